import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import StageError
from pipeline.measure.process import Worker, WorkerDiedError
from pipeline.measure.worker import serve
from pipeline.measure.workload import Point
from pipeline.runtime import ExecutionSpec

PREFILL = Point(kind="prefill", batch=1, prompt=8, new_tokens=4)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and pidfd")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_models.onnx_artifact(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker("int4", ExecutionSpec(), tmp_path / "logs" / "int4.log") as worker:
        yield worker


def answers_to(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    out = io.StringIO()
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def ended(pid: int) -> bool:
    """Wait until the process has ended, ten seconds at most."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 10)[0])
    finally:
        os.close(handle)


def block(**changes: Any) -> dict[str, Any]:
    return {"point": PREFILL.model_dump(), "vocab_size": 64, "seed": 0, "steps": 4, "min_s": 0.001, **changes}


def test_each_request_gets_one_answer() -> None:
    assert len(answers_to({"request": "nonsense"}, {"request": "nonsense"})) == 2


def test_an_unknown_request_is_named_in_the_error() -> None:
    assert "'nonsense'" in answers_to({"request": "nonsense"})[0]["error"]["message"]


def test_a_block_before_a_load_is_refused() -> None:
    assert "nothing is loaded" in answers_to({"request": "block", **block()})[0]["error"]["message"]


def test_an_exception_of_a_library_becomes_an_error_that_names_it(artifact: Artifact) -> None:
    load = {"request": "load", "manifest": {"format": 3}, "blobs": ".", "spec": {}}
    assert answers_to(load)[0]["error"]["message"].startswith("ValidationError")


def test_a_worker_loads_and_answers(worker: Worker, artifact: Artifact) -> None:
    loaded = worker.load(artifact)
    assert (loaded["vocab_size"], loaded["max_length"]) == (64, 48)
    assert loaded["load_s"] > 0
    assert loaded["environment"]["OMP_NUM_THREADS"] == "1"
    assert len(worker.ask("block", **block())["seconds"]) >= 1


def test_a_runner_that_does_not_compile_has_nothing_to_forget_and_takes_no_time(
    worker: Worker, artifact: Artifact
) -> None:
    worker.forget_compiled(artifact)
    worker.load(artifact)
    assert worker.ask("compile", shapes=[[1, 8]]) == {"compile_s": 0.0}


def test_whole_passes_are_timed_and_their_shapes_run_beforehand_where_something_is_compiled(
    worker: Worker, tmp_path: Path
) -> None:
    worker.load(tiny_models.onnx_artifact(tmp_path / "whole", cached=False))
    assert worker.ask("compile", shapes=[], forward=[[2, 8]]) == {"compile_s": 0.0}
    point = Point(kind="forward", batch=2, prompt=8, new_tokens=0).model_dump()
    assert len(worker.ask("block", **block(point=point, steps=0))["seconds"]) >= 1
    assert worker.ask("warm_up", point=point, vocab_size=64, seed=0, steps=0, cap_s=0.1)["seconds"]


def test_a_graph_without_a_cache_asked_for_prompts_is_refused_with_what_to_do(worker: Worker, tmp_path: Path) -> None:
    worker.load(tiny_models.onnx_artifact(tmp_path / "whole", cached=False))
    with pytest.raises(StageError, match=r"(?s)no key-value cache.*evaluate\.workload\.forward"):
        worker.ask("block", **block())


@linux
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_batch_that_memory_does_not_hold_is_told_and_the_next_request_is_answered(
    format: str, worker: Worker, tmp_path: Path
) -> None:
    if format == "onnx":
        worker.load(tiny_models.onnx_artifact(tmp_path / "whole", cached=False))
    else:
        worker.load(tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama")))
    small = Point(kind="forward", batch=1, prompt=8, new_tokens=0)
    worker.ask("block", **block(point=small.model_dump(), steps=0))
    psutil.Process(worker.pid).rlimit(psutil.RLIMIT_AS, (psutil.Process(worker.pid).memory_info().vms + 2**27,) * 2)
    huge = Point(kind="forward", batch=40_000, prompt=48, new_tokens=0)  # its logits alone take 491 MB
    with pytest.raises(StageError, match=r"(?s)there is not enough memory for it.*a smaller batch"):
        worker.ask("block", **block(point=huge.model_dump(), steps=0))
    assert worker.ask("block", **block(point=small.model_dump(), steps=0))["seconds"]


def test_affinity_is_that_of_the_spec(tmp_path: Path, artifact: Artifact) -> None:
    cpu = max(os.sched_getaffinity(0))
    with Worker("pinned", ExecutionSpec(affinity=(cpu,)), tmp_path / "log") as worker:
        assert worker.load(artifact)["environment"]["affinity"] == [cpu]
        assert psutil.Process(worker.pid).cpu_affinity() == [cpu]


def test_a_refusal_carries_the_stage_and_the_reason(worker: Worker, artifact: Artifact) -> None:
    worker.load(artifact)
    long = PREFILL.model_copy(update={"prompt": 100})
    with pytest.raises(StageError, match="int4: the prompt has 100 tokens and the model takes at most 48"):
        worker.ask("block", **block(point=long.model_dump()))


def test_a_worker_goes_on_after_a_refusal(worker: Worker, artifact: Artifact) -> None:
    worker.load(artifact)
    with pytest.raises(StageError):
        worker.ask("nonsense")
    assert worker.ask("block", **block())["seconds"]


def test_a_worker_that_is_killed_is_reported_with_its_signal(worker: Worker, artifact: Artifact) -> None:
    worker.load(artifact)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"int4 was ended by SIGKILL .* during `block`"):
        worker.ask("block", **block())


def test_the_last_lines_of_the_log_come_with_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with Worker("int4", ExecutionSpec(), tmp_path / "log") as worker, pytest.raises(WorkerDiedError) as caught:
        worker.ask("block")
    assert "exit status 7" in str(caught.value)
    assert "out of luck" in str(caught.value)


def test_what_libraries_print_goes_to_the_log_and_not_between_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Artifact
) -> None:
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    (noisy / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Late:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            os.write(1, b'chatter\\n')\n"
        "sys.meta_path.insert(0, Late())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(noisy))
    with Worker("int4", ExecutionSpec(), tmp_path / "log") as worker:
        assert worker.load(artifact)["vocab_size"] == 64
    assert "chatter" in (tmp_path / "log").read_text()


@linux
def test_leaving_the_context_leaves_no_process(tmp_path: Path) -> None:
    with Worker("int4", ExecutionSpec(), tmp_path / "log") as worker:
        pid = worker.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


@linux
def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    worker = Worker("int4", ExecutionSpec(), tmp_path / "log")
    worker.close()
    worker.close()
    assert ended(worker.pid)


@linux
def test_a_worker_has_a_session_of_its_own_so_that_ctrl_c_reaches_only_the_parent(worker: Worker) -> None:
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)


@linux
def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.measure.process import Worker\n"
        "from pipeline.runtime import ExecutionSpec\n"
        f"worker = Worker('int4', ExecutionSpec(), Path({str(tmp_path / 'log')!r}))\n"
        "try:\n"
        "    worker.ask('nonsense')\n"
        "except Exception:\n"
        "    print(worker.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.communicate()
    assert ended(pid)


@linux
@pytest.mark.slow
def test_idle_workers_do_not_spin_beside_one_that_runs(tmp_path: Path, artifact: Artifact) -> None:
    spec = ExecutionSpec(threads=2)
    checkpoint = tiny_models.save_llama(tmp_path / "llama")
    with (
        Worker("onnx", spec, tmp_path / "onnx.log") as idle_onnx,
        Worker("torch", spec, tmp_path / "torch.log") as idle_torch,
        Worker("busy", spec, tmp_path / "busy.log") as busy,
    ):
        busy.load(artifact)
        idle_onnx.load(artifact)
        idle_torch.load(tiny_models.torch_artifact(checkpoint))
        for worker in (idle_onnx, idle_torch):
            worker.ask("block", **block())
        busy.ask("block", **block(min_s=0.05))  # what spins for a moment after its work has stopped by now
        before = [sum(psutil.Process(w.pid).cpu_times()[:2]) for w in (idle_onnx, idle_torch)]
        busy.ask("block", **block(min_s=1.0))
        after = [sum(psutil.Process(w.pid).cpu_times()[:2]) for w in (idle_onnx, idle_torch)]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([0, 0], abs=0.05)
