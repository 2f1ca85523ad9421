"""optimize_onnxruntime: what each level does, where the weights stay, and that a wrong graph is noticed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from passes.graph import optimize_onnxruntime as module
from passes.graph.half_precision import to_half_precision
from passes.graph.optimize_onnxruntime import OptimizeOnnxRuntime
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, PassContext, PipelineError, Requires, load_onnx, save_onnx
from pipeline.hardware import describe_host
from pipeline.runtime import ExecutionSpec, load_runner
from pipeline.store.writer import OutputWriter

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
X = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
LARGE = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)

GELU = """(float[n, 64] x) => (float[n, 64] y)
    <float root = {1.4142135}, float one = {1}, float half = {0.5}>
    { m = MatMul(x, w)  d = Div(m, root)  e = Erf(d)  a = Add(e, one)  p = Mul(m, a)  g = Mul(p, half)  y = Relu(g) }"""

QDQ = """(float[n, 64] x) => (float[n, 64] y)
    <float step = {0.05}, uint8 middle = {128}, int8 zero = {0}, float result = {0.2}>
    {
        q = QuantizeLinear(x, step, middle)  d = DequantizeLinear(q, step, middle)
        e = DequantizeLinear(w, small, zero)  m = MatMul(d, e)
        r = QuantizeLinear(m, result, middle)  y = DequantizeLinear(r, result, middle)
    }"""


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in load_onnx(artifact).graph)


def result(bench: Any, artifact: Artifact, x: np.ndarray = X) -> np.ndarray:
    outputs: list[np.ndarray] = bench.session(artifact).run(None, {"x": x})
    return outputs[0]


def steps(decoder: Any, artifact: Artifact) -> np.ndarray:
    """Logits of a prompt, a continuation and a single token, one after the other."""
    tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)
    model = decoder(artifact)
    return np.concatenate([model.step(part) for part in (tokens[:, :8], tokens[:, 8:11], tokens[:, 11:])], axis=1)


@pytest.fixture(scope="module")
def quantized(bench, exported_llama):
    return bench.run(QuantizeWeights, exported_llama, bits=8)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
class TestALanguageModel:
    @pytest.mark.parametrize("kind", ["exported_llama", "quantized"])
    def test_computes_the_same(self, bench, decoder, request, level, kind):
        before = request.getfixturevalue(kind)
        made = bench.run(OptimizeOnnxRuntime, before, level=level)
        np.testing.assert_allclose(steps(decoder, made), steps(decoder, before), atol=1e-4)

    @pytest.mark.parametrize("kind", ["exported_llama", "quantized"])
    def test_keeps_its_weights_where_they_lie(self, bench, request, level, kind):
        before = request.getfixturevalue(kind)
        made = bench.run(OptimizeOnnxRuntime, before, level=level)

        def places(artifact: Artifact) -> set[tuple[str, int, int]]:
            files = artifact.component.files
            return {(files[t.file].digest, t.offset, t.length) for t in artifact.component.tensors.values()}

        assert places(made) <= places(before)
        assert made.component.tensors.items() <= before.component.tensors.items()
        assert len(bench.written[made.digest]) == 1  # the graph

    def test_keeps_its_interface_and_signature(self, bench, exported_llama, level):
        made = bench.run(OptimizeOnnxRuntime, exported_llama, level=level)
        assert made.interface == exported_llama.interface
        assert made.manifest.files == exported_llama.manifest.files
        for kind in ("inputs", "outputs"):
            before, after = (getattr(load_onnx(artifact).graph, kind) for artifact in (exported_llama, made))
            assert [(v.name, v.dtype, v.shape) for v in before] == [(v.name, v.dtype, v.shape) for v in after]

    def test_can_still_be_quantized(self, bench, exported_llama, level):
        made = bench.run(QuantizeWeights, bench.run(OptimizeOnnxRuntime, exported_llama, level=level))
        assert operators(made)["MatMulNBits"] == 15
        assert not {"MatMul", "FusedMatMul"} & operators(made).keys()

    def test_is_the_same_bytes_each_time(self, bench, exported_llama, level):
        assert len({bench.run(OptimizeOnnxRuntime, exported_llama, level=level).digest for _ in range(2)}) == 1


class TestTheBasicLevel:
    def test_drops_what_does_nothing_and_folds_constants(self, bench, graph_artifact):
        text = """(float[n, 64] x) => (float[n, 64] y) <float one = {1}, float two = {2}>
            { i = Identity(x)  three = Add(one, two)  y = Mul(i, three) }"""
        made = bench.run(OptimizeOnnxRuntime, graph_artifact(f"{HEADER} g {text}"), level="O1")
        assert operators(made) == {"Mul": 1}
        np.testing.assert_array_equal(result(bench, made), X * 3)

    def test_does_not_fuse(self, bench, graph_artifact):
        text = "(float[n, 64] x) => (float[n, 64] y) { s = Sigmoid(x)  m = Mul(x, s)  y = Relu(m) }"
        before = graph_artifact(f"{HEADER} g {text}")
        assert operators(bench.run(OptimizeOnnxRuntime, before, level="O1")) == {"Sigmoid": 1, "Mul": 1, "Relu": 1}
        assert operators(bench.run(OptimizeOnnxRuntime, before, level="O2")) == {"QuickGelu": 1, "Relu": 1}


class TestTheExtendedLevel:
    def test_fuses_gelu(self, bench, graph_artifact):
        before = graph_artifact(f"{HEADER} g {GELU}", w=LARGE)
        made = bench.run(OptimizeOnnxRuntime, before, level="O2")
        assert operators(made) == {"MatMul": 1, "Gelu": 1, "Relu": 1}
        np.testing.assert_allclose(result(bench, made), result(bench, before), atol=1e-5)

    def test_leaves_a_decoder_s_transposed_weights_to_the_load(self, bench, exported_llama):
        made = bench.run(OptimizeOnnxRuntime, exported_llama, level="O2")
        assert operators(made)["MatMul"] == operators(exported_llama)["MatMul"] == 15
        assert "FusedMatMul" not in operators(made)
        assert operators(made)["QuickGelu"] == 2

    def test_still_merges_transposed_activations_into_their_product(self, bench, graph_artifact):
        text = "(float[n, 64] x) => (float[n, n] y) { t = Transpose<perm = [1, 0]>(x)  m = MatMul(x, t)  y = Relu(m) }"
        before = graph_artifact(f"{HEADER} g {text}")
        made = bench.run(OptimizeOnnxRuntime, before, level="O2")
        assert operators(made) == {"FusedMatMul": 1, "Relu": 1}
        np.testing.assert_allclose(result(bench, made), result(bench, before), rtol=1e-5)

    def test_of_graphs_that_the_python_fusions_cannot_take_goes_without_them(
        self, bench, graph_artifact, monkeypatch, caplog
    ):
        from onnxruntime.transformers import optimizer

        def refuse(*_: Any) -> None:
            raise IndexError("list index out of range")

        monkeypatch.setattr(optimizer, "optimize_by_fusion", refuse)
        made = bench.run(OptimizeOnnxRuntime, graph_artifact(f"{HEADER} g {GELU}", w=LARGE), level="O2")
        assert operators(made)["Gelu"] == 1
        assert "cannot take this graph, it is left as it is: IndexError" in caplog.text

    def test_bakes_in_no_layout_of_this_cpu(self, bench, graph_artifact):
        text = "(float[n, 32, 8, 8] x) => (float[n, 32, 6, 6] y) { c = Conv(x, w)  y = Relu(c) }"
        weight = np.random.default_rng(3).standard_normal((32, 32, 3, 3)).astype(np.float32)
        made = bench.run(OptimizeOnnxRuntime, graph_artifact(f"{HEADER} g {text}", w=weight), level="O3")
        assert {node.domain for node in load_onnx(made).graph} <= {"", "com.microsoft"}


class TestTheThirdLevel:
    @pytest.mark.parametrize(("opset", "operator"), [(17, "FastGelu"), (20, "Gelu")])
    def test_approximates_gelu(self, bench, graph_artifact, opset, operator):
        header = HEADER.replace(": 20", f": {opset}")
        before = graph_artifact(f"{header} g {GELU}", w=LARGE)
        exact, made = (bench.run(OptimizeOnnxRuntime, before, level=level) for level in ("O2", "O3"))
        assert operators(made) == {"MatMul": 1, operator: 1, "Relu": 1}
        np.testing.assert_allclose(result(bench, exact), result(bench, before), atol=1e-5)
        assert 1e-5 < np.abs(result(bench, made) - result(bench, before)).max() < 1e-2


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_calibrated_graph_computes_the_same(bench, graph_artifact, level):
    random = np.random.default_rng(4)
    weight, scale = random.integers(-100, 100, (64, 64), dtype=np.int8), np.array(0.01, np.float32)
    before = graph_artifact(f"{HEADER} g {QDQ}", w=weight, small=scale)
    made = bench.run(OptimizeOnnxRuntime, before, level=level)
    np.testing.assert_allclose(result(bench, made), result(bench, before), atol=0.2 + 1e-4)  # one step of the result
    assert made.component.tensors == before.component.tensors


class TestFoldedWeights:
    def test_are_written_as_new_ones(self, bench, decoder, exported_llama):
        made = bench.run(OptimizeOnnxRuntime, exported_llama, level="O1", fold_weights=True)
        before = exported_llama.component.tensors
        new = {name: ref for name, ref in made.component.tensors.items() if before.get(name) != ref}
        assert {ref.dtype for ref in new.values()} == {"float32"}
        assert made.manifest.weights_bytes > 1.5 * exported_llama.manifest.weights_bytes  # of half precision before
        assert operators(made)["Cast"] < operators(exported_llama)["Cast"]
        np.testing.assert_allclose(steps(decoder, made), steps(decoder, exported_llama), atol=1e-4)


class TestHalfPrecision:
    @pytest.fixture(scope="class")
    def halved(self, bench, exported_llama):
        staging = bench.new_folder("half")
        context = PassContext(output=OutputWriter(staging))
        model = load_onnx(exported_llama)
        interface = to_half_precision(model, exported_llama.interface, context)
        made = save_onnx(model, context.output, like=exported_llama, interface=interface)
        return bench.store.publish(staging, made.manifest)

    def test_computes_nearly_the_same(self, halved, exported_llama):
        tokens = np.random.default_rng(1).integers(3, 300, (1, 20), dtype=np.int64)
        before, after = (load_runner(a, ExecutionSpec()) for a in (exported_llama, halved))
        for act in (lambda r: r.prefill(tokens[:, :12]), lambda r: r.decode(tokens[:, 12:13])):
            expected = act(before)
            assert 0 < np.abs(act(after) - expected).max() < 0.02 * expected.std()

    def test_has_weights_and_cache_of_two_bytes(self, halved):
        assert halved.interface.cache.dtype == "float16"
        assert {ref.dtype for ref in halved.component.tensors.values()} <= {"float16", "bfloat16"}

    def test_turns_positions_into_angles_in_single_precision(self, halved):
        graph = load_onnx(halved).graph
        waiting = [value for node in graph if node.op_type in ("Cos", "Sin") for value in node.inputs]
        seen = set()
        while waiting:
            value = waiting.pop()
            seen.add(value)
            if (node := value.producer()) is not None:
                waiting.extend(other for other in node.inputs if other is not None and other not in seen)
        dtypes = {value.dtype.name for value in seen if value.dtype is not None}
        assert "FLOAT" in dtypes
        assert "FLOAT16" not in dtypes

    def test_of_a_graph_with_branches_is_refused(self, bench, graph_artifact):
        text = """(float[n, 64] x, bool c) => (float[n, 64] y)
            { y = If (c) <then_branch = t () => (float[n, 64] a) { a = Relu(x) },
                          else_branch = e () => (float[n, 64] b) { b = Abs(x) }> }"""
        before = graph_artifact(f"{HEADER} g {text}")
        context = PassContext(output=OutputWriter(bench.new_folder("half")))
        with pytest.raises(PipelineError, match="a graph with If cannot be converted to float16"):
            to_half_precision(load_onnx(before), before.interface, context)

    def test_copies_between_devices_are_no_part_of_the_graph(self, graph_artifact):
        text = """(float[n, 64] x) => (float[n, 64] y, float[n, 64] z, float[n, 64] again)
            { a = MemcpyFromHost(x)  b = Relu(a)  c = MemcpyToHost(b)  y = Abs(c)  d = Abs(a)
              z = MemcpyToHost(d)  again = MemcpyFromHost(x) }"""
        copied = load_onnx(graph_artifact(f"{HEADER} g {text}"))
        module._drop_copies(copied)
        assert Counter(node.op_type for node in copied.graph) == {"Relu": 1, "Abs": 2, "Identity": 1}
        assert [value.name for value in copied.graph.outputs] == ["y", "z", "again"]
        onnx.checker.check_model(ir.to_proto(copied))
        x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
        session = onnxruntime.InferenceSession(ir.to_proto(copied).SerializeToString())
        y, z, again = session.run(None, {"x": x})
        np.testing.assert_array_equal(y, np.maximum(x, 0))
        np.testing.assert_array_equal(z, np.abs(x))
        np.testing.assert_array_equal(again, x)

    def test_asks_for_a_gpu_when_the_plan_is_made(self):
        def requirements(level: str) -> Requires:
            return OptimizeOnnxRuntime.requirements(OptimizeOnnxRuntime.Params(level=level))

        assert requirements("O4") == Requires(device="cuda", providers=("CUDAExecutionProvider",))
        assert requirements("O3") == Requires()

    @pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not describe_host().gpus,
        reason="float16 is for CUDA: it needs a GPU and an ONNX Runtime that has CUDA",
    )
    def test_runs_on_cuda(self, bench, exported_llama):
        made = bench.run(OptimizeOnnxRuntime, exported_llama, level="O4")
        runner = load_runner(made, ExecutionSpec(device="cuda"))
        tokens = np.random.default_rng(1).integers(3, 300, (1, 20), dtype=np.int64)
        expected = load_runner(exported_llama, ExecutionSpec()).prefill(tokens)
        assert np.abs(runner.prefill(tokens) - expected).max() < 0.05 * expected.std()


def test_a_graph_that_came_out_wrong_is_refused(bench, exported_llama, monkeypatch):
    def damaged(model: Any, artifact: Artifact, context: PassContext) -> Any:
        node = next(node for node in model.graph if node.op_type == "RMSNormalization")
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1.0)
        return model

    monkeypatch.setattr(module, "_fused", damaged)
    with pytest.raises(PipelineError, match=r"differs from the one before by .* of the standard deviation; 0\.001"):
        bench.run(OptimizeOnnxRuntime, exported_llama, level="O2")


def test_a_graph_that_onnx_runtime_refuses_is_an_error_for_the_user(bench, graph_artifact):
    before = graph_artifact(f"{HEADER} g (float[n, 64] x) => (float[n, 64] y) {{ y = com.microsoft.Nonsense(x) }}")
    with pytest.raises(PipelineError, match=r"ONNX Runtime refuses the graph: .*Nonsense"):
        bench.run(OptimizeOnnxRuntime, before, level="O1")


@pytest.mark.slow
def test_a_graph_of_the_oldest_operator_set_is_fused_and_computes_the_same(bench, llama, decoder):
    from passes.export.export_onnx import ExportOnnx

    before = bench.run(ExportOnnx, llama, opset=18)
    made = bench.run(OptimizeOnnxRuntime, before, level="O2")
    assert operators(made).total() < operators(before).total()
    np.testing.assert_allclose(steps(decoder, made), steps(decoder, before), atol=1e-4)
