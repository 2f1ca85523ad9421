"""The page: tables of what was measured, and what became of the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.operators import PRODUCT
from benchmarks.peers.targets import Verdict
from pipeline.measure.statistics import Interval

DASH = "–"

LEAST_SHARE = 0.01
"""Of a call's time; operators with less are shown together."""


@dataclass(frozen=True)
class Row:
    """What is known of one candidate."""

    name: str
    is_ours: bool
    prefill: Interval | None = None
    decode: Interval | None = None
    prefill_ratio: Interval | None = None
    """Our best artifact's speed over this one's."""
    decode_ratio: Interval | None = None
    first_divergence: float | None = None
    following_divergence: float | None = None
    agreement: float | None = None
    memory_bytes: int | None = None
    load_s: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class ConversionRow:
    """What one conversion took."""

    name: str
    is_ours: bool
    wall_s: float
    processor_s: float
    peak_memory_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class QualityRow:
    """One candidate's quality on a trained model."""

    name: str
    first_divergence: float | None = None
    following_divergence: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Page:
    """All that the page says."""

    best: str
    model: str
    date: str
    host: str
    how: Sequence[str]
    rows: Sequence[Row]
    noise: Mapping[str, Interval]
    bandwidth: Interval
    conversions: Sequence[ConversionRow]
    stages: Sequence[tuple[str, float, int]]
    """Of our best artifact's conversion: stage, seconds, bytes of memory at its highest."""
    trained: Sequence[QualityRow]
    trained_prompts: str
    """What was scored on the trained model."""
    verdicts: Sequence[Verdict]
    remarks: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds of a call of our best artifact by operator, for each kind of call."""
    product_bytes: int = 0
    """Of the quantized weights that one step of decode reads."""


def render(page: Page) -> str:
    """The page as Markdown."""
    parts = [
        "# Beside other tools",
        "",
        f"{page.model} Measured on {page.date} on {page.host} by `python benchmarks/peers.py`, which writes this page.",
        "",
        *[line for paragraph in page.how for line in (paragraph, "")],
        "## Targets",
        "",
        *table(
            ("target", "met", "measured"),
            [(v.target, "yes" if v.met else "**no**", v.why) for v in page.verdicts],
            numbers=0,
        ),
        *[line for remark in page.remarks for line in ("", remark)],
        "",
        *_operators(page),
        "## Speed and divergence",
        "",
        f"Tokens per second with 95 % intervals; `{page.best} ×` is how many times as fast {page.best} is.",
        "",
        *table(
            ("", "prefill", f"{page.best} ×", "decode", f"{page.best} ×", "KL first token", "KL following", "top-1"),
            [_speed_row(row, page.best) for row in page.rows],
        ),
        "",
        *[
            f"{kind}: {page.best} against itself {interval.low:.3f}–{interval.high:.3f}."
            for kind, interval in page.noise.items()
        ],
        f"Read bandwidth before each round: median {page.bandwidth.median:.0f} GB/s, from {page.bandwidth.low:.0f} to "
        f"{page.bandwidth.high:.0f}.",
        "",
        "Memory while running is anonymous and shared memory; weights that stay mapped from their file, as this "
        "project's do, are not in it.",
        "",
        "| | memory while running | load |",
        "| --- | ---: | ---: |",
        *[
            f"| {row.name} | {_gigabytes(row.memory_bytes)} | {_or_dash(row.load_s, '{:.1f} s')} |"
            for row in page.rows
            if row.failure is None
        ],
        "",
        "## Conversion",
        "",
        "From the checkpoint in float32 to what the tool runs, in a process of its own, its start included. Memory is "
        "anonymous and shared memory of the process and its descendants at its highest. The machine is shared: seconds "
        "of a processor say what a conversion itself takes. `written` has the store, too, where a tool keeps one.",
        "",
        *table(
            ("", "seconds", "of a processor", "peak memory", "written"),
            [
                (
                    r.name,
                    f"{r.wall_s:.1f}",
                    f"{r.processor_s:.1f}",
                    _gigabytes(r.peak_memory_bytes),
                    _gigabytes(r.size_bytes),
                )
                for r in page.conversions
            ],
        ),
        "",
        f"The stages of {page.best}, each in a process of its own; what is left of its seconds are starts, digests and "
        "the copy that is exported.",
        "",
        *table(
            ("stage", "seconds", "peak memory"),
            [(name, f"{seconds:.1f}", _gigabytes(peak)) for name, seconds, peak in page.stages],
        ),
        "",
        "## The same on a trained model",
        "",
        "`llama2-tiny`, 5.9 million parameters trained on English text, on its held-out text, scored in the same way: "
        f"{page.trained_prompts}.",
        "",
        *table(
            ("", "KL first token", "KL following", "top-1", "perplexity"),
            [_quality_row(row) for row in page.trained],
        ),
        "",
    ]
    if page.missing:
        parts += ["## Left out", "", *[f"- {name}: {why}" for name, why in page.missing.items()], ""]
    parts += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in page.versions.items()) + ".", ""]
    return "\n".join(parts)


def _operators(page: Page) -> list[str]:
    """Where the time of our best artifact goes."""
    if not page.operators:
        return []
    lines = [
        "### Where the time goes",
        "",
        f"Of {page.best}, by operator: shares of the medians of the nodes' times in ONNX Runtime's profiler.",
        "",
    ]
    shares = {
        kind: {name: took / sum(seconds.values()) for name, took in seconds.items()}
        for kind, seconds in page.operators.items()
    }
    for kind, found in shares.items():
        shown = {name: share for name, share in found.items() if share >= LEAST_SHARE}
        shown["all others"] = 1 - sum(shown.values())
        lines += [*table((kind, "share"), [(name, f"{share:.1%}") for name, share in shown.items()]), ""]
    decode = next((row.decode for row in page.rows if row.name == page.best), None)
    share = shares.get("decode", {}).get(PRODUCT)
    if share and decode and page.product_bytes:
        rate = page.product_bytes / (share / decode.median) / 1e9
        lines += [
            f"At that share of a step, {PRODUCT} reads its {page.product_bytes / 1e6:.0f} MB of weights and scales at "
            f"{rate:.0f} GB/s in the rounds below; before them memory was read at {page.bandwidth.median:.0f} GB/s.",
            "",
        ]
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int | None = None) -> list[str]:
    """A Markdown table; all columns but the first are numbers, or the last `numbers`."""
    count = len(header) - 1 if numbers is None else numbers
    align = ["---"] * (len(header) - count) + ["---:"] * count
    return [f"| {' | '.join(cells)} |" for cells in (header, align, *rows)]


def _speed_row(row: Row, best: str) -> tuple[str, ...]:
    name = f"**{row.name}**" if row.is_ours else row.name
    if row.failure is not None:
        return (name, *["failed"] * 7)
    return (
        name,
        _interval(row.prefill, "{:.0f}"),
        DASH if row.name == best else _interval(row.prefill_ratio, "{:.2f}"),
        _interval(row.decode, "{:.1f}"),
        DASH if row.name == best else _interval(row.decode_ratio, "{:.2f}"),
        _or_dash(row.first_divergence, "{:.2g}"),
        _or_dash(row.following_divergence, "{:.2g}"),
        _or_dash(row.agreement, "{:.1%}"),
    )


def _quality_row(row: QualityRow) -> tuple[str, ...]:
    if row.failure is not None:
        return (row.name, *["failed"] * 4)
    return (
        row.name,
        _or_dash(row.first_divergence, "{:.2g}"),
        _or_dash(row.following_divergence, "{:.2g}"),
        _or_dash(row.agreement, "{:.1%}"),
        _or_dash(row.perplexity, "{:.3f}"),
    )


def _interval(interval: Interval | None, pattern: str) -> str:
    if interval is None:
        return DASH
    return f"{pattern.format(interval.median)} ({pattern.format(interval.low)}–{pattern.format(interval.high)})"


def _or_dash(value: float | None, pattern: str) -> str:
    return DASH if value is None else pattern.format(value)


def _gigabytes(size_bytes: int | None) -> str:
    return DASH if size_bytes is None else f"{size_bytes / 1e9:.2f} GB"
