"""`pipeline init`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def init_verb(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, an .onnx file, a built-in name or a hub id.")
    ],
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="PROFILE", help="The machine to optimize for; see `pipeline hardware`.")
    ] = "local",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The recipe's file; default: NAME.yaml here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Write a first recipe for a model.

    Commented, and fitting the model: `pipeline plan` accepts it as it is.
    """
    import json

    from pipeline.errors import RecipeError
    from pipeline.hardware import load_profile
    from pipeline.plugin import Registry
    from pipeline.recipe.json_schema import recipe_json_schema
    from pipeline.starter import SCHEMA_FILE, describe_model, recipe_name, starter_recipe

    if hardware != "local":
        load_profile(hardware, relative_to=Path.cwd())
    folder = (output.parent if output else Path()).absolute()
    if not folder.is_dir():
        raise RecipeError(f"the folder {folder} is not there")
    facts = describe_model(model, relative_to=Path.cwd(), recipe_folder=folder)
    name = recipe_name(facts)
    file = output or Path(f"{name}.yaml")
    if file.is_dir():
        raise RecipeError(f"{file} is a folder", hint="give the recipe's file, for example --output my-model.yaml")
    if file.exists() and not force:
        raise RecipeError(f"{file} is there already", hint="--force overwrites it, --output FILE writes elsewhere")
    if hardware.endswith((".yaml", ".yml")):
        hardware = str(Path(hardware).expanduser().resolve())
    registry = Registry()
    text = starter_recipe(facts, name=name, hardware=hardware, registry=registry)
    schema = folder / SCHEMA_FILE
    if not schema.exists():
        data = json.dumps(recipe_json_schema(registry), indent=2, ensure_ascii=False) + "\n"
        schema.write_text(data, encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {file}")
    if not facts.has_tokenizer:
        typer.echo("the model has no tokenizer.json beside it: its quality on text cannot be measured, its speed can")
    typer.echo("next:")
    if facts.downloaded:
        typer.echo(f"  pipeline plan {shlex.quote(str(file))}    # what a run would do")
        typer.echo(f"  pipeline run {shlex.quote(str(file))}     # do it, measure, report")
    else:
        typer.echo(f"  pipeline run {shlex.quote(str(file))}     # downloads the model, then optimizes and measures it")
