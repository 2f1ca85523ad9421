import re
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import fused_llama
import numpy as np
import onnx
import pytest
import tiny_models
from onnx import helper, load_model, numpy_helper, save_model

from pipeline.artifact import Artifact, Component, Interface, Manifest, TensorRef
from pipeline.measure.effect import ComparisonError, Effect, Origin, compare_artifacts, graph_fingerprint, with_rules
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


def test_slow_nodes_of_the_stages_own_graph_are_those_of_its_device(before: Artifact, int4: Artifact) -> None:
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


def test_what_changed_no_node_has_no_region(before: Artifact, tmp_path: Path) -> None:
    assert effect(before, before).region is None
    assert effect(before, tiny_models.onnx_artifact(tmp_path / "trained", seed=1)).region is None


def test_weights_that_are_quantized_anew_are_counted_out_of_all(before: Artifact, int4: Artifact) -> None:
    wider = load_onnx(int4)
    found = newly_quantized([(load_onnx(int4), wider)])
    assert found is None
    node = next(node for node in wider.graph if node.op_type == "MatMulNBits")
    node.attributes["bits"] = type(node.attributes["bits"])("bits", node.attributes["bits"].type, 8)
    assert newly_quantized([(load_onnx(int4), wider)]) == (1, 1)


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


@pytest.mark.slow
def test_parameters_and_data_types_of_a_checkpoint_are_counted(tmp_path: Path) -> None:
    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    half = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "half", dtype="bfloat16"))
    found = effect(source, half)
    tensors = sum(1 for ref in source.component.tensors.values() if len(ref.shape) == 2)
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


# --- weights that changed beside other things


def edited(artifact: Artifact, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Artifact:
    """The artifact with another graph, its weights where they lie."""
    folder.mkdir()
    path = artifact.component.files["model.onnx"].path
    model = load_model(str(path), load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    files = artifact.component.files | {"model.onnx": tiny_models.entry_of(folder / "model.onnx")}
    component = artifact.component.model_copy(update={"files": files})
    return Artifact(artifact.manifest.model_copy(update={"components": {"model": component}}), artifact.blobs)


def test_other_weights_beside_another_operator_are_an_effect_on_weights(before: Artifact, tmp_path: Path) -> None:
    found = effect(before, tiny_models.onnx_artifact(tmp_path / "both", seed=1, extra_identity=True))
    assert (found.kind, found.operators) == ("weights", {"Identity": (0, 1)})


def test_weights_that_moved_beside_another_operator_leave_the_effect_on_the_graph(
    before: Artifact, tmp_path: Path
) -> None:
    assert effect(before, tiny_models.onnx_artifact(tmp_path / "x", shift=4096, extra_identity=True)).kind == "graph"


def test_weights_in_another_data_type_are_an_effect_on_weights(before: Artifact, tmp_path: Path) -> None:
    half = tiny_models.onnx_artifact(tmp_path / "half", weight_dtype="bfloat16")
    assert effect(before, half).kind == "weights"
    assert effect(half, before).kind == "weights"


def test_places_that_are_equal_are_not_read_to_find_changed_weights(before: Artifact, tmp_path: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Identity", [model.graph.node[-1].output[0]], ["again"]))

    after = edited(before, tmp_path / "after", add)
    (tmp_path / "before" / "weights.bin").unlink()
    assert effect(before, after).kind == "graph"


def affine(
    folder: Path, *, bias: bool = True, scaled: bool = False, gain: float = 1.0, identity: bool = False
) -> Artifact:
    """A one-layer artifact whose last product is a Gemm, perhaps followed by a Mul with constants (`scaled`).

    `gain` multiplies the values of the head.
    """
    source = tiny_models.onnx_artifact(folder.with_name(folder.name + "-source"))
    head = (tiny_models.onnx_weights()["head"] * np.float32(gain)).astype(np.float32)

    def edit(model: onnx.ModelProto) -> None:
        last = model.graph.node[-1]
        model.graph.node.remove(last)
        flat = np.array([-1, tiny_models.WIDTH])
        model.graph.initializer.append(numpy_helper.from_array(head, "own_head"))
        model.graph.initializer.append(numpy_helper.from_array(flat, "flat"))
        model.graph.initializer.append(numpy_helper.from_array(np.full(64, 2, np.float32), "own_gain"))
        model.graph.initializer.append(numpy_helper.from_array(np.ones(64, np.float32), "own_bias"))
        model.graph.node.append(helper.make_node("Reshape", [last.input[0], "flat"], ["flat_rows"]))
        inputs = ["flat_rows", "own_head", "own_bias"]
        model.graph.node.append(helper.make_node("Gemm", inputs, ["product" if scaled or identity else "logits"]))
        if scaled:
            model.graph.node.append(helper.make_node("Mul", ["product", "own_gain"], ["logits"]))
        if identity:
            model.graph.node.append(helper.make_node("Identity", ["product"], ["logits"]))

    return edited(source, folder, edit)


def test_a_scale_that_is_folded_into_weights_is_a_change_of_the_graph(tmp_path: Path) -> None:
    scaled = affine(tmp_path / "scaled", scaled=True)
    assert effect(scaled, affine(tmp_path / "folded", gain=2.0)).kind == "graph"


def test_other_weights_beside_a_node_that_is_gone_and_read_none_are_an_effect_on_weights(tmp_path: Path) -> None:
    longer = affine(tmp_path / "longer", identity=True)
    assert effect(longer, affine(tmp_path / "same")).kind == "graph"
    assert effect(longer, affine(tmp_path / "tuned", gain=2.0)).kind == "weights"


def test_a_transposed_weight_is_a_change_of_the_graph(before: Artifact, tmp_path: Path) -> None:
    def turn(model: onnx.ModelProto) -> None:
        head = tiny_models.onnx_weights()["head"].T.copy()
        model.graph.initializer.append(numpy_helper.from_array(head, "turned"))
        model.graph.node.insert(0, helper.make_node("Transpose", ["turned"], ["back_again"], perm=[1, 0]))
        model.graph.node[-1].input[1] = "back_again"

    turned = edited(before, tmp_path / "turned", turn)
    assert effect(before, turned).kind == "graph"
    assert effect(turned, before).kind == "graph"


def test_large_constants_inside_the_graph_are_weights_too(tmp_path: Path) -> None:
    found = effect(affine(tmp_path / "one"), affine(tmp_path / "other", gain=2.0))
    assert (found.kind, found.region) == ("weights", None)


def branching(folder: Path, value: float, *, inside: bool, identity: bool = False) -> Artifact:
    """An If whose branches multiply the logits by a large constant: their own, or one of the graph around them."""
    source = tiny_models.onnx_artifact(folder.with_name(folder.name + "-source"))

    def edit(model: onnx.ModelProto) -> None:
        large = numpy_helper.from_array(np.full((64, 64), value, np.float32), "large")
        branches = {}
        for name in ("then_branch", "else_branch"):
            out = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            product = helper.make_node("MatMul", ["logits", "large"], [name])
            branches[name] = helper.make_graph([product], name, [], [out], [large] if inside else [])
        if not inside:
            model.graph.initializer.append(large)
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], **branches))
        if identity:
            model.graph.node.append(helper.make_node("Identity", ["chosen"], ["again"]))

    return edited(source, folder, edit)


@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_a_subgraph_reads_are_compared(inside: bool, tmp_path: Path) -> None:
    one = branching(tmp_path / "one", 1.0, inside=inside)
    assert effect(one, branching(tmp_path / "two", 2.0, inside=inside)).kind == "weights"
    assert effect(one, branching(tmp_path / "longer", 1.0, inside=inside, identity=True)).kind == "graph"
    assert effect(one, branching(tmp_path / "both", 2.0, inside=inside, identity=True)).kind == "weights"


# --- functions of a model


def with_function(folder: Path, edit: Callable[[onnx.FunctionProto], None], **given: object) -> Artifact:
    """The logits go through a function loc.F of attributes p and q, which the call gives as `given`."""
    source = tiny_models.onnx_artifact(folder.with_name(folder.name + "-source"))

    def add(model: onnx.ModelProto) -> None:
        nodes = [helper.make_node("Constant", [], ["c"]), helper.make_node("LeakyRelu", ["a"], ["r"])]
        nodes.append(helper.make_node("Add", ["r", "c"], ["b"]))
        nodes[0].attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.ones(1, np.float32))))
        nodes[1].attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="p", type=onnx.AttributeProto.FLOAT))
        function = helper.make_function("loc", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 18)], ["p", "q"])
        edit(function)
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid("loc", 1))
        model.graph.node.append(helper.make_node("F", ["logits"], ["out"], domain="loc", **given))

    return edited(source, folder, add)


def refers_to_q(function: onnx.FunctionProto) -> None:
    function.node[1].attribute[0].ref_attr_name = "q"


def constant_by_reference(function: onnx.FunctionProto) -> None:
    function.attribute.append("value")
    del function.node[0].attribute[:]
    function.node[0].attribute.append(
        onnx.AttributeProto(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    )


def default(value: float) -> Callable[[onnx.FunctionProto], None]:
    def edit(function: onnx.FunctionProto) -> None:
        function.attribute.remove("p")
        function.attribute_proto.append(helper.make_attribute("p", value))

    return edit


def large_constant(value: float) -> Callable[[onnx.FunctionProto], None]:
    def edit(function: onnx.FunctionProto) -> None:
        function.node[0].attribute[0].CopyFrom(
            helper.make_attribute("value", numpy_helper.from_array(np.full((300, 1), value, np.float32)))
        )

    return edit


def as_it_is(function: onnx.FunctionProto) -> None:
    """No other function."""


def test_a_function_that_reads_another_attribute_is_another_graph(tmp_path: Path) -> None:
    first, second = (
        with_function(tmp_path / name, edit, p=0.1, q=0.9) for name, edit in (("p", as_it_is), ("q", refers_to_q))
    )
    assert effect(first, second).kind == "graph"
    assert effect(first, with_function(tmp_path / "again", as_it_is, p=0.1, q=0.9)).kind == "none"


def test_tensors_that_a_function_is_given_by_reference_are_compared(tmp_path: Path) -> None:
    def of(name: str, value: float) -> Artifact:
        given = numpy_helper.from_array(np.full(1, value, np.float32))
        return with_function(tmp_path / name, constant_by_reference, p=0.1, q=0.9, value=given)

    assert effect(of("a", 1.0), of("b", 1.0)).kind == "none"
    assert effect(of("c", 1.0), of("d", 2.0)).kind == "graph"


def test_another_default_of_a_functions_attribute_is_another_graph(tmp_path: Path) -> None:
    one, other = (with_function(tmp_path / str(value), default(value), q=0.9) for value in (0.25, 0.5))
    assert effect(one, other).kind == "graph"


def test_large_constants_of_a_function_are_weights(tmp_path: Path) -> None:
    one, other = (with_function(tmp_path / str(value), large_constant(value), p=0.1, q=0.9) for value in (1.0, 2.0))
    assert effect(one, other).kind == "weights"
    longer = [
        edited(artifact, tmp_path / f"longer-{number}", one_more_identity)
        for number, artifact in enumerate((one, other))
    ]
    assert [effect(one, after).kind for after in longer] == ["graph", "weights"]


def one_more_identity(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [model.graph.node[-1].output[0]], ["more"]))


def test_nodes_of_a_function_are_counted(before: Artifact, tmp_path: Path) -> None:
    found = effect(before, with_function(tmp_path / "f", as_it_is, p=0.1, q=0.9))
    assert found.operators["LeakyRelu"] == (0, 1)
    assert found.operators["loc.F"] == (0, 1)


# --- what both formats count


def test_a_conversion_counts_the_same_weights_on_both_sides(tmp_path: Path) -> None:
    """Vectors of norms and tables of constants are too small to be told apart: they are left out of both."""
    source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
    tensors = source.component.tensors
    matrices = {name: ref for name, ref in tensors.items() if len(ref.shape) == 2}
    assert len(matrices) < len(tensors)
    graph = onnx_of(source, matrices, tmp_path / "graph")
    found = effect(source, graph)
    assert found.kind == "conversion"
    assert found.data_types == {}
    assert found.parameters is not None
    assert found.parameters[0] == found.parameters[1] == sum(prod(ref.shape) for ref in matrices.values())


def onnx_of(source: Artifact, matrices: Mapping[str, TensorRef], folder: Path) -> Artifact:
    """A graph that multiplies by each matrix of a checkpoint, and adds eight numbers of its own."""
    folder.mkdir()
    nodes, initializers = [], [numpy_helper.from_array(np.ones(8, np.float32), "frequencies")]
    for number, (name, ref) in enumerate(matrices.items()):
        external = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=ref.shape)
        external.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", ref.file), ("offset", ref.offset), ("length", ref.length)):
            external.external_data.add(key=key, value=str(value))
        initializers.append(external)
        nodes.append(helper.make_node("Identity", [name], [f"y{number}"]))
    nodes.append(helper.make_node("Identity", ["frequencies"], ["y"]))
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [8])
    model = helper.make_model(helper.make_graph(nodes, "g", [], [out], initializers), ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    files = {**source.component.files, "model.onnx": tiny_models.entry_of(folder / "model.onnx")}
    component = Component(format="onnx", files=files, tensors=dict(matrices))
    return Artifact(Manifest(format="onnx", components={"model": component}, interface=Interface()), folder)


def test_tables_of_cosines_are_no_parameters(before: Artifact, tmp_path: Path) -> None:
    def rotate(model: onnx.ModelProto) -> None:
        for name in ("cosines", "sines"):
            model.graph.initializer.append(numpy_helper.from_array(np.ones((48, 8), np.float32), name))
        node = helper.make_node("RotaryEmbedding", ["past_k", "cosines", "sines", "positions"], ["turned"])
        model.graph.node.append(node)

    found = effect(before, edited(before, tmp_path / "rotary", rotate))
    assert found.parameters is not None
    assert found.parameters[0] == found.parameters[1]


# --- strangers' graphs


def test_control_characters_of_a_graph_are_made_visible(before: Artifact, tmp_path: Path) -> None:
    def evil(model: onnx.ModelProto) -> None:
        node = helper.make_node("Evil\x1b]0;owned\x07", ["logits"], ["out"], domain="x\x9b", mode="\x1b[31m")
        model.graph.node.append(node)
        model.opset_import.append(helper.make_opsetid("x\x9b", 1))

    found = effect(before, edited(before, tmp_path / "evil", evil))
    told = with_rules(found, {"\x1bfuse": (1, 2)}).model_dump_json()
    assert r"x\\x9b.Evil\\x1b]0;owned\\x07" in told
    assert r"mode=\\x1b[31m" in told
    assert r"\\x1bfuse" in told
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]|\\u00[019]", told)


def test_a_parent_that_cannot_be_read_is_no_failure_of_the_stage(before: Artifact, tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\xffno graph")
    files = before.component.files | {"model.onnx": tiny_models.entry_of(tmp_path / "garbage.onnx")}
    component = before.component.model_copy(update={"files": files})
    garbage = Artifact(before.manifest.model_copy(update={"components": {"model": component}}), before.blobs)
    with pytest.raises(ComparisonError):
        effect(garbage, before)
    with pytest.raises(Exception) as raised:
        effect(before, garbage)
    assert not isinstance(raised.value, ComparisonError)


class TestTwoComponents:
    """Of one graph for prompts and one for single tokens; the parent is one of the two that they come from."""

    @staticmethod
    def together(before: Artifact, int4: Artifact, parent: Artifact) -> Effect:
        both = fused_llama.two_phases(before, int4)
        parent_name = "plain" if parent is before else "int4"
        origins = {"": Origin(parent_name, parent), "prefill": Origin("plain", before), "decode": Origin("int4", int4)}
        return compare_artifacts(parent, both, origins=origins)

    def test_each_is_told_by_the_stage_that_it_comes_from(self, before: Artifact, int4: Artifact) -> None:
        for parent, kinds in ((before, ["none", "weights"]), (int4, ["weights", "none"])):
            found = self.together(before, int4, parent)
            assert [(part.name, part.same_as) for part in found.components] == [
                ("prefill", "plain"),
                ("decode", "int4"),
            ]
            assert [part.kind for part in found.components] == kinds
            assert found.kind == "weights"

    def test_nodes_and_operators_are_those_of_both_and_shared_weights_count_once(
        self, before: Artifact, int4: Artifact
    ) -> None:
        found = self.together(before, int4, before)
        assert found.nodes == (22, 44)
        assert [part.nodes for part in found.components] == [(22, 22), (22, 22)]
        assert found.operators["MatMul"] == (3, 5)
        assert found.operators["com.microsoft.MatMulNBits"] == (0, 1)
        assert found.weights_quantized == (1, 2)
        assert found.data_types == {"uint8": (0, 1)}
        assert [node.count for node in found.slow_nodes] == [1]

    def test_the_region_shows_the_one_that_changed(self, before: Artifact, int4: Artifact) -> None:
        region = self.together(before, int4, before).region
        assert region is not None
        assert [row.operator for row in region.after if row.change == "new"] == ["com.microsoft.MatMulNBits"]

    def test_twice_the_same_is_another_graph_with_the_same_weights(self, before: Artifact) -> None:
        found = self.together(before, before, before)
        assert found.kind == "graph"
        assert [(part.kind, part.is_new) for part in found.components] == [("none", True), ("none", True)]
        assert (found.weights_quantized, found.region) == (None, None)

    def test_weights_of_other_values_are_found_in_one_of_them(self, before: Artifact, tmp_path: Path) -> None:
        trained = tiny_models.onnx_artifact(tmp_path / "trained", seed=1)
        found = compare_artifacts(
            fused_llama.two_phases(before, before),
            fused_llama.two_phases(before, trained),
            origins={"": Origin("both", fused_llama.two_phases(before, before))},
        )
        assert found.kind == "weights"
        assert [(part.name, part.kind, part.is_new) for part in found.components] == [
            ("prefill", "none", False),
            ("decode", "weights", False),
        ]
        assert [part.same_as for part in found.components] == ["both/prefill", None]

    def test_a_weight_kept_in_half_the_bytes_by_one_of_them_is_another_weight(
        self, before: Artifact, tmp_path: Path
    ) -> None:
        half = tiny_models.onnx_artifact(tmp_path / "half", weight_dtype="bfloat16")
        found = compare_artifacts(before, fused_llama.two_phases(before, half))
        assert [part.kind for part in found.components] == ["none", "weights"]

    def test_one_that_becomes_a_single_graph_again_is_compared_with_both(
        self, before: Artifact, int4: Artifact
    ) -> None:
        found = compare_artifacts(fused_llama.two_phases(before, int4), before)
        assert found.kind == "weights"
        assert [(part.name, part.kind, part.is_gone) for part in found.components] == [
            ("prefill", "none", True),
            ("decode", "weights", True),
        ]
        assert found.nodes == (44, 22)

    def test_another_crossover_is_an_effect_on_execution(self, before: Artifact, int4: Artifact) -> None:
        early, late = (fused_llama.two_phases(before, int4, crossover_tokens=n) for n in (4, 16))
        found = compare_artifacts(early, late)
        assert (found.kind, found.operators, found.weights_quantized) == ("execution", {}, None)
        assert [part.kind for part in found.components] == ["none", "none"]

    def test_the_same_artifact_has_no_effect(self, before: Artifact, int4: Artifact) -> None:
        both = fused_llama.two_phases(before, int4)
        assert effect(both, both).kind == "none"

    def test_of_a_checkpoint_they_are_a_conversion(self, before: Artifact, int4: Artifact, tmp_path: Path) -> None:
        source = tiny_models.torch_artifact(tiny_models.save_llama(tmp_path / "llama"))
        both = fused_llama.two_phases(before, int4)
        found = compare_artifacts(source, both, origins={"": Origin("source", source), "decode": Origin("int4", int4)})
        assert (found.kind, found.nodes) == ("conversion", (None, 44))
        assert [(part.kind, part.same_as) for part in found.components] == [(None, None), (None, "int4")]

    def test_other_names_are_other_components(self, before: Artifact) -> None:
        parts = {"encoder": before.component, "decoder": before.component}
        pair = Artifact(before.manifest.model_copy(update={"components": parts}), before.blobs)
        found = compare_artifacts(pair, fused_llama.two_phases(before, before))
        assert found.kind == "graph"
        assert {part.name: (part.is_new, part.is_gone, part.kind) for part in found.components} == {
            "prefill": (True, False, None),
            "decode": (True, False, None),
            "encoder": (False, True, None),
            "decoder": (False, True, None),
        }
