"""What passes make of a model is counted from their artifacts: as a hand count finds, and as it then runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from passes.compile.compile_onnxruntime import CompileOnnxRuntime
from passes.export.export_onnx import ExportOnnx
from passes.quantize.quantize_dynamic import QuantizeDynamic
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, PassContext
from pipeline.hardware import describe_host
from pipeline.measure.roofline import Ceilings, Subject, Timing, rooflines
from pipeline.measure.work_counts import Extent, Work, count_work, extent_of
from pipeline.measure.workload import Point
from pipeline.store.writer import OutputWriter

TOKEN = Extent(batch=1, length=1, past=20, keep=1)
WHOLE = Extent(batch=2, length=8, past=0, keep=8)

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
}
WEIGHTS = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) + 256 * 1024
"""Numbers in the weights of products: those of two layers, and the head."""

NORMS = 5 * 256 * 4


def counted(artifact: Artifact, extent: Extent) -> Work:
    work = count_work(artifact, extent)
    assert work is not None
    assert not work.uncounted
    return work


@pytest.fixture(scope="module")
def checkpoint(bench: Any) -> Path:
    return bench.checkpoint(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def exported(bench: Any, checkpoint: Path) -> Artifact:
    return bench.run(ExportOnnx, bench.source(checkpoint), verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("extent", [TOKEN, WHOLE], ids=["one token", "whole pass"])
def test_an_exported_graph_has_the_work_of_its_model(
    extent: Extent, bench: Any, checkpoint: Path, exported: Artifact
) -> None:
    before, after = counted(bench.source(checkpoint), extent), counted(exported, extent)
    assert after.flops == before.flops
    assert after.cache_bytes == before.cache_bytes
    assert before.weights_bytes == 4 * WEIGHTS + NORMS
    assert 0 <= after.weights_bytes - before.weights_bytes < 1000  # constants that shapes and angles are made of


@pytest.mark.slow
def test_quantized_weights_are_read_as_they_are_stored(bench: Any, exported: Artifact) -> None:
    small = counted(exported, TOKEN).weights_bytes - 4 * WEIGHTS
    int4 = counted(bench.run(QuantizeWeights, exported, bits=4, symmetric=False, block_size=32), TOKEN)
    codes, scales, zero_points = WEIGHTS // 2, WEIGHTS // 32 * 4, WEIGHTS // 32 // 2
    assert int4.weights_bytes - small == codes + scales + zero_points
    assert int4.compute_dtype == "int8"
    assert int4.total_flops == counted(exported, TOKEN).total_flops
    int8 = counted(bench.run(QuantizeDynamic, exported), TOKEN)
    assert WEIGHTS < int8.weights_bytes < 1.1 * WEIGHTS
    assert int8.total_flops == counted(exported, TOKEN).total_flops


@pytest.mark.slow
def test_a_compiled_graph_reads_its_packed_weights_and_no_plain_ones(bench: Any, exported: Artifact) -> None:
    int4 = bench.run(QuantizeWeights, exported, bits=4)
    staging = bench.new_folder("compile")
    facets = {name: describe_host().facets()[name] for name in CompileOnnxRuntime.depends_on}
    context = PassContext(output=OutputWriter(staging), facets=facets)
    compiled = CompileOnnxRuntime().run(int4, CompileOnnxRuntime.Params(), context)
    compiled = bench.store.publish(staging, compiled.manifest)
    packed = sum(ref.length for name, ref in compiled.component.tensors.items() if ".prepacked_" in name)
    assert packed > WEIGHTS // 2
    assert 0 <= counted(compiled, TOKEN).weights_bytes - packed < NORMS + 1000
    assert counted(compiled, TOKEN).total_flops == counted(int4, TOKEN).total_flops


@pytest.mark.slow
def test_int8_weights_without_a_kernel_are_flagged_and_their_siblings_not(bench: Any, exported: Artifact) -> None:
    """At accuracy_level 0, ONNX Runtime unpacks 8-bit weights at every call; the times are made up."""
    levels = {level: bench.run(QuantizeWeights, exported, bits=8, accuracy_level=level) for level in (0, 4)}
    stages = {"exported": (exported, 1.0), "level0": (levels[0], 7.0), "level4": (levels[4], 0.3)}
    found = rooflines(
        [Subject(name, "onnx", [decoding(artifact, 1e-3 * times)]) for name, (artifact, times) in stages.items()],
        host=Ceilings(20.0, {"float32": 50.0, "int8": 100.0}),
        target=Ceilings(None, {}),
    )
    assert str(found["level0"].flag).startswith("kernel not engaged: decode uses ")
    assert found["level4"].flag is None
    assert found["exported"].flag is None


def decoding(artifact: Artifact, seconds: float) -> Timing:
    """One token, in seconds that are given: what this machine takes is no matter of a test."""
    point = Point(kind="decode", batch=1, prompt=8, new_tokens=10)
    return Timing(point, counted(artifact, extent_of(point)), seconds)
