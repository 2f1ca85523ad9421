"""The parent's side of a worker: start it, ask it, and be sure that it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from pipeline.artifact import Artifact
from pipeline.errors import StageError
from pipeline.parent import worker_environment
from pipeline.runtime import ExecutionSpec

LOG_LINES = 12
"""Last lines of the log that a failure shows."""


@dataclass(frozen=True)
class StageToMeasure:
    """A stage's name, its artifact, and how to load it."""

    name: str
    artifact: Artifact
    spec: ExecutionSpec
    memory_bytes: int | None = None
    """What running it takes at its most, where that was estimated before."""


class Process(Protocol):
    """What a worker needs of its process; a Popen is one."""

    @property
    def pid(self) -> int: ...
    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    @property
    def returncode(self) -> int | Any: ...  # None until it was waited for
    def wait(self) -> int: ...


class WorkerDiedError(StageError):
    """The process ended without an answer."""


class LoadError(StageError):
    """The model does not load: that is its stage's failure, and not the measurement's."""


class Worker:
    """A process that loads one artifact and runs it; a context manager that leaves none behind.

    It has a session of its own, so that Ctrl-C reaches only the parent, and the kernel ends it when the parent ends.
    """

    def __init__(self, name: str, spec: ExecutionSpec, log: Path) -> None:
        self.name = name
        self.log = log
        self._spec = spec
        self._preparing = False
        self._process: Process | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self._log_start = sink.tell()
        self._begin()

    def _begin(self) -> None:
        """Start the process, where it does not wait to be prepared."""
        self._process = self._execute()

    def _execute(self) -> Process:
        with self.log.open("ab") as sink:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.measure.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=worker_environment(self._spec.threads),
                start_new_session=True,
            )

    @property
    def process(self) -> Process:
        assert self._process is not None, "the process has not been started: prepare it"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def prepare(self, artifact: Artifact) -> None:
        """Have the process import what the artifact needs. Returns at once, so that several can do so together.

        Whether it went well is the next answer's to tell.
        """
        self._send("prepare", description(artifact, self._spec))
        self._preparing = True

    def wait_until_prepared(self) -> None:
        """Wait for what `prepare` began.

        Raises: StageError where a library is missing; WorkerDiedError where the process ends.
        """
        if self._preparing:
            self._preparing = False
            self._receive("prepare")

    def load(self, artifact: Artifact) -> dict[str, Any]:
        """Load the artifact: load_s (imports not counted), vocab_size, max_length, environment.

        Raises: StageError where a library is missing; LoadError where the model does not load, or its process ends.
        """
        self.wait_until_prepared()
        try:
            return self.ask("load", **description(artifact, self._spec))
        except StageError as error:
            raise self._load_error(error) from None

    def _load_error(self, error: StageError) -> LoadError:
        reason = error.message.removeprefix(f"{self.name}: ")
        return LoadError(f"its model does not load: {reason}", hint=error.hint)

    def forget_compiled(self, artifact: Artifact) -> None:
        """Drop what earlier processes compiled of the artifact, so that loading it is cold.

        Raises: StageError where it cannot be dropped; WorkerDiedError where the process ends.
        """
        self.ask("forget_compiled", **description(artifact, self._spec))

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises: StageError with the worker's reason where it refuses; WorkerDiedError where it ends first.
        """
        self.wait_until_prepared()
        self._send(request, fields)
        return self._receive(request)

    def _send(self, request: str, fields: dict[str, Any]) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it is dead, which reading its answer will tell
            stdin.write(json.dumps({"request": request, **fields}).encode() + b"\n")
            stdin.flush()

    def _receive(self, request: str) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death(request)
        answer = json.loads(line)
        if "ok" in answer:
            result: dict[str, Any] = answer["ok"]
            return result
        raise StageError(f"{self.name}: {answer['error']['message']}", hint=answer["error"]["hint"])

    def close(self) -> None:
        """End the process and those that it started. Safe to call again."""
        if self._process is None:
            return
        if self._process.returncode is None:  # not waited for yet, so the number is still its own
            kill_group(self._process.pid)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _death(self, request: str) -> WorkerDiedError:
        how = how_it_ended(self.process.wait())
        with suppress(ProcessLookupError):  # those that it started
            os.killpg(self.process.pid, signal.SIGKILL)
        hint = last_lines(self.log, self._log_start)
        return WorkerDiedError(f"the process of {self.name} {how} during `{request}`", hint=hint)


def description(artifact: Artifact, spec: ExecutionSpec) -> dict[str, Any]:
    """What requests say of an artifact and how it is run."""
    return {
        "manifest": artifact.manifest.model_dump(mode="json"),
        "blobs": str(artifact.blobs.absolute()),
        "spec": spec.model_dump(mode="json"),
    }


def kill_group(pid: int) -> None:
    """Kill a process that was not waited for yet, and those that it started, where it has a session of its own."""
    for kill in (os.killpg, os.kill):  # a fork that has just begun has no session yet
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """An exit status, or a signal's number below zero, in words."""
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")


def last_lines(log: Path, start: int) -> str:
    """The end of a log, of what was written after `start`."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()[-LOG_LINES:]
    name = f"{log.parent.name}/{log.name}"  # the run's folder has another name when it is complete
    return "\n  ".join([f"last lines of {name}:", *lines]) if lines else f"{name} is empty"


class WorkerProcess(Protocol):
    """What the schedule needs of a worker; `Worker` is one."""

    @property
    def pid(self) -> int: ...
    def prepare(self, artifact: Artifact) -> None: ...
    def wait_until_prepared(self) -> None: ...
    def load(self, artifact: Artifact) -> dict[str, Any]: ...
    def forget_compiled(self, artifact: Artifact) -> None: ...
    def ask(self, request: str, **fields: Any) -> dict[str, Any]: ...
    def close(self) -> None: ...


StartWorker = Callable[[str, ExecutionSpec, Path], WorkerProcess]
