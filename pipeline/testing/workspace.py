"""Where a pass is tried: small models, a store of what comes before it, and a fresh store for each run of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.execute import StageResult, Watch, execute
from pipeline.files import copy_file
from pipeline.hardware import HardwareProfile, Host, describe_host, load_profile
from pipeline.models import Source, find_source
from pipeline.plan import Plan, PlannedStage, make_plan
from pipeline.plugin import Registry
from pipeline.recipe import Recipe
from pipeline.recipe.load import recipe_from_text
from pipeline.store import Store
from pipeline.store.writer import BLOBS
from pipeline.testing.models import tiny_llama

CHECKED = "checked"
"""The stage of the pass that is tried."""

Entry = Mapping[str, Any]


class Workspace:
    """A folder that several checks may share: what comes before the passes is made in it once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self._count = 0

    @cached_property
    def host(self) -> Host:
        return describe_host()

    @cached_property
    def profile(self) -> HardwareProfile:
        return load_profile("local", host=self.host)

    def model(self, *, other: bool = False) -> Path:
        """The small model, or one of the same shapes with other weights."""
        return tiny_llama(self.folder / ("other-model" if other else "model"), seed=int(other))

    def new_store(self, folder: Path) -> Store:
        """An empty store below `folder`."""
        self._count += 1
        return Store(folder / f"store-{self._count}")

    def source(self, model: Path | None = None) -> Source:
        model = model or self.model()
        return find_source("path", str(model), relative_to=model)

    def recipe(self, entries: Iterable[Entry], model: Path | None = None) -> Recipe:
        """A recipe of those entries over the small model. Relative paths in it start where this process is.

        Raises: RecipeError where they do not fit together.
        """
        recipe = {
            "version": 1,
            "name": "conformance",
            "model": {"path": str(model or self.model())},
            "passes": list(entries),
            "evaluate": {"workload": {"forward": [[1, 8]]}},  # which a model without a cache can be asked for, too
        }
        return recipe_from_text(json.dumps(recipe), file="the recipe of the check", folder=Path.cwd())

    def plan(self, entries: Iterable[Entry], model: Path | None = None) -> Plan:
        """The plan of those entries over the small model.

        Raises: RecipeError where they do not fit together, or a parameter is not right.
        """
        model = model or self.model()
        return make_plan(
            self.recipe(entries, model),
            source=self.source(model),
            store=self.store,
            registry=Registry(code="run"),
            profile=self.profile,
            host=self.host,
        )

    def make_what_comes_before(self, plan: Plan, watch: Watch) -> dict[str, StageResult]:
        """Run all stages but the one that is tried, or take them from the store."""
        before = plan.model_copy(update={"stages": plan.stages[:-1]})
        return execute(before, source=self.source(), store=self.store, watch=watch)

    def provide(self, plan: Plan, store: Store, *, swapped: str | None = None) -> None:
        """Put what comes before the last stage into `store`.

        `swapped`: digest of an artifact there that stands for the one that the pass comes after.
        """
        parent = plan.stages[-1].parent
        for stage in plan.stages[:-1]:
            carry_over(stage, self.store, store, artifact=swapped if stage.name == parent else None)

    def try_pass(self, plan: Plan, store: Store, watch: Watch) -> StageResult:
        """Run the last stage in `store`, which was provided with what comes before it."""
        return execute(plan, source=self.source(), store=store, watch=watch)[plan.stages[-1].name]


def carry_over(stage: PlannedStage, source: Store, target: Store, *, artifact: str | None = None) -> None:
    """Copy a stage's artifact and its record from a store into another, or the record alone, for another artifact."""
    record = source.stage_record(stage.key)
    found = source.artifact(record.artifact) if record else None
    assert record is not None and found is not None, f"{stage.name} was not made"
    if artifact is None:
        with target.staging() as staging:
            (staging / BLOBS).mkdir()
            for _, entry in found.manifest.entries():
                if entry.path is None:
                    copy_file(found.locate(entry), staging / BLOBS / entry.digest)
            target.publish(staging, found.manifest)
    else:
        record = record.model_copy(update={"artifact": artifact})
    target.put_record(record, own=stage.own, inputs="carried-over")


def entries_of(given: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a recipe from passes' names and mappings."""
    return [{"pass": entry} if isinstance(entry, str) else dict(entry) for entry in given]
