"""Gates as a recipe states them: read, and refused where no run of the recipe could ever evaluate or pass them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pipeline.errors import RecipeError, did_you_mean
from pipeline.measure.workload import Point, Workload
from pipeline.recipe.positions import Positions
from pipeline.recipe.schema import SOURCE, Gate, RecipeModel, parse_gate
from pipeline.report.gates import METRICS, SELECTORS


def checked_gates(
    recipe: RecipeModel,
    names: Sequence[str],
    unmeasured: Collection[str],
    positions: Positions,
    elsewhere: Mapping[str, int],
) -> list[Gate]:
    """The recipe's gates.

    Args:
        names: of the recipe's stages, without the source.
        unmeasured: those of them that are made and never run.
        elsewhere: stages that other cells of the matrix have, and in which one.

    Raises: RecipeError at the place of a gate that cannot be read, names what is not there, or cannot be evaluated.
    """
    known, gates = [SOURCE, *names], []
    for i, text in enumerate(recipe.gates):
        where = positions.find(("gates", i))
        try:
            gate = parse_gate(text)
        except ValueError as error:
            raise RecipeError(str(error), location=where) from None
        if gate.stage not in known:
            hint = did_you_mean(gate.stage, known, noun="stages")
            if gate.stage in elsewhere:
                hint = f"cell {elsewhere[gate.stage]} has it; every cell needs the stages of its gates; {hint}"
            raise RecipeError(f"gate {text!r}: there is no stage {gate.stage!r}", location=where, hint=hint)
        if gate.metric not in METRICS:
            raise RecipeError(
                f"gate {text!r}: there is no metric {gate.metric!r}",
                location=where,
                hint=did_you_mean(gate.metric, METRICS, noun="metrics"),
            )
        for key, value in gate.selector.items():
            if not METRICS[gate.metric].by_point:
                raise RecipeError(f"gate {text!r}: {gate.metric} has no workload points to select", location=where)
            if key not in SELECTORS:
                hint = did_you_mean(key, SELECTORS, noun="selectors")
                raise RecipeError(f"gate {text!r}: there is no selector {key!r}", location=where, hint=hint)
            if not value.isdigit():
                raise RecipeError(f"gate {text!r}: {key} should be a number of tokens or sequences", location=where)
        why, hint = _hopeless(gate, recipe)
        if gate.stage in unmeasured and not METRICS[gate.metric].unrun:
            why, hint = f"{gate.stage} is not to be measured", "take `measure: false` out of its entry"
        if why:
            raise RecipeError(f"gate {text!r}: {why}", location=where, hint=hint)
        gates.append(gate)
    return gates


def _hopeless(gate: Gate, recipe: RecipeModel) -> tuple[str, str]:
    """(why no run of the recipe could evaluate or pass the gate, what to try); empty where one could."""
    metric, baseline = METRICS[gate.metric], recipe.evaluate.baseline
    if metric.paired and gate.stage == baseline:
        return f"{baseline} is the baseline, with which {gate.metric} compares", "name another stage"
    if metric.over == "vs_parent" and gate.stage == SOURCE:
        return (
            f"{SOURCE} was made from no other stage",
            f"{gate.metric.removesuffix('_over_parent')} compares with the baseline",
        )
    timed = list(Workload.of(recipe.evaluate.workload).points())
    kinds = list(dict.fromkeys(point.kind for point in timed))
    needed = [kind for kind in metric.kinds if kind in kinds]
    if metric.kinds and not needed:
        return (
            f"the workload times {' and '.join(kinds)}, and {gate.metric} is of {' or '.join(metric.kinds)}",
            "evaluate.workload.forward times whole passes; prompt_lengths, new_tokens and batch_sizes the rest",
        )
    points = [_selectable(point) for point in timed if point.kind in needed]
    wanted = {key: int(value) for key, value in gate.selector.items()}
    if wanted and not any(all(point.get(key) == value for key, value in wanted.items()) for point in points):
        there = "; ".join(dict.fromkeys(", ".join(f"{k}: {v}" for k, v in point.items()) for point in points))
        return "the workload has no such point", f"it has {there}"
    if metric.share and gate.comparison in {">", ">=", "=="} and gate.bound > 1:
        return f"{gate.metric} is a share, which is never more than 1", f"{gate.bound / 100:g} is {gate.bound:g} %"
    return "", ""


def _selectable(point: Point) -> dict[str, int]:
    """What a selector may say of the point."""
    found = {"batch": point.batch, "prompt": point.prompt}
    return {**found, "new_tokens": point.new_tokens} if point.kind == "decode" else found
