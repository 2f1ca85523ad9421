"""The changed region of a graph as SVG and as text."""

import re
from xml.etree import ElementTree

import pytest

from pipeline.report.graph_drawing import LONGEST, as_text, caption, draw
from pipeline.report.schema import Region, RegionNode

KEPT = RegionNode(id=1, operator="MatMul", detail="float[4×4]")
END = RegionNode(id=4, operator="Add", inputs=(3, 1))
REGION = Region(
    where="layer 0",
    alike=22,
    before=(
        KEPT,
        RegionNode(id=2, operator="Sigmoid", change="gone", inputs=(1,)),
        RegionNode(id=3, operator="Mul", change="gone", inputs=(1, 2)),
        END,
    ),
    after=(
        KEPT,
        RegionNode(id=9, operator="com.microsoft.QuickGelu", detail="alpha=1", change="new", inputs=(1,)),
        END.model_copy(update={"inputs": (9, 1)}),
    ),
)


def drawings(region: Region) -> list[ElementTree.Element]:
    """Parsed as XML: what is not well-formed raises."""
    root = ElementTree.fromstring(draw(region))  # noqa: S314 - our own
    return list(root.iter("svg"))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter("text")]


def test_before_and_after_are_drawn_with_a_sign_for_what_changed() -> None:
    before, after = drawings(REGION)
    assert texts(before) == ["  MatMul float[4×4]", "- Sigmoid", "- Mul", "  Add"]
    assert texts(after) == ["  MatMul float[4×4]", "+ QuickGelu alpha=1", "  Add"]


def test_every_edge_is_drawn_once() -> None:
    before, after = drawings(REGION)
    assert len(list(before.iter("path"))) == 5
    assert len(list(after.iter("path"))) == 3


def test_edges_that_pass_by_other_nodes_have_lanes_of_their_own() -> None:
    before, _ = drawings(REGION)
    lanes = [path.get("d", "") for path in before.iter("path") if "Q" in path.get("d", "")]
    assert len(lanes) == 2  # 1 -> 3 and 1 -> 4
    assert len({re.findall(r"Q(-?\d+)", lane)[0] for lane in lanes}) == 2


def test_both_drawings_have_one_scale() -> None:
    widths = {svg.get("viewBox", "").split()[2] for svg in drawings(REGION)}
    assert len(widths) == 1


def test_texts_of_a_model_are_escaped() -> None:
    evil = RegionNode(id=1, operator="<script>", detail='"&<b>', change="new")
    region = Region(where="<i>", before=(), after=(evil,))
    assert "<script>" not in draw(region)
    assert texts(drawings(region)[1]) == ['+ <script> "&<b>']


def test_a_long_row_is_cut_and_its_title_is_whole() -> None:
    node = RegionNode(id=1, operator="MatMul", detail="x" * 100, change="gone")
    before, _ = drawings(Region(where="layer 0", before=(node,), after=()))
    assert len(texts(before)[0]) == LONGEST
    assert any("x" * 100 in (title.text or "") for title in before.iter("title"))


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_texts_fit_into_the_drawing(side: str) -> None:
    row = RegionNode(id=1, operator="W" * 200, change="gone")
    region = Region(where="layer 0", before=(row,), after=(row,))
    svg = drawings(region)[("before", "after").index(side)]
    width = float(svg.get("viewBox", "").split()[2])
    (text,) = svg.iter("text")
    assert float(text.get("x", "nan")) + len("".join(text.itertext())) * 7.8 <= width  # 13 px of Liberation Mono


def test_nothing_is_fetched_and_nothing_runs() -> None:
    assert not re.search(r"https?:|<script|href|url\(|onload", draw(REGION))


def test_the_text_numbers_nodes_and_names_what_they_take() -> None:
    assert as_text(REGION).splitlines() == [
        "layer 0, one of 22 that changed alike",
        "  before",
        "      1 MatMul float[4×4]",
        "  -   2 Sigmoid  <- 1",
        "  -   3 Mul  <- 1, 2",
        "      4 Add  <- 3, 1",
        "  after",
        "      1 MatMul float[4×4]",
        "  +   2 com.microsoft.QuickGelu alpha=1  <- 1",
        "      3 Add  <- 2, 1",
    ]


def test_the_caption_says_what_is_left_out() -> None:
    assert caption(REGION.model_copy(update={"alike": 1, "left_out": 7})) == "layer 0; 7 further nodes are not shown"


def test_an_empty_side_is_drawn_as_such() -> None:
    before, after = drawings(Region(where="part 1 of the graph", before=(), after=(KEPT,)))
    assert texts(before) == []
    assert texts(after) == ["  MatMul float[4×4]"]
