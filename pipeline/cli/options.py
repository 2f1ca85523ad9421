"""Options and arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. passes.int4.bits=8. May be repeated."),
]
CellOption = Annotated[
    str | None,
    typer.Option("--cell", metavar="N|all", help="A cell of the recipe's matrix, from 0, or all. Default: the first."),
]
UntilOption = Annotated[
    str | None, typer.Option("--until", metavar="STAGE", help="Only the stages listed up to this one.")
]
OnlyOption = Annotated[
    str | None, typer.Option("--only", metavar="STAGE", help="Only this stage and what it is made from.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Go on though the plan says that this host has too little memory or disk.")
]
AllowCodeOption = Annotated[
    bool,
    typer.Option("--allow-code", help="Run passes in Python files beside the recipe: they can do all that you can."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
