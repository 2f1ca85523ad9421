import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from onnx import helper, load_model, save_model

from pipeline.artifact import Artifact
from pipeline.measure.effect import Effect, compare_artifacts, graph_fingerprint, region_of, with_rules
from pipeline.measure.graph_weights import newly_quantized
from pipeline.onnx_model import load_onnx


@pytest.fixture
def before(tmp_path: Path) -> Artifact:
    return tiny_models.onnx_artifact(tmp_path / "before")


def effect(before: Artifact, after: Artifact) -> Effect:
    return compare_artifacts(before, after)


def fingerprint(artifact: Artifact) -> str:
    return graph_fingerprint(load_onnx(artifact))


def test_the_same_artifact_has_no_effect(before: Artifact) -> None:
    assert effect(before, before).kind == "none"


def test_other_names_of_inner_values_are_no_effect(before: Artifact, tmp_path: Path) -> None:
    renamed = tiny_models.onnx_artifact(tmp_path / "renamed", prefix="layer/")
    assert renamed.digest != before.digest
    assert effect(before, renamed).kind == "none"


def test_weights_that_moved_to_another_place_are_no_effect(before: Artifact, tmp_path: Path) -> None:
    assert effect(before, tiny_models.onnx_artifact(tmp_path / "moved", shift=4096)).kind == "none"


def test_other_weights_in_the_same_graph_are_an_effect_on_weights(before: Artifact, tmp_path: Path) -> None:
    found = effect(before, tiny_models.onnx_artifact(tmp_path / "trained", seed=1))
    assert (found.kind, found.operators) == ("weights", {})


def test_an_added_operator_is_an_effect_on_the_graph(before: Artifact, tmp_path: Path) -> None:
    found = effect(before, tiny_models.onnx_artifact(tmp_path / "added", extra_identity=True))
    assert found.kind == "graph"
    assert found.operators == {"Identity": (0, 1)}
    assert found.nodes[1] == (found.nodes[0] or 0) + 1


def test_another_small_constant_is_an_effect_on_the_graph(before: Artifact, tmp_path: Path) -> None:
    assert effect(before, tiny_models.onnx_artifact(tmp_path / "scaled", scale=3.0)).kind == "graph"


def test_another_execution_block_alone_is_an_effect_on_execution(before: Artifact, tmp_path: Path) -> None:
    other = tiny_models.onnx_artifact(tmp_path / "other", execution={"cache": "static"})
    assert effect(before, other).kind == "execution"


def test_another_format_is_a_conversion(before: Artifact, tmp_path: Path) -> None:
    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    found = effect(source, before)
    assert found.kind == "conversion"
    assert found.nodes == (None, 22)


def test_another_attribute_is_another_graph(before: Artifact) -> None:
    model = load_onnx(before)
    own = graph_fingerprint(model)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.attributes["axis"] = type(softmax.attributes["axis"])("axis", softmax.attributes["axis"].type, 1)
    assert graph_fingerprint(model) != own


def test_another_edge_is_another_graph(before: Artifact) -> None:
    model = load_onnx(before)
    own = graph_fingerprint(model)
    concat = [node for node in model.graph if node.op_type == "Concat"]
    concat[0].replace_input_with(0, model.graph.inputs[3])
    assert graph_fingerprint(model) != own


def test_swapped_outputs_are_another_graph(before: Artifact) -> None:
    model = load_onnx(before)
    own = graph_fingerprint(model)
    model.graph.outputs[1], model.graph.outputs[2] = model.graph.outputs[2], model.graph.outputs[1]
    assert graph_fingerprint(model) != own


def test_the_order_of_independent_nodes_is_not_part_of_the_graph(before: Artifact) -> None:
    model = load_onnx(before)
    own = graph_fingerprint(model)
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    model.graph.remove(gathers[1])
    model.graph.insert_before(gathers[0], gathers[1])
    assert graph_fingerprint(model) == own


def test_fingerprints_are_the_same_in_another_process(before: Artifact) -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.artifact import Artifact, Manifest\n"
        "from pipeline.measure.effect import graph_fingerprint\n"
        "from pipeline.onnx_model import load_onnx\n"
        "manifest = Manifest.model_validate_json(sys.stdin.read())\n"
        "print(graph_fingerprint(load_onnx(Artifact(manifest, Path('.')))))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=before.manifest.model_dump_json(),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == fingerprint(before)


@pytest.fixture
def int4(before: Artifact, tmp_path: Path) -> Artifact:
    """Of three products one has a constant weight; it becomes a MatMulNBits."""
    path = Path(str(before.component.files["model.onnx"].path))
    model = load_model(path, load_external_data=False)
    last = model.graph.node[-1]
    packed = helper.make_tensor("packed", 2, [64, 1, 8], bytes(512), raw=True)
    scales = helper.make_tensor("scales", 1, [64], np.ones(64, np.float32).tobytes(), raw=True)
    quantized = helper.make_node(
        "MatMulNBits",
        [last.input[0], "packed", "scales"],
        ["logits"],
        domain="com.microsoft",
        K=16,
        N=64,
        bits=4,
        block_size=16,
    )
    model.graph.node.remove(last)
    model.graph.node.append(quantized)
    model.graph.initializer.extend([packed, scales])
    save_model(model, tmp_path / "int4.onnx")
    component = before.component.model_copy(
        update={"files": before.component.files | {"model.onnx": tiny_models.entry_of(tmp_path / "int4.onnx")}}
    )
    return Artifact(before.manifest.model_copy(update={"components": {"model": component}}), before.blobs)


def test_quantized_products_are_counted_out_of_those_with_constant_weights(before: Artifact, int4: Artifact) -> None:
    found = effect(before, int4)
    assert found.kind == "weights"
    assert found.weights_quantized == (1, 1)
    assert found.operators == {"MatMul": (3, 2), "com.microsoft.MatMulNBits": (0, 1)}


def test_a_torch_checkpoint_that_was_copied_has_no_effect(tmp_path: Path) -> None:
    source = tiny_models.save_llama(tmp_path / "llama")
    shutil.copytree(source, tmp_path / "copy")
    found = effect(tiny_models.torch_artifact(source), tiny_models.torch_artifact(tmp_path / "copy"))
    assert found.kind == "none"


def test_changed_tensors_of_a_torch_checkpoint_are_counted(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    tiny_models.save_llama(tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    found = effect(source, tiny_models.torch_artifact(tmp_path / "tuned"))
    assert (found.kind, found.weights_changed) == ("weights", (1, len(tensors)))


def test_transforms_of_a_torch_checkpoint_are_an_effect_on_its_graph(tmp_path: Path) -> None:
    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    manifest = source.manifest.model_copy(update={"transforms": ({"transform": "sdpa"},)})
    assert effect(source, Artifact(manifest, source.blobs)).kind == "graph"


def test_the_dtype_a_torch_checkpoint_runs_in_is_an_effect_on_execution(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    half = tiny_models.torch_artifact(folder, dtype="bfloat16")
    assert effect(tiny_models.torch_artifact(folder), half).kind == "execution"


def test_operator_sets_that_no_node_uses_are_no_effect(before: Artifact) -> None:
    model = load_onnx(before)
    own = graph_fingerprint(model)
    model.opset_imports["com.microsoft"] = 1
    assert graph_fingerprint(model) == own


def test_a_default_that_is_written_out_is_no_effect(before: Artifact) -> None:
    import onnx_ir as ir

    model = load_onnx(before)
    own = graph_fingerprint(model)
    shape = next(node for node in model.graph if node.op_type == "Gather" and "axis" not in node.attributes)
    shape.attributes["axis"] = ir.AttrInt64("axis", 0)
    assert graph_fingerprint(model) == own
    shape.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert graph_fingerprint(model) != own


def test_casts_data_types_and_parameters_are_counted_before_and_after(before: Artifact, tmp_path: Path) -> None:
    numbers = sum(array.size for array in tiny_models.onnx_weights().values())
    found = effect(before, tiny_models.onnx_artifact(tmp_path / "half", weight_dtype="bfloat16"))
    assert found.casts == (0, 3)
    assert found.data_types == {"bfloat16": (0, 3), "float32": (3, 0)}
    assert found.parameters == (numbers, numbers)


def test_packed_weights_count_as_the_numbers_that_they_hold(before: Artifact, int4: Artifact) -> None:
    numbers = sum(array.size for array in tiny_models.onnx_weights().values())
    assert effect(before, int4).parameters == (numbers, numbers)


def test_slow_nodes_of_the_stages_own_graph_are_told_on_a_cpu_alone(before: Artifact, int4: Artifact) -> None:
    (slow,) = effect(before, int4).slow_nodes
    assert (slow.operator, slow.count) == ("com.microsoft.MatMulNBits", 1)
    assert "accuracy_level" in slow.reason
    assert effect(before, before).slow_nodes == ()
    assert compare_artifacts(before, int4, device="cuda").slow_nodes == ()


def test_the_region_shows_what_became_of_the_product(before: Artifact, int4: Artifact) -> None:
    region = effect(before, int4).region
    assert region is not None
    assert [row.operator for row in region.before if row.change == "gone"] == ["MatMul"]
    assert [row.operator for row in region.after if row.change == "new"] == ["com.microsoft.MatMulNBits"]
    assert [row.operator for row in region.after if row.change == "kept"] == ["Reshape"]
    assert region == region_of(before, int4)


def test_what_changed_no_node_has_no_region(before: Artifact, tmp_path: Path) -> None:
    assert effect(before, before).region is None
    assert effect(before, tiny_models.onnx_artifact(tmp_path / "trained", seed=1)).region is None


def test_weights_that_are_quantized_anew_are_counted_out_of_all(before: Artifact, int4: Artifact) -> None:
    wider = load_onnx(int4)
    found = newly_quantized([load_onnx(int4)], [wider])
    assert found is None
    node = next(node for node in wider.graph if node.op_type == "MatMulNBits")
    node.attributes["bits"] = type(node.attributes["bits"])("bits", node.attributes["bits"].type, 8)
    assert newly_quantized([load_onnx(int4)], [wider]) == (1, 1)


class TestWhatAPassTells:
    UNCHANGED = Effect(kind="none", nodes=(155, 155))
    CHANGED = Effect(kind="graph", nodes=(155, 150))

    def test_stands_beside_what_was_found(self) -> None:
        found = with_rules(self.CHANGED, {"fuse": (5, 155)})
        assert (found.rules, found.kind, found.contradiction) == ({"fuse": (5, 155)}, "graph", None)

    def test_of_nothing_done_agrees_with_nothing_found(self) -> None:
        found = with_rules(self.UNCHANGED, {"fuse_transpose_into_gemm": (0, 155)})
        assert (found.kind, found.contradiction) == ("none", None)

    def test_of_more_than_was_found_is_a_contradiction_and_no_effect(self) -> None:
        found = with_rules(self.UNCHANGED, {"fuse": (5, 155), "drop": (0, 155)})
        assert found.kind == "none"
        assert found.contradiction == "the pass tells of fuse 5 of 155, and nothing was found changed"

    def test_of_less_than_was_found_is_a_contradiction_too(self) -> None:
        assert "was found changed" in str(with_rules(self.CHANGED, {"fuse": (0, 155)}).contradiction)

    def test_is_not_asked_for(self) -> None:
        assert with_rules(self.UNCHANGED, {}) == self.UNCHANGED


def test_parameters_and_data_types_of_a_checkpoint_are_counted(tmp_path: Path) -> None:
    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    half = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "half", dtype="bfloat16"))
    found = effect(source, half)
    tensors = len(source.component.tensors)
    assert found.kind == "weights"
    assert found.data_types == {"bfloat16": (0, tensors), "float32": (tensors, 0)}
    assert found.parameters is not None
    assert found.parameters[0] == found.parameters[1] > 10_000


@pytest.mark.slow
def test_modules_of_a_checkpoint_are_counted_where_its_configuration_changed(tmp_path: Path) -> None:
    """Without torch in this process; the model is built without weights in another."""
    import json

    folder = tiny_models.save_llama(tmp_path / "llama")
    source = tiny_models.torch_artifact(folder)
    shutil.copytree(folder, tmp_path / "shorter")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "shorter" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    found = effect(source, tiny_models.torch_artifact(tmp_path / "shorter"))
    assert found.kind == "graph"
    assert found.modules["LlamaDecoderLayer"] == (2, 1)
    assert found.modules["Linear"] == (15, 8)
    assert "Embedding" not in found.modules


@pytest.mark.slow
def test_modules_that_transformers_cannot_build_are_left_out(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    shutil.copytree(folder, tmp_path / "unknown")
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no_such_model"}')
    found = effect(tiny_models.torch_artifact(tmp_path / "unknown"), tiny_models.torch_artifact(folder))
    assert (found.kind, found.modules) == ("graph", {})
