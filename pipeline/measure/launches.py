"""Launches: a process for every stage and a second one for the baseline, started, loaded and warmed up.

What launches are there to vary is drawn anew for each: the processes that workers are forked from are begun by exec,
one for every runtime, and import its libraries, side by side; see pipeline.measure.nursery. Loading, which is timed,
and everything after it is one at a time.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pipeline.errors import StageError
from pipeline.measure.budget import BLOCK_S
from pipeline.measure.cold_load import ColdLoads, drop_from_page_cache, is_compiled
from pipeline.measure.memory import MemorySampler
from pipeline.measure.process import LoadError, StageToMeasure, StartWorker, WorkerProcess
from pipeline.measure.record import Record
from pipeline.measure.samples import LoadSample, StartUp, WarmUpSample
from pipeline.measure.workload import Point

_T = TypeVar("_T")

WARM_UP_CAP_S = 5.0
WARM_UP_SHARE = 0.1
"""Of the budget, for the warm-ups of all launches together."""

PROCESS_BYTES = 600 * 2**20
"""What a worker takes besides its model: the libraries."""

WEIGHTS_FACTOR = 1.5
"""Memory of a loaded model over the bytes of its weights: some are repacked or converted when they are loaded."""


@dataclass(frozen=True, eq=False)
class Seat:
    """One process of a launch: a stage, or the second process of the baseline."""

    stage: StageToMeasure
    replica: int = 0

    def __str__(self) -> str:
        return self.stage.name + (" (again)" if self.replica else "")


Group = Sequence[Seat]
"""Those that are loaded together."""


def seat_together(
    stages: Sequence[StageToMeasure], baseline: str, available_bytes: int, pairs: Sequence[tuple[str, str]] = ()
) -> list[list[Seat]]:
    """All stages and the baseline's second process in one group, or where they do not fit, several.

    The baseline is beside its second process in the first, and beside another stage alone in each of the others. The
    two stages of each of `pairs` are in a group of their own, because only what shares rounds can be compared: beside
    the baseline, where that fits, too.
    """
    named = {stage.name: stage for stage in stages}
    again = Seat(named[baseline], replica=1)
    if len(named) == 1 or together_bytes(stages, baseline) <= available_bytes:
        return [[*map(Seat, stages), again]]
    paired = {name for pair in pairs for name in pair}
    wanted = [tuple(name for name in named if name in pair and name != baseline) for pair in pairs]
    wanted += [(name,) for name in named if name not in paired and name != baseline]
    groups = [[Seat(named[baseline]), again]]
    for names in dict.fromkeys(wanted):
        members = [Seat(named[name]) for name in names]
        beside = [Seat(named[baseline]), *members]
        groups.append(beside if len(members) == 1 or group_bytes(beside) <= available_bytes else members)
    return groups


def group_bytes(group: Group) -> int:
    """Memory of all processes of the group, roughly."""
    return sum(_estimated_bytes(seat.stage) for seat in group)


def together_bytes(stages: Sequence[StageToMeasure], baseline: str) -> int:
    """Memory of all stages and the baseline's second process, roughly."""
    return sum(_estimated_bytes(stage) * (2 if stage.name == baseline else 1) for stage in stages)


def _estimated_bytes(stage: StageToMeasure) -> int:
    if stage.memory_bytes is not None:
        return stage.memory_bytes
    return int(stage.artifact.manifest.weights_bytes * WEIGHTS_FACTOR) + PROCESS_BYTES


class Crew:
    """The loaded and warm processes of one launch of one group; a context manager that leaves none behind."""

    def __init__(self, launch: int, group: Group) -> None:
        self.launch = launch
        self.group = group
        self.processes = ExitStack()
        self.workers: dict[Seat, WorkerProcess] = {}
        self.estimates: dict[tuple[Seat, Point], float] = {}
        """Seconds of an iteration, as the warm-up saw them."""

    def close(self) -> None:
        """End all processes. Safe to call again."""
        self.processes.close()
        self.workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Launcher:
    """Starts crews, and keeps what one launch leaves to the next: whose cold load is due, and the vocabulary."""

    points: Sequence[Point]
    baseline: str
    budget_s: float
    seed: int
    logs: Path
    record: Record
    cold: ColdLoads
    begin_launch: Callable[[], AbstractContextManager[StartWorker]]
    """What starts the processes of one launch."""
    clock: Callable[[], float]
    tell: Callable[[str], None]
    vocab_size: int = 0
    cold_compile_s: float = 0.0
    """Seconds that went into compiling with nothing kept, which the budget does not count."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 (an order, not a secret)
        self._launch = 0
        self._begun: int | None = None
        self._source = ExitStack()
        self._start_worker: StartWorker | None = None

    def close(self) -> None:
        """End what starts processes. Safe to call again."""
        self._start_worker, self._begun = None, None
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _starter(self) -> StartWorker:
        """What starts processes in this launch; it is the same for all its groups."""
        if self._start_worker is None or self._begun != self._launch:
            self.close()
            self._start_worker = self._source.enter_context(self.begin_launch())
            self._begun = self._launch
        return self._start_worker

    def start(self, group: Group, launch: int, *, number: int = 0, groups: int = 1, launches: int = 1) -> Crew:
        """The crew of the `number`-th group, without those that fail. They are left out of later launches, too.

        So many `groups` and `launches`, as far as is known, share the time for warm-ups.
        """
        seats = [seat for seat in group if seat.stage.name not in self.record.failures]
        crew, self._launch = Crew(launch, group), launch
        try:
            began = self.clock()
            starting = self._import_side_by_side(seats, launch, crew.processes)
            imported, compiled_s = self.clock(), self.cold_compile_s
            self._load_in_turn(crew, starting)
            loaded = self.clock()
            self._warm_up(crew, share=1 / (groups * launches))
            self.record.start_ups.append(
                StartUp(
                    launch=launch,
                    group=number,
                    processes=len(seats),
                    import_s=imported - began,
                    load_s=loaded - imported - (self.cold_compile_s - compiled_s),
                    warm_up_s=self.clock() - loaded,
                )
            )
        except BaseException:
            crew.close()
            raise
        return crew

    def load_cold_alone(self, name: str, group: Group) -> None:
        """Time the stage's cold load in a process that does nothing else."""
        seat = next(seat for seat in group if seat.stage.name == name and not seat.replica)
        with ExitStack() as processes:
            worker = self._begin(seat, processes)
            if worker is not None:
                self._load(seat, worker, None, cold=True)

    def ask(self, crew: Crew, seat: Seat, request: str, point: Point, **fields: Any) -> dict[str, Any] | None:
        """The answer of the seat's process; None where it failed, and then its stage is out."""
        try:
            answer = crew.workers[seat].ask(
                request, point=point.model_dump(), vocab_size=self.vocab_size, seed=self.seed, **fields
            )
        except StageError as error:
            crew.workers.pop(seat).close()
            self._fail(seat, f"{point}: {error}")
            return None
        if device_bytes := answer.get("device_peak_memory_bytes"):
            _raise_to(self.record.device_memory, seat.stage.name, device_bytes)
        return answer

    def shuffled(self, items: Iterable[_T]) -> list[_T]:
        drawn = list(items)
        self._random.shuffle(drawn)
        return drawn

    def _import_side_by_side(
        self, seats: Sequence[Seat], launch: int, processes: ExitStack
    ) -> dict[Seat, WorkerProcess]:
        """Processes that have imported what they need, in the order in which they are to load."""
        drawn = list(seats) if launch == 0 else self.shuffled(seats)
        turn = self.cold.first(dict.fromkeys(seat.stage.name for seat in drawn))
        order = sorted(drawn, key=lambda seat: (turn.index(seat.stage.name), seat.replica))
        self.tell(f"starting {len(order)} processes")
        starting = {seat: w for seat in order if (w := self._begin(seat, processes)) is not None}
        for seat, worker in list(starting.items()):
            try:
                worker.wait_until_prepared()
            except StageError as error:
                self._fail(seat, str(error))
                del starting[seat]
        return starting

    def _begin(self, seat: Seat, processes: ExitStack) -> WorkerProcess | None:
        """A process that has begun to import what it needs, closed by `processes`; None where it does not start."""
        stage = seat.stage
        try:
            worker = self._starter()(stage.name, stage.spec, self.logs / f"{stage.name}.log")
        except StageError as error:
            self._fail(seat, str(error))
            return None
        processes.callback(worker.close)
        worker.prepare(stage.artifact)
        return worker

    def _load_in_turn(self, crew: Crew, starting: Mapping[Seat, WorkerProcess]) -> None:
        for seat, worker in starting.items():
            name = seat.stage.name
            cold = seat.replica == 0 and self.cold.may(name, {loaded.stage.name for loaded in crew.workers})
            if self._load(seat, worker, crew.launch, cold=cold):
                crew.workers[seat] = worker

    def _load(self, seat: Seat, worker: WorkerProcess, launch: int | None, *, cold: bool) -> bool:
        """Load and record how long it took; False where it failed."""
        stage = seat.stage
        self.tell(f"loading {seat}")
        compiled = is_compiled(stage.artifact)
        if cold:
            self.cold.done(stage.name)
        dropped = cold and drop_from_page_cache(self.cold.files(stage.name))
        if cold and not dropped:
            self.record.kept_in_memory.append(stage.name)
        warm = not cold and self.cold.is_warm(stage.name)
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
        self.cold.was_read(stage.name)
        if stage.name == self.baseline or not self.vocab_size:
            self.vocab_size = min(self.vocab_size or answer["vocab_size"], answer["vocab_size"])
        self.record.loads.append(
            LoadSample(
                stage=stage.name,
                replica=seat.replica,
                launch=launch,
                load_s=answer["load_s"] + compile_s,
                cold=dropped,
                warm=warm,
                compiled_anew=cold and compiled,
                environment=answer.get("environment", {}),
            )
        )
        return True

    def _compile(self, seat: Seat, worker: WorkerProcess, *, cold: bool) -> float:
        """Seconds that compiling for the workload's shapes takes, which is a part of loading."""
        self.tell(f"compiling {seat}")
        shapes = sorted({(point.batch, point.prompt) for point in self.points if point.kind != "forward"})
        passes = sorted({(point.batch, point.prompt) for point in self.points if point.kind == "forward"})
        compile_s = float(worker.ask("compile", shapes=shapes, forward=passes)["compile_s"])
        if cold and compile_s:
            self.cold_compile_s += compile_s
            self.record.notes.append(
                f"{seat}: compiling with nothing kept took {compile_s:.1f} s, which the budget does not count"
            )
        return compile_s

    def _warm_up(self, crew: Crew, *, share: float) -> None:
        """Warm up every process at every point, within its `share` of the time for that.

        The memory of the process is sampled meanwhile, and never while a block is timed.
        """
        cap_s = self.budget_s * WARM_UP_SHARE * share / max(1, len(crew.workers) * len(self.points))
        cap_s = min(max(cap_s, BLOCK_S), WARM_UP_CAP_S)
        for seat, worker in list(crew.workers.items()):  # those that fail are taken out
            self.tell(f"warming up {seat}")
            with MemorySampler(worker.pid) as memory:
                for point in self.points:
                    answer = self.ask(crew, seat, "warm_up", point, steps=point.new_tokens, cap_s=cap_s)
                    if answer is None:
                        break
                    seconds = answer["seconds"]
                    crew.estimates[seat, point] = statistics.median(seconds[-max(1, len(seconds) // 2) :])
                    self.record.warm_ups.append(
                        WarmUpSample(
                            stage=seat.stage.name,
                            replica=seat.replica,
                            launch=crew.launch,
                            point=point,
                            seconds=tuple(seconds),
                            flat=answer["flat"],
                        )
                    )
            _raise_to(self.record.memory, seat.stage.name, memory.peak_memory_bytes)
            _raise_to(self.record.rss, seat.stage.name, memory.peak_rss_bytes)
        crew.estimates = {key: seconds for key, seconds in crew.estimates.items() if key[0] in crew.workers}

    def _fail(self, seat: Seat, reason: str) -> None:
        self.record.fail(seat.stage.name, seat.replica, self._launch, reason)


def _raise_to(peaks: dict[str, int], name: str, value: int) -> None:
    peaks[name] = max(peaks.get(name, 0), value)
