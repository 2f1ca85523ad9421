"""Key-value caches of ONNX graphs: values that each step replaces, or buffers that each step appends to.

Both hold OrtValues [B, kv_heads, T, head_dim], key and value of each layer in turn: k[0], v[0], k[1] … They do not know
how many positions are filled: the runner does, and the graph is told by its mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.artifact import CacheLayout, numpy_dtype
from pipeline.runtime.onnx_session import ort_value

if TYPE_CHECKING:
    import numpy as np

ROOM = 256
"""Positions by which buffers are rounded up. Pages of them that no token filled take no memory."""


def empty_past(layout: CacheLayout, batch: int) -> list[Any]:
    """The past before any token: T is 0."""
    import numpy as np

    empty = ort_value(np.empty((batch, layout.kv_heads, 0, layout.head_dim), numpy_dtype(layout.dtype)))
    return [empty] * (2 * layout.layers)


class CacheBuffers:
    """Buffers [B, kv_heads, capacity, head_dim] that are past and present at once.

    They stay when the cache is emptied, for the next prompt; `device` is cpu or cuda.
    """

    def __init__(self, layout: CacheLayout, max_length: int, device: str) -> None:
        self._layout, self._max_length, self._device = layout, max_length, device
        self.values: list[Any] = []
        self._arrays: list[np.ndarray] = []  # the memory of the values that lie on the host
        self.batch = self.capacity = 0

    def has_room(self, batch: int, total: int) -> bool:
        """Whether `total` positions of so many sequences fit."""
        return batch == self.batch and total <= self.capacity

    def make_room(self, batch: int, *, filled: int, total: int) -> None:
        """Allocate buffers for `total` positions and one more, into which the first `filled` are copied.

        The capacity is rounded up, and at least doubled where the batch stays, but never more than the model's
        positions. Whoever holds the values of before keeps their memory from being freed.
        """
        wanted = total + 1  # a prompt that just fits would have its first token wait for a copy
        rounded = -(-wanted // ROOM) * ROOM
        if batch == self.batch:
            rounded = max(rounded, 2 * self.capacity)
        self.batch, self.capacity = batch, min(rounded, self._max_length)
        before: list[Any] = self._on_host() if filled else [None] * (2 * self._layout.layers)
        self.values, self._arrays = [], []
        for i, contents in enumerate(before):
            array = self._zeros()
            if contents is not None:
                array[:, :, :filled] = contents[:, :, :filled]
                before[i] = None  # only this one is there twice
            self._put(array)

    def _zeros(self) -> np.ndarray:
        import numpy as np

        layout = self._layout
        return np.zeros((self.batch, layout.kv_heads, self.capacity, layout.head_dim), numpy_dtype(layout.dtype))

    def _put(self, array: np.ndarray) -> None:
        import onnxruntime as ort

        if self._device == "cpu":
            self._arrays.append(array)
            self.values.append(ort_value(array))
        else:
            self.values.append(ort.OrtValue.ortvalue_from_numpy(array, self._device))

    def _on_host(self) -> list[Any]:
        return list(self._arrays) if self._device == "cpu" else [value.numpy() for value in self.values]
