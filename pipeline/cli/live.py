"""The display while a run works: a live line per stage in a terminal, plain lines elsewhere. It writes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from pipeline.events import Events
from pipeline.execute import StageResult
from pipeline.plan import Plan
from pipeline.report.figures import megabytes
from pipeline.report.terminal import STYLES

SILENCE_S = 60.0
"""Where lines are kept, in the log of a nightly run, a long measurement says where it is so often."""


class LiveDisplay(Events):
    """Shows where a run is."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._told = clock()
        self._rows: dict[str, str] = {}
        self._current: str | None = None
        self._message = ""
        self._began = time.monotonic()
        self._measuring = ""
        self._live = Live(console=self._console, refresh_per_second=8, transient=True, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def note(self, message: str) -> None:
        self._console.print(f"note: {escape(message)}", soft_wrap=True)

    def plan_made(self, plan: Plan) -> None:
        self._rows = {stage.name: "" for stage in plan.stages}

    def stage_started(self, name: str) -> None:
        self._current, self._message, self._began = name, "", time.monotonic()

    def stage_progress(self, name: str, fraction: float, message: str) -> None:
        self._message = f"{fraction:4.0%} {message}"

    def stage_ended(self, result: StageResult) -> None:
        self._current = None
        style = STYLES.get(result.status, "default")
        words = f"[{style}]{result.status}[/]"
        if result.status == "ran":
            words += f" in {result.cost.wall_s or 0:.1f} s"
            if result.cost.peak_memory_bytes:
                words += f", peak {megabytes(result.cost.peak_memory_bytes)}"
        if result.reason:
            words += f": {escape(result.reason)}"
        self._rows[result.name] = words
        if not self._live.is_started:
            self._console.print(f"{result.name}: {words}", soft_wrap=True)

    def measuring(self, message: str) -> None:
        if self._live.is_started:
            # A display that refreshes itself would take processor time from what is being measured: from here on it
            # is drawn only between blocks
            if self._live.auto_refresh:
                self._live.stop()
                self._live = Live(
                    console=self._console, auto_refresh=False, transient=True, get_renderable=self._render
                )
                self._live.start()
            self._measuring = message
            self._live.refresh()
            return
        changed = message.partition(",")[0] != self._measuring.partition(",")[0]
        self._measuring = message
        if changed or self._clock() - self._told >= SILENCE_S:
            self._told = self._clock()
            self._console.print(f"measuring: {escape(message)}", soft_wrap=True)

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, words in self._rows.items():
            if name == self._current:
                elapsed = time.monotonic() - self._began
                table.add_row(name, Spinner("dots", f"{elapsed:.0f} s {escape(self._message)}"))
            else:
                table.add_row(name, words or "[dim]waits[/]")
        if self._measuring:
            table.add_row("measuring", Spinner("dots", escape(self._measuring)))
        return table
