"""What a runner's key-value cache holds, and the checks that every causal language model shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

SCORE_BYTES = 64 * 2**20
"""Bytes of float32 logits that `score` gives at a time: the same in every runner, so that stages compute alike."""


NO_CACHE = "the graph has no key-value cache: it knows whole passes only"
NO_CACHE_HINT = "measure it with evaluate.workload.forward, such as [[1, 128]], or export it with its cache"


def as_tokens(tokens: ArrayLike) -> np.ndarray:
    """Token ids as an int64 array; lists will do."""
    import numpy as np

    return np.asarray(tokens, dtype=np.int64)


class Sequence:
    """The batch and the number of positions in a cache, checked before each call."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.batch = 0
        self.length = 0

    def reset(self) -> None:
        self.batch = self.length = 0

    def check_prompt(self, tokens: np.ndarray) -> tuple[int, int]:
        """(B, S) of a prompt [B, S].

        Raises: PipelineError where it is empty, has another rank, or is longer than max_length.
        """
        if tokens.ndim != 2 or not tokens.size:
            raise PipelineError(f"tokens must have shape [batch, length] and not be empty, not {list(tokens.shape)}")
        batch, length = tokens.shape
        if length > self.max_length:
            raise PipelineError(f"the prompt has {length} tokens and the model takes at most {self.max_length}")
        return batch, length

    def check_step(self, tokens: np.ndarray) -> int:
        """B of a step [B, 1] that follows what the cache holds.

        Raises: PipelineError where the cache is empty or full, or its batch is another.
        """
        if tokens.ndim != 2 or tokens.shape[1] != 1:
            raise PipelineError(f"decode takes one token a sequence, shape [batch, 1], not {list(tokens.shape)}")
        batch = int(tokens.shape[0])
        if not self.length:
            raise PipelineError(f"decode of batch {batch} with 0 tokens in the cache: prefill comes first")
        if batch != self.batch:
            raise PipelineError(f"decode of batch {batch} with a cache of batch {self.batch}")
        if self.length + 1 > self.max_length:
            raise PipelineError(f"position {self.length + 1} is beyond the model's {self.max_length}")
        return batch

    def chunk_length(self, batch: int, vocab_size: int) -> int:
        """Positions whose logits [B, C, V] in float32 take at most SCORE_BYTES; at least 1."""
        return max(1, SCORE_BYTES // (4 * batch * vocab_size))

    def extend(self, batch: int, length: int) -> None:
        """Record that `length` positions were added."""
        self.batch = batch
        self.length += length
