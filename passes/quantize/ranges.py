"""Ranges of activations on the calibration text, by ONNX Runtime's own histograms where they are not just the extremes.

The text is read once for the extremes and, for histograms, once more: a histogram that knows the extremes beforehand
keeps its number of bins, and so its memory and the time to search it, whatever outliers come.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from passes.quantize.calibration import observe
from pipeline import Artifact, PassContext, PipelineError

if TYPE_CHECKING:
    import numpy as np

Method = Literal["minmax", "entropy", "percentile"]

QUANTIZED_BINS = 256
"""Levels that `entropy` compares a histogram with: those of 8 bits."""

BINS = {"percentile": 2048, "entropy": 512}


def activation_ranges(
    artifact: Artifact,
    names: Sequence[str],
    tokens: np.ndarray,
    *,
    context: PassContext,
    method: Method,
    bins: int | None,
    percentile: float,
) -> dict[str, tuple[float, float]]:
    """(low, high) of each value of the graph, over prompts and single tokens after a cache.

    Raises: PipelineError where a value is not finite, or the graph cannot be run on tokens.
    """
    extremes = _extremes(artifact, names, tokens, context)
    if method == "minmax":
        return extremes
    return _from_histograms(
        artifact, extremes, tokens, context, method=method, bins=bins or BINS[method], percentile=percentile
    )


def _extremes(
    artifact: Artifact, names: Sequence[str], tokens: np.ndarray, context: PassContext
) -> dict[str, tuple[float, float]]:
    import numpy as np

    found: dict[str, tuple[float, float]] = {}
    for values in observe(artifact, names, tokens, threads=context.threads, decode=True):
        for name, value in values.items():
            low, high = float(value.min()), float(value.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise PipelineError(f"the activation {name!r} is not finite on the calibration text")
            before = found.get(name, (low, high))
            found[name] = min(low, before[0]), max(high, before[1])
    return found


def _from_histograms(
    artifact: Artifact,
    extremes: dict[str, tuple[float, float]],
    tokens: np.ndarray,
    context: PassContext,
    *,
    method: Method,
    bins: int,
    percentile: float,
) -> dict[str, tuple[float, float]]:
    import numpy as np
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(method, False, bins, QUANTIZED_BINS, percentile, "same")
    for name, (low, high) in extremes.items():
        top = max(-low, high) or 1.0
        counts, edges = np.histogram(np.empty(0, np.float32), bins, range=(-top, top))
        collector.histogram_dict[name] = (
            counts,
            edges.astype(np.float32),
            np.float32(low),
            np.float32(high),
            np.array(top, np.float32),
        )
    for values in observe(artifact, list(extremes), tokens, threads=context.threads, decode=True):
        collector.collect_value(values)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it is about to do
        found = collector.compute_collection_result()
    return {name: (float(limits[0]), float(limits[1])) for name, limits in found.items()}
