"""Plans over passes of the test's own, run as a run does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.execute import StageResult, execute
from pipeline.hardware import describe_host, load_profile
from pipeline.models import find_source
from pipeline.plan import make_plan
from pipeline.plugin import Registry
from pipeline.recipe.load import recipe_from_text
from pipeline.store import Store

Run = Callable[..., dict[str, StageResult]]


@pytest.fixture
def run_passes(plugins: Path, checkpoint: Path, store: Store) -> Run:
    """Plan and execute `passes`, written as in a recipe, over the checkpoint."""

    def run(passes: str, *, at: Store = store, **how: object) -> dict[str, StageResult]:
        text = f"version: 1\nname: x\nmodel: {{path: {checkpoint}}}\npasses: {passes}\n"
        recipe = recipe_from_text(text, file="r.yaml", folder=checkpoint)
        host = describe_host()
        source = find_source("path", str(checkpoint), relative_to=checkpoint)
        profile = load_profile("local", host=host)
        plan = make_plan(recipe, source=source, store=at, registry=Registry(), profile=profile, host=host)
        return execute(plan, source=source, store=at, **how)  # type: ignore[arg-type]

    return run
