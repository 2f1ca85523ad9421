import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import HostError, PipelineError
from pipeline.hardware.host import find_gpus
from pipeline.runtime import ExecutionSpec, kv_cache, load_runner, onnx_session
from pipeline.runtime import onnxruntime as runtime
from pipeline.runtime.layer_outputs import open_layers
from pipeline.runtime.onnx_session import open_session
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 20))
EXPECTED = tiny_models.onnx_logits(tiny_models.onnx_weights(), TOKENS)
CPU_ONLY = ["CPUExecutionProvider"]
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

    def watched_run(session: object, tokens: np.ndarray, *, keep: int, cached: bool = True) -> object:
        asked.append((keep, cached))
        return run(session, tokens, keep=keep, cached=cached)

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

    graph = onnx.load_from_string(onnx_session.graph_over_files(artifact, artifact.component, {})).graph
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
    assert onnx_session.provider_of(ExecutionSpec(device="cuda")) == "CUDAExecutionProvider"
    assert onnx_session.provider_of(ExecutionSpec(device="cuda", provider="TensorrtExecutionProvider")).startswith(
        "Tensorrt"
    )
    assert onnx_session.provider_of(ExecutionSpec()) == "CPUExecutionProvider"


BUILT_FOR_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
TF32 = 0.01
"""Share of the logits' standard deviation by which they may differ: ONNX Runtime multiplies float32 with ten bits of
mantissa on CUDA, and a wrong graph differs by the whole of it."""
needs_cuda = pytest.mark.skipif(
    not BUILT_FOR_CUDA or not find_gpus(), reason="needs a CUDA GPU and an ONNX Runtime that has CUDA"
)


@pytest.mark.skipif(BUILT_FOR_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_cuda_device_without_cuda_is_the_host_s_fault(artifact: Artifact) -> None:
    with pytest.raises(HostError, match="the stage asks for CUDAExecutionProvider"):
        OnnxRuntimeRunner(artifact, ExecutionSpec(device="cuda"))


@pytest.mark.skipif(not BUILT_FOR_CUDA, reason="this ONNX Runtime has no CUDA")
def test_cuda_that_does_not_start_is_the_host_s_fault_and_nothing_runs_on_the_cpu(artifact: Artifact) -> None:
    code = f"""
from pathlib import Path
from pipeline.artifact import Artifact, Manifest
from pipeline.errors import HostError
from pipeline.runtime import ExecutionSpec, load_runner
manifest = Manifest.model_validate_json({artifact.manifest.model_dump_json()!r})
try:
    load_runner(Artifact(manifest, Path({str(artifact.blobs)!r})), ExecutionSpec(device="cuda"))
except HostError as error:
    print(error.message)
"""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert "could not start CUDAExecutionProvider, and would run the graph on the processor" in done.stdout, done.stderr


def test_a_provider_that_onnx_runtime_leaves_out_is_an_error(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it leaves out one whose libraries are missing, it leaves out one that it was not asked for."""
    without = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, providers: without(*given, providers=CPU_ONLY))
    with pytest.raises(HostError, match="could not start AzureExecutionProvider, and would run the graph on the proce"):
        onnx_session.open_session(artifact, artifact.component, ExecutionSpec(), "AzureExecutionProvider")


@needs_cuda
def test_on_cuda_the_logits_are_the_same(artifact: Artifact) -> None:
    runner = OnnxRuntimeRunner(artifact, ExecutionSpec(device="cuda"))
    np.testing.assert_allclose(runner.prefill(TOKENS[:, :19]), EXPECTED[:, 18], atol=TF32 * EXPECTED.std())
    np.testing.assert_allclose(runner.decode(TOKENS[:, 19:]), EXPECTED[:, 19], atol=TF32 * EXPECTED.std())


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


LONG = np.random.default_rng(1).integers(0, tiny_models.VOCABULARY, (2, 53))
"""A prompt of 12 and the tokens after it."""


@pytest.fixture(scope="module", params=[True, False], ids=["some logits", "all logits"])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("grouped")
    return tiny_models.grouped_query_artifact(folder, limits_logits=request.param)


class TestACacheThatIsExtendedInPlace:
    @pytest.fixture(autouse=True)
    def _small_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv_cache, "ROOM", 8)

    @pytest.fixture
    def runner(self, grouped: Artifact) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(grouped, ExecutionSpec())

    @pytest.mark.parametrize("batch", [1, 2])
    def test_gives_the_logits_of_caches_that_are_joined(
        self, runner: OnnxRuntimeRunner, grouped: Artifact, batch: int
    ) -> None:
        reference = tiny_models.Concatenating(graph=grouped)
        tokens = LONG[:batch]
        expected = reference.step("graph", tokens[:, :12])[:, -1]
        np.testing.assert_allclose(runner.prefill(tokens[:, :12]), expected, atol=1e-5)
        capacities = set()
        for position in range(12, 52):
            token = tokens[:, position : position + 1]
            np.testing.assert_allclose(runner.decode(token), reference.step("graph", token)[:, 0], atol=1e-5)
            capacities.add(runner._buffers.capacity)
        assert capacities == {16, 32, 64}

    @pytest.mark.parametrize("batch", [1, 2])
    def test_gives_the_logits_that_the_runner_gives_without(self, grouped: Artifact, batch: int) -> None:
        joined = with_interface(grouped, cache=tiny_models.GROUPED)
        found = []
        for artifact in (grouped, joined):
            runner = OnnxRuntimeRunner(artifact, ExecutionSpec())
            steps = [runner.prefill(LONG[:batch, :12])]
            steps += [runner.decode(LONG[:batch, i : i + 1]) for i in range(12, 20)]
            found.append(np.stack([*steps, runner.forward(LONG[:batch, :20])]))
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)

    def test_is_written_to_where_it_lies(self, runner: OnnxRuntimeRunner) -> None:
        runner.prefill(LONG[:, :17])  # room for 24
        places = [value.data_ptr() for value in runner._buffers.values]
        before = [array.copy() for array in runner._buffers._arrays]
        runner.decode(LONG[:, 17:18])
        assert [value.data_ptr() for value in runner._buffers.values] == places
        for array, was in zip(runner._buffers._arrays, before, strict=True):
            np.testing.assert_array_equal(array[:, :, :17], was[:, :, :17])
            assert np.abs(array[:, :, 17]).min() > 0
            assert not array[:, :, 18:].any()

    def test_binds_its_buffers_once_and_then_only_what_changes(self, runner: OnnxRuntimeRunner) -> None:
        (session,) = runner._sessions.values()
        runner.prefill(LONG[:, :17])
        runner.decode(LONG[:, 17:18])
        binding, bound = session._binding, dict(session._bound)
        runner.decode(LONG[:, 18:19])
        assert session._binding is binding
        changed = {name for name, value in session._bound.items() if value is not bound[name]}
        assert changed == {"input_ids", "attention_mask"}

    def test_has_room_for_the_first_token_after_a_prompt(self, runner: OnnxRuntimeRunner) -> None:
        runner.prefill(LONG[:, :16])
        assert runner._buffers.capacity == 24

    def test_never_has_room_for_more_than_the_model_has_positions(self, runner: OnnxRuntimeRunner) -> None:
        runner.prefill(np.resize(LONG, (1, 64)))
        assert runner._buffers.capacity == 64
        with pytest.raises(PipelineError, match="position 65 is beyond the model's 64"):
            runner.decode(LONG[:1, :1])

    def test_is_emptied_and_not_allocated_again(self, runner: OnnxRuntimeRunner) -> None:
        first = runner.prefill(LONG[:, :12])
        for position in range(12, 40):
            runner.decode(LONG[:, position : position + 1])
        places = [value.data_ptr() for value in runner._buffers.values]
        np.testing.assert_array_equal(runner.prefill(LONG[:, :12]), first)
        assert [value.data_ptr() for value in runner._buffers.values] == places

    def test_another_batch_has_buffers_of_its_own(self, runner: OnnxRuntimeRunner) -> None:
        both = runner.prefill(LONG[:, :12])
        np.testing.assert_allclose(runner.prefill(LONG[1:, :12]), both[1:], atol=1e-5)
        np.testing.assert_allclose(runner.prefill(LONG[:, :12]), both, atol=1e-5)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_is_scored_in_chunks_where_one_sequence_is(
        self, runner: OnnxRuntimeRunner, grouped: Artifact, batch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.runtime.sequence.SCORE_BYTES", 20 * 4 * tiny_models.VOCABULARY)
        chunks = list(runner.score(LONG[:batch]))
        assert [chunk.shape[1] for chunk in chunks] == ([20, 20, 13] if batch == 1 else [53])
        expected = tiny_models.Concatenating(graph=grouped).step("graph", LONG[:batch])
        np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, atol=1e-5)

    def test_whole_passes_leave_it_empty(self, runner: OnnxRuntimeRunner) -> None:
        runner.prefill(LONG[:, :12])
        runner.forward(LONG)
        with pytest.raises(PipelineError, match="prefill comes first"):
            runner.decode(LONG[:, :1])

    def test_values_of_a_pass_need_no_buffers(self, runner: OnnxRuntimeRunner) -> None:
        (logits,) = runner.values(LONG[:1], ["logits"])
        np.testing.assert_allclose(logits[:, -1], runner.forward(LONG[:1]), atol=1e-5)
        assert runner._buffers.values == []

    def test_a_failed_step_empties_it_and_the_next_prompt_is_as_ever(self, runner: OnnxRuntimeRunner) -> None:
        first = runner.prefill(LONG[:, :12])
        with pytest.raises(PipelineError, match=r"failed on tokens \[2, 1\] after 12"):
            runner.decode(np.full((2, 1), tiny_models.VOCABULARY + 5))
        with pytest.raises(PipelineError, match="prefill comes first"):
            runner.decode(LONG[:, :1])
        np.testing.assert_array_equal(runner.prefill(LONG[:, :12]), first)

    @needs_cuda
    def test_on_cuda_the_logits_are_the_same(self, grouped: Artifact, runner: OnnxRuntimeRunner) -> None:
        there = OnnxRuntimeRunner(grouped, ExecutionSpec(device="cuda"))
        expected = runner.prefill(LONG[:, :12])
        close = TF32 * expected.std()
        np.testing.assert_allclose(there.prefill(LONG[:, :12]), expected, atol=close)
        for position in range(12, 30):
            token = LONG[:, position : position + 1]
            np.testing.assert_allclose(there.decode(token), runner.decode(token), atol=close)


class TestTwoPhases:
    @pytest.fixture(scope="class", params=[True, False], ids=["in place", "joined"])
    def parts(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
        """Two graphs of other weights, so that it shows which of them ran."""
        return {
            name: tiny_models.grouped_query_artifact(tmp_path_factory.mktemp(name), seed=seed, in_place=request.param)
            for seed, name in enumerate(("prefill", "decode"))
        }

    @pytest.fixture
    def runner(self, parts: dict[str, Artifact]) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(tiny_models.two_phases(**parts, crossover_tokens=8), ExecutionSpec())

    def test_both_graphs_are_opened_side_by_side(
        self, parts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        together = threading.Barrier(2, timeout=20)

        def meet(*given: Any) -> Any:
            together.wait()
            return open_session(*given)

        monkeypatch.setattr("pipeline.runtime.onnxruntime.open_session", meet)
        OnnxRuntimeRunner(tiny_models.two_phases(**parts, crossover_tokens=8), ExecutionSpec())

    @pytest.mark.parametrize("damaged", ["prefill", "decode"])
    def test_either_of_them_may_fail_to_load(
        self, parts: dict[str, Artifact], damaged: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        artifact = tiny_models.two_phases(**parts, crossover_tokens=8)
        component = artifact.manifest.components[damaged]

        def fail(artifact: Artifact, part: Any, *given: Any) -> Any:
            if part is component:
                raise PipelineError("ONNX Runtime cannot load the graph")
            return open_session(artifact, part, *given)

        monkeypatch.setattr("pipeline.runtime.onnxruntime.open_session", fail)
        with pytest.raises(PipelineError, match="cannot load the graph"):
            OnnxRuntimeRunner(artifact, ExecutionSpec())

    @pytest.mark.parametrize("batch", [1, 2])
    def test_single_tokens_go_on_from_the_cache_that_the_prompt_left(
        self, runner: OnnxRuntimeRunner, parts: dict[str, Artifact], batch: int
    ) -> None:
        reference, tokens = tiny_models.Concatenating(**parts), LONG[:batch]
        expected = reference.step("prefill", tokens[:, :12])[:, -1]
        np.testing.assert_allclose(runner.prefill(tokens[:, :12]), expected, atol=1e-5)
        for position in range(12, 30):
            token = tokens[:, position : position + 1]
            np.testing.assert_allclose(runner.decode(token), reference.step("decode", token)[:, 0], atol=1e-5)

    def test_switches_back_and_forth_over_buffers_that_grow(
        self, runner: OnnxRuntimeRunner, parts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kv_cache, "ROOM", 8)
        for length in (12, 9, 30):
            reference = tiny_models.Concatenating(**parts)
            expected = reference.step("prefill", LONG[:1, :length])[:, -1]
            np.testing.assert_allclose(runner.prefill(LONG[:1, :length]), expected, atol=1e-5)
            for position in range(length, length + 12):
                token = LONG[:1, position : position + 1]
                np.testing.assert_allclose(runner.decode(token), reference.step("decode", token)[:, 0], atol=1e-5)

    @pytest.mark.parametrize(("shape", "which"), [((1, 7), "decode"), ((1, 8), "prefill"), ((2, 4), "prefill")])
    def test_the_number_of_new_tokens_decides(
        self, runner: OnnxRuntimeRunner, parts: dict[str, Artifact], shape: tuple[int, int], which: str
    ) -> None:
        tokens = LONG[: shape[0], : shape[1]]
        expected = tiny_models.Concatenating(**parts).step(which, tokens)
        np.testing.assert_allclose(runner.prefill(tokens), expected[:, -1], atol=1e-5)
        np.testing.assert_allclose(runner.forward(tokens), expected[:, -1], atol=1e-5)

    def test_tokens_of_many_sequences_are_as_many_new_tokens(
        self, runner: OnnxRuntimeRunner, parts: dict[str, Artifact]
    ) -> None:
        reference, tokens = tiny_models.Concatenating(**parts), np.resize(LONG, (8, 5))
        reference.step("prefill", tokens[:, :4])
        runner.prefill(tokens[:, :4])
        expected = reference.step("prefill", tokens[:, 4:])[:, 0]
        np.testing.assert_allclose(runner.decode(tokens[:, 4:]), expected, atol=1e-5)

    @pytest.mark.parametrize("batch", [1, 2, 9])
    def test_is_scored_as_it_is_used_half_a_prompt_and_half_single_tokens(
        self, runner: OnnxRuntimeRunner, parts: dict[str, Artifact], batch: int
    ) -> None:
        reference, tokens = tiny_models.Concatenating(**parts), np.resize(LONG, (batch, 21))
        expected = [reference.step("prefill", tokens[:, :10])]
        expected += [reference.step("decode", tokens[:, i : i + 1]) for i in range(10, 21)]
        found = np.concatenate(list(runner.score(tokens)), axis=1)
        np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-5)

    def test_is_scored_in_chunks(self, runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = np.concatenate(list(runner.score(LONG[:1])), axis=1)
        monkeypatch.setattr("pipeline.runtime.sequence.SCORE_BYTES", 20 * 4 * tiny_models.VOCABULARY)
        chunks = list(runner.score(LONG[:1]))
        assert [chunk.shape[1] for chunk in chunks] == [20, 6, 20, 7]
        np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole, atol=1e-5)

    @pytest.mark.parametrize(
        ("block", "message"),
        [
            (None, "execution block: phases"),
            ({"crossover_tokens": 0}, r"execution block: phases\.crossover_tokens: .* greater than or equal to 1"),
            ({"crossover": 3}, r"execution block: phases\.crossover"),
        ],
    )
    def test_an_execution_block_that_does_not_say_when_to_switch_is_refused(
        self, parts: dict[str, Artifact], block: object, message: str
    ) -> None:
        artifact = tiny_models.two_phases(**parts, crossover_tokens=8)
        manifest = artifact.manifest.model_copy(update={"execution": {"phases": block}})
        with pytest.raises(PipelineError, match=message):
            OnnxRuntimeRunner(Artifact(manifest, artifact.blobs), ExecutionSpec())

    def test_what_lies_between_its_layers_is_asked_of_the_stages_that_it_comes_from(
        self, parts: dict[str, Artifact]
    ) -> None:
        with pytest.raises(PipelineError, match="look at the stages that they come from"):
            open_layers(tiny_models.two_phases(**parts, crossover_tokens=8), ExecutionSpec())
