"""Weights as 8-bit integers with a scale (and zero point) for each output channel, or one for the whole weight.

weight = (code - zero_point) * scale. The numbers are those of ONNX Runtime's quantize_dynamic and quantize_static:
signed codes are symmetric, -127 … 127; unsigned ones span the channel's values and zero, 0 … 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.quantize.block_quantization import for_each

if TYPE_CHECKING:
    import numpy as np

CHUNK_VALUES = 1 << 18
"""Weights handled at a time by a thread."""


@dataclass(frozen=True)
class ChannelQuantized:
    """A quantized weight; scales float32 and zero points (of the codes' type) are [N], or [] for one of each."""

    codes: np.ndarray
    """int8 or uint8 [K, N], as ONNX's products take it."""
    scales: np.ndarray
    zero_points: np.ndarray


def quantize_channels(
    weight: np.ndarray,
    *,
    signed: bool = True,
    per_channel: bool = True,
    reduce_range: bool = False,
    threads: int = 1,
) -> ChannelQuantized:
    """Quantize a weight [N, K] of any float data type.

    `reduce_range` leaves a bit unused: -64 … 64, or 0 … 127.

    Raises: ValueError where the weight holds a value that is not finite.
    """
    import numpy as np

    rows, columns = weight.shape
    kind = np.int8 if signed else np.uint8
    low, high = np.empty(rows, np.float32), np.empty(rows, np.float32)
    step = max(1, CHUNK_VALUES // columns)

    def span(start: int) -> None:
        part = slice(start, start + step)
        values = np.asarray(weight[part], np.float32)
        low[part], high[part] = values.min(axis=1), values.max(axis=1)

    for_each(span, range(0, rows, step), threads)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the weight holds values that are not finite")
    if not per_channel:
        low, high = low.min(), high.max()
    scales, zeros = _parameters(np.minimum(low, 0), np.maximum(high, 0), signed=signed, reduce_range=reduce_range)
    codes = np.empty((columns, rows), kind)

    def encode(start: int) -> None:
        part = slice(start, start + step)
        scale = scales[part, None] if per_channel else scales
        zero = zeros[part, None] if per_channel else zeros
        values = np.asarray(weight[part], np.float32) / scale
        np.rint(values, out=values)
        values += zero
        np.clip(values, np.iinfo(kind).min, np.iinfo(kind).max, out=values)
        codes[:, part] = values.T

    for_each(encode, range(0, rows, step), threads)
    return ChannelQuantized(codes, scales, zeros.astype(kind))


def dequantize_channels(quantized: ChannelQuantized) -> np.ndarray:
    """The float32 weight [N, K] that the codes stand for."""
    import numpy as np

    weight = (quantized.codes.astype(np.float32) - quantized.zero_points.astype(np.float32)) * quantized.scales
    return np.ascontiguousarray(weight.T)


def _parameters(
    low: np.ndarray, high: np.ndarray, *, signed: bool, reduce_range: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(scales, zero points), both float32, for ranges that hold zero; a range of nothing gets the scale 1."""
    import numpy as np

    if signed:
        largest = np.maximum(high, -low).astype(np.float64)
        scales = 2 * largest / (128 if reduce_range else 254)
    else:
        scales = (high.astype(np.float64) - low) / (127 if reduce_range else 255)
    empty = scales < np.finfo(np.float32).tiny
    scales = np.where(empty, 1.0, scales)
    zeros = np.zeros_like(scales) if signed else np.where(empty, 0.0, np.rint(-low / scales))
    return scales.astype(np.float32), zeros.astype(np.float32)
