"""equalize_channels: the function stays, outliers go, and what is rounded afterwards is nearer to the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from passes.export.export_onnx import ExportOnnx
from passes.graph.agreement import largest_difference, outputs_of
from passes.graph.fuse_transformer import FuseTransformer
from passes.quantize.equalize_channels import EqualizeChannels, scales
from passes.quantize.products import find_products
from passes.quantize.quantize_dynamic import QuantizeDynamic
from passes.quantize.quantize_static import QuantizeStatic
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, PipelineError, load_onnx
from pipeline.measure.graph_weights import newly_quantized
from tests.passes.conftest import SIZES, give_words

OUTLIER, FACTOR = 5, 40.0


@pytest.fixture(scope="module")
def with_outlier(bench: Any) -> Artifact:
    """A fused Llama with one large channel behind each norm of its layers, and small columns that read it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig

    folder = bench.checkpoint(LlamaConfig(**SIZES))
    give_words(folder)  # for those that are calibrated
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("layernorm.weight"):
            tensor[OUTLIER] *= FACTOR
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, OUTLIER] /= FACTOR
    save_file({name: torch.clone(tensor) for name, tensor in weights.items()}, folder / "model.safetensors")
    exported = bench.run(ExportOnnx, bench.source(folder), verify=False)
    return bench.run(FuseTransformer, exported)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def equalized(bench: Any, with_outlier: Artifact) -> Artifact:
    return bench.run(EqualizeChannels, with_outlier)  # type: ignore[no-any-return]


def outputs(bench: Any, artifact: Artifact) -> Any:
    return outputs_of(bench.session(artifact), artifact.interface)


def test_the_function_stays(bench, with_outlier, equalized):
    assert largest_difference(outputs(bench, with_outlier), outputs(bench, equalized)) < 1e-4


def test_every_norm_that_products_read_is_equalized(equalized):
    products = find_products(load_onnx(equalized))
    scaled = [product.weight_name for product in products if product.scale is not None]
    expected = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
    assert {name.split(".")[-2] for name in scaled} == expected
    assert len(scaled) == 2 * 5 + 1


def test_gains_and_columns_are_alike_in_size_afterwards(equalized):
    model = load_onnx(equalized)
    gains = [
        v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("layernorm.weight.equalized")
    ]
    assert len(gains) == 4
    assert all(np.abs(gain).max() < 5 * np.abs(gain).mean() for gain in gains)


def test_no_weight_is_written(bench, with_outlier, equalized):
    matrices = {n: r for n, r in equalized.component.tensors.items() if len(r.shape) == 2 and r.length > 4096}
    assert matrices.items() <= with_outlier.component.tensors.items()


def test_its_weights_count_among_those_that_can_be_quantized(bench, equalized):
    quantized = bench.run(QuantizeWeights, equalized)
    assert newly_quantized([(load_onnx(equalized), load_onnx(quantized))]) == (15, 15)


@pytest.mark.parametrize(
    ("quantizer", "params"),
    [(QuantizeDynamic, {}), (QuantizeWeights, {"bits": 8, "block_size": 64}), (QuantizeWeights, {"block_size": 64})],
)
def test_what_is_rounded_afterwards_is_nearer(bench, with_outlier, equalized, quantizer, params):
    expected = outputs(bench, with_outlier)
    plain, better = (
        largest_difference(expected, outputs(bench, bench.run(quantizer, artifact, **params)))
        for artifact in (with_outlier, equalized)
    )
    assert better < 0.8 * plain


@pytest.mark.parametrize(
    ("quantizer", "params"),
    [
        (QuantizeWeights, {"method": "gptq", "samples": 4, "sequence_length": 32}),
        (QuantizeWeights, {"method": "hqq"}),
        (QuantizeWeights, {"method": "k_quant"}),
        (QuantizeStatic, {"samples": 4, "sequence_length": 32}),
    ],
    ids=["gptq", "hqq", "k_quant", "static"],
)
def test_every_other_quantizer_takes_it_too(bench, equalized, quantizer, params):
    made = bench.run(quantizer, equalized, **params)
    assert newly_quantized([(load_onnx(equalized), load_onnx(made))]) == (15, 15)
    assert largest_difference(outputs(bench, equalized), outputs(bench, made)) < 2


def test_a_second_time_there_is_nothing_to_do(bench, equalized):
    with pytest.raises(PipelineError, match="nothing to equalize"):
        bench.run(EqualizeChannels, equalized)


def test_the_plan_knows_that_weights_stay():
    from pipeline import ModelSize

    model = ModelSize(format="onnx", largest=1000)
    assert EqualizeChannels.predict(EqualizeChannels.Params(), model).model == model


positive = arrays.arrays(np.float32, 6, elements=st.floats(0, 1e3, width=32))


class TestScales:
    @given(positive, positive, st.floats(0, 1))
    def test_are_positive_and_finite(self, activations, weights, strength):
        found = scales(activations, weights, strength)
        assert np.isfinite(found).all()
        assert (found > 0).all()

    def test_at_a_half_make_both_alike(self):
        activations, weights = np.array([1, 40, 2], np.float32), np.array([1, 1 / 40, 0.5], np.float32)
        found = scales(activations, weights, 0.5)
        np.testing.assert_allclose(
            activations / found, weights * found * (activations / found)[0] / (weights * found)[0]
        )

    def test_leave_a_channel_that_is_nothing(self):
        assert scales(np.array([0, 3, 3], np.float32), np.array([1, 1, 1], np.float32), 0.5)[0] == 1
