"""`pipeline import-olive`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def import_olive_verb(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A workflow of Olive, in JSON or YAML.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The recipe's file; default: NAME.yaml here, or NAME-recipe.yaml."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Turn a workflow of Microsoft's Olive into a recipe.

    What a recipe cannot say is printed, and stands as comments at its head.
    """
    from pipeline.errors import RecipeError
    from pipeline.import_olive import import_olive
    from pipeline.plugin import Registry
    from pipeline.recipe.load import recipe_from_text
    from pipeline.recipe.parameters import check_parameters

    target = output or Path(f"{file.stem}.yaml")
    if target.resolve() == file.resolve():
        if output is not None:
            raise RecipeError(f"{output} is the workflow itself", hint="--output FILE writes elsewhere")
        target = Path(f"{file.stem}-recipe.yaml")
    folder = target.parent.absolute()
    if not folder.is_dir():
        raise RecipeError(f"the folder {folder} is not there")
    if target.is_dir():
        raise RecipeError(f"{target} is a folder", hint="give the recipe's file, for example --output my-model.yaml")
    if target.exists() and not force:
        raise RecipeError(f"{target} is there already", hint="--force overwrites it, --output FILE writes elsewhere")
    registry = Registry()
    imported = import_olive(file, recipe_folder=folder, registry=registry)
    check_parameters(recipe_from_text(imported.text, file=str(target), folder=folder), registry)
    target.write_text(imported.text, encoding="utf-8")
    typer.echo(f"wrote {target}")
    for reason in imported.left_out:
        typer.echo(f"not carried over: {reason}", err=True)
    typer.echo("next:")
    typer.echo(f"  pipeline plan {shlex.quote(str(target))}    # what a run would do")
