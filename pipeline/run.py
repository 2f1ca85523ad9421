"""The whole way: a recipe in, artifacts, a report, and an exit code out."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError, RecipeError
from pipeline.execute import StageResult, execute
from pipeline.hardware import HardwareProfile, Host, describe_host, load_profile
from pipeline.measure.effect import EFFECT_VERSION, Effect, compare_artifacts
from pipeline.measure.process import StageToMeasure
from pipeline.measure.quality import QualityMeasurement, QualityWorkload, StageQuality, measure_quality
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.workload import Workload
from pipeline.models import Source, evaluation_text, find_source
from pipeline.plan import Plan, digest_of, make_plan, select_stages
from pipeline.plugin import Registry
from pipeline.recipe import Recipe
from pipeline.report.build import build_report
from pipeline.report.folder import LATEST, REPORT
from pipeline.report.schema import Report
from pipeline.runtime import ExecutionSpec, runner_version
from pipeline.store import Store, default_store_path
from pipeline.store.folder import materialize


class Events:
    """What a run tells while it works. Does nothing; a display overrides it."""

    def note(self, message: str) -> None: ...
    def plan_made(self, plan: Plan) -> None: ...
    def stage_started(self, name: str) -> None: ...
    def stage_progress(self, name: str, fraction: float, message: str) -> None: ...
    def stage_ended(self, result: StageResult) -> None: ...
    def measuring(self, message: str) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    report: Report
    folder: Path
    exit_code: int


@dataclass(frozen=True)
class Measured:
    """What was found out about the artifacts of a run."""

    effects: Mapping[str, Effect] = field(default_factory=dict)
    quality: Mapping[str, StageQuality] = field(default_factory=dict)
    speed: SpeedMeasurement | None = None
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    text_digest: str | None = None


def plan_recipe(
    recipe: Recipe,
    *,
    store: Store | None = None,
    until: str | None = None,
    only: str | None = None,
    force: bool = False,
) -> Plan:
    """What `run` would do, without doing it.

    Raises: RecipeError for what is wrong in the recipe; HostError where its model cannot be had here.
    """
    host = describe_host()
    store = store or Store(default_store_path())
    source = _source(recipe, download=False)
    return _plan(recipe, source, store, host, until=until, only=only, force=force)


def run(
    recipe: Recipe,
    *,
    store: Store | None = None,
    until: str | None = None,
    only: str | None = None,
    measure: bool = True,
    force: bool = False,
    runs: Path = Path("runs"),
    events: Events | None = None,
) -> RunResult:
    """Run a recipe and write its report to `runs/NAME/ID`, of which `runs/NAME/latest` is the newest.

    Stages that fail are in the report; the exit code says so.

    Raises: RecipeError, HostError before anything runs; KeyboardInterrupt with finished stages kept in the store.
    """
    began = time.monotonic()
    events = events or Events()
    host = describe_host()
    store = store or Store(default_store_path())
    source = _source(recipe, download=True)
    text = _evaluation_text(recipe)
    plan = _plan(recipe, source, store, host, until=until, only=only, force=force)
    plan.require_runnable()
    events.plan_made(plan)
    with _RunFolder(runs, recipe.name) as folder:
        results = execute(
            plan,
            source=source,
            store=store,
            on_start=events.stage_started,
            on_progress=events.stage_progress,
            on_end=events.stage_ended,
        )
        results = {name: _keep_log(result, folder.path) for name, result in results.items()}
        artifacts = _artifacts(results, store)
        chosen = {recipe.evaluate.baseline, only} if only else set(artifacts)
        measured = _measure(recipe, plan, artifacts, chosen, text, store, folder.path, events, speed=measure)
        report = build_report(
            recipe=recipe,
            plan=plan,
            results=results,
            artifacts=artifacts,
            effects=measured.effects,
            quality=measured.quality,
            speed=measured.speed,
            failures=measured.failures,
            notes=(*plan.notes, *measured.notes),
            text_digest=measured.text_digest,
            run_id=folder.id,
            export=None,
            wall_s=time.monotonic() - began,
        )
        export = _choose_export(recipe, plan, report)
        if export is not None:
            materialize(artifacts[export], folder.path / "model")
        report = report.model_copy(update={"export": export, "wall_s": time.monotonic() - began})
        _write(folder.path, recipe, plan, measured, report)
    return RunResult(report=report, folder=folder.finished, exit_code=exit_code(recipe, report))


def exit_code(recipe: Recipe, report: Report) -> int:
    """3 where a stage failed or could not be measured, 1 where a gate failed or a stage is broken, else 0."""
    if any(stage.status in {"failed", "skipped", "unmeasured"} for stage in report.stages):
        return 3
    allowed = {stage.name for stage in recipe.stages if stage.allow_broken}
    broken = [s.name for s in report.stages if _is_broken(report, s.name) and s.name not in allowed]
    return 1 if broken or any(gate.result == "failed" for gate in report.gates) else 0


def _source(recipe: Recipe, *, download: bool) -> Source:
    model = recipe.model
    try:
        return find_source(
            model.kind,
            model.source,
            relative_to=recipe.folder,
            revision=model.revision,
            dtype=model.dtype,
            download=download,
        )
    except RecipeError as error:
        where = recipe.location("model", model.kind)
        raise RecipeError(error.message, hint=error.hint, location=where) from None


def _plan(
    recipe: Recipe, source: Source, store: Store, host: Host, *, until: str | None, only: str | None, force: bool
) -> Plan:
    return make_plan(
        recipe,
        source=source,
        store=store,
        registry=Registry(),
        profile=_profile(recipe, host),
        host=host,
        stages=select_stages(recipe, until=until, only=only),
        force=force,
    )


def _profile(recipe: Recipe, host: Host) -> HardwareProfile:
    try:
        return load_profile(recipe.hardware, host=host, relative_to=recipe.folder)
    except RecipeError as error:
        raise RecipeError(error.message, hint=error.hint, location=recipe.location("hardware")) from None


def _evaluation_text(recipe: Recipe) -> str:
    """The text that quality is measured on.

    Raises: RecipeError where it is not there or not text.
    """
    given = recipe.evaluate.quality.text
    path = evaluation_text() if given == "builtin" else (recipe.folder / Path(given).expanduser()).resolve()
    where = recipe.location("evaluate", "quality", "text")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the evaluation text {path} cannot be read: {error.strerror}", location=where) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", location=where) from None
    if not text.strip():
        raise RecipeError(f"the evaluation text {path} is empty", location=where)
    return text


def _keep_log(result: StageResult, folder: Path) -> StageResult:
    """Copy the stage's log beside the report; `log` becomes relative to it."""
    if result.log is None or not Path(result.log).is_file():
        return result.model_copy(update={"log": None})
    target = folder / "logs" / f"{result.name}.log"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(result.log, target)
    return result.model_copy(update={"log": f"logs/{result.name}.log"})


def _artifacts(results: Mapping[str, StageResult], store: Store) -> dict[str, Artifact]:
    found = {name: store.artifact(r.artifact) for name, r in results.items() if r.artifact is not None}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def _measure(
    recipe: Recipe,
    plan: Plan,
    artifacts: Mapping[str, Artifact],
    chosen: set[str],
    text: str,
    store: Store,
    folder: Path,
    events: Events,
    *,
    speed: bool,
) -> Measured:
    """Effects and quality, from the store where they are known, and speed, which is always measured anew."""
    effects = {
        stage.name: _effect(artifacts[stage.parent], artifacts[stage.name], store)
        for stage in plan.stages
        if stage.parent in artifacts and stage.name in artifacts
    }
    baseline = recipe.evaluate.baseline
    text_digest = digest_of(text)
    if baseline not in artifacts:
        note = f"nothing was measured: the baseline {baseline} has no artifact"
        return Measured(effects=effects, notes=(note,), text_digest=text_digest)
    spec = ExecutionSpec(threads=plan.threads)
    stages = [StageToMeasure(name, a, spec) for name, a in artifacts.items() if name in chosen]
    quality = _quality(recipe, plan, stages, text, text_digest, store, folder, events, known_only=not speed)
    if not speed:
        note = "speed, load time and memory were not measured (--no-measure)"
        return Measured(effects=effects, quality=quality.stages, notes=(*quality.notes, note), text_digest=text_digest)
    _probe(plan.host, events)
    measurable = [s for s in stages if s.name not in quality.failures]
    timed = _speed(recipe, measurable, folder, events) if baseline not in quality.failures else None
    return Measured(
        effects=effects,
        quality=quality.stages,
        speed=timed,
        failures={**quality.failures, **(timed.failures if timed else {})},
        notes=(*quality.notes, *(timed.notes if timed else ())),
        text_digest=text_digest,
    )


def _effect(before: Artifact, after: Artifact, store: Store) -> Effect:
    key = digest_of({"effect": EFFECT_VERSION, "before": before.digest, "after": after.digest})
    if known := store.measurement(key):
        return Effect.model_validate(known)
    found = compare_artifacts(before, after)
    store.put_measurement(key, found.model_dump(mode="json"))
    return found


def _quality(
    recipe: Recipe,
    plan: Plan,
    stages: list[StageToMeasure],
    text: str,
    text_digest: str,
    store: Store,
    folder: Path,
    events: Events,
    *,
    known_only: bool,
) -> QualityMeasurement:
    """Quality of every stage; only those that the store does not know are scored, beside the baseline."""
    wanted = recipe.evaluate.quality
    workload = QualityWorkload(window=wanted.window, stride=wanted.stride, tokens=wanted.tokens)
    baseline = next(s for s in stages if s.name == recipe.evaluate.baseline)

    def key(stage: StageToMeasure) -> str:
        return digest_of(
            {
                "quality": [s.artifact.digest for s in (stage, baseline)],
                "runners": [runner_version(s.artifact.format) for s in (stage, baseline)],
                "text": text_digest,
                "workload": workload.model_dump(),
                "host": plan.host.facets(),
                "threads": plan.threads,
            }
        )

    known = {s.name: StageQuality.model_validate(found) for s in stages if (found := store.measurement(key(s)))}
    unknown = [s for s in stages if s.name not in known]
    if known_only or not unknown:
        return QualityMeasurement(stages=known)
    asked = unknown if baseline in unknown else [baseline, *unknown]
    try:
        measured = measure_quality(
            asked,
            baseline=baseline.name,
            text=text,
            logs=folder / "logs",
            workload=workload,
            on_progress=lambda fraction, message: events.measuring(f"quality, {message}"),
        )
    except PipelineError as error:  # a text or a tokenizer that does not do: speed can still be measured
        note = f"quality was not measured: {error}"
        events.note(note)
        return QualityMeasurement(stages=known, notes=(note,))
    for stage in asked:
        if stage.name in measured.stages:
            store.put_measurement(key(stage), measured.stages[stage.name].model_dump(mode="json"))
    return measured.model_copy(update={"stages": {**known, **measured.stages}})


def _speed(recipe: Recipe, stages: list[StageToMeasure], folder: Path, events: Events) -> SpeedMeasurement:
    from pipeline.measure.schedule import measure_speed

    wanted = recipe.evaluate.workload
    return measure_speed(
        stages,
        Workload(
            prompt_lengths=tuple(wanted.prompt_lengths),
            new_tokens=wanted.new_tokens,
            batch_sizes=tuple(wanted.batch_sizes),
        ),
        baseline=recipe.evaluate.baseline,
        budget_s=recipe.evaluate.budget_s,
        seed=recipe.seed,
        logs=folder / "logs",
        on_progress=lambda fraction, message: events.measuring(f"speed, {fraction:.0%} {message}"),
    )


def _probe(host: Host, events: Events) -> None:
    """Measure this machine, once: what it can do belongs beside what was measured on it."""
    from pipeline.hardware.probe import cached_probe, default_folder, probe

    if cached_probe(host, default_folder()) is None:
        events.measuring("this machine, once")
        try:
            probe(host, default_folder())
        except PipelineError as error:
            events.note(f"this machine could not be measured: {error}")


def _choose_export(recipe: Recipe, plan: Plan, report: Report) -> str | None:
    """The stage to export: the recipe's, else the last leaf that is not broken. None where it has no artifact."""
    whole = {s.name for s in report.stages if s.artifact is not None and s.status != "unmeasured"}
    if recipe.export is not None:
        return recipe.export if recipe.export in whole else None
    parents = {name for s in plan.stages for name in (s.parent, *s.inputs.values())}
    leaves = [s.name for s in plan.stages if s.name not in parents]
    return next((n for n in reversed(leaves) if n in whole and not _is_broken(report, n)), None)


def _is_broken(report: Report, name: str) -> bool:
    quality = report.stage(name).quality
    return bool(quality and quality.vs_baseline and quality.vs_baseline.verdict == "broken")


def _write(folder: Path, recipe: Recipe, plan: Plan, measured: Measured, report: Report) -> None:
    """Everything that belongs to a run, the report last: a folder with a report is complete."""
    (folder / "recipe.yaml").write_text(_resolved(recipe), encoding="utf-8")
    facets = {"stages": {"__all__": {"facets"}}}
    (folder / "plan.json").write_text(plan.model_dump_json(indent=1, exclude=facets), encoding="utf-8")
    if measured.speed is not None:
        (folder / "samples.json").write_text(measured.speed.model_dump_json(), encoding="utf-8")
    (folder / REPORT).write_text(report.to_json(), encoding="utf-8")


def _resolved(recipe: Recipe) -> str:
    """The recipe as it was run, overrides applied, as a recipe again."""
    data = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data = {"version": recipe.version, "name": recipe.name, **data}
    if recipe.model.path is not None:
        data["model"]["path"] = str((recipe.folder / Path(recipe.model.path).expanduser()).resolve())
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


class _RunFolder:
    """A run's folder in the making; it gets its name, and `latest` points to it, when the run is complete."""

    def __init__(self, runs: Path, name: str) -> None:
        self.id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        self._home = runs / name
        self.path = self._home / f".{self.id}"
        self.finished = self._home / self.id

    def __enter__(self) -> _RunFolder:
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # not empty: earlier runs are in it
                self._home.rmdir()
                self._home.parent.rmdir()
            return
        self.path.rename(self.finished)
        link = self._home / f".latest.{self.id}"
        link.symlink_to(self.id)
        link.replace(self._home / LATEST)


