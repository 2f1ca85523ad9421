"""quantize_dynamic: its numbers are those of ONNX Runtime's own tool, and its graphs run."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.quantize import channel_quantization
from passes.quantize.channel_quantization import dequantize_channels, quantize_channels
from passes.quantize.quantize_dynamic import QuantizeDynamic
from pipeline import Artifact, Interface, Manifest, PipelineError, load_onnx, save_onnx
from pipeline.artifact import ONNX_FILE
from pipeline.measure.effect import compare_artifacts
from pipeline.store.folder import materialize
from pipeline.store.writer import OutputWriter

KINDS = [(signed, per_channel) for signed in (True, False) for per_channel in (True, False)]


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in load_onnx(artifact).graph)


def two_products(*, gemm: bool = False, addends: tuple[int, ...] = (24,)) -> ir.Model:
    """y = relu(x · A) · B (+ c), both weights [K, N] as quantization tools expect them."""

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 48]))
    a, b, c = (
        constant("a", random_array(48, 64)),
        constant("b", random_array(64, 24, seed=1)),
        constant("c", random_array(*addends, seed=2)),
    )
    nodes = [ir.node("MatMul", [x, a], name="first")]
    nodes.append(ir.node("Relu", [nodes[-1].outputs[0]], name="relu"))
    last = nodes[-1].outputs[0]
    nodes.append(ir.node("Gemm", [last, b, c], name="second") if gemm else ir.node("MatMul", [last, b], name="second"))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", 24])
    graph = ir.Graph(
        [x], [y], nodes=nodes, initializers=[a, b, c] if gemm else [a, b], opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def publish(bench):
    def publish(model: ir.Model) -> Artifact:
        staging = bench.new_folder("graph")
        like = Artifact(Manifest(format="onnx", components={}, interface=Interface(task="forward")), bench.store.blobs)
        return bench.store.publish(staging, save_onnx(model, OutputWriter(staging), like=like).manifest)

    return publish


class TestTheNumbers:
    @pytest.mark.parametrize(("signed", "per_channel"), KINDS)
    @pytest.mark.parametrize("reduce_range", [True, False])
    def test_are_those_of_onnx_runtimes_own_quantizer(self, bench, publish, signed, per_channel, reduce_range):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        folder = bench.new_folder("theirs") / "model"
        materialize(publish(two_products()), folder)
        quantize_dynamic(
            folder / "model.onnx",
            folder / "int8.onnx",
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        )
        theirs = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "int8.onnx").graph.initializer}
        ours = quantize_channels(
            random_array(48, 64).T, signed=signed, per_channel=per_channel, reduce_range=reduce_range
        )
        np.testing.assert_allclose(ours.scales, theirs["a_scale"], rtol=1e-6)
        assert np.array_equal(ours.zero_points, theirs["a_zero_point"])
        assert np.array_equal(ours.codes, theirs["a_quantized"])

    @settings(max_examples=40, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 6), st.integers(1, 70)),
        kind=st.sampled_from(KINDS),
        draw=st.tuples(st.floats(1e-20, 1e20), st.floats(-3, 3), st.integers(0, 100)),
    )
    def test_stand_for_weights_within_a_step_of_the_originals(self, shape, kind, draw):
        (signed, per_channel), (scale, shift, seed) = kind, draw
        weight = (random_array(*shape, seed=seed) + np.float32(shift)) * np.float32(scale)
        quantized = quantize_channels(weight, signed=signed, per_channel=per_channel)
        error = np.abs(dequantize_channels(quantized) - weight)
        assert (error <= np.reshape(quantized.scales, (-1, 1)) * (0.501 if signed else 1.001)).all()

    def test_of_a_channel_of_zeros_are_zeros(self):
        assert not dequantize_channels(quantize_channels(np.zeros((3, 8), np.float32))).any()

    @pytest.mark.parametrize("threads", [1, 3])
    def test_do_not_depend_on_how_the_rows_are_divided(self, monkeypatch, threads):
        weight = random_array(50, 96).astype(ml_dtypes.bfloat16)
        whole = quantize_channels(weight)
        monkeypatch.setattr(channel_quantization, "CHUNK_VALUES", 7 * 96)
        parts = quantize_channels(weight, threads=threads)
        assert np.array_equal(whole.codes, parts.codes) and np.array_equal(whole.scales, parts.scales)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_are_refused_for_weights_that_are_not_finite(self, value):
        weight = random_array(4, 8)
        weight[2, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            quantize_channels(weight)


class TestAGraph:
    @pytest.mark.parametrize("weight_type", ["int8", "uint8"])
    @pytest.mark.parametrize("per_channel", [True, False])
    def test_gives_what_onnx_runtimes_own_tool_makes_of_it(self, bench, publish, weight_type, per_channel):
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        before = publish(two_products())
        folder = bench.new_folder("theirs") / "model"
        materialize(before, folder)
        kind = QuantType.QInt8 if weight_type == "int8" else QuantType.QUInt8
        quantize_dynamic(folder / "model.onnx", folder / "int8.onnx", per_channel=per_channel, weight_type=kind)
        x = random_array(5, 48, seed=3)
        (theirs,) = onnxruntime.InferenceSession(folder / "int8.onnx").run(None, {"x": x})
        made = bench.run(QuantizeDynamic, before, weight_type=weight_type, per_channel=per_channel)
        (ours,) = bench.session(made).run(None, {"x": x})
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
        assert operators(made) == {"DynamicQuantizeMatMul": 2, "Relu": 1}

    @pytest.mark.parametrize("addends", [(24,), (1,), (1, 24), (5, 1), ()])
    def test_keeps_the_bias_of_a_gemm_of_whatever_shape(self, bench, publish, addends):
        before = publish(two_products(gemm=True, addends=addends))
        made = bench.run(QuantizeDynamic, before)
        assert operators(made)["DynamicQuantizeMatMul"] == 2
        assert operators(made)["Add"] == (0 if addends == (24,) else 1)
        x = random_array(5, 48, seed=3)
        expected = bench.session(before).run(None, {"x": x})[0]
        result = bench.session(made).run(None, {"x": x})[0]
        assert np.abs(result - expected).max() < 0.03 * np.abs(expected).max()

    def test_counts_as_quantized(self, bench, publish):
        before = publish(two_products())
        effect = compare_artifacts(before, bench.run(QuantizeDynamic, before, exclude=["second"]))
        assert (effect.kind, effect.weights_quantized) == ("weights", (1, 2))

    def test_in_half_precision_is_refused(self, bench, publish):
        model = two_products()
        for value in [*model.graph.inputs, *model.graph.initializers.values(), *(n.outputs[0] for n in model.graph)]:
            value.dtype = ir.DataType.FLOAT16
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float16), name=value.name)
        with pytest.raises(PipelineError, match="take float32 activations"):
            bench.run(QuantizeDynamic, publish(model))

    def test_with_a_weight_that_is_not_finite_names_it(self, bench, publish):
        model = two_products()
        broken = random_array(64, 24)
        broken[3, 3] = np.nan
        model.graph.initializers["b"].const_value = ir.Tensor(broken, name="b")
        with pytest.raises(PipelineError, match=r"weight 'b' cannot be quantized: .* not finite"):
            bench.run(QuantizeDynamic, publish(model))


class TestALanguageModel:
    @pytest.mark.slow
    def test_gives_nearly_the_same_logits(self, bench, family, logits_of):
        tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)
        made = bench.run(QuantizeDynamic, family)
        expected = logits_of(family, tokens)
        assert np.abs(logits_of(made, tokens) - expected).max() < 0.35 * expected.std()
        assert operators(made)["DynamicQuantizeMatMul"] == 15
        assert "MatMul" not in operators(made)

    def test_decodes_after_its_cache_nearly_as_before(self, bench, reading_llama, decoder):
        tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)

        def last(artifact: Artifact) -> np.ndarray:
            step = decoder(artifact)
            step.step(tokens[:, :11])
            return step.step(tokens[:, 11:])

        expected = last(reading_llama)
        assert np.abs(last(bench.run(QuantizeDynamic, reading_llama)) - expected).mean() < 0.1 * expected.std()

    def test_keeps_its_head_where_asked(self, bench, reading_llama):
        made = bench.run(QuantizeDynamic, reading_llama, head="keep")
        assert operators(made)["DynamicQuantizeMatMul"] == 14
        assert "lm_head.weight" in made.component.tensors

    def test_writes_a_byte_a_weight(self, bench, reading_llama):
        made = bench.run(QuantizeDynamic, reading_llama)
        pack = next(e for n, e in made.component.files.items() if n != ONNX_FILE and e.path is None)
        weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * 300
        assert weights < pack.size_bytes < weights + 40 * 4096

    def test_says_which_weight_a_pattern_was_meant_for(self, bench, reading_llama):
        with pytest.raises(
            PipelineError, match=r"exclude: '\*\.dwon_proj\.\*' matches none of the 15 weights"
        ) as caught:
            bench.run(QuantizeDynamic, reading_llama, exclude=["*.dwon_proj.*"])
        assert "down_proj" in str(caught.value.hint)
