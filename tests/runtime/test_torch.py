import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import HostError, PipelineError
from pipeline.hardware.host import find_gpus
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


def test_a_whole_pass_gives_the_logits_of_the_last_position_and_keeps_nothing(
    runner: TorchRunner, expected: np.ndarray
) -> None:
    runner.prefill(TOKENS[:, :12])
    np.testing.assert_allclose(runner.forward(TOKENS), expected[:, -1], atol=1e-5)
    with pytest.raises(PipelineError, match="prefill comes first"):
        runner.decode(TOKENS[:, :1])


def test_a_whole_pass_computes_all_logits_without_a_cache(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    original = runner._model.forward

    def forward(**given: Any) -> Any:
        output = original(**given)
        seen.append({"cache": output.past_key_values, "shape": tuple(output.logits.shape)})
        return output

    monkeypatch.setattr(runner._model, "forward", forward)
    runner.forward(TOKENS)
    assert seen == [{"cache": None, "shape": (2, 20, tiny_models.VOCABULARY)}]


def test_on_a_cpu_there_is_no_peak_of_a_device(runner: TorchRunner) -> None:
    assert runner.device_peak_memory_bytes is None


@pytest.mark.skipif(not find_gpus(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_logits_are_the_same_and_its_memory_is_told(artifact: Artifact, expected: np.ndarray) -> None:
    runner = TorchRunner(artifact, ExecutionSpec(device="cuda"))
    np.testing.assert_allclose(all_logits(runner, 12), expected, atol=1e-3)
    np.testing.assert_allclose(np.concatenate(list(runner.score(TOKENS)), axis=1), expected, atol=1e-3)
    np.testing.assert_allclose(runner.forward(TOKENS), expected[:, -1], atol=1e-3)
    assert runner.device_peak_memory_bytes is not None
    assert artifact.manifest.weights_bytes <= runner.device_peak_memory_bytes < artifact.manifest.weights_bytes + 10**9


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


def with_execution(artifact: Artifact, **execution: Any) -> Artifact:
    changed = {**artifact.manifest.execution, **execution}
    return Artifact(artifact.manifest.model_copy(update={"execution": changed}), artifact.blobs)


def all_logits(runner: TorchRunner, prompt: int) -> np.ndarray:
    """Logits [B, S, V] of TOKENS: of a prompt as it is scored, then token by token."""
    scored = list(runner.score(TOKENS[:, :prompt]))
    last = runner.prefill(TOKENS[:, :prompt])
    np.testing.assert_allclose(last, scored[-1][:, -1], atol=1e-5)
    steps = [runner.decode(TOKENS[:, i : i + 1])[:, None] for i in range(prompt, TOKENS.shape[1])]
    return np.concatenate([*scored, *steps], axis=1)


class TestAStaticCache:
    @pytest.fixture
    def runner(self, artifact: Artifact) -> TorchRunner:
        return TorchRunner(with_execution(artifact, cache="static", max_length=24), ExecutionSpec())

    def test_gives_the_logits_of_one_that_grows(self, runner: TorchRunner, expected: np.ndarray) -> None:
        np.testing.assert_allclose(all_logits(runner, 12), expected, atol=1e-5)

    def test_is_emptied_and_not_allocated_again(self, runner: TorchRunner, expected: np.ndarray) -> None:
        runner.prefill(TOKENS)
        places = [layer.keys.data_ptr() for layer in runner._cache.layers]
        runner.decode(TOKENS[:, :1])
        runner.prefill(TOKENS[:1])  # another batch has one of its own
        np.testing.assert_allclose(runner.prefill(TOKENS), expected[:, -1], atol=1e-5)
        assert [layer.keys.data_ptr() for layer in runner._cache.layers] == places

    def test_holds_as_many_positions_as_the_artifact_says(self, runner: TorchRunner) -> None:
        assert runner.max_length == 24
        runner.prefill(TOKENS)
        assert {layer.keys.shape[2] for layer in runner._cache.layers} == {24}
        with pytest.raises(PipelineError, match="25 tokens and the model takes at most 24"):
            runner.prefill(np.zeros((1, 25), int))

    def test_is_never_longer_than_the_model(self, artifact: Artifact) -> None:
        long = with_execution(artifact, cache="static", max_length=1000)
        assert TorchRunner(long, ExecutionSpec()).max_length == tiny_models.MAX_LENGTH


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ({"compile": {"mode": "fastest"}}, r"execution block: compile\.mode: Input should be 'default'"),
        ({"compile": {"speed": 1}}, r"execution block: compile\.speed: Extra inputs"),
        ({"cache": "paged"}, "execution block: cache"),
    ],
)
def test_an_execution_block_that_the_runner_does_not_know_is_refused(
    artifact: Artifact, execution: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        TorchRunner(with_execution(artifact, **execution), ExecutionSpec())


def test_without_a_compiler_a_compiled_model_does_not_load(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(HostError, match="neither g\\+\\+ nor clang"):
        TorchRunner(with_execution(artifact, compile={}), ExecutionSpec())


def test_what_is_not_compiled_has_nothing_to_compile_or_forget(artifact: Artifact, runner: TorchRunner) -> None:
    runner.compile_shapes(1, 8)
    assert runner.compilations == 0
    assert not TorchRunner.forget_compiled(artifact, ExecutionSpec())


@pytest.fixture(scope="module")
def compiled_store(tmp_path_factory: pytest.TempPathFactory, put_toolchain: Callable[[Path], None]) -> Path:
    store = tmp_path_factory.mktemp("store")
    put_toolchain(store)
    return store


@pytest.fixture(scope="module")
def shallow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, which compiles in half the time of two."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("shallow"), layers=1)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self, compiled_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Nothing compiled in this process; what earlier tests left on disk stays, as it does between processes."""
        import torch

        monkeypatch.setenv("PIPELINE_STORE", str(compiled_store))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_store))  # the runner sets it: put back afterwards
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.fixture
    def static(self, artifact: Artifact) -> Artifact:
        return with_execution(artifact, compile={"fullgraph": True}, cache="static", max_length=32)

    @pytest.fixture
    def shallow(self, shallow_checkpoint: Path) -> Artifact:
        artifact = tiny_models.torch_artifact(shallow_checkpoint)
        return with_execution(artifact, compile={"fullgraph": True}, cache="static", max_length=32)

    def test_gives_the_logits_of_the_uncompiled_model(self, static: Artifact, expected: np.ndarray) -> None:
        runner = TorchRunner(static, ExecutionSpec())
        np.testing.assert_allclose(all_logits(runner, 12), expected, atol=1e-5)
        np.testing.assert_allclose(all_logits(runner, 15), expected, atol=1e-5)  # the cache used again

    def test_prompts_of_all_lengths_share_one_graph_and_single_tokens_another(self, shallow: Artifact) -> None:
        runner = TorchRunner(shallow, ExecutionSpec())
        before = runner.compilations
        runner.compile_shapes(1, 8)
        assert runner.compilations == before + 2
        for length in (8, 2, 13, 19):
            list(runner.score(TOKENS[:1, :length]))
            runner.prefill(TOKENS[:1, :length])
            for position in range(6):
                runner.decode(TOKENS[:1, position : position + 1])
        assert runner.compilations == before + 2

    def test_a_cache_that_grows_is_not_compiled_for_every_length(
        self, artifact: Artifact, expected: np.ndarray
    ) -> None:
        runner = TorchRunner(with_execution(artifact, compile={}), ExecutionSpec())
        before = runner.compilations
        runner.compile_shapes(2, 8)
        compiled = runner.compilations
        assert compiled - before == 2
        np.testing.assert_allclose(all_logits(runner, 12), expected, atol=1e-5)
        np.testing.assert_allclose(all_logits(runner, 4), expected, atol=1e-5)
        assert runner.compilations == compiled

    def test_a_second_load_takes_the_kernels_of_the_first_until_they_are_forgotten(self, shallow: Artifact) -> None:
        import torch
        from torch._dynamo.utils import counters

        def misses() -> int:
            torch._dynamo.reset()
            counters.clear()
            TorchRunner(shallow, ExecutionSpec()).prefill(TOKENS[:1, :8])
            return int(counters["inductor"]["fxgraph_cache_miss"])

        TorchRunner.forget_compiled(shallow, ExecutionSpec())
        assert misses() == 1
        assert misses() == 0
        assert TorchRunner.forget_compiled(shallow, ExecutionSpec())
        assert misses() == 1

    def test_a_process_that_compiles_writes_nowhere_but_in_the_store(
        self, shallow: Artifact, tmp_path: Path, compiled_store: Path
    ) -> None:
        TorchRunner.forget_compiled(shallow, ExecutionSpec())
        code = (
            "import sys, pathlib\n"
            "from pipeline.artifact import Artifact, Manifest\n"
            "from pipeline.runtime import ExecutionSpec, load_runner\n"
            "manifest = Manifest.model_validate_json(sys.stdin.read())\n"
            f"runner = load_runner(Artifact(manifest, pathlib.Path({str(shallow.blobs)!r})), ExecutionSpec())\n"
            "runner.prefill([[1, 2, 3, 4, 5, 6, 7, 8]])\n"
            "assert runner.compilations == 1\n"
            "import psutil; print(len(psutil.Process().children()))"
        )
        places = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
        for place in places.values():
            Path(place).mkdir()
        environment = {**os.environ, **places, "PIPELINE_STORE": str(compiled_store)}
        del environment["TORCHINDUCTOR_CACHE_DIR"]
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            input=shallow.manifest.model_dump_json(),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["0"]  # and no process of its own is left
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        assert list((tmp_path / "TMPDIR").iterdir()) == []

    def test_shapes_beyond_the_limit_are_an_error_and_never_run_uncompiled(
        self, shallow: Artifact, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.runtime.torch.RECOMPILE_LIMIT", 1)
        runner = TorchRunner(with_execution(shallow, compile={"dynamic": False}), ExecutionSpec())
        runner.prefill(TOKENS)
        with pytest.raises(PipelineError, match=r"cannot compile the model for tokens \[2, 19\]"):
            runner.prefill(TOKENS[:, :19])

    def test_bfloat16_is_computed_in_bfloat16(self, shallow: Artifact, shallow_checkpoint: Path) -> None:
        expected = tiny_models.llama_logits(shallow_checkpoint, TOKENS)
        runner = TorchRunner(with_execution(shallow, dtype="bfloat16"), ExecutionSpec())
        half = runner.prefill(TOKENS)
        assert runner.dtype == "bfloat16"
        assert not np.allclose(half, expected[:, -1], atol=1e-5)
        np.testing.assert_allclose(half, expected[:, -1], atol=0.5)

    def test_runs_on_a_gpu(self, static: Artifact, expected: np.ndarray) -> None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        runner = TorchRunner(static, ExecutionSpec(device="cuda"))
        np.testing.assert_allclose(all_logits(runner, 12), expected, atol=1e-3)
        assert runner.device_peak_memory_bytes is not None
        assert runner.device_peak_memory_bytes >= static.manifest.weights_bytes

    def test_whole_passes_of_all_lengths_share_one_graph(self, shallow: Artifact, shallow_checkpoint: Path) -> None:
        expected = tiny_models.llama_logits(shallow_checkpoint, TOKENS)
        runner = TorchRunner(shallow, ExecutionSpec())
        runner.forward(TOKENS[:, :12])
        compiled = runner.compilations
        np.testing.assert_allclose(runner.forward(TOKENS), expected[:, -1], atol=1e-5)
        assert runner.compilations == compiled
