"""Who runs when: launches and shuffled rounds, so that what is compared was measured side by side.

A launch starts one process for every stage and a second one for the baseline. In a round, every one of them runs a
block at every point, in short visits that take turns. A stage's figure is its ratio to the baseline inside the round;
the second process of the baseline gives the ratio that pure noise has. How many rounds and launches there are, and
after which of them it is looked whether all is decided, is planned after the first warm-up and before the first timed
block.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.errors import PipelineError
from pipeline.measure.budget import decode_steps, round_seconds
from pipeline.measure.cold_load import ColdLoads, is_compiled
from pipeline.measure.launches import Crew, Group, Launcher, group_bytes, seat_together, together_bytes
from pipeline.measure.looks import LEAST_ROUNDS, MARGIN, LookPlan
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import StageToMeasure, StartWorker
from pipeline.measure.record import Record
from pipeline.measure.rounds import run_blocks
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.statistics import Verdict, compare_stages, decide
from pipeline.measure.workload import Point, Workload

LOOKS = (12, 30, 80, 200)
"""Rounds after which it is looked whether all is decided."""

PLANNED_SHARE = 0.95
"""Of the budget: what the warm-up foretells is not exact."""

OVERRUN = 1.1
"""Rounds that take longer than foretold may go on until so many times the budget."""

FIGURE_ROUNDS = 2
"""Fewer have no figure, however wide its interval."""

Progress = Callable[[float, str], None]
Ending = Literal["decided", "looks", "budget", "failed"]


def measure_speed(
    stages: Sequence[StageToMeasure],
    workload: Workload,
    *,
    baseline: str,
    budget_s: float,
    seed: int,
    logs: Path,
    looks: Sequence[int] = LOOKS,
    margin: float = MARGIN,
    parents: Mapping[str, str | None] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    on_progress: Progress = lambda fraction, message: None,
    clock: Callable[[], float] = time.monotonic,
    start_worker: StartWorker | None = None,
    available_bytes: int | None = None,
) -> SpeedMeasurement:
    """Measure every stage at every point of the workload, and how long each takes to load.

    It is looked after `looks` rounds in all (at most four, ascending) whether every comparison with the baseline has a
    verdict at `margin`, and then it ends. Looks that `budget_s` seconds do not hold are left out beforehand; where
    none fits, there are fewer rounds and launches, and LEAST_ROUNDS rounds of one launch in any case. Cold compilation
    is a part of the load time that the budget does not count.

    `logs` gets one log a stage. A stage that fails is left out from there on and its reason returned; the others go
    on. `parents` names the stage that each was made from. With `pairs`, those comparisons of one stage with another
    are what has to be decided, instead of those with the baseline. Where the models do not fit into `available_bytes`
    (default: what the host has free) together, each stage runs beside the baseline alone, or beside the other of its
    pair. Where the baseline is the only stage, there is nothing to decide: it ends with the first look.

    Raises: PipelineError where no stage has the baseline's name, or two have the same.
    """
    names = [stage.name for stage in stages]
    if baseline not in names or len(set(names)) != len(names):
        raise PipelineError(f"the baseline must be one of the stages, each named once: {baseline!r}, {names}")
    if available_bytes is None:
        import psutil

        available_bytes = int(psutil.virtual_memory().available)
    record = Record()
    groups = seat_together(stages, baseline, available_bytes, pairs)
    if len(groups) > 1:
        who = "the two stages of each comparison ran beside each other" if pairs else "each stage ran beside"
        record.notes.append(
            f"together the models take about {together_bytes(stages, baseline) / 1e9:.1f} GB and "
            f"{available_bytes / 1e9:.1f} GB are free: {who}{'' if pairs else f' {baseline} alone'}"
        )
        for group in groups:
            if group_bytes(group) > available_bytes:
                told = f"{' and '.join(map(str, group))} take about {group_bytes(group) / 1e9:.1f} GB together: "
                record.notes.append(told + "more than is free, so that they may run out of memory")
                on_progress(0.0, record.notes[-1])
    schedule = _Schedule(
        stages=stages,
        points=list(workload.points()),
        groups=groups,
        baseline=baseline,
        parents=parents or dict.fromkeys(names),
        pairs=pairs,
        declared=LookPlan.declare(looks if len(stages) > 1 else looks[:1], margin),
        budget_s=budget_s,
        seed=seed,
        logs=logs,
        record=record,
        on_progress=on_progress,
        clock=clock,
        begin_launch=lambda: Nurseries(record.note) if start_worker is None else nullcontext(start_worker),
    )
    return schedule.run()


@dataclass
class _Schedule:
    stages: Sequence[StageToMeasure]
    points: Sequence[Point]
    groups: Sequence[Group]
    baseline: str
    parents: Mapping[str, str | None]
    pairs: Sequence[tuple[str, str]]
    declared: LookPlan
    budget_s: float
    seed: int
    logs: Path
    record: Record
    on_progress: Progress
    clock: Callable[[], float]
    begin_launch: Callable[[], AbstractContextManager[StartWorker]]
    plan: LookPlan | None = None
    fits: bool = True
    """Whether what is planned fits into the budget."""
    steps: dict[Point, int] = field(default_factory=dict)
    round_s: float = 0.0
    launch_s: float = 0.0
    launches: int = 0
    rounds: int = 0
    """Of all launches; with groups, of the one that had most."""
    looks_taken: int = 0
    ended: Ending | None = None

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.launcher = Launcher(
            points=self.points,
            baseline=self.baseline,
            budget_s=self.budget_s,
            seed=self.seed,
            logs=self.logs,
            record=self.record,
            cold=ColdLoads({stage.name: stage.artifact for stage in self.stages}),
            begin_launch=self.begin_launch,
            clock=self.clock,
            tell=self._tell,
        )

    def run(self) -> SpeedMeasurement:
        with self.launcher:
            self._compile_those_that_share()
            first, number = self._first_crew()
            with first:
                if first.workers:
                    self._plan(first)
                    self._measure(first, number)
            self._cold_loads_left()
        self._note_what_is_missing()
        return self._result()

    # The plan

    def _first_crew(self) -> tuple[Crew, int]:
        """The first launch of the first group in which anything runs, and which one that is."""
        crew, number = Crew(0, ()), 0
        for number, group in enumerate(self.groups):
            launches = self.declared.looks[0].launches  # the plan is not known yet
            crew = self.launcher.start(group, 0, number=number, groups=len(self.groups), launches=launches)
            if crew.workers:
                break
        return crew, number

    def _plan(self, crew: Crew) -> None:
        """Fix the looks by what the first warm-up foretells. A process takes as long in every group."""
        self.steps = decode_steps(self.points, crew.estimates, self.budget_s)
        for point, steps in self.steps.items():
            if steps < point.new_tokens:
                timed = f"{steps} of {point.new_tokens} new tokens"
                self.record.notes.append(f"{point}: {timed} were timed, for the budget")
        groups = sum(map(len, self.groups)) / len(crew.group)
        start_up = self.record.start_ups[-1]
        launch_s = start_up.import_s + start_up.load_s + start_up.warm_up_s
        self.round_s, self.launch_s = round_seconds(crew.estimates, self.steps) * groups, launch_s * groups
        left_s = PLANNED_SHARE * self.budget_s - self._spent() + launch_s  # the plan counts the launch that has begun
        plan = self._plan_within(left_s)
        alone_s = self._cold_loads_after(plan) * (launch_s - start_up.warm_up_s) / max(1, start_up.processes)
        self.plan = self._plan_within(left_s - alone_s) if alone_s else plan
        self.fits = self._seconds(self.plan) <= left_s
        if self.plan.looks[0].rounds < self.declared.looks[0].rounds or not self.fits:
            needed_s = (self._seconds(self.declared) + self._spent() - launch_s) / PLANNED_SHARE
            self.record.notes.append(
                f"the budget of {self.budget_s:g} s is too small for one look: {_look(self.declared)} would take about "
                f"{needed_s:.0f} s, for which evaluate.budget_s should be {_rounded_up(needed_s)}; planned: "
                f"{_look(self.plan)}" + ("" if self.fits else ", which does not fit either: nothing is claimed")
            )
        looks = ", ".join(str(look.rounds) for look in self.plan.looks)
        self._tell(f"planned: a look after {looks} rounds, {_counted(self.plan.looks[-1].launches, 'launch')} at most")

    def _seconds(self, plan: LookPlan) -> float:
        """Until the plan's first look."""
        return plan.seconds(round_s=self.round_s, launch_s=self.launch_s)[0]

    def _plan_within(self, left_s: float) -> LookPlan:
        return self.declared.within_budget(left_s, round_s=self.round_s, launch_s=self.launch_s)

    def _cold_loads_after(self, plan: LookPlan) -> int:
        """How many cold loads the launches still to come leave over."""
        groups = [[seat.stage.name for seat in group if not seat.replica] for group in self.groups]
        return self.launcher.cold.left_after(plan.looks[0].launches - 1, groups)

    # Rounds

    def _measure(self, first: Crew, number: int) -> None:
        """All launches of the plan, until a look finds everything decided or the budget is used up."""
        assert self.plan is not None
        planned = self.plan.rounds_by_launch
        for launch, rounds in enumerate(planned):
            if launch and not self._holds_a_launch():
                self.ended = "budget"
                return
            done = 0
            most = 0
            for at, group in enumerate(self.groups):
                if launch == 0 and at < number:  # nothing of it runs
                    continue
                if launch == 0 and at == number:
                    crew = first
                elif self._is_needless(group):
                    continue
                else:
                    crew = self.launcher.start(group, launch, number=at, groups=len(self.groups), launches=len(planned))
                with crew:
                    ran = self._rounds(crew, done, rounds, len(planned))
                done += ran
                most = max(most, ran)
            self.launches += bool(most)
            self.rounds += most
            if most < rounds:
                self.ended = "budget" if self._alive() else "failed"
                return
            if self._look():
                return
        self.ended = "looks"

    def _is_needless(self, group: Group) -> bool:
        """Whether nothing could be compared in it: the stage beside the baseline has failed, or there is none left."""
        names = {seat.stage.name for seat in group}
        return not names - self.record.failures.keys() or (
            len(self.groups) > 1 and bool(names & self.record.failures.keys())
        )

    def _alive(self) -> set[str]:
        return {stage.name for stage in self.stages} - self.record.failures.keys()

    def _rounds(self, crew: Crew, first: int, rounds: int, launches: int) -> int:
        """Run rounds; the number of those that were run. The least are run whatever they take."""
        launch = crew.launch
        for number in range(rounds):
            late = self._spent() + self.round_s / len(self.groups) > OVERRUN * self.budget_s
            if late and (launch > 0 or number >= LEAST_ROUNDS):
                return number
            if not crew.workers:
                return number
            self._tell(f"launch {launch + 1} of {launches}, round {number + 1} of {rounds}")
            order = 0
            for point in self.launcher.shuffled(self.points):
                if point in self.steps:
                    blocks = run_blocks(self.launcher, crew, point, steps=self.steps[point], clock=self.clock)
                    self.record.samples += [
                        block.sample(launch=crew.launch, round=first + number, order=order + place)
                        for place, block in enumerate(blocks)
                    ]
                    order += len(blocks)
        return rounds

    def _look(self) -> bool:
        """Look, where the plan has a look at so many rounds; whether there is nothing more to find out."""
        assert self.plan is not None
        if self.rounds not in {look.rounds for look in self.plan.looks}:
            return False
        self.looks_taken += 1
        alive = self._alive()
        pairs = [pair for pair in self._pairs_to_decide() if alive.issuperset(pair)]
        if self.baseline not in alive or (len(self.stages) > 1 and not pairs):
            self.ended = "failed"
            return True
        verdicts = self._verdicts_on_pairs(pairs) if self.pairs else self._verdicts(alive)
        wanted = len(pairs) * len(self.steps)  # a comparison without a figure is not decided, either
        undecided = wanted - sum(verdict != "inconclusive" for verdict in verdicts)
        self._tell(f"{undecided} of {wanted} comparisons are not decided")
        if undecided or not pairs or not self.fits:
            return False
        self.ended = "decided"
        return True

    def _pairs_to_decide(self) -> Sequence[tuple[str, str]]:
        """What every point needs a verdict on, as long as nothing fails."""
        return self.pairs or [(stage.name, self.baseline) for stage in self.stages if stage.name != self.baseline]

    def _verdicts(self, alive: Set[str]) -> list[Verdict]:
        """The verdicts on all stages against the baseline."""
        assert self.plan is not None
        samples, look = self.record.samples, self.looks_taken
        found = decide(samples, baseline=self.baseline, parents=self.parents, plan=self.plan, look=look)
        return [comparison.verdict for comparison in found.comparisons if comparison.stage in alive]

    def _verdicts_on_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdicts on those of the pairs that were asked for."""
        found = [
            compare_stages(
                self.record.samples,
                stage,
                other,
                baseline=self.baseline,
                plan=self.plan,
                looks_taken=self.looks_taken,
                comparisons=len(self.pairs),
            )
            for stage, other in pairs
        ]
        return [ratio.verdict for ratios in found for ratio in ratios.values()]

    def _holds_a_launch(self) -> bool:
        """Whether another launch and a round fit into the budget."""
        return self._spent() + self.launch_s + self.round_s <= OVERRUN * self.budget_s

    # Cold loads that no launch gives

    def _compile_those_that_share(self) -> None:
        """Compile, with nothing kept, those of which the first launch can load no more than one cold."""
        compiled = {stage.name for stage in self.stages if is_compiled(stage.artifact)}
        for group in self.groups:
            loaded: list[str] = []
            for name in [name for name in self.launcher.cold.due if name in compiled and name in _names(group)]:
                if self.launcher.cold.may(name, loaded):
                    loaded.append(name)
                else:
                    self.launcher.load_cold_alone(name, group)

    def _cold_loads_left(self) -> None:
        cold, missing = self.launcher.cold, []
        for name in cold.due:
            if name in self.record.failures:
                continue
            start_ups = self.record.start_ups
            one_s = sum(s.import_s + s.load_s for s in start_ups) / max(1, sum(s.processes for s in start_ups))
            if not self.plan or self._spent() + one_s > OVERRUN * self.budget_s:
                missing.append(name)
                continue
            self.launcher.load_cold_alone(name, next(group for group in self.groups if name in _names(group)))
        if missing and self.plan:
            self.record.notes.append(
                f"the cold load of {', '.join(missing)} was not measured: the files are shared with another stage, so "
                "that each launch can time one of them, and the budget held no more"
            )

    # The result

    def _note_what_is_missing(self) -> None:
        if self.record.kept_in_memory:
            self.record.notes.append(
                f"the cold load of {', '.join(self.record.kept_in_memory)} was not measured: the system kept the files "
                "in memory, as it does while another process uses them"
            )
        if not self.launches:
            self.record.notes.append("no stage was measured to the end")
        elif self.launches == 1:
            self.record.notes.append("one launch: what differs from launch to launch is assumed, and not measured")
        blocks = Counter((sample.stage, sample.point) for sample in self.record.samples if not sample.replica)
        most = {
            stage.name: max((blocks[stage.name, point] for point in self.points), default=0) for stage in self.stages
        }
        why = self.record.failures.get(self.baseline)
        for name, rounds in most.items():
            if rounds >= FIGURE_ROUNDS or name in self.record.failures:
                continue
            self.record.failures[name] = "not measured: " + (
                f"the baseline {self.baseline} failed: {why}"
                if why
                else f"it ran in one round, and a figure takes {FIGURE_ROUNDS}"
                if rounds
                else f"the budget of {self.budget_s:g} s was used up before its first round"
            )

    def _spent(self) -> float:
        return self.clock() - self.began - self.launcher.cold_compile_s

    def _tell(self, message: str) -> None:
        self.on_progress(min(1.0, self._spent() / self.budget_s) if self.budget_s > 0 else 1.0, message)

    def _result(self) -> SpeedMeasurement:
        record = self.record
        names = [stage.name for stage in self.stages]
        return SpeedMeasurement(
            baseline=self.baseline,
            seed=self.seed,
            budget_s=self.budget_s,
            plan=self.plan,
            looks_taken=self.looks_taken,
            fits=self.fits,
            ended=self.ended,
            launches=self.launches,
            rounds=self.rounds,
            round_s=self.round_s or None,
            launch_s=self.launch_s or None,
            start_ups=tuple(record.start_ups),
            decode_tokens={str(point): steps for point, steps in self.steps.items() if point.kind == "decode"},
            samples=tuple(record.samples),
            warm_ups=tuple(record.warm_ups),
            load_samples=tuple(record.loads),
            load=record.load_times(names),
            inference_peak_memory_bytes=record.memory,
            inference_peak_rss_bytes=record.rss,
            device_peak_memory_bytes=record.device_memory,
            failures=record.failures,
            unloadable=tuple(record.unloadable),
            logs={name: str(self.logs / f"{name}.log") for name in names},
            notes=tuple(record.notes),
            wall_s=self.clock() - self.began,
        )


def _names(group: Group) -> set[str]:
    return {seat.stage.name for seat in group}


def _rounded_up(seconds: float) -> int:
    """With a twentieth to spare, for the machine is never the same twice."""
    return 5 * math.ceil(1.05 * seconds / 5)


def _look(plan: LookPlan) -> str:
    """What the plan's first look takes."""
    return f"{_counted(plan.looks[0].rounds, 'round')} in {_counted(plan.looks[0].launches, 'launch')}"


def _counted(count: int, what: str) -> str:
    ending = "" if count == 1 else "es" if what.endswith("ch") else "s"
    return f"{count} {what}{ending}"
