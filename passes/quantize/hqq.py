"""Half-quadratic quantization: ONNX Runtime's own solver, given some rows of a weight at a time.

It keeps the scales of round to nearest and moves each block's zero point, a real number, to where a norm of the error
that forgives outliers is least (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
Zero points rounded to codes would be those of round to nearest again, so they stay real numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.quantize.block_quantization import BlockQuantized, pack_codes

if TYPE_CHECKING:
    import numpy as np

CHUNK_VALUES = 1 << 22
"""Weights that the solver gets at a time; it holds some ten float32 arrays of that size.

The solver stops when the mean error of what it was given no longer falls, so a weight in several parts may get other
zero points than one given whole: each part stops when its own error no longer falls.
"""


def quantize_hqq(weight: np.ndarray, *, bits: int, block_size: int) -> BlockQuantized:
    """Quantize a weight [N, K] of any float data type; the zero points are float32 [N, blocks].

    Raises: ValueError where the weight holds a value that is not finite.
    """
    import numpy as np
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    solver = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=block_size, bits=bits))
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.float32)
    step = max(1, CHUNK_VALUES // (blocks * block_size))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = torch.from_numpy(np.array(weight[part], np.float32, order="C"))
        with torch.no_grad():
            found, scale, zero = solver.quantize_internal(values, bits=bits, group_size=block_size)
        if not torch.isfinite(scale).all():
            raise ValueError("the weight holds values that are not finite")
        codes[part] = pack_codes(found.numpy().astype(np.uint8).reshape(-1, blocks, block_size), bits)
        scales[part], zeros[part] = scale.numpy(), zero.numpy()
    return BlockQuantized(codes, scales, zeros)
