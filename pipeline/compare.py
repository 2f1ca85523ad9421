"""Two runs, compared: the artifacts of both are measured again, in the same rounds.

Figures of two nights share no rounds: what one night was slower at is no property of a model. So stages of the same
name are loaded again, side by side, and each ratio comes from rounds that both ran in. Where an artifact has left the
store there is nothing to measure: then the two reports are compared, the result is called unpaired, and its interval
comes from how much the runs of equal artifacts on this machine differ from each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from pipeline.artifact import Artifact, canonical_json
from pipeline.errors import PipelineError, RecipeError, did_you_mean
from pipeline.events import Events
from pipeline.hardware import describe_host
from pipeline.measure.looks import LookPlan
from pipeline.measure.process import StageToMeasure
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.statistics import CONFIDENCE, speed_figures, verdict
from pipeline.measure.workload import Workload
from pipeline.recipe import Recipe
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
from pipeline.report.folder import REPORT
from pipeline.report.paired import paired_speed
from pipeline.report.schema import PointKey, Ratio, Report, Speed, StageReport
from pipeline.reproduce import PastRun
from pipeline.run_folder import RunFolder
from pipeline.runtime import ExecutionSpec, runner_version
from pipeline.store import Store

COMPARISONS = "comparisons"
"""Folder of the comparisons, beside those of the recipes' runs."""

COMPARISON_JSON = "comparison.json"
COMPARISON_MARKDOWN = "comparison.md"
COMPARISON_HTML = "comparison.html"

MACHINE = {
    "cpu_model": "processor",
    "physical_cores": "cores",
    "logical_cores": "logical cores",
    "memory_bytes": "memory",
    "gpus": "GPUs",
    "architecture": "architecture",
}
"""What makes a host another one. Its software may be newer: both runs' artifacts meet the same one here."""

LEAST_RUNS = 3
"""Runs of equal artifacts without which nobody knows how much one run differs from the next."""

ABSENT = "–"


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
    forced = tuple(_unlike(a, b))
    if forced and not force:
        told = "\n".join(f"  {_difference(d)}" for d in forced)
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
        )
        if measured is not None:
            (folder.path / "samples.json").write_text(measured.model_dump_json(), encoding="utf-8")
        (folder.path / COMPARISON_MARKDOWN).write_text(render_comparison_markdown(comparison), encoding="utf-8")
        (folder.path / COMPARISON_HTML).write_text(render_comparison_html(comparison), encoding="utf-8")
        (folder.path / COMPARISON_JSON).write_text(comparison.to_json(), encoding="utf-8")
    return CompareResult(comparison, folder.finished)


# What is comparable


def _unlike(a: PastRun, b: PastRun) -> Iterator[Unlike]:
    """What the runs do not share with each other, or with this machine."""
    here = describe_host().model_dump(mode="json")
    for field, what in MACHINE.items():
        values = [_machine(host, field) for host in (a.report.host, b.report.host, here)]
        if len(set(values)) > 1:
            yield Unlike(what=what, a=values[0], b=values[1], here=values[2])
    before, after = (run.recipe.evaluate for run in (a, b))
    told: list[tuple[str, Any, Any]] = [
        ("device", a.report.hardware.get("device"), b.report.hardware.get("device")),
        ("threads", a.report.threads, b.report.threads),
        ("workload", before.workload.model_dump(mode="json"), after.workload.model_dump(mode="json")),
        ("evaluation text", _text(a.report), _text(b.report)),
        ("tokens that quality is measured on", _scoring(before.quality), _scoring(after.quality)),
    ]
    if _same_model(a.report) != _same_model(b.report):
        told.append(("model", _model(a.report), _model(b.report)))
    for what, old, new in told:
        if old != new:
            yield Unlike(what=what, a=_short(old), b=_short(new))


def _difference(unlike: Unlike) -> str:
    here = f", {unlike.here} here" if unlike.here is not None else ""
    return f"{unlike.what}: {unlike.a} in RUN_A, {unlike.b} in RUN_B{here}"


def _machine(host: Mapping[str, Any], field: str) -> str:
    value = host.get(field)
    if field == "memory_bytes" and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if field == "gpus":
        return ", ".join(str(gpu.get("name")) for gpu in value or () if isinstance(gpu, dict)) or "none"
    return ABSENT if value is None else str(value)


def _text(report: Report) -> str:
    return report.lock.digests.get("evaluation_text", ABSENT)[:12]


def _scoring(quality: Any) -> dict[str, int]:
    return {"tokens": quality.tokens, "window": quality.window, "stride": quality.stride}


def _model(report: Report) -> str:
    source = report.model.source if report.model else ABSENT
    digest = report.lock.digests.get("source")
    return f"{source} ({digest[:12]})" if digest else source


def _same_model(report: Report) -> str:
    """What tells one model from another: its contents, else its name."""
    return report.lock.digests.get("source") or (report.model.source if report.model else ABSENT)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode()


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
        measured = measure_speed(
            list(seats.values()),
            _workload(a.recipe),
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
    history = _History(a, b) if missing else None
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
    return StageToMeasure(name, found, ExecutionSpec(device=device, threads=run.report.threads))


def _workload(recipe: Recipe) -> Workload:
    wanted = recipe.evaluate.workload
    return Workload(
        prompt_lengths=tuple(wanted.prompt_lengths),
        new_tokens=tuple(wanted.new_token_counts),
        batch_sizes=tuple(wanted.batch_sizes),
        forward=None if wanted.forward is None else tuple((batch, length) for batch, length in wanted.forward),
    )


Medians = Mapping[str, Mapping[PointKey, float]]


def _medians(measured: SpeedMeasurement | None) -> Medians:
    """Median seconds by seat and workload point."""
    if measured is None:
        return {}
    names = dict.fromkeys(sample.stage for sample in measured.samples)
    found = speed_figures(
        measured.samples, baseline=measured.baseline, parents=dict.fromkeys(names), plan=_looks(measured)
    )
    return {
        name: {(p.kind, p.batch, p.prompt, p.new_tokens or None): p.latency_s.median for p in points}
        for name, points in found.stages.items()
    }


def _floors(measured: SpeedMeasurement | None) -> dict[str, tuple[float, float]]:
    if measured is None:
        return {}
    found = speed_figures(measured.samples, baseline=measured.baseline, parents={}, plan=_looks(measured))
    return {
        " ".join(str(v) for v in (f.kind, f.batch, f.prompt, f.new_tokens) if v): (f.ratio_low, f.ratio_high)
        for f in found.noise_floor
    }


def _looks(measured: SpeedMeasurement) -> LookPlan | None:
    return LookPlan.declare(measured.looks, measured.margin) if measured.looks else None


# One stage


def _stage(
    pair: _Pair,
    a: PastRun,
    b: PastRun,
    measured: SpeedMeasurement | None,
    medians: Medians,
    *,
    missing: str | None,
    history: _History | None,
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
        speed = tuple(_unpaired(pair, history, a.recipe.evaluate.margin))
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
    elif _text(a.report) != _text(b.report):
        reason = "the evaluation texts differ"
    elif old.tokens != new.tokens or _scoring(a.recipe.evaluate.quality) != _scoring(b.recipe.evaluate.quality):
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


# Unpaired


class _History:
    """How much runs of equal artifacts differ from each other, from the reports of both recipes on A's machine."""

    def __init__(self, a: PastRun, b: PastRun) -> None:
        machine = [_machine(a.report.host, field) for field in MACHINE]
        self._times: dict[tuple[str, PointKey], dict[str, list[float]]] = {}
        seen = set()
        for home in (a.folder.resolve().parent, b.folder.resolve().parent):
            for file in sorted(home.glob(f"*/{REPORT}")):
                if file.parent.is_symlink() or file in seen:  # `latest` is one of the others
                    continue
                seen.add(file)
                try:
                    report = Report.model_validate_json(file.read_bytes())
                except (OSError, ValidationError):  # of another version, or being removed
                    continue
                if [_machine(report.host, field) for field in MACHINE] == machine:
                    self._add(report)

    def _add(self, report: Report) -> None:
        for stage in report.stages:
            for point in stage.speed or ():
                if stage.artifact is not None and point.latency_s.median > 0:
                    groups = self._times.setdefault((stage.name, point.point), {})
                    groups.setdefault(stage.artifact.digest, []).append(math.log(point.latency_s.median))

    def spread(self, stage: str, point: PointKey) -> tuple[float, int, int]:
        """(standard deviation of the logarithm of one run's median, its degrees of freedom, runs that told it)."""
        groups = [v for v in self._times.get((stage, point), {}).values() if len(v) > 1]
        freedom = sum(len(values) - 1 for values in groups)
        squares = sum((v - sum(values) / len(values)) ** 2 for values in groups for v in values)
        return (math.sqrt(squares / freedom) if freedom else math.nan), freedom, sum(map(len, groups))


def _unpaired(pair: _Pair, history: _History, margin: float) -> Iterator[ComparedSpeed]:
    """Ratios of the reports' medians, with the interval of two single runs."""
    from scipy import stats

    before = {point.point: point for point in pair.a.speed or ()}
    for new in pair.b.speed or ():
        old = before.get(new.point)
        if old is None or min(old.latency_s.median, new.latency_s.median) <= 0:
            continue
        center = math.log(old.latency_s.median / new.latency_s.median)
        spread, freedom, count = history.spread(pair.name, new.point)
        ratio = None
        if count < LEAST_RUNS:
            reason = (
                f"not known: how much one run differs from the next takes {LEAST_RUNS} runs of equal artifacts on this "
                f"machine to tell, and there are {count}"
            )
        else:
            half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * spread * math.sqrt(2)
            low, high = math.exp(center - half), math.exp(center + half)
            ratio = Ratio(ratio=math.exp(center), low=low, high=high, verdict=verdict(low, high, margin=margin))
            reason = "unpaired: from the two reports"
        yield _told(new, old, ratio, count, reason)


def _told(new: Speed, old: Speed, ratio: Ratio | None, count: int, reason: str) -> ComparedSpeed:
    return ComparedSpeed(
        kind=new.kind,
        batch=new.batch,
        prompt=new.prompt,
        new_tokens=new.new_tokens,
        paired=False,
        ratio=ratio,
        a_latency_s=old.latency_s.median,
        b_latency_s=new.latency_s.median,
        runs_in_history=count,
        reason=reason,
    )
