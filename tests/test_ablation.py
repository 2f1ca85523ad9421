"""`pipeline run --ablate`: what each pass of a chain contributes, found by leaving it out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.ablation import end_of_chain, plan_ablation, with_contributions
from pipeline.errors import RecipeError
from pipeline.execute import StageResult
from pipeline.hardware import describe_host
from pipeline.measure.looks import LookPlan
from pipeline.measure.samples import Sample, SpeedMeasurement
from pipeline.measure.workload import Point
from pipeline.plan import Plan
from pipeline.recipe import Recipe, Stage
from pipeline.recipe.load import recipe_from_text
from pipeline.report.schema import Report
from pipeline.report.tables import ablation_table
from pipeline.report.words import headline
from pipeline.resolve import resolve, source_of
from pipeline.run import run
from pipeline.store import Store, default_store_path

pytestmark = pytest.mark.usefixtures("plugins", "store")

CHAIN = """
  - pass: mark
  - pass: write
    name: note
  - pass: same
"""


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def made(passes: str = CHAIN, rest: str = "") -> Recipe:
        text = f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses:{passes}{rest}"
        return recipe_from_text(text, file="r.yaml", folder=tmp_path)

    return made


def ablate(recipe: Recipe, tmp_path: Path, end: str | None = None) -> Report:
    return run(recipe, ablate=end_of_chain(recipe, end), measure=False, runs=tmp_path / "runs").report


def resolved(recipe: Recipe, stages: Sequence[Stage]) -> Plan:
    """The plan of some stages of the recipe."""
    store = Store(default_store_path())
    source = source_of(recipe, download=False)
    return resolve(recipe, source, store, describe_host(), stages=stages, force=False)


def parents(report: Report) -> dict[str, str | None]:
    return {stage.name: stage.parent for stage in report.stages}


def test_each_pass_is_left_out_in_turn_and_what_follows_is_made_anew(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    report = ablate(recipe(), tmp_path)
    assert parents(report) == {
        "source": None,
        "mark": "source",
        "note": "mark",
        "same": "note",
        "note_without_mark": "source",
        "same_without_mark": "note_without_mark",
        "same_without_note": "mark",
    }
    assert report.ablation is not None
    assert {c.stage: c.variant for c in report.ablation.contributions} == {
        "mark": "same_without_mark",
        "note": "same_without_note",
        "same": "note",  # the chain without its last pass is there already
    }
    assert set(report.ablation.extra_stages) == {"note_without_mark", "same_without_mark", "same_without_note"}


def test_the_variants_lack_what_the_dropped_pass_did(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    report = ablate(recipe(), tmp_path)
    store = Store(tmp_path / "store")
    found = {}
    for stage in report.stages:
        assert stage.artifact is not None
        artifact = store.artifact(stage.artifact.digest)
        assert artifact is not None
        found[stage.name] = ("mark" in artifact.manifest.execution, "note.txt" in artifact.manifest.files)
    assert found["same"] == (True, True)
    assert found["same_without_mark"] == (False, True)
    assert found["same_without_note"] == (True, False)


def test_sizes_are_compared_even_where_nothing_is_measured(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    report = ablate(recipe("\n  - {pass: mark}\n  - {pass: write, text: abcdef}\n"), tmp_path)
    assert report.ablation is not None
    changes = {c.stage: (c.size_bytes_change, c.reason) for c in report.ablation.contributions}
    why = "speed was not measured in rounds that both ran in"
    assert changes == {"mark": (0, why), "write": (6, why)}


def test_a_further_input_is_replaced_as_a_parent_is(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    passes = """
  - {pass: mark, name: left, value: 2}
  - {pass: mark, name: right, value: 3, after: source}
  - {pass: combine, after: left, inputs: {other: right}}
"""
    plan = plan_ablation(recipe(passes), "combine", partial(resolved, recipe(passes)))
    made = {s.name: (s.parent, s.inputs) for s in plan.extra}
    assert made == {
        "combine_without_left": ("source", {"other": "right"}),
        "combine_without_right": ("left", {"other": "source"}),
    }
    report = ablate(recipe(passes), tmp_path)
    assert report.ablation is not None
    assert all(c.variant for c in report.ablation.contributions)


def test_only_the_chain_its_variants_and_the_baseline_are_made(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    passes = CHAIN + "  - {pass: mark, name: aside, value: 9, after: source}\n"
    report = ablate(recipe(passes, "export: note\n"), tmp_path)
    assert report.ablation is not None
    assert report.ablation.stage == "note"
    assert set(parents(report)) == {"source", "mark", "note", "note_without_mark"}
    assert report.export == "note"


def test_a_variant_never_takes_a_name_that_the_recipe_has(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    passes = """
  - {pass: mark, name: same_without_note, value: 7}
  - {pass: write, name: note}
  - {pass: same}
"""
    report = ablate(recipe(passes), tmp_path)
    assert parents(report)["same_without_note_2"] == "same_without_note"


def test_a_pass_that_the_next_cannot_do_without_is_listed_with_the_reason(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    passes = "\n  - {pass: bad_onnx}\n  - {pass: onnx_only}\n"
    planned = plan_ablation(recipe(passes), "onnx_only", partial(resolved, recipe(passes)))
    first, last = planned.variants
    assert (first.end, last.end) == (None, "bad_onnx")
    assert first.reason == (
        "onnx_only_without_bad_onnx: the pass 'onnx_only' takes onnx, and the stage 'source' yields torch"
    )


def test_a_variant_that_fails_is_a_finding_and_no_failure_of_the_run(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = """
        from pipeline import Pass, PipelineError
        class NeedsMark(Pass):
            "Work on marked models only."
            name = "needs_mark"
            accepts, produces = frozenset({"torch"}), "torch"
            def run(self, artifact, params, context):
                if "mark" not in artifact.manifest.execution:
                    raise PipelineError("the model has no mark")
                return artifact
        """
    install(tmp_path, "needs_mark_passes", source, {"needs_mark": "needs_mark_passes:NeedsMark"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    passes = "\n  - {pass: mark}\n  - {pass: needs_mark}\n  - {pass: write}\n"
    result = run(recipe(passes), ablate="write", measure=False, runs=tmp_path / "runs")
    assert result.exit_code == 0
    assert result.report.ablation is not None
    mark = result.report.ablation.contributions[0]
    assert (mark.variant, mark.reason) == (None, "needs_mark_without_mark: the model has no mark")
    assert not {"needs_mark_without_mark", "write_without_mark"} & set(parents(result.report))
    assert "write_without_needs_mark" in parents(result.report)


def test_a_chain_that_fails_still_ends_with_3(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    result = run(recipe("\n  - {pass: mark}\n  - {pass: refuse}\n"), ablate="refuse", measure=False, runs=tmp_path)
    assert result.exit_code == 3
    assert result.report.ablation is not None
    assert all(c.size_bytes_change is None for c in result.report.ablation.contributions)


def test_gates_ask_for_the_recipe_s_own_stages(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    report = ablate(recipe(CHAIN, 'gates: ["same.size_bytes < 1e9"]\n'), tmp_path)
    assert [(g.gate, g.result) for g in report.gates] == [("same.size_bytes < 1e9", "passed")]


def test_the_recipe_in_the_folder_is_the_recipe_without_the_extra_stages_and_says_how_it_was_run(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    result = run(recipe(), ablate="same", measure=False, runs=tmp_path / "runs")
    text = (result.folder / "recipe.yaml").read_text()
    assert "--ablate same" in text.splitlines()[0]
    again = recipe_from_text(text, file="recipe.yaml", folder=tmp_path)
    assert again.stage_names == ["source", "mark", "note", "same"]
    planned = json.loads((result.folder / "plan.json").read_text())
    assert "same_without_mark" in [stage["name"] for stage in planned["stages"]]


def test_a_second_ablation_finds_everything_in_the_store(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    ablate(recipe(), tmp_path)
    assert {s.status for s in ablate(recipe(), tmp_path).stages} == {"cached"}


def test_what_cannot_be_ablated_is_told(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for passes, stage, expected in (
        (CHAIN, "nte", "there is no stage 'nte'"),
        (CHAIN, "source", "has no pass that could be dropped"),
        (" []\n", None, "has no pass that could be dropped"),
    ):
        with pytest.raises(RecipeError, match=expected):
            end_of_chain(recipe(passes), stage)
    for option in ({"until": "note"}, {"only": "note"}):
        with pytest.raises(RecipeError, match="neither --until nor --only"):
            run(recipe(), ablate="same", measure=False, runs=tmp_path, **option)  # type: ignore[arg-type]


# What the figures come to

DECODE = Point(kind="decode", batch=1, prompt=8, new_tokens=4)


def measured(seconds: dict[str, float], rounds: int = 24) -> SpeedMeasurement:
    """Blocks of stages that take so long, with a little noise that repeats."""
    samples = []
    for launch in range(4):
        for number in range(rounds // 4):
            for order, (name, each) in enumerate([*seconds.items(), ("source", seconds["source"])]):
                wobble = 1 + 0.001 * ((launch * 7 + number * 5 + order * 3) % 5 - 2)
                again = order == len(seconds)
                samples.append(
                    Sample(
                        stage=name,
                        replica=int(again),
                        launch=launch,
                        round=number,
                        order=order,
                        point=DECODE,
                        seconds=(each * wobble,),
                        started_s=0.0,
                    )
                )
    return SpeedMeasurement(
        baseline="source",
        seed=0,
        launches=4,
        rounds=rounds,
        samples=tuple(samples),
        plan=LookPlan.declare([rounds]),
        looks_taken=1,
    )


def with_quality(report: Report, perplexity: dict[str, float], kl: dict[str, float]) -> Report:
    data = json.loads(report.to_json())
    for stage in data["stages"]:
        name = stage["name"]
        ratio = perplexity[name] / perplexity["source"]
        paired: dict[str, Any] = {"perplexity_ratio": {"ratio": ratio, "low": ratio, "high": ratio}}
        paired |= {"kl_divergence": kl.get(name), "top1_agreement": 1.0, "max_abs_logit_error": 0.0}
        paired |= {"first_divergence": None, "verdict": "equivalent"}
        scored = {"perplexity": perplexity[name], "tokens": 9, "vs_baseline": None if name == "source" else paired}
        stage["quality"] = scored
    return Report.model_validate(data)


@pytest.fixture
def contributions(recipe: Callable[..., Recipe], tmp_path: Path) -> dict[str, Any]:
    """Of mark and write: with mark twice as fast, with write as fast as without."""
    two = recipe("\n  - {pass: mark}\n  - {pass: write}\n")
    report = ablate(two, tmp_path)
    plan = plan_ablation(two, "write", partial(resolved, two))
    speed = measured({"source": 0.04, "mark": 0.02, "write": 0.02, "write_without_mark": 0.04})
    perplexity = {"source": 10.0, "mark": 11.0, "write": 11.0, "write_without_mark": 10.0}
    scored = with_quality(report, perplexity, {"mark": 0.02, "write": 0.03, "write_without_mark": 0.0})
    results = {s.name: StageResult(name=s.name, status="ran", artifact="0" * 64) for s in report.stages}
    found = with_contributions(plan, scored, results, speed).ablation
    assert found is not None
    return {c.stage: c for c in found.contributions}


def test_a_pass_that_makes_the_chain_twice_as_fast_is_found_to(contributions: dict[str, Any]) -> None:
    (mark,) = contributions["mark"].speed
    assert (mark.kind, mark.new_tokens) == ("decode", 4)
    assert mark.ratio.ratio == pytest.approx(2, rel=0.01)
    assert mark.ratio.low > 1.9
    assert mark.ratio.verdict == "faster"


def test_a_pass_that_adds_nothing_is_found_to_add_nothing(contributions: dict[str, Any]) -> None:
    (write,) = contributions["write"].speed
    assert write.ratio.ratio == pytest.approx(1, abs=0.01)
    assert write.ratio.verdict in {"equivalent", "inconclusive"}


def test_quality_is_told_as_ratio_and_as_difference(contributions: dict[str, Any]) -> None:
    assert contributions["mark"].perplexity_ratio == pytest.approx(1.1)
    assert contributions["mark"].kl_divergence_change == pytest.approx(0.03)
    assert contributions["write"].perplexity_ratio == pytest.approx(1.0)
    assert contributions["write"].kl_divergence_change == pytest.approx(0.01)


def made_slower(report: Report, plan: Any, seconds: dict[str, float]) -> Report:
    results = {s.name: StageResult(name=s.name, status="ran", artifact="0" * 64) for s in report.stages}
    return with_contributions(plan, report, results, measured(seconds))


def test_a_pass_that_changed_nothing_is_credited_with_nothing_whatever_was_timed(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """`same` returns what it was given: the chain with and without it is one artifact; 3 % of noise is no credit."""
    chain = recipe("\n  - {pass: mark}\n  - {pass: same}\n  - {pass: write}\n")
    plan = plan_ablation(chain, "write", partial(resolved, chain))
    times = {"source": 0.04, "write": 0.02, "same": 0.02, "write_without_mark": 0.04, "write_without_same": 0.0206}
    report = made_slower(ablate(chain, tmp_path), plan, times)
    assert report.ablation is not None
    found = {c.stage: c for c in report.ablation.contributions}
    assert {name: c.same_artifact for name, c in found.items()} == {"mark": False, "same": True, "write": False}
    (timed,) = found["same"].speed
    assert timed.ratio.verdict == "faster"
    table = ablation_table(report)
    assert table is not None
    verdicts = {row[0]: row[4] for row in table.rows}
    assert verdicts["same"] == (
        "contradiction: timed faster, and yet it changed nothing: the chain with and without it is the same artifact"
    )
    assert "contradiction" not in verdicts["mark"]
    assert (
        "Contradiction: with and without same the chain that ends in write is the same artifact, and yet with it was "
        "timed faster; the pass did not do that."
    ) in headline(report)


def test_a_pass_that_changed_nothing_is_told_though_its_timing_claims_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    report = ablate(recipe("\n  - {pass: mark}\n  - {pass: same}\n"), tmp_path)
    assert "same contributed nothing: with and without it the chain that ends in same is the same artifact." in (
        headline(report)
    )
    table = ablation_table(report)
    assert table is not None
    assert table.rows[1][1].startswith("it changed nothing: the chain with and without it is the same artifact; ")


def test_stages_made_for_the_ablation_alone_win_nothing_and_lead_no_headline(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Without `write` the chain is twice as fast and predicts best: no stage of the recipe does that."""
    two = recipe("\n  - {pass: mark}\n  - {pass: write}\n")
    plan = plan_ablation(two, "write", partial(resolved, two))
    perplexity = {"source": 10.0, "mark": 12.0, "write": 11.0, "write_without_mark": 9.0}
    report = with_quality(ablate(two, tmp_path), perplexity, {"mark": 0.1, "write": 0.1, "write_without_mark": 0.1})
    data = json.loads(report.to_json())
    for stage, rate in zip(data["stages"], (10.0, 15.0, 20.0, 40.0), strict=True):
        figure = {"median": rate, "low": rate, "high": rate}
        ratio = {"ratio": rate / 10, "low": rate / 10, "high": rate / 10, "verdict": "faster"}
        point = {"kind": "decode", "batch": 1, "prompt": 8, "new_tokens": 4, "rounds": 9, "launches": 3}
        stage["speed"] = [{**point, "tokens_per_s": figure, "latency_s": figure, "vs_baseline": ratio}]
        stage["effect"] = {"kind": "weights"}
        if stage["name"] == "write_without_mark":
            stage["roofline"] = {"flag": "kernel not engaged"}
    report = Report.model_validate(data).model_copy(update={"ablation": None})
    results = {s.name: StageResult(name=s.name, status="ran", artifact="0" * 64) for s in report.stages}
    found = with_contributions(plan, report, results, None)
    assert found.pareto == ("source", "write")
    assert not any("write_without_mark" in line for line in headline(found))


def test_random_weights_have_no_ratio_of_perplexities(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    one = recipe("\n  - {pass: mark}\n")
    report = with_quality(ablate(one, tmp_path), {"source": 10.0, "mark": 11.0}, {"mark": 0.5})
    assert report.model is not None
    random = report.model_copy(update={"model": report.model.model_copy(update={"random_weights": True})})
    plan = plan_ablation(one, "mark", partial(resolved, one))
    results = {s.name: StageResult(name=s.name, status="ran", artifact="0" * 64) for s in report.stages}
    found = with_contributions(plan, random, results, None).ablation
    assert found is not None
    assert found.contributions[0].perplexity_ratio is None
    assert found.contributions[0].kl_divergence_change == pytest.approx(0.5)
