"""export_onnx: what the graph computes, where its weights lie, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from passes.export.causal_lm import causal_lm_config, reference_causal_lm, refused_operator
from passes.export.export_onnx import KEPT_METADATA, ExportOnnx, number_anew
from passes.export.verify import _calls, verify_against_torch
from pipeline import Artifact, CacheLayout, Interface, PassContext, PipelineError, load_onnx
from pipeline.artifact import ONNX_FILE
from pipeline.store.writer import OutputWriter

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = np.random.default_rng(1).integers(3, 300, (2, 12), dtype=np.int64)


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes in float32, loaded as any user loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    path = artifact.file(ONNX_FILE)
    assert path is not None
    return onnx.load(path, load_external_data=False).graph


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(artifact).node)


def edited(llama_folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A folder with the same weights and another config.json."""
    config = json.loads((llama_folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "model.safetensors").symlink_to(llama_folder / "model.safetensors")
    return tmp_path


class TestTheGraph:
    def test_gives_torchs_logits(self, exported_llama, llama_folder, logits_of):
        np.testing.assert_allclose(logits_of(exported_llama, TOKENS), torch_logits(llama_folder, TOKENS), atol=2e-4)

    def test_continues_from_its_own_cache_token_by_token(self, exported_llama, llama_folder, decoder):
        steps = decoder(exported_llama)
        parts = [steps.step(TOKENS[:, :5])] + [steps.step(TOKENS[:, i : i + 1]) for i in range(5, 12)]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), torch_logits(llama_folder, TOKENS), atol=2e-4)

    def test_takes_any_batch_size(self, exported_llama, logits_of):
        both = logits_of(exported_llama, TOKENS)
        np.testing.assert_allclose(logits_of(exported_llama, TOKENS[:1]), both[:1], atol=2e-5)

    def test_ignores_what_the_mask_hides(self, exported_llama, logits_of):
        padded = np.concatenate([np.full((1, 3), 7), TOKENS[:1, :6]], axis=1)
        mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
        hidden = logits_of(exported_llama, padded, mask)[:, 3:]
        np.testing.assert_allclose(hidden, logits_of(exported_llama, TOKENS[:1, :6]), atol=2e-5)

    def test_has_one_node_for_each_attention_norm_and_rotation(self, exported_llama):
        found = operators(exported_llama)
        assert (found["Attention"], found["RMSNormalization"], found["RotaryEmbedding"]) == (2, 5, 4)
        assert (found["Cos"], found["Sin"]) == (1, 1)

    def test_multiplies_by_weights_stored_as_torch_stores_them(self, exported_llama):
        weights = {i.name: tuple(i.dims) for i in graph_of(exported_llama).initializer}
        assert weights["model.layers.0.mlp.up_proj.weight"] == (96, 64)

    def test_says_its_dynamic_dimensions(self, exported_llama):
        graph = graph_of(exported_llama)
        dims = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in [*graph.input, *graph.output]
        }
        assert dims["input_ids"] == ["batch", "sequence"]
        assert dims["past_key_values.1.value"] == ["batch", 2, "past", 16]
        assert dims["present.1.value"] == ["batch", 2, "past + sequence", 16]
        assert dims["logits"] == ["batch", "sequence", 300]

    def test_is_valid_onnx(self, exported_llama, bench):
        from pipeline.store.folder import materialize

        folder = bench.new_folder("valid") / "model"
        materialize(exported_llama, folder)
        onnx.checker.check_model(folder / ONNX_FILE, full_check=True)


class TestTheWeights:
    def test_stay_in_the_checkpoint(self, bench, exported_llama, llama):
        component = exported_llama.component
        assert bench.written[exported_llama.digest] == [component.files[ONNX_FILE].digest]
        spans = {(ref.offset, ref.length, ref.dtype) for ref in llama.component.tensors.values()}
        assert {(ref.offset, ref.length, ref.dtype) for ref in component.tensors.values()} == spans
        checkpoint = llama.component.files["model.safetensors"]
        assert {component.files[ref.file] for ref in component.tensors.values()} == {checkpoint}

    def test_are_the_checkpoints_bytes(self, exported_llama, llama):
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
            assert np.array_equal(exported_llama.tensor(name), llama.tensor(name))

    def test_of_a_tied_head_are_the_embeddings(self, exported_llama):
        tensors = exported_llama.component.tensors
        assert tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"]

    def test_are_as_many_bytes_as_before(self, exported_llama, llama):
        assert exported_llama.manifest.weights_bytes == llama.manifest.weights_bytes

    def test_in_half_precision_keep_it_and_are_cast_where_used(self, exported_llama):
        graph = graph_of(exported_llama)
        stored = {i.name: i.data_type for i in graph.initializer if i.name.endswith(".weight")}
        assert set(stored.values()) == {onnx.TensorProto.BFLOAT16}
        reading = {name: node.op_type for node in graph.node for name in node.input if name in stored}
        assert reading.pop("model.embed_tokens.weight") == "Gather"
        assert set(reading.values()) == {"Cast"}

    def test_that_are_computed_are_in_the_graph(self, exported_llama):
        inline = [i.name for i in graph_of(exported_llama).initializer if i.data_location != onnx.TensorProto.EXTERNAL]
        assert "model.rotary_emb.inv_freq" in inline


class TestTheArtifact:
    def test_names_every_input_and_output_by_role(self, exported_llama):
        graph, interface = graph_of(exported_llama), exported_llama.interface
        assert [value.name for value in graph.input] == list(interface.inputs.values())
        assert [value.name for value in graph.output] == list(interface.outputs.values())
        assert interface.inputs["past.k[1]"] == "past_key_values.1.key"
        assert interface.outputs["present.v[0]"] == "present.0.value"

    def test_describes_the_cache_and_the_model(self, exported_llama):
        interface = exported_llama.interface
        assert interface.cache is not None
        assert interface.cache == CacheLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", in_place=False)
        assert (interface.task, interface.vocab_size, interface.max_length) == ("causal-lm", 300, 64)

    def test_carries_the_companions_and_no_execution(self, exported_llama, llama):
        assert exported_llama.manifest.files == llama.manifest.files
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= exported_llama.manifest.files.keys()
        assert llama.manifest.execution and exported_llama.manifest.execution == {}

    def test_names_no_file_of_this_machine(self, exported_llama, llama_folder):
        path = exported_llama.file(ONNX_FILE)
        assert path is not None
        data = path.read_bytes()
        for trace in (b".py", str(Path.home()).encode(), str(Path.cwd()).encode(), str(llama_folder).encode()):
            assert trace not in data

    def test_keeps_the_modules_that_nodes_come_from(self, exported_llama):
        scopes = [
            {p.key: p.value for p in node.metadata_props}
            for node in graph_of(exported_llama).node
            if node.op_type == "Attention"
        ]
        assert all(set(props) == set(KEPT_METADATA) for props in scopes)
        assert "'model.layers.1.self_attn'" in scopes[1]["pkg.torch.onnx.name_scopes"]

    @pytest.mark.parametrize("shift", [1, 7, 1000])
    def test_is_the_same_bytes_whatever_numbers_torch_had_reached(self, shift):
        """What torch folds away is counted, and which libraries are loaded decides how much that is."""

        def graph(by: int) -> ir.Model:
            kept = ir.Value(name="cos_1", const_value=ir.tensor(np.ones(4, np.float32)))
            made = [ir.Value(name=f"val_{n + by}", const_value=ir.tensor(np.ones(n, np.int64))) for n in (3, 1, 2)]
            tokens = ir.Value(name="val_2", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.FLOAT))
            nodes = [ir.node("Mul", [tokens, kept], name=f"node_Mul_{4 + by}")]
            nodes[0].outputs[0].name = f"cos_{5 + by}"
            for number, value in enumerate(made):
                nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], value], name=f"node_Reshape_{number * 9 + by}"))
                nodes[-1].outputs[0].name = f"val_{number * 11 + 20 + by}"
            nodes[-1].outputs[0].name = "logits_5"
            built = ir.Graph([tokens], nodes[-1].outputs, nodes=nodes, initializers=[made[0], kept, *made[1:]])
            return ir.Model(built, ir_version=10)

        first, second = graph(0), graph(shift)
        for model in (first, second):
            number_anew(model, keep={"cos_1"})
        assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
        found = [name for node in first.graph for name in (node.name, node.outputs[0].name)]
        assert found == [
            "node_Mul",
            "cos",
            "node_Reshape",
            "val_4",
            "node_Reshape_1",
            "val_5",
            "node_Reshape_2",
            "logits_5",
        ]
        assert list(first.graph.initializers) == ["val", "cos_1", "val_1", "val_3"]
        assert [value.name for value in (*first.graph.inputs, *first.graph.outputs)] == ["val_2", "logits_5"]

    def test_no_two_values_are_numbered_alike(self):
        names = ["tmp_1", "tmp_2", "tmp_1_2", "tmp", "tmp_1_3", "tmp_5_5"]
        first = ir.Value(name="tokens", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes: list[ir.Node] = []
        for name in names:
            nodes.append(ir.node("Abs", [nodes[-1].outputs[0] if nodes else first], name=f"node_{name}"))
            nodes[-1].outputs[0].name = name
        kept = [ir.Value(name=f"tmp_{n}_1", const_value=ir.tensor(np.ones(n, np.int64))) for n in (1, 2)]
        last = ir.node("Abs", [nodes[-1].outputs[0]], name="last")
        last.outputs[0].name = "logits"
        graph = ir.Graph([first], last.outputs, nodes=[*nodes, last], initializers=kept)
        number_anew(ir.Model(graph, ir_version=10), keep={})
        found = [node.outputs[0].name for node in graph] + list(graph.initializers)
        assert len(set(found)) == len(found) == len(names) + 3
        assert len({node.name for node in graph}) == len(names) + 1

    @pytest.mark.slow
    def test_is_the_same_bytes_in_another_process(self, exported_llama, llama_folder, tmp_path):
        script = (
            "import sys; from pathlib import Path\n"
            "from passes.export.export_onnx import ExportOnnx\n"
            "from pipeline import PassContext\n"
            "from pipeline.models.source import find_source, source_artifact\n"
            "from pipeline.store.store import Store\n"
            "from pipeline.store.writer import OutputWriter\n"
            "folder, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
            "artifact = source_artifact(find_source('path', str(folder), relative_to=folder), Store(out / 'store'))\n"
            "made = ExportOnnx().run(\n"
            "    artifact, ExportOnnx.Params(verify=False), PassContext(output=OutputWriter(out / 'staging')))\n"
            "print(made.digest)\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", script, str(llama_folder), str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split()[-1] == exported_llama.digest


@pytest.mark.slow
class TestOtherModels:
    """Verification is part of each export: a graph that differed from torch would raise."""

    def export(self, bench: Any, config: Any, dtype: str = "float32", **params: Any) -> Artifact:
        return bench.run(ExportOnnx, bench.source(bench.checkpoint(config, dtype)), **params)

    def test_a_float32_checkpoint_needs_no_casts(self, bench):
        from transformers import LlamaConfig

        made = self.export(bench, LlamaConfig(**SIZES, tie_word_embeddings=False))
        tensors = made.component.tensors
        assert {ref.dtype for ref in tensors.values()} == {"float32"}
        assert tensors["lm_head.weight"].offset != tensors["model.embed_tokens.weight"].offset
        assert not any(name.endswith(".float32") for node in graph_of(made).node for name in node.output)

    def test_opset_18_does_without_the_fused_operators(self, bench, logits_of):
        from transformers import LlamaConfig

        folder = bench.checkpoint(LlamaConfig(**SIZES), "float16")
        made = bench.run(ExportOnnx, bench.source(folder), opset=18)
        assert not {"Attention", "RMSNormalization", "RotaryEmbedding"} & operators(made).keys()
        np.testing.assert_allclose(logits_of(made, TOKENS), torch_logits(folder, TOKENS), atol=2e-4)

    def test_a_checkpoint_in_shards_is_referred_to_shard_by_shard(self, bench):
        from transformers import LlamaConfig

        folder = bench.checkpoint(LlamaConfig(**SIZES), max_shard_size="150KB")
        made = bench.run(ExportOnnx, bench.source(folder))
        shards = {ref.file for ref in made.component.tensors.values()}
        assert len(shards) == len(list(folder.glob("*.safetensors"))) > 1

    def test_qwen2_has_biases(self, bench):
        from transformers import Qwen2Config

        made = self.export(bench, Qwen2Config(**SIZES), "bfloat16")
        assert "model.layers.0.self_attn.q_proj.bias" in made.component.tensors

    def test_mistral_slides_its_window(self, bench, logits_of):
        from transformers import MistralConfig

        folder = bench.checkpoint(MistralConfig(**SIZES, sliding_window=4))
        made = bench.run(ExportOnnx, bench.source(folder))
        np.testing.assert_allclose(logits_of(made, TOKENS), torch_logits(folder, TOKENS), atol=2e-4)

    def test_gemma_scales_its_embeddings_and_adds_one_to_its_norms(self, bench):
        from transformers import GemmaConfig

        assert operators(self.export(bench, GemmaConfig(**SIZES, head_dim=16), "bfloat16"))["RMSNormalization"] == 5

    def test_gpt2_is_no_llama_at_all(self, bench):
        from transformers import GPT2Config

        config = GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        made = self.export(bench, config)
        assert made.interface.cache is not None and made.interface.cache.kv_heads == 4

    def test_an_operator_that_cannot_be_written_is_named(self, bench):
        from transformers import FalconConfig

        config = FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, bos_token_id=1, eos_token_id=2
        )
        with pytest.raises(
            PipelineError,
            match=r"does not support this 'falcon' model: the operator aten\.scaled_dot_product_attention\.default: "
            r"\w+Error: \S+",
        ) as caught:
            self.export(bench, config, verify=False)
        assert "\n" not in caught.value.message


class TestWithoutACache:
    """`cache: false`, by both exporters."""

    @pytest.fixture(scope="class", params=["dynamo", "torchscript"])
    def exporter(self, request):
        return request.param

    @pytest.fixture(scope="class")
    def folder(self, bench):
        from transformers import LlamaConfig

        return bench.checkpoint(LlamaConfig(**SIZES, tie_word_embeddings=False))

    @pytest.fixture(scope="class")
    def whole(self, bench, folder, exporter):
        return bench.run(ExportOnnx, bench.source(folder), cache=False, exporter=exporter)

    def test_the_graph_takes_tokens_and_gives_logits_and_nothing_else(self, whole):
        graph = graph_of(whole)
        assert [value.name for value in graph.input] == ["input_ids"]
        assert [value.name for value in graph.output] == ["logits"]
        assert (whole.interface.inputs, whole.interface.outputs) == ({"tokens": "input_ids"}, {"logits": "logits"})
        assert whole.interface.cache is None
        assert (whole.interface.vocab_size, whole.interface.max_length) == (300, 64)

    @pytest.mark.parametrize("shape", [(2, 12), (1, 1), (3, 7)])
    def test_it_gives_torchs_logits_for_any_batch_and_length(self, bench, whole, folder, shape):
        tokens = TOKENS.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
        given = bench.session(whole).run(["logits"], {"input_ids": tokens})[0]
        np.testing.assert_allclose(given, torch_logits(folder, tokens), atol=2e-4)

    def test_its_weights_stay_in_the_checkpoint(self, bench, whole, folder):
        checkpoint = bench.source(folder).component
        large = {ref.offset for ref in checkpoint.tensors.values() if ref.length > 1024}
        everywhere = {ref.offset for ref in checkpoint.tensors.values()}
        assert large <= {ref.offset for ref in whole.component.tensors.values()} <= everywhere
        assert {entry.digest for name, entry in whole.component.files.items() if name != ONNX_FILE} == {
            entry.digest for entry in checkpoint.files.values()
        }

    def test_it_names_no_file_of_this_machine(self, whole):
        text = whole.file(ONNX_FILE).read_bytes()
        assert b".py" not in text and b"/work" not in text and b"site-packages" not in text

    def test_half_precision_weights_keep_it(self, bench, exporter, logits_of):
        from transformers import LlamaConfig

        folder = bench.checkpoint(LlamaConfig(**SIZES), "bfloat16")
        made = bench.run(ExportOnnx, bench.source(folder), cache=False, exporter=exporter)
        assert {ref.dtype for ref in made.component.tensors.values()} == {"bfloat16"}
        given = bench.session(made).run(["logits"], {"input_ids": TOKENS})[0]
        np.testing.assert_allclose(given, torch_logits(folder, TOKENS), atol=2e-4)

    def test_two_exports_are_the_same_bytes(self, bench, whole, folder, exporter):
        again = bench.run(ExportOnnx, bench.source(folder), cache=False, exporter=exporter)
        assert again.digest == whole.digest

    def test_the_graph_is_compared_with_torch(self, whole, bench, folder, tmp_path):
        model = load_onnx(whole)
        powers = [node for node in model.graph if node.op_type in ("RMSNormalization", "Sqrt")]
        powers[-1].op_type = {"RMSNormalization": "RMSNormalization", "Sqrt": "Exp"}[powers[-1].op_type]
        if powers[-1].op_type == "RMSNormalization":
            powers[-1].attributes["epsilon"] = ir.AttrFloat32("epsilon", 10.0)
        context = PassContext(output=OutputWriter(tmp_path / "staging"))
        with pytest.raises(PipelineError, match=r"differs from torch with batch 2, 7 tokens, past 0: logits"):
            verify_against_torch(model, bench.source(folder), whole.interface, tolerance=1e-3, context=context)

    def test_torchscript_leaves_an_identity_for_equal_parameters_and_dynamo_none(self, bench, exporter):
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        folder = bench.new_folder("fresh")
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder)  # all norms are ones
        (folder / "tokenizer.json").write_text("{}")
        made = bench.run(ExportOnnx, bench.source(folder), cache=False, exporter=exporter)
        assert operators(made)["Identity"] == {"dynamo": 0, "torchscript": 4}[exporter]

    def test_a_family_without_positions_can_be_exported_too(self, bench, exporter):
        from transformers import GPT2Config

        config = GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        made = bench.run(ExportOnnx, bench.source(bench.checkpoint(config)), cache=False, exporter=exporter)
        assert made.interface.cache is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"exporter": "torchscript"}, "without a cache only: add `cache: false`"),
        ({"exporter": "torchscript", "cache": False, "opset": 21}, "opset 20 at most, not 21"),
        ({"exporter": "tensorflow"}, "'dynamo' or 'torchscript'"),
    ],
)
def test_an_exporter_that_cannot_do_it_is_refused(params, message):
    with pytest.raises(ValidationError, match=message):
        ExportOnnx.Params(**params)


def test_torchscript_writes_its_own_latest_opset_unless_told():
    assert ExportOnnx.Params(exporter="torchscript", cache=False).opset == 20
    assert ExportOnnx.Params(exporter="torchscript", cache=False, opset=18).opset == 18
    assert ExportOnnx.Params(cache=False).opset == 23


class TestVerification:
    @pytest.fixture(autouse=True)
    def _give_context(self, tmp_path):
        self.context = PassContext(output=OutputWriter(tmp_path / "staging"))

    def check(self, model: Any, artifact: Artifact, interface: Interface, tolerance: float = 1e-3) -> dict[str, float]:
        return verify_against_torch(model, artifact, interface, tolerance=tolerance, context=self.context)

    def test_compares_an_empty_and_a_filled_cache(self, exported_llama, llama):
        errors = self.check(load_onnx(exported_llama), llama, exported_llama.interface)
        assert list(errors) == [
            "batch 2, 7 tokens, past 0",
            "batch 2, 3 tokens, past 7",
            "batch 2, 1 tokens, past 10",
        ]
        assert all(0 < error < 1e-4 for error in errors.values())

    def test_refuses_a_graph_that_computes_something_else(self, exported_llama, llama):
        model = load_onnx(exported_llama)
        last = [node for node in model.graph if node.op_type == "RMSNormalization"][-1]
        last.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10.0)
        with pytest.raises(PipelineError, match=r"7 tokens, past 0: logits\[\d, \d, \d+\] is \S+, torch gives \S+"):
            self.check(model, llama, exported_llama.interface)

    def test_refuses_a_graph_whose_cache_is_wrong(self, exported_llama, llama):
        model = load_onnx(exported_llama)
        roles = exported_llama.interface
        key, value = roles.outputs["present.k[1]"], roles.outputs["present.v[1]"]
        names = {"present.k[1]": value, "present.v[1]": key}
        swapped = roles.model_copy(update={"outputs": roles.outputs | names})
        with pytest.raises(PipelineError, match=r"past 0: present\.1\."):
            self.check(model, llama, swapped)

    def test_refuses_a_graph_that_does_not_run(self, exported_llama, llama):
        model = load_onnx(exported_llama)
        model.graph.initializers["model.rotary_emb.inv_freq"].const_value = ir.Tensor(np.ones((1, 5, 1), np.float32))
        with pytest.raises(PipelineError, match="cannot run the exported graph on 7 tokens after 0: "):
            self.check(model, llama, exported_llama.interface)

    def test_refuses_a_graph_that_onnx_runtime_does_not_load(self, exported_llama, llama):
        model = load_onnx(exported_llama)
        model.graph[-1].op_type = "MatMull"
        with pytest.raises(PipelineError, match=r"ONNX Runtime refuses the exported graph: .*MatMull"):
            self.check(model, llama, exported_llama.interface)

    def test_refuses_what_is_not_a_number(self, bench, llama_folder, exported_llama, tmp_path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(llama_folder / "model.safetensors")
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
        with pytest.raises(PipelineError, match="the torch model itself gives values in logits that are not finite"):
            self.check(load_onnx(exported_llama), bench.source(tmp_path), exported_llama.interface)

    def test_holds_the_tolerance_that_is_asked_for(self, exported_llama, llama):
        with pytest.raises(PipelineError, match="1e-12 is allowed"):
            self.check(load_onnx(exported_llama), llama, exported_llama.interface, tolerance=1e-12)

    @pytest.mark.parametrize("kind", ["LlamaConfig", "MistralConfig", "Qwen2Config"])
    def test_of_what_would_be_large_in_float32_compares_the_first_layers_and_says_so(
        self, bench, monkeypatch, caplog, kind
    ):
        import transformers

        config = getattr(transformers, kind)(**SIZES | {"num_hidden_layers": 5}, tie_word_embeddings=False)
        source = bench.source(bench.checkpoint(config, "bfloat16"))
        made = bench.run(ExportOnnx, source, verify=False)
        monkeypatch.setattr("passes.export.verify.WIDENED_BYTES", 1000)
        before = load_onnx(made)
        with caplog.at_level("INFO"):
            errors = self.check(before, source, made.interface)
        assert all(0 < error < 1e-4 for error in errors.values())
        assert "the first 3 of 5 layers; not the later ones, nor the head" in caplog.text
        assert [value.name for value in before.graph.outputs] == list(made.interface.outputs.values())
        wrong = load_onnx(made)
        norm = next(node for node in wrong.graph if node.op_type == "RMSNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10.0)
        with pytest.raises(PipelineError, match=r"differs from torch with batch 2, 7 tokens, past 0: present\.0\.key"):
            self.check(wrong, source, made.interface)

    @pytest.mark.parametrize(("max_length", "calls"), [(None, [7, 3, 1]), (64, [7, 3, 1]), (8, [6, 1, 1]), (2, [1, 1])])
    def test_stays_within_the_longest_sequence(self, max_length, calls):
        assert list(_calls(max_length)) == calls

    def test_keeps_half_precision_weights_mapped_outside_of_their_module(self, llama):
        import torch

        model = reference_causal_lm(llama).module
        with torch.no_grad():
            model(torch.from_numpy(TOKENS))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("No ONNX function found for <OpOverload(op='aten.sort', overload='stable')>.", "aten.sort.stable"),
        (
            "%x : [num_users=1] = call_function[target=torch.ops.aten.fft_rfft.default](args = (%y,))",
            "aten.fft_rfft.default",
        ),
        ("hidden_size is not a number", None),
    ],
)
def test_the_operator_that_an_exporter_refuses_is_found_behind_its_error(text, operator):
    inner = ValueError(text)
    inner.__cause__ = KeyError("x")
    outer = RuntimeError("this is step 3 of 3")
    outer.__cause__ = inner
    assert refused_operator(outer) == operator


class TestRefusals:
    def test_an_encoder_decoder_is_no_causal_lm(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, model_type="t5")
        with pytest.raises(PipelineError, match="'t5' is not a causal language model"):
            bench.run(ExportOnnx, bench.source(folder))

    def test_an_unknown_architecture_is_named(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, model_type="lama", auto_map={"AutoModelForCausalLM": "modeling.Lama"})
        with pytest.raises(PipelineError, match="no architecture 'lama'") as caught:
            bench.run(ExportOnnx, bench.source(folder))
        assert "trust_remote_code" in str(caught.value)

    def test_a_config_without_a_model_type_is_refused(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, model_type=None)
        with pytest.raises(PipelineError, match="model_type"):
            causal_lm_config(bench.source(folder))

    def test_a_quantized_checkpoint_is_refused(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(PipelineError, match="already quantized"):
            bench.run(ExportOnnx, bench.source(folder))

    def test_a_missing_tensor_is_named(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, attention_bias=True)
        with pytest.raises(PipelineError, match=r"no tensor for the parameter 'model\.layers\.0\..*bias"):
            bench.run(ExportOnnx, bench.source(folder))

    def test_a_tensor_of_another_shape_is_named_with_both_shapes(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, intermediate_size=128)
        with pytest.raises(PipelineError, match=r"gate_proj\.weight' has shape \[96, 64\].* has \[128, 64\]"):
            bench.run(ExportOnnx, bench.source(folder))

    def test_an_impossible_config_fails_without_a_traceback(self, bench, llama_folder, tmp_path):
        folder = edited(llama_folder, tmp_path, hidden_act="no_such_activation")
        with pytest.raises(PipelineError, match="cannot build the 'llama' model"):
            bench.run(ExportOnnx, bench.source(folder))

    def test_transforms_cannot_be_exported(self, bench, llama):
        manifest = llama.manifest.model_copy(update={"transforms": ({"transform": "swap"},)})
        with pytest.raises(PipelineError, match="transforms cannot be exported: swap"):
            bench.run(ExportOnnx, Artifact(manifest, llama.blobs))

    @pytest.mark.parametrize("opset", [17, 24, "23"])
    def test_opsets_outside_the_exporters_range_are_refused(self, opset):
        with pytest.raises(ValidationError, match="opset"):
            ExportOnnx.Params(opset=opset)


def test_importing_the_passes_loads_nothing_heavy():
    script = (
        "import sys, passes.export.export_onnx, passes.quantize.quantize_weights\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
