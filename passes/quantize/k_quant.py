"""k-quants: scales and zero points found by weighted least squares, by ONNX Runtime's own function.

For each block it tries 20 ranges narrower and wider than the block's values, fits scale and offset to each by least
squares in which large weights count more, and keeps the best; the method is that of llama.cpp's Q4_K. The offset is
rounded to a zero point only afterwards, which undoes part of the gain, and all of it where a block's values have one
sign: the zero point would lie outside the codes. A block that comes out worse than round to nearest keeps round to
nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.quantize.block_quantization import (
    BlockQuantized,
    blocked,
    dequantize_blocks,
    for_each,
    pack_codes,
    pack_zero_points,
    quantize_blocks,
    unpack_codes,
)

if TYPE_CHECKING:
    import numpy as np

CHUNK_VALUES = 1 << 18
"""Weights handled at a time by a thread; a block's codes depend on that block alone."""


def quantize_k_quant(weight: np.ndarray, *, bits: int, block_size: int, threads: int = 1) -> BlockQuantized:
    """Quantize a weight [N, K] of any float data type, with zero points.

    Raises: ValueError where the weight holds a value that is not finite.
    """
    import numpy as np
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8)
    step = max(1, CHUNK_VALUES // (blocks * block_size))

    def chunk(start: int) -> None:
        part = slice(start, start + step)
        values = blocked(weight[part], blocks, block_size)  # [n, blocks, block_size]
        plain = quantize_blocks(
            values.reshape(len(values), -1), bits=bits, block_size=block_size, symmetric=False
        )  # raises where a value is not finite
        with np.errstate(all="ignore"):  # blocks of equal values give 0 / 0; they lose the comparison below
            found, scale, zero = quant_tensor_k_quant_cpu(values, bits, block_size)
            found, scale, zero = (a.reshape(len(values), blocks, -1) for a in (found, scale, zero))
            scale = scale.astype(np.float32)
            restored = (found - zero.astype(np.float32)) * scale
            error = np.square(restored - values).sum(axis=-1)
        nearest = dequantize_blocks(plain, bits=bits, columns=blocks * block_size).reshape(values.shape)
        better = error < np.square(nearest - values).sum(axis=-1)  # [n, blocks]; false for what is not a number
        found = np.where(better[..., None], found, unpack_codes(plain.codes, bits)).astype(np.uint8)
        assert plain.zero_points is not None
        zeros[part] = np.where(better, zero[..., 0], unpack_codes(plain.zero_points, bits)[:, :blocks])
        scales[part] = np.where(better, scale[..., 0], plain.scales)
        codes[part] = pack_codes(found, bits)

    for_each(chunk, range(0, rows, step), threads)
    return BlockQuantized(codes, scales, pack_zero_points(zeros, bits))
