"""Where quality fell: a stage's values against a better one's, layer by layer, on the same held-out tokens.

One process at a time: the reference leaves its values in a temporary folder, and the stage is compared with them as it
runs, so that no two models are ever in memory together.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import PipelineError, StageError
from pipeline.measure.process import StageToMeasure, StartWorker, Worker, WorkerProcess
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.component_alone import component_alone
from pipeline.runtime.layer_outputs import EMBEDDING, HEAD, LayerOutputs, Place, open_layers
from pipeline.runtime.phases import phases_of

if TYPE_CHECKING:
    import numpy as np

LAYERS_VERSION = 3
"""Enters the key of cached results: raised when the same two artifacts would compare otherwise."""

PASSAGE_TOKENS = 64
PASSAGES = 4
"""Sequences that are compared, each from an empty cache, and the tokens of one."""

KEPT_BYTES = 256 * 2**20
"""Disk that the reference's values may take; a large model keeps fewer passages."""

LOGITS = 4096
"""Logits of a position that are compared, evenly spread over the vocabulary."""

FLOOR = 0.02
"""Relative error that rounding alone does not explain: computing a layer in bfloat16, which keeps 8 bits, left up to
1.8 % in small random models."""

JUMP = 3.0
"""Times the largest error before it: where an error begins, and does not merely grow from layer to layer."""


class LayerDifference(Frozen):
    """How far one place of the model is from the reference's; None where that is not finite, or was not seen.

    A relative error is the norm of the difference over the norm of the reference's value, by token, as the mean over
    tokens: a single token with huge values, as many models make of the first, does not hide the others.
    """

    layer: str
    relative_error: float | None
    added: float | None = Field(
        default=None, description="relative error where the layer is given what the reference's was: its own"
    )
    attention: float | None = Field(default=None, description="relative error of what attention adds to the stream")
    mlp: float | None = Field(default=None, description="relative error of what the feed-forward part adds")


class LayerDivergence(Frozen):
    """A stage against its reference, in the order of the model."""

    reference: str
    component: str | None = Field(None, description="which of the stage's it is; None: it has one")
    reference_component: str | None = Field(
        None, description="the reference's that it is compared with; None: the only"
    )
    tokens: int
    matched: tuple[int, int] = Field(description="layers that could be compared, of the reference's")
    layers: tuple[LayerDifference, ...]
    first: str | None = Field(description="where the error begins; None where none exceeds FLOOR")
    most: str | None = Field(description="the layer that added most to the difference; None where there is none")


class LayersWork(Frozen):
    """What a worker is asked to do."""

    tokens: str = Field(description="path of a .npy file: int64 token ids [passages, length]")
    folder: str = Field(description="where the reference's values are")
    is_reference: bool


@dataclass(frozen=True)
class LayersMeasurement:
    """Divergence by stage, and why that of others is not known."""

    stages: dict[str, LayerDivergence]
    reasons: dict[str, str]


def measure_layers(
    pairs: Sequence[tuple[StageToMeasure, StageToMeasure]],
    *,
    ids: Sequence[int],
    logs: Path,
    on_progress: Callable[[str], None] = lambda message: None,
    start_worker: StartWorker = Worker,
) -> LayersMeasurement:
    """Compare stages with their references, given as (stage, reference), on the tokens `ids`.

    Passages are as long as both of a pair take, whatever others take, so that what is found of it depends on the two
    alone. Every reference runs once for all stages that have it and the same passages. Of a stage with several
    components each is compared by itself, and the one whose logits are farthest away is told. A stage that cannot be
    compared has a reason.
    """
    import numpy as np

    found: dict[str, list[LayerDivergence]] = {}
    reasons: dict[str, str] = {}
    references: dict[tuple[str, str | None, int], tuple[StageToMeasure, list[_Compared]]] = {}
    for stage, reference in pairs:
        length = min(passage_length([stage.artifact, reference.artifact]), len(ids))
        try:
            compared = _components_of(stage, reference, length)
        except PipelineError as error:
            reasons[stage.name] = str(error)
            continue
        for one in compared:
            key = reference.name, one.reference_component, length
            references.setdefault(key, (one.reference, []))[1].append(one)

    def ask(stage: StageToMeasure, work: LayersWork) -> dict[str, Any]:
        on_progress(f"layers of {stage.name}")
        worker: WorkerProcess = start_worker(stage.name, stage.spec, logs / f"{stage.name}.log")
        try:
            worker.prepare(stage.artifact)
            return worker.ask("layers", **describe(stage), work=work.model_dump(mode="json"))
        finally:
            worker.close()

    for (name, _, length), (reference, own) in references.items():
        passages = min(PASSAGES, len(ids) // length)
        with tempfile.TemporaryDirectory(prefix="layers-") as folder:
            tokens = Path(folder) / "tokens.npy"
            np.save(tokens, np.array(ids[: passages * length], np.int64).reshape(passages, length))
            work = LayersWork(tokens=str(tokens), folder=folder, is_reference=True)
            try:
                ask(reference, work)
            except StageError as error:
                reasons |= {one.stage.name: f"the layers of its reference are not known: {error}" for one in own}
                continue
            for one in own:
                try:
                    answer = ask(one.stage, work.model_copy(update={"is_reference": False}))
                except StageError as error:
                    reasons[one.stage.name] = str(error)
                    continue
                which = {"component": one.component, "reference_component": one.reference_component}
                divergence = LayerDivergence.model_validate({"reference": name, **which, **answer})
                found.setdefault(one.stage.name, []).append(divergence)
    return LayersMeasurement(
        stages={name: max(several, key=_distance) for name, several in found.items()},
        reasons={name: reason for name, reason in reasons.items() if name not in found},
    )


@dataclass(frozen=True)
class _Compared:
    """A component of a stage against one of its reference, each as an artifact of its own; None: it has one alone."""

    stage: StageToMeasure
    component: str | None
    reference: StageToMeasure
    reference_component: str | None


def _components_of(stage: StageToMeasure, reference: StageToMeasure, length: int) -> list[_Compared]:
    """What is compared: each component of the stage with the reference's of that name, else with its for a prompt.

    Raises: PipelineError where the reference has several components and none of them is known to run a prompt.
    """
    ours, theirs = (list(one.artifact.manifest.components) for one in (stage, reference))
    found = []
    for name in ours:
        own = name if len(ours) > 1 else None
        other = None
        if len(theirs) > 1:
            phases = phases_of(reference.artifact)
            if name not in theirs and phases is None:
                raise PipelineError(f"which component of {reference.name} runs a prompt is not known")
            other = name if name in theirs or phases is None else phases.component_for(length)
        found.append(_Compared(_alone(stage, own), own, _alone(reference, other), other))
    return found


def _alone(stage: StageToMeasure, component: str | None) -> StageToMeasure:
    return stage if component is None else replace(stage, artifact=component_alone(stage.artifact, component))


def _distance(found: LayerDivergence) -> float:
    """How far the last place, the logits where they were seen, is from the reference's."""
    return _size(found.layers[-1].relative_error) if found.layers else 0.0


def passage_length(artifacts: Sequence[Artifact]) -> int:
    """Tokens of a passage: PASSAGE_TOKENS, or as many as every model takes."""
    limits = [a.interface.max_length for a in artifacts if a.interface.max_length is not None]
    return min([PASSAGE_TOKENS, *limits])


def describe(stage: StageToMeasure) -> dict[str, Any]:
    """The stage as a worker's request names it."""
    return {
        "manifest": stage.artifact.manifest.model_dump(mode="json"),
        "blobs": str(stage.artifact.blobs.absolute()),
        "spec": stage.spec.model_dump(mode="json"),
    }


def answer_layers(artifact: Artifact, spec: ExecutionSpec, work: LayersWork) -> dict[str, Any]:
    """The worker's part: keep the reference's values, or compare with them; then it is a LayerDivergence's fields.

    Raises: PipelineError where the layers cannot be seen, or none of them is one of the reference's.
    """
    import numpy as np

    tokens = np.load(work.tokens)
    folder = Path(work.folder)
    if work.is_reference:
        return {"tokens": keep_values(open_layers(artifact, spec), tokens, folder)}
    return compare_values(lambda fed: open_layers(artifact, spec, fed=fed), tokens, folder)


INDEX = "index.json"


def keep_values(model: LayerOutputs, tokens: np.ndarray, folder: Path) -> int:
    """Write the values of every place to a file of its own, and an index of them; returns the tokens that were run.

    At least one passage is kept, and as many of the others as KEPT_BYTES allows.
    """
    widths: dict[Place, int] = {}
    size = done = 0

    def keep(place: Place, values: np.ndarray) -> None:
        nonlocal size
        values = _columns(place, values)
        widths[place] = values.shape[1]
        with (folder / _file_name(place)).open("ab") as file:
            size += file.write(values.astype("<f4").tobytes())

    for passage in tokens:
        model.run(passage, keep)
        done += 1
        if size / done * (done + 1) > KEPT_BYTES:
            break
    index = [{"layer": p.layer, "part": p.part, "width": width} for p, width in widths.items()]
    (folder / INDEX).write_text(json.dumps({"passages": done, "places": index}), encoding="utf-8")
    return done * int(tokens.shape[1])


def compare_values(opened: Callable[[bool], LayerOutputs], tokens: np.ndarray, folder: Path) -> dict[str, Any]:
    """A LayerDivergence's fields but for the reference's name: a model against the values that `keep_values` wrote.

    `opened` loads the model, to run as it is or to be fed. It runs twice: as it is, for how far errors have come at
    each layer, and with every layer fed with what the reference's layer was given, for what each does by itself.

    Raises: PipelineError where not one layer is the reference's, too.
    """
    kept, passages = read_values(folder, tokens.shape[1])
    tokens = tokens[:passages]
    errors = _errors(opened(False), tokens, kept)
    theirs = [place for place in kept if place.is_layer and place.part == "output"]
    ours = [place for place in theirs if place in errors]
    if not ours:
        raise PipelineError(f"none of the reference's {len(theirs)} layers is found in it with the same width")
    alone: dict[Place, float | None] = {}
    if len(ours) == len(theirs) and Place(EMBEDDING) in errors:
        alone = _errors(opened(True), tokens, kept, fed=True)
    layers = tuple(
        LayerDifference(
            layer=place.layer,
            relative_error=errors[place],
            added=alone.get(place),
            attention=errors.get(Place(place.layer, "attention")),
            mlp=errors.get(Place(place.layer, "mlp")),
        )
        for place in kept
        if place.part == "output" and place in errors
    )
    return {
        "tokens": tokens.size,
        "matched": (len(ours), len(theirs)),
        "layers": [layer.model_dump() for layer in layers],
        "first": first_layer(layers),
        "most": most_layer(layers),
    }


def read_values(folder: Path, length: int) -> tuple[dict[Place, np.ndarray], int]:
    """(values [tokens, width] of every place, mapped; the number of passages of `length` tokens that they are of)."""
    import numpy as np

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    kept: dict[Place, np.ndarray] = {}
    for entry in index["places"]:
        place = Place(entry["layer"], entry["part"])
        shape = (index["passages"] * length, entry["width"])
        kept[place] = np.memmap(folder / _file_name(place), "<f4", "r", shape=shape)
    return kept, index["passages"]


def _errors(
    model: LayerOutputs, tokens: np.ndarray, kept: Mapping[Place, np.ndarray], *, fed: bool = False
) -> dict[Place, float | None]:
    """Relative error of every place that was seen in all of tokens [passages, length]; None: not finite."""
    import numpy as np

    length = tokens.shape[1]
    sums: dict[Place, float] = {}
    counts: Counter[Place] = Counter()
    begin = 0

    def reference(place: Place) -> np.ndarray:
        return kept[place][begin : begin + length]

    def compare(place: Place, values: np.ndarray) -> None:
        values = _columns(place, values)
        if place not in kept or values.shape != (length, kept[place].shape[1]):
            return
        expected = reference(place).astype(np.float64)
        sums[place] = sums.get(place, 0.0) + float(_by_token(values - expected, expected).sum())
        counts[place] += length

    for passage in tokens:
        model.run(passage, compare, reference if fed else None)
        begin += length
    return {
        place: sums[place] / tokens.size if math.isfinite(sums[place]) else None
        for place in sums
        if counts[place] == tokens.size
    }


def first_layer(layers: Sequence[LayerDifference]) -> str | None:
    """Where the error begins.

    The first place whose error is not finite, or is at least FLOOR and JUMP times the largest before it; where errors
    only grow little by little, the first of at least FLOOR. None where no error is as large.
    """
    largest = 0.0
    for layer in layers:
        error = _size(layer.relative_error)
        if error >= FLOOR and error >= JUMP * largest:
            return layer.layer
        largest = max(largest, error)
    return next((layer.layer for layer in layers if _size(layer.relative_error) >= FLOOR), None)


def most_layer(layers: Sequence[LayerDifference]) -> str | None:
    """The layer that added most to the difference; the first whose values are not finite, where there is one.

    Where it is not known what each does by itself, the one at which the error grew most. None where nothing differs.
    """
    if lost := next((layer.layer for layer in layers if layer.relative_error is None), None):
        return lost
    added = {layer.layer: layer.added for layer in layers}
    if any(value is None for value in added.values()):
        errors = [_size(layer.relative_error) for layer in layers]
        added = {layer.layer: now - then for layer, then, now in zip(layers, [0.0, *errors], errors, strict=False)}
    most = max(added, key=lambda name: _size(added[name]), default=None)
    return most if most is not None and _size(added[most]) > 0 else None


def _size(error: float | None) -> float:
    return math.inf if error is None else error


def _by_token(difference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Norm of the difference over the norm of the reference's, [S]; 0 where both are.

    Where the reference is zero and the other is not, the whole of it is error: 1.
    """
    import numpy as np

    apart, size = np.linalg.norm(difference, axis=1), np.linalg.norm(expected, axis=1)
    ratio: np.ndarray = apart / np.where(size == 0.0, np.where(apart == 0.0, 1.0, apart), size)
    return ratio


def _columns(place: Place, values: np.ndarray) -> np.ndarray:
    """The values that are compared: of the logits, some."""
    import numpy as np

    if place.layer != HEAD or values.shape[1] <= LOGITS:
        return values
    return values[:, np.linspace(0, values.shape[1] - 1, LOGITS).round().astype(int)]


def _file_name(place: Place) -> str:
    return f"{place.layer.replace(' ', '-')}.{place.part}.f32"
