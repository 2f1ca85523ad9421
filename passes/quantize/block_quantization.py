"""Weights in blocks of few-bit integers: round to nearest, one scale (and zero point) a block.

The layout is that of the operator com.microsoft.MatMulNBits (ONNX Runtime, docs/ContribOperators.md): for a weight
[N, K] in blocks of `block_size` along K, the last one padded,

    codes        uint8    [N, blocks, block_size * bits / 8]   lower code in the lower bits
    scales       float32  [N, blocks]
    zero_points  uint8    [N, ceil(blocks * bits / 8)]         packed likewise; 2^(bits-1) where there are none
              or float32  [N, blocks]                          4 bits only, and far slower on CPUs

and weight = (code - zero_point) * scale.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CHUNK_VALUES = 1 << 18
"""Weights handled at a time by a thread, so that its temporaries stay in the cache."""


@dataclass(frozen=True)
class BlockQuantized:
    """A quantized weight in the layout above; `zero_points` is None where it is symmetric."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def quantize_blocks(
    weight: np.ndarray, *, bits: int, block_size: int, symmetric: bool, threads: int = 1
) -> BlockQuantized:
    """Quantize a weight [N, K] of any float data type.

    Symmetric: the block's value of largest magnitude gets the code 0, so that all 2^bits codes are used on its side,
    and the other side ends at 2^bits - 1. Asymmetric: the codes span the block's values and zero.

    Raises: ValueError where the weight holds a value that is not finite.
    """
    import numpy as np

    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = None if symmetric else np.empty((rows, blocks), np.uint8)
    step = max(1, CHUNK_VALUES // (blocks * block_size))

    def chunk(start: int) -> None:
        part = slice(start, start + step)
        # a block down a column: numpy looks for extremes across long rows several times as fast as within short ones
        values = np.ascontiguousarray(blocked(weight[part], blocks, block_size).reshape(-1, block_size).T)
        with np.errstate(invalid="ignore"):  # a weight that is not finite shows in its scales
            if zeros is None:
                found = _symmetric(values, bits, scales[part].reshape(-1))
            else:
                found = _asymmetric(values, bits, scales[part].reshape(-1), zeros[part].reshape(-1))
        if bits == 4:
            found = found[0::2] | found[1::2] << 4
        codes[part] = found.T.reshape(-1, *codes.shape[1:])

    for_each(chunk, range(0, rows, step), threads)
    if not np.isfinite(scales).all():
        raise ValueError("the weight holds values that are not finite")
    return BlockQuantized(codes, scales, None if zeros is None else pack_zero_points(zeros, bits))


def dequantize_blocks(quantized: BlockQuantized, *, bits: int, columns: int) -> np.ndarray:
    """The float32 weight [N, columns] that the codes stand for."""
    import numpy as np

    rows, blocks, _ = quantized.codes.shape
    codes = unpack_codes(quantized.codes, bits).astype(np.float32)
    zeros: np.ndarray | float = float(1 << (bits - 1))
    if quantized.zero_points is not None:
        stored = quantized.zero_points
        zeros = stored if stored.dtype.kind == "f" else unpack_codes(stored, bits)[:, :blocks].astype(np.float32)
        zeros = zeros[..., None]
    weight = (codes - zeros) * quantized.scales[..., None]
    return np.ascontiguousarray(weight.reshape(rows, -1)[:, :columns])


def blocked(rows: np.ndarray, blocks: int, block_size: int) -> np.ndarray:
    """float32 [n, blocks, block_size], padded with zeros; a new array."""
    import numpy as np

    count, columns = rows.shape
    if columns == blocks * block_size:
        return np.array(rows, np.float32, order="C").reshape(count, blocks, block_size)
    values = np.zeros((count, blocks * block_size), np.float32)
    values[:, :columns] = rows
    return values.reshape(count, blocks, block_size)


def _symmetric(values: np.ndarray, bits: int, scales: np.ndarray) -> np.ndarray:
    """Codes of `values` [block size, blocks], which are used up; fills `scales` [blocks]."""
    import numpy as np

    middle = 1 << (bits - 1)
    high, low = values.max(axis=0), values.min(axis=0)
    np.divide(np.where(high > -low, high, low), -middle, out=scales)
    values *= _inverse(scales)
    values += middle
    return _rounded(values, bits)


def _asymmetric(values: np.ndarray, bits: int, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Codes of `values` [block size, blocks], which are used up; fills `scales` and `zeros` [blocks]."""
    import numpy as np

    largest = (1 << bits) - 1
    high, low = np.maximum(values.max(axis=0), 0), np.minimum(values.min(axis=0), 0)
    np.divide(high - low, largest, out=scales)
    inverse = _inverse(scales)
    zeros[...] = _rounded(-low * inverse, bits)
    values *= inverse
    values += zeros
    return _rounded(values, bits)


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scales, and 0 where that is not finite: a block of zeros, or of values too small to tell from them."""
    import numpy as np

    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scales
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    import numpy as np

    np.rint(values, out=values)
    np.clip(values, 0, (1 << bits) - 1, out=values)
    return values.astype(np.uint8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, 8 / bits to a byte, the first in the lowest bits."""
    if bits == 8:
        return codes
    packed = codes[..., 1::2] << 4
    packed |= codes[..., 0::2]
    return packed


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes that `pack_codes` packed."""
    import numpy as np

    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack_zero_points(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Integer zero points [N, blocks] as the operator takes them."""
    import numpy as np

    return pack_codes(np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % (8 // bits)))), bits)


def for_each(function: Callable[[int], None], items: range, threads: int) -> None:
    """Call `function` with each of the items, on several threads: numpy lets go of the interpreter meanwhile."""
    if threads == 1 or len(items) == 1:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, items))
