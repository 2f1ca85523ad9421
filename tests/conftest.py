"""A model folder without a model, a store of one's own, and a package of passes that a stranger could have written."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

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
