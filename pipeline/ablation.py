"""What each pass contributes: the chain that ends in a stage, made again without each of its passes in turn.

Dropping a stage puts the stage that it was made from in its place, wherever the chain reads it: as a parent and as a
further input. Whatever came after it is made anew, through the same plan and store, so that most of it is cached. The
whole chain, the chains without a pass and the baseline are then measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import RecipeError, did_you_mean
from pipeline.execute import StageResult
from pipeline.measure.samples import SpeedMeasurement
from pipeline.plan import Plan, select_stages
from pipeline.recipe import Recipe, Stage
from pipeline.recipe.schema import SOURCE
from pipeline.report.paired import paired_speed
from pipeline.report.pareto import pareto
from pipeline.report.schema import Ablation, Contribution, PairedSpeed, Report, StageReport


@dataclass(frozen=True)
class Variant:
    """The chain without one of its stages."""

    dropped: str
    end: str | None
    """The stage that ends it; None where the stage cannot be dropped."""
    stages: tuple[Stage, ...] = ()
    """Those that are made for it alone."""
    reason: str | None = None
    """Why the stage cannot be dropped."""


@dataclass(frozen=True)
class AblationPlan:
    """The chain that ends in `end`, and that chain without each of its stages."""

    end: str
    kept: tuple[Stage, ...]
    """Stages of the recipe that take part: the chain, the baseline and what they are made from."""
    variants: tuple[Variant, ...]

    @property
    def extra(self) -> tuple[Stage, ...]:
        """Stages that the recipe does not have."""
        return tuple(stage for variant in self.variants for stage in variant.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All that is to be made, in order."""
        return (*self.kept, *self.extra)

    def measured(self, baseline: str) -> set[str]:
        """The stages that are compared: not those in the middle of a chain."""
        return {baseline, self.end, *(variant.end for variant in self.variants if variant.end is not None)}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What has to be decided: the whole chain against each that lacks a pass, where they are two."""
        ends = dict.fromkeys(variant.end for variant in self.variants if variant.end is not None)
        return [(self.end, end) for end in ends]

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with the extra stages; its gates, its export and how it is evaluated are as they were."""
        return recipe.model_copy(update={"stages": list(self.stages)})


def end_of_chain(recipe: Recipe, stage: str | None = None) -> str:
    """The stage whose chain is ablated: `stage`, else the one that the recipe exports, else its last leaf.

    Raises: RecipeError where there is no such stage, or nothing to drop.
    """
    if stage is not None and stage not in recipe.stage_names:
        hint = did_you_mean(stage, recipe.stage_names, noun="stages")
        raise RecipeError(f"--ablate: there is no stage {stage!r}", hint=hint)
    read = {name for s in recipe.stages for name in (s.parent, *s.inputs.values())}
    leaves = [s.name for s in recipe.stages if s.name not in read]
    found = stage or recipe.export or (leaves[-1] if leaves else SOURCE)
    if found == SOURCE:
        raise RecipeError(
            "--ablate: the chain of source has no pass that could be dropped",
            hint="name a stage that a pass makes" if recipe.stages else "the recipe has no passes",
        )
    return found


def plan_ablation(recipe: Recipe, end: str, plan: Callable[[Sequence[Stage]], Plan]) -> AblationPlan:
    """Drop each stage that `end` is made from, and `end` itself, in turn.

    `plan` resolves stages on this host. A stage without which the others cannot be planned, or cannot run here, is
    listed with the reason.

    Raises: RecipeError where the whole chain cannot be planned.
    """
    kept = tuple(select_stages(recipe, only=end))
    known = set(plan(kept).problems)
    chain = _chain(recipe, end)
    taken = set(recipe.stage_names)
    variants = []
    for dropped in chain:
        variant = _without(dropped, chain, end, taken)
        if variant.stages and (reason := _obstacle(plan, [*kept, *variant.stages], known)):
            variant = Variant(dropped=dropped.name, end=None, reason=reason)
        taken |= {stage.name for stage in variant.stages}
        variants.append(variant)
    return AblationPlan(end=end, kept=kept, variants=tuple(variants))


def _obstacle(plan: Callable[[Sequence[Stage]], Plan], stages: Sequence[Stage], known: set[str]) -> str:
    """Why the stages cannot be made here, beside the problems `known` of the whole chain; empty where they can."""
    try:
        return "; ".join(problem for problem in plan(stages).problems if problem not in known)
    except RecipeError as error:  # a pass does not take what the stage before the dropped one yields
        return error.message.removeprefix(f"{error.location}: ")  # a place where nothing is wrong


def _chain(recipe: Recipe, end: str) -> list[Stage]:
    """All that `end` is made from and itself, in the recipe's order, without the source."""
    found: set[str] = set()
    waiting = [end]
    while waiting:
        name = waiting.pop()
        if name != SOURCE and name not in found:
            found.add(name)
            stage = recipe.stage(name)
            waiting += [stage.parent, *stage.inputs.values()]
    return [stage for stage in recipe.stages if stage.name in found]


def _without(dropped: Stage, chain: Sequence[Stage], end: str, taken: set[str]) -> Variant:
    instead = {dropped.name: dropped.parent}
    made = []
    for stage in chain:
        reads = {stage.parent, *stage.inputs.values()}
        if stage is dropped or not reads & instead.keys():
            continue
        name = _free(f"{stage.name}_without_{dropped.name}", taken)
        changes = {
            "name": name,
            "parent": instead.get(stage.parent, stage.parent),
            "inputs": {role: instead.get(read, read) for role, read in stage.inputs.items()},
        }
        made.append(stage.model_copy(update=changes))
        instead[stage.name] = name
    return Variant(dropped=dropped.name, end=instead[end], stages=tuple(made))


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with a number where a stage of the recipe has it already."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def with_contributions(
    plan: AblationPlan,
    report: Report,
    results: Mapping[str, StageResult],
    speed: SpeedMeasurement | None,
) -> Report:
    """The report with what each pass contributed, and without the extra stages that could not be made or measured.

    Those are findings about the chain, told where the contribution would stand, and no failure of the recipe.
    """
    whole = report.stage(plan.end)
    extra = {stage.name for stage in plan.extra}
    lost = {stage.name: stage for stage in report.stages if stage.name in extra and _failed(stage)}

    def compare(without: str) -> tuple[PairedSpeed, ...]:
        return () if speed is None else paired_speed(speed, whole.name, without, comparisons=len(plan.pairs))

    contributions = tuple(_contribution(variant, whole, report, results, compare) for variant in plan.variants)
    stages = tuple(stage for stage in report.stages if stage.name not in lost)
    own = report.model_copy(update={"stages": tuple(stage for stage in stages if stage.name not in extra)})
    made = tuple(stage.name for stage in stages if stage.name in extra)
    ablation = Ablation(stage=plan.end, contributions=contributions, extra_stages=made)
    note = (
        f"--ablate {plan.end}: only the chain that ends in {plan.end}, that chain without each of its passes, and "
        f"{report.baseline} were made and measured"
    )
    changes = {"stages": stages, "pareto": pareto(own), "ablation": ablation, "notes": (*report.notes, note)}
    return report.model_copy(update=changes)


def _failed(stage: StageReport) -> bool:
    return stage.status in {"failed", "skipped", "unmeasured"}


def _contribution(
    variant: Variant,
    whole: StageReport,
    report: Report,
    results: Mapping[str, StageResult],
    compare: Callable[[str], tuple[PairedSpeed, ...]],
) -> Contribution:
    if variant.end is None:
        return Contribution(stage=variant.dropped, variant=None, reason=variant.reason)
    for name in [*(stage.name for stage in variant.stages), variant.end]:
        if results[name].artifact is None:
            return Contribution(stage=variant.dropped, variant=None, reason=f"{name}: {results[name].reason}")
    without = report.stage(variant.end)
    if _failed(without):
        return Contribution(stage=variant.dropped, variant=None, reason=f"{variant.end}: {without.reason}")
    speed = compare(without.name)
    reason = None
    if whole.artifact is None or _failed(whole):
        reason = f"{whole.name}: {whole.reason}"
    elif not speed:
        reason = "speed was not measured in rounds that both ran in"
    return Contribution(
        stage=variant.dropped,
        variant=variant.end,
        reason=reason,
        same_artifact=_is_same(whole, without),
        speed=speed,
        perplexity_ratio=_perplexity_ratio(whole, without, report),
        kl_divergence_change=_kl_change(whole, without, report),
        size_bytes_change=whole.artifact.size_bytes - without.artifact.size_bytes
        if whole.artifact and without.artifact
        else None,
    )


def _is_same(whole: StageReport, without: StageReport) -> bool:
    """Whether both chains end in one artifact, byte for byte."""
    both = [stage.artifact.digest if stage.artifact else None for stage in (whole, without)]
    return both[0] is not None and both[0] == both[1]


def _perplexity_ratio(whole: StageReport, without: StageReport, report: Report) -> float | None:
    """None where one is not known, or the weights are random and perplexity means nothing."""
    if report.model is not None and report.model.random_weights:
        return None
    a, b = (stage.quality.perplexity if stage.quality else None for stage in (whole, without))
    return a / b if a and b else None


def _kl_change(whole: StageReport, without: StageReport, report: Report) -> float | None:
    a, b = (_divergence(stage, report) for stage in (whole, without))
    return a - b if a is not None and b is not None else None


def _divergence(stage: StageReport, report: Report) -> float | None:
    """From the baseline, nats a token; the baseline's own is zero."""
    if stage.name == report.baseline:
        return 0.0
    paired = stage.quality.vs_baseline if stage.quality else None
    return paired.kl_divergence if paired else None
