"""Whether products that read one value pay as one product: queries, keys and values; the MLP's gate and up.

    python benchmarks/packed_products.py RUN STAGE            # a run's folder and a stage of int4 or int8 MatMulNBits

The graph of the stage, and copies of it in which products of one input are joined along their outputs and split again,
in shuffled rounds of one prompt and 32 single tokens each. Printed are the ratios of speed to the stage as it is, with
95 % intervals. The copies are put into the store, where `pipeline cache gc` finds them unused.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pipeline import Artifact, ExecutionSpec, load_onnx, load_runner, new_tensor, save_onnx
from pipeline.measure.estimate import estimate, look_at
from pipeline.store import Store, default_store_path
from pipeline.store.writer import OutputWriter

PROMPT, TOKENS = 128, 32
GROUPS = {"queries, keys, values": ("q_proj", "k_proj", "v_proj"), "gate, up": ("gate_proj", "up_proj")}


def joined(artifact: Artifact, names: tuple[str, ...], store: Store) -> tuple[Artifact, int]:
    """The artifact with these products joined, and in how many places."""
    model = load_onnx(artifact)
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMulNBits" and any(name in str(node.inputs[1].name) for name in names):
            by_input.setdefault(node.inputs[0], []).append(node)
    groups = [nodes for nodes in by_input.values() if len(nodes) == len(names)]
    with store.staging() as staging:
        output = OutputWriter(staging)
        for number, nodes in enumerate(groups):
            join(model, nodes, f"joined.{names[0]}.{number}", output)
        RemoveUnusedNodesPass()(model)
        return store.publish(staging, save_onnx(model, output, like=artifact).manifest), len(groups)


def join(model: ir.Model, nodes: list[ir.Node], name: str, output: OutputWriter) -> None:
    first = nodes[0]
    weights = []
    for position in range(1, len(first.inputs)):
        arrays = [node.inputs[position].const_value.numpy().reshape(node.attributes.get_int("N"), -1) for node in nodes]
        shape = first.inputs[position].const_value.shape.numpy()
        array = np.concatenate(arrays).reshape(-1, *shape[1:]) if len(shape) > 1 else np.concatenate(arrays).reshape(-1)
        tensor = new_tensor(output, f"{name}.{position}", array)
        weights.append(
            ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        )
        model.graph.register_initializer(weights[-1])
    widths = [node.attributes.get_int("N") for node in nodes]
    sizes = ir.Value(
        name=f"{name}.widths",
        const_value=(tensor := ir.tensor(np.array(widths), name=f"{name}.widths")),
        type=ir.TensorType(tensor.dtype),
        shape=tensor.shape,
    )
    model.graph.register_initializer(sizes)
    attributes = {key: value.value for key, value in first.attributes.items()} | {"N": sum(widths)}
    product = ir.node("MatMulNBits", [first.inputs[0], *weights], attributes, domain="com.microsoft", name=name)
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": 2}, num_outputs=len(nodes), name=f"{name}.split")
    product.outputs[0].name = f"{name}.value"
    old = [node.outputs[0] for node in nodes]
    ir.convenience.replace_nodes_and_values(model.graph, first, nodes, [product, split], old, split.outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    store = Store(default_store_path())
    report = json.loads((asked.run / "report.json").read_text())
    digest = next(stage["artifact"]["digest"] for stage in report["stages"] if stage["name"] == asked.stage)
    artifact = store.artifact(digest)
    assert artifact is not None, f"the store has no {digest}"
    variants = {"as it is": artifact}
    for label, names in GROUPS.items():
        variants[label], count = joined(artifact, names, store)
        print(f"{label}: joined in {count} places")
    runners = {label: load_runner(made, ExecutionSpec(threads=asked.threads)) for label, made in variants.items()}
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, artifact.interface.vocab_size, (1, PROMPT + TOKENS))
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in runners}
    order = list(runners)
    shuffle = np.random.default_rng(1)
    for turn in range(asked.rounds + 1):  # the first one warms up
        shuffle.shuffle(order)
        for label in order:
            begin = time.perf_counter()
            runners[label].prefill(tokens[:, :PROMPT])
            middle = time.perf_counter()
            for position in range(PROMPT, PROMPT + TOKENS):
                runners[label].decode(tokens[:, position : position + 1])
            if turn:
                times[label].append((middle - begin, time.perf_counter() - middle))
    for phase, kind in enumerate(("prefill", "decode")):
        for label in GROUPS:
            pairs = zip(times["as it is"], times[label], strict=True)
            logs = np.log([before[phase] / after[phase] for before, after in pairs])
            found = estimate(look_at(logs[None], np.zeros(len(logs), int)))
            middle, half = float(found.center[0]), float(found.half_width()[0])
            low, ratio, high = np.exp([middle - half, middle, middle + half])
            print(f"{kind:8} {label:22} {ratio:.3f} x  ({low:.3f}-{high:.3f})  {asked.rounds} rounds in 1 launch")


if __name__ == "__main__":
    main()
