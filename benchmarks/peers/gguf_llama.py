"""A Llama of transformers in the words of GGUF: names, metadata, and the order of the query and key rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class Shape(NamedTuple):
    """What GGUF's metadata say of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    epsilon: float
    rotary_base: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a config.json.

        Raises: ValueError where the model is none that these names describe.
        """
        if config.get("model_type") != "llama":
            raise ValueError(
                f"GGUF is written of Llamas only; config.json says model_type {config.get('model_type')!r}"
            )
        if config.get("tie_word_embeddings"):
            raise ValueError("GGUF is written of models with a head of their own; this one's is its embedding")
        rotary = config.get("rope_parameters") or {}
        if rotary.get("rope_type", "default") != "default":
            raise ValueError(f"GGUF is written with plain rotary embeddings, not {rotary['rope_type']!r}")
        heads = config["num_attention_heads"]
        if config.get("head_dim", config["hidden_size"] // heads) != config["hidden_size"] // heads:
            raise ValueError("GGUF is written of models whose heads share the hidden size evenly")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            vocabulary=config["vocab_size"],
            positions=config["max_position_embeddings"],
            epsilon=config["rms_norm_eps"],
            rotary_base=rotary.get("rope_theta", config.get("rope_theta", 10000.0)),
        )

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of the checkpoint.

    Raises: ValueError for a tensor that a Llama has not.
    """
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    found = LAYER.fullmatch(name)
    if found is None or found[2] not in IN_LAYERS:
        raise ValueError(f"GGUF has no name for the tensor {name!r} of a Llama")
    return f"blk.{found[1]}.{IN_LAYERS[found[2]]}.weight"


def interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection [heads * D, K] in the order in which llama.cpp rotates pairs of them.

    transformers rotates row i of a head with row i + D/2; llama.cpp rotates rows 2i and 2i + 1.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def in_gguf_order(name: str, weight: np.ndarray, shape: Shape) -> np.ndarray:
    """The tensor as GGUF keeps it: queries and keys interleaved, all others as they are."""
    if name.endswith("q_proj.weight"):
        return interleave_rotary(weight, shape.heads)
    if name.endswith("k_proj.weight"):
        return interleave_rotary(weight, shape.kv_heads)
    return weight
