"""The header of a safetensors file: where each tensor lies, without reading any.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' raw little-endian bytes.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from pydantic import NonNegativeInt, ValidationError

from pipeline.artifact import Frozen, TensorRef
from pipeline.errors import PipelineError

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Name in the format -> (ours, bytes of an element). numpy knows both, and its import would slow every plan."""

LONGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation


def read_header(path: Path) -> dict[str, TensorRef]:
    """Name -> place of every tensor in the file.

    Raises: PipelineError where the file is no safetensors file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, size - 8):
            raise PipelineError(f"{path} is not a safetensors file, or is cut off inside its header")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise PipelineError(f"{path} is not a safetensors file: its header is not JSON") from None
        except RecursionError:
            raise PipelineError(f"{path} is not a safetensors file: its header nests too deeply to be read") from None
    if not isinstance(header, dict):
        raise PipelineError(f"{path} is not a safetensors file: its header is not a JSON object")
    return {
        name: _tensor(path, name, entry, begin=8 + length, size=size)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensor(path: Path, name: str, entry: object, *, begin: int, size: int) -> TensorRef:
    try:
        checked = _Entry.model_validate(entry)
    except ValidationError:
        raise PipelineError(f"{path}: the header's entry for tensor {name!r} is damaged") from None
    start, end = checked.data_offsets
    if checked.dtype not in DTYPES:
        raise PipelineError(f"{path}: tensor {name!r} has data type {checked.dtype}, which is not supported")
    dtype, itemsize = DTYPES[checked.dtype]
    if prod(checked.shape) * itemsize != end - start:
        raise PipelineError(f"{path}: tensor {name!r} has shape {list(checked.shape)} and {end - start} bytes")
    if begin + end > size:
        raise PipelineError(f"{path} is cut off: tensor {name!r} ends at {begin + end:,} of {size:,} bytes")
    return TensorRef(file=path.name, offset=begin + start, length=end - start, dtype=dtype, shape=checked.shape)


class _Entry(Frozen):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]
