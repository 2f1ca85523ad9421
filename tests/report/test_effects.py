"""What changed is told as it was found, and what was told otherwise is a contradiction."""

from __future__ import annotations

from every_case import rich_report

from pipeline.report.cells_report import changed_in_words
from pipeline.report.effects import change, contradiction, effect_facts, effect_in_words, slow_nodes_in_words
from pipeline.report.schema import Effect, StageReport

RICH = rich_report()


def with_effect(**effect: object) -> StageReport:
    return RICH.stage("cleanup").model_copy(update={"effect": Effect.model_validate(effect)})


def test_a_pass_that_tells_of_work_where_nothing_changed_contradicts_itself() -> None:
    told = with_effect(kind="none", nodes=(155, 155), rules={"fuse": (3, 155), "drop": (0, 155)})
    assert contradiction(told) == "its pass tells of 3 by fuse, and nothing changed"
    assert contradiction(with_effect(kind="graph", nodes=(155, 150), rules={"fuse": (3, 155)})) == ""
    assert contradiction(with_effect(kind="none", nodes=(155, 155), rules={"fuse": (0, 155)})) == ""
    assert contradiction(with_effect(kind="graph", contradiction="5 told, 3 found")) == "5 told, 3 found"


def test_casts_are_told_where_some_were_inserted() -> None:
    assert "312 Casts inserted" in effect_in_words(RICH.stage("export_onnx"))
    assert "1 Cast inserted" in effect_in_words(with_effect(kind="graph", nodes=(3, 4), casts=(0, 1)))
    assert "Cast" not in change(RICH.stage("fused"), RICH)


def test_rules_are_told_with_what_they_did_and_of_how_many() -> None:
    assert change(RICH.stage("fused"), RICH) == (
        "changed the graph (1,893 → 871 nodes): attention 22 of 22, skip_norm 43 of 45"
    )


def test_slow_nodes_are_told_with_their_reason() -> None:
    assert slow_nodes_in_words(RICH.stage("int8_slow")) == (
        "154 MatMulNBits without a fast kernel (8 bits at accuracy_level 0)"
    )
    assert slow_nodes_in_words(RICH.stage("int8")) == ""


def test_facts_hold_all_that_was_found() -> None:
    assert dict(effect_facts(RICH.stage("int8"))) == {
        "nodes": "871 → 715",
        "weights quantized": "154 of 155",
        "weights in float32": "201 → 47",
        "weights in uint8": "0 → 154",
    }
    assert dict(effect_facts(RICH.stage("export_onnx")))["parameters"] == "1,100,048,384"
    assert effect_facts(RICH.stage("source")) == []


def test_of_many_rules_those_that_did_something_are_told_and_the_others_counted() -> None:
    rules = {f"rule_{i}": (0, 261) for i in range(36)} | {"unsqueeze": (3, 261), "dead": (4, 257)}
    stage = with_effect(kind="graph", nodes=(261, 257), rules=rules)
    assert change(stage, RICH) == (
        "changed the graph (261 → 257 nodes): dead 4 of 257, unsqueeze 3 of 261, 36 other rules did nothing"
    )
    facts = dict(effect_facts(stage))
    assert facts["rule dead"] == "4 of 257"
    assert facts["rules that did nothing: 36"].startswith("rule_0, rule_1, ")
    assert "rule rule_0" not in facts
    busy = with_effect(kind="graph", nodes=(9, 8), rules={f"rule_{i}": (9 - i, 9) for i in range(8)})
    assert change(busy, RICH).endswith("rule_3 6 of 9, rule_4 5 of 9, 3 more rules")
    one_more = with_effect(kind="graph", nodes=(9, 8), rules={f"rule_{i}": (9 - i, 9) for i in range(6)})
    assert change(one_more, RICH).endswith("rule_4 5 of 9, 1 more rule")
    few = with_effect(kind="graph", nodes=(9, 8), rules={"a": (0, 9), "b": (1, 9)})
    assert change(few, RICH) == "changed the graph (9 → 8 nodes): a 0 of 9, b 1 of 9"


def test_weights_that_no_node_reads_are_told_where_they_came_or_went() -> None:
    """The graph computes the same: the effect is none, and yet the artifact has another size."""
    idle = with_effect(kind="none", nodes=(155, 155))
    parent = RICH.stage(str(idle.parent))
    assert idle.artifact is not None
    assert parent.artifact is not None

    def storing(more: int) -> str:
        assert idle.artifact is not None
        assert parent.artifact is not None
        artifact = idle.artifact.model_copy(update={"weights_bytes": parent.artifact.weights_bytes + more})
        return change(idle.model_copy(update={"artifact": artifact}), RICH)

    assert storing(0) == "changed nothing: 0 of 155 nodes"
    assert storing(-2_500_000) == (
        "changed nothing: 0 of 155 nodes, but dropped 2.5 MB of weights that no node reads, or that are stored twice"
    )
    assert "but stores 1.0 MB more of weights" in storing(1_000_000)


TOGETHER = {
    "kind": "weights",
    "nodes": (715, 1430),
    "operators": {"MatMulNBits": (154, 154), "DynamicQuantizeMatMul": (0, 154)},
    "casts": (2, 4),
    "weights_quantized": (154, 308),
    "components": (
        {"name": "prefill", "is_new": True, "kind": "weights", "nodes": (715, 715), "same_as": "int8"},
        {"name": "decode", "is_new": True, "kind": "none", "nodes": (715, 715), "same_as": "cleanup"},
    ),
}


def test_a_stage_of_several_components_is_told_by_the_stages_that_they_come_from() -> None:
    stage = with_effect(**TOGETHER)
    assert change(stage, RICH) == "consists of prefill as int8 and decode as cleanup (1,430 nodes)"
    assert effect_in_words(stage) == "weights, prefill as int8, decode as cleanup, 1,430 nodes"
    assert changed_in_words(stage.effect) == "prefill as int8, decode as cleanup, 1,430 nodes"
    facts = dict(effect_facts(stage.model_copy(update={"parent": "cleanup"})))
    assert facts["component prefill"] == "715 nodes, graph and weights of int8, other weights than cleanup"
    assert facts["component decode"] == "715 nodes, graph and weights of cleanup"
    assert facts["weights quantized"] == "154 of 308"


def test_components_that_no_stage_has_as_they_are_say_how_they_differ() -> None:
    components = (
        {"name": "prefill", "kind": "graph", "nodes": (715, 700)},
        {"name": "decode", "kind": "none", "nodes": (715, 715), "same_as": "both/decode"},
    )
    stage = with_effect(kind="graph", nodes=(1430, 1415), casts=(2, 4), components=components)
    stage = stage.model_copy(update={"parent": "both"})
    assert change(stage, RICH) == "changed the graph (1,430 → 1,415 nodes), 2 Casts inserted"
    facts = dict(effect_facts(stage))
    assert facts["component prefill"] == "715 → 700 nodes, another graph than both"
    assert facts["component decode"] == "715 nodes, graph and weights of both/decode"


def test_components_that_are_gone_are_told_by_what_is_left() -> None:
    components = (
        {"name": "encoder", "is_gone": True, "kind": None, "nodes": (50, None)},
        {"name": "decoder", "kind": "none", "nodes": (60, 60)},
        {"name": "joiner", "is_new": True, "kind": None, "nodes": (None, 7)},
    )
    stage = with_effect(kind="graph", nodes=(110, 67), components=components).model_copy(update={"parent": "whole"})
    facts = dict(effect_facts(stage))
    assert facts["component encoder"] == "50 nodes, gone"
    assert facts["component decoder"] == "60 nodes, graph and weights of whole"
    assert facts["component joiner"] == "7 nodes"
