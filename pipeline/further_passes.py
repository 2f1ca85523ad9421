"""Passes of other projects that a pass of ours can run by name: what is known of each, and whether it can run here.

A package names a function in the entry-point group `pipeline.catalogues`, by the name of the pass that runs them. It
gives the entries, and with `named` that one alone, with its parameters. `pipeline passes list --olive` shows those of
`olive`, `pipeline passes show olive --type NAME` one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.errors import PipelineError, RecipeError, did_you_mean
from pipeline.passes_catalogue import Parameter

CATALOGUES = "pipeline.catalogues"


class FurtherPass(Frozen):
    """One pass of another project."""

    name: str
    takes: str = Field(description="format")
    yields: str = Field(description="format, or in words what it yields instead")
    runs_here: bool
    needs: str = Field("", description="why it cannot run here, and what would help")
    parameters: tuple[Parameter, ...] | None = Field(None, description="None: not asked for, or nobody can tell")


def further_passes(catalogue: str) -> list[FurtherPass]:
    """The entries of the catalogue of that name.

    Raises: PipelineError where no installed package has one, or it cannot be read.
    """
    found: Iterable[FurtherPass] = _entries_of(catalogue)()
    return list(found)


def further_pass(catalogue: str, name: str) -> FurtherPass:
    """One entry of the catalogue, with its parameters where they are known.

    Raises: RecipeError where it has none of that name; PipelineError as above.
    """
    entries = _entries_of(catalogue)
    found: FurtherPass | None = next((entry for entry in entries(named=name) if entry.name == name), None)
    if found is None:
        names = [entry.name for entry in entries()]
        raise RecipeError(f"{catalogue} runs no pass named {name!r}", hint=did_you_mean(name, names, noun="types"))
    return found


def _entries_of(catalogue: str) -> Any:
    point = next(iter(entry_points(group=CATALOGUES, name=catalogue)), None)
    if point is None:
        raise PipelineError(f"no installed package has a catalogue of passes named {catalogue!r}")
    return point.load()
