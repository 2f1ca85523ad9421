"""compile_onnxruntime: the packed weights, how they travel with the artifact, and hosts that they are not for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passes.compile import compile_onnxruntime as module
from passes.compile.compile_onnxruntime import COMPILED_FILE, CompileOnnxRuntime
from passes.graph.onnxoptimizer import OnnxOptimizer
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, HostError, PassContext, PipelineError, load_model, load_onnx
from pipeline.hardware.host import describe_host
from pipeline.runtime import ExecutionSpec, load_runner, onnx_session
from pipeline.store.folder import materialize, read_folder
from pipeline.store.writer import OutputWriter

TOKENS = np.random.default_rng(1).integers(3, 300, (1, 14), dtype=np.int64)


def compiled(bench: Any, artifact: Artifact, *, threads: int = 1, **params: Any) -> Artifact:
    staging = bench.new_folder("compiled")
    facets = {name: describe_host().facets()[name] for name in CompileOnnxRuntime.depends_on}
    context = PassContext(output=OutputWriter(staging), facets=facets, threads=threads)
    made = CompileOnnxRuntime().run(artifact, CompileOnnxRuntime.Params(**params), context)
    assert not list(staging.glob("scratch-*"))
    return bench.store.publish(staging, made.manifest)


def outputs(artifact: Artifact) -> np.ndarray:
    """Logits of a prompt and of two tokens after it, through the runner."""
    runner = load_runner(artifact, ExecutionSpec())
    steps = [runner.prefill(TOKENS[:, :12]), *(runner.decode(TOKENS[:, i : i + 1]) for i in (12, 13))]
    return np.concatenate(steps)


def record_of(artifact: Artifact) -> dict[str, Any]:
    path = artifact.file(COMPILED_FILE)
    assert path is not None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def with_record(bench: Any, artifact: Artifact, **changes: Any) -> Artifact:
    """The artifact with another compiled.json, as another host would have written it."""
    staging = bench.new_folder("other")
    entry = OutputWriter(staging).file(COMPILED_FILE, json.dumps({**record_of(artifact), **changes}).encode())
    part = artifact.component.model_copy(update={"files": {**artifact.component.files, COMPILED_FILE: entry}})
    return bench.store.publish(staging, artifact.manifest.model_copy(update={"components": {"model": part}}))


@pytest.fixture(scope="module")
def quantized(bench, exported_llama):
    return bench.run(QuantizeWeights, exported_llama)


@pytest.fixture(scope="module")
def made(bench, quantized):
    return compiled(bench, quantized)


class TestACompiledModel:
    @pytest.mark.parametrize("kind", ["exported_llama", "quantized"])
    @pytest.mark.parametrize("prepack", [True, False])
    def test_computes_the_same_through_the_runner(self, bench, request, kind, prepack):
        before = request.getfixturevalue(kind)
        after = compiled(bench, before, prepack=prepack)
        np.testing.assert_allclose(outputs(after), outputs(before), atol=1e-5)
        assert bool(record_of(after)["weights"]) == prepack

    def test_has_a_packed_form_of_every_quantized_weight(self, made):
        record = record_of(made)
        codes = [name for name in made.component.tensors if name.endswith(".q4")]
        assert len(codes) == 11  # of 15: those of keys and values are so small that they are in the graph
        assert set(record["weights"]) == set(codes)
        assert all(
            part in made.component.tensors
            for w in record["weights"].values()
            for f in w.values()
            for part in f["parts"]
        )

    def test_keeps_what_is_not_packed_where_it_lies(self, bench, made, quantized):
        embedding = "model.embed_tokens.weight"
        assert made.component.tensors[embedding] == quantized.component.tensors[embedding]
        packed = record_of(made)["weights"]
        kept = {name: ref for name, ref in made.component.tensors.items() if name in quantized.component.tensors}
        assert {name for name, ref in kept.items() if ref != quantized.component.tensors[name]} == set(packed)

    def test_is_one_graph_for_any_tool(self, bench, made, quantized, logits_of):
        np.testing.assert_allclose(logits_of(made, TOKENS), logits_of(quantized, TOKENS), atol=1e-5)

    def test_says_what_it_is_for(self, made):
        facts = made.manifest.execution["compiled"]
        assert facts["cpu"] == describe_host().cpu_model
        assert facts.items() <= record_of(made).items()

    def test_does_not_depend_on_the_number_of_threads(self, bench, made, quantized):
        assert compiled(bench, quantized, threads=2).digest == made.digest

    def test_is_another_on_another_cpu(self):
        assert CompileOnnxRuntime.depends_on == ("host.cpu", "host.instruction_sets")
        assert "onnxruntime" in CompileOnnxRuntime.libraries

    def test_written_out_and_loaded_from_its_folder_computes_the_same(self, bench, made, quantized):
        folder = bench.new_folder("out") / "model"
        materialize(made, folder)
        runner = load_model(folder, threads=1)
        np.testing.assert_allclose(runner.prefill(TOKENS[:, :12]), outputs(quantized)[:1], atol=1e-5)

    def test_written_out_brings_its_packed_weights(self, bench, made):
        folder = bench.new_folder("out") / "model"
        materialize(made, folder)
        assert packed_entries(read_folder(folder)) == packed_entries(made) > 0


def packed_entries(artifact: Artifact) -> int:
    """How many packed weights the runner names to ONNX Runtime."""
    import onnx

    component = artifact.component
    weights = onnx_session.compiled_for_this_host(artifact, component, onnx_session.CPU)
    graph = onnx.load_from_string(onnx_session.graph_over_files(artifact, component, weights or {})).graph
    return sum(entry.key.startswith("prepacked") for i in graph.initializer for entry in i.external_data)


class TestPackedWeights:
    def damaged(self, bench: Any, artifact: Artifact) -> Artifact:
        """The artifact with a packed weight that holds other numbers."""
        tensors = dict(artifact.component.tensors)
        part, other = (f"model.layers.{layer}.mlp.up_proj.weight.q4.prepacked_0.0" for layer in (0, 1))
        assert tensors[part].length == tensors[other].length
        tensors[part] = tensors[other]
        component = artifact.component.model_copy(update={"tensors": tensors})
        return Artifact(artifact.manifest.model_copy(update={"components": {"model": component}}), artifact.blobs)

    def test_are_what_the_kernels_read(self, bench, made):
        assert np.abs(outputs(self.damaged(bench, made)) - outputs(made)).max() > 1e-3

    def test_of_other_kernels_are_not_taken(self, bench, made):
        """As on a host whose kernels pack otherwise: their key is over what they pack, and this is not it."""
        weights = record_of(made)["weights"]
        for forms in weights.values():
            for form in forms.values():
                form["key"] = form["key"].partition("+")[0] + "+1234"
        foreign = with_record(bench, self.damaged(bench, made), weights=weights)
        np.testing.assert_array_equal(outputs(foreign), outputs(made))


class TestAnotherHost:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"cpu": "Another CPU"}, "cpu Another CPU there"),
            ({"instruction_sets": ["mmx"]}, r"instruction_sets \['mmx'\] there"),
            ({"onnxruntime": "0.1"}, r"onnxruntime 0\.1 there"),
        ],
    )
    def test_loads_it_as_if_it_were_not_compiled_and_says_so(self, bench, made, caplog, change, said):
        foreign = with_record(bench, self.with_damaged_packs(bench, made), **change)
        np.testing.assert_allclose(outputs(foreign), outputs(made), atol=1e-5)
        assert packed_entries(foreign) == 0
        caplog.clear()
        outputs(foreign)
        assert any(record.levelname == "WARNING" for record in caplog.records)
        assert re.search(f"compiled for another host.*{said}", caplog.text)

    def test_refuses_a_graph_with_that_cpu_s_layouts(self, bench, made):
        foreign = with_record(bench, made, cpu="Another CPU", layout=True)
        with pytest.raises(HostError, match="compiled for another host: cpu Another CPU there"):
            load_runner(foreign, ExecutionSpec())

    def with_damaged_packs(self, bench: Any, artifact: Artifact) -> Artifact:
        return TestPackedWeights().damaged(bench, artifact)


def test_layouts_of_this_cpu_are_recorded(bench, graph_artifact):
    header = '<ir_version: 10, opset_import: ["" : 20]>'
    text = "(float[n, 32, 8, 8] x) => (float[n, 32, 6, 6] y) { c = Conv(x, w)  y = Relu(c) }"
    weight = np.random.default_rng(3).standard_normal((32, 32, 3, 3)).astype(np.float32)
    made = compiled(bench, graph_artifact(f"{header} g {text}", w=weight))
    domains = {node.domain for node in load_onnx(made).graph}
    assert record_of(made)["layout"] == ("com.microsoft.nchwc" in domains)
    if "avx2" in describe_host().instruction_sets:
        assert record_of(made)["layout"]


class TestALaterPass:
    def test_makes_a_graph_that_is_no_longer_compiled(self, bench, made, quantized):
        later = bench.run(OnnxOptimizer, made)
        assert COMPILED_FILE not in later.component.files
        assert "compiled" not in later.manifest.execution
        assert not [name for name in later.component.tensors if "prepacked" in name]
        np.testing.assert_allclose(outputs(later), outputs(quantized), atol=1e-5)

    def test_that_keeps_the_execution_block_does_no_harm(self, bench, exported_llama):
        later = bench.run(QuantizeWeights, compiled(bench, exported_llama), bits=8)
        assert Counter(node.op_type for node in load_onnx(later).graph)["MatMulNBits"] == 15
        assert COMPILED_FILE not in later.component.files
        np.testing.assert_allclose(
            outputs(later), outputs(bench.run(QuantizeWeights, exported_llama, bits=8)), atol=1e-3
        )


def test_a_graph_that_came_out_wrong_is_refused(bench, quantized, monkeypatch):
    real = module._take_packed

    def wrong(path: Path) -> Any:
        import onnx

        model = onnx.load(path, load_external_data=False)
        node = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f = 1.0
        path.write_bytes(model.SerializeToString())
        return real(path)

    monkeypatch.setattr(module, "_take_packed", wrong)
    with pytest.raises(PipelineError, match="the compiled graph differs from the one before"):
        compiled(bench, quantized)


LOAD = """
import sys
from pathlib import Path
from pipeline.artifact import Artifact, Manifest
from pipeline.runtime import ExecutionSpec, load_runner
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner

artifact = Artifact(Manifest.model_validate_json(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
OnnxRuntimeRunner.import_libraries(artifact)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

before = anonymous()
runner = load_runner(artifact, ExecutionSpec())
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_packed_weights_are_mapped_and_not_made_in_memory(bench):
    from transformers import LlamaConfig

    from passes.export.export_onnx import ExportOnnx

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 4000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64}
    folder = bench.checkpoint(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    before = bench.run(ExportOnnx, bench.source(folder), verify=False)

    def anonymous_bytes(artifact: Artifact) -> int:
        manifest = bench.new_folder("load") / "manifest.json"
        manifest.write_text(artifact.manifest.model_dump_json())
        command = [sys.executable, "-c", LOAD, str(manifest), str(artifact.blobs)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    weights = sum(ref.length for name, ref in before.component.tensors.items() if "proj" in name)
    assert weights > 50e6
    assert anonymous_bytes(before) > weights
    assert anonymous_bytes(compiled(bench, before)) < 0.3 * weights
