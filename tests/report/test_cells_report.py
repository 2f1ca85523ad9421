"""The report over all cells of a matrix: the same tables and one chart, of whatever the cells' runs found."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest

from pipeline.report import cells_words as words
from pipeline.report.cells_html import render_cells_html
from pipeline.report.cells_markdown import render_cells_markdown
from pipeline.report.cells_report import CellOutcome, CellsReport, build_cells_report, changed_in_words, label_of
from pipeline.report.figures import duration
from pipeline.report.schema import Cell, Effect, Ratio, Report
from pipeline.report.time_chart import time_chart

POINT = {"kind": "forward", "batch": 2, "prompt": 1024, "new_tokens": None, "rounds": 100, "launches": 6}
EVIL = '<script>alert("x")</script>|`'


def stage(name: str, *, parent: str | None, seconds: float, ratio: dict[str, Any] | None = None, **more: Any) -> Any:
    latency = {"median": seconds, "low": seconds * 0.99, "high": seconds * 1.02}
    tokens = {"median": 1 / seconds, "low": 0.98 / seconds, "high": 1.01 / seconds}
    return {
        "name": name,
        "pass": name,
        "params": {},
        "parent": parent,
        "status": "ran",
        "speed": [{**POINT, "tokens_per_s": tokens, "latency_s": latency, "vs_baseline": ratio, "outliers": 2}],
        **more,
    }


def ratio(middle: float, half: float, verdict: str, **more: Any) -> dict[str, Any]:
    return {"ratio": middle, "low": middle - half, "high": middle + half, "verdict": verdict, **more}


def artifact(size: int) -> dict[str, Any]:
    return {"digest": "0" * 64, "format": "torch", "size_bytes": size, "weights_bytes": size, "unique_bytes": size}


NOTHING = {"kind": "none", "nodes": [155, 155], "rules": {"fuse_transpose_into_gemm": [0, 155]}}


def report(seconds: float, size: int, verdict: dict[str, Any]) -> Report:
    source = stage("source", parent=None, seconds=seconds, artifact=artifact(size))
    del source["speed"]
    return Report.model_validate(
        {
            "recipe": "r",
            "run": "id",
            "created": "2026-01-01T00:00:00+00:00",
            "wall_s": 1.0,
            "lock": {"packages": {}, "seed": 0, "digests": {}},
            "host": {"cpu_model": f"A CPU {EVIL}"},
            "hardware": {"name": "local"},
            "threads": 2,
            "baseline": "export_onnx",
            "schedule": {
                "budget_s": 60,
                "margin": 0.01,
                "looks": [100],
                "looks_taken": 1,
                "rounds": 100,
                "launches": 6,
                "ended": "looks",
            },
            "noise_floor": [
                {**{k: POINT[k] for k in ("kind", "batch", "prompt")}, "ratio_low": 0.99, "ratio_high": 1.016}
            ],
            "stages": [
                source,
                stage("export_onnx", parent="source", seconds=seconds),
                stage("fuse", parent="export_onnx", seconds=seconds, ratio=verdict, effect=NOTHING),
            ],
        }
    )


def outcome(index: int, found: Report | None, **more: Any) -> CellOutcome:
    cell = Cell(index=index, of=3, overrides={"model.architecture.hidden_size": 512 * 2**index, "x.evil": EVIL})
    run = f"../run-{index}" if found else None
    return CellOutcome(cell=cell, exit_code=0 if found else 4, report=found, run=run, **more)


def built(*outcomes: CellOutcome) -> CellsReport:
    return build_cells_report(
        outcomes,
        recipe="r",
        description=EVIL,
        baseline="export_onnx",
        identity="20260101-000000-abcd",
        created="2026-01-01T00:00:00+00:00",
        exit_code=4,
    )


@pytest.fixture
def cells() -> CellsReport:
    means = {("fuse", ("forward", 2, 1024, None)): 0.0467}
    return built(
        outcome(0, report(0.0454, 50_000_000, ratio(1.012, 0.006, "inconclusive", rounds_to_decide=190)), means=means),
        outcome(1, report(0.3, 150_000_000, ratio(1.0, 0.004, "equivalent"))),
        outcome(2, None, error=f"not enough memory {EVIL}"),
    )


def test_every_point_has_a_figure_for_each_stage_in_each_cell(cells: CellsReport) -> None:
    (point,) = cells.points
    assert [s.name for s in point.stages] == ["source", "export_onnx", "fuse"]
    fuse = point.stages[2]
    assert [f.cell for f in fuse.figures] == [0, 1, 2]
    assert fuse.figures[0].latency_s is not None
    assert fuse.figures[0].latency_s.median == 0.0454
    assert (fuse.figures[0].mean_s, fuse.figures[1].mean_s) == (0.0467, None)
    assert fuse.figures[0].vs_baseline == Ratio(**ratio(1.012, 0.006, "inconclusive", rounds_to_decide=190))
    assert fuse.figures[2].reason == f"not enough memory {EVIL}"


def test_a_stage_that_was_measured_in_no_cell_and_failed_in_none_has_no_row() -> None:
    found = built(outcome(0, report(0.1, 1, ratio(1, 0.1, "inconclusive"))))
    assert [s.name for s in found.points[0].stages] == ["export_onnx", "fuse"]


def test_a_pass_that_matched_no_node_is_shown_with_0_of_155_nodes(cells: CellsReport) -> None:
    page = render_cells_markdown(cells)
    row = next(line for line in page.splitlines() if line.startswith("| fuse | **"))
    assert (
        "**+1.2 %**<br>(+0.6 to +1.8 %)<br>inconclusive, about 190 rounds may decide<br>changed 0 of 155 nodes" in row
    )
    assert "fuse changed nothing (0 of 155 nodes): +1.2 % in " in page


def test_a_stage_that_changed_nothing_and_is_called_faster_is_told_to_contradict_itself() -> None:
    found = built(outcome(0, report(0.1, 1, ratio(1.22, 0.01, "faster"))))
    for page in (render_cells_markdown(found), render_cells_html(found)):
        assert "contradiction: it changed nothing: whatever made it faster than export_onnx, the pass did not" in page
    assert words.headline(found)[1:] == [
        f"fuse changed nothing (0 of 155 nodes): +22.0 % in hidden_size 512, evil {EVIL} (CONTRADICTION: timed faster)."
    ]


def from_another(over_baseline: dict[str, Any], over_parent: dict[str, Any]) -> Report:
    """The stage changed nothing of export_onnx; the baseline is the source, and export_onnx 20 times as fast."""
    data = json.loads(report(0.1, 1, over_baseline).to_json()) | {"baseline": "source"}
    data["stages"][2]["speed"][0]["vs_parent"] = over_parent
    return Report.model_validate(data)


def test_what_changed_nothing_and_is_as_fast_as_its_parent_is_no_contradiction_however_fast_that_is() -> None:
    faster, same = ratio(20.0, 0.1, "faster"), ratio(1.001, 0.004, "equivalent")
    found = built(outcome(0, from_another(faster, same))).model_copy(update={"baseline": "source"})
    figure = found.points[0].stages[-1].figures[0]
    assert (figure.contradicted, words.contradiction(figure)) == (False, None)
    assert "+0.1 % against export_onnx in hidden_size 512" in words.headline(found)[1]
    assert "+1,900" not in words.headline(found)[1]
    assert "contradiction" not in render_cells_markdown(found).lower()


def test_what_changed_nothing_and_is_slower_than_its_parent_is_one_though_it_is_as_fast_as_the_baseline() -> None:
    same, slower = ratio(1.001, 0.004, "equivalent"), ratio(0.9, 0.01, "slower")
    found = built(outcome(0, from_another(same, slower))).model_copy(update={"baseline": "source"})
    told = words.contradiction(found.points[0].stages[-1].figures[0])
    assert told == "contradiction: it changed nothing: whatever made it slower than export_onnx, the pass did not"
    assert "(CONTRADICTION: timed slower)" in words.headline(found)[1]


def test_a_stage_behind_another_branch_is_held_against_its_parent_in_the_tables() -> None:
    behind = from_another(ratio(0.969, 0.025, "inconclusive"), ratio(0.996, 0.02, "inconclusive"))
    found = built(outcome(0, behind)).model_copy(update={"baseline": "source"})
    told = "−0.4 % (−2.4 to +1.6 %) against export_onnx: inconclusive"
    assert render_cells_markdown(found).count(told) == 1
    assert render_cells_html(found).count(told) == 1


def test_of_many_cells_the_contradictions_are_counted() -> None:
    cells = [outcome(i, report(0.1, 1, ratio(1.22, 0.01, "faster" if i else "inconclusive"))) for i in range(5)]
    assert "faster in 4 cells, CONTRADICTION in 4, for there it changed nothing" in words.headline(built(*cells))[0]


def test_cells_that_are_still_to_run_are_counted(cells: CellsReport) -> None:
    assert not any("Not complete" in line for line in words.headline(cells))
    some = built(outcome(0, report(0.1, 1, ratio(1, 0.1, "inconclusive"))))
    assert words.headline(some)[0] == "Not complete: 1 of 3 cells have been run."
    assert "1 of 3 cells ran" in render_cells_html(some)


def test_a_cell_that_failed_is_there_with_its_reason(cells: CellsReport) -> None:
    assert cells.cells[2].error == f"not enough memory {EVIL}"
    assert cells.cells[2].run is None
    for page in (render_cells_markdown(cells), render_cells_html(cells)):
        assert page.count("not enough memory") >= 2


def test_of_a_failed_chain_the_cause_is_told_once() -> None:
    data = json.loads(report(0.1, 1, ratio(1, 0.1, "inconclusive")).to_json())
    for i, (status, reason) in enumerate((("failed", "no such width"), ("skipped", "source failed"))):
        data["stages"][i] |= {"status": status, "reason": reason, "speed": None}
    found = built(outcome(0, Report.model_validate(data)))
    assert found.cells[0].error == "source failed: no such width; skipped: export_onnx"


def test_the_axis_is_the_models_size_where_the_models_differ(cells: CellsReport) -> None:
    assert (cells.axis.title, cells.axis.values) == ("weights of the model, MB", {0: 50.0, 1: 150.0})


def test_the_axis_is_the_number_that_is_overridden_where_the_models_are_one() -> None:
    same = [outcome(i, report(0.1, 7, ratio(1, 0.1, "inconclusive"))) for i in range(2)]
    axis = built(*same).axis
    assert (axis.title, axis.values) == ("model.architecture.hidden_size", {0: 512.0, 1: 1024.0})


def test_the_chart_has_every_interval_and_grows_with_time(cells: CellsReport) -> None:
    chart = time_chart(cells, cells.points[0], width=920, height=430, font=14)
    assert chart is not None
    assert [line.name for line in chart.lines] == ["export_onnx", "fuse"]
    for line in chart.lines:
        small, large = line.marks
        assert small.x < large.x
        assert small.y > large.y  # y grows downwards
        for mark in line.marks:
            assert mark.high <= mark.y <= mark.low
            assert chart.left <= mark.x <= chart.right
            assert chart.top <= mark.high
            assert mark.low <= chart.bottom
    # equal times stand beside each other
    assert chart.lines[0].marks[0].x != chart.lines[1].marks[0].x
    assert "logarithmic" in chart.y_title


def test_a_chart_of_nothing_is_none() -> None:
    found = built(outcome(0, report(0.1, 1, ratio(1, 0.1, "inconclusive"))))
    empty = found.points[0].model_copy(update={"stages": ()})
    assert time_chart(found, empty, width=920, height=430, font=14) is None


def test_html_escapes_what_strangers_wrote_and_asks_for_nothing(cells: CellsReport) -> None:
    page = render_cells_html(cells)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#|data:|\.\./)', page)
    HTMLParser().feed(page)
    assert len(page) < 300_000


def test_markdown_escapes_what_strangers_wrote(cells: CellsReport) -> None:
    page = render_cells_markdown(cells)
    assert "<script" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {5, 7}  # no cell was split


def test_json_fits_its_schema_and_comes_back(cells: CellsReport) -> None:
    data = json.loads(cells.to_json())
    jsonschema.validate(data, CellsReport.model_json_schema())
    assert CellsReport.model_validate(data) == cells


@pytest.mark.parametrize(
    ("effect", "told"),
    [
        ({"kind": "none", "nodes": [155, 155]}, "0 of 155 nodes"),
        ({"kind": "none"}, "nothing"),
        ({"kind": "graph", "nodes": [155, 120], "rules": {"fuse": [35, 155]}}, "fuse: 35 of 155, 155 → 120 nodes"),
        ({"kind": "graph", "nodes": [9, 8], "rules": {"a": [1, 9], "b": [0, 9]}}, "a: 1 of 9, 9 → 8 nodes"),
        ({"kind": "weights", "nodes": [9, 9], "weights_quantized": [3, 4]}, "3 of 4 weights quantized, 9 nodes"),
        ({"kind": "execution"}, "execution"),
    ],
)
def test_what_a_stage_changed_is_told_with_its_numbers(effect: dict[str, Any], told: str) -> None:
    assert changed_in_words(Effect.model_validate(effect)) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1.0, "+0.0"),
        (1.2, "+20.0"),
        (0.978, "−2.2"),
        (2.5, "+150"),
        (1.00997, "+0.997"),  # inside the margin of 1 % and shown inside
        (1.01003, "+1.003"),
        (0.99996, "−0.004"),  # below 1 and shown below
        (float("inf"), "∞"),
    ],
)
def test_no_end_of_an_interval_is_rounded_across_zero_or_the_margin(value: float, told: str) -> None:
    assert words.signed(value) == told


def test_the_margin_of_the_recipe_is_the_edge_that_figures_keep_their_side_of() -> None:
    assert (words.signed(1.02997), words.signed(1.02997, 0.03)) == ("+3.0", "+2.997")
    assert (words.signed(0.97083), words.signed(0.97083, 0.03)) == ("−2.9", "−2.92")  # 1 / 1.03 is −2.913 %
    data = json.loads(report(0.1, 1, ratio(1.0, 0.02997, "equivalent")).to_json())
    data["schedule"]["margin"] = 0.03
    page = render_cells_markdown(built(outcome(0, Report.model_validate(data))))
    assert "(−3.0 to +2.997 %)" in page  # the edge below is −2.913 %


def test_labels_are_short_and_durations_have_units() -> None:
    assert label_of({"model.architecture.hidden_size": 512, "hardware": "local"}) == "hidden_size 512, hardware local"
    assert label_of({}) == "as written"
    assert [duration(v) for v in (5.1001, 0.0454, 1.2e-4)] == ["5.10 s", "45.4 ms", "120 µs"]
