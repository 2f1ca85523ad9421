"""ONNX files as the protocol-buffer messages that they are: walked over, and searched for tensors kept outside.

A length stands before every part of a message, so what is not asked for is stepped over: neither a file of gigabytes
nor the weights inside it are read.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the encoding is
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeAlias

from pipeline.errors import PipelineError

EXTERNAL = 1
"""TensorProto.DataLocation: the bytes lie in another file."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
TENSOR_NAME, TENSOR_LOCATION = 8, 14

HOLDERS = {
    "ModelProto": {MODEL_GRAPH: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", GRAPH_INITIALIZER: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
"""Message -> its fields that are a tensor or may hold one, at any depth."""

Data: TypeAlias = "bytes | mmap.mmap"
Span: TypeAlias = tuple[int, int]
"""Begin and end of a message in the file."""


class Outside(NamedTuple):
    """A tensor whose bytes lie in another file."""

    name: str
    main: bool
    """Whether it is an initializer of the main graph, the only place where a manifest can say which file that is."""


def external_tensors(data: Data) -> Iterator[Outside]:
    """The tensors of a model, wherever they stand in it, that are kept in other files.

    Raises: ValueError or RecursionError where `data` is no model.
    """
    yield from _search(data, (0, len(data)), "ModelProto", ())


def check_external_tensors(data: Data, known: Collection[str]) -> None:
    """Make sure that a graph names no files but those of the initializers `known`, before a runtime may read any file.

    Raises: PipelineError where another tensor lies outside the graph, or `data` is no model.
    """
    try:
        for name, main in external_tensors(data):
            if not main or name not in known:
                what = f"initializer {name!r}" if main else f"the tensor {name!r} of a node, subgraph or function"
                raise PipelineError(
                    f"the graph keeps {what} outside, and the manifest does not say where",
                    hint="a graph that names files on its own could read any file of yours: it is not run",
                )
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"the graph is damaged: {error}") from None


def _search(data: Data, span: Span, kind: str, path: tuple[int, ...]) -> Iterator[Outside]:
    holders = HOLDERS[kind]
    for number, value in fields(data, span):
        if (inner := holders.get(number)) is None:
            continue
        here = (*path, number)
        if inner != "TensorProto":
            yield from _search(data, as_span(value), inner, here)
        elif (name := _name_if_external(data, as_span(value))) is not None:
            yield Outside(name, main=here == (MODEL_GRAPH, GRAPH_INITIALIZER))


def _name_if_external(data: Data, span: Span) -> str | None:
    """The tensor's name where any of its fields says that it is external: of several, readers may take any."""
    name, external = "", False
    for number, value in fields(data, span):
        if number == TENSOR_NAME:
            name = as_text(data, value)
        elif number == TENSOR_LOCATION:
            external |= as_enum(value) == EXTERNAL
    return name if external else None


def fields(data: Data, span: Span) -> Iterator[tuple[int, int | Span]]:
    """(field number, value) of a message: an integer, or where its bytes lie.

    Raises: ValueError where it is cut off or is no message.
    """
    at, end = span
    while at < end:
        tag, at = varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if tag >= 2**32:  # a reader that keeps 32 bits of it would see another field
            raise ValueError(f"no field has the number {number:,}")
        if kind == VARINT:
            value, at = varint(data, at, end)
            yield number, value
        elif kind == BYTES:
            length, at = varint(data, at, end)
            if at + length > end:
                raise ValueError(f"{length:,} bytes are announced at {at:,} and {end - at:,} are there")
            yield number, (at, at + length)
            at += length
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
            if at > end:
                raise ValueError(f"it ends within a number at {at:,}")
        else:
            raise ValueError(f"byte {at:,} does not begin a field")


def varint(data: Data, at: int, end: int) -> tuple[int, int]:
    """(number, where the next byte lies) of a base-128 number."""
    number = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError(f"it ends within a number at {at:,}")


def is_span(value: int | Span) -> bool:
    return isinstance(value, tuple)


def as_span(value: int | Span) -> Span:
    if not isinstance(value, tuple):
        raise ValueError(f"a message is expected where the number {value} stands")  # noqa: TRY004 - of the file, not of a caller
    return value


def as_integer(value: int | Span) -> int:
    """A signed 64-bit number."""
    if isinstance(value, tuple):
        raise ValueError(f"a number is expected at {value[0]:,}")  # noqa: TRY004
    return value - 2**64 if value >= 2**63 else value


def as_enum(value: int | Span) -> int:
    """A number of 32 bits; readers drop those above."""
    return as_integer(value) & 0xFFFFFFFF


def as_text(data: Data, value: int | Span) -> str:
    begin, end = as_span(value)
    return data[begin:end].decode("utf-8")
