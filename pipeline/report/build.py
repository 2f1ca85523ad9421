"""From a run's values to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.evaluate import Measured
from pipeline.execute import StageResult
from pipeline.hardware.probe import Figure, ProbeResult, cached_probe, probe_folder
from pipeline.measure.effect import Effect, with_rules
from pipeline.measure.judging import Judgement
from pipeline.measure.layers import LayerDivergence
from pipeline.measure.quality import StageQuality
from pipeline.measure.roofline import Ceilings, Subject, Timing, host_ceilings, rooflines, target_ceilings
from pipeline.measure.samples import LoadTimes, SpeedMeasurement
from pipeline.measure.statistics import NoiseFloor as MeasuredFloor
from pipeline.measure.statistics import SpeedPoint, speed_figures
from pipeline.measure.work_counts import Work
from pipeline.measure.workload import Point
from pipeline.plan import Plan, PlannedStage, digest_of
from pipeline.recipe import Recipe
from pipeline.recipe.schema import SOURCE
from pipeline.report.break_even import break_even
from pipeline.report.gates import Condition, evaluate_gate
from pipeline.report.paired import every_contrast
from pipeline.report.pareto import pareto
from pipeline.report.schema import (
    ArtifactFacts,
    Cost,
    Divergence,
    Load,
    Lock,
    ModelFacts,
    NoiseFloor,
    QualityFacts,
    QualityRatio,
    Report,
    Schedule,
    Speed,
    StageReport,
)

BANDWIDTH_MOVED = 1.2
"""The host's bandwidth before and after a measurement that differs by more than that is told."""

PACKAGES = (
    "pipeline",
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxoptimizer",
    "olive-ai",
    "numpy",
    "scipy",
)


def build_report(
    *,
    recipe: Recipe,
    plan: Plan,
    results: Mapping[str, StageResult],
    artifacts: Mapping[str, Artifact],
    measured: Measured,
    store: Path,
    run_id: str,
    wall_s: float,
) -> Report:
    """The report of one run, without its export: which stage that is depends on the report."""
    speed = measured.speed
    figures: Mapping[str, tuple[SpeedPoint, ...]] = {}
    floors: tuple[MeasuredFloor, ...] = ()
    if speed is not None:
        parents = {stage.name: stage.parent for stage in plan.stages}
        found = speed_figures(
            speed.samples,
            baseline=recipe.evaluate.baseline,
            parents=parents,
            plan=speed.plan,
            looks_taken=speed.looks_taken,
        )
        if not speed.fits:
            found = found.without_claims()
        figures, floors = found.stages, found.noise_floor
    probed = cached_probe(plan.host, probe_folder(store), threads=plan.threads)
    held: set[str] = set()
    stages = []
    for planned in plan.stages:
        artifact = artifacts.get(planned.name)
        stages.append(
            _stage(
                planned,
                results[planned.name],
                artifact,
                effect=measured.effects.get(planned.name),
                quality=measured.quality.get(planned.name),
                judgement=measured.judgements.get(planned.name),
                divergence=measured.divergences.get(planned.name),
                speed=speed,
                points=figures.get(planned.name, ()),
                failure=measured.failures.get(planned.name),
                unloadable=planned.name in measured.unloadable,
                log=measured.logs.get(planned.name),
                held=held,
            )
        )
        if artifact is not None:
            held |= _blobs(artifact)
    draft = Report(
        recipe=recipe.name,
        description=recipe.description,
        model=ModelFacts(
            source=str(plan.stage(SOURCE).params["model"]), random_weights=recipe.model.architecture is not None
        ),
        cell=recipe.cell,
        run=run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=wall_s,
        lock=_lock(recipe, artifacts, measured.text_digest),
        host=_host(plan, probed, measured.bandwidth),
        hardware=plan.hardware.model_dump(mode="json"),
        threads=plan.threads,
        notes=(*plan.notes, *measured.notes, *_notes_on_the_host(probed, measured, plan.hardware.device)),
        baseline=recipe.evaluate.baseline,
        schedule=_schedule(speed),
        noise_floor=tuple(NoiseFloor(**{**f.model_dump(), "new_tokens": f.new_tokens or None}) for f in floors),
        stages=_with_rooflines(stages, plan, probed, measured),
        contrasts=every_contrast(speed) if speed is not None else (),
    )
    sources = {s.name: (*filter(None, (s.parent,)), *s.inputs.values()) for s in plan.stages}
    earned = [s.model_copy(update={"break_even": break_even(s, draft, sources)}) for s in draft.stages]
    draft = draft.model_copy(update={"stages": tuple(earned)})
    gates = tuple(
        evaluate_gate(Condition(g.text, g.stage, g.metric, g.selector, g.comparison, g.holds), draft)
        for g in recipe.parsed_gates
    )
    return draft.model_copy(update={"gates": gates, "pareto": pareto(draft)})


def _stage(
    planned: PlannedStage,
    result: StageResult,
    artifact: Artifact | None,
    *,
    effect: Effect | None,
    quality: StageQuality | None,
    judgement: Judgement | None,
    divergence: LayerDivergence | None,
    speed: SpeedMeasurement | None,
    points: tuple[SpeedPoint, ...],
    failure: str | None,
    unloadable: bool,
    log: str | None,
    held: set[str],
) -> StageReport:
    measured = speed is not None and bool(points)
    loads = speed.load if speed else {}
    load = _load(loads.get(planned.name), loads.get(str(planned.parent)))
    return StageReport.model_validate(
        {
            "name": planned.name,
            "pass": planned.pass_name,
            "params": planned.params,
            "parent": planned.parent,
            "status": ("failed" if unloadable else "unmeasured") if failure and artifact else result.status,
            "reason": failure or result.reason,
            "log": result.log or log,
            "artifact": _facts(artifact, held) if artifact else None,
            "cost": Cost(**result.cost.model_dump()),
            "predicted_memory": planned.predicted,
            "effect": with_rules(effect, result.rules) if effect else None,
            "load": load,
            "inference_peak_memory_bytes": speed.inference_peak_memory_bytes.get(planned.name) if speed else None,
            "device_peak_memory_bytes": speed.device_peak_memory_bytes.get(planned.name) if speed else None,
            "speed": tuple(_speed(p) for p in points) if measured else None,
            "quality": _quality(quality, judgement, divergence) if quality else None,
        }
    )


def _load(own: LoadTimes | None, parents: LoadTimes | None) -> Load | None:
    if own is None:
        return None
    saved = None
    if parents is not None and parents.warm_s is not None and own.warm_s is not None:
        saved = parents.warm_s - own.warm_s
    return Load(**own.model_dump(), saved_s=saved)


def _facts(artifact: Artifact, held: set[str]) -> ArtifactFacts:
    blobs = {e.digest: e.size_bytes for _, e in artifact.manifest.entries() if not e.path}
    return ArtifactFacts(
        digest=artifact.digest,
        format=artifact.format,
        size_bytes=artifact.manifest.size_bytes,
        weights_bytes=artifact.manifest.weights_bytes,
        unique_bytes=sum(size for digest, size in blobs.items() if digest not in held),
    )


def _blobs(artifact: Artifact) -> set[str]:
    return {e.digest for _, e in artifact.manifest.entries() if not e.path}


def _speed(point: SpeedPoint) -> Speed:
    return Speed.model_validate({**point.model_dump(), "new_tokens": point.new_tokens or None})


def _schedule(speed: SpeedMeasurement | None) -> Schedule | None:
    if speed is None or speed.plan is None or speed.ended is None:
        return None
    return Schedule(
        budget_s=speed.budget_s,
        margin=speed.margin,
        looks=speed.looks,
        looks_taken=speed.looks_taken,
        rounds=speed.rounds,
        launches=speed.launches,
        fits=speed.fits,
        ended=speed.ended,
    )


def _quality(quality: StageQuality, judgement: Judgement | None, divergence: LayerDivergence | None) -> QualityFacts:
    figures = None
    if quality.vs_baseline is not None and judgement is not None:
        figures = {**quality.vs_baseline.model_dump(exclude={"identical"}), **judgement.model_dump()}
    return QualityFacts(
        perplexity=quality.perplexity,
        tokens=quality.tokens,
        compared_tokens=quality.kept_tokens,
        sample_prompt=quality.sample_prompt,
        sample_text=quality.sample_text,
        vs_baseline=QualityRatio.model_validate(figures) if figures else None,
        divergence=Divergence.model_validate(divergence.model_dump()) if divergence else None,
    )


def _host(plan: Plan, probed: ProbeResult | None, bandwidth: Sequence[Figure]) -> dict[str, Any]:
    """The host as it was described, with the probe's figures and the bandwidth beside the run where there are any."""
    described = plan.host.model_dump(mode="json")
    around = dict(zip(("before", "after"), (f.model_dump(mode="json") for f in bandwidth), strict=False))
    return {
        **described,
        "probe": probed.model_dump(mode="json", exclude={"host"}) if probed else None,
        "bandwidth_gb_per_s": around or None,
    }


def _notes_on_the_host(probed: ProbeResult | None, measured: Measured, device: str = "cpu") -> tuple[str, ...]:
    """What makes its figures doubtful. MBU and MFU are shares of what the processor can do, so a GPU has none."""
    notes = []
    if len(measured.bandwidth) == 2:
        before, after = (figure.value for figure in measured.bandwidth)
        if max(before, after) > BANDWIDTH_MOVED * min(before, after):
            notes.append(
                f"this machine's memory was read at {before:.0f} GB/s before the speed measurement and at {after:.0f} "
                "GB/s after it: compare stages of this run with each other, and not with another run's"
            )
    if device == "cpu" and probed is not None and probed.was_busy and measured.speed is not None:
        notes.append(
            f"what this machine can do was measured beside other work (load {probed.load_average_1m:.1f}), so MBU and "
            "MFU may be too high"
        )
    return tuple(notes)


def _with_rooflines(
    stages: Sequence[StageReport], plan: Plan, probed: ProbeResult | None, measured: Measured
) -> tuple[StageReport, ...]:
    # the probe measures the processor: of another device, nothing is known but what its profile says
    host = host_ceilings(probed, measured.bandwidth) if plan.hardware.device == "cpu" else Ceilings(None, {})
    subjects = [
        Subject(
            name=stage.name,
            format=stage.artifact.format,
            timings=_timings(measured.work[stage.name], stage, measured.speed),
            reasons=tuple(f"{n.count} {n.operator}: {n.reason}" for n in stage.effect.slow_nodes)
            if stage.effect
            else (),
            fits=stage.predicted_memory.fits if stage.predicted_memory else None,
        )
        for stage in stages
        if stage.artifact is not None and stage.name in measured.work
    ]
    found = rooflines(subjects, host=host, target=target_ceilings(plan.hardware, host))
    return tuple(s.model_copy(update={"roofline": found.get(s.name)}) for s in stages)


def _timings(work: Mapping[Point, Work], stage: StageReport, speed: SpeedMeasurement | None) -> list[Timing]:
    """The work at each workload point with the time that it took, where that was measured."""
    seconds = {p.point: p.latency_s.median for p in stage.speed or ()}
    best: dict[Point, float] = {}
    for sample in speed.samples if speed else ():
        if sample.stage == stage.name:
            best[sample.point] = min(best.get(sample.point, sample.latency_s), sample.latency_s)
    return [
        Timing(
            point,
            asked,
            seconds.get((point.kind, point.batch, point.prompt, point.new_tokens or None)),
            best.get(point),
        )
        for point, asked in work.items()
    ]


def installed_packages() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return packages


def _lock(recipe: Recipe, artifacts: Mapping[str, Artifact], text_digest: str) -> Lock:
    digests = {"recipe": digest_of(recipe.model_dump(mode="json", by_alias=True)), "evaluation_text": text_digest}
    return Lock(
        packages=installed_packages(),
        seed=recipe.seed,
        digests={**digests, **{n: a.digest for n, a in artifacts.items()}},
    )
