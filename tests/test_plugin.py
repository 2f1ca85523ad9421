"""Passes are found by their entry points, imported one by one, and their code is part of their key."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pipeline.code_digest import code_digest
from pipeline.errors import PipelineError, RecipeError
from pipeline.plugin import PASSES, Pass, PassContext, Registry, params_as_json
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


# What a pass says of itself

BASE = """
from pathlib import Path
from typing import Any
from pydantic import ConfigDict, Field
from pipeline import Pass, PassParams

class P(Pass):
    name = "p"
    accepts, produces = {"onnx"}, "onnx"
    def run(self, artifact, params, context):
        return artifact
"""


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, module: str) -> type[Pass]:
    (folder / f"{module}.py").write_text(BASE + textwrap.indent(textwrap.dedent(text), "    "))
    monkeypatch.syspath_prepend(str(folder))
    return Registry([point("p", f"{module}:P")]).load("p")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accepts = {'onx'}", "declares the unknown format 'onx'\n  did you mean 'onnx'"),
        ("produces = 'gguf'", "declares the unknown format 'gguf'"),
        ("accepts = 'onnx'", r"accepts a text, 'onnx', where a set of formats is expected\n  write accepts = {'onnx'}"),
        ("Params = dict", r"Params of the pass 'p' of \w+ are not a subclass of pipeline\.PassParams"),
    ],
)
def test_what_cannot_be_of_a_pass_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        loaded(tmp_path, monkeypatch, text, f"said_{abs(hash(text))}")


PARAMETERS = """
class Params(PassParams):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    fine: Path = Path("x")
    odd: {type} = {default}
"""


@pytest.mark.parametrize(
    ("type", "default", "reason"),
    [
        ("object", "object()", "Unable to serialize"),
        ("Any", "Field(default_factory=lambda: float('nan'))", "cannot be put into JSON"),
        ("Any", "Field(default_factory=lambda: {1, 2})", "they come back as others"),
    ],
)
def test_parameters_that_json_cannot_hold_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str, default: str, reason: str
) -> None:
    text = PARAMETERS.format(type=type, default=default)
    found = loaded(tmp_path, monkeypatch, text, f"json_{type.lower()}_{len(default)}")
    with pytest.raises(PipelineError, match=reason) as caught:
        params_as_json(found.Params(), found)
    assert "the pass 'p'" in caught.value.message


def test_the_parameter_that_json_cannot_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(tmp_path, monkeypatch, PARAMETERS.format(type="object", default="object()"), "json_named")
    with pytest.raises(PipelineError, match="its parameter 'odd' cannot be put into JSON"):
        params_as_json(found.Params(), found)


def test_parameters_of_every_built_in_pass_survive_json() -> None:
    registry = Registry()
    for name in registry.names():
        found = registry.load(name)
        if not any(field.is_required() for field in found.Params.model_fields.values()):
            assert params_as_json(found.Params(), found) == found.Params().model_dump(mode="json")


def test_the_packages_of_two_plugins_of_one_name_are_both_named() -> None:
    registry = Registry([point("a", "one:A"), point("a", "two:A")])
    assert registry.origin("a") == "one and two"
    with pytest.raises(RecipeError, match="unknown pass 'b'"):
        registry.origin("b")
