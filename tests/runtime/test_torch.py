from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.runtime import ExecutionSpec, load_runner
from pipeline.runtime.torch import TorchRunner

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 20))
Prompt = Callable[[TorchRunner], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Artifact:
    return tiny_models.torch_artifact(checkpoint)


@pytest.fixture
def runner(artifact: Artifact) -> TorchRunner:
    return TorchRunner(artifact, ExecutionSpec())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    return tiny_models.llama_logits(checkpoint, TOKENS)


def test_the_entry_point_of_torch_loads_this_runner(artifact: Artifact) -> None:
    assert isinstance(load_runner(artifact, ExecutionSpec()), TorchRunner)


def test_prefill_gives_the_logits_of_the_last_position(runner: TorchRunner, expected: np.ndarray) -> None:
    np.testing.assert_allclose(runner.prefill(TOKENS), expected[:, -1], atol=1e-5)


def test_decode_continues_the_prompt_token_by_token(runner: TorchRunner, expected: np.ndarray) -> None:
    runner.prefill(TOKENS[:, :12])
    for position in range(12, 20):
        step = runner.decode(TOKENS[:, position : position + 1])
        np.testing.assert_allclose(step, expected[:, position], atol=1e-5)


def test_score_gives_the_logits_of_all_positions(runner: TorchRunner, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.concatenate(list(runner.score(TOKENS)), axis=1), expected, atol=1e-5)


def test_score_in_small_chunks_gives_the_same_logits(
    runner: TorchRunner, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runtime.sequence.SCORE_BYTES", 7 * 2 * 4 * tiny_models.VOCABULARY)
    chunks = list(runner.score(TOKENS))
    assert [chunk.shape[1] for chunk in chunks] == [7, 7, 6]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, atol=1e-5)


def test_a_second_prompt_does_not_see_the_first(runner: TorchRunner) -> None:
    first = runner.prefill(TOKENS)
    runner.decode(TOKENS[:, :1])
    np.testing.assert_array_equal(runner.prefill(TOKENS), first)


def test_logits_are_float32_when_the_weights_are_bfloat16(tmp_path: Path) -> None:
    artifact = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "half", dtype="bfloat16"))
    assert TorchRunner(artifact, ExecutionSpec()).prefill(TOKENS).dtype == np.float32


def test_the_dtype_of_the_execution_block_is_what_the_model_computes_in(checkpoint: Path, expected: np.ndarray) -> None:
    half = TorchRunner(tiny_models.torch_artifact(checkpoint, dtype="bfloat16"), ExecutionSpec()).prefill(TOKENS)
    assert not np.allclose(half, expected[:, -1], atol=1e-5)
    np.testing.assert_allclose(half, expected[:, -1], atol=0.5)


def test_tied_weights_are_tied(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "tied", tied=True)
    runner = TorchRunner(tiny_models.torch_artifact(folder), ExecutionSpec())
    np.testing.assert_allclose(runner.prefill(TOKENS), tiny_models.llama_logits(folder, TOKENS)[:, -1], atol=1e-5)


def test_weights_under_another_name_are_found(checkpoint: Path, expected: np.ndarray) -> None:
    artifact = tiny_models.torch_artifact(checkpoint, weights_name="part-1.safetensors")
    np.testing.assert_allclose(TorchRunner(artifact, ExecutionSpec()).prefill(TOKENS), expected[:, -1], atol=1e-5)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny_models.save_llama(tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        TorchRunner(tiny_models.torch_artifact(folder), ExecutionSpec())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: r.prefill(np.zeros((1, 49), int)), "the prompt has 49 tokens and the model takes at most 48"),
        (lambda r: r.decode(TOKENS[:, :1]), "0 tokens in the cache"),
        (lambda r: (r.prefill(TOKENS), r.decode(TOKENS[:1, :1])), "batch 1 with a cache of batch 2"),
        (lambda r: (r.prefill(np.zeros((1, 48), int)), r.decode(np.zeros((1, 1), int))), "position 49 .* 48"),
        (lambda r: r.prefill(np.zeros((1, 0), int)), r"not \[1, 0\]"),
        (lambda r: r.decode(TOKENS), r"not \[2, 20\]"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_with_both_numbers(runner: TorchRunner, act: Prompt, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        act(runner)


def test_unknown_transforms_are_refused_rather_than_left_out(artifact: Artifact) -> None:
    manifest = artifact.manifest.model_copy(update={"transforms": ({"transform": "int8_linear"},)})
    with pytest.raises(PipelineError, match="int8_linear"):
        TorchRunner(Artifact(manifest, artifact.blobs), ExecutionSpec())


def test_unchanged_weights_stay_mapped(tmp_path: Path) -> None:
    """Anonymous memory grows by far less than the weights' 32 MB when they are loaded and run."""
    import os

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.measure.memory import tree_memory

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    warm = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "warm"))
    TorchRunner(warm, ExecutionSpec()).prefill(TOKENS)
    torch.set_num_threads(1)
    artifact = tiny_models.torch_artifact(tmp_path)
    assert artifact.manifest.weights_bytes > 32e6
    before = tree_memory(os.getpid()).memory_bytes
    runner = TorchRunner(artifact, ExecutionSpec())
    runner.prefill(TOKENS[:1, :4])
    assert tree_memory(os.getpid()).memory_bytes - before < 16e6
