"""At which layer the quality of the worse stages of a run fell, remembered by the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.events import Events
from pipeline.measure.judging import Judgement
from pipeline.measure.layers import (
    LAYERS_VERSION,
    PASSAGE_TOKENS,
    PASSAGES,
    LayerDivergence,
    measure_layers,
)
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import StageToMeasure
from pipeline.remembered import remembered
from pipeline.runtime import runner_version
from pipeline.store import Store

WORSE = frozenset({"degraded", "broken"})
AS_GOOD = frozenset({"identical", "equivalent"})


def references(
    judgements: Mapping[str, Judgement], parents: Mapping[str, str | None], measured: Iterable[str], baseline: str
) -> dict[str, str]:
    """The stage that each worse one is compared with: its parent where that is as good as the baseline, else that.

    Only what is `measured` is a reference: a parent of which nothing is known says nothing.
    """
    good = ({name for name, found in judgements.items() if found.verdict in AS_GOOD} | {baseline}) & set(measured)
    worse = [name for name, judged in judgements.items() if judged.verdict in WORSE]
    return {name: parent if (parent := parents.get(name)) in good and parent else baseline for name in worse}


def find_divergences(
    pairs: Mapping[str, tuple[StageToMeasure, StageToMeasure]],
    *,
    store: Store,
    circumstances: Mapping[str, Any],
    tokens: Callable[[int], Sequence[int]],
    logs: Path,
    events: Events,
    known_only: bool,
) -> tuple[dict[str, LayerDivergence], list[str]]:
    """(where the quality of each stage fell, notes of why that is not known of others).

    `pairs` names stages with their references. `circumstances` is what a comparison depends on beside the two: the
    text, the host, the device, threads. `tokens` gives the first token ids of the text, so many at most.
    """
    reasons: dict[str, str] = {}

    def measure(names: list[str]) -> Iterator[tuple[str, LayerDivergence]]:
        with Nurseries() as start_worker:
            measured = measure_layers(
                [pairs[name] for name in names],
                ids=tokens(PASSAGES * PASSAGE_TOKENS),
                logs=logs,
                on_progress=lambda message: events.measuring(f"where quality fell, {message}"),
                start_worker=start_worker,
            )
        reasons.update(measured.reasons)
        yield from measured.stages.items()

    found = remembered(
        store,
        LayerDivergence,
        {name: {**_identity(pair), **circumstances} for name, pair in pairs.items()},
        None if known_only else measure,
    )
    # two stages may be one artifact: what is remembered of it bears another's name
    named = {name: found[name].model_copy(update={"reference": pairs[name][1].name}) for name in found}
    return named, [f"at which layer the quality of {name} fell is not known: {why}" for name, why in reasons.items()]


def _identity(pair: tuple[StageToMeasure, StageToMeasure]) -> dict[str, Any]:
    artifacts: list[Artifact] = [stage.artifact for stage in pair]
    return {
        "version": LAYERS_VERSION,
        "layers": [artifact.digest for artifact in artifacts],
        "runners": [runner_version(artifact.format) for artifact in artifacts],
    }
