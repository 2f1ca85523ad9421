"""What is seen of a pass from inside its process: its own doing, and not that of libraries and of Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.testing import Findings

LURKER = '''
"""A pass that does one thing, by name, and a library that it uses."""

import glob
import json
import os
import subprocess
import tempfile
from pathlib import Path

from pipeline import Artifact, Pass, PassParams


class Lurker(Pass):
    """Do what is asked for."""

    name = "lurker"
    accepts, produces = frozenset({"torch"}), "torch"

    class Params(PassParams):
        what: str
        where: str = ""

    def run(self, artifact, params, context):
        getattr(self, params.what)("/" + params.where, artifact, context)  # the folder is told without its slash
        return artifact

    def list_folder(self, where, artifact, context):
        os.listdir(where)

    def look_for_files(self, where, artifact, context):
        glob.glob(where + "/*.txt")

    def read_through_a_library(self, where, artifact, context):
        import lurkers_library

        lurkers_library.load(where + "/settings.txt")

    def read_after_writing(self, where, artifact, context):
        with context.output.scratch() as folder:
            (folder / "x").write_text("x")
            os.rename(folder / "x", folder / "y")
            (folder / "y").read_text()

    def read_through_a_link(self, where, artifact, context):
        with context.output.scratch() as folder:
            (folder / "link").symlink_to(where + "/settings.txt")
            (folder / "link").read_text()

    def read_what_it_was_given(self, where, artifact, context):
        artifact.read_json("config.json")
        artifact.file("model.safetensors").read_bytes()
        artifact.tensor("lm_head.weight").sum()

    def import_and_ask_for_versions(self, where, artifact, context):
        import sqlite3
        from importlib.metadata import version

        version("numpy")

    def read_itself_and_the_system(self, where, artifact, context):
        Path(__file__).read_text()
        Path("/proc/self/status").read_text()

    def find_a_program(self, where, artifact, context):
        import shutil

        shutil.which("true")
        tempfile.gettempdir()

    def read_the_path(self, where, artifact, context):
        os.environ["PATH"]

    def expand_a_variable(self, where, artifact, context):
        os.path.expandvars("$LURKERS_FOLDER/x")

    def ask_whether_it_is_set(self, where, artifact, context):
        "LURKERS_FLAG" in os.environ

    def hand_on_all(self, where, artifact, context):
        subprocess.run(["true"], env={**os.environ, "X": "1"}, check=True)

    def start_a_program(self, where, artifact, context):
        subprocess.run(["true"], check=True)

    def write_to_a_temporary_folder(self, where, artifact, context):
        with tempfile.TemporaryDirectory():
            pass

    def remove_a_file(self, where, artifact, context):
        os.remove(where + "/settings.txt")

    def change_a_mode(self, where, artifact, context):
        os.chmod(where + "/settings.txt", 0o600)
'''

LIBRARY = """
import os

def load(path):
    os.environ.get("LIBRARYS_SETTING")
    with open(path) as file:
        return file.read()
"""


@pytest.fixture
def lurk(
    check: Callable[..., Findings],
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Findings]:
    """Have the pass do that one thing, in a folder with a file of settings that no parameter names."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    install(plugins, "lurkers", LURKER, {"lurker": "lurkers:Lurker"})
    (plugins / "lurkers_library.py").write_text(LIBRARY)
    (tmp_path / "settings.txt").write_text("settings")
    monkeypatch.syspath_prepend(str(plugins))
    monkeypatch.setenv("PYTHONPATH", str(plugins))

    def lurking(what: str) -> Findings:
        others = ("key", "formats", "determinism", "effect", "tolerance", "odd_model")
        return check("lurker", {"what": what, "where": str(tmp_path)[1:]}, skip=others)

    return lurking


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("list_folder", "files {folder} (lurkers.py:"),
        ("look_for_files", "files {folder} (lurkers.py:"),
        ("read_through_a_link", "files {folder}/settings.txt (lurkers.py:"),
        ("read_the_path", "environment variables PATH (lurkers.py:"),
        ("expand_a_variable", "environment variables LURKERS_FOLDER (lurkers.py:"),
        ("ask_whether_it_is_set", "environment variables LURKERS_FLAG (lurkers.py:"),
    ],
)
def test_what_the_key_does_not_hold_is_seen(
    lurk: Callable[[str], Findings], tmp_path: Path, what: str, told: str
) -> None:
    found = lurk(what)
    assert [f.check for f in found.failed] == ["reads"], str(found)
    assert told.format(folder=tmp_path.resolve()) in found["reads"].message


def test_reading_the_whole_environment_is_told_as_that(
    lurk: Callable[[str], Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(30):
        monkeypatch.setenv(f"LURKERS_{i}", "x")
    message = lurk("hand_on_all")["reads"].message
    assert "all environment variables: make each a parameter, or give a program that it starts an `env`" in message


@pytest.mark.parametrize(
    "what",
    [
        "read_after_writing",
        "read_what_it_was_given",
        "import_and_ask_for_versions",
        "read_itself_and_the_system",
        "find_a_program",
        "start_a_program",
    ],
)
def test_what_is_its_own_or_is_in_the_key_may_be_read(lurk: Callable[[str], Findings], what: str) -> None:
    found = lurk(what)
    assert {found[name].outcome for name in ("run", "reads", "writes", "input")} == {"passed"}, str(found)


def test_what_a_library_reads_is_a_warning(lurk: Callable[[str], Findings], tmp_path: Path) -> None:
    found = lurk("read_through_a_library")
    assert found["reads"].outcome == "warning"
    assert f"{tmp_path.resolve()}/settings.txt (lurkers.py:" in found["reads"].message
    assert "through lurkers_library" in found["reads"].message


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("remove_a_file", "settings.txt (lurkers.py:"),
        ("change_a_mode", "settings.txt (lurkers.py:"),
        ("write_to_a_temporary_folder", "context.output.scratch()"),
    ],
)
def test_changes_outside_its_context_are_seen(lurk: Callable[[str], Findings], what: str, told: str) -> None:
    found = lurk(what)
    assert found["writes"].outcome == "failed", str(found)
    assert told in found["writes"].message
    assert found["input"].outcome == found["reads"].outcome == "passed"
