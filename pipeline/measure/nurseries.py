"""The parent's side of nurseries: workers forked from a process that has imported their libraries once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.artifact import Artifact
from pipeline.errors import StageError
from pipeline.measure.process import Worker, WorkerDiedError, description, how_it_ended, kill_group, last_lines
from pipeline.parent import adopting_orphans, worker_environment
from pipeline.runtime import ExecutionSpec

CPU = ("cpu", "CPUExecutionProvider")


class Nursery:
    """A process that imports what an artifact's runner needs, and from which workers are forked."""

    def __init__(self, artifact: Artifact, spec: ExecutionSpec, log: Path, note: Callable[[str], None]) -> None:
        self.format = artifact.format
        self.log = log
        self._note = note
        self._fit = True
        self._importing = True
        self._waiting: list[Callable[[], None]] = []
        ours, theirs = socket.socketpair()
        self._channel, self._answers = ours, ours.makefile("rb")
        with theirs, log.open("ab") as sink:
            self._log_start = sink.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.measure.nursery"],
                stdin=theirs.fileno(),
                stdout=sink,
                stderr=sink,
                env=worker_environment(spec.threads),
                start_new_session=True,
            )
        plain = artifact.manifest.model_copy(update={"execution": {}})  # what compiles one is not the others' to hold
        self._send("import", description(Artifact(plain, artifact.blobs), spec))

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_fit(self) -> bool:
        """Whether workers can be forked from it; waits until it has imported.

        Raises: WorkerDiedError where the process ends.
        """
        if self._importing:
            unfit = self._receive("import")["unfit"]
            self._importing, self._fit = False, unfit is None
            if not self._fit:
                self._note(f"each process of {self.format} imported its libraries anew: {unfit}")
        return self._fit

    def wait_for(self, begin: Callable[[], None]) -> None:
        """Have `begin` called when it has imported, if somebody waits for that."""
        self._waiting.append(begin)

    def begin_those_that_wait(self) -> None:
        """Begin the workers that wait for it, so that they go on side by side. What fails, its worker tries again."""
        waiting, self._waiting = self._waiting, []
        for begin in waiting:
            with suppress(StageError):
                begin()

    def fork(self, log: Path) -> Fork:
        """A new worker, whose standard error is the end of `log`.

        Raises: StageError where there is no room for another process; WorkerDiedError where the nursery ends.
        """
        with ExitStack() as theirs:
            requests, stdin = os.pipe()
            theirs.callback(os.close, requests)
            stdout, answers = os.pipe()
            theirs.callback(os.close, answers)
            fork = Fork(os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb"))
            try:
                sink = theirs.enter_context(log.open("ab"))
                with adopting_orphans():
                    self._send("fork", {}, [requests, answers, sink.fileno()])
                    fork.pid = self._receive("fork")["pid"]
            except BaseException:
                fork.close()
                raise
        return fork

    def _send(self, request: str, fields: dict[str, Any], handles: list[int] | None = None) -> None:
        message = json.dumps({"request": request, **fields}).encode() + b"\n"
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which reading its answer will tell
            if handles:
                socket.send_fds(self._channel, [message], handles)
            else:
                self._channel.sendall(message)

    def _receive(self, request: str) -> dict[str, Any]:
        try:
            line = self._answers.readline()
        except ConnectionResetError:
            line = b""
        if not line.endswith(b"\n"):
            how = how_it_ended(self._process.wait())
            raise WorkerDiedError(
                f"the process that imports libraries for {self.format} {how} during `{request}`",
                hint=last_lines(self.log, self._log_start),
            )
        answer = json.loads(line)
        if "error" in answer:
            raise StageError(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def close(self) -> None:
        """End the process; its forks go on. Safe to call again."""
        if self._process.returncode is None:
            kill_group(self._process.pid)
        self._process.wait()
        self._answers.close()
        self._channel.close()
        with suppress(FileNotFoundError):
            if self.log.stat().st_size == 0:
                self.log.unlink()


class Fork:
    """A forked worker: to its parent what a Popen is of one that was begun by exec."""

    def __init__(self, stdin: BufferedWriter, stdout: BufferedReader) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.pid = 0
        self.returncode: int | None = None

    def wait(self) -> int:
        """The exit status, or the signal's number below zero."""
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:  # somebody else has waited for it, and knows
                self.returncode = 0
        return self.returncode

    def close(self) -> None:
        """Close its streams."""
        for stream in (self.stdin, self.stdout):
            with suppress(BrokenPipeError):
                stream.close()


class ForkedWorker(Worker):
    """A worker that a nursery forks when it has imported the libraries; where none can, it is begun by exec."""

    def __init__(
        self,
        name: str,
        spec: ExecutionSpec,
        log: Path,
        nursery: Callable[[Artifact, ExecutionSpec, Path], Nursery | None],
    ) -> None:
        super().__init__(name, spec, log)
        self._nursery = nursery
        self._expected: tuple[Nursery, Artifact] | None = None

    def _begin(self) -> None:
        pass

    def prepare(self, artifact: Artifact) -> None:
        if self._process is None:
            nursery = self._nursery(artifact, self._spec, self.log.parent)
            if nursery is not None:
                self._expected = nursery, artifact
                nursery.wait_for(self._begin_prepared)
                return
            self._process = self._execute()
        super().prepare(artifact)

    def wait_until_prepared(self) -> None:
        self._begin_now()
        super().wait_until_prepared()

    def _begin_now(self) -> None:
        if self._expected is not None:
            self._expected[0].begin_those_that_wait()
        self._begin_prepared()

    def _begin_prepared(self) -> None:
        """Start the process, where that is still to be done, and have it import what its artifact needs besides."""
        if self._expected is None:
            return
        nursery, artifact = self._expected
        self._process = nursery.fork(self.log) if nursery.is_fit() else self._execute()
        self._expected = None
        super().prepare(artifact)

    def close(self) -> None:
        self._expected = None
        super().close()

    def load(self, artifact: Artifact) -> dict[str, Any]:
        if self._process is None and self._expected is None:
            self.prepare(artifact)
            self._begin_now()
            try:
                super().wait_until_prepared()
            except StageError as error:  # nobody asked before: what importing for a model finds wrong is the model's
                raise self._load_error(error) from None
        return super().load(artifact)


class Nurseries:
    """Begins workers, and what they are forked from: one process for every runtime; a context manager."""

    def __init__(self, note: Callable[[str], None] = lambda note: None) -> None:
        """`note` is told why the workers of a runtime are begun by exec, where its libraries are the reason."""
        self._note = note
        self._open: dict[tuple[Any, ...], Nursery] = {}

    def __call__(self, name: str, spec: ExecutionSpec, log: Path) -> Worker:
        return ForkedWorker(name, spec, log, self._nursery)

    def _nursery(self, artifact: Artifact, spec: ExecutionSpec, logs: Path) -> Nursery | None:
        """What imports for such artifacts; None where workers are begun by exec.

        So they are where a GPU is used: its driver does not survive a fork, and importing may wake it.
        """
        if sys.platform != "linux" or (spec.device, spec.provider) != CPU:
            return None
        key = (artifact.format, spec.threads, spec.affinity)  # what the libraries see when they are imported
        if key not in self._open:
            self._open[key] = Nursery(artifact, spec, logs / f"libraries-{artifact.format}.log", self._note)
        return self._open[key]

    @property
    def running(self) -> list[Nursery]:
        return list(self._open.values())

    def close(self) -> None:
        """End the nurseries; the workers go on, and are their owners' to close. Safe to call again."""
        for nursery in self._open.values():
            nursery.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
