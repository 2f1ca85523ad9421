"""A Llama in GGUF's words, held against transformers' rotation; no GGUF library is needed."""

import numpy as np
import pytest

from benchmarks.peers.gguf_llama import Shape, gguf_name, in_gguf_order, interleave_rotary

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.3.mlp.gate_proj.weight", "blk.3.ffn_gate.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
    ],
)
def test_a_tensor_has_the_name_that_llama_cpp_looks_for(name, expected):
    assert gguf_name(name) == expected


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.experts.weight", "x"])
def test_a_tensor_that_a_llama_has_not_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match=name):
        gguf_name(name)


def test_the_shape_is_read_from_the_config():
    shape = Shape.of(CONFIG)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_size) == (2, 4, 2, 16)
    assert (shape.vocabulary, shape.positions, shape.epsilon, shape.rotary_base) == (100, 256, 1e-5, 50000.0)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
    ],
)
def test_a_model_that_the_names_do_not_describe_is_refused(change):
    with pytest.raises(ValueError, match="GGUF is written"):
        Shape.of(CONFIG | change)


def rotated_by_halves(vector, angles):
    """As transformers rotates a head [D]: element i with element i + D/2."""
    first, second = np.split(vector, 2)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def rotated_by_pairs(vector, angles):
    """As llama.cpp rotates a head [D]: element 2i with element 2i + 1."""
    even, odd = vector[0::2], vector[1::2]
    found = np.empty_like(vector)
    found[0::2] = even * np.cos(angles) - odd * np.sin(angles)
    found[1::2] = odd * np.cos(angles) + even * np.sin(angles)
    return found


def test_interleaved_projections_give_the_same_attention_scores_under_llama_cpps_rotation():
    heads, size, hidden = 3, 8, 5
    draw = np.random.default_rng(0)
    query, key = draw.normal(size=(2, heads * size, hidden))
    x, y = draw.normal(size=(2, hidden))
    at_x, at_y = draw.uniform(0, 3, size=(2, size // 2))
    wanted, found = [], []
    for rotated, q, k, scores in (
        (rotated_by_halves, query, key, wanted),
        (rotated_by_pairs, interleave_rotary(query, heads), interleave_rotary(key, heads), found),
    ):
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            scores.append(rotated(q[rows] @ x, at_x) @ rotated(k[rows] @ y, at_y))
    np.testing.assert_allclose(found, wanted)


def test_keys_are_interleaved_by_their_own_number_of_heads_and_values_not_at_all():
    shape = Shape.of(CONFIG)
    weight = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)
    keys = in_gguf_order("model.layers.0.self_attn.k_proj.weight", weight, shape)
    np.testing.assert_array_equal(keys, interleave_rotary(weight, 2))
    assert not np.array_equal(keys, weight)
    np.testing.assert_array_equal(in_gguf_order("model.layers.0.self_attn.v_proj.weight", weight, shape), weight)
