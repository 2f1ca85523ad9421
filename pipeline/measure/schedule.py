"""Who runs when: launches, warm-ups and shuffled rounds, so that what is compared was measured side by side.

A launch starts one process for every stage and a second one for the baseline. In a round, every one of them runs a
block at every point, one at a time, in an order drawn anew. A stage's figure is its ratio to the baseline inside the
round; the second process of the baseline gives the ratio that pure noise has.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError, StageError
from pipeline.measure.memory import MemorySampler
from pipeline.measure.process import LoadError, StageToMeasure, StartWorker, Worker, WorkerProcess
from pipeline.measure.samples import LoadSample, LoadTimes, Sample, SpeedMeasurement, WarmUpSample
from pipeline.measure.workload import Point, Workload

_T = TypeVar("_T")

LAUNCHES = 3
LEAST_ROUNDS = 3
MOST_ROUNDS = 20
"""Rounds of a launch."""

BLOCK_S = 0.2
WARM_UP_CAP_S = 5.0
PROCESS_BYTES = 600 * 2**20
"""What a worker takes besides its model: the libraries."""

WEIGHTS_FACTOR = 1.5
"""Memory of a loaded model over the bytes of its weights: some are repacked or converted when they are loaded."""


Progress = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class _Seat:
    """One process of a launch: a stage, or the second process of the baseline."""

    stage: StageToMeasure
    replica: int = 0

    def __str__(self) -> str:
        return self.stage.name + (" (again)" if self.replica else "")


@dataclass
class _Record:
    """What is collected on the way."""

    samples: list[Sample] = field(default_factory=list)
    warm_ups: list[WarmUpSample] = field(default_factory=list)
    loads: list[LoadSample] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unloadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure_speed(
    stages: Sequence[StageToMeasure],
    workload: Workload,
    *,
    baseline: str,
    budget_s: float,
    seed: int,
    logs: Path,
    on_progress: Progress = lambda fraction, message: None,
    clock: Callable[[], float] = time.monotonic,
    start_worker: StartWorker = Worker,
    available_bytes: int | None = None,
) -> SpeedMeasurement:
    """Measure prefill and decode of every stage, and how long each takes to load.

    Within `budget_s` seconds there are LAUNCHES launches of at least LEAST_ROUNDS rounds; where that is too little,
    fewer launches, and one launch of LEAST_ROUNDS in any case. Cold compilation is a part of the load time that the
    budget does not count. `logs` gets one log a stage. A stage that fails is
    left out from there on and its reason returned; the others go on. Where the models do not fit into
    `available_bytes` (default: what the host has free) together, each stage runs beside the baseline alone.

    Raises: PipelineError where no stage has the baseline's name, or two have the same.
    """
    names = [stage.name for stage in stages]
    if baseline not in names or len(set(names)) != len(names):
        raise PipelineError(f"the baseline must be one of the stages, each named once: {baseline!r}, {names}")
    if available_bytes is None:
        import psutil

        available_bytes = int(psutil.virtual_memory().available)
    schedule = _Schedule(
        stages=list(stages),
        points=list(workload.points()),
        baseline=baseline,
        budget_s=budget_s,
        seed=seed,
        logs=logs,
        on_progress=on_progress,
        clock=clock,
    )
    return schedule.run(start_worker, available_bytes)


@dataclass
class _Schedule:
    stages: list[StageToMeasure]
    points: list[Point]
    baseline: str
    budget_s: float
    seed: int
    logs: Path
    on_progress: Progress
    clock: Callable[[], float]
    record: _Record = field(default_factory=_Record)
    vocab_size: int = 0
    steps: dict[Point, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.cold_compile_s = 0.0
        self.random = random.Random(self.seed)  # noqa: S311 (an order, not a secret)

    def run(self, start_worker: StartWorker, available_bytes: int) -> SpeedMeasurement:
        groups = self._groups(available_bytes)
        self._cold_loads(groups, start_worker)
        planned, rounds, launches, most = 1, LEAST_ROUNDS, 0, 0
        launch = 0
        while launch < planned:
            began = self.clock()
            counts: list[int] = []
            first_round = 0
            for group in groups:
                seats = [seat for seat in group if seat.stage.name not in self.record.failures]
                with ExitStack() as stack:
                    workers = self._start(seats, launch, start_worker, stack)
                    if not workers:
                        continue
                    estimates = self._warm_up(workers, launch, share=1 / len(groups))
                    if launch == 0 and not counts:
                        round_s = self._round_s(estimates) * len(groups)
                        overhead_s = (self.clock() - began) * len(groups)
                        planned, rounds = self._plan(round_s, overhead_s, len(groups))
                    done = self._rounds(workers, launch, first_round, rounds, planned)
                first_round += done
                counts.append(done)
            if any(counts):
                launches += 1
                most += max(counts)
            launch += 1
            if launch < planned and self._spent() > self.budget_s:
                self.record.notes.append(f"the budget of {self.budget_s:g} s was used up after {launch} launches")
                break
            if not counts:
                break
        if launches == 0:
            self.record.notes.append("no stage was measured to the end")
        elif launches == 1:
            self.record.notes.append("one launch: the intervals do not cover what differs from launch to launch")
        elif launches < LAUNCHES:
            self.record.notes.append(f"{launches} launches instead of {LAUNCHES}, for the budget")
        return self._result(launches, most)

    # Preparation

    def _groups(self, available_bytes: int) -> list[list[_Seat]]:
        """Seats that are loaded together: all, or where they do not fit, the baseline beside one at a time."""
        base = next(stage for stage in self.stages if stage.name == self.baseline)
        seats = [_Seat(stage) for stage in self.stages]
        again = _Seat(base, replica=1)
        need = sum(map(_estimated_bytes, [*seats, again]))
        if need <= available_bytes or len(seats) == 1:
            return [[*seats, again]]
        self.record.notes.append(
            f"together the models take about {need / 1e9:.1f} GB and {available_bytes / 1e9:.1f} GB are free: "
            f"each stage ran beside {self.baseline} alone"
        )
        return [[_Seat(base), other] for other in [again, *seats] if other.replica or other.stage is not base]

    def _cold_loads(self, groups: list[list[_Seat]], start_worker: StartWorker) -> None:
        """Time cold loads that the first launch cannot: pages that another process maps cannot be dropped."""
        for group in groups:
            mapped: set[Path] = set()
            for seat in group:
                files = _files(seat.stage.artifact)
                if seat.replica == 0 and files & mapped:
                    with ExitStack() as stack:
                        worker = self._begin(seat, start_worker, stack)
                        if worker is not None:
                            self._load(seat, worker, None, cold=True)
                mapped |= files

    # One launch

    def _start(
        self, seats: list[_Seat], launch: int, start_worker: StartWorker, stack: ExitStack
    ) -> dict[_Seat, WorkerProcess]:
        """Workers with their artifacts loaded. Libraries are imported side by side; loading, which is timed, is not."""
        order = seats if launch == 0 else self._shuffled(seats)
        starting = {seat: w for seat in order if (w := self._begin(seat, start_worker, stack)) is not None}
        for seat, worker in list(starting.items()):
            try:
                worker.wait_until_prepared()
            except StageError as error:
                self._fail(seat, str(error))
                del starting[seat]
        workers: dict[_Seat, WorkerProcess] = {}
        for seat, worker in starting.items():
            known = {sample.stage for sample in self.record.loads if sample.cold}
            cold = launch == 0 and seat.replica == 0 and seat.stage.name not in known
            if self._load(seat, worker, launch, cold=cold):
                workers[seat] = worker
        return workers

    def _begin(self, seat: _Seat, start_worker: StartWorker, stack: ExitStack) -> WorkerProcess | None:
        """A process that has begun to import what it needs, closed by `stack`; None where it does not start."""
        stage = seat.stage
        if stage.name in self.record.failures:
            return None
        try:
            worker = start_worker(stage.name, stage.spec, self.logs / f"{stage.name}.log")
        except StageError as error:
            self._fail(seat, str(error))
            return None
        stack.callback(worker.close)
        worker.prepare(stage.artifact)
        return worker

    def _load(self, seat: _Seat, worker: WorkerProcess, launch: int | None, *, cold: bool) -> bool:
        """Load and record how long it took; False where it failed."""
        stage = seat.stage
        self._tell(f"loading {seat}")
        compiled = "compile" in stage.artifact.manifest.execution
        dropped = cold and drop_from_page_cache(_files(stage.artifact))
        try:
            if cold and compiled:
                worker.forget_compiled(stage.artifact)
            answer = worker.load(stage.artifact)
            compile_s = self._compile(seat, worker, cold=cold) if compiled else 0.0
        except StageError as error:
            self._fail(seat, str(error))
            if isinstance(error, LoadError) and stage.name in self.record.failures:
                self.record.unloadable.append(stage.name)
            return False
        if stage.name == self.baseline or not self.vocab_size:
            self.vocab_size = min(self.vocab_size or answer["vocab_size"], answer["vocab_size"])
        self.record.loads.append(
            LoadSample(
                stage=stage.name,
                replica=seat.replica,
                launch=launch,
                load_s=answer["load_s"] + compile_s,
                cold=dropped,
                environment=answer.get("environment", {}),
            )
        )
        return True

    def _compile(self, seat: _Seat, worker: WorkerProcess, *, cold: bool) -> float:
        """Seconds that compiling for the workload's shapes takes, which is a part of loading."""
        self._tell(f"compiling {seat}")
        shapes = sorted({(point.batch, point.prompt) for point in self.points})
        compile_s = float(worker.ask("compile", shapes=shapes)["compile_s"])
        if cold and compile_s:
            self.cold_compile_s += compile_s
            self.record.notes.append(
                f"{seat}: compiling with nothing kept took {compile_s:.1f} s, which the budget does not count"
            )
        return compile_s

    def _warm_up(
        self, workers: dict[_Seat, WorkerProcess], launch: int, *, share: float
    ) -> dict[tuple[_Seat, Point], float]:
        """Warm up every worker at every point and return the seconds that an iteration takes there.

        The memory of the workers is sampled meanwhile, and never while a block is timed.
        """
        estimates: dict[tuple[_Seat, Point], float] = {}
        cap_s = self.budget_s * share * 0.1 / max(1, len(workers) * len(self.points))
        cap_s = min(max(cap_s, BLOCK_S), WARM_UP_CAP_S)
        for seat, worker in list(workers.items()):  # those that fail are taken out
            self._tell(f"warming up {seat}")
            name = seat.stage.name
            with MemorySampler(worker.pid) as memory:
                for point in self.points:
                    answer = self._ask(workers, seat, "warm_up", point, steps=point.new_tokens, cap_s=cap_s)
                    if answer is None:
                        break
                    seconds = answer["seconds"]
                    estimates[seat, point] = statistics.median(seconds[-max(1, len(seconds) // 2) :])
                    self.record.warm_ups.append(
                        WarmUpSample(
                            stage=name,
                            replica=seat.replica,
                            launch=launch,
                            point=point,
                            seconds=tuple(seconds),
                            flat=answer["flat"],
                        )
                    )
            self.record.memory[name] = max(self.record.memory.get(name, 0), memory.peak_memory_bytes)
            self.record.rss[name] = max(self.record.rss.get(name, 0), memory.peak_rss_bytes)
        self._choose_steps(estimates)
        return {key: value for key, value in estimates.items() if key[0] in workers}

    def _choose_steps(self, estimates: dict[tuple[_Seat, Point], float]) -> None:
        """How many tokens each stage decodes after a prompt: all, or as many as the slowest can in its share."""
        seats = len({seat for seat, _ in estimates}) or 1
        share_s = max(BLOCK_S, 0.5 * self.budget_s / (LEAST_ROUNDS * seats * len(self.points)))
        for point in self.points:
            times = [s for (_, at), s in estimates.items() if at == point]
            if point in self.steps or not times:
                continue
            fitting = int(share_s / max(times)) if max(times) > 0 else point.new_tokens
            self.steps[point] = min(point.new_tokens, max(4, fitting))
            if point.kind == "decode" and self.steps[point] < point.new_tokens:
                self.record.notes.append(
                    f"{point}: {self.steps[point]} of {point.new_tokens} new tokens were timed, for the budget"
                )

    def _round_s(self, estimates: dict[tuple[_Seat, Point], float]) -> float:
        """Seconds that a round takes, by what the warm-up saw; the work that is not timed included."""
        total = 0.0
        prefill = {
            (seat, point.batch, point.prompt): s for (seat, point), s in estimates.items() if point.kind == "prefill"
        }
        for (seat, point), iteration_s in estimates.items():
            if point.kind == "prefill":
                total += iteration_s + max(BLOCK_S, iteration_s)
            else:
                cycle_s = max(iteration_s * self.steps[point], 1e-6)
                cycles = max(1.0, BLOCK_S / cycle_s)
                total += cycles * (cycle_s + prefill.get((seat, point.batch, point.prompt), 0.0))
        return max(total, 1e-6)

    def _plan(self, round_s: float, overhead_s: float, groups: int) -> tuple[int, int]:
        """(launches, rounds a launch) for what is left of the budget, decided before the first round."""
        left = self.budget_s - self._spent() - (overhead_s * (groups - 1) / groups)
        for launches in range(LAUNCHES, 0, -1):
            rounds = int((left - (launches - 1) * overhead_s) / (launches * round_s))
            if rounds >= LEAST_ROUNDS:
                return launches, min(rounds, MOST_ROUNDS)
        return 1, LEAST_ROUNDS

    def _rounds(self, workers: dict[_Seat, WorkerProcess], launch: int, first: int, rounds: int, launches: int) -> int:
        """Run rounds; the number of those begun. Late ones are left out where the budget is far exceeded."""
        for number in range(rounds):
            if number >= LEAST_ROUNDS and self._spent() > 1.25 * self.budget_s:
                self.record.notes.append(f"launch {launch + 1} ended after {number} of {rounds} rounds, for the budget")
                return number
            if not workers:
                return number
            self._tell(f"launch {launch + 1} of {launches}, round {number + 1} of {rounds}")
            order = 0
            for point in self._shuffled(self.points):
                for seat in self._shuffled(workers):
                    if seat not in workers:
                        continue
                    started_s = self.clock()
                    answer = self._ask(workers, seat, "block", point, steps=self.steps[point], min_s=BLOCK_S)
                    if answer is None:
                        continue
                    self.record.samples.append(
                        Sample(
                            stage=seat.stage.name,
                            replica=seat.replica,
                            launch=launch,
                            round=first + number,
                            order=order,
                            point=point,
                            seconds=tuple(answer["seconds"]),
                            started_s=started_s,
                        )
                    )
                    order += 1
        return rounds

    def _ask(
        self, workers: dict[_Seat, WorkerProcess], seat: _Seat, request: str, point: Point, **fields: Any
    ) -> dict[str, Any] | None:
        """The worker's answer; None where it failed, and then its stage is out."""
        try:
            return workers[seat].ask(
                request, point=point.model_dump(), vocab_size=self.vocab_size, seed=self.seed, **fields
            )
        except StageError as error:
            workers.pop(seat).close()
            self._fail(seat, f"{point}: {error}")
            return None

    def _fail(self, seat: _Seat, reason: str) -> None:
        """Leave the stage out from here on; without the baseline's second process only the noise is unknown."""
        if seat.replica:
            self.record.notes.append(
                f"the second process of {seat.stage.name} failed, the noise is not known: {reason}"
            )
        else:
            self.record.failures[seat.stage.name] = reason

    # Odds and ends

    def _shuffled(self, items: Iterable[_T]) -> list[_T]:
        drawn = list(items)
        self.random.shuffle(drawn)
        return drawn

    def _spent(self) -> float:
        return self.clock() - self.began - self.cold_compile_s

    def _tell(self, message: str) -> None:
        self.on_progress(min(1.0, self._spent() / self.budget_s) if self.budget_s > 0 else 1.0, message)

    def _result(self, launches: int, rounds: int) -> SpeedMeasurement:
        record = self.record
        load = {}
        for stage in self.stages:
            mine = [sample for sample in record.loads if sample.stage == stage.name]
            warm = [sample.load_s for sample in mine if not sample.cold]
            load[stage.name] = LoadTimes(
                cold_s=next((sample.load_s for sample in mine if sample.cold), None),
                warm_s=statistics.median(warm) if warm else None,
            )
        return SpeedMeasurement(
            baseline=self.baseline,
            seed=self.seed,
            launches=launches,
            rounds=rounds,
            decode_tokens={str(point): steps for point, steps in self.steps.items() if point.kind == "decode"},
            samples=tuple(record.samples),
            warm_ups=tuple(record.warm_ups),
            load_samples=tuple(record.loads),
            load=load,
            inference_peak_memory_bytes=record.memory,
            inference_peak_rss_bytes=record.rss,
            failures=record.failures,
            unloadable=tuple(record.unloadable),
            logs={stage.name: str(self.logs / f"{stage.name}.log") for stage in self.stages},
            notes=tuple(record.notes),
            wall_s=self.clock() - self.began,
        )


def drop_from_page_cache(files: Iterable[Path]) -> bool:
    """Tell the kernel to drop the files' clean pages; False where it cannot be told. Pages in use stay."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(handle)
    return True


def _files(artifact: Artifact) -> set[Path]:
    """The files of the artifact's components: graphs and weights."""
    return {artifact.locate(entry) for part in artifact.manifest.components.values() for entry in part.files.values()}


def _estimated_bytes(seat: _Seat) -> int:
    return int(seat.stage.artifact.manifest.weights_bytes * WEIGHTS_FACTOR) + PROCESS_BYTES
