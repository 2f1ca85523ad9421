"""Graphs without a key-value cache go through every pass that takes graphs, and are verified there, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from passes.compile.compile_onnxruntime import CompileOnnxRuntime
from passes.export.export_onnx import ExportOnnx
from passes.graph import optimize_onnxruntime
from passes.graph.agreement import CALLS, outputs_of
from passes.graph.onnxoptimizer import OnnxOptimizer
from passes.graph.optimize_onnxruntime import OptimizeOnnxRuntime
from passes.quantize.quantize_dynamic import QuantizeDynamic
from passes.quantize.quantize_static import QuantizeStatic
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, Pass, PipelineError
from pipeline.hardware import describe_host
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner

from .conftest import FACETS, SIZES, Bench, give_words

TOKENS = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)


@pytest.fixture(scope="module")
def checkpoint(bench: Bench) -> Artifact:
    from transformers import LlamaConfig

    folder = bench.checkpoint(LlamaConfig(**SIZES, tie_word_embeddings=False))
    give_words(folder)
    return bench.source(folder)


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def whole(bench: Bench, checkpoint: Artifact, request: pytest.FixtureRequest) -> Artifact:
    return bench.run(ExportOnnx, checkpoint, cache=False, exporter=request.param, verify=False)


def logits(artifact: Artifact) -> np.ndarray:
    """Of all positions, as the runner scores them."""
    return np.concatenate(list(OnnxRuntimeRunner(artifact, ExecutionSpec()).score(TOKENS)), axis=1)


@pytest.fixture
def _host_facets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in describe_host().facets().items():
        monkeypatch.setitem(FACETS, name, value)


@pytest.mark.usefixtures("_host_facets")
@pytest.mark.parametrize(
    ("cls", "params", "tolerance"),
    [
        (OnnxOptimizer, {}, 1e-5),
        (OptimizeOnnxRuntime, {"level": "O1"}, 1e-5),
        (OptimizeOnnxRuntime, {"level": "O2"}, 1e-5),
        (CompileOnnxRuntime, {}, 1e-5),
        (QuantizeDynamic, {}, 0.1),
        (QuantizeStatic, {"samples": 2, "sequence_length": 32}, 0.1),
        (QuantizeWeights, {"bits": 8}, 0.05),
        (QuantizeWeights, {"bits": 8, "method": "gptq", "samples": 2, "sequence_length": 32}, 0.05),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", None) or str(value),
)
def test_a_graph_without_a_cache_goes_through(
    bench: Bench,
    whole: Artifact,
    cls: type[Pass],
    params: dict[str, Any],
    tolerance: float,
) -> None:
    made = bench.run(cls, whole, **params)
    expected = logits(whole)
    assert made.interface.cache is None
    error = np.sqrt(np.mean((logits(made) - expected) ** 2)) / expected.std()
    assert error <= tolerance


def test_the_optimized_graph_is_compared_with_the_one_before(
    bench: Bench, whole: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*given: Any) -> Any:
        seen.append(outputs_of(*given))
        return seen[-1]

    monkeypatch.setattr(optimize_onnxruntime, "outputs_of", watched)
    bench.run(OptimizeOnnxRuntime, whole, level="O1")
    assert len(seen) == 2
    assert [call["logits"].shape for call in seen[0]] == [(1, count, 300) for count in CALLS]


def test_inputs_that_tokens_do_not_give_are_named(bench: Bench, whole: Artifact) -> None:
    interface = whole.interface.model_copy(update={"inputs": {"tokens": "somewhere_else"}})
    with pytest.raises(PipelineError, match="tokens alone do not give the graph's inputs input_ids"):
        outputs_of(bench.session(whole), interface)
