"""What taking turns does to the noise of a ratio: blocks in one piece against blocks in visits.

Several processes load the same graph, that of the model that ships with the package, so that every ratio between them
is 1 but for noise. Each pair of rounds, in shuffled order, has one in which every process runs its block in one piece,
and one in which blocks are made of visits that take turns. Printed is the spread (standard deviation, and the robust
one from the median distance to the median) of the logarithm of the ratio to the first process, and what a round takes.

    python benchmarks/visits.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.execute import execute
from pipeline.hardware import describe_host
from pipeline.measure.budget import BLOCK_S, VISIT_S
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import WorkerProcess
from pipeline.measure.workload import Point
from pipeline.recipe import load_recipe
from pipeline.resolve import resolve, source_of
from pipeline.runtime import ExecutionSpec
from pipeline.store import Store

PROCESSES = 6
POINTS = (
    Point(kind="prefill", batch=1, prompt=128, new_tokens=0),
    Point(kind="decode", batch=1, prompt=128, new_tokens=64),
)
PIECES = {"one piece": BLOCK_S, "visits": VISIT_S}


def block(
    workers: list[WorkerProcess], point: Point, vocab_size: int, visit_s: float, draw: random.Random
) -> list[float]:
    """Seconds of an iteration of each process, from blocks of at least BLOCK_S in pieces of at least `visit_s`."""
    seconds: list[list[float]] = [[] for _ in workers]
    turn = list(range(len(workers)))
    while turn:
        draw.shuffle(turn)
        for place in turn:
            asked = {"point": point.model_dump(), "vocab_size": vocab_size, "seed": 0, "steps": point.new_tokens}
            seconds[place] += workers[place].ask("block", **asked, min_s=visit_s)["seconds"]
        turn = [place for place in turn if sum(seconds[place]) < BLOCK_S]
    return [statistics.fmean(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    draw = random.Random(0)  # noqa: S311 (an order, not a secret)
    host = describe_host()
    spec = ExecutionSpec(threads=host.physical_cores)
    table = Table("workload", "block", "spread", "robust spread", "a round")
    with tempfile.TemporaryDirectory() as folder, Nurseries() as start_worker:
        store = Store(Path(folder) / "store")
        recipe = load_recipe("llama2-cpu")
        source = source_of(recipe, download=False)
        plan = resolve(recipe, source, store, host, until="export_onnx", force=False)
        made = execute(plan, source=source, store=store)
        artifact = store.artifact(str(made["export_onnx"].artifact))
        assert artifact is not None
        workers = [start_worker(f"process-{n}", spec, Path(folder) / f"{n}.log") for n in range(PROCESSES)]
        try:
            (vocab_size,) = {worker.load(artifact)["vocab_size"] for worker in workers}
            for point in POINTS:
                block(workers, point, vocab_size, BLOCK_S, draw)  # a warm-up
                ratios: dict[str, list[list[float]]] = defaultdict(list)
                took: dict[str, float] = defaultdict(float)
                for _ in range(rounds):
                    for name in draw.sample(list(PIECES), len(PIECES)):
                        began = time.monotonic()
                        first, *others = block(workers, point, vocab_size, PIECES[name], draw)
                        took[name] += time.monotonic() - began
                        ratios[name].append([math.log(other / first) for other in others])
                for name, rows in ratios.items():
                    columns = list(zip(*rows, strict=True))
                    spread = statistics.fmean(map(statistics.stdev, columns))
                    robust = statistics.fmean(map(robust_spread, columns))
                    table.add_row(str(point), name, f"{spread:.1%}", f"{robust:.1%}", f"{took[name] / rounds:.2f} s")
        finally:
            for worker in workers:
                worker.close()
    Console().print(table)
    Console().print(f"{PROCESSES} processes, {rounds} rounds of each kind, {spec.threads} threads")


def robust_spread(values: tuple[float, ...]) -> float:
    """1.4826 times the median distance to the median: the standard deviation of normal values."""
    center = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - center) for value in values)


if __name__ == "__main__":
    main()
