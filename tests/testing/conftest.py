"""Passes that break one promise each, passes that keep all, and models scored without processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError, StageError
from pipeline.measure.worker import Session
from pipeline.runtime import ExecutionSpec
from pipeline.testing import Findings, check_pass

CARELESS = '''
"""Passes that keep all promises but one; the first keeps all."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pipeline import Artifact, FileEntry, Pass, PassParams, Field, PipelineError


def noted(artifact, context, text="", **execution):
    """The artifact with a note beside it, and with that in its execution block."""
    entry = context.output.file("note.txt", text.encode())
    manifest = artifact.manifest
    files = {**manifest.files, "note.txt": entry}
    update = {"files": files, "execution": {**manifest.execution, "noted": True, **execution}}
    return Artifact(manifest.model_copy(update=update), artifact.blobs)


class Base(Pass):
    """Put a note beside a model."""

    accepts, produces = frozenset({"torch"}), "torch"

    class Params(PassParams):
        text: str = Field("a note", description="what it says")

    def run(self, artifact, params, context):
        return noted(artifact, context, params.text)


class Careful(Base):
    """Keep all promises, with parameters of all kinds, a file and the seed among them."""

    name = "careful"
    depends_on = ("seed",)

    class Params(PassParams):
        text: str = "a note"
        level: int = Field(2, ge=1, le=2)
        share: float = Field(0.5, gt=0, lt=1)
        names: list[str] = []
        table: dict[str, int] = {}
        loud: bool | None = None
        file: Path | None = None

    def run(self, artifact, params, context):
        text = params.text if params.file is None else params.file.read_text()
        with context.output.scratch() as folder:
            (folder / "draft").write_text(text)
            text = (folder / "draft").read_text()
        own = Path(__file__).read_text()[:3]
        return noted(artifact, context, text + own, seed=context.seed, level=params.level)


class Shouts(Base):
    """Take a file that it has to be told of."""

    name = "shouts"

    class Params(PassParams):
        file: Path

    def run(self, artifact, params, context):
        return noted(artifact, context, params.file.read_text().upper())


class Returns(Base):
    """Return nothing."""

    name = "returns_nothing"

    def run(self, artifact, params, context):
        noted(artifact, context)


class Endless(Base):
    """Never end."""

    name = "endless"

    def run(self, artifact, params, context):
        while True:
            time.sleep(0.01)


class Exotic(Base):
    """Yield what nothing here can load."""

    name = "exotic"
    produces = "abacus"


class Picky(Base):
    """Take what nothing here yields."""

    name = "picky"
    accepts = frozenset({"torch", "papyrus"})


class Moonstruck(Base):
    """Depend on what no context has."""

    name = "moonstruck"
    depends_on = ("moon.phase",)


class Opaque(Base):
    """Have a parameter that JSON cannot hold."""

    name = "opaque"

    class Params(PassParams):
        how: Any = object()


class Hidden(Base):
    """Have a parameter that the key does not see."""

    name = "hidden"

    class Params(PassParams):
        text: str = Field("a note", exclude=True)


class Scribbler(Base):
    """Write into the model that it reads."""

    name = "scribbler"

    def run(self, artifact, params, context):
        with artifact.file("model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        return noted(artifact, context)


class Litterer(Base):
    """Leave a file beside its own source."""

    name = "litterer"

    def run(self, artifact, params, context):
        Path(__file__).with_name("litter.txt").write_text("mine")
        return noted(artifact, context)


class Homesick(Base):
    """Read settings from the user's home folder."""

    name = "homesick"

    def run(self, artifact, params, context):
        try:
            text = (Path.home() / ".careless").read_text()
        except FileNotFoundError:
            text = ""
        return noted(artifact, context, text)


class Moody(Base):
    """Do as the environment says."""

    name = "moody"

    def run(self, artifact, params, context):
        return noted(artifact, context, os.environ.get("CARELESS_MOOD", "calm"))


class Nosy(Base):
    """Read the seed without saying so, and go on where that is refused."""

    name = "nosy"

    def run(self, artifact, params, context):
        try:
            text = str(context.seed)
        except PipelineError:
            text = ""
        return noted(artifact, context, text)


class Dicey(Base):
    """Draw lots."""

    name = "dicey"

    def run(self, artifact, params, context):
        return noted(artifact, context, os.urandom(8).hex())


class Frank(Dicey):
    """Draw lots, and say so."""

    name = "frank"
    deterministic = False


class Unordered(Base):
    """Go through a set of names in whatever order."""

    name = "unordered"

    def run(self, artifact, params, context):
        return noted(artifact, context, " ".join({f"name{i}" for i in range(20)}))


class Braggart(Base):
    """Tell of what it did not do."""

    name = "braggart"

    def run(self, artifact, params, context):
        context.count_rule("fuse_everything", 5, 5)
        return artifact


class Idle(Base):
    """Do nothing."""

    name = "idle"

    def run(self, artifact, params, context):
        return artifact


class Clumsy(Base):
    """Take any model for a language model with a head."""

    name = "clumsy"

    def run(self, artifact, params, context):
        return noted(artifact, context, str(artifact.tensor("lm_head.weight").shape))


class Coarse(Base):
    """Round all weights without saying how much that may cost."""

    name = "coarse"

    def run(self, artifact, params, context):
        import numpy as np
        from safetensors.numpy import save

        component = artifact.component
        arrays = {name: (np.round(artifact.tensor(name) * 8) / 8) for name in component.tensors}
        data = save(arrays)
        entry = context.output.file("model.safetensors", data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        tensors = {
            name: ref.model_copy(update={"offset": 8 + length + header[name]["data_offsets"][0]})
            for name, ref in component.tensors.items()
        }
        part = component.model_copy(update={"files": {"model.safetensors": entry}, "tensors": tensors})
        return Artifact(artifact.manifest.model_copy(update={"components": {"model": part}}), artifact.blobs)


class Stumbling(Base):
    """Stumble in the plan over a model in another format."""

    name = "stumbling"

    @classmethod
    def check_stages(cls, parent, inputs):
        {"torch": True}[parent.format]


class Shortsighted(Base):
    """Foresee nothing, and fail at it."""

    name = "shortsighted"
    libraries = ("a-library-that-nobody-has",)

    @classmethod
    def predict(cls, params, model):
        raise ZeroDivisionError("no idea")
'''

IMPRESSIONABLE = '''
"""A pass that does as the environment said when it was imported."""

from os import environ

from pipeline import Artifact, Pass

MOOD = environ.get("IMPRESSIONABLE_MOOD", "calm")


class Impressionable(Pass):
    """Put a mood into the execution block."""

    name = "impressionable"
    accepts, produces = frozenset({"torch"}), "torch"

    def run(self, artifact, params, context):
        execution = {**artifact.manifest.execution, "mood": MOOD}
        return Artifact(artifact.manifest.model_copy(update={"execution": execution}), artifact.blobs)
'''

NAMES = {
    "careful": "Careful",
    "shouts": "Shouts",
    "returns_nothing": "Returns",
    "endless": "Endless",
    "exotic": "Exotic",
    "picky": "Picky",
    "moonstruck": "Moonstruck",
    "opaque": "Opaque",
    "hidden": "Hidden",
    "scribbler": "Scribbler",
    "litterer": "Litterer",
    "homesick": "Homesick",
    "moody": "Moody",
    "nosy": "Nosy",
    "dicey": "Dicey",
    "frank": "Frank",
    "unordered": "Unordered",
    "braggart": "Braggart",
    "idle": "Idle",
    "clumsy": "Clumsy",
    "coarse": "Coarse",
    "stumbling": "Stumbling",
    "shortsighted": "Shortsighted",
}


class InProcess:
    """A worker without a process."""

    def __init__(self, name: str, spec: ExecutionSpec, log: Path) -> None:
        self.pid = 0
        self._spec = spec
        self._session = Session()

    def prepare(self, artifact: Artifact) -> None:
        pass

    def wait_until_prepared(self) -> None:
        pass

    def forget_compiled(self, artifact: Artifact) -> None:
        pass

    def load(self, artifact: Artifact) -> dict[str, Any]:
        manifest = artifact.manifest.model_dump(mode="json")
        return self.ask("load", manifest=manifest, blobs=str(artifact.blobs), spec=self._spec.model_dump())

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        try:
            return self._session.answer({"request": request, **fields})
        except PipelineError as error:
            raise StageError(error.message) from error

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def careless_folder(tmp_path_factory: pytest.TempPathFactory, install: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("careless")
    install(folder, "careless", CARELESS, {name: f"careless:{cls}" for name, cls in NAMES.items()})
    install(folder, "impressionable", IMPRESSIONABLE, {"impressionable": "impressionable:Impressionable"})
    return folder


@pytest.fixture
def careless(careless_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """These passes, installed for this process and for the workers that it starts."""
    monkeypatch.syspath_prepend(str(careless_folder))
    monkeypatch.setenv("PYTHONPATH", str(careless_folder))
    return careless_folder


@pytest.fixture(scope="session")
def workspace(make_once: Callable[..., Path]) -> Path:
    """What comes before passes, made once for all test processes. Nobody may harm the model in it."""
    return make_once("conformance", lambda folder: None)


@pytest.fixture
def check(workspace: Path) -> Callable[..., Findings]:
    """`check_pass` in the shared workspace, whose models are scored in this process."""

    def checked(*given: Any, **options: Any) -> Findings:
        return check_pass(*given, **{"workspace": workspace, "start_worker": InProcess, **options})

    return checked
