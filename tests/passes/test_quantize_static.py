"""quantize_static: calibrated ranges, and graphs that run with a cache."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from passes.quantize import quantize_static, ranges
from passes.quantize.calibration import calibration_tokens, observe
from passes.quantize.quantize_static import QuantizeStatic, activation_parameters
from passes.quantize.ranges import activation_ranges
from pipeline import Artifact, Interface, PassContext, PipelineError, load_onnx
from pipeline.measure.effect import compare_artifacts
from pipeline.runtime.protocol import ExecutionSpec, load_runner
from pipeline.store.writer import OutputWriter


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in load_onnx(artifact).graph)


def input_of_product(artifact: Artifact, weight: str) -> str:
    from passes.quantize.products import find_products

    return next(str(p.input.name) for p in find_products(load_onnx(artifact)) if p.weight_name == weight)


@pytest.fixture
def context(bench) -> PassContext:
    text = " ".join(f"w{i * i % 277}" for i in range(1500))
    return PassContext(output=OutputWriter(bench.new_folder("out")), facets={"seed": 0, "calibration_text": text})


def without(artifact: Artifact, name: str) -> Artifact:
    """The artifact without one of its companions."""
    files = {n: e for n, e in artifact.manifest.files.items() if n != name}
    return Artifact(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)


class TestCalibrationText:
    def test_gives_pieces_that_do_not_overlap(self, reading_llama, context):
        tokens = calibration_tokens(reading_llama, context, samples=8, length=32)
        ids = [i * i % 277 for i in range(1500)]
        assert tokens.shape == (8, 32) and tokens.dtype == np.int64
        starts = {next(s for s in range(0, 1500, 32) if ids[s : s + 32] == list(row)) for row in tokens}
        assert len(starts) == 8

    def test_depends_on_the_seed_alone(self, reading_llama, context):
        import dataclasses

        first, again = (calibration_tokens(reading_llama, context, samples=8, length=32) for _ in range(2))
        other = dataclasses.replace(context, facets={**context.facets, "seed": 1})
        assert np.array_equal(first, again)
        assert not np.array_equal(first, calibration_tokens(reading_llama, other, samples=8, length=32))

    def test_is_cut_to_what_the_model_takes(self, reading_llama, context):
        assert calibration_tokens(reading_llama, context, samples=2, length=512).shape == (2, 64)

    def test_gives_all_it_has(self, reading_llama, context):
        assert len(calibration_tokens(reading_llama, context, samples=1000, length=32)) == 1500 // 32

    def test_needs_a_tokenizer(self, reading_llama, context):
        with pytest.raises(PipelineError, match=r"no tokenizer\.json"):
            calibration_tokens(without(reading_llama, "tokenizer.json"), context, samples=2, length=8)

    def test_needs_a_tokenizer_that_can_be_read(self, exported_llama, context):
        with pytest.raises(PipelineError, match=r"tokenizer\.json cannot be read"):
            calibration_tokens(exported_llama, context, samples=2, length=8)

    def test_needs_the_models_own_tokenizer(self, reading_llama, context):
        interface = reading_llama.interface.model_copy(update={"vocab_size": 100})
        other = Artifact(reading_llama.manifest.model_copy(update={"interface": interface}), reading_llama.blobs)
        with pytest.raises(PipelineError, match=r"the tokenizer gives token \d+ and the model's vocabulary has 100"):
            calibration_tokens(other, context, samples=2, length=8)


class TestObserving:
    def test_gives_the_values_that_flow_through_the_graph(self, bench, reading_llama, context):
        """The input of the head times the head is what the model gives."""
        name = input_of_product(reading_llama, "lm_head.weight")
        tokens = calibration_tokens(reading_llama, context, samples=3, length=16)
        (seen,) = observe(reading_llama, [name], tokens, threads=1, decode=False)
        head = reading_llama.tensor("lm_head.weight").astype(np.float32)
        (expected,) = load_runner(reading_llama, ExecutionSpec()).score(tokens)
        np.testing.assert_allclose(seen[name] @ head.T, expected, atol=1e-3)

    def test_follows_prompts_with_single_tokens_after_their_cache(self, reading_llama, context):
        name = input_of_product(reading_llama, "lm_head.weight")
        tokens = calibration_tokens(reading_llama, context, samples=3, length=16)
        (whole,) = observe(reading_llama, [name], tokens, threads=1, decode=False)
        parts = [values[name] for values in observe(reading_llama, [name], tokens, threads=1, decode=True)]
        assert [part.shape[1] for part in parts] == [12, 1, 1, 1, 1]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[name], atol=1e-3)

    def test_keeps_a_cache_in_bfloat16(self, graph_artifact):
        """Every step sees the tokens so far, which the cache holds."""
        from pipeline import CacheLayout

        text = """<ir_version: 10, opset_import: ["" : 18]>
            g (int64[b, s] tokens, bfloat16[b, 1, p, 1] past_k, bfloat16[b, 1, p, 1] past_v)
            => (float[b, 1, t, 1] logits, bfloat16[b, 1, t, 1] present_k, bfloat16[b, 1, t, 1] present_v) {
                axes = Constant <value_ints: ints = [1, 3]> ()
                heads = Unsqueeze (tokens, axes)
                new = Cast <to: int = 16> (heads)
                present_k = Concat <axis: int = 2> (past_k, new)
                present_v = Concat <axis: int = 2> (past_v, new)
                logits = Cast <to: int = 1> (present_k)
            }"""
        made = graph_artifact(text)
        roles = {f"{when}.{part}[0]": f"{when}_{part}" for when in ("past", "present") for part in "kv"}
        interface = Interface(
            task="causal-lm",
            inputs={"tokens": "tokens"} | {k: v for k, v in roles.items() if k.startswith("past")},
            outputs={"logits": "logits"} | {k: v for k, v in roles.items() if k.startswith("present")},
            cache=CacheLayout(layers=1, kv_heads=1, head_dim=1, dtype="bfloat16"),
        )
        artifact = Artifact(made.manifest.model_copy(update={"interface": interface}), made.blobs)
        tokens = np.arange(8)[None]
        seen = [v["logits"].ravel().tolist() for v in observe(artifact, ["logits"], tokens, threads=1, decode=True)]
        assert seen == [list(range(length)) for length in (4, 5, 6, 7, 8)]

    def test_covers_all_samples_run_by_run(self, reading_llama, context, monkeypatch):
        from passes.quantize import calibration

        monkeypatch.setattr(calibration, "RUN_TOKENS", 40)
        name = input_of_product(reading_llama, "lm_head.weight")
        tokens = calibration_tokens(reading_llama, context, samples=5, length=16)
        seen = [v[name].shape for v in observe(reading_llama, [name], tokens, threads=1, decode=False)]
        assert [shape[:2] for shape in seen] == [(2, 16), (2, 16), (1, 16)]

    def test_needs_a_graph_that_takes_tokens(self, reading_llama, context):
        manifest = reading_llama.manifest.model_copy(update={"interface": Interface(task="forward")})
        with pytest.raises(PipelineError, match="names no input `tokens`"):
            next(observe(Artifact(manifest, reading_llama.blobs), ["x"], np.zeros((1, 4)), threads=1, decode=False))


class TestRanges:
    def seen(self, artifact: Artifact, name: str, tokens: np.ndarray) -> np.ndarray:
        parts = observe(artifact, [name], tokens, threads=1, decode=True)
        return np.concatenate([values[name].ravel() for values in parts])

    @pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
    def test_lie_within_the_extremes(self, reading_llama, context, method):
        name = input_of_product(reading_llama, "model.layers.0.mlp.down_proj.weight")
        tokens = calibration_tokens(reading_llama, context, samples=8, length=32)
        values = self.seen(reading_llama, name, tokens)
        found = activation_ranges(
            reading_llama, [name], tokens, context=context, method=method, bins=None, percentile=99.0
        )
        low, high = found[name]
        assert values.min() <= low < 0 < high <= values.max()
        if method == "minmax":
            assert (low, high) == (values.min(), values.max())

    def test_of_percentiles_hold_that_share(self, reading_llama, context):
        name = input_of_product(reading_llama, "model.layers.0.mlp.down_proj.weight")
        tokens = calibration_tokens(reading_llama, context, samples=16, length=32)
        values = self.seen(reading_llama, name, tokens)
        found = activation_ranges(
            reading_llama, [name], tokens, context=context, method="percentile", bins=4096, percentile=98.0
        )
        low, high = found[name]
        assert 0.975 < np.mean((values >= low) & (values <= high)) < 0.985

    def test_do_not_depend_on_the_order_in_which_outliers_come(self, reading_llama, context, monkeypatch):
        """A histogram that grows with its outliers has more bins; ours knows them beforehand."""
        name = input_of_product(reading_llama, "model.layers.0.mlp.down_proj.weight")
        order = [np.ones((1, 9), np.float32), np.full((1, 3), -50, np.float32), np.full((1, 2), 7, np.float32)]

        def found(values: list[np.ndarray]) -> tuple[float, float]:
            monkeypatch.setattr(ranges, "observe", lambda *_, **__: iter([{name: value} for value in values]))
            tokens = np.zeros((1, 4), np.int64)
            return activation_ranges(
                reading_llama, [name], tokens, context=context, method="percentile", bins=512, percentile=99.0
            )[name]

        assert found(order) == found(order[::-1])

    def test_that_are_not_finite_are_refused(self, reading_llama, context, monkeypatch):
        monkeypatch.setattr(ranges, "observe", lambda *_, **__: iter([{"x": np.array([1, np.nan], np.float32)}]))
        with pytest.raises(PipelineError, match="'x' is not finite"):
            activation_ranges(
                reading_llama, ["x"], np.zeros((1, 4)), context=context, method="minmax", bins=None, percentile=99
            )


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("limits", [(-3.0, 5.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-30, 4e3)])
def test_parameters_of_activations_are_onnx_runtimes(kind, limits):
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    info = np.iinfo(kind)
    low, high = (np.array(limit, np.float32) for limit in limits)
    zero, scale = compute_scale_zp(low, high, np.array(info.min, kind), np.array(info.max, kind))
    ours = activation_parameters(*limits, kind)
    assert ours[0] == pytest.approx(float(scale)) and ours[0].dtype == np.float32
    assert ours[1] == zero and ours[1].dtype == kind


class TestALanguageModel:
    @pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
    def test_gives_nearly_the_same_logits_in_the_runner(self, bench, reading_llama, method):
        made = bench.run(QuantizeStatic, reading_llama, method=method)
        tokens = np.random.default_rng(1).integers(3, 277, (1, 24), dtype=np.int64)
        (expected,), (given,) = (load_runner(a, ExecutionSpec()).score(tokens) for a in (reading_llama, made))
        assert np.abs(given - expected).mean() < 0.1 * expected.std()
        assert compare_artifacts(reading_llama, made).weights_quantized == (15, 15)

    @pytest.mark.slow
    def test_of_another_family_is_near_too(self, bench, family, logits_of):
        made = bench.run(QuantizeStatic, family, samples=16)
        tokens = np.random.default_rng(1).integers(3, 277, (2, 24), dtype=np.int64)
        expected = logits_of(family, tokens)
        assert np.abs(logits_of(made, tokens) - expected).mean() < 0.1 * expected.std()

    def test_decodes_after_its_cache_as_it_scores(self, bench, reading_llama):
        made = bench.run(QuantizeStatic, reading_llama, activation_type="int8")
        runner = load_runner(made, ExecutionSpec())
        tokens = np.random.default_rng(1).integers(3, 277, (1, 12), dtype=np.int64)
        (whole,) = runner.score(tokens)
        runner.prefill(tokens[:, :11])
        np.testing.assert_allclose(runner.decode(tokens[:, 11:]), whole[:, -1], atol=1e-3)

    def test_becomes_products_of_integers_in_onnx_runtime(self, bench, reading_llama):
        import onnx
        import onnxruntime

        from pipeline.store.folder import materialize

        folder = bench.new_folder("optimized") / "model"
        materialize(bench.run(QuantizeStatic, reading_llama), folder)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        found = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
        assert found["MatMulIntegerToFloat"] == 15 and not found["MatMul"]

    def test_quantizes_an_activation_once_for_all_that_read_it(self, bench, reading_llama):
        made = bench.run(QuantizeStatic, reading_llama)
        assert operators(made)["QuantizeLinear"] == 2 * 4 + 1

    def test_in_groups_of_activations_is_the_same(self, bench, reading_llama, monkeypatch):
        whole = bench.run(QuantizeStatic, reading_llama, samples=4)
        monkeypatch.setattr(quantize_static, "ACTIVATION_BYTES", 4 * 1024 * 150)
        parts = bench.run(QuantizeStatic, reading_llama, samples=4)
        scales = [
            {n: t.const_value.numpy() for n, t in load_onnx(a).graph.initializers.items() if n.endswith(".scale")}
            for a in (whole, parts)
        ]
        assert scales[0].keys() == scales[1].keys() and len(scales[0]) == 9
        assert all(np.isclose(scales[0][n], scales[1][n], rtol=1e-4) for n in scales[0])

    def test_leaves_what_is_excluded(self, bench, reading_llama):
        made = bench.run(QuantizeStatic, reading_llama, exclude=["*.mlp.*"], head="keep")
        assert compare_artifacts(reading_llama, made).weights_quantized == (8, 15)
        assert "model.layers.0.mlp.up_proj.weight" in made.component.tensors

    def test_without_products_of_the_kind_has_nothing_to_quantize(self, bench, reading_llama):
        with pytest.raises(PipelineError, match="nothing to quantize"):
            bench.run(QuantizeStatic, reading_llama, operators=["Gemm"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"percentile": 99.0}, "percentile: for `method: percentile` only, and this is minmax"),
        ({"bins": 1024}, "bins: for `method: percentile` and `entropy` only"),
        ({"method": "entropy", "percentile": 99.0}, "this is entropy"),
        ({"operators": []}, "operators"),
        ({"operators": ["Conv"]}, "operators"),
        ({"method": "max"}, "method"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(params, message):
    with pytest.raises(ValidationError, match=message):
        QuantizeStatic.Params(**params)
