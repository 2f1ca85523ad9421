"""`pipeline passes check`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import JsonOption

if TYPE_CHECKING:
    from pipeline.file_pass import CodeFile
    from pipeline.plugin import Registry
    from pipeline.testing import Findings

STAGE_FAILED, HOST_LACKS = 3, 4
COLOURS = {"passed": "green", "warning": "yellow", "failed": "red", "skipped": "bright_black"}


def check_verb(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A pass's name; or ./FILE.py:CLASS, below this folder: its code runs.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PARAMETER=VALUE", help="A parameter, e.g. bits=8. May be repeated."),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(
            "--after",
            metavar="ENTRY",
            help="A pass that comes before it: a name, or an entry as in a recipe, '{pass: export_onnx, verify: "
            "false}'. May be repeated, in order.",
        ),
    ] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="ROLE=STAGE", help="A further stage that it reads. May be repeated."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0, help="Largest difference of a logit from the model before.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", metavar="CHECK", help="A check to leave out. May be repeated.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that one run of it may take.")] = 300.0,
    json: JsonOption = False,
) -> int:
    """Check a pass: run it on a small model, and hold it against what every pass promises.

    Without --set, --after and --input it is tried as it says itself, in its `examples`.
    """
    import sys
    import tempfile
    from contextlib import redirect_stdout
    from pathlib import Path

    from pipeline.cli.output import print_json
    from pipeline.file_pass import find_code
    from pipeline.plugin import Registry
    from pipeline.testing import check_pass
    from pipeline.testing.conformance import examples_of

    registry = Registry(code="run")
    code = find_code(name, Path.cwd(), named_by="this command")
    if code is None:
        registry.info(name)
    own: dict[str, Any] = {
        "params": None if set_ is None else {key: _yaml(value) for key, value in map(_pair, set_)},
        "after": None if after is None else [_entry(text) for text in after],
        "inputs": None if input_ is None else dict(map(_pair, input_)),
        "tolerance": tolerance or None,
    }
    told = any(value is not None for key, value in own.items() if key != "tolerance")
    with redirect_stdout(sys.stderr):
        examples = [None] if told else _examples(registry, name, code, examples_of)
    # a file may print when it is imported
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        found = [
            check_pass(name, **own, example=example, skip=skip or (), timeout_s=timeout, workspace=Path(folder))
            for example in examples
        ]
    if json:
        print_json([{**f.model_dump(mode="json"), "ok": f.ok} for f in found])
    else:
        for findings in found:
            _print(findings)
    if any(f.failed for f in found):
        return STAGE_FAILED
    return HOST_LACKS if any(f.host_lacks for f in found) else 0


def _examples(registry: Registry, name: str, code: CodeFile | None, examples_of: Any) -> list[Any]:
    from pipeline.errors import PipelineError

    try:
        return list(examples_of(registry.load(name, code)))
    except PipelineError:  # it cannot be imported, which is what the check then says
        return [None]


def _pair(text: str) -> tuple[str, str]:
    """Raises: RecipeError where it is not KEY=VALUE."""
    from pipeline.errors import RecipeError

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"{text!r} is not KEY=VALUE")
    return key.strip(), value


def _yaml(text: str) -> Any:
    from pipeline.recipe.parsing import parse
    from pipeline.recipe.tree import plain

    node = parse(text, "--set")
    return None if node is None else plain(node)[0]


def _entry(text: str) -> Any:
    """A pass's name, or an entry as in a recipe.

    Raises: RecipeError where it is neither.
    """
    from pipeline.errors import RecipeError

    value = _yaml(text)
    if not (isinstance(value, str) or (isinstance(value, dict) and "pass" in value)):
        raise RecipeError(f"--after {text}: give a pass's name, or an entry such as '{{pass: export_onnx}}'")
    return value


def _print(findings: Findings) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console

    output = console()
    with_what = f" ({escape(findings.example)})" if findings.example else ""
    output.print(f"[bold]{escape(findings.pass_name)}[/]{with_what}, from {escape(findings.origin)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for finding in findings.findings:
        colour = COLOURS[finding.outcome]
        table.add_row(finding.check, f"[{colour}]{finding.outcome}[/]", escape(finding.message))
    output.print(table)
    passed, of = len(findings.of("passed")), len(findings.findings)
    output.print(f"{passed} of {of} checks passed, in {findings.seconds:.0f} s")
