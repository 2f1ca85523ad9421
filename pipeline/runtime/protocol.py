"""What a runner is, for each task, and how one is found."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import PipelineError, did_you_mean
from pipeline.store.folder import read_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

RUNNERS = "pipeline.runners"


class ExecutionSpec(Frozen):
    """How a runner should load an artifact."""

    device: str = "cpu"
    provider: str = Field(default="CPUExecutionProvider", description="ONNX Runtime execution provider")
    threads: int = Field(default=1, ge=1, description="threads inside one operator")
    affinity: tuple[int, ...] | None = Field(
        default=None, description="logical CPUs that the process may use; None leaves it"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the runtime itself")


class CausalLMRunner(Protocol):
    """A loaded causal language model with one key-value cache, or with none: then it knows whole passes only.

    Tokens are int64 arrays; logits are float32 arrays. B is the batch, S the number of tokens, V the vocabulary.
    """

    version: str
    """Enters the key of cached measurements: raised when the same artifact would give other numbers."""

    vocab_size: int
    max_length: int

    has_cache: bool
    """Without one, `prefill` and `decode` raise PipelineError."""

    def forward(self, tokens: ArrayLike) -> np.ndarray:
        """Compute the logits of all positions of [B, S], keep nothing, and return the last position's, [B, V].

        The logits of the other positions stay where they were computed: copying them is no work of the model.
        """

    def prefill(self, tokens: ArrayLike) -> np.ndarray:
        """Empty the cache, process a prompt [B, S], and return the last position's logits [B, V]."""

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Append one token a sequence, [B, 1], and return its logits [B, V]."""

    def score(self, tokens: ArrayLike) -> Iterator[np.ndarray]:
        """Logits of all positions of [B, S] from an empty cache, in order, in chunks [B, C, V]."""

    def reset(self) -> None:
        """Empty the cache."""


class RunnerFactory(Protocol):
    """What the entry-point group `pipeline.runners` names, by the format that it loads."""

    version: str

    def __call__(self, artifact: Artifact, spec: ExecutionSpec) -> CausalLMRunner: ...


@cache
def known_formats() -> frozenset[str]:
    """Formats of artifacts: those that some installed runner loads."""
    return frozenset(point.name for point in entry_points(group=RUNNERS))


def _factory(format: str) -> RunnerFactory:
    points = {point.name: point for point in entry_points(group=RUNNERS)}
    if format not in points:
        raise PipelineError(f"no runner for format {format!r}", hint=did_you_mean(format, points, noun="runners"))
    factory: RunnerFactory = points[format].load()
    return factory


def load_runner(artifact: Artifact, spec: ExecutionSpec) -> CausalLMRunner:
    """Load the artifact with the runner registered for its format.

    Raises: PipelineError where there is none, or the model does not load.
    """
    return _factory(artifact.format)(artifact, spec)


def has_cache(runner: CausalLMRunner) -> bool:
    """Whether the runner knows prompts and single tokens after them; one that does not say so does."""
    return bool(getattr(runner, "has_cache", True))


def runner_version(format: str) -> str:
    """The version of the runner for a format, for the keys of cached measurements."""
    return _factory(format).version


def load_model(folder: str | Path, *, threads: int | None = None, trust_remote_code: bool = False) -> CausalLMRunner:
    """Load an exported model folder, such as `runs/NAME/latest/model`.

    `trust_remote_code` lets Python files that the model brings run.

    Raises: PipelineError where the folder holds no exported model, or one whose code is not trusted.
    """
    from pipeline.hardware.host import describe_host

    spec = ExecutionSpec(threads=threads or describe_host().physical_cores)
    artifact = read_folder(Path(folder))
    if artifact.manifest.execution.get("trust_remote_code") and not trust_remote_code:
        raise PipelineError(
            f"the model in {folder} runs Python files that it brings",
            hint="read its .py files; load_model(FOLDER, trust_remote_code=True) runs them",
        )
    return load_runner(artifact, spec)
