"""What an ONNX file says of its inputs, outputs and weights, without reading a weight.

The mapped file is walked over (see pipeline/onnx_wire.py), so that one of gigabytes is read as quickly as one of
kilobytes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.onnx_wire import (
    EXTERNAL,
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    TENSOR_LOCATION,
    TENSOR_NAME,
    Span,
    as_enum,
    as_integer,
    as_span,
    as_text,
    external_tensors,
    fields,
    is_span,
    varint,
)

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

GRAPH_NODE, GRAPH_INPUT, GRAPH_OUTPUT = 1, 11, 12
NODE_OPERATOR = 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_EXTERNAL = 1, 2, 13
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR, TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE, DIM_PARAM = 1, 1, 2, 1, 1, 2


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
    """Tensors outside the file that are no initializers of the main graph, or sparse ones of it."""


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
    graphs = [value for number, value in fields(data, (0, len(data))) if number == MODEL_GRAPH and is_span(value)]
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs where a model has one")
    inputs: list[Value] = []
    outputs: list[Value] = []
    external: list[ExternalTensor] = []
    operators: set[str] = set()
    names: set[str] = set()
    parameters = 0
    for number, value in fields(data, as_span(graphs[0])):
        if number == GRAPH_INPUT:
            inputs.append(_value(data, as_span(value)))
        elif number == GRAPH_OUTPUT:
            outputs.append(_value(data, as_span(value)))
        elif number == GRAPH_INITIALIZER:
            name, shape, outside = _tensor(data, as_span(value))
            names.add(name)
            parameters += prod(shape) if len(shape) > 1 else 0
            if outside is not None:
                external.append(outside)
        elif number == GRAPH_NODE:
            operators |= {as_text(data, kind) for n, kind in fields(data, as_span(value)) if n == NODE_OPERATOR}
    return OnnxHeader(
        # older graphs list initializers among the inputs, as values that a caller may replace
        inputs=tuple(value for value in inputs if value.name not in names),
        outputs=tuple(outputs),
        initializers=len(names),
        parameters=parameters,
        external=tuple(external),
        operators=frozenset(operators),
        hidden=tuple(name or "a constant" for name, main in external_tensors(data) if not main),
    )


def _value(data: mmap.mmap, span: Span) -> Value:
    name, dtype, shape = "", None, None
    for number, value in fields(data, span):
        if number == VALUE_NAME:
            name = as_text(data, value)
        elif number == VALUE_TYPE:
            for kind, tensor in fields(data, as_span(value)):
                if kind == TYPE_TENSOR:
                    dtype, shape = _tensor_type(data, as_span(tensor))
    return Value(name=name, dtype=dtype, shape=shape)


def _tensor_type(data: mmap.mmap, span: Span) -> tuple[str | None, tuple[int | str | None, ...] | None]:
    dtype, shape = None, None
    for number, value in fields(data, span):
        if number == TENSOR_ELEMENT:
            dtype = DTYPES.get(as_integer(value), f"data type {value}")
        elif number == TENSOR_SHAPE:
            shape = tuple(_dimension(data, as_span(d)) for n, d in fields(data, as_span(value)) if n == SHAPE_DIM)
    return dtype, shape


def _dimension(data: mmap.mmap, span: Span) -> int | str | None:
    for number, value in fields(data, span):
        if number == DIM_VALUE:
            return as_integer(value)
        if number == DIM_PARAM:
            return as_text(data, value) or None
    return None


def _tensor(data: mmap.mmap, span: Span) -> tuple[str, tuple[int, ...], ExternalTensor | None]:
    """(name, shape, where its bytes lie if that is another file)."""
    name, data_type, location = "", 0, 0
    shape: list[int] = []
    said: dict[str, str] = {}
    for number, value in fields(data, span):
        if number == TENSOR_DIMS:
            shape += _packed(data, value) if is_span(value) else [as_integer(value)]
        elif number == TENSOR_TYPE:
            data_type = as_integer(value)
        elif number == TENSOR_NAME:
            name = as_text(data, value)
        elif number == TENSOR_EXTERNAL:
            pair = {n: as_text(data, v) for n, v in fields(data, as_span(value))}
            said[pair.get(1, "")] = pair.get(2, "")
        elif number == TENSOR_LOCATION:
            location = as_enum(value)
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


def _packed(data: mmap.mmap, value: int | Span) -> list[int]:
    at, end = as_span(value)
    found = []
    while at < end:
        number, at = varint(data, at, end)
        found.append(number)
    return found
