"""Models are found, checked and described without being loaded or copied."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import HostError, PipelineError, RecipeError
from pipeline.models import builtin_names, evaluation_text, find_source, source_artifact
from pipeline.models import source as source_module
from pipeline.models.safetensors import read_header
from pipeline.models.source import Kind, Source, calibration_text, reading_digest
from pipeline.store import Store


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    shutil.copytree(checkpoint, tmp_path / "model")
    return tmp_path / "model"


def complaint(folder: Path, kind: str = "path") -> str:
    with pytest.raises(RecipeError) as caught:
        find_source(kind, str(folder), relative_to=Path())  # type: ignore[arg-type]
    return str(caught.value)


def test_a_folder_becomes_an_artifact_that_references_its_files(checkpoint: Path, store: Store) -> None:
    artifact = source_artifact(find_source("path", str(checkpoint), relative_to=Path()), store)
    assert artifact.format == "torch"
    assert artifact.interface.vocab_size == 8
    assert artifact.interface.max_length == 256
    assert artifact.manifest.execution == {"dtype": "float32"}
    assert artifact.file("model.safetensors") == checkpoint / "model.safetensors"
    np.testing.assert_array_equal(artifact.tensor("a"), np.arange(6).reshape(2, 3))
    assert not store.blobs.exists()


def test_a_relative_path_starts_from_the_recipe(checkpoint: Path) -> None:
    assert find_source("path", checkpoint.name, relative_to=checkpoint.parent).folder == checkpoint


def test_the_data_type_is_the_configs_then_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert find_source("path", str(folder), relative_to=Path()).dtype == "bfloat16"
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert find_source("path", str(folder), relative_to=Path()).dtype == "float32"
    assert find_source("path", str(folder), relative_to=Path(), dtype="float16").dtype == "float16"


def test_what_is_wrong_with_a_folder_is_said(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in complaint(tmp_path / "nowhere")
    assert "is a file, not a folder" in complaint(folder / "config.json")
    (folder / "config.json").write_text("{")
    assert "is not JSON" in complaint(folder)
    (folder / "config.json").write_text("[]")
    assert "is not a JSON object" in complaint(folder)
    (folder / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    assert "BertForMaskedLM is not a causal language model" in complaint(folder)
    (folder / "config.json").unlink()
    assert "holds no config.json" in complaint(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = complaint(folder)
    assert "a pickle that can run code" in message
    assert "save_pretrained" in message
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights" in complaint(folder)


def test_shards_are_taken_from_their_index_and_a_missing_one_is_named(folder: Path, store: Store) -> None:
    save_file({"b": np.ones(2, np.float16)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    artifact = source_artifact(find_source("path", str(folder), relative_to=Path()), store)
    assert artifact.tensor("b").tolist() == [1, 1]
    (folder / "model-2.safetensors").unlink()
    assert "lacks 1 of 2 weight files: model-2.safetensors" in complaint(folder)


def test_an_index_cannot_name_files_elsewhere(folder: Path) -> None:
    index = {"weight_map": {"a": "../../etc/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names a file outside its folder" in complaint(folder)


def test_an_unknown_built_in_model_is_answered_with_the_nearest() -> None:
    assert "did you mean 'llama2-tiny'?" in complaint(Path("lama2-tiny"), "builtin")


def test_a_cut_file_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(PipelineError, match="is cut off: tensor 'a' ends at"):
        read_header(path)
    path.write_bytes(data[:10])
    with pytest.raises(PipelineError, match="not a safetensors file, or is cut off"):
        read_header(path)
    path.write_bytes((8).to_bytes(8, "little") + b"not json")
    with pytest.raises(PipelineError, match="its header is not JSON"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [2]}}',
        '{"a": [1, 2]}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_damaged_header_is_told(header: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(PipelineError, match="entry for tensor 'a' is damaged"):
        read_header(path)


def test_a_hub_model_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HostError, match="hub cannot be reached") as caught:
        find_source("huggingface", "someone/some-model", relative_to=Path())
    assert "model: {path: FOLDER}" in str(caught.value)
    assert caught.value.exit_code == 4


def test_what_is_no_hub_id_is_the_recipes_mistake() -> None:
    assert "is not a hub id" in complaint(Path("a/b/c/d"), "huggingface")


def test_the_built_in_model_is_whole_and_small(store: Store) -> None:
    assert builtin_names() == ["llama2-tiny"]
    source = find_source("builtin", "llama2-tiny", relative_to=Path())
    artifact = source_artifact(source, store)
    weights = artifact.file("model.safetensors")
    assert weights is not None
    assert weights.stat().st_size <= 12_000_000
    assert {ref.dtype for ref in artifact.manifest.components["model"].tensors.values()} == {"bfloat16"}
    card = json.loads((source.folder / "training.json").read_text())
    assert card["held_out_tokens"] >= 20_000
    assert card["held_out_bits_per_byte"] <= 1.75


def test_held_out_and_calibration_text_share_no_paragraph() -> None:
    held_out = set(evaluation_text().read_text().split("\n\n"))
    calibration = set(calibration_text().read_text().split("\n\n"))
    assert not {p for p in held_out & calibration if len(p) >= 40}


def test_json_that_nests_too_deeply_is_told(folder: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(deep)
    assert "nests its values too deeply" in complaint(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors.index.json").write_text(deep)
    assert "is damaged" in complaint(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
    assert "its header nests too deeply" in complaint(folder)


@pytest.mark.parametrize("kind", ["builtin", "path", "huggingface", "onnx", "architecture"])
def test_a_sources_key_holds_the_code_that_writes_its_manifest(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the modules that it names, all that those import of pipeline/models is there, but what only checks."""
    home = Path(source_module.__file__).parent
    named = {*source_module.READERS.get(kind, source_module.TORCH_READERS)}
    writes = {"onnx_file.py", "onnx_header.py", "random_weights.py", "checkpoint.py", "safetensors.py"}
    writers = named - {"source.py"}
    imported = set(
        re.findall(
            r"^from pipeline\.models\.(\w+) import",
            "".join((home / name).read_text() for name in writers),
            re.MULTILINE,
        )
    )
    others = {"safetensors.py"} if kind == "onnx" else set()  # checkpoint.py reads no weights for it
    assert ({f"{name}.py" for name in imported} & writes) - others <= named
    source = Source(kind=kind, name="x", folder=tmp_path, dtype="float32", files=(), max_length=None)
    before = reading_digest(source)
    shutil.copytree(home, tmp_path / "models", ignore=shutil.ignore_patterns("builtin"))
    monkeypatch.setattr(source_module, "__file__", str(tmp_path / "models" / "source.py"))
    assert reading_digest(source) == before
    for name in sorted(named):
        path = tmp_path / "models" / name
        kept = path.read_text()
        path.write_text(kept + "# mended\n")
        assert reading_digest(source) != before, name
        path.write_text(kept)
    assert "checkpoint.py" in named
