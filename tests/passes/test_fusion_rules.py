"""The rules of fuse_transformer, each alone on a graph of a few nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from passes.graph.attention_mask import CausalMask, MaskInputs, causal_mask
from passes.graph.flat_products import flat_product, same_shape
from passes.graph.fusion import Left, NotFusedError, Rule, apply_rule, place_of, put_in_place
from passes.graph.kept_logits import keep_last_logits
from passes.graph.norm_rules import Gains, fold_gain, simplified_normalization, skip_normalization
from passes.graph.part_of_graph import DependsOnOthersError, compute
from passes.graph.rotary_table import rotary_tables
from passes.quantize.products import register, remove_unused

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
OPSETS = {"": 23, "com.microsoft": 1}
RANDOM = np.random.default_rng(0)


def graph_of(text: str, **initializers: np.ndarray) -> ir.Model:
    """A model of ONNX's text form, its shapes inferred."""
    model = onnx.parser.parse_model(HEADER + "agraph " + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in initializers.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, dict(feeds))
    return outputs


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def value_of(model: ir.Model, name: str) -> ir.Value:
    graph = model.graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    return next(value for value in values if value.name == name)


class TestARule:
    RULE = Rule(
        "no_negative",
        lambda graph: [node for node in graph if node.op_type == "Neg"],
        lambda node, _: put_in_place(node, [new := ir.node("Abs", node.inputs)], [(node.outputs[0], new.outputs[0])]),
    )

    def test_counts_what_it_did_and_keeps_the_names_of_outputs(self):
        model = graph_of("(float[2] x) => (float[2] y) { a = Neg(x)  y = Neg(a) }")
        outcome = apply_rule(self.RULE, model.graph, None)
        assert (outcome.done, outcome.of, outcome.left) == (2, 2, ())
        remove_unused(model)
        assert operators(model) == ["Abs", "Abs"]
        assert [output.name for output in model.graph.outputs] == ["y"]

    def test_names_what_it_left_and_why(self):
        def refuse(node: ir.Node, _: Any) -> None:
            raise NotFusedError("it is needed")

        model = graph_of("(float[2] x) => (float[2] y) { y = Neg(x) }")
        model.graph[0].name = "first"
        outcome = apply_rule(Rule("none", self.RULE.candidates, refuse), model.graph, None)
        assert (outcome.done, outcome.left) == (0, (Left("first", "it is needed"),))

    def test_names_a_node_by_the_module_that_it_comes_from(self):
        node = ir.node("Neg", [])
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model', 'model.layers.3', 'neg']"
        assert place_of(node) == "model.layers.3"


class TestAPartOfAGraph:
    def test_is_computed_from_what_is_given(self):
        model = graph_of("(int64[n] x, int64[n] z) => (int64[n] y) { a = Neg(x)  b = Abs(a)  y = Add(b, z) }")
        (made,) = compute([value_of(model, "b")], {value_of(model, "x"): np.array([1, -2])}, OPSETS)
        assert made.tolist() == [1, 2]

    def test_names_the_inputs_that_it_would_need(self):
        model = graph_of("(int64[n] x, int64[n] z) => (int64[n] y) { y = Add(x, z) }")
        with pytest.raises(DependsOnOthersError, match=r"^z$"):
            compute([value_of(model, "y")], {value_of(model, "x"): np.array([1])}, OPSETS)


MASK = """(int64[b, s] tokens, int64[b, t] mask, float[b, 2, p, 4] past) => (bool[b, 1, s, t] seen)
    <int64 zero = {{0}}, int64 one = {{1}}, int64[1] first = {{0}}, int64[1] third = {{2}}, int64[1] heads = {{1}},
     int64[2] rows = {{1, 2}}, int64 window = {{{window}}}>
    {{
        s = Shape<start: int = 1, end: int = 2>(tokens)   n = Squeeze(s)
        p = Shape<start: int = 2, end: int = 3>(past)     before = Squeeze(p)
        r = Range(zero, n, one)   q = Add(r, before)
        t = Add(before, n)        k = Range(zero, t, one)
        q2 = Unsqueeze(q, heads)
        causal = {comparison}
        far = Sub(q2, window)     near = Greater(k, far)
        both = And(causal, near)
        real = Cast<to: int = 9>(mask)   real4 = Unsqueeze(real, rows)
        seen = And({seen}, real4)
    }}"""


def mask_of(*, comparison: str = "LessOrEqual(k, q2)", seen: str = "causal", window: int = 4) -> CausalMask:
    model = graph_of(MASK.format(comparison=comparison, seen=seen, window=window))
    tokens, mask, past = model.graph.inputs
    inputs = MaskInputs(tokens=tokens, mask=mask, positions=None, pasts=(past,))
    return causal_mask(value_of(model, "seen"), inputs, length=32, opsets=OPSETS)


class TestAMask:
    def test_is_causal_where_it_lets_see_what_is_past(self):
        assert mask_of() == CausalMask(None)

    @pytest.mark.parametrize("window", [1, 4, 31])
    def test_has_a_window_where_it_forgets(self, window):
        assert mask_of(seen="both", window=window) == CausalMask(window)

    def test_has_none_where_the_window_is_longer_than_the_model(self):
        assert mask_of(seen="both", window=32) == CausalMask(None)

    @pytest.mark.parametrize("comparison", ["Less(k, q2)", "GreaterOrEqual(k, q2)", "LessOrEqual(k, t)"])
    def test_is_refused_where_it_lets_see_something_else(self, comparison):
        with pytest.raises(NotFusedError, match="not causal"):
            mask_of(comparison=comparison)

    def test_may_be_added_instead(self):
        text = MASK.format(comparison="LessOrEqual(k, q2)", seen="causal", window=4).replace(
            "(bool[b, 1, s, t] seen)", "(float[b, 1, s, t] added)"
        )
        text = text.replace("int64 zero", "float nothing = {0.0}, float never = {-1e9}, int64 zero")
        model = graph_of(text.rstrip().removesuffix("}") + "added = Where(seen, nothing, never) }")
        tokens, mask, past = model.graph.inputs
        inputs = MaskInputs(tokens=tokens, mask=mask, positions=None, pasts=(past,))
        assert causal_mask(value_of(model, "added"), inputs, length=16, opsets=OPSETS) == CausalMask(None)

    def test_is_refused_where_it_depends_on_what_is_cached(self):
        model = graph_of(
            "(int64[b, s] tokens, int64[b, t] mask, float[b, 1, t, 1] past, float[t] z) => (bool[b, 1, t, t] seen)"
            " { a = ReduceSum<keepdims: int = 1>(past)  c = Add(a, z)  seen = Equal(c, c) }"
        )
        tokens, mask, past, _ = model.graph.inputs
        inputs = MaskInputs(tokens=tokens, mask=mask, positions=None, pasts=(past,))
        with pytest.raises(NotFusedError, match="depends on z"):
            causal_mask(value_of(model, "seen"), inputs, length=16, opsets=OPSETS)


ROTARY = """(int64[b, s] positions, float other) => (float[b, s, 8] c, float[b, s, 8] d)
    <int64[1] last = {{2}}>
    {{
        p = Unsqueeze(positions, last)   f = Cast<to: int = 1>(p)
        {between}
        a = Mul(g, frequencies)   c = Cos(a)   d = Sin(a)
    }}"""


def tables_of(between: str) -> tuple[np.ndarray, np.ndarray]:
    frequencies = (10.0 ** -np.arange(0, 1, 0.125)).astype(np.float32)
    model = graph_of(ROTARY.format(between=between), frequencies=frequencies)
    cosines, sines = value_of(model, "c"), value_of(model, "d")
    return rotary_tables(cosines, sines, model.graph.inputs[0], length=6, opsets=OPSETS)


class TestARotaryTable:
    def test_holds_what_the_graph_computes_for_each_position(self):
        cosines, sines = tables_of("g = Identity(f)")
        angles = np.arange(6)[:, None] * 10.0 ** -np.arange(0, 1, 0.125)[None]
        np.testing.assert_allclose(cosines, np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sines, np.sin(angles), atol=1e-6)

    def test_is_refused_where_it_changes_with_the_length(self):
        with pytest.raises(NotFusedError, match="changes with the length"):
            tables_of("longest = ReduceMax<keepdims: int = 0>(f)  g = Div(f, longest)")

    def test_is_refused_where_it_depends_on_something_else(self):
        with pytest.raises(NotFusedError, match="depends on other"):
            tables_of("g = Mul(f, other)")


def gains_of(model: ir.Model) -> Gains:
    return Gains(
        opsets=OPSETS,
        add_tensor=lambda name, array: register(model, name, ir.Tensor(array, name=name)),
    )


X = RANDOM.standard_normal((2, 3, 16)).astype(np.float32)
Z = RANDOM.standard_normal((2, 3, 16)).astype(np.float32)
W = RANDOM.standard_normal(16).astype(np.float32)


class TestANorm:
    @pytest.mark.parametrize(
        ("norm", "operator"),
        [
            ("RMSNormalization<axis: int = -1>(s, w)", "SkipSimplifiedLayerNormalization"),
            ("LayerNormalization<axis: int = -1>(s, w, w)", "SkipLayerNormalization"),
        ],
    )
    def test_of_a_sum_becomes_one_operator_that_gives_the_sum_too(self, norm, operator):
        text = "(float[2, 3, 16] x, float[2, 3, 16] z) => (float[2, 3, 16] y, float[2, 3, 16] r)"
        model = graph_of(text + "{ s = Add(x, z)  e = Exp(s)  y = " + norm + "  r = Add(s, e) }", w=W)
        expected = run(model, {"x": X, "z": Z})
        outcome = apply_rule(skip_normalization(), model.graph, gains_of(model))
        assert (outcome.done, outcome.of) == (1, 1)
        assert sorted(operators(model)) == sorted([operator, "Exp", "Add"])
        for got, wanted in zip(run(model, {"x": X, "z": Z}), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)

    def test_of_a_sum_with_a_bias_is_no_candidate(self):
        model = graph_of(
            "(float[2, 3, 16] x) => (float[2, 3, 16] y) { s = Add(x, w)  y = RMSNormalization<axis: int = -1>(s, w) }",
            w=W,
        )
        assert apply_rule(skip_normalization(), model.graph, gains_of(model)).of == 0

    def test_over_two_axes_is_left(self):
        model = graph_of(
            "(float[2, 3, 16] x, float[2, 3, 16] z) => (float[2, 3, 16] y)"
            "{ s = Add(x, z)  y = RMSNormalization<axis: int = 1>(s, w) }",
            w=RANDOM.standard_normal((3, 16)).astype(np.float32),
        )
        outcome = apply_rule(skip_normalization(), model.graph, gains_of(model))
        assert "axis 1" in outcome.left[0].reason

    def test_has_its_computed_gain_folded(self):
        model = graph_of(
            "(float[2, 3, 16] x) => (float[2, 3, 16] y) <float one = {1.0}>"
            "{ g = Add(w, one)  y = RMSNormalization<axis: int = -1>(x, g) }",
            w=W,
        )
        expected = run(model, {"x": X})
        assert apply_rule(fold_gain(), model.graph, gains_of(model)).done == 1
        remove_unused(model)
        assert operators(model) == ["RMSNormalization"]
        np.testing.assert_array_equal(model.graph.initializers["w.gain"].const_value.numpy(), W + 1)
        np.testing.assert_allclose(run(model, {"x": X})[0], expected[0], atol=1e-6)

    def test_alone_becomes_the_runtimes_own(self):
        model = graph_of(
            "(float[2, 3, 16] x) => (float[2, 3, 16] y) { y = RMSNormalization<axis: int = -1>(x, w) }", w=W
        )
        expected = run(model, {"x": X})
        assert apply_rule(simplified_normalization(), model.graph, gains_of(model)).done == 1
        assert operators(model) == ["SimplifiedLayerNormalization"]
        np.testing.assert_allclose(run(model, {"x": X})[0], expected[0], atol=1e-5)


HEAD = """(float[2, s, 16] x) => (float[2, s, 32] logits, float[2, s, 16] present)
    { present = Relu(x)  h = Tanh(present)  r = Add(h, x)  n = SimplifiedLayerNormalization<axis: int = -1>(r, w)
      logits = MatMul(n, m) }"""
M = RANDOM.standard_normal((16, 32)).astype(np.float32)


class TestKeptLogits:
    def test_are_the_last_of_all(self):
        model = graph_of(HEAD, w=W, m=M)
        logits, present = run(model, {"x": X})
        assert keep_last_logits(model.graph, logits="logits", others=["present"]) == 2
        for keep in (1, 2, 3, 9):
            kept, whole = run(model, {"x": X, "logits_to_keep": np.array([keep])})
            np.testing.assert_allclose(kept, logits[:, -keep:], atol=1e-6)
            np.testing.assert_allclose(whole, present, atol=0)

    def test_are_cut_before_the_first_node_that_they_alone_need(self):
        model = graph_of(HEAD, w=W, m=M)
        keep_last_logits(model.graph, logits="logits", others=["present"])
        model.graph.sort()
        names = operators(model)
        assert names.index("Slice") < names.index("Tanh")

    @pytest.mark.parametrize(
        ("node", "reason"),
        [
            ("h = CumSum(present, one)", "CumSum"),
            ("t = Transpose<perm: ints = [0, 2, 1]>(present)  h = Transpose<perm: ints = [0, 2, 1]>(t)", "Transpose"),
            ("t = Tanh(present)  u = MatMul(square, t)  h = Identity(u)", "multiplies two activations"),
        ],
    )
    def test_are_refused_where_positions_could_mix(self, node, reason):
        text = HEAD.replace("h = Tanh(present)", node).replace("{ present", "<int64 one = {1}> { present", 1)
        model = graph_of(text, w=W, m=M, square=np.ones((2, 3, 3), np.float32))
        before = operators(model)
        with pytest.raises(NotFusedError, match=reason):
            keep_last_logits(model.graph, logits="logits", others=["present"])
        assert operators(model) == before


FLAT = """(float[b, s, {shape}] x) => (float[b, s, 32] y)
    <int64[2] flat = {{-1, 16}}, int64[1] width = {{32}}>
    {{
        n = Shape<start: int = 0, end: int = 2>(x)   parts = Concat<axis: int = 0>(n, width)
        f = Reshape(x, flat)   g = Gemm{attributes}(f, w, bias)   r = Reshape(g, parts)   y = Relu(r)
    }}"""


def flat_graph(shape: str = "16", attributes: str = "", weight: np.ndarray = M) -> ir.Model:
    bias = RANDOM.standard_normal(32).astype(np.float32)
    model = graph_of(FLAT.format(shape=shape, attributes=attributes), w=weight, bias=bias)
    value_of(model, "f").shape = ir.Shape(["b*s", 16])
    value_of(model, "g").shape = ir.Shape(["b*s", 32])
    value_of(model, "r").shape = ir.Shape(["b", "s", 32])
    return model


class TestAFlatProduct:
    @pytest.mark.parametrize(
        ("shape", "attributes", "weight"),
        [("16", "", M), ("16", "<transB: int = 1>", np.ascontiguousarray(M.T)), ("4, 4", "", M)],
    )
    def test_becomes_one_over_batch_and_sequence(self, shape, attributes, weight):
        model = flat_graph(shape, attributes, weight)
        x = X.reshape(2, 3, *(int(n) for n in shape.split(",")))
        (expected,) = run(model, {"x": x})
        assert apply_rule(flat_product(), model.graph, None).done == 1
        remove_unused(model)
        assert "Gemm" not in operators(model)
        np.testing.assert_allclose(run(model, {"x": x})[0], expected, atol=1e-5)

    def test_that_scales_is_left(self):
        outcome = apply_rule(flat_product(), flat_graph(attributes="<alpha: float = 2.0>").graph, None)
        assert outcome.left[0].reason == "it scales its operands"


def test_a_reshape_to_the_same_shape_goes():
    model = graph_of("(float[b, s, 16] x) => (float[b, s, 16] y) { n = Shape(x)  r = Reshape(x, n)  y = Relu(r) }")
    value_of(model, "r").shape = model.graph.inputs[0].shape
    assert apply_rule(same_shape(), model.graph, None).done == 1
    remove_unused(model)
    assert operators(model) == ["Relu"]
