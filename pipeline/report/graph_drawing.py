"""The changed region of a graph, before and after, as drawings for HTML and as text for a terminal.

A node is a row, in the order of computation, and its inputs are lines at the left: rows can be read on a phone, and do
not overlap however branched the graph is. What is gone, new or rewired has a sign and a word beside its colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pipeline.report.schema import Region, RegionNode

ROW = 24
LANE = 12
TEXT = 13
NARROWEST = 340
CHARACTER = 7.9
"""Width of a monospaced character of size 13, rounded up."""

LONGEST = 46
"""Characters of a row; what is longer is cut, and whole in the row's title."""

MICROSOFT = "com.microsoft."
"""Left out in drawings, where room is short; the title of the row has it."""

SIGNS = {"kept": " ", "gone": "-", "new": "+", "rewired": "~"}

STYLE = """
.region { display: flex; flex-wrap: wrap; gap: 8px 24px; }
.region figure { margin: 0; flex: 1 1 340px; min-width: 0; max-width: 560px; }
.region figcaption { font-size: 13px; margin-bottom: 2px; color: var(--soft, #55626f); }
.region svg { display: block; width: 100%; height: auto; }
.region text { font: 13px ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; fill: var(--ink, #16202a); }
.region .kept text { fill: var(--soft, #55626f); }
.region .gone text { fill: var(--bad, #a8410a); }
.region .new text { fill: var(--good, #006d4e); }
.region .rewired text { fill: var(--unsure, #7a5b00); }
.region .edge { fill: none; stroke: var(--soft, #55626f); stroke-width: 1.2; opacity: 0.7; }
.region circle { fill: var(--soft, #55626f); }
.region .gone circle { fill: var(--bad, #a8410a); }
.region .new circle { fill: var(--good, #006d4e); }
.region .rewired circle { fill: var(--unsure, #7a5b00); }
""".strip()
"""For a page that holds any number of drawings. Colours are the report's own, with its light ones as the default."""


def draw(region: Region) -> str:
    """An HTML element with two SVG drawings, side by side where there is room. Needs STYLE once on its page."""
    sides = (("before", region.before), ("after", region.after))
    width = max(_least_width(rows) for _, rows in sides)  # the same for both, so that their texts are of one size
    figures = "".join(
        f"<figure><figcaption>{title}: {_counted(rows)}</figcaption>"
        f"{_svg(rows, f'{region.where}, {title}', width)}</figure>"
        for title, rows in sides
    )
    return f'<div class="region">{figures}</div>'


def caption(region: Region) -> str:
    """What is drawn, in a line."""
    words = region.where
    if region.alike > 1:
        words += f", one of {region.alike} that changed alike"
    if region.left_out:
        words += f"; {region.left_out} further nodes are not shown"
    return words


def as_text(region: Region) -> str:
    """Both lists below each other: sign, number, operator, detail, and the numbers of the nodes that it takes from."""
    lines = [caption(region)]
    for title, rows in (("before", region.before), ("after", region.after)):
        lines.append(f"  {title}")
        numbers = {row.id: number for number, row in enumerate(rows, 1)}
        for row in rows:
            takes = ", ".join(str(numbers[source]) for source in row.inputs if source in numbers)
            lines.append(
                f"  {SIGNS[row.change]} {numbers[row.id]:>3} {_label(row)}" + (f"  <- {takes}" if takes else "")
            )
    return "\n".join(lines)


def _counted(rows: Sequence[RegionNode]) -> str:
    words = [f"{count} {change}" for change in ("gone", "new", "rewired") if (count := _count(rows, change))]
    return ", ".join(words) if words else "nothing changed here"


def _count(rows: Sequence[RegionNode], change: str) -> int:
    return sum(1 for row in rows if row.change == change)


def _label(row: RegionNode) -> str:
    return f"{row.operator} {row.detail}".rstrip()


def _edges(rows: Sequence[RegionNode]) -> tuple[list[tuple[int, int]], dict[tuple[int, int], int]]:
    """(edges as pairs of rows, the lanes of those that pass by other rows)."""
    place = {row.id: number for number, row in enumerate(rows)}
    edges = sorted({(place[s], place[row.id]) for row in rows for s in row.inputs if s in place}, key=_span)
    return edges, _lanes([edge for edge in edges if _span(edge) > 1])


def _shown(row: RegionNode) -> str:
    text = f"{SIGNS[row.change]} {_label(row).removeprefix(MICROSOFT)}"
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _left(lanes: dict[tuple[int, int], int]) -> int:
    return LANE * (max(lanes.values(), default=0) + 2)


def _least_width(rows: Sequence[RegionNode]) -> int:
    longest = max((len(_shown(row)) for row in rows), default=0)
    return max(NARROWEST, _left(_edges(rows)[1]) + 10 + round(CHARACTER * longest))


def _svg(rows: Sequence[RegionNode], title: str, width: int) -> str:
    edges, lanes = _edges(rows)
    left = _left(lanes)
    parts = [
        f'<svg viewBox="0 0 {width} {ROW * max(1, len(rows))}" style="max-width:{width}px" role="img">'
        f"<title>{escape(title)}</title>",
        *(f'<path class="edge" d="{_path(edge, lanes.get(edge, 0), left)}"/>' for edge in edges),
    ]
    for number, row in enumerate(rows):
        y = ROW * number + ROW // 2
        parts.append(
            f'<g class="{row.change}"><title>{escape(f"{row.change}: {_label(row)}")}</title>'
            f'<circle cx="{left}" cy="{y}" r="4"/>'
            f'<text x="{left + 10}" y="{y + 4.5}" xml:space="preserve">{escape(_shown(row))}</text></g>'
        )
    return "".join(parts) + "</svg>"


def _span(edge: tuple[int, int]) -> int:
    return abs(edge[1] - edge[0])


def _lanes(edges: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """A lane for each edge, from 1, so that no two in one lane overlap; shorter edges lie further in."""
    taken: dict[int, list[tuple[int, int]]] = {}
    lanes = {}
    for edge in edges:
        lane = 1
        while any(edge[0] < end and start < edge[1] for start, end in taken.get(lane, ())):
            lane += 1
        taken.setdefault(lane, []).append(edge)
        lanes[edge] = lane
    return lanes


def _path(edge: tuple[int, int], lane: int, left: int) -> str:
    start, end = (ROW * number + ROW // 2 for number in edge)
    if lane == 0:
        return f"M{left} {start}V{end}"
    x = left - LANE * lane
    bend = min(LANE, (end - start) // 2)
    return f"M{left} {start}Q{x} {start} {x} {start + bend}V{end - bend}Q{x} {end} {left} {end}"
