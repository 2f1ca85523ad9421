"""A recipe resolved against a host: what would run, what is cached, what cannot run and why. No stage runs."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from pipeline.artifact import SCHEMA_VERSION, Frozen, canonical_json
from pipeline.code_digest import code_digest
from pipeline.errors import HostError, PipelineError, RecipeError, did_you_mean
from pipeline.file_pass import CodeFile
from pipeline.hardware import HardwareProfile, Host
from pipeline.hardware.host import Gpu
from pipeline.installed import missing_packages
from pipeline.memory_estimate import (
    Load,
    ModelSize,
    Prediction,
    corrected,
    predict_memory,
    size_of_artifact,
    size_of_config,
    unknown_conversion_bytes,
)
from pipeline.models import Source, source_artifact
from pipeline.models.architecture import library_versions
from pipeline.models.source import calibration_text, reading_digest
from pipeline.plugin import Pass, PassParams, Registry, StageRef, UnreadPass, params_as_json, unknown_format
from pipeline.recipe import Recipe, Stage, validate
from pipeline.recipe.parameters import pass_of
from pipeline.recipe.schema import SOURCE
from pipeline.report.schema import PredictedMemory
from pipeline.runtime.protocol import known_formats
from pipeline.store import Store
from pipeline.store.room import too_little_room

DEVICE_MEMORY = "device_peak_memory_bytes"
"""The gate metric that only a GPU has."""

Status = Literal["cached", "will run", "may hit", "cannot run"]

FACETS = (
    "seed",
    "calibration_text",
    "profile.*",
    "host.cpu",
    "host.gpu",
    "host.cores",
    "host.instruction_sets",
    "threads",
)
"""Context facets that a pass may declare in `depends_on`."""


class PlannedStage(Frozen):
    """One stage: what would run, under which key, and whether it has to."""

    name: str
    pass_name: str
    code: CodeFile | None = Field(None, description="where the pass is in a file of its own")
    comes_after: dict[str, str] = Field(default_factory=dict, description="passes that may not follow, and why")
    params: dict[str, Any]
    parent: str | None
    inputs: dict[str, str] = Field(default_factory=dict)
    key: str
    own: str = Field(description="the stage's own part of the key: everything but its parents")
    ingredients: dict[str, Any] = Field(description="what `own` was computed over")
    facets: dict[str, Any] = Field(default_factory=dict, description="values of the facets that the pass declares")
    produces: str
    deterministic: bool = True
    timeout_s: float | None = Field(None, description="seconds after which the pass is ended")
    measure: bool = Field(True, description="false: its model is made and never run")
    writes_bytes: int = Field(0, description="of weights that the stage is expected to write, by estimate")
    status: Status
    reason: str = ""
    artifact: str | None = Field(None, description="digest, where it is known already")
    predicted: PredictedMemory | None = Field(None, description="memory, estimated before anything runs")


class Plan(Frozen):
    """Stages in the order in which they run, and where."""

    recipe: str
    stages: tuple[PlannedStage, ...]
    hardware: HardwareProfile
    host: Host
    threads: int
    notes: tuple[str, ...] = Field((), description="differences between the host and the profile that stop nothing")
    obstacles: tuple[str, ...] = Field((), description="why it cannot run on this host")

    def stage(self, name: str) -> PlannedStage:
        """Raises: KeyError where there is no such stage."""
        return next(s for s in self.stages if s.name == name)

    @property
    def problems(self) -> list[str]:
        """Why it cannot run on this host: of all stages together, and of each that cannot."""
        return [*self.obstacles, *(f"{s.name}: {s.reason}" for s in self.stages if s.status == "cannot run")]

    def require_runnable(self) -> None:
        """Raises: HostError where some stage cannot run here."""
        if problems := self.problems:
            raise HostError("the plan cannot run on this host:\n  " + "\n  ".join(problems))


def select_stages(recipe: Recipe, *, until: str | None = None, only: str | None = None) -> list[Stage]:
    """The stages to run: all, those listed up to `until`, or `only` with what it is made from.

    The baseline and what it is made from are always among them.

    Raises: RecipeError where there is no such stage.
    """
    if until is not None and only is not None:
        raise RecipeError("--until and --only exclude each other")
    for given in filter(None, (until, only)):
        if given not in recipe.stage_names:
            raise RecipeError(
                f"there is no stage {given!r}", hint=did_you_mean(given, recipe.stage_names, noun="stages")
            )
    listed = recipe.stage_names
    if until is not None:
        wanted = set(listed[: listed.index(until) + 1])
    else:
        wanted = _with_ancestors(recipe, only) if only is not None else set(listed)
    wanted |= _with_ancestors(recipe, recipe.evaluate.baseline)
    return [stage for stage in recipe.stages if stage.name in wanted]


def _with_ancestors(recipe: Recipe, name: str) -> set[str]:
    found, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current != SOURCE and current not in found:
            found.add(current)
            stage = recipe.stage(current)
            waiting += [stage.parent, *stage.inputs.values()]
    return found


def make_plan(
    recipe: Recipe,
    *,
    source: Source,
    store: Store,
    registry: Registry,
    profile: HardwareProfile,
    host: Host,
    stages: Sequence[Stage] | None = None,
    force: bool = False,
) -> Plan:
    """Resolve `recipe` (all stages, or those given) against what is installed, stored and at hand.

    Raises: RecipeError where a pass or a parameter is unknown, or formats do not fit.
    """
    _check_workload(recipe, source)
    _check_gates(recipe, profile)
    first = _plan_source(recipe, source, store)
    planned: dict[str, PlannedStage] = {SOURCE: first}
    for stage in recipe.stages if stages is None else stages:
        planned[stage.name] = _plan_stage(
            stage, recipe, planned, store=store, registry=registry, profile=profile, host=host
        )
    sizes, predicted, writes, doubts = _predictions(
        planned, recipe, source, store=store, registry=registry, profile=profile
    )
    _check_caches(recipe, sizes)
    stages_with_memory = [
        s.model_copy(update={"predicted": predicted[s.name], "writes_bytes": writes[s.name]}) for s in planned.values()
    ]
    obstacles = [] if force else _memory_obstacles(stages_with_memory, recipe, profile, host)
    return Plan(
        recipe=recipe.name,
        stages=tuple(stages_with_memory),
        hardware=profile,
        host=host,
        threads=threads_of(recipe, profile, host),
        notes=(
            *_model_notes(source),
            *_settings_notes(recipe, source, host),
            *_differences(profile, host),
            *_does_not_fit(stages_with_memory, profile),
            *doubts,
        ),
        obstacles=tuple(
            obstacles
            + ([] if force else _disk_obstacles(stages_with_memory, store))
            + _device_obstacles(stages_with_memory, profile, host)
        ),
    )


def _check_workload(recipe: Recipe, source: Source) -> None:
    wanted = recipe.evaluate.workload
    if wanted.forward is not None:
        longest = max(length for _, length in wanted.forward)
        if source.max_length is not None and longest > source.max_length:
            raise RecipeError(
                f"a sequence of {longest} tokens takes as many positions; the model has {source.max_length}",
                location=recipe.location("evaluate", "workload", "forward"),
            )
        return
    prompt, new = max(wanted.prompt_lengths), max(wanted.new_token_counts)
    if source.max_length is not None and prompt + new > source.max_length:
        raise RecipeError(
            f"a prompt of {prompt} and {new} new tokens take {prompt + new} positions; "
            f"the model has {source.max_length}",
            location=recipe.location("evaluate", "workload", "prompt_lengths"),
            hint="lower evaluate.workload.prompt_lengths or new_tokens",
        )


def _check_gates(recipe: Recipe, profile: HardwareProfile) -> None:
    for i, gate in enumerate(recipe.parsed_gates):
        if gate.metric == DEVICE_MEMORY and profile.device == "cpu":
            raise RecipeError(
                f"gate {gate.text!r}: {profile.name} is a CPU, of which there is no {DEVICE_MEMORY}",
                location=recipe.location("gates", i),
                hint="peak_memory_bytes is the memory of its processes",
            )


def _settings_notes(recipe: Recipe, source: Source, host: Host) -> Iterator[str]:
    """What a run will not do quite as the recipe says, or what will not serve it."""
    quality, threads = recipe.evaluate.quality, recipe.evaluate.threads
    asked_for = "window" in quality.model_fields_set
    if asked_for and source.max_length is not None and quality.window > source.max_length:
        yield (
            f"evaluate.quality.window is {quality.window}: quality is scored in windows of {source.max_length}, "
            "for the model has no more positions"
        )
    if threads is not None and threads > host.physical_cores:
        yield f"evaluate.threads is {threads}: this host has {host.physical_cores} cores, for which they will wait"


def _check_caches(recipe: Recipe, sizes: Mapping[str, ModelSize]) -> None:
    """Raises: RecipeError where a stage is to be asked for prompts and single tokens and has no cache for them."""
    if recipe.evaluate.workload.forward is not None:
        return
    for name, size in sizes.items():
        if not size.has_cache:
            index = next((stage.index for stage in recipe.stages if stage.name == name), None)
            where = ("model",) if index is None else ("passes", index)
            raise RecipeError(
                f"the graph of the stage {name!r} has no key-value cache, which prompts and single tokens need",
                location=recipe.location(*where),
                hint="measure whole passes: `workload: {forward: [[1, 128]]}` under `evaluate:`, which is [batch, "
                "length]; or take a graph with a cache",
            )


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@cache
def engine_digest() -> str:
    """SHA-256 over the engine's sources through which passes read and write: a mend there changes what they yield."""
    folder = Path(__file__).parent
    names = ("artifact.py", "onnx_model.py", "stored_tensor.py", "store/writer.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def environment() -> dict[str, str]:
    """What enters every key: the engine, the schema, Python, the operating system and the architecture."""
    return {
        "engine": engine_digest(),
        "schema": str(SCHEMA_VERSION),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "os": platform.system(),
        "architecture": platform.machine(),
    }


def inputs_digest(parent: str, inputs: Mapping[str, str]) -> str:
    """One name for the contents of all that a stage reads: its parent's artifact digest and those of its inputs."""
    return digest_of({"parent": parent, "inputs": dict(inputs)})


def _plan_source(recipe: Recipe, source: Source, store: Store) -> PlannedStage:
    ingredients: dict[str, Any] = {
        "pass": SOURCE,
        "environment": {"schema": str(SCHEMA_VERSION)},
        "dtype": source.dtype,
        "code": reading_digest(source),  # a mend there changes what the files or the seed mean
    }
    params: dict[str, Any] = {"model": str(source), "dtype": source.dtype}
    reason = "its files have not been seen before"
    if source.architecture is None:
        ingredients["files"] = {name: store.digest_file((source.folder / name).resolve()) for name in source.files}
        if source.trust_remote_code:
            ingredients["trust_remote_code"] = params["trust_remote_code"] = True
    else:
        ingredients |= {
            "environment": environment(),
            "architecture": source.architecture,
            "libraries": library_versions(),
        }
        params["architecture"] = source.architecture
        reason = "its weights have not been drawn before"
    own = digest_of(ingredients)
    record = store.stage_record(own)
    return PlannedStage(
        name=SOURCE,
        pass_name=SOURCE,
        params=params,
        parent=None,
        key=own,
        own=own,
        ingredients=ingredients,
        produces=source.format,
        status="cached" if record else "will run",
        reason="" if record else reason,
        artifact=record.artifact if record else None,
    )


def _plan_stage(
    stage: Stage,
    recipe: Recipe,
    planned: Mapping[str, PlannedStage],
    *,
    store: Store,
    registry: Registry,
    profile: HardwareProfile,
    host: Host,
) -> PlannedStage:
    where = ("passes", stage.index)
    found, code = pass_of(stage, recipe, registry)
    params = _absolute_paths(validate(found.Params, stage.params, recipe.positions, where), recipe, where)
    accepts, produces = found.formats(params)
    if unknown := sorted({*accepts, produces} - known_formats()):
        raise unknown_format(found.name, found.__module__, unknown)
    parent = planned[stage.parent]
    try:
        read = {role: StageRef(name, planned[name].produces) for role, name in stage.inputs.items()}
        found.check_stages(StageRef(parent.name, parent.produces), read)
    except RecipeError as error:
        location = recipe.location(*where, "inputs")
        raise RecipeError(f"{stage.name}: {error.message}", hint=error.hint, location=location) from None
    if parent.produces not in accepts:
        raise RecipeError(
            f"{stage.name}: the pass {found.name!r} takes {' or '.join(sorted(accepts))}, "
            f"and the stage {parent.name!r} yields {parent.produces}",
            location=recipe.location(*where, "after"),
            hint=_format_hint(accepts, parent.produces),
        )
    _check_order(stage, found, recipe, planned)
    facets = {name: facet_value(name, recipe, profile, host) for name in found.facets(params)}
    unread = issubclass(found, UnreadPass)
    ingredients = {"code": code.digest} if unread and code else _ingredients(found, code, params, facets, store)
    own = digest_of(ingredients)
    parents = {"": parent.key, **{role: planned[name].key for role, name in stage.inputs.items()}}
    key = digest_of({"own": own, "parents": parents})
    status, reason, artifact = _status(stage, found, planned, own=own, key=key, store=store, host=host, params=params)
    return PlannedStage(
        name=stage.name,
        pass_name=found.name if code is None else str(code),
        code=code,
        comes_after=dict(found.comes_after),
        params=params_as_json(params, found),
        parent=stage.parent,
        inputs=stage.inputs,
        key=key,
        own=own,
        ingredients=ingredients,
        facets=facets,
        produces=produces,
        deterministic=found.deterministic,
        timeout_s=stage.timeout_s,
        measure=stage.measure,
        status=status,
        reason=reason,
        artifact=artifact,
    )


def _ingredients(
    found: type[Pass], code: CodeFile | None, params: PassParams, facets: Mapping[str, Any], store: Store
) -> dict[str, Any]:
    """What the stage's own part of the key is computed over."""
    return {
        "pass": found.name,
        "version": found.version,
        "code": code_digest(found) if code is None else code.digest,
        "params": {**params_as_json(params, found), **_contents_of_paths(params, store)},
        "libraries": {name: _library_version(name) for name in found.libraries},
        "facets": {n: digest_of(v) if n == "calibration_text" else v for n, v in facets.items()},
        "environment": environment(),
    }


def _check_order(stage: Stage, found: type[Pass], recipe: Recipe, planned: Mapping[str, PlannedStage]) -> None:
    """Raises: RecipeError where the stage is made from one that its pass, or that one's, does not let it follow."""
    seen: set[str] = set()
    waiting = [stage.parent, *stage.inputs.values()]
    while waiting:
        earlier = planned[waiting.pop()]
        if earlier.name in seen:
            continue
        seen.add(earlier.name)
        waiting += [name for name in (earlier.parent, *earlier.inputs.values()) if name is not None]
        told = f" (stage {earlier.name!r})" if earlier.name != earlier.pass_name else ""
        for reason, rule in (
            (found.comes_before.get(earlier.pass_name), f"has to come before {earlier.pass_name}{told}"),
            (earlier.comes_after.get(found.name), f"cannot come after {earlier.pass_name}{told}"),
        ):
            if reason is not None:
                raise RecipeError(
                    f"{stage.name}: {found.name} {rule}: {reason}",
                    location=recipe.location("passes", stage.index, "pass"),
                    hint="change their order, or branch off before it with `after:`",
                )


def _format_hint(accepts: Set[str], produced: str) -> str | None:
    if "onnx" in accepts and produced == "torch":
        return "put export_onnx before it"
    if "torch" in accepts and produced == "onnx":
        return "an ONNX graph cannot become torch again: take this pass out, or put it before the export"
    return None


def _status(
    stage: Stage,
    found: type[Pass],
    planned: Mapping[str, PlannedStage],
    *,
    own: str,
    key: str,
    store: Store,
    host: Host,
    params: PassParams,
) -> tuple[Status, str, str | None]:
    if issubclass(found, UnreadPass):
        return "may hit", "its code is not run to say more", None
    if record := store.stage_record(key):
        return "cached", "", record.artifact
    needs = [planned[name] for name in (stage.parent, *stage.inputs.values())]
    if all(need.artifact for need in needs):
        inputs = {role: str(planned[name].artifact) for role, name in stage.inputs.items()}
        if record := store.record_by_content(own, inputs_digest(str(needs[0].artifact), inputs)):
            return "cached", "the same was done to an equal artifact", record.artifact
    blocked = next((need.name for need in needs if need.status == "cannot run"), None)
    if blocked:
        return "cannot run", f"it needs {blocked}, which cannot run", None
    if lacking := _lacking(found, params, host):
        return "cannot run", lacking, None
    changing = next((need.name for need in needs if need.artifact is None), None)
    if damage := store.damage(key):
        return "will run", f"in the store, {damage}", None
    if changing and store.may_hit(own):
        return "may hit", f"cached if {changing} comes out as before", None
    return "will run", f"{changing} runs first" if changing else "not in the store", None


def _lacking(found: type[Pass], params: PassParams, host: Host) -> str:
    """What the pass requires and the host does not have; empty where it has all."""
    requires = found.requirements(params)
    if requires.device == "cuda" and not host.gpus:
        return f"the pass {found.name!r} needs a CUDA GPU and this host has none"
    if missing := [p for p in requires.providers if p not in host.execution_providers]:
        return f"the pass {found.name!r} needs {', '.join(missing)}; install the onnxruntime package that brings it"
    if missing := [s for s in requires.instruction_sets if s not in host.instruction_sets]:
        return f"the pass {found.name!r} needs {', '.join(missing)}, which this CPU lacks"
    if missing := [p for p in requires.programs if not any(map(shutil.which, p.split("|")))]:
        return f"the pass {found.name!r} needs the program {' and '.join(missing).replace('|', ' or ')}; install it"
    if missing := missing_packages(requires.packages):
        wanted = " ".join(f'"{p}"' for p in missing)
        return f"the pass {found.name!r} needs {', '.join(missing)}, which is not installed; pip install {wanted}"
    return ""


def _device_obstacles(stages: Iterable[PlannedStage], profile: HardwareProfile, host: Host) -> list[str]:
    """Devices and execution providers of the profile that the host lacks and that some stage would run on."""
    if profile.device == "cuda" and not host.gpus:
        return [
            f"the profile {profile.name} is a CUDA device and this host has none; "
            "run on a machine with an NVIDIA GPU and driver, or use --set hardware=local"
        ]
    missing = [p for p in profile.execution_providers if p not in host.execution_providers]
    graphs = [stage.name for stage in stages if stage.produces == "onnx" and stage.measure]
    if not missing or not graphs:
        return []
    return [
        f"ONNX Runtime here lacks {', '.join(missing)}, which the profile {profile.name} names, to run "
        f"{', '.join(graphs)}; install the onnxruntime package that brings it"
    ]


def _predictions(
    planned: Mapping[str, PlannedStage],
    recipe: Recipe,
    source: Source,
    *,
    store: Store,
    registry: Registry,
    profile: HardwareProfile,
) -> tuple[dict[str, ModelSize], dict[str, PredictedMemory], dict[str, int], list[str]]:
    """(size of each stage's model, its memory, the bytes that it writes, why a pass could not foresee its own)."""
    wanted = recipe.evaluate.workload
    if wanted.forward is not None:
        loads = [Load(batch, length, 0, whole=True) for batch, length in wanted.forward]
    else:
        longest = max(wanted.new_token_counts)
        loads = [Load(b, p, longest) for b in wanted.batch_sizes for p in wanted.prompt_lengths]
    predicted: dict[str, PredictedMemory] = {}
    sizes: dict[str, ModelSize] = {}
    writes: dict[str, int] = {}
    doubts = []
    for name, stage in planned.items():
        if stage.parent is None:
            prediction = Prediction(model=_source_size(stage, source, store))
            writes[name] = 0 if source.architecture is None else prediction.model.weights_bytes
        else:
            found = registry.load(stage.pass_name, stage.code)
            before = sizes[stage.parent]
            try:
                params = found.Params.model_validate_json(json.dumps(stage.params))
                inputs = {role: sizes[read] for role, read in stage.inputs.items()}
                prediction = found.predict_from(params, before, inputs)
            except Exception as error:  # a stranger's pass may raise anything, and an estimate must not stop a plan
                doubts.append(f"{name}: the pass cannot foresee its memory: {type(error).__name__}: {error}")
                prediction = Prediction(model=before.model_copy(update={"format": stage.produces}))
            writes[name] = _written_bytes(before, prediction)
            if prediction.conversion_bytes is None:
                prediction = prediction.model_copy(update={"conversion_bytes": unknown_conversion_bytes(before)})
            artifact = store.artifact(stage.artifact) if stage.artifact else None
            if artifact is not None:
                prediction = prediction.model_copy(update={"model": corrected(prediction.model, artifact)})
        sizes[name] = prediction.model
        capacity = profile.memory_bytes
        predicted[name] = predict_memory(prediction, loads, device=profile.device, capacity_bytes=capacity)
    return sizes, predicted, writes, doubts


def _written_bytes(before: ModelSize, prediction: Prediction) -> int:
    """Bytes of the weights that a pass writes: those that change. One that foresees nothing may write them all anew."""
    after = prediction.model
    if prediction.written_bytes is not None:
        return prediction.written_bytes
    if prediction.conversion_bytes is None:
        return before.weights_bytes
    if after.prepacked and not before.prepacked:
        return after.weights_bytes
    return sum(after.weights(k).size_bytes for k in after.stored_kinds if after.weights(k) != before.weights(k))


def _source_size(stage: PlannedStage, source: Source, store: Store) -> ModelSize:
    """From its tensors where they are there, else from the configuration that the recipe gives."""
    artifact = store.artifact(stage.artifact) if stage.artifact else None
    if artifact is None and source.architecture is not None:
        return size_of_config(source.architecture["config"], dtype=source.dtype)
    return size_of_artifact(artifact or source_artifact(source, store))


def _memory_obstacles(
    stages: Sequence[PlannedStage], recipe: Recipe, profile: HardwareProfile, host: Host
) -> list[str]:
    """Every stage is made, if it is not there, and most are loaded to be measured: both have to fit into free memory.

    On a GPU it is the GPU's memory that running has to fit into.
    """
    found = []
    running = f"running it with {_largest_work(recipe)}"
    gpu = next((gpu.memory_bytes for gpu in host.gpus), None) if profile.device == "cuda" else None
    for stage in stages:
        memory = stage.predicted
        if memory is None:
            continue
        needs = []
        if stage.status != "cached" and memory.conversion_bytes is not None:
            needs.append(("making it", memory.conversion_bytes, host.available_memory_bytes, "this host has"))
        if not stage.measure:
            pass
        elif profile.device == "cpu":
            needs.append((running, _bytes_to_run(memory), host.available_memory_bytes, "this host has"))
        elif gpu is not None:
            needs.append((running, _bytes_to_run(memory), gpu, f"{host.gpus[0].name} has"))
        for what, needed, room, holder in needs:
            if needed > room:
                free = " free" if room == host.available_memory_bytes else ""
                found.append(
                    f"{stage.name}: {what} takes about {_readable(needed)} of memory, by estimate, and {holder} "
                    f"{_readable(room)}{free}; --force tries"
                )
                break
    return found


def _largest_work(recipe: Recipe) -> str:
    """The largest batch and length of the workload, in words."""
    wanted = recipe.evaluate.workload
    if wanted.forward is not None:
        batch, length = max(wanted.forward, key=lambda shape: shape[0] * shape[1])
    else:
        batch, length = max(wanted.batch_sizes), max(wanted.prompt_lengths) + max(wanted.new_token_counts)
    return f"a batch of {batch} and {length:,} tokens each"


def _does_not_fit(stages: Sequence[PlannedStage], profile: HardwareProfile) -> list[str]:
    return [
        f"{stage.name} does not fit {profile.name}: running it takes about {_readable(_bytes_to_run(stage.predicted))}"
        f", by estimate, and {profile.name} has {_readable(profile.memory_bytes)}"
        for stage in stages
        if stage.measure and stage.predicted is not None and stage.predicted.fits is False and profile.memory_bytes
    ]


def _bytes_to_run(memory: PredictedMemory) -> int:
    """Memory of inference and the weights that it maps; the weights alone where no more is known."""
    held = memory.weights_bytes if memory.inference_bytes is None else memory.inference_bytes
    return (held or 0) + (memory.mapped_bytes or 0)


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _model_notes(source: Source) -> list[str]:
    """What a reader should know of the model before believing its figures."""
    if source.architecture is not None:
        random = (
            "the weights are random: speed, size and memory are the architecture's; perplexity means nothing, "
            "agreement with the baseline on seeded tokens does"
        )
        if (outliers := source.architecture.get("outlier_channels")) is None:
            return [random]
        low, high = outliers["scale"]
        return [
            random,
            f"{outliers['share']:.2%} of each norm's channels are scaled by {low:g} to {high:g}, for activations with "
            "outliers such as trained models have",
        ]
    if not source.has_tokenizer:
        return ["the model has no tokenizer.json: its quality on text cannot be measured, its speed can"]
    return []


def _disk_obstacles(stages: Sequence[PlannedStage], store: Store) -> list[str]:
    """Each stage that is to run has to find room in the store."""
    running = [stage for stage in stages if stage.status in {"will run", "may hit"}]
    found = [(stage.name, too_little_room(store, stage.writes_bytes)) for stage in running]
    return [f"{name}: {lacking}" for name, lacking in found if lacking]


def _differences(profile: HardwareProfile, host: Host) -> list[str]:
    notes = []
    if profile.physical_cores is not None and host.physical_cores != profile.physical_cores:
        notes.append(f"{profile.name} has {profile.physical_cores} cores, this host {host.physical_cores}")
    if profile.device == "cuda":  # it says nothing of the machine around it
        return [f"{profile.name} is {profile.model}; this host has {gpu.name}" for gpu in _other_gpus(profile, host)]
    if missing := sorted(set(profile.instruction_sets) - set(host.instruction_sets)):
        notes.append(f"this host lacks instruction sets of {profile.name}: {', '.join(missing)}")
    if extra := sorted(set(host.instruction_sets) - set(profile.instruction_sets)):
        notes.append(f"this host has instruction sets that {profile.name} lacks: {', '.join(extra)}")
    if profile.memory_bytes and host.memory_bytes < profile.memory_bytes:
        notes.append(
            f"{profile.name} has {profile.memory_bytes / 2**30:.0f} GiB of memory, "
            f"this host {host.memory_bytes / 2**30:.0f} GiB"
        )
    return notes


def _other_gpus(profile: HardwareProfile, host: Host) -> list[Gpu]:
    """The GPU that would be used, if it is not the one that the profile describes."""
    return [gpu for gpu in host.gpus[:1] if gpu.name != profile.model]


def threads_of(recipe: Recipe, profile: HardwareProfile, host: Host) -> int:
    """What the recipe says, else the lesser of the profile's and the host's cores."""
    return recipe.evaluate.threads or min(host.physical_cores, profile.physical_cores or host.physical_cores)


def facet_value(name: str, recipe: Recipe, profile: HardwareProfile, host: Host) -> Any:
    """The value of a declared context facet.

    Raises: PipelineError where there is no such facet.
    """
    if name == "seed":
        return recipe.seed
    if name == "threads":
        return threads_of(recipe, profile, host)
    if name == "calibration_text":
        return calibration_text().read_text(encoding="utf-8")
    room, _, field = name.partition(".")
    values = {"profile": profile.model_dump(mode="json"), "host": {k[5:]: v for k, v in host.facets().items()}}
    if room in values and field in values[room]:
        return values[room][field]
    raise PipelineError(f"there is no context facet {name!r}", hint=f"facets: {', '.join(FACETS)}")


@cache
def _library_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _absolute_paths(params: PassParams, recipe: Recipe, where: tuple[str | int, ...]) -> PassParams:
    """Paths in parameters, however deep, start from the folder of the file that names them and have to exist."""

    def settle(name: str, value: Any) -> Any:
        if isinstance(value, Path):
            path = (recipe.folder_of(*where, name) / value.expanduser()).resolve()
            if not path.exists():
                raise RecipeError(f"{name}: {path} does not exist", location=recipe.location(*where, name))
            return path
        return _map_inside(value, lambda inner: settle(name, inner))

    return params.model_copy(update={name: settle(name, value) for name, value in params})


def _contents_of_paths(params: PassParams, store: Store) -> dict[str, Any]:
    """Parameters that hold paths, as they enter the key: a file or folder by its contents, not by its name."""

    def by_contents(value: Any) -> Any:
        if isinstance(value, Path):
            files = [value] if value.is_file() else sorted(p for p in value.rglob("*") if p.is_file())
            root = value.parent if value.is_file() else value
            return {"contents": [[str(p.relative_to(root)), store.digest_file(p)] for p in files]}
        return _map_inside(value, by_contents)

    return {name: by_contents(value) for name, value in params if _holds_path(value)}


def _map_inside(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to what it holds, if it holds anything."""
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: change(inner) for name, inner in value})
    if isinstance(value, dict):
        return {key: change(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(change(inner) for inner in value)
    return value


def _holds_path(value: Any) -> bool:
    found = isinstance(value, Path)

    def look(inner: Any) -> Any:
        nonlocal found
        found = found or _holds_path(inner)
        return inner

    _map_inside(value, look)
    return found
