"""A report with all that can go well or wrong in one run, from values alone."""

from __future__ import annotations

from typing import Any

from pipeline.report.schema import Report

HOSTILE = "<script>alert('x')</script><img src=\"http://198.51.100.7/x\"> ![x](http://198.51.100.7/y) | `a` {{ 7 * 7 }}"
LONG = "a_stage_whose_name_is_much_longer_than_anyone_would_want_it_to_be_on_a_phone"
POINTS = (
    ("prefill", 1, 128, None),
    ("decode", 1, 128, 64),
    ("prefill", 4, 512, None),
    ("decode", 4, 512, 64),
    ("decode", 1, 128, 256),  # told from the first decode by its new tokens alone
)


def digest(seed: int) -> str:
    return f"{seed * 2654435761 % 2**64:016x}" * 4


def interval(median: float, spread: float) -> dict[str, float]:
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread)}


def ratio(value: float, spread: float, verdict: str) -> dict[str, Any]:
    said = {"ratio": value, "low": value * (1 - spread), "high": value * (1 + spread), "verdict": verdict}
    return {**said, "rounds_to_decide": 190, "inside_floor": True} if verdict == "inconclusive" else said


def speeds(
    rates: tuple[float, ...],
    base: tuple[float, ...],
    verdicts: str,
    parent: tuple[float, ...] | None,
    over_parent: str | None = None,
) -> list:
    """Speed at every point of POINTS; verdicts by their first letters."""
    words = {"f": "faster", "s": "slower", "e": "equivalent", "i": "inconclusive", "b": None}
    found = []
    for i, (kind, batch, prompt, new_tokens) in enumerate(POINTS):
        word, above = words[verdicts[i]], words[(over_parent or verdicts)[i]]
        spread = {"e": 0.004, "i": 0.09}.get(verdicts[i], 0.03)
        tokens = batch * (prompt if kind == "prefill" else 1)
        found.append(
            {
                "kind": kind,
                "batch": batch,
                "prompt": prompt,
                "new_tokens": new_tokens,
                "rounds": 30,
                "launches": 6,
                "outliers": 2 if verdicts[i] == "i" else 0,
                "tokens_per_s": interval(rates[i], spread),
                "latency_s": interval(tokens / rates[i], spread),
                "vs_baseline": ratio(rates[i] / base[i], spread, word) if word else None,
                "vs_parent": ratio(rates[i] / parent[i], 0.03, above) if above and parent else None,
            }
        )
    return found


def quality(
    perplexity: float | None,
    figures: tuple[float, float, float, float, int | None, str] | None,
    text: str,
    reason: str | None = None,
    divergence: dict | None = None,
) -> dict:
    """Figures: perplexity ratio, KL, agreement, logit error, first divergence, verdict."""
    paired = None
    if figures is not None:
        r, kl, same, error, at, verdict = figures
        finite = perplexity is not None
        paired = {
            "perplexity_ratio": {
                "ratio": r if finite else None,
                "low": r * 0.9972 if finite else None,
                "high": r * 1.0031 if finite else None,
            },
            "kl_divergence": kl if finite else None,
            "top1_agreement": same if finite else None,
            "max_abs_logit_error": error if finite else None,
            "first_divergence": at,
            "verdict": verdict,
            "reason": reason,
        }
    return {
        "divergence": divergence,
        "perplexity": perplexity,
        "tokens": 19999,
        "compared_tokens": 4096,
        "sample_prompt": "The list of names\n*****************\n\nA list",
        "sample_text": text,
        "vs_baseline": paired,
    }


def stage(name: str, pass_: str, parent: str | None, size: int | None, **more: Any) -> dict:
    number = sum(map(ord, name))
    artifact = None
    if size is not None:
        artifact = {
            "digest": digest(number),
            "format": "torch" if parent is None else "onnx",
            "size_bytes": size,
            "weights_bytes": size - 412_000,
            "unique_bytes": size // 3,
        }
    cost = {"wall_s": 0.31 + number % 97 / 7, "peak_memory_bytes": size and size * 2 + 61_000_000}
    return {
        "name": name,
        "pass": pass_,
        "params": {},
        "parent": parent,
        "status": "ran",
        "artifact": artifact,
        "cost": cost if size is not None else {},
        "log": f"logs/{name}.log",
        **more,
    }


def measured(size: int, warm: float, estimate: float = 1.13, *, fits: bool | None = True) -> dict[str, Any]:
    """Load, memory and its estimate."""
    running = size + 83_400_000
    return {
        "load": {"cold_s": warm * 3.7, "warm_s": warm, "saved_s": 0.21 - warm},
        "inference_peak_memory_bytes": running,
        "predicted_memory": {
            "conversion_bytes": int(size * 2.2 + 75_000_000),
            "inference_bytes": int(running * estimate),
            "weights_bytes": size,
            "kv_cache_bytes": 11_000_000,
            "activations_bytes": 17_000_000,
            "runtime_bytes": 70_000_000,
            "fits": fits,
        },
    }


TEXT = " of [bold]names[/bold] is a sequence of objects, each of which is a name.\n\nThe names are in order"
BASE = (4321.0, 98.7, 9120.0, 312.0, 97.1)
EXPORTED = (4590.0, 187.0, 9344.0, 318.0, 185.3)
FUSED = (5230.0, 214.0, 10330.0, 655.0, 211.7)
INT8 = (9800.0, 402.0, 15210.0, 1177.0, 395.0)
INT4 = (6210.0, 521.0, 11070.0, 1240.0, 511.0)
SLOW = (61.0, 1.9, 63.0, 7.3, 1.9)


def layers(errors: tuple[float | None, ...], first: str, most: str) -> dict[str, Any]:
    """Errors of the embedding, of the layers and of the head."""
    names = ["embedding", *(f"layer {i}" for i in range(len(errors) - 2)), "head"]
    found = [
        {"layer": name, "relative_error": error, "added": None if name == "head" else error}
        for name, error in zip(names, errors, strict=True)
    ]
    matched = [len(errors) - 2, len(errors) - 2]
    return {"reference": "fused", "tokens": 512, "matched": matched, "layers": found, "first": first, "most": most}


def roofline(share: float, size: int, flag: str | None = None) -> dict[str, Any]:
    return {
        "bytes_per_token": size,
        "flops_per_token": 2_207_000_000,
        "prefill_flops_per_token": 2_190_000_000,
        "bandwidth_gb_per_s": 71.3,
        "gflops": 188.3,
        "compute_dtype": "float32",
        "mbu": share,
        "mfu": share / 2,
        "flag": flag,
        "target": {
            "decode_tokens_per_s_limit": 68.3e9 / size,
            "prefill_tokens_per_s_limit": 274.7,
            "bound_by": "memory",
            "fits": True,
        },
    }


def ablation() -> dict[str, Any]:
    """One pass that helps, one that does nothing, one that cannot be dropped."""
    at = {"kind": "decode", "batch": 1, "prompt": 128, "new_tokens": 64}
    longer = {**at, "new_tokens": 256}
    helps = {
        "stage": "fused",
        "variant": "int8_without_fused",
        "perplexity_ratio": 1.0002,
        "size_bytes_change": -41_000,
    }
    nothing = {"stage": "cleanup", "variant": "int8_without_cleanup", "kl_divergence_change": -0.00001}
    return {
        "stage": "int8",
        "contributions": [
            {
                **helps,
                "speed": [
                    {**at, "ratio": ratio(1.31, 0.03, "faster")},
                    {**longer, "ratio": ratio(1.28, 0.03, "faster")},
                ],
            },
            {**nothing, "speed": [{**at, "ratio": ratio(1.003, 0.004, "inconclusive")}]},
            {"stage": "export_onnx", "variant": None, "reason": f"fuse_attention takes onnx {HOSTILE}"},
        ],
    }


def region() -> dict[str, Any]:
    """One layer whose attention became one node."""
    return {
        "where": "layer 0",
        "alike": 22,
        "left_out": 3,
        "before": [
            {"id": 1, "operator": "MatMul", "detail": "q_proj [2048, 2048]"},
            {"id": 2, "operator": "RotaryEmbedding", "change": "gone", "inputs": [1]},
            {"id": 3, "operator": HOSTILE, "change": "gone", "inputs": [2]},
            {"id": 4, "operator": "MatMul", "detail": "o_proj [2048, 2048]", "inputs": [3]},
        ],
        "after": [
            {"id": 1, "operator": "MatMul", "detail": "q_proj [2048, 2048]"},
            {"id": 5, "operator": "GroupQueryAttention", "change": "new", "inputs": [1]},
            {"id": 4, "operator": "MatMul", "detail": "o_proj [2048, 2048]", "change": "rewired", "inputs": [5]},
        ],
    }


REASON = "perplexity 1.072 times the baseline's: beyond 1.01"
FLAG = "kernel not engaged: decode uses 1.9 % of the bandwidth, its siblings 39 to 76 %; 154 MatMulNBits at level 0"


def rich_report(*, random_weights: bool = False) -> Report:
    """Thirteen stages: two branches, five workload points, failures, garbage, hostile words and long names."""
    operators = {
        "MatMul": [155, 1],
        "com.microsoft.MatMulNBits": [0, 154],
        "Cast": [312, 4],
        "Transpose": [176, 22],
        **{f"Operator{i}": [40 - i, 2 * i] for i in range(12)},
    }
    stages = [
        stage(
            "source",
            "source",
            None,
            4_400_000_000,
            params={"model": "path: /models/llama", "dtype": "bfloat16"},
            speed=speeds(BASE, BASE, "bbbbb", None),
            quality=quality(40.123, None, TEXT),
            roofline=roofline(0.61, 4_400_000_000),
            **measured(4_400_000_000, 1.92),
        ),
        stage(
            "export_onnx",
            "export_onnx",
            "source",
            4_402_500_000,
            status="cached",
            params={"opset": 23, "verify": True, "tolerance": 0.005},
            effect={"kind": "conversion", "nodes": [None, 1893], "casts": [0, 312], "parameters": [1_100_048_384] * 2},
            speed=speeds(EXPORTED, BASE, "ffiif", BASE),
            roofline=roofline(0.764, 4_400_000_000),
            break_even={"cost_s": 61.3, "tokens": 12400, "low": 11800, "high": 13100, "kind": "decode"},
            quality=quality(40.1234, (1.0, 0.000011, 0.9991, 0.0121, None, "equivalent"), TEXT),
            **measured(4_402_500_000, 1.31, 0.94),
        ),
        stage(
            "cleanup",
            "onnxoptimizer",
            "export_onnx",
            4_402_500_000,
            effect={
                "kind": "none",
                "nodes": [1893, 1893],
                "rules": {"eliminate_identity": [2, 1893]},
                "contradiction": "its pass tells of 2 by eliminate_identity, and nothing changed",
            },
            speed=speeds((4610.0, 189.24, 9330.0, 319.0, 205.0), BASE, "ffiif", EXPORTED, "eiief"),
            quality=quality(40.1234, (1.0, 0.0, 1.0, 0.0, None, "identical"), TEXT),
            **measured(4_402_500_000, 1.3, 0.94),
        ),
        stage(
            "fused",
            "fuse_attention",
            "cleanup",
            4_402_100_000,
            effect={
                "kind": "graph",
                "nodes": [1893, 871],
                "operators": {"Attention": [22, 0], "com.microsoft.GroupQueryAttention": [0, 22], "Concat": [88, 0]},
                "rules": {"attention": [22, 22], "skip_norm": [43, 45]},
                "casts": [312, 4],
                "region": region(),
            },
            speed=speeds(FUSED, BASE, "fffff", EXPORTED),
            device_peak_memory_bytes=4_500_000_000,
            roofline=roofline(0.39, 4_400_000_000),
            break_even={"cost_s": 71.0, "tokens": 9000, "low": 8100, "high": None, "kind": "decode"},
            quality=quality(40.1229, (0.99999, 0.000013, 0.9989, 0.0133, 48, "equivalent"), TEXT[:80] + "."),
            **measured(4_402_100_000, 1.29),
        ),
        stage(
            "int8",
            "quantize_weights",
            "fused",
            1_312_000_000,
            params={"bits": 8, "block_size": 32, "exclude": ["lm_head"]},
            effect={
                "kind": "weights",
                "nodes": [871, 715],
                "operators": operators,
                "weights_quantized": [154, 155],
                "data_types": {"float32": [201, 47], "uint8": [0, 154]},
            },
            speed=speeds(INT8, BASE, "fffff", FUSED),
            roofline=roofline(0.55, 1_312_000_000),
            quality=quality(40.19, (1.0017, 0.00042, 0.9871, 0.212, 31, "equivalent"), TEXT[:52] + " and some more"),
            **measured(1_312_000_000, 0.61),
        ),
        stage(
            "int4",
            "quantize_weights",
            "fused",
            748_000_000,
            params={"bits": 4, "block_size": 128, "exclude": [HOSTILE]},
            effect={"kind": "weights", "nodes": [871, 715], "operators": operators, "weights_quantized": [155, 155]},
            speed=speeds(INT4, BASE, "fffff", FUSED),
            roofline=roofline(0.57, 748_000_000),
            quality=quality(
                43.01,
                (1.072, 0.0312, 0.9123, 1.972, 7, "degraded"),
                TEXT[:20] + HOSTILE,
                "KL 0.031 nats: beyond 0.01" if random_weights else REASON,
                layers((0.0, 0.021, 0.034, 0.171, 0.18, 0.12), "layer 0", "layer 2"),
            ),
            **measured(748_000_000, 0.44),
        ),
        stage(
            "garbage",
            "quantize_weights",
            "fused",
            748_000_000,
            params={"bits": 2},
            effect={"kind": "weights", "nodes": [871, 715], "weights_quantized": [155, 155]},
            speed=speeds((6350.0, 544.0, 11500.0, 1300.0, 540.0), BASE, "fffff", FUSED),
            quality=quality(
                None,
                (1.0, 0.0, 0.0, 0.0, 0, "broken"),
                "�" * 40,
                None,
                layers((0.0, None, None, None, None, None), "layer 0", "layer 0"),
            ),
            **measured(748_000_000, 0.43),
        ),
        stage(
            "collapsed",
            "prune",
            "int8",
            655_000_000,
            effect={"kind": "weights", "weights_changed": [154, 201]},
            speed=speeds((9911.0, 409.0, 15300.0, 1190.0, 401.0), BASE, "fffff", INT8),
            quality=quality(211.7, (5.2763, 1.91, 0.213, 19.4, 0, "broken"), " the the the the"),
            **measured(655_000_000, 0.39, 1.4, fits=False),
        ),
        stage(
            LONG,
            "compile_torch",
            "source",
            4_400_000_000,
            effect={"kind": "execution", "nodes": [None, None], "modules": {"Linear": [155, 0], "Compiled": [0, 1]}},
            speed=speeds((4300.0, 99.4, 9150.0, 309.0, 97.3), BASE, "eiiei", BASE),
            quality=quality(40.123, (1.0, 0.0, 1.0, 0.0, None, "identical"), TEXT),
            **measured(4_400_000_000, 17.4, 0.8, fits=None),
        ),
        stage(
            "int8_slow",
            "quantize_weights",
            "fused",
            1_312_000_000,
            params={"bits": 8, "accuracy_level": 0},
            effect={
                "kind": "weights",
                "nodes": [871, 715],
                "weights_quantized": [154, 155],
                "slow_nodes": [{"operator": "MatMulNBits", "count": 154, "reason": "8 bits at accuracy_level 0"}],
            },
            speed=speeds(SLOW, BASE, "sssss", FUSED),
            quality=quality(40.19, (1.0017, 0.00042, 0.9871, 0.212, 31, "equivalent"), TEXT[:52] + " and some more"),
            roofline=roofline(0.019, 1_312_000_000, FLAG),
            **measured(1_312_000_000, 0.61),
        ),
        stage("never_timed", "mark", "source", 4_400_100_000, status="unmeasured", reason=HOSTILE),
        stage("bad", "crash", "int4", None, status="failed", reason=f"ZeroDivisionError: [1/0] {HOSTILE}"),
        stage("after", "mark", "bad", None, status="skipped", reason="bad failed"),
    ]
    floors = [(0.991, 1.009), (0.9842, 1.0133), (0.981, 1.012), (0.963, 1.027), (0.985, 1.012)]
    return Report.model_validate(
        {
            "recipe": "golden",
            "description": f"every kind of [stage] {HOSTILE}",
            "model": {"source": "path: /models/llama", "random_weights": random_weights},
            "cell": {"index": 1, "of": 3, "overrides": {"evaluate.workload.batch_sizes": [1, 4]}},
            "run": "20260101-000000-abcd",
            "created": "2026-01-01T00:00:00+00:00",
            "wall_s": 611.5,
            "lock": {
                "packages": {"torch": "2.13.0", "onnxruntime": "1.31.1"},
                "seed": 17,
                "digests": {"recipe": digest(3), "evaluation_text": digest(5), "int4": digest(7)},
            },
            "host": {
                "cpu_model": "Some CPU @ 3.1 GHz",
                "physical_cores": 2,
                "logical_cores": 4,
                "memory_bytes": 25_769_803_776,
                "distribution": "Some Linux 12",
                "architecture": "x86_64",
                "python": "3.11.7",
                "load_average": [0.31, 0.2, 0.1],
                "probe": {"bandwidth_gb_per_s": {"value": 71.3}, "gemm_gflops": {"float32": {"value": 188.3}}},
            },
            "hardware": {
                "name": "i7-1165g7",
                "model": "Intel Core i7-1165G7",
                "device": "cpu",
                "physical_cores": 4,
                "memory_bytes": 17_179_869_184,
                "bandwidth_gb_per_s": 68.3,
                "peak_gflops": {"float32": 601.6, "bfloat16": None, "int8": 2406.4},
            },
            "threads": 2,
            "notes": ["i7-1165g7 has 4 cores, this host 2", HOSTILE],
            "baseline": "source",
            "schedule": {
                "budget_s": 600.0,
                "margin": 0.01,
                "looks": [12, 30, 80, 200],
                "looks_taken": 2,
                "rounds": 30,
                "launches": 6,
                "ended": "decided",
            },
            "ablation": ablation(),
            "noise_floor": [
                {
                    "kind": kind,
                    "batch": batch,
                    "prompt": prompt,
                    "new_tokens": new,
                    "ratio_low": low,
                    "ratio_high": high,
                }
                for (kind, batch, prompt, new), (low, high) in zip(POINTS, floors, strict=True)
            ],
            "stages": stages,
            "gates": [
                {"gate": "int4.decode_speedup >= 1.5", "result": "passed", "observed": 3.85},
                {"gate": "int4.perplexity_ratio <= 1.05", "result": "failed", "observed": 1.0753},
                {"gate": "bad.size_bytes < 1", "result": "not_evaluated", "reason": f"it failed {HOSTILE}"},
            ],
            "pareto": ["int8", "int4"],
            "export": "int8",
        }
    )


def forward_report() -> Report:
    """Three passes over a graph without a cache, of which two match nothing: random weights, whole passes alone."""
    base = rich_report(random_weights=True)

    def at(time_s: float, against: tuple[float, float, str] | None, more: dict | None = None) -> list:
        compared = ratio(*against) if against else None
        point = {"kind": "forward", "batch": 2, "prompt": 1024, "rounds": 100, "launches": 5, "outliers": 3}
        rates = {"tokens_per_s": interval(2048 / time_s, 0.012), "latency_s": interval(time_s, 0.012)}
        return [{**point, **rates, "vs_baseline": {**compared, **(more or {})} if compared else None}]

    nothing = {"kind": "none", "nodes": [155, 155]}
    same = (1.0, 0.0, 1.0, 0.0, None, "identical")
    stages = [
        stage("source", "source", None, 120_000_000, speed=at(0.0512, (0.887, 0.02, "slower")),
              quality=quality(32011.0, (1.0, 0.0, 0.9999, 0.0001, None, "equivalent"), "")),
        stage("export_onnx", "export_onnx", "source", 120_000_000, effect={"kind": "conversion", "nodes": [None, 155]},
              speed=at(0.0454, None), quality=quality(32011.0, None, "")),
        stage("fuse_transpose_into_gemm", "onnxoptimizer", "export_onnx", 120_000_000, effect=nothing,
              speed=at(0.0449, (1.012, 0.006, "inconclusive"), {"inside_floor": True}),
              quality=quality(32011.0, same, "")),
        stage("fuse_matmul_add_bias_into_gemm", "onnxoptimizer", "export_onnx", 120_000_000, effect=nothing,
              speed=at(0.0375, (1.21, 0.01, "faster")), quality=quality(32011.0, same, "")),
        stage("eliminate_identity", "onnxoptimizer", "export_onnx", 120_000_000,
              effect={"kind": "graph", "nodes": [155, 149], "rules": {"eliminate_identity": [6, 6]}},
              speed=at(0.0455, (0.998, 0.003, "equivalent")), quality=quality(32011.0, same, "")),
    ]  # fmt: skip
    data = base.model_dump(by_alias=True) | {
        "baseline": "export_onnx",
        "stages": stages,
        "noise_floor": [{"kind": "forward", "batch": 2, "prompt": 1024, "ratio_low": 0.988, "ratio_high": 1.016}],
        "schedule": {"budget_s": 90.0, "margin": 0.01, "looks": [100], "looks_taken": 0, "rounds": 61, "launches": 5,
                     "ended": "budget"},
        "ablation": None,
        "gates": [],
        "pareto": ["export_onnx", "eliminate_identity"],
        "export": "eliminate_identity",
        "cell": None,
    }  # fmt: skip
    return Report.model_validate(data)
