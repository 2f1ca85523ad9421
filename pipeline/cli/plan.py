"""`pipeline plan`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from pipeline.cli.options import CellOption, ForceOption, JsonOption, OnlyOption, RecipeArgument, SetOption, UntilOption

if TYPE_CHECKING:
    from pipeline.report.schema import PredictedMemory


WIDE = 100
"""Columns of a terminal below which a plan leaves out where a stage comes from, and its key."""


def plan_verb(
    recipe: RecipeArgument,
    set_: SetOption = None,
    cell: CellOption = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Say what a run would do, and why.

    What is cached, what would run, what cannot run here. Runs nothing.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.cells import chosen_recipes, for_each_cell
    from pipeline.cli.output import console, fail
    from pipeline.errors import HostError
    from pipeline.recipe import Recipe
    from pipeline.report.columns import name_lines
    from pipeline.resolve import plan_recipe

    def plan_one(loaded: Recipe) -> tuple[int, Any]:
        plan = plan_recipe(loaded, until=until, only=only, force=force)
        if not json:
            output = console()
            wide = output.width >= WIDE
            longest = output.width // 6 if wide else output.width // 5
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for column in ("stage", "pass", *(("from",) if wide else ()), "status", *(("key",) if wide else ())):
                table.add_column(column, no_wrap=True)  # names are broken where their words end, and keys nowhere
            for column in ("to make", "to run"):
                table.add_column(column, justify="right", no_wrap=True)
            table.add_column("why", overflow="fold")
            for stage in plan.stages:
                names = [stage.name, stage.pass_name]
                if wide:
                    names.append(", ".join([stage.parent or "", *stage.inputs.values()]))
                row = [
                    *(name_lines(name, longest) for name in names),
                    stage.status,
                    *([stage.key[:12]] if wide else []),
                ]
                table.add_row(*row, *memory_to_make_and_run(stage.predicted), escape(stage.reason))
            output.print(table)
            output.print(
                f"target {plan.hardware.name}, {plan.threads} threads; memory to make and to run is estimated",
                soft_wrap=True,
            )
            for note in plan.notes:
                output.print(f"note: {escape(note)}", soft_wrap=True)
        code = 0
        try:
            plan.require_runnable()
        except HostError as error:
            code = error.exit_code
            if not json:
                typer.echo("")
            fail(error)
        return code, plan.model_dump(mode="json", exclude={"stages": {"__all__": {"facets"}}})

    return for_each_cell(chosen_recipes(recipe, set_, cell), cell, plan_one, json=json)


def memory_to_make_and_run(memory: PredictedMemory | None) -> tuple[str, str]:
    """Estimates as text, of the memory that a run measures: pages of mapped files are not in it."""
    if memory is None:
        return "–", "–"
    return _size(memory.conversion_bytes), _size(memory.inference_bytes)


def _size(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
