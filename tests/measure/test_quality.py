from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError, StageError
from pipeline.measure.judging import judge
from pipeline.measure.process import StageToMeasure
from pipeline.measure.quality import (
    QualityMeasurement,
    QualityWorkload,
    RatioInterval,
    first_divergence,
    kept_tokens,
    measure_quality,
    notes_on_text,
    perplexity,
    perplexity_ratio,
    tokenize,
)
from pipeline.measure.worker import Session
from pipeline.recipe.schema import Thresholds
from pipeline.runtime import ExecutionSpec

TEXT = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, 400))
WORKLOAD = QualityWorkload(window=32, stride=16, tokens=300)


class InProcess:
    """A worker without a process."""

    def __init__(self, name: str, spec: ExecutionSpec, log: Path) -> None:
        self.pid = 0
        self.spec = spec
        self.session = Session()

    def prepare(self, artifact: Artifact) -> None:
        pass

    def wait_until_prepared(self) -> None:
        pass

    def load(self, artifact: Artifact) -> dict[str, Any]:
        manifest = artifact.manifest.model_dump(mode="json")
        return self.ask("load", manifest=manifest, blobs=str(artifact.blobs), spec=self.spec.model_dump())

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        try:
            return self.session.answer({"request": request, **fields})
        except PipelineError as error:
            raise StageError(error.message) from error

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("quality")
    first = tiny_models.save_llama(folder / "first")
    return {
        "source": tiny_models.torch_artifact(first),
        "same": tiny_models.torch_artifact(first),
        "half": tiny_models.torch_artifact(first, dtype="bfloat16"),
        "garbage": tiny_models.torch_artifact(tiny_models.save_llama(folder / "second", seed=1)),
    }


def measure(artifacts: dict[str, Artifact], *names: str, **changes: Any) -> QualityMeasurement:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec()) for name in names]
    options: dict[str, Any] = {"workload": WORKLOAD, "start_worker": InProcess, **changes}
    return measure_quality(stages, baseline="source", text=TEXT, logs=Path("logs"), **options)


@pytest.fixture(scope="module")
def measured(artifacts: dict[str, Artifact]) -> QualityMeasurement:
    return measure(artifacts, "source", "same", "half", "garbage")


def test_all_stages_score_the_same_tokens(measured: QualityMeasurement) -> None:
    assert {quality.tokens for quality in measured.stages.values()} == {299}


def test_the_baseline_has_a_perplexity_and_no_comparison(measured: QualityMeasurement) -> None:
    assert measured.stages["source"].perplexity is not None
    assert measured.stages["source"].vs_baseline is None


def test_perplexity_is_that_of_the_model_itself(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    folder = Path(str(artifacts["source"].component.files["model.safetensors"].path)).parent
    found = measure(artifacts, "source", workload=QualityWorkload(window=40, stride=20, tokens=40))
    ids = np.array([tokenize(artifacts["source"], TEXT, limit=40)])
    logits = tiny_models.llama_logits(folder, ids)[0, :-1].astype(np.float64)
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(39), ids[0, 1:]]
    assert found.stages["source"].perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-4)


@pytest.mark.parametrize(("stage", "verdict"), [("same", "identical"), ("garbage", "broken")])
def test_the_verdict_tells_a_copy_from_garbage(measured: QualityMeasurement, stage: str, verdict: str) -> None:
    comparison = measured.stages[stage].vs_baseline
    assert comparison is not None
    assert judge(comparison, Thresholds()).verdict == verdict


def test_a_rounded_model_is_neither_identical_nor_broken(measured: QualityMeasurement) -> None:
    comparison = measured.stages["half"].vs_baseline
    assert comparison is not None
    assert judge(comparison, Thresholds()).verdict in ("equivalent", "degraded")
    assert comparison.kl_divergence is not None
    assert 0 < comparison.kl_divergence < 0.1


def test_a_copy_never_diverges_and_garbage_does(measured: QualityMeasurement) -> None:
    same, garbage = (measured.stages[name].vs_baseline for name in ("same", "garbage"))
    assert same is not None
    assert garbage is not None
    assert same.first_divergence is None
    assert garbage.first_divergence is not None


def test_sample_text_is_words_of_the_tokenizer(measured: QualityMeasurement) -> None:
    assert measured.stages["source"].sample_text.split()[0].startswith("w")
    assert measured.stages["source"].sample_text == measured.stages["same"].sample_text


def test_the_result_survives_json(measured: QualityMeasurement) -> None:
    assert QualityMeasurement.model_validate_json(measured.model_dump_json()) == measured


def test_a_window_longer_than_a_model_shrinks_and_is_noted(artifacts: dict[str, Artifact]) -> None:
    found = measure(artifacts, "source", workload=QualityWorkload(window=512, stride=256, tokens=300))
    assert (found.stages["source"].window, found.stages["source"].stride) == (48, 24)
    assert "48 tokens" in found.notes[0]


@pytest.mark.parametrize(
    ("asked_for", "notes"), [(300, ()), (400, ("the evaluation text gives 300 tokens; 400 were asked for",))]
)
def test_a_text_with_fewer_tokens_than_were_asked_for_is_told_from_the_figures(
    measured: QualityMeasurement, asked_for: int, notes: tuple[str, ...]
) -> None:
    workload = WORKLOAD.model_copy(update={"tokens": asked_for})
    assert notes_on_text(measured.stages.values(), workload) == notes
    assert notes_on_text((), workload) == ()


def test_a_stage_that_does_not_load_is_a_failure_and_the_others_are_scored(artifacts: dict[str, Artifact]) -> None:
    manifest = artifacts["same"].manifest.model_copy(update={"execution": {"dtype": "float8"}})
    broken = artifacts | {"same": Artifact(manifest, artifacts["same"].blobs)}
    found = measure(broken, "source", "same", "garbage")
    assert list(found.failures) == ["same"]
    assert set(found.stages) == {"source", "garbage"}


def test_without_a_baseline_no_stage_is_compared(artifacts: dict[str, Artifact]) -> None:
    manifest = artifacts["source"].manifest.model_copy(update={"execution": {"dtype": "float8"}})
    broken = artifacts | {"source": Artifact(manifest, artifacts["source"].blobs)}
    found = measure(broken, "source", "garbage")
    assert found.stages == {}
    assert "the baseline could not be scored" in found.failures["garbage"]


def test_a_model_without_a_tokenizer_is_refused_with_a_way_out(artifacts: dict[str, Artifact]) -> None:
    files = {name: e for name, e in artifacts["source"].manifest.files.items() if name != "tokenizer.json"}
    bare = Artifact(artifacts["source"].manifest.model_copy(update={"files": files}), artifacts["source"].blobs)
    with pytest.raises(PipelineError, match=r"no tokenizer\.json") as caught:
        measure({"source": bare}, "source")
    assert caught.value.hint is not None


def test_the_text_is_cut_after_the_limit_in_tokens(artifacts: dict[str, Artifact]) -> None:
    assert tokenize(artifacts["source"], TEXT, limit=7) == [int(word[1:]) for word in TEXT.split()[:7]]


def test_words_longer_than_expected_do_not_shorten_the_text(artifacts: dict[str, Artifact]) -> None:
    spaced = TEXT.replace(" ", " " * 40)
    assert tokenize(artifacts["source"], spaced, limit=50) == tokenize(artifacts["source"], TEXT, limit=50)


def test_a_text_of_one_token_is_too_short(artifacts: dict[str, Artifact]) -> None:
    with pytest.raises(PipelineError, match="gives 1 tokens"):
        tokenize(artifacts["source"], "w1", limit=10)


@given(st.integers(1, 100_000), st.integers(2, 300_000))
def test_kept_tokens_are_distinct_and_within_the_text(count: int, vocab_size: int) -> None:
    kept = kept_tokens(count, vocab_size)
    assert len(set(kept)) == len(kept) >= 1
    assert list(kept) == sorted(kept)
    assert 0 <= kept[0] <= kept[-1] < count


likelihoods = st.lists(st.floats(0, 20), min_size=2, max_size=200).map(np.array)


@given(likelihoods, st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_a_stage_that_is_worse_by_the_same_at_each_token_has_exactly_that_ratio(nll: np.ndarray, worse: float) -> None:
    found = perplexity_ratio(nll + worse, nll)
    assert [found.ratio, found.low, found.high] == pytest.approx([np.exp(worse)] * 3, rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(8, 600))
@settings(max_examples=40, deadline=None)
def test_the_interval_of_the_perplexity_ratio_holds_the_ratio(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    found = perplexity_ratio(draw.exponential(2, count), draw.exponential(2, count))
    assert found.ratio is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high


def test_the_interval_of_the_perplexity_ratio_covers_in_simulation() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        base = draw.exponential(2, 4096)
        found = perplexity_ratio(base + draw.normal(0.02, 0.5, 4096), base)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= np.exp(0.02) <= found.high
    assert 85 <= covered <= 100


def test_a_perplexity_that_is_not_finite_is_none() -> None:
    assert perplexity(np.array([1.0, np.nan])) is None
    assert perplexity(np.array([1e4])) is None
    assert perplexity_ratio(np.array([1.0, np.inf]), np.array([1.0, 1.0])) == RatioInterval(
        ratio=None, low=None, high=None
    )


def test_likelihoods_of_other_tokens_are_not_paired() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        perplexity_ratio(np.zeros(3), np.zeros(2))


def test_the_first_divergence_is_the_index_of_the_first_other_token() -> None:
    assert first_divergence((1, 2, 3), (1, 5, 4)) == 1
    assert first_divergence((1, 2), (1, 2)) is None


@pytest.mark.slow
def test_real_workers_score_in_processes_of_their_own(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec()) for name in ("source", "same")]
    found = measure_quality(stages, baseline="source", text=TEXT, logs=tmp_path, workload=WORKLOAD)
    assert found.failures == {}
    same = found.stages["same"].vs_baseline
    assert same is not None
    assert same.identical


def test_a_text_shorter_than_one_window_is_refused(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    stages = [StageToMeasure("source", artifacts["source"], ExecutionSpec())]
    few = " ".join(TEXT.split()[:5])
    with pytest.raises(PipelineError, match="gives 5 tokens, less than one window of"):
        measure_quality(stages, baseline="source", text=few, logs=tmp_path, workload=WORKLOAD, start_worker=InProcess)


def test_another_models_tokenizer_is_told(artifacts: dict[str, Artifact]) -> None:
    source = artifacts["source"]
    interface = source.interface.model_copy(update={"vocab_size": 3})
    small = Artifact(source.manifest.model_copy(update={"interface": interface}), source.blobs)
    with pytest.raises(PipelineError, match="the model's vocabulary has 3"):
        tokenize(small, TEXT, limit=40)
