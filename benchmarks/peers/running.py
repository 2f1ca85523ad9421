"""What every tool's runner has in common: one sequence, whose length is counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

MAX_LENGTH = 512
"""Positions that every tool is given room for, where it asks how many."""


class Running(ABC):
    """Prompts and single tokens over a tool that runs tokens after what its cache holds; batch 1.

    Its methods are those of pipeline.runtime.CausalLMRunner that a timed block calls.
    """

    version = "1"
    has_cache = True

    def __init__(self, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.max_length = MAX_LENGTH
        self._length = 0

    @abstractmethod
    def _empty(self) -> None:
        """Empty the tool's cache."""

    @abstractmethod
    def _run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        """Run tokens [1, S] (int64) after `past` others; the last position's logits [1, V] (float32)."""

    def prefill(self, tokens: ArrayLike) -> np.ndarray:
        """Empty the cache, process a prompt [1, S], and return the last position's logits [1, V]."""
        self.reset()
        return self.decode(tokens)

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Append tokens [1, S], and return the last one's logits [1, V]."""
        import numpy as np

        ids = np.asarray(tokens, np.int64)
        logits = self._run(ids, self._length)
        self._length += ids.shape[1]
        return logits

    def reset(self) -> None:
        """Empty the cache."""
        self._empty()
        self._length = 0
