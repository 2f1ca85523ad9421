"""How the verbs print."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.errors import PipelineError

WIDTH_WITHOUT_TERMINAL = 120


def fail(error: PipelineError) -> int:
    """Print the error for the person who has to act on it; return its exit code."""
    from pipeline.report.figures import printable

    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(printable(str(error)), err=True)
    return error.exit_code


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def console() -> Console:
    """A console for tables; wide enough where the output is a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)
