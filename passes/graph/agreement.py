"""Whether two graphs of one causal language model compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline import Interface, PipelineError

if TYPE_CHECKING:
    import numpy as np

SEED = 0
CALLS = (7, 3, 1)
"""Tokens of each call: a prompt into an empty cache, a longer continuation, a single token."""


Outputs = list[dict[str, "np.ndarray"]]
"""Of each call, the outputs by role."""


def outputs_of(session: Any, interface: Interface) -> Outputs:
    """Run a session of a causal language model call by call on random tokens, each continuing from its own cache.

    Raises: PipelineError where ONNX Runtime fails.
    """
    import numpy as np

    tokens = np.random.default_rng(SEED).integers(0, interface.vocab_size or 1, (1, sum(CALLS)), dtype=np.int64)
    model = _Stepper(session, interface)
    outputs: Outputs = []
    past = 0
    for count in CALLS:
        if past + count <= (interface.max_length or sum(CALLS)):
            outputs.append(model.step(tokens[:, past : past + count], past))
            past += count
    return outputs


def largest_difference(expected: Outputs, given: Outputs) -> float:
    """The largest absolute difference of an output, over the standard deviation of what is expected.

    Raises: PipelineError where the shapes differ.
    """
    return max(
        _difference(role, reference, step[role])
        for call, step in zip(expected, given, strict=True)
        for role, reference in call.items()
    )


def _difference(role: str, expected: np.ndarray, given: np.ndarray) -> float:
    import numpy as np

    if expected.shape != given.shape:
        raise PipelineError(f"the output {role} has shape {list(given.shape)}, before it was {list(expected.shape)}")
    reference = expected.astype(np.float64)
    difference = float(np.abs(given - reference).max()) / (float(reference.std()) or 1.0)
    return difference if np.isfinite(difference) else float("inf")


class _Stepper:
    """A session and the cache that it has filled."""

    def __init__(self, session: Any, interface: Interface) -> None:
        self._session = session
        self._interface = interface
        self._inputs = {node.name: node for node in session.get_inputs()}
        self._past: dict[str, Any] = {}

    def step(self, tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
        """Outputs by role, for tokens [1, S] after `past` others."""
        import numpy as np

        roles, length = self._interface.inputs, tokens.shape[1]
        values = {
            "tokens": tokens,
            "mask": np.ones((1, past + length)),
            "positions": np.arange(past, past + length)[None],
        }
        feeds = {roles[role]: self._typed(roles[role], value) for role, value in values.items() if role in roles}
        if keep := self._interface.logits_to_keep:
            feeds[keep] = self._typed(keep, np.full([1] * len(self._inputs[keep].shape), length))
        for role, name in roles.items():
            if role.startswith("past."):
                feeds[name] = self._past.get(role, self._empty(name))
        outputs = self._interface.outputs
        try:
            results = dict(zip(outputs, self._session.run(list(outputs.values()), feeds), strict=True))
        except Exception as error:  # the runtime's exceptions share no base of their own
            raise PipelineError(
                f"ONNX Runtime cannot run the graph on {length} tokens after {past}: {str(error).partition(chr(10))[0]}"
            ) from error
        self._past = {role.replace("present", "past"): value for role, value in results.items() if role != "logits"}
        return results

    def _typed(self, name: str, value: np.ndarray) -> np.ndarray:
        return value.astype("int32" if self._inputs[name].type == "tensor(int32)" else "int64")

    def _empty(self, name: str) -> np.ndarray:
        import numpy as np

        assert self._interface.cache is not None
        cache = self._interface.cache
        dtype = {"tensor(float16)": np.float16}.get(self._inputs[name].type, np.float32)
        return np.zeros((1, cache.kv_heads, 0, cache.head_dim), dtype)
