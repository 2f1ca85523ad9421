import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError, StageError
from pipeline.measure.process import StageToMeasure
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.workload import Workload
from pipeline.runtime import ExecutionSpec

WORKLOAD = Workload(prompt_lengths=(8,), new_tokens=(16,))
NAMES = ("source", "export", "int4")


class FakeHost:
    """Workers that share a clock which only their work moves forward."""

    def __init__(self, *, import_s: float = 1.0, token_s: float = 0.01) -> None:
        self.now = 0.0
        self.import_s = import_s
        self.token_s = token_s
        self.alive: set[int] = set()
        self.most_alive: dict[str, int] = {}
        self.started: list[str] = []
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.failing: dict[tuple[str, str], int] = {}
        self.compiled: set[str] = set()

    def clock(self) -> float:
        return self.now

    def start(self, name: str, spec: ExecutionSpec, log: Path) -> "FakeWorker":
        self.started.append(name)
        return FakeWorker(self, name)

    def fail(self, name: str, request: str, *, after: int = 0) -> None:
        """Let the request of that stage fail once it was answered `after` times."""
        self.failing[name, request] = after

    def check(self, name: str, request: str) -> None:
        left = self.failing.get((name, request))
        if left is not None:
            self.failing[name, request] = left - 1
            if left <= 0:
                raise StageError(f"{name} ended by SIGKILL")


class FakeWorker:
    count = 0

    def __init__(self, host: FakeHost, name: str) -> None:
        FakeWorker.count += 1
        self.key = FakeWorker.count
        self.host = host
        self.name = name
        self.pid = os.getpid()
        host.alive.add(self.key)
        host.most_alive["all"] = max(host.most_alive.get("all", 0), len(host.alive))

    def prepare(self, artifact: Artifact) -> None:
        pass

    def wait_until_prepared(self) -> None:
        pass

    def load(self, artifact: Artifact) -> dict[str, Any]:
        self.host.check(self.name, "load")
        self.host.now += self.host.import_s + 0.5
        return {"load_s": 0.5, "vocab_size": 64, "max_length": 48, "environment": {"threads": 1}}

    def forget_compiled(self, artifact: Artifact) -> None:
        self.host.check(self.name, "forget_compiled")
        self.host.compiled.discard(self.name)

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        self.host.check(self.name, request)
        self.host.asked.append((self.name, request, fields))
        if request == "compile":
            compile_s = 2.0 if self.name in self.host.compiled else 100.0
            self.host.compiled.add(self.name)
            self.host.now += compile_s
            return {"compile_s": compile_s}
        point = fields["point"]
        each = self.host.token_s * (point["prompt"] if point["kind"] == "prefill" else 1)
        if request == "warm_up":
            self.host.now += 6 * each
            return {"seconds": [each] * 6, "flat": True}
        steps = 1 if point["kind"] == "prefill" else fields["steps"]
        cycles = max(1, int(fields["min_s"] / (each * steps) + 0.999))
        self.host.now += cycles * each * steps
        return {"seconds": [each] * (cycles * steps)}

    def close(self) -> None:
        self.host.alive.discard(self.key)


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("stages")
    return {name: tiny_models.onnx_artifact(folder / name, seed=i) for i, name in enumerate(NAMES)}


def measure(host: FakeHost, artifacts: dict[str, Artifact], **changes: Any) -> SpeedMeasurement:
    settings: dict[str, Any] = {
        "baseline": "source",
        "budget_s": 200,
        "seed": 0,
        "logs": Path("logs"),
        "clock": host.clock,
        "start_worker": host.start,
        "available_bytes": 10**12,
        **changes,
    }
    stages = [StageToMeasure(name, artifact, ExecutionSpec()) for name, artifact in artifacts.items()]
    return measure_speed(stages, WORKLOAD, **settings)


def test_every_round_has_every_stage_and_the_baseline_twice(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts)
    rounds = Counter((s.launch, s.round, s.point) for s in measured.samples)
    assert set(rounds.values()) == {4}
    assert {(s.stage, s.replica) for s in measured.samples} == {
        ("source", 0),
        ("source", 1),
        ("export", 0),
        ("int4", 0),
    }


def test_there_are_three_launches_where_the_budget_allows(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts)
    assert measured.launches == 3
    assert Counter(host.started) == {"source": 6, "export": 3, "int4": 3}
    assert measured.notes == ()


def test_the_order_is_drawn_anew_in_each_round(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts)
    point = measured.samples[0].point
    orders = {
        tuple((s.stage, s.replica) for s in measured.samples if (s.launch, s.round, s.point) == (launch, number, point))
        for launch, number in {(s.launch, s.round) for s in measured.samples}
    }
    assert len(orders) > 3


def test_the_same_seed_gives_the_same_order(artifacts: dict[str, Artifact]) -> None:
    first, second = (measure(FakeHost(), artifacts) for _ in range(2))
    assert first.samples == second.samples
    assert measure(FakeHost(), artifacts, seed=1).samples != first.samples


def test_a_small_budget_gives_one_launch_of_three_rounds_and_says_so(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    measured = measure(host, artifacts, budget_s=1)
    assert (measured.launches, measured.rounds) == (1, 3)
    assert any("one launch" in note for note in measured.notes)


@pytest.mark.parametrize("budget_s", [30, 60, 120, 300])
def test_the_budget_is_kept_where_it_is_enough(host: FakeHost, artifacts: dict[str, Artifact], budget_s: float) -> None:
    assert measure(host, artifacts, budget_s=budget_s).wall_s <= 1.1 * budget_s


def test_a_slow_model_decodes_fewer_tokens_at_every_stage_alike(artifacts: dict[str, Artifact]) -> None:
    host = FakeHost(token_s=1.0)
    measured = measure(host, artifacts, budget_s=100)
    assert len({fields["steps"] for _, request, fields in host.asked if request == "block"}) <= 2
    decode = {len(s.seconds) for s in measured.samples if s.point.kind == "decode"}
    assert len(decode) == 1
    assert decode < {1, *range(16)}
    assert any("of 16 new tokens were timed" in note for note in measured.notes)


def test_every_stage_is_fed_the_same_tokens(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measure(host, artifacts)
    assert {(f["seed"], f["vocab_size"]) for _, _, f in host.asked} == {(0, 64)}


def test_no_worker_is_left(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measure(host, artifacts)
    assert not host.alive


def test_no_worker_is_left_after_an_interruption(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    def interrupt(fraction: float, message: str) -> None:
        if "round 2" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(host, artifacts, on_progress=interrupt)
    assert not host.alive


@pytest.mark.parametrize("request_name", ["load", "warm_up", "block"])
def test_a_stage_that_fails_is_out_and_the_others_go_on(
    host: FakeHost, artifacts: dict[str, Artifact], request_name: str
) -> None:
    host.fail("export", request_name, after=0 if request_name != "block" else 2)
    measured = measure(host, artifacts)
    assert list(measured.failures) == ["export"]
    assert "SIGKILL" in measured.failures["export"]
    last = max((s.launch, s.round) for s in measured.samples)
    assert {s.stage for s in measured.samples if (s.launch, s.round) == last} == {"source", "int4"}
    assert host.started.count("export") == 1


def test_samples_taken_before_a_failure_are_kept(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.fail("export", "block", after=2)
    assert sum(s.stage == "export" for s in measure(host, artifacts).samples) == 2


def test_a_failing_second_process_of_the_baseline_does_not_fail_the_baseline(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.fail("source", "load", after=1)
    measured = measure(host, artifacts, budget_s=1)
    assert measured.failures == {}
    assert any("noise is not known" in note for note in measured.notes)


def test_when_all_stages_fail_there_are_reasons_and_no_samples(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    for name in NAMES:
        host.fail(name, "load")
    measured = measure(host, artifacts)
    assert set(measured.failures) == set(NAMES)
    assert measured.samples == ()


def test_models_that_do_not_fit_together_run_beside_the_baseline_alone(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    measured = measure(host, artifacts, available_bytes=2**30)
    assert host.most_alive["all"] == 2
    for launch, number in {(s.launch, s.round) for s in measured.samples}:
        seen = {s.stage for s in measured.samples if (s.launch, s.round) == (launch, number) and not s.replica}
        assert "source" in seen
        assert len(seen) <= 2
    assert any("beside source alone" in note for note in measured.notes)


def test_the_first_load_is_cold_and_the_later_ones_are_warm(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts)
    for name in NAMES:
        loads = [sample for sample in measured.load_samples if sample.stage == name]
        assert [sample.cold for sample in loads] == [True] + [False] * (len(loads) - 1)
        assert measured.load[name].cold_s == measured.load[name].warm_s == 0.5


def test_a_stage_that_shares_files_with_another_is_loaded_cold_while_no_one_maps_them(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    shared = {"source": artifacts["source"], "again": artifacts["source"]}
    measured = measure(host, shared)
    assert host.started[0] == "again"
    first = next(sample for sample in measured.load_samples if sample.stage == "again")
    assert (first.launch, first.cold) == (None, True)


def with_compiled(artifacts: dict[str, Artifact]) -> dict[str, Artifact]:
    """The stages and one that is compiled when it is loaded."""
    source = artifacts["source"]
    manifest = source.manifest.model_copy(update={"execution": {"compile": {}}})
    return {**artifacts, "compiled": Artifact(manifest, source.blobs)}


def test_compiling_is_a_part_of_loading_cold_and_warm(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.compiled.add("compiled")  # an earlier run did so
    measured = measure(host, with_compiled(artifacts))
    assert (measured.load["compiled"].cold_s, measured.load["compiled"].warm_s) == (100.5, 2.5)
    assert measured.load["source"].warm_s == 0.5
    shapes = {tuple(map(tuple, fields["shapes"])) for _, request, fields in host.asked if request == "compile"}
    assert shapes == {tuple(sorted({(point.batch, point.prompt) for point in WORKLOAD.points()}))}


def test_cold_compiling_takes_nothing_from_the_budget_and_is_told(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    measured = measure(host, with_compiled(artifacts), budget_s=120)
    plain = measure(FakeHost(), artifacts | {"more": artifacts["export"]}, budget_s=120)
    assert measured.launches == plain.launches
    assert measured.wall_s > 100
    assert [note for note in measured.notes if "100.0 s" in note] == [
        "compiled: compiling with nothing kept took 100.0 s, which the budget does not count"
    ]


def test_a_stage_that_does_not_compile_is_out_and_the_others_go_on(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.fail("compiled", "compile")
    measured = measure(host, with_compiled(artifacts))
    assert set(measured.failures) == {"compiled"}
    assert {sample.stage for sample in measured.samples} == set(NAMES)


def test_memory_is_reported_for_each_stage(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    assert set(measure(host, artifacts).inference_peak_memory_bytes) == set(NAMES)


def test_a_baseline_that_is_no_stage_is_refused(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    with pytest.raises(PipelineError, match="'nobody'"):
        measure(host, artifacts, baseline="nobody")


def test_the_result_survives_json(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts, budget_s=1)
    assert SpeedMeasurement.model_validate_json(measured.model_dump_json()) == measured


@pytest.mark.slow
def test_real_workers_measure_real_models(tmp_path: Path, artifacts: dict[str, Artifact]) -> None:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec()) for name in ("source", "int4")]
    measured = measure_speed(stages, WORKLOAD, baseline="source", budget_s=1, seed=0, logs=tmp_path / "logs")
    assert measured.failures == {}
    assert measured.launches == 1
    assert all(sum(sample.seconds) >= 0.2 for sample in measured.samples)
    assert measured.inference_peak_memory_bytes["int4"] > 2**20
