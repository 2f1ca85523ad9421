"""An architecture whose weights are drawn from a seed: what can be said of it before anything is drawn."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.errors import RecipeError, did_you_mean
from pipeline.models.outlier_channels import check_family
from pipeline.models.transformers_index import causal_language_models, configuration_fields

LIBRARIES = ("torch", "transformers")
"""Their versions decide what a seed draws."""

RESERVED = ("model_type", "architectures", "dtype", "torch_dtype", "auto_map", "transformers_version")
"""Fields of a configuration that the recipe says in other ways, or that follow from it."""


def check_architecture(kind: str, config: dict[str, Any], *, outliers: bool = False) -> None:
    """Compare type and field names with what the installed transformers knows; values are checked when it is built.

    Raises: RecipeError where there is no such architecture or field, or it cannot be given the outlier channels that
    are asked for.
    """
    known = causal_language_models()
    if known and kind not in known:
        raise RecipeError(
            f"transformers has no causal language model of type {kind!r}",
            hint=did_you_mean(kind, known, noun="types"),
        )
    check_fields(kind, config, configuration_fields(kind))
    if outliers:
        check_family(kind)


def check_fields(kind: str, config: dict[str, Any], known: frozenset[str]) -> None:
    """Raises: RecipeError where a key is no field of the configuration; with nothing known, only for reserved ones."""
    for name in config:
        if name in RESERVED:
            hint = "`model.dtype` says it" if "dtype" in name else "it follows from `type`"
            raise RecipeError(f"the architecture cannot be given {name!r}", hint=hint)
        if known and name not in known:
            hint = did_you_mean(name, known - set(RESERVED), noun="fields")
            raise RecipeError(f"the configuration of {kind!r} has no field {name!r}", hint=hint)


def library_versions() -> dict[str, str]:
    """Versions that enter the key of random weights."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
