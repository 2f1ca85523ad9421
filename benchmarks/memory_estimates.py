"""Memory as it was estimated before a run, beside what the run measured, stage by stage.

    python benchmarks/memory_estimates.py                              # the built-in model
    python benchmarks/memory_estimates.py RECIPE --set KEY=VALUE …     # any recipe
    python benchmarks/memory_estimates.py --report runs/NAME/latest    # a run that is there
    python benchmarks/memory_estimates.py --within 1.25                # exit code 1 where a ratio is further from 1

The recipe runs in a store of its own, so that every stage is made anew. A ratio above 1 is an estimate that was too
high. Both figures are anonymous and shared memory; weights that are mapped from their files stand apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RECIPE = "recipes/llama2-cpu.yaml"


def run_recipe(recipe: str, overrides: list[str], work: Path) -> Path:
    """Run it in an empty store and return the run's folder.

    Raises: SystemExit with its output where it leaves no report.
    """

    command = [str(Path(sys.executable).with_name("pipeline")), "run", recipe, "--runs", str(work / "runs")]
    for override in overrides:
        command += ["--set", override]
    environment = {**os.environ, "PIPELINE_STORE": str(work / "store")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = list((work / "runs").glob("*/latest"))
    if not found:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return found[0]


def rows(report: dict[str, Any]) -> list[tuple[str, str, int | None, int | None]]:
    """(stage, what, estimated, measured) in bytes, where either is known."""
    found: list[tuple[str, str, int | None, int | None]] = []
    for stage in report["stages"]:
        predicted = stage["predicted_memory"] or {}
        to_make = predicted.get("conversion_bytes"), stage["cost"]["peak_memory_bytes"]
        to_run = predicted.get("inference_bytes"), stage["inference_peak_memory_bytes"]
        found += [(stage["name"], what, *pair) for what, pair in (("make", to_make), ("run", to_run)) if any(pair)]
    return found


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.0f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--report", type=Path, help="a run's folder, or its report.json; nothing is run")
    parser.add_argument("--within", type=float, help="factor by which estimate and measurement may differ")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-") as work:
        folder = options.report or run_recipe(options.recipe, options.overrides, Path(work))
        path = folder / "report.json" if folder.is_dir() else folder
        if not path.is_file():
            sys.exit(f"there is no report at {path}: give a run's folder, such as runs/NAME/latest")
        report = json.loads(path.read_text(encoding="utf-8"))
    table = Table("stage", "to")
    for column in ("estimated", "measured", "ratio"):
        table.add_column(column, justify="right")
    missed = False
    for stage, what, estimated, measured in rows(report):
        ratio = estimated / measured if estimated and measured else None
        missed |= ratio is not None and options.within is not None and max(ratio, 1 / ratio) > options.within
        shown = "–" if ratio is None else f"{ratio:.2f}"
        table.add_row(stage, what, megabytes(estimated), megabytes(measured), shown)
    Console(width=100).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
