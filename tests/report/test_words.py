"""The sentences say what the figures say, and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from every_case import HOSTILE, LONG, forward_report, rich_report

from pipeline.report.effects import effect_in_words
from pipeline.report.markdown import render_markdown
from pipeline.report.schema import BreakEven, Divergence, Effect, NoiseFloor, Ratio, Report, StageReport
from pipeline.report.stage_cards import layer_chart
from pipeline.report.words import break_even_in_words, divergence_in_words, earned_back, headline, sentence

RICH = rich_report()
NAMES = [s.name for s in RICH.stages]


def numbers_in(text: str, report: Report) -> list[str]:
    """Numbers as they stand in a text, without those in names and reasons."""
    told = [s.name for s in report.stages] + [s.reason for s in report.stages if s.reason] + [HOSTILE]
    told += [report.model.source] if report.model else []
    told += [r for s in report.stages if (r := s.quality and s.quality.vs_baseline and s.quality.vs_baseline.reason)]
    told += [s.roofline.flag for s in report.stages if s.roofline and s.roofline.flag]
    told += [slow.reason for s in report.stages if s.effect for slow in s.effect.slow_nodes]
    told += [
        layer.layer
        for s in report.stages
        if s.quality and s.quality.divergence
        for layer in s.quality.divergence.layers
    ]
    for word in sorted(told, key=len, reverse=True):
        text = text.replace(word, " ")
    return [n.replace(",", "").replace("−", "-") for n in re.findall(r"[+−]?\d[\d,]*\.?\d*(?:e-?\d+)?", text)]


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)


def tellable(stage: StageReport, report: Report) -> set[float]:
    """What may be told of a stage: its own figures, the baseline's, the noise floor, each in a unit that people use."""
    values = set(leaves([s.model_dump() for s in (stage, report.stage(report.baseline))]))
    values |= {abs(v) for v in values}  # what takes longer saves a negative time
    values |= {v * scale for v in values for scale in (1e-6, 1e-9, 100.0)}
    values |= {(p.ratio - 1) * 100 for s in stage.speed or () for p in (s.vs_baseline, s.vs_parent) if p}
    floors = [max(abs(math.log(f.ratio_low)), abs(math.log(f.ratio_high))) for f in report.noise_floor]
    values |= {100 * math.expm1(f) for f in floors}
    points = list(stage.speed or ())
    values |= {float(n) for n in range(1, len(points) + 1)}  # how many points, and how many of them are faster …
    return values | {0.0}


def is_among(number: str, values: set[float]) -> bool:
    """Whether some value reads like this when rounded to as many digits."""
    told = float(number)
    if "e" in number:
        return any(v and abs(v - told) <= 0.06 * abs(v) for v in values)
    digits = len(number.partition(".")[2])
    significant = float(f"{told:.2g}") == told
    return any(
        abs(v - told) <= 0.5000001 * 10**-digits or (significant and f"{v:.2g}" == f"{told:.2g}" and digits > 2)
        for v in values
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("random", [False, True])
def test_no_sentence_has_a_number_that_is_not_in_the_report(name: str, random: bool) -> None:
    report = rich_report(random_weights=random)
    stage = report.stage(name)
    strange = [n for n in numbers_in(sentence(stage, report), report) if not is_among(n, tellable(stage, report))]
    assert strange == []


def test_a_number_that_is_not_in_the_report_would_be_seen() -> None:
    stage = RICH.stage("int4")
    assert not is_among("6.31", tellable(stage, RICH))
    assert not is_among("12.5", tellable(stage, RICH))
    assert len(numbers_in(sentence(stage, RICH), RICH)) > 20


def test_no_headline_has_a_number_that_is_not_in_the_report() -> None:
    values = {v for s in RICH.stages for v in tellable(s, RICH)} | {float(len(RICH.gates))}
    assert [n for n in numbers_in(" ".join(headline(RICH)), RICH) if not is_among(n, values)] == []


def test_a_stage_tells_what_it_changed_and_how_fast_it_is_against_baseline_and_parent(report: Report) -> None:
    assert sentence(report.stage("export_onnx"), report) == (
        "export_onnx converted the model to onnx (132 nodes); decode is faster than source, 2.53 × (2.50–2.56); "
        "prefill is slower than source, 0.930 × (0.920–0.940); perplexity 1.0000 × source's (0.9990–1.0010), "
        "equivalent; takes 12.0 MB."
    )
    told = sentence(report.stage("int4"), report)
    assert told.startswith(
        "int4 quantized 15 of 15 weights (132 → 102 nodes); decode is inconclusive against source, 1.020 ×"
    )
    assert "and slower than export_onnx, 0.40 × (0.38–0.43)" in told
    assert "prefill is as fast as source, 1.002 × (0.997–1.006)" in told
    assert "degraded" in told


def idle(shift: float, verdict: str, floor: tuple[float, float] | None, report: Report) -> str:
    """The sentence of a stage that changed nothing and whose decode is `shift` times its parent's."""
    parent = report.stage("export_onnx")
    ratio = Ratio.model_validate({"ratio": shift, "low": shift - 0.01, "high": shift + 0.01, "verdict": verdict})
    assert parent.speed is not None
    point = parent.speed[1].model_copy(update={"vs_parent": ratio})
    stage = report.stage("same").model_copy(
        update={"speed": (point,), "effect": Effect(kind="none", nodes=(155, 155)), "parent": "export_onnx"}
    )
    floors = (
        ()
        if floor is None
        else (NoiseFloor(kind="decode", batch=1, prompt=128, ratio_low=floor[0], ratio_high=floor[1]),)
    )
    return sentence(stage, report.model_copy(update={"noise_floor": floors}))


def test_what_changed_nothing_is_noise_inside_the_noise_floor(report: Report) -> None:
    told = idle(1.012, "inconclusive", (0.9842, 1.0133), report)
    assert told.startswith(
        "same changed nothing: 0 of 155 nodes; its +1.2 % against export_onnx is inside the noise floor of 1.6 %;"
    )


def test_what_changed_nothing_and_is_faster_all_the_same_is_not_explained_away(report: Report) -> None:
    told = idle(1.05, "faster", (0.9842, 1.0133), report)
    assert (
        "decode was timed faster than export_onnx all the same, 1.050 × (1.040–1.060) beyond the noise floor of 1.6 %: "
        "a contradiction, for nothing in the model explains it"
    ) in told


def test_between_the_floor_and_a_verdict_nothing_is_claimed(report: Report) -> None:
    assert "its −2.0 % against export_onnx (0.970–0.990) is inconclusive" in idle(
        0.98, "inconclusive", (0.9842, 1.0133), report
    )
    assert "means nothing, for the noise floor is not known" in idle(1.012, "inconclusive", None, report)


def test_what_failed_says_why_and_nothing_more(report: Report) -> None:
    assert sentence(report.stage("bad"), report) == "bad failed: ZeroDivisionError: [1/0]"
    assert sentence(report.stage("after"), report) == "after was skipped: bad failed"


def test_what_is_broken_shouts_first() -> None:
    told = sentence(RICH.stage("collapsed"), RICH)
    assert told.startswith("BROKEN: its predictions are garbage (perplexity 5.2763 × source's), however fast it is. ")
    assert headline(RICH)[0] == "BROKEN: garbage and collapsed; their predictions are garbage, however fast they are."
    assert sentence(RICH.stage("garbage"), RICH).startswith("BROKEN: its predictions are garbage (they are not finite)")


def test_a_broken_stage_wins_nothing(report: Report) -> None:
    lines = " ".join(headline(report)[1:])
    assert "garbage" not in lines
    assert "Fastest decode: export_onnx, 2.53 × source (2.50–2.56)" in lines


def test_random_weights_are_judged_by_agreement() -> None:
    report = rich_report(random_weights=True)
    told = sentence(report.stage("int8"), report)
    assert "the most likely token is source's in 98.7 % of places (KL 0.00042), equivalent" in told
    assert "perplexity 1.0017" not in told
    assert "its perplexity means nothing" in sentence(report.stage("source"), report)


def test_what_was_not_timed_is_said_not_to_be() -> None:
    quiet = RICH.model_copy(update={"stages": tuple(s.model_copy(update={"speed": None}) for s in RICH.stages)})
    assert "its speed was not measured in this run" in sentence(quiet.stage("int4"), quiet)
    assert "Speed was not measured in this run." in headline(quiet)


def test_a_winner_whose_interval_overlaps_another_is_told_with_it(report: Report) -> None:
    first = report.stage("export_onnx")
    assert first.speed is not None
    near = Ratio(ratio=2.5, low=2.4, high=2.6, verdict="faster")
    twin = first.model_copy(
        update={"name": "twin", "speed": (first.speed[1].model_copy(update={"vs_baseline": near, "vs_parent": None}),)}
    )
    lines = headline(report.model_copy(update={"stages": (*report.stages, twin)}))
    assert any("export_onnx, 2.53 × source" in li and "twin cannot be told from it" in li for li in lines)


def test_one_that_is_inconclusive_but_may_be_faster_still_is_told_with_the_winner(report: Report) -> None:
    first = report.stage("export_onnx")
    assert first.speed is not None
    wild = Ratio(ratio=9.0, low=0.5, high=60.0, verdict="inconclusive")
    point = first.speed[1].model_copy(update={"vs_baseline": wild, "vs_parent": None})
    other = first.model_copy(update={"name": "wild", "speed": (point,)})
    lines = headline(report.model_copy(update={"stages": (*report.stages, other)}))
    assert any("export_onnx, 2.53 × source" in li and "wild cannot be told from it" in li for li in lines)


def test_a_winner_that_beat_its_parent_directly_is_the_only_one(report: Report) -> None:
    first = report.stage("export_onnx")
    assert first.speed is not None
    better = Ratio(ratio=2.54, low=2.5, high=2.6, verdict="faster")
    child = first.model_copy(
        update={
            "name": "child",
            "parent": "export_onnx",
            "speed": (first.speed[1].model_copy(update={"vs_baseline": better, "vs_parent": better}),),
        }
    )
    lines = headline(report.model_copy(update={"stages": (*report.stages, child)}))
    assert any(line.startswith("Fastest decode: child, 2.54 ×") and "cannot be told" not in line for line in lines)


def test_where_nothing_is_faster_no_winner_is_named(report: Report) -> None:
    lines = headline(
        report.model_copy(update={"stages": tuple(s for s in report.stages if s.name in {"source", "int4"})})
    )
    assert "No faster decode: int4 is inconclusive against source." in lines
    assert "No faster prefill: int4 is as fast as source." in lines
    assert not any(line.startswith("Fastest") for line in lines)


def test_gates_and_failures_end_the_headline(report: Report) -> None:
    assert headline(report)[-1] == "Failed: bad. Skipped: after. Gates: 1 of 2 failed, 1 of 2 not evaluated."


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (None, "–"),
        ({"kind": "none", "nodes": [3, 3]}, "changed nothing: 0 of 3 nodes"),
        ({"kind": "conversion", "nodes": [None, 132]}, "conversion, 132 nodes"),
        (
            {"kind": "weights", "weights_quantized": [1, 2], "nodes": [4, 3]},
            "weights, 1 of 2 weights quantized, 4 → 3 nodes",
        ),
    ],
)
def test_an_effect_in_a_table_is_short(effect: dict | None, expected: str) -> None:
    stage = RICH.stage("int4").model_copy(update={"effect": Effect.model_validate(effect) if effect else None})
    assert effect_in_words(stage) == expected


def test_names_however_long_are_told_whole() -> None:
    assert LONG in " ".join(headline(RICH.model_copy(update={"stages": (RICH.stage("source"), RICH.stage(LONG))})))


FORWARD = forward_report()


def test_a_pass_that_matched_nothing_is_said_to_have_changed_nothing_whatever_its_timing() -> None:
    told = sentence(FORWARD.stage("fuse_transpose_into_gemm"), FORWARD)
    assert told.startswith(
        "fuse_transpose_into_gemm changed nothing: 0 of 155 nodes; its +1.2 % is inside the noise floor of 1.6 %;"
    )


def test_a_pass_that_matched_nothing_and_is_faster_is_a_contradiction_and_never_a_success() -> None:
    told = sentence(FORWARD.stage("fuse_matmul_add_bias_into_gemm"), FORWARD)
    assert "forward was timed faster than export_onnx all the same, 1.21 × (1.20–1.22) beyond the noise floor" in told
    lines = headline(FORWARD)
    assert not [line for line in lines if line.startswith("Fastest")]
    assert (
        "Contradiction: fuse_matmul_add_bias_into_gemm changed nothing, and yet was timed faster than export_onnx; "
        "nothing in the model explains it."
    ) in lines


def test_of_what_changed_nothing_the_parent_wins() -> None:
    lines = headline(RICH.model_copy(update={"stages": RICH.stages[:3]}))
    assert any(line.startswith("Fastest decode (batch 1, prompt 128, new tokens 64): export_onnx") for line in lines)
    assert not any("cleanup" in line for line in lines if line.startswith("Fastest"))


def test_a_headline_names_three_and_counts_the_rest() -> None:
    stage = RICH.stage(LONG)
    many = tuple(stage.model_copy(update={"name": f"copy_{i}"}) for i in range(8))
    lines = headline(RICH.model_copy(update={"stages": (RICH.stage("source"), *many), "ablation": None}))
    assert (
        "No faster decode (batch 1, prompt 128, new tokens 64): copy_0, copy_1, copy_2 and 5 more are inconclusive "
        in (" ".join(lines))
    )


def test_what_was_made_for_the_ablation_alone_wins_nothing() -> None:
    assert RICH.ablation is not None
    extra = RICH.ablation.model_copy(update={"extra_stages": ("int4",)})
    lines = headline(RICH.model_copy(update={"ablation": extra}))
    assert not any("int4" in line for line in lines if line.startswith(("Fastest", "Smallest")))
    assert any("int4" in line for line in headline(RICH) if line.startswith("Fastest decode"))


def test_a_flag_is_told_in_the_headline_and_in_the_sentence() -> None:
    flag = RICH.stage("int8_slow").roofline
    assert flag is not None
    assert f"Look at int8_slow: {flag.flag}." in headline(RICH)
    assert f"; look at it: {flag.flag};" in sentence(RICH.stage("int8_slow"), RICH)


@pytest.mark.parametrize(
    ("ends", "kind", "expected", "short"),
    [
        (
            (12400, 11800, 13100),
            "decode",
            "the 61.3 s of making it are earned back after 12,400 decoded tokens (11,800–13,100)",
            "12,400 tokens (11,800–13,100)",
        ),
        (
            (9000, 8100, None),
            "forward",
            "the 61.3 s of making it are earned back after 9,000 tokens (8,100 to never)",
            "9,000 tokens (8,100 to never)",
        ),
        (
            (9000, None, None),
            "forward",
            "the 61.3 s of making it are earned back after 9,000 tokens",
            "9,000 tokens",
        ),
        ((None, None, None), "decode", "the 61.3 s of making it are never earned back", "never"),
    ],
)
def test_break_even_is_told_with_its_interval(
    ends: tuple[int | None, int | None, int | None], kind: str, expected: str, short: str
) -> None:
    tokens, low, high = ends
    found = BreakEven.model_validate({"cost_s": 61.3, "tokens": tokens, "low": low, "high": high, "kind": kind})
    assert break_even_in_words(found) == expected
    assert earned_back(found) == short
    assert earned_back(None) == "–"


def diverging(
    first: str | None, most: str | None, errors: dict[str, float | None], added: dict[str, float] | None = None
) -> str:
    layers = [{"layer": n, "relative_error": error, "added": (added or {}).get(n)} for n, error in errors.items()]
    return divergence_in_words(
        Divergence.model_validate({"reference": "fused", "tokens": 5, "layers": layers, "first": first, "most": most})
    )


def test_the_layer_where_quality_fell_is_named() -> None:
    errors = {"layer 0": 0.021, "layer 1": 0.17}
    assert diverging("layer 0", "layer 1", errors) == (
        "its values leave fused's first at layer 0 (relative error 0.021), "
        "and the error grows most at layer 1 (to 0.17)"
    )
    # 0.17 came together on the way: what decided is what each layer does by itself
    assert diverging("layer 0", "layer 1", errors, {"layer 0": 0.021, "layer 1": 0.09}) == (
        "its values leave fused's first at layer 0 (relative error 0.021), and layer 1 adds most, 0.09 by itself"
    )
    assert diverging("layer 0", "layer 0", errors, {"layer 0": 0.021, "layer 1": 0.009}) == (
        "its values leave fused's first at layer 0 (relative error 0.021), which adds most, 0.021 by itself"
    )
    assert diverging("layer 1", "layer 1", {"layer 1": None}) == (
        "its values leave fused's first at layer 1 (not finite), which adds most, too"
    )
    assert diverging(None, None, errors) == ""


def test_of_several_components_the_one_whose_values_leave_is_named() -> None:
    found = {
        "reference": "both",
        "component": "decode",
        "reference_component": "prefill",
        "tokens": 5,
        "layers": [{"layer": "layer 0", "relative_error": 0.5}],
        "first": "layer 0",
        "most": "layer 0",
    }
    assert divergence_in_words(Divergence.model_validate(found)) == (
        "the values of its decode leave both/prefill's first at layer 0 (relative error 0.5), which adds most, too"
    )
    assert layer_chart(Divergence.model_validate(found)).title == (
        "Relative error by layer of decode against both/prefill, on 5 tokens"
    )


def test_the_reason_of_a_verdict_is_told_in_the_tables_and_the_verdict_in_the_sentence() -> None:
    assert "degraded: perplexity 1.072 times the baseline's: beyond 1.01" in " ".join(render_markdown(RICH).split())
    assert ", degraded;" in sentence(RICH.stage("int4"), RICH)


def test_what_would_decide_is_told_of_the_baseline_and_not_again_of_the_parent() -> None:
    stage = RICH.stage(LONG)
    assert stage.speed is not None
    point = stage.speed[1].model_copy(update={"vs_parent": stage.speed[1].vs_baseline})
    told = sentence(stage.model_copy(update={"speed": (point,), "parent": "fused"}), RICH)
    assert "and inconclusive against fused, 1.007 × (0.916–1.098)" in told
    assert told.count("rounds may decide") == 1


def test_an_undecided_speed_says_what_would_decide_it() -> None:
    told = sentence(FORWARD.stage("source"), FORWARD)
    assert "rounds may decide" not in told
    alone = RICH.stage(LONG)
    assert alone.speed is not None
    one = alone.model_copy(update={"speed": alone.speed[1:2], "parent": "source"})
    assert (
        "inconclusive against source, 1.007 × (0.916–1.098): reaches into the noise floor of 1.6 %, about 190 rounds "
        in (sentence(one, RICH))
    )
