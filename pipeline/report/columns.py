"""Tables for a terminal of any width: no figure and no word is broken, and what has no room side by side goes below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

GAP = 3
"""Characters between two columns."""

LONGEST_WORD = 24
"""A longer one in running text may be broken."""


@dataclass
class Column:
    """A header and its cells, as rich's markup.

    A figure keeps its line, and so does what is `left`, at the other side; words may be wrapped between each other.
    """

    header: str
    kind: Literal["figure", "left", "words"] = "figure"
    cells: list[str] = field(default_factory=list)

    def least_width(self) -> int:
        """Characters without which something would be broken; a header may be, between its words."""
        words = [len(word) for word in self.header.split(" ")]
        for cell in self.cells:
            plain = Text.from_markup(cell).plain
            if self.kind != "words":
                words += map(len, plain.splitlines())
            else:
                words += [min(len(word), LONGEST_WORD) for word in plain.split()]
        return max(words, default=1)


def name_lines(name: str, room: int) -> str:
    """A name, escaped, in lines of at most `room` characters, broken behind underscores where it has any."""
    lines = [""]
    for part in name.replace("_", "_\0").split("\0"):
        if len(lines[-1]) + len(part) > room and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(escape(piece) for line in lines for piece in textwrap.wrap(line, room) or [""])


def table(columns: Sequence[Column], width: int) -> RenderableType:
    """The columns side by side; those for which there is no room in further tables below, with the first one again."""
    first, *others = columns
    blocks: list[list[Column]] = [[first]]
    for column in others:
        taken = sum(c.least_width() + GAP for c in blocks[-1])
        if len(blocks[-1]) > 1 and taken + column.least_width() > width:
            blocks.append([first])
        blocks[-1].append(column)
    drawn = [_draw(block, width) for block in blocks]
    return Group(*[part for one in drawn for part in (Text(""), one)][1:])


def _draw(columns: Sequence[Column], width: int) -> Table:
    whole = sum(max(c.least_width(), len(c.header)) for c in columns) + GAP * (len(columns) - 1) <= width
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        keeps = column.kind != "words"
        header = column.header
        if keeps and not whole:
            header = "\n".join(textwrap.wrap(header, column.least_width()))
        right = column.kind == "figure" and i > 0
        drawn.add_column(escape(header), justify="right" if right else "left", no_wrap=keeps, overflow="fold")
    for row in zip(*(c.cells for c in columns), strict=True):
        drawn.add_row(*row)
    return drawn
