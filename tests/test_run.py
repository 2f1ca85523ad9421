"""The main job, whole and small: from the shipped recipe to a report, a model folder and the text that it generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline import load_model
from pipeline.compare import compare
from pipeline.recipe import load_recipe
from pipeline.report.schema import StageReport, report_json_schema
from pipeline.reproduce import read_past_run
from pipeline.run import RunResult, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("measured_briefly")]


@pytest.fixture
def result(main_job: Any) -> RunResult:
    return main_job.result


def stage(result: RunResult, name: str) -> StageReport:
    return result.report.stage(name)


def test_every_stage_runs_and_the_gates_pass(result: RunResult) -> None:
    assert [s.name for s in result.report.stages] == [
        "source",
        "export_onnx",
        "onnxoptimizer",
        "optimized",
        "int4",
        "int4_compiled",
        "int8",
        "int8_compiled",
        "torch_compiled",
    ]
    assert {s.status for s in result.report.stages} == {"ran"}
    assert {g.result for g in result.report.gates} == {"passed"}
    assert result.exit_code == 0


def test_the_report_fits_its_schema_and_nothing_that_was_asked_for_is_missing(result: RunResult) -> None:
    data = json.loads((result.folder / "report.json").read_text())
    jsonschema.validate(data, report_json_schema())
    warm = {s.name: s.load.warm_s for s in result.report.stages if s.load}
    for s in result.report.stages:
        assert s.speed is not None
        assert {p.kind for p in s.speed} == {"prefill", "decode"}
        assert s.load is not None
        unmeasured = [note for note in result.report.notes if note.startswith("the cold load of ") and s.name in note]
        assert s.load.cold_s is not None or unmeasured  # a second holds few
        assert s.load.cold_s is not None or s.load.warm_s is not None or unmeasured
        assert s.inference_peak_memory_bytes
        assert s.cost.wall_s is not None
        assert s.quality is not None
        assert s.name == "source" or s.quality.vs_baseline is not None
        known = s.parent is not None and None not in (s.load.warm_s, warm[s.parent])
        assert (s.load.saved_s is not None) == known
    assert len(result.report.noise_floor) == 2


def test_quality_falls_as_the_bits_do(result: RunResult) -> None:
    ratios = {
        s.name: s.quality.vs_baseline.perplexity_ratio.ratio
        for s in result.report.stages
        if s.quality and s.quality.vs_baseline
    }
    assert abs(ratios["export_onnx"] - 1) < 0.005  # type: ignore[operator]
    assert abs(ratios["int8"] - 1) < 0.01  # type: ignore[operator]
    assert ratios["int8_compiled"] == pytest.approx(ratios["int8"], abs=1e-3)
    assert abs(ratios["torch_compiled"] - 1) < 0.005  # type: ignore[operator]
    assert ratios["int8"] < ratios["int4"] < 1.1  # type: ignore[operator]


def test_effects_are_found_by_comparison(result: RunResult) -> None:
    effects = {s.name: s.effect for s in result.report.stages}
    assert effects["source"] is None
    assert effects["export_onnx"].kind == "conversion"  # type: ignore[union-attr]
    int4 = effects["int4"]
    assert int4 is not None
    assert int4.kind == "weights"
    assert int4.weights_quantized == (36, 36)  # 5 layers of 7 matrices, and the head


def test_the_export_writes_no_weights_and_int4_is_smaller(result: RunResult) -> None:
    facts = {s.name: s.artifact for s in result.report.stages}
    assert facts["export_onnx"].unique_bytes < 2_000_000  # type: ignore[union-attr]
    assert facts["int4"].size_bytes < 0.6 * facts["source"].size_bytes  # type: ignore[union-attr]


def test_the_exported_model_generates_the_text_that_was_measured(result: RunResult) -> None:
    quality = stage(result, "int4").quality
    assert result.report.export == "int4"
    assert quality is not None
    folder = result.folder / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(quality.sample_prompt or "", add_special_tokens=False).ids
    wanted = quality.sample_text or ""
    model = load_model(folder)
    logits = model.prefill(np.array([ids]))
    made: list[int] = []
    while len(tokenizer.decode(made, skip_special_tokens=False)) < len(wanted):
        made.append(int(logits[0].argmax()))
        logits = model.decode(np.array([[made[-1]]]))
    assert tokenizer.decode(made, skip_special_tokens=False) == wanted


def test_a_second_run_caches_every_stage_and_its_quality_and_measures_speed_anew(main_job: Any, tmp_path: Path) -> None:
    result = main_job.result
    # compile_torch's would be compiled anew, to be loaded cold; the others would say what int4 does
    unmeasured = [
        "torch_compiled",
        "export_onnx",
        "onnxoptimizer",
        "int4_compiled",
        "int8",
        "int8_compiled",
    ]
    overrides = [*main_job.overrides, "gates=[]", *(f"passes.{name}.measure=false" for name in unmeasured)]
    again = run(load_recipe("llama2-cpu", overrides), store=main_job.store, runs=tmp_path / "runs")
    assert {s.status for s in again.report.stages} == {"cached"}
    assert stage(again, "int4").quality == stage(result, "int4").quality
    assert stage(again, "int4").speed != stage(result, "int4").speed
    assert (tmp_path / "runs" / "llama2-cpu" / "latest").resolve() == again.folder.resolve()


def test_the_models_of_two_runs_are_measured_again_side_by_side(main_job: Any, tmp_path: Path) -> None:
    result, store, runs = main_job.result, main_job.store, tmp_path / "runs"
    recipe = load_recipe("llama2-cpu", [*main_job.overrides, "passes.int4.bits=8"])
    other = run(recipe, store=store, runs=runs, measure=False)
    a, b = (read_past_run(str(folder), runs) for folder in (result.folder, other.folder))
    found = compare(a, b, store=store, runs=runs, stages=["int4", "optimized"], budget_s=1)
    stages = {s.name: s for s in found.comparison.stages}
    assert {name: (s.status, s.same_artifact) for name, s in stages.items()} == {
        "int4": ("paired", False),
        "optimized": ("paired", True),
    }
    for s in stages.values():
        assert {p.kind for p in s.speed} == {"prefill", "decode"}
        assert all(p.paired and p.ratio is not None and p.ratio.low < p.ratio.high for p in s.speed)
    assert found.comparison.rounds >= 3
    assert found.comparison.forced == ()
    assert {path.name for path in found.folder.iterdir()} >= {"comparison.html", "comparison.json", "samples.json"}


def test_without_measuring_quality_is_remembered_and_speed_is_not_shown(main_job: Any, tmp_path: Path) -> None:
    recipe = load_recipe("llama2-cpu", main_job.overrides)
    quiet = run(recipe, store=main_job.store, runs=tmp_path / "runs", measure=False)
    assert stage(quiet, "int4").quality == stage(main_job.result, "int4").quality
    assert stage(quiet, "int4").speed is None
    assert any("--no-measure" in note for note in quiet.report.notes)


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, install: Callable[..., None]) -> None:
    install(
        tmp_path,
        "garbage_passes",
        """
        from pipeline import Pass, load_onnx, save_onnx
        class Negate(Pass):
            "Turn the logits upside down."
            name = "negate"
            accepts, produces = frozenset({"onnx"}), "onnx"
            def run(self, artifact, params, context):
                import onnx_ir as ir
                model = load_onnx(artifact)
                logits = model.graph.outputs[0]
                node = ir.node("Neg", [logits])
                model.graph.append(node)
                new = node.outputs[0]
                new.shape, new.type = logits.shape, logits.type
                logits.name, new.name = "upright", "logits"
                model.graph.outputs[0] = new
                return save_onnx(model, context.output, like=artifact)
        """,
        {"negate": "garbage_passes:Negate"},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("garbage")
def test_a_stage_whose_output_is_garbage_is_broken_and_ends_with_1(main_job: Any, tmp_path: Path) -> None:
    passes = "passes=[{pass: export_onnx}, {pass: negate}]"
    overrides = [*main_job.overrides, passes, "export=null", "gates=[]"]
    made = run(load_recipe("llama2-cpu", overrides), store=main_job.store, runs=tmp_path / "runs")
    quality = stage(made, "negate").quality
    assert quality is not None
    assert quality.vs_baseline is not None
    assert quality.vs_baseline.verdict == "broken"
    assert made.exit_code == 1
    assert made.report.export is None
