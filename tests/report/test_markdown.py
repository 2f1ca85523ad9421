"""report.md is what GitHub shows as tables and sentences, whatever strangers wrote into a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from every_case import rich_report

from pipeline.report.markdown import block, code, plain, render_markdown
from pipeline.report.schema import Report
from pipeline.report.words import headline

GOLDEN = Path(__file__).parent / "golden.md"


def outside_code(text: str) -> str:
    """The page without its fenced blocks and code spans."""
    text = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def test_the_page_says_what_it_said_before(report: Report) -> None:
    """After a change that is meant: write render_markdown(report) to golden.md, and look at the difference."""
    assert render_markdown(report) == GOLDEN.read_text()


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    lines = render_markdown(rich_report()).splitlines()
    tables = 0
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|( -+:? \|)+", line):
            tables += 1
            width = len(re.findall(r"(?<!\\)\|", line))
            for row in (lines[i - 1], *_rows_after(lines, i)):
                assert len(re.findall(r"(?<!\\)\|", row)) == width, row
    assert tables == 15


def _rows_after(lines: list[str], i: int) -> list[str]:
    rows = []
    for line in lines[i + 1 :]:
        if not line.startswith("|"):
            break
        rows.append(line)
    return rows


def test_hostile_words_become_no_markup() -> None:
    text = outside_code(render_markdown(rich_report()))
    assert "<script" not in text
    assert "<img" not in text
    assert "http://" not in text
    assert re.search(r"(?<!\\)!?\[", text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", "a\\|b"),
        ("# no title", "\\# no title"),
        ("- no list", "\\- no list"),
        ("*loud* [link](x)", "\\*loud\\* \\[link\\](x)"),
        ("<b>", "&lt;b&gt;"),
        ("two\nlines", "two lines"),
        ("int4_block is a_name_", "int4_block is a_name\\_"),
        ("@someone", "&#64;someone"),
    ],
)
def test_a_strangers_words_are_plain(text: str, expected: str) -> None:
    assert plain(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a|b", "`a|b`")])
def test_code_cannot_close_its_own_fence(text: str, expected: str) -> None:
    assert code(text) == expected


def test_code_in_a_table_does_not_split_its_cell() -> None:
    assert code("a|b", in_table=True) == "`a\\|b`"


def test_a_block_cannot_close_its_own_fence() -> None:
    assert block("```\nx") == "````text\n```\nx\n````"


def test_the_headline_and_every_stage_are_told() -> None:
    report = rich_report()
    text = render_markdown(report)
    for line in headline(report):
        assert plain(line) in text
    for stage in report.stages:
        assert f"### {plain(stage.name)}" in text
    assert "**BROKEN**" in text


def test_a_figure_of_the_host_is_never_the_targets() -> None:
    assert "target i7-1165g7. No measured figure here is one of the target." in render_markdown(rich_report())
