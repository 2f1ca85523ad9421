"""Scoring of held-out tokens inside a worker: what a stage predicts, token by token, and greedy text.

The baseline leaves its predictions in a folder; the other stages are compared with them as they are scored, so that
no process ever holds more than one chunk of logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.errors import PipelineError
from pipeline.runtime import CausalLMRunner, has_cache

if TYPE_CHECKING:
    import numpy as np

NLL = "nll.npy"
TOP1 = "top1.npy"
LOG_PROBABILITIES = "log_probabilities.f16"
LOG_SUM_EXP = "log_sum_exp.npy"

MOST_WHOLE_PASSES = 32
"""Tokens of greedy text of a model without a cache."""

ROWS = 32
"""Positions whose logits are worked on at a time, in float64."""


class Window(Frozen):
    """Tokens [begin, end) are given; those from `first` on are scored, each from all before it in the window."""

    begin: int = Field(ge=0)
    end: int
    first: int


class ScoreWork(Frozen):
    """What a worker is asked to score."""

    tokens: str = Field(description="path of a .npy file: int64 token ids, one dimension")
    windows: tuple[Window, ...]
    folder: str = Field(description="where to write this stage's predictions")
    baseline: str | None = Field(
        default=None, description="folder of the baseline's predictions; None for the baseline itself"
    )
    kept: tuple[int, ...] = Field(
        (), description="indices of the scored tokens whose distributions are kept, ascending"
    )
    prompt: tuple[int, ...] = Field(default=(), description="prompt of the greedy text")
    new_tokens: int = Field(default=0, ge=0, description="tokens of greedy text")


class Scored(Frozen):
    """What is known once all windows are scored. Means are over tokens, divergence is in nats."""

    tokens: int
    sample: tuple[int, ...] = ()
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    max_abs_logit_error: float | None = None


def windows_over(length: int, *, window: int, stride: int) -> tuple[Window, ...]:
    """Windows of at most `window` tokens, each `stride` further, that score every token but the first exactly once.

    All but the first window give at least `window - stride` tokens of context.

    Raises: PipelineError where the numbers do not fit: 2 <= window, 1 <= stride < window, 2 <= length.
    """
    if not 1 <= stride < window:
        raise PipelineError(f"the stride must be at least 1 and below the window: stride {stride}, window {window}")
    if length < 2:
        raise PipelineError(f"scoring takes at least 2 tokens; the text has {length}")
    found = []
    begin, scored = 0, 1
    while scored < length:
        end = min(begin + window, length)
        found.append(Window(begin=begin, end=end, first=scored))
        scored = end
        begin += stride
    return tuple(found)


def score_windows(runner: CausalLMRunner, work: ScoreWork) -> Scored:
    """Score every window and write each token's negative log-likelihood (float64, nats) to `nll.npy`.

    The baseline (`baseline` is None) also leaves the most likely token of each position and, for the kept ones, its
    log-probabilities as float16 (precise where the probability is) and the logarithm of the sum of exponentials. The
    others are compared with these: for the divergence, their own log-probabilities are rounded in the same way; of a
    logit error, what rounding may have caused is taken off, so it is a lower bound. Equal logits differ by nothing.

    Raises: PipelineError where the runner refuses.
    """
    import numpy as np

    tokens = np.load(work.tokens)
    folder = Path(work.folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = sum(window.end - window.first for window in work.windows)
    nll = np.full(count, np.nan)
    top1 = np.zeros(count, np.int64)
    slot = np.full(count, -1)  # index -> row among the kept
    slot[list(work.kept)] = np.arange(len(work.kept))
    keeper = _Keeper(folder, len(work.kept)) if work.baseline is None else None
    comparison = None if work.baseline is None else _Comparison(Path(work.baseline))

    done = 0
    for window in work.windows:
        position = window.begin + 1  # the token that the next row of logits predicts
        for chunk in runner.score(tokens[None, window.begin : window.end]):
            logits = chunk[0]  # [C, V]
            last = min(len(logits), window.end - position)
            for row in range(max(0, window.first - position), last, ROWS):
                rows = logits[row : min(row + ROWS, last)].astype(np.float64)
                targets = tokens[position + row : position + row + len(rows)]
                at = slice(done, done + len(rows))
                best = rows.argmax(axis=1)
                log_sum_exp = _log_sum_exp(rows)
                log_probabilities = rows - log_sum_exp[:, None]
                nll[at] = -log_probabilities[np.arange(len(rows)), targets]
                top1[at] = best
                chosen = slot[at] >= 0
                if chosen.any():
                    kept = (slot[at][chosen], log_probabilities[chosen], log_sum_exp[chosen])
                    if keeper is not None:
                        keeper.add(*kept)
                    if comparison is not None:
                        comparison.add(*kept)
                done += len(rows)
            position += len(logits)
    np.save(folder / NLL, nll)
    sample = greedy(runner, work.prompt, work.new_tokens)
    if keeper is not None:
        np.save(folder / TOP1, top1)
        keeper.close()
    if comparison is None:
        return Scored(tokens=count, sample=sample)
    expected = np.load(Path(work.baseline or "") / TOP1)
    return Scored(
        tokens=count,
        sample=sample,
        kl_divergence=comparison.mean_divergence,
        top1_agreement=float(np.mean((top1 == expected) & np.isfinite(nll))) if count else None,
        max_abs_logit_error=comparison.largest_error,
    )


def greedy(runner: CausalLMRunner, prompt: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
    """The most likely token after each, `new_tokens` times, through prefill and decode.

    Without a cache every token costs a whole pass, so there are MOST_WHOLE_PASSES tokens at most.
    """
    import numpy as np

    if not prompt or not new_tokens:
        return ()
    found: list[int] = []
    if not has_cache(runner):
        for _ in range(min(new_tokens, MOST_WHOLE_PASSES)):
            logits = runner.forward(np.array([[*prompt, *found]], dtype=np.int64))
            found.append(int(logits[0].argmax()))
        return tuple(found)
    logits = runner.prefill(np.array([prompt], dtype=np.int64))
    while True:
        found.append(int(logits[0].argmax()))
        if len(found) == new_tokens:
            runner.reset()
            return tuple(found)
        logits = runner.decode(np.array([[found[-1]]], dtype=np.int64))


class _Keeper:
    """Writes the baseline's distributions of the kept tokens to files."""

    def __init__(self, folder: Path, rows: int) -> None:
        import numpy as np

        self._folder = folder
        self._rows = rows
        self._log_sum_exp = np.full(rows, np.nan)
        self._map: np.memmap | None = None

    def add(self, rows: np.ndarray, log_probabilities: np.ndarray, log_sum_exp: np.ndarray) -> None:
        import numpy as np

        if self._map is None:
            shape = (self._rows, log_probabilities.shape[1])
            self._map = np.memmap(self._folder / LOG_PROBABILITIES, np.float16, "w+", shape=shape)
        self._map[rows] = _float16(log_probabilities)
        self._log_sum_exp[rows] = log_sum_exp

    def close(self) -> None:
        import numpy as np

        if self._map is not None:
            self._map.flush()
        np.save(self._folder / LOG_SUM_EXP, self._log_sum_exp)


class _Comparison:
    """Divergence and errors of a stage against what the baseline left."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self._log_sum_exp = np.load(folder / LOG_SUM_EXP)
        self._path = folder / LOG_PROBABILITIES
        self._map: np.memmap | None = None
        self._divergence = 0.0
        self._count = 0
        self._error = 0.0

    def add(self, rows: np.ndarray, log_probabilities: np.ndarray, log_sum_exp: np.ndarray) -> None:
        import numpy as np

        vocabulary = log_probabilities.shape[1]
        if self._map is None:
            shape = (len(self._log_sum_exp), vocabulary)
            expected_bytes = shape[0] * shape[1] * 2
            if self._path.stat().st_size != expected_bytes:
                known = self._path.stat().st_size // 2 // max(1, shape[0])
                raise PipelineError(f"the stage predicts {vocabulary} tokens and the baseline {known}")
            self._map = np.memmap(self._path, np.float16, "r", shape=shape)
        stored = np.asarray(self._map[rows])
        theirs = stored.astype(np.float64)
        ours = _float16(log_probabilities).astype(np.float64)
        # rounding shifts the sums of probabilities a little: both are brought back to 1, so that no divergence is < 0
        p = theirs - _log_sum_exp(theirs)[:, None]
        q = ours - _log_sum_exp(ours)[:, None]
        self._divergence += float(np.sum(np.exp(p) * (p - q)))
        self._count += len(rows)
        # the baseline's value lies within half a step of the stored one
        within = np.spacing(np.minimum(np.abs(stored), np.float16(2**15))).astype(np.float64) / 2
        exact = _within_float16(log_probabilities)
        apart = np.abs((exact + log_sum_exp[:, None]) - (theirs + self._log_sum_exp[rows][:, None]))
        errors = np.maximum(apart - within, 0.0)
        self._error = float(np.maximum(self._error, errors.max()))  # a NaN stays

    @property
    def mean_divergence(self) -> float | None:
        return self._divergence / self._count if self._count else None

    @property
    def largest_error(self) -> float | None:
        return self._error if self._count else None


def _log_sum_exp(rows: np.ndarray) -> np.ndarray:
    """Logarithm of the sum of exponentials of each row."""
    import numpy as np

    top = rows.max(axis=1)
    with np.errstate(invalid="ignore"):  # inf - inf of a broken stage is NaN, as it should be
        sums: np.ndarray = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return sums


def _within_float16(values: np.ndarray) -> np.ndarray:
    """What is beyond float16's range becomes its largest value: a logit of minus infinity is one that never wins."""
    import numpy as np

    limit = float(np.finfo(np.float16).max)
    clipped: np.ndarray = np.clip(values, -limit, limit)
    return clipped


def _float16(values: np.ndarray) -> np.ndarray:
    import numpy as np

    rounded: np.ndarray = _within_float16(values).astype(np.float16)
    return rounded
