"""`pipeline report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption

HTML = (".html", ".htm")
MARKDOWN = (".md", ".markdown")


def report_verb(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a recipe's name: its latest run.")],
    html: Annotated[bool, typer.Option("--html", help="One HTML file that needs nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown, as GitHub shows it.")] = False,
    json: JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write to FILE instead of printing; .html, .md or .json say how."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs' results.")] = Path("runs"),
) -> None:
    """Show the report of a run again.

    In the terminal, or as HTML, Markdown or JSON.
    """
    from pipeline.errors import RecipeError
    from pipeline.report.folder import read_report

    if sum((html, markdown, json)) > 1:
        raise RecipeError("--html, --markdown and --json exclude each other")
    if output is not None and not (html or markdown or json):  # the file's ending says what it should hold
        html, markdown, json = (output.suffix.lower() in endings for endings in (HTML, MARKDOWN, (".json",)))
    report = read_report(run, runs)
    if html:
        from pipeline.report.html import render_html

        text = render_html(report)
    elif markdown:
        from pipeline.report.markdown import render_markdown

        text = render_markdown(report)
    elif json:
        text = report.to_json()
    else:
        from pipeline.cli.output import console
        from pipeline.report.terminal import render, render_text

        if output is None:
            render(report, console())
            return
        text = render_text(report)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.is_dir():
        raise RecipeError(f"--output {output} is a folder; give a file")
    if not output.parent.is_dir():
        raise RecipeError(f"--output {output}: there is no folder {output.parent}")
    output.write_text(text, encoding="utf-8")
