"""Paired quality: every stage scores the same held-out tokens, and is compared with the baseline token by token."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import PipelineError, StageError
from pipeline.measure.process import LoadError, StageToMeasure, StartWorker, Worker
from pipeline.measure.scoring import NLL, Scored, ScoreWork, windows_over

if TYPE_CHECKING:
    import numpy as np

KEPT_TOKENS = 2048
"""Tokens whose whole distribution is kept for the baseline and compared."""

KEPT_BYTES = 512 * 2**20
"""Disk that the baseline's distributions may take; a large vocabulary keeps fewer tokens."""

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 32

LEAST_BLOCKS = 8
"""Stretches of text that the interval resamples."""

QUALITY_VERSION = 3
"""Enters the key of cached results: raised when the same predictions would be scored otherwise."""


class QualityWorkload(Frozen):
    """How much of the text is scored, and how."""

    window: int = Field(default=512, ge=2, description="tokens that a model sees at once")
    stride: int = Field(default=256, ge=1, description="tokens from one window to the next")
    tokens: int = Field(default=20000, ge=2, description="tokens of the text that are used, at most")


class RatioInterval(Frozen):
    """A ratio and its 95 % interval; None where a number is not finite."""

    ratio: float | None
    low: float | None
    high: float | None


class QualityFigures(Frozen):
    """A stage against the baseline on the same tokens: what was found, whatever a recipe makes of it."""

    perplexity_ratio: RatioInterval
    kl_divergence: float | None = Field(description="mean of KL(baseline || stage) over the kept tokens, nats")
    top1_agreement: float | None = Field(description="share of all scored tokens with the same most likely token")
    max_abs_logit_error: float | None = Field(
        description="over the kept tokens; a lower bound, to the resolution of float16"
    )
    first_divergence: int | None = Field(
        description="first token of the greedy text that differs; None where none does"
    )
    identical: bool = Field(description="every prediction that was compared is the baseline's, bit for bit")


class StageQuality(Frozen):
    """The quality of one stage."""

    perplexity: float | None = Field(description="None where it is not finite")
    tokens: int = Field(description="tokens that were scored")
    non_finite_tokens: int = Field(default=0, description="those whose likelihood is not a number")
    kept_tokens: int = Field(description="those whose whole distribution was compared")
    window: int
    stride: int
    sample_prompt: str = ""
    sample_text: str = Field(default="", description="greedy text after the prompt")
    vs_baseline: QualityFigures | None = Field(default=None, description="None for the baseline")


class QualityMeasurement(Frozen):
    """Quality by stage; stages that could not be scored, with the reason."""

    stages: dict[str, StageQuality]
    failures: dict[str, str] = Field(default_factory=dict)
    unloadable: tuple[str, ...] = Field((), description="those of the failures whose model does not load")
    notes: tuple[str, ...] = ()


def measure_quality(
    stages: Sequence[StageToMeasure],
    *,
    baseline: str,
    text: str,
    logs: Path,
    workload: QualityWorkload | None = None,
    random_weights: int | None = None,
    on_progress: Callable[[float, str], None] = lambda fraction, message: None,
    start_worker: StartWorker = Worker,
) -> QualityMeasurement:
    """Score `text` at every stage, one process at a time, and compare each with the baseline.

    The text is tokenized by the baseline's tokenizer.json, without special tokens. Where a model is shorter than the
    window, the window shrinks for all, and a note says so. Predictions go through a temporary folder. Where the
    baseline cannot be scored, no stage is, and all have its reason.

    A model with random weights has no tokenizer and no text is likelier to it than another: with `random_weights`, a
    seed, tokens are drawn evenly from its vocabulary instead.

    Raises: PipelineError where there is no such baseline, no tokenizer or another model's, or too little text.
    """
    import numpy as np

    base = next((stage for stage in stages if stage.name == baseline), None)
    if base is None:
        raise PipelineError(f"the baseline {baseline!r} is none of the stages")
    wanted = workload or QualityWorkload()
    wanted, notes = fit_windows(wanted, [stage.artifact for stage in stages])
    window, stride = wanted.window, wanted.stride
    if random_weights is None:
        ids = tokenize(base.artifact, text, limit=wanted.tokens)
    else:
        ids = seeded_tokens(base.artifact, wanted.tokens, random_weights)
    if len(ids) < window:
        raise PipelineError(f"the evaluation text gives {len(ids)} tokens, less than one window of {window}")
    windows = windows_over(len(ids), window=window, stride=stride)
    count = len(ids) - 1
    prompt = tuple(ids[: min(PROMPT_TOKENS, window // 2)])

    def shown(tokens: Sequence[int]) -> str:
        return decode(base.artifact, tokens) if random_weights is None else " ".join(map(str, tokens))

    measured: dict[str, StageQuality] = {}
    failures: dict[str, str] = {}
    unloadable: list[str] = []

    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", np.array(ids, dtype=np.int64))
        kept: tuple[int, ...] = ()
        scored: dict[str, Scored] = {}
        ordered = [base, *(stage for stage in stages if stage is not base)]
        for done, stage in enumerate(ordered):
            on_progress(done / len(ordered), f"scoring {stage.name}")
            if stage is not base and baseline in failures:
                failures[stage.name] = f"the baseline could not be scored: {failures[baseline]}"
                continue
            try:
                worker = start_worker(stage.name, stage.spec, logs / f"{stage.name}.log")
                try:
                    loaded = worker.load(stage.artifact)
                    if stage is base:
                        kept = kept_tokens(count, loaded["vocab_size"])
                    work = ScoreWork(
                        tokens=str(folder / "tokens.npy"),
                        windows=windows,
                        folder=str(folder / stage.name),
                        baseline=None if stage is base else str(folder / baseline),
                        kept=kept,
                        prompt=prompt,
                        new_tokens=min(SAMPLE_TOKENS, window - len(prompt)),
                    )
                    answer = worker.ask("score", work=work.model_dump(mode="json"))
                finally:
                    worker.close()
            except StageError as error:
                failures[stage.name] = str(error)
                if isinstance(error, LoadError):
                    unloadable.append(stage.name)
                continue
            scored[stage.name] = Scored.model_validate(answer)
            nll = np.load(folder / stage.name / NLL)
            comparison = None
            if stage is not base:
                comparison = compare_quality(
                    nll,
                    np.load(folder / baseline / NLL),
                    scored[stage.name],
                    scored[baseline].sample,
                )
            measured[stage.name] = StageQuality(
                perplexity=perplexity(nll),
                tokens=len(nll),
                non_finite_tokens=int(np.count_nonzero(~np.isfinite(nll))),
                kept_tokens=len(kept),
                window=window,
                stride=stride,
                sample_prompt=shown(prompt),
                sample_text=shown(scored[stage.name].sample),
                vs_baseline=comparison,
            )
    return QualityMeasurement(stages=measured, failures=failures, unloadable=tuple(unloadable), notes=notes)


def tokenize(artifact: Artifact, text: str, *, limit: int) -> list[int]:
    """The first `limit` token ids of the text by the artifact's tokenizer.json, without special tokens.

    Raises: PipelineError where the artifact has no tokenizer.json, or the text has fewer than two tokens.
    """
    ids = encode(_tokenizer_file(artifact), text, limit=limit)
    if len(ids) < 2:
        raise PipelineError(f"the evaluation text gives {len(ids)} tokens; at least 2 are needed")
    vocabulary = artifact.interface.vocab_size
    if vocabulary is not None and max(ids) >= vocabulary:
        raise PipelineError(
            f"the tokenizer gives token {max(ids)} and the model's vocabulary has {vocabulary}",
            hint="the tokenizer.json beside the model is another model's",
        )
    return ids


def encode(tokenizer_file: Path, text: str, *, limit: int) -> list[int]:
    """The first `limit` token ids of the text, without special tokens.

    Raises: PipelineError where the file is not a tokenizer.
    """
    tokenizer = _tokenizer(tokenizer_file)
    characters = limit * 8
    while True:
        ids: list[int] = tokenizer.encode(text[:characters], add_special_tokens=False).ids
        if len(ids) > limit or characters >= len(text):  # one more: the last may be cut off
            return ids[:limit]
        characters *= 2


def seeded_tokens(artifact: Artifact, count: int, seed: int) -> list[int]:
    """`count` token ids, evenly drawn from the artifact's vocabulary.

    Raises: PipelineError where the artifact does not say how large that is.
    """
    import numpy as np

    vocabulary = artifact.interface.vocab_size
    if vocabulary is None:
        raise PipelineError("the model's interface does not say how large its vocabulary is")
    drawn: list[int] = np.random.default_rng(seed).integers(0, vocabulary, count).tolist()
    return drawn


def decode(artifact: Artifact, ids: Sequence[int]) -> str:
    """The text of token ids."""
    found: str = _tokenizer(_tokenizer_file(artifact)).decode(list(ids), skip_special_tokens=False)
    return found


def _tokenizer_file(artifact: Artifact) -> Path:
    path = artifact.file("tokenizer.json")
    if path is None:
        raise PipelineError(
            "the model has no tokenizer.json, so its quality on text cannot be measured",
            hint="save the model's fast tokenizer beside it: AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER)",
        )
    return path


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise PipelineError(f"{path} is not a tokenizer that can be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def kept_tokens(count: int, vocab_size: int) -> tuple[int, ...]:
    """Indices of the scored tokens whose distributions are kept: evenly spread, within KEPT_TOKENS and KEPT_BYTES."""
    import numpy as np

    rows = min(count, KEPT_TOKENS, max(1, KEPT_BYTES // (2 * vocab_size)))
    return tuple(int(i) for i in np.linspace(0, count - 1, rows).round())


def perplexity(nll: np.ndarray) -> float | None:
    """exp of the mean negative log-likelihood (nats); None where that is not finite."""
    mean = float(nll.mean())
    return _finite(math.exp(mean)) if mean < 700 else None


def compare_quality(
    nll: np.ndarray,
    baseline_nll: np.ndarray,
    scored: Scored,
    baseline_sample: Sequence[int],
) -> QualityFigures:
    """A stage's tokens against the baseline's, both as negative log-likelihoods (float64, nats) in the same order."""
    import numpy as np

    same = scored.max_abs_logit_error == 0.0 and scored.top1_agreement == 1.0
    return QualityFigures(
        perplexity_ratio=perplexity_ratio(nll, baseline_nll),
        kl_divergence=_finite(scored.kl_divergence),
        top1_agreement=scored.top1_agreement,
        max_abs_logit_error=_finite(scored.max_abs_logit_error),
        first_divergence=first_divergence(scored.sample, baseline_sample),
        identical=same and np.array_equal(nll, baseline_nll),
    )


def perplexity_ratio(nll: np.ndarray, baseline_nll: np.ndarray) -> RatioInterval:
    """exp of the mean difference of the likelihoods, with a 95 % interval: BCa over contiguous stretches of the text.

    Raises: ValueError where the two are not of the same tokens.
    """
    import warnings

    import numpy as np
    from scipy import stats

    if nll.shape != baseline_nll.shape:
        raise ValueError(f"likelihoods of {nll.size} and {baseline_nll.size} tokens are not paired")
    difference = nll - baseline_nll
    mean = float(difference.mean())
    if not math.isfinite(mean) or mean > 700:
        return RatioInterval(ratio=None, low=None, high=None)
    blocks = np.array_split(difference, min(len(difference), max(LEAST_BLOCKS, len(difference) // 256)))
    sums, counts = np.array([b.sum() for b in blocks]), np.array([float(len(b)) for b in blocks])
    if len(blocks) < 2 or np.ptp(sums / counts) == 0.0:
        return RatioInterval(ratio=math.exp(mean), low=math.exp(mean), high=math.exp(mean))

    def statistic(sums: np.ndarray, counts: np.ndarray, axis: int) -> Any:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    low = high = math.nan
    for method in ("BCa", "percentile"):  # BCa has no answer where the resamples hardly differ
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (sums, counts),
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=2000,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        low, high = float(found.low), float(found.high)
        if math.isfinite(low) and math.isfinite(high):
            break
    # the intervals of BCa need not hold the estimate
    return RatioInterval(ratio=math.exp(mean), low=math.exp(min(low, mean)), high=math.exp(max(high, mean)))


def first_divergence(sample: Sequence[int], baseline: Sequence[int]) -> int | None:
    """Index of the first token that differs; None where none does."""
    return next((i for i, (a, b) in enumerate(zip(sample, baseline, strict=True)) if a != b), None)


def fit_windows(wanted: QualityWorkload, artifacts: Sequence[Artifact]) -> tuple[QualityWorkload, tuple[str, ...]]:
    """(workload, notes): the windows that were wanted, or the longest that every model can take."""
    limits = [artifact.interface.max_length for artifact in artifacts]
    limit = min((length for length in limits if length is not None), default=wanted.window)
    if limit >= wanted.window:
        return wanted, ()
    stride = min(wanted.stride, max(1, limit // 2))
    note = f"quality windows have {limit} tokens, stride {stride}, instead of {wanted.window}: a model takes no more"
    return wanted.model_copy(update={"window": limit, "stride": stride}), (note,)


def notes_on_text(scored: Iterable[StageQuality], wanted: QualityWorkload) -> tuple[str, ...]:
    """That the text gave fewer tokens than were asked for, whether it was scored now or its figures are remembered."""
    tokens = max((quality.tokens + 1 for quality in scored), default=wanted.tokens)  # the first is never predicted
    if tokens >= wanted.tokens:
        return ()
    return (f"the evaluation text gives {tokens:,} tokens; {wanted.tokens:,} were asked for",)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
