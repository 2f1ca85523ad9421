"""From a recipe to a plan on this host: its model, its profile and its evaluation text are found, nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.hardware import HardwareProfile, Host, describe_host, load_profile
from pipeline.hardware.probe import probe_folder
from pipeline.models import Source, evaluation_text, find_source
from pipeline.plan import Plan, make_plan, select_stages
from pipeline.plugin import Registry
from pipeline.recipe import Recipe, Stage
from pipeline.store import Store, default_store_path


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
    source = source_of(recipe, download=False)
    evaluation_text_of(recipe)
    return resolve(recipe, source, store, host, until=until, only=only, force=force)


def source_of(recipe: Recipe, *, download: bool) -> Source:
    """The recipe's model; `download` allows the hub's files to be fetched.

    Raises: RecipeError, with the place in the recipe, where there is none; HostError where it cannot be had here.
    """
    model = recipe.model
    try:
        return find_source(
            model.kind,
            model.source,
            relative_to=recipe.folder_of("model", model.kind),
            revision=model.revision,
            dtype=model.dtype,
            download=download,
            trust_remote_code=model.trust_remote_code,
            architecture=model.architecture.model_dump() if model.architecture else None,
        )
    except RecipeError as error:
        where = recipe.location("model", model.kind)
        raise RecipeError(error.message, hint=error.hint, location=where) from None


def resolve(
    recipe: Recipe,
    source: Source,
    store: Store,
    host: Host,
    *,
    until: str | None = None,
    only: str | None = None,
    stages: Sequence[Stage] | None = None,
    force: bool,
) -> Plan:
    """The plan of what was found: of `stages`, or of those that `until` and `only` select.

    Raises: RecipeError where the profile, a pass or a parameter is not right.
    """
    return make_plan(
        recipe,
        source=source,
        store=store,
        registry=Registry(),
        profile=_profile(recipe, host, store),
        host=host,
        stages=select_stages(recipe, until=until, only=only) if stages is None else stages,
        force=force,
    )


def _profile(recipe: Recipe, host: Host, store: Store) -> HardwareProfile:
    try:
        return load_profile(
            recipe.hardware,
            host=host,
            relative_to=recipe.folder_of("hardware"),
            probe_folder=probe_folder(store.root),
        )
    except RecipeError as error:
        raise RecipeError(error.message, hint=error.hint, location=recipe.location("hardware")) from None


def evaluation_text_of(recipe: Recipe) -> str:
    """The text that quality is measured on.

    Raises: RecipeError where it is not there or not text.
    """
    given = recipe.evaluate.quality.text
    home = recipe.folder_of("evaluate", "quality", "text")
    path = evaluation_text() if given == "builtin" else (home / Path(given).expanduser()).resolve()
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
