"""The terminal shows the report at every width, and breaks no name in the middle of a word."""

from __future__ import annotations

import io
import re

import pytest
from every_case import LONG, forward_report, rich_report
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.report.columns import Column, name_lines, table
from pipeline.report.terminal import render_text

WIDTHS = (72, 80, 100, 120, 160)


@pytest.mark.parametrize("width", WIDTHS)
def test_names_are_broken_behind_underscores_alone(width: int) -> None:
    lines = render_text(rich_report(), width).splitlines()
    starts = [line.split()[0] for line in lines if line[:1].strip("─")]
    pieces = [piece for piece in starts if 3 < len(piece) <= width // 4 and "_" in piece and piece in LONG]
    assert len(pieces) >= 10
    assert all(set(piece.strip("_").split("_")) <= set(LONG.split("_")) for piece in pieces)
    assert not [line for line in lines if line.startswith(("_", "int8_s ", "garbag "))]


@given(st.lists(st.text("ab_", min_size=1, max_size=30), min_size=1, max_size=4), st.integers(6, 40))
def test_a_name_keeps_its_letters_and_its_room(parts: list[str], room: int) -> None:
    name = "_".join(parts)
    lines = name_lines(name, room).split("\n")
    assert "".join(lines) == name
    assert all(len(line) <= room for line in lines)


def test_columns_without_room_stand_in_a_table_below() -> None:
    columns = [Column("stage", cells=["a"]), *(Column(f"c{i}", cells=["1,234.5 MB"]) for i in range(5))]
    console = Console(file=io.StringIO(), width=40, color_system=None)
    console.print(table(columns, 40))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("1,234.5 MB") == 5
    assert shown.count("stage") == 3
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 40


@pytest.mark.parametrize("width", WIDTHS)
def test_every_point_has_its_table_and_no_line_is_too_long(width: int) -> None:
    text = render_text(rich_report(), width)
    assert len(re.findall(r"^(decode|prefill) of \d+ tokens", text, re.MULTILINE)) == 5
    assert max(map(len, text.splitlines())) <= width


def test_a_narrow_terminal_has_the_same_figures() -> None:
    wide, narrow = render_text(rich_report(), 140), render_text(rich_report(), 80)
    figures = re.findall(r"\d\.\d+–\d\.\d+", wide)
    assert len(figures) > 60
    assert [f for f in set(figures) if f not in narrow] == []


def test_the_schedule_and_the_note_on_ratios_stand_with_the_speeds() -> None:
    text = " ".join(render_text(rich_report()).split())
    assert "30 rounds in 6 launches; looked after 12 and 30 of 12, 30, 80, 200 rounds" in text
    assert "A ratio is the median of the ratios within each round" in text


def test_whole_passes_are_told_by_their_time() -> None:
    text = render_text(forward_report())
    assert "forward pass of 1024 tokens, batch 2" in text
    assert re.search(r"export_onnx +45,110 +45.4 ms +44.9–45.9 ms", text)


def test_random_weights_have_no_perplexity_column_and_no_held_out_tokens() -> None:
    text = render_text(forward_report())
    assert "agreement with export_onnx on 19,999 tokens (random weights: perplexity means nothing)" in text
    assert "held-out" not in text
    assert re.search(r"^stage +KL +top-1 +verdict", text, re.MULTILINE)


def test_outliers_contradictions_and_flags_stand_beside_the_verdict() -> None:
    text = " ".join(render_text(rich_report(), 160).split())
    assert "contradiction: it changed nothing" in text
    assert "slower, kernel not engaged" in text
    assert "blocks far from the others, which count all the same: " in text
    assert "on_a_phone 2 of 30" in text.replace("_ ", "_")


def test_the_reason_stands_beside_the_verdict() -> None:
    assert "degraded: perplexity 1.072 times the baseline's: beyond 1.01" in " ".join(
        render_text(rich_report(), 160).split()
    )
