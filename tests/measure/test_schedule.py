import mmap
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError, StageError
from pipeline.measure.cold_load import files_of
from pipeline.measure.launches import seat_together
from pipeline.measure.looks import LookPlan
from pipeline.measure.process import StageToMeasure
from pipeline.measure.samples import Sample, SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.statistics import Decisions, compare_stages, decide, speed_figures
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
        self.times: dict[str, float] = {}
        self.noise = 0.0
        self.device_bytes: int | None = None
        self.overrun = 1.0
        self.random = random.Random(0)  # noqa: S311 (noise, not a secret)
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
        each = self.host.token_s * self.host.times.get(self.name, 1.0) * (1 if self.decodes(point) else point["prompt"])
        if request == "warm_up":
            self.host.now += 6 * each
            return {"seconds": [each] * 6, "flat": True, "device_peak_memory_bytes": self.host.device_bytes}
        each *= self.host.overrun * (1 + self.host.noise * self.host.random.uniform(-1, 1))
        steps = fields["steps"] if self.decodes(point) else 1
        cycles = max(1, int(fields["min_s"] / (each * steps) + 0.999))
        self.host.now += cycles * each * steps
        return {"seconds": [each] * (cycles * steps)}

    @staticmethod
    def decodes(point: dict[str, Any]) -> bool:
        return bool(point["kind"] == "decode")

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


def test_twelve_rounds_in_three_launches_decide_what_is_plain(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.times = {"export": 0.5, "int4": 0.25}
    host.noise = 0.01
    measured = measure(host, artifacts)
    assert (measured.rounds, measured.launches, measured.looks_taken, measured.ended) == (12, 3, 1, "decided")
    assert Counter(host.started) == {"source": 6, "export": 3, "int4": 3}
    assert measured.notes == ()


def rounds_by_launch(measured: SpeedMeasurement) -> list[int]:
    seen: dict[int, set[int]] = defaultdict(set)
    for sample in measured.samples:
        seen[sample.launch].add(sample.round)
    return [len(seen[launch]) for launch in sorted(seen)]


def test_what_is_not_decided_is_looked_at_again_until_the_last_look(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.noise = 0.5
    measured = measure(host, artifacts, looks=(4, 9, 16), budget_s=10_000)
    assert (measured.rounds, measured.looks_taken, measured.ended) == (16, 3, "looks")
    assert measured.plan == LookPlan.declare((4, 9, 16))
    assert rounds_by_launch(measured) == list(measured.plan.rounds_by_launch)


def test_it_is_looked_at_the_end_of_a_launch_and_only_after_as_many_rounds_as_were_declared(
    host: FakeHost, artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[int, int]] = []

    def spy(samples: list[Sample], **rest: Any) -> Decisions:
        looked.append((rest["look"], len({(s.launch, s.round) for s in samples})))
        return decide(samples, **rest)

    monkeypatch.setattr("pipeline.measure.schedule.decide", spy)
    host.noise = 0.5
    measure(host, artifacts, looks=(4, 9, 16), budget_s=10_000)
    assert looked == [(1, 4), (2, 9), (3, 16)]


def test_a_lone_look_has_exactly_so_many_rounds(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts, looks=(100,), budget_s=10_000)
    assert (measured.rounds, measured.looks_taken) == (100, 1)
    for name in NAMES:
        for point in WORKLOAD.points():
            mine = [s for s in measured.samples if (s.stage, s.replica, s.point) == (name, 0, point)]
            assert len(mine) == len({(s.launch, s.round) for s in mine}) == 100


def test_the_plan_is_announced_before_the_first_round(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    told: list[str] = []
    measure(host, artifacts, on_progress=lambda fraction, message: told.append(message))
    planned = next(i for i, message in enumerate(told) if message.startswith("planned: a look after 12"))
    assert planned < next(i for i, message in enumerate(told) if "round 1" in message)


def test_looks_that_the_budget_does_not_hold_are_left_out_beforehand(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.noise = 0.5
    measured = measure(host, artifacts, looks=(4, 9, 2000), budget_s=150)
    assert len(measured.looks) < 4
    assert measured.looks[:2] == (4, 9)
    assert measured.looks[-1] < 2000
    assert measured.ended == "looks"
    assert measured.rounds == measured.looks[-1]


def test_rounds_that_take_longer_than_foretold_end_with_the_budget(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.noise, host.overrun = 0.5, 12.0
    measured = measure(host, artifacts, budget_s=200)
    assert measured.ended == "budget"
    assert measured.rounds < measured.looks[-1]
    assert measured.wall_s <= 1.1 * 200


def test_whole_passes_are_measured_without_prompts(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec()) for name in NAMES]
    measured = measure_speed(
        stages,
        Workload(forward=((2, 8),)),
        baseline="source",
        budget_s=100,
        seed=0,
        logs=Path("logs"),
        clock=host.clock,
        start_worker=host.start,
        available_bytes=10**12,
    )
    assert {s.point.kind for s in measured.samples} == {"forward"}
    assert measured.decode_tokens == {}
    assert measured.rounds == 12


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


def test_a_budget_that_is_too_small_gives_the_least_and_says_what_one_look_takes(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.times = {"int4": 0.1}
    measured = measure(host, artifacts, budget_s=1)
    assert (measured.launches, measured.rounds) == (1, 3)
    assert (measured.fits, measured.ended) == (False, "looks")
    assert any("one launch" in note for note in measured.notes)
    small = next(note for note in measured.notes if "too small for one look" in note)
    assert small.startswith("the budget of 1 s is too small for one look: 12 rounds in 3 launches would take about ")
    assert small.endswith("planned: 3 rounds in 1 launch, which does not fit either: nothing is claimed")


def test_what_one_look_is_said_to_take_is_enough_for_it(artifacts: dict[str, Artifact]) -> None:
    small = next(note for note in measure(FakeHost(), artifacts, budget_s=1).notes if "too small" in note)
    needed_s = float(small.split("would take about ")[1].split(" s,")[0])
    enough_s = int(small.split("evaluate.budget_s should be ")[1].split(";")[0])
    assert 1.05 * needed_s - 1 <= enough_s <= 1.05 * needed_s + 6
    assert measure(FakeHost(), artifacts, budget_s=enough_s).looks[0] == 12
    assert measure(FakeHost(), artifacts, budget_s=0.7 * needed_s).looks[0] < 12


def test_nothing_is_claimed_where_the_budget_holds_not_even_the_least(artifacts: dict[str, Artifact]) -> None:
    host = FakeHost()
    host.times = {"int4": 0.1}
    measured = measure(host, artifacts, budget_s=1)
    assert not measured.fits
    parents: dict[str, str | None] = dict.fromkeys(NAMES)
    found = speed_figures(measured.samples, baseline="source", parents=parents, plan=measured.plan)
    assert {p.vs_baseline.verdict for p in found.stages["int4"] if p.vs_baseline is not None} == {"faster"}
    found = found.without_claims()
    verdicts = [p.vs_baseline.verdict for p in found.stages["int4"] if p.vs_baseline is not None]
    assert verdicts == ["inconclusive"] * 2


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


@pytest.mark.parametrize("moment", ["loading export", "warming up int4", "planned", "round 2"])
def test_no_worker_is_left_after_an_interruption(host: FakeHost, artifacts: dict[str, Artifact], moment: str) -> None:
    def interrupt(fraction: float, message: str) -> None:
        if moment in message:
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


def test_samples_taken_before_a_failure_are_kept_and_the_reason_says_how_many_rounds_they_are(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.fail("export", "block", after=13)
    measured = measure(host, artifacts)
    kept = [s for s in measured.samples if s.stage == "export"]
    assert sum(len(s.visits) for s in kept) == 12  # what it began to run when it failed is no block
    assert {(s.launch, s.round) for s in kept} == {(0, 0), (0, 1), (0, 2)}
    assert "in launch 1, after 3 rounds: " in measured.failures["export"]


@pytest.mark.parametrize("request_name", ["load", "warm_up"])
def test_a_stage_that_fails_in_a_later_launch_keeps_its_rounds(
    host: FakeHost, artifacts: dict[str, Artifact], request_name: str
) -> None:
    host.fail("export", request_name, after=1 if request_name == "load" else 2)
    measured = measure(host, artifacts)
    assert {s.launch for s in measured.samples if s.stage == "export"} == {0}
    assert "in launch 2, after 4 rounds: " in measured.failures["export"]
    assert {s.launch for s in measured.samples if s.stage == "int4"} == {0, 1, 2}
    assert host.started.count("export") == 2


def test_without_the_baseline_it_ends_at_the_next_look(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.fail("source", "load")
    measured = measure(host, artifacts, budget_s=10_000)
    assert set(measured.failures) == {"source"}
    assert (measured.rounds, measured.ended) == (12, "failed")
    assert {s.stage for s in measured.samples} == {"export", "int4"}


def test_when_all_but_the_baseline_fail_it_ends_at_the_next_look(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.noise = 0.5
    for name in ("export", "int4"):
        host.fail(name, "warm_up")
    measured = measure(host, artifacts, budget_s=10_000)
    assert (measured.rounds, measured.ended) == (12, "failed")


def test_a_stage_that_failed_keeps_nobody_from_a_decision(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.times = {"int4": 0.5}
    host.fail("export", "block", after=5)
    measured = measure(host, artifacts, budget_s=10_000)
    assert (measured.rounds, measured.ended) == (12, "decided")


def test_what_has_no_figure_is_not_decided_and_says_why(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.times = {"export": 0.5, "int4": 0.25}
    measured = measure(host, artifacts, looks=(1,))
    assert (measured.rounds, measured.looks_taken, measured.ended) == (1, 1, "looks")
    assert measured.failures == dict.fromkeys(NAMES, "not measured: it ran in one round, and a figure takes 2")


def test_a_pair_of_which_one_failed_leaves_nothing_to_decide(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.fail("export", "load")
    measured = measure(host, artifacts, pairs=[("int4", "export")])
    assert (measured.rounds, measured.ended) == (12, "failed")


def test_a_pair_is_decided_without_those_that_failed(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.fail("export", "load")
    host.times = {"int4": 0.25}
    measured = measure(host, artifacts, pairs=[("int4", "export"), ("int4", "source")])
    assert (measured.rounds, measured.ended) == (12, "decided")


def test_a_baseline_that_nothing_is_compared_with_ends_with_the_first_look(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.noise = 0.2
    measured = measure(host, {"source": artifacts["source"]}, looks=(4, 9, 20), budget_s=10_000)
    assert (measured.looks, measured.rounds, measured.looks_taken, measured.ended) == ((4,), 4, 1, "looks")
    assert measured.failures == {}


def test_the_most_memory_on_a_device_is_kept_where_there_is_one(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    assert measure(host, artifacts, budget_s=1).device_peak_memory_bytes == {}
    host.device_bytes = 7
    assert measure(host, artifacts, budget_s=1).device_peak_memory_bytes == dict.fromkeys(NAMES, 7)


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


def test_groups_alternate_within_each_launch_and_all_have_the_rounds_of_the_plan(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.noise = 0.5
    measured = measure(host, artifacts, available_bytes=2**30, looks=(4, 9), budget_s=10_000)
    assert (measured.rounds, measured.looks_taken, measured.launches) == (9, 2, 3)
    for name, replica in (("source", 1), ("export", 0), ("int4", 0)):
        rounds = {(s.launch, s.round) for s in measured.samples if (s.stage, s.replica) == (name, replica)}
        beside = {(s.launch, s.round) for s in measured.samples if (s.stage, s.replica) == ("source", 0)}
        assert len(rounds) == 9
        assert rounds < beside
        assert {launch for launch, _ in rounds} == {0, 1, 2}
    order = [s.launch for s in sorted(measured.samples, key=lambda s: s.started_s)]
    assert order == sorted(order)


def test_a_group_whose_stage_failed_is_not_started_again(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    host.fail("export", "load")
    host.noise = 0.5
    measured = measure(host, artifacts, available_bytes=2**30, looks=(9,), budget_s=10_000)
    assert host.started.count("export") == 1
    assert host.started.count("source") == 2 * 3 + 1 + 3  # with its second process, beside export, beside int4
    assert measured.rounds == 9


def test_memory_that_was_estimated_decides_what_fits_together(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec(), memory_bytes=100) for name in NAMES]
    assert len(seat_together(stages, "source", available_bytes=400)) == 1
    assert len(seat_together(stages, "source", available_bytes=399)) == 3


@pytest.mark.parametrize(
    ("available", "groups"),
    [
        (400, ["source export int4 source"]),
        (399, ["source source", "source export int4"]),
        (299, ["source source", "export int4"]),
        (150, ["source source", "export int4"]),  # not even that: what is to be compared has to be tried
    ],
)
def test_the_stages_of_a_pair_run_side_by_side(
    artifacts: dict[str, Artifact], available: int, groups: list[str]
) -> None:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec(), memory_bytes=100) for name in NAMES]
    found = seat_together(stages, "source", available, [("int4", "export")])
    assert [" ".join(seat.stage.name for seat in group) for group in found] == groups


def test_of_several_pairs_each_has_a_group_and_who_has_none_runs_beside_the_baseline(
    artifacts: dict[str, Artifact],
) -> None:
    names = ["source", "a", "b", "c", "d"]
    stages = [StageToMeasure(name, artifacts["source"], ExecutionSpec(), memory_bytes=100) for name in names]
    pairs = [("c", "a"), ("c", "b"), ("c", "source"), ("a", "c")]
    found = seat_together(stages, "source", 200, pairs)
    assert [[seat.stage.name for seat in group] for group in found] == [
        ["source", "source"],
        ["a", "c"],
        ["b", "c"],
        ["source", "c"],
        ["source", "d"],
    ]


@pytest.mark.parametrize("available_bytes", [2**31, 2**30])  # of about 630 MB each: with the baseline, and without
def test_models_that_do_not_fit_together_are_compared_in_their_pair(
    host: FakeHost, artifacts: dict[str, Artifact], available_bytes: int
) -> None:
    host.times = {"export": 0.5, "int4": 0.25}
    measured = measure(host, artifacts, available_bytes=available_bytes, pairs=[("int4", "export")])
    assert measured.ended == "decided"
    found = compare_stages(
        measured.samples, "int4", "export", baseline="source", plan=measured.plan, looks_taken=measured.looks_taken
    )
    assert [ratio.verdict for ratio in found.values()] == ["faster"] * 2
    assert any("the two stages of each comparison ran beside each other" in note for note in measured.notes)


def test_the_plan_counts_every_process_of_every_group(artifacts: dict[str, Artifact]) -> None:
    together, apart = (
        measure(FakeHost(), artifacts, available_bytes=available, pairs=[("int4", "export")])
        for available in (10**12, 2**31)
    )
    assert together.round_s is not None
    assert apart.round_s == pytest.approx(together.round_s * 5 / 4)  # the baseline twice, and beside the pair


def test_models_that_do_not_even_fit_in_pairs_are_told_before_anything_is_loaded(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    told: list[tuple[str, int]] = []
    measured = measure(
        host,
        artifacts,
        available_bytes=2**20,
        pairs=[("int4", "export")],
        on_progress=lambda fraction, message: told.append((message, len(host.started))),
    )
    assert (
        "export and int4 take about 1.3 GB together: more than is free, so that they may run out of memory",
        0,
    ) in told
    assert {message for message, started in told if not started} & set(measured.notes)


def test_the_first_load_is_cold_and_the_later_ones_are_warm(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts)
    for name in NAMES:
        loads = [sample for sample in measured.load_samples if sample.stage == name]
        assert [sample.cold for sample in loads] == [True] + [False] * (len(loads) - 1)
        assert measured.load[name].cold_s == measured.load[name].warm_s == 0.5


def cold_loads(measured: SpeedMeasurement) -> dict[str, int | None]:
    return {sample.stage: sample.launch for sample in measured.load_samples if sample.cold}


def test_of_stages_that_share_files_each_launch_loads_another_cold(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    shared = {"source": artifacts["source"], "again": artifacts["source"], "other": artifacts["export"]}
    measured = measure(host, shared)
    assert cold_loads(measured) == {"source": 0, "other": 0, "again": 1}
    assert Counter(host.started) == {"source": 6, "again": 3, "other": 3}


def test_a_cold_load_that_no_launch_gives_has_a_process_of_its_own_at_the_end(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    host.times = {f"copy{i}": 0.5 for i in range(4)}
    shared = {"source": artifacts["source"]} | {f"copy{i}": artifacts["source"] for i in range(4)}
    measured = measure(host, shared, budget_s=1000)
    assert measured.launches == 3
    assert sorted(map(str, cold_loads(measured).values())) == ["0", "1", "2", "None", "None"]
    assert len(cold_loads(measured)) == 5
    assert host.started[-2:] == ["copy2", "copy3"]


def test_the_plan_leaves_room_for_the_cold_loads_that_no_launch_gives(artifacts: dict[str, Artifact]) -> None:
    own = measure(FakeHost(import_s=20.0), artifacts, looks=(30,), budget_s=160)
    shared = measure(FakeHost(import_s=20.0), dict.fromkeys(NAMES, artifacts["source"]), looks=(30,), budget_s=160)
    assert own.launches == shared.launches == 1
    assert own.rounds > shared.rounds >= 3
    assert len(cold_loads(own)) == len(cold_loads(shared)) == 3
    assert shared.wall_s <= 160


def test_a_budget_that_holds_no_more_cold_loads_says_which_are_missing(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    measured = measure(host, {"source": artifacts["source"], "again": artifacts["source"]}, budget_s=1)
    assert cold_loads(measured) == {"source": 0}
    assert measured.load["again"].cold_s is None
    assert any(note.startswith("the cold load of again was not measured") for note in measured.notes)


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


@pytest.mark.skipif(sys.platform != "linux", reason="looks at which pages stay in memory")
def test_files_that_stay_in_memory_give_no_cold_load_and_a_note(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    stages = with_compiled(artifacts)
    path = max(files_of(stages["compiled"]), key=lambda path: path.stat().st_size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert len(mapped[:])  # touched, so that its pages are in memory
        measured = measure(host, stages)
    assert (measured.load["compiled"].cold_s, measured.load["compiled"].warm_s) == (None, 2.5)  # not 100.5
    (note,) = [note for note in measured.notes if "the system kept the files in memory" in note]
    assert note.startswith("the cold load of compiled")


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


def test_compiled_stages_that_share_files_are_all_compiled_before_the_first_round(
    host: FakeHost, artifacts: dict[str, Artifact]
) -> None:
    one = with_compiled(artifacts)
    measured = measure(host, one | {"compiled2": one["compiled"]}, budget_s=1)
    assert {name: measured.load[name].cold_s for name in ("compiled", "compiled2")} == {
        "compiled": 100.5,
        "compiled2": 100.5,
    }
    assert measured.load["compiled2"].warm_s == 2.5


def test_what_a_launch_takes_before_its_first_round_is_recorded(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts)
    assert [s.launch for s in measured.start_ups] == list(range(measured.launches))
    assert {(s.processes, s.load_s) for s in measured.start_ups} == {(4, 6.0)}
    assert measured.launch_s == pytest.approx(
        sum(measured.start_ups[0].model_dump(include={"load_s", "warm_up_s"}).values())
    )


def test_a_round_takes_what_was_foretold(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts, looks=(4,))
    begun = sorted(min(s.started_s for s in measured.samples if (s.launch, s.round) == (0, n)) for n in (0, 1))
    took = begun[1] - begun[0]
    assert measured.round_s is not None
    assert took <= measured.round_s <= 2 * took  # the fake does not spend time on what is not timed


def test_memory_is_reported_for_each_stage(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    assert set(measure(host, artifacts).inference_peak_memory_bytes) == set(NAMES)


def test_a_baseline_that_is_no_stage_is_refused(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    with pytest.raises(PipelineError, match="'nobody'"):
        measure(host, artifacts, baseline="nobody")


def test_the_result_survives_json(host: FakeHost, artifacts: dict[str, Artifact]) -> None:
    measured = measure(host, artifacts, budget_s=1)
    assert SpeedMeasurement.model_validate_json(measured.model_dump_json()) == measured


PADDED_RUNNER = """
import time
from pipeline.measure import block
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner

# the cores may be shared with other tests: seconds of this process's own are the same on an idle machine and a busy one
for timed in (block.run_block, block.warm_up):
    timed.__kwdefaults__["clock"] = time.process_time_ns

class PaddedRunner(OnnxRuntimeRunner):
    def __init__(self, artifact, spec):
        super().__init__(artifact, spec)
        self.least_s = artifact.manifest.execution["least_s"]

    def prefill(self, tokens):
        return self.padded(super().prefill, tokens)

    def decode(self, tokens):
        return self.padded(super().decode, tokens)

    def padded(self, run, tokens):
        end = time.process_time() + self.least_s
        logits = run(tokens)
        while time.process_time() < end:
            pass
        return logits
"""


@pytest.fixture
def padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: dict[str, Artifact]) -> Callable[..., Artifact]:
    """Artifacts of a stranger's format, whose runner takes so long for each prompt and token."""
    plugin = tmp_path / "plugin"
    (plugin / "padded-1.0.dist-info").mkdir(parents=True)
    (plugin / "padded.py").write_text(PADDED_RUNNER)
    (plugin / "padded-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: padded\nVersion: 1.0\n")
    entry_points = "[pipeline.runners]\npadded = padded:PaddedRunner\n"
    (plugin / "padded-1.0.dist-info" / "entry_points.txt").write_text(entry_points)
    monkeypatch.setenv("PYTHONPATH", str(plugin))

    def make(least_s: float) -> Artifact:
        source = artifacts["source"]
        update = {"format": "padded", "execution": {"least_s": least_s}}
        return Artifact(source.manifest.model_copy(update=update), source.blobs)

    return make


@pytest.mark.slow
def test_a_runner_that_takes_3_percent_longer_is_slower_and_a_copy_is_not(
    tmp_path: Path, padded: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.measure.rounds.BLOCK_S", 0.05)
    stages = [
        StageToMeasure(name, padded(least_s), ExecutionSpec())
        for name, least_s in (("source", 0.004), ("copy", 0.004), ("longer", 0.004 * 1.03))
    ]
    measured = measure_speed(
        stages,
        WORKLOAD,
        baseline="source",
        budget_s=300,
        looks=(12, 30, 80),
        seed=0,
        logs=tmp_path / "logs",
    )
    assert measured.failures == {}
    assert measured.fits
    found = speed_figures(
        measured.samples,
        baseline="source",
        parents={"source": None, "copy": "source", "longer": "source"},
        plan=measured.plan,
        looks_taken=measured.looks_taken,
    )
    verdicts = {
        name: {p.kind: p.vs_baseline.verdict for p in points if p.vs_baseline is not None}
        for name, points in found.stages.items()
    }
    assert verdicts["longer"] == {"prefill": "slower", "decode": "slower"}
    assert verdicts["copy"].keys() == {"prefill", "decode"}
    assert not set(verdicts["copy"].values()) & {"faster", "slower"}


@pytest.mark.slow
def test_real_workers_measure_real_models(tmp_path: Path, artifacts: dict[str, Artifact]) -> None:
    stages = [StageToMeasure(name, artifacts[name], ExecutionSpec()) for name in ("source", "int4")]
    measured = measure_speed(stages, WORKLOAD, baseline="source", budget_s=1, seed=0, logs=tmp_path / "logs")
    assert measured.failures == {}
    assert (measured.launches, measured.rounds) == (1, 3)
    assert all(sum(sample.seconds) >= 0.2 for sample in measured.samples)
    assert measured.inference_peak_memory_bytes["int4"] > 2**20
