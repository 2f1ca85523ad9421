"""GPTQ: column by column, the error of each rounded weight is made up for by the weights not yet rounded.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). With x the
inputs of a layer [tokens, K] and H = xᵀx, the error of a column is spread over the later ones along a row of the upper
Cholesky factor of H⁻¹.

ONNX Runtime's own function is not used. As of 1.31 it takes the factor's columns for its rows, which are zero where the
errors should go, and so rounds to nearest; it takes a block's scales before the errors of the columns at hand are in,
finds others afterwards from what came out, and with an order of columns tears blocks apart. Here codes, scales and zero
points belong together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.quantize.block_quantization import (
    BlockQuantized,
    pack_codes,
    pack_zero_points,
    quantize_blocks,
    unpack_codes,
)

if TYPE_CHECKING:
    import numpy as np

LAZY_COLUMNS = 128
"""Columns after which the error goes to all later ones, in one product of matrices."""


def inverse_factor(hessian: np.ndarray, *, damping: float, order: np.ndarray | None = None) -> np.ndarray:
    """The upper Cholesky factor of H⁻¹ [K, K] in float32, of H = xᵀx with its columns in `order`.

    `damping` times the mean of H's diagonal is added to the diagonal, ten times as much where that is too little. A
    column whose input was always zero takes no part.

    Raises: ValueError where H holds a value that is not finite, or no damping helps.
    """
    import numpy as np
    from scipy.linalg import lapack

    if not np.isfinite(hessian).all():
        raise ValueError("its inputs on the calibration text are not finite")
    diagonal = np.diag(hessian).copy()
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    for _ in range(5):
        damped = np.array(hessian, np.float32, order="F")
        damped[np.diag_indices_from(damped)] += np.float32(damping * mean) + dead * np.float32(mean)
        if order is not None:
            damped = np.asfortranarray(damped[np.ix_(order, order)])
        factor, failed = lapack.spotrf(damped, lower=1, overwrite_a=1)
        if not failed:
            inverse, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
        if not failed:
            # only the lower triangle was computed; the transpose has it as its upper one
            upper, failed = lapack.spotrf(np.asfortranarray(inverse.T), lower=0, clean=1, overwrite_a=1)
        if not failed and np.isfinite(upper).all():
            return np.ascontiguousarray(upper)
        damping *= 10
    raise ValueError("the second moments of its inputs cannot be inverted: give more calibration text, or more damping")


def activation_order(hessian: np.ndarray) -> np.ndarray:
    """Columns by falling second moment of their inputs."""
    import numpy as np

    return np.argsort(-np.diag(hessian), kind="stable")


def quantize_gptq(
    weight: np.ndarray,
    factor: np.ndarray,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    order: np.ndarray | None = None,
) -> BlockQuantized:
    """Quantize a weight [N, K] of any float data type.

    `factor` comes from `inverse_factor`. In an `order` of columns the blocks' scales are those of the untouched
    weights; else each block's are found when its first column's turn comes, with the errors of all before it made up
    for. `symmetric` is that of `quantize_blocks`.

    Raises: ValueError where the weight holds a value that is not finite.
    """
    import numpy as np

    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    largest = np.float32((1 << bits) - 1)
    scales, zeros = (a.astype(np.float32) for a in _parameters(weight, bits, block_size, symmetric))
    work = np.array(np.asarray(weight).T, np.float32, order="C")  # [K, N]: a column of the weight is a row here
    if order is not None:
        work = work[order]
    codes = np.empty((columns, rows), np.uint8)
    for begin in range(0, columns, LAZY_COLUMNS):
        end = min(begin + LAZY_COLUMNS, columns)
        errors = np.empty((end - begin, rows), np.float32)
        for place in range(begin, end):
            column = place if order is None else int(order[place])
            block = column // block_size
            if order is None and column % block_size == 0:
                found = _parameters(work[column : column + block_size].T, bits, block_size, symmetric)
                scales[:, block], zeros[:, block] = found[0][:, 0], found[1][:, 0]
            scale, zero = scales[:, block], zeros[:, block]
            safe = np.where(scale == 0, np.float32(1), scale)
            code = np.clip(np.rint(work[place] / safe + zero), 0, largest)
            codes[column] = code
            error = (work[place] - (code - zero) * scale) / factor[place, place]
            errors[place - begin] = error
            work[place + 1 : end] -= factor[place, place + 1 : end, None] * error
        work[end:] -= factor[begin:end, end:].T @ errors
    whole = np.zeros((rows, blocks * block_size), np.uint8)
    whole[:, :columns] = codes.T
    packed = pack_codes(whole.reshape(rows, blocks, block_size), bits)
    return BlockQuantized(packed, scales, None if symmetric else pack_zero_points(zeros.astype(np.uint8), bits))


def _parameters(weight: np.ndarray, bits: int, block_size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """(scales, zero points) [N, blocks] of round to nearest."""
    import numpy as np

    plain = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    if plain.zero_points is None:
        return plain.scales, np.full_like(plain.scales, 1 << (bits - 1))
    return plain.scales, unpack_codes(plain.zero_points, bits)[:, : plain.scales.shape[1]]
