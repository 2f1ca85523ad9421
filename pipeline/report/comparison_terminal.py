"""A comparison of two runs as tables in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.report import comparison_words as words
from pipeline.report.comparison import Comparison
from pipeline.report.points import point_in_words
from pipeline.report.printable import without_controls
from pipeline.report.terminal import STYLES


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Print all of it."""
    comparison = without_controls(comparison)
    for unlike in comparison.forced:
        console.print(f"[bold red]not comparable[/] {escape(words.difference_in_words(unlike))}", soft_wrap=True)
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(words.schedule_in_words(comparison), markup=False)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("stage", "work"):
        table.add_column(column, overflow="fold")
    for column in ("time, A", "time, B", "B over A", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for stage in comparison.stages:
        for point in stage.speed:
            ratio, interval = words.ratio_in_words(point, comparison)
            style = STYLES.get(words.shown_verdict(point, stage), "default") if point.ratio else "yellow"
            says = f"[{style}]{escape(words.claim(point, stage))}[/]"
            a, b = words.times_of(point)
            table.add_row(escape(stage.name), point_in_words(point), a, b, ratio, interval, says)
        if not stage.speed:
            table.add_row(escape(stage.name), "–", "–", "–", "–", "–", escape(f"{stage.status}: {stage.reason}"))
    console.print(table)
    console.print()
    for stage in comparison.stages:
        ratio, says = words.quality_in_words(stage)
        told = f"{stage.name}: {words.artifact_in_words(stage)}; perplexity {ratio} ({says})"
        console.print(told, markup=False, soft_wrap=True)
    for which, names in (("RUN_A", comparison.only_in_a), ("RUN_B", comparison.only_in_b)):
        if names:
            console.print(f"only in {which}: {', '.join(names)}", markup=False, soft_wrap=True)
    console.print()
    for line in words.headline(comparison):
        console.print(line, markup=False, soft_wrap=True)
