"""One conversion, in a process that is watched: how long it takes, and how much memory.

python -m benchmarks.peers.converting ADAPTER OPTIONS CHECKPOINT FOLDER       # what the process runs
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.candidates import Conversion

ROOT = Path(__file__).parents[2]
RECORD = "conversion.json"


@dataclass(frozen=True)
class Converted:
    """What a conversion took; or why there is nothing."""

    wall_s: float
    processor_s: float
    """Of all its processes: what other work on the machine changes less than the seconds that pass."""
    peak_memory_bytes: int
    size_bytes: int
    error: str | None = None


def environment(threads: int) -> dict[str, str]:
    """The variables of a process of another environment: threads, no network, this repository's modules."""
    from pipeline.parent import worker_environment

    return {**worker_environment(threads), "PYTHONPATH": str(ROOT)}


def convert(
    conversion: Conversion, python: Path, checkpoint: Path, work: Path, *, threads: int, log: Path
) -> Converted:
    """Convert in a fresh process, unless `work` has it already; interpreter and imports count.

    Memory is anonymous and shared memory of the process and its descendants, sampled.
    """
    from pipeline.measure.memory import MemorySampler

    folder = work / conversion.folder
    if (folder / RECORD).exists():
        return Converted(**json.loads((folder / RECORD).read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    adapter, options = conversion.command
    command = [str(python), "-P", "-m", "benchmarks.peers.converting", adapter, options, str(checkpoint), str(folder)]
    with log.open("wb") as output:
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(threads))
        with MemorySampler(process.pid) as memory:
            code = process.wait()
        wall_s, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    error = None if code == 0 else f"ended with {code}: {_last_words(log)}"
    found = Converted(wall_s, processor_s, memory.peak_memory_bytes, _size(folder), error)
    (folder / RECORD).write_text(json.dumps(asdict(found)))
    return found


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def adapter_module(name: str) -> Any:
    """The module of an adapter; see benchmarks.peers."""
    return importlib.import_module(f"benchmarks.peers.{name}")


def run(adapter: str, options: Mapping[str, Any], checkpoint: Path, folder: Path) -> None:
    adapter_module(adapter).convert(checkpoint, folder, **options)


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)  # what is written is written: threads that a tool leaves behind have no say
