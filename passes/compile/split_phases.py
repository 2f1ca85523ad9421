"""One model of two graphs over one key-value cache: the one that is fast on prompts, and the one that is on tokens."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline import (
    Artifact,
    Example,
    ExecutionSpec,
    Field,
    Interface,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    PipelineError,
    Prediction,
    RecipeError,
    StageRef,
    check_roles,
    load_runner,
)

if TYPE_CHECKING:
    import numpy as np

PREFILL, DECODE = "prefill", "decode"
"""Roles of the stages that are read, and names of the components that are made."""

PHASES = "phases"
"""Key of the execution block under which the runner finds when to switch."""

LENGTHS = (1, 2, 4, 8, 16, 32, 64)
"""New tokens of the calls that are timed."""

ROUNDS = 5
MOST_ROUNDS = 25
MEASURE_S = 10.0
"""Rounds go on for so long, but there are at least ROUNDS and at most MOST_ROUNDS of them."""

TIMED_S = 0.002
"""Shorter calls are repeated until they have taken so long together: a single one would be too coarse to time."""

SEED = 0


class SplitPhases(Pass):
    """Put two graphs into one model, over one key-value cache: one runs prompts, the other single tokens."""

    name, version = "split_phases", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("onnxruntime",)
    depends_on = ("host.cpu", "host.cores")
    deterministic = False
    roles = (PREFILL, DECODE)
    examples = (
        Example(
            after=(
                {"pass": "export_onnx", "verify": False},
                "fuse_transformer",
                {"pass": "quantize_weights", "bits": 8},
            ),
            inputs={PREFILL: "fuse_transformer", DECODE: "quantize_weights"},
            tolerance=0.5,
        ),
    )

    class Params(PassParams):
        crossover_tokens: int | None = Field(
            None,
            ge=1,
            description="calls of so many new tokens (sequences times tokens of each) and more run the graph for "
            "prompts, those of fewer the one for single tokens; left out: measured on this machine",
        )

        def facets(self) -> tuple[str, ...]:
            return SplitPhases.depends_on if self.crossover_tokens is None else ()

    @classmethod
    def check_stages(cls, parent: StageRef, inputs: Mapping[str, StageRef]) -> None:
        """Raises: RecipeError where the roles are others, or stages are read that do not yield ONNX graphs.

        The stage that it comes after has to be one of the two: the report compares with it.
        """
        super().check_stages(parent, inputs)
        for role, stage in inputs.items():
            if stage.format not in cls.accepts:
                raise RecipeError(
                    f"inputs.{role} takes an ONNX graph, and the stage {stage.name!r} yields {stage.format}",
                    hint="name a stage that comes after export_onnx",
                )
        names = {role: stage.name for role, stage in inputs.items()}
        if parent.name not in names.values():
            raise RecipeError(
                f"it comes after {parent.name!r}, which is neither its prefill stage {names[PREFILL]!r} nor its decode "
                f"stage {names[DECODE]!r}",
                hint=f"write `after: {names[DECODE]}`: the stage that the report compares it with",
            )

    @classmethod
    def predict_from(cls, params: Params, model: ModelSize, inputs: Mapping[str, ModelSize]) -> Prediction:
        """Both models, with what they share counted once. To measure, both are loaded."""
        made = _together(inputs[PREFILL], inputs[DECODE])
        loaded = 0 if made.prepacked else made.linear.size_bytes + made.head.size_bytes
        conversion = 25 * 10**6 if params.crossover_tokens else 70 * 10**6 + loaded * 11 // 10
        return Prediction(model=made, conversion_bytes=conversion, written_bytes=0)

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Check that the two go together, find the crossover, and write the manifest. No weight is copied.

        Raises: PipelineError where a graph has no cache, or caches, interfaces or companions differ.
        """
        check_roles(self.roles, context.inputs)
        for role, part in context.inputs.items():
            _check_part(role, part)
        prefill, decode = context.inputs[PREFILL], context.inputs[DECODE]
        if artifact.digest not in (prefill.digest, decode.digest):
            raise PipelineError(
                "the stage that it comes after is neither of its inputs, and the report would compare it with that",
                hint="write `after:` with the stage that `inputs` names for prefill or decode",
            )
        _check_alike(prefill, decode)
        crossover = params.crossover_tokens or measure_crossover(prefill, decode, context)
        context.logger.info("calls of %d new tokens and more run the prefill graph", crossover)
        manifest = prefill.manifest.model_copy(
            update={
                "components": {PREFILL: prefill.component, DECODE: decode.component},
                "files": {**prefill.manifest.files, **decode.manifest.files},
                "execution": {
                    **prefill.manifest.execution,
                    **decode.manifest.execution,
                    PHASES: {"crossover_tokens": crossover},
                },
                "lineage": None,
            }
        )
        return Artifact(manifest, artifact.blobs)


def measure_crossover(prefill: Artifact, decode: Artifact, context: PassContext) -> int:
    """The number of new tokens from which on the prefill graph is the faster one.

    Both graphs take turns on prompts of 1 to 64 tokens; the figure of a length is the median over rounds of the ratio
    of their times within the round. Between the two lengths where it passes 1, it is taken to go along a straight line
    over the logarithm of the length.
    """
    import numpy as np

    spec = ExecutionSpec(threads=context.threads)
    runners = [load_runner(prefill, spec), load_runner(decode, spec)]
    longest = min(runner.max_length for runner in runners)
    lengths = [length for length in LENGTHS if length <= longest]
    tokens = np.random.default_rng(SEED).integers(0, runners[0].vocab_size, (1, lengths[-1]), dtype=np.int64)
    order = np.random.default_rng(SEED)
    calls = {n: [_repeats(runner, tokens[:, :n]) for runner in runners] for n in lengths}
    logs: dict[int, list[float]] = {n: [] for n in lengths}
    begin = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= ROUNDS and time.perf_counter() - begin > MEASURE_S:
            break
        context.progress(min(0.95, max(done / MOST_ROUNDS, (time.perf_counter() - begin) / MEASURE_S)), "measuring")
        for n in order.permutation(lengths):
            seconds = [0.0, 0.0]
            for i in order.permutation(2):
                seconds[i] = _seconds(runners[i], tokens[:, :n], calls[n][i])
            logs[n].append(math.log(seconds[0] / seconds[1]))
    ratios = {n: statistics.median(values) for n, values in logs.items()}
    for n, ratio in ratios.items():
        times = "token takes" if n == 1 else "tokens take"
        context.logger.info("%d %s prefill %.2f times as long as decode", n, times, math.exp(ratio))
    crossover = crossover_of(ratios)
    if crossover == 1:
        context.logger.warning("the prefill graph is the faster one for a single token, too: decode's never runs")
    if crossover > lengths[-1]:
        context.logger.warning(
            "the prefill graph is not the faster one at any of these lengths; it runs what is longer than %d tokens, "
            "which was not measured",
            lengths[-1],
        )
    return crossover


def crossover_of(ratios: Mapping[int, float]) -> int:
    """The number of tokens from which on the logarithm of the ratio, prefill's time over decode's, stays below 0.

    `ratios` are by number of tokens, ascending. Where the last is not below 0 it is one more than that has tokens.
    """
    lengths = sorted(ratios)
    slower = [i for i, n in enumerate(lengths) if ratios[n] >= 0]
    if not slower:
        return lengths[0]
    if slower[-1] == len(lengths) - 1:
        return lengths[-1] + 1
    below, above = lengths[slower[-1]], lengths[slower[-1] + 1]
    share = ratios[below] / (ratios[below] - ratios[above])
    between = math.exp(math.log(below) + share * (math.log(above) - math.log(below)))
    return min(above, math.floor(between) + 1)


def _repeats(runner: Any, tokens: np.ndarray) -> int:
    """How often a call is repeated to be timed, after one that warms up."""
    runner.prefill(tokens)
    return max(1, math.ceil(TIMED_S / _seconds(runner, tokens, 1)))


def _seconds(runner: Any, tokens: np.ndarray, repeats: int) -> float:
    """Seconds of one call, as the mean of several."""
    begin = time.perf_counter()
    for _ in range(repeats):
        runner.prefill(tokens)
    return (time.perf_counter() - begin) / repeats


def _check_part(role: str, artifact: Artifact) -> None:
    """Raises: PipelineError where it is no graph with a key-value cache."""
    if artifact.format != "onnx":
        raise PipelineError(
            f"inputs.{role} takes an ONNX graph, not a model in format {artifact.format}",
            hint="put export_onnx before it",
        )
    if len(artifact.manifest.components) != 1:
        parts = ", ".join(artifact.manifest.components)
        raise PipelineError(f"inputs.{role} takes a model of one graph; that one has {parts}")
    if artifact.interface.cache is None:
        raise PipelineError(
            f"inputs.{role} has no key-value cache, so that nothing could go from one graph to the other",
            hint="export it with `cache: true`",
        )


def _check_alike(prefill: Artifact, decode: Artifact) -> None:
    """Raises: PipelineError that shows what differs and has to be the same, for one cache to serve both graphs."""
    manifests = prefill.manifest, decode.manifest
    files = ({name: entry.digest for name, entry in manifest.files.items()} for manifest in manifests)
    executions = (manifest.execution for manifest in manifests)
    different = [
        *_different_fields(prefill.interface, decode.interface),
        *_different_values("the file ", *files),
        *_different_values("execution.", *executions),
    ]
    if different:
        raise PipelineError(
            "the two stages do not go together:\n  " + "\n  ".join(different),
            hint="take stages that were made from one export by passes that keep its inputs and outputs",
        )


def _different_fields(prefill: Interface, decode: Interface) -> list[str]:
    """What differs between two interfaces, a line for each field; of names by role, those of the first role."""
    found = []
    for field in Interface.model_fields:
        old, new = getattr(prefill, field), getattr(decode, field)
        if old == new:
            continue
        if isinstance(old, dict):
            role = next(role for role in (*old, *new) if old.get(role) != new.get(role))
            field, old, new = f"{field} {role}", old.get(role), new.get(role)  # noqa: PLW2901
        found.append(_both(field, old, new))
    return found


def _different_values(what: str, prefill: Mapping[str, Any], decode: Mapping[str, Any]) -> list[str]:
    """A line for each key that both have with another value."""
    keys = [key for key in prefill if key in decode and prefill[key] != decode[key]]
    return [_both(f"{what}{key}", prefill[key], decode[key]) for key in keys]


def _both(what: str, prefill: Any, decode: Any) -> str:
    old, new = ("none" if value is None else str(value) for value in (prefill, decode))
    return f"{what}: {old} in prefill, {new} in decode"


def _together(prefill: ModelSize, decode: ModelSize) -> ModelSize:
    """The size of both: weights that are stored alike in both are the same ones."""
    kinds = {}
    for kind in ("linear", "embedding", "head", "other"):
        old, new = prefill.weights(kind), decode.weights(kind)
        if old == new:
            kinds[kind] = new
            continue
        quantized = [weights.dtype.startswith("int") for weights in (old, new)]
        dtype = new.dtype if all(quantized) or not quantized[1] else old.dtype
        total = old.bytes_per_parameter + new.bytes_per_parameter
        kinds[kind] = new.model_copy(update={"dtype": dtype, "bytes_per_parameter": total})
    tied, prepacked = prefill.tied and decode.tied, prefill.prepacked and decode.prepacked
    return decode.model_copy(update={**kinds, "tied": tied, "prepacked": prepacked, "phases": (prefill, decode)})
