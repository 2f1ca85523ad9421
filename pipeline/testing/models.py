"""Small real models: a Llama of two layers with random weights and a tokenizer, and models that no pass expects.

They are written without torch, from a seed, so that the same call gives the same bytes on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import MAIN_COMPONENT, Artifact, Component, Interface, Manifest
from pipeline.files import write_atomically
from pipeline.store import Store
from pipeline.store.writer import OutputWriter

if TYPE_CHECKING:
    import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 256,
}
"""Two query heads for each key-value head, and a head of its own."""

SPREAD = 0.15
"""Standard deviation of the weights; with it the logits' is about 1."""


def tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint of two layers, 64 wide, in float32, with a tokenizer of bytes; returns the folder.

    Files that are there and are what they should be stay untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _files(seed).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)
    return folder


def _files(seed: int) -> dict[str, bytes]:
    from safetensors.numpy import save

    return {
        "config.json": (json.dumps(CONFIG, indent=1) + "\n").encode(),
        "tokenizer.json": _tokenizer(),
        "model.safetensors": save(_weights(seed)),
    }


def _weights(seed: int) -> dict[str, np.ndarray]:
    import numpy as np

    random = np.random.default_rng(seed)
    wide, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], wide), "lm_head": (CONFIG["vocab_size"], wide)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.q_proj": (queries, wide), f"{at}.self_attn.o_proj": (wide, queries)}
        shapes |= {f"{at}.self_attn.{name}_proj": (keys, wide) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj": (inner, wide) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (wide, inner)
    weights = {f"{name}.weight": random.normal(0, SPREAD, shape) for name, shape in shapes.items()}
    norms = ["model.norm"]
    for layer in range(CONFIG["num_hidden_layers"]):
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    weights |= {f"{name}.weight": random.normal(1, SPREAD, wide) for name in norms}
    return {name: array.astype(np.float32) for name, array in weights.items()}


def _tokenizer() -> bytes:
    """One token for each byte, so that any text can be read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str()
    return text.encode()


def odd_artifact(format: str, store: Store) -> Artifact | None:
    """A model of that format that is no language model and has next to nothing in it; None for an unknown format."""
    makers = {"onnx": _one_node, "torch": _one_tensor}
    if format not in makers:
        return None
    with store.staging() as staging:
        manifest = makers[format](OutputWriter(staging), store)
        return store.publish(staging, manifest)


def _one_node(output: OutputWriter, store: Store) -> Manifest:
    """A graph of one node without weights."""
    import onnx_ir as ir
    from onnx import parser

    from pipeline.onnx_model import save_onnx

    text = '<ir_version: 10, opset_import: ["" : 21]> lonely (float[2, "n"] x) => (float[2, "n"] y) { y = Abs (x) }'
    interface = Interface(task="forward", inputs={"x": "x"}, outputs={"y": "y"})
    like = Artifact(Manifest(format="onnx", components={}, interface=interface), store.blobs)
    return save_onnx(ir.from_proto(parser.parse_model(text)), output, like=like).manifest


def _one_tensor(output: OutputWriter, store: Store) -> Manifest:
    """A checkpoint of one tensor whose configuration says next to nothing."""
    import numpy as np

    ref = output.tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
    packed = output.close_pack()
    assert packed is not None
    name, entry = packed
    part = Component(format="torch", files={name: entry}, tensors={"a": ref.model_copy(update={"file": name})})
    return Manifest(
        format="torch",
        components={MAIN_COMPONENT: part},
        files={"config.json": output.file("config.json", b'{"model_type": "nothing_known"}')},
        interface=Interface(task="forward"),
    )
