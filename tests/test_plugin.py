"""Passes are found by their entry points, imported one by one, and their code is part of their key."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, RecipeError
from pipeline.plugin import PASSES, PassContext, Registry, code_digest
from pipeline.store.writer import OutputWriter


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, PASSES)


def test_the_built_in_passes_are_registered_as_a_strangers_are(plugins: Path) -> None:
    assert {"export_onnx", "quantize_weights", "mark"} <= set(Registry().names())


def test_an_unknown_pass_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'quantize_weights'"):
        Registry().load("quantise_weights")


def test_two_plugins_of_one_name_are_both_named() -> None:
    registry = Registry([point("a", "one:A"), point("a", "two:A")])
    with pytest.raises(RecipeError, match=r"named 'a': one:A \(one\) and two:A \(two\)"):
        registry.load("a")


def test_one_plugin_that_is_found_twice_on_the_path_is_one() -> None:
    assert Registry([point("a", "one:A"), point("a", "one:A")]).info("a").entry_point.value == "one:A"


def test_a_plugin_that_does_not_import_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_plugin.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PipelineError, match="cannot be imported: RuntimeError: no licence"):
        Registry([point("bad", "bad_plugin:Bad")]).load("bad")


def test_what_is_not_a_pass_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"not a subclass of pipeline\.Pass"):
        Registry([point("path", "pathlib:Path")]).load("path")


def test_a_parameter_with_a_reserved_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    source = """
        from pipeline import Pass, PassParams
        class P(Pass):
            accepts, produces = {"onnx"}, "onnx"
            name = "p"
            class Params(PassParams):
                after: str = ""
            def run(self, artifact, params, context): ...
    """
    install(tmp_path, "reserved_plugin", source, {"p": "reserved_plugin:P"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PipelineError, match="reserved names: after"):
        Registry().load("p")


def test_an_undeclared_facet_cannot_be_read(tmp_path: Path) -> None:
    context = PassContext(output=OutputWriter(tmp_path), facets={"profile.device": "cpu"})
    assert context.facet("profile.device") == "cpu"
    with pytest.raises(PipelineError, match="'seed', which it does not declare"):
        _ = context.seed


def test_the_code_digest_follows_the_imports_within_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "coded"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text("class A:\n    def f(self):\n        from coded import deep\n")
    (package / "deep.py").write_text("from . import deeper\n")
    (package / "deeper.py").write_text("X = 1\n")
    (package / "other.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cls = importlib.import_module("coded.main").A
    before = code_digest(cls)
    (package / "other.py").write_text("X = 2\n")
    assert code_digest(cls) == before
    (package / "deeper.py").write_text("X = 2\n")
    assert code_digest(cls) != before
    assert "coded.deeper" not in sys.modules


def test_a_pass_that_calls_itself_otherwise_than_its_entry_point_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    source = """
        from pipeline import Pass
        class P(Pass):
            name, accepts, produces = "mark", {"torch"}, "torch"
            def run(self, artifact, params, context): ...
    """
    install(tmp_path, "misnamed_plugin", source, {"other": "misnamed_plugin:P"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PipelineError, match="as 'other'; the pass calls itself 'mark'"):
        Registry().load("other")


def test_a_pass_that_does_not_say_its_formats_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    source = """
        from pipeline import Pass
        class P(Pass):
            name = "formless"
            def run(self, artifact, params, context): ...
    """
    install(tmp_path, "formless_plugin", source, {"formless": "formless_plugin:P"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PipelineError, match="does not say its accepts and produces"):
        Registry().load("formless")
