"""Whether a pass's model predicts what the model before it predicts: scored as a run scores its stages."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from pipeline.artifact import Artifact
from pipeline.measure.nurseries import Nurseries
from pipeline.measure.process import StageToMeasure, StartWorker
from pipeline.measure.quality import QualityFigures, QualityWorkload, measure_quality
from pipeline.runtime import ExecutionSpec

BEFORE, AFTER = "before", "after"
SEED = 0

ROUNDING = 0.01
"""Largest difference of a logit that counts as the same computation. What is kept of the model before is rounded to
float16, so that differences below 0.004 are not seen; a wrong graph differs by about 1."""


class Agreement(NamedTuple):
    """What scoring found, or why there is nothing."""

    figures: QualityFigures | None
    failure: str = ""
    loads: bool = True
    """The model after the pass loads."""


def score(
    before: Artifact, after: Artifact, *, device: str, threads: int, logs: Path, start_worker: StartWorker | None = None
) -> Agreement:
    """Score seeded tokens with both models, and write some text through prompts and single tokens.

    Raises: PipelineError where the model before does not say how large its vocabulary is.
    """
    spec = ExecutionSpec(device=device, threads=threads)
    limits = [a.interface.max_length for a in (before, after)]
    window = min([32, *(length for length in limits if length)])
    with Nurseries() if start_worker is None else nullcontext(start_worker) as start:
        measured = measure_quality(
            [StageToMeasure(BEFORE, before, spec), StageToMeasure(AFTER, after, spec)],
            baseline=BEFORE,
            text="",
            logs=logs,
            workload=QualityWorkload(window=window, stride=window // 2, tokens=3 * window),
            random_weights=SEED,
            start_worker=start,
        )
    quality = measured.stages.get(AFTER)
    if quality is None:
        return Agreement(None, measured.failures.get(AFTER, ""), AFTER not in measured.unloadable)
    return Agreement(quality.vs_baseline)
