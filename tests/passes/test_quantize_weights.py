"""quantize_weights: the numbers, their layout, and which weights of a graph they replace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from passes.quantize import block_quantization, quantize_weights
from passes.quantize.block_quantization import dequantize_blocks, quantize_blocks
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, Interface, Manifest, PassContext, PipelineError, load_onnx, save_onnx
from pipeline.artifact import ONNX_FILE
from pipeline.runtime.protocol import ExecutionSpec, load_runner
from pipeline.store.writer import OutputWriter

KINDS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def restored(weight: np.ndarray, *, bits: int, block_size: int, symmetric: bool) -> np.ndarray:
    quantized = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    return dequantize_blocks(quantized, bits=bits, columns=weight.shape[1])


class TestTheNumbers:
    @pytest.mark.parametrize(("bits", "symmetric"), KINDS)
    @pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
    def test_are_those_of_onnx_runtimes_own_quantizer(self, bits, symmetric, block_size):
        from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

        weight = random_weight(12, 512)
        blocks = 512 // block_size
        codes = np.zeros((12, blocks, block_size * bits // 8), np.uint8)
        scales = np.zeros((12, blocks), np.float32)
        zeros = np.zeros((12, blocks * bits // 8), np.uint8)
        quantize = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
        quantize(codes, np.ascontiguousarray(weight.T), scales, zeros, block_size, 12, 512, symmetric)
        ours = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=symmetric)
        assert np.array_equal(ours.codes, codes)
        np.testing.assert_allclose(ours.scales, scales, rtol=1e-6)
        assert ours.zero_points is None if symmetric else np.array_equal(ours.zero_points, zeros)

    @settings(max_examples=60, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 5), st.integers(1, 100)),
        block_size=st.sampled_from([16, 32, 64]),
        kind=st.sampled_from(KINDS),
        draw=st.tuples(st.floats(1e-20, 1e20), st.floats(-3, 3), st.integers(0, 100)),
    )
    def test_stand_for_weights_within_a_step_of_the_originals(self, shape, block_size, kind, draw):
        (rows, columns), (bits, symmetric), (scale, shift, seed) = shape, kind, draw
        weight = (random_weight(rows, columns, seed) + np.float32(shift)) * np.float32(scale)
        quantized = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=symmetric)
        error = np.abs(dequantize_blocks(quantized, bits=bits, columns=columns) - weight)
        step = np.abs(np.repeat(quantized.scales, block_size, axis=1)[:, :columns])
        # a step at most where the far end is cut off or the zero point was rounded, else half of one
        assert (error <= step * 1.001).all()
        assert np.median(error / step) <= 0.501

    @pytest.mark.parametrize(("bits", "symmetric"), KINDS)
    def test_keep_zero_and_the_largest_value_exact(self, bits, symmetric):
        weight = np.zeros((1, 32), np.float32)
        weight[0, 5] = -3.0
        result = restored(weight, bits=bits, block_size=32, symmetric=symmetric)
        np.testing.assert_allclose(result, weight, rtol=1e-6)

    @pytest.mark.parametrize(("bits", "symmetric"), KINDS)
    def test_of_a_block_of_zeros_are_zeros(self, bits, symmetric):
        assert not restored(np.zeros((2, 48), np.float32), bits=bits, block_size=16, symmetric=symmetric).any()

    def test_of_skewed_weights_are_closer_with_zero_points(self):
        weight = np.abs(random_weight(8, 256))
        errors = {
            symmetric: np.abs(restored(weight, bits=4, block_size=32, symmetric=symmetric) - weight).mean()
            for symmetric in (True, False)
        }
        assert errors[False] < 0.6 * errors[True]

    @pytest.mark.parametrize("threads", [1, 3])
    def test_do_not_depend_on_how_the_rows_are_divided(self, monkeypatch, threads):
        weight = random_weight(50, 96)
        whole = quantize_blocks(weight, bits=4, block_size=32, symmetric=False)
        monkeypatch.setattr(block_quantization, "CHUNK_VALUES", 7 * 96)
        parts = quantize_blocks(weight, bits=4, block_size=32, symmetric=False, threads=threads)
        assert np.array_equal(whole.codes, parts.codes)
        assert np.array_equal(whole.scales, parts.scales)
        assert np.array_equal(whole.zero_points, parts.zero_points)

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
    def test_are_the_same_for_a_weight_stored_in_another_precision(self, dtype):
        weight = random_weight(4, 64).astype(dtype)
        single = restored(weight.astype(np.float32), bits=8, block_size=32, symmetric=True)
        assert np.array_equal(restored(weight, bits=8, block_size=32, symmetric=True), single)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_are_refused_for_weights_that_are_not_finite(self, value, symmetric):
        weight = random_weight(4, 64)
        weight[2, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            quantize_blocks(weight, bits=4, block_size=32, symmetric=symmetric)

    def test_leave_the_weight_untouched(self):
        weight = random_weight(4, 64)
        before = weight.copy()
        quantize_blocks(weight, bits=4, block_size=32, symmetric=False)
        assert np.array_equal(weight, before)


def product_model(
    weight: np.ndarray, form: str = "torch", bias: np.ndarray | None = None, **attributes: Any
) -> ir.Model:
    """y = x · Wᵀ (+ bias) for a weight [N, K], written in one of the ways that exporters write it."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", weight.shape[1]]))
    stored = np.ascontiguousarray(weight.T) if form in ("plain", "gemm") else weight
    w = ir.Value(
        name="w",
        const_value=ir.Tensor(stored, name="w"),
        shape=ir.Shape(stored.shape),
        type=ir.TensorType(ir.Tensor(stored).dtype),
    )
    initializers, nodes, last = [w], [], w
    if form == "cast":
        nodes.append(ir.node("Cast", [last], {"to": ir.DataType.FLOAT}, name="cast"))
        last = nodes[-1].outputs[0]
    if form in ("torch", "cast"):
        nodes.append(ir.node("Transpose", [last], {"perm": [1, 0]}, name="transpose"))
        last = nodes[-1].outputs[0]
    extra = []
    if bias is not None:
        extra = [ir.Value(name="b", const_value=ir.Tensor(bias, name="b"), type=ir.TensorType(ir.DataType.FLOAT))]
        initializers += extra
    if form.startswith("gemm"):
        nodes.append(
            ir.node("Gemm", [x, last, *extra], {"transB": int(form == "gemm_b"), **attributes}, name="product")
        )
    else:
        nodes.append(ir.node("MatMul", [x, last], name="product"))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", weight.shape[0]])
    nodes[-1].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layer']"
    graph = ir.Graph([x], [y], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def publish(bench):
    """Publish a graph as an artifact."""

    def publish(model: ir.Model) -> Artifact:
        staging = bench.new_folder("graph")
        like = Artifact(Manifest(format="onnx", components={}, interface=Interface(task="forward")), bench.store.blobs)
        made = save_onnx(model, OutputWriter(staging), like=like)
        return bench.store.publish(staging, made.manifest)

    return publish


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    path = artifact.file(ONNX_FILE)
    assert path is not None
    return onnx.load(path, load_external_data=False).graph


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(artifact).node)


class TestAProduct:
    @pytest.mark.parametrize(("bits", "symmetric"), KINDS)
    @pytest.mark.parametrize("shape", [(64, 32), (64, 16), (256, 256), (80, 32), (40, 64), (20, 256)])
    def test_in_onnx_runtime_is_that_of_the_restored_weight(self, bench, publish, bits, symmetric, shape):
        columns, block_size = shape
        weight, x = random_weight(24, columns), random_weight(5, columns, seed=1)
        made = bench.run(
            QuantizeWeights,
            publish(product_model(weight)),
            bits=bits,
            symmetric=symmetric,
            block_size=block_size,
            accuracy_level=1,
        )
        expected = x @ restored(weight, bits=bits, block_size=block_size, symmetric=symmetric).T
        (result,) = bench.session(made).run(None, {"x": x})
        np.testing.assert_allclose(result, expected, atol=1e-4)

    @pytest.mark.parametrize("form", ["torch", "cast", "plain", "gemm", "gemm_b"])
    def test_is_quantized_however_it_is_written(self, bench, publish, form):
        weight, x = random_weight(24, 64).astype(ml_dtypes.bfloat16), random_weight(5, 64, seed=1)
        if form != "cast":
            weight = weight.astype(np.float32)
        made = bench.run(QuantizeWeights, publish(product_model(weight, form)), bits=8, accuracy_level=1)
        assert operators(made) == {"MatMulNBits": 1}
        expected = x @ restored(weight, bits=8, block_size=32, symmetric=True).T
        np.testing.assert_allclose(bench.session(made).run(None, {"x": x})[0], expected, atol=1e-4)

    def test_keeps_its_bias(self, bench, publish):
        weight, x, bias = random_weight(24, 64), random_weight(5, 64, seed=1), random_weight(1, 24, seed=2)[0]
        made = bench.run(QuantizeWeights, publish(product_model(weight, "gemm", bias)), bits=8, accuracy_level=1)
        expected = x @ restored(weight, bits=8, block_size=32, symmetric=True).T + bias
        np.testing.assert_allclose(bench.session(made).run(None, {"x": x})[0], expected, atol=1e-4)

    def test_with_int8_activations_is_close(self, bench, publish):
        weight, x = random_weight(24, 64), random_weight(5, 64, seed=1)
        made = bench.run(QuantizeWeights, publish(product_model(weight)), bits=8)
        (result,) = bench.session(made).run(None, {"x": x})
        assert np.abs(result - x @ weight.T).max() < 0.03 * np.abs(x @ weight.T).max()

    def test_has_the_attributes_and_shapes_of_the_operator(self, bench, publish):
        made = bench.run(
            QuantizeWeights, publish(product_model(random_weight(24, 80))), symmetric=False, accuracy_level=2
        )
        (node,) = graph_of(made).node
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes == {"K": 80, "N": 24, "bits": 4, "block_size": 32, "accuracy_level": 2}
        shapes = {i.name: (tuple(i.dims), i.data_type) for i in graph_of(made).initializer}
        uint8, single = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
        assert shapes == {
            "w.q4": ((24, 3, 16), uint8),
            "w.scales": ((24, 3), single),
            "w.zero_points": ((24, 2), uint8),
        }
        path = made.file(ONNX_FILE)
        imports = {o.domain: o.version for o in onnx.load(path, load_external_data=False).opset_import}
        assert imports == {"": 23, "com.microsoft": 1}

    def test_keeps_its_name_and_module_scope(self, bench, publish):
        (node,) = graph_of(bench.run(QuantizeWeights, publish(product_model(random_weight(24, 64))))).node
        assert node.name == "product"
        assert [p.value for p in node.metadata_props] == ["['', 'layer']"]

    def test_is_smaller(self, bench, publish):
        before = publish(product_model(random_weight(256, 256)))
        after = bench.run(QuantizeWeights, before, block_size=32)
        assert after.manifest.weights_bytes == 256 * 256 // 2 + 256 * 8 * 4
        assert before.manifest.weights_bytes == 256 * 256 * 4

    @pytest.mark.parametrize(
        ("form", "attributes"), [("gemm", {"alpha": 0.5}), ("gemm", {"beta": 2.0}), ("gemm_b", {"alpha": -1.0})]
    )
    def test_that_matmulnbits_cannot_stand_for_is_left_alone(self, bench, publish, form, attributes):
        model = product_model(random_weight(24, 64), form, np.zeros(24, np.float32), **attributes)
        with pytest.raises(PipelineError, match="multiplies by no constant float weight"):
            bench.run(QuantizeWeights, publish(model))

    def test_of_two_activations_is_left_alone(self, bench, publish):
        model = product_model(random_weight(64, 64))
        x = model.graph.inputs[0]
        extra = ir.node("MatMul", [x, x], name="square")
        model.graph.insert_before(model.graph[0], extra)
        for node in model.graph:
            if node.name == "product":
                node.replace_input_with(0, extra.outputs[0])
        assert operators(bench.run(QuantizeWeights, publish(model))) == {"MatMul": 1, "MatMulNBits": 1}

    def test_by_a_stack_of_matrices_is_left_alone(self, bench, publish):
        model = product_model(random_weight(24, 64), "plain")
        stack = np.zeros((2, 64, 24), np.float32)
        model.graph.initializers["w"].const_value = ir.Tensor(stack, name="w")
        with pytest.raises(PipelineError, match="multiplies by no constant float weight"):
            bench.run(QuantizeWeights, publish(model))

    def test_with_a_weight_that_is_not_finite_names_it(self, bench, publish):
        weight = random_weight(24, 64)
        weight[0, 0] = np.nan
        with pytest.raises(PipelineError, match=r"weight 'w' cannot be quantized: .* not finite"):
            bench.run(QuantizeWeights, publish(product_model(weight)))

    def test_of_a_shared_weight_is_stored_once(self, bench, publish):
        model = product_model(random_weight(64, 64))
        product = next(node for node in model.graph if node.name == "product")
        again = ir.node("MatMul", [product.outputs[0], product.inputs[1]], name="again")
        model.graph.append(again)
        again.outputs[0].name, again.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(again.outputs[0])
        made = bench.run(QuantizeWeights, publish(model))
        assert operators(made) == {"MatMulNBits": 2}
        assert {i.name for i in graph_of(made).initializer} == {"w.q4", "w.scales"}

    def test_only_the_tensors_that_are_new_are_written(self, bench, publish):
        before = publish(product_model(random_weight(256, 256)))
        made = bench.run(QuantizeWeights, before)
        pack = next(e for n, e in made.component.files.items() if n != ONNX_FILE)
        assert pack.size_bytes < 256 * 256 // 2 + 256 * 8 * 4 + 4096
        assert set(bench.written[made.digest]) == {entry.digest for _, entry in made.manifest.entries()}


class TestALanguageModel:
    def test_in_8_bits_gives_nearly_the_same_logits(self, bench, exported_llama, logits_of):
        tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)
        made = bench.run(QuantizeWeights, exported_llama, bits=8)
        expected = logits_of(exported_llama, tokens)
        assert np.abs(logits_of(made, tokens) - expected).max() < 0.2 * expected.std()

    def test_has_every_linear_layer_quantized(self, bench, exported_llama):
        made = bench.run(QuantizeWeights, exported_llama)
        assert operators(made)["MatMulNBits"] == 15
        assert "MatMul" not in operators(made)

    def test_keeps_its_interface_and_companions(self, bench, exported_llama):
        made = bench.run(QuantizeWeights, exported_llama)
        assert made.interface == exported_llama.interface
        assert made.manifest.files == exported_llama.manifest.files

    def test_keeps_its_embedding_in_the_checkpoint_though_the_head_shares_it(self, bench, exported_llama, llama):
        made = bench.run(QuantizeWeights, exported_llama)
        embedding = made.component.tensors["model.embed_tokens.weight"]
        assert embedding == exported_llama.component.tensors["model.embed_tokens.weight"]
        assert made.component.files[embedding.file].path == llama.component.files["model.safetensors"].path
        assert "lm_head.weight.q4" in made.component.tensors

    def test_has_no_dead_casts_transpositions_or_weights(self, bench, exported_llama):
        graph = graph_of(bench.run(QuantizeWeights, exported_llama))
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        assert all(set(node.output) & read for node in graph.node)
        assert {i.name for i in graph.initializer} <= read
        assert not any(node.op_type == "Transpose" and node.input[0].endswith("weight.float32") for node in graph.node)

    def test_without_head_keeps_the_head(self, bench, exported_llama):
        made = bench.run(QuantizeWeights, exported_llama, head="keep")
        assert operators(made)["MatMulNBits"] == 14
        assert "lm_head.weight" in made.component.tensors

    def test_excludes_weights_by_name_and_pattern(self, bench, exported_llama):
        patterns = ["*.down_proj.*", "model.layers.0.self_attn.q_proj.weight"]
        made = bench.run(QuantizeWeights, exported_llama, exclude=patterns)
        left = {name for name in made.component.tensors if "proj" in name and name.endswith("weight")}
        assert left == {
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
        }

    def test_says_which_weight_a_pattern_was_meant_for(self, bench, exported_llama):
        with pytest.raises(PipelineError, match=r"exclude: 'lm_heat\.weight' matches none of the 15 weights") as caught:
            bench.run(QuantizeWeights, exported_llama, exclude=["lm_heat.weight"])
        assert caught.value.hint is not None and caught.value.hint.startswith("the nearest are 'lm_head.weight', ")

    def test_with_everything_excluded_is_an_error(self, bench, exported_llama):
        with pytest.raises(PipelineError, match="all 15 weights are excluded"):
            bench.run(QuantizeWeights, exported_llama, exclude=["*"])

    def test_that_is_quantized_already_has_nothing_to_quantize(self, bench, exported_llama):
        with pytest.raises(PipelineError, match="nothing to quantize"):
            bench.run(QuantizeWeights, bench.run(QuantizeWeights, exported_llama))

    def test_is_the_same_bytes_each_time(self, bench, exported_llama):
        first, second = (bench.run(QuantizeWeights, exported_llama, symmetric=False) for _ in range(2))
        assert first.digest == second.digest

    def test_reports_progress_weight_by_weight(self, bench, exported_llama):
        seen: list[tuple[float, str]] = []
        context = PassContext(
            output=OutputWriter(bench.new_folder("staging")), report_progress=lambda f, m: seen.append((f, m))
        )
        QuantizeWeights().run(exported_llama, QuantizeWeights.Params(), context)
        assert len(seen) == 15 and seen[0] == (0, "model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    "params", [{"bits": 5}, {"block_size": 48}, {"accuracy_level": 5}, {"bits": "4"}, {"group_size": 32}]
)
def test_parameters_that_the_operator_does_not_take_are_refused(params):
    with pytest.raises(ValidationError, match=next(iter(params))):
        QuantizeWeights.Params(**params)


def test_a_model_half_quantized_can_be_quantized_further(bench, exported_llama):
    part = bench.run(QuantizeWeights, exported_llama, bits=8, exclude=["*.mlp.*"])
    whole = bench.run(QuantizeWeights, part, bits=4)
    bits = Counter(node.attributes.get_int("bits") for node in load_onnx(whole).graph if node.op_type == "MatMulNBits")
    assert bits == {8: 9, 4: 6}


class TestMethods:
    """What each method does to a language model; its numbers are tested in test_quantize_methods."""

    @pytest.mark.parametrize("method", ["rtn", "hqq", "k_quant", "gptq"])
    def test_gives_nearly_the_same_logits_in_the_runner(self, bench, reading_llama, method):
        made = bench.run(QuantizeWeights, reading_llama, method=method, block_size=16, accuracy_level=0)
        tokens = np.random.default_rng(1).integers(3, 277, (1, 24), dtype=np.int64)
        (expected,), (given,) = (load_runner(a, ExecutionSpec()).score(tokens) for a in (reading_llama, made))
        assert operators(made)["MatMulNBits"] == 15 and "MatMul" not in operators(made)
        assert np.abs(given - expected).mean() < 0.3 * expected.std()

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["hqq", "k_quant", "gptq"])
    def test_takes_other_families(self, bench, family, logits_of, method):
        made = bench.run(QuantizeWeights, family, method=method, block_size=16, embedding="int8")
        tokens = np.random.default_rng(1).integers(3, 277, (2, 12), dtype=np.int64)
        expected = logits_of(family, tokens)
        assert np.abs(logits_of(made, tokens) - expected).mean() < 0.3 * expected.std()

    def test_gptq_is_closer_on_text_like_that_it_read(self, bench, reading_llama, logits_of):
        tokens = np.array([[(i * i) % 277 for i in range(700, 760)]], dtype=np.int64)
        expected = logits_of(reading_llama, tokens)
        errors = {}
        for method in ("rtn", "gptq"):
            made = bench.run(QuantizeWeights, reading_llama, method=method, accuracy_level=1)
            errors[method] = float(np.square(logits_of(made, tokens) - expected).mean())
        assert errors["gptq"] < 0.8 * errors["rtn"]

    @pytest.mark.parametrize("act_order", [False, True])
    def test_gptq_in_groups_of_inputs_is_the_same(self, bench, reading_llama, monkeypatch, act_order):
        whole = bench.run(QuantizeWeights, reading_llama, method="gptq", samples=4, act_order=act_order)
        monkeypatch.setattr(quantize_weights, "HESSIAN_BYTES", 4 * 96 * 96)
        parts = bench.run(QuantizeWeights, reading_llama, method="gptq", samples=4, act_order=act_order)
        codes = [
            {n: t.const_value.numpy() for n, t in load_onnx(a).graph.initializers.items() if n.endswith(".q4")}
            for a in (whole, parts)
        ]
        assert codes[0].keys() == codes[1].keys() and len(codes[0]) == 15
        assert all(np.mean(codes[0][name] == codes[1][name]) > 0.99 for name in codes[0])

    def test_gptq_depends_on_the_calibration_text_and_others_do_not(self):
        assert QuantizeWeights.facets(QuantizeWeights.Params(method="gptq")) == ("calibration_text", "seed", "threads")
        assert QuantizeWeights.facets(QuantizeWeights.Params()) == ()

    def test_gptq_without_a_tokenizer_says_what_it_lacks(self, bench, reading_llama):
        files = {n: e for n, e in reading_llama.manifest.files.items() if n != "tokenizer.json"}
        bare = Artifact(reading_llama.manifest.model_copy(update={"files": files}), reading_llama.blobs)
        with pytest.raises(PipelineError, match=r"calibration reads text, and the model has no tokenizer\.json"):
            bench.run(QuantizeWeights, bare, method="gptq")

    def test_hqq_has_real_zero_points(self, bench, reading_llama):
        made = bench.run(QuantizeWeights, reading_llama, method="hqq")
        zeros = made.tensor("lm_head.weight.zero_points")
        assert zeros.dtype == np.float32 and not np.array_equal(zeros, np.rint(zeros))

    def test_logs_what_was_quantized_and_what_was_left(self, bench, reading_llama, caplog):
        with caplog.at_level("INFO", logger="pipeline.pass"):
            bench.run(QuantizeWeights, reading_llama, exclude=["*.mlp.*"])
        messages = [record.getMessage() for record in caplog.records if record.name == "pipeline.pass"]
        assert messages[0] == "9 of 15 products by a constant weight quantized: rtn, 4 bits in blocks of 32"
        assert len(messages) == 7 and messages[1].startswith("left as it is: model.layers.0.mlp.gate_proj.weight (")

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"method": "k_quant", "symmetric": True}, "k_quant always has zero points"),
            ({"method": "hqq", "symmetric": True}, "hqq always has zero points"),
            ({"method": "hqq", "bits": 8}, "hqq takes 4 bits, not 8"),
            ({"samples": 8}, "samples: for `method: gptq` only, and this is rtn"),
            ({"method": "hqq", "damping": 0.1, "act_order": True}, "damping, act_order: for `method: gptq` only"),
            ({"head": True}, "head"),
            ({"embedding": "int2"}, "embedding"),
        ],
    )
    def test_with_parameters_that_exclude_each_other_are_refused(self, params, message):
        with pytest.raises(ValidationError, match=message):
            QuantizeWeights.Params(**params)

    def test_survive_the_way_to_the_worker(self):
        """There every parameter is given, the defaults, too."""
        for values in ({"method": "gptq", "samples": 3}, {"method": "hqq"}, {"method": "k_quant"}, {}):
            params = QuantizeWeights.Params.model_validate(values)
            assert QuantizeWeights.Params.model_validate_json(params.model_dump_json()) == params


class TestTheHeadAndTheEmbedding:
    @pytest.mark.parametrize(("head", "bits"), [("int8", {4: 14, 8: 1}), ("int4", {4: 15}), ("same", {4: 15})])
    def test_the_head_may_have_bits_of_its_own(self, bench, reading_llama, head, bits):
        made = bench.run(QuantizeWeights, reading_llama, head=head)
        nodes = [node for node in load_onnx(made).graph if node.op_type == "MatMulNBits"]
        assert Counter(node.attributes.get_int("bits") for node in nodes) == bits

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("embedding", ["int8", "int4"])
    def test_the_embedding_may_be_quantized_alone(self, bench, reading_llama, logits_of, embedding, symmetric):
        """With bits of 8 for the rest, what differs from 8 bits without it comes from the embedding."""
        plain = bench.run(QuantizeWeights, reading_llama, bits=8, symmetric=symmetric)
        made = bench.run(QuantizeWeights, reading_llama, bits=8, symmetric=symmetric, embedding=embedding)
        assert operators(made)["GatherBlockQuantized"] == 1
        assert "model.embed_tokens.weight" not in made.component.tensors
        tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)
        expected = logits_of(plain, tokens)
        error = np.abs(logits_of(made, tokens) - expected).mean()
        assert 0 < error < {"int8": 0.04, "int4": 0.3}[embedding] * expected.std()

    def test_a_table_that_the_head_shares_stays_one(self, bench, exported_llama, logits_of):
        tied = bench.run(QuantizeWeights, exported_llama, embedding="int4")
        tensors = tied.component.tensors
        rows, blocks = tensors["lm_head.weight.q4.rows"], tensors["lm_head.weight.q4"]
        assert (rows.offset, rows.length) == (blocks.offset, blocks.length)
        assert (rows.shape, blocks.shape) == ((300, 32), (300, 2, 16))
        assert not any(name.endswith("embed_tokens.weight") for name in tensors)
        other = bench.run(QuantizeWeights, exported_llama, embedding="int8")
        assert other.manifest.weights_bytes == tied.manifest.weights_bytes + 300 * 64 + 300 * 2 * 4
        tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)
        expected = logits_of(exported_llama, tokens)
        assert np.abs(logits_of(tied, tokens) - expected).mean() < 0.5 * expected.std()

    def test_a_table_whose_rows_fill_no_block_is_cut(self, bench, publish):
        """The operator for products pads rows, that for tables does not."""
        table = random_weight(30, 40)
        tokens = ir.Value(name="tokens", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows"]))
        w = ir.Value(name="w", const_value=ir.Tensor(table, name="w"), type=ir.TensorType(ir.DataType.FLOAT))
        w.shape = ir.Shape(table.shape)
        transpose = ir.node("Transpose", [w], {"perm": [1, 0]})
        gather = ir.node("Gather", [w, tokens], name="look_up")
        product = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]], name="head")
        for node in (gather, transpose, product):
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        y = product.outputs[0]
        y.name, y.shape = "logits", ir.Shape(["rows", 30])
        graph = ir.Graph(
            [tokens],
            [y],
            nodes=[transpose, gather, product],
            initializers=[w],
            opset_imports={"": 23},
            name="g",
        )
        before = publish(ir.Model(graph, ir_version=10))
        interface = Interface(task="forward", inputs={"tokens": "tokens"}, outputs={"logits": "logits"})
        before = Artifact(before.manifest.model_copy(update={"interface": interface}), before.blobs)
        made = bench.run(QuantizeWeights, before, bits=8, embedding="int8", accuracy_level=1)
        ids = np.array([3, 17, 29])
        expected = restored(table, bits=8, block_size=32, symmetric=True)
        (result,) = bench.session(made).run(None, {"tokens": ids})
        np.testing.assert_allclose(result, expected[ids] @ expected.T, atol=1e-4)

    def test_a_graph_without_an_embedding_is_told_so(self, bench, publish):
        with pytest.raises(PipelineError, match="looks no token up in a constant float table"):
            bench.run(QuantizeWeights, publish(product_model(random_weight(24, 64))), embedding="int8")

    def test_a_graph_without_a_head_is_told_so(self, bench, publish):
        with pytest.raises(PipelineError, match="no product that yields logits"):
            bench.run(QuantizeWeights, publish(product_model(random_weight(24, 64))), head="int8")

    def test_nodes_are_excluded_by_name_too(self, bench, publish):
        with pytest.raises(PipelineError, match="all 1 weights are excluded"):
            bench.run(QuantizeWeights, publish(product_model(random_weight(24, 64))), exclude=["prod*"])
