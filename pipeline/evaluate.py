"""What is found out about the artifacts of a run: effects and quality, remembered by the store, and speed, never."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.events import Events
from pipeline.hardware.probe import cached_probe, default_folder, probe
from pipeline.measure.effect import EFFECT_VERSION, Effect, compare_artifacts
from pipeline.measure.process import StageToMeasure
from pipeline.measure.quality import (
    QualityMeasurement,
    QualityWorkload,
    StageQuality,
    fit_windows,
    measure_quality,
)
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.workload import Workload
from pipeline.plan import Plan, digest_of
from pipeline.recipe import Recipe
from pipeline.runtime import ExecutionSpec, runner_version
from pipeline.store import Store


@dataclass(frozen=True)
class Measured:
    """Everything that was found out."""

    text_digest: str
    effects: Mapping[str, Effect] = field(default_factory=dict)
    quality: Mapping[str, StageQuality] = field(default_factory=dict)
    speed: SpeedMeasurement | None = None
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One run's artifacts and how they are to be evaluated."""

    recipe: Recipe
    plan: Plan
    artifacts: Mapping[str, Artifact]
    chosen: Set[str]
    """Stages to measure; effects are told of all."""
    text: str
    store: Store
    logs: Path
    events: Events

    def evaluate(self, *, speed: bool) -> Measured:
        """Effects, quality and, where asked for, speed. Without speed, only what the store remembers of quality."""
        text_digest = digest_of(self.text)
        effects = self._effects()
        baseline = self.recipe.evaluate.baseline
        if baseline not in self.artifacts:
            note = f"nothing was measured: the baseline {baseline} has no artifact"
            return Measured(text_digest=text_digest, effects=effects, notes=(note,))
        spec = ExecutionSpec(threads=self.plan.threads)
        stages = [StageToMeasure(name, a, spec) for name, a in self.artifacts.items() if name in self.chosen]
        quality = self._quality(stages, text_digest, known_only=not speed)
        notes, failures = list(quality.notes), dict(quality.failures)
        timed = None
        if not speed:
            notes.append("speed, load time and memory were not measured (--no-measure)")
        elif baseline not in failures:
            timed = self._speed([s for s in stages if s.name not in failures])
            failures |= timed.failures
            notes += timed.notes
        return Measured(
            text_digest=text_digest,
            effects=effects,
            quality=quality.stages,
            speed=timed,
            failures=failures,
            notes=tuple(notes),
        )

    def _effects(self) -> dict[str, Effect]:
        pairs = [
            (stage.name, self.artifacts[stage.parent], self.artifacts[stage.name])
            for stage in self.plan.stages
            if stage.parent is not None and stage.parent in self.artifacts and stage.name in self.artifacts
        ]
        found = {}
        for name, before, after in pairs:
            key = digest_of({"effect": EFFECT_VERSION, "before": before.digest, "after": after.digest})
            if known := self.store.measurement(key):
                found[name] = Effect.model_validate(known)
                continue
            found[name] = compare_artifacts(before, after)
            self.store.put_measurement(key, found[name].model_dump(mode="json"))
        return found

    def _quality(self, stages: list[StageToMeasure], text_digest: str, *, known_only: bool) -> QualityMeasurement:
        """Only stages that the store does not know are scored, beside the baseline."""
        wanted = self.recipe.evaluate.quality
        asked_for = QualityWorkload(window=wanted.window, stride=wanted.stride, tokens=wanted.tokens)
        workload, notes = fit_windows(asked_for, [stage.artifact for stage in stages])
        baseline = next(s for s in stages if s.name == self.recipe.evaluate.baseline)

        def key(stage: StageToMeasure) -> str:
            return digest_of(
                {
                    "quality": [s.artifact.digest for s in (stage, baseline)],
                    "runners": [runner_version(s.artifact.format) for s in (stage, baseline)],
                    "text": text_digest,
                    "workload": workload.model_dump(),
                    "host": self.plan.host.facets(),
                    "threads": self.plan.threads,
                }
            )

        found = {s.name: self.store.measurement(key(s)) for s in stages}
        known = {name: StageQuality.model_validate(value) for name, value in found.items() if value}
        unknown = [s for s in stages if s.name not in known]
        if known_only or not unknown:
            return QualityMeasurement(stages=known, notes=notes)
        scored = unknown if baseline in unknown else [baseline, *unknown]
        try:
            measured = measure_quality(
                scored,
                baseline=baseline.name,
                text=self.text,
                logs=self.logs,
                workload=workload,
                on_progress=lambda fraction, message: self.events.measuring(f"quality, {message}"),
            )
        except PipelineError as error:  # a text or a tokenizer that does not do: speed can still be measured
            note = f"quality was not measured: {error}"
            return QualityMeasurement(stages=known, notes=(*notes, note))
        for stage in scored:
            if stage.name in measured.stages:
                self.store.put_measurement(key(stage), measured.stages[stage.name].model_dump(mode="json"))
        return measured.model_copy(update={"stages": {**known, **measured.stages}, "notes": (*notes, *measured.notes)})

    def _speed(self, stages: list[StageToMeasure]) -> SpeedMeasurement:
        self._probe()
        wanted = self.recipe.evaluate.workload
        return measure_speed(
            stages,
            Workload(
                prompt_lengths=tuple(wanted.prompt_lengths),
                new_tokens=wanted.new_tokens,
                batch_sizes=tuple(wanted.batch_sizes),
            ),
            baseline=self.recipe.evaluate.baseline,
            budget_s=self.recipe.evaluate.budget_s,
            seed=self.recipe.seed,
            logs=self.logs,
            on_progress=lambda fraction, message: self.events.measuring(f"speed, {fraction:.0%} {message}"),
        )

    def _probe(self) -> None:
        """Measure this machine, once: what it can do belongs beside what was measured on it."""
        if cached_probe(self.plan.host, default_folder()) is not None:
            return
        self.events.measuring("this machine, once")
        try:
            probe(self.plan.host, default_folder())
        except PipelineError as error:
            self.events.note(f"this machine could not be measured: {error}")
