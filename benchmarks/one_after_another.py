"""What the blocks of a run would have said if each model had been timed for itself, one after another.

    python benchmarks/one_after_another.py runs/*/latest/samples.json

A run times all stages side by side. Here its blocks are taken as a script takes them that times the baseline first and
the next model afterwards: the baseline's mean over one launch by the stage's mean over another launch, for every two
launches of the run. `one after another` is the smallest and the largest speed-up found so, `next launch` the largest in
either direction where the second launch follows the first one; `in turns` is the run's own figure with its interval.
The row `(itself)` is the baseline's second process: the same model.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.statistics import speed_figures
from pipeline.measure.workload import Point

Who = tuple[str, int]


def means(measured: SpeedMeasurement, point: Point) -> dict[Who, dict[int, float]]:
    """Mean seconds of an iteration of each process, by launch."""
    found: dict[Who, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in measured.samples:
        if sample.point == point:
            found[sample.stage, sample.replica][sample.launch].append(sample.latency_s)
    return {who: {launch: float(np.mean(times)) for launch, times in own.items()} for who, own in found.items()}


def one_after_another(base: dict[int, float], own: dict[int, float]) -> tuple[list[float], list[float]]:
    """Speed-ups with the two taken from different launches; those of which the second launch follows the first."""
    pairs = [(i, j) for i, j in itertools.product(sorted(base), sorted(own)) if i != j]
    return [base[i] / own[j] for i, j in pairs], [base[i] / own[j] for i, j in pairs if j == i + 1]


def signed(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def table_of(measured: SpeedMeasurement, point: Point) -> Table:
    stages = dict.fromkeys(s.stage for s in measured.samples if s.point == point)
    figures = speed_figures(
        measured.samples,
        baseline=measured.baseline,
        parents=dict.fromkeys(stages),
        plan=measured.plan,
        looks_taken=measured.looks_taken,
    )
    times = means(measured, point)
    base = times[measured.baseline, 0]
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "in turns", "95 %", "next launch", "one after another"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    here = (point.kind, point.batch, point.prompt, point.new_tokens)
    floor = next((f for f in figures.noise_floor if (f.kind, f.batch, f.prompt, f.new_tokens) == here), None)
    for (stage, replica), own in sorted(times.items(), key=lambda item: (not item[0][1], item[0])):
        found, after = one_after_another(base, own)
        if (stage, replica) == (measured.baseline, 0) or not found:
            continue
        if replica:
            name, inner = "(itself)", ("", f"{signed(floor.ratio_low)} to {signed(floor.ratio_high)}" if floor else "")
        else:
            ratio = next((p.vs_baseline for p in figures.stages.get(stage, ()) if p.point == point), None)
            inner = (signed(ratio.ratio), f"{signed(ratio.low)} to {signed(ratio.high)}") if ratio else ("", "")
            name = stage
        nearest = max(after, key=lambda r: abs(np.log(r)), default=None)
        table.add_row(name, *inner, signed(nearest) if nearest else "", f"{signed(min(found))} to {signed(max(found))}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="+", help="samples.json of runs")
    console = Console(width=130)
    for path in parser.parse_args().samples:
        measured = SpeedMeasurement.model_validate_json(path.read_text())
        for point in dict.fromkeys(sample.point for sample in measured.samples):
            console.print(f"{point}, {measured.rounds} rounds in {measured.launches} launches; speed-ups in %")
            console.print(table_of(measured, point))
            console.print()


if __name__ == "__main__":
    main()
