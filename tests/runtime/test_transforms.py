"""Module transforms: found by name, applied when a model is loaded, and part of what the artifact is."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.measure.effect import compare_artifacts as effect
from pipeline.runtime import ExecutionSpec, transforms
from pipeline.runtime.torch import TorchRunner
from pipeline.runtime.transforms import TRANSFORMS, with_transform

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, (2, 20))

SOURCE = """
def scale_head(model, factor=2.0):
    import torch

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight * factor, requires_grad=False)


def swap_norms(model):
    import torch

    for name, norm in list(model.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            fused = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
            fused.weight = norm.weight
            model.set_submodule(name, fused)


def crash(model):
    raise ZeroDivisionError("one over nothing")
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_models.torch_artifact(tiny_models.save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of transforms, installed for this process and for those that it starts."""
    module = tmp_path / "sample_transforms.py"
    module.write_text(textwrap.dedent(SOURCE))
    info = tmp_path / "sample_transforms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample_transforms\nVersion: 1.0\n")
    lines = [f"{name} = sample_transforms:{name}" for name in ("scale_head", "swap_norms", "crash")]
    (info / "entry_points.txt").write_text("\n".join([f"[{TRANSFORMS}]", *lines, "absent = no_such_module:f", ""]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    transforms._points.cache_clear()
    yield module
    transforms._points.cache_clear()
    sys.modules.pop("sample_transforms", None)


def logits(artifact: Artifact) -> np.ndarray:
    return TorchRunner(artifact, ExecutionSpec()).prefill(TOKENS)


def test_transforms_are_applied_in_their_order_with_their_parameters(artifact: Artifact, installed: Path) -> None:
    plain = logits(artifact)
    twice = with_transform(with_transform(artifact, "scale_head"), "scale_head", factor=3.0)
    np.testing.assert_allclose(logits(twice), 6 * plain, atol=1e-5)
    assert [entry["params"] for entry in twice.manifest.transforms] == [{}, {"factor": 3.0}]
    assert twice.digest != artifact.digest


def test_a_swapped_module_is_an_effect_that_counts_modules(artifact: Artifact, installed: Path) -> None:
    swapped = with_transform(artifact, "swap_norms")
    np.testing.assert_allclose(logits(swapped), logits(artifact), atol=1e-5)
    found = effect(artifact, swapped)
    norms = 2 * 2 + 1  # of two layers, and the last
    assert found.kind == "graph"
    assert found.modules == {"LlamaRMSNorm": (norms, 0), "RMSNorm": (0, norms)}


def test_another_code_than_the_artifact_was_made_with_is_refused(artifact: Artifact, installed: Path) -> None:
    made = with_transform(artifact, "scale_head")
    installed.write_text(SOURCE.replace("factor=2.0", "factor=9.0"))
    with pytest.raises(PipelineError, match="'scale_head' is not the one that this artifact was made with"):
        logits(made)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scale_haed", "'scale_haed' is not installed\\n  did you mean 'scale_head'"),
        ("absent", "'absent' cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_transform_that_cannot_be_had_is_told(artifact: Artifact, installed: Path, name: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        with_transform(artifact, name)


def test_a_transform_that_fails_says_which(artifact: Artifact, installed: Path) -> None:
    with pytest.raises(PipelineError, match="module transform 'crash' failed: ZeroDivisionError: one over nothing"):
        logits(with_transform(artifact, "crash"))


def test_parameters_that_json_cannot_hold_are_refused(artifact: Artifact, installed: Path) -> None:
    with pytest.raises(PipelineError, match="parameters of the transform 'scale_head' cannot be put into JSON"):
        with_transform(artifact, "scale_head", factor=object())


def test_two_transforms_of_one_name_are_both_named(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("t", "one:t", TRANSFORMS), EntryPoint("t", "two:t", TRANSFORMS)]
    monkeypatch.setattr(transforms, "_points", lambda: {"t": points})
    with pytest.raises(PipelineError, match=r"one:t \(one\) and two:t \(two\)"):
        with_transform(artifact, "t")


def test_a_graph_has_no_modules_to_transform(tmp_path: Path, installed: Path) -> None:
    with pytest.raises(PipelineError, match="for torch artifacts; this one is onnx"):
        with_transform(tiny_models.onnx_artifact(tmp_path / "onnx"), "scale_head")
