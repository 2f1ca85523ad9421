"""onnxoptimizer: what its rules do to small graphs, what survives them, and which of them are refused."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxoptimizer
import pytest
from pydantic import ValidationError

from passes.graph import onnxoptimizer as module
from passes.graph.onnxoptimizer import RULES_OF, UNFIT, OnnxOptimizer
from pipeline import (
    Artifact,
    FileEntry,
    Interface,
    Manifest,
    PassContext,
    PipelineError,
    TensorRef,
    load_onnx,
    referenced_tensor,
    save_onnx,
)
from pipeline.store.writer import OutputWriter

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
LARGE = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
"""256 KB: laid aside."""

X = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in load_onnx(artifact).graph.all_nodes())


def result(bench: Any, artifact: Artifact, x: np.ndarray = X) -> np.ndarray:
    outputs: list[np.ndarray] = bench.session(artifact).run(None, {"x": x})
    return outputs[0]


RULES = {
    "eliminate_identity": (
        "(float[n, 256] x) => (float[n, 256] y) { a = Identity(x)  b = Relu(a)  y = Identity(b) }",
        {"Identity": 2, "Relu": 1},
        {"Relu": 1},
    ),
    "eliminate_deadend": (
        "(float[n, 256] x) => (float[n, 256] y) { y = Relu(x)  a = MatMul(x, w)  b = Abs(a) }",
        {"Relu": 1, "MatMul": 1, "Abs": 1},
        {"Relu": 1},
    ),
    "fuse_transpose_into_gemm": (
        "(float[n, 256] x) => (float[n, 256] y) { t = Transpose<perm = [1, 0]>(w)  y = Gemm(x, t) }",
        {"Transpose": 1, "Gemm": 1},
        {"Gemm": 1},
    ),
    "fuse_matmul_add_bias_into_gemm": (
        "(float[3, 256] x) => (float[3, 256] y) { m = MatMul(x, w)  y = Add(m, b) }",
        {"MatMul": 1, "Add": 1},
        {"Gemm": 1},
    ),
    "fuse_consecutive_transposes": (
        "(float[n, 256] x) => (float[n, 256] y) "
        "{ t = Transpose<perm = [1, 0]>(x)  u = Transpose<perm = [1, 0]>(t)  y = Relu(u) }",
        {"Transpose": 2, "Relu": 1},
        {"Transpose": 1, "Relu": 1},  # of nothing: eliminate_nop_transpose would drop it
    ),
    "eliminate_nop_cast": (
        "(float[n, 256] x) => (float[n, 256] y) { c = Cast<to = 1>(x)  y = Relu(c) }",
        {"Cast": 1, "Relu": 1},
        {"Relu": 1},
    ),
    "eliminate_nop_with_unit": (
        "(float[n, 256] x) => (float[n, 256] y) <float one = {1}> { c = Mul(x, one)  y = Relu(c) }",
        {"Mul": 1, "Relu": 1},
        {"Relu": 1},
    ),
    "eliminate_common_subexpression": (
        "(float[n, 256] x) => (float[n, 256] y) { a = MatMul(x, w)  b = MatMul(x, w)  y = Add(a, b) }",
        {"MatMul": 2, "Add": 1},
        {"MatMul": 1, "Add": 1},
    ),
}


@pytest.mark.parametrize("rule", RULES)
class TestARule:
    def graphs(self, bench, graph_artifact, rule):
        text, before, after = RULES[rule]
        weights = {"w": LARGE} if re.search(r"\bw\b", text) else {}
        weights |= {"b": LARGE[0]} if re.search(r"\(m, b\)", text) else {}
        made = graph_artifact(f"{HEADER} g {text}", **weights)
        assert operators(made) == before
        return made, bench.run(OnnxOptimizer, made, passes=[rule]), after

    def test_does_what_it_says_even_to_weights_that_it_does_not_see(self, bench, graph_artifact, rule):
        _, made, expected = self.graphs(bench, graph_artifact, rule)
        assert operators(made) == expected

    def test_leaves_the_results_as_they_were(self, bench, graph_artifact, rule):
        before, made, _ = self.graphs(bench, graph_artifact, rule)
        np.testing.assert_allclose(result(bench, made), result(bench, before), atol=1e-4)


class TestWeights:
    def test_stay_where_they_lie(self, bench, graph_artifact):
        text, _, _ = RULES["fuse_transpose_into_gemm"]
        before = graph_artifact(f"{HEADER} g {text}", w=LARGE)
        made = bench.run(OnnxOptimizer, before)
        assert made.component.tensors == before.component.tensors
        assert len(bench.written[made.digest]) == 1  # the graph

    def test_that_nothing_reads_any_more_are_dropped(self, bench, graph_artifact):
        text, _, _ = RULES["eliminate_deadend"]
        before = graph_artifact(f"{HEADER} g {text}", w=LARGE)
        assert set(before.component.tensors) == {"w"}
        assert not bench.run(OnnxOptimizer, before).component.tensors

    def test_of_a_convolution_are_computed_with(self, bench, graph_artifact):
        random = np.random.default_rng(2)
        weight = random.standard_normal((64, 64, 3, 3)).astype(np.float32)  # 147 KB
        scale, bias, mean, variance = random.random((4, 64)).astype(np.float32) + 0.5
        text = (
            "(float[n, 64, 8, 8] x) => (float[n, 64, 6, 6] y) "
            "{ c = Conv(x, w)  y = BatchNormalization(c, scale, bias, mean, variance) }"
        )
        before = graph_artifact(f"{HEADER} g {text}", w=weight, scale=scale, bias=bias, mean=mean, variance=variance)
        made = bench.run(OnnxOptimizer, before, passes=["fuse_bn_into_conv"])
        assert "BatchNormalization" not in operators(made)
        x = random.standard_normal((1, 64, 8, 8)).astype(np.float32)
        np.testing.assert_allclose(result(bench, made, x), result(bench, before, x), atol=1e-3)

    def test_small_and_equal_are_merged(self, bench, graph_artifact):
        text = "(float[n, 512] x) => (float[n, 512] y) { a = Add(x, b)  y = Mul(a, c) }"
        gain = np.linspace(1, 2, 512, dtype=np.float32)
        before = graph_artifact(f"{HEADER} g {text}", b=gain, c=gain.copy())
        made = bench.run(OnnxOptimizer, before, passes=["eliminate_duplicate_initializer"])
        assert len(made.component.tensors) == 1
        assert next(iter(made.component.tensors.values())) in before.component.tensors.values()

    def test_beyond_two_gigabytes_are_never_read(self, bench, tmp_path: Path):
        rows, columns = 30_000, 20_000
        path = tmp_path / "weights"
        with path.open("wb") as file:
            file.truncate(rows * columns * 4)  # a hole, as large as no message of protobuf may be
        size = path.stat().st_size
        entry = FileEntry(digest=hashlib.sha256(b"hole").hexdigest(), size_bytes=size, path=str(path))
        ref = TensorRef(file="weights", offset=0, length=size, dtype="float32", shape=(rows, columns))
        model = ir.from_proto(
            onnx.parser.parse_model(
                f"{HEADER} g (float[n, {rows}] x) => (float[n, {columns}] y) {{ i = Identity(x)  y = MatMul(i, w) }}"
            )
        )
        weight = next(value for node in model.graph for value in node.inputs if value is not None and value.name == "w")
        weight.const_value = referenced_tensor("w", path, ref, entry)
        weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape((rows, columns))
        model.graph.register_initializer(weight)
        like = Artifact(Manifest(format="onnx", components={}, interface=Interface(task="forward")), bench.store.blobs)
        before = save_onnx(model, OutputWriter(bench.new_folder("large")), like=like)
        before = Artifact(before.manifest, bench.folder)
        staging = bench.new_folder("optimized")
        blob = before.component.files["model.onnx"]
        place = before.locate(blob)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        made = OnnxOptimizer().run(before, OnnxOptimizer.Params(), PassContext(output=OutputWriter(staging)))
        assert made.component.tensors["w"].length == size
        assert made.component.files[made.component.tensors["w"].file].path == str(path)


class TestWhatSurvives:
    def test_are_operators_of_other_domains_and_of_opset_23(self, bench, graph_artifact):
        text = (
            "(float[n, 256] x) => (float[n, 256] y) "
            "{ i = Identity(x)  r = RMSNormalization<axis = -1>(i, gain)  y = com.microsoft.QuickGelu<alpha = 1.0>(r) }"
        )
        before = graph_artifact(f"{HEADER} g {text}", gain=LARGE[0])
        made = bench.run(OnnxOptimizer, before)
        assert operators(made) == {"RMSNormalization": 1, "QuickGelu": 1}
        assert dict(load_onnx(made).opset_imports) == {"": 23, "com.microsoft": 1}
        np.testing.assert_allclose(result(bench, made), result(bench, before), atol=1e-5)

    def test_are_data_types_that_the_library_does_not_know(self, bench, graph_artifact):
        text = (
            "(float[n, 4] x) => (float[n, 4] y) "
            "{ i = Identity(x)  d = DequantizeLinear(codes, scale)  m = Mul(i, d)  y = Relu(m) }"
        )
        codes = np.array([1, -2, 3, -4], ml_dtypes.int4)
        before = graph_artifact(f"{HEADER} g {text}", codes=codes, scale=np.array(0.5, np.float32))
        made = bench.run(OnnxOptimizer, before)
        assert operators(made) == {"DequantizeLinear": 1, "Mul": 1, "Relu": 1}
        assert load_onnx(made).graph.initializers["codes"].dtype == ir.DataType.INT4
        x = np.ones((1, 4), np.float32)
        np.testing.assert_array_equal(result(bench, made, x), [[0.5, 0, 1.5, 0]])

    def test_are_local_functions_inlined(self, bench, graph_artifact):
        text = """<ir_version: 10, opset_import: ["" : 23, "mine" : 1]>
            g (float[n, 256] x) => (float[n, 256] y) { i = Identity(x)  y = mine.twice(i) }
            <opset_import: ["" : 23], domain: "mine"> twice (a) => (b) { b = Add(a, a) }"""
        made = bench.run(OnnxOptimizer, graph_artifact(text))
        assert operators(made) == {"Add": 1}
        np.testing.assert_array_equal(result(bench, made), X + X)

    def test_is_what_nodes_say_of_their_origin(self, bench, exported_llama):
        def scopes(artifact: Artifact) -> dict[str, str]:
            nodes = load_onnx(artifact).graph
            return {str(n.outputs[0].name): str(n.metadata_props) for n in nodes if n.metadata_props}

        before, after = scopes(exported_llama), scopes(bench.run(OnnxOptimizer, exported_llama))
        assert len(after) > 30
        assert all(before[name] == text for name, text in after.items())


class TestALanguageModel:
    @pytest.fixture(scope="class")
    def made(self, bench, exported_llama):
        return bench.run(OnnxOptimizer, exported_llama, fixed_point=True)

    def test_computes_the_same(self, made, exported_llama, decoder):
        tokens = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)
        before, after = decoder(exported_llama), decoder(made)
        for part in (tokens[:, :8], tokens[:, 8:11], tokens[:, 11:]):
            np.testing.assert_allclose(after.step(part), before.step(part), atol=1e-5)

    def test_has_fewer_nodes(self, made, exported_llama):
        assert operators(made).total() < operators(exported_llama).total()

    def test_keeps_its_interface_and_signature(self, made, exported_llama):
        assert made.interface == exported_llama.interface
        for kind in ("inputs", "outputs"):
            before, after = (getattr(load_onnx(artifact).graph, kind) for artifact in (exported_llama, made))
            assert [(v.name, v.dtype, v.shape) for v in before] == [(v.name, v.dtype, v.shape) for v in after]

    def test_keeps_its_weights_in_the_checkpoint(self, bench, made, exported_llama):
        assert set(made.component.tensors.items()) <= set(exported_llama.component.tensors.items())
        assert len(bench.written[made.digest]) == 1

    def test_is_the_same_bytes_each_time(self, bench, made, exported_llama):
        assert bench.run(OnnxOptimizer, exported_llama, fixed_point=True).digest == made.digest


def test_a_fixed_point_runs_the_rules_until_they_change_nothing(bench, graph_artifact):
    text = (
        "(float[n, 256] x) => (float[n, 256] y) { t = Transpose<perm = [1, 0]>(x)  i = Identity(t)  "
        "u = Transpose<perm = [1, 0]>(i)  y = Relu(u) }"
    )
    before = graph_artifact(f"{HEADER} g {text}")
    rules = ["fuse_consecutive_transposes", "eliminate_identity"]
    once = bench.run(OnnxOptimizer, before, passes=rules)
    assert operators(once)["Transpose"] == 2
    assert operators(bench.run(OnnxOptimizer, before, passes=rules, fixed_point=True))["Transpose"] == 1


class TestNames:
    def test_that_no_rule_has_are_refused_with_the_nearest_before_anything_runs(self):
        with pytest.raises(ValidationError, match=r"no rule 'eliminate_idenity'; the nearest of 48 is 'eliminate_id"):
            OnnxOptimizer.Params(passes=["eliminate_idenity"])

    def test_of_a_library_that_is_not_known_are_checked_by_the_worker(self, bench, graph_artifact, monkeypatch):
        monkeypatch.setattr(module, "RULES_OF", {})
        params = OnnxOptimizer.Params(passes=["fuse_everything"])
        before = graph_artifact(f"{HEADER} g (float[n] x) => (float[n] y) {{ y = Relu(x) }}")
        with pytest.raises(PipelineError, match=r"onnxoptimizer .*: there is no rule 'fuse_everything'"):
            bench.run(OnnxOptimizer, before, **params.model_dump())

    @pytest.mark.parametrize("rule", UNFIT)
    def test_of_rules_that_leave_no_usable_graph_are_refused_with_the_reason(self, rule):
        with pytest.raises(ValidationError, match=f"{rule}' cannot be used here: it "):
            OnnxOptimizer.Params(passes=[rule])

    def test_are_needed(self):
        with pytest.raises(ValidationError, match="the list is empty"):
            OnnxOptimizer.Params(passes=[])

    def test_by_version_are_those_of_the_library(self):
        known = RULES_OF.get(version("onnxoptimizer"))
        if known is None:
            pytest.skip(f"the rules of onnxoptimizer {version('onnxoptimizer')} are not listed; workers check names")
        assert sorted(known) == sorted(onnxoptimizer.get_available_passes())

    def test_of_the_default_are_all_usable(self):
        assert not UNFIT.keys() & set(onnxoptimizer.get_fuse_and_elimination_passes())


def test_a_graph_that_the_library_refuses_is_an_error_for_the_user(bench, graph_artifact, monkeypatch):
    def refuse(*_: Any) -> None:
        raise RuntimeError("Unknown tensor data type\nin C++")

    monkeypatch.setattr(onnxoptimizer, "optimize", refuse)
    before = graph_artifact(f"{HEADER} g (float[n] x) => (float[n] y) {{ y = Relu(x) }}")
    with pytest.raises(PipelineError, match=r"onnxoptimizer cannot take this graph: Unknown tensor data type$"):
        bench.run(OnnxOptimizer, before)


class TestCounts:
    """What the pass tells of each rule: nodes changed, of the nodes there were."""

    def counts(self, bench, artifact, **params):
        context = PassContext(output=OutputWriter(bench.new_folder("counts")))
        OnnxOptimizer().run(artifact, OnnxOptimizer.Params(**params), context)
        return context.rules

    @pytest.mark.parametrize(
        ("rule", "done", "of"),
        [
            ("eliminate_identity", 2, 3),
            ("fuse_transpose_into_gemm", 2, 2),
            ("fuse_matmul_add_bias_into_gemm", 1, 2),  # the Add; the MatMul that is left is another rule's
            ("eliminate_nop_cast", 1, 2),
            ("eliminate_common_subexpression", 1, 3),
        ],
    )
    def test_are_of_the_nodes_that_a_rule_changed(self, bench, graph_artifact, rule, done, of):
        text, _, _ = RULES[rule]
        weights = {"w": LARGE} if re.search(r"\bw\b", text) else {}
        weights |= {"b": LARGE[0]} if re.search(r"\(m, b\)", text) else {}
        made = graph_artifact(f"{HEADER} g {text}", **weights)
        assert self.counts(bench, made, passes=[rule])[rule] == (done, of)

    def test_are_zero_where_a_rule_matches_no_node(self, bench, graph_artifact):
        made = graph_artifact(f"{HEADER} g (float[n, 256] x) => (float[n, 256] y) {{ a = Relu(x)  y = Neg(a) }}")
        rules = ["fuse_transpose_into_gemm", "fuse_matmul_add_bias_into_gemm", "eliminate_identity"]
        assert self.counts(bench, made, passes=rules) == dict.fromkeys(rules, (0, 2))

    def test_of_nodes_that_a_rule_left_dead_are_the_clean_ups(self, bench, graph_artifact):
        text, _, _ = RULES["fuse_matmul_add_bias_into_gemm"]
        made = graph_artifact(f"{HEADER} g {text}", w=LARGE, b=LARGE[0])
        found = self.counts(bench, made, passes=["fuse_matmul_add_bias_into_gemm"])
        assert found == {"fuse_matmul_add_bias_into_gemm": (1, 2), "eliminate_deadend": (1, 2)}

    def test_add_up_over_rounds(self, bench, graph_artifact):
        """The Transposes of the second pair meet only when the first is gone."""
        text = (
            "(float[n, 256] x) => (float[n, 256] y) { a = Transpose<perm = [1, 0]>(x)  b = Transpose<perm = [1, 0]>(a) "
            "c = Identity(b)  d = Identity(c)  y = Relu(d) }"
        )
        made = graph_artifact(f"{HEADER} g {text}")
        once = self.counts(bench, made, passes=["eliminate_nop_transpose", "fuse_consecutive_transposes"])
        again = self.counts(
            bench, made, passes=["eliminate_nop_transpose", "fuse_consecutive_transposes"], fixed_point=True
        )
        assert once["eliminate_nop_transpose"] == (0, 5)
        assert again["eliminate_nop_transpose"] == (1, 5)

    def test_do_not_depend_on_the_names_of_nodes(self, bench, graph_artifact):
        made = graph_artifact(f"{HEADER} g (float[n, 256] x) => (float[n, 256] y) {{ a = Relu(x)  y = Neg(a) }}")
        found = self.counts(bench, made, passes=["set_unique_name_for_nodes"])
        assert found == {"set_unique_name_for_nodes": (0, 2)}


def test_a_node_that_takes_another_value_counts_where_none_is_gone():
    def graph(body):
        return onnx.parser.parse_graph(f"g (float[2] x) => (float[2] y) {{ {body} }}")

    before = graph("a = Relu(x)  b = Abs(x)  y = Add(a, b)")
    assert module.changed_nodes(before, graph("a = Relu(x)  b = Abs(x)  y = Add(a, a)")) == 1
    assert module.changed_nodes(before, graph("b = Abs(x)  a = Relu(x)  y = Add(a, b)")) == 0
    assert module.changed_nodes(before, graph("a = Relu(x)  y = Add(a, a)")) == 1  # the Abs, and not its reader
