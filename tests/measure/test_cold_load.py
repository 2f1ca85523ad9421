import mmap
import os
import sys
from pathlib import Path

import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.measure.cold_load import ColdLoads, drop_from_page_cache, files_of, is_in_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs posix_fadvise and mincore")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("stages")
    return [tiny_models.onnx_artifact(folder / str(i), seed=i) for i in range(2)]


def compiled(artifact: Artifact) -> Artifact:
    return Artifact(artifact.manifest.model_copy(update={"execution": {"compile": {}}}), artifact.blobs)


def written(path: Path) -> Path:
    """A file of 4 MiB that was just written; skips where the folder lies in memory."""
    path.write_bytes(bytes(4 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if not drop_from_page_cache([path]):
        pytest.skip("the file system keeps its files in memory")
    path.write_bytes(bytes(4 << 20))
    return path


def test_files_of_an_artifact_are_its_graph_and_its_weights(artifacts: list[Artifact]) -> None:
    assert {path.name for path in files_of(artifacts[0])} == {"model.onnx", "weights.bin"}


def test_stages_with_files_of_their_own_may_all_be_loaded_cold(artifacts: list[Artifact]) -> None:
    cold = ColdLoads({"a": artifacts[0], "b": artifacts[1]})
    assert cold.may("a", [])
    assert cold.may("b", ["a"])


def test_a_stage_may_not_be_loaded_cold_beside_one_that_has_its_files(artifacts: list[Artifact]) -> None:
    cold = ColdLoads({"a": artifacts[0], "b": artifacts[0]})
    assert cold.may("b", [])
    assert not cold.may("b", ["a"])


def test_what_was_timed_once_is_not_due_again(artifacts: list[Artifact]) -> None:
    cold = ColdLoads({"a": artifacts[0]})
    cold.done("a")
    cold.done("a")
    assert cold.due == ()
    assert not cold.may("a", [])


def test_those_that_are_due_are_loaded_first_and_of_them_the_compiled_ones(artifacts: list[Artifact]) -> None:
    cold = ColdLoads({"a": artifacts[0], "b": artifacts[1], "c": compiled(artifacts[0])})
    assert cold.first(["a", "b", "c"]) == ["c", "a", "b"]
    cold.done("c")
    cold.done("b")
    assert cold.first(["b", "c", "a"]) == ["a", "b", "c"]


@pytest.mark.parametrize(("launches", "left"), [(0, 3), (1, 2), (2, 1), (3, 0), (9, 0)])
def test_every_launch_takes_one_of_those_that_share(artifacts: list[Artifact], launches: int, left: int) -> None:
    cold = ColdLoads({"a": artifacts[0], "b": artifacts[0], "c": artifacts[0]})
    assert cold.left_after(launches, [["a", "b", "c"]]) == left
    assert len(cold.due) == 3


def test_every_group_of_a_launch_takes_one_of_its_own(artifacts: list[Artifact]) -> None:
    cold = ColdLoads({"a": artifacts[0], "b": artifacts[0], "c": artifacts[0]})
    assert cold.left_after(1, [["a", "b"], ["a", "c"]]) == 1


@linux
def test_a_file_that_was_just_written_can_be_dropped(tmp_path: Path) -> None:
    assert drop_from_page_cache([written(tmp_path / "weights")])


@linux
def test_pages_that_a_process_maps_are_found_to_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "weights")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, len(mapped), mmap.PAGESIZE)) == 0
        assert not drop_from_page_cache([path])
    assert drop_from_page_cache([path])


@linux
def test_an_empty_file_is_dropped_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert drop_from_page_cache([tmp_path / "empty"])


def test_a_file_that_is_not_there_cannot_be_dropped(tmp_path: Path) -> None:
    assert not drop_from_page_cache([tmp_path / "nothing"])


@linux
def test_files_are_in_memory_once_they_were_read_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "weights")
    assert is_in_memory([path])
    assert drop_from_page_cache([path])
    assert not is_in_memory([path])
    path.read_bytes()
    assert is_in_memory([path])
    assert not is_in_memory([tmp_path / "absent"])


@linux
def test_a_stage_is_warm_once_its_files_were_read_by_a_load_or_are_in_memory(artifacts: list[Artifact]) -> None:
    files = files_of(artifacts[0])
    cold = ColdLoads({"a": artifacts[0], "b": artifacts[1]})
    if not drop_from_page_cache(files):
        pytest.skip("the file system keeps its files in memory")
    assert not cold.is_warm("a")
    cold.was_read("a")
    assert cold.is_warm("a")
    assert ColdLoads({}).is_warm("of no files here")
    for path in files:
        path.read_bytes()
    assert ColdLoads({"a": artifacts[0]}).is_warm("a")
