import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import StageError
from pipeline.measure.memory import MemorySampler
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import Worker, WorkerDiedError
from pipeline.measure.workload import Point
from pipeline.parent import adopting_orphans
from pipeline.runtime import ExecutionSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

PREFILL = Point(kind="prefill", batch=1, prompt=8, new_tokens=4)
TOLERATED_BYTES = 16 * 2**20
"""Memory by which a fork's process may differ from one begun by exec."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_models.onnx_artifact(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def nurseries(notes: list[str]) -> Iterator[Nurseries]:
    with Nurseries(notes.append) as nurseries:
        yield nurseries


@pytest.fixture
def begin(nurseries: Nurseries, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Begins a worker and has it load the artifact."""
    workers: list[Worker] = []

    def begin(name: str, artifact: Artifact, spec: ExecutionSpec | None = None) -> Worker:
        workers.append(nurseries(name, spec or ExecutionSpec(), tmp_path / "logs" / f"{name}.log"))
        workers[-1].load(artifact)
        return workers[-1]

    yield begin
    for worker in workers:
        worker.close()


def block() -> dict[str, Any]:
    return {"point": PREFILL.model_dump(), "vocab_size": 64, "seed": 0, "steps": 4, "min_s": 0.001}


def mapping_base(pid: int, library: str) -> int:
    """Where the library begins in the process's memory."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if library in line:
            return int(line.split("-")[0], 16)
    raise AssertionError(f"{library} is not mapped")


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


def processes_of(nurseries: Nurseries) -> list[int]:
    return [nursery.pid for nursery in nurseries.running]


def test_workers_of_one_runtime_come_from_one_process_and_are_this_processs_children(
    begin: Callable[..., Worker], nurseries: Nurseries, artifact: Artifact
) -> None:
    workers = [begin(name, artifact) for name in ("one", "two")]
    assert len(processes_of(nurseries)) == 1
    assert len({worker.pid for worker in workers}) == 2
    assert all(psutil.Process(worker.pid).ppid() == os.getpid() for worker in workers)
    assert all(worker.ask("block", **block())["seconds"] for worker in workers)


def test_a_worker_has_a_session_of_its_own_so_that_ctrl_c_reaches_only_the_parent(
    begin: Callable[..., Worker], nurseries: Nurseries, artifact: Artifact
) -> None:
    worker = begin("one", artifact)
    assert os.getsid(worker.pid) == worker.pid
    assert os.getsid(0) not in [os.getsid(pid) for pid in (worker.pid, *processes_of(nurseries))]


def test_workers_of_one_launch_share_where_a_library_lies_and_those_of_two_do_not(
    tmp_path: Path, artifact: Artifact
) -> None:
    bases = []
    for launch in range(2):
        with Nurseries() as nurseries:
            for name in ("one", "two"):
                with nurseries(name, ExecutionSpec(), tmp_path / f"{name}{launch}.log") as worker:
                    worker.load(artifact)
                    bases.append(mapping_base(worker.pid, "onnxruntime_pybind11_state"))
    assert bases[0] == bases[1]
    assert bases[2] == bases[3]
    assert bases[0] != bases[2]


def test_what_workers_of_one_launch_load_lies_elsewhere_in_each(
    begin: Callable[..., Worker], artifact: Artifact
) -> None:
    lowest = set()
    for name in ("one", "two", "three"):
        pid = begin(name, artifact).pid
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        lowest.add(next(line.split("-")[0] for line in lines if line.startswith("7")))
    assert len(lowest) > 1


def test_the_nursery_has_no_thread_but_the_first_when_it_has_forked(
    begin: Callable[..., Worker], nurseries: Nurseries, notes: list[str], artifact: Artifact
) -> None:
    begin("one", artifact, ExecutionSpec(threads=2))
    (pid,) = processes_of(nurseries)
    assert psutil.Process(pid).num_threads() == 1
    assert notes == []


def test_threads_and_affinity_are_those_of_the_spec_and_other_specs_have_another_nursery(
    begin: Callable[..., Worker], nurseries: Nurseries, tmp_path: Path, artifact: Artifact
) -> None:
    cpu = max(os.sched_getaffinity(0))
    pinned = nurseries("pinned", ExecutionSpec(threads=2, affinity=(cpu,)), tmp_path / "pinned.log")
    with pinned:
        environment = pinned.load(artifact)["environment"]
    assert (environment["affinity"], environment["OMP_NUM_THREADS"]) == ([cpu], "2")
    begin("free", artifact)
    assert len(processes_of(nurseries)) == 2


def test_each_worker_writes_to_its_own_log(begin: Callable[..., Worker], artifact: Artifact, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with pytest.raises(StageError, match="vocab_sized"):
            begin(name, artifact).ask("block", **block(), vocab_sized=name)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert {name: text.count("Traceback") for name, text in logs.items() if text} == {"one.log": 1, "two.log": 1}


def test_a_crash_is_told_with_its_signal_and_log_and_disturbs_no_sibling(
    begin: Callable[..., Worker], artifact: Artifact
) -> None:
    first, second = begin("first", artifact), begin("second", artifact)
    os.kill(first.pid, signal.SIGSEGV)
    with pytest.raises(WorkerDiedError, match=r"first was ended by SIGSEGV during `block`") as caught:
        first.ask("block", **block())
    assert "Fatal Python error: Segmentation fault" in str(caught.value)
    assert second.ask("block", **block())["seconds"]
    assert begin("third", artifact).ask("block", **block())["seconds"]


def test_a_killed_worker_is_told_to_be_out_of_memory_perhaps(begin: Callable[..., Worker], artifact: Artifact) -> None:
    worker = begin("one", artifact)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"one was ended by SIGKILL \(often: out of memory\) during `block`"):
        worker.ask("block", **block())


def test_closing_ends_the_worker_and_what_it_started(begin: Callable[..., Worker], artifact: Artifact) -> None:
    worker = begin("one", artifact)
    worker.close()
    worker.close()
    assert not psutil.pid_exists(worker.pid)


def test_a_worker_that_was_never_prepared_closes(nurseries: Nurseries, tmp_path: Path) -> None:
    nurseries("one", ExecutionSpec(), tmp_path / "log").close()
    assert processes_of(nurseries) == []


def test_a_nursery_that_is_gone_leaves_its_workers_and_fails_the_next_with_the_reason(
    begin: Callable[..., Worker], nurseries: Nurseries, artifact: Artifact
) -> None:
    worker = begin("one", artifact)
    (pid,) = processes_of(nurseries)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StageError, match=r"imports libraries for onnx was ended by SIGKILL .* during `fork`"):
        begin("two", artifact)
    assert worker.ask("block", **block())["seconds"]
    nurseries.close()
    assert not psutil.pid_exists(pid)


def test_a_nursery_that_ends_while_it_imports_fails_its_stages_with_the_reason_and_its_log(
    nurseries: Nurseries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Artifact
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    for name in ("one", "two"):
        with (
            nurseries(name, ExecutionSpec(), tmp_path / f"{name}.log") as worker,
            pytest.raises(StageError, match=r"(?s)ended with exit status 7 during `import`.*out of luck"),
        ):
            worker.load(artifact)


def test_workers_and_nurseries_die_with_the_process_that_began_them(tmp_path: Path, artifact: Artifact) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(artifact.manifest.model_dump_json())
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.artifact import Artifact, Manifest\n"
        "from pipeline.measure.nurseries import Nurseries\n"
        "from pipeline.runtime import ExecutionSpec\n"
        f"manifest = Manifest.model_validate_json(Path({str(manifest)!r}).read_text())\n"
        f"artifact = Artifact(manifest, Path({str(artifact.blobs)!r}))\n"
        "nurseries = Nurseries()\n"
        f"workers = [nurseries(name, ExecutionSpec(), Path({str(tmp_path)!r}, name)) for name in 'ab']\n"
        "for worker in workers:\n"
        "    worker.load(artifact)\n"
        "print([w.pid for w in workers] + [n.pid for n in nurseries.running], flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = json.loads(parent.stdout.readline())
    assert len(pids) == 3
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.communicate()
    assert all(ended(pid) for pid in pids)


def test_orphans_are_adopted_only_as_long_as_one_is_forked(begin: Callable[..., Worker], artifact: Artifact) -> None:
    code = "import os, time\nif os.fork(): os._exit(0)\nos.close(1)\nos.setsid()\ntime.sleep(60)"
    begin("one", artifact)
    before = {child.pid for child in psutil.Process().children()}
    subprocess.run([sys.executable, "-c", code + "  # not adopted"], check=True)
    orphans = [p for p in psutil.process_iter(["cmdline"]) if code + "  # not adopted" in (p.info["cmdline"] or ())]
    for orphan in orphans:
        orphan.kill()
    assert len(orphans) == 1
    assert {child.pid for child in psutil.Process().children()} <= before
    with adopting_orphans():
        subprocess.run([sys.executable, "-c", code], check=True)
        (adopted,) = [child for child in psutil.Process().children() if child.pid not in before]
    adopted.kill()
    adopted.wait()


STRANGE_RUNNERS = """
import threading
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner

class Threaded(OnnxRuntimeRunner):
    @staticmethod
    def import_libraries(artifact):
        OnnxRuntimeRunner.import_libraries(artifact)
        threading.Thread(target=threading.Event().wait, daemon=True).start()

class Silent(OnnxRuntimeRunner):
    import_libraries = None
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with runners that workers find."""
    metadata = tmp_path / "plugin" / "strange-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    entry_points = "[pipeline.runners]\nThreaded = strange:Threaded\nSilent = strange:Silent\n"
    (metadata / "entry_points.txt").write_text(entry_points)
    (metadata.parent / "strange.py").write_text(STRANGE_RUNNERS)
    monkeypatch.setenv("PYTHONPATH", str(metadata.parent))


@pytest.mark.parametrize(
    ("format", "reason"),
    [("Threaded", "importing for Threaded starts a thread"), ("Silent", "the runner of Silent does not say what")],
)
@pytest.mark.usefixtures("stranger")
def test_a_runner_that_cannot_be_forked_has_workers_begun_by_exec(
    format: str, reason: str, begin: Callable[..., Worker], notes: list[str], artifact: Artifact
) -> None:
    strange = Artifact(artifact.manifest.model_copy(update={"format": format}), artifact.blobs)
    worker = begin("one", strange)
    assert worker.ask("block", **block())["seconds"]
    assert "pipeline.measure.worker" in psutil.Process(worker.pid).cmdline()
    (note,) = notes
    assert reason in note


def test_a_gpu_is_used_by_processes_begun_by_exec(nurseries: Nurseries, tmp_path: Path, artifact: Artifact) -> None:
    spec = ExecutionSpec(device="cuda", provider="CUDAExecutionProvider")
    with nurseries("one", spec, tmp_path / "log") as worker:
        worker.prepare(artifact)
        process = psutil.Process(worker.pid)
        command = next(filter(None, iter(process.cmdline, None)))  # a process has none in the moment of its exec
        assert "pipeline.measure.worker" in command
    assert processes_of(nurseries) == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_fork_takes_the_memory_of_a_process_begun_by_exec(
    format: str, begin: Callable[..., Worker], tmp_path: Path, artifact: Artifact
) -> None:
    if format == "torch":
        artifact = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    with Worker("executed", ExecutionSpec(), tmp_path / "log") as executed:
        executed.load(artifact)
        peaks = []
        for worker in (executed, begin("forked", artifact)):
            with MemorySampler(worker.pid) as memory:
                worker.ask("block", **block())
            peaks.append(memory.peak_memory_bytes)
    assert peaks[0] > 20 * 2**20
    assert peaks[1] == pytest.approx(peaks[0], abs=TOLERATED_BYTES)
