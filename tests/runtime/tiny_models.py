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


def save_llama(folder: Path, *, dtype: str = "float32", seed: int = 0, tied: bool = False, layers: int = 2) -> Path:
    """Write a random Llama checkpoint and a tokenizer of words w0 … w63."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
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


GROUPED = CacheLayout(layers=2, kv_heads=2, head_dim=16)
GROUPED_HEADS = 4


def grouped_query_artifact(
    folder: Path, *, seed: int = 0, in_place: bool = True, max_length: int = 64, limits_logits: bool = True
) -> Artifact:
    """Two layers of com.microsoft's GroupQueryAttention, rotary embedding inside, which can append to its past.

    The mask [B, past + S] says how much is filled. `limits_logits` says whether `logits_to_keep` limits the logits.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    width, narrow, inner = GROUPED_HEADS * GROUPED.head_dim, GROUPED.kv_heads * GROUPED.head_dim, 48
    nodes, initializers = [], []

    def node(operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], domain=domain, **attributes))
        return output

    def constant(name: str, array: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(array, name))
        return name

    def product(x: str, name: str, columns: int, rows: int = width) -> str:
        weight = (random.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)
        return node("MatMul", [x, constant(f"{name}.weight", weight)], name)

    angles = np.arange(max_length)[:, None] / 10000.0 ** (np.arange(0, GROUPED.head_dim, 2) / GROUPED.head_dim)
    tables = [constant("cos", np.cos(angles).astype(np.float32)), constant("sin", np.sin(angles).astype(np.float32))]
    one = constant("one", np.array([1]))
    lengths = node("ReduceSum", ["attention_mask", one], "lengths", keepdims=0)
    filled = node("Cast", [node("Sub", [lengths, one], "last")], "filled", to=TensorProto.INT32)
    columns = node("Gather", [node("Shape", ["attention_mask"], "dims"), constant("axis", np.array(1))], "columns")
    total = node("Cast", [columns], "total", to=TensorProto.INT32)
    table = constant("embed", random.normal(size=(VOCABULARY, width)).astype(np.float32))
    x = node("Gather", [table, "input_ids"], "x")
    caches = []
    for i in range(GROUPED.layers):
        q, k, v = (product(x, f"{i}.{n}", c) for n, c in (("q", width), ("k", narrow), ("v", narrow)))
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        present = [f"present.{i}.{part}" for part in ("key", "value")]
        caches.append((past, present))
        attention = helper.make_node(
            "GroupQueryAttention",
            [q, k, v, *past, filled, total, *tables],
            [f"{i}.attention", *present],
            domain="com.microsoft",
            num_heads=GROUPED_HEADS,
            kv_num_heads=GROUPED.kv_heads,
            do_rotary=1,
        )
        nodes.append(attention)
        x = node("Add", [x, product(f"{i}.attention", f"{i}.o", width)], f"{i}.middle")
        up = node("Tanh", [product(x, f"{i}.up", inner)], f"{i}.act")
        x = node("Add", [x, product(up, f"{i}.down", width, inner)], f"{i}.out")
    if limits_logits:
        first = node("Neg", ["logits_to_keep"], "first")
        x = node("Slice", [x, first, constant("end", np.array([2**62])), one], "kept")
    nodes.append(
        helper.make_node(
            "MatMul", [x, constant("head", random.normal(size=(width, VOCABULARY)).astype(np.float32))], ["logits"]
        )
    )

    def tensor(name: str, element: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    def cache_of(names: list[str], length: str) -> list[onnx.ValueInfoProto]:
        return [tensor(n, TensorProto.FLOAT, ["batch", GROUPED.kv_heads, length, GROUPED.head_dim]) for n in names]

    keep = [tensor("logits_to_keep", TensorProto.INT64, [1])] if limits_logits else []
    graph = helper.make_graph(
        nodes,
        "grouped",
        [
            tensor("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            tensor("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *keep,
            *(value for past, _ in caches for value in cache_of(past, "past")),
        ],
        [
            tensor("logits", TensorProto.FLOAT, ["batch", "kept", VOCABULARY]),
            *(value for _, present in caches for value in cache_of(present, "present")),
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    roles = [(f"{part}[{i}]", j, i) for i in range(GROUPED.layers) for j, part in enumerate("kv")]
    interface = Interface(
        inputs={
            "tokens": "input_ids",
            "mask": "attention_mask",
            **{f"past.{role}": caches[i][0][j] for role, j, i in roles},
        },
        outputs={"logits": "logits", **{f"present.{role}": caches[i][1][j] for role, j, i in roles}},
        cache=GROUPED.model_copy(update={"in_place": in_place}),
        vocab_size=VOCABULARY,
        max_length=max_length,
        logits_to_keep="logits_to_keep" if limits_logits else None,
    )
    component = Component(format="onnx", files={"model.onnx": entry_of(path)})
    return Artifact(Manifest(format="onnx", components={"model": component}, interface=interface), folder)


def two_phases(prefill: Artifact, decode: Artifact, *, crossover_tokens: int) -> Artifact:
    """One artifact of both graphs."""
    components = {"prefill": prefill.component, "decode": decode.component}
    execution = {"phases": {"crossover_tokens": crossover_tokens}}
    update = {"components": components, "execution": execution}
    return Artifact(prefill.manifest.model_copy(update=update), prefill.blobs)


class Concatenating:
    """Plain sessions of artifacts' graphs, and one cache of arrays that each step hands to the next."""

    def __init__(self, **artifacts: Artifact) -> None:
        import onnxruntime

        self.interface = next(iter(artifacts.values())).interface
        self.sessions = {
            name: onnxruntime.InferenceSession(artifact.locate(artifact.component.files["model.onnx"]))
            for name, artifact in artifacts.items()
        }
        self.past: dict[str, np.ndarray] = {}
        self.length = 0

    def step(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Logits [B, S, V] of these tokens after those of the steps before."""
        batch, count = tokens.shape
        layout, inputs = self.interface.cache, self.interface.inputs
        assert layout is not None
        feeds = {"input_ids": tokens, "attention_mask": np.ones((batch, self.length + count), np.int64)}
        if self.interface.logits_to_keep is not None:
            feeds["logits_to_keep"] = np.array([count])
        for role in [role for role in inputs if role.startswith("past.")]:
            empty = np.empty((batch, layout.kv_heads, 0, layout.head_dim), np.float32)
            feeds[inputs[role]] = self.past.get(role, empty)
        roles, names = zip(*self.interface.outputs.items(), strict=True)
        found = dict(zip(roles, self.sessions[name].run(list(names), feeds), strict=True))
        self.past = {role.replace("present", "past"): value for role, value in found.items() if role != "logits"}
        self.length += count
        logits: np.ndarray = found["logits"]
        return logits
