"""`pipeline passes`: what is installed, what is wrong with it, and new ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pipeline` in an empty folder, with packages below `tmp_path` installed."""
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "160"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *arguments]
        return subprocess.run(
            command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=False
        )

    return run


GOOD = """
    from typing import Literal
    from pipeline import Field, Pass, PassParams, Requires
    class Good(Pass):
        '''Do good.

        In more words.
        '''
        name, version = "good", 3
        accepts, produces = {"onnx", "torch"}, "onnx"
        libraries, depends_on = ("numpy",), ("seed",)
        requires = Requires(device="cuda", programs=("g++|clang++",))
        comes_before = {"quantize_weights": "it needs float weights"}
        deterministic = False
        class Params(PassParams):
            bits: int = Field(4, ge=2, le=8, description="width of a weight")
            how: Literal["a", "b"] = "a"
        def run(self, artifact, params, context):
            return artifact
"""


def test_a_pass_is_shown_with_all_that_it_says(cli: Callable, install: Callable, tmp_path: Path) -> None:
    install(tmp_path, "goods", GOOD, {"good": "goods:Good"})
    shown = cli("passes", "show", "good").stdout
    for words in (
        "good (version 3, from goods 1.0)",
        "In more words.",
        "takes onnx or torch, yields onnx",
        "needs a CUDA GPU, the program g++ or clang++",
        "comes before quantize_weights: it needs float weights",
        "its key holds its code and parameters, the version of numpy, seed",
        "two runs of it differ",
        "integer >= 2 and <= 8",
        "width of a weight",
        '"a" | "b"',
    ):
        assert words in shown, words
    as_json = json.loads(cli("passes", "show", "good", "--json").stdout)
    assert as_json["requires"]["device"] == "cuda"


def test_plugins_that_cannot_be_used_are_listed_with_the_reason_and_disturb_nothing(
    cli: Callable, install: Callable, tmp_path: Path
) -> None:
    odd = GOOD.replace('bits: int = Field(4, ge=2, le=8, description="width of a weight")', "bits: object = object()")
    odd = odd.replace("class Params(PassParams):", "class Params(PassParams, arbitrary_types_allowed=True):")
    install(tmp_path, "goods", GOOD, {"good": "goods:Good"})
    install(tmp_path, "odds", odd.replace('"good"', '"odd"'), {"odd": "odds:Good"})
    install(tmp_path, "bads", "raise RuntimeError('no licence')", {"bad": "bads:Bad"})
    install(tmp_path, "ones", GOOD.replace('"good"', '"twice"'), {"twice": "ones:Good"})
    install(tmp_path, "twos", GOOD.replace('"good"', '"twice"'), {"twice": "twos:Good"})
    listed = cli("passes", "list", "--json")
    assert listed.returncode == 0
    found = {entry["name"]: entry for entry in json.loads(listed.stdout)}
    assert found["good"]["problem"] is None
    assert found["export_onnx"]["problem"] is None
    assert "no licence" in found["bad"]["problem"]
    assert found["bad"]["origin"] == "bads 1.0"
    assert "cannot be put into JSON" in found["odd"]["problem"]
    assert "ones:Good (ones 1.0) and twos:Good (twos 1.0)" in found["twice"]["problem"]
    assert found["twice"]["origin"] == "ones 1.0 and twos 1.0"
    assert cli("passes").stdout == cli("passes", "list").stdout
    shown = cli("passes", "show", "bad")
    assert (shown.returncode, "bads 1.0, cannot be used" in shown.stderr) == (3, True)
    assert cli("schema").returncode == 0
    assert cli("passes", "show", "godo").returncode == 2


@pytest.mark.parametrize("takes", ["onnx", "torch"])
def test_a_new_package_holds_a_pass_of_a_few_lines(cli: Callable, tmp_path: Path, takes: str) -> None:
    done = cli("passes", "new", "my_first_pass", "--takes", takes)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "here" / "my-first-pass"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "my_first_pass.py",
        "pyproject.toml",
        "test_my_first_pass.py",
    ]
    text = (folder / "my_first_pass.py").read_text()
    assert "class MyFirstPass(Pass):" in text
    lines = [line for line in text.partition("class MyFirstPass")[2].splitlines() if line.strip()]
    assert len(lines) <= 30
    again = cli("passes", "new", "my_first_pass")
    assert (again.returncode, "my-first-pass is there already" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["My-Pass"], "'My-Pass' cannot name a pass"),
        (["export_onnx"], "'export_onnx' is there already, from pipeline"),
        (["json"], "'json' is a word or a module of Python"),
        (["class"], "'class' is a word or a module of Python"),
        (["onnx_ir"], "'onnx_ir' is the name of an installed module"),
        (["fine", "--takes", "onx"], "did you mean 'onnx'"),
    ],
)
def test_names_that_will_not_do_are_refused(cli: Callable, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = cli("passes", "new", *arguments)
    assert (done.returncode, words in done.stderr) == (2, True)
    assert list((tmp_path / "here").iterdir()) == []
