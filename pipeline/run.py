"""The whole way: a recipe in, artifacts, a report, and an exit code out."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.ablation import AblationPlan, end_of_chain, plan_ablation, with_contributions
from pipeline.artifact import Artifact
from pipeline.errors import HostError, RecipeError
from pipeline.evaluate import Evaluation, Measured
from pipeline.events import Events
from pipeline.execute import StageResult, execute
from pipeline.hardware import describe_host
from pipeline.plan import Plan
from pipeline.plugin import Code
from pipeline.recipe import Recipe, Stage
from pipeline.recipe.parsing import to_yaml
from pipeline.report.build import build_report
from pipeline.report.folder import write_report
from pipeline.report.schema import Report
from pipeline.resolve import evaluation_text_of, resolve, source_of
from pipeline.run_folder import RunFolder
from pipeline.store import Store, default_store_path
from pipeline.store.folder import materialize
from pipeline.store.roots import register_run


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    report: Report
    folder: Path
    exit_code: int
    made: frozenset[str] = frozenset()
    """Stages that ran, and did not come from the store, whatever became of their measurement."""


def run(
    recipe: Recipe,
    *,
    store: Store | None = None,
    until: str | None = None,
    only: str | None = None,
    ablate: str | None = None,
    measure: bool = True,
    force: bool = False,
    allow_code: bool = False,
    runs: Path = Path("runs"),
    events: Events | None = None,
) -> RunResult:
    """Run a recipe and write its report to `runs/NAME/ID`, of which `runs/NAME/latest` is the newest.

    Stages that fail are in the report; the exit code says so. With `ablate`, a stage, the chain that ends there is
    also made without each of its passes, and nothing else but the baseline is measured beside these. `allow_code`:
    passes in files beside the recipe run; without it they are an error.

    Raises: RecipeError, HostError before anything runs; KeyboardInterrupt with finished stages kept in the store.
    """
    began = time.monotonic()
    events = events or Events()
    host = describe_host()
    store = store or Store(default_store_path())
    source = source_of(recipe, download=True)
    text = evaluation_text_of(recipe, source)
    ablation = None
    files: Code = "run" if allow_code else "refuse"
    if ablate is None:
        plan = resolve(recipe, source, store, host, until=until, only=only, force=force, code=files)
    elif until is not None or only is not None:
        raise RecipeError("--ablate goes with neither --until nor --only: it takes the chain that ends in one stage")
    else:

        def planned(stages: Sequence[Stage]) -> Plan:
            return resolve(recipe, source, store, host, stages=stages, force=force, code=files)

        ablation = plan_ablation(recipe, end_of_chain(recipe, ablate), planned)
        plan = planned(ablation.stages)
    plan.require_runnable()
    events.plan_made(plan)
    home = RunFolder(runs, recipe.name)
    with store.lease(home.path), home as folder:
        results = execute(
            plan,
            source=source,
            store=store,
            force=force,
            on_start=events.stage_started,
            on_progress=events.stage_progress,
            on_end=events.stage_ended,
        )
        results = {name: _keep_log(result, folder.path) for name, result in results.items()}
        artifacts = _artifacts(results, store)
        chosen = {recipe.evaluate.baseline, only} if only else set(artifacts)
        chosen -= {stage.name for stage in plan.stages if not stage.measure}
        if ablation is not None:
            chosen = ablation.measured(recipe.evaluate.baseline)
        evaluation = Evaluation(
            recipe=ablation.of(recipe) if ablation else recipe,
            plan=plan,
            artifacts=artifacts,
            chosen=chosen,
            text=text,
            store=store,
            logs=folder.path / "logs",
            events=events,
            pairs=ablation.pairs if ablation else (),
        )
        measured = evaluation.evaluate(speed=measure)
        report = build_report(
            recipe=recipe,
            plan=plan,
            results=results,
            artifacts=artifacts,
            measured=measured,
            store=store.root,
            run_id=folder.id,
            wall_s=time.monotonic() - began,
        )
        if ablation is not None:
            report = with_contributions(ablation, report, results, measured.speed)
        export = _choose_export(recipe, plan, report)
        notes, code = report.notes, exit_code(recipe, report)
        own = [result for name, result in results.items() if name in recipe.stage_names]
        if any(result.host_lacks for result in own):
            code = HostError.exit_code
        if export is not None:
            try:
                materialize(artifacts[export], folder.path / "model")
            except (HostError, OSError) as error:  # the disk is full; what was measured is worth keeping
                notes, code, export = (*notes, f"no model was exported: {error}"), HostError.exit_code, None
        changes = {"export": export, "notes": notes, "wall_s": time.monotonic() - began}
        report = report.model_copy(update=changes)
        _write(folder.path, recipe, plan, measured, report, ablation=ablation)
        register_run(store, folder.finished, recipe.name, {name: a.digest for name, a in artifacts.items()})
    made = frozenset(name for name, result in results.items() if result.status == "ran")
    return RunResult(report=report, folder=folder.finished, exit_code=code, made=made)


def exit_code(recipe: Recipe, report: Report) -> int:
    """3 where a stage failed or could not be measured, 1 where a gate failed or a stage is broken, else 0.

    Stages that are not the recipe's, but were made for an ablation, do not count.
    """
    own = [stage for stage in report.stages if stage.name in recipe.stage_names]
    if any(stage.status in {"failed", "skipped", "unmeasured"} for stage in own):
        return 3
    allowed = {stage.name for stage in recipe.stages if stage.allow_broken}
    broken = [s.name for s in own if _is_broken(report, s.name) and s.name not in allowed]
    return 1 if broken or any(gate.result == "failed" for gate in report.gates) else 0


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


def _choose_export(recipe: Recipe, plan: Plan, report: Report) -> str | None:
    """The stage to export: the recipe's, else the last leaf that is not broken. None where it has no artifact."""
    whole = {s.name for s in report.stages if s.artifact is not None and s.status in {"ran", "cached"}}
    if recipe.export is not None:
        return recipe.export if recipe.export in whole else None
    own = [stage for stage in plan.stages if stage.name in recipe.stage_names]
    parents = {name for s in own for name in (s.parent, *s.inputs.values())}
    leaves = [s.name for s in own if s.name not in parents]
    return next((n for n in reversed(leaves) if n in whole and not _is_broken(report, n)), None)


def _is_broken(report: Report, name: str) -> bool:
    quality = report.stage(name).quality
    return bool(quality and quality.vs_baseline and quality.vs_baseline.verdict == "broken")


def _write(
    folder: Path, recipe: Recipe, plan: Plan, measured: Measured, report: Report, *, ablation: AblationPlan | None
) -> None:
    """Everything that belongs to a run, the report last: a folder with a report is complete."""
    how = ""
    if ablation is not None:
        how = f"# This run was made with --ablate {ablation.end}: its report has stages that no entry here makes.\n"
    (folder / "recipe.yaml").write_text(how + _resolved(recipe, plan, _keep_code(plan, folder)), encoding="utf-8")
    facets = {"stages": {"__all__": {"facets"}}}
    (folder / "plan.json").write_text(plan.model_dump_json(indent=1, exclude=facets), encoding="utf-8")
    if measured.speed is not None:
        (folder / "samples.json").write_text(measured.speed.model_dump_json(), encoding="utf-8")
    write_report(report, folder)


def _keep_code(plan: Plan, folder: Path) -> dict[str, str]:
    """Copy passes in files into the run's folder, below code/; stage -> what a recipe there says of its pass.

    The text is the one that ran: a file that was changed since is not kept, and the recipe names it where it was.
    """
    kept = {}
    for stage in plan.stages:
        if stage.code is None:
            continue
        source = Path(stage.code.path)
        name = f"./code/{stage.name}/{source.name}"
        text = source.read_bytes() if source.is_file() else b""
        if hashlib.sha256(text).hexdigest() == stage.code.digest:
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(text)
            kept[stage.name] = f"{name}:{stage.code.class_name}"
    return kept


def _resolved(recipe: Recipe, plan: Plan, code: Mapping[str, str]) -> str:
    """The recipe as it was run, composed, overridden and with absolute paths: one file that runs from anywhere.

    `code`: stage -> where a pass in a file is now.
    """
    data = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data = {"version": recipe.version, "name": recipe.name, **data}

    def absolute(path: str, *where: str) -> str:
        return str((recipe.folder_of(*where) / Path(path).expanduser()).resolve())

    if recipe.model.path is not None:
        data["model"]["path"] = absolute(recipe.model.path, "model", "path")
    if recipe.model.onnx is not None:  # a link in the hub's cache stays one: its data files lie beside it
        file = recipe.folder_of("model", "onnx") / Path(recipe.model.onnx).expanduser()
        data["model"]["onnx"] = str(file.parent.resolve() / file.name)
    if recipe.hardware.endswith((".yaml", ".yml")):
        data["hardware"] = absolute(recipe.hardware, "hardware")
    if recipe.evaluate.quality.text != "builtin":
        text = absolute(recipe.evaluate.quality.text, "evaluate", "quality", "text")
        data["evaluate"]["quality"]["text"] = text
    planned = {stage.name: stage.params for stage in plan.stages}
    for stage in recipe.stages:
        if stage.name in code:
            data["passes"][stage.index]["pass"] = code[stage.name]
            data["passes"][stage.index].setdefault("name", stage.name)
        settled = planned.get(stage.name, {})  # paths among them are absolute already
        data["passes"][stage.index] |= {key: settled[key] for key in stage.params if key in settled}
    return to_yaml(data)
