"""A comparison of two runs as Markdown in GitHub's dialect."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report import comparison_words as words
from pipeline.report.comparison import Comparison
from pipeline.report.markdown import code, plain, table
from pipeline.report.points import point_in_words
from pipeline.report.printable import without_controls


def render_comparison_markdown(comparison: Comparison) -> str:
    """The whole page."""
    comparison = without_controls(comparison)
    parts = [_head(comparison), _speed(comparison), _others(comparison), _where(comparison)]
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part) + "\n"


def _head(comparison: Comparison) -> Iterator[str]:
    a, b = (f"{plain(run.recipe)} {plain(run.run)}" for run in (comparison.a, comparison.b))
    yield f"# {a} and {b}"
    if comparison.forced:
        yield "\n> **These runs are not comparable; they were measured because of --force.**"
        for unlike in comparison.forced:
            yield f"> - {plain(words.difference_in_words(unlike))}"
    yield ""
    for line in words.headline(comparison):
        yield f"- {plain(line)}"
    yield f"\n{plain(words.schedule_in_words(comparison))}"
    for note in comparison.notes:
        yield f"\n> {plain(note)}"


def _speed(comparison: Comparison) -> Iterator[str]:
    yield "## Speed of RUN_B over RUN_A\n"
    rows = []
    for stage in comparison.stages:
        for point in stage.speed:
            ratio, interval = words.ratio_in_words(point, comparison)
            a, b = words.times_of(point)
            work = plain(point_in_words(point))
            says = plain(words.claim(point, stage))
            rows.append((plain(stage.name), work, a, b, ratio, interval, says, words.basis(point)))
        if not stage.speed:
            rows.append((plain(stage.name), "–", "–", "–", "–", "", plain(f"{stage.status}: {stage.reason}"), ""))
    header = ("stage", "work", ">time, A", ">time, B", ">B over A", ">95 %", "verdict", "from")
    yield from table(header, rows)
    if floors := words.floors_in_words(comparison):
        yield f"\nThe baseline against itself: {plain('; '.join(floors))}. No claim is made inside that."


def _others(comparison: Comparison) -> Iterator[str]:
    yield "## Artifacts and quality\n"
    rows = []
    for stage in comparison.stages:
        ratio, says = words.quality_in_words(stage)
        rows.append(
            (plain(stage.name), plain(words.artifact_in_words(stage)), ratio, plain(says), plain(stage.reason or ""))
        )
    yield from table(("stage", "artifact", ">perplexity, B over A", "from the two reports", "note"), rows)
    for which, names in (("RUN_A", comparison.only_in_a), ("RUN_B", comparison.only_in_b)):
        if names:
            yield f"\nOnly in {which}: {plain(', '.join(names))}."


def _where(comparison: Comparison) -> Iterator[str]:
    yield "## Where it ran\n"
    rows = [
        (which, code(run.folder, in_table=True), plain(run.model), plain(run.host), plain(run.created))
        for which, run in (("RUN_A", comparison.a), ("RUN_B", comparison.b))
    ]
    yield from table(("", "folder", "model", "measured on", "at"), rows)
    threads = " and ".join(map(str, dict.fromkeys(comparison.threads)))
    host = plain(comparison.host.get("cpu_model"))
    yield f"\nMeasured again on {host}, {threads} threads, {plain(comparison.created)}."
