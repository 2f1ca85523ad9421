"""`pipeline passes check`: what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("plugins", "store")


def test_a_pass_that_stands_all_checks_ends_well(cli: Cli) -> None:
    code, out, _ = cli("passes", "check", "mark", "--set", "value=3", "--skip", "tolerance")
    assert code == 0
    assert "mark (value=3), from sample_passes 1.0" in out
    assert "11 of 12 checks passed" in out


def test_a_pass_that_fails_one_ends_with_the_code_of_a_failed_stage(cli: Cli) -> None:
    code, out, _ = cli("passes", "check", "nothing", "--json")
    assert code == 3
    (found,) = json.loads(out)
    assert found["ok"] is False
    failed = [f for f in found["findings"] if f["outcome"] == "failed"]
    assert [f["check"] for f in failed] == ["run"]
    assert "returned NoneType" in failed[0]["message"]


def test_what_the_host_lacks_ends_with_its_own_code(cli: Cli, no_gpu: None) -> None:
    code, out, _ = cli("passes", "check", "needs_gpu")
    assert code == 4
    assert "needs a CUDA GPU and this host has none" in " ".join(out.split())


def test_what_comes_before_and_what_is_read_besides_can_be_told(cli: Cli) -> None:
    arguments = ["--after", "{pass: mark, name: first}", "--after", "write", "--input", "other=first"]
    code, out, _ = cli("passes", "check", "combine", *arguments, "--skip", "tolerance", "--json")
    (found,) = json.loads(out)
    assert (code, found["ok"]) == (0, True), found
    assert found["example"] == "after first, write"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["marc"], "did you mean 'mark'?"),
        (["mark", "--set", "value=99"], "value should be less than or equal to 9"),
        (["mark", "--set", "valu=9"], "did you mean 'value'?"),
        (["mark", "--set", "value"], "'value' is not KEY=VALUE"),
        (["mark", "--after", "no_such_pass"], "unknown pass 'no_such_pass'"),
        (["mark", "--after", "{after: x}"], "give a pass's name, or an entry"),
        (["mark", "--skip", "everything"], "unknown checks everything"),
    ],
)
def test_a_wrong_command_line_is_told_with_what_is_right(cli: Cli, arguments: list[str], told: str) -> None:
    code, _, err = cli("passes", "check", *arguments)
    assert code == 2, err
    assert told in err


def test_a_pass_that_cannot_be_imported_fails(
    cli: Cli, install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "shattered", "raise RuntimeError('no licence')", {"shattered": "shattered:Shattered"})
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = cli("passes", "check", "shattered")
    assert code == 3
    assert "RuntimeError: no licence" in " ".join(out.split())
