"""`pipeline import-olive`: a workflow of Olive becomes a recipe that loads; what is lost is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.plugin import Registry
from pipeline.recipe import load_recipe
from pipeline.recipe.parameters import check_parameters

Cli = Callable[..., Any]

WORKFLOW: dict[str, Any] = {
    "input_model": {
        "type": "HfModel",
        "model_path": "meta-llama/Llama-2-7b-hf",
        "task": "text-generation",
        "load_kwargs": {"torch_dtype": "float16", "attn_implementation": "eager"},
    },
    "systems": {
        "local_system": {
            "type": "LocalSystem",
            "accelerators": [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}],
        }
    },
    "evaluators": {"common": {"metrics": []}},
    "data_configs": [{"name": "calibration"}],
    "passes": {
        "conversion": {"type": "OnnxConversion", "target_opset": 20, "use_dynamo_exporter": True},
        "Quant-1": {
            "type": "OnnxBlockWiseRtnQuantization",
            "config": {"block_size": 32, "blok": 3, "accuracy_level": "SEARCHABLE_VALUES"},
        },
        "lora": {"type": "QLoRA"},
        "choice": [{"type": "OnnxKQuantQuantization", "block_size": 16}, {"type": "OnnxHqqQuantization"}],
    },
    "target": "local_system",
    "cache_dir": "cache",
    "search_strategy": False,
    "nonsense": 1,
}


def test_a_workflow_becomes_a_recipe_and_its_losses_are_told(cli: Cli) -> None:
    Path("llama.json").write_text(json.dumps(WORKFLOW))
    done = cli("import-olive", "llama.json")
    assert done.code == 0, done.err
    recipe = load_recipe("llama.yaml")
    check_parameters(recipe, Registry())
    assert (recipe.model.kind, recipe.model.source, recipe.model.dtype) == (
        "huggingface",
        "meta-llama/Llama-2-7b-hf",
        "float16",
    )
    assert recipe.stage_names == ["source", "conversion", "quant_1", "choice"]
    assert recipe.stage("conversion").params == {
        "type": "OnnxConversion",
        "target_opset": 20,
        "use_dynamo_exporter": True,
        "task": "text-generation",
    }
    assert recipe.stage("quant_1").params == {"type": "OnnxBlockWiseRtnQuantization", "block_size": 32}
    assert recipe.stage("choice").params == {"type": "OnnxKQuantQuantization", "block_size": 16}
    lost = [line for line in done.err.splitlines() if line.startswith("not carried over: ")]
    for what in (
        "input_model.load_kwargs.attn_implementation",
        "systems: the device gpu",
        "passes.Quant-1.blok",
        "passes.Quant-1.accuracy_level: SEARCHABLE_VALUES",
        "passes.lora: Olive's QLoRA cannot be a stage",
        "passes.choice: the alternatives after the first of 2",
        "evaluators",
        "data_configs",
        "cache_dir",
        "search_strategy",
        "nonsense",
    ):
        assert any(line.startswith(f"not carried over: {what}") for line in lost), what
    comments = " ".join(line.lstrip("# ") for line in Path("llama.yaml").read_text().splitlines() if line[:1] == "#")
    assert all(" ".join(line.removeprefix("not carried over: ").split()) in comments for line in lost)


def test_a_yaml_workflow_with_an_onnx_file(cli: Cli) -> None:
    Path("models").mkdir()
    Path("w.yml").write_text(
        "input_model: {type: onnxmodel, model_path: models/m.onnx}\n"
        "passes:\n  peephole: {type: OnnxPeepholeOptimizer}\n"
    )
    done = cli("import-olive", "w.yml", "-o", "models/made.yaml")
    assert (done.code, done.err) == (0, "")
    recipe = load_recipe("models/made.yaml")
    assert (recipe.model.kind, recipe.model.source) == ("onnx", "m.onnx")  # from the recipe's folder
    again = cli("import-olive", "w.yml", "-o", "models/made.yaml")
    assert again.code == 2
    assert "is there already" in again.err
    assert cli("import-olive", "w.yml", "-o", "models/made.yaml", "--force").code == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("w.json", "{", "w.json:1:2: this is not JSON"),
        ("w.yaml", "a: [", "this is not YAML"),
        ("w.yaml", "!!python/object/apply:os.system ['true']", "this is not YAML"),
        ("w.json", "[]", "holds no workflow"),
        ("w.json", '{"input_modle": {}, "passes": {}}', "did you mean 'input_modle'?"),
        ("w.json", '{"input_model": {"type": "HfModel"}, "passes": {"a": {"type": "QuaRot"}}}', "no model_path"),
        ("w.json", '{"input_model": {"type": "DiffusersModel", "model_path": "x"}, "passes": {}}', "DiffusersModel"),
        ("w.json", '{"input_model": "a/b", "passes": []}', "passes should be a mapping"),
        ("w.json", '{"input_model": "a/b", "passes": {"a": 3}}', "passes.a should be a mapping"),
        ("w.json", '{"input_model": "a/b", "passes": {"a": {}}}', "passes.a has no type"),
        ("w.json", '{"input_model": "a/b", "passes": {"a": {"type": "QLoRA"}}}', "none of its passes can be a stage"),
    ],
)
def test_what_is_no_workflow_is_refused(cli: Cli, name: str, text: str, words: str) -> None:
    Path(name).write_text(text)
    done = cli("import-olive", name, "-o", "made.yaml")
    assert done.code == 2
    assert words in done.err
    assert not Path("made.yaml").exists()
    assert [p.name for p in Path().iterdir()] == [name]


def test_a_file_that_is_not_there(cli: Cli) -> None:
    done = cli("import-olive", "nothing.json")
    assert done.code == 2
    assert "cannot be read" in done.err


def test_one_of_its_passes_is_shown_with_its_parameters(cli: Cli) -> None:
    code, out, _ = cli("passes", "show", "olive", "--type", "OnnxBlockWiseRtnQuantization", "--json")
    found = json.loads(out)
    assert (code, found["takes"], found["yields"]) == (0, "onnx", "onnx")
    parameters = {p["name"]: p for p in found["parameters"]}
    assert (parameters["block_size"]["type"], parameters["block_size"]["default"]) == ("integer", "128")
    assert "user_script" not in parameters
    code, out, _ = cli("passes", "show", "olive", "--type", "GraphSurgeries")
    assert code == 0
    assert "it can run here" in out
    assert "required" in next(line for line in out.splitlines() if line.startswith("surgeries"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["olive", "--type", "OnnxPeepholeOptimiser"], "did you mean 'OnnxPeepholeOptimizer'?"),
        (["export_onnx", "--type", "X"], "no installed package has a catalogue of passes named 'export_onnx'"),
    ],
)
def test_a_type_that_is_not_there_is_told(cli: Cli, arguments: list[str], told: str) -> None:
    code, out, err = cli("passes", "show", *arguments)
    assert code != 0
    assert told in " ".join((out + err).split())


def test_the_catalogue_is_listed(cli: Cli) -> None:
    done = cli("passes", "list", "--olive")
    assert done.code == 0
    assert "OnnxPeepholeOptimizer" in done.out
    assert "can run here" in done.out
    entries = json.loads(cli("passes", "list", "--olive", "--json").out)
    assert {"name", "takes", "yields", "runs_here", "needs"} == set(entries[0])
    assert json.loads(cli("passes", "list", "--json").out) == json.loads(cli("passes", "--json").out)


def test_a_workflow_is_never_written_over(cli: Cli) -> None:
    text = "input_model: {type: HfModel, model_path: a/b}\npasses: {a: {type: OnnxConversion}}\n"
    Path("flow.yaml").write_text(text)
    done = cli("import-olive", "flow.yaml", "--force")
    assert (done.code, Path("flow-recipe.yaml").is_file()) == (0, True), done.err
    done = cli("import-olive", "flow.yaml", "--force", "-o", "./flow.yaml")
    assert (done.code, "is the workflow itself" in done.err) == (2, True)
    assert Path("flow.yaml").read_text() == text


def test_a_key_that_stands_twice_is_refused(cli: Cli) -> None:
    Path("w.json").write_text('{"input_model": "a/b", "passes": {"a": {"type": "Gptq"}, "a": {"type": "Rtn"}}}')
    done = cli("import-olive", "w.json")
    assert (done.code, "the key 'a' stands twice" in done.err) == (2, True)
