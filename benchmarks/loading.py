"""What loading the models of a run takes once their files are in memory: seconds and anonymous memory.

    python benchmarks/loading.py llama-1b-cpu int4_256_compiled two_phases [--loads 5]

Each load has a process of its own, which has imported its libraries before; the stages take turns. The first load of
each is not counted: it reads the files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.artifact import Artifact
from pipeline.hardware import describe_host
from pipeline.measure.memory import MemorySampler
from pipeline.measure.nurseries import Nurseries
from pipeline.report.figures import megabytes
from pipeline.report.folder import read_report
from pipeline.runtime import ExecutionSpec
from pipeline.store import Store, default_store_path


def artifacts_of(run: str, stages: list[str], store: Store) -> dict[str, Artifact]:
    """Raises: SystemExit where the run has no such stage or the store no longer has its artifact."""
    report = read_report(run, Path("runs"))
    found: dict[str, Artifact] = {}
    for name in stages:
        stage = next((stage for stage in report.stages if stage.name == name), None)
        artifact = store.artifact(stage.artifact.digest) if stage and stage.artifact else None
        if artifact is None:
            raise SystemExit(f"{name} is no stage of {run} whose artifact is in {store.root}")
        found[name] = artifact
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or a recipe's name for its latest run")
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--loads", type=int, default=5)
    given = parser.parse_args()
    store = Store(default_store_path())
    spec = ExecutionSpec(threads=describe_host().physical_cores)
    took: dict[str, list[float]] = defaultdict(list)
    grew: dict[str, list[int]] = defaultdict(list)
    with store.lease(), tempfile.TemporaryDirectory() as logs, Nurseries() as start_worker:
        artifacts = artifacts_of(given.run, given.stages, store)
        for turn in range(given.loads + 1):
            for name, artifact in artifacts.items():
                worker = start_worker(name, spec, Path(logs) / f"{name}-{turn}.log")
                try:
                    worker.prepare(artifact)
                    worker.wait_until_prepared()
                    with MemorySampler(worker.process.pid, interval_s=0.005) as memory:
                        before = memory.sample().memory_bytes
                        seconds = worker.load(artifact)["load_s"]
                    if turn:
                        took[name].append(seconds)
                        grew[name].append(memory.peak_memory_bytes - before)
                finally:
                    worker.close()
    table = Table("stage", "median", "least", "most", "memory that loading took")
    for name, seconds in took.items():
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        table.add_row(name, *(f"{figure:.2f} s" for figure in figures), megabytes(max(grew[name])))
    Console().print(table)


if __name__ == "__main__":
    main()
