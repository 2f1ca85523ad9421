"""A page from its template: everything that is put in is escaped, and a name that is not given is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """The whole page, from a template of this package; the same template has the same filters each time."""
    environment = _environment(template)
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values) + "\n"


@cache
def _environment(template: str) -> Environment:
    """One for each kind of page, which keeps what it compiled of the templates: a process may write many pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
