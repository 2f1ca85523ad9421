"""Passes that hang, crash and misbehave: what their stage's reason says, and what is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.execute import StageResult
from pipeline.execute.ending import how_it_died, last_words, where_it_was
from pipeline.store import Store

Run = Callable[..., dict[str, StageResult]]

BAD_PASSES = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from pipeline import Field, Pass, PassParams

class Base(Pass):
    "Misbehaves."
    accepts, produces = frozenset({"torch"}), "torch"

class Sleeps(Base):
    name = "sleeps"
    class Params(PassParams):
        flag: str = ""
    def run(self, artifact, params, context):
        child = subprocess.Popen(["sleep", "600"])
        Path(params.flag).write_text(str(child.pid))
        self.wait_for_ever()
    def wait_for_ever(self):
        time.sleep(600)

class Spins(Base):
    name = "spins"
    def run(self, artifact, params, context):
        while True:
            pass

class ReadsNothing(Base):
    name = "reads_nothing"
    def run(self, artifact, params, context):
        print("about to crash")
        self.read(0)
    def read(self, address):
        ctypes.string_at(address)

class Exits(Base):
    name = "exits"
    def run(self, artifact, params, context):
        sys.exit(0)

class ExitsHard(Base):
    name = "exits_hard"
    def run(self, artifact, params, context):
        os._exit(0)

class LacksMemory(Base):
    name = "lacks_memory"
    def run(self, artifact, params, context):
        bytearray(1 << 60)

class Babbles(Base):
    name = "babbles"
    def run(self, artifact, params, context):
        for descriptor in range(1, 10):
            try:
                os.write(descriptor, b'{"fraction": "x"}\\n[1, 2]\\n\\xff\\xfe no json \\n{"fraction": 1}\\n')
            except OSError:
                pass
        return artifact

class Lingers(Base):
    name = "lingers"
    class Params(PassParams):
        flag: str = ""
    def run(self, artifact, params, context):
        child = subprocess.Popen(["sleep", "600"])
        Path(params.flag).write_text(str(child.pid))
        return artifact
"""

NAMES = {
    "sleeps": "Sleeps",
    "spins": "Spins",
    "reads_nothing": "ReadsNothing",
    "exits": "Exits",
    "exits_hard": "ExitsHard",
    "lacks_memory": "LacksMemory",
    "babbles": "Babbles",
    "lingers": "Lingers",
}


@pytest.fixture
def bad_passes(plugins: Path, tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    install(folder, "bad_passes", BAD_PASSES, {name: f"bad_passes:{cls}" for name, cls in NAMES.items()})
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{plugins}")


pytestmark = pytest.mark.usefixtures("bad_passes")


def is_gone(pid: int) -> bool:
    """True once the process has ended; killed ones take a moment to."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
    return False


def leftovers(store: Store) -> list[Path]:
    return list((store.root / "tmp").iterdir())


def test_a_pass_that_takes_too_long_is_ended_with_its_children_and_told_where_it_was(
    run_passes: Run, store: Store, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    passes = f"[{{pass: sleeps, flag: {flag}, timeout_s: 2}}, {{pass: mark, after: source}}]"
    results = run_passes(passes)
    assert results["sleeps"].status == "failed"
    assert str(results["sleeps"].reason).startswith("took longer than timeout_s: 2 s; it was in bad_passes.py:")
    assert "(wait_for_ever)" in str(results["sleeps"].reason)
    assert "in wait_for_ever" in Path(str(results["sleeps"].log)).read_text()
    assert results["mark"].status == "ran"
    assert is_gone(int(flag.read_text()))
    assert leftovers(store) == []


def test_a_pass_that_never_gives_way_is_ended_too(run_passes: Run) -> None:
    results = run_passes("[{pass: spins, timeout_s: 2}]")
    assert "took longer than timeout_s: 2 s; it was in bad_passes.py:" in str(results["spins"].reason)


def test_a_pass_that_ends_in_time_is_not_disturbed_by_its_limit(run_passes: Run) -> None:
    assert run_passes("[{pass: mark, timeout_s: 60}]")["mark"].status == "ran"


def test_a_crash_in_c_names_the_signal_and_the_place_and_logs_the_stack(run_passes: Run) -> None:
    result = run_passes("[{pass: reads_nothing}]")["reads_nothing"]
    assert "ended by SIGSEGV in " in str(result.reason)
    assert str(result.reason).endswith("; its last words: about to crash")
    log = Path(str(result.log)).read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert "in read" in log


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exits", "the pass ended its process with sys.exit(0) and made nothing (the pass did not expect this; the "),
        ("exits_hard", "the pass's process ended with code 0 and no result"),
        ("lacks_memory", "MemoryError (there was too little memory for it)"),
        ("crash", "(the pass did not expect this; the author of sample_passes 1.0 may want to see the log)"),
    ],
)
def test_the_reason_says_how_it_ended(name: str, reason: str, run_passes: Run) -> None:
    result = run_passes(f"[{{pass: {name}}}]")[name]
    assert result.status == "failed"
    assert reason in str(result.reason)


def test_a_polite_refusal_is_told_without_a_hint_at_a_mistake(run_passes: Run) -> None:
    assert "did not expect" not in str(run_passes("[{pass: refuse}]")["refuse"].reason)


def test_nonsense_on_every_open_descriptor_disturbs_nothing(run_passes: Run) -> None:
    said: list[object] = []
    results = run_passes("[{pass: babbles}]", on_progress=lambda *words: said.append(words))
    assert results["babbles"].status == "ran"
    assert said == []


def test_a_process_that_a_pass_left_running_is_ended(run_passes: Run, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    assert run_passes(f"[{{pass: lingers, flag: {flag}}}]")["lingers"].status == "ran"
    assert is_gone(int(flag.read_text()))


@pytest.mark.parametrize(
    ("oom_kills", "peak_gb", "words"),
    [
        (1, 1, "ended by SIGKILL: the kernel killed it for lack of memory; its memory reached 1.0 GB, and 8.0 GB were"),
        (0, 7, "ended by SIGKILL, likely for lack of memory: its memory reached 7.0 GB, and 8.0 GB were free"),
        (0, 1, "ended by SIGKILL, by whom is not known (lack of memory is the usual cause); its memory reached 1.0 GB"),
    ],
)
def test_a_kill_says_what_is_known_of_memory(oom_kills: int, peak_gb: int, words: str, tmp_path: Path) -> None:
    died = how_it_died(
        -9, tmp_path / "no log", oom_kills=oom_kills, peak_bytes=peak_gb * 10**9, available_bytes=8 * 10**9
    )
    assert words in died


def test_last_words_and_place_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "working\n\nlast words\nFatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n"
        '  File "/a/other.py", line 1 in wait\n\nCurrent thread 0x2 (most recent call first):\n'
        '  File "/a/deep.py", line 7 in solve\n  File "/a/top.py", line 3 in run\n\nExtension modules: x\n'
    )
    assert last_words(log) == "last words"
    assert where_it_was(log) == "deep.py:7 (solve)"
    log.write_text("working\n")
    assert (last_words(log), where_it_was(log)) == ("working", "")
