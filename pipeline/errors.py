"""Errors for the person who reads them. Each carries the exit code that the command line ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple


class Location(NamedTuple):
    """A place in a file that a person wrote. Lines and columns count from 1; line 0 means the whole of it."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class PipelineError(Exception):
    """Something a user can act on: `message` says what was wrong, `hint` what to try."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class RecipeError(PipelineError):
    """The recipe, a file it names, or the command line is wrong."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, location: Location | None = None) -> None:
        super().__init__(f"{location}: {message}" if location else message, hint=hint)
        self.location = location


class HostError(PipelineError):
    """The plan cannot run on this host."""

    exit_code = 4


class StageError(PipelineError):
    """A stage failed while it ran."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` was most likely meant to be, or None where none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str], *, noun: str = "known names") -> str:
    """A hint: the nearest known name if there is one, and all of them in any case."""
    names = sorted(known)
    listing = f"{noun}: {', '.join(names) or 'none'}"
    near = nearest(word, names)
    return f"did you mean {near!r}? {listing}" if near else listing
