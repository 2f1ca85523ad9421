"""The page's contents, out of what the steps have kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import targets
from benchmarks.peers.candidates import ALONE, BEST, FP32, NEW_TOKENS, OURS, PROMPT, Candidate
from benchmarks.peers.converting import RECORD, Converted
from benchmarks.peers.measuring import POINTS, SCORED, Quality, speed_ratios
from benchmarks.peers.ours import exported
from benchmarks.peers.page import ConversionRow, Page, QualityRow, Row
from pipeline.hardware.host import Host
from pipeline.measure.samples import Sample
from pipeline.measure.scoring import Scored
from pipeline.measure.statistics import Interval, speed_figures


@dataclass(frozen=True)
class Kept:
    """What the steps have left: their results as they were written, and where the conversions lie."""

    candidates: Sequence[Candidate]
    speed: dict[str, Any]
    large: dict[str, Any]
    tiny: dict[str, Any]
    operators: dict[str, Any]
    work: Path
    """The folder of the large model: its checkpoint and conversions."""


def gather(kept: Kept, host: Host, *, threads: int) -> Page:
    """All that the page says."""
    samples = [Sample.model_validate(fields) for fields in kept.speed["samples"]]
    rows = _rows(kept, samples)
    conversions = _conversions(kept)
    rates = sorted(kept.speed["bandwidth_gb_per_s"])
    best = next(c.conversion for c in kept.candidates if c.name == BEST and c.conversion is not None)
    figures = speed_figures(samples, baseline=BEST, parents={BEST: None})
    return Page(
        best=BEST,
        model=_model(kept.work / "checkpoint"),
        date=kept.speed["date"],
        host=f"{host.cpu_model}, {threads} threads",
        how=_how(kept.speed, len({sample.round for sample in samples})),
        rows=rows,
        noise={
            floor.kind: Interval(median=1.0, low=floor.ratio_low, high=floor.ratio_high)
            for floor in figures.noise_floor
        },
        bandwidth=Interval(median=rates[len(rates) // 2], low=rates[0], high=rates[-1]),
        conversions=conversions,
        stages=_stages(kept.work / best.folder),
        trained_prompts="{} prompts, of which {} are continued".format(*SCORED["tiny"]),
        trained=[_quality_row(candidate, kept.tiny) for candidate in kept.candidates],
        verdicts=_verdicts(rows, conversions),
        remarks=[*_remarks(rows), *_remarks_on_trained(rows, kept.tiny)],
        missing={
            **{name: f"its divergence: {why}" for name, why in kept.large["failures"].items()},
            **kept.speed["failures"],
        },
        versions={**kept.large["versions"], "Python": ".".join(map(str, sys.version_info[:3]))},
        operators=kept.operators["seconds"],
        product_bytes=kept.operators["product_bytes"],
    )


def _rows(kept: Kept, samples: Sequence[Sample]) -> list[Row]:
    names = [candidate.name for candidate in kept.candidates]
    figures = speed_figures(samples, baseline=BEST, parents=dict.fromkeys(names))
    ratios = speed_ratios(samples, [name for name in names if name != BEST])
    rows = []
    for candidate in kept.candidates:
        name = candidate.name
        at = {point.kind: point.tokens_per_s for point in figures.stages.get(name, ())}
        over = {
            point.kind: Interval(median=ratio.ratio, low=ratio.low, high=ratio.high)
            for point in POINTS
            if (ratio := ratios.get((name, point))) is not None
        }
        fields = kept.large["quality"].get(name)
        quality = quality_of(fields) if fields else None
        rows.append(
            Row(
                name=name,
                is_ours=candidate.is_ours,
                prefill=at.get("prefill"),
                decode=at.get("decode"),
                prefill_ratio=over.get("prefill"),
                decode_ratio=over.get("decode"),
                first_divergence=quality.first.kl_divergence if quality else None,
                following_divergence=quality.following.kl_divergence if quality else None,
                agreement=quality.following.top1_agreement if quality else None,
                memory_bytes=kept.speed["memory_bytes"].get(name),
                load_s=kept.speed["load_s"].get(name),
                failure=kept.speed["failures"].get(name),
            )
        )
    return rows


def _conversions(kept: Kept) -> list[ConversionRow]:
    named = {c.conversion: c.name for c in reversed(kept.candidates) if c.conversion is not None}
    rows = []
    for conversion, name in [*reversed(named.items()), *((made, name) for name, made in ALONE.items())]:
        record = kept.work / conversion.folder / RECORD
        made = Converted(**json.loads(record.read_text())) if record.exists() else None
        if made is not None and made.error is None:
            rows.append(
                ConversionRow(
                    name,
                    conversion.environment == OURS,
                    made.wall_s,
                    made.processor_s,
                    made.peak_memory_bytes,
                    made.size_bytes,
                )
            )
    return rows


def _stages(folder: Path) -> list[tuple[str, float, int]]:
    """The stages of the run in `folder`, a conversion of ours, with their costs."""
    report = json.loads((exported(folder).parent / "report.json").read_text())
    made = [stage for stage in report["stages"] if stage["status"] == "ran" and stage["cost"]["peak_memory_bytes"]]
    return [(stage["name"], stage["cost"]["wall_s"], stage["cost"]["peak_memory_bytes"]) for stage in made]


def _quality_row(candidate: Candidate, tiny: dict[str, Any]) -> QualityRow:
    name = candidate.name
    if name not in tiny["quality"]:
        return QualityRow(name, failure=tiny["failures"].get(name, "not scored"))
    quality = quality_of(tiny["quality"][name])
    return QualityRow(
        name,
        first_divergence=quality.first.kl_divergence,
        following_divergence=quality.following.kl_divergence,
        agreement=quality.following.top1_agreement,
        perplexity=quality.perplexity,
    )


def quality_fields(quality: Quality) -> dict[str, Any]:
    return {
        "first": quality.first.model_dump(),
        "following": quality.following.model_dump(),
        "perplexity": quality.perplexity,
    }


def quality_of(fields: dict[str, Any]) -> Quality:
    return Quality(
        Scored.model_validate(fields["first"]), Scored.model_validate(fields["following"]), fields["perplexity"]
    )


def _model(checkpoint: Path) -> str:
    config = json.loads((checkpoint / "config.json").read_text())
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return (
        f"A Llama of {size / 4e9:.1f} billion parameters: {config['num_hidden_layers']} layers, hidden "
        f"{config['hidden_size']}, intermediate {config['intermediate_size']}, {config['num_attention_heads']} heads, "
        f"{config['num_key_value_heads']} of keys and values, vocabulary {config['vocab_size']:,}; random weights with "
        f"outlier channels, a checkpoint of {size / 1e9:.1f} GB in float32."
    )


def _remarks_on_trained(rows: Sequence[Row], tiny: dict[str, Any]) -> list[str]:
    """How the divergences compare on the trained model, ours and that of the peer which each target is set against."""
    found = []
    for kind, what in (("prefill", "first"), ("decode", "following")):
        peers = _peers(rows, kind)
        name = max(peers, key=lambda peer: peer.tokens_per_s).name if peers else ""
        if BEST in tiny["quality"] and name in tiny["quality"]:
            own, other = (tiny["quality"][who][what]["kl_divergence"] for who in (BEST, name))
            found.append(
                f"{kind.capitalize()} on the trained model: divergence {own:.2g} against {other:.2g} of {name}, "
                f"{'no larger' if own <= other else f'{own / other:.2f} times as large'}."
            )
    return found


def _how(speed: dict[str, Any], rounds: int) -> list[str]:
    prompts, continued = SCORED["large"]
    return [
        f"Prompts of {PROMPT} tokens, then {NEW_TOKENS} single tokens, batch 1, all of them fed: every candidate "
        f"computes the same tokens. Each runs in a process of its own, idle while another runs; {rounds} rounds in "
        f"{speed['launches']} launches, the order drawn anew, blocks, visits and intervals as in "
        f"[measurement](measurement.md). The whole took {speed['wall_s'] / 60:.0f} minutes.",
        f"Divergence is the mean KL (nats) from {FP32.name} on the same tokens, as the model is used: the first token "
        f"after each of {prompts} prompts, which prefill predicts, and the {NEW_TOKENS} tokens after that of "
        f"{continued} of them, which steps of decode predict. Log-probabilities are compared in float16, which "
        "resolves about 1e-6. `top-1` is the share of the following tokens with the same most likely token.",
    ]


def _peers(rows: Sequence[Row], kind: str) -> list[targets.Peer]:
    divergence = {"prefill": "first_divergence", "decode": "following_divergence"}[kind]
    return [
        targets.Peer(row.name, speed.median, ratio, getattr(row, divergence))
        for row in rows
        if not row.is_ours
        and (speed := getattr(row, kind)) is not None
        and (ratio := getattr(row, f"{kind}_ratio")) is not None
    ]


def _verdicts(rows: Sequence[Row], conversions: Sequence[ConversionRow]) -> list[targets.Verdict]:
    best = next(row for row in rows if row.name == BEST)
    found = []
    if peers := _peers(rows, "prefill"):
        found.append(targets.judge_speed("prefill", peers, best.first_divergence))
        found.append(targets.judge_speed("decode", _peers(rows, "decode"), best.following_divergence))
    others = [conversion for conversion in conversions if not conversion.is_ours]
    if not others:
        return found
    seconds = {c.name: c.wall_s for c in others}
    gigabytes = {c.name: c.peak_memory_bytes / 1e9 for c in others}
    for own in conversions:
        if own.is_ours:
            spent, held = f"seconds of {own.name}", f"memory of {own.name}"
            found += [
                targets.judge_conversion(spent, own.wall_s, seconds, share=targets.TIME_SHARE, unit="s"),
                targets.judge_conversion(
                    held, own.peak_memory_bytes / 1e9, gigabytes, share=targets.MEMORY_SHARE, unit="GB"
                ),
            ]
    return found


def _remarks(rows: Sequence[Row]) -> list[str]:
    best = next(row for row in rows if row.name == BEST)
    found = [
        targets.judge_worse("prefill", _peers(rows, "prefill"), best.first_divergence),
        targets.judge_worse("decode", _peers(rows, "decode"), best.following_divergence),
    ]
    return [f"{remark[0].upper()}{remark[1:]}." for remark in found if remark]
