"""A tiny random Llama, and its graph as a fusing pass leaves it: fused attention over a cache that grows in place.

The graph is written by hand, of the operators that ONNX Runtime has for it (GroupQueryAttention,
SkipSimplifiedLayerNormalization …), with an input that says of how many positions logits are wanted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

from pipeline.artifact import Artifact, CacheLayout, Component, Interface, Manifest, TensorRef

VOCABULARY, MAX_LENGTH = tiny_models.VOCABULARY, tiny_models.MAX_LENGTH
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, WIDTH = 64, 96, 2, 4, 2, 16
MICROSOFT = "com.microsoft"

LAYER_PRODUCTS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * WIDTH + 3 * HIDDEN * INTERMEDIATE
"""Numbers in the weights of a layer's products."""

ATTENTION_PRODUCTS = HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * WIDTH
"""And of those before its attention."""

HEAD = HIDDEN * VOCABULARY


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Write the Llama as transformers does, with the tokenizer of `tiny_models`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_models.save_llama(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fused_llama(folder: Path, checkpoint: Path, *, window: int = -1) -> Artifact:
    """The graph of a checkpoint that `save_checkpoint` wrote, with all weights in one file; `window`: of attention."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_file(checkpoint / "model.safetensors")
    arrays = {
        name: np.ascontiguousarray(a.T if "proj" in name or "lm_head" in name else a) for name, a in loaded.items()
    }
    angles = np.outer(np.arange(MAX_LENGTH), 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH))
    arrays |= {"rotary.cos": np.cos(angles).astype(np.float32), "rotary.sin": np.sin(angles).astype(np.float32)}
    nodes: list[Any] = []
    small = {
        "one": np.array([1]),
        "axis": np.array([1]),
        "end": np.array([np.iinfo(np.int64).max]),
    }

    def node(operator: str, inputs: list[str], outputs: str | list[str], domain: str = "", **attributes: Any) -> str:
        outputs = [outputs] if isinstance(outputs, str) else outputs
        nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def product(value: str, weight: str, name: str) -> str:
        return node("MatMul", [value, weight], name)

    def added(value: str, stream: str, gain: str, name: str) -> tuple[str, str]:
        """(the normalized sum, the sum)."""
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        node("SkipSimplifiedLayerNormalization", [value, stream, gain], outputs, MICROSOFT, epsilon=1e-6)
        return outputs[0], outputs[3]

    filled = node("ReduceSum", ["mask", "axis"], "filled", keepdims=0)
    last = node("Cast", [node("Sub", [filled, "one"], "last")], "seqlens_k", to=TensorProto.INT32)
    total = node("Cast", [node("Shape", ["mask"], "total64", start=1, end=2)], "total", to=TensorProto.INT32)
    begin = node("Neg", ["logits_to_keep"], "begin")
    stream = node("Gather", ["model.embed_tokens.weight", "tokens"], "embedded")
    normed = node(
        "SimplifiedLayerNormalization",
        [stream, "model.layers.0.input_layernorm.weight"],
        "first.normed",
        axis=-1,
        epsilon=1e-6,
        stash_type=1,
    )
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        q, k, v = (product(normed, f"{at}.self_attn.{x}_proj.weight", f"{at}.{x}") for x in "qkv")
        made = node(
            "GroupQueryAttention",
            [q, k, v, f"past_k.{i}", f"past_v.{i}", last, total, "rotary.cos", "rotary.sin"],
            [f"{at}.attended", f"present_k.{i}", f"present_v.{i}"],
            MICROSOFT,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            local_window_size=window,
        )
        if i == LAYERS - 1:  # what follows works position by position: on those that are asked for
            made = node("Slice", [made, begin, "end", "axis"], f"{at}.attended.last")
            stream = node("Slice", [stream, begin, "end", "axis"], f"{at}.stream.last")
        out = product(made, f"{at}.self_attn.o_proj.weight", f"{at}.o")
        normed, stream = added(out, stream, f"{at}.post_attention_layernorm.weight", f"{at}.attention")
        gate = product(normed, f"{at}.mlp.gate_proj.weight", f"{at}.gate")
        active = node("Mul", [gate, node("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.active")
        up = product(normed, f"{at}.mlp.up_proj.weight", f"{at}.up")
        down = product(node("Mul", [active, up], f"{at}.gated"), f"{at}.mlp.down_proj.weight", f"{at}.down")
        after = f"model.layers.{i + 1}.input_layernorm.weight" if i + 1 < LAYERS else "model.norm.weight"
        normed, stream = added(down, stream, after, f"{at}.mlp")
    nodes[-1].output[3] = ""  # nobody takes the last sum
    product(normed, "lm_head.weight", "logits")

    tensors: dict[str, TensorRef] = {}
    initializers = [numpy_helper.from_array(array, name) for name, array in small.items()]
    with (folder / "weights.bin").open("wb") as file:
        for name, array in arrays.items():
            ref = TensorRef(
                file="weights/pack", offset=file.tell(), length=array.nbytes, dtype="float32", shape=array.shape
            )
            file.write(array.tobytes())
            tensors[name] = ref
            outside = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
            outside.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights/pack"), ("offset", ref.offset), ("length", ref.length)):
                outside.external_data.add(key=key, value=str(value))
            initializers.append(outside)

    def tensor(name: str, element: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    places = [(part, i) for i in range(LAYERS) for part in "kv"]
    graph = helper.make_graph(
        nodes,
        "fused",
        [
            tensor("tokens", TensorProto.INT64, ["batch", "sequence"]),
            tensor("mask", TensorProto.INT64, ["batch", "total"]),
            *(tensor(f"past_{p}.{i}", TensorProto.FLOAT, ["batch", KV_HEADS, "past", WIDTH]) for p, i in places),
            tensor("logits_to_keep", TensorProto.INT64, [1]),
        ],
        [
            tensor("logits", TensorProto.FLOAT, ["batch", "kept", VOCABULARY]),
            *(tensor(f"present_{p}.{i}", TensorProto.FLOAT, ["batch", KV_HEADS, "there", WIDTH]) for p, i in places),
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    files = {"model.onnx": folder / "model.onnx", "weights/pack": folder / "weights.bin"}
    component = Component(
        format="onnx", files={n: tiny_models.entry_of(path) for n, path in files.items()}, tensors=tensors
    )
    interface = Interface(
        inputs={"tokens": "tokens", "mask": "mask", **{f"past.{p}[{i}]": f"past_{p}.{i}" for p, i in places}},
        outputs={"logits": "logits", **{f"present.{p}[{i}]": f"present_{p}.{i}" for p, i in places}},
        cache=CacheLayout(layers=LAYERS, kv_heads=KV_HEADS, head_dim=WIDTH, in_place=True),
        vocab_size=VOCABULARY,
        max_length=MAX_LENGTH,
        logits_to_keep="logits_to_keep",
    )
    companions = {path.name: tiny_models.entry_of(path) for path in sorted(checkpoint.glob("*.json"))}
    manifest = Manifest(format="onnx", components={"model": component}, files=companions, interface=interface)
    return Artifact(manifest, folder)


def two_phases(prefill: Artifact, decode: Artifact, *, crossover_tokens: int = 4) -> Artifact:
    """One artifact of two: prompts run through `prefill`, single tokens through `decode`."""
    manifest = prefill.manifest.model_copy(
        update={
            "components": {"prefill": prefill.component, "decode": decode.component},
            "execution": {"phases": {"crossover_tokens": crossover_tokens}},
        }
    )
    return Artifact(manifest, prefill.blobs)
