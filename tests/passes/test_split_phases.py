"""split_phases: what goes together, what is measured, and the model of two graphs that comes out."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from passes.compile import split_phases as module
from passes.compile.compile_onnxruntime import COMPILED_FILE, CompileOnnxRuntime
from passes.compile.split_phases import SplitPhases, crossover_of
from passes.graph.onnxoptimizer import OnnxOptimizer
from passes.quantize.quantize_dynamic import QuantizeDynamic
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, ModelSize, PassContext, PipelineError, RecipeError, StageRef, load_model, load_runner
from pipeline.artifact import CacheLayout
from pipeline.hardware.host import describe_host
from pipeline.memory_estimate import Weights
from pipeline.runtime import ExecutionSpec, onnx_session
from pipeline.store.folder import materialize, read_folder
from pipeline.store.writer import OutputWriter

TOKENS = np.random.default_rng(1).integers(3, 300, (1, 24), dtype=np.int64)


@pytest.fixture(scope="module")
def int4(bench, exported_llama):
    return bench.run(QuantizeWeights, exported_llama)


@pytest.fixture(scope="module")
def int8(bench, exported_llama):
    return bench.run(QuantizeDynamic, exported_llama)


@pytest.fixture(scope="module")
def two(bench, int8, int4):
    return split(bench, {"prefill": int8, "decode": int4}, crossover_tokens=4)


def split(bench: Any, inputs: dict[str, Artifact], *, after: Artifact | None = None, **params: Any) -> Artifact:
    staging = bench.new_folder("split")
    values = SplitPhases.Params(**params)
    facets = {name: describe_host().facets()[name] for name in SplitPhases.facets(values)}
    context = PassContext(output=OutputWriter(staging), inputs=inputs, facets=facets)
    made = SplitPhases().run(after or inputs["decode"], values, context)
    assert not any((staging / "blobs").iterdir())
    return bench.store.publish(staging, made.manifest)


def changed(artifact: Artifact, **interface: Any) -> Artifact:
    update = {"interface": artifact.interface.model_copy(update=interface)}
    return Artifact(artifact.manifest.model_copy(update=update), artifact.blobs)


def steps(runner: Any) -> np.ndarray:
    """Logits of a prompt of 12 tokens and of the tokens after it."""
    decoded = [runner.prefill(TOKENS[:, :12])]
    decoded += [runner.decode(TOKENS[:, i : i + 1]) for i in range(12, TOKENS.shape[1])]
    return np.concatenate(decoded)


@pytest.fixture(scope="module")
def expected(decoder, int8, int4) -> np.ndarray:
    """The same by plain sessions: the prompt through one graph, the other tokens and the cache through the other."""
    first, second = decoder(int8), decoder(int4)
    logits = [first.step(TOKENS[:, :12])[:, -1]]
    second.past, second.mask = first.past, first.mask
    logits += [second.step(TOKENS[:, i : i + 1])[:, -1] for i in range(12, TOKENS.shape[1])]
    return np.concatenate(logits)


class TestOneModelOfTwo:
    def test_runs_prompts_through_one_graph_and_single_tokens_through_the_other(self, two, expected):
        np.testing.assert_allclose(steps(load_runner(two, ExecutionSpec())), expected, atol=1e-4)

    def test_is_of_the_components_that_its_inputs_have(self, two, int8, int4):
        assert two.manifest.components == {"prefill": int8.component, "decode": int4.component}
        assert two.interface == int4.interface
        assert two.manifest.files == int4.manifest.files

    def test_counts_what_both_share_once(self, two, int8, int4):
        shared = int4.component.tensors["model.embed_tokens.weight"].length
        assert two.manifest.weights_bytes <= int8.manifest.weights_bytes + int4.manifest.weights_bytes - shared

    def test_says_when_it_switches(self, two):
        assert two.manifest.execution["phases"] == {"crossover_tokens": 4}

    def test_may_be_of_one_graph_twice(self, bench, int4):
        same = split(bench, {"prefill": int4, "decode": int4}, crossover_tokens=4)
        found = [steps(load_runner(artifact, ExecutionSpec())) for artifact in (same, int4)]
        np.testing.assert_allclose(*found, atol=1e-5)

    def test_keeps_what_was_compiled(self, bench, int8, int4, expected):
        compiled = {role: compile_for_this_host(bench, part) for role, part in (("prefill", int8), ("decode", int4))}
        made = split(bench, compiled, crossover_tokens=4)
        assert made.manifest.execution["compiled"] == compiled["decode"].manifest.execution["compiled"]
        for role, part in made.manifest.components.items():
            packed = onnx_session.compiled_for_this_host(made, part, onnx_session.CPU)
            assert packed == json.loads(compiled[role].file(COMPILED_FILE).read_text())["weights"]
            assert packed
        np.testing.assert_allclose(steps(load_runner(made, ExecutionSpec())), expected, atol=1e-3)

    def test_is_none_that_a_pass_on_one_graph_could_take(self, bench, two):
        with pytest.raises(PipelineError, match="components are decode, prefill, and none is 'model'"):
            bench.run(OnnxOptimizer, two)


def compile_for_this_host(bench: Any, artifact: Artifact) -> Artifact:
    staging = bench.new_folder("compiled")
    facets = {name: describe_host().facets()[name] for name in CompileOnnxRuntime.depends_on}
    made = CompileOnnxRuntime().run(
        artifact, CompileOnnxRuntime.Params(), PassContext(output=OutputWriter(staging), facets=facets)
    )
    return bench.store.publish(staging, made.manifest)


class TestWrittenOut:
    @pytest.fixture(scope="class")
    def folder(self, bench, two):
        folder = bench.new_folder("out") / "model"
        materialize(two, folder)
        return folder

    def test_has_a_graph_for_each_phase_and_one_file_of_weights(self, folder, two):
        names = {path.name for path in folder.iterdir()}
        assert {"prefill.onnx", "decode.onnx", "model.onnx.data", "config.json"} <= names
        assert "model.onnx" not in names
        assert (folder / "model.onnx.data").stat().st_size < two.manifest.weights_bytes + 4096 * 200

    def test_runs_as_any_exported_model_does(self, folder, expected):
        model = load_model(folder, threads=1)
        tokens = TOKENS[0, :12].tolist()
        logits = [model.prefill([tokens])]
        for token in TOKENS[0, 12:].tolist():
            tokens.append(token)
            logits.append(model.decode([tokens[-1:]]))
        np.testing.assert_allclose(np.concatenate(logits), expected, atol=1e-4)

    def test_is_read_back_as_it_was(self, folder, two):
        found = read_folder(folder)
        assert found.manifest.execution == two.manifest.execution
        for part, component in two.manifest.components.items():
            for name in component.tensors:
                np.testing.assert_array_equal(found.tensor(name, part), two.tensor(name, part))

    @pytest.mark.parametrize("part", ["prefill", "decode"])
    def test_has_graphs_that_any_tool_loads(self, folder, part):
        import onnx
        import onnxruntime

        onnx.checker.check_model(str(folder / f"{part}.onnx"))
        session = onnxruntime.InferenceSession(folder / f"{part}.onnx", providers=["CPUExecutionProvider"])
        assert "logits" in {node.name for node in session.get_outputs()}


class TestWhatDoesNotGoTogether:
    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            (["prefill"], "its `inputs` lacks decode"),
            ([], "lacks prefill and decode"),
            (["prefill", "decode", "draft"], "has draft, which it does not read"),
            (["prefil", "decode"], "lacks prefill and has prefil, which it does not read"),
        ],
    )
    def test_roles_that_are_missing_or_unknown_are_named(self, bench, int4, roles, message):
        with pytest.raises(RecipeError, match=message) as refused:
            split(bench, dict.fromkeys(roles, int4), after=int4, crossover_tokens=4)
        assert refused.value.hint == "write `inputs: {prefill: STAGE, decode: STAGE}`"
        with pytest.raises(RecipeError, match=message):
            SplitPhases.check_stages(StageRef("int4", "onnx"), dict.fromkeys(roles, StageRef("int4", "onnx")))

    def test_both_cache_layouts_are_shown(self, bench, int8, int4):
        other = changed(int4, cache=CacheLayout(layers=2, kv_heads=4, head_dim=16, in_place=True))
        with pytest.raises(PipelineError) as refused:
            split(bench, {"prefill": int8, "decode": other}, crossover_tokens=4)
        assert refused.value.message.splitlines() == [
            "the two stages do not go together:",
            "  cache: layers=2 kv_heads=2 head_dim=16 dtype='float32' in_place=False in prefill, "
            "layers=2 kv_heads=4 head_dim=16 dtype='float32' in_place=True in decode",
        ]

    @pytest.mark.parametrize(
        ("difference", "shown"),
        [
            ({"vocab_size": 512}, "vocab_size: 300 in prefill, 512 in decode"),
            ({"max_length": 32}, "max_length: 64 in prefill, 32 in decode"),
            ({"logits_to_keep": "keep"}, "logits_to_keep: none in prefill, keep in decode"),
            ({"outputs": {"logits": "scores"}}, "outputs logits: logits in prefill, scores in decode"),
        ],
    )
    def test_what_differs_in_the_interfaces_is_shown(self, bench, int8, int4, difference, shown):
        with pytest.raises(PipelineError, match=f"\n  {re.escape(shown)}"):
            split(bench, {"prefill": int8, "decode": changed(int4, **difference)}, crossover_tokens=4)

    def test_another_model_s_configuration_is_shown(self, bench, int8, int4):
        entry = int4.manifest.files["config.json"].model_copy(update={"digest": "0" * 64})
        files = {**int4.manifest.files, "config.json": entry}
        other = Artifact(int4.manifest.model_copy(update={"files": files}), int4.blobs)
        with pytest.raises(PipelineError, match=r"the file config\.json: [0-9a-f]{64} in prefill, 0{64} in decode"):
            split(bench, {"prefill": int8, "decode": other}, crossover_tokens=4)

    def test_a_torch_model_is_told_to_be_exported(self, bench, llama, int4):
        with pytest.raises(PipelineError, match=r"inputs\.prefill takes an ONNX graph, not a model in format torch"):
            split(bench, {"prefill": llama, "decode": int4}, crossover_tokens=4)
        with pytest.raises(
            RecipeError, match=r"inputs\.prefill takes an ONNX graph, and the stage 'source' yields torch"
        ):
            SplitPhases.check_stages(
                StageRef("int4", "onnx"), {"prefill": StageRef("source", "torch"), "decode": StageRef("int4", "onnx")}
            )

    def test_a_graph_without_a_cache_is_refused(self, bench, int4):
        whole = changed(int4, cache=None)
        with pytest.raises(PipelineError, match=r"inputs\.decode has no key-value cache"):
            split(bench, {"prefill": int4, "decode": whole}, crossover_tokens=4)

    def test_two_phases_are_not_split_again(self, bench, two, int4):
        with pytest.raises(PipelineError, match="takes a model of one graph; that one has prefill, decode"):
            split(bench, {"prefill": two, "decode": int4}, crossover_tokens=4)

    def test_it_comes_after_one_of_the_two(self, bench, int8, int4, exported_llama):
        split(bench, {"prefill": int8, "decode": int4}, after=int8, crossover_tokens=4)
        with pytest.raises(PipelineError, match="it comes after is neither of its inputs"):
            split(bench, {"prefill": int8, "decode": int4}, after=exported_llama, crossover_tokens=4)
        read = {"prefill": StageRef("int8", "onnx"), "decode": StageRef("int4", "onnx")}
        with pytest.raises(RecipeError, match="after 'export_onnx', which is neither") as refused:
            SplitPhases.check_stages(StageRef("export_onnx", "onnx"), read)
        assert "`after: int4`" in str(refused.value.hint)

    @pytest.mark.parametrize("tokens", [0, -3])
    def test_a_crossover_below_1_is_refused(self, tokens):
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            SplitPhases.Params(crossover_tokens=tokens)


class TestTheCrossover:
    def test_is_measured_and_the_figures_are_logged(self, bench, int8, int4, caplog):
        with caplog.at_level(logging.INFO, logger="pipeline.pass"):
            made = split(bench, {"prefill": int8, "decode": int4})
        crossover = made.manifest.execution["phases"]["crossover_tokens"]
        assert 1 <= crossover <= module.LENGTHS[-1] + 1
        lines = [record.getMessage() for record in caplog.records]
        assert [int(line.split()[0]) for line in lines if "times as long" in line] == list(module.LENGTHS)
        assert f"calls of {crossover} new tokens and more run the prefill graph" in lines

    def test_is_part_of_the_host_where_it_is_measured(self):
        assert "host.cpu" in SplitPhases.facets(SplitPhases.Params())
        assert SplitPhases.facets(SplitPhases.Params(crossover_tokens=16)) == ()

    @pytest.mark.parametrize(
        ("ratios", "crossover"),
        [
            ({1: 0.5, 2: 0.5, 4: 0.5, 8: -0.5, 16: -0.7}, 6),  # halfway in the logarithm: 5.66
            ({1: 0.5, 2: 0.1, 4: -0.9, 8: -0.9}, 3),  # a tenth of the way: 2.14
            ({1: 0.5, 2: -0.1, 4: 0.2, 8: -0.2}, 6),  # noise before the last change of sign does not count
            ({1: -0.1, 2: -0.2}, 1),
            ({1: 0.3, 2: 0.2, 4: 0.1}, 5),
            ({1: 0.3, 2: 0.0, 4: -0.1}, 3),
        ],
    )
    def test_lies_where_the_ratio_of_times_passes_1(self, ratios, crossover):
        assert crossover_of(ratios) == crossover

    def test_is_where_times_are_equal_by_the_line_between(self):
        """Two costs a + b n that meet at 20 tokens."""
        ratios = {n: math.log((30 + n) / (10 + 2 * n)) for n in module.LENGTHS}
        assert crossover_of(ratios) in (19, 20, 21)


def test_memory_is_foreseen_of_both_with_what_they_share_once():
    plain = {"parameters": 1000, "dtype": "float32", "bytes_per_parameter": 4.0}
    shared = ModelSize(format="onnx", embedding=Weights(**plain), other=Weights(**plain))
    eight = shared.with_weights(["linear", "head"], "int8", 1.0).model_copy(
        update={"linear": Weights(parameters=8000, dtype="int8", bytes_per_parameter=1.0)}
    )
    four = shared.model_copy(update={"linear": Weights(parameters=8000, dtype="int4", bytes_per_parameter=0.5)})
    predicted = SplitPhases.predict_from(
        SplitPhases.Params(crossover_tokens=4), four, {"prefill": eight, "decode": four}
    )
    assert predicted.model.embedding == shared.embedding
    assert predicted.model.linear.size_bytes == 8000 + 4000
    assert predicted.written_bytes == 0
    measured = SplitPhases.predict_from(SplitPhases.Params(), four, {"prefill": eight, "decode": four})
    assert measured.conversion_bytes > predicted.conversion_bytes
