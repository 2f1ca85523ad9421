"""What an ONNX file says of its inputs, outputs and weights, without reading a weight.

An ONNX file is one protocol-buffer message, and a length stands before every part of it: this walks over the mapped
file and steps over what it does not ask for, so that a file of gigabytes is read as quickly as one of kilobytes.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the encoding is
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TypeAlias

from pipeline.errors import PipelineError

DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    17: "float8_e4m3fn",
    19: "float8_e5m2",
}
"""TensorProto.DataType -> our name. Those of less than a byte and strings are not among them."""

EXTERNAL = 1
"""TensorProto.DataLocation: the bytes lie in another file."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_OPERATOR, NODE_ATTRIBUTE = 4, 5
ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = 5, 6, 10, 11
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 13, 14
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR, TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE, DIM_PARAM = 1, 1, 2, 1, 1, 2

Span: TypeAlias = tuple[int, int]
"""Begin and end of a message in the file."""


@dataclass(frozen=True)
class Value:
    """An input or output of the graph. A dimension is a number, a name, or None where nothing is said."""

    name: str
    dtype: str | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose bytes lie in another file; `length` is None where the graph does not say."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class OnnxHeader:
    """The parts of a graph that say how to call it and where its weights lie."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    initializers: int
    parameters: int
    """Elements of all initializers of two and more dimensions; packed ones count as they are stored."""
    external: tuple[ExternalTensor, ...]
    operators: frozenset[str] = frozenset()
    """Types of the nodes of the main graph."""
    hidden: tuple[str, ...] = field(default=())
    """Tensors outside the file that are no initializers of the main graph."""


def read_onnx_header(path: Path) -> OnnxHeader:
    """Walk over the file at `path`.

    Raises: PipelineError where it is no ONNX file or is cut off; OSError where it cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise PipelineError(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _model(data)
            except (ValueError, RecursionError) as error:  # a text that is no UTF-8 is a ValueError, too
                raise PipelineError(f"{path} is no ONNX file, or is cut off: {error}") from None


def _model(data: mmap.mmap) -> OnnxHeader:
    graphs = [value for number, value in _fields(data, (0, len(data))) if number == MODEL_GRAPH and _is_span(value)]
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs where a model has one")
    inputs: list[Value] = []
    outputs: list[Value] = []
    external: list[ExternalTensor] = []
    hidden: list[str] = []
    operators: set[str] = set()
    names: set[str] = set()
    parameters = 0
    for number, value in _fields(data, _span(graphs[0])):
        if number == GRAPH_INPUT:
            inputs.append(_value(data, _span(value)))
        elif number == GRAPH_OUTPUT:
            outputs.append(_value(data, _span(value)))
        elif number == GRAPH_INITIALIZER:
            name, shape, outside = _tensor(data, _span(value))
            names.add(name)
            parameters += prod(shape) if len(shape) > 1 else 0
            if outside is not None:
                external.append(outside)
        elif number == GRAPH_NODE:
            hidden += _inside_node(data, _span(value))
            operators |= {_text(data, kind) for n, kind in _fields(data, _span(value)) if n == NODE_OPERATOR}
    return OnnxHeader(
        # older graphs list initializers among the inputs, as values that a caller may replace
        inputs=tuple(value for value in inputs if value.name not in names),
        outputs=tuple(outputs),
        initializers=len(names),
        parameters=parameters,
        external=tuple(external),
        operators=frozenset(operators),
        hidden=tuple(hidden),
    )


def _inside_node(data: mmap.mmap, span: Span) -> Iterator[str]:
    """Names of external tensors in the attributes and subgraphs of a node."""
    for number, attribute in _fields(data, span):
        if number != NODE_ATTRIBUTE:
            continue
        for kind, value in _fields(data, _span(attribute)):
            if kind in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS) and _is_span(value):
                name, _, outside = _tensor(data, _span(value))
                if outside is not None:
                    yield name or "a constant"
            elif kind in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS) and _is_span(value):
                yield from _inside_graph(data, _span(value))


def _inside_graph(data: mmap.mmap, span: Span) -> Iterator[str]:
    for number, value in _fields(data, span):
        if number == GRAPH_NODE:
            yield from _inside_node(data, _span(value))
        elif number == GRAPH_INITIALIZER:
            name, _, outside = _tensor(data, _span(value))
            if outside is not None:
                yield name


def _value(data: mmap.mmap, span: Span) -> Value:
    name, dtype, shape = "", None, None
    for number, value in _fields(data, span):
        if number == VALUE_NAME:
            name = _text(data, value)
        elif number == VALUE_TYPE:
            for kind, tensor in _fields(data, _span(value)):
                if kind == TYPE_TENSOR:
                    dtype, shape = _tensor_type(data, _span(tensor))
    return Value(name=name, dtype=dtype, shape=shape)


def _tensor_type(data: mmap.mmap, span: Span) -> tuple[str | None, tuple[int | str | None, ...] | None]:
    dtype, shape = None, None
    for number, value in _fields(data, span):
        if number == TENSOR_ELEMENT:
            dtype = DTYPES.get(_integer(value), f"data type {value}")
        elif number == TENSOR_SHAPE:
            shape = tuple(_dimension(data, _span(d)) for n, d in _fields(data, _span(value)) if n == SHAPE_DIM)
    return dtype, shape


def _dimension(data: mmap.mmap, span: Span) -> int | str | None:
    for number, value in _fields(data, span):
        if number == DIM_VALUE:
            return _integer(value)
        if number == DIM_PARAM:
            return _text(data, value) or None
    return None


def _tensor(data: mmap.mmap, span: Span) -> tuple[str, tuple[int, ...], ExternalTensor | None]:
    """(name, shape, where its bytes lie if that is another file)."""
    name, data_type, location = "", 0, 0
    shape: list[int] = []
    said: dict[str, str] = {}
    for number, value in _fields(data, span):
        if number == TENSOR_DIMS:
            shape += _packed(data, value) if _is_span(value) else [_integer(value)]
        elif number == TENSOR_TYPE:
            data_type = _integer(value)
        elif number == TENSOR_NAME:
            name = _text(data, value)
        elif number == TENSOR_EXTERNAL:
            pair = {n: _text(data, v) for n, v in _fields(data, _span(value))}
            said[pair.get(1, "")] = pair.get(2, "")
        elif number == TENSOR_LOCATION:
            location = _integer(value)
    if location != EXTERNAL:
        return name, tuple(shape), None
    outside = ExternalTensor(
        name=name,
        data_type=data_type,
        shape=tuple(shape),
        location=said.get("location", ""),
        offset=int(said.get("offset", 0)),
        length=int(said["length"]) if "length" in said else None,
    )
    return name, tuple(shape), outside


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """(field number, value) of a message: an integer, or where its bytes lie."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(data, at, end)
            yield number, value
        elif kind == BYTES:
            length, at = _varint(data, at, end)
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


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
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


def _packed(data: mmap.mmap, value: int | Span) -> list[int]:
    at, end = _span(value)
    found = []
    while at < end:
        number, at = _varint(data, at, end)
        found.append(number)
    return found


def _is_span(value: int | Span) -> bool:
    return isinstance(value, tuple)


def _span(value: int | Span) -> Span:
    if not isinstance(value, tuple):
        raise ValueError(f"a message is expected where the number {value} stands")  # noqa: TRY004 - of the file, not of a caller
    return value


def _integer(value: int | Span) -> int:
    """A signed 64-bit number."""
    if isinstance(value, tuple):
        raise ValueError(f"a number is expected at {value[0]:,}")  # noqa: TRY004
    return value - 2**64 if value >= 2**63 else value


def _text(data: mmap.mmap, value: int | Span) -> str:
    begin, end = _span(value)
    return data[begin:end].decode("utf-8")
