"""torch.compile as a stage: nothing is compiled into the artifact, its execution block says how a runner compiles."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from pipeline import (
    Artifact,
    Example,
    ExecutionSpec,
    Field,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    PipelineError,
    Prediction,
    Requires,
    load_runner,
)

if TYPE_CHECKING:
    import numpy as np

SEED = 0
PROMPT, STEPS = 128, 3
"""Tokens that the compiled model is compared with the uncompiled one on. The kernels are tuned to the first prompt that
they meet and kept for those who load the artifact, so it has a common length."""

STATIC_LENGTH = 1024
"""Positions of a static cache whose length nobody gave."""

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest error of a position: the root mean square of its logits' differences from the uncompiled model's, as a share
of the standard deviation of all logits. Fused operators keep float32 in between where the others round, so in half
precision both differ from float32 by about as much."""

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class CompileTorch(Pass):
    """Have a torch model compiled by torch.compile when it is loaded."""

    name, version = "compile_torch", 1
    accepts, produces = frozenset({"torch"}), "torch"
    libraries = ("torch", "transformers")
    depends_on = ("profile.device",)
    requires = Requires(programs=("g++|clang++",))
    examples = (Example(params={"verify": False}), Example())

    class Params(PassParams):
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
            "default",
            description="torch.compile's mode: reduce-overhead adds CUDA graphs, which a CPU has not; the max-autotune "
            "ones try several kernels for each product, which takes minutes",
        )
        dynamic: bool | None = Field(
            None,
            description="null: prompts of all lengths share a graph, single tokens have one of their own; true: batch "
            "sizes share them, too; false: every shape is compiled by itself, which is slow to load and fast to run",
        )
        fullgraph: bool = Field(False, description="fail where torch would leave parts of the model uncompiled")
        cache: Literal["dynamic", "static"] = Field(
            "dynamic",
            description="dynamic: a key-value cache that grows; static: one of fixed size, written in place, which "
            "CUDA graphs need; every token attends over all of its positions, so on a CPU a long one is slow",
        )
        max_length: int | None = Field(
            None,
            ge=2,
            description="positions of the static cache, prompt and new tokens together; default: the model's, at most "
            f"{STATIC_LENGTH}",
        )
        dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
            None, description="data type to compute in; null leaves it as it is"
        )
        verify: bool = Field(True, description="compile it here and compare it with the uncompiled model")

        @model_validator(mode="after")
        def _fit_together(self) -> Self:
            if self.cache == "dynamic":
                if self.max_length is not None:
                    raise ValueError("max_length is the size of a static cache; with `cache: dynamic` leave it out")
                if self.dynamic is False:
                    raise ValueError(
                        "`dynamic: false` with `cache: dynamic` would compile every token anew; use `cache: static`"
                    )
                if self.mode in CUDA_GRAPHS:
                    raise ValueError(
                        f"`mode: {self.mode}` records CUDA graphs, whose shapes are fixed; it needs `cache: static`"
                    )
            return self

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """The model keeps its size. Memory is the compiler's, as measured: it hardly depends on the weights."""
        return Prediction(model=model, conversion_bytes=(850 if params.verify else 25) * 10**6)

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Write the execution block; compile, and compare with the uncompiled model, on the device of the profile.

        Raises: PipelineError where the model has fewer positions than `max_length`, torch cannot compile it, or what
        is compiled computes something else.
        """
        execution: dict[str, Any] = {
            **artifact.manifest.execution,
            "compile": params.model_dump(include={"mode", "dynamic", "fullgraph"}),
            "cache": params.cache,
        }
        if params.dtype is not None:
            execution["dtype"] = params.dtype
        interface = artifact.interface
        if params.cache == "static":
            length = static_length(params.max_length, _longest(artifact))
            execution["max_length"] = length
            interface = interface.model_copy(update={"max_length": length})
        elif execution.pop("max_length", None) is not None:  # a static cache before this stage had narrowed it
            interface = interface.model_copy(update={"max_length": _longest(artifact)})
        device = str(context.facet("profile.device"))
        if params.mode in CUDA_GRAPHS and device == "cpu":
            context.logger.warning("on a CPU, mode %s does what it would do without CUDA graphs", params.mode)
        made = _changed(artifact, execution=execution, interface=interface)
        if params.verify:
            verify_against_eager(made, ExecutionSpec(device=device, threads=context.threads), context)
        return made


def static_length(wanted: int | None, longest: int | None) -> int:
    """Positions of the static cache.

    Raises: PipelineError where the model has fewer than are wanted.
    """
    if wanted is None:
        return min(longest or STATIC_LENGTH, STATIC_LENGTH)
    if longest is not None and wanted > longest:
        raise PipelineError(
            f"max_length is {wanted} and the model has {longest} positions", hint=f"at most max_length: {longest}"
        )
    return wanted


def verify_against_eager(artifact: Artifact, spec: ExecutionSpec, context: PassContext) -> dict[str, float]:
    """Run a prompt and single tokens uncompiled and compiled, as `spec` says; the largest error of each phase.

    What was compiled on the way stays for those who load the artifact on this machine.

    Raises: PipelineError where torch cannot compile the model or an error is above TOLERANCES, or not a number.
    """
    from torch._dynamo.utils import counters

    plain = {k: v for k, v in artifact.manifest.execution.items() if k not in ("compile", "cache", "max_length")}
    context.progress(0.0, "running it uncompiled")
    expected, dtype = _logits(_changed(artifact, execution=plain), spec)
    context.progress(0.1, "compiling")
    counters.clear()
    got, _ = _logits(artifact, spec)
    _tell_what_was_left_out(context.logger)
    errors = {phase: _error(got[phase], logits) for phase, logits in expected.items()}
    for phase, error in errors.items():
        context.logger.info("%s: largest error %.1e of the standard deviation", phase, error)
        if not error <= TOLERANCES[dtype]:  # not a number, too
            raise PipelineError(
                f"the compiled model differs from the uncompiled one in its {phase} logits by {error:.2g} of their "
                f"standard deviation; {TOLERANCES[dtype]:g} is allowed in {dtype}",
                hint="`verify: false` keeps it anyway, and its quality is measured",
            )
    return errors


def _logits(artifact: Artifact, spec: ExecutionSpec) -> tuple[dict[str, np.ndarray], str]:
    """(logits [B, V] of a prompt, of all its positions and of tokens after it, by phase; the data type computed in)."""
    import numpy as np

    runner: Any = load_runner(artifact, spec)
    prompt = max(1, min(PROMPT, runner.max_length - STEPS))
    steps = min(STEPS, runner.max_length - prompt)
    tokens = np.random.default_rng(SEED).integers(0, runner.vocab_size, (1, prompt + steps), dtype=np.int64)
    found = {"prefill": runner.prefill(tokens[:, :prompt])}
    if steps:
        decoded = [runner.decode(tokens[:, prompt + i : prompt + i + 1]) for i in range(steps)]
        found["decode"] = np.concatenate(decoded)
    found["score"] = np.concatenate(list(runner.score(tokens[:, :prompt])), axis=1)[0]
    return found, runner.dtype


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a position, of logits [positions, V], as TOLERANCES counts it."""
    import numpy as np

    of_positions = np.sqrt(np.mean(np.square(got.astype(np.float64) - expected), axis=-1))
    return float(of_positions.max()) / (float(expected.std()) or 1.0)


def _tell_what_was_left_out(logger: logging.Logger) -> None:
    """Log what torch compiled, where and why it left the graph, and whether it recorded no CUDA graphs after all."""
    from torch._dynamo.utils import counters

    breaks = counters["graph_break"]
    logger.info("%d graphs compiled, %d graph breaks", counters["stats"]["unique_graphs"], sum(breaks.values()))
    for reason, times in breaks.most_common():
        logger.warning("graph break, %d times: %s", times, str(reason).strip().partition("\n")[0])
    if skipped := counters["inductor"]["cudagraph_skips"]:
        logger.warning("torch recorded no CUDA graph of %d of them: their kernels are launched one by one", skipped)


def _longest(artifact: Artifact) -> int | None:
    """Positions that the model has, as far as its manifest or its configuration says."""
    config = artifact.read_json("config.json")
    text = config.get("text_config", config)
    narrowed = artifact.manifest.execution.get("max_length") is not None  # by a static cache, which this one replaces
    found = (None if narrowed else artifact.interface.max_length) or text.get("max_position_embeddings")
    return int(found) if found is not None else None


def _changed(artifact: Artifact, **update: Any) -> Artifact:
    return Artifact(artifact.manifest.model_copy(update=update), artifact.blobs)
