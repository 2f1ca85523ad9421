"""Roofline and ablation are tables of what the report holds, and nothing else."""

from __future__ import annotations

from every_case import HOSTILE, rich_report

from pipeline.report.schema import Roofline
from pipeline.report.tables import ablation_table, roofline_table

RICH = rich_report()


def test_the_roofline_has_a_row_for_every_stage_that_was_counted() -> None:
    found = roofline_table(RICH)
    assert found is not None
    assert [row[0] for row in found.rows] == [s.name for s in RICH.stages if s.roofline]
    cells = dict(zip(found.header, next(r for r in found.rows if r[0] == "int4"), strict=True))
    assert cells[">bytes a token"] == "748.0 MB"
    assert cells[">operations a decoded token"] == "2.21 G"
    assert cells[">MBU"] == "57.0 %"
    assert cells[">MFU"] == "28.5 % of float32"
    assert cells[">target: decode at most"] == "91.3 tok/s"
    assert "computed from its profile, not measured" in found.note


def test_a_column_that_nobody_has_is_left_out() -> None:
    stages = tuple(s.model_copy(update={"roofline": Roofline(bytes_per_token=5)}) for s in RICH.stages)
    found = roofline_table(RICH.model_copy(update={"stages": stages}))
    assert found is not None
    assert found.header == ("stage", ">bytes a token")
    bare = tuple(s.model_copy(update={"roofline": None}) for s in RICH.stages)
    assert roofline_table(RICH.model_copy(update={"stages": bare})) is None


def test_the_ablation_has_a_line_for_every_pass_and_point() -> None:
    found = ablation_table(RICH)
    assert found is not None
    assert [row[0] for row in found.rows] == ["fused", "", "cleanup", "export_onnx"]
    fused, longer, cleanup, export = found.rows
    assert fused[1:] == (
        "decode of 64 tokens after 128, batch 1",
        "1.31 ×",
        "1.27–1.35",
        "faster",
        "1.0002 ×",
        "–",
        "−41.0 kB",
    )
    assert longer[1:5] == ("decode of 256 tokens after 128, batch 1", "1.28 ×", "1.24–1.32", "faster")
    assert cleanup[4] == (
        "inconclusive, inside the noise floor of 1.6 %, about 190 rounds may decide, its own stage changed nothing"
    )
    assert export[1] == f"fuse_attention takes onnx {HOSTILE}"
    assert set(export[2:]) == {"–"}
    assert ablation_table(RICH.model_copy(update={"ablation": None})) is None
