"""Olive's passes as stages: each kind run for real, refusals at plan time, and failures that are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passes.export.export_onnx import ExportOnnx
from passes.graph.optimize_onnxruntime import OptimizeOnnxRuntime
from passes.olive import catalogue, parameters
from passes.olive.olive import CALIBRATION, OlivePass
from pipeline import Artifact, ExecutionSpec, PipelineError, load_onnx, load_runner
from pipeline.errors import RecipeError
from pipeline.further_passes import further_passes
from pipeline.plan import Plan
from pipeline.recipe import load_recipe
from pipeline.recipe.load import recipe_from_text
from pipeline.resolve import plan_recipe
from pipeline.run import run
from pipeline.store import Store

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
CALIBRATED = {"calibration_samples": 4, "calibration_length": 32}
TOKENS = np.arange(3, 27)[None]


@pytest.fixture(scope="module")
def source(bench: Any) -> Artifact:
    """A Llama in float32 with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig

    folder = bench.checkpoint(LlamaConfig(**SIZES))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    artifact: Artifact = bench.source(folder)
    return artifact


@pytest.fixture(scope="module")
def graph(bench: Any, source: Artifact) -> Artifact:
    """The same as a graph whose products read their weights as they are."""
    exported = bench.run(ExportOnnx, source, verify=False)
    made: Artifact = bench.run(OptimizeOnnxRuntime, exported, level="O2", fold_weights=True)
    return made


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in load_onnx(artifact).graph)


def logits(artifact: Artifact) -> np.ndarray:
    """Of all positions, through the runner that the report measures with."""
    runner = load_runner(artifact, ExecutionSpec(threads=1))
    return np.concatenate(list(runner.score(TOKENS)), axis=1)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def check_carried_along(made: Artifact, before: Artifact) -> None:
    assert made.manifest.files["tokenizer.json"] == before.manifest.files["tokenizer.json"]
    assert made.read_json("config.json")["vocab_size"] == 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "params", "least_cosine"),
    [
        ("OrtTransformersOptimization", {}, 0.99999),
        ("OnnxPeepholeOptimizer", {}, 0.99999),
        ("OnnxScriptFusion", {}, 0.99999),
        ("GraphSurgeries", {"surgeries": [{"surgeon": "RemoveShapes"}]}, 0.99999),
        ("OnnxFloatToFloat16", {}, 0.9999),
        ("OnnxDynamicQuantization", {"op_types_to_quantize": ["MatMul"]}, 0.99),
        ("OnnxBlockWiseRtnQuantization", {"block_size": 32}, 0.9),
        ("OnnxKQuantQuantization", {"block_size": 32}, 0.9),
    ],
)
def test_a_pass_for_graphs_keeps_what_the_graph_computes(
    bench: Any, graph: Artifact, kind: str, params: dict[str, Any], least_cosine: float
) -> None:
    made = bench.run(OlivePass, graph, type=kind, **params)
    assert made.format == "onnx"
    assert made.digest != graph.digest
    assert set(made.interface.inputs.values()) == set(graph.interface.inputs.values())
    assert made.interface.outputs == graph.interface.outputs
    check_carried_along(made, graph)
    assert cosine(logits(made), logits(graph)) >= least_cosine
    assert bench.run(OlivePass, graph, type=kind, **params).digest == made.digest  # deterministic


@pytest.mark.slow
def test_what_the_quantizers_quantized_is_in_the_graph(bench: Any, graph: Artifact) -> None:
    products = operators(graph)["MatMul"]
    assert products == 15  # q, k, v, o, gate, up and down of two layers, and the head
    kquant = bench.run(OlivePass, graph, type="OnnxKQuantQuantization", block_size=32)
    assert operators(kquant)["MatMulNBits"] == products
    assert kquant.manifest.weights_bytes < graph.manifest.weights_bytes
    dynamic = bench.run(OlivePass, graph, type="OnnxDynamicQuantization", op_types_to_quantize=["MatMul"])
    assert operators(dynamic)["MatMulInteger"] == products
    half = bench.run(OlivePass, graph, type="OnnxFloatToFloat16")
    assert half.interface.cache is not None
    assert half.interface.cache.dtype == "float16"


@pytest.mark.slow
def test_weights_that_olive_left_alone_are_stored_once(bench: Any, graph: Artifact) -> None:
    made = bench.run(OlivePass, graph, type="OnnxPeepholeOptimizer")
    spans = {name: (ref.file, ref.offset) for name, ref in graph.component.tensors.items()}
    kept = [name for name, ref in made.component.tensors.items() if spans.get(name) == (ref.file, ref.offset)]
    assert len(kept) >= 15


@pytest.mark.slow
def test_hqq_of_olive_runs_and_leaves_garbage(bench: Any, graph: Artifact) -> None:
    made = bench.run(OlivePass, graph, type="OnnxHqqQuantization", block_size=32)
    assert operators(made)["MatMulNBits"] == 15
    assert cosine(logits(made), logits(graph)) < 0.5
    assert "logits" in made.interface.outputs  # Olive renames it


@pytest.mark.slow
def test_quarot_rotates_weights_and_keeps_the_function(bench: Any, source: Artifact) -> None:
    made = bench.run(OlivePass, source, type="QuaRot")
    assert made.format == "torch"
    check_carried_along(made, source)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not np.allclose(made.tensor(name), source.tensor(name), atol=1e-3)
    assert cosine(logits(made), logits(source)) > 0.99999
    assert bench.run(OlivePass, source, type="QuaRot").digest == made.digest


@pytest.mark.slow
def test_gptq_calibrates_on_our_text_and_the_torch_runner_loads_it(bench: Any, source: Artifact) -> None:
    made = bench.run(OlivePass, source, type="Gptq", group_size=32, **CALIBRATED)
    assert made.read_json("config.json")["quantization_config"]["quant_method"] == "olive"
    assert "model.layers.0.mlp.down_proj.qweight" in made.component.tensors
    assert made.manifest.weights_bytes < source.manifest.weights_bytes / 1.5
    assert cosine(logits(made), logits(source)) > 0.9
    other = bench.run(OlivePass, source, type="Gptq", group_size=32, calibration_samples=1, calibration_length=32)
    assert other.digest != made.digest  # other text, other weights
    graph = bench.run(OlivePass, made, type="OnnxConversion", use_dynamo_exporter=True, task="text-generation")
    assert operators(graph)["MatMulNBits"] == 14  # all but the head, whose weight Gptq leaves alone
    scored = load_runner(graph, ExecutionSpec(threads=1)).forward(TOKENS)
    assert cosine(scored, logits(made)[:, -1]) > 0.99  # MatMulNBits rounds activations, too


@pytest.mark.slow
def test_onnx_conversion_without_a_cache_runs_and_with_one_fails_as_ours(bench: Any, source: Artifact) -> None:
    made = bench.run(OlivePass, source, type="OnnxConversion", use_dynamo_exporter=True, task="text-generation")
    assert made.format == "onnx"
    assert made.interface.cache is None
    check_carried_along(made, source)
    runner = load_runner(made, ExecutionSpec(threads=1))
    last = runner.forward(TOKENS)  # type: ignore[attr-defined]
    assert np.allclose(last, logits(source)[:, -1], atol=1e-4)
    with pytest.raises(PipelineError, match="Olive's OnnxConversion failed: AttributeError") as failed:
        bench.run(OlivePass, source, type="OnnxConversion")
    assert "task: text-generation" in str(failed.value.hint)


@pytest.mark.slow
def test_a_graph_that_does_not_load_fails_the_stage(bench: Any, source: Artifact) -> None:
    exported = bench.run(ExportOnnx, source, verify=False)  # with the operator Attention
    with pytest.raises(PipelineError, match="ONNX Runtime refuses the graph that Olive made") as failed:
        bench.run(OlivePass, exported, type="OnnxDynamicQuantization")
    assert "op_types_to_quantize" in str(failed.value.hint)


@pytest.mark.slow
def test_what_olive_only_logs_fails_the_stage(bench: Any, graph: Artifact, source: Artifact) -> None:
    with pytest.raises(PipelineError, match="refuses these parameters") as refused:
        bench.run(OlivePass, graph, type="OrtTransformersOptimization", float16=True)
    assert "does not support float16" in str(refused.value.hint)
    with pytest.raises(PipelineError, match="gave the model back untouched") as untouched:
        bench.run(OlivePass, graph, type="OrtTransformersOptimization", model_type="nonsense")
    assert "Unsupported model type" in str(untouched.value.hint)
    with pytest.raises(PipelineError, match="Olive's Gptq failed: AssertionError: in_features 64 must be divisible"):
        bench.run(OlivePass, source, type="Gptq", group_size=48, **CALIBRATED)


@pytest.fixture
def guarded(tmp_path: Path) -> dict[str, str]:
    """An environment with a home and a temporary folder of its own, in which every connection is noted and fails."""
    for name in ("home", "work", "tmp", "guard"):
        (tmp_path / name).mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(
        "import socket\n"
        "def refused(self, address):\n"
        f"    open({str(tmp_path / 'connections')!r}, 'a').write(repr(address) + '\\n')\n"
        "    raise OSError('no network here')\n"
        "socket.socket.connect = refused\n"
    )
    kept = {key: value for key, value in os.environ.items() if key not in {"CI", "XDG_CACHE_HOME"}}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "PIPELINE_STORE": str(tmp_path / "store"),
        "PYTHONPATH": str(tmp_path / "guard"),
        "TMPDIR": str(tmp_path / "tmp"),
    }


@pytest.mark.slow
def test_the_shipped_recipe_runs_sends_nothing_leaves_nothing_and_says_broken_of_hqq(
    tmp_path: Path,
    guarded: dict[str, str],
    probed_store: Callable[[Path], Store],
    monkeypatch: pytest.MonkeyPatch,
    measured_briefly: None,
) -> None:
    store = probed_store(tmp_path / "store")
    command = [sys.executable, "-m", "pipeline", "run", "olive-llama2-cpu", "--no-measure"]
    for narrowed in (["--until", "export_onnx"], []):
        before = sorted((tmp_path / "tmp").iterdir())  # after the first, what torch's exporter leaves there
        done = subprocess.run(
            [*command, *narrowed], cwd=tmp_path / "work", env=guarded, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "connections").exists()
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"runs"}
    assert [p for p in (tmp_path / "home").rglob("*") if "olive" in p.name.lower() or p.name == "deviceid"] == []
    assert sorted((tmp_path / "tmp").iterdir()) == before

    latest = tmp_path / "work" / "runs" / "olive-llama2-cpu" / "latest" / "report.json"
    effects = {s["name"]: s["effect"] for s in json.loads(latest.read_text())["stages"]}
    for name in ("olive_rtn", "olive_kquant", "olive_hqq", "olive_int8", "int4", "int8"):
        assert effects[name]["weights_quantized"] == [36, 36], name

    told = ["evaluate.budget_s=1", "evaluate.quality.tokens=2000", "gates=[]"]
    told += ["evaluate.workload.prompt_lengths=[16]", "evaluate.workload.new_tokens=8"]
    told += ["passes.export_onnx.measure=false", "passes.optimized.measure=false"]
    strict = load_recipe("olive-llama2-cpu", [*told, "passes.olive_hqq.allow_broken=false"])
    result = run(strict, store=store, only="olive_hqq", runs=tmp_path / "runs")
    hqq = next(stage for stage in result.report.stages if stage.name == "olive_hqq")
    assert hqq.status == "cached"
    assert hqq.quality is not None
    assert hqq.quality.vs_baseline is not None
    assert hqq.quality.vs_baseline.verdict == "broken"
    assert result.exit_code == 1


# --- before anything runs ---------------------------------------------------------------------------------------------


def plan(text: str, store: Store) -> Plan:
    head = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\npasses:\n  - pass: export_onnx\n"
    recipe = recipe_from_text(head + text, file="r.yaml", folder=Path())
    return plan_recipe(recipe, store=store)


@pytest.mark.parametrize(
    ("entry", "place", "words"),
    [
        ("type: OnnxPeepholeOptimiser", "r.yaml:6:19", "did you mean 'OnnxPeepholeOptimizer'?"),
        ("type: OnnxHqqQuantization, block_sise: 3", "r.yaml:6:46", "did you mean 'block_size'?"),
        ("type: OnnxHqqQuantization, block_size: '3'", "r.yaml:6:46", "valid integer"),
        ("type: OnnxHqqQuantization, accuracy_level: 9", "r.yaml:6:46", "should be 0, 1, 2, 3 or 4"),
        ("type: GraphSurgeries", "r.yaml:6:5", "'surgeries' is missing"),
        ("type: OnnxStaticQuantization, data_config: {name: x}", "r.yaml:6:49", "calibration text"),
        ("type: OnnxPeepholeOptimizer, calibration_samples: 3", "r.yaml:6:48", "does not calibrate"),
        ("type: OnnxPeepholeOptimizer, task: text-generation", "r.yaml:6:48", "takes a graph"),
        ("type: OpenVINOConversion", "r.yaml:6:19", "OpenVINO's format"),
        ("type: OnnxConversion, user_script: x.py", "r.yaml:6:41", "Python code"),
        ("block_size: 3", "r.yaml:6:5", "the key 'type' is missing"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(store: Store, entry: str, place: str, words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        plan(f"  - {{pass: olive, {entry}}}\n", store)
    assert words in str(refused.value)
    assert str(refused.value).startswith(place)


def test_formats_follow_the_type(store: Store) -> None:
    with pytest.raises(RecipeError, match="takes torch, and the stage 'export_onnx' yields onnx"):
        plan("  - {pass: olive, type: QuaRot}\n", store)
    planned = plan("  - {pass: olive, type: QuaRot, after: source}\n", store).stage("olive")
    assert planned.produces == "torch"
    assert set(planned.facets) == {"seed", "profile.device"}
    assert planned.ingredients["libraries"]["olive-ai"] == catalogue.olive_version()
    gptq = plan("  - {pass: olive, type: Gptq, after: source}\n", store).stage("olive")
    assert "calibration_text" in gptq.facets


def test_a_missing_package_is_told_by_the_plan(store: Store) -> None:
    made = plan("  - {pass: olive, type: OnnxBnb4Quantization}\n", store)
    if not catalogue.olive_types()["OnnxBnb4Quantization"].lacking:
        pytest.skip("bitsandbytes is installed")
    assert made.stage("olive").status == "cannot run"
    assert "bitsandbytes" in made.stage("olive").reason
    assert "pip install" in made.stage("olive").reason


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_the_catalogue_lists_all_of_olives_passes_and_what_they_need() -> None:
    found = {entry.name: entry for entry in further_passes("olive")}
    if catalogue.olive_version() == "0.13.0":
        assert len(found) == 81
    assert found["OnnxPeepholeOptimizer"].runs_here
    assert (found["Gptq"].takes, found["Gptq"].yields) == ("torch", "torch")
    assert (found["OnnxConversion"].takes, found["OnnxConversion"].yields) == ("torch", "onnx")
    assert "OpenVINO" in found["OpenVINOConversion"].needs
    assert all(entry.runs_here != bool(entry.needs) for entry in found.values())
    assert catalogue.UNFIT.keys() <= found.keys()
    assert catalogue.FURTHER_PACKAGES.keys() | catalogue.GPU_ONLY | catalogue.EXPORTS <= found.keys()


@pytest.mark.slow
def test_the_table_of_parameters_is_what_olive_says() -> None:
    """And every pass that the catalogue calls fit to run here can be imported."""
    answer = parameters.ask_olive()
    assert set(answer["types"]) == set(catalogue.olive_types())
    for name, told in answer["types"].items():
        if catalogue.olive_types()[name].lacking == "":
            assert told.get("parameters") == parameters.parameters_of(name), name
    own = {"type", "task", *CALIBRATION}
    assert not [name for name, told in answer["types"].items() if own & told.get("parameters", {}).keys()]


def test_another_version_is_asked_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version without a table: here, one that is not installed, whose answer is that of the installed one."""
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path))
    asked: list[int] = []

    def ask() -> dict[str, Any]:
        asked.append(1)
        return {"types": {"New": {"parameters": {"size": {"schema": {"type": "integer"}, "required": True}}}}}

    monkeypatch.setattr(parameters, "ask_olive", ask)
    parameters._table.cache_clear()
    assert set(parameters._table("99.0")) == {"New"}
    parameters._table.cache_clear()
    assert set(parameters._table("99.0")) == {"New"}
    assert len(asked) == 1
    assert json.loads((tmp_path / "olive" / "parameters-99.0.json").read_text()).keys() == {"New"}
    parameters._table.cache_clear()
