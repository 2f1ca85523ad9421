"""Two runs compared: their artifacts measured again in the same rounds, or their reports where those are gone."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.artifact import Artifact
from pipeline.compare import CompareResult, compare
from pipeline.errors import RecipeError, StageError
from pipeline.measure.process import StageToMeasure
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.recipe.load import recipe_from_text
from pipeline.report.comparison import ComparedSpeed, Comparison
from pipeline.report.comparison_words import headline, outcome
from pipeline.report.schema import Report
from pipeline.reproduce import read_past_run
from pipeline.run import run
from pipeline.runtime import ExecutionSpec
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("plugins")


class FakeHost:
    """Workers whose time is the clock's: each token takes its seat so many seconds."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.seconds = {name.replace("__", "."): each for name, each in seconds.items()}
        self.broken: set[str] = set()
        self.asked: list[str] = []
        self.threads: dict[str, int | None] = {}
        self.turn = 0
        self.available_bytes = 10**12

    def clock(self) -> float:
        return self.now

    def start(self, name: str, spec: ExecutionSpec, log: Path) -> FakeWorker:
        self.threads[name] = spec.threads
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        return FakeWorker(self, name)

    @property
    def measure(self) -> Callable[..., Any]:
        return partial(measure_speed, clock=self.clock, start_worker=self.start, available_bytes=self.available_bytes)


class FakeWorker:
    def __init__(self, host: FakeHost, name: str) -> None:
        self.host, self.name, self.pid = host, name, os.getpid()

    def prepare(self, artifact: Artifact) -> None:
        pass

    def wait_until_prepared(self) -> None:
        pass

    def load(self, artifact: Artifact) -> dict[str, Any]:
        if self.name in self.host.broken:
            raise StageError(f"{self.name} does not load")
        self.host.now += 0.5
        return {"load_s": 0.5, "vocab_size": 8, "max_length": 256, "environment": {}}

    def forget_compiled(self, artifact: Artifact) -> None:
        pass

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        if request == "compile":
            return {"compile_s": 0.0}
        self.host.asked.append(self.name)
        self.host.turn += 1
        each = self.host.seconds.get(self.name, 0.01) * (1 + 0.001 * (self.host.turn * 7 % 5 - 2))
        steps = max(1, fields.get("steps") or 1)
        count = 6 if request == "warm_up" else max(1, math.ceil(fields["min_s"] / (each * steps))) * steps
        self.host.now += count * each
        return {"seconds": [each] * count, "flat": True, "device_peak_memory_bytes": None}

    def close(self) -> None:
        pass


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    return Place(checkpoint, tmp_path)


class Place:
    """A store and a folder of runs."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.runs, self.store = model, folder, folder / "runs", Store(folder / "store")

    def run(self, passes: str = "[{pass: mark}]", rest: str = "", *, name: str = "r") -> Path:
        """A finished run, not measured; its folder."""
        evaluate = rest or "evaluate: {budget_s: 300, workload: {prompt_lengths: [8], new_tokens: 4}}\n"
        text = f"version: 1\nname: {name}\nmodel: {{path: {self.model}}}\npasses: {passes}\n{evaluate}"
        recipe = recipe_from_text(text, file="r.yaml", folder=self.folder)
        return run(recipe, store=self.store, measure=False, runs=self.runs).folder

    def compare(self, a: Path, b: Path, host: FakeHost | None = None, **options: Any) -> CompareResult:
        past = [read_past_run(str(folder), self.runs) for folder in (a, b)]
        measure = (host or FakeHost()).measure
        return compare(past[0], past[1], store=self.store, runs=self.runs, measure=measure, **options)


def change(folder: Path, **changes: Any) -> None:
    """Edit report.json by dotted paths written with double underscores."""
    data = json.loads((folder / "report.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = data
        for key in parents:
            inner = inner[int(key) if key.isdigit() else key]
        inner[last] = value
    (folder / "report.json").write_text(json.dumps(data))


def ratios(result: CompareResult, stage: str) -> dict[str, ComparedSpeed]:
    return {point.kind: point for s in result.comparison.stages if s.name == stage for point in s.speed}


def verdict(result: CompareResult, stage: str, kind: str = "decode") -> str:
    ratio = ratios(result, stage)[kind].ratio
    assert ratio is not None
    return ratio.verdict


# Measured again


def test_a_stage_that_takes_3_percent_longer_is_slower_and_its_copy_equivalent(place: Place) -> None:
    a, b = place.run("[{pass: mark}, {pass: write}]"), place.run("[{pass: mark, value: 2}, {pass: write}]")
    host = FakeHost(a__mark=0.0100, b__mark=0.0103, a__write=0.02, b__write=0.02)
    found = place.compare(a, b, host)
    assert verdict(found, "mark") == "slower"
    assert verdict(found, "mark", "prefill") == "slower"
    assert verdict(found, "write") == "equivalent"
    assert found.comparison.slower == ("mark",)
    assert ratios(found, "mark")["decode"].a_latency_s == pytest.approx(0.0100, rel=0.01)
    assert ratios(found, "mark")["decode"].b_latency_s == pytest.approx(0.0103, rel=0.01)


def test_the_ratio_is_of_b_over_a_and_above_1_is_faster(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    ratio = ratios(place.compare(a, b, FakeHost(a__mark=0.02, b__mark=0.01)), "mark")["decode"].ratio
    assert ratio is not None
    assert ratio.ratio == pytest.approx(2, rel=0.01)
    assert ratio.low > 1.9
    assert ratio.verdict == "faster"


def test_both_run_in_the_same_rounds_beside_the_baseline_of_the_first(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    host = FakeHost()
    found = place.compare(a, b, host).comparison
    assert found.baseline == "a.source"
    assert set(host.asked) == {"a.source", "b.source", "a.mark", "b.mark"}
    assert all(p.paired and p.rounds == found.rounds for s in found.stages for p in s.speed)
    samples = json.loads((place.runs / "comparisons" / "latest" / "samples.json").read_text())["samples"]
    rounds = {(s["launch"], s["round"]) for s in samples}
    for seat in set(host.asked):
        assert {(s["launch"], s["round"]) for s in samples if s["stage"] == seat} == rounds


def test_it_goes_on_until_the_pairs_are_decided_and_not_only_what_is_plain(place: Place) -> None:
    """Both are ten times as fast as the baseline, which the first look shows; what is asked is which of them is."""
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")

    plain = place.compare(a, b, FakeHost(a__source=0.1, b__source=0.1, a__mark=0.01, b__mark=0.02))
    close = place.compare(a, b, FakeHost(a__source=0.1, b__source=0.1, a__mark=0.01, b__mark=0.0101))
    assert verdict(plain, "mark") == "slower"
    assert plain.comparison.rounds < close.comparison.rounds


def test_only_the_stages_that_are_asked_for_are_compared(place: Place) -> None:
    a, b = place.run("[{pass: mark}, {pass: write}]"), place.run("[{pass: mark}, {pass: write, text: abc}]")
    host = FakeHost()
    found = place.compare(a, b, host, stages=["write"]).comparison
    assert [s.name for s in found.stages] == ["write"]
    assert set(host.asked) == {"a.source", "a.write", "b.write"}


def test_the_same_artifact_is_said_to_be_the_same(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    found = {s.name: s for s in place.compare(a, b).comparison.stages}
    assert (found["source"].same_artifact, found["mark"].same_artifact) == (True, False)


def test_one_artifact_that_was_timed_slower_is_a_contradiction_and_no_loss(place: Place) -> None:
    a, b = place.run("[{pass: mark}, {pass: write}]"), place.run("[{pass: mark, value: 2}, {pass: write}]")
    result = place.compare(a, b, FakeHost(a__source=0.01, b__source=0.0103))
    found = result.comparison
    assert verdict(result, "source") == "slower"
    assert (found.slower, found.contradicted) == ((), ("source",))
    assert outcome(found) == ("unsure", "the same artifact, timed otherwise: source")
    told = " ".join(headline(found))
    assert re.search(
        r"source is the same artifact in both runs, and yet was timed slower \(prefill 0\.9\d+ ×, decode",
        told,
    )
    assert "Slower in RUN_B" not in told
    page = (result.folder / "comparison.md").read_text()
    assert "contradiction, slower though it is the same artifact" in page
    assert 'class="badge contradiction"' in (result.folder / "comparison.html").read_text()


def test_stages_of_one_run_alone_are_listed(place: Place) -> None:
    a, b = place.run("[{pass: mark}]"), place.run("[{pass: write}]")
    found = place.compare(a, b).comparison
    assert (found.only_in_a, found.only_in_b) == (("mark",), ("write",))


def test_a_stage_that_does_not_load_is_told_and_the_others_go_on(place: Place) -> None:
    a, b = place.run("[{pass: mark}, {pass: write}]"), place.run("[{pass: mark, value: 2}, {pass: write}]")
    host = FakeHost()
    host.broken = {"b.mark"}
    found = place.compare(a, b, host)
    assert found.failed == ("mark",)
    told = {s.name: s.reason for s in found.comparison.stages}
    assert "b.mark does not load" in str(told["mark"])
    assert verdict(found, "write") == "equivalent"


def test_models_that_do_not_fit_together_are_compared_in_rounds_that_both_of_a_pair_ran_in(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    host = FakeHost(a__mark=0.01, b__mark=0.02)
    host.available_bytes = 2**20
    found = place.compare(a, b, host)
    assert found.failed == ()
    assert verdict(found, "mark") == "slower"
    assert verdict(found, "source") == "equivalent"


@pytest.mark.parametrize(("mapped_bytes", "expected"), [(500, 1500), (None, 1000)])
def test_what_the_runs_had_estimated_decides_what_fits_together(
    place: Place, mapped_bytes: int | None, expected: int
) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    for folder in (a, b):
        change(folder, stages__0__predicted_memory=None)
    change(b, stages__1__predicted_memory={"inference_bytes": 1000, "mapped_bytes": mapped_bytes})
    change(a, stages__1__predicted_memory={"inference_bytes": None, "mapped_bytes": mapped_bytes})
    seats: dict[str, int | None] = {}

    def spy(stages: list[StageToMeasure], *arguments: Any, **options: Any) -> SpeedMeasurement:
        seats.update({stage.name: stage.memory_bytes for stage in stages})
        return FakeHost().measure(stages, *arguments, **options)  # type: ignore[no-any-return]

    past = [read_past_run(str(folder), place.runs) for folder in (a, b)]
    compare(past[0], past[1], store=place.store, runs=place.runs, measure=spy)
    assert seats == {"a.source": None, "b.source": None, "a.mark": None, "b.mark": expected}


def test_the_comparison_lies_in_a_folder_of_its_own(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    result = place.compare(a, b)
    assert result.folder.parent == place.runs / "comparisons"
    names = {"comparison.json", "comparison.md", "comparison.html", "samples.json", "logs"}
    assert {p.name for p in result.folder.iterdir()} == names
    data = json.loads((result.folder / "comparison.json").read_text())
    jsonschema.validate(data, Comparison.model_json_schema())
    assert Comparison.model_validate(data) == result.comparison
    assert str(a) in (result.folder / "comparison.html").read_text()


def test_an_interrupted_comparison_leaves_nothing(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    past = [read_past_run(str(folder), place.runs) for folder in (a, b)]

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(past[0], past[1], store=place.store, runs=place.runs, measure=interrupted)  # type: ignore[arg-type]
    assert not (place.runs / "comparisons").exists()


# Quality


def scored(folder: Path, perplexity: float, verdict: str = "equivalent") -> None:
    paired = {"perplexity_ratio": {"ratio": 1.0, "low": 1.0, "high": 1.0}, "kl_divergence": 0.1}
    paired |= {"top1_agreement": 0.9, "max_abs_logit_error": 1.0, "first_divergence": None, "verdict": verdict}
    change(folder, stages__1__quality={"perplexity": perplexity, "tokens": 9, "vs_baseline": paired})


def test_perplexities_are_those_of_the_two_reports(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    scored(a, 10.0)
    scored(b, 12.0, "degraded")
    result = place.compare(a, b)
    quality = result.comparison.stages[1].quality
    assert quality is not None
    assert quality.perplexity_ratio == pytest.approx(1.2)
    assert (quality.a_verdict, quality.b_verdict) == ("equivalent", "degraded")
    assert "Predicts worse in RUN_B: mark." in (result.folder / "comparison.md").read_text()


# What is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"host__cpu_model": "Another CPU"}, "processor: "),
        ({"host__memory_bytes": 2**30}, "memory: "),
        ({"threads": 64}, "threads: "),
        ({"lock__digests__evaluation_text": "f" * 64}, "evaluation text: "),
        ({"lock__digests__source": "e" * 64}, "model: "),
        ({"hardware__device": "cuda"}, "device: "),
    ],
)
def test_what_is_not_comparable_is_refused_with_each_difference(
    changes: dict[str, Any], told: str, place: Place
) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    change(b, **changes)
    with pytest.raises(RecipeError, match="not comparable") as error:
        place.compare(a, b)
    assert told in str(error.value)
    assert str(error.value).count("in RUN_A") == 1
    assert not (place.runs / "comparisons").exists()


def test_two_runs_of_one_other_machine_are_refused_here(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    for folder in (a, b):
        change(folder, host__cpu_model="Another CPU")
    with pytest.raises(RecipeError, match=r"processor: Another CPU in RUN_A, Another CPU in RUN_B, .+ here"):
        place.compare(a, b)


def test_another_workload_is_refused(place: Place) -> None:
    a = place.run()
    b = place.run(rest="evaluate: {workload: {prompt_lengths: [16], new_tokens: 4}}\n")
    with pytest.raises(RecipeError, match=r"workload: .*8.* in RUN_A, .*16.* in RUN_B"):
        place.compare(a, b)


def test_forced_runs_are_measured_as_the_first_was_and_the_result_begins_with_what_differs(place: Place) -> None:
    a = place.run()
    b = place.run("[{pass: mark, value: 2}]", "evaluate: {workload: {prompt_lengths: [16], new_tokens: 4}}\n")
    change(b, threads=64)
    host = FakeHost()
    result = place.compare(a, b, host, force=True)
    assert {d.what for d in result.comparison.forced} == {"threads", "workload"}
    assert {p.prompt for s in result.comparison.stages for p in s.speed} == {8}
    assert host.threads["b.mark"] == 64 != host.threads["a.mark"]
    page = (result.folder / "comparison.md").read_text()
    assert page.index("not comparable") < page.index("## Speed")
    html = (result.folder / "comparison.html").read_text()
    assert html.index("These runs are not comparable") < html.index('id="speed"')


def test_the_same_run_twice_is_refused(place: Place) -> None:
    a = place.run()
    with pytest.raises(RecipeError, match="both are the same run"):
        place.compare(a, a.parent / "latest")


def test_an_unknown_stage_is_named_with_its_run(place: Place) -> None:
    a, b = place.run("[{pass: mark}, {pass: write}]"), place.run("[{pass: mark, value: 2}]")
    with pytest.raises(RecipeError, match="RUN_B has no stage 'write'"):
        place.compare(a, b, stages=["write"])
    with pytest.raises(RecipeError, match="RUN_A has no stage 'mrk'") as error:
        place.compare(a, b, stages=["mrk"])
    assert "mark" in str(error.value.hint)


def test_runs_without_a_stage_in_common_are_refused(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    for i in range(2):
        change(b, **{f"stages__{i}__name": f"other{i}"})
    with pytest.raises(RecipeError, match="no stage in common: RUN_A has source, mark; RUN_B has other0, other1"):
        place.compare(a, b)


# Artifacts that are gone


def timed(folder: Path, seconds: float) -> None:
    """Give the run's stage `mark` a decode speed."""
    data = json.loads((folder / "report.json").read_text())
    latency = {"median": seconds, "low": seconds, "high": seconds}
    point = {"kind": "decode", "batch": 1, "prompt": 8, "new_tokens": 4, "rounds": 9, "launches": 3}
    data["stages"][1]["speed"] = [{**point, "tokens_per_s": latency, "latency_s": latency}]
    Report.model_validate(data)
    (folder / "report.json").write_text(json.dumps(data))


def lose(place: Place, folder: Path) -> None:
    """Take the manifest of the run's stage `mark` out of the store."""
    digest = json.loads((folder / "report.json").read_text())["stages"][1]["artifact"]["digest"]
    (place.store.root / "artifacts" / digest[:2] / f"{digest}.json").unlink()


def unpaired(place: Place, history: list[float], a_s: float, b_s: float) -> ComparedSpeed:
    a = place.run()
    timed(a, a_s)
    for seconds in history:  # of the same artifact as A's
        timed(place.run(), seconds)
    b = place.run("[{pass: mark, value: 2}]")
    timed(b, b_s)
    lose(place, b)
    result = place.compare(a, b)
    stage = result.comparison.stages[1]
    assert stage.status == "unpaired"
    assert "not in the store any more" in str(stage.reason)
    (point,) = stage.speed
    assert "unpaired" in (result.folder / "comparison.md").read_text()
    return point


def test_without_the_artifact_the_reports_are_compared_with_the_spread_of_the_history(place: Place) -> None:
    point = unpaired(place, [0.0098, 0.0102, 0.0101], 0.0100, 0.0200)
    assert (point.paired, point.runs_in_history) == (False, 4)
    assert point.ratio is not None
    assert point.ratio.ratio == pytest.approx(0.5)
    logs = [math.log(v) for v in (0.0100, 0.0098, 0.0102, 0.0101)]
    mean = sum(logs) / 4
    spread = math.sqrt(sum((v - mean) ** 2 for v in logs) / 3)
    assert math.log(point.ratio.high / point.ratio.low) == pytest.approx(2 * 3.182446 * spread * math.sqrt(2), rel=1e-5)
    assert point.ratio.verdict == "slower"


def test_a_history_that_varies_as_much_as_the_two_runs_differ_decides_nothing(place: Place) -> None:
    point = unpaired(place, [0.0105, 0.0097, 0.0102], 0.0100, 0.0104)
    assert point.ratio is not None
    assert point.ratio.verdict == "inconclusive"


def test_less_than_three_runs_of_equal_artifacts_tell_nothing(place: Place) -> None:
    point = unpaired(place, [0.0101], 0.0100, 0.0200)
    assert point.ratio is None
    assert "there are 2" in str(point.reason)


@pytest.mark.parametrize("changes", [{"threads": 64}, {"hardware__device": "cuda"}])
def test_runs_with_other_threads_or_on_another_device_are_no_history(changes: dict[str, Any], place: Place) -> None:
    for seconds in (0.01, 0.04):
        other = place.run()
        timed(other, seconds)
        change(other, **changes)
    point = unpaired(place, [0.0101, 0.0099], 0.0100, 0.0200)
    assert point.runs_in_history == 3
    assert point.ratio is not None
    assert point.ratio.verdict == "slower"


def test_what_shares_no_rounds_is_told_to_be_slower_and_fails_nothing(place: Place) -> None:
    point = unpaired(place, [0.0098, 0.0102, 0.0101], 0.0100, 0.0200)
    assert point.ratio is not None
    assert point.ratio.verdict == "slower"
    data = json.loads((place.runs / "comparisons" / "latest" / "comparison.json").read_text())
    found = Comparison.model_validate(data)
    assert found.slower == ()
    assert "Slower in RUN_B: mark (decode 0.50 ×, unpaired)." in headline(found)
    assert outcome(found)[0] == "unsure"


def test_runs_on_other_machines_are_no_history(place: Place) -> None:
    for _ in range(3):
        other = place.run()
        timed(other, 0.01)
        change(other, host__cpu_model="Another CPU")
    point = unpaired(place, [], 0.0100, 0.0200)
    assert (point.ratio, point.runs_in_history) == (None, 0)


def test_a_stage_that_failed_in_one_run_has_nothing_to_compare(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: refuse, name: mark}]")
    result = place.compare(a, b)
    stage = result.comparison.stages[1]
    assert stage.status == "absent"
    assert "RUN_B has no artifact of it: this model has no such layer" in str(stage.reason)
    assert result.failed == ()


def test_where_the_baseline_is_gone_another_stage_takes_its_place(place: Place) -> None:
    rest = "evaluate: {baseline: mark, budget_s: 300, workload: {prompt_lengths: [8], new_tokens: 4}}\n"
    passes = "[{pass: mark}, {pass: write, after: source}]"
    a, b = place.run(passes, rest), place.run(passes.replace("write,", "write, text: abc,"), rest)
    lose(place, a)
    found = place.compare(a, b).comparison
    assert found.baseline == "a.source"
    assert any("the baseline of RUN_A is gone" in note for note in found.notes)
    assert {s.name: s.status for s in found.stages} == {"source": "paired", "mark": "unpaired", "write": "paired"}


def test_the_page_begins_with_what_came_out(place: Place) -> None:
    a, b = place.run(), place.run("[{pass: mark, value: 2}]")
    for seconds, told in ((0.02, "slower in RUN_B: mark"), (0.005, "faster in RUN_B, and nothing slower")):
        host = FakeHost(a__mark=0.01, b__mark=seconds)
        page = (place.compare(a, b, host).folder / "comparison.html").read_text()
        assert told in page[: page.index("<h1>")]
    undecided = place.compare(a, b, FakeHost(), budget_s=0.001)
    page = (undecided.folder / "comparison.html").read_text()
    assert "not all is decided" in page[: page.index("<h1>")]
    assert {verdict(undecided, s.name) for s in undecided.comparison.stages} == {"inconclusive"}
