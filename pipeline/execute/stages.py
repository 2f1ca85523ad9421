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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, ValidationError

from pipeline.artifact import Frozen, Lineage, Manifest
from pipeline.errors import StageError
from pipeline.execute.ending import how_it_died, oom_kills, where_it_was
from pipeline.execute.request import REQUEST, RESULT, Answer, Failure, Request
from pipeline.measure.memory import MemorySampler
from pipeline.models import Source, source_artifact
from pipeline.parent import worker_environment
from pipeline.plan import Plan, PlannedStage, inputs_digest
from pipeline.recipe.schema import SOURCE
from pipeline.store import StageRecord, Store
from pipeline.store.room import DISK_FULL, disk_is_full, free_bytes, too_little_room

Progress = Callable[[str, float, str], None]
"""Called with a stage's name, how far it is from 0 to 1, and what it does."""


DUMP_SIGNAL = signal.SIGUSR1
"""Has a worker write its Python stacks into the log."""

LEAST_ROOM_BYTES = 1_000_000
"""With less than this free on the disk, a worker that ended without a word ended for that."""

DUMP_S = 1.0
"""How long a worker that took too long has for that."""


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
    rules: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """What the pass told of its rules, when it ran: rule -> (done, of)."""
    log: str | None = None
    host_lacks: bool = False
    """It failed for want of room on this host's disk, and not through the pass."""
    refused: bool = False
    """It failed because the pass said that it could not do it, and why."""
    observed: dict[str, Any] = Field(default_factory=dict)
    """What the stage's observer saw, when it ran."""


@dataclass(frozen=True)
class Watch:
    """How the workers of some stages are watched, by the conformance kit."""

    stages: frozenset[str] = frozenset()
    """Those whose worker calls the observer."""
    observer: str | None = None
    """See `Request`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the environment of all workers has beside what it always has."""


@dataclass(frozen=True)
class _Ended:
    """How a worker ended: with an answer, or else why without one."""

    answer: Answer | None
    cost: Cost
    died: str = ""


def execute(
    plan: Plan,
    *,
    source: Source,
    store: Store,
    force: bool = False,
    watch: Watch | None = None,
    on_start: Callable[[str], None] = lambda name: None,
    on_progress: Progress = lambda name, fraction, message: None,
    on_end: Callable[[StageResult], None] = lambda result: None,
) -> dict[str, StageResult]:
    """Run every stage of the plan in order. A stage that fails stops those made from it, and no other.

    `force`: try stages that the disk has likely too little room for; `watch`: how workers are watched.

    Raises: KeyboardInterrupt after the running worker was ended; what was finished stays in the store.
    """
    results: dict[str, StageResult] = {}
    with store.lease():
        for stage in plan.stages:
            needs = [n for n in (stage.parent, *stage.inputs.values()) if n is not None]
            broken = next((n for n in needs if results[n].artifact is None), None)
            if broken:
                reason = f"{broken} {results[broken].status}"
                results[stage.name] = StageResult(name=stage.name, status="skipped", reason=reason)
            else:
                on_start(stage.name)
                damage = store.damage(stage.key)
                result = _run(
                    plan,
                    stage,
                    results,
                    source=source,
                    store=store,
                    force=force,
                    watch=watch or Watch(),
                    on_progress=on_progress,
                )
                if damage and result.status == "ran":
                    result = result.model_copy(update={"reason": f"made again: in the store, {damage}"})
                results[stage.name] = result
            on_end(results[stage.name])
    return results


def _run(
    plan: Plan,
    stage: PlannedStage,
    results: dict[str, StageResult],
    *,
    source: Source,
    store: Store,
    force: bool,
    watch: Watch,
    on_progress: Progress,
) -> StageResult:
    """One stage. A full disk is its failure; whatever else the operating system refuses is not expected here."""
    try:
        if stage.name == SOURCE and source.architecture is None:  # else its weights are drawn, by a worker
            return _source(plan, stage, source, store)
        return _stage(plan, stage, results, store, on_progress, force=force, watch=watch)
    except StageError as error:
        return StageResult(name=stage.name, status="failed", reason=str(error))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        reason = disk_is_full(store, str(error))
        return StageResult(name=stage.name, status="failed", reason=reason, host_lacks=True)


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
    plan: Plan,
    stage: PlannedStage,
    results: dict[str, StageResult],
    store: Store,
    on_progress: Progress,
    *,
    force: bool,
    watch: Watch,
) -> StageResult:
    parent = str(results[stage.parent].artifact) if stage.parent else ""
    inputs = {role: str(results[name].artifact) for role, name in stage.inputs.items()}
    contents = inputs_digest(parent, inputs)

    def waiting() -> None:
        on_progress(stage.name, 0.0, "another run is making it: waiting for that")

    with store.lock(stage.key, on_wait=waiting):  # once we have it, what another run was making is there
        record = store.stage_record(stage.key) or store.record_by_content(stage.own, contents)
        if record:
            if record.key != stage.key:
                cost = Cost(**record.model_dump(include=set(Cost.model_fields)))
                _index(plan, stage, record.artifact, inputs=contents, cost=cost, store=store, rules=record.rules)
                _copy_log(store, record.key, stage.key)
            return _cached(stage, record, store)
        if not force and (lacking := too_little_room(store, stage.writes_bytes)):
            return StageResult(name=stage.name, status="failed", reason=lacking, host_lacks=True)
        with store.staging() as staging:
            log = store.log_path(stage.key)
            ended = _work(
                plan,
                stage,
                parent,
                inputs,
                store=store,
                staging=staging,
                log=log,
                watch=watch,
                on_progress=on_progress,
            )
            if ended.answer is None or ended.answer.manifest is None:
                return _failed(stage, ended, store, log)
            cost = ended.cost
            manifest = _with_lineage(ended.answer.manifest, stage, tuple(filter(None, (parent, *inputs.values()))))
            try:
                artifact = store.publish(staging, manifest)
            except StageError as error:
                return StageResult(name=stage.name, status="failed", reason=str(error), cost=cost, log=str(log))
        rules, observed = ended.answer.rules, ended.answer.observed
        _index(plan, stage, artifact.digest, inputs=contents, cost=cost, store=store, rules=rules)
    return StageResult(
        name=stage.name,
        status="ran",
        artifact=artifact.digest,
        cost=cost,
        rules=rules,
        observed=observed,
        log=str(log),
    )


def _work(
    plan: Plan,
    stage: PlannedStage,
    parent: str,
    inputs: dict[str, str],
    *,
    store: Store,
    staging: Path,
    log: Path,
    watch: Watch,
    on_progress: Progress,
) -> _Ended:
    """Run the pass in a process of its own, for as long as the recipe lets it."""
    import psutil

    request = Request(
        stage=stage.name,
        pass_name=stage.pass_name,
        code=stage.code,
        params=stage.params,
        artifact=_manifest(store, parent) if parent else None,
        inputs={role: _manifest(store, digest) for role, digest in inputs.items()},
        facets=stage.facets,
        threads=plan.threads,
        blobs=str(store.blobs),
        observer=watch.observer if stage.name in watch.stages else None,
    )
    (staging / REQUEST).write_text(request.model_dump_json(), encoding="utf-8")
    available_bytes, kills = int(psutil.virtual_memory().available), oom_kills()
    too_long = ""
    began = time.monotonic()
    with log.open("wb") as stderr:
        # -P: the user's working folder is not on the path, whatever it holds; a session of its own: Ctrl-C is ours
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.execute.worker", str(staging)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**worker_environment(plan.threads), **watch.environment},
            start_new_session=True,
        )
        try:
            with MemorySampler(process.pid) as memory:
                reader = threading.Thread(target=_follow, args=(process.stdout, stage.name, on_progress), daemon=True)
                reader.start()
                try:
                    # not the end of its output: a process that it started may hold that open
                    code = process.wait(timeout=stage.timeout_s)
                except subprocess.TimeoutExpired:
                    code, too_long = -DUMP_SIGNAL, f"took longer than timeout_s: {stage.timeout_s:g} s"
                    _dump_stacks(process, log)
        finally:
            _end(process)
        reader.join()
    cost = Cost(
        wall_s=time.monotonic() - began,
        peak_memory_bytes=memory.peak_memory_bytes,
        peak_rss_bytes=memory.peak_rss_bytes,
    )
    if too_long:
        where = where_it_was(log)
        return _Ended(None, cost, too_long + (f"; it was in {where}" if where else ""))
    try:
        return _Ended(Answer.model_validate_json((staging / RESULT).read_bytes()), cost)
    except (FileNotFoundError, ValidationError):
        died = how_it_died(
            code,
            log,
            oom_kills=oom_kills() - kills,
            peak_bytes=memory.peak_memory_bytes,
            available_bytes=available_bytes,
        )
        return _Ended(None, cost, died)


def _failed(stage: PlannedStage, ended: _Ended, store: Store, log: Path) -> StageResult:
    failure = ended.answer.failure if ended.answer else None
    if failure is None:
        full = free_bytes(store) < LEAST_ROOM_BYTES
        reason = disk_is_full(store, ended.died) if full else ended.died
    else:
        full = failure.disk_full
        reason = disk_is_full(store, failure.message) if full else _in_words(failure)
    return StageResult(
        name=stage.name,
        status="failed",
        reason=reason,
        cost=ended.cost,
        log=str(log),
        host_lacks=full,
        refused=failure is not None and failure.expected,
        observed=ended.answer.observed if ended.answer else {},
    )


def _in_words(failure: Failure) -> str:
    return failure.message + (f" ({failure.hint})" if failure.hint else "")


def _dump_stacks(process: subprocess.Popen[bytes], log: Path) -> None:
    """Have the worker, which hangs, say where in the log; wait until it has, or cannot any more."""
    before = log.stat().st_size
    process.send_signal(DUMP_SIGNAL)
    until = time.monotonic() + DUMP_S
    while time.monotonic() < until and process.poll() is None:
        now = log.stat().st_size
        if now > before and where_it_was(log):
            return
        time.sleep(0.02)


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


def _cached(stage: PlannedStage, record: StageRecord, store: Store) -> StageResult:
    log = store.log_path(stage.key)
    store.touch(stage.key)
    return StageResult(
        name=stage.name,
        status="cached",
        artifact=record.artifact,
        cost=Cost(**record.model_dump(include=set(Cost.model_fields))),
        rules=record.rules,
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
    rules: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    record = StageRecord(
        key=stage.key,
        artifact=artifact,
        recipe=plan.recipe,
        stage=stage.name,
        pass_name=stage.pass_name,
        ingredients=stage.ingredients,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rules=dict(rules or {}),
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
