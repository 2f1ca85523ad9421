"""Two runs, compared: the artifacts of both are measured again, in the same rounds.

Figures of two nights share no rounds: what one night was slower at is no property of a model. So stages of the same
name are loaded again, side by side, and each ratio comes from rounds that both ran in. Where an artifact has left the
store there is nothing to measure: then the two reports are compared, the result is called unpaired, and its interval
comes from how much the runs of equal artifacts on this machine differ from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.artifact import Artifact
from pipeline.comparable import difference, scoring_of, text_of, unlike
from pipeline.errors import PipelineError, RecipeError, did_you_mean
from pipeline.events import Events
from pipeline.hardware import describe_host
from pipeline.measure.process import StageToMeasure
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.statistics import speed_figures
from pipeline.measure.workload import Point, Workload
from pipeline.report.comparison import (
    ComparedQuality,
    ComparedRun,
    ComparedSpeed,
    ComparedStage,
    Comparison,
    Unlike,
)
from pipeline.report.comparison_html import render_comparison_html
from pipeline.report.comparison_markdown import render_comparison_markdown
from pipeline.report.paired import paired_speed
from pipeline.report.schema import PointKey, Report, StageReport
from pipeline.reproduce import PastRun
from pipeline.run_folder import RunFolder
from pipeline.runtime import ExecutionSpec, runner_version
from pipeline.store import Store
from pipeline.unpaired import History, unpaired_speed

COMPARISONS = "comparisons"
"""Folder of the comparisons, beside those of the recipes' runs."""

COMPARISON_JSON = "comparison.json"
COMPARISON_MARKDOWN = "comparison.md"
COMPARISON_HTML = "comparison.html"

Measure = Callable[..., SpeedMeasurement]
"""Called as `measure_speed` is."""


@dataclass(frozen=True)
class CompareResult:
    """A finished comparison."""

    comparison: Comparison
    folder: Path

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.comparison.stages if stage.status == "failed")


class _Pair(NamedTuple):
    """A stage that both runs have."""

    name: str
    a: StageReport
    b: StageReport

    @property
    def seats(self) -> tuple[str, str]:
        """The names under which the two run in the schedule, A's first."""
        return f"a.{self.name}", f"b.{self.name}"


def compare(
    a: PastRun,
    b: PastRun,
    *,
    store: Store,
    runs: Path,
    stages: Sequence[str] = (),
    budget_s: float | None = None,
    force: bool = False,
    events: Events | None = None,
    measure: Measure = measure_speed,
) -> CompareResult:
    """Measure the stages that two runs have in common (or `stages` of them) again, interleaved, and compare them.

    Everything is measured as A's recipe says: workload, looks, margin, seed, and its budget unless `budget_s` is given.
    The result goes to `runs/comparisons/ID`. Runs that are not comparable are refused, unless `force`; then the result
    says at its top what was different.

    Raises: RecipeError where the runs are not comparable, are the same one, or have no stage in common;
    KeyboardInterrupt with nothing left behind.
    """
    if a.folder.resolve() == b.folder.resolve():
        raise RecipeError(
            f"both are the same run, {a.folder.resolve()}", hint="`pipeline reproduce` does a run again and compares"
        )
    forced = tuple(unlike(a, b))
    if forced and not force:
        told = "\n".join(f"  {difference(d)}" for d in forced)
        raise RecipeError(
            f"the runs are not comparable:\n{told}",
            hint="--force measures what can be measured here, and the result says what was different",
        )
    pairs = _pairs(a.report, b.report, stages)
    events = events or Events()
    home = RunFolder(runs, COMPARISONS)
    with store.lease(home.path), home as folder:
        comparison, measured = _compare(
            a,
            b,
            pairs,
            store=store,
            identity=folder.id,
            logs=folder.path / "logs",
            budget_s=budget_s or a.recipe.evaluate.budget_s,
            forced=forced,
            events=events,
            measure=measure,
        )
        if measured is not None:
            (folder.path / "samples.json").write_text(measured.model_dump_json(), encoding="utf-8")
        (folder.path / COMPARISON_MARKDOWN).write_text(render_comparison_markdown(comparison), encoding="utf-8")
        (folder.path / COMPARISON_HTML).write_text(render_comparison_html(comparison), encoding="utf-8")
        (folder.path / COMPARISON_JSON).write_text(comparison.to_json(), encoding="utf-8")
    return CompareResult(comparison, folder.finished)


def _pairs(a: Report, b: Report, wanted: Sequence[str]) -> list[_Pair]:
    """Raises: RecipeError where there is no such stage in both, or none in common."""
    old, new = ({stage.name: stage for stage in report.stages} for report in (a, b))
    for name in wanted:
        for which, known in (("RUN_A", old), ("RUN_B", new)):
            if name not in known:
                hint = did_you_mean(name, known, noun="stages")
                raise RecipeError(f"--stage: {which} has no stage {name!r}", hint=hint)
    names = [name for name in old if name in new and (not wanted or name in wanted)]
    if not names:
        raise RecipeError(
            f"the runs have no stage in common: RUN_A has {', '.join(old)}; RUN_B has {', '.join(new)}",
            hint="stages are paired by name; give them the same `name:` in both recipes",
        )
    return [_Pair(name, old[name], new[name]) for name in names]


# Measuring


def _compare(
    a: PastRun,
    b: PastRun,
    pairs: Sequence[_Pair],
    *,
    store: Store,
    identity: str,
    logs: Path,
    budget_s: float,
    forced: tuple[Unlike, ...],
    events: Events,
    measure: Measure,
) -> tuple[Comparison, SpeedMeasurement | None]:
    seats: dict[str, StageToMeasure] = {}
    missing: dict[str, str] = {}
    for pair in pairs:
        found = [_seat(name, stage, run, store) for name, stage, run in zip(pair.seats, pair[1:], (a, b), strict=True)]
        if lost := [seat for seat in found if isinstance(seat, str)]:
            missing[pair.name] = "; ".join(dict.fromkeys(lost))
        else:
            seats |= {seat.name: seat for seat in found if isinstance(seat, StageToMeasure)}
    notes = []
    baseline = None
    both = [(new, old) for old, new in (pair.seats for pair in pairs if pair.name not in missing)]
    if seats:
        base = a.report.stage(a.report.baseline)
        seat = _seat(f"a.{base.name}", base, a, store)
        if isinstance(seat, StageToMeasure):
            seats = {seat.name: seat, **seats}
            baseline = seat.name
        else:
            baseline = next(iter(seats))
            notes.append(f"the baseline of RUN_A is gone ({seat}): {baseline} took its place in the schedule")
    if a.recipe.seed != b.recipe.seed:
        notes.append(f"the seeds differ, {a.recipe.seed} and {b.recipe.seed}: both were given the tokens of RUN_A's")
    measured = None
    wanted = a.recipe.evaluate
    if baseline is not None:
        measured = measure(
            list(seats.values()),
            Workload.of(wanted.workload),
            baseline=baseline,
            budget_s=budget_s,
            seed=a.recipe.seed,
            logs=logs,
            looks=wanted.looks,
            margin=wanted.margin,
            pairs=both,
            on_progress=lambda fraction, message: events.measuring(f"speed, {fraction:.0%} {message}"),
        )
        notes += measured.notes
    figures = _medians(measured)
    history = History(a, b) if missing else None
    stages = [
        _stage(pair, a, b, measured, figures, missing=missing.get(pair.name), history=history, count=len(both))
        for pair in pairs
    ]
    names = [{stage.name for stage in run.report.stages} for run in (a, b)]
    return (
        Comparison(
            id=identity,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            a=_run(a),
            b=_run(b),
            forced=forced,
            notes=tuple(notes),
            host=describe_host().model_dump(mode="json"),
            threads=(a.report.threads, b.report.threads),
            baseline=baseline,
            budget_s=budget_s,
            margin=wanted.margin,
            rounds=measured.rounds if measured else 0,
            launches=measured.launches if measured else 0,
            noise_floor=_floors(measured),
            stages=tuple(stages),
            only_in_a=tuple(s.name for s in a.report.stages if s.name not in names[1]),
            only_in_b=tuple(s.name for s in b.report.stages if s.name not in names[0]),
        ),
        measured,
    )


def _run(past: PastRun) -> ComparedRun:
    report = past.report
    return ComparedRun(
        folder=str(past.folder.resolve()),
        recipe=report.recipe,
        run=report.run,
        created=report.created,
        host=report.host.get("cpu_model"),
        model=report.model.source if report.model else None,
    )


def _seat(name: str, stage: StageReport, run: PastRun, store: Store) -> StageToMeasure | str:
    """The stage as it is to be measured, else why it cannot be."""
    which = "RUN_A" if name.startswith("a.") else "RUN_B"
    if stage.artifact is None:
        return f"{which} has no artifact of it: {stage.reason or stage.status}"
    found = store.examine(stage.artifact.digest)
    if not isinstance(found, Artifact):
        return f"the artifact of {which} is not in the store any more: {found}"
    try:
        runner_version(found.format)
    except PipelineError as error:  # a format that no installed runner loads
        return f"{which}: {error}"
    device = run.report.hardware.get("device") or "cpu"
    spec = ExecutionSpec(device=device, threads=run.report.threads)
    return StageToMeasure(name, found, spec, memory_bytes=_memory_bytes(stage))


def _memory_bytes(stage: StageReport) -> int | None:
    """What running the stage takes, as its run had estimated it: cache, activations and mapped weights included."""
    predicted = stage.predicted_memory
    if predicted is None or predicted.inference_bytes is None:
        return None
    return predicted.inference_bytes + (predicted.mapped_bytes or 0)


Medians = Mapping[str, Mapping[PointKey, float]]


def _medians(measured: SpeedMeasurement | None) -> Medians:
    """Median seconds by seat and workload point."""
    if measured is None:
        return {}
    names = dict.fromkeys(sample.stage for sample in measured.samples)
    found = speed_figures(
        measured.samples, baseline=measured.baseline, parents=dict.fromkeys(names), plan=measured.plan
    )
    return {
        name: {(p.kind, p.batch, p.prompt, p.new_tokens or None): p.latency_s.median for p in points}
        for name, points in found.stages.items()
    }


def _floors(measured: SpeedMeasurement | None) -> dict[str, tuple[float, float]]:
    if measured is None:
        return {}
    found = speed_figures(measured.samples, baseline=measured.baseline, parents={}, plan=measured.plan)
    return {
        str(Point(kind=f.kind, batch=f.batch, prompt=f.prompt, new_tokens=f.new_tokens)): (f.ratio_low, f.ratio_high)
        for f in found.noise_floor
    }


# One stage


def _stage(
    pair: _Pair,
    a: PastRun,
    b: PastRun,
    measured: SpeedMeasurement | None,
    medians: Medians,
    *,
    missing: str | None,
    history: History | None,
    count: int,
) -> ComparedStage:
    digests = [stage.artifact.digest if stage.artifact else None for stage in (pair.a, pair.b)]
    status: Literal["paired", "unpaired", "failed", "absent"] = "paired"
    reason = missing
    speed: tuple[ComparedSpeed, ...] = ()
    if missing is not None and None in digests:
        status = "absent"
    elif missing is not None and history is not None:
        status = "unpaired"
        speed = tuple(unpaired_speed(pair.a, pair.b, history, a.recipe.evaluate.margin))
    elif measured is not None:
        speed = tuple(_paired(pair, measured, medians, count))
        reason = "; ".join(measured.failures[seat] for seat in pair.seats if seat in measured.failures) or None
        if reason is not None or not speed:
            status, reason = "failed", reason or "it was not measured in rounds that both ran in"
    sizes = [stage.artifact.size_bytes if stage.artifact else None for stage in (pair.a, pair.b)]
    return ComparedStage(
        name=pair.name,
        same_artifact=digests[0] is not None and digests[0] == digests[1],
        a_digest=digests[0],
        b_digest=digests[1],
        status=status,
        reason=reason,
        speed=speed,
        quality=_quality(pair, a, b),
        size_bytes=(sizes[0], sizes[1]),
    )


def _paired(pair: _Pair, measured: SpeedMeasurement, medians: Medians, count: int) -> Iterator[ComparedSpeed]:
    old, new = pair.seats
    for found in paired_speed(measured, new, old, comparisons=count):
        point = (found.kind, found.batch, found.prompt, found.new_tokens)
        both = [
            {(s.launch, s.round) for s in measured.samples if s.stage == seat and s.replica == 0 and _key(s) == point}
            for seat in (old, new)
        ]
        shared = both[0] & both[1]
        yield ComparedSpeed(
            kind=found.kind,
            batch=found.batch,
            prompt=found.prompt,
            new_tokens=found.new_tokens,
            paired=True,
            ratio=found.ratio,
            a_latency_s=medians.get(old, {}).get(point),
            b_latency_s=medians.get(new, {}).get(point),
            rounds=len(shared),
            launches=len({launch for launch, _ in shared}),
        )


def _key(sample: Any) -> PointKey:
    point = sample.point
    return point.kind, point.batch, point.prompt, point.new_tokens or None


def _quality(pair: _Pair, a: PastRun, b: PastRun) -> ComparedQuality | None:
    old, new = pair.a.quality, pair.b.quality
    if old is None or new is None:
        return None
    reason, ratio = None, None
    random = any(run.report.model is not None and run.report.model.random_weights for run in (a, b))
    if random:
        reason = "the weights are random: perplexity means nothing"
    elif text_of(a.report) != text_of(b.report):
        reason = "the evaluation texts differ"
    elif old.tokens != new.tokens or scoring_of(a.recipe.evaluate.quality) != scoring_of(b.recipe.evaluate.quality):
        reason = "not the same tokens were scored"
    elif old.perplexity is None or new.perplexity is None:
        reason = "a perplexity is not finite"
    else:
        ratio = new.perplexity / old.perplexity
    return ComparedQuality(
        a_perplexity=None if random else old.perplexity,
        b_perplexity=None if random else new.perplexity,
        perplexity_ratio=ratio,
        a_verdict=old.vs_baseline.verdict if old.vs_baseline else None,
        b_verdict=new.vs_baseline.verdict if new.vs_baseline else None,
        reason=reason,
    )
