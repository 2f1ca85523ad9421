"""What a runner is asked to do when its speed is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.artifact import Frozen

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["prefill", "decode"]


class Point(Frozen):
    """One thing that is timed: prompts of `prompt` tokens, or the `new_tokens` single tokens after one."""

    kind: Kind
    batch: int = Field(ge=1)
    prompt: int = Field(ge=1, description="tokens of the prompt")
    new_tokens: int = Field(ge=1, description="tokens decoded after the prompt")

    @property
    def length(self) -> int:
        """Positions that a model must have for it."""
        return self.prompt + (self.new_tokens if self.kind == "decode" else 0)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens that one timed iteration processes: a whole batch of prompts, or one token a sequence."""
        return self.batch * (self.prompt if self.kind == "prefill" else 1)

    def __str__(self) -> str:
        return f"{self.kind} batch {self.batch} prompt {self.prompt}"


class Workload(Frozen):
    """The points at which every stage is measured: prefill and decode for each prompt length and batch size."""

    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = Field(default=64, ge=1)
    batch_sizes: tuple[int, ...] = (1,)

    def points(self) -> Iterator[Point]:
        for batch in self.batch_sizes:
            for prompt in self.prompt_lengths:
                yield Point(kind="prefill", batch=batch, prompt=prompt, new_tokens=self.new_tokens)
                yield Point(kind="decode", batch=batch, prompt=prompt, new_tokens=self.new_tokens)


def fixed_tokens(point: Point, *, vocab_size: int, seed: int) -> np.ndarray:
    """The tokens [B, prompt + new_tokens] (int64) that every stage is fed at this point: none is sampled."""
    import numpy as np

    random = np.random.default_rng([seed, point.batch, point.prompt])
    return random.integers(0, vocab_size, (point.batch, point.prompt + point.new_tokens), dtype=np.int64)
