"""cells.json: all cells of a recipe's matrix side by side, each of which has a run and a report of its own.

For every workload point and stage: the time and the speed against the baseline in each cell, with intervals and
verdicts, and what the stage changed there. Nothing is pooled over cells: they are different models or work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from pipeline.artifact import canonical_json
from pipeline.report.effects import components_in_words, is_put_together
from pipeline.report.figures import MARGIN, floor_share
from pipeline.report.schema import Cell, Effect, Interval, Kind, Part, PointKey, Ratio, Report, Speed, StageReport
from pipeline.report.verdicts import is_contradicted, over_parent

CELLS_VERSION: Literal[1] = 1
KINDS: tuple[Kind, ...] = ("forward", "decode", "prefill")


class CellFacts(Part):
    """One cell and the run that was made of it."""

    index: int
    label: str = Field(description="its overrides, short: hidden_size 512, num_attention_heads 4")
    overrides: dict[str, Any]
    run: str | None = Field(None, description="the run's folder, relative to this file; null: there is none")
    exit_code: int
    error: str | None = Field(None, description="why there is no run, or which of its stages have no figures")
    size_bytes: int | None = Field(None, description="weights of the source")
    rounds: int | None = None
    launches: int | None = None
    ended: str | None = Field(None, description="decided, looks or budget: why there were no more rounds")
    noise_floor: dict[str, float] = Field(
        default_factory=dict, description="by workload point, as a share: how much the baseline differs from itself"
    )


class CellFigure(Part):
    """A stage in one cell, at one workload point."""

    cell: int = Field(description="index of the cell")
    status: str = Field(description="ran, cached, skipped, failed or unmeasured, as in report.json; absent: no run")
    reason: str | None = Field(None, description="why there are no figures")
    latency_s: Interval | None = Field(
        None, description="seconds for one prompt (prefill), one token of every sequence (decode) or one pass (forward)"
    )
    mean_s: float | None = Field(None, description="mean over all blocks, outliers among them")
    rounds: int | None = None
    launches: int | None = None
    outliers: int = 0
    vs_baseline: Ratio | None = None
    parent: str | None = Field(None, description="the stage that it was made from")
    vs_parent: Ratio | None = None
    contradicted: bool = Field(
        False, description="it changed nothing, and was timed faster or slower than the stage that it was made from"
    )
    changed: str | None = Field(None, description="what the stage changed: 0 of 155 nodes")
    effect: str | None = Field(None, description="none, graph, weights, execution or conversion")
    broken: bool = False


class StageOverCells(Part):
    name: str
    is_baseline: bool
    figures: tuple[CellFigure, ...] = Field(description="one for each cell, in order")


class PointOverCells(Part):
    """One workload point in all cells that have it."""

    kind: Kind
    batch: int
    prompt: int
    new_tokens: int | None = None
    stages: tuple[StageOverCells, ...]

    @property
    def point(self) -> PointKey:
        return self.kind, self.batch, self.prompt, self.new_tokens


class SizeAxis(Part):
    """What the cells differ in, as numbers that a chart can be drawn over."""

    title: str
    values: dict[int, float] = Field(description="index of the cell -> its place")
    categories: bool = Field(description="true: the places are only an order")


class CellsReport(Part):
    """All cells of one recipe, run one after the other."""

    schema_version: Literal[1] = CELLS_VERSION
    recipe: str
    description: str = ""
    id: str
    created: str = Field(description="UTC, ISO 8601")
    exit_code: int = Field(description="the worst of the cells' so far")
    of: int = Field(description="cells of the matrix; fewer are here where they have not all been run")
    margin: float = Field(MARGIN, description="speeds within this share of each other are equivalent")
    host: str | None = Field(description="the processor that everything was measured on; null: nothing ran")
    threads: tuple[int, ...] = Field(description="that the runs used, each number once")
    baseline: str
    axis: SizeAxis
    cells: tuple[CellFacts, ...]
    points: tuple[PointOverCells, ...]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


Means = Mapping[tuple[str, PointKey], float]
"""Mean seconds of all blocks of a stage at a point."""


@dataclass(frozen=True)
class CellOutcome:
    """What became of one cell."""

    cell: Cell
    exit_code: int
    report: Report | None = None
    run: str | None = None
    """Folder of the run, relative to where the report over the cells will be."""
    error: str | None = None
    means: Means = field(default_factory=dict)


def build_cells_report(
    outcomes: Sequence[CellOutcome],
    *,
    recipe: str,
    description: str,
    baseline: str,
    identity: str,
    created: str,
    exit_code: int,
) -> CellsReport:
    """Put the reports of the cells side by side."""
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    points = {p.point: p for report in reports for stage in report.stages for p in stage.speed or ()}
    order = sorted(points, key=lambda key: (KINDS.index(key[0]), *(value or 0 for value in key[1:])))
    return CellsReport(
        recipe=recipe,
        description=description,
        id=identity,
        created=created,
        exit_code=exit_code,
        of=max((outcome.cell.of for outcome in outcomes), default=0),
        margin=next((r.schedule.margin for r in reports if r.schedule is not None), MARGIN),
        host=next((str(r.host.get("cpu_model")) for r in reports), None),
        threads=tuple(sorted({report.threads for report in reports})),
        baseline=baseline,
        axis=_axis(outcomes),
        cells=tuple(_facts(outcome) for outcome in outcomes),
        points=tuple(_point(points[key], outcomes) for key in order),
    )


def label_of(overrides: Mapping[str, Any]) -> str:
    """The overrides, each by the last part of its key: `hidden_size 512`."""
    told = []
    for key, value in overrides.items():
        shown = value if isinstance(value, str) else canonical_json(value).decode()
        told.append(f"{key.rpartition('.')[2]} {shown}")
    return ", ".join(told) or "as written"


def changed_in_words(effect: Effect | None) -> str | None:
    """What a stage changed, with how many of how many: `0 of 155 nodes`, `fuse_x: 3 of 155`, `155 → 120 nodes`."""
    if effect is None:
        return None
    before, after = effect.nodes or (None, None)
    if effect.kind == "none":
        return "nothing" if after is None else f"0 of {after:,} nodes"
    rules = effect.rules if len(effect.rules) == 1 else {r: counts for r, counts in effect.rules.items() if counts[0]}
    told = [f"{rule}: {done:,} of {of:,}" for rule, (done, of) in rules.items()]
    if is_put_together(effect):
        told.append(components_in_words(effect))
        before = None  # the parent's are in each of them
    elif effect.weights_quantized is not None:
        done, of = effect.weights_quantized
        told.append(f"{done:,} of {of:,} weights quantized")
    if after is not None:
        told.append(f"{after:,} nodes" if before in {None, after} else f"{before:,} → {after:,} nodes")
    return ", ".join(told) or effect.kind


def _facts(outcome: CellOutcome) -> CellFacts:
    report = outcome.report
    error = outcome.error
    floors, source = {}, None
    schedule = None
    if report is not None:
        lost = [s for s in report.stages if _has_no_figures(s)]
        causes = [s for s in lost if s.status != "skipped"] or lost  # what was skipped was skipped for one of these
        others = [s.name for s in lost if s not in causes]
        error = "; ".join(f"{s.name} {s.status}: {s.reason}" for s in causes) or None
        error = error and error + (f"; skipped: {', '.join(others)}" if others else "")
        floors = {_key(f.point): floor_share(f.ratio_low, f.ratio_high) for f in report.noise_floor}
        source = report.stages[0].artifact if report.stages else None
        schedule = report.schedule
    return CellFacts(
        index=outcome.cell.index,
        label=label_of(outcome.cell.overrides),
        overrides=outcome.cell.overrides,
        run=outcome.run,
        exit_code=outcome.exit_code,
        error=error,
        size_bytes=source.weights_bytes if source else None,
        rounds=schedule.rounds if schedule else None,
        launches=schedule.launches if schedule else None,
        ended=schedule.ended if schedule else None,
        noise_floor=floors,
    )


def _has_no_figures(stage: StageReport) -> bool:
    return stage.status in {"failed", "skipped", "unmeasured"}


def _key(point: PointKey) -> str:
    return " ".join(str(part) for part in point if part is not None)


def floor_of(cell: CellFacts, point: PointOverCells) -> float | None:
    """The noise floor of a cell at a workload point, as a share; None where it is not known."""
    return cell.noise_floor.get(_key(point.point))


def _point(point: Speed, outcomes: Sequence[CellOutcome]) -> PointOverCells:
    names: dict[str, bool] = {}
    for outcome in outcomes:
        for stage in outcome.report.stages if outcome.report else ():
            names.setdefault(stage.name, False)
            names[stage.name] |= outcome.report is not None and outcome.report.baseline == stage.name
    stages = [
        StageOverCells(name=name, is_baseline=base, figures=tuple(_figure(name, point, o) for o in outcomes))
        for name, base in names.items()
    ]
    return PointOverCells(
        kind=point.kind,
        batch=point.batch,
        prompt=point.prompt,
        new_tokens=point.new_tokens,
        # a stage that was measured nowhere (it was not asked for) has no row; one that failed has
        stages=tuple(s for s in stages if any(f.latency_s or f.reason for f in s.figures)),
    )


def _figure(name: str, point: Speed, outcome: CellOutcome) -> CellFigure:
    report = outcome.report
    stage = next((s for s in report.stages if s.name == name), None) if report else None
    if stage is None:
        why = outcome.error if report is None else "this cell has no such stage"
        return CellFigure(cell=outcome.cell.index, status="absent", reason=why)
    speed = next((p for p in stage.speed or () if p.point == point.point), None)
    quality = stage.quality.vs_baseline if stage.quality else None
    return CellFigure(
        cell=outcome.cell.index,
        status=stage.status,
        reason=stage.reason if _has_no_figures(stage) else None,
        latency_s=speed.latency_s if speed else None,
        mean_s=outcome.means.get((name, point.point)) if speed else None,
        rounds=speed.rounds if speed else None,
        launches=speed.launches if speed else None,
        outliers=speed.outliers if speed else 0,
        vs_baseline=speed.vs_baseline if speed else None,
        parent=stage.parent,
        vs_parent=over_parent(stage, speed, report) if speed and report else None,
        contradicted=speed is not None and report is not None and is_contradicted(stage, speed, report),
        changed=changed_in_words(stage.effect),
        effect=stage.effect.kind if stage.effect else None,
        broken=quality is not None and quality.verdict == "broken",
    )


def _axis(outcomes: Sequence[CellOutcome]) -> SizeAxis:
    """The weights of the models where they differ, else the one number that the cells override, else their order."""
    sizes = {}
    for outcome in outcomes:
        source = outcome.report.stages[0].artifact if outcome.report and outcome.report.stages else None
        if source is not None and source.weights_bytes > 0:
            sizes[outcome.cell.index] = source.weights_bytes / 1e6
    if len(set(sizes.values())) > 1 and len(set(sizes.values())) == len(sizes):
        return SizeAxis(title="weights of the model, MB", values=sizes, categories=False)
    keys = {key for outcome in outcomes for key in outcome.cell.overrides}
    for key in sorted(keys):
        values = {o.cell.index: _number(o.cell.overrides.get(key)) for o in outcomes}
        known = {index: value for index, value in values.items() if value is not None}
        if len(known) == len(outcomes) and len(set(known.values())) == len(outcomes) > 1:
            return SizeAxis(title=key, values=known, categories=False)
    order = {outcome.cell.index: float(i) for i, outcome in enumerate(outcomes, start=1)}
    return SizeAxis(title="cell", values=order, categories=True)


def _number(value: Any) -> float | None:
    """A positive number, also as the only item of a list; None for anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if usable else None


__all__ = [
    "CELLS_VERSION",
    "CellFacts",
    "CellFigure",
    "CellOutcome",
    "CellsReport",
    "PointOverCells",
    "StageOverCells",
    "build_cells_report",
    "changed_in_words",
    "floor_of",
    "label_of",
]
