"""Which stage a worse one is compared with, and what of that is remembered; for layers see tests/measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.divergences import find_divergences, references
from pipeline.events import Events
from pipeline.measure.judging import Judgement
from pipeline.measure.layers import LayerDivergence
from pipeline.measure.process import StageToMeasure
from pipeline.runtime import ExecutionSpec
from pipeline.store import Store

PARENTS = {"source": None, "export": "source", "int4": "export", "smaller": "int4"}


def judged(**verdicts: Any) -> dict[str, Judgement]:
    return {name: Judgement(verdict=verdict, reason="") for name, verdict in verdicts.items()}


@pytest.mark.parametrize(
    ("judgements", "expected"),
    [
        (judged(export="identical", int4="equivalent", smaller="equivalent"), {}),
        (judged(export="identical", int4="degraded"), {"int4": "export"}),
        (judged(export="degraded"), {"export": "source"}),
        (judged(export="equivalent", int4="degraded", smaller="broken"), {"int4": "export", "smaller": "source"}),
    ],
)
def test_a_worse_stage_is_compared_with_its_parent_where_that_is_as_good_as_the_baseline(
    judgements: dict[str, Judgement], expected: dict[str, str]
) -> None:
    assert references(judgements, PARENTS, PARENTS, "source") == expected


def test_a_parent_that_was_not_measured_is_no_reference() -> None:
    judgements = judged(export="identical", int4="degraded")
    assert references(judgements, PARENTS, {"source", "int4"}, "source") == {"int4": "source"}


@pytest.mark.slow
def test_a_divergence_is_found_once_and_bears_the_name_of_the_reference_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "runtime"))
    import tiny_models

    worse = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "worse", seed=1))
    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "source"))
    store = Store(tmp_path / "store")
    asked: list[int] = []

    def tokens(limit: int) -> list[int]:
        asked.append(limit)
        return [i * 7 % tiny_models.VOCABULARY for i in range(limit)]

    def find(name: str, *, known_only: bool = False) -> tuple[dict[str, LayerDivergence], list[str]]:
        pair = StageToMeasure("worse", worse, ExecutionSpec()), StageToMeasure(name, source, ExecutionSpec())
        return find_divergences(
            {"worse": pair},
            store=store,
            circumstances={"text": "a"},
            tokens=tokens,
            logs=tmp_path,
            events=Events(),
            known_only=known_only,
        )

    assert find("source", known_only=True) == ({}, [])
    assert asked == []
    first, notes = find("source")
    assert (first["worse"].reference, notes) == ("source", [])
    again, _ = find("copy", known_only=True)
    assert again["worse"] == first["worse"].model_copy(update={"reference": "copy"})
    assert len(asked) == 1
