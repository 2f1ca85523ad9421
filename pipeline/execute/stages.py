"""Runs the stages of a plan that are not in the store, each in a worker process, and indexes what they yield."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from pipeline.artifact import Frozen, Lineage, Manifest
from pipeline.errors import StageError
from pipeline.execute.request import REQUEST, RESULT, Answer, Request
from pipeline.measure.memory import MemorySampler
from pipeline.models import Source, source_artifact
from pipeline.parent import worker_environment
from pipeline.plan import Plan, PlannedStage, inputs_digest
from pipeline.recipe.schema import SOURCE
from pipeline.store import StageRecord, Store

Progress = Callable[[str, float, str], None]
"""Called with a stage's name, how far it is from 0 to 1, and what it does."""


class Cost(Frozen):
    """What making an artifact took, on the machine and the day that it was made."""

    wall_s: float | None = None
    peak_memory_bytes: int | None = None  # anonymous + shared, of the process tree
    peak_rss_bytes: int | None = None


class StageResult(Frozen):
    """What became of one stage."""

    name: str
    status: Literal["ran", "cached", "skipped", "failed"]
    reason: str | None = None
    artifact: str | None = None
    cost: Cost = Cost()
    log: str | None = None


def execute(
    plan: Plan,
    *,
    source: Source,
    store: Store,
    on_start: Callable[[str], None] = lambda name: None,
    on_progress: Progress = lambda name, fraction, message: None,
    on_end: Callable[[StageResult], None] = lambda result: None,
) -> dict[str, StageResult]:
    """Run every stage of the plan in order. A stage that fails stops those made from it, and no other.

    Raises: KeyboardInterrupt after the running worker was ended; what was finished stays in the store.
    """
    results: dict[str, StageResult] = {}
    for stage in plan.stages:
        needs = [n for n in (stage.parent, *stage.inputs.values()) if n is not None]
        broken = next((n for n in needs if results[n].artifact is None), None)
        if broken:
            reason = f"{broken} {results[broken].status}"
            results[stage.name] = StageResult(name=stage.name, status="skipped", reason=reason)
        else:
            on_start(stage.name)
            if stage.name == SOURCE:
                results[stage.name] = _source(plan, stage, source, store)
            else:
                try:
                    results[stage.name] = _stage(plan, stage, results, store, on_progress)
                except StageError as error:
                    results[stage.name] = StageResult(name=stage.name, status="failed", reason=str(error))
        on_end(results[stage.name])
    return results


def _source(plan: Plan, stage: PlannedStage, source: Source, store: Store) -> StageResult:
    """The untouched model is described in this process: nothing is converted, nothing is copied."""
    if record := store.stage_record(stage.key):
        return _cached(stage, record, store)
    began = time.monotonic()
    made = source_artifact(source, store)
    manifest = _with_lineage(made.manifest, stage, ())
    with store.staging() as staging:
        artifact = store.publish(staging, manifest)
    cost = Cost(wall_s=time.monotonic() - began)
    _index(plan, stage, artifact.digest, inputs="", cost=cost, store=store)
    return StageResult(name=stage.name, status="ran", artifact=artifact.digest, cost=cost)


def _stage(
    plan: Plan, stage: PlannedStage, results: dict[str, StageResult], store: Store, on_progress: Progress
) -> StageResult:
    parent = str(results[str(stage.parent)].artifact)
    inputs = {role: str(results[name].artifact) for role, name in stage.inputs.items()}
    contents = inputs_digest(parent, inputs)
    with store.lock(stage.key):  # another run may be making it right now: then it is there when we get the lock
        record = store.stage_record(stage.key) or store.record_by_content(stage.own, contents)
        if record:
            if record.key != stage.key:
                cost = Cost(**record.model_dump(include=set(Cost.model_fields)))
                _index(plan, stage, record.artifact, inputs=contents, cost=cost, store=store)
                _copy_log(store, record.key, stage.key)
            return _cached(stage, record, store)
        with store.staging() as staging:
            log = store.log_path(stage.key)
            answer, cost, died = _work(
                plan, stage, parent, inputs, store=store, staging=staging, log=log, on_progress=on_progress
            )
            if answer is None or answer.manifest is None:
                failure = answer.failure if answer else None
                reason = died
                if failure is not None:
                    reason = failure.message + (f" ({failure.hint})" if failure.hint else "")
                return StageResult(name=stage.name, status="failed", reason=reason, cost=cost, log=str(log))
            manifest = _with_lineage(answer.manifest, stage, (parent, *inputs.values()))
            try:
                artifact = store.publish(staging, manifest)
            except StageError as error:
                return StageResult(name=stage.name, status="failed", reason=str(error), cost=cost, log=str(log))
        _index(plan, stage, artifact.digest, inputs=contents, cost=cost, store=store)
    return StageResult(name=stage.name, status="ran", artifact=artifact.digest, cost=cost, log=str(log))


def _work(
    plan: Plan,
    stage: PlannedStage,
    parent: str,
    inputs: dict[str, str],
    *,
    store: Store,
    staging: Path,
    log: Path,
    on_progress: Progress,
) -> tuple[Answer | None, Cost, str]:
    """Run the pass in a process of its own: (its answer, its cost, why there is no answer)."""
    request = Request(
        stage=stage.name,
        pass_name=stage.pass_name,
        params=stage.params,
        artifact=_manifest(store, parent),
        inputs={role: _manifest(store, digest) for role, digest in inputs.items()},
        facets=stage.facets,
        threads=plan.threads,
        blobs=str(store.blobs),
    )
    (staging / REQUEST).write_text(request.model_dump_json(), encoding="utf-8")
    began = time.monotonic()
    with log.open("wb") as stderr:
        # -P: the user's working folder is not on the path, whatever it holds; a session of its own: Ctrl-C is ours
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.execute.worker", str(staging)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=worker_environment(plan.threads),
            start_new_session=True,
        )
        try:
            with MemorySampler(process.pid) as memory:
                reader = threading.Thread(target=_follow, args=(process.stdout, stage.name, on_progress), daemon=True)
                reader.start()
                code = process.wait()  # not the end of its output: a process that it started may hold that open
        finally:
            _end(process)
        reader.join()
    cost = Cost(
        wall_s=time.monotonic() - began,
        peak_memory_bytes=memory.peak_memory_bytes,
        peak_rss_bytes=memory.peak_rss_bytes,
    )
    try:
        return Answer.model_validate_json((staging / RESULT).read_bytes()), cost, ""
    except (FileNotFoundError, ValidationError):
        return None, cost, _how_it_died(code, log)


def _follow(stdout: IO[bytes], stage: str, on_progress: Progress) -> None:
    with stdout:
        for line in stdout:
            try:
                said = json.loads(line)
                on_progress(stage, float(said["fraction"]), str(said["message"]))
            except (ValueError, KeyError, TypeError):  # a pass wrote to the descriptor itself; its text is no progress
                continue


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no process of the worker's group behind."""
    with suppress(ProcessLookupError):  # it has ended, and so have its children
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how_it_died(code: int, log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f"; its last words: {lines[-1].strip()[:200]}" if lines else ""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for lack of memory" if name == "SIGKILL" else ""
        return f"the pass's process was ended by {name}{memory}{last}"
    return f"the pass's process ended with code {code} and no result{last}"


def _cached(stage: PlannedStage, record: StageRecord, store: Store) -> StageResult:
    log = store.log_path(stage.key)
    return StageResult(
        name=stage.name,
        status="cached",
        artifact=record.artifact,
        cost=Cost(**record.model_dump(include=set(Cost.model_fields))),
        log=str(log) if log.exists() else None,
    )


def _index(
    plan: Plan,
    stage: PlannedStage,
    artifact: str,
    *,
    inputs: str,
    cost: Cost,
    store: Store,
) -> None:
    record = StageRecord(
        key=stage.key,
        artifact=artifact,
        recipe=plan.recipe,
        stage=stage.name,
        pass_name=stage.pass_name,
        ingredients=stage.ingredients,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **cost.model_dump(),
    )
    store.put_record(record, own=stage.own, inputs=inputs)


def _manifest(store: Store, digest: str) -> Manifest:
    artifact = store.artifact(digest)
    if artifact is None:
        raise StageError(f"the artifact {digest[:12]} left the store, or a file of it changed, while the plan ran")
    return artifact.manifest


def _with_lineage(manifest: Manifest, stage: PlannedStage, parents: tuple[str, ...]) -> Manifest:
    lineage = Lineage(stage_key=stage.key, stage=stage.name, pass_name=stage.pass_name, parents=parents)
    return manifest.model_copy(update={"lineage": lineage})


def _copy_log(store: Store, old: str, new: str) -> None:
    if store.log_path(old).exists():
        shutil.copyfile(store.log_path(old), store.log_path(new))
