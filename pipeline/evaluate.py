"""What is found out about the artifacts of a run: effects and quality, remembered by the store, and speed, never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.events import Events
from pipeline.hardware.probe import BUSY_LOAD, Figure, cached_probe, probe, probe_folder, quick_bandwidth
from pipeline.measure.effect import EFFECT_VERSION, Effect, compare_artifacts
from pipeline.measure.layers import (
    LAYERS_VERSION,
    PASSAGE_TOKENS,
    PASSAGES,
    LayerDivergence,
    measure_layers,
)
from pipeline.measure.process import StageToMeasure
from pipeline.measure.quality import (
    QUALITY_VERSION,
    Judgement,
    QualityWorkload,
    StageQuality,
    fit_windows,
    judge,
    measure_quality,
    seeded_tokens,
    tokenize,
)
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.work_counts import WORK_VERSION, Work, count_work, extent_of
from pipeline.measure.workload import Point, Workload
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
    divergences: Mapping[str, LayerDivergence] = field(default_factory=dict)
    """Where the quality of those that are worse than the baseline fell."""
    speed: SpeedMeasurement | None = None
    work: Mapping[str, Mapping[Point, Work]] = field(default_factory=dict)
    """What an iteration at each workload point asks of a machine, for the stages of which that is known."""
    bandwidth: tuple[Figure, ...] = ()
    """Of the host's memory before and after speed was measured."""
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
    pairs: Sequence[tuple[str, str]] = ()
    """Comparisons of speed that have to be decided, instead of those with the baseline."""

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
        work, uncounted = self._work(stages)
        notes += uncounted
        bandwidth: tuple[Figure, ...] = ()
        if speed:  # before quality: what a cold load compiles is there when the same model is scored
            before = self._bandwidth()
            timed = self._speed(stages)
            bandwidth = (*before, *self._bandwidth())
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
        judgements = self._judgements(quality.stages)
        divergences, unseen = self._divergences(stages, judgements, text_digest, known_only=not speed)
        notes += unseen
        return Measured(
            text_digest=text_digest,
            effects=effects,
            quality=quality.stages,
            judgements=judgements,
            divergences=divergences,
            speed=timed,
            work=work,
            bandwidth=bandwidth,
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
            device = self.plan.hardware.device
            key = digest_of(
                {"effect": EFFECT_VERSION, "before": before.digest, "after": after.digest, "device": device}
            )
            if (known := _remembered(Effect, self.store, key)) is not None:
                found[name] = known
                continue
            try:
                found[name] = compare_artifacts(before, after, device=device)
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
        random_weights = self._token_seed
        scored_text = self._scored_text(text_digest)

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

    @property
    def _token_seed(self) -> int | None:
        """No text is likelier than another to a model with random weights: it scores tokens drawn from this seed."""
        return self.recipe.seed if self.recipe.model.architecture is not None else None

    def _scored_text(self, text_digest: str) -> str:
        """What tells the scored tokens from others, for the keys of what is remembered."""
        return text_digest if self._token_seed is None else f"tokens drawn from seed {self._token_seed}"

    def _divergences(
        self,
        stages: Sequence[StageToMeasure],
        judgements: Mapping[str, Judgement],
        text_digest: str,
        *,
        known_only: bool,
    ) -> tuple[dict[str, LayerDivergence], list[str]]:
        """(where the quality of worse stages fell, notes of why that is not known of others).

        A stage is compared with its parent, where that is as good as the baseline, else with the baseline.
        """
        loaded = {stage.name: stage for stage in stages}
        baseline = self.recipe.evaluate.baseline
        good = {name for name, found in judgements.items() if found.verdict in {"identical", "equivalent"}} | {baseline}
        parents = {planned.name: planned.parent for planned in self.plan.stages}
        found: dict[str, LayerDivergence] = {}
        unknown: dict[str, tuple[StageToMeasure, StageToMeasure]] = {}
        keys: dict[str, str] = {}
        for name, judged in judgements.items():
            if judged.verdict not in {"degraded", "broken"}:
                continue
            parent = parents.get(name)
            pair = loaded[name], loaded[parent if parent in good and parent in loaded else baseline]
            keys[name] = digest_of(
                {
                    "version": LAYERS_VERSION,
                    "layers": [s.artifact.digest for s in pair],
                    "runners": [runner_version(s.artifact.format) for s in pair],
                    "text": self._scored_text(text_digest),
                    "host": self.plan.host.facets(),
                    "device": self.plan.hardware.device,
                    "threads": self.plan.threads,
                }
            )
            known = _remembered(LayerDivergence, self.store, keys[name])
            if known is not None:
                found[name] = known.model_copy(update={"reference": pair[1].name})
            else:
                unknown[name] = pair
        if known_only or not unknown:
            return found, []
        source = loaded[baseline].artifact
        limit = PASSAGES * PASSAGE_TOKENS
        measured = measure_layers(
            list(unknown.values()),
            ids=tokenize(source, self.text, limit=limit)
            if self._token_seed is None
            else seeded_tokens(source, limit, self._token_seed),
            logs=self.logs,
            on_progress=lambda message: self.events.measuring(f"where quality fell, {message}"),
        )
        for name, divergence in measured.stages.items():
            self.store.put_measurement(keys[name], divergence.model_dump(mode="json"))
        notes = [f"at which layer the quality of {n} fell is not known: {why}" for n, why in measured.reasons.items()]
        return {**found, **measured.stages}, notes

    def _judgements(self, quality: Mapping[str, StageQuality]) -> dict[str, Judgement]:
        """By the thresholds of this recipe, whenever the figures were found."""
        thresholds = self.recipe.evaluate.quality.thresholds
        random_weights = self.recipe.model.architecture is not None
        return {
            name: judge(found.vs_baseline, thresholds, random_weights=random_weights)
            for name, found in quality.items()
            if found.vs_baseline is not None
        }

    def _workload(self) -> Workload:
        wanted = self.recipe.evaluate.workload
        return Workload(
            prompt_lengths=tuple(wanted.prompt_lengths),
            new_tokens=tuple(wanted.new_token_counts),
            batch_sizes=tuple(wanted.batch_sizes),
            forward=None if wanted.forward is None else tuple((b, length) for b, length in wanted.forward),
        )

    def _work(self, stages: list[StageToMeasure]) -> tuple[dict[str, dict[Point, Work]], list[str]]:
        """(by stage, what each workload point asks of a machine; why that is not known of some)."""
        device = self.plan.hardware.device
        found: dict[str, dict[Point, Work]] = {}
        problems: list[str] = []
        for stage in stages:
            digest = stage.artifact.digest
            for point in self._workload().points():
                extent = extent_of(point)
                key = digest_of({"work": WORK_VERSION, "of": digest, "extent": extent, "device": device})
                work = _remembered(Work, self.store, key)
                if work is None:
                    try:
                        work = count_work(stage.artifact, extent, device=device)
                    except Exception as error:  # a graph can be anything; it runs or fails without being counted
                        problems.append(f"the work of {stage.name} was not counted: {type(error).__name__}: {error}")
                        break
                    if work is None:
                        break
                    self.store.put_measurement(key, work.model_dump(mode="json"))
                found.setdefault(stage.name, {})[point] = work
            left = {name for work in found.get(stage.name, {}).values() for name in work.uncounted}
            if left:
                problems.append(f"the operations of {stage.name} are not all counted: {', '.join(sorted(left))}")
        return found, problems

    def _bandwidth(self) -> tuple[Figure, ...]:
        """What the host's memory delivers right now, where the stages run on the host's processor."""
        if self.plan.hardware.device != "cpu":
            return ()
        return (quick_bandwidth(host=self.plan.host, threads=self.plan.threads),)

    def _speed(self, stages: list[StageToMeasure]) -> SpeedMeasurement:
        self._probe()
        return measure_speed(
            stages,
            self._workload(),
            baseline=self.recipe.evaluate.baseline,
            budget_s=self.recipe.evaluate.budget_s,
            looks=self.recipe.evaluate.looks,
            margin=self.recipe.evaluate.margin,
            parents={stage.name: stage.parent for stage in self.plan.stages},
            pairs=self.pairs,
            seed=self.recipe.seed,
            logs=self.logs,
            on_progress=lambda fraction, message: self.events.measuring(f"speed, {fraction:.0%} {message}"),
        )

    def _probe(self) -> None:
        """Measure this machine, once, and again where it was busy then and is not now.

        What it can do belongs beside what was measured on it.
        """
        folder = probe_folder(self.store.root)
        threads = self.plan.threads
        known = cached_probe(self.plan.host, folder, threads=threads)
        load = self.plan.host.load_average
        quieter = known is not None and known.was_busy and load is not None and load[0] < BUSY_LOAD
        if known is not None and not quieter:
            return
        self.events.measuring("what this machine can do, once")
        try:
            probe(self.plan.host, folder, threads=threads, again=quieter)
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
