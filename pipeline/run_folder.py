"""The folder of a run, or of a comparison: it has its name only when all that belongs to it is there."""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pipeline.report.folder import LATEST


def new_id() -> str:
    """A name that sorts by time and that no other run has: UTC, then four random digits."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunFolder:
    """A run's folder in the making; it gets its name, and `latest` points to it, when the run is complete.

    Whatever ends it before that leaves nothing behind.
    """

    def __init__(self, runs: Path, name: str) -> None:
        self.id = new_id()
        self._home = runs / name
        self.path = self._home / f".{self.id}"
        self.finished = self._home / self.id
        self._made = [folder for folder in (self._home, runs) if not folder.exists()]

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # not empty: another run is in it by now
                for folder in self._made:
                    folder.rmdir()
            return
        self.path.rename(self.finished)
        link = self._home / f".latest.{self.id}"
        link.symlink_to(self.id)
        link.replace(self._home / LATEST)
