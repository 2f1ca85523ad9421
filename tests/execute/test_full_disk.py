"""A full disk: said before anything is written where it can be foreseen, and clean afterwards where it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.cli import main
from pipeline.errors import HostError
from pipeline.execute import StageResult
from pipeline.store import Store

Run = Callable[..., dict[str, StageResult]]

DISK_BYTES = 2 * 2**20

PASSES = """
from pipeline import Field, Pass, PassParams

class Base(Pass):
    "Writes much."
    accepts, produces = frozenset({"torch"}), "torch"

class Fills(Base):
    name = "fills"
    class Params(PassParams):
        megabytes: int = 1
        patient: bool = False
    def run(self, artifact, params, context):
        import hashlib
        block = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(32)) * 1024  # 1 MiB
        entries = {}
        for number in range(params.megabytes):
            entries[f"part{number}"] = context.output.file(f"part{number}", block[number + 1 :])
        files = {**artifact.manifest.files, **entries}
        return type(artifact)(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    options = f"size={DISK_BYTES}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small_store(
    small_disk: Path, plugins: Path, tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Store:
    folder = tmp_path / "filling"
    folder.mkdir()
    install(folder, "filling_passes", PASSES, {"fills": "filling_passes:Fills"})
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{plugins}")
    monkeypatch.setenv("PIPELINE_STORE", str(small_disk / "store"))
    return Store(small_disk / "store")


def files_in(room: Path) -> list[Path]:
    return [p for p in room.rglob("*") if p.is_file()] if room.exists() else []


def leave(disk: Path, free: int) -> Path:
    """Fill the disk up to `free` bytes."""
    ballast = disk / "ballast"
    size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free
    ballast.write_bytes(bytes(size))
    return ballast


def test_a_pass_that_fills_the_disk_fails_alone_and_leaves_nothing(run_passes: Run, small_store: Store) -> None:
    results = run_passes("[{pass: fills, megabytes: 3}, {pass: mark, after: source}]", at=small_store)
    failed = results["fills"]
    assert (failed.status, failed.host_lacks) == ("failed", True)
    assert "the disk is full: OSError: [Errno 28] No space left on device" in str(failed.reason)
    assert f" kB are free for the store in {small_store.root}; `pipeline cache gc` frees" in str(failed.reason)
    assert results["mark"].status == "ran"
    assert files_in(small_store.blobs) + files_in(small_store.root / "tmp") == []


def test_with_room_the_same_pass_runs(run_passes: Run, small_store: Store) -> None:
    assert run_passes("[{pass: fills, megabytes: 1}]", at=small_store)["fills"].status == "ran"


@pytest.mark.parametrize("free", [4096, 3 * 4096, 6 * 4096, 12 * 4096, 20 * 4096])
def test_wherever_the_disk_ends_no_half_artifact_is_left(
    free: int, run_passes: Run, small_store: Store, small_disk: Path
) -> None:
    run_passes("[{pass: mark}]", at=small_store)
    ballast = leave(small_disk, free)
    results = run_passes("[{pass: mark}, {pass: write, text: new}]", at=small_store)
    assert results["mark"].status == "cached"
    if results["write"].status == "failed":
        assert results["write"].host_lacks
        assert "are free for the store in" in str(results["write"].reason)
    ballast.unlink()
    assert [p for p in files_in(small_store.root / "artifacts") if p.name.startswith(".")] == []
    again = run_passes("[{pass: mark}, {pass: write, text: new}]", at=small_store)
    assert again["write"].status in {"ran", "cached"}
    assert files_in(small_store.root / "tmp") == []


def test_a_disk_that_is_plainly_too_small_is_told_by_the_plan(
    run_passes: Run,
    small_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = large_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    for verb in ("plan", "run"):
        monkeypatch.setattr("sys.argv", ["pipeline", verb, str(recipe)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == HostError.exit_code
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(r"mark: it writes up to 4,194 kB and 2,0\d\d kB are free for the store in", said)
        assert "--force tries" in said
    assert not (tmp_path / "runs").exists()


def test_force_tries_nevertheless(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = large_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pipeline", "run", str(recipe), "--no-measure", "--force"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "mark" in capsys.readouterr().out


def test_a_full_disk_during_a_run_ends_with_4_and_the_report_tells(
    small_store: Store,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses: [{{pass: fills, megabytes: 3}}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pipeline", "run", str(recipe), "--no-measure"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == HostError.exit_code
    assert "the disk is full" in " ".join(capsys.readouterr().out.split())


def test_a_runs_folder_without_room_is_removed_and_told(
    small_disk: Path, marking: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(small_disk, 2 * 4096)
    arguments = ["pipeline", "run", str(marking), "--no-measure", "--runs", str(small_disk / "runs")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == HostError.exit_code
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert files_in(small_disk / "runs") == []


def test_a_store_without_any_room_ends_a_run_with_4_and_a_plan_well(
    small_disk: Path, marking: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(small_disk / "store"))
    leave(small_disk, 0)
    codes = {}
    for arguments in (["plan", str(marking), "--force"], ["run", str(marking), "--no-measure", "--force"]):
        monkeypatch.setattr("sys.argv", ["pipeline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        codes[arguments[0]] = ended.value.code
    said = capsys.readouterr().err
    assert codes == {"plan": 0, "run": HostError.exit_code}
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert files_in(small_disk / "store" / "leases") == []


@pytest.fixture
def marking(plugins: Path, store: Store, checkpoint: Path, tmp_path: Path) -> Path:
    """A recipe that needs little."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses: [{{pass: mark}}]\n")
    return recipe


def large_model(folder: Path) -> Path:
    """A recipe over a model whose weights are larger than the small disk."""
    model = folder / "large"
    model.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 8}
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    save_file({"a": np.zeros((1024, 1024), dtype=np.float32)}, model / "model.safetensors")
    recipe = folder / "large.yaml"
    recipe.write_text(f"version: 1\nname: large\nmodel: {{path: {model}}}\npasses: [{{pass: mark}}]\n")
    return recipe
