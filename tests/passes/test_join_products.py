"""join_products: what reads one value is one product afterwards, and computes the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.graph.agreement import largest_difference, outputs_of
from passes.graph.fuse_transformer import FuseTransformer
from passes.graph.join_products import Joiner, JoinProducts, is_product
from passes.quantize.products import register
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, PipelineError, load_onnx, load_runner, save_onnx
from pipeline.runtime import ExecutionSpec
from pipeline.store.writer import OutputWriter
from tests.passes.conftest import exported
from tests.passes.test_fuse_transformer import configuration

# family -> (attentions whose three are packed, groups that are split, products that are left alone) of two layers
FAMILIES = {
    "llama_gqa": (2, 2, 5),  # o and down of each layer, the head
    "qwen2": (2, 2, 5),  # with biases
    "qwen3": (0, 4, 5),  # norms lie between products and attention
    "phi": (2, 0, 7),  # no gate: fc1, fc2 and dense of each layer, the head
    "phi3": (0, 0, 9),  # its checkpoint has them joined
}


def quantized(bench: Any, family: str, **params: Any) -> Artifact:
    graph = bench.run(FuseTransformer, exported(bench, configuration(family)))
    return bench.run(QuantizeWeights, graph, **{"block_size": 32, **params})


@pytest.fixture(
    scope="module", params=[pytest.param(f, marks=pytest.mark.slow if f != "llama_gqa" else ()) for f in FAMILIES]
)
def pair(bench: Any, request: pytest.FixtureRequest) -> tuple[str, Artifact, Artifact]:
    before = quantized(bench, request.param)
    return request.param, before, bench.run(JoinProducts, before)


@pytest.fixture(scope="module")
def llama(bench: Any) -> Artifact:
    return quantized(bench, "llama_gqa")


def products(artifact: Artifact) -> list[ir.Node]:
    return [node for node in load_onnx(artifact).graph if is_product(node)]


def difference(bench: Any, before: Artifact, after: Artifact) -> float:
    return largest_difference(*(outputs_of(bench.session(made), made.interface) for made in (before, after)))


class TestEveryFamily:
    def test_computes_the_same(self, bench, pair):
        _, before, after = pair
        assert difference(bench, before, after) < 1e-4

    def test_joins_what_reads_one_value_and_nothing_else(self, pair):
        family, before, after = pair
        packed, split, alone = FAMILIES[family]
        nodes = list(load_onnx(after).graph)
        counts = Counter(node.op_type for node in nodes)
        assert counts["MatMulNBits"] == packed + split + alone
        assert counts["Split"] - Counter(n.op_type for n in load_onnx(before).graph)["Split"] == split
        attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
        assert [node.inputs[1] is None and node.inputs[2] is None for node in attentions] == [packed > 0] * 2
        reading = Counter(node.inputs[0].name for node in nodes if is_product(node))
        shared = 2 if family == "phi" else 1  # attention and MLP side by side: another kind of product, left alone
        assert max(reading.values()) <= shared

    def test_keeps_every_weight_once(self, pair):
        _, before, after = pair
        rows = [sum(node.attributes.get_int("N", 0) for node in products(made)) for made in (before, after)]
        assert rows[0] == rows[1]

    def test_runs_in_the_runner_token_by_token(self, pair):
        _, before, after = pair
        tokens = np.random.default_rng(3).integers(3, 300, (1, 12), dtype=np.int64)
        logits = []
        for made in (before, after):
            runner = load_runner(made, ExecutionSpec())
            steps = [runner.prefill(tokens[:, :8])] + [runner.decode(tokens[:, i : i + 1]) for i in range(8, 12)]
            logits.append(np.stack(steps))
        np.testing.assert_allclose(logits[1], logits[0], atol=1e-4 * max(1, logits[0].std()))


@pytest.mark.parametrize(
    "params",
    [
        {"bits": 8},
        {"symmetric": False},
        {"block_size": 16},
        pytest.param({"method": "k_quant"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_of_all_kinds_are_joined(bench, params):
    before = quantized(bench, "llama_gqa", **params)
    after = bench.run(JoinProducts, before)
    assert len(products(after)) == 9
    assert difference(bench, before, after) < 1e-4


def test_what_is_joined_is_written_and_the_rest_stays_where_it_lies(bench, llama):
    after = bench.run(JoinProducts, llama)
    kept = {name: ref for name, ref in after.component.tensors.items() if name in llama.component.tensors}
    assert kept.items() <= llama.component.tensors.items()
    assert any("down_proj" in name for name in kept)
    assert not any("gate_proj" in name for name in kept)
    new = after.component.tensors.keys() - llama.component.tensors.keys()
    assert "model.layers.0.mlp.gate_proj+up_proj.weight.q4" in new
    assert "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight.q4" in new


def test_each_of_the_two_can_be_left_out(bench, llama):
    assert len(products(bench.run(JoinProducts, llama, others=False))) == 15 - 4
    assert len(products(bench.run(JoinProducts, llama, attention=False, others=False))) == 15
    only_split = bench.run(JoinProducts, llama, attention=False)
    assert sum(node.op_type == "Split" for node in load_onnx(only_split).graph) == 4
    assert difference(bench, llama, only_split) < 1e-4


def test_once_joined_there_is_nothing_left_to_join(bench, llama):
    once = bench.run(JoinProducts, llama)
    assert bench.run(JoinProducts, once).component.tensors == once.component.tensors


def test_products_that_differ_are_left(bench):
    mixed = bench.run(FuseTransformer, exported(bench, configuration("llama_gqa")))
    mixed = bench.run(QuantizeWeights, mixed, block_size=32, exclude=["*.up_proj.*", "*.k_proj.*"])
    mixed = bench.run(QuantizeWeights, mixed, block_size=16)
    after = bench.run(JoinProducts, mixed)
    assert len(products(after)) == 15  # nothing fits together but q and v, whose k is of another kind
    assert difference(bench, mixed, after) < 1e-4


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_of_large_weights_the_first_layers_are_compared(bench, llama, monkeypatch, caplog, wrong):
    monkeypatch.setattr("passes.graph.join_products.COMPARED_BYTES", 0)
    monkeypatch.setattr("passes.graph.join_products.FIRST_LAYERS", 1)
    if wrong:  # keys and values change places
        together = Joiner.side_by_side
        monkeypatch.setattr(Joiner, "side_by_side", lambda self, parts, rows: together(self, parts[::-1], rows[::-1]))
        with pytest.raises(PipelineError, match="the graph with joined products differs"):
            bench.run(JoinProducts, llama)
        return
    with caplog.at_level("INFO"):
        bench.run(JoinProducts, llama)
    assert "the first 1 layers are compared" in caplog.text


def test_one_number_added_to_all_is_no_bias_and_leaves_attention_as_it_is(bench, llama):
    model = load_onnx(llama)
    for node in [n for n in model.graph if n.op_type == "GroupQueryAttention"]:
        one = register(model, f"{node.name}.one", ir.tensor(np.ones(1, np.float32), name=f"{node.name}.one"))
        for place, value in enumerate(node.inputs[:3]):
            add = ir.node("Add", [value, one])
            new = add.outputs[0]
            new.name, new.dtype, new.shape = f"{value.name}.one", value.dtype, value.shape
            model.graph.insert_before(node, add)
            node.replace_input_with(place, new)
    staging = bench.new_folder("altered")
    altered = bench.store.publish(staging, save_onnx(model, OutputWriter(staging), like=llama).manifest)
    after = bench.run(JoinProducts, altered)
    assert all(n.inputs[1] is not None for n in load_onnx(after).graph if n.op_type == "GroupQueryAttention")
    assert difference(bench, altered, after) < 1e-4


def test_a_graph_without_such_products_is_refused(bench):
    exported_llama = exported(bench, configuration("llama_gqa"))
    with pytest.raises(PipelineError, match="no MatMulNBits to join") as error:
        bench.run(JoinProducts, exported_llama)
    assert "quantize_weights" in str(error.value.hint)
