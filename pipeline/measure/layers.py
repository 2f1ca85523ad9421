"""Where quality fell: a stage's values against a better one's, layer by layer, on the same held-out tokens.

One process at a time: the reference leaves its values in a temporary folder, and the stage is compared with them as it
runs, so that no two models are ever in memory together.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import PipelineError, StageError
from pipeline.measure.process import StageToMeasure, StartWorker, Worker, WorkerProcess
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.layer_outputs import HEAD, LayerOutputs, Place, open_layers

if TYPE_CHECKING:
    import numpy as np

LAYERS_VERSION = 1
"""Enters the key of cached results: raised when the same two artifacts would compare otherwise."""

PASSAGE_TOKENS = 64
PASSAGES = 4
"""Sequences that are compared, each from an empty cache, and the tokens of one."""

KEPT_BYTES = 256 * 2**20
"""Disk that the reference's values may take; a large model keeps fewer passages."""

LOGITS = 4096
"""Logits of a position that are compared, evenly spread over the vocabulary."""

FLOOR = 0.01
"""Relative error that rounding alone does not explain: bfloat16 keeps 8 bits, and so errs by up to 0.4 % at a time."""

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
        default=None, description="norm of what the difference gained in this layer, over the norm of the reference's"
    )
    attention: float | None = Field(default=None, description="relative error of what attention adds to the stream")
    mlp: float | None = Field(default=None, description="relative error of what the feed-forward part adds")


class LayerDivergence(Frozen):
    """A stage against its reference, in the order of the model."""

    reference: str
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

    Every reference runs once, whatever number of stages it is that of. A stage that cannot be compared has a reason.

    Raises: PipelineError where there are no tokens for a passage.
    """
    import numpy as np

    found: dict[str, LayerDivergence] = {}
    reasons: dict[str, str] = {}
    references = {reference.name: reference for _, reference in pairs}
    length = passage_length([stage.artifact for pair in pairs for stage in pair])
    passages = min(PASSAGES, len(ids) // length)
    if not passages:
        raise PipelineError(f"comparing layers takes a passage of {length} tokens; the text has {len(ids)}")

    def ask(stage: StageToMeasure, work: LayersWork) -> dict[str, Any]:
        on_progress(f"layers of {stage.name}")
        worker: WorkerProcess = start_worker(stage.name, stage.spec, logs / f"{stage.name}.log")
        try:
            return worker.ask("layers", **describe(stage), work=work.model_dump(mode="json"))
        finally:
            worker.close()

    for name, reference in references.items():
        own = [stage for stage, other in pairs if other.name == name]
        with tempfile.TemporaryDirectory(prefix="layers-") as folder:
            tokens = Path(folder) / "tokens.npy"
            np.save(tokens, np.array(ids[: passages * length], np.int64).reshape(passages, length))
            work = LayersWork(tokens=str(tokens), folder=folder, is_reference=True)
            try:
                ask(reference, work)
            except StageError as error:
                reasons |= {stage.name: f"the layers of its reference are not known: {error}" for stage in own}
                continue
            for stage in own:
                try:
                    answer = ask(stage, work.model_copy(update={"is_reference": False}))
                except StageError as error:
                    reasons[stage.name] = str(error)
                    continue
                found[stage.name] = LayerDivergence.model_validate({"reference": name, **answer})
    return LayersMeasurement(stages=found, reasons=reasons)


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
    model = open_layers(artifact, spec)
    folder = Path(work.folder)
    if work.is_reference:
        return {"tokens": keep_values(model, tokens, folder)}
    return compare_values(model, tokens, folder)


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


def compare_values(model: LayerOutputs, tokens: np.ndarray, folder: Path) -> dict[str, Any]:
    """A LayerDivergence's fields but for the reference's name: the model against the values that `keep_values` wrote.

    Raises: PipelineError where not one layer is the reference's, too.
    """
    import numpy as np

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    passages = index["passages"]
    length = tokens.shape[1]
    kept = {
        Place(entry["layer"], entry["part"]): np.memmap(
            folder / _file_name(Place(entry["layer"], entry["part"])),
            "<f4",
            "r",
            shape=(passages * length, entry["width"]),
        )
        for entry in index["places"]
    }
    errors: dict[Place, _Mean] = {}
    gains: dict[Place, _Mean] = {}
    before: np.ndarray | None = None
    begin = 0

    def compare(place: Place, values: np.ndarray) -> None:
        nonlocal before
        reference = kept.get(place)
        values = _columns(place, values)
        if reference is None or values.shape != (length, reference.shape[1]):
            return
        expected = reference[begin : begin + length].astype(np.float64)
        difference = values - expected  # [S, width]
        errors.setdefault(place, _Mean()).add(_by_token(difference, expected))
        if place.part == "output" and place.layer != HEAD:
            gained = difference if before is None else difference - before
            gains.setdefault(place, _Mean()).add(_by_token(gained, expected))
            before = difference

    for passage in tokens[:passages]:
        before = None
        model.run(passage, compare)
        begin += length
    whole = {place: mean.value for place, mean in errors.items() if mean.count == passages * length}
    theirs = [place for place in kept if place.is_layer and place.part == "output"]
    ours = [place for place in theirs if place in whole]
    if not ours:
        raise PipelineError(f"none of the reference's {len(theirs)} layers is found in it with the same width")
    layers = tuple(
        LayerDifference(
            layer=place.layer,
            relative_error=whole[place],
            added=gains[place].value if place in gains else None,
            attention=whole.get(Place(place.layer, "attention")),
            mlp=whole.get(Place(place.layer, "mlp")),
        )
        for place in kept
        if place.part == "output" and place in whole
    )
    return {
        "tokens": passages * length,
        "matched": (len(ours), len(theirs)),
        "layers": [layer.model_dump() for layer in layers],
        "first": first_layer(layers),
        "most": most_layer(layers),
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

    The head's share cannot be told from what it was given: it counts where its error is at least FLOOR and JUMP times
    the largest before it. None where nothing differs.
    """
    if lost := next((layer.layer for layer in layers if layer.relative_error is None), None):
        return lost
    inner = [layer for layer in layers if layer.layer != HEAD]
    head = next((_size(layer.relative_error) for layer in layers if layer.layer == HEAD), 0.0)
    if head >= max(FLOOR, *(JUMP * _size(layer.relative_error) for layer in inner)):
        return HEAD
    most = max(inner, key=lambda layer: layer.added or 0.0, default=None)
    return most.layer if most is not None and most.added else None


def _size(error: float | None) -> float:
    return math.inf if error is None else error


class _Mean:
    """A mean over tokens; None where one of them is not finite."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        self.count += len(values)
        self._sum += float(values.sum())

    @property
    def value(self) -> float | None:
        return self._sum / self.count if math.isfinite(self._sum) else None


def _by_token(difference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Norm of the difference over the norm of the reference's, [S]; 0 where both are."""
    import numpy as np

    apart, size = np.linalg.norm(difference, axis=1), np.linalg.norm(expected, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = np.where(apart == 0.0, 0.0, apart / size)
    return ratio


def _columns(place: Place, values: np.ndarray) -> np.ndarray:
    """The values that are compared: of the logits, some."""
    import numpy as np

    if place.layer != HEAD or values.shape[1] <= LOGITS:
        return values
    return values[:, np.linspace(0, values.shape[1] - 1, LOGITS).round().astype(int)]


def _file_name(place: Place) -> str:
    return f"{place.layer.replace(' ', '-')}.{place.part}.f32"
