"""What is found out about the artifacts of a run: effects and quality, remembered by the store, and speed, never."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.divergences import find_divergences, references
from pipeline.errors import PipelineError
from pipeline.events import Events
from pipeline.hardware.probe import BUSY_LOAD, Figure, cached_probe, probe, probe_folder, quick_bandwidth
from pipeline.measure.effect import EFFECT_VERSION, ComparisonError, Effect, Origin, compare_artifacts
from pipeline.measure.judging import Judgement, judge
from pipeline.measure.layers import LayerDivergence
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import StageToMeasure
from pipeline.measure.quality import (
    QUALITY_VERSION,
    QualityMeasurement,
    QualityWorkload,
    StageQuality,
    fit_windows,
    measure_quality,
    notes_on_text,
    seeded_tokens,
    tokenize,
)
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.schedule import measure_speed
from pipeline.measure.visible import visible
from pipeline.measure.work_counts import WORK_VERSION, Work, count_work, extent_of
from pipeline.measure.workload import Point, Workload
from pipeline.plan import Plan, digest_of
from pipeline.recipe import Recipe
from pipeline.remembered import remembered
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
        effects, failures, incomparable = self._effects()
        unloadable = set(failures)
        baseline = self.recipe.evaluate.baseline

        def nothing(why: str) -> Measured:
            return Measured(
                text_digest=text_digest,
                effects=effects,
                failures=failures,
                unloadable=unloadable,
                logs=self._logs(),
                notes=(*incomparable, f"nothing was measured: the baseline {baseline} {why}"),
            )

        if baseline not in self.artifacts:
            return nothing("has no artifact")
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
            return nothing(f"cannot be: {failures[baseline]}")
        notes = list(incomparable)
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
        quality = self._quality(stages, known_only=not speed)
        notes += quality.notes
        if timed is not None:
            # those that did not load beside the others are loaded alone to be scored: what was scored did load
            unloadable |= set(timed.unloadable) - quality.stages.keys()
        failures |= quality.failures
        unloadable |= quality.unloadable
        if quality.problem is not None:
            failures = {stage.name: quality.problem for stage in stages} | failures
        judgements = self._judgements(quality.stages)
        divergences, unseen = self._divergences(stages, judgements, known_only=not speed)
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

    def _effects(self) -> tuple[dict[str, Effect], dict[str, str], list[str]]:
        """(effects, why a stage's artifact cannot be read, notes of why what others changed is not known)."""
        pairs = {
            stage.name: (self.artifacts[stage.parent], self.artifacts[stage.name])
            for stage in self.plan.stages
            if stage.parent is not None and stage.parent in self.artifacts and stage.name in self.artifacts
        }
        device = self.plan.hardware.device
        origins = {name: self._origins(name) for name in pairs}
        failures: dict[str, str] = {}
        notes: list[str] = []

        def compare(names: list[str]) -> Iterator[tuple[str, Effect]]:
            for name in names:
                try:
                    effect = compare_artifacts(*pairs[name], device=device, origins=origins[name])
                except ComparisonError as error:  # it may run all the same
                    notes.append(f"what {name} changed is not known: {error}")
                    continue
                except Exception as error:  # a pass can yield anything; what cannot be read fails its stage alone
                    failures[name] = visible(f"its artifact cannot be read: {type(error).__name__}: {error}")
                    continue
                yield name, effect

        identities = {
            name: {
                "effect": EFFECT_VERSION,
                "before": before.digest,
                "after": after.digest,
                "device": device,
                "origins": {role: [origin.stage, origin.artifact.digest] for role, origin in origins[name].items()},
            }
            for name, (before, after) in pairs.items()
        }
        return remembered(self.store, Effect, identities, compare), failures, notes

    def _origins(self, name: str) -> dict[str, Origin]:
        """By role, the stages that one with several components was made from; its parent's role is empty."""
        if len(self.artifacts[name].manifest.components) == 1:
            return {}
        planned = self.plan.stage(name)
        roles = {"": planned.parent, **planned.inputs}
        return {
            role: Origin(stage, self.artifacts[stage])
            for role, stage in roles.items()
            if stage in self.artifacts and stage
        }

    def _quality(self, stages: list[StageToMeasure], *, known_only: bool) -> _Quality:
        """Only stages that the store does not know are scored, beside the baseline."""
        wanted = self.recipe.evaluate.quality
        asked_for = QualityWorkload(window=wanted.window, stride=wanted.stride, tokens=wanted.tokens)
        workload, notes = fit_windows(asked_for, [stage.artifact for stage in stages])
        baseline = next(s for s in stages if s.name == self.recipe.evaluate.baseline)
        measured = QualityMeasurement(stages={})
        problem: str | None = None

        def identity(stage: StageToMeasure) -> dict[str, Any]:
            return {
                "version": QUALITY_VERSION,
                # a stage may be the baseline's very artifact: that one has a comparison, and the baseline none
                "role": "baseline" if stage is baseline else "stage",
                "quality": [s.artifact.digest for s in (stage, baseline)],
                "runners": [runner_version(s.artifact.format) for s in (stage, baseline)],
                "workload": workload.model_dump(),
                **self._circumstances(),
            }

        def score(names: list[str]) -> Iterable[tuple[str, StageQuality]]:
            nonlocal measured, problem
            try:
                with Nurseries() as start_worker:
                    measured = measure_quality(
                        [stage for stage in stages if stage is baseline or stage.name in names],
                        baseline=baseline.name,
                        text=self.text,
                        logs=self.logs,
                        workload=workload,
                        random_weights=self._token_seed,
                        on_progress=lambda fraction, message: self.events.measuring(f"quality, {message}"),
                        start_worker=start_worker,
                    )
            except PipelineError as error:  # a text or a tokenizer that does not do: speed can still be measured
                problem = f"quality was not measured: {error}"
            return [(name, measured.stages[name]) for name in names if name in measured.stages]

        found = remembered(
            self.store, StageQuality, {s.name: identity(s) for s in stages}, None if known_only else score
        )
        return _Quality(
            stages=found,
            failures=measured.failures,
            unloadable=set(measured.unloadable),
            notes=(*notes, *measured.notes, *notes_on_text(found.values(), workload)),
            problem=problem,
        )

    @property
    def _token_seed(self) -> int | None:
        """No text is likelier than another to a model with random weights: it scores tokens drawn from this seed."""
        return self.recipe.seed if self.recipe.model.architecture is not None else None

    def _circumstances(self) -> dict[str, Any]:
        """What predictions depend on beside the artifacts and the runners, for the keys of what is remembered."""
        seed = self._token_seed
        return {
            "text": digest_of(self.text) if seed is None else f"tokens drawn from seed {seed}",
            "host": self.plan.host.facets(),
            "device": self.plan.hardware.device,
            "threads": self.plan.threads,
        }

    def _divergences(
        self, stages: Sequence[StageToMeasure], judgements: Mapping[str, Judgement], *, known_only: bool
    ) -> tuple[dict[str, LayerDivergence], list[str]]:
        """(where the quality of worse stages fell, notes of why that is not known of others)."""
        loaded = {stage.name: stage for stage in stages}
        baseline = self.recipe.evaluate.baseline
        parents = {planned.name: planned.parent for planned in self.plan.stages}

        def tokens(limit: int) -> list[int]:
            source, seed = loaded[baseline].artifact, self._token_seed
            return tokenize(source, self.text, limit=limit) if seed is None else seeded_tokens(source, limit, seed)

        return find_divergences(
            {name: (loaded[name], loaded[r]) for name, r in references(judgements, parents, loaded, baseline).items()},
            store=self.store,
            circumstances=self._circumstances(),
            tokens=tokens,
            logs=self.logs,
            events=self.events,
            known_only=known_only,
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

    def _work(self, stages: list[StageToMeasure]) -> tuple[dict[str, dict[Point, Work]], list[str]]:
        """(by stage, what each workload point asks of a machine; why that is not known of some)."""
        points = list(Workload.of(self.recipe.evaluate.workload).points())
        found: dict[str, dict[Point, Work]] = {}
        problems: list[str] = []
        for stage in stages:
            work, problem = self._work_of(stage, points)
            if work:
                found[stage.name] = work
            left = {name for one in work.values() for name in one.uncounted}
            if left:
                problems.append(f"the operations of {stage.name} are not all counted: {', '.join(sorted(left))}")
            problems += problem
        return found, problems

    def _work_of(self, stage: StageToMeasure, points: Sequence[Point]) -> tuple[dict[Point, Work], list[str]]:
        """(what each point asks of a machine, why that is not known of some), up to the first that is not counted."""
        device = self.plan.hardware.device
        problems: list[str] = []

        def count(unknown: list[Point]) -> Iterator[tuple[Point, Work]]:
            for point in unknown:
                try:
                    work = count_work(stage.artifact, extent_of(point), device=device)
                except Exception as error:  # a graph can be anything; it runs or fails without being counted
                    problems.append(f"the work of {stage.name} was not counted: {type(error).__name__}: {error}")
                    return
                if work is None:
                    return
                yield point, work

        identities = {
            point: {"work": WORK_VERSION, "of": stage.artifact.digest, "extent": extent_of(point), "device": device}
            for point in points
        }
        return remembered(self.store, Work, identities, count), problems

    def _bandwidth(self) -> tuple[Figure, ...]:
        """What the host's memory delivers right now, where the stages run on the host's processor."""
        if self.plan.hardware.device != "cpu":
            return ()
        return (quick_bandwidth(host=self.plan.host, threads=self.plan.threads),)

    def _speed(self, stages: list[StageToMeasure]) -> SpeedMeasurement:
        self._probe()
        return measure_speed(
            stages,
            Workload.of(self.recipe.evaluate.workload),
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
