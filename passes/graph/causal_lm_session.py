"""A causal language model's graph in a session, run call by call, each after what those before left in its cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline import Interface, PipelineError

if TYPE_CHECKING:
    import numpy as np

FED = ("tokens", "mask", "positions")


class CausalLMSession:
    """An ONNX Runtime session and the cache that it has filled, if it has one.

    `outputs` are the names of the values that a call gives. With `carried` the outputs of the cache are kept for the
    next call; they have to be the session's. Inputs that the session does not take, as nothing needs them, are left
    out. `alive` is what must not go before the session does.

    Raises: PipelineError where the graph takes inputs that tokens alone do not give.
    """

    def __init__(
        self,
        session: Any,
        interface: Interface,
        outputs: Sequence[str],
        *,
        carried: bool = True,
        alive: Sequence[Any] = (),
    ) -> None:
        self._session = session
        self._alive = alive
        self._roles = interface.inputs
        self._layout = interface.cache
        self._logits_to_keep = interface.logits_to_keep
        self._types = {node.name: (node.type, len(node.shape)) for node in session.get_inputs()}
        pasts = [role for role in self._roles if role.startswith("past.")]
        if pasts and self._layout is None:
            raise PipelineError("the graph's interface has no cache layout")
        self._pasts = {self._roles[role]: interface.outputs[role.replace("past", "present")] for role in pasts}
        known = {self._roles.get(role) for role in FED} | self._pasts.keys() | {self._logits_to_keep}
        if unknown := self._types.keys() - known:
            raise PipelineError(f"tokens alone do not give the graph's inputs {', '.join(sorted(unknown))}")
        self._outputs = list(outputs)
        self.has_cache = carried and bool(pasts)
        self._asked = list(dict.fromkeys([*outputs, *(self._pasts.values() if self.has_cache else ())]))
        self._past: dict[str, Any] = {}

    def run(self, tokens: np.ndarray, past: int, *, keep: int | None = None) -> dict[str, np.ndarray]:
        """The outputs for tokens [B, S] after `past` others; an empty past empties the cache.

        `keep`, by default all, says of how many of the last positions there are logits, where the graph can limit them.

        Raises: PipelineError where ONNX Runtime fails.
        """
        import numpy as np

        batch, length = tokens.shape
        given = {
            "tokens": tokens,
            "mask": np.ones((batch, past + length)),
            "positions": np.broadcast_to(np.arange(past, past + length), (batch, length)),
        }
        arrays = {self._roles[role]: array for role, array in given.items() if role in self._roles}
        if self._logits_to_keep is not None:
            rank = self._types.get(self._logits_to_keep, ("", 0))[1]
            arrays[self._logits_to_keep] = np.full([1] * rank, length if keep is None else keep)
        feeds = {name: _ort_value(self._integers(name, array)) for name, array in arrays.items() if name in self._types}
        for name in self._pasts.keys() & self._types.keys():
            feeds[name] = self._past[name] if past else self._empty(batch)
        try:
            made = self._session.run_with_ort_values(self._asked, feeds)
        except Exception as error:  # the runtime's exceptions share no base of their own
            raise PipelineError(
                f"ONNX Runtime cannot run the graph on {length} tokens after {past}: {str(error).partition(chr(10))[0]}"
            ) from error
        values = dict(zip(self._asked, made, strict=True))
        if self.has_cache:
            self._past = {name: values[present] for name, present in self._pasts.items()}
        return {name: _numpy(values[name]) for name in self._outputs}

    def _integers(self, name: str, values: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.ascontiguousarray(values, np.int32 if self._types[name][0] == "tensor(int32)" else np.int64)

    def _empty(self, batch: int) -> Any:
        """The cache of a layer before any token."""
        import ml_dtypes
        import numpy as np

        assert self._layout is not None
        dtype = np.dtype(getattr(ml_dtypes, self._layout.dtype, self._layout.dtype))
        return _ort_value(np.empty((batch, self._layout.kv_heads, 0, self._layout.head_dim), dtype))


def _ort_value(array: np.ndarray) -> Any:
    """An OrtValue over the array's own memory: a session takes no bfloat16 from numpy otherwise."""
    import onnx_ir as ir
    import onnxruntime

    element = int(ir.DataType.from_numpy(array.dtype))
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)


def _numpy(value: Any) -> np.ndarray:
    """A copy of an OrtValue of the host, bfloat16 as ml_dtypes has it."""
    import numpy as np
    import onnx_ir as ir

    dtype = ir.DataType(value.element_type()).numpy()
    shape = value.shape()
    if 0 in shape:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype).reshape(shape).copy()
