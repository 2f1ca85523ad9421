"""`pipeline plan`"""

from __future__ import annotations

import typer

from pipeline.cli.options import ForceOption, JsonOption, OnlyOption, RecipeArgument, SetOption, UntilOption


def plan_verb(
    recipe: RecipeArgument,
    set_: SetOption = None,
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

    from pipeline.cli.output import console, print_json
    from pipeline.errors import HostError
    from pipeline.recipe import load_recipe
    from pipeline.run import plan_recipe

    plan = plan_recipe(load_recipe(recipe, set_ or []), until=until, only=only, force=force)
    if json:
        print_json(plan.model_dump(mode="json", exclude={"stages": {"__all__": {"facets"}}}))
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in ("stage", "pass", "from", "status", "key", "why"):
            table.add_column(column, overflow="fold")
        for stage in plan.stages:
            sources = ", ".join([stage.parent or "", *stage.inputs.values()])
            row = (stage.name, stage.pass_name, sources, stage.status, stage.key[:12], escape(stage.reason))
            table.add_row(*row)
        output = console()
        output.print(table)
        output.print(f"target {plan.hardware.name}, {plan.threads} threads", soft_wrap=True)
        for note in plan.notes:
            output.print(f"note: {escape(note)}", soft_wrap=True)
    try:
        plan.require_runnable()
    except HostError as error:
        from pipeline.cli.output import fail

        typer.echo("")
        return fail(error)
    return 0
