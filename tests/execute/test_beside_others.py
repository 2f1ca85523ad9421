"""Several processes over one store: runs beside runs, garbage collection beside runs, and what a killed run leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import Store
from pipeline.store.garbage import collect_garbage

pytestmark = pytest.mark.slow

WAITING = """
import os, time
from pathlib import Path
from pipeline import Pass, PassParams

class Waits(Pass):
    "Say that it began, write, and wait until told to go on."
    name = "waits"
    accepts, produces = frozenset({"torch"}), "torch"
    class Params(PassParams):
        folder: str
    def run(self, artifact, params, context):
        folder = Path(params.folder)
        entry = context.output.file("made", b"made while others worked")
        (folder / f"began-{os.getpid()}").write_text("")
        deadline = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        files = {**artifact.manifest.files, "made": entry}
        return type(artifact)(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)
"""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    folder = tmp_path / "signs"
    folder.mkdir()
    return folder


@pytest.fixture
def waiting(plugins: Path, tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass `waits`, installed for processes that are started."""
    folder = tmp_path / "waiting"
    folder.mkdir()
    install(folder, "waiting_passes", WAITING, {"waits": "waiting_passes:Waits"})
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{plugins}")


@pytest.fixture
def start(waiting: None, store: Store, checkpoint: Path, signs: Path, tmp_path: Path) -> Start:
    """Start `pipeline run` over [mark, waits] in a process of its own, or over `passes`."""

    def begin(passes: str = f"[{{pass: mark}}, {{pass: waits, folder: {signs}}}]") -> subprocess.Popen[bytes]:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(f"version: 1\nname: x\nmodel: {{path: {checkpoint}}}\npasses: {passes}\n")
        arguments = ["run", str(recipe), "--no-measure", "--runs", str(tmp_path / "runs")]
        code = "from pipeline.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return begin


def wait_for(signs: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not list(signs.glob("began-*")):
        if process.poll() is not None:
            said = process.communicate()
            raise AssertionError(f"the run ended before its pass began: {said}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def hidden(runs: Path) -> list[Path]:
    return [p for p in runs.glob("*/.*") if p.is_dir() and not p.is_symlink()]


def test_two_runs_make_a_stage_once_and_the_second_waits_for_the_first(
    start: Start, signs: Path, store: Store, tmp_path: Path
) -> None:
    first = start()
    wait_for(signs, first)
    second = start()
    locked = store.root / "leases"
    deadline = time.monotonic() + 60
    while len(list(locked.glob("*.jsonl"))) < 2:  # the second has begun, too
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (signs / "go").write_text("")
    said = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert len(list(signs.glob("began-*"))) == 1
    reports = [json.loads(p.read_text()) for p in (tmp_path / "runs" / "x").glob("2*/report.json")]
    statuses = sorted(stage["status"] for report in reports for stage in report["stages"] if stage["name"] == "waits")
    assert statuses == ["cached", "ran"]


def test_garbage_collection_leaves_a_running_run_alone(start: Start, signs: Path, store: Store, tmp_path: Path) -> None:
    process = start()
    wait_for(signs, process)
    for _ in range(3):
        collected = collect_garbage(store)
        assert collected.kept_for == {"running processes": 2}  # the source and mark; waits is not published yet
    (signs / "go").write_text("")
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert collect_garbage(store).kept_for == {"runs": 3}
    assert (tmp_path / "runs/x/latest/model/made").read_bytes() == b"made while others worked"


@pytest.mark.slow
def test_collecting_again_and_again_beside_runs_breaks_none(start: Start, store: Store, tmp_path: Path) -> None:
    for value in range(1, 3):
        process = start(f"[{{pass: mark, value: {value}}}, {{pass: write, text: t{value}}}]")
        while process.poll() is None:
            collect_garbage(store)
            time.sleep(0.02)  # else it would take the processor from the run
        assert process.returncode == 0, process.communicate()
        process.communicate()
        shutil.rmtree(tmp_path / "runs")
    collect_garbage(store)
    assert list(store.records()) == []


@pytest.mark.parametrize("by", ["the next run", "garbage collection"])
def test_what_a_killed_run_left_is_removed(by: str, start: Start, signs: Path, store: Store, tmp_path: Path) -> None:
    process = start()
    wait_for(signs, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    runs = tmp_path / "runs"
    assert len(hidden(runs)) == 1
    if by == "the next run":
        again = start("[{pass: mark}]")
        said = again.communicate(timeout=60)
        assert again.returncode == 0, said
    else:
        deadline = time.monotonic() + 30  # its worker, which holds no lock, may live for a moment
        while (collected := collect_garbage(store)) and hidden(runs):
            assert time.monotonic() < deadline
        assert collected.kept_artifacts == 0
    assert hidden(runs) == []
    assert [p for p in (store.root / "tmp").iterdir() if p.is_dir()] == []
