"""`pipeline init`: a recipe for any model that `plan` accepts as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, load, save
from safetensors.numpy import save_file

from pipeline.plugin import Registry
from pipeline.recipe import load_recipe
from pipeline.recipe.json_schema import recipe_json_schema
from pipeline.starter import ModelFacts, recipe_name, starter_recipe
from pipeline.store import Store

Cli = Callable[..., Any]


def save_checkpoint(folder: Path, *, positions: int = 256, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": positions,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"model.layers.{i}.a": np.zeros((4, 4), np.float32) for i in range(2)}
    save_file({"model.embed_tokens.weight": np.zeros((8, 4), np.float32), **weights}, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def save_graph(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = [("key", "k"), ("value", "v")]
    inputs = [value("input_ids", TensorProto.INT64, ["b", "s"])]
    inputs += [value(f"past_key_values.0.{n}", TensorProto.FLOAT, ["b", 2, "p", 4]) for n, _ in cache]
    outputs = [value("logits", TensorProto.FLOAT, ["b", "s", 32])]
    outputs += [value(f"present.0.{n}", TensorProto.FLOAT, ["b", 2, "t", 4]) for n, _ in cache]
    save(helper.make_model(helper.make_graph([], "g", inputs, outputs)), path)
    (path.parent / "config.json").write_text('{"max_position_embeddings": 100}')
    return path


def planned(cli: Cli, file: Path | str) -> dict[str, Any]:
    done = cli("plan", file, "--json")
    assert done.code == 0, done.err
    plan: dict[str, Any] = json.loads(done.out)
    return plan


@pytest.mark.usefixtures("store")
def test_a_built_in_model(cli: Cli) -> None:
    done = cli("init", "llama2-tiny")
    assert done.code == 0, done.err
    assert "pipeline plan llama2-tiny.yaml" in done.out
    assert "pipeline run llama2-tiny.yaml" in done.out
    text = Path("llama2-tiny.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert "5.87 million parameters, 5 layers, 11.7 MB of bfloat16 weights, up to 1024 positions" in text
    plan = planned(cli, "llama2-tiny.yaml")
    assert [s["name"] for s in plan["stages"]] == ["source", "export_onnx", "int8", "int4"]
    assert [s["parent"] for s in plan["stages"]] == [None, "source", "export_onnx", "export_onnx"]


@pytest.mark.usefixtures("store")
def test_the_schema_beside_it_accepts_it(cli: Cli) -> None:
    cli("init", "llama2-tiny")
    schema = json.loads(Path("recipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(Path("llama2-tiny.yaml").read_text()), schema)
    assert schema == recipe_json_schema(Registry())


@pytest.mark.usefixtures("store")
def test_a_schema_that_is_there_is_kept(cli: Cli) -> None:
    Path("recipe.schema.json").write_text("{}")
    cli("init", "llama2-tiny")
    assert Path("recipe.schema.json").read_text() == "{}"


@pytest.mark.usefixtures("store")
def test_a_folder_and_a_workload_that_fits_it(cli: Cli, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "work" / "models" / "My Model", positions=40)
    done = cli("init", "models/My Model")
    assert done.code == 0, done.err
    recipe = load_recipe("my-model.yaml")
    assert recipe.model.path == "models/My Model"
    assert recipe.evaluate.workload.prompt_lengths == [20]
    assert recipe.evaluate.workload.new_tokens == 20
    assert recipe.evaluate.quality.window == 40
    planned(cli, "my-model.yaml")
    outside = cli("init", folder, "--output", tmp_path / "elsewhere.yaml")
    assert outside.code == 0
    assert load_recipe(tmp_path / "elsewhere.yaml").model.path == "work/models/My Model"


@pytest.mark.usefixtures("store")
def test_an_onnx_file_needs_no_export(cli: Cli, tmp_path: Path) -> None:
    save_graph(tmp_path / "work" / "tiny" / "onnx" / "model.onnx")
    done = cli("init", "tiny/onnx/model.onnx")
    assert done.code == 0, done.err
    assert "no tokenizer.json" in done.out
    recipe = load_recipe("tiny.yaml")
    assert recipe.model.onnx == "tiny/onnx/model.onnx"
    assert [s.pass_name for s in recipe.stages] == ["quantize_weights", "quantize_weights"]
    assert [s.parent for s in recipe.stages] == ["source", "source"]
    assert recipe.gates == []
    assert [s["produces"] for s in planned(cli, "tiny.yaml")["stages"]] == ["onnx", "onnx", "onnx"]


@pytest.mark.usefixtures("store")
def test_a_graph_that_is_quantized_already_is_not_quantized_again(cli: Cli, tmp_path: Path) -> None:
    path = save_graph(tmp_path / "work" / "tiny" / "model.onnx")
    model = load(path)
    model.graph.node.append(helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft"))
    save(model, path)
    assert cli("init", "tiny").code == 0
    text = Path("tiny.yaml").read_text()
    assert "Its weights are quantized already" in text
    assert load_recipe("tiny.yaml").stages == []
    planned(cli, "tiny.yaml")


@pytest.mark.usefixtures("store")
def test_a_folder_that_holds_one_graph_and_nothing_else_is_that_graph(cli: Cli, tmp_path: Path) -> None:
    save_graph(tmp_path / "work" / "tiny" / "model.onnx")
    assert cli("init", "tiny").code == 0
    assert load_recipe("tiny.yaml").model.onnx == "tiny/model.onnx"


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "name", ["a: b", "- x", "#hash", "{curly}", "it's", 'quo"te', "null", "1.5", "ünï çødé", "*star", "new\nname: x"]
)
def test_odd_folder_names_are_kept_as_they_are(name: str, cli: Cli, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "work" / name)
    done = cli("init", f"./{name}", "--output", "out.yaml")
    assert done.code == 0, done.err
    recipe = load_recipe("out.yaml")
    assert recipe.model.path == name
    assert recipe.name == recipe_name(ModelFacts(kind="path", name=name))
    planned(cli, "out.yaml")


@pytest.mark.usefixtures("store")
def test_a_recipe_is_not_overwritten_unasked(cli: Cli) -> None:
    Path("llama2-tiny.yaml").write_text("mine")
    done = cli("init", "llama2-tiny")
    assert done.code == 2
    assert "llama2-tiny.yaml is there already" in done.err
    assert "--force overwrites it" in done.err
    assert Path("llama2-tiny.yaml").read_text() == "mine"
    assert not Path("recipe.schema.json").exists()
    assert cli("init", "llama2-tiny", "--force").code == 0
    assert Path("llama2-tiny.yaml").read_text() != "mine"


@pytest.mark.usefixtures("store")
def test_a_profile_is_checked_and_written(cli: Cli) -> None:
    done = cli("init", "llama2-tiny", "--hardware", "i7-1165g8")
    assert done.code == 2
    assert "did you mean 'i7-1165g7'?" in done.err
    assert cli("init", "llama2-tiny", "--hardware", "i7-1165g7").code == 0
    assert load_recipe("llama2-tiny.yaml").hardware == "i7-1165g7"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("lama2-tiny", "did you mean 'llama2-tiny'?"),
        ("./nowhere", "is no folder, no .onnx file"),
        ("nowhere.onnx", "there is no file"),
        ("notes.txt", "is neither a model folder nor an .onnx file"),
        ("empty", "holds no config.json"),
    ],
)
def test_what_is_no_model_is_told(given: str, why: str, cli: Cli) -> None:
    Path("notes.txt").write_text("")
    Path("empty").mkdir()
    done = cli("init", given)
    assert done.code == 2
    assert why in done.err
    assert not list(Path().glob("*.yaml"))


def test_a_place_that_cannot_be_written_is_told(cli: Cli) -> None:
    Path("folder").mkdir()
    assert "is a folder" in cli("init", "llama2-tiny", "--output", "folder").err
    assert "is not there" in cli("init", "llama2-tiny", "--output", "no/where.yaml").err


def test_a_hub_model_that_cannot_be_reached_ends_with_4(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("cache").absolute()))
    done = cli("init", "someone/some-model")
    assert done.code == 4
    assert "the hub cannot be reached" in done.err


def test_a_hub_model_that_is_not_downloaded_is_described_by_its_config() -> None:
    facts = ModelFacts(kind="huggingface", name="someone/Some.Model", layers=3, max_length=512, downloaded=False)
    text = starter_recipe(facts, name=recipe_name(facts), hardware="local", registry=Registry())
    assert "# someone/Some.Model: 3 layers, up to 512 positions, not downloaded yet: `pipeline run` does." in text
    data = yaml.safe_load(text)
    assert data["name"] == "some.model"
    assert data["model"] == {"huggingface": "someone/Some.Model"}


def test_other_passes_are_named_and_no_line_is_long(cli: Cli) -> None:
    cli("init", "llama2-tiny")
    text = Path("llama2-tiny.yaml").read_text()
    others = set(Registry().names()) - {"export_onnx", "quantize_weights"}
    assert all(f"# - pass: {name} " in text for name in others)
    assert max(map(len, text.split("\n"))) <= 120


@pytest.mark.usefixtures("store")
def test_it_imports_no_heavy_library(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['pipeline', 'init', 'llama2-tiny']\nfrom pipeline.cli import main\n"
    code += (
        "try:\n    main()\nexcept SystemExit: print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.usefixtures("measured_briefly")
def test_a_model_without_a_tokenizer_is_timed_all_the_same(
    cli: Cli, tmp_path: Path, probed_store: Callable[[Path], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(probed_store(tmp_path / "store").root))
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=48))
    model.save_pretrained(tmp_path / "work" / "tiny")
    assert "no tokenizer.json" in cli("init", "tiny").out
    small = ["evaluate.budget_s=1", "passes=[]", "export=null", "evaluate.workload.prompt_lengths=[8]"]
    small += ["evaluate.workload.new_tokens=4"]
    done = cli("run", "tiny.yaml", *(word for s in small for word in ("--set", s)), "--json")
    assert done.code == 3
    report = json.loads(done.out)
    stage = report["stages"][0]
    assert stage["status"] == "unmeasured"
    assert "no tokenizer.json" in stage["reason"]
    assert {p["kind"] for p in stage["speed"]} == {"prefill", "decode"}
    assert any("no tokenizer.json" in note for note in report["notes"])
