"""Which nodes of two graphs are the same, and where they differ."""

import random
import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pipeline.measure.graph_changes import MOST_NODES, GraphChanges, changes_of, region
from pipeline.measure.graph_match import match_graphs

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def graph(body: str, weights: int = 0) -> ir.Model:
    """A graph of x [n, 4] to y; `weights`: that many matrices w0, w1 … of zeros, layers.N.w by name."""
    given = "".join(f", float[4, 4] w{number}" for number in range(weights))
    model = ir.from_proto(onnx.parser.parse_model(f"{HEADER} g (float[n, 4] x{given}) => (float[n, m] y) {{ {body} }}"))
    for number, value in enumerate(list(model.graph.inputs)[1:]):
        model.graph.inputs.remove(value)
        value.name = f"layers.{number}.w"
        value.const_value = ir.tensor(np.zeros((4, 4), np.float32), name=value.name)
        model.graph.initializers[value.name] = value
    return model


def layers(count: int, body: str, prefix: str = "") -> list[str]:
    """A chain of layers; # is the layer's number, @ the value before it, $ its result, % a prefix of names."""
    names = ["x", *(f"{prefix}r{number}" for number in range(count - 1)), "y"]
    texts = []
    for number in range(count):
        text = body.replace("@", names[number]).replace("$", names[number + 1])
        texts.append(text.replace("#", str(number)).replace("%", prefix))
    return texts


def chain(count: int, body: str, prefix: str = "") -> ir.Model:
    return graph(" ".join(layers(count, body, prefix)), weights=count)


def operators(found: GraphChanges) -> tuple[list[str], list[str]]:
    match = found.match
    gone = [match.before.nodes[number].op_type for number in match.gone]
    new = [match.after.nodes[number].op_type for number in match.new]
    return sorted(gone), sorted(new)


PLAIN = "%m# = MatMul(@, w#) %s# = Sigmoid(%m#) %p# = Mul(%m#, %s#) $ = Add(%p#, @)"
FUSED = "%m# = MatMul(@, w#) %p# = com.microsoft.QuickGelu(%m#) $ = Add(%p#, @)"


def test_a_graph_does_not_differ_from_itself_under_other_names() -> None:
    found = changes_of(chain(3, PLAIN), chain(3, PLAIN, prefix="other"))
    assert found.groups == ()
    assert len(found.match.forward) == 12


def test_what_is_fused_in_each_layer_is_found_and_nothing_else() -> None:
    found = changes_of(chain(3, PLAIN), chain(3, FUSED, prefix="o"))
    assert operators(found) == (["Mul"] * 3 + ["Sigmoid"] * 3, ["QuickGelu"] * 3)
    assert found.match.rewired == []


def test_layers_that_changed_alike_are_one_group() -> None:
    found = changes_of(chain(12, PLAIN), chain(12, FUSED))
    (group,) = found.groups
    assert group.places == tuple(f"layer {number}" for number in range(12))
    assert (group.gone, group.new) == ({"Mul": 1, "Sigmoid": 1}, {"com.microsoft.QuickGelu": 1})


def test_a_layer_that_changed_otherwise_is_a_group_of_its_own() -> None:
    texts = layers(4, PLAIN)
    texts[2] = layers(4, PLAIN.replace("Sigmoid", "Tanh"))[2]
    found = changes_of(chain(4, PLAIN), graph(" ".join(texts), weights=4))
    assert [group.places for group in found.groups] == [("layer 2",)]
    assert operators(found) == (["Sigmoid"], ["Tanh"])


def test_the_region_shows_one_layer_with_a_neighbour_each_way() -> None:
    found = changes_of(chain(5, PLAIN), chain(5, FUSED))
    shown = region(found, found.groups[0])
    assert (shown.where, shown.alike, shown.left_out) == ("layer 0", 5, 0)
    assert [(row.operator, row.change) for row in shown.before] == [
        ("MatMul", "kept"),
        ("Sigmoid", "gone"),
        ("Mul", "gone"),
        ("Add", "kept"),
    ]
    assert [(row.operator, row.change) for row in shown.after] == [
        ("MatMul", "kept"),
        ("com.microsoft.QuickGelu", "new"),
        ("Add", "kept"),
    ]
    ids = {row.operator: row.id for row in shown.before}
    assert {row.operator: row.id for row in shown.after if row.change == "kept"} == {
        "MatMul": ids["MatMul"],
        "Add": ids["Add"],
    }
    assert shown.before[2].inputs == (ids["MatMul"], ids["Sigmoid"])


def test_a_large_region_is_cut_and_says_so() -> None:
    deep = "a = Sigmoid(x) " + " ".join(f"a{i} = Neg(a{i - 1})" if i else "a0 = Neg(a)" for i in range(99))
    other = "a = Sigmoid(x) " + " ".join(f"a{i} = Abs(a{i - 1})" if i else "a0 = Abs(a)" for i in range(99))
    found = changes_of(graph(f"{deep} y = Tanh(a98)"), graph(f"{other} y = Tanh(a98)"))
    shown = region(found, found.groups[0])
    nodes = {row.id for row in (*shown.before, *shown.after)}
    changed = [row for row in (*shown.before, *shown.after) if row.change != "kept"]
    assert len(nodes) <= MOST_NODES
    assert shown.left_out == 198 - len(changed) > 0


def test_a_removed_node_is_all_that_changed() -> None:
    found = changes_of(graph("a = Relu(x) b = Identity(a) y = Neg(b)"), graph("a = Relu(x) y = Neg(a)"))
    assert operators(found) == (["Identity"], [])
    assert found.match.rewired == []


def test_an_inserted_node_is_all_that_changed() -> None:
    found = changes_of(graph("a = Relu(x) y = Neg(a)"), graph("a = Relu(x) b = Cast<to = 10>(a) y = Neg(b)"))
    assert operators(found) == ([], ["Cast"])


def test_a_node_that_takes_another_value_is_rewired() -> None:
    before = graph("a = Relu(x) b = Abs(x) c = Add(a, b) y = Mul(c, a)")
    after = graph("a = Relu(x) b = Abs(x) c = Add(a, b) y = Mul(c, b)")
    found = changes_of(before, after)
    assert operators(found) == ([], [])
    (pair,) = found.match.rewired
    assert found.match.before.nodes[pair[0]].op_type == "Mul"
    shown = region(found, found.groups[0])
    assert {row.operator: row.change for row in shown.after}["Mul"] == "rewired"


def test_another_attribute_is_another_node_and_a_default_written_out_is_none() -> None:
    softmax = graph("y = Softmax(x)")
    assert operators(changes_of(softmax, graph("y = Softmax<axis = -1>(x)"))) == ([], [])
    assert operators(changes_of(softmax, graph("y = Softmax<axis = 0>(x)"))) == (["Softmax"], ["Softmax"])


def test_one_of_two_equal_nodes_that_goes_is_found() -> None:
    before = graph("a = Relu(x) b = Relu(x) y = Add(a, b)")
    found = changes_of(before, graph("a = Relu(x) y = Add(a, a)"))
    assert operators(found) == (["Relu"], [])


def test_changes_without_layers_are_grouped_by_what_hangs_together() -> None:
    before = graph("a = Identity(x) b = Relu(a) c = Neg(b) d = Abs(c) e = Exp(d) f = Identity(e) y = Tanh(f)")
    after = graph("b = Relu(x) c = Neg(b) d = Abs(c) e = Exp(d) y = Tanh(e)")
    (group,) = changes_of(before, after).groups
    assert group.places == ("part 1 of the graph", "part 2 of the graph")
    assert group.gone == {"Identity": 1}


def test_layers_are_read_from_the_exporters_metadata_and_from_paths_in_names() -> None:
    def made(named: bool) -> tuple[ir.Model, ir.Model]:
        before, after = graph("a = Sigmoid(x) y = Neg(a)"), graph("a = Tanh(x) y = Neg(a)")
        for model in (before, after):
            node = model.graph[0]
            if named:
                node.name = "/model/layers.7/mlp/act"
            else:
                node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model', 'model.layers.7', 'silu_3']"
        return before, after

    for named in (False, True):
        assert changes_of(*made(named)).groups[0].places == ("layer 7",)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_graph_with_one_node_replaced_differs_in_that_node_alone(seed: int) -> None:
    """Of nodes that are told apart by what they compute; equal ones could change places."""
    drawn = random.Random(seed)  # noqa: S311 - no secret
    unary = ["Relu", "Neg", "Abs", "Exp", "Tanh", "Sigmoid", "Sqrt", "Floor"]
    values, lines = ["x"], []
    for number in range(60):
        a, b = drawn.choice(values), drawn.choice(values)
        call = f"{drawn.choice(unary)}({a})" if drawn.random() < 0.6 else f"Add({a}, {b})"
        lines.append(f"v{number} = {call}")
        values.append(f"v{number}")
    lines.append("y = Sum(" + ", ".join(values[1:]) + ")")
    changed = drawn.randrange(60)
    other = list(lines)
    other[changed] = f"v{changed} = Softplus({lines[changed].partition('(')[2].partition(')')[0].split(',')[0]})"
    found = changes_of(graph(" ".join(lines)), graph(" ".join(other)))
    assert operators(found)[1] == ["Softplus"]
    assert len(found.match.gone) == 1


@pytest.mark.slow
def test_ten_thousand_nodes_take_seconds() -> None:
    before, after = chain(2500, PLAIN), chain(2500, FUSED)
    began = time.perf_counter()
    found = changes_of(before, after)
    took_s = time.perf_counter() - began
    assert len(found.match.new) == 2500
    assert took_s < 30  # about 2 s; a busy machine may take longer, a quadratic matcher would take minutes


def test_every_pair_is_of_nodes_that_are_alike() -> None:
    match = match_graphs(chain(4, PLAIN).graph, chain(4, FUSED).graph)
    for old, new in match.forward.items():
        assert match.before.nodes[old].op_type == match.after.nodes[new].op_type
    assert len(set(match.forward.values())) == len(match.forward)
