"""What the framework itself costs: the time of the commands that do no heavy work, and of the main job from nothing.

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

RECIPE = "recipes/llama2-cpu.yaml"
LIGHT = {
    "pipeline --help": (["--help"], 0.25),
    f"pipeline plan {RECIPE}": (["plan", RECIPE], 0.6),
    f"pipeline run {RECIPE} --no-measure (all cached)": (["run", RECIPE, "--no-measure"], 1.5),
}
COLD_LIMIT_S = 120.0


def seconds(arguments: list[str], environment: dict[str, str], folder: Path) -> float:
    """Wall time of one `pipeline` process.

    Raises: SystemExit with its output where it fails.
    """
    command = [str(Path(sys.executable).with_name("pipeline")), *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="rounds of the light commands")
    parser.add_argument("--cold", action="store_true", help="the main job from an empty store, too")
    options = parser.parse_args()
    table = Table("command", "median s", "min", "max", "limit s", "")
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
        first = ["run", RECIPE] if options.cold else ["run", RECIPE, "--no-measure"]
        took = seconds(first, environment, work)
        if options.cold:
            row("the main job, empty store", [took], COLD_LIMIT_S)
            row("the main job again (measures anew)", [seconds(first, environment, work)], None)
        samples: dict[str, list[float]] = {name: [] for name in LIGHT}
        for number in range(options.runs + 1):
            for name, (arguments, _) in LIGHT.items():
                took = seconds(arguments, environment, work)
                if number:  # the first round only warms the file cache
                    samples[name].append(took)
        for name, (_, limit) in LIGHT.items():
            row(name, samples[name], limit)
    finally:
        shutil.rmtree(work)
    Console(width=100).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
