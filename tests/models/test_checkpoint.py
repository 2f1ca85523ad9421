"""Checkpoints as transformers saves them, from the folder to the runner; and those that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import HostError, PipelineError, RecipeError
from pipeline.models import find_source, source_artifact
from pipeline.models.hub import hub_config
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.torch import TorchRunner
from pipeline.store import Store

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}

Save = Callable[..., Path]


@pytest.fixture
def save_llama(tmp_path: Path) -> Save:
    def save(name: str = "model", *, tied: bool = False, **saving: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.3))
        model.save_pretrained(tmp_path / name, **saving)
        return tmp_path / name

    return save


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits_by_transformers(folder: Path, tokens: list[list[int]]) -> np.ndarray:
    import torch
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        logits: np.ndarray = LlamaForCausalLM.from_pretrained(folder)(torch.tensor(tokens)).logits[:, -1].numpy()
    return logits


def complaint(folder: Path, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        find_source("path", str(folder), relative_to=Path(), **options)
    return str(caught.value)


def runner_of(folder: Path, store: Store) -> TorchRunner:
    artifact = source_artifact(find_source("path", str(folder), relative_to=Path()), store)
    TorchRunner.import_libraries(artifact)
    return TorchRunner(artifact, ExecutionSpec())


def test_a_sharded_checkpoint_runs(save_llama: Save, store: Store) -> None:
    folder = save_llama(max_shard_size="20KB")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 2
    source = find_source("path", str(folder), relative_to=Path())
    assert list(source.weights) == shards
    runner = runner_of(folder, store)
    expected = logits_by_transformers(folder, [[1, 2, 3]])
    np.testing.assert_allclose(runner.prefill([[1, 2, 3]]), expected, atol=1e-5)


def test_a_checkpoint_whose_head_is_its_embedding_runs(save_llama: Save, store: Store) -> None:
    folder = save_llama(tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    expected = logits_by_transformers(folder, [[1, 2, 3]])
    np.testing.assert_allclose(runner_of(folder, store).prefill([[1, 2, 3]]), expected, atol=1e-5)


def test_a_missing_shard_is_named_with_and_without_an_index(save_llama: Save) -> None:
    folder = save_llama(max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    assert f"lacks 1 of {len(shards)} weight files: {shards[1].name}" in complaint(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert f"lacks 1 of {len(shards)} weight files: {shards[1].name}" in complaint(folder)


def test_a_tensor_that_no_shard_holds_is_named_though_all_shards_are_there(save_llama: Save) -> None:
    folder = save_llama(max_shard_size="20KB")
    told = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / told["model.norm.weight"]
    save_file({k: v for k, v in load_file(shard).items() if k != "model.norm.weight"}, shard)
    said = complaint(folder)
    assert f"lists {len(told)} tensors, of which 1 are missing: {shard.name} holds no 'model.norm.weight'" in said


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_hidden_layers": 3}, "describes 3 layers and the weights hold 2; layer 2 is missing"),
        ({"num_hidden_layers": 1}, "describes 1 layers and the weights hold 2"),
        ({"vocab_size": 65}, "config.json says vocab_size 65 and model.embed_tokens.weight has 64 rows"),
    ],
)
def test_a_config_of_another_model_is_refused_before_anything_runs(
    changes: dict[str, Any], why: str, save_llama: Save
) -> None:
    folder = save_llama()
    edit_config(folder, **changes)
    assert why in complaint(folder)


def test_layers_that_predict_further_tokens_are_no_disagreement(save_llama: Save) -> None:
    folder = save_llama()
    edit_config(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    assert find_source("path", str(folder), relative_to=Path()).max_length == 48


def test_wrong_shapes_are_told_before_the_weights_are_loaded(save_llama: Save, store: Store) -> None:
    folder = save_llama()
    edit_config(folder, intermediate_size=40)
    artifact = source_artifact(find_source("path", str(folder), relative_to=Path()), store)
    with pytest.raises(PipelineError, match=r"describes model\.layers\.0\.mlp\.gate_proj\.weight as \[40, 32\]"):
        TorchRunner.import_libraries(artifact)


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, CLIPConfig, T5Config

    for config, architecture in ((BertConfig(), "BertModel"), (T5Config(), "T5ForConditionalGeneration")):
        config.architectures = [architecture]
        config.save_pretrained(tmp_path / architecture)
        assert f"{architecture} is not a causal language model" in complaint(tmp_path / architecture)
    T5Config().save_pretrained(tmp_path / "t5")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    assert "the architecture 't5' is not a causal language model" in complaint(tmp_path / "t5")
    assert "the architecture 'clip' is not a causal language model" in complaint(tmp_path / "clip")


def test_an_unknown_architecture_is_answered_with_the_nearest(save_llama: Save) -> None:
    folder = save_llama()
    edit_config(folder, model_type="lama")
    message = complaint(folder)
    assert "the installed transformers has no architecture 'lama'" in message
    assert "did you mean 'llama'?" in message


def test_a_folder_of_onnx_files_is_told_how_to_give_them(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "model: {onnx: FILE}" in complaint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model: {onnx: model.onnx}" in complaint(tmp_path)
    assert "model: {onnx: FILE}" in complaint(tmp_path / "model.onnx")


def test_a_config_that_names_positions_otherwise_is_understood(checkpoint: Path, tmp_path: Path, store: Store) -> None:
    config = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    source = find_source("path", str(tmp_path), relative_to=Path())
    assert source.max_length == 40
    assert source_artifact(source, store).interface.max_length == 40


# The hub


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub_cache(tmp_path: Path, save_llama: Save, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two revisions of one model, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, (name, commit) in enumerate(COMMITS.items()):
        (home / "refs" / name).write_text(commit)
        folder = save_llama(f"saved-{name}")
        edit_config(folder, max_position_embeddings=100 + i)
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in sorted(folder.iterdir()):
            blob = home / "blobs" / f"{name}-{file.name}"
            file.rename(blob)
            (snapshot / file.name).symlink_to(blob)
    return home


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(("revision", "positions"), [(None, 100), ("main", 100), ("v1", 101), ("b" * 40, 101)])
def test_a_revision_is_taken_from_the_cache(revision: str | None, positions: int, store: Store) -> None:
    source = find_source("huggingface", "someone/tiny", relative_to=Path(), revision=revision, download=False)
    assert source.max_length == positions
    assert source.revision == COMMITS["v1" if positions == 101 else "main"]
    artifact = source_artifact(source, store)
    assert artifact.tensor("model.norm.weight").shape == (32,)


@pytest.mark.usefixtures("hub_cache")
def test_a_revision_that_is_not_in_the_cache_is_named() -> None:
    with pytest.raises(HostError, match="'someone/tiny' at v9 is not in the local cache"):
        find_source("huggingface", "someone/tiny", relative_to=Path(), revision="v9", download=False)
    with pytest.raises(HostError, match="the hub cannot be reached"):
        hub_config("someone/other")


def test_a_download_that_was_interrupted_is_not_taken_for_the_model(hub_cache: Path) -> None:
    (hub_cache / "snapshots" / COMMITS["main"] / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="holds no weights"):
        find_source("huggingface", "someone/tiny", relative_to=Path(), download=False)
    with pytest.raises(RecipeError, match="has no whole set of safetensors") as caught:
        find_source("huggingface", "someone/tiny", relative_to=Path(), download=True)
    assert "its download was cut short" in str(caught.value)
