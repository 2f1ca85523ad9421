"""What a runner is asked to do when its speed is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.artifact import Frozen

if TYPE_CHECKING:
    import numpy as np

    from pipeline.recipe import schema

Kind = Literal["prefill", "decode", "forward"]


class Point(Frozen):
    """One thing that is timed: prompts of `prompt` tokens, the `new_tokens` single tokens after one, or whole passes.

    A pass (`forward`) is a batch of sequences of `prompt` tokens through a model without a cache.
    """

    kind: Kind
    batch: int = Field(ge=1)
    prompt: int = Field(ge=1, description="tokens of the prompt")
    new_tokens: int = Field(ge=0, description="tokens decoded after the prompt; 0 where nothing is decoded")

    @property
    def length(self) -> int:
        """Positions that a model must have for it."""
        return self.prompt + (self.new_tokens if self.kind == "decode" else 0)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens that one timed iteration processes: a whole batch of prompts, or one token a sequence."""
        return self.batch * (1 if self.kind == "decode" else self.prompt)

    def __str__(self) -> str:
        if self.kind == "forward":
            return f"forward batch {self.batch} length {self.prompt}"
        decoded = f" new tokens {self.new_tokens}" if self.kind == "decode" else ""
        return f"{self.kind} batch {self.batch} prompt {self.prompt}{decoded}"


class Workload(Frozen):
    """The points at which every stage is measured.

    Prefill for each batch size and prompt length, and decode for each of those and each number of new tokens; or, where
    `forward` is given, whole passes of [batch, length] alone.
    """

    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (64,)
    batch_sizes: tuple[int, ...] = (1,)
    forward: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, recipe: schema.Workload) -> Workload:
        """The workload that a recipe's `evaluate.workload` asks for."""
        return cls(
            prompt_lengths=tuple(recipe.prompt_lengths),
            new_tokens=tuple(recipe.new_token_counts),
            batch_sizes=tuple(recipe.batch_sizes),
            forward=None if recipe.forward is None else tuple((batch, length) for batch, length in recipe.forward),
        )

    def points(self) -> Iterator[Point]:
        for batch, length in self.forward or ():
            yield Point(kind="forward", batch=batch, prompt=length, new_tokens=0)
        if self.forward is not None:
            return
        for batch in self.batch_sizes:
            for prompt in self.prompt_lengths:
                yield Point(kind="prefill", batch=batch, prompt=prompt, new_tokens=0)
                for new_tokens in self.new_tokens:
                    yield Point(kind="decode", batch=batch, prompt=prompt, new_tokens=new_tokens)


def fixed_tokens(point: Point, *, vocab_size: int, seed: int) -> np.ndarray:
    """The tokens [B, prompt + new_tokens] (int64) that every stage is fed at this point: none is sampled."""
    import numpy as np

    random = np.random.default_rng([seed, point.batch, point.prompt])
    shapes = ((point.batch, point.prompt), (point.batch, point.new_tokens))  # the prompt is the same for every kind
    return np.concatenate([random.integers(0, vocab_size, shape, dtype=np.int64) for shape in shapes], axis=1)
