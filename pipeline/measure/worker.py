"""The process that loads one artifact and runs it: `python -m pipeline.measure.worker`, or a nursery's fork.

Requests come as JSON lines on standard input; each gets one JSON line, `{"ok": …}` or `{"error": …}`, on a private
copy of standard output. Whatever libraries print goes to standard error, which the parent makes a log file. Between
requests the process blocks in a read.

    prepare          manifest, blobs, spec                  -> nothing; the libraries are imported
    forget_compiled  manifest, blobs, spec                  -> forgotten: what earlier processes compiled is gone
    load             manifest, blobs, spec                  -> load_s, vocab_size, max_length, environment
    compile          shapes [[batch, prompt], …], forward   -> compile_s; 0 for runners that do not compile
    warm_up          point, vocab_size, seed, steps, cap_s  -> seconds, flat, device_peak_memory_bytes
    block            point, vocab_size, seed, steps, min_s  -> seconds
    score            work (see pipeline.measure.scoring)    -> what score_windows returns
    layers           manifest, blobs, spec, work            -> what answer_layers of pipeline.measure.layers returns;
                                                               nothing needs to be loaded, and nothing stays so

`forget_compiled` and `compile` are answered by the runner's `forget_compiled(artifact, spec)` and
`compile_shapes(batch, prompt)`, where it has them; a property `compilations`, which counts them, keeps what is compiled
meanwhile out of timed blocks. `forward` lists shapes of whole passes, each of which is run once. A property
`device_peak_memory_bytes` says what the runner has held on a GPU at most.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TextIO

from pipeline.artifact import Artifact, Manifest
from pipeline.errors import PipelineError
from pipeline.measure.block import run_block, warm_up
from pipeline.measure.workload import Point, fixed_tokens
from pipeline.parent import die_with_parent
from pipeline.runtime import CausalLMRunner, ExecutionSpec, load_runner
from pipeline.runtime.protocol import RUNNERS

OUT_OF_MEMORY = ("Failed to allocate memory", "can't allocate memory", "bad_alloc", "bad allocation", "out of memory")
"""How ONNX Runtime, torch on CPUs, C++ and CUDA say that an allocation was refused."""

RECORDED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY")


class Session:
    """One loaded model and the requests that it answers."""

    def __init__(self) -> None:
        self._runner: CausalLMRunner | None = None
        self._expected_s: dict[Point, float] = {}  # what an iteration takes, by the warm-up

    @property
    def runner(self) -> CausalLMRunner:
        if self._runner is None:
            raise PipelineError("nothing is loaded: the first request must be `load`")
        return self._runner

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises: PipelineError for an unknown request; whatever the runner raises."""
        fields = dict(request)
        name = fields.pop("request", None)
        handlers: dict[Any, Callable[..., dict[str, Any]]] = {
            "prepare": self._prepare,
            "forget_compiled": self._forget_compiled,
            "load": self._load,
            "compile": self._compile,
            "warm_up": self._warm_up,
            "block": self._block,
            "score": self._score,
            "layers": self._layers,
        }
        if name not in handlers:
            raise PipelineError(f"unknown request {name!r}")
        return handlers[name](**fields)

    def _prepare(self, manifest: dict[str, Any], blobs: str, spec: dict[str, Any]) -> dict[str, Any]:
        prepare(Artifact(Manifest.model_validate(manifest), Path(blobs)), ExecutionSpec.model_validate(spec))
        return {}

    def _load(self, manifest: dict[str, Any], blobs: str, spec: dict[str, Any]) -> dict[str, Any]:
        self._prepare(manifest, blobs, spec)
        artifact = Artifact(Manifest.model_validate(manifest), Path(blobs))
        execution = ExecutionSpec.model_validate(spec)
        begin = time.perf_counter_ns()
        self._runner = load_runner(artifact, execution)
        load_s = (time.perf_counter_ns() - begin) / 1e9
        return {
            "load_s": load_s,
            "vocab_size": self._runner.vocab_size,
            "max_length": self._runner.max_length,
            "environment": {
                "threads": execution.threads,
                "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
                **{name: os.environ.get(name) for name in RECORDED},
            },
        }

    def _forget_compiled(self, manifest: dict[str, Any], blobs: str, spec: dict[str, Any]) -> dict[str, Any]:
        artifact = Artifact(Manifest.model_validate(manifest), Path(blobs))
        forget = optional(artifact, "forget_compiled")
        return {"forgotten": bool(forget and forget(artifact, ExecutionSpec.model_validate(spec)))}

    def _compile(self, shapes: list[list[int]], forward: list[list[int]] | None = None) -> dict[str, Any]:
        """Whoever compiles for the shapes that it meets meets them here, as a part of loading."""
        import numpy as np

        compile_shapes = getattr(self.runner, "compile_shapes", None)
        if compile_shapes is None:
            return {"compile_s": 0.0}
        begin = time.perf_counter_ns()
        for batch, prompt in shapes:
            compile_shapes(batch, prompt)
        for batch, length in forward or ():
            self.runner.forward(np.zeros((batch, length), np.int64))
        return {"compile_s": (time.perf_counter_ns() - begin) / 1e9}

    def _warm_up(self, point: dict[str, Any], vocab_size: int, seed: int, steps: int, cap_s: float) -> dict[str, Any]:
        work = Point.model_validate(point)
        tokens = fixed_tokens(work, vocab_size=vocab_size, seed=seed)
        seconds, flat = warm_up(self.runner, work, tokens, cap_s=cap_s, steps=steps)
        self._expected_s[work] = statistics.median(seconds)
        peak = getattr(self.runner, "device_peak_memory_bytes", None)
        return {"seconds": seconds, "flat": flat, "device_peak_memory_bytes": peak}

    def _block(self, point: dict[str, Any], vocab_size: int, seed: int, steps: int, min_s: float) -> dict[str, Any]:
        work = Point.model_validate(point)
        tokens = fixed_tokens(work, vocab_size=vocab_size, seed=seed)
        expected_s = self._expected_s.get(work, 0.0)
        return {"seconds": run_block(self.runner, work, tokens, min_s=min_s, steps=steps, expected_s=expected_s)}

    def _score(self, work: dict[str, Any]) -> dict[str, Any]:
        from pipeline.measure.scoring import ScoreWork, score_windows

        return score_windows(self.runner, ScoreWork.model_validate(work)).model_dump()

    def _layers(
        self, manifest: dict[str, Any], blobs: str, spec: dict[str, Any], work: dict[str, Any]
    ) -> dict[str, Any]:
        from pipeline.measure.layers import LayersWork, answer_layers

        self._prepare(manifest, blobs, spec)
        artifact = Artifact(Manifest.model_validate(manifest), Path(blobs))
        return answer_layers(artifact, ExecutionSpec.model_validate(spec), LayersWork.model_validate(work))


def prepare(artifact: Artifact, spec: ExecutionSpec) -> None:
    """Have the runner import what it needs, where it says how, so that the load time does not count it."""
    if spec.affinity is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.affinity)  # before any library starts its threads
    import_libraries = optional(artifact, "import_libraries")
    if import_libraries is not None:
        import_libraries(artifact)


def optional(artifact: Artifact, name: str) -> Callable[..., Any] | None:
    """What the runner of the artifact's format offers by that name, if it does."""
    for point in entry_points(group=RUNNERS):
        if point.name == artifact.format:
            found: Callable[..., Any] | None = getattr(point.load(), name, None)
            return found
    return None


def serve(requests: TextIO, answers: TextIO, session: Session | None = None) -> None:
    """Answer requests until their stream ends; `session` is who answers."""
    session = session or Session()
    for line in requests:
        try:
            answer: dict[str, Any] = {"ok": session.answer(json.loads(line))}
        except Exception as error:  # libraries raise anything; the parent decides what it means for the run
            if not isinstance(error, PipelineError):
                traceback.print_exc()
            answer = {"error": _told(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _told(error: Exception) -> dict[str, Any]:
    """What is told of an error: message and hint."""
    if isinstance(error, PipelineError):
        message, hint = error.message, error.hint
    else:
        message, hint = f"{type(error).__name__}: {error}", None
    if isinstance(error, MemoryError) or any(sign in message for sign in OUT_OF_MEMORY):
        message = f"there is not enough memory for it: {message}"
        hint = "a smaller batch or a shorter prompt takes less"
    return {"message": message, "hint": hint}


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
