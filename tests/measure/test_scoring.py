from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.measure.scoring import NLL, Scored, ScoreWork, Window, greedy, score_windows, windows_over

VOCABULARY = 20
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 50)
WINDOWS = windows_over(50, window=16, stride=8)
KEPT = tuple(range(0, 49, 3))


class TableRunner:
    """A model whose next-token logits depend on the last token alone: a table [V, V]."""

    version = "1"
    max_length = 100

    def __init__(self, table: np.ndarray, *, chunk: int = 5) -> None:
        self.table = table.astype(np.float32)
        self.vocab_size = table.shape[1]
        self.chunk = chunk

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens[:, -1]]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens[:, -1]]

    def score(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, tokens.shape[1], self.chunk):
            yield self.table[tokens[:, begin : begin + self.chunk]]

    def reset(self) -> None:
        pass


class WholePassRunner(TableRunner):
    """The same without a cache."""

    has_cache = False

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        raise AssertionError("it has no cache")

    decode = prefill

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens[:, -1]]


Score = Callable[[np.ndarray], tuple[Scored, np.ndarray]]
TABLE = np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY)) * 3


def log_probabilities(table: np.ndarray) -> np.ndarray:
    table = table.astype(np.float32).astype(np.float64)
    return table - np.log(np.exp(table).sum(axis=1, keepdims=True))


@pytest.fixture
def against_baseline(tmp_path: Path) -> Score:
    """Scores TABLE as the baseline and another table against it."""
    np.save(tmp_path / "tokens.npy", TOKENS)

    def score(table: np.ndarray, *, baseline: str | None = "base", name: str = "other") -> tuple[Scored, np.ndarray]:
        work = ScoreWork(
            tokens=str(tmp_path / "tokens.npy"),
            windows=WINDOWS,
            folder=str(tmp_path / name),
            baseline=str(tmp_path / baseline) if baseline else None,
            kept=KEPT,
            prompt=(1, 2),
            new_tokens=6,
        )
        return score_windows(TableRunner(table), work), np.load(tmp_path / name / NLL)

    score(TABLE, baseline=None, name="base")
    return score


@given(st.integers(2, 400), st.integers(2, 60), st.integers(1, 59))
def test_windows_score_every_token_but_the_first_once(length: int, window: int, stride: int) -> None:
    stride = min(stride, window - 1)
    windows = windows_over(length, window=window, stride=stride)
    assert [t for w in windows for t in range(w.first, w.end)] == list(range(1, length))
    assert all(w.end - w.begin <= window and w.first > w.begin for w in windows)


@given(st.integers(2, 400), st.integers(2, 60), st.integers(1, 59))
def test_later_windows_give_context(length: int, window: int, stride: int) -> None:
    stride = min(stride, window - 1)
    assert all(w.first - w.begin >= window - stride for w in windows_over(length, window=window, stride=stride)[1:])


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 9), (8, 0)])
def test_a_stride_that_skips_tokens_is_refused(window: int, stride: int) -> None:
    with pytest.raises(PipelineError, match=f"stride {stride}, window {window}"):
        windows_over(100, window=window, stride=stride)


def test_likelihoods_are_those_of_each_next_token(against_baseline: Score) -> None:
    _, nll = against_baseline(TABLE)
    np.testing.assert_allclose(nll, -log_probabilities(TABLE)[TOKENS[:-1], TOKENS[1:]], rtol=1e-9)


def test_a_stage_that_is_the_baseline_differs_by_nothing(against_baseline: Score) -> None:
    scored, _ = against_baseline(TABLE)
    assert (scored.kl_divergence, scored.top1_agreement, scored.max_abs_logit_error) == (0.0, 1.0, 0.0)


def test_the_divergence_is_that_of_the_distributions(against_baseline: Score) -> None:
    other = TABLE + np.random.default_rng(2).normal(size=TABLE.shape)
    p, q = log_probabilities(TABLE), log_probabilities(other)
    rows = TOKENS[:-1][list(KEPT)]
    expected = np.mean((np.exp(p) * (p - q)).sum(axis=1)[rows])
    assert against_baseline(other)[0].kl_divergence == pytest.approx(expected, rel=1e-2)


def test_the_largest_logit_error_is_found(against_baseline: Score) -> None:
    other = TABLE.copy()
    other[TOKENS[KEPT[3]], 7] += 2.5
    assert against_baseline(other)[0].max_abs_logit_error == pytest.approx(2.5, abs=0.02)


def test_a_shift_of_all_logits_is_an_error_but_no_divergence(against_baseline: Score) -> None:
    scored, _ = against_baseline(TABLE + 4)
    assert scored.max_abs_logit_error == pytest.approx(4, abs=0.02)
    assert scored.kl_divergence == pytest.approx(0, abs=1e-6)


def test_a_logit_error_below_the_resolution_of_what_is_kept_is_next_to_nothing(against_baseline: Score) -> None:
    scored, _ = against_baseline(TABLE + np.random.default_rng(2).normal(size=TABLE.shape) * 1e-6)
    assert scored.max_abs_logit_error == pytest.approx(0, abs=1e-5)


def test_a_logit_of_minus_infinity_in_both_is_no_error(tmp_path: Path) -> None:
    table = TABLE.copy()
    table[:, 3] = -np.inf
    np.save(tmp_path / "tokens.npy", np.where(TOKENS == 3, 4, TOKENS))
    found = None
    for name, baseline in (("base", None), ("other", str(tmp_path / "base"))):
        work = ScoreWork(
            tokens=str(tmp_path / "tokens.npy"),
            windows=WINDOWS,
            folder=str(tmp_path / name),
            baseline=baseline,
            kept=KEPT,
        )
        found = score_windows(TableRunner(table), work)
    assert found is not None
    assert (found.kl_divergence, found.max_abs_logit_error, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_agreement_is_the_share_of_equal_most_likely_tokens(against_baseline: Score) -> None:
    other = TABLE.copy()
    changed = int(TOKENS[0])
    other[changed, (TABLE[changed].argmax() + 1) % VOCABULARY] = 100
    expected = np.mean(TOKENS[:-1] != changed)
    assert against_baseline(other)[0].top1_agreement == pytest.approx(expected)


def test_a_stage_of_nan_agrees_with_nothing_and_has_a_nan_error(against_baseline: Score) -> None:
    scored, nll = against_baseline(np.full_like(TABLE, np.nan))
    assert np.isnan(nll).all()
    assert scored.top1_agreement == 0
    assert scored.max_abs_logit_error is not None
    assert np.isnan(scored.max_abs_logit_error)


def test_one_nan_among_many_is_not_lost(against_baseline: Score) -> None:
    other = TABLE.copy()
    other[TOKENS[KEPT[0]]] = np.nan
    scored, nll = against_baseline(other)
    assert np.isnan(scored.max_abs_logit_error or 0.0)
    assert np.isnan(nll).any()
    assert not np.isnan(nll).all()


def test_another_vocabulary_is_refused_with_both_sizes(against_baseline: Score) -> None:
    with pytest.raises(PipelineError, match="predicts 25 tokens and the baseline 20"):
        against_baseline(np.zeros((VOCABULARY, 25)))


def test_the_size_of_chunks_does_not_matter(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    found = []
    for chunk in (1, 7, 64):
        work = ScoreWork(tokens=str(tmp_path / "tokens.npy"), windows=WINDOWS, folder=str(tmp_path / str(chunk)))
        score_windows(TableRunner(TABLE, chunk=chunk), work)
        found.append(np.load(tmp_path / str(chunk) / NLL))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_the_last_window_may_be_short(tmp_path: Path) -> None:
    assert windows_over(18, window=16, stride=8)[-1] == Window(begin=8, end=18, first=16)


def test_greedy_text_follows_the_most_likely_token() -> None:
    table = np.zeros((4, 4))
    table[[0, 1, 2, 3], [2, 0, 3, 1]] = 1
    assert greedy(TableRunner(table), (1,), 5) == (0, 2, 3, 1, 0)


def test_no_greedy_text_without_a_prompt() -> None:
    assert greedy(TableRunner(TABLE), (), 5) == ()


def test_without_a_cache_the_greedy_text_is_the_same_and_costs_a_pass_for_each_token() -> None:
    assert greedy(WholePassRunner(TABLE), (1, 2), 6) == greedy(TableRunner(TABLE), (1, 2), 6)


def test_without_a_cache_the_greedy_text_is_short() -> None:
    assert len(greedy(WholePassRunner(TABLE), (1, 2), 500)) == 32
