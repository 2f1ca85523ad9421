"""HQQ, k-quant and GPTQ: what their codes stand for, against the weights, round to nearest, and ONNX Runtime's own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from safetensors import safe_open

from passes.quantize import hqq, k_quant
from passes.quantize.block_quantization import BlockQuantized, dequantize_blocks, quantize_blocks
from passes.quantize.gptq import activation_order, inverse_factor, quantize_gptq
from passes.quantize.hqq import quantize_hqq
from passes.quantize.k_quant import quantize_k_quant
from pipeline.models.source import BUILTIN


@pytest.fixture(scope="module")
def trained() -> np.ndarray:
    """A weight [256, 640] of the trained built-in model."""
    with safe_open(BUILTIN / "llama2-tiny" / "model.safetensors", "pt") as file:
        weight: np.ndarray = file.get_tensor("model.layers.2.mlp.down_proj.weight").float().numpy()
    return weight


def restored(quantized: BlockQuantized, weight: np.ndarray, bits: int = 4) -> np.ndarray:
    return dequantize_blocks(quantized, bits=bits, columns=weight.shape[1])


def mean_error(quantized: BlockQuantized, weight: np.ndarray, bits: int = 4) -> float:
    return float(np.abs(restored(quantized, weight, bits) - weight).mean())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def inputs_of(columns: int, tokens: int = 2000) -> np.ndarray:
    """Inputs whose columns depend on one another, and some of which are far larger, as a language model's."""
    random = np.random.default_rng(3)
    mixed = random.standard_normal((tokens, columns // 4)) @ random.standard_normal((columns // 4, columns))
    return ((mixed + random.standard_normal((tokens, columns))) * random.gamma(1, 1, columns)).astype(np.float32)


class TestHqq:
    @pytest.mark.parametrize("block_size", [32, 128])
    def test_is_closer_to_the_weights_than_round_to_nearest(self, trained, block_size):
        ours = mean_error(quantize_hqq(trained, bits=4, block_size=block_size), trained)
        nearest = quantize_blocks(trained, bits=4, block_size=block_size, symmetric=False)
        assert ours < 0.98 * mean_error(nearest, trained)

    def test_gives_a_product_that_points_where_the_weight_s_does(self, trained):
        x = np.random.default_rng(0).standard_normal((32, trained.shape[1])).astype(np.float32)
        ours = restored(quantize_hqq(trained, bits=4, block_size=32), trained)
        assert cosine(x @ ours.T, x @ trained.T) > 0.99

    def test_given_whole_is_onnx_runtimes(self, trained):
        import torch
        from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

        solver = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=64, bits=4))
        codes, scales, zeros = solver.quantize_internal(torch.from_numpy(trained), bits=4, group_size=64)
        blocks = codes.numpy().reshape(256, 10, 64)
        expected = (blocks - zeros.numpy()[..., None]) * scales.numpy()[..., None]
        ours = restored(quantize_hqq(trained, bits=4, block_size=64), trained)
        np.testing.assert_allclose(ours, expected.reshape(256, 640), atol=1e-6)

    def test_in_parts_is_as_close(self, trained, monkeypatch):
        whole = mean_error(quantize_hqq(trained, bits=4, block_size=32), trained)
        monkeypatch.setattr(hqq, "CHUNK_VALUES", 640 * 30)
        assert mean_error(quantize_hqq(trained, bits=4, block_size=32), trained) < 1.01 * whole

    def test_pads_the_last_block(self):
        weight = np.random.default_rng(0).standard_normal((6, 70)).astype(np.float32)
        quantized = quantize_hqq(weight, bits=4, block_size=32)
        assert quantized.codes.shape == (6, 3, 16)
        assert mean_error(quantized, weight) < 0.1


class TestKQuant:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("block_size", [16, 32, 128])
    def test_no_block_is_worse_than_round_to_nearest(self, trained, bits, block_size):
        nearest = quantize_blocks(trained, bits=bits, block_size=block_size, symmetric=False)
        ours = quantize_k_quant(trained, bits=bits, block_size=block_size)

        def errors(quantized: BlockQuantized) -> np.ndarray:
            difference = restored(quantized, trained, bits) - trained
            return np.square(difference).reshape(256, -1, block_size).sum(axis=-1)

        assert (errors(ours) <= errors(nearest) * 1.0001).all()
        assert errors(ours).sum() < 0.99 * errors(nearest).sum()

    def test_is_onnx_runtimes_where_that_is_better(self, trained):
        from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

        codes, scales, zeros = quant_tensor_k_quant_cpu(trained, 4, 128)
        theirs = ((codes - zeros.astype(float)) * scales).reshape(256, 5, 128)
        ours = restored(quantize_k_quant(trained, bits=4, block_size=128), trained).reshape(256, 5, 128)
        same = np.isclose(ours, theirs, atol=1e-6).all(axis=-1)
        assert 0.5 < same.mean() < 1

    def test_keeps_blocks_of_one_sign(self):
        weight = np.random.default_rng(0).uniform(1, 2, (8, 64)).astype(np.float32)
        assert np.abs(restored(quantize_k_quant(weight, bits=4, block_size=32), weight) - weight).max() < 0.08

    @pytest.mark.parametrize("threads", [1, 3])
    def test_does_not_depend_on_how_the_rows_are_divided(self, trained, monkeypatch, threads):
        whole = quantize_k_quant(trained, bits=4, block_size=32)
        monkeypatch.setattr(k_quant, "CHUNK_VALUES", 640 * 7)
        parts = quantize_k_quant(trained, bits=4, block_size=32, threads=threads)
        assert np.array_equal(whole.codes, parts.codes) and np.array_equal(whole.scales, parts.scales)

    def test_of_equal_values_is_exact_and_silent(self):
        weight = np.zeros((2, 64), np.float32)
        weight[1] = 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantized = quantize_k_quant(weight, bits=4, block_size=32)
        np.testing.assert_allclose(restored(quantized, weight), weight, rtol=1e-6)


class TestGptq:
    def output_error(self, weight: np.ndarray, x: np.ndarray, given: np.ndarray) -> float:
        return float(np.square(x @ (given - weight).T).sum())

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("act_order", [True, False])
    @pytest.mark.parametrize("block_size", [32, 128, 256])
    def test_gives_outputs_closer_than_round_to_nearest(self, trained, symmetric, act_order, block_size):
        x = inputs_of(trained.shape[1])
        hessian = x.T @ x
        order = activation_order(hessian) if act_order else None
        factor = inverse_factor(hessian, damping=0.01, order=order)
        ours = quantize_gptq(trained, factor, bits=4, block_size=block_size, symmetric=symmetric, order=order)
        nearest = quantize_blocks(trained, bits=4, block_size=block_size, symmetric=symmetric)
        errors = [self.output_error(trained, x, restored(q, trained)) for q in (ours, nearest)]
        assert errors[0] < 0.5 * errors[1]

    @pytest.mark.parametrize("act_order", [True, False])
    def test_is_the_published_algorithm(self, act_order):
        """Column by column with the whole inverse, in float64 and without stretches or triangles."""
        weight = np.random.default_rng(0).standard_normal((16, 320)).astype(np.float32)
        x = inputs_of(320)
        hessian = (x.T @ x).astype(np.float64)
        order = activation_order(hessian) if act_order else None
        factor = inverse_factor(hessian, damping=0.01, order=order)
        quantized = quantize_gptq(weight, factor, bits=4, block_size=64, symmetric=True, order=order)
        inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(320))
        work, expected = weight.astype(np.float64), np.empty((16, 320))
        scales = quantize_blocks(weight, bits=4, block_size=64, symmetric=True).scales
        for column in range(320) if order is None else order:
            if order is None and column % 64 == 0:
                now = quantize_blocks(work[:, column : column + 64], bits=4, block_size=64, symmetric=True)
                scales[:, column // 64] = now.scales[:, 0]
            scale = scales[:, column // 64]
            expected[:, column] = np.clip(np.rint(work[:, column] / scale), -8, 7) * scale
            error = (work[:, column] - expected[:, column]) / inverse[column, column]
            work -= np.outer(error, inverse[column])
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        # a weight on the edge between two codes falls differently in float32, and those after it in its row with it
        assert np.isclose(restored(quantized, weight), expected, atol=1e-4).mean() > 0.9

    def test_is_closer_than_onnx_runtimes_own(self, trained):
        """That one takes the factor's columns for its rows, so that no error reaches another weight."""
        from onnxruntime.quantization.neural_compressor.weight_only import gptq

        x = inputs_of(trained.shape[1])
        hessian = (x.T @ x).astype(np.float64)
        theirs = gptq(trained.T.astype(np.float64), hessian.copy(), group_size=128, blocksize=128, scheme="asym").T
        factor = inverse_factor(hessian, damping=0.01)
        ours = restored(quantize_gptq(trained, factor, bits=4, block_size=128, symmetric=False), trained)
        assert self.output_error(trained, x, ours) < 0.5 * self.output_error(trained, x, theirs)

    def test_of_inputs_that_do_not_depend_on_one_another_is_round_to_nearest(self, trained):
        factor = inverse_factor(np.eye(trained.shape[1], dtype=np.float32), damping=0.01)
        ours = quantize_gptq(trained, factor, bits=4, block_size=32, symmetric=False)
        nearest = quantize_blocks(trained, bits=4, block_size=32, symmetric=False)
        assert np.mean(ours.codes == nearest.codes) > 0.999
        assert np.array_equal(ours.scales, nearest.scales)

    def test_rounds_weights_of_inputs_that_were_always_zero(self, trained):
        x = inputs_of(trained.shape[1])
        x[:, 5:9] = 0
        factor = inverse_factor(x.T @ x, damping=0.01)
        ours = restored(quantize_gptq(trained, factor, bits=8, block_size=32, symmetric=True), trained, 8)
        assert np.abs(ours[:, 5:9] - trained[:, 5:9]).max() < 0.002

    def test_of_columns_that_fill_no_block_pads(self):
        weight = np.random.default_rng(0).standard_normal((6, 70)).astype(np.float32)
        x = inputs_of(70)
        factor = inverse_factor(x.T @ x, damping=0.01)
        quantized = quantize_gptq(weight, factor, bits=4, block_size=32, symmetric=False)
        assert quantized.codes.shape == (6, 3, 16)
        assert cosine(x @ restored(quantized, weight).T, x @ weight.T) > 0.99

    def test_damps_moments_that_cannot_be_inverted(self):
        factor = inverse_factor(np.ones((64, 64), np.float32), damping=1e-7)
        assert np.isfinite(factor).all()

    def test_refuses_moments_that_are_not_finite(self):
        hessian = np.eye(4, dtype=np.float32)
        hessian[1, 2] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            inverse_factor(hessian, damping=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weight = np.ones((4, 64), np.float32) * np.arange(64, dtype=np.float32)
    weight[2, 3] = value
    factor = np.eye(64, dtype=np.float32)
    for quantize in (
        lambda: quantize_hqq(weight, bits=4, block_size=32),
        lambda: quantize_k_quant(weight, bits=4, block_size=32),
        lambda: quantize_gptq(weight, factor, bits=4, block_size=32, symmetric=True),
    ):
        with pytest.raises(ValueError, match="not finite"):
            quantize()
