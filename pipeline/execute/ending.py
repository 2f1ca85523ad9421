"""How a worker process ended without an answer, in words for the person who has to act on it."""

from __future__ import annotations

import re
import signal
from pathlib import Path

LIKELY_SHARE = 0.8
"""Of the memory that was free: a process that was killed with more than this was likely killed for it."""

LONGEST_WORDS = 200
DUMP = re.compile(r"^(Fatal Python error: .*|Timeout \(.*\)!|(Current thread|Thread) 0x[0-9a-f]+.*)$")
FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')


def how_it_died(code: int, log: Path, *, oom_kills: int, peak_bytes: int, available_bytes: int) -> str:
    """Why a process that ended with `code` gave no result.

    `oom_kills`: how often the kernel killed for lack of memory meanwhile; `peak_bytes`: its own memory, sampled;
    `available_bytes`: what was free when it began.
    """
    said = f"; its last words: {words}" if (words := last_words(log)) else ""
    if code >= 0:
        return f"the pass's process ended with code {code} and no result{said}"
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"signal {number}"
    where = f" in {place}" if (place := where_it_was(log)) else ""
    memory = _memory(oom_kills, peak_bytes, available_bytes) if name == "SIGKILL" else ""
    return f"the pass's process was ended by {name}{where}{memory}{said}"


def _memory(oom_kills: int, peak_bytes: int, available_bytes: int) -> str:
    used = f"its memory reached {peak_bytes / 1e9:.1f} GB, and {available_bytes / 1e9:.1f} GB were free at its start"
    if oom_kills > 0:
        return f": the kernel killed it for lack of memory; {used}"
    if peak_bytes > LIKELY_SHARE * available_bytes:
        return f", likely for lack of memory: {used}"
    return f", by whom is not known (lack of memory is the usual cause); {used}"


def last_words(log: Path) -> str:
    """The last line that the pass wrote, without Python's own dump of its stacks."""
    lines = _lines(log)
    if (start := _dump_begins(lines)) is not None:
        lines = lines[:start]
    return lines[-1].strip()[:LONGEST_WORDS] if lines else ""


def where_it_was(log: Path) -> str:
    """FILE:LINE (FUNCTION) of the innermost Python frame in the log's last dump; empty where there is none."""
    lines = _lines(log)
    start = _dump_begins(lines)
    current = [i for i, line in enumerate(lines) if line.startswith("Current thread 0x")]
    if start is None or not current or current[-1] < start:
        return ""
    frames = [match for line in lines[current[-1] + 1 :] if (match := FRAME.match(line))]
    if not frames:
        return ""
    return f"{Path(frames[0]['file']).name}:{frames[0]['line']} ({frames[0]['function']})"


def oom_kills() -> int:
    """How often the kernel has killed for lack of memory since it started; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def _lines(log: Path) -> list[str]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def _dump_begins(lines: list[str]) -> int | None:
    """Index of the first line of the dump at the log's end."""
    return next((i for i, line in enumerate(lines) if DUMP.match(line)), None)
