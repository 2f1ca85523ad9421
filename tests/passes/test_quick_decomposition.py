"""Programs that are taken apart by looking at each operator compute what they did, and others are left to torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from passes.export import export_onnx, quick_decomposition
from passes.export.quick_decomposition import by_looking, take_apart
from pipeline import Artifact


class Module(torch.nn.Module):  # type: ignore[misc]
    """A module of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 3.0]))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def mask(self: Module, x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(3)[None]
    seen = (columns <= rows) & (columns > rows - 2) | (columns == 0)
    return torch.where(seen, x, torch.tensor(-1.0))


def _write_first(x: torch.Tensor) -> torch.Tensor:
    x[:, 0] = 7.0
    return x


def _remember(self: Module, x: torch.Tensor) -> torch.Tensor:
    self.seen.add_(1.0)
    return x + self.seen


BY_LOOKING: dict[str, Callable[..., Any]] = {
    "a mask of and and or": mask,
    "to half and back": lambda self, x: (x.to(torch.float16) * self.scale.half()).to(torch.float32),
    "to what it is": lambda self, x: x.to(torch.float32).float() + self.scale.to(x.device),
    "like another": lambda self, x: x.long().to(self.scale) + 1,
    "detached": lambda self, x: torch.nn.functional.silu(x.detach()).contiguous(),
    "an output that nothing changed": lambda self, x: (x.to(torch.float32), x.detach() * 2),
    "whole numbers and a fraction": lambda self, x: x.long() * 0.5 + torch.arange(3),
    "half and single precision": lambda self, x: x.half() + self.scale,
    "chunks": lambda self, x: torch.cat(list(torch.cat([x, x], -1).chunk(2, -1))[::-1], -1),
    "chunks of which the last is smaller": lambda self, x: torch.cat([x, x], -1)[:, :5].chunk(2, 1)[1],
    "one chunk": lambda self, x: x.chunk(1, -1)[0] * 2,
    "nothing dropped out": lambda self, x: torch.nn.functional.dropout(x, 0.5, training=False) * 2,
    "a mean of squares": lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "reshaped": lambda self, x: (
        torch.cat([x, x], -1).reshape(x.shape[0], 2, 3).transpose(0, 1).reshape(2, -1).unbind(0)[1]
    ),
}

BY_TORCH: dict[str, Callable[..., Any]] = {
    "a part counted from the end": lambda self, x: x.narrow(1, -2, 2),
    "broadcast": lambda self, x: x[None].broadcast_to(2, -1, 3),
    "flattened": lambda self, x: torch.cat([x[None], x[None]]).flatten(),
    "dropped out": lambda self, x: torch.nn.functional.dropout(x, 0.0, training=True),
    "an operator that ONNX does not have": lambda self, x: torch.nan_to_num(x.square()),
    "a write in place": lambda self, x: (x * 2).add_(1.0),
    "a part that is written": lambda self, x: _write_first(x.clone()),
    "a buffer that is written": _remember,
    "a branch": lambda self, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
}


def exported(function: Callable[..., Any], *, looking: bool) -> torch.onnx.ONNXProgram:
    with by_looking() if looking else nullcontext():
        made = torch.onnx.export(
            Module(function).eval(),
            (torch.randn(4, 3),),
            dynamo=True,
            opset_version=23,
            verbose=False,
            dynamic_shapes=({0: "rows"},),
        )
    assert made is not None
    return made


def outputs(program: torch.onnx.ONNXProgram, x: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return found


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each program that was exported came to."""
    found: list[bool] = []

    def look(*given: Any) -> bool:
        found.append(take_apart(*given))
        return found[-1]

    monkeypatch.setattr(quick_decomposition, "take_apart", look)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_LOOKING, *BY_TORCH])
def test_computes_what_torch_and_its_own_export_do(name: str, looks: list[bool]) -> None:
    function = BY_LOOKING.get(name) or BY_TORCH[name]
    quick, official = exported(function, looking=True), exported(function, looking=False)
    assert looks == [name in BY_LOOKING]
    for rows in (2, 5):
        x = 3 * torch.randn(rows, 3)
        expected = Module(function)(x)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        found, known = outputs(quick, x), outputs(official, x)
        for a, b, c in zip(found, known, expected, strict=True):
            assert a.dtype == b.dtype == c.numpy().dtype
            np.testing.assert_allclose(a, b, rtol=1e-6)
            # ONNX Runtime computes half precision in single precision
            np.testing.assert_allclose(a, c.detach().numpy(), rtol=2e-3 if "half" in name else 1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TORCH)
def test_a_program_that_is_left_to_torch_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(program: Any, known: set[Any]) -> bool:
        before = str(program)
        assert not take_apart(program, known)
        seen.append(str(program) == before)
        return False

    monkeypatch.setattr(quick_decomposition, "take_apart", look)
    exported(BY_TORCH[name], looking=True)
    assert seen == [True]


def _raise(*given: Any) -> bool:
    raise KeyError("val")


@pytest.mark.parametrize("look", [lambda *given: True, _raise])
def test_what_cannot_be_written_after_all_is_exported_again_by_torch(
    look: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = BY_TORCH["an operator that ONNX does not have"]
    monkeypatch.setattr(quick_decomposition, "take_apart", look)
    options = {"opset_version": 23, "dynamic_shapes": ({0: "rows"},)}
    made = export_onnx._exported(Module(function).eval(), (torch.randn(4, 3),), **options)
    x = torch.randn(2, 3)
    np.testing.assert_allclose(outputs(made, x)[0], function(None, x).numpy(), rtol=1e-5)


def test_as_many_casts_are_inserted_as_torch_inserts() -> None:
    function = BY_LOOKING["whole numbers and a fraction"]
    quick, official = (
        Counter(node.op_type for node in exported(function, looking=looking).model.graph) for looking in (True, False)
    )
    assert quick["Cast"] == official["Cast"] > 0


@pytest.mark.slow
def test_the_graph_of_a_model_has_the_operators_that_torchs_own_export_gives(
    llama: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def operators() -> Counter[str]:
        model, _, _ = export_onnx.trace(llama, 23)
        export_onnx.simplify(model)
        return Counter(node.op_type for node in model.graph)

    quick = operators()
    monkeypatch.setattr(export_onnx, "by_looking", nullcontext)
    assert quick == operators()


def test_a_torch_that_has_it_otherwise_exports_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _fx_passes
    from torch.onnx._internal.fx.passes import type_promotion

    monkeypatch.delattr(type_promotion._TypePromotionInterpreter, "_maybe_promote_node")
    before = _fx_passes.decompose_with_registry, type_promotion._TypePromotionInterpreter.run_node
    with by_looking() as looking:
        assert before == (_fx_passes.decompose_with_registry, type_promotion._TypePromotionInterpreter.run_node)
    assert not looking.taken_apart


def test_torch_is_as_it_was_afterwards() -> None:
    from torch.onnx._internal.exporter import _fx_passes
    from torch.onnx._internal.fx.passes import type_promotion

    before = _fx_passes.decompose_with_registry, type_promotion._TypePromotionInterpreter.run_node
    with pytest.raises(RuntimeError, match="midway"), by_looking():
        assert _fx_passes.decompose_with_registry is not before[0]
        raise RuntimeError("midway")
    assert before == (_fx_passes.decompose_with_registry, type_promotion._TypePromotionInterpreter.run_node)
