"""What makes artifacts worth keeping: the runs whose reports tell of them, and pins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from pipeline.artifact import Frozen
from pipeline.files import write_atomically
from pipeline.store.store import Store


class Run(Frozen):
    """A finished run."""

    folder: str = Field(description="absolute; a run whose folder is gone keeps nothing")
    recipe: str
    created: str = Field(description="UTC, ISO 8601")
    artifacts: dict[str, str] = Field(description="digests by stage")

    @property
    def exists(self) -> bool:
        """Whether its folder is there, or still has the name that it has until the run is complete."""
        folder = Path(self.folder)
        return folder.with_name(f".{folder.name}").is_dir() or folder.is_dir()


class Pin(Frozen):
    """An artifact that somebody wants to keep."""

    artifact: str
    note: str = ""
    created: str = Field(description="UTC, ISO 8601")


def register_run(store: Store, folder: Path, recipe: str, artifacts: Mapping[str, str]) -> None:
    """Have the store keep `artifacts` (digests by stage) for as long as the run's `folder` exists."""
    run = Run(folder=str(folder.absolute()), recipe=recipe, created=_now(), artifacts=dict(artifacts))
    write_atomically(_run_path(store, run), run.model_dump_json(indent=1).encode())


def runs(store: Store) -> list[Run]:
    """The registered runs, the newest first, those whose folders are gone among them."""
    found = [r for path in (store.root / "runs").glob("*.json") if (r := _read(path, Run)) is not None]
    return sorted(found, key=lambda run: run.created, reverse=True)


def forget_run(store: Store, run: Run) -> None:
    _run_path(store, run).unlink(missing_ok=True)


def pin(store: Store, artifact: str, note: str = "") -> None:
    """Keep the artifact until it is unpinned."""
    made = Pin(artifact=artifact, note=note, created=_now())
    write_atomically(_pin_path(store, artifact), made.model_dump_json(indent=1).encode())


def unpin(store: Store, artifact: str) -> bool:
    """False where it was not pinned."""
    path = _pin_path(store, artifact)
    was = path.exists()
    path.unlink(missing_ok=True)
    return was


def pins(store: Store) -> dict[str, Pin]:
    """By digest of the artifact. A pin that cannot be read still pins: its name says what."""
    found = {}
    for path in (store.root / "pins").glob("*.json"):
        found[path.stem] = _read(path, Pin) or Pin(artifact=path.stem, note="damaged", created="")
    return found


Model = TypeVar("Model", bound=Frozen)


def _read(path: Path, model: type[Model]) -> Model | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):  # removed meanwhile; damaged
        return None


def _run_path(store: Store, run: Run) -> Path:
    return store.root / "runs" / f"{hashlib.sha256(run.folder.encode()).hexdigest()[:32]}.json"


def _pin_path(store: Store, artifact: str) -> Path:
    return store.root / "pins" / f"{artifact}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
