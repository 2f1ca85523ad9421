"""What launches really add: the A/A pairs of runs, against the half percent that intervals assume of one launch.

    python benchmarks/launch_noise.py runs/*/*/samples.json

Every run with two launches or more has the ratio of the baseline's two processes in every round. For each kind of
workload point the variances of all runs are pooled by their degrees of freedom; a square root of a negative one (rounds
explain all) is shown as 0. The interval is of the variance among launches' medians, less what rounds explain.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from pipeline.measure.estimate import LAUNCH_SD, Seen, look_at
from pipeline.measure.samples import SpeedMeasurement


def pairs(measured: SpeedMeasurement) -> dict[str, list[Seen]]:
    """What the rounds say of the baseline against its second process, by kind of point; only with several launches."""
    rounds: dict[tuple[object, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for sample in measured.samples:
        if sample.stage == measured.baseline:
            rounds[sample.point, sample.replica][sample.launch, sample.round] = math.log(sample.latency_s)
    found = defaultdict(list)
    for point in {sample.point for sample in measured.samples}:
        one, other = rounds[point, 0], rounds[point, 1]
        common = sorted(one.keys() & other.keys())
        launches = np.array([launch for launch, _ in common])
        if len(set(launches)) < 2 or len(common) <= len(set(launches)):
            continue
        found[point.kind].append(look_at(np.array([[one[at] - other[at] for at in common]]), launches))
    return found


def pooled(seen: list[Seen]) -> tuple[float, float, float, float]:
    """(standard deviation that launches add to one process, its 95 % interval, that of a block), as shares."""
    freedoms = np.array([s.between_freedom for s in seen])
    total = freedoms.sum()
    among = float(np.average([s.between[0] for s in seen], weights=freedoms))
    explained = float(np.average([(s.launch_noise / s.concentration)[0] for s in seen], weights=freedoms))
    ends = [max(0.0, (among + explained) * total / float(stats.chi2.ppf(q, total)) - explained) for q in (0.975, 0.025)]
    noise = float(np.median([s.noise[0] for s in seen]))
    per_process = [math.sqrt(max(0.0, value) / 2) for value in (among, *ends)]
    return per_process[0], per_process[1], per_process[2], noise / math.sqrt(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="+", help="samples.json of runs")
    found: dict[str, list[Seen]] = defaultdict(list)
    for path in parser.parse_args().samples:
        for kind, seen in pairs(SpeedMeasurement.model_validate_json(path.read_text())).items():
            found[kind] += seen
    if not found:
        sys.exit("no run has two launches with the baseline's second process")
    table = Table(box=None, pad_edge=False)
    for column in ("kind", "pairs", "launches add, %", "95 % interval", "assumed, %", "a block's noise, %"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, seen in sorted(found.items()):
        center, low, high, noise = pooled(seen)
        row = f"{100 * center:.2f}", f"{100 * low:.2f} to {100 * high:.2f}", f"{100 * LAUNCH_SD:.2f}"
        table.add_row(kind, str(len(seen)), *row, f"{100 * noise:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
