import os
from pathlib import Path

import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.runtime import compile_cache


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_models.torch_artifact(tiny_models.save_llama(tmp_path_factory.mktemp("llama")))


def test_the_folder_is_for_its_owner_alone(store: Path) -> None:
    assert compile_cache.compile_cache_root() == store / "compiled"
    assert (store / "compiled").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(store: Path, mode: int) -> None:
    compile_cache.compile_cache_root().chmod(mode)
    with pytest.raises(PipelineError, match="others than its owner may have written there"):
        compile_cache.compile_cache_root()


def test_a_folder_of_somebody_else_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cache.compile_cache_root()
    monkeypatch.setattr(os, "getuid", lambda: store.stat().st_uid + 1)
    with pytest.raises(PipelineError, match="it is not run"):
        compile_cache.compile_cache_root()


def test_a_link_to_a_folder_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    store.mkdir()
    (store / "compiled").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match="remove it"):
        compile_cache.compile_cache_root()


def test_kernels_are_kept_by_artifact_threads_and_versions(artifact: Artifact) -> None:
    def place(**changes: object) -> Path:
        settings: dict = {"artifact": artifact, "threads": 2, "version": "1", **changes}
        return compile_cache.artifact_cache(settings.pop("artifact"), **settings)

    other = Artifact(artifact.manifest.model_copy(update={"execution": {"dtype": "bfloat16"}}), artifact.blobs)
    places = [place(), place(threads=4), place(version="2"), place(artifact=other)]
    assert place() == places[0]
    assert len(set(places)) == 4


def test_what_is_forgotten_is_gone(artifact: Artifact) -> None:
    folder = compile_cache.artifact_cache(artifact, threads=1, version="1")
    assert not compile_cache.forget(folder)
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / "kernel.so").write_bytes(b"code")
    assert compile_cache.forget(folder)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("name", [compile_cache.TOOLCHAIN, "ab" * 32])
def test_a_folder_that_torch_made_again_is_closed_to_others(name: str) -> None:
    folder = compile_cache.compile_cache_root() / name
    folder.mkdir()
    folder.chmod(0o775)
    assert compile_cache._kernel_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_kernels_is_not_closed_where_others_could_reach_it() -> None:
    folder = compile_cache.compile_cache_root() / "kernels"
    folder.mkdir()
    folder.chmod(0o775)
    folder.parent.chmod(0o755)
    with pytest.raises(PipelineError, match="others than its owner may have written there"):
        compile_cache._kernel_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o775


def test_a_link_among_the_kernels_is_refused_and_what_it_points_to_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere").chmod(0o775)
    folder = compile_cache.compile_cache_root() / "kernels"
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match="it is not run"):
        compile_cache._kernel_folder(folder)
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o775


def test_kernels_of_somebody_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_cache.compile_cache_root() / "kernels"
    folder.mkdir()
    folder.chmod(0o775)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PipelineError, match="it is not run"):
        compile_cache._kernel_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o775


def test_kernels_lie_in_the_store_of_their_artifact(artifact: Artifact, store: Path, tmp_path: Path) -> None:
    another = tmp_path / "another"
    (another / "artifacts").mkdir(parents=True)
    kept = Artifact(artifact.manifest, another / "blobs")
    assert compile_cache.artifact_cache(kept, threads=1, version="1").parent == another / "compiled"
    exported = Artifact(artifact.manifest, tmp_path / "model")
    assert compile_cache.artifact_cache(exported, threads=1, version="1").parent == store / "compiled"
