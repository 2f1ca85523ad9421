"""Executing plans: what is kept, what a failing pass leaves behind, and what other stages notice of it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.execute import StageResult, execute
from pipeline.hardware import describe_host, load_profile
from pipeline.models import find_source
from pipeline.plan import Plan, make_plan
from pipeline.plugin import Registry
from pipeline.recipe.load import recipe_from_text
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("plugins")


def make(passes: str, checkpoint: Path, store: Store) -> Plan:
    text = f"version: 1\nname: x\nmodel: {{path: {checkpoint}}}\npasses: {passes}\n"
    recipe = recipe_from_text(text, file="r.yaml", folder=checkpoint)
    host = describe_host()
    source = find_source("path", str(checkpoint), relative_to=checkpoint)
    profile = load_profile("local", host=host)
    return make_plan(recipe, source=source, store=store, registry=Registry(), profile=profile, host=host)


def run(passes: str, checkpoint: Path, store: Store, **how: object) -> dict[str, StageResult]:
    source = find_source("path", str(checkpoint), relative_to=checkpoint)
    return execute(make(passes, checkpoint, store), source=source, store=store, **how)  # type: ignore[arg-type]


def statuses(results: dict[str, StageResult]) -> dict[str, str]:
    return {name: result.status for name, result in results.items()}


def leftovers(store: Store) -> list[Path]:
    return [p for p in (store.root / "tmp").iterdir() if p.is_dir()]


def test_stages_run_once_and_are_cached_from_then_on(checkpoint: Path, store: Store) -> None:
    passes = "[{pass: mark}, {pass: write}]"
    assert set(statuses(run(passes, checkpoint, store)).values()) == {"ran"}
    again = run(passes, checkpoint, store)
    assert set(statuses(again).values()) == {"cached"}
    assert [s.status for s in make(passes, checkpoint, store).stages] == ["cached"] * 3


def test_a_changed_parameter_runs_only_what_depends_on_it(checkpoint: Path, store: Store) -> None:
    run("[{pass: mark}, {pass: write}]", checkpoint, store)
    results = run("[{pass: mark}, {pass: write, text: y}]", checkpoint, store)
    assert statuses(results) == {"source": "cached", "mark": "cached", "write": "ran"}


def test_a_pass_that_changes_nothing_upstream_still_hits(checkpoint: Path, store: Store) -> None:
    run("[{pass: mark}]", checkpoint, store)
    planned = make("[{pass: same}, {pass: mark}]", checkpoint, store)
    assert [s.status for s in planned.stages] == ["cached", "will run", "may hit"]
    results = run("[{pass: same}, {pass: mark}]", checkpoint, store)
    assert statuses(results) == {"source": "cached", "same": "ran", "mark": "cached"}
    assert results["same"].artifact == results["source"].artifact


def test_cost_and_log_of_a_cached_stage_are_those_of_the_day_that_it_ran(checkpoint: Path, store: Store) -> None:
    first = run("[{pass: mark}]", checkpoint, store)["mark"]
    again = run("[{pass: mark}]", checkpoint, store)["mark"]
    assert first.cost == again.cost
    assert first.cost.wall_s is not None
    assert first.cost.peak_memory_bytes
    assert again.log is not None
    assert "marking with 1" in Path(again.log).read_text()


def test_progress_reaches_the_caller_and_prints_do_not_disturb_it(checkpoint: Path, store: Store) -> None:
    seen: list[tuple[str, float, str]] = []
    run("[{pass: mark}]", checkpoint, store, on_progress=lambda *said: seen.append(said))
    assert seen == [("mark", 0.5, "half")]


def test_further_inputs_reach_the_pass(checkpoint: Path, store: Store) -> None:
    passes = "[{pass: mark, value: 4}, {pass: combine, after: source, inputs: {other: mark}}]"
    results = run(passes, checkpoint, store)
    artifact = store.artifact(str(results["combine"].artifact))
    assert artifact is not None
    assert artifact.manifest.execution["other"] == {"dtype": "float32", "mark": 4}
    assert artifact.manifest.lineage is not None
    assert artifact.manifest.lineage.parents == (results["source"].artifact, results["mark"].artifact)


def test_facets_reach_the_pass_that_declares_them(checkpoint: Path, store: Store) -> None:
    results = run("[{pass: seeded}]", checkpoint, store)
    artifact = store.artifact(str(results["seeded"].artifact))
    assert artifact is not None
    assert artifact.manifest.execution["seed"] == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("refuse", "this model has no such layer (try another)"),
        ("crash", "ZeroDivisionError: one over nothing"),
        ("segfault", "ended by SIGSEGV in sample_passes.py:"),
        ("nothing", "returned NoneType where it promises 'torch'"),
        ("wrong_format", "returned an artifact of format 'torch' where it promises 'onnx'"),
        ("peek", "'seed', which it does not declare"),
        ("phantom", "the artifact names ghost, which is not in the store"),
        ("orphan", "ended by SIGKILL"),
    ],
)
def test_a_failing_pass_fails_its_stage_with_its_reason_and_no_other(
    name: str, reason: str, checkpoint: Path, store: Store
) -> None:
    results = run(f"[{{pass: {name}}}, {{pass: mark, after: source}}]", checkpoint, store)
    assert statuses(results) == {"source": "ran", name: "failed", "mark": "ran"}
    assert reason in str(results[name].reason)
    assert leftovers(store) == []


def test_stages_made_from_a_failed_one_are_skipped(checkpoint: Path, store: Store) -> None:
    results = run("[{pass: crash}, {pass: mark}, {pass: write}]", checkpoint, store)
    assert statuses(results) == {"source": "ran", "crash": "failed", "mark": "skipped", "write": "skipped"}
    assert results["mark"].reason == "crash failed"


def test_a_failed_stage_is_tried_again(checkpoint: Path, store: Store) -> None:
    run("[{pass: crash}]", checkpoint, store)
    assert statuses(run("[{pass: crash}]", checkpoint, store))["crash"] == "failed"


def test_a_damaged_artifact_is_made_again(checkpoint: Path, store: Store) -> None:
    run("[{pass: write}]", checkpoint, store)
    blob = next(p for p in store.blobs.rglob("*") if p.is_file())
    blob.unlink()
    assert statuses(run("[{pass: write}]", checkpoint, store))["write"] == "ran"
    assert blob.read_bytes() == b"x"


def edited(weights: Path) -> None:
    """Change a value of a checkpoint, and not its size."""
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def test_of_a_checkpoint_that_changed_nothing_is_taken_from_the_store(
    checkpoint: Path, store: Store, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    before = run("[{pass: mark}]", folder, store)
    edited(folder / "model.safetensors")
    assert store.artifact(str(before["mark"].artifact)) is None
    after = run("[{pass: mark}]", folder, store)
    assert statuses(after) == {"source": "ran", "mark": "ran"}
    assert after["mark"].artifact != before["mark"].artifact


def test_a_checkpoint_that_changes_during_a_run_fails_what_would_read_it(
    checkpoint: Path, store: Store, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "own")

    def change(stage: str) -> None:
        if stage == "mark":
            edited(folder / "model.safetensors")

    results = run("[{pass: mark}]", folder, store, on_start=change)
    assert results["mark"].status == "failed"
    assert "a file of it changed, while the plan ran" in str(results["mark"].reason)


def start(passes: str, checkpoint: Path, store: Store) -> subprocess.Popen[bytes]:
    """`pipeline run` in a process of its own, to be interrupted."""
    recipe = store.root.parent / "r.yaml"
    recipe.write_text(f"version: 1\nname: x\nmodel: {{path: {checkpoint}}}\npasses: {passes}\n")
    # a shell that starts this in the background leaves SIGINT ignored, and that is inherited
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom pipeline.cli import main; main()"
    )
    runs = str(store.root.parent / "runs")
    return subprocess.Popen([sys.executable, "-c", code, "run", str(recipe), "--no-measure", "--runs", runs])


def wait_for(path: Path) -> int:
    """The number in a file that another process is about to write."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "the pass never began"
        threading.Event().wait(0.02)
    return int(path.read_text())


def wait_gone(pid: int) -> None:
    try:
        psutil.Process(pid).wait(timeout=30)
    except psutil.NoSuchProcess:
        return


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_worker_and_nothing_half_written(
    how: signal.Signals, checkpoint: Path, store: Store, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    process = start(f"[{{pass: mark}}, {{pass: hang, flag: {flag}}}]", checkpoint, store)
    worker = wait_for(flag)
    process.send_signal(how)
    code = process.wait(timeout=30)
    assert code == (130 if how == signal.SIGINT else -how)
    wait_gone(worker)
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    if how == signal.SIGINT:
        assert leftovers(store) == []
        assert not (tmp_path / "runs").exists()
    results = run("[{pass: mark}, {pass: write}]", checkpoint, store)  # sweeps what a kill left
    assert statuses(results) == {"source": "cached", "mark": "cached", "write": "ran"}
    assert leftovers(store) == []
    assert not any(p.read_bytes() == b"half written" for p in store.blobs.rglob("*") if p.is_file())


def test_two_runs_at_once_make_each_stage_once(checkpoint: Path, store: Store) -> None:
    processes = [start("[{pass: write, text: both}]", checkpoint, store) for _ in range(2)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    assert len([r for r in store.records() if r.pass_name == "write"]) == 1
    assert len(list((store.root / "logs").glob("*.log"))) == 1
    assert leftovers(store) == []
