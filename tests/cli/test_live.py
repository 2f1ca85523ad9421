"""What a run says while it works, where no terminal redraws it."""

from __future__ import annotations

import io

from rich.console import Console

from pipeline.cli.live import SILENCE_S, LiveDisplay


def test_a_long_measurement_says_now_and_then_where_it_is() -> None:
    text, now = io.StringIO(), [0.0]
    with LiveDisplay(Console(file=text, width=100), clock=lambda: now[0]) as display:
        display.measuring("speed, 0% starting 3 processes")
        for seconds, message in [(1, "1% round 1"), (SILENCE_S - 1, "2% round 2"), (SILENCE_S + 5, "3% round 3")]:
            now[0] = seconds
            display.measuring(f"speed, {message}")
        now[0] += 1
        display.measuring("quality of [int4], 5%")
    assert text.getvalue().splitlines() == [
        "measuring: speed, 0% starting 3 processes",
        "measuring: speed, 3% round 3",
        "measuring: quality of [int4], 5%",
    ]
