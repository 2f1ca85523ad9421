"""A run, done again: what differs here, which artifacts come out the same, which figures do not.

Artifacts are compared by digest, perplexity by value and by the interval of its ratio to the baseline. Speeds of two
nights share no rounds: they are shown side by side and called unpaired.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.errors import HostError, RecipeError
from pipeline.events import Events
from pipeline.hardware import describe_host
from pipeline.hardware.probe import probe_folder
from pipeline.plan import Plan, digest_of, select_stages
from pipeline.plugin import Code
from pipeline.recipe import Recipe, load_recipe
from pipeline.report.build import installed_packages
from pipeline.report.figures import megabytes
from pipeline.report.folder import find_run, read_report
from pipeline.report.schema import Report, StageReport
from pipeline.resolve import evaluation_text_of, plan_recipe
from pipeline.run import RunResult, run
from pipeline.store import Store
from pipeline.why import comparable_ingredients, differing

ABSENT = "–"
HOST_FIELDS = {
    "cpu_model": "processor",
    "physical_cores": "cores",
    "logical_cores": "logical cores",
    "memory_bytes": "memory",
    "instruction_sets": "instruction sets",
    "gpus": "GPUs",
    "os": "operating system",
    "distribution": "distribution",
    "kernel": "kernel",
    "architecture": "architecture",
    "python": "Python",
    "governor": "governor",
    "execution_providers": "execution providers",
}
"""What of a host is compared: nothing that changes from minute to minute."""


class Difference(Frozen):
    """One thing that is not as it was."""

    what: str
    then: str
    now: str


class ArtifactOutcome(Frozen):
    """What became of a stage's artifact."""

    stage: str
    then: str | None = Field(description="digest")
    now: str | None
    outcome: Literal["same", "differs", "missing", "new"]
    made: bool = Field(description="False: it came from the store, and proves nothing")
    deterministic: bool = Field(True, description="False: the pass says that two runs of it differ")


class FigureOutcome(Frozen):
    """A figure that was found twice."""

    stage: str
    figure: str
    then: str
    now: str
    says: str


class Reproduction(Frozen):
    """What came of doing a run again."""

    of: str = Field(description="folder of the run")
    run: str | None = Field(None, description="folder of the new one; null: only compared")
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    artifacts: tuple[ArtifactOutcome, ...] = ()
    figures: tuple[FigureOutcome, ...] = ()
    exit_code: int = 0


class PastRun(NamedTuple):
    """A run that is there to be done again."""

    folder: Path
    report: Report
    recipe: Recipe
    plan: dict[str, Any] | None
    """plan.json, as it was written; None where it is missing."""


def read_past_run(name: str, runs: Path) -> PastRun:
    """Raises: RecipeError where there is no such run, or its recipe or plan is missing or damaged."""
    folder = find_run(name, runs)
    report = read_report(str(folder), runs)
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise RecipeError(f"{folder} has no recipe.yaml: what was run is not known")
    plan: dict[str, Any] | None = None
    if (folder / "plan.json").is_file():
        try:
            plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            _ = [(stage["name"], stage["ingredients"]) for stage in plan["stages"]]  # type: ignore[index]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RecipeError(f"{folder / 'plan.json'} is damaged") from None
    return PastRun(folder, report, load_recipe(recipe), plan)


def compare_here(past: PastRun, store: Store, *, allow_code: bool = False) -> Reproduction:
    """What differs on this machine, before anything runs. Passes in files are looked into where `allow_code` says so.

    Raises: RecipeError where the recipe cannot be planned any more.
    """
    notes = []
    if past.recipe.model.trust_remote_code:
        notes.append(
            f"trust_remote_code: true: doing it again runs Python files that {past.recipe.model.source} brings, "
            "as the recipe says"
        )
    if past.plan is None:
        notes.append("plan.json is missing: passes, parameters and model files were not compared")
    plan: Plan | None = None
    try:
        choice = _selection(past)
        only = choice.only or choice.ablate
        code: Code = "run" if allow_code else "read"
        plan = plan_recipe(past.recipe, store=store, until=choice.until, only=only, code=code)
        unread = [stage.name for stage in plan.stages if stage.code is not None and not allow_code]
        if unread:
            notes.append(
                f"of passes in files only the text was compared: {', '.join(unread)}; with --allow-code they run"
            )
    except HostError as error:  # a model of the hub that is not here yet
        notes.append(f"the model's files were not compared: {error.message}")
    found = [
        *_packages(past.report),
        *_host(past.report),
        *(_planned(past, plan) if plan is not None else ()),
        *_text(past),
    ]
    return Reproduction(of=str(past.folder), differences=tuple(found), notes=tuple(notes))


def reproduce(
    past: PastRun,
    before: Reproduction,
    *,
    store: Store,
    runs: Path,
    fresh: bool = True,
    measure: bool = True,
    allow_code: bool = False,
    events: Events | None = None,
) -> Reproduction:
    """Run it again and compare. With `fresh` every stage is made anew, in a store that is thrown away afterwards.

    The exit code is that of the new run; where that is 0, it is 1 if an artifact of a deterministic pass came out
    different although nothing differs here.

    Raises: what `run` raises.
    """
    choice = _selection(past)._asdict()

    def again(store: Store) -> RunResult:
        return run(past.recipe, store=store, measure=measure, allow_code=allow_code, runs=runs, events=events, **choice)

    if not fresh:
        return _compared(past, before, again(store))
    with store.staging() as folder:  # if this process dies, whoever next uses the store removes it
        if (probed := probe_folder(store.root)).is_dir():  # the same profile, for passes that go by what was measured
            shutil.copytree(probed, probe_folder(folder))
        return _compared(past, before, again(Store(folder)))


def _compared(past: PastRun, before: Reproduction, result: RunResult) -> Reproduction:
    deterministic = _deterministic(result.folder)
    artifacts = tuple(_artifacts(past.report, result.report, deterministic, result.made))
    unlike = any(a.outcome == "differs" and a.deterministic for a in artifacts)
    code = result.exit_code or (1 if unlike and not before.differences else 0)
    return before.model_copy(
        update={
            "run": str(result.folder),
            "artifacts": artifacts,
            "figures": tuple(_figures(past.report, result.report)),
            "exit_code": code,
        }
    )


class Selection(NamedTuple):
    """The --until, --only or --ablate that a run was started with, as far as its report tells."""

    until: str | None = None
    only: str | None = None
    ablate: str | None = None


def _selection(past: PastRun) -> Selection:
    if past.report.ablation is not None:
        return Selection(ablate=past.report.ablation.stage)
    ran = {stage.name for stage in past.report.stages}
    names = past.recipe.stage_names
    if ran == set(names):
        return Selection()
    for name in names[1:]:
        if {s.name for s in select_stages(past.recipe, until=name)} | {names[0]} == ran:
            return Selection(until=name)
        if {s.name for s in select_stages(past.recipe, only=name)} | {names[0]} == ran:
            return Selection(only=name)
    return Selection()


def _packages(report: Report) -> Iterator[Difference]:
    now = installed_packages()
    for name, version in report.lock.packages.items():
        if now.get(name) != version:
            yield Difference(what=f"package {name}", then=version, now=now.get(name, "not installed"))
    for name in now.keys() - report.lock.packages.keys():
        yield Difference(what=f"package {name}", then="not installed", now=now[name])


def _host(report: Report) -> Iterator[Difference]:
    now = describe_host().model_dump(mode="json")
    for field, what in HOST_FIELDS.items():
        old, new = report.host.get(field), now.get(field)
        if field == "memory_bytes":
            old, new = _gibibytes(old), _gibibytes(new)
        if isinstance(old, list) and isinstance(new, list) and all(isinstance(v, str) for v in [*old, *new]):
            old, new = sorted(old), sorted(new)
            if field == "instruction_sets":  # of long lists, what only one of them has
                old, new = [v for v in old if v not in new] or old, [v for v in new if v not in old] or new
        if old != new:
            yield Difference(what=what, then=_told(old), now=_told(new))


def _planned(past: PastRun, plan: Plan) -> Iterator[Difference]:
    """Threads, the target, and what enters the stages' keys: model files, parameters, code, libraries, facets."""
    if past.report.threads != plan.threads:
        yield Difference(what="threads", then=str(past.report.threads), now=str(plan.threads))
    target = plan.hardware.model_dump(mode="json")
    if target["name"] != "local" or past.report.hardware.get("name") != "local":  # local is measured, never twice alike
        for change in differing(_given(past.report.hardware), _given(target)):
            yield Difference(what=f"target {change.what}", then=change.before, now=change.now)
    if past.plan is None:
        return
    then = {str(stage["name"]): stage["ingredients"] for stage in past.plan["stages"]}
    stages: dict[tuple[str, str, str], list[str]] = {}
    for stage in plan.stages:
        if isinstance(old := then.get(stage.name), dict):
            old = comparable_ingredients(old, stage.ingredients)
            for change in differing(old, json.loads(json.dumps(stage.ingredients))):
                stages.setdefault((change.what, change.before, change.now), []).append(stage.name)
    for (what, old_value, now), names in stages.items():
        yield Difference(what=f"{', '.join(names)}: {what}", then=old_value, now=now)


def _text(past: PastRun) -> Iterator[Difference]:
    then, now = past.report.lock.digests.get("evaluation_text", ABSENT), digest_of(evaluation_text_of(past.recipe))
    if then != now:
        yield Difference(what="evaluation text", then=then[:12], now=now[:12])


def _deterministic(folder: Path) -> dict[str, bool]:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return {stage["name"]: stage["deterministic"] for stage in plan["stages"]}


def _artifacts(
    then: Report, now: Report, deterministic: Mapping[str, bool], made: Collection[str]
) -> Iterator[ArtifactOutcome]:
    for stage, old, new in _both(then, now):
        a, b = (s.artifact.digest if s and s.artifact else None for s in (old, new))
        if a is None and b is None:
            continue
        outcome: Literal["same", "differs", "missing", "new"] = (
            "missing" if b is None else "new" if a is None else "same" if a == b else "differs"
        )
        yield ArtifactOutcome(
            stage=stage,
            then=a,
            now=b,
            outcome=outcome,
            made=stage in made,
            deterministic=deterministic.get(stage, True),
        )


def _figures(then: Report, now: Report) -> Iterator[FigureOutcome]:
    for name, old, new in _both(then, now):
        if old is None or new is None:
            continue
        if old.artifact and new.artifact:
            a, b = old.artifact.size_bytes, new.artifact.size_bytes
            says = "the same" if a == b else f"differs by {b - a:+,} bytes"
            yield FigureOutcome(stage=name, figure="size", then=megabytes(a), now=megabytes(b), says=says)
        yield from _quality(name, old, new)
        yield from _speeds(name, old, new)


def _quality(name: str, old: StageReport, new: StageReport) -> Iterator[FigureOutcome]:
    if old.quality is None or new.quality is None:
        return
    a, b = old.quality.perplexity, new.quality.perplexity
    yield FigureOutcome(
        stage=name, figure="perplexity", then=_perplexity(a), now=_perplexity(b), says=_judged(old, new)
    )
    if old.quality.sample_text != new.quality.sample_text:
        yield FigureOutcome(stage=name, figure="sample text", then="as it was", now="another", says="differs")


def _judged(old: StageReport, new: StageReport) -> str:
    """Whether a perplexity is the same, and if not, whether its ratio to the baseline lies in the old interval."""
    a, b = (s.quality.perplexity if s.quality else None for s in (old, new))
    if a == b:
        return "exactly the same"
    ratios = [
        s.quality.vs_baseline.perplexity_ratio if s.quality and s.quality.vs_baseline else None for s in (old, new)
    ]
    if ratios[0] is None or ratios[1] is None:
        return f"differs by {abs(b / a - 1):.2g} of it" if a and b else "differs"
    interval, ratio = ratios[0], ratios[1].ratio
    if ratio is None or interval.low is None or interval.high is None:
        return "differs"
    inside = interval.low <= ratio <= interval.high
    return "its ratio to the baseline lies " + ("within" if inside else "outside") + " the old interval"


def _speeds(name: str, old: StageReport, new: StageReport) -> Iterator[FigureOutcome]:
    before = {point.point: point.tokens_per_s for point in old.speed or ()}
    for point in new.speed or ():
        a, b = before.get(point.point), point.tokens_per_s
        if a is not None:
            yield FigureOutcome(
                stage=name,
                figure=f"{point.kind}, batch {point.batch}, prompt {point.prompt}"
                + (f", {point.new_tokens} new tokens" if point.new_tokens else ""),
                then=f"{a.median:,.1f} tok/s ({a.low:,.1f}–{a.high:,.1f})",
                now=f"{b.median:,.1f} tok/s ({b.low:,.1f}–{b.high:,.1f})",
                says=f"{b.median / a.median:.2f} ×, unpaired",
            )


def _both(then: Report, now: Report) -> Iterator[tuple[str, StageReport | None, StageReport | None]]:
    old, new = ({s.name: s for s in report.stages} for report in (then, now))
    for name in dict.fromkeys([*old, *new]):
        yield name, old.get(name), new.get(name)


def _perplexity(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null: a profile of an earlier version lacks it."""
    return {key: value for key, value in values.items() if value is not None}


def _gibibytes(value: Any) -> str | None:
    return f"{value / 2**30:.1f} GiB" if isinstance(value, int) else None


def _told(value: Any) -> str:
    if value is None or value == []:
        return ABSENT
    if isinstance(value, list):
        return ", ".join(str(v.get("name", v)) if isinstance(v, dict) else str(v) for v in value)
    return str(value)
