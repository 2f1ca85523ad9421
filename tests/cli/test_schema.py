"""`pipeline schema`: printed, or written for an editor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("plugins")

Cli = Callable[..., tuple[int, str, str]]


def test_the_schema_is_written_as_it_is_printed(cli: Cli) -> None:
    code, out, _ = cli("schema", "--output", "recipe.schema.json")
    assert (code, out) == (0, "schema: recipe.schema.json\n")
    assert json.loads(Path("recipe.schema.json").read_text()) == json.loads(cli("schema")[1])


def test_the_schema_has_the_installed_passes_with_their_parameters(cli: Cli) -> None:
    schema = json.loads(cli("schema")[1])
    assert schema["$defs"]["pass.mark"]["properties"]["value"]["maximum"] == 9
    assert "$defs" in json.loads(cli("schema", "--group")[1])
    assert {"extends", "matrix", "passes"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--output", "gone/recipe.schema.json"],
            "gone/recipe.schema.json cannot be written: No such file or directory",
        ),
        (["--output", "."], "cannot be written: Is a directory"),
        (["--group", "--report"], "--report and --group exclude each other"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str], expected: str, cli: Cli) -> None:
    code, _, err = cli("schema", *arguments)
    assert (code, expected in err) == (2, True), err
