"""A model's own Python files run where the recipe says so, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import load_model
from pipeline.errors import PipelineError, RecipeError
from pipeline.models import find_source, source_artifact
from pipeline.recipe.load import recipe_from_text
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.torch import TorchRunner
from pipeline.store import Store
from pipeline.store.folder import materialize

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
import os
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

if "OWN_CODE_RAN" in os.environ:
    Path(os.environ["OWN_CODE_RAN"]).touch()

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama that calls itself something that transformers does not know."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils
    from transformers.utils import hub

    for module in (dynamic_module_utils, hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("OWN_CODE_RAN", str(tmp_path / "ran"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=48, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    data = json.loads(path.read_text())
    data |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    path.write_text(json.dumps(data))
    (tmp_path / "own" / "configuration_own.py").write_text(CONFIGURATION)
    (tmp_path / "own" / "modeling_own.py").write_text(MODELING)
    return tmp_path / "own"


def complaint(folder: Path, *, trust: bool) -> str:
    with pytest.raises(RecipeError) as caught:
        find_source("path", str(folder), relative_to=Path(), trust_remote_code=trust)
    return str(caught.value)


def test_it_is_refused_with_the_key_to_set(folder: Path) -> None:
    message = complaint(folder, trust=False)
    assert "transformers has no architecture 'own_llama'; the model brings Python code of its own" in message
    assert "`trust_remote_code: true` under `model:` runs them" in message


def test_where_it_is_trusted_it_runs(folder: Path, store: Store) -> None:
    source = find_source("path", str(folder), relative_to=Path(), trust_remote_code=True)
    artifact = source_artifact(source, store)
    assert {"configuration_own.py", "modeling_own.py"} <= set(artifact.manifest.files)
    assert not (folder.parent / "ran").exists()
    TorchRunner.import_libraries(artifact)
    runner = TorchRunner(artifact, ExecutionSpec())
    assert (folder.parent / "ran").exists()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(
        folder, config=LlamaConfig(**json.loads((folder / "config.json").read_text()))
    )
    with torch.inference_mode():
        expected = plain(torch.tensor([[1, 2, 3]])).logits[:, -1].numpy()
    np.testing.assert_allclose(runner.prefill([[1, 2, 3]]), expected, atol=1e-5)


def test_an_artifact_that_does_not_say_so_runs_no_code(folder: Path, store: Store) -> None:
    source = find_source("path", str(folder), relative_to=Path(), trust_remote_code=True)
    artifact = source_artifact(source, store)
    quiet = artifact.manifest.model_copy(update={"execution": {"dtype": "float32"}})
    with pytest.raises(PipelineError, match=r"transformers cannot read config\.json"):
        TorchRunner.import_libraries(type(artifact)(quiet, artifact.blobs))
    assert not (folder.parent / "ran").exists()


def test_a_folder_that_was_written_out_is_not_trusted_for_that(folder: Path, store: Store, tmp_path: Path) -> None:
    source = find_source("path", str(folder), relative_to=Path(), trust_remote_code=True)
    materialize(source_artifact(source, store), tmp_path / "copy")
    with pytest.raises(PipelineError, match="runs Python files that it brings"):
        load_model(tmp_path / "copy")
    assert not (tmp_path / "ran").exists()
    assert load_model(tmp_path / "copy", threads=1, trust_remote_code=True).vocab_size == 64


@pytest.mark.slow
def test_it_is_exported_and_checked(folder: Path, store: Store, tmp_path: Path) -> None:
    from passes.export.export_onnx import ExportOnnx
    from pipeline.plugin import PassContext
    from pipeline.store.writer import OutputWriter

    artifact = source_artifact(find_source("path", str(folder), relative_to=Path(), trust_remote_code=True), store)
    context = PassContext(output=OutputWriter(tmp_path / "out"))
    made = ExportOnnx().run(artifact, ExportOnnx.Params(), context)
    assert made.format == "onnx"
    assert "trust_remote_code" not in made.manifest.execution


def test_its_files_are_part_of_the_artifact(folder: Path, store: Store) -> None:
    def digest() -> str:
        source = find_source("path", str(folder), relative_to=Path(), trust_remote_code=True)
        return source_artifact(source, store).digest

    before = digest()
    with (folder / "modeling_own.py").open("a") as file:
        file.write("# changed\n")
    assert digest() != before


def test_code_that_is_missing_or_elsewhere_is_told(folder: Path) -> None:
    (folder / "modeling_own.py").unlink()
    assert "lacks modeling_own.py, which auto_map names for AutoModelForCausalLM" in complaint(folder, trust=True)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling_own.OwnForCausalLM"
    path.write_text(json.dumps(data))
    assert "lies in another repository, someone/else" in complaint(folder, trust=True)


@pytest.mark.slow
def test_plan_why_and_schema_never_import_it(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "x.yaml"
    text = f"version: 1\nname: x\nmodel: {{path: {folder}, trust_remote_code: true}}\npasses: [{{pass: export_onnx}}]\n"
    recipe.write_text(text + "evaluate: {workload: {prompt_lengths: [8], new_tokens: 8}}\n")
    for verb in (["plan", str(recipe)], ["why", str(recipe), "export_onnx"], ["schema"]):
        command = [sys.executable, "-m", "pipeline", *verb]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_trust_goes_with_files_that_can_hold_code_only() -> None:
    text = "version: 1\nname: x\nmodel: {builtin: llama2-tiny, trust_remote_code: true}\n"
    with pytest.raises(RecipeError, match="trust_remote_code goes with path and huggingface only"):
        recipe_from_text(text, file="x.yaml", folder=Path())
