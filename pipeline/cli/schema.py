"""`pipeline schema`"""

from __future__ import annotations

from typing import Annotated

import typer


def schema_verb(
    report: Annotated[bool, typer.Option("--report", help="The schema of report.json instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes.

    It holds the parameters of the passes that are installed here. Editors complete and check recipes with it.
    """
    from pipeline.cli.output import print_json

    if report:
        from pipeline.report.schema import report_json_schema

        print_json(report_json_schema())
    else:
        from pipeline.plugin import Registry
        from pipeline.recipe.json_schema import recipe_json_schema

        print_json(recipe_json_schema(Registry()))
