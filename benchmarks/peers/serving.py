"""The process that runs one candidate, and the parent's side of it.

The protocol is that of pipeline.measure.worker: JSON lines through pipes, one answer a request, and the timed blocks
are its blocks. What differs is what is loaded, a tool through its adapter, and that it answers only when it has come to
rest: threads that spin on after their work would be taken for the next candidate's.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.candidates import PROMPT, Candidate
from benchmarks.peers.converting import adapter_module, environment
from pipeline.artifact import Artifact
from pipeline.measure.process import LoadError, Process, Worker
from pipeline.measure.worker import Session, serve
from pipeline.parent import die_with_parent
from pipeline.runtime import CausalLMRunner, ExecutionSpec

if TYPE_CHECKING:
    import numpy as np

REST_STEP_S = 0.005
REST_SHARE = 0.1
"""A process is at rest when it uses no more than this share of one core."""

REST_CAP_S = 2.0


class CandidateWorker(Worker):
    """A process that loads one candidate in its own environment."""

    def __init__(
        self, candidate: Candidate, log: Path, *, python: Path, folder: Path, checkpoint: Path, threads: int
    ) -> None:
        self._python = python
        self._candidate = {
            "adapter": candidate.adapter,
            "options": candidate.options,
            "folder": str(folder),
            "checkpoint": str(checkpoint),
            "threads": threads,
        }
        super().__init__(candidate.name, ExecutionSpec(threads=threads), log)

    def _execute(self) -> Process:
        with self.log.open("ab") as sink:
            return subprocess.Popen(
                [str(self._python), "-P", "-m", "benchmarks.peers.serving"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment(self._spec.threads),
                start_new_session=True,
            )

    def prepare(self, artifact: Artifact) -> None:
        """Nothing: an adapter imports its tool when it loads."""

    def load(self, artifact: Artifact) -> dict[str, Any]:
        """Load the candidate: load_s (imports counted), vocab_size, max_length, environment, versions, described.

        Raises: LoadError where it does not load, or its process ends.
        """
        from pipeline.errors import StageError

        try:
            return self.ask("load_candidate", **self._candidate)
        except StageError as error:
            raise LoadError(f"it does not load: {error.message}", hint=error.hint) from None


class CandidateSession(Session):
    """What the process answers: load_candidate, and the rest as pipeline.measure.worker has it."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("request") == "load_candidate":
            fields = {name: value for name, value in request.items() if name != "request"}
            found = self._load_candidate(**fields)
        else:
            found = super().answer(request)
        rest()
        return found

    def _load_candidate(
        self, adapter: str, options: Mapping[str, Any], folder: str, checkpoint: str, threads: int
    ) -> dict[str, Any]:
        began = time.perf_counter()
        self._runner = adapter_module(adapter).load(Path(folder), Path(checkpoint), threads, **options)
        described = getattr(self._runner, "described", dict)
        return {
            "load_s": time.perf_counter() - began,
            "vocab_size": self.runner.vocab_size,
            "max_length": self.runner.max_length,
            "environment": {"threads": threads, "affinity": sorted(os.sched_getaffinity(0))},
            "versions": {d.name: d.version for d in importlib.metadata.distributions()},
            "described": described(),
        }

    def _score(self, work: dict[str, Any]) -> dict[str, Any]:
        from pipeline.measure.scoring import ScoreWork, score_windows

        fields = ScoreWork.model_validate(work)
        return score_windows(AsUsed(self.runner), fields).model_dump()  # type: ignore[arg-type]


class AsUsed:
    """A runner that is scored as it is used: a prompt in one pass, and each token after it in a step of its own.

    Only the logits that a user sees are given: the prompt's last, and those of the steps. The others are zeros, which
    no window scores.
    """

    has_cache = True

    def __init__(self, runner: CausalLMRunner) -> None:
        self._runner = runner

    def score(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Logits of all positions of [1, S] but the last, whose prediction nothing is compared with."""
        import numpy as np

        logits = self._runner.prefill(tokens[:, :PROMPT])  # [1, V]
        yield np.broadcast_to(np.float32(0), (1, PROMPT - 1, logits.shape[1]))
        yield logits[:, None]
        for at in range(PROMPT, tokens.shape[1] - 1):
            yield self._runner.decode(tokens[:, at : at + 1])[:, None]


def rest() -> None:
    """Wait until this process's threads have come to rest, REST_CAP_S at most."""
    deadline = time.monotonic() + REST_CAP_S
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(REST_STEP_S)
        if time.process_time() - before <= REST_SHARE * REST_STEP_S:
            return


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes into the log
    serve(sys.stdin, answers, CandidateSession())


if __name__ == "__main__":
    main()
