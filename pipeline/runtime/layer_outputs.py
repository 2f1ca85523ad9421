"""What a runner shows of a model's inside: the values between its layers, for tokens of one sequence.

A runner whose class has `layers(artifact, spec, *, fed)` can do so; what that returns is a `LayerOutputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.runtime.protocol import RUNNERS, ExecutionSpec

if TYPE_CHECKING:
    import numpy as np

EMBEDDING, HEAD = "embedding", "head"

Part = Literal["output", "attention", "mlp"]
"""What leaves a layer (the residual stream after it), and what its two halves add to that."""


@dataclass(frozen=True)
class Place:
    """Where a value stands in a model: `embedding`, `layer 0`, `layer 1` …, or `head`, whose output are the logits."""

    layer: str
    part: Part = "output"

    @staticmethod
    def in_layer(index: int, part: Part = "output") -> Place:
        return Place(f"layer {index}", part)

    @property
    def is_layer(self) -> bool:
        return self.layer not in (EMBEDDING, HEAD)


Take = Callable[[Place, "np.ndarray"], None]
"""Is given a place and its values, float32 [S, width]. What attention and the feed-forward part add come before what
leaves their layer."""

Stream = Callable[[Place], "np.ndarray"]
"""Gives the values [S, width] that are to take the place of those which left the embedding, or a layer."""


class LayerOutputs(Protocol):
    """A loaded model that shows what lies between its layers."""

    def run(self, tokens: np.ndarray, take: Take, stream: Stream | None = None) -> None:
        """One pass over a sequence [S] from an empty cache; `take` is called in the order of the model.

        A model that was opened to be fed takes `stream`: every layer, and the head, is given those values and not
        what came out of the layer before, so that each shows what it does by itself.
        """


def open_layers(artifact: Artifact, spec: ExecutionSpec, *, fed: bool = False) -> LayerOutputs:
    """Load the artifact so that it shows its layers; `fed` is for a model whose `run` is given a stream.

    Raises: PipelineError where its runner cannot, or no layers are found in it.
    """
    for point in entry_points(group=RUNNERS):
        if point.name == artifact.format and (open_ := getattr(point.load(), "layers", None)) is not None:
            opened: LayerOutputs = open_(artifact, spec, fed=fed)
            return opened
    raise PipelineError(f"the runner of format {artifact.format!r} does not show the layers of a model")
