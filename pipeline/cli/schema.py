"""`pipeline schema`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def schema_verb(
    report: Annotated[bool, typer.Option("--report", help="The schema of report.json instead.")] = False,
    group: Annotated[bool, typer.Option("--group", help="The schema of groups of passes instead.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to this file instead.")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes.

    It holds the parameters of the passes that are installed here. Editors complete and check recipes with it, for
    example where a recipe begins with `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from pipeline.errors import RecipeError

    if report and group:
        raise RecipeError("--report and --group exclude each other")
    text = json.dumps(_schema("report" if report else "group" if group else "recipe"), indent=2, ensure_ascii=False)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{output} cannot be written: {error.strerror}") from None
    typer.echo(f"schema: {output}")


def _schema(of: Literal["recipe", "group", "report"]) -> object:
    from pipeline.plugin import Registry
    from pipeline.recipe.json_schema import group_json_schema, recipe_json_schema
    from pipeline.report.schema import report_json_schema

    if of == "report":
        return report_json_schema()
    return recipe_json_schema(Registry()) if of == "recipe" else group_json_schema(Registry())
