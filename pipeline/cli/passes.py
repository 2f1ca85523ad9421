"""`pipeline passes`"""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import JsonOption
from pipeline.cli.verb import Verbs

app = Verbs(help="The passes that are installed.", invoke_without_command=True, no_args_is_help=False)


@app.callback()
def passes_verb(context: typer.Context, json: JsonOption = False) -> None:
    """List the passes that are installed."""
    if context.invoked_subcommand is None:
        list_passes(json)


@app.command("list")
def list_verb(
    olive: Annotated[
        bool, typer.Option("--olive", help="The passes of Microsoft's Olive, which `olive` runs.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the passes that are installed, or those of Olive."""
    if olive:
        list_further_passes("olive", json)
    else:
        list_passes(json)


def list_further_passes(catalogue: str, json: bool) -> None:
    """Print the passes of another project."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.further_passes import further_passes

    found = further_passes(catalogue)
    if json:
        print_json([entry.model_dump(mode="json") for entry in found])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("type", "takes", "yields", "here", "what it needs"):
        table.add_column(column, overflow="fold")
    for entry in found:
        table.add_row(entry.name, entry.takes, entry.yields, "yes" if entry.runs_here else "no", escape(entry.needs))
    console().print(table)
    console().print(f"{sum(entry.runs_here for entry in found)} of {len(found)} can run here")


def list_passes(json: bool) -> None:
    """Print the installed passes."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.passes_catalogue import describe_pass
    from pipeline.plugin import Registry

    registry = Registry()
    described = [describe_pass(registry, name) for name in registry.names()]
    if json:
        print_json([d.model_dump(mode="json") for d in described])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("pass", "takes", "yields", "what it does", "from"):
        table.add_column(column, overflow="fold")
    for d in described:
        what = d.summary if d.problem is None else f"cannot be used: {d.problem}"
        table.add_row(d.name, ", ".join(d.accepts), d.produces or "", escape(what), escape(d.origin))
    console().print(table)


@app.command("show")
def show_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pass's name.")], json: JsonOption = False
) -> None:
    """Show a pass: what it does, its parameters, what it needs."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.errors import PipelineError
    from pipeline.passes_catalogue import describe_pass
    from pipeline.plugin import Registry

    registry = Registry()
    registry.info(name)
    described = describe_pass(registry, name)
    if json:
        print_json(described.model_dump(mode="json"))
        return
    if described.problem is not None:
        raise PipelineError(described.problem)
    output = console()
    output.print(f"[bold]{described.name}[/] (version {described.version}, from {escape(described.origin)})")
    output.print(escape(described.documentation))
    output.print(f"takes {', '.join(described.accepts)}, yields {described.produces}")
    if described.libraries or described.depends_on:
        output.print(f"its key holds the versions of {', '.join(described.libraries) or 'no library'}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("parameter", "type", "default", "description"):
        table.add_column(column, overflow="fold")
    for p in described.parameters:
        table.add_row(p.name, escape(p.type), escape(p.default), escape(p.description))
    output.print(table)
