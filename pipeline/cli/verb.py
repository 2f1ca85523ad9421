"""What all verbs of the command line have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


class Verb(TyperCommand):
    """A verb that refuses an option which was given twice and counts once: the first would be lost without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in dict.fromkeys(given):
            plain = getattr(option, "is_flag", True) or option.multiple or getattr(option, "count", False)
            if not plain and given.count(option) > 1:
                ctx.fail(f"{max(option.opts, key=len)} was given {given.count(option)} times; it takes one value")
        return super().parse_args(ctx, args)


class Verbs(typer.Typer):
    """A command line of such verbs."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Callable], Callable]:  # type: ignore[override]
        return super().command(name, cls=Verb, **settings)
