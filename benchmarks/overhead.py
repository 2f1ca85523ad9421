"""What the framework itself costs: the time of the commands that do no heavy work, with and without plugins installed,
and of the main job from nothing.

    python benchmarks/overhead.py                 # the light commands
    python benchmarks/overhead.py --cold          # the main job, too: an empty store, then the same run again

Each light command runs in a process of its own, after one warm-up, as often as --runs says; a round runs each of them
once. The limits are those that the project holds itself to on two cores; the exit code is 1 where a median misses its.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.measure.memory import MemorySampler

RECIPE = "recipes/llama2-cpu.yaml"
LIGHT = {
    "pipeline --help": (["--help"], 0.25),
    f"pipeline plan {RECIPE}": (["plan", RECIPE], 0.6),
    f"pipeline run {RECIPE} --no-measure (all cached)": (["run", RECIPE, "--no-measure"], 1.5),
}
PLUGINS, PLUGINS_LIMIT_S = 200, 0.05
"""Installed packages with a pass each, and what they may add to `pipeline --help`."""

COLD_LIMIT_S = 240.0
COLD_LIMIT_BYTES = 3e9
"""Anonymous and shared memory of all processes of the main job together, at its highest."""


def pipeline(arguments: list[str]) -> list[str]:
    return [str(Path(sys.executable).with_name("pipeline")), *arguments]


def seconds(arguments: list[str], environment: dict[str, str], folder: Path) -> float:
    """Wall time of one `pipeline` process.

    Raises: SystemExit with its output where it fails.
    """
    command = pipeline(arguments)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return took


def seconds_and_bytes(arguments: list[str], environment: dict[str, str], folder: Path) -> tuple[float, int]:
    """Wall time of one `pipeline` process, and the most memory that it and its workers took together.

    Raises: SystemExit with its output where it fails.
    """
    log = folder / "output"
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(pipeline(arguments), env=environment, cwd=folder, stdout=output, stderr=output)
        with MemorySampler(process.pid, interval_s=0.2) as memory:
            code = process.wait()
        took = time.perf_counter() - began
    if code != 0:
        sys.exit(f"{' '.join(arguments)} ended with {code}\n{log.read_text()}")
    return took, memory.peak_memory_bytes


def added_by_plugins(environment: dict[str, str], work: Path, runs: int) -> dict[str, list[float]]:
    """Seconds by which installed plugins make commands slower: the difference of each of `runs` pairs of processes.

    Which of a pair comes first takes turns.
    """
    folder = work / "plugins"
    for number in range(PLUGINS):
        info = folder / f"plugin_{number}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin_{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[pipeline.passes]\npass_{number} = no_module_{number}:Pass\n")
    with_them = {**environment, "PYTHONPATH": str(folder)}
    added: dict[str, list[float]] = {"--help": [], "plan": []}
    for command, arguments in (("--help", ["--help"]), ("plan", ["plan", RECIPE])):
        for number in range(runs + 1):
            order = [environment, with_them] if number % 2 else [with_them, environment]
            took = {id(given): seconds(arguments, given, work) for given in order}
            if number:  # the first round only warms the file cache
                added[command].append(took[id(with_them)] - took[id(environment)])
    return added


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="rounds of the light commands")
    parser.add_argument("--cold", action="store_true", help="the main job from an empty store, too")
    options = parser.parse_args()
    table = Table("command", "median s", "min", "max", "limit", "")
    missed = False

    def row(name: str, times: list[float], limit: float | None) -> None:
        nonlocal missed
        middle = statistics.median(times)
        holds = limit is None or middle <= limit
        missed |= not holds
        words = "" if limit is None else ("holds" if holds else "MISSED")
        shown = "–" if limit is None else f"{limit:g}"
        table.add_row(name, f"{middle:.3f}", f"{min(times):.3f}", f"{max(times):.3f}", shown, words)

    work = Path(tempfile.mkdtemp(prefix="overhead-"))
    try:
        environment = {**os.environ, "PIPELINE_STORE": str(work / "store")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # Python keeps compiled modules unless it is told not to
        first = ["run", RECIPE] if options.cold else ["run", RECIPE, "--no-measure"]
        took, peak = seconds_and_bytes(first, environment, work)
        if options.cold:
            row("the main job, empty store", [took], COLD_LIMIT_S)
            row("  its memory, GB", [peak / 1e9], COLD_LIMIT_BYTES / 1e9)
            again, peak = seconds_and_bytes(first, environment, work)
            row("the main job again (measures anew)", [again], None)
            row("  its memory, GB", [peak / 1e9], COLD_LIMIT_BYTES / 1e9)
        samples: dict[str, list[float]] = {name: [] for name in LIGHT}
        for number in range(options.runs + 1):
            for name, (arguments, _) in LIGHT.items():
                took = seconds(arguments, environment, work)
                if number:  # the first round only warms the file cache
                    samples[name].append(took)
        for name, (_, limit) in LIGHT.items():
            row(name, samples[name], limit)
        added = added_by_plugins(environment, work, options.runs)
        row(f"{PLUGINS} plugins add to pipeline --help", added["--help"], PLUGINS_LIMIT_S)
        row(f"{PLUGINS} plugins add to pipeline plan", added["plan"], None)
    finally:
        shutil.rmtree(work)
    Console(width=100).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
