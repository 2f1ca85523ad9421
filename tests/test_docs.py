"""The example in docs/writing-a-pass.md is a pass that works."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from pipeline.artifact import Artifact, Interface, Manifest
from pipeline.onnx_model import load_onnx, onnx_component
from pipeline.plugin import PassContext, Registry
from pipeline.store import Store
from pipeline.store.writer import OutputWriter

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "writing-a-pass.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_pass_is_found_and_does_what_it_says(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    points = tomllib.loads(block("toml"))["project"]["entry-points"]["pipeline.passes"]
    install(tmp_path, "drop_identity", block("python"), points)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Registry().load("drop_identity")
    assert found.summary() == "Remove Identity nodes."

    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=float32, shape=ir.Shape([2]))
    middle, last = ir.node("Identity", [x]), None
    negated = ir.node("Neg", [middle.outputs[0]])
    last = ir.node("Identity", [negated.outputs[0]])
    y = last.outputs[0]
    y.name, y.type, y.shape = "y", float32, ir.Shape([2])
    graph = ir.Graph([x], [y], nodes=[middle, negated, last], opset_imports={"": 23}, name="g")
    with store.staging() as staging:
        part = onnx_component(ir.Model(graph, ir_version=10), OutputWriter(staging))
        made = Manifest(format="onnx", components={"model": part}, interface=Interface())
        before = store.publish(staging, made)

    def operators(artifact: Artifact) -> list[str]:
        return [node.op_type for node in load_onnx(artifact).graph]

    assert operators(before) == ["Identity", "Neg", "Identity"]
    with store.staging() as staging:
        context = PassContext(output=OutputWriter(staging))
        after = store.publish(staging, found().run(before, found.Params(), context).manifest)
    assert operators(after) == ["Neg", "Identity"]
