"""Fakes for the tests of passes and runners: a clock that is told the time, a model that is a rule, a passing store."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.models import find_source, source_artifact
from pipeline.plugin import Pass, PassContext
from pipeline.store import Store
from pipeline.store.writer import OutputWriter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


class FakeClock:
    """A monotonic clock in nanoseconds, as `time.perf_counter_ns`, on which time passes when it is told to."""

    def __init__(self, start_ns: int = 0) -> None:
        self.now_ns = start_ns

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        """Raises: ValueError where time would run backwards."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds} s")
        self.now_ns += round(seconds * 1e9)


class FakeRunner:
    """A causal language model that is a rule: after token t, at any place, comes (t + step) modulo the vocabulary.

    It keeps the contract of a runner, cache and errors included. The logit of that token is `height`, all others are 0.
    `calls` lists what it was asked for, as (method, shape); with a `clock`, each call takes `seconds` of its time.
    """

    version = "1"

    def __init__(
        self,
        *,
        vocab_size: int = 16,
        max_length: int = 64,
        step: int = 1,
        height: float = 8.0,
        has_cache: bool = True,
        clock: FakeClock | None = None,
        seconds: float = 0.001,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.has_cache = has_cache
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self._step = step
        self._height = height
        self._clock = clock
        self._seconds = seconds
        self._batch: int | None = None
        self._filled = 0

    def forward(self, tokens: ArrayLike) -> np.ndarray:
        """Logits of the last position, [B, V], of a whole pass."""
        given = self._called("forward", tokens, self.max_length)
        return self._logits(given)[:, -1]

    def prefill(self, tokens: ArrayLike) -> np.ndarray:
        """Empty the cache, take a prompt [B, S]; logits [B, V]."""
        self._needs_cache()
        given = self._called("prefill", tokens, self.max_length)
        self._batch, self._filled = given.shape
        return self._logits(given)[:, -1]

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Append one token a sequence, [B, 1]; logits [B, V]."""
        self._needs_cache()
        given = self._called("decode", tokens, self.max_length - self._filled)
        if self._batch is None:
            raise PipelineError("decode needs a prompt: call prefill first")
        if given.shape != (self._batch, 1):
            raise PipelineError(f"decode takes [{self._batch}, 1] tokens, not {list(given.shape)}")
        self._filled += 1
        return self._logits(given)[:, -1]

    def score(self, tokens: ArrayLike) -> Iterator[np.ndarray]:
        """Logits [B, S, V] in two chunks."""
        given = self._called("score", tokens, self.max_length)
        logits, half = self._logits(given), (given.shape[1] + 1) // 2
        yield logits[:, :half]
        if half < given.shape[1]:
            yield logits[:, half:]

    def reset(self) -> None:
        """Empty the cache."""
        self._batch, self._filled = None, 0

    def _needs_cache(self) -> None:
        if not self.has_cache:
            raise PipelineError("this model has no key-value cache: it knows whole passes only")

    def _called(self, method: str, tokens: ArrayLike, room: int) -> np.ndarray:
        import numpy as np

        given = np.asarray(tokens, dtype=np.int64)
        self.calls.append((method, given.shape))
        if given.ndim != 2 or 0 in given.shape:
            raise PipelineError(f"tokens are [batch, length], not {list(given.shape)}")
        if given.min() < 0 or given.max() >= self.vocab_size:
            raise PipelineError(f"the vocabulary has the tokens 0 to {self.vocab_size - 1}")
        if given.shape[1] > room:
            raise PipelineError(f"there is room for {room} more positions, not for {given.shape[1]}")
        if self._clock is not None:
            self._clock.advance(self._seconds)
        return given

    def _logits(self, tokens: np.ndarray) -> np.ndarray:
        import numpy as np

        logits = np.zeros((*tokens.shape, self.vocab_size), np.float32)  # [B, S, V]
        np.put_along_axis(logits, (tokens[..., None] + self._step) % self.vocab_size, self._height, axis=-1)
        return logits


class FakeStore(Store):
    """A real store in a temporary folder, in which a pass can be run without the engine; a context manager.

    Give it a `folder` to keep it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary = folder is None
        super().__init__(Path(tempfile.mkdtemp(prefix="store-")) if folder is None else folder)

    def model(self, folder: Path) -> Artifact:
        """The checkpoint in that folder as an artifact, such as one that `tiny_llama` wrote."""
        return source_artifact(find_source("path", str(folder), relative_to=folder), self)

    def run(
        self,
        cls: type[Pass],
        artifact: Artifact,
        params: Mapping[str, Any] | None = None,
        *,
        inputs: Mapping[str, Artifact] | None = None,
        facets: Mapping[str, Any] | None = None,
        rules: dict[str, tuple[int, int]] | None = None,
    ) -> Artifact:
        """Run a pass in this process and publish what it makes: quick, and without what the engine looks after.

        `facets` are the values of those that the pass declares; a dict given as `rules` gets what it counts.

        Raises: PipelineError where the pass declares a facet that is not given; whatever the pass raises.
        """
        values = cls.Params(**(params or {}))
        declared = cls.facets(values)
        given = dict(facets or {})
        if missing := [name for name in declared if name not in given]:
            raise PipelineError(f"{cls.name} declares {', '.join(missing)}", hint="give `facets` with their values")
        with self.staging() as staging:
            context = PassContext(
                output=OutputWriter(staging),
                inputs=dict(inputs or {}),
                facets={name: given[name] for name in declared},
                rules={} if rules is None else rules,
            )
            return self.publish(staging, cls().run(artifact, values, context).manifest)

    def close(self) -> None:
        """Remove it, where it is a temporary one."""
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
