"""Tiny models for tests: a random Llama checkpoint, and a hand-made ONNX causal language model with one layer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import Artifact, CacheLayout, Component, FileEntry, Interface, Manifest, TensorRef

VOCABULARY = 64
MAX_LENGTH = 48
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WIDTH, HEADS = 16, 2
HEAD = WIDTH // HEADS


def entry_of(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data), path=str(path.resolve()))


def save_llama(folder: Path, *, dtype: str = "float32", seed: int = 0, tied: bool = False) -> Path:
    """Write a random Llama checkpoint and a tokenizer of words w0 … w63."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=min(words)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def torch_artifact(folder: Path, *, dtype: str = "auto", weights_name: str | None = None) -> Artifact:
    """The checkpoint as an artifact, its tensors found in the header of the safetensors file."""
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    name = weights_name or weights.name
    tensors = {
        tensor: TensorRef(
            file=name,
            offset=8 + length + place["data_offsets"][0],
            length=place["data_offsets"][1] - place["data_offsets"][0],
            dtype=DTYPES[place["dtype"]],
            shape=tuple(place["shape"]),
        )
        for tensor, place in header.items()
    }
    companions = {path.name: entry_of(path) for path in sorted(folder.glob("*.json"))}
    manifest = Manifest(
        format="torch",
        components={"model": Component(format="torch", files={name: entry_of(weights)}, tensors=tensors)},
        files=companions,
        interface=Interface(vocab_size=VOCABULARY, max_length=MAX_LENGTH),
        execution={"dtype": dtype},
    )
    return Artifact(manifest, folder)


def llama_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of the whole sequence at once, by transformers itself."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        logits: np.ndarray = LlamaForCausalLM.from_pretrained(folder)(torch.from_numpy(tokens)).logits.float().numpy()
    return logits


def onnx_weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "embed": random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "places": random.normal(size=(MAX_LENGTH, WIDTH)).astype(np.float32),
        "head": random.normal(size=(WIDTH, VOCABULARY)).astype(np.float32),
    }


def onnx_logits(weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """What the graph below computes for a whole sequence [B, S], in numpy."""
    batch, length = tokens.shape
    x = weights["embed"][tokens] + weights["places"][:length]  # [B, S, D]
    heads = x.reshape(batch, length, HEADS, HEAD).transpose(0, 2, 1, 3)  # [B, H, S, d]
    scores = heads @ heads.transpose(0, 1, 3, 2)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -1e9)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weight / weight.sum(-1, keepdims=True)) @ (heads * 2)
    logits: np.ndarray = mixed.transpose(0, 2, 1, 3).reshape(batch, length, WIDTH) @ weights["head"]
    return logits


def onnx_artifact(
    folder: Path,
    *,
    seed: int = 0,
    prefix: str = "",
    weight_dtype: str = "float32",
    extra_identity: bool = False,
    scale: float = 2.0,
    shift: int = 0,
    execution: dict[str, Any] | None = None,
    cached: bool = True,
) -> Artifact:
    """A one-layer attention model whose key and value are the embedding and `scale` times the embedding.

    `cached` says whether it takes and gives a key-value cache. `prefix` goes before the names of inner values, `shift`
    moves the weights within their file, and `weight_dtype` may be bfloat16; none of these three changes what is
    computed, the last but for rounding.
    """
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(ml_dtypes.bfloat16 if weight_dtype == "bfloat16" else weight_dtype)
    element = TensorProto.BFLOAT16 if weight_dtype == "bfloat16" else TensorProto.FLOAT
    arrays = {name: array.astype(kind) for name, array in onnx_weights(seed).items()}
    offset, tensors, initializers = shift, {}, []
    with (folder / "weights.bin").open("wb") as file:
        file.write(bytes(shift))
        for name, array in arrays.items():
            raw = array.tobytes()
            tensors[name] = (offset, len(raw), array.shape)
            file.write(raw)
            external = TensorProto(name=name, data_type=element, dims=array.shape)
            external.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights/pack"), ("offset", offset), ("length", len(raw))):
                external.external_data.add(key=key, value=str(value))
            initializers.append(external)
            offset += len(raw)

    nodes = []

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def inner(name: str) -> str:
        return prefix + name

    def constant(name: str, array: np.ndarray) -> str:
        initializers.append(onnx.numpy_helper.from_array(array, inner(name)))
        return inner(name)

    def weight(name: str) -> str:
        return name if element == TensorProto.FLOAT else node("Cast", [name], inner(name + "_f"), to=TensorProto.FLOAT)

    token = node("Gather", [weight("embed"), "tokens"], inner("token"))
    place = node("Gather", [weight("places"), "positions"], inner("place"))
    x = node("Add", [token, place], inner("x"))
    split = node("Reshape", [x, constant("split", np.array([0, 0, HEADS, HEAD]))], inner("split_x"))
    heads = node("Transpose", [split], inner("heads"), perm=[0, 2, 1, 3])
    values = node("Mul", [heads, constant("scale", np.array(scale, np.float32))], inner("values"))
    if cached:
        node("Concat", ["past_k", heads], "present_k", axis=2)
        node("Concat", ["past_v", values], "present_v", axis=2)
    else:
        node("Identity", [heads], "present_k")
        node("Identity", [values], "present_v")
    keys = node("Transpose", ["present_k"], inner("keys"), perm=[0, 1, 3, 2])
    scores = node("MatMul", [heads, keys], inner("scores"))
    # a query at position p sees the keys 0 … p: [S, 1] >= [T]
    length = node("Squeeze", [node("Shape", ["present_k"], inner("dims"), start=2, end=3)], inner("length"))
    columns = node("Range", [constant("zero", np.array(0)), length, constant("one", np.array(1))], inner("columns"))
    first = node("Gather", ["positions", constant("row", np.array(0))], inner("first"), axis=0)
    rows = node("Unsqueeze", [first, constant("axis", np.array([1]))], inner("rows"))
    seen = node("GreaterOrEqual", [rows, columns], inner("seen"))
    masked = node("Where", [seen, scores, constant("never", np.array(-1e9, np.float32))], inner("masked"))
    mixed = node("MatMul", [node("Softmax", [masked], inner("share"), axis=-1), "present_v"], inner("mixed"))
    back = node("Transpose", [mixed], inner("back"), perm=[0, 2, 1, 3])
    joined = node("Reshape", [back, constant("join", np.array([0, 0, WIDTH]))], inner("joined"))
    if extra_identity:
        joined = node("Identity", [joined], inner("same"))
    node("MatMul", [joined, weight("head")], "logits")

    def tensor(name: str, element_type: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element_type, shape)

    cache, present = ["batch", HEADS, "past", HEAD], ["batch", HEADS, "total", HEAD]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            tensor("tokens", TensorProto.INT64, ["batch", "sequence"]),
            tensor("positions", TensorProto.INT64, ["batch", "sequence"]),
            *([tensor(name, TensorProto.FLOAT, cache) for name in ("past_k", "past_v")] if cached else []),
        ],
        [
            tensor("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]),
            *([tensor(name, TensorProto.FLOAT, present) for name in ("present_k", "present_v")] if cached else []),
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    component = Component(
        format="onnx",
        files={"model.onnx": entry_of(folder / "model.onnx"), "weights/pack": entry_of(folder / "weights.bin")},
        tensors={
            name: TensorRef(file="weights/pack", offset=begin, length=size, dtype=weight_dtype, shape=shape)
            for name, (begin, size, shape) in tensors.items()
        },
    )
    interface = Interface(
        inputs={
            "tokens": "tokens",
            "positions": "positions",
            **({"past.k[0]": "past_k", "past.v[0]": "past_v"} if cached else {}),
        },
        outputs={
            "logits": "logits",
            **({"present.k[0]": "present_k", "present.v[0]": "present_v"} if cached else {}),
        },
        cache=CacheLayout(layers=1, kv_heads=HEADS, head_dim=HEAD) if cached else None,
        vocab_size=VOCABULARY,
        max_length=MAX_LENGTH,
    )
    manifest = Manifest(format="onnx", components={"model": component}, interface=interface, execution=execution or {})
    return Artifact(manifest, folder)
