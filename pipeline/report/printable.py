"""A report without control characters: what strangers named is shown, and moves no cursor and turns no text round."""

from __future__ import annotations

from typing import Any, TypeVar

from pipeline.report.figures import printable
from pipeline.report.schema import Part

Whole = TypeVar("Whole", bound=Part)


def without_controls(part: Whole) -> Whole:
    """The same report with every control character in its words written out: `\\x1b`.

    Every renderer begins with this, so that none has to think of it at a hundred places. The JSON that a page offers to
    save is as it was, for JSON writes such characters out itself.
    """
    return type(part).model_validate(_printable(part.model_dump(by_alias=True)))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(each) for each in value]
    return value
