"""A report with one stage of every kind, from values alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from pipeline.report.schema import Report

if "every_case" not in sys.modules:  # importable by the test modules beside it
    spec = importlib.util.spec_from_file_location("every_case", Path(__file__).with_name("every_case.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["every_case"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["every_case"])

DIGEST = "0123456789abcdef" * 4


def interval(median: float) -> dict:
    return {"median": median, "low": median * 0.98, "high": median * 1.02}


Told = tuple[float, float, float, str]


def speed(kind: str, rate: float, ratio: Told | None, over_parent: Told | None = None) -> dict:
    """The parent is the baseline where nothing else is said."""
    paired, above = (
        dict(zip(("ratio", "low", "high", "verdict"), told, strict=True)) if told else None
        for told in (ratio, over_parent or ratio)
    )
    return {
        "kind": kind,
        "batch": 1,
        "prompt": 128,
        "new_tokens": 64 if kind == "decode" else None,
        "rounds": 12,
        "launches": 3,
        "tokens_per_s": interval(rate),
        "latency_s": interval(1 / rate),
        "vs_baseline": paired,
        "vs_parent": above,
    }


def quality(perplexity: float | None, paired: dict | None) -> dict:
    return {
        "perplexity": perplexity,
        "tokens": 19999,
        "compared_tokens": 4096,
        "sample_prompt": "The list",
        "sample_text": " of [bold]names[/bold]",
        "vs_baseline": paired,
    }


def paired(ratio: float | None, verdict: str) -> dict:
    return {
        "perplexity_ratio": {
            "ratio": ratio,
            "low": ratio and ratio * 0.999,
            "high": ratio and ratio * 1.001,
        },
        "kl_divergence": None if ratio is None else 0.0123,
        "top1_agreement": None if ratio is None else 0.95,
        "max_abs_logit_error": None if ratio is None else 0.5,
        "first_divergence": 7,
        "verdict": verdict,
    }


def stage(name: str, pass_name: str, parent: str | None, status: str = "ran", **more: object) -> dict:
    artifact = {
        "digest": DIGEST,
        "format": "onnx",
        "size_bytes": 12_000_000,
        "weights_bytes": 11_000_000,
        "unique_bytes": 1_000_000,
    }
    return {
        "name": name,
        "pass": pass_name,
        "params": {},
        "parent": parent,
        "status": status,
        "artifact": None if status in {"failed", "skipped"} else artifact,
        "cost": {"wall_s": 1.5, "peak_memory_bytes": 400_000_000, "peak_rss_bytes": 500_000_000},
        **more,
    }


@pytest.fixture
def report() -> Report:
    quantized = {
        "kind": "weights",
        "nodes": [132, 102],
        "operators": {"MatMul": [15, 0]},
        "weights_quantized": [15, 15],
    }
    return Report.model_validate(
        {
            "recipe": "golden",
            "description": "every kind of [stage]",
            "run": "20260101-000000-abcd",
            "created": "2026-01-01T00:00:00+00:00",
            "wall_s": 61.5,
            "lock": {"packages": {"torch": "2.13.0"}, "seed": 0, "digests": {"recipe": DIGEST}},
            "host": {"cpu_model": "Some CPU", "physical_cores": 2},
            "hardware": {"name": "i7-1165g7"},
            "threads": 2,
            "notes": ["i7-1165g7 has 4 cores, this host 2"],
            "baseline": "source",
            "noise_floor": [
                {"kind": "prefill", "batch": 1, "prompt": 128, "ratio_low": 0.991, "ratio_high": 1.009},
                {"kind": "decode", "batch": 1, "prompt": 128, "ratio_low": 0.995, "ratio_high": 1.006},
            ],
            "stages": [
                stage(
                    "source",
                    "source",
                    None,
                    speed=[speed("prefill", 4321.0, None), speed("decode", 98.7, None)],
                    quality=quality(40.123, None),
                    load={"cold_s": 0.5, "warm_s": 0.25},
                    inference_peak_memory_bytes=300_000_000,
                ),
                stage(
                    "export_onnx",
                    "export_onnx",
                    "source",
                    "cached",
                    effect={"kind": "conversion", "nodes": [None, 132]},
                    speed=[
                        speed("prefill", 4000.0, (0.93, 0.92, 0.94, "slower")),
                        speed("decode", 250.0, (2.53, 2.5, 2.56, "faster")),
                    ],
                    quality=quality(40.123, paired(1.0, "equivalent")),
                ),
                stage(
                    "int4",
                    "quantize_weights",
                    "export_onnx",
                    effect=quantized,
                    speed=[
                        speed("prefill", 4330.0, (1.002, 0.997, 1.006, "equivalent")),
                        speed("decode", 101.0, (1.02, 0.97, 1.08, "inconclusive"), (0.40, 0.38, 0.43, "slower")),
                    ],
                    quality=quality(43.0, paired(1.072, "degraded")),
                ),
                stage(
                    "garbage",
                    "quantize_weights",
                    "export_onnx",
                    effect=quantized,
                    speed=[speed("decode", 300.0, (3.0, 2.9, 3.1, "faster"))],
                    quality=quality(None, paired(None, "broken")),
                ),
                stage("same", "same", "int4", effect={"kind": "none", "nodes": [102, 102]}),
                stage("bad", "crash", "int4", "failed", reason="ZeroDivisionError: [1/0]", log="logs/bad.log"),
                stage("after", "mark", "bad", "skipped", reason="bad failed"),
            ],
            "gates": [
                {"gate": "int4.decode_speedup >= 1.5", "result": "failed", "observed": 0.97},
                {"gate": "bad.size_bytes < 1", "result": "not_evaluated", "reason": "it failed"},
            ],
            "pareto": ["source", "export_onnx"],
            "export": "int4",
        }
    )
