"""Passes of other projects that a pass of ours can run by name: what is known of each, and whether it can run here.

A package names a function in the entry-point group `pipeline.catalogues`; it gives the entries. `pipeline passes list
--olive` shows the one that is called `olive`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.errors import PipelineError

CATALOGUES = "pipeline.catalogues"


class FurtherPass(Frozen):
    """One pass of another project."""

    name: str
    takes: str = Field(description="format")
    yields: str = Field(description="format, or in words what it yields instead")
    runs_here: bool
    needs: str = Field("", description="why it cannot run here, and what would help")


def further_passes(catalogue: str) -> list[FurtherPass]:
    """The entries of the catalogue of that name.

    Raises: PipelineError where no installed package has one, or it cannot be read.
    """
    point = next(iter(entry_points(group=CATALOGUES, name=catalogue)), None)
    if point is None:
        raise PipelineError(f"no installed package has a catalogue of passes named {catalogue!r}")
    found: Iterable[FurtherPass] = point.load()()
    return list(found)
