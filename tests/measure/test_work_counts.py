"""Bytes and operations are those that a hand count, and torch's own counter, find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fused_llama
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import HEAD, HEADS, VOCABULARY, WIDTH, entry_of, onnx_artifact, save_llama, torch_artifact

from pipeline.artifact import Artifact, Component, Interface, Manifest, TensorRef
from pipeline.errors import PipelineError
from pipeline.measure.work_counts import Extent, Work, count_work, extent_of
from pipeline.measure.workload import Point

FLOAT, INT64, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT8, TensorProto.UINT8
MICROSOFT = "com.microsoft"

PROMPT = Extent(batch=2, length=6, past=0, keep=1)
WHOLE = Extent(batch=2, length=6, past=0, keep=6)
TOKEN = Extent(batch=2, length=1, past=9, keep=1)

# save_llama: 2 layers of hidden 32, intermediate 48, 4 heads over 2 key-value heads of width 8, vocabulary 64
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
TABLE = VOCABULARY * 32
NORMS = 5 * 32


def counted(artifact: Artifact, extent: Extent, **options: Any) -> Work:
    work = count_work(artifact, extent, **options)
    assert work is not None
    return work


# --- what is run at a workload point


@pytest.mark.parametrize(
    ("point", "extent"),
    [
        (Point(kind="decode", batch=2, prompt=128, new_tokens=64), Extent(2, 1, 160, 1)),
        (Point(kind="prefill", batch=2, prompt=128, new_tokens=0), Extent(2, 128, 0, 1)),
        (Point(kind="forward", batch=2, prompt=128, new_tokens=0), Extent(2, 128, 0, 128)),
    ],
)
def test_decode_is_counted_in_the_middle_of_its_tokens(point: Point, extent: Extent) -> None:
    assert extent_of(point) == extent
    assert extent.tokens == point.tokens_per_iteration


# --- torch


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def attention(extent: Extent, *, heads: int = 4, width: int = 8, layers: int = 2) -> int:
    """Two products for each pair of a token and a position, each a multiply-add for each number of a head."""
    return layers * 2 * 2 * extent.batch * heads * extent.length * (extent.past + extent.length) * width


def test_a_llama_is_what_a_hand_count_finds(llama: Path) -> None:
    work = counted(torch_artifact(llama), TOKEN)
    assert work.flops == {"float32": 2 * 2 * (2 * LAYER + TABLE) + attention(TOKEN)}
    assert work.weights_bytes == 4 * (2 * LAYER + TABLE + NORMS)
    assert work.rows_bytes == 2 * 32 * 4  # of the embedding, one row for each sequence
    assert (
        work.cache_bytes == 2 * 2 * 9 * (2 * 2 * 8) * 4
    )  # key and value, sequences, positions, layers x heads x width
    assert work.bytes_read == work.weights_bytes + work.rows_bytes + work.cache_bytes


def test_a_prompt_needs_the_head_for_its_last_position_alone(llama: Path) -> None:
    prompt, whole = (counted(torch_artifact(llama), extent) for extent in (PROMPT, WHOLE))
    assert whole.flops["float32"] - prompt.flops["float32"] == 2 * 2 * 5 * TABLE
    assert prompt.cache_bytes == 0


def test_weights_count_in_the_data_type_that_they_are_computed_in(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, dtype="bfloat16")
    half, widened = (counted(torch_artifact(folder, dtype=dtype), TOKEN) for dtype in ("auto", "float32"))
    assert half.compute_dtype == "bfloat16"
    assert (half.bytes_read * 2, "float32") == (widened.bytes_read, widened.compute_dtype)


def test_a_tied_head_reads_the_table_once(tmp_path: Path) -> None:
    tied = counted(torch_artifact(save_llama(tmp_path, tied=True)), TOKEN)
    assert tied.weights_bytes == 4 * (2 * LAYER + TABLE + NORMS)


def test_a_weight_with_two_names_is_read_once(llama: Path) -> None:
    plain = torch_artifact(llama)
    component = plain.component
    names = {**component.tensors, "again.weight": component.tensors["model.layers.0.mlp.up_proj.weight"]}
    shared = component.model_copy(update={"tensors": names})
    twice = Artifact(plain.manifest.model_copy(update={"components": {"model": shared}}), plain.blobs)
    assert count_work(twice, TOKEN) == count_work(plain, TOKEN)


@pytest.mark.parametrize("extent", [WHOLE, TOKEN], ids=["whole pass", "one token"])
def test_a_llama_has_the_operations_that_torch_counts(llama: Path, extent: Extent) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DynamicCache, LlamaForCausalLM

    # not sdpa: torch's counter does not know the kernel that it takes on a processor
    model = LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if extent.past:
            model(torch.zeros((extent.batch, extent.past), dtype=torch.int64), past_key_values=cache, use_cache=True)
        counter = FlopCounterMode(display=False)
        with counter:
            tokens = torch.zeros((extent.batch, extent.length), dtype=torch.int64)
            model(tokens, past_key_values=cache, use_cache=True)
    assert counted(torch_artifact(llama), extent).total_flops == counter.get_total_flops()


def configured(llama: Path, folder: Path, execution: dict[str, Any] | None = None, **changes: Any) -> Artifact:
    """The Llama with another configuration."""
    config = json.loads((llama / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    plain = torch_artifact(llama)
    files = plain.manifest.files | {"config.json": entry_of(folder / "config.json")}
    update = {"files": files, "execution": plain.manifest.execution | (execution or {})}
    return Artifact(plain.manifest.model_copy(update=update), folder)


def test_a_token_sees_its_window_alone(llama: Path, tmp_path: Path) -> None:
    everywhere = counted(configured(llama, tmp_path, sliding_window=4), TOKEN)
    full, window = counted(torch_artifact(llama), TOKEN), Extent(2, 1, 4, 1)
    assert everywhere.cache_bytes == counted(torch_artifact(llama), window).cache_bytes
    half = configured(llama, tmp_path, sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    assert 2 * counted(half, TOKEN).cache_bytes == everywhere.cache_bytes + full.cache_bytes
    assert counted(configured(llama, tmp_path, sliding_window=4, use_sliding_window=False), TOKEN) == full


def test_a_static_cache_is_read_to_its_end(llama: Path, tmp_path: Path) -> None:
    static = counted(configured(llama, tmp_path, {"cache": "static", "max_length": 40}), TOKEN)
    assert static.flops == counted(torch_artifact(llama), Extent(2, 1, 39, 1)).flops


@pytest.mark.parametrize("field", ["num_local_experts", "kv_lora_rank", "state_size"])
def test_what_is_no_dense_decoder_is_not_counted(field: str, llama: Path, tmp_path: Path) -> None:
    assert count_work(configured(llama, tmp_path, **{field: 8}), TOKEN) is None


# --- a graph whose attention is made of small operators


@pytest.mark.parametrize("extent", [PROMPT, WHOLE, TOKEN])
def test_shapes_are_followed_through_a_graph(extent: Extent, tmp_path: Path) -> None:
    work = counted(onnx_artifact(tmp_path), extent)
    head = 2 * extent.tokens * WIDTH * VOCABULARY  # this graph has logits of all positions
    assert work.flops == {"float32": head + attention(extent, heads=HEADS, width=HEAD, layers=1)}
    assert not work.uncounted


def test_a_graph_reads_rows_of_tables_and_all_of_other_weights(tmp_path: Path) -> None:
    work = counted(onnx_artifact(tmp_path), TOKEN)
    small = work.weights_bytes - 4 * WIDTH * VOCABULARY
    assert 0 < small < 200  # constants that shapes are made of
    assert work.rows_bytes == 2 * TOKEN.tokens * WIDTH * 4  # of both tables
    assert work.cache_bytes == 2 * 2 * 9 * HEADS * HEAD * 4


def test_a_weight_behind_a_cast_is_read_as_what_it_was_cast_to(tmp_path: Path) -> None:
    plain, half = (counted(onnx_artifact(tmp_path / d, weight_dtype=d), TOKEN) for d in ("float32", "bfloat16"))
    assert half.bytes_read == plain.bytes_read
    assert half.compute_dtype == "float32"


# --- operators, one by one


def graph(
    folder: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    weights: dict[str, np.ndarray] | None = None,
    *,
    interface: Interface | None = None,
    compiled: dict[str, list[int]] | None = None,
) -> Artifact:
    """A graph of these nodes and a file of its weights. `compiled`: weight -> lengths of its packed parts."""
    tensors: dict[str, TensorRef] = {}
    initializers = []
    with (folder / "pack").open("wb") as file:
        for name, array in (weights or {}).items():
            ref = TensorRef(
                file="pack", offset=file.tell(), length=array.nbytes, dtype=str(array.dtype), shape=array.shape
            )
            file.write(array.tobytes())
            if array.size <= 4:
                initializers.append(numpy_helper.from_array(array, name))
                continue
            tensors[name] = ref
            outside = TensorProto(
                name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape, data_location=1
            )
            for key, value in (("location", "pack"), ("offset", ref.offset), ("length", ref.length)):
                outside.external_data.add(key=key, value=str(value))
            initializers.append(outside)
    record: dict[str, Any] = {}
    for name, lengths in (compiled or {}).items():
        parts = [f"{name}.prepacked_0.{i}" for i in range(len(lengths))]
        record[name] = {"prepacked_0": {"key": "k", "parts": parts, "checksums": ["0"] * len(parts)}}
        tensors |= {
            part: TensorRef(file="pack", offset=0, length=length, dtype="uint8", shape=(length,))
            for part, length in zip(parts, lengths, strict=True)
        }
    made = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", 0, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    (folder / "model.onnx").write_bytes(helper.make_model(made, opset_imports=opsets).SerializeToString())
    files = {"model.onnx": entry_of(folder / "model.onnx"), "pack": entry_of(folder / "pack")}
    if record:
        (folder / "compiled.json").write_text(json.dumps({"weights": record}))
        files["compiled.json"] = entry_of(folder / "compiled.json")
    component = Component(format="onnx", files=files, tensors=tensors)
    interface = interface or Interface(inputs={"tokens": "x"})
    return Artifact(Manifest(format="onnx", components={"model": component}, interface=interface), folder)


X = {"x": (FLOAT, ["b", "s", 16])}
ROWS = PROMPT.tokens


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def node(operator: str, inputs: list[str], domain: str = MICROSOFT, **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, ["y"], domain=domain, **attributes)


def three(folder: Path, *nodes: Any, weights: dict[str, np.ndarray] | None = None) -> Artifact:
    """Nodes over x of [2, 6, 16]: a size that an input fixes is taken as it is."""
    return graph(folder, list(nodes), {"x": (FLOAT, [2, 6, 16])}, weights, interface=Interface())


Expected = tuple[int, str, int]
"""Operations, the data type that they are in, and bytes read."""


@pytest.mark.parametrize(
    ("operator", "weights", "attributes", "expected"),
    [
        ("MatMul", {"w": floats(16, 24)}, {}, (2 * 12 * 16 * 24, "float32", 16 * 24 * 4)),
        (
            "MatMulNBits",
            {"w": np.zeros((24, 1, 8), np.uint8), "scales": floats(24), "zeros": np.zeros(24, np.uint8)},
            {"K": 16, "N": 24, "bits": 4, "block_size": 16, "accuracy_level": 4},
            (2 * 12 * 16 * 24, "int8", 24 * 8 + 24 * 4 + 24),
        ),
        (
            "MatMulNBits",
            {"w": np.zeros((24, 1, 16), np.uint8), "scales": floats(24)},
            {"K": 16, "N": 24, "bits": 8, "block_size": 16},
            (2 * 12 * 16 * 24, "float32", 24 * 16 + 24 * 4),
        ),
        (
            "DynamicQuantizeMatMul",
            {"w": np.zeros((16, 24), np.int8), "scales": floats(24)},
            {},
            (2 * 12 * 16 * 24, "int8", 16 * 24 + 24 * 4),
        ),
        ("FusedMatMul", {"w": floats(24, 16)}, {"transB": 1}, (2 * 12 * 16 * 24, "float32", 16 * 24 * 4)),
        (
            "Attention",
            {"w": floats(16, 48), "bias": floats(48)},
            {"num_heads": 2},
            (2 * 12 * 16 * 48 + 2 * 2 * 2 * 2 * 6 * 6 * 8, "float32", 16 * 48 * 4 + 48 * 4),
        ),
    ],
)
def test_a_product_is_counted(
    operator: str, weights: dict[str, np.ndarray], attributes: dict[str, Any], expected: Expected, tmp_path: Path
) -> None:
    flops, dtype, size = expected
    domain = "" if operator == "MatMul" else MICROSOFT
    work = counted(three(tmp_path, node(operator, ["x", *weights], domain, **attributes), weights=weights), PROMPT)
    assert work.flops == {dtype: flops}
    assert work.bytes_read == size


def test_a_product_of_the_product_before_is_counted(tmp_path: Path) -> None:
    """Shapes go on behind the operators that ONNX itself does not know."""
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "w", "scales"], ["a"], domain=MICROSOFT, K=16, N=24, bits=8, block_size=16
        ),
        helper.make_node("SkipSimplifiedLayerNormalization", ["a", "a", "g"], ["n", "", "", "sum"], domain=MICROSOFT),
        helper.make_node("QuickGelu", ["sum"], ["g2"], domain=MICROSOFT),
        helper.make_node("MatMul", ["g2", "v"], ["y"]),
    ]
    weights = {"w": np.zeros((24, 1, 16), np.uint8), "scales": floats(24), "g": floats(24), "v": floats(24, 8)}
    work = counted(three(tmp_path, *nodes, weights=weights), PROMPT)
    assert work.total_flops == 2 * 12 * 24 * (16 + 8)
    assert work.launches == 4


def test_a_gemm_and_a_convolution_are_counted(tmp_path: Path) -> None:
    artifact = graph(
        tmp_path,
        [
            helper.make_node("Gemm", ["x", "w", "c"], ["y"], transB=1),
            helper.make_node("Conv", ["image", "kernel"], ["z"], group=2),
        ],
        {"x": (FLOAT, [5, 16]), "image": (FLOAT, [1, 4, 10, 10])},
        {"w": floats(24, 16), "c": floats(24), "kernel": floats(6, 2, 3, 3)},
        interface=Interface(),
    )
    assert counted(artifact, PROMPT).total_flops == 2 * 5 * 16 * 24 + 2 * (6 * 8 * 8) * (2 * 3 * 3)


def test_a_product_between_quantized_inputs_is_one_of_integers(tmp_path: Path) -> None:
    quantize = helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"])
    restore = helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["xf"])
    weight = helper.make_node("DequantizeLinear", ["w", "s", "zero"], ["wf"])
    weights = {"w": np.zeros((16, 24), np.int8), "s": np.float32([0.1]).reshape(()), "zero": np.int8([0]).reshape(())}
    both = counted(
        three(tmp_path, quantize, restore, weight, helper.make_node("MatMul", ["xf", "wf"], ["y"]), weights=weights),
        PROMPT,
    )
    assert both.flops == {"int8": 2 * 12 * 16 * 24}
    assert both.weights_bytes == 16 * 24 + 4 + 1  # as it is stored
    only = counted(three(tmp_path, weight, helper.make_node("MatMul", ["x", "wf"], ["y"]), weights=weights), PROMPT)
    assert only.compute_dtype == "float32"


HEADS_OF = {"query": (FLOAT, ["b", "s", 32]), "key": (FLOAT, ["b", "s", 16]), "value": (FLOAT, ["b", "s", 16])}
PAST = {name: (FLOAT, ["b", 2, "past", 8]) for name in ("past_k", "past_v")}


def sized(inputs: dict[str, tuple[int, list[Any]]], extent: Extent) -> dict[str, tuple[int, list[Any]]]:
    sizes = {"b": extent.batch, "s": extent.length, "past": extent.past}
    return {name: (kind, [sizes.get(size, size) for size in shape]) for name, (kind, shape) in inputs.items()}


ROLES = Interface(inputs={"past.k[0]": "past_k", "past.v[0]": "past_v"})


@pytest.mark.parametrize("extent", [PROMPT, TOKEN])
def test_grouped_attention_counts_every_query_head(extent: Extent, tmp_path: Path) -> None:
    inputs = ["query", "key", "value", "past_k", "past_v", "lengths", "total"]
    made = node("GroupQueryAttention", inputs, num_heads=4, kv_num_heads=2)
    given = {**HEADS_OF, **PAST, "lengths": (INT64, ["b"]), "total": (INT64, [1])}
    work = counted(graph(tmp_path, [made], sized(given, extent), interface=ROLES), extent)
    assert work.total_flops == attention(extent, layers=1)
    assert work.cache_bytes == 2 * 2 * extent.past * 2 * 8 * 4


def test_a_window_limits_what_a_token_reads(tmp_path: Path) -> None:
    inputs = ["query", "key", "value", "past_k", "past_v"]
    made = node("GroupQueryAttention", inputs, num_heads=4, kv_num_heads=2, local_window_size=3)
    work = counted(graph(tmp_path, [made], sized({**HEADS_OF, **PAST}, TOKEN), interface=ROLES), TOKEN)
    assert work.total_flops == attention(Extent(2, 1, 2, 1), layers=1)
    assert work.cache_bytes == 2 * 2 * 3 * 2 * 8 * 4


@pytest.mark.parametrize("extent", [PROMPT, TOKEN])
def test_onnx_attention_is_counted_in_both_layouts(extent: Extent, tmp_path: Path) -> None:
    flat = helper.make_node(
        "Attention", ["query", "key", "value", "", "past_k", "past_v"], ["y", "pk", "pv"], q_num_heads=4, kv_num_heads=2
    )
    work = counted(graph(tmp_path, [flat], sized({**HEADS_OF, **PAST}, extent), interface=ROLES), extent)
    split = helper.make_node("Attention", ["q4", "k4", "v4", "", "past_k", "past_v"], ["y", "pk", "pv"])
    given = {"q4": (FLOAT, ["b", 4, "s", 8]), "k4": (FLOAT, ["b", 2, "s", 8]), "v4": (FLOAT, ["b", 2, "s", 8])}
    assert counted(graph(tmp_path, [split], sized({**given, **PAST}, extent), interface=ROLES), extent) == work
    assert work.total_flops == attention(extent, layers=1)


def test_multi_head_attention_is_counted(tmp_path: Path) -> None:
    made = node("MultiHeadAttention", ["query", "key", "value"], num_heads=4)
    given = {"query": (FLOAT, ["b", "s", 32]), "key": (FLOAT, ["b", 7, 32]), "value": (FLOAT, ["b", 7, 32])}
    work = counted(graph(tmp_path, [made], sized(given, PROMPT), interface=Interface()), PROMPT)
    assert work.total_flops == 2 * 2 * 2 * 4 * 6 * 7 * 8


def test_a_table_of_codes_is_read_by_rows_with_their_scales(tmp_path: Path) -> None:
    lookup = node("GatherBlockQuantized", ["table", "x", "scales"], block_size=16, bits=4, quantize_axis=1)
    weights = {"table": np.zeros((64, 16), np.uint8), "scales": floats(64, 2)}
    work = counted(graph(tmp_path, [lookup], {"x": (INT64, ["b", "s"])}, weights), TOKEN)
    assert (work.weights_bytes, work.rows_bytes) == (0, 2 * (16 + 8))


def test_a_table_that_is_the_head_too_is_read_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "turned"], ["a"]),
        helper.make_node("Transpose", ["table"], ["again"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "again"], ["y"]),
    ]
    work = counted(graph(tmp_path, nodes, {"x": (INT64, ["b", "s"])}, {"table": floats(64, 16)}), TOKEN)
    assert work.weights_bytes == 64 * 16 * 4
    assert work.launches == 3


def test_a_compiled_graph_reads_the_packed_forms_of_its_weights(tmp_path: Path) -> None:
    weights = {"w": np.zeros((24, 1, 8), np.uint8), "scales": floats(24)}
    made = node("MatMulNBits", ["x", *weights], K=16, N=24, bits=4, block_size=16, accuracy_level=4)
    work = counted(graph(tmp_path, [made], X, weights, compiled={"w": [400, 50]}), PROMPT)
    assert work.weights_bytes == 450  # its scales are within


def test_half_precision_is_widened_on_a_processor_and_not_on_a_gpu(tmp_path: Path) -> None:
    artifact = graph(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT16, [2, 6, 16])},
        {"w": np.ones((16, 24), np.float16)},
        interface=Interface(),
    )
    cpu, cuda = (counted(artifact, PROMPT, device=device) for device in ("cpu", "cuda"))
    assert (cpu.weights_bytes, cpu.compute_dtype) == (16 * 24 * 4, "float32")
    assert (cuda.weights_bytes, cuda.compute_dtype) == (16 * 24 * 2, "float16")


def test_accuracy_level_says_what_a_processor_computes_in_and_nothing_of_a_gpu(tmp_path: Path) -> None:
    weights = {"w": np.zeros((24, 1, 8), np.uint8), "scales": floats(24)}
    made = node("MatMulNBits", ["x", *weights], K=16, N=24, bits=4, block_size=16, accuracy_level=4)
    artifact = graph(tmp_path, [made], X, weights)
    cpu, cuda = (counted(artifact, PROMPT, device=device) for device in ("cpu", "cuda"))
    assert (cpu.compute_dtype, cuda.compute_dtype) == ("int8", "float32")
    assert (cuda.weights_bytes, cuda.total_flops) == (cpu.weights_bytes, cpu.total_flops)


def test_products_that_cannot_be_counted_are_named(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", 1, None)],
    )
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    experts = helper.make_node("MoE", ["x", "w"], ["z"], domain=MICROSOFT)
    weights = {"w": floats(16, 24), "flag": np.array(True)}
    work = counted(three(tmp_path, choice, experts, weights=weights), PROMPT)
    assert work.uncounted == ("If", "MoE")
    assert work.total_flops is None


def test_positions_kept_shrink_the_head_where_the_graph_can(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Neg", ["keep"], ["begin"]),
        helper.make_node("Slice", ["x", "begin", "end", "axis"], ["last"]),
        helper.make_node("MatMul", ["last", "w"], ["y"]),
    ]
    weights = {"w": floats(16, 24), "end": np.array([2**31]), "axis": np.array([1])}
    inputs = {"x": (FLOAT, [2, 6, 16]), "keep": (INT64, [1])}
    artifact = graph(tmp_path, nodes, inputs, weights, interface=Interface(logits_to_keep="keep"))
    assert counted(artifact, PROMPT).total_flops == 2 * 2 * 16 * 24
    assert counted(artifact, WHOLE).total_flops == 2 * 12 * 16 * 24


def test_positions_kept_may_be_gathered(tmp_path: Path) -> None:
    """As onnxruntime-genai's graphs do: their number is made into places, and these are looked up."""
    nodes = [
        helper.make_node("Shape", ["x"], ["length"], start=1, end=2),
        helper.make_node("Sub", ["length", "keep"], ["begin"]),
        helper.make_node("Squeeze", ["begin"], ["first"]),
        helper.make_node("Squeeze", ["length"], ["end"]),
        helper.make_node("Range", ["first", "end", "one"], ["places"]),
        helper.make_node("Gather", ["x", "places"], ["last"], axis=1),
        helper.make_node("MatMul", ["last", "w"], ["y"]),
    ]
    inputs = {"x": (FLOAT, [2, 6, 16]), "keep": (INT64, [1])}
    weights = {"w": floats(16, 24), "one": np.array(1)}
    artifact = graph(tmp_path, nodes, inputs, weights, interface=Interface(logits_to_keep="keep"))
    assert counted(artifact, PROMPT).total_flops == 2 * 2 * 16 * 24
    assert counted(artifact, WHOLE).total_flops == 2 * 12 * 16 * 24


# --- a fused graph, and two of them


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("fused")
    return fused_llama.fused_llama(folder, fused_llama.save_checkpoint(folder / "checkpoint"))


def fused_flops(extent: Extent) -> int:
    """In the last layer, what follows the attention is computed for the positions that are kept."""
    kept = extent.batch * extent.keep
    layer, before = fused_llama.LAYER_PRODUCTS, fused_llama.ATTENTION_PRODUCTS
    products = extent.tokens * (layer + before) + kept * (layer - before + fused_llama.HEAD)
    return 2 * products + attention(extent, heads=fused_llama.HEADS, width=fused_llama.WIDTH, layers=2)


@pytest.mark.parametrize("extent", [PROMPT, WHOLE, TOKEN], ids=["prompt", "whole pass", "one token"])
def test_a_fused_graph_is_what_a_hand_count_finds(fused: Artifact, extent: Extent) -> None:
    work = counted(fused, extent)
    assert work.flops == {"float32": fused_flops(extent)}
    norms = 5 * fused_llama.HIDDEN
    small = work.weights_bytes - 4 * (2 * fused_llama.LAYER_PRODUCTS + fused_llama.HEAD + norms)
    assert 0 <= small < 100  # what shapes are made of
    rotary = 2 * 2 * extent.length * fused_llama.WIDTH // 2 * 4  # both tables, in both layers
    assert work.rows_bytes == extent.tokens * fused_llama.HIDDEN * 4 + rotary
    positions = extent.batch * extent.past * fused_llama.KV_HEADS * fused_llama.WIDTH
    assert work.cache_bytes == 2 * fused_llama.LAYERS * positions * 4
    assert not work.uncounted


def test_query_key_and_value_may_come_in_one(tmp_path: Path) -> None:
    inputs = ["all", "", "", "past_k", "past_v", "lengths", "total"]
    made = node("GroupQueryAttention", inputs, num_heads=4, kv_num_heads=2)
    given = {"all": (FLOAT, ["b", "s", 64]), **PAST, "lengths": (INT64, ["b"]), "total": (INT64, [1])}
    work = counted(graph(tmp_path, [made], sized(given, TOKEN), interface=ROLES), TOKEN)
    assert work.total_flops == attention(TOKEN, layers=1)


def test_of_two_phases_each_call_is_counted_in_the_graph_that_runs_it(fused: Artifact, tmp_path: Path) -> None:
    """Between them, the number of new tokens decides, those of all sequences together."""
    limited = fused_llama.fused_llama(tmp_path, Path(fused.blobs) / "checkpoint", window=2)
    both = fused_llama.two_phases(fused, limited, crossover_tokens=8)
    assert count_work(both, PROMPT) == count_work(fused, PROMPT)
    assert count_work(both, TOKEN) == count_work(limited, TOKEN) != count_work(fused, TOKEN)
    short = Extent(batch=1, length=3, past=5, keep=1)
    assert count_work(both, short) == count_work(limited, short) != count_work(fused, short)


def test_what_does_not_say_when_its_graphs_run_is_not_counted(fused: Artifact) -> None:
    both = fused_llama.two_phases(fused, fused)
    silent = Artifact(both.manifest.model_copy(update={"execution": {}}), both.blobs)
    with pytest.raises(PipelineError, match="phases"):
        count_work(silent, TOKEN)
    parts = {"encoder": fused.component, "decoder": fused.component}
    assert count_work(Artifact(fused.manifest.model_copy(update={"components": parts}), fused.blobs), TOKEN) is None


def test_weights_that_two_graphs_share_are_stored_once(fused: Artifact) -> None:
    both = fused_llama.two_phases(fused, fused)
    assert both.manifest.weights_bytes == fused.manifest.weights_bytes
    assert both.manifest.size_bytes == fused.manifest.size_bytes
