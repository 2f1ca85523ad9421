"""An ONNX file of the user's becomes an artifact that refers to it, or is refused with what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pipeline.artifact import Artifact, CacheLayout
from pipeline.errors import PipelineError, RecipeError
from pipeline.hardware import describe_host, load_profile
from pipeline.models import find_source, source_artifact
from pipeline.onnx_model import load_onnx
from pipeline.plan import Plan, make_plan
from pipeline.plugin import Registry
from pipeline.recipe.load import recipe_from_text
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner
from pipeline.store import Store
from pipeline.store.folder import materialize

Write = Callable[..., Path]


def artifact_of(path: Path, store: Store) -> Artifact:
    return source_artifact(find_source("onnx", str(path), relative_to=Path()), store)


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        find_source("onnx", str(path), relative_to=Path())
    return str(caught.value)


def expected_logits(path: Path, tokens: list[list[int]]) -> np.ndarray:
    model = onnx.load(path)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    logits: np.ndarray = weights["embed"][np.array(tokens)] @ weights["head"]
    return logits


@pytest.mark.parametrize("external", [False, True])
def test_the_graph_runs_from_where_it_lies(external: bool, tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path / "model", external=external)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_nlink) for p in path.parent.iterdir()}
    artifact = artifact_of(path, store)
    assert artifact.format == "onnx"
    assert artifact.interface.cache == CacheLayout(layers=1, kv_heads=2, head_dim=4, dtype="float32", in_place=False)
    assert artifact.interface.vocab_size == 32
    assert artifact.interface.max_length == 64
    assert set(artifact.component.tensors) == ({"embed", "head"} if external else set())
    assert artifact.file("model.onnx") == path
    assert not store.blobs.exists()
    runner = OnnxRuntimeRunner(artifact, ExecutionSpec())
    np.testing.assert_allclose(runner.prefill([[1, 2, 3]]), expected_logits(path, [[3]])[:, 0], atol=1e-5)
    np.testing.assert_allclose(runner.decode([[7]]), expected_logits(path, [[7]])[:, 0], atol=1e-5)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_nlink) for p in path.parent.iterdir()} == before


def test_tensors_are_mapped_from_the_users_file(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path / "model", external=True)
    artifact = artifact_of(path, store)
    head = next(t for t in onnx.load(path).graph.initializer if t.name == "head")
    np.testing.assert_array_equal(artifact.tensor("head"), onnx.numpy_helper.to_array(head))
    model = load_onnx(artifact)
    np.testing.assert_array_equal(model.graph.initializers["head"].const_value.numpy(), artifact.tensor("head"))


def test_a_copy_that_is_written_out_runs_by_itself(tmp_path: Path, store: Store, write_graph: Write) -> None:
    import onnxruntime

    path = write_graph(tmp_path / "model", name="decoder.onnx", external=True, data="weights.bin")
    folder = tmp_path / "copy"
    materialize(artifact_of(path, store), folder)
    shutil.rmtree(path.parent)
    names = {p.name for p in folder.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "config.json", "pipeline.json"}
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()][:2] == ["input_ids", "attention_mask"]


def test_equal_graphs_are_equal_artifacts_wherever_they_lie(tmp_path: Path, store: Store, write_graph: Write) -> None:
    one = artifact_of(write_graph(tmp_path / "one", external=True), store)
    other = artifact_of(write_graph(tmp_path / "other", external=True), store)
    assert one.digest == other.digest


@pytest.mark.parametrize("present", ["present", "present_key_values"])
def test_both_names_of_the_cache_are_known(present: str, tmp_path: Path, store: Store, write_graph: Write) -> None:
    artifact = artifact_of(write_graph(tmp_path, present=present), store)
    assert artifact.interface.outputs["present.v[0]"] == f"{present}.0.value"


def test_half_precision_caches_keep_their_type(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path, dtype=TensorProto.FLOAT16)
    artifact = artifact_of(path, store)
    assert artifact.interface.cache is not None
    assert artifact.interface.cache.dtype == "float16"


def test_companions_beside_the_graph_are_taken_along(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path / "model")
    (path.parent / "tokenizer.json").write_text("{}")
    source = find_source("onnx", str(path), relative_to=Path())
    assert source.has_tokenizer
    assert set(source_artifact(source, store).manifest.files) == {"config.json", "tokenizer.json"}


def test_companions_above_a_folder_of_its_own_are_taken_along(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path / "model" / "onnx", external=True, config={})
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 48}')
    source = find_source("onnx", "model/onnx/model.onnx", relative_to=tmp_path)
    assert source.files == ("config.json", "onnx/model.onnx", "onnx/model.onnx_data")
    assert source.weights_bytes == sum(p.stat().st_size for p in path.parent.iterdir())
    artifact = source_artifact(source, store)
    assert artifact.interface.max_length == 48
    assert set(artifact.manifest.files) == {"config.json"}


def test_genai_config_says_how_long_a_sequence_may_be(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path, config={})
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"context_length": 40}}))
    assert artifact_of(path, store).interface.max_length == 40


def test_an_unknown_length_is_answered_with_what_to_write(tmp_path: Path, write_graph: Write) -> None:
    message = refusal(write_graph(tmp_path, config={}))
    assert "nothing says how many positions" in message
    assert 'config.json with {"max_position_embeddings": N}' in message


def test_sizes_that_the_shapes_leave_open_come_from_the_config(
    tmp_path: Path, store: Store, write_graph: Write
) -> None:
    cache = {f"past_key_values.0.{part}": ["b", "heads", "past", "size"] for part in ("key", "value")}
    logits = {"logits": ["b", "s", "vocabulary"]}
    config = {"num_key_value_heads": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 32, "n_positions": 9}
    path = write_graph(tmp_path, inputs=cache, outputs=logits, config=config)
    interface = artifact_of(path, store).interface
    assert interface.cache is not None
    assert (interface.cache.kv_heads, interface.cache.head_dim) == (2, 4)
    assert (interface.vocab_size, interface.max_length) == (32, 9)
    (tmp_path / "config.json").write_text('{"n_positions": 9, "vocab_size": 32}')
    assert "nor a config.json beside it say how many heads" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"without": ("logits",)}, "it has no output logits"),
        ({"without": ("input_ids",)}, "it has no input input_ids"),
        ({"without": ("present.0.key", "present.0.value")}, "it takes a cache, and has no outputs present.N.key"),
        ({"without": ("present.0.key",)}, "2 inputs and 1 outputs that do not go together"),
        ({"inputs": {"use_cache_branch": [1]}}, "a merged decoder"),
        ({"inputs": {"token_type_ids": ["b", "s"]}}, "that of an encoder"),
        ({"inputs": {"encoder_hidden_states": ["b", "s", 8]}}, "the decoder of an encoder-decoder"),
        ({"inputs": {"beam_idx": ["b"]}}, "inputs that no one fills: beam_idx"),
        ({"inputs": {"input_ids": ["b", 1]}}, "it takes exactly 1 tokens at a time"),
        ({"outputs": {"logits": ["b", 1, 32]}}, "the logits of the last position only"),
        ({"inputs": {"past_key_values.0.key": ["b", 2, 64, 4]}}, "room for exactly 64 positions"),
        ({"inputs": {"past_key_values.0.key": ["b", 2, "past"]}}, "instead of [batch, heads, past, size]"),
        ({"inputs": {"past_key_values.0.key": ["b", 3, "past", 4]}}, "layers of its cache differ"),
    ],
)
def test_a_graph_that_is_something_else_is_refused(
    changes: dict[str, Any], why: str, tmp_path: Path, write_graph: Write
) -> None:
    message = refusal(write_graph(tmp_path, **changes))
    assert "is not a causal language model: " in message
    assert why in message
    assert "expected: input_ids [batch, sequence]" in message


def test_a_graph_that_can_limit_its_logits_is_asked_for_all(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path, inputs={"num_logits_to_keep": []}, outputs={"logits": ["b", "kept", 32]})
    assert artifact_of(path, store).interface.logits_to_keep == "num_logits_to_keep"


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd"])
def test_external_data_may_not_leave_the_folder(location: str, tmp_path: Path, write_graph: Write) -> None:
    path = relocate(write_graph(tmp_path / "model", external=True), location)
    (tmp_path / "secret").write_bytes(bytes(10_000))
    assert f"{location!r}, outside the folder of the graph" in refusal(path)


def test_a_link_to_a_place_outside_is_refused(tmp_path: Path, write_graph: Write) -> None:
    path = write_graph(tmp_path / "model", external=True)
    data = path.parent / "model.onnx_data"
    data.rename(tmp_path / "secret")
    data.symlink_to(tmp_path / "secret")
    assert "is a link to a place outside the folder of the graph" in refusal(path)


def test_the_hubs_cache_may_hold_both_as_links(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path / "snapshot", external=True)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(path.parent.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    artifact = artifact_of(path, store)
    assert OnnxRuntimeRunner(artifact, ExecutionSpec()).prefill([[1]]).shape == (1, 32)


def test_data_that_is_missing_or_cut_off_is_told(tmp_path: Path, write_graph: Write) -> None:
    path = write_graph(tmp_path, external=True)
    data = tmp_path / "model.onnx_data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "is cut off: 'head' ends at" in refusal(path)
    data.unlink()
    assert f"lies in {data}, which is not there" in refusal(path)


def test_what_is_no_file_or_no_model_is_told(tmp_path: Path, write_graph: Write) -> None:
    assert "there is no file" in refusal(tmp_path / "nowhere.onnx")
    path = write_graph(tmp_path / "model")
    assert "give one of its files: model.onnx" in refusal(path.parent)
    path.write_bytes(b"\x00" * 100)
    assert "is no ONNX file" in refusal(path)


def relocate(path: Path, location: str) -> Path:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for pair in tensor.external_data:
            if pair.key == "location":
                pair.value = location
    path.write_bytes(model.SerializeToString())
    return path


def plan_of(path: Path, passes: str, store: Store, workload: str = "{prompt_lengths: [16], new_tokens: 8}") -> Plan:
    text = f"version: 1\nname: x\nmodel: {{onnx: {path}}}\npasses: [{passes}]\n"
    text += f"evaluate: {{workload: {workload}}}\n"
    recipe = recipe_from_text(text, file="x.yaml", folder=path.parent)
    host = describe_host()
    source = find_source("onnx", str(path), relative_to=path.parent)
    return make_plan(
        recipe, source=source, store=store, registry=Registry(), profile=load_profile("local", host=host), host=host
    )


def test_a_plan_knows_that_the_source_is_a_graph(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path, external=True)
    plan = plan_of(path, "{pass: quantize_weights}", store)
    assert [stage.produces for stage in plan.stages] == ["onnx", "onnx"]
    assert any("no tokenizer.json" in note for note in plan.notes)
    with pytest.raises(RecipeError, match="takes torch, and the stage 'source' yields onnx") as caught:
        plan_of(path, "{pass: export_onnx}", store)
    assert "take this pass out" in str(caught.value)


@pytest.mark.parametrize("presents", [True, False])
def test_a_graph_without_a_cache_runs_whole(presents: bool, tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = save_whole(write_graph, tmp_path, presents=presents)
    artifact = artifact_of(path, store)
    assert artifact.interface.cache is None
    assert artifact.interface.outputs == {"logits": "logits"}
    runner = OnnxRuntimeRunner(artifact, ExecutionSpec())
    np.testing.assert_allclose(runner.forward([[1, 2, 3]]), expected_logits(path, [[3]])[:, 0], atol=1e-5)
    with pytest.raises(PipelineError, match="no key-value cache"):
        runner.prefill([[1, 2, 3]])


def test_a_plan_of_a_graph_without_a_cache_needs_whole_passes_for_a_workload(
    tmp_path: Path, store: Store, write_graph: Write
) -> None:
    path = save_whole(write_graph, tmp_path, presents=False)
    with pytest.raises(RecipeError, match=r"stage 'source' has no key-value cache") as caught:
        plan_of(path, "", store)
    assert "x.yaml:3" in str(caught.value)
    assert "forward: [[1, 128]]" in str(caught.value)
    assert not plan_of(path, "{pass: quantize_weights}", store, "{forward: [[2, 16]]}").obstacles


def save_whole(write_graph: Write, folder: Path, *, presents: bool) -> Path:
    """A graph that takes no cache, with or without the one that it would leave."""
    names = [f"present.0.{part}" for part in ("key", "value")]
    without = ("attention_mask", "past_key_values.0.key", "past_key_values.0.value", *names)
    path = write_graph(folder, without=without)
    model = onnx.load(path)
    for node in [node for node in model.graph.node if node.op_type == "Concat"]:
        model.graph.node.remove(node)
    if presents:
        for name in names:
            model.graph.node.append(onnx.helper.make_node("Identity", ["heads"], [name]))
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2, "s", 4]))
    onnx.save_model(model, path)
    return path


def test_the_key_holds_the_data_beside_the_graph(tmp_path: Path, store: Store, write_graph: Write) -> None:
    path = write_graph(tmp_path, external=True)
    before = plan_of(path, "", store).stage("source").key
    data = tmp_path / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(bytes(content))
    assert plan_of(path, "", store).stage("source").key != before


@pytest.mark.parametrize("place", ["function", "sparse", "subgraph", "training"])
def test_only_dense_initializers_of_the_main_graph_may_lie_outside(
    place: str, tmp_path: Path, write_graph: Write
) -> None:
    path = write_graph(tmp_path / "model", external=True)
    find_source("onnx", str(path), relative_to=Path())
    (tmp_path / "key").write_bytes(bytes(16))
    model = onnx.load(path, load_external_data=False)
    secret = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    secret.external_data.add(key="location", value=str(tmp_path / "key").lstrip("/"))
    make = onnx.helper
    if place == "function":
        node = make.make_node("Constant", [], ["c"], value=secret)
        model.functions.append(make.make_function("own", "Hold", [], ["c"], [node], [make.make_opsetid("", 18)]))
    elif place == "sparse":
        indices = onnx.numpy_helper.from_array(np.arange(4), "indices")
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=secret, indices=indices, dims=[8]))
    elif place == "subgraph":
        out = make.make_tensor_value_info("out", TensorProto.FLOAT, [4])
        branch = make.make_graph([make.make_node("Identity", ["secret"], ["out"])], "b", [], [out], [secret])
        model.graph.node.append(make.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    else:
        model.training_info.add().initialization.initializer.append(secret)
    path.write_bytes(model.SerializeToString())
    assert "keeps secret" in (said := refusal(path))
    assert "only the dense initializers of the main graph may lie outside" in said
