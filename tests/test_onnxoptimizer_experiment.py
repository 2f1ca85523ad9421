"""The recipe that repeats a published experiment: three rules of onnxoptimizer on a Llama-2 graph without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.recipe import Recipe, load_cells, load_recipe
from pipeline.resolve import plan_recipe
from pipeline.run import run
from pipeline.store import Store

RULES = ("eliminate_identity", "fuse_transpose_into_gemm", "fuse_matmul_add_bias_into_gemm")
SHRUNKEN = [
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=96",
    "model.architecture.vocab_size=300",
    "evaluate.workload.forward=[[2, 16]]",
    "evaluate.looks=[3]",
    "evaluate.budget_s=1",
]


def test_its_cells_are_the_three_published_sizes() -> None:
    cells: list[Recipe] = load_cells("llama2-onnxoptimizer")
    sizes = []
    for cell in cells:
        assert cell.model.architecture is not None
        config = cell.model.architecture.config
        sizes.append((config["hidden_size"], config["num_attention_heads"]))
        assert (config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]) == (2, 11008, 32000)
        assert cell.evaluate.workload.forward == [[2, 1024]]
        assert cell.evaluate.baseline == "exported"
    assert sizes == [(512, 4), (1024, 8), (2048, 16)]
    assert [cell.evaluate.looks for cell in cells] == [[100], [100], [12, 30, 80, 200]]
    assert cells[2].evaluate.budget_s == 900


def test_every_cell_can_be_planned_and_each_rule_follows_each_exporter(store: Store) -> None:
    for cell in load_cells("llama2-onnxoptimizer"):
        plan = plan_recipe(cell, store=store)
        for parent, prefix in (("exported", ""), ("torchscript", "torchscript_")):
            for rule in RULES:
                stage = plan.stage(prefix + rule)
                assert (stage.parent, stage.params["passes"]) == (parent, [rule])


@pytest.mark.slow
@pytest.mark.usefixtures("measured_briefly")
def test_two_rules_change_nothing_and_one_removes_what_torchscript_left(
    probed_store: Callable[[Path], Store], tmp_path: Path
) -> None:
    store = probed_store(tmp_path / "store")
    report = run(load_recipe("llama2-onnxoptimizer", SHRUNKEN), store=store, runs=tmp_path / "runs").report
    kinds = {stage.name: stage.effect.kind for stage in report.stages if stage.effect is not None}
    assert {kinds[name] for name in RULES} == {"none"}
    assert {kinds[f"torchscript_{name}"] for name in RULES[1:]} == {"none"}
    cleaned = report.stage("torchscript_eliminate_identity")
    assert cleaned.effect is not None and cleaned.effect.nodes is not None
    assert cleaned.effect.nodes[0] - cleaned.effect.nodes[1] == 4
    for stage in report.stages:
        assert [speed.kind for speed in stage.speed] == ["forward"], stage.reason
        assert stage.quality is not None
        if stage.name != "exported":
            assert stage.quality.vs_baseline is not None
            assert stage.quality.vs_baseline.verdict in ("identical", "equivalent")
