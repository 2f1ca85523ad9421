"""A pass writes through its context and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.execute.write_guard import WriteGuard


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteGuard:
    """Of a store below the folder for temporary files, which is elsewhere than the tests' own."""
    for name in ("temporary", "store", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return WriteGuard(tmp_path / "store" / "tmp" / "staging", tmp_path / "store")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("store/tmp/staging/blobs/x", True),
        ("store/compiled/key/kernel.so", True),
        ("store/blobs/ab/abcd", False),
        ("store/tmp/other/blobs/x", False),
        ("temporary/x", True),
        ("home/.cache/huggingface/modules/x.py", True),
        ("home/notes.txt", False),
        ("project/__pycache__/module.pyc", True),
        ("model/config.json", False),
    ],
)
def test_where_a_pass_may_write(guard: WriteGuard, tmp_path: Path, path: str, allowed: bool) -> None:
    assert guard.allows(tmp_path / path) is allowed


def test_a_cache_folder_that_the_environment_names_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    assert WriteGuard(tmp_path / "staging", tmp_path / "store").allows(tmp_path / "hf" / "x")


WAYS = {
    "open": "open(target / 'new', 'w')",
    "append": "open(target / 'old', 'a')",
    "update": "open(target / 'old', 'r+b')",
    "os.open": "os.open(target / 'new', os.O_WRONLY | os.O_CREAT)",
    "mkdir": "(target / 'new').mkdir()",
    "remove": "(target / 'old').unlink()",
    "rename away": "(target / 'old').rename(staging / 'taken')",
    "rename in": "(staging / 'mine').rename(target / 'new')",
    "link": "os.link(staging / 'mine', target / 'new')",
    "symlink": "(target / 'new').symlink_to(staging)",
    "chmod": "(target / 'old').chmod(0o600)",
    "truncate": "os.truncate(target / 'old', 0)",
    "rmtree": "shutil.rmtree(target)",
    "through a link": "open(staging / 'link', 'w')",
    "through a folder's link": "open(staging / 'folder' / 'new', 'w')",
    "relative": "os.chdir(target); open('new', 'w')",
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_way_a_pass_writes_it_is_refused_and_nothing_changes(tmp_path: Path, way: str) -> None:
    code = f"""
        import os, shutil, sys, tempfile
        from pathlib import Path
        from pipeline.execute.write_guard import WriteGuard, WriteOutsideError
        staging, target = Path(sys.argv[1]), Path(sys.argv[2])
        tempfile.tempdir = str(staging)
        guard = WriteGuard(staging, staging.parent)
        guard.install()
        (target / "before").touch()  # not active yet
        def work():
            (staging / "own").write_text("allowed")
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "x").touch()
            (target / "old").read_text()
            {WAYS[way]}
        try:
            guard.watch(work)
        except WriteOutsideError as error:
            assert Path(error.filename).is_relative_to(target), error.filename
            print("refused")
    """
    staging, target = tmp_path / "store" / "staging", tmp_path / "target"
    staging.mkdir(parents=True)
    target.mkdir()
    (target / "old").write_text("as it was")
    (staging / "mine").touch()
    (staging / "link").symlink_to(target / "old")
    (staging / "folder").symlink_to(target)
    command = [sys.executable, "-c", textwrap.dedent(code), str(staging), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused", done.stderr
    assert "refused to write" in done.stderr
    assert sorted(path.name for path in target.iterdir()) == ["before", "old"]
    assert (target / "old").read_text() == "as it was"


def test_a_pass_that_writes_elsewhere_fails_with_the_place(
    tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, run_passes: Callable[..., dict]
) -> None:
    (tmp_path / "temporary").mkdir()
    target = tmp_path / "notes.txt"
    source = f"""
        from pathlib import Path
        from pipeline import Pass
        class Scribble(Pass):
            name = "scribble"
            accepts, produces = {{"torch"}}, "torch"
            def run(self, artifact, params, context):
                Path({str(target)!r}).write_text("here")
                return artifact
        class Careful(Scribble):
            name = "careful"
            def run(self, artifact, params, context):
                try:
                    return super().run(artifact, params, context)
                except OSError:
                    return artifact
    """
    install(tmp_path, "scribbles", source, {"scribble": "scribbles:Scribble", "careful": "scribbles:Careful"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    results = run_passes("[{pass: scribble}, {pass: careful, after: source}]")
    assert results["scribble"].status == "failed"
    assert f"the pass tried to write {target}, outside its context; nothing was written" in results["scribble"].reason
    assert "context.output.scratch()" in results["scribble"].reason
    assert results["careful"].status == "ran"
    assert f"refused to write {target}" in Path(results["careful"].log).read_text()
    assert not target.exists()
