"""What is found out about the artifacts of a run: effects and quality, remembered by the store, and speed, never."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.events import Events
from pipeline.hardware.probe import cached_probe, probe, probe_folder
from pipeline.measure.effect import EFFECT_VERSION, Effect, compare_artifacts
from pipeline.measure.process import StageToMeasure
from pipeline.measure.quality import (
    QUALITY_VERSION,
    Judgement,
    QualityWorkload,
    StageQuality,
    fit_windows,
    judge,
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
    judgements: Mapping[str, Judgement] = field(default_factory=dict)
    """What the recipe's thresholds make of the quality of those that were compared with the baseline."""
    speed: SpeedMeasurement | None = None
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a stage has no figures."""
    unloadable: Set[str] = frozenset()
    """Those of them whose artifact cannot be read or loaded: the stage failed, whatever its pass thought."""
    logs: Mapping[str, str] = field(default_factory=dict)
    """Logs of what was loaded, relative to the run's folder."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Quality:
    """What is known of the stages' quality, why some could not be scored, and why none could."""

    stages: Mapping[str, StageQuality]
    failures: Mapping[str, str] = field(default_factory=dict)
    unloadable: Set[str] = frozenset()
    notes: tuple[str, ...] = ()
    problem: str | None = None


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
        effects, failures = self._effects()
        unloadable = set(failures)
        baseline = self.recipe.evaluate.baseline
        if baseline not in self.artifacts:
            note = f"nothing was measured: the baseline {baseline} has no artifact"
            return Measured(
                text_digest=text_digest,
                effects=effects,
                failures=failures,
                unloadable=unloadable,
                logs=self._logs(),
                notes=(note,),
            )
        spec = ExecutionSpec(device=self.plan.hardware.device, threads=self.plan.threads)
        stages = [
            StageToMeasure(name, artifact, spec, memory_bytes=_memory_bytes(self.plan, name))
            for name, artifact in self.artifacts.items()
            if name in self.chosen and name not in failures
        ]
        for stage in list(stages):
            try:
                runner_version(stage.artifact.format)
            except PipelineError as error:  # a format that no installed runner loads
                failures[stage.name] = str(error)
                stages.remove(stage)
        if baseline in failures:
            note = f"nothing was measured: the baseline {baseline} cannot be: {failures[baseline]}"
            return Measured(
                text_digest=text_digest,
                effects=effects,
                failures=failures,
                unloadable=unloadable,
                logs=self._logs(),
                notes=(note,),
            )
        notes: list[str] = []
        timed = None
        if speed:  # before quality: what a cold load compiles is there when the same model is scored
            timed = self._speed(stages)
            failures |= timed.failures
            notes += timed.notes
        else:
            notes.append("speed, load time and memory were not measured (--no-measure)")
        quality = self._quality(stages, text_digest, known_only=not speed)
        notes += quality.notes
        if timed is not None:
            # those that did not load beside the others are loaded alone to be scored: what was scored did load
            unloadable |= set(timed.unloadable) - quality.stages.keys()
        failures |= quality.failures
        unloadable |= quality.unloadable
        if quality.problem is not None:
            failures = {stage.name: quality.problem for stage in stages} | failures
        return Measured(
            text_digest=text_digest,
            effects=effects,
            quality=quality.stages,
            judgements=self._judgements(quality.stages),
            speed=timed,
            failures=failures,
            unloadable=unloadable,
            logs=self._logs(),
            notes=tuple(notes),
        )

    def _logs(self) -> dict[str, str]:
        names = [name for name in self.artifacts if (self.logs / f"{name}.log").is_file()]
        return {name: f"{self.logs.name}/{name}.log" for name in names}

    def _effects(self) -> tuple[dict[str, Effect], dict[str, str]]:
        """(effects, why a stage's artifact cannot be read)."""
        pairs = [
            (stage.name, self.artifacts[stage.parent], self.artifacts[stage.name])
            for stage in self.plan.stages
            if stage.parent is not None and stage.parent in self.artifacts and stage.name in self.artifacts
        ]
        found: dict[str, Effect] = {}
        failures: dict[str, str] = {}
        for name, before, after in pairs:
            key = digest_of({"effect": EFFECT_VERSION, "before": before.digest, "after": after.digest})
            if (known := _remembered(Effect, self.store, key)) is not None:
                found[name] = known
                continue
            try:
                found[name] = compare_artifacts(before, after)
            except Exception as error:  # a pass can yield anything; what cannot be read fails its stage and no other
                failures[name] = f"its artifact cannot be read: {type(error).__name__}: {error}"
                continue
            self.store.put_measurement(key, found[name].model_dump(mode="json"))
        return found, failures

    def _quality(self, stages: list[StageToMeasure], text_digest: str, *, known_only: bool) -> _Quality:
        """Only stages that the store does not know are scored, beside the baseline."""
        wanted = self.recipe.evaluate.quality
        asked_for = QualityWorkload(window=wanted.window, stride=wanted.stride, tokens=wanted.tokens)
        workload, notes = fit_windows(asked_for, [stage.artifact for stage in stages])
        baseline = next(s for s in stages if s.name == self.recipe.evaluate.baseline)
        # no text is likelier than another to a model with random weights: it scores seeded tokens
        random_weights = self.recipe.seed if self.recipe.model.architecture is not None else None
        scored_text = text_digest if random_weights is None else f"tokens drawn from seed {random_weights}"

        def key(stage: StageToMeasure) -> str:
            return digest_of(
                {
                    "version": QUALITY_VERSION,
                    "quality": [s.artifact.digest for s in (stage, baseline)],
                    "runners": [runner_version(s.artifact.format) for s in (stage, baseline)],
                    "text": scored_text,
                    "workload": workload.model_dump(),
                    "host": self.plan.host.facets(),
                    "device": self.plan.hardware.device,
                    "threads": self.plan.threads,
                }
            )

        found = {s.name: _remembered(StageQuality, self.store, key(s)) for s in stages}
        known = {name: quality for name, quality in found.items() if quality is not None}
        unknown = [s for s in stages if s.name not in known]
        if known_only or not unknown:
            return _Quality(stages=known, notes=notes)
        scored = unknown if baseline in unknown else [baseline, *unknown]
        try:
            measured = measure_quality(
                scored,
                baseline=baseline.name,
                text=self.text,
                logs=self.logs,
                workload=workload,
                random_weights=random_weights,
                on_progress=lambda fraction, message: self.events.measuring(f"quality, {message}"),
            )
        except PipelineError as error:  # a text or a tokenizer that does not do: speed can still be measured
            return _Quality(stages=known, notes=notes, problem=f"quality was not measured: {error}")
        for stage in scored:
            if stage.name in measured.stages:
                self.store.put_measurement(key(stage), measured.stages[stage.name].model_dump(mode="json"))
        return _Quality(
            stages={**known, **measured.stages},
            failures=measured.failures,
            unloadable=set(measured.unloadable),
            notes=(*notes, *measured.notes),
        )

    def _judgements(self, quality: Mapping[str, StageQuality]) -> dict[str, Judgement]:
        """By the thresholds of this recipe, whenever the figures were found."""
        thresholds = self.recipe.evaluate.quality.thresholds
        random_weights = self.recipe.model.architecture is not None
        return {
            name: judge(found.vs_baseline, thresholds, random_weights=random_weights)
            for name, found in quality.items()
            if found.vs_baseline is not None
        }

    def _speed(self, stages: list[StageToMeasure]) -> SpeedMeasurement:
        self._probe()
        wanted = self.recipe.evaluate.workload
        return measure_speed(
            stages,
            Workload(
                prompt_lengths=tuple(wanted.prompt_lengths),
                new_tokens=tuple(wanted.new_token_counts),
                batch_sizes=tuple(wanted.batch_sizes),
                forward=None if wanted.forward is None else tuple((b, length) for b, length in wanted.forward),
            ),
            baseline=self.recipe.evaluate.baseline,
            budget_s=self.recipe.evaluate.budget_s,
            looks=self.recipe.evaluate.looks,
            margin=self.recipe.evaluate.margin,
            parents={stage.name: stage.parent for stage in self.plan.stages},
            seed=self.recipe.seed,
            logs=self.logs,
            on_progress=lambda fraction, message: self.events.measuring(f"speed, {fraction:.0%} {message}"),
        )

    def _probe(self) -> None:
        """Measure this machine, once: what it can do belongs beside what was measured on it."""
        folder = probe_folder(self.store.root)
        if cached_probe(self.plan.host, folder) is not None:
            return
        self.events.measuring("what this machine can do, once")
        try:
            probe(self.plan.host, folder)
        except PipelineError as error:
            self.events.note(f"this machine could not be measured: {error}")


def _memory_bytes(plan: Plan, name: str) -> int | None:
    """What running the stage takes, by the plan's estimate; the pages of the weights that it maps included."""
    predicted = plan.stage(name).predicted
    if predicted is None or predicted.inference_bytes is None:
        return None
    return predicted.inference_bytes + (predicted.mapped_bytes or 0)


Remembered = TypeVar("Remembered", bound=BaseModel)


def _remembered(model: type[Remembered], store: Store, key: str) -> Remembered | None:
    """The result under `key`; None where there is none, or one that another version wrote."""
    found = store.measurement(key)
    try:
        return None if found is None else model.model_validate(found)
    except ValidationError:
        return None
