import mmap
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import tiny_models

from pipeline.measure.cold_load import ColdLoads, files_of
from pipeline.measure.launches import Launcher, Seat
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import StageToMeasure
from pipeline.measure.record import Record
from pipeline.measure.workload import Workload
from pipeline.runtime import ExecutionSpec

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

WORKLOAD = Workload(prompt_lengths=(8,), new_tokens=(4,))


@pytest.fixture
def stage(tmp_path: Path) -> StageToMeasure:
    return StageToMeasure("source", tiny_models.onnx_artifact(tmp_path / "onnx"), ExecutionSpec())


@pytest.fixture
def begun() -> list[Nurseries]:
    """What launches began their processes with."""
    return []


@pytest.fixture
def launcher(stage: StageToMeasure, begun: list[Nurseries], tmp_path: Path) -> Iterator[Launcher]:
    def begin() -> Nurseries:
        begun.append(Nurseries())
        return begun[-1]

    with Launcher(
        points=list(WORKLOAD.points()),
        baseline="source",
        budget_s=1,
        seed=0,
        logs=tmp_path / "logs",
        record=Record(),
        cold=ColdLoads({"source": stage.artifact}),
        begin_launch=begin,
        clock=time.monotonic,
        tell=lambda message: None,
    ) as launcher:
        yield launcher


@linux
def test_every_launch_has_its_own_nursery_and_its_groups_share_it(
    launcher: Launcher, stage: StageToMeasure, begun: list[Nurseries]
) -> None:
    nurseries = []
    for launch, number in ((0, 0), (0, 1), (1, 0)):
        with launcher.start([Seat(stage), Seat(stage, replica=1)], launch, number=number, groups=2) as crew:
            assert len(crew.workers) == 2
            nurseries.append([nursery.pid for nursery in begun[-1].running])
    assert [len(pids) for pids in nurseries] == [1, 1, 1]
    assert nurseries[0] == nurseries[1] != nurseries[2]
    assert not psutil.pid_exists(nurseries[0][0])
    assert launcher.record.failures == {}


@linux
def test_what_is_loaded_alone_after_the_last_launch_comes_from_its_nursery(
    launcher: Launcher, stage: StageToMeasure, begun: list[Nurseries]
) -> None:
    group = [Seat(stage)]
    with launcher.start(group, 0):
        pass
    launcher.load_cold_alone("source", group)
    assert len(begun) == 1
    assert [load.launch for load in launcher.record.loads] == [0, None]
    (pid,) = [nursery.pid for nursery in begun[0].running]
    launcher.close()
    assert not psutil.pid_exists(pid)


@linux
def test_a_load_whose_files_another_process_maps_is_not_called_cold(launcher: Launcher, stage: StageToMeasure) -> None:
    with ExitStack() as held:
        for path in files_of(stage.artifact):
            file = held.enter_context(path.open("rb"))
            mapped = held.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            assert len(mapped[:])  # touched, so that the pages are in memory
        launcher.load_cold_alone("source", [Seat(stage)])
    assert [load.cold for load in launcher.record.loads] == [False]
    assert launcher.record.kept_in_memory == ["source"]
