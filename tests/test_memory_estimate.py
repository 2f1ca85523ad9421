"""Memory estimates: they follow the formulas, grow with what they depend on, and agree with real artifacts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.export.export_onnx import ExportOnnx
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline.artifact import Artifact, CacheLayout, Component, FileEntry, Interface, Manifest, TensorRef
from pipeline.errors import HostError
from pipeline.hardware import describe_host, load_profile
from pipeline.memory_estimate import (
    RUNTIME_BYTES,
    Decoder,
    Load,
    ModelSize,
    Prediction,
    Weights,
    activation_bytes,
    corrected,
    decoder_of,
    held_weights,
    kv_cache_bytes,
    predict_memory,
    size_of_artifact,
    size_of_config,
    unknown_conversion_bytes,
)
from pipeline.models import find_source, source_artifact
from pipeline.plan import Plan, make_plan
from pipeline.plugin import Registry
from pipeline.recipe.load import recipe_from_text
from pipeline.store import Store

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}

sizes = st.integers(1, 64)
decoders = st.builds(
    Decoder,
    layers=st.integers(1, 8),
    heads=sizes,
    kv_heads=sizes,
    head_dim=sizes,
    hidden=sizes,
    intermediate=sizes,
    vocab=sizes,
)
kinds_of_weights = st.builds(
    Weights,
    parameters=st.integers(1, 10**9),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int4"]),
    bytes_per_parameter=st.sampled_from([0.625, 2.0, 4.0]),
)
models = st.builds(
    ModelSize,
    format=st.sampled_from(["torch", "onnx"]),
    linear=kinds_of_weights,
    embedding=kinds_of_weights,
    head=kinds_of_weights,
    other=kinds_of_weights,
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    decoder=decoders,
    logits_to_keep=st.booleans(),
    prepacked=st.booleans(),
)
loads = st.builds(Load, batch=st.integers(1, 8), prompt=st.integers(1, 512), new_tokens=st.integers(1, 64))


def inference(model: ModelSize, load: Load, device: str = "cpu") -> int:
    found = predict_memory(Prediction(model=model), [load], device=device).inference_bytes
    assert found is not None
    return found


# --- formulas and monotony


@given(decoders, st.integers(1, 8), st.integers(1, 4096), st.sampled_from([("float32", 4), ("bfloat16", 2)]))
def test_the_cache_is_keys_and_values_of_every_layer_and_position(
    decoder: Decoder, batch: int, length: int, dtype: tuple[str, int]
) -> None:
    one_tensor = batch * decoder.kv_heads * length * decoder.head_dim * dtype[1]
    found = kv_cache_bytes(decoder, batch=batch, length=length, dtype=dtype[0])
    assert found == sum(2 * one_tensor for _ in range(decoder.layers))


def test_the_cache_of_llama2_7b_is_half_a_mebibyte_a_token_in_half_precision() -> None:
    decoder = decoder_of(LLAMA_7B)
    assert decoder is not None
    assert kv_cache_bytes(decoder, batch=1, length=1, dtype="float16") == 512 * 1024


@given(models, loads, st.sampled_from(["batch", "prompt", "new_tokens"]), st.sampled_from(["cpu", "cuda"]))
def test_more_work_never_takes_less(model: ModelSize, load: Load, field: str, device: str) -> None:
    larger = load._replace(**{field: getattr(load, field) + 1})
    assert inference(model, larger, device) >= inference(model, load, device)


@given(models, loads, st.sampled_from(["linear", "embedding", "head", "other"]), st.sampled_from(["cpu", "cuda"]))
def test_more_parameters_never_take_less(model: ModelSize, load: Load, kind: str, device: str) -> None:
    weights = model.weights(kind)
    more = weights.model_copy(update={"parameters": weights.parameters + 1000})
    larger = model.model_copy(update={kind: more})
    before, after = (predict_memory(Prediction(model=m), [load], device=device) for m in (model, larger))
    assert (after.inference_bytes or 0) >= (before.inference_bytes or 0)
    assert (after.mapped_bytes or 0) >= (before.mapped_bytes or 0)
    assert unknown_conversion_bytes(larger) >= unknown_conversion_bytes(model)


@given(models, st.lists(loads, min_size=1, max_size=4))
def test_the_largest_workload_decides(model: ModelSize, several: list[Load]) -> None:
    together = predict_memory(Prediction(model=model), several)
    alone = [predict_memory(Prediction(model=model), [load]) for load in several]
    assert together.kv_cache_bytes == max(found.kv_cache_bytes or 0 for found in alone)
    assert together.activations_bytes == max(found.activations_bytes or 0 for found in alone)


@given(models, loads)
def test_inference_is_the_sum_of_its_parts(model: ModelSize, load: Load) -> None:
    found = predict_memory(Prediction(model=model, conversion_bytes=7), [load], capacity_bytes=10**12)
    parts = (found.weights_bytes, found.kv_cache_bytes, found.activations_bytes, found.runtime_bytes)
    assert found.inference_bytes == sum(part or 0 for part in parts)
    assert found.conversion_bytes == 7
    assert found.runtime_bytes == RUNTIME_BYTES[model.format]
    assert found.fits is (found.inference_bytes + (found.mapped_bytes or 0) <= 10**12)


def test_what_fits_is_decided_with_the_weights_that_are_mapped() -> None:
    model = size_of_config(LLAMA_7B, dtype="bfloat16")
    need = predict_memory(Prediction(model=model), [Load(1, 128, 64)])
    assert need.inference_bytes is not None and need.mapped_bytes is not None
    whole = need.inference_bytes + need.mapped_bytes
    for capacity, fits in ((whole, True), (whole - 1, False), (None, None)):
        found = predict_memory(Prediction(model=model), [Load(1, 128, 64)], capacity_bytes=capacity)
        assert found.fits is fits


def test_a_graph_without_a_limit_on_its_logits_pays_for_every_position() -> None:
    model = size_of_config(LLAMA_7B)
    whole = model.model_copy(update={"logits_to_keep": False})
    limited, unlimited = (activation_bytes(m, Load(2, 100, 1)) for m in (model, whole))
    assert limited is not None and unlimited is not None
    assert unlimited - limited == 2 * (100 - 1) * 32000 * 4


def test_fused_attention_keeps_no_scores_and_no_second_cache() -> None:
    model = size_of_config(LLAMA_7B).model_copy(update={"format": "onnx", "logits_to_keep": False})
    fused = model.model_copy(update={"cache_in_place": True, "logits_to_keep": True})
    plain, less = (activation_bytes(m, Load(2, 100, 28)) for m in (model, fused))
    assert plain is not None and less is not None
    decoder = model.decoder
    assert decoder is not None
    cache = kv_cache_bytes(decoder, batch=2, length=128, dtype="float32")
    assert plain - less == 2 * 32 * 100 * 100 * 4 + cache + 2 * (100 - 1) * 32000 * 4
    both = [predict_memory(Prediction(model=m), [Load(2, 100, 28)]).kv_cache_bytes for m in (model, fused)]
    assert both == [cache, cache]


def test_scores_that_are_capped_are_kept_by_fused_attention_too() -> None:
    decoder = decoder_of({**LLAMA_7B, "attn_logit_softcapping": 50.0})
    fused = size_of_config(LLAMA_7B).model_copy(update={"format": "onnx", "cache_in_place": True})
    capped = fused.model_copy(update={"decoder": decoder})
    less, more = (activation_bytes(m, Load(1, 100, 1)) for m in (fused, capped))
    assert less is not None and more is not None
    assert more - less == 32 * 100 * 100 * 4


# --- where weights are


def test_torch_maps_weights_whose_data_type_stays_and_copies_the_others() -> None:
    model = size_of_config(LLAMA_7B, dtype="bfloat16")
    assert held_weights(model) == (0, model.weights_bytes)
    widened = model.model_copy(update={"dtype": "float32"})
    assert held_weights(widened) == (2 * model.weights_bytes, 0)


def test_onnx_runtime_holds_products_and_maps_the_table() -> None:
    model = size_of_config(LLAMA_7B, dtype="bfloat16").model_copy(update={"format": "onnx", "dtype": "float32"})
    held = held_weights(model)
    products = model.linear.parameters + model.head.parameters
    assert held.memory_bytes >= products * 4  # widened to float32
    assert held.mapped_bytes == model.embedding.size_bytes + model.other.size_bytes
    quantized = model.with_weights(("linear", "head"), "int4", 0.625)
    assert held_weights(quantized).memory_bytes == pytest.approx(products * 0.625)
    packed = quantized.model_copy(update={"prepacked": True})
    assert held_weights(packed) == (0, quantized.weights_bytes)


def two_phases(prefill: ModelSize, decode: ModelSize) -> ModelSize:
    return decode.model_copy(update={"phases": (prefill, decode)})


def test_two_phases_hold_the_products_of_both_and_map_what_they_share_once() -> None:
    model = size_of_config(LLAMA_7B, dtype="float32").model_copy(update={"format": "onnx"})
    int8, int4 = (model.with_weights(("linear",), f"int{bits}", bits / 8) for bits in (8, 4))
    held = held_weights(two_phases(int8, int4))
    each = [held_weights(one) for one in (int8, int4)]
    assert held.memory_bytes == sum(one.memory_bytes for one in each)  # the float head is packed by each of them
    assert held.mapped_bytes == each[0].mapped_bytes == each[1].mapped_bytes
    both = two_phases(int8, int4)
    assert both.weights_bytes == int8.weights_bytes + int4.linear.size_bytes


def test_packed_phases_are_mapped() -> None:
    model = size_of_config(LLAMA_7B, dtype="float32").model_copy(update={"format": "onnx"})
    int8, int4 = (
        model.with_weights(("linear", "head"), f"int{bits}", bits / 8).model_copy(update={"prepacked": True})
        for bits in (8, 4)
    )
    both = two_phases(int8, int4)
    assert held_weights(both) == (0, both.weights_bytes)
    assert held_weights(both, device="cuda").memory_bytes == int8.weights_bytes + int4.weights_bytes


def test_a_gpu_holds_all_weights_itself() -> None:
    model = size_of_config(LLAMA_7B, dtype="bfloat16")
    assert held_weights(model, device="cuda") == (model.weights_bytes, 0)


# --- what a model is


def test_llama2_7b_has_its_known_number_of_parameters() -> None:
    assert size_of_config(LLAMA_7B).parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"num_key_value_heads": None}, "kv_heads", 32),
        ({"head_dim": 64}, "head_dim", 64),
        ({"intermediate_size": None}, "intermediate", 4 * 4096),
    ],
)
def test_fields_that_a_configuration_leaves_out_follow_from_the_others(
    change: dict[str, Any], field: str, expected: int
) -> None:
    assert getattr(decoder_of({**LLAMA_7B, **change}), field) == expected


def test_the_names_of_older_configurations_are_known_and_so_is_an_inner_one() -> None:
    old = {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}
    expected = Decoder(layers=12, heads=12, kv_heads=12, head_dim=64, hidden=768, intermediate=3072, vocab=50257)
    assert decoder_of(old) == decoder_of({"text_config": old}) == expected


@pytest.mark.parametrize("wrong", [None, "4096", True, -1, 0, 1.5, [1]])
def test_a_configuration_that_does_not_say_gives_no_sizes_and_no_estimate(wrong: Any) -> None:
    config = {**LLAMA_7B, "hidden_size": wrong}
    assert decoder_of(config) is None
    found = predict_memory(Prediction(model=size_of_config(config)), [Load(1, 8, 8)], capacity_bytes=1)
    assert found.inference_bytes is found.kv_cache_bytes is found.activations_bytes is found.fits is None


def checkpoint_of(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_as_large_as_its_configuration_says(
    tied: bool, dtype: str, store: Store, tmp_path: Path
) -> None:
    config = {**SMALL, "tie_word_embeddings": tied}
    folder = checkpoint_of(tmp_path / "model", config, dtype)
    artifact = source_artifact(find_source("path", str(folder), relative_to=folder), store)
    found = size_of_artifact(artifact)
    assert found == size_of_config(config, dtype=dtype)
    assert found.weights_bytes == artifact.manifest.weights_bytes


def test_a_graph_that_keeps_its_weights_inside_counts_as_products(tmp_path: Path) -> None:
    part = Component(format="onnx", files={"model.onnx": FileEntry(digest="0" * 64, size_bytes=8000)})
    manifest = Manifest(format="onnx", components={"model": part}, interface=Interface())
    found = size_of_artifact(Artifact(manifest, tmp_path))
    assert found.weights_bytes == 8000
    assert found.decoder is None


def test_a_real_artifact_of_two_phases_has_the_bytes_of_each(tmp_path: Path) -> None:
    model = size_of_config(SMALL).model_copy(update={"format": "onnx"})

    def ref(offset: int, length: int, dtype: str) -> TensorRef:
        return TensorRef(file="w", offset=offset, length=length, dtype=dtype, shape=(1, length))

    files = {"w": FileEntry(digest="0" * 64, size_bytes=4000)}
    shared = {
        "model.embed_tokens.weight": ref(0, 1000, "float32"),
        "lm_head.weight": ref(1000, 400, "float32"),
    }
    layer = "model.layers.0.mlp.up_proj.weight"
    prefill = Component(format="onnx", files=files, tensors={**shared, f"{layer}.q8": ref(1400, 800, "int8")})
    packed = {f"{layer}.q4": ref(2200, 400, "uint8"), f"{layer}.q4.prepacked_0.0": ref(2600, 480, "uint8")}
    decode = Component(format="onnx", files=files, tensors={**shared, **packed})
    interface = Interface(cache=CacheLayout(layers=2, kv_heads=2, head_dim=16, in_place=True), logits_to_keep="keep")
    manifest = Manifest(
        format="onnx", components={"prefill": prefill, "decode": decode}, interface=interface, execution={}
    )
    found = corrected(model.model_copy(update={"logits_to_keep": False}), Artifact(manifest, tmp_path))
    assert [(one.embedding.size_bytes, one.head.size_bytes, one.linear.size_bytes) for one in found.phases] == [
        (1000, 400, 800),
        (1000, 400, 880),
    ]
    assert [(one.head.dtype, one.linear.dtype, one.prepacked) for one in found.phases] == [
        ("float32", "int8", False),
        ("float32", "uint8", True),
    ]
    assert manifest.weights_bytes == 3080
    assert found.weights_bytes == 3080 + model.other.size_bytes  # norms, which graphs keep inside
    assert (found.cache_in_place, found.logits_to_keep) == (True, True)
    assert held_weights(found).memory_bytes == 800 + round(400 * 1.1)


def test_a_graph_that_was_exported_says_how_its_cache_is_given(tmp_path: Path) -> None:
    layout = CacheLayout(layers=2, kv_heads=2, head_dim=16)
    for in_place in (False, True):
        interface = Interface(cache=layout.model_copy(update={"in_place": in_place}))
        part = Component(format="onnx", files={"model.onnx": FileEntry(digest="0" * 64, size_bytes=8000)})
        parts = {"prefill": part, "decode": part}
        found = size_of_artifact(Artifact(Manifest(format="onnx", components=parts, interface=interface), tmp_path))
        assert found.cache_in_place is in_place
        assert found.weights_bytes == 16000


def test_a_real_artifact_corrects_the_bytes_and_no_other_thing(tmp_path: Path) -> None:
    model = size_of_config(SMALL).model_copy(update={"format": "onnx"})

    def ref(offset: int, length: int) -> TensorRef:
        return TensorRef(file="w", offset=offset, length=length, dtype="uint8", shape=(1, length))

    tensors = {
        "model.embed_tokens.weight": ref(0, 1000),
        "lm_head.weight.q4": ref(1000, 300),
        "lm_head.weight.scales": ref(1300, 20),
        "model.layers.0.mlp.up_proj.weight.q4": ref(1320, 600),
        "alias.of.the.same.bytes": ref(1320, 600),
    }
    part = Component(format="onnx", files={"w": FileEntry(digest="0" * 64, size_bytes=1920)}, tensors=tensors)
    artifact = Artifact(Manifest(format="onnx", components={"model": part}, interface=Interface()), tmp_path)
    found = corrected(model, artifact)
    assert (found.embedding.size_bytes, found.head.size_bytes, found.linear.size_bytes) == (1000, 320, 600)
    assert found.linear.parameters == model.linear.parameters
    assert found.decoder == model.decoder


# --- what passes foresee


def test_a_head_that_is_quantized_alone_is_no_longer_the_table() -> None:
    model = size_of_config({**LLAMA_7B, "tie_word_embeddings": True}, dtype="bfloat16")
    assert model.tied
    alone = QuantizeWeights.predict(QuantizeWeights.Params(), model).model
    assert not alone.tied
    assert alone.weights_bytes == alone.embedding.size_bytes + sum(
        alone.weights(kind).size_bytes for kind in ("linear", "head", "other")
    )
    both = QuantizeWeights.predict(QuantizeWeights.Params(embedding="int4"), model).model
    assert both.tied
    kept = QuantizeWeights.predict(QuantizeWeights.Params(head="keep"), model).model
    assert kept.tied and kept.head.dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {"bits": 4, "block_size": 32},
        {"bits": 8, "block_size": 64},
        {"bits": 4, "block_size": 16, "symmetric": False},
        {"bits": 8, "block_size": 32, "head": "keep"},
        {"bits": 4, "block_size": 32, "head": "int8", "embedding": "int8"},
    ],
    ids=str,
)
def test_a_quantized_artifact_has_the_bytes_that_were_foreseen(
    params: dict[str, Any], exported: Artifact, foreseen: ModelSize, tmp_path: Path
) -> None:
    from pipeline.plugin import PassContext
    from pipeline.store.writer import OutputWriter

    given = QuantizeWeights.Params(**params)
    made = QuantizeWeights().run(exported, given, PassContext(output=OutputWriter(tmp_path)))
    expected = QuantizeWeights.predict(given, foreseen).model
    assert made.manifest.weights_bytes == pytest.approx(expected.weights_bytes, rel=0.03)
    assert corrected(expected, made).weights_bytes == pytest.approx(made.manifest.weights_bytes, rel=0.01)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Store]:
    """Large enough that norms, which stay inside the graph, hardly count."""
    home = tmp_path_factory.mktemp("medium")
    config = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
    folder = checkpoint_of(home / "model", config, "bfloat16")
    store = Store(home / "store")
    return source_artifact(find_source("path", str(folder), relative_to=folder), store), store


@pytest.fixture(scope="module")
def foreseen(medium: tuple[Artifact, Store]) -> ModelSize:
    return ExportOnnx.predict(ExportOnnx.Params(), size_of_artifact(medium[0])).model


@pytest.fixture(scope="module")
def exported(medium: tuple[Artifact, Store], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from pipeline.plugin import PassContext
    from pipeline.store.writer import OutputWriter

    source, store = medium
    staging = tmp_path_factory.mktemp("staging")
    context = PassContext(output=OutputWriter(staging))
    made = ExportOnnx().run(source, ExportOnnx.Params(verify=False), context)
    return store.publish(staging, made.manifest)


@pytest.mark.slow
def test_an_exported_artifact_has_the_bytes_and_the_cache_that_were_foreseen(
    exported: Artifact, foreseen: ModelSize
) -> None:
    assert exported.manifest.weights_bytes == pytest.approx(foreseen.weights_bytes, rel=0.03)
    cache, decoder = exported.interface.cache, foreseen.decoder
    assert cache is not None and decoder is not None
    assert (cache.layers, cache.kv_heads, cache.head_dim, cache.dtype) == (
        decoder.layers,
        decoder.kv_heads,
        decoder.head_dim,
        foreseen.dtype,
    )
    assert foreseen.logits_to_keep is (exported.interface.logits_to_keep is not None)


# --- in the plan

RECIPE = """
version: 1
name: x
model: {builtin: llama2-tiny}
hardware: local
passes:
  - pass: export_onnx
  - pass: quantize_weights
evaluate:
  workload: {prompt_lengths: [16, 64], new_tokens: 8, batch_sizes: [1, 4]}
"""


def plan(store: Store, *overrides: str, text: str = RECIPE, **changes: Any) -> Plan:
    recipe = recipe_from_text(text, file="r.yaml", folder=Path(), overrides=overrides)
    host = changes.pop("host", describe_host())
    profile = changes.pop("profile", load_profile("local", host=host))
    source = find_source("builtin", "llama2-tiny", relative_to=Path())
    return make_plan(recipe, source=source, store=store, registry=Registry(), profile=profile, host=host, **changes)


def test_every_stage_of_a_plan_has_its_memory(store: Store) -> None:
    found = {stage.name: stage.predicted for stage in plan(store).stages}
    source, exported, quantized = (found[name] for name in ("source", "export_onnx", "quantize_weights"))
    assert source is not None and exported is not None and quantized is not None
    assert source.conversion_bytes is None  # nothing is converted
    assert (exported.conversion_bytes or 0) > (quantized.conversion_bytes or 0) > 0
    assert (quantized.weights_bytes or 0) < (exported.weights_bytes or 0)
    assert exported.kv_cache_bytes == 2 * 5 * 4 * 4 * (64 + 8) * 64 * 4  # layers, batch, heads, length, size, float32


def test_the_workload_is_no_part_of_a_key_and_changes_the_memory(store: Store) -> None:
    small, large = (plan(store, f"evaluate.workload.batch_sizes=[{batch}]") for batch in (1, 8))
    assert [s.key for s in small.stages] == [s.key for s in large.stages]
    for before, after in zip(small.stages, large.stages, strict=True):
        assert before.predicted is not None and after.predicted is not None
        assert (before.predicted.inference_bytes or 0) < (after.predicted.inference_bytes or 0)


def test_what_does_not_fit_the_host_is_told_by_stage_with_both_numbers_and_may_be_forced(store: Store) -> None:
    host = describe_host().model_copy(update={"available_memory_bytes": 350_000_000})
    with pytest.raises(HostError) as caught:
        plan(store, host=host).require_runnable()
    told = r"export_onnx: making it takes about 4\d\d MB of memory, by estimate, and this host has 350 MB free"
    assert re.search(told, str(caught.value))
    assert "--force tries" in str(caught.value)
    assert "quantize_weights" not in str(caught.value)
    plan(store, host=host, force=True).require_runnable()


def test_what_does_not_fit_the_target_is_a_note_and_stops_nothing(store: Store) -> None:
    host = describe_host()
    tiny = load_profile("local", host=host).model_copy(update={"name": "tiny", "memory_bytes": 200_000_000})
    made = plan(store, profile=tiny)
    made.require_runnable()
    fits = {stage.name: stage.predicted.fits for stage in made.stages if stage.predicted}
    assert fits == {"source": False, "export_onnx": True, "quantize_weights": True}
    assert [note for note in made.notes if "does not fit" in note] == [
        note for note in made.notes if note.startswith("source does not fit tiny: running it takes about 3")
    ]
    assert any("and tiny has 200 MB" in note for note in made.notes)


def test_a_target_with_a_gpu_says_nothing_of_the_hosts_instruction_sets(store: Store) -> None:
    made = plan(store, profile=load_profile("rtx-3090"))
    assert not [note for note in made.notes if "instruction sets" in note or "cores" in note]
    memory = made.stage("source").predicted
    assert memory is not None and memory.mapped_bytes == 0


def test_a_pass_that_fails_to_foresee_stops_no_plan_and_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cls: type, params: object, model: ModelSize) -> Prediction:
        raise ZeroDivisionError("by design")

    found = Registry().load("quantize_weights")
    monkeypatch.setattr(found, "predict", classmethod(broken))
    made = plan(store)
    made.require_runnable()
    assert "quantize_weights: the pass cannot foresee its memory: ZeroDivisionError: by design" in made.notes
    memory = made.stage("quantize_weights").predicted
    assert memory is not None and memory.conversion_bytes is not None


def test_a_pass_that_says_nothing_is_assumed_to_hold_its_parent_twice() -> None:
    model = size_of_config(LLAMA_7B, dtype="bfloat16")
    assert unknown_conversion_bytes(model) == pytest.approx(2 * model.weights_bytes, abs=5 * 10**8)


def test_a_whole_pass_keeps_no_cache_and_has_the_logits_of_all_positions() -> None:
    model = size_of_config(
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": 300,
            "intermediate_size": 96,
        }
    )
    prompt, whole = Load(2, 100, 0), Load(2, 100, 0, whole=True)
    found = predict_memory(Prediction(model=model), [whole])
    assert found.kv_cache_bytes == 0
    more = (activation_bytes(model, whole) or 0) - (activation_bytes(model, prompt) or 0)
    assert more == 2 * 99 * 300 * 4
    graph = model.model_copy(update={"format": "onnx", "logits_to_keep": False, "has_cache": False})
    assert predict_memory(Prediction(model=graph), [prompt]).kv_cache_bytes == 0
