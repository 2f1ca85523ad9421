"""Why a stage has to run: its key's ingredients against those of the run of it that is most alike."""

from __future__ import annotations

import json
from typing import Any

from pipeline.artifact import Frozen
from pipeline.errors import RecipeError, did_you_mean
from pipeline.plan import Plan, PlannedStage
from pipeline.store import StageRecord, Store

ABSENT = "absent"
LONGEST = 72


class Change(Frozen):
    """One ingredient of the key that differs."""

    what: str
    before: str
    now: str


class Explanation(Frozen):
    stage: str
    status: str
    reason: str = ""
    compared_with: str | None = None
    changes: tuple[Change, ...] = ()


def explain_stage(plan: Plan, name: str, store: Store) -> Explanation:
    """Compare the stage, and where it is itself unchanged its ancestors, with what the store remembers.

    Raises: RecipeError where the plan has no such stage.
    """
    names = [s.name for s in plan.stages]
    if name not in names:
        raise RecipeError(f"there is no stage {name!r}", hint=did_you_mean(name, names, noun="stages"))
    stage = plan.stage(name)
    if stage.status == "cached":
        reason = stage.reason or f"its key {stage.key[:12]} is in the store"
        return Explanation(stage=name, status=stage.status, reason=reason)
    nearest = _nearest(plan, stage, store)
    if nearest is None:
        reason = f"the store has no run of the pass {stage.pass_name!r}"
        return Explanation(stage=name, status=stage.status, reason=reason)
    changes = differing(comparable_ingredients(nearest.ingredients, stage.ingredients), stage.ingredients)
    for role, needed in {"its parent": stage.parent, **stage.inputs}.items():
        parent = plan.stage(needed) if needed else None
        if parent is not None and parent.status != "cached":
            changes.append(Change(what=f"{role} {parent.name}", before="as it was", now=parent.status))
    if not changes and stage.ingredients.keys() == {"code"}:
        reason = "its file is as it was; it is not run, so that nothing else of it can be compared"
        return Explanation(stage=name, status=stage.status, reason=reason, compared_with=nearest.created)
    if not changes:
        reason = "its own part is unchanged; what it is made from is not, or its artifact was damaged or removed"
        return Explanation(stage=name, status=stage.status, reason=reason, compared_with=nearest.created)
    return Explanation(
        stage=name, status=stage.status, reason=stage.reason, compared_with=nearest.created, changes=tuple(changes)
    )


def comparable_ingredients(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Of `before`, what is known of `now`, too: of a pass in a file that is not run, only its text."""
    return {"code": before.get("code", ABSENT)} if now.keys() == {"code"} else before


def _nearest(plan: Plan, stage: PlannedStage, store: Store) -> StageRecord | None:
    """The remembered run of the same pass with the fewest differences; this recipe's stage first, then the newest."""
    candidates = [r for r in store.records() if r.pass_name == stage.pass_name]

    def distance(record: StageRecord) -> tuple[bool, int]:
        same = (record.recipe, record.stage) == (plan.recipe, stage.name)
        before = comparable_ingredients(record.ingredients, stage.ingredients)
        return (not same, len(differing(before, stage.ingredients)))

    return min(candidates, key=distance, default=None)


def differing(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[Change]:
    """What of two nested mappings is not the same, by dotted names."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(Change(what=prefix + key, before=_short(old), now=_short(new)))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):  # a digest
        return text[:12]
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
