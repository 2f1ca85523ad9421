"""A tensor of an ONNX graph whose bytes lie in a file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from pipeline.artifact import FileEntry, TensorRef, map_tensor, numpy_dtype


class StoredTensor(ir.LazyTensor):
    """A tensor whose bytes lie in a file; mapped when asked for."""

    def __init__(self, name: str, path: Path, ref: TensorRef, entry: FileEntry | None) -> None:
        self.path = path
        self.ref = ref
        self.entry = entry  # None while the pack that holds it is still being written
        dtype = ir.DataType.from_numpy(numpy_dtype(ref.dtype))
        super().__init__(self._map, dtype=dtype, shape=ir.Shape(ref.shape), name=name)

    def _map(self) -> ir.TensorProtocol:
        return ir.Tensor(map_tensor(self.path, self.ref), dtype=self.dtype, shape=self.shape, name=self.name)
