"""`pipeline passes`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import AllowCodeOption, JsonOption
from pipeline.cli.passes_check import check_verb
from pipeline.cli.verb import Verbs

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.passes_catalogue import Parameter, PassDescription

app = Verbs(help="The passes that are installed, and new ones.", invoke_without_command=True, no_args_is_help=False)


@app.callback()
def passes_verb(context: typer.Context, json: JsonOption = False) -> None:
    """The passes that are installed, and new ones. Without a command: list them."""
    if context.invoked_subcommand is None:
        list_passes(json)


@app.command("list")
def list_verb(
    olive: Annotated[
        bool, typer.Option("--olive", help="The passes of Microsoft's Olive, which `olive` runs.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the passes that are installed, those that cannot be used with the reason; or those of Olive."""
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
        print_json([entry.model_dump(mode="json", exclude={"parameters"}) for entry in found])
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


app.command("check")(check_verb)


@app.command("show")
def show_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pass's name; or ./FILE.py:CLASS, below this folder.")],
    type_: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="One of the passes that it runs by name, as `olive` does."),
    ] = None,
    allow_code: AllowCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Show a pass: what it does, its parameters, what it needs.

    Of one in a file, without --allow-code, what its text says.
    """
    from pipeline.cli.output import console, print_json
    from pipeline.errors import PipelineError
    from pipeline.file_pass import find_code
    from pipeline.passes_catalogue import describe_pass
    from pipeline.plugin import Registry

    if type_ is not None:
        show_further_pass(name, type_, json)
        return
    registry = Registry(code="run" if allow_code else "read")
    with redirect_stdout(sys.stderr):  # a file may print when it is imported
        described = describe_pass(registry, name, find_code(name, Path.cwd(), named_by="this command"))
    if json:
        print_json(described.model_dump(mode="json"))
    elif described.problem is not None:
        raise PipelineError(f"{name}, from {described.origin}, cannot be used: {described.problem}")
    else:
        _print_pass(described, console())


def show_further_pass(catalogue: str, name: str, json: bool) -> None:
    """Print a pass of another project, with its parameters."""
    from rich.markup import escape

    from pipeline.cli.output import console, print_json
    from pipeline.further_passes import further_pass

    found, output = further_pass(catalogue, name), console()
    if json:
        print_json(found.model_dump(mode="json"))
        return
    output.print(f"[bold]{escape(found.name)}[/], which {escape(catalogue)} runs")
    output.print(escape(f"takes {found.takes}, yields {found.yields}"))
    output.print("it can run here" if found.runs_here else escape(f"it cannot run here: {found.needs}"))
    output.print()
    if found.parameters is None:
        output.print("its parameters are not known: its packages are not installed")
    else:
        _print_parameters(found.parameters, output)


@app.command("new")
def new_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The pass's name, such as drop_identity.")],
    takes: Annotated[str, typer.Option("--takes", metavar="onnx|torch", help="What the pass changes.")] = "onnx",
    into: Annotated[
        Path | None, typer.Option("--into", help="The folder that is made. Default: the name, with - for _.")
    ] = None,
) -> None:
    """Write a new package with a pass, a test and a README."""
    from pipeline.new_pass import write_package

    folder = write_package(name, takes=takes, into=into)
    typer.echo(f"wrote {folder}: a pass, its test and a README")
    typer.echo(f"next:  pip install -e {folder}")
    typer.echo(f"       pytest {folder}")
    typer.echo(f"       pipeline passes show {name}")


def _print_pass(d: PassDescription, output: Console) -> None:
    from rich.markup import escape

    version = "of unknown version" if d.version is None else f"version {d.version}"
    output.print(f"[bold]{escape(d.name)}[/] ({version}, from {escape(d.origin)})")
    output.print(escape(d.documentation))
    output.print()
    inputs = f", and in `inputs` {' and '.join(d.roles)}" if d.roles else ""
    unknown = "what only its code says"
    output.print(escape(f"takes {' or '.join(d.accepts) or unknown}{inputs}, yields {d.produces or unknown}"))
    if d.is_known_by_text:
        output.print("its code was not run: what it needs and its parameters are seen with --allow-code")
        return
    output.print(escape(f"needs {_needs(d)}"))
    for other, reason in d.comes_before.items():
        output.print(escape(f"comes before {other}: {reason}"))
    for other, reason in d.comes_after.items():
        output.print(escape(f"comes after {other}: {reason}"))
    key = [*(f"the version of {name}" for name in d.libraries), *d.depends_on]
    output.print(escape(f"its key holds its code and parameters{', ' if key else ''}{', '.join(key)}"))
    if not d.deterministic:
        output.print("two runs of it differ: the first result that is stored stands")
    output.print()
    _print_parameters(d.parameters, output)


def _print_parameters(parameters: Sequence[Parameter], output: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if not parameters:
        output.print("it has no parameters")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("parameter", "type", "default", "description"):
        table.add_column(column, overflow="fold")
    for p in parameters:
        table.add_row(escape(p.name), escape(p.type), escape(p.default), escape(p.description))
    output.print(table)


def _needs(d: PassDescription) -> str:
    """What the host must have, in words."""
    needs = [] if d.requires.device == "any" else [{"cpu": "a CPU", "cuda": "a CUDA GPU"}[d.requires.device]]
    needs += d.requires.providers
    needs += [f"instructions {name}" for name in d.requires.instruction_sets]
    needs += [f"the program {name.replace('|', ' or ')}" for name in d.requires.programs]
    return ", ".join(needs) or "no particular hardware"
