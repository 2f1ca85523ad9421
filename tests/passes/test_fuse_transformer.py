"""fuse_transformer: each family's graph computes what torch does, and what cannot be fused is named."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from passes.export.export_onnx import ExportOnnx
from passes.graph.causal_lm_session import CausalLMSession
from passes.graph.fuse_transformer import FuseTransformer
from pipeline import Artifact, PipelineError, load_onnx, load_runner
from pipeline.runtime import ExecutionSpec
from tests.passes.conftest import SIZES

PROMPT, STEPS = 9, 8
TOKENS = np.random.default_rng(3).integers(3, 300, (2, PROMPT + STEPS), dtype=np.int64)


def configuration(family: str) -> Any:
    import transformers as t

    wide = SIZES | {"hidden_size": 128, "num_key_value_heads": 4}  # heads of 32 values, of which half are turned
    one_head = SIZES | {"num_key_value_heads": 1, "head_dim": 32}
    makers = {
        "llama_mha": lambda: t.LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
        "llama_gqa": lambda: t.LlamaConfig(**SIZES),
        "mistral": lambda: t.MistralConfig(**SIZES, sliding_window=6),
        "qwen2": lambda: t.Qwen2Config(**SIZES),
        "qwen3": lambda: t.Qwen3Config(**SIZES, head_dim=32),
        "phi": lambda: t.PhiConfig(**wide, partial_rotary_factor=0.5),
        "phi3": lambda: t.Phi3Config(**SIZES),
        "gemma": lambda: t.GemmaConfig(**one_head),
        "gpt2": lambda: t.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=300, bos_token_id=1, eos_token_id=2
        ),
    }
    return makers[family]()


SLOW = ["llama_mha", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gpt2"]
FAMILIES = ["llama_gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module", params=FAMILIES)
def fused(bench: Any, request: pytest.FixtureRequest) -> tuple[str, Any, Artifact]:
    """(the family, its checkpoint's folder, its fused graph)."""
    folder = bench.checkpoint(configuration(request.param))
    exported = bench.run(ExportOnnx, bench.source(folder), verify=False)
    return request.param, folder, bench.run(FuseTransformer, exported)


def torch_logits(folder: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of whole sequences, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    return logits


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in load_onnx(artifact).graph)


def stepwise(bench: Any, artifact: Artifact, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of a prompt and then of single tokens, each after what the cache holds."""
    roles = artifact.interface
    model = CausalLMSession(bench.session(artifact), roles, [roles.outputs["logits"]])
    parts = [tokens[:, :PROMPT], *(tokens[:, i : i + 1] for i in range(PROMPT, tokens.shape[1]))]
    logits, past = [], 0
    for part in parts:
        logits.append(model.run(part, past)[roles.outputs["logits"]])
        past += part.shape[1]
    return np.concatenate(logits, axis=1)


class TestEveryFamily:
    def test_computes_what_torch_does_over_a_prompt_and_eight_tokens(self, bench, fused):
        _, folder, artifact = fused
        expected = torch_logits(folder, TOKENS)
        np.testing.assert_allclose(stepwise(bench, artifact, TOKENS), expected, atol=1e-4 * max(1, expected.std()))

    def test_has_one_attention_operator_a_layer_and_none_of_the_parts(self, fused):
        family, _, artifact = fused
        found = operators(artifact)
        assert found["GroupQueryAttention"] == 2
        gone = {"Attention", "RotaryEmbedding", "RMSNormalization", "Cos", "Sin", "Expand", "Range", "GatherND"}
        assert not gone & found.keys(), family

    def test_adds_and_normalizes_in_one_operator(self, fused):
        found = operators(fused[2])
        assert found["SkipSimplifiedLayerNormalization"] + found["SkipLayerNormalization"] >= 2

    def test_gives_as_many_of_the_last_logits_as_asked_for(self, bench, fused):
        artifact = fused[2]
        roles = artifact.interface
        logits = roles.outputs["logits"]
        model = CausalLMSession(bench.session(artifact), roles, [logits])
        whole, last = (model.run(TOKENS, 0, keep=keep)[logits] for keep in (TOKENS.shape[1], 3))
        np.testing.assert_allclose(last, whole[:, -3:], atol=1e-5 * max(1, whole.std()))

    def test_says_that_its_cache_may_lie_in_one_buffer(self, fused):
        cache = fused[2].interface.cache
        assert cache is not None
        assert cache.in_place

    def test_runs_in_the_runner(self, fused):
        runner = load_runner(fused[2], ExecutionSpec())
        expected = torch_logits(fused[1], TOKENS[:1])
        given = [runner.prefill(TOKENS[:1, :PROMPT])]
        given += [runner.decode(TOKENS[:1, i : i + 1]) for i in range(PROMPT, TOKENS.shape[1])]
        np.testing.assert_allclose(np.stack(given, 1), expected[:, PROMPT - 1 :], atol=1e-4 * max(1, expected.std()))


@pytest.fixture(scope="module")
def fused_llama(bench, exported_llama):
    return bench.run(FuseTransformer, exported_llama)


class TestALlamaInHalfPrecision:
    def test_computes_the_same(self, bench, exported_llama, fused_llama):
        before, after = (stepwise(bench, artifact, TOKENS) for artifact in (exported_llama, fused_llama))
        np.testing.assert_allclose(after, before, atol=1e-4 * max(1, before.std()))

    def test_keeps_its_weights_where_they_lie(self, exported_llama, fused_llama):
        large = {n: r for n, r in fused_llama.component.tensors.items() if len(r.shape) == 2 and "rotary" not in n}
        assert large.items() <= exported_llama.component.tensors.items()

    def test_takes_no_positions_any_more(self, fused_llama):
        assert "positions" not in fused_llama.interface.inputs
        assert "position_ids" not in {value.name for value in load_onnx(fused_llama).graph.inputs}

    def test_padding_on_the_right_changes_nothing_on_the_left(self, bench, fused_llama):
        roles = fused_llama.interface
        session = bench.session(fused_llama)
        alone = CausalLMSession(session, roles, [roles.outputs["logits"]]).run(TOKENS[:1, :5], 0)
        cache = roles.cache
        mask = np.array([[1] * 5 + [0] * 4, [1] * 9])
        feeds = {roles.inputs["tokens"]: TOKENS[:, :9], roles.inputs["mask"]: mask, "logits_to_keep": np.array([9])}
        empty = np.zeros((2, cache.kv_heads, 0, cache.head_dim), np.float32)
        feeds |= {name: empty for role, name in roles.inputs.items() if role.startswith("past.")}
        (padded,) = session.run([roles.outputs["logits"]], feeds)
        np.testing.assert_allclose(padded[:1, :5], alone[roles.outputs["logits"]], atol=1e-4)

    def test_keeps_the_modules_that_its_nodes_come_from(self, fused_llama):
        nodes = [n for n in load_onnx(fused_llama).graph if n.op_type == "GroupQueryAttention"]
        scopes = [node.metadata_props["pkg.torch.onnx.name_scopes"] for node in nodes]
        assert ["layers.0.self_attn" in scopes[0], "layers.1.self_attn" in scopes[1]] == [True, True]

    def test_can_be_fused_again_to_no_effect(self, bench, fused_llama):
        again = bench.run(FuseTransformer, fused_llama, allow_partial=True)
        assert operators(again) == operators(fused_llama)

    def test_without_the_option_gives_all_logits(self, bench, exported_llama):
        made = bench.run(FuseTransformer, exported_llama, logits_to_keep=False)
        assert made.interface.logits_to_keep is None


class TestWhatCannotBeFused:
    def test_is_a_graph_without_a_cache(self, bench, llama):
        exported = bench.run(ExportOnnx, llama, cache=False, verify=False)
        with pytest.raises(PipelineError, match="no key-value cache"):
            bench.run(FuseTransformer, exported)

    @pytest.mark.slow
    def test_is_an_older_operator_set(self, bench, llama):
        exported = bench.run(ExportOnnx, llama, opset=18, verify=False)
        with pytest.raises(PipelineError, match="no Attention operator") as raised:
            bench.run(FuseTransformer, exported)
        assert "opset 23" in str(raised.value.hint)

    @pytest.mark.slow
    def test_is_rotation_of_too_few_values_which_stays_outside(self, bench):
        from transformers import LlamaConfig

        folder = bench.checkpoint(LlamaConfig(**SIZES | {"head_dim": 8}))
        made = bench.run(FuseTransformer, bench.run(ExportOnnx, bench.source(folder), verify=False))
        found = operators(made)
        assert (found["GroupQueryAttention"], found["RotaryEmbedding"]) == (2, 4)
        expected = torch_logits(folder, TOKENS)
        np.testing.assert_allclose(stepwise(bench, made, TOKENS), expected, atol=1e-4 * max(1, expected.std()))

    def test_is_named_layer_by_layer_with_its_reason(self, bench, exported_llama, altered):
        def look_ahead(model: Any) -> None:
            attention = [node for node in model.graph if node.op_type == "Attention"]
            attention[1].attributes["is_causal"] = _integer("is_causal", 1)

        with pytest.raises(PipelineError, match=r"1 of 2 attention layers cannot be fused: .*layers\.1.*mask"):
            bench.run(FuseTransformer, altered(exported_llama, look_ahead))

    def test_is_kept_where_that_is_allowed(self, bench, exported_llama, altered):
        def look_ahead(model: Any) -> None:
            attention = [node for node in model.graph if node.op_type == "Attention"]
            attention[1].attributes["softcap"] = _float("softcap", 0.0)
            attention[1].attributes["is_causal"] = _integer("is_causal", 1)

        made = bench.run(FuseTransformer, altered(exported_llama, look_ahead), allow_partial=True, verify=False)
        found = operators(made)
        assert (found["GroupQueryAttention"], found["Attention"]) == (1, 1)
        assert made.interface.cache is not None
        assert not made.interface.cache.in_place


def _integer(name: str, value: int) -> Any:
    import onnx_ir

    return onnx_ir.AttrInt64(name, value)


def _float(name: str, value: float) -> Any:
    import onnx_ir

    return onnx_ir.AttrFloat32(name, value)


@pytest.fixture
def altered(bench: Any) -> Any:
    """The artifact with its graph changed by a function."""
    from pipeline import save_onnx
    from pipeline.store.writer import OutputWriter

    def publish(artifact: Artifact, change: Any) -> Artifact:
        model = load_onnx(artifact)
        change(model)
        staging = bench.new_folder("altered")
        return bench.store.publish(staging, save_onnx(model, OutputWriter(staging), like=artifact).manifest)

    return publish
