"""Whether two graphs of one causal language model compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passes.graph.causal_lm_session import CausalLMSession
from pipeline import Interface, PassContext, PipelineError

if TYPE_CHECKING:
    import numpy as np

SEED = 0
CALLS = (7, 3, 1)
"""Tokens of each call: a prompt into an empty cache, a longer continuation, a single token."""


Outputs = list[dict[str, "np.ndarray"]]
"""Of each call, the outputs by role."""


def outputs_of(session: Any, interface: Interface) -> Outputs:
    """Run a session of a causal language model call by call on random tokens, each continuing from its own cache.

    Without a cache each call is a sequence of its own. A graph that takes no tokens is none: it has no outputs.

    Raises: PipelineError where ONNX Runtime fails.
    """
    import numpy as np

    if "tokens" not in interface.inputs:
        return []
    tokens = np.random.default_rng(SEED).integers(0, interface.vocab_size or 1, (1, sum(CALLS)), dtype=np.int64)
    model = CausalLMSession(session, interface, list(interface.outputs.values()))
    outputs: Outputs = []
    past = 0
    for count in CALLS:
        if past + count <= (interface.max_length or sum(CALLS)):
            given = model.run(tokens[:, past : past + count], past)
            outputs.append({role: given[name] for role, name in interface.outputs.items()})
            past += count if interface.cache is not None else 0
    return outputs


def largest_difference(expected: Outputs, given: Outputs) -> float:
    """The largest absolute difference of an output, over the standard deviation of what is expected.

    Of a graph without outputs to compare it is 0. Raises: PipelineError where the shapes differ.
    """
    differences = [
        _difference(role, reference, step[role])
        for call, step in zip(expected, given, strict=True)
        for role, reference in call.items()
    ]
    return max(differences, default=0.0)


def check_agreement(
    expected: Outputs, given: Outputs, context: PassContext, *, tolerance: float, what: str, hint: str
) -> None:
    """Log the largest difference of the outputs of `what` from those of the graph before it.

    Raises: PipelineError where it is more than `tolerance`, a share of an output's standard deviation.
    """
    difference = largest_difference(expected, given)
    context.logger.info("largest difference from before: %.1e of the standard deviation", difference)
    if not difference <= tolerance:  # nor where it is no number
        raise PipelineError(
            f"{what} differs from the one before by {difference:.2g} of the standard deviation; "
            f"{tolerance:.2g} is allowed",
            hint=hint,
        )


def _difference(role: str, expected: np.ndarray, given: np.ndarray) -> float:
    import numpy as np

    if expected.shape != given.shape:
        raise PipelineError(f"the output {role} has shape {list(given.shape)}, before it was {list(expected.shape)}")
    reference = expected.astype(np.float64)
    difference = float(np.abs(given - reference).max()) / (float(reference.std()) or 1.0)
    return difference if np.isfinite(difference) else float("inf")
