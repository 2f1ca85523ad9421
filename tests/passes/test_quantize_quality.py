"""What each way to quantize does to the trained built-in model's predictions, on text that it never read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passes.export.export_onnx import ExportOnnx
from passes.quantize.quantize_dynamic import QuantizeDynamic
from passes.quantize.quantize_static import QuantizeStatic
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, Pass, PassContext
from pipeline.models.source import BUILTIN, calibration_text, find_source, source_artifact
from pipeline.runtime.protocol import ExecutionSpec, load_runner
from pipeline.store.writer import OutputWriter

pytestmark = pytest.mark.slow

WINDOW, TOKENS = 512, 5120


class Trained:
    """The built-in model, exported, and how it predicts held-out text."""

    def __init__(self, bench: Any) -> None:
        from tokenizers import Tokenizer

        folder = BUILTIN / "llama2-tiny"
        text = (folder / "held_out.txt").read_text(encoding="utf-8")[: TOKENS * 8]
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        self.bench = bench
        self.tokens = np.array(ids[: TOKENS + 1], np.int64)
        source = source_artifact(find_source("builtin", "llama2-tiny", relative_to=Path.cwd()), bench.store)
        self.exported = self.run(ExportOnnx, source, verify=False)
        self.expected = self.predict(self.exported)

    def run(self, cls: type[Pass], artifact: Artifact, **params: Any) -> Artifact:
        values = cls.Params(**params)
        facets = {"seed": 0, "threads": 1, "calibration_text": calibration_text().read_text(encoding="utf-8")}
        staging = self.bench.new_folder(cls.name)
        context = PassContext(output=OutputWriter(staging), facets={name: facets[name] for name in cls.facets(values)})
        return self.bench.store.publish(staging, cls().run(artifact, values, context).manifest)

    def predict(self, artifact: Artifact) -> np.ndarray:
        """Log-probabilities [TOKENS, V]."""
        runner = load_runner(artifact, ExecutionSpec())
        parts = [np.concatenate(list(runner.score(w[None])), axis=1)[0] for w in self.tokens[:-1].reshape(-1, WINDOW)]
        logits = np.concatenate(parts)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits

    def compare(self, cls: type[Pass], **params: Any) -> tuple[float, float]:
        """(perplexity ratio, KL divergence in nats) of the model so quantized to the exported one."""
        given = self.predict(self.run(cls, self.exported, **params))
        places = np.arange(TOKENS)
        ratio = np.exp((self.expected[places, self.tokens[1:]] - given[places, self.tokens[1:]]).mean())
        divergence = (np.exp(self.expected) * (self.expected - given)).sum(axis=-1).mean()
        return float(ratio), float(divergence)


@pytest.fixture(scope="module")
def trained(bench: Any) -> Trained:
    return Trained(bench)


@pytest.mark.parametrize(
    ("cls", "params", "ratio", "divergence"),
    [
        (QuantizeWeights, {"bits": 8}, 1.002, 0.0005),
        (QuantizeWeights, {}, 1.03, 0.022),
        (QuantizeWeights, {"symmetric": False}, 1.02, 0.020),
        (QuantizeWeights, {"method": "hqq"}, 1.02, 0.016),
        (QuantizeWeights, {"method": "k_quant"}, 1.02, 0.019),
        (QuantizeWeights, {"method": "gptq", "samples": 16}, 1.012, 0.012),
        (QuantizeWeights, {"bits": 8, "embedding": "int8"}, 1.002, 0.001),
        (QuantizeDynamic, {}, 1.01, 0.005),
        (QuantizeDynamic, {"weight_type": "uint8"}, 1.01, 0.005),
        (QuantizeStatic, {"samples": 8}, 1.02, 0.008),
        (QuantizeStatic, {"samples": 8, "method": "percentile"}, 1.02, 0.008),
        (QuantizeStatic, {"samples": 8, "method": "entropy"}, 1.02, 0.012),
    ],
)
def test_predictions_stay_near(trained, cls, params, ratio, divergence):
    found = trained.compare(cls, **params)
    assert found[0] < ratio and 0 < found[1] < divergence


def test_gptq_predicts_better_than_what_reads_no_text(trained):
    divergences = {
        method: trained.compare(QuantizeWeights, method=method, symmetric=False if method == "rtn" else None)[1]
        for method in ("rtn", "gptq")
    }
    assert divergences["gptq"] < 0.8 * divergences["rtn"]
