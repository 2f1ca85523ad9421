"""From a recipe to a plan on this host: its model, its profile and its evaluation text are found, nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError, RecipeError
from pipeline.hardware import HardwareProfile, Host, describe_host, load_profile
from pipeline.hardware.probe import probe_folder
from pipeline.measure.quality import encode
from pipeline.models import Source, evaluation_text, find_source
from pipeline.models.source import TOKENIZER
from pipeline.plan import Plan, make_plan, select_stages
from pipeline.plugin import Code, Registry
from pipeline.recipe import Recipe, Stage
from pipeline.store import Store, default_store_path

LONG_TOKEN = 32
"""Characters: a text with as many for every token of a window is long enough without counting."""


def plan_recipe(
    recipe: Recipe,
    *,
    store: Store | None = None,
    until: str | None = None,
    only: str | None = None,
    force: bool = False,
    code: Code = "read",
) -> Plan:
    """What `run` would do, without doing it. `code`: what becomes of passes in files; by default none of it is run.

    Raises: RecipeError for what is wrong in the recipe; HostError where its model cannot be had here.
    """
    host = describe_host()
    store = store or Store(default_store_path())
    source = source_of(recipe, download=False)
    evaluation_text_of(recipe, source)
    return resolve(recipe, source, store, host, until=until, only=only, force=force, code=code)


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
    code: Code = "refuse",
) -> Plan:
    """The plan of what was found: of `stages`, or of those that `until` and `only` select.

    Raises: RecipeError where the profile, a pass or a parameter is not right.
    """
    return make_plan(
        recipe,
        source=source,
        store=store,
        registry=Registry(code=code),
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


def evaluation_text_of(recipe: Recipe, source: Source | None = None) -> str:
    """The text that quality is measured on, long enough for the model `source`, where that is given.

    Raises: RecipeError where it is not there, not text, or gives less than one window of tokens.
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
    if "\0" in text:
        place = len(text[: text.index("\0")].encode())
        raise RecipeError(f"{path} is not text: byte {place} is zero", location=where)
    if not text.strip():
        raise RecipeError(f"the evaluation text {path} is empty", location=where)
    if source is not None:
        _check_length(recipe, source, text, path)
    return text


def _check_length(recipe: Recipe, source: Source, text: str, path: Path) -> None:
    """Raises: RecipeError where the tokens that are to be scored do not fill one window.

    Tokens are counted only where there may be too few. Without a tokenizer there is nothing to count, and seeded tokens
    are as many as are asked for.
    """
    wanted = recipe.evaluate.quality
    window = min(wanted.window, source.max_length or wanted.window)
    if wanted.tokens < window:
        raise RecipeError(
            f"{wanted.tokens} tokens are to be scored, and a window has {window}",
            hint="raise evaluate.quality.tokens, or lower evaluate.quality.window",
            location=recipe.location("evaluate", "quality", "tokens"),
        )
    if source.architecture is not None or not source.has_tokenizer or len(text) >= window * LONG_TOKEN:
        return
    try:
        count = len(encode(source.folder / TOKENIZER, text, limit=window))
    except PipelineError:  # a damaged tokenizer is the model's fault, and told where quality is measured
        return
    if count < window:
        raise RecipeError(
            f"the evaluation text {path} gives {count} tokens, less than one window of {window}",
            hint=f"give a longer text, or set evaluate.quality.window to {count} at most"
            if count >= 2
            else "give a longer text",
            location=recipe.location("evaluate", "quality", "text"),
        )
