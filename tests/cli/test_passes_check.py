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


IN_A_FILE = """
from pipeline import Artifact, Field, Pass, PassParams

print("it was run")


class MarkIt(Pass):
    \"""Set a key of the execution block.\"""

    name, version = "mark_it", 3
    accepts, produces = {"torch"}, "torch"

    class Params(PassParams):
        value: int = Field(1, ge=0, description="what the key is set to")

    def run(self, artifact, params, context):
        READ
        execution = {**artifact.manifest.execution, "mark": params.value}
        return Artifact(artifact.manifest.model_copy(update={"execution": execution}), artifact.blobs)
"""


@pytest.fixture
def in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mark.py"
    file.write_text(IN_A_FILE.replace("READ", "pass"))
    return file


def test_a_pass_in_a_file_is_checked_as_an_installed_one_is(cli: Cli, in_a_file: Path) -> None:
    code, out, _ = cli("passes", "check", "./mark.py:MarkIt", "--skip", "tolerance", "--json")
    (found,) = json.loads(out)
    assert (code, found["ok"], found["origin"]) == (0, True, str(in_a_file)), found
    assert {f["outcome"] for f in found["findings"] if f["check"] != "tolerance"} == {"passed"}, found
    assert not in_a_file.with_name("__pycache__").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import os; os.environ.get('NEVER_SAID')", "NEVER_SAID (mark.py:17)"),
        ("open('/etc/hostname').read()", "/etc/hostname (mark.py:17)"),
    ],
)
def test_what_a_pass_in_a_file_reads_beside_its_key_is_seen(cli: Cli, in_a_file: Path, line: str, told: str) -> None:
    in_a_file.write_text(IN_A_FILE.replace("READ", line))
    skipped = [argument for check in ("tolerance", "odd_model", "determinism") for argument in ("--skip", check)]
    code, out, _ = cli("passes", "check", "./mark.py:MarkIt", *skipped, "--json")
    (found,) = json.loads(out)
    assert code == 3
    assert [f["check"] for f in found["findings"] if f["outcome"] == "failed"] == ["reads"]
    assert told in next(f["message"] for f in found["findings"] if f["check"] == "reads")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./mark.py:MarkId", "did you mean 'MarkIt'?"),
        ("../mark.py:MarkIt", "lies outside the folder of this command"),
        ("./no_such.py:MarkIt", "cannot be read: No such file"),
        ("./mark.py", "write ./FILE.py:CLASS"),
    ],
)
def test_a_pass_in_a_file_that_is_not_there_is_told(cli: Cli, in_a_file: Path, name: str, told: str) -> None:
    for verb in ("check", "show"):
        code, out, err = cli("passes", verb, name)
        assert code != 0
        assert told in " ".join((out + err).split())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('accepts, produces = frozenset({"torch"}), "onnx"', "takes torch, yields onnx"),
        ('accepts = produces = "to" + "rch"', "takes what only its code says, yields what only its code says"),
        ('accepts, produces = {["torch"]}, {"onnx"}', "takes what only its code says, yields what only its code says"),
        ('version, produces = "1.2", "onnx"', "(of unknown version, from "),
    ],
)
def test_of_a_pass_in_a_file_nothing_is_guessed(cli: Cli, in_a_file: Path, said: str, told: str) -> None:
    in_a_file.write_text(f"class MarkIt:\n    {said}\n")
    code, out, _ = cli("passes", "show", "./mark.py:MarkIt")
    assert code == 0
    assert told in " ".join(out.split())


def test_a_pass_in_a_file_is_shown_by_its_text_unless_its_code_is_allowed(cli: Cli, in_a_file: Path) -> None:
    in_a_file.write_text(in_a_file.read_text() + "# no other test has run this\n")
    code, out, _ = cli("passes", "show", "./mark.py:MarkIt")
    assert code == 0
    assert "it was run" not in out
    assert "Set a key of the execution block." in out
    assert f"(version 3, from {in_a_file})" in out.replace("\n", "")
    assert "takes torch, yields torch" in out
    assert "its code was not run" in out
    code, out, err = cli("passes", "show", "./mark.py:MarkIt", "--allow-code")
    assert (code, "it was run" in err, "what the key is set to" in out) == (0, True, True)


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
