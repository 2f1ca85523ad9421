"""A model folder without a model, a store of one's own, and a package of passes that a stranger could have written.

And what takes long and is the same for all tests, made once for all test processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

from pipeline.hardware import describe_host
from pipeline.hardware.probe import probe, probe_folder
from pipeline.recipe import load_recipe
from pipeline.report.schema import Report
from pipeline.run import RunResult, run
from pipeline.runtime import compile_cache
from pipeline.store import Store

# Two test processes share two cores: threads that spin while they wait for each other would take them from the other's.
# Read when the library loads, which no test module does before this one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

settings.register_profile("patient", deadline=None)  # a busy machine makes no test wrong
settings.load_profile("patient")

PASSES = '''
"""Passes that do little, and passes that misbehave."""

import os
import signal
from pathlib import Path

from pipeline import Field, Pass, PassParams, PipelineError


class Base(Pass):
    """Does something to a torch artifact."""

    accepts, produces = frozenset({"torch"}), "torch"


class Mark(Base):
    """Put a mark into the execution block."""

    name = "mark"

    class Params(PassParams):
        value: int = Field(1, ge=0, le=9, description="the mark")

    def run(self, artifact, params, context):
        context.progress(0.5, "half")
        print("marking with", params.value)
        manifest = artifact.manifest
        execution = {**manifest.execution, "mark": params.value}
        return type(artifact)(manifest.model_copy(update={"execution": execution}), artifact.blobs)


class Write(Base):
    """Write a file of some size."""

    name = "write"

    class Params(PassParams):
        text: str = "x"

    def run(self, artifact, params, context):
        entry = context.output.file("note.txt", params.text.encode())
        files = {**artifact.manifest.files, "note.txt": entry}
        return type(artifact)(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)


class Same(Base):
    """Change nothing."""

    name = "same"

    def run(self, artifact, params, context):
        return artifact


class Refuse(Base):
    """Refuse politely."""

    name = "refuse"

    def run(self, artifact, params, context):
        raise PipelineError("this model has no such layer", hint="try another")


class Crash(Base):
    """Raise what no one expected."""

    name = "crash"

    def run(self, artifact, params, context):
        raise ZeroDivisionError("one over nothing")


class Segfault(Base):
    """Die as C code dies."""

    name = "segfault"

    def run(self, artifact, params, context):
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)


class Hang(Base):
    """Write a blob and wait until killed."""

    name = "hang"

    class Params(PassParams):
        flag: str = ""

    def run(self, artifact, params, context):
        context.output.file("half", b"half written")
        Path(params.flag).write_text(str(os.getpid()))
        signal.pause()


class Nothing(Base):
    """Return nothing."""

    name = "nothing"

    def run(self, artifact, params, context):
        return None


class WrongFormat(Base):
    """Promise onnx and yield torch."""

    name = "wrong_format"
    produces = "onnx"

    def run(self, artifact, params, context):
        return artifact


class Peek(Base):
    """Read a facet that was not declared."""

    name = "peek"

    def run(self, artifact, params, context):
        return context.seed


class Seeded(Base):
    """Depend on the seed."""

    name = "seeded"
    depends_on = ("seed", "profile.memory_bytes")

    def run(self, artifact, params, context):
        manifest = artifact.manifest
        execution = {**manifest.execution, "seed": context.seed, "memory": context.facet("profile.memory_bytes")}
        return type(artifact)(manifest.model_copy(update={"execution": execution}), artifact.blobs)


class OnnxOnly(Base):
    """Take onnx."""

    name = "onnx_only"
    accepts, produces = frozenset({"onnx"}), "onnx"

    def run(self, artifact, params, context):
        return artifact


class NeedsGpu(Base):
    """Need a GPU."""

    name = "needs_gpu"
    from pipeline import Requires

    requires = Requires(device="cuda")

    def run(self, artifact, params, context):
        return artifact


class Reads(Base):
    """Read a file that a parameter names."""

    name = "reads"

    class Params(PassParams):
        file: Path

    def run(self, artifact, params, context):
        manifest = artifact.manifest
        execution = {**manifest.execution, "read": params.file.read_text()}
        return type(artifact)(manifest.model_copy(update={"execution": execution}), artifact.blobs)


class ReadsMany(Base):
    """Read files that a parameter lists."""

    name = "reads_many"

    class Params(PassParams):
        files: list[Path]

    def run(self, artifact, params, context):
        manifest = artifact.manifest
        execution = {**manifest.execution, "read": [f.read_text() for f in params.files]}
        return type(artifact)(manifest.model_copy(update={"execution": execution}), artifact.blobs)


class Phantom(Base):
    """Name a blob that was never written."""

    name = "phantom"

    def run(self, artifact, params, context):
        from pipeline import FileEntry

        files = {**artifact.manifest.files, "ghost": FileEntry(digest="0" * 64, size_bytes=3)}
        return type(artifact)(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)


class Orphan(Base):
    """Die and leave a child that holds the pipe open."""

    name = "orphan"

    def run(self, artifact, params, context):
        if os.fork() == 0:
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)


class BadOnnx(Base):
    """Yield an ONNX artifact whose graph is garbage."""

    name = "bad_onnx"
    produces = "onnx"

    def run(self, artifact, params, context):
        from pipeline import Component

        entry = context.output.file("model.onnx", b"no protobuf")
        part = Component(format="onnx", files={"model.onnx": entry})
        update = {"format": "onnx", "components": {"model": part}}
        return type(artifact)(artifact.manifest.model_copy(update=update), artifact.blobs)


class Combine(Base):
    """Read a further stage."""

    name = "combine"

    def run(self, artifact, params, context):
        manifest = artifact.manifest
        execution = {**manifest.execution, "other": context.inputs["other"].manifest.execution}
        return type(artifact)(manifest.model_copy(update={"execution": execution}), artifact.blobs)
'''

CLASSES = {
    "mark": "Mark",
    "write": "Write",
    "same": "Same",
    "refuse": "Refuse",
    "crash": "Crash",
    "segfault": "Segfault",
    "hang": "Hang",
    "nothing": "Nothing",
    "wrong_format": "WrongFormat",
    "peek": "Peek",
    "seeded": "Seeded",
    "onnx_only": "OnnxOnly",
    "needs_gpu": "NeedsGpu",
    "reads": "Reads",
    "reads_many": "ReadsMany",
    "phantom": "Phantom",
    "orphan": "Orphan",
    "bad_onnx": "BadOnnx",
    "combine": "Combine",
}


def install_plugin(folder: Path, package: str, source: str, entry_points: dict[str, str]) -> None:
    """Make an installed distribution out of one module: what pip leaves behind, without pip."""
    (folder / f"{package}.py").write_text(textwrap.dedent(source))
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pipeline.passes]", *lines, ""]))


@pytest.fixture(scope="session")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    points = {name: f"sample_passes:{cls}" for name, cls in CLASSES.items()}
    install_plugin(folder, "sample_passes", PASSES, points)
    return folder


@pytest.fixture
def plugins(plugin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sample passes, installed for this process and for the workers that it starts."""
    monkeypatch.syspath_prepend(str(plugin_folder))
    monkeypatch.setenv("PYTHONPATH", str(plugin_folder))
    yield plugin_folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a model: a config and safetensors. No runner could load it; no test here asks one to."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": 8,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def install() -> Callable[..., None]:
    """`install_plugin`, for tests that write passes of their own."""
    return install_plugin


# Made once for all test processes

MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Make a folder of that name, or wait until another test process has made it; nobody may change it afterwards."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not (shared / f"{name}.made").exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                make(folder)
                (shared / f"{name}.made").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def probed_store(make_once: MakeOnce) -> Callable[[Path], Store]:
    """A store in a folder where none is, in which this machine was measured before, as it is for all runs but one."""
    known = make_once("probe", lambda folder: probe(describe_host(), folder))

    def made(root: Path) -> Store:
        shutil.copytree(known, probe_folder(root))
        return Store(root)

    return made


@pytest.fixture(scope="session")
def put_toolchain(make_once: MakeOnce) -> Callable[[Path], None]:
    """Put into a store, in which nothing was compiled, what torch found out about the C++ compiler."""

    def prepare(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_WARM_POOL"):  # preparing sets them: put back afterwards
                patch.setenv(name, "")
            compile_cache.prepare_toolchain(compile_cache.private_folder(folder / "compiled"))

    known = make_once("toolchain", prepare)

    def put(root: Path) -> None:
        shutil.copytree(known / "compiled", root / "compiled")

    return put


@pytest.fixture(scope="session")
def briefly() -> Callable[[pytest.MonkeyPatch], None]:
    """Have runs measure for a moment: shorter blocks, and the host's bandwidth from memory that is quickly filled.

    What is measured, by whom and in which order stays what it is. For tests that ask for no more of a figure than that
    it is there.
    """

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.measure.rounds.BLOCK_S", 0.05)
        monkeypatch.setattr("pipeline.hardware.probe._buffer_bytes", lambda host: 64 * 2**20)

    return patch


@pytest.fixture
def measured_briefly(briefly: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    briefly(monkeypatch)


@pytest.fixture(scope="session")
def run_once(make_once: MakeOnce) -> Callable[[str, Callable[[Path], RunResult]], tuple[RunResult, Path]]:
    """(a run that is done once for all test processes, the folder that it was done in)."""

    def done(name: str, do: Callable[[Path], RunResult]) -> tuple[RunResult, Path]:
        def make(place: Path) -> None:
            result = do(place)
            ended = {"folder": str(result.folder), "exit_code": result.exit_code}
            (place / "ended.json").write_text(json.dumps(ended))

        place = make_once(name, make)
        ended = json.loads((place / "ended.json").read_text())
        folder = Path(ended["folder"])
        report = Report.model_validate_json((folder / "report.json").read_bytes())
        return RunResult(report=report, folder=folder, exit_code=ended["exit_code"]), place

    return done


class MainJob(NamedTuple):
    """A run of the shipped recipe, its store, and what else the recipe was told."""

    result: RunResult
    store: Store
    overrides: list[str]


MAIN_JOB = [
    "hardware=local",
    "evaluate.budget_s=1",
    "evaluate.quality.tokens=2000",
    "evaluate.workload.prompt_lengths=[16]",
    "evaluate.workload.new_tokens=8",
]
"""Not for its speed: quality on less of the text, and the fewest rounds over little work."""


@pytest.fixture(scope="session")
def main_job(
    run_once: Callable[..., tuple[RunResult, Path]],
    briefly: Callable[[pytest.MonkeyPatch], None],
    probed_store: Callable[[Path], Store],
    put_toolchain: Callable[[Path], None],
) -> MainJob:
    """The shipped recipe, run in a store without artifacts, in which tests may run it again."""

    def do(place: Path) -> RunResult:
        store = probed_store(place / "store")
        put_toolchain(store.root)
        with pytest.MonkeyPatch.context() as patch:
            briefly(patch)
            return run(load_recipe("llama2-cpu", MAIN_JOB), store=store, runs=place / "runs")

    result, place = run_once("main-job", do)
    return MainJob(result, Store(place / "store"), MAIN_JOB)
