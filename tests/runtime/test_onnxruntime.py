import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import HostError, PipelineError
from pipeline.runtime import ExecutionSpec, load_runner
from pipeline.runtime import onnxruntime as runtime
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 20))
EXPECTED = tiny_models.onnx_logits(tiny_models.onnx_weights(), TOKENS)
Prompt = Callable[[OnnxRuntimeRunner], object]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny_models.onnx_artifact(tmp_path / "onnx")


@pytest.fixture
def runner(artifact: Artifact) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(artifact, ExecutionSpec())


def with_interface(artifact: Artifact, **changes: object) -> Artifact:
    interface = artifact.interface.model_copy(update=changes)
    return Artifact(artifact.manifest.model_copy(update={"interface": interface}), artifact.blobs)


def test_the_entry_point_of_onnx_loads_this_runner(artifact: Artifact) -> None:
    assert isinstance(load_runner(artifact, ExecutionSpec()), OnnxRuntimeRunner)


def test_prefill_gives_the_logits_of_the_last_position(runner: OnnxRuntimeRunner) -> None:
    np.testing.assert_allclose(runner.prefill(TOKENS), EXPECTED[:, -1], atol=1e-4)


def test_decode_takes_what_the_step_before_presented(runner: OnnxRuntimeRunner) -> None:
    runner.prefill(TOKENS[:, :12])
    for position in range(12, 20):
        step = runner.decode(TOKENS[:, position : position + 1])
        np.testing.assert_allclose(step, EXPECTED[:, position], atol=1e-4)


def test_score_gives_the_logits_of_all_positions(runner: OnnxRuntimeRunner) -> None:
    np.testing.assert_allclose(np.concatenate(list(runner.score(TOKENS)), axis=1), EXPECTED, atol=1e-4)


def test_score_of_one_sequence_in_chunks_gives_the_same_logits(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runtime.sequence.SCORE_BYTES", 7 * 4 * tiny_models.VOCABULARY)
    chunks = list(runner.score(TOKENS[:1]))
    assert [chunk.shape[1] for chunk in chunks] == [7, 7, 6]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), EXPECTED[:1], atol=1e-4)


def test_a_second_prompt_does_not_see_the_first(runner: OnnxRuntimeRunner) -> None:
    first = runner.prefill(TOKENS)
    runner.decode(TOKENS[:, :1])
    np.testing.assert_array_equal(runner.prefill(TOKENS), first)


def test_bfloat16_weights_are_handed_over_as_they_lie(tmp_path: Path) -> None:
    half = OnnxRuntimeRunner(
        tiny_models.onnx_artifact(tmp_path / "half", weight_dtype="bfloat16"), ExecutionSpec()
    ).prefill(TOKENS)
    import ml_dtypes

    weights = {n: w.astype(ml_dtypes.bfloat16).astype(np.float32) for n, w in tiny_models.onnx_weights().items()}
    np.testing.assert_allclose(half, tiny_models.onnx_logits(weights, TOKENS)[:, -1], atol=1e-3)


def test_weights_may_begin_at_any_byte(tmp_path: Path) -> None:
    runner = OnnxRuntimeRunner(tiny_models.onnx_artifact(tmp_path / "odd", shift=3), ExecutionSpec())
    np.testing.assert_allclose(runner.prefill(TOKENS), EXPECTED[:, -1], atol=1e-4)


def test_a_vocabulary_that_the_interface_leaves_out_is_read_from_the_graph(artifact: Artifact) -> None:
    runner = OnnxRuntimeRunner(with_interface(artifact, vocab_size=None), ExecutionSpec())
    assert runner.vocab_size == tiny_models.VOCABULARY


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: r.prefill(np.zeros((1, 49), int)), "the prompt has 49 tokens and the model takes at most 48"),
        (lambda r: r.decode(TOKENS[:, :1]), "0 tokens in the cache"),
        (lambda r: (r.prefill(TOKENS), r.decode(TOKENS[:1, :1])), "batch 1 with a cache of batch 2"),
        (lambda r: (r.prefill(np.zeros((1, 48), int)), r.decode(np.zeros((1, 1), int))), "position 49 .* 48"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_with_both_numbers(
    runner: OnnxRuntimeRunner, act: Prompt, message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        act(runner)


def test_a_failed_run_empties_the_cache(runner: OnnxRuntimeRunner) -> None:
    runner.prefill(TOKENS)
    with pytest.raises(PipelineError, match="ONNX Runtime failed"):
        runner.decode(np.full((2, 1), tiny_models.VOCABULARY + 5))
    with pytest.raises(PipelineError, match="prefill comes first"):
        runner.decode(TOKENS[:, :1])


@pytest.mark.parametrize("cached", [True, False])
def test_a_whole_pass_gives_the_logits_of_the_last_position(tmp_path: Path, cached: bool) -> None:
    runner = OnnxRuntimeRunner(tiny_models.onnx_artifact(tmp_path / "onnx", cached=cached), ExecutionSpec())
    assert runner.has_cache is cached
    np.testing.assert_allclose(runner.forward(TOKENS), EXPECTED[:, -1], atol=1e-4)


def test_a_whole_pass_leaves_nothing_in_the_cache(runner: OnnxRuntimeRunner) -> None:
    runner.prefill(TOKENS[:, :12])
    runner.forward(TOKENS)
    with pytest.raises(PipelineError, match="prefill comes first"):
        runner.decode(TOKENS[:, :1])


def test_a_whole_pass_asks_for_all_logits_and_copies_the_last(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, copied = [], []
    run, copy = runner._run, runtime._positions

    def watched_run(tokens: np.ndarray, *, keep: int, cached: bool = True) -> object:
        asked.append((keep, cached))
        return run(tokens, keep=keep, cached=cached)

    def watched_copy(logits: object, part: slice) -> np.ndarray:
        copied.append(copy(logits, part))
        return copied[-1]

    monkeypatch.setattr(runner, "_run", watched_run)
    monkeypatch.setattr(runtime, "_positions", watched_copy)
    runner.forward(TOKENS)
    assert asked == [(20, False)]
    assert [array.shape for array in copied] == [(2, 1, tiny_models.VOCABULARY)]


def test_a_whole_pass_that_is_too_long_is_refused_with_both_numbers(runner: OnnxRuntimeRunner) -> None:
    with pytest.raises(PipelineError, match="49 tokens and the model takes at most 48"):
        runner.forward(np.zeros((1, 49), int))


def test_a_graph_without_a_cache_scores_whole_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.sequence.SCORE_BYTES", 7 * 2 * 4 * tiny_models.VOCABULARY)
    runner = OnnxRuntimeRunner(tiny_models.onnx_artifact(tmp_path / "onnx", cached=False), ExecutionSpec())
    chunks = list(runner.score(TOKENS))
    assert [chunk.shape[1] for chunk in chunks] == [7, 7, 6]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), EXPECTED, atol=1e-4)


@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_a_graph_without_a_cache_says_how_it_can_be_measured(tmp_path: Path, call: str) -> None:
    runner = OnnxRuntimeRunner(tiny_models.onnx_artifact(tmp_path / "onnx", cached=False), ExecutionSpec())
    with pytest.raises(PipelineError, match="the graph has no key-value cache") as refused:
        getattr(runner, call)(TOKENS[:, :1])
    assert "evaluate.workload.forward" in str(refused.value.hint)


def test_a_missing_provider_is_the_host_s_fault(artifact: Artifact) -> None:
    with pytest.raises(HostError, match=r"NoSuchExecutionProvider.*CPUExecutionProvider"):
        OnnxRuntimeRunner(artifact, ExecutionSpec(provider="NoSuchExecutionProvider"))


def test_an_interface_without_a_role_of_the_cache_is_refused_by_role(artifact: Artifact) -> None:
    inputs = {role: name for role, name in artifact.interface.inputs.items() if role != "past.v[0]"}
    with pytest.raises(PipelineError, match=r"past\.v\[0\]"):
        OnnxRuntimeRunner(with_interface(artifact, inputs=inputs), ExecutionSpec())


def test_an_input_without_a_role_is_refused_by_name(artifact: Artifact) -> None:
    inputs = {role: name for role, name in artifact.interface.inputs.items() if role != "positions"}
    with pytest.raises(PipelineError, match="no role to the graph's inputs positions"):
        OnnxRuntimeRunner(with_interface(artifact, inputs=inputs), ExecutionSpec())


def test_a_graph_that_does_not_load_is_an_error_for_the_user(artifact: Artifact) -> None:
    Path(str(artifact.component.files["model.onnx"].path)).write_bytes(b"not a graph")
    with pytest.raises(PipelineError, match="cannot load the graph"):
        OnnxRuntimeRunner(artifact, ExecutionSpec())


def test_weights_are_mapped_from_the_files_that_hold_them(artifact: Artifact) -> None:
    import onnx

    graph = onnx.load_from_string(runtime._graph_over_files(artifact, {})).graph
    places = {
        initializer.name: {entry.key: entry.value for entry in initializer.external_data}
        for initializer in graph.initializer
        if initializer.external_data
    }
    file = Path(str(artifact.component.files["weights/pack"].path)).resolve()
    refs = artifact.component.tensors
    assert places == {
        name: {"location": str(file)[1:], "offset": str(ref.offset), "length": str(ref.length)}
        for name, ref in refs.items()
    }


def test_weights_may_lie_behind_a_link(tmp_path: Path) -> None:
    artifact = tiny_models.onnx_artifact(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files = {
        name: entry.model_copy(update={"path": str(entry.path).replace("/real/", "/link/")})
        for name, entry in artifact.component.files.items()
    }
    component = artifact.component.model_copy(update={"files": files})
    linked = Artifact(artifact.manifest.model_copy(update={"components": {"model": component}}), artifact.blobs)
    np.testing.assert_allclose(OnnxRuntimeRunner(linked, ExecutionSpec()).prefill(TOKENS), EXPECTED[:, -1], atol=1e-4)


def test_a_weight_that_the_manifest_does_not_know_is_an_error(artifact: Artifact) -> None:
    component = artifact.component.model_copy(update={"tensors": {}})
    damaged = Artifact(artifact.manifest.model_copy(update={"components": {"model": component}}), artifact.blobs)
    with pytest.raises(PipelineError, match=r"initializer '\w+' outside, and the manifest does not say where"):
        OnnxRuntimeRunner(damaged, ExecutionSpec())


def test_a_missing_file_of_weights_is_an_error_for_the_user(artifact: Artifact) -> None:
    Path(str(artifact.component.files["weights/pack"].path)).unlink()
    with pytest.raises(PipelineError, match="cannot load the graph"):
        OnnxRuntimeRunner(artifact, ExecutionSpec())


def test_a_cuda_device_means_cuda_s_provider() -> None:
    assert runtime._provider(ExecutionSpec(device="cuda")) == "CUDAExecutionProvider"
    assert runtime._provider(ExecutionSpec(device="cuda", provider="TensorrtExecutionProvider")).startswith("Tensorrt")
    assert runtime._provider(ExecutionSpec()) == "CPUExecutionProvider"


HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_cuda_device_without_cuda_is_the_host_s_fault(artifact: Artifact) -> None:
    with pytest.raises(HostError, match="the stage asks for CUDAExecutionProvider"):
        OnnxRuntimeRunner(artifact, ExecutionSpec(device="cuda"))


@pytest.mark.skipif(not HAS_CUDA, reason="this ONNX Runtime has no CUDA")
def test_on_cuda_the_logits_are_the_same(artifact: Artifact) -> None:
    runner = OnnxRuntimeRunner(artifact, ExecutionSpec(device="cuda"))
    np.testing.assert_allclose(runner.prefill(TOKENS[:, :19]), EXPECTED[:, 18], atol=1e-2)
    np.testing.assert_allclose(runner.decode(TOKENS[:, 19:]), EXPECTED[:, 19], atol=1e-2)


def test_loading_a_model_starts_no_telemetry(artifact: Artifact) -> None:
    """Importing ONNX Runtime starts a thread that sends usage data; a runner turns that off beforehand."""
    code = f"""
import os, sys
from pathlib import Path
from pipeline.artifact import Artifact, Manifest
from pipeline.runtime import ExecutionSpec, load_runner
manifest = Manifest.model_validate_json({artifact.manifest.model_dump_json()!r})
load_runner(Artifact(manifest, Path({str(artifact.blobs)!r})), ExecutionSpec(threads=1))
print(os.environ["ORT_DISABLE_TELEMETRY"], len(os.listdir("/proc/self/task")))
"""
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.stdout.split() == ["1", "1"], done.stderr
