"""What cannot be loaded is its stage's failure; what fails while it is measured leaves the stage unmeasured.

What predicts worse is judged by the recipe's thresholds, and told with the layer at which it fell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import load_recipe
from pipeline.report.html import render_html
from pipeline.report.markdown import render_markdown
from pipeline.report.schema import Divergence, QualityRatio
from pipeline.report.terminal import render_text
from pipeline.run import RunResult, run
from pipeline.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("measured_briefly")]

PASSES = """
import json
from pipeline import Pass

class Base(Pass):
    "Changes the config."
    accepts, produces = frozenset({"torch"}), "torch"
    def run(self, artifact, params, context):
        config = {**artifact.read_json("config.json"), **self.change}
        entry = context.output.file("config.json", json.dumps(config).encode())
        files = {**artifact.manifest.files, "config.json": entry}
        return type(artifact)(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)

class TooWide(Base):
    name = "too_wide"
    change = {"hidden_size": 320}

class Plain(Base):
    name = "plain"
    change = {"hidden_size": 256}
"""

NAMES = {"too_wide": "TooWide", "plain": "Plain"}


WORKLOAD = ["evaluate.budget_s=1", "evaluate.workload.prompt_lengths=[8]", "evaluate.workload.new_tokens=2"]
WINDOWS = ["evaluate.quality.window=64", "evaluate.quality.stride=32"]

Ran = tuple[RunResult, Path]
RunOnce = Callable[[str, Callable[[Path], RunResult]], Ran]
ProbedStore = Callable[[Path], Store]


def run_with(package: str, source: str, names: dict[str, str], place: Path, sets: list[str], **how: Any) -> RunResult:
    """Run llama2-cpu with these settings and passes."""
    with pytest.MonkeyPatch.context() as patch:
        how["briefly"](patch)
        how["install"](place, package, source, {n: f"{package}:{c}" for n, c in names.items()})
        patch.syspath_prepend(str(place))
        patch.setenv("PYTHONPATH", str(place))
        return run(load_recipe("llama2-cpu", sets), store=how["store"], runs=place / "runs")


@pytest.fixture(scope="module")
def result(
    run_once: RunOnce, probed_store: ProbedStore, briefly: Callable[..., None], install: Callable[..., None]
) -> RunResult:
    passes = (
        "passes=[{pass: too_wide}, {pass: plain}, {pass: too_wide, name: unrun, after: source, measure: false}, "
        "{pass: plain, name: other, after: source}]"
    )
    sets = [passes, "export=null", "gates=[]", "hardware=local", "evaluate.quality.tokens=600", *WORKLOAD, *WINDOWS]

    def do(place: Path) -> RunResult:
        store = probed_store(place / "store")
        return run_with("misleading_passes", PASSES, NAMES, place, sets, store=store, briefly=briefly, install=install)

    return run_once("unloadable", do)[0]


def test_a_stage_whose_model_does_not_load_failed_with_its_reason_and_log(result: RunResult) -> None:
    stage = result.report.stage("too_wide")
    assert stage.status == "failed"
    assert str(stage.reason).startswith("its model does not load: ")
    assert stage.log is not None
    assert (result.folder / stage.log).is_file()
    assert result.exit_code == 3


@pytest.mark.parametrize("name", ["plain", "other"])
def test_what_was_made_from_it_and_other_branches_are_measured(name: str, result: RunResult) -> None:
    stage = result.report.stage(name)
    assert stage.status in {"ran", "cached"}
    assert stage.speed
    assert stage.quality is not None


def test_it_is_not_exported(result: RunResult) -> None:
    assert result.report.export == "other"


def test_what_is_not_to_be_measured_is_made_and_never_loaded(result: RunResult) -> None:
    stage = result.report.stage("unrun")  # it would not load
    assert stage.status in {"ran", "cached"}
    assert stage.reason is None
    assert (stage.speed, stage.quality, stage.load) == (None, None, None)
    assert stage.artifact is not None
    assert stage.effect is not None


BREAKING = """
from pipeline import Pass, load_onnx, new_tensor, save_onnx

class BreakLayer(Pass):
    "Multiply the weights of the second layer by 30, as a wrong scale would."
    name = "break_layer"
    accepts, produces = frozenset({"onnx"}), "onnx"
    def run(self, artifact, params, context):
        model = load_onnx(artifact)
        for name, value in model.graph.initializers.items():
            if "layers.1." in name and "proj" in name:
                value.const_value = new_tensor(context.output, name, value.const_value.numpy() * 30)
        return save_onnx(model, context.output, like=artifact)
"""

WORSE = (
    "passes=[{pass: export_onnx, verify: false}, {pass: break_layer, name: wrong}, "
    "{pass: quantize_weights, name: first_int4, after: export_onnx, head: keep, symmetric: true, block_size: 128, "
    "exclude: ['*layers.[1-9]*']}]"
)
SHORT = [WORSE, "export=null", "gates=[]", "hardware=local", "evaluate.quality.tokens=1500", *WORKLOAD]


@pytest.fixture(scope="module")
def worse(
    run_once: RunOnce, probed_store: ProbedStore, briefly: Callable[..., None], install: Callable[..., None]
) -> Iterator[Ran]:
    """A run whose stages predict worse than the model, and the folder of its store."""

    def do(place: Path) -> RunResult:
        store, names = probed_store(place / "store"), {"break_layer": "BreakLayer"}
        return run_with("breaking_passes", BREAKING, names, place, SHORT, store=store, briefly=briefly, install=install)

    found, place = run_once("worse", do)
    with pytest.MonkeyPatch.context() as patch:  # its passes, for those who run it again
        patch.syspath_prepend(str(place))
        patch.setenv("PYTHONPATH", str(place))
        yield found, place


def quality_of(result: RunResult, name: str) -> tuple[QualityRatio, Divergence]:
    quality = result.report.stage(name).quality
    assert quality is not None
    assert quality.vs_baseline is not None
    assert quality.divergence is not None, result.report.notes
    return quality.vs_baseline, quality.divergence


def test_a_broken_layer_is_broken_named_and_ends_the_run_with_exit_code_1(worse: Ran) -> None:
    paired, divergence = quality_of(worse[0], "wrong")
    assert paired.verdict == "broken"
    assert "times the baseline's: beyond 2" in str(paired.reason)
    assert (divergence.first, divergence.most) == ("layer 1", "layer 1")
    assert divergence.reference == "export_onnx"
    assert worse[0].exit_code == 1
    assert worse[0].report.export != "wrong"


def test_a_layer_that_was_rounded_alone_is_the_only_one_with_an_error_of_its_own(worse: Ran) -> None:
    paired, divergence = quality_of(worse[0], "first_int4")
    assert paired.verdict == "degraded"
    assert "beyond" in str(paired.reason)
    assert (divergence.first, divergence.most) == ("layer 0", "layer 0")
    assert divergence.matched is not None
    assert divergence.matched[0] == divergence.matched[1] > 2
    assert [e.layer for e in divergence.layers if e.added is None or e.added > 1e-4] == ["layer 0"]


def test_what_is_as_good_as_the_baseline_has_no_divergence(worse: Ran) -> None:
    exported = worse[0].report.stage("export_onnx").quality
    assert exported is not None
    assert exported.divergence is None
    assert exported.vs_baseline is not None
    assert exported.vs_baseline.verdict in {"identical", "equivalent"}


def test_another_threshold_judges_what_is_remembered(worse: Ran, tmp_path: Path) -> None:
    result, place = worse
    thresholds = {"equivalent_kl_divergence": 5, "equivalent_perplexity_ratio": 1.9, "broken_perplexity_ratio": 1e9}
    thresholds |= {"broken_top1_agreement": 0}
    sets = [f"evaluate.quality.thresholds.{name}={value}" for name, value in thresholds.items()]
    recipe = load_recipe("llama2-cpu", [*SHORT, *sets])
    again = run(recipe, store=Store(place / "store"), runs=tmp_path / "runs", measure=False)
    then, now = (found.report.stage("first_int4").quality for found in (result, again))
    assert then is not None
    assert now is not None
    assert now.perplexity == then.perplexity
    assert now.vs_baseline is not None
    assert now.vs_baseline.verdict == "equivalent"
    assert now.divergence is None
    paired, divergence = quality_of(again, "wrong")
    assert paired.verdict == "degraded"
    assert divergence == quality_of(result, "wrong")[1]
    assert again.exit_code == 0


KEEPING = """
from pipeline import Pass

class Keep(Pass):
    "Changes nothing."
    name = "keep"
    accepts, produces = frozenset({"torch"}), "torch"
    def run(self, artifact, params, context):
        return artifact
"""

FEW = ["export=null", "gates=[]", "hardware=local", "evaluate.quality.tokens=600", *WORKLOAD, *WINDOWS]


@pytest.mark.parametrize("first", ["[]", "[{pass: keep}]"])
def test_the_baseline_and_a_stage_of_its_artifact_are_told_apart_whoever_was_scored_first(
    first: str,
    probed_store: ProbedStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    install: Callable[..., None],
) -> None:
    install(tmp_path, "keeping_passes", KEEPING, {"keep": "keeping_passes:Keep"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text(f"Once upon a time there was {first}, and that was made smaller. " * 12)
    store = probed_store(tmp_path / "store")
    for passes, known in ((first, False), ("[{pass: keep}]", first != "[]")):
        sets = [*FEW, f"passes={passes}", f"evaluate.quality.text={text}"]
        # what is remembered of both has to do, once both were scored
        found = run(load_recipe("llama2-cpu", sets), store=store, runs=tmp_path / "runs", measure=not known).report
        base = found.stage("source").quality
        assert base is not None
        assert base.vs_baseline is None
        assert any("600 were asked for" in note for note in found.notes), found.notes
        if passes == "[]":  # nothing to decide, and nothing failed
            assert found.schedule is not None
            assert found.schedule.ended == "looks"
            assert found.stage("source").speed
    kept = found.stage("keep").quality
    assert kept is not None
    assert kept.vs_baseline is not None
    assert kept.vs_baseline.verdict == "identical"


UNREADABLE = """
import json
import onnx
from onnx import helper
from pipeline import Artifact, Component, Interface, Manifest, Pass

def graph(context, data):
    files = {"model.onnx": context.output.file("model.onnx", data)}
    return Manifest(format="onnx", components={"model": Component(format="onnx", files=files)}, interface=Interface())

class Garbage(Pass):
    "Writes no graph."
    name = "garbage"
    accepts, produces = frozenset({"torch"}), "onnx"
    def run(self, artifact, params, context):
        return Artifact(graph(context, b"no graph"), artifact.blobs)

class Mended(Pass):
    "Writes a graph."
    name = "mended"
    accepts, produces = frozenset({"onnx"}), "onnx"
    def run(self, artifact, params, context):
        y = helper.make_tensor_value_info("y", 1, [1])
        node = helper.make_node("Constant", [], ["y"], value_floats=[1.0])
        model = helper.make_model(helper.make_graph([node], "g", [], [y]), ir_version=10)
        return Artifact(graph(context, model.SerializeToString()), artifact.blobs)
"""


def test_what_cannot_be_compared_with_its_parent_is_not_failed_by_that(
    tmp_path: Path, checkpoint: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"garbage": "unreadable_passes:Garbage", "mended": "unreadable_passes:Mended"}
    install(tmp_path, "unreadable_passes", UNREADABLE, names)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses: [{{pass: garbage}}, {{pass: mended}}]\n"
    )
    report = run(load_recipe(recipe), store=Store(tmp_path / "store"), runs=tmp_path / "runs", measure=False).report
    assert report.stage("garbage").status == "failed"
    assert "its artifact cannot be read" in str(report.stage("garbage").reason)
    assert (report.stage("mended").status, report.stage("mended").effect) == ("ran", None)
    assert any(note.startswith("what mended changed is not known: ") for note in report.notes)


TOGETHER = """
import numpy as np
from onnx import helper, numpy_helper
from pipeline import Artifact, Component, Field, Interface, Manifest, Pass, PassParams

class Multiply(Pass):
    "Writes a graph of one product."
    name = "multiply"
    accepts, produces = frozenset({"torch"}), "onnx"

    class Params(PassParams):
        factor: float = Field(1.0, description="what its weight is full of")

    def run(self, artifact, params, context):
        x, y = (helper.make_tensor_value_info(name, 1, [2, 4]) for name in "xy")
        weight = numpy_helper.from_array(np.full((4, 4), params.factor, np.float32), "w")
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        data = helper.make_model(graph, ir_version=10).SerializeToString()
        files = {"model.onnx": context.output.file("model.onnx", data)}
        part = Component(format="onnx", files=files)
        manifest = Manifest(format="onnx", components={"model": part}, interface=Interface())
        return Artifact(manifest, artifact.blobs)

class Together(Pass):
    "Puts two graphs into one artifact."
    name = "together"
    accepts, produces = frozenset({"onnx"}), "onnx"
    def run(self, artifact, params, context):
        parts = {role: given.component for role, given in context.inputs.items()}
        execution = {"phases": {"crossover_tokens": 4}}
        update = {"components": parts, "execution": execution}
        return Artifact(artifact.manifest.model_copy(update=update), artifact.blobs)
"""


def test_a_stage_put_together_of_two_names_both_whichever_of_them_is_its_parent(
    tmp_path: Path, checkpoint: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "joining_passes", TOGETHER, {n: f"joining_passes:{n.title()}" for n in ("multiply", "together")})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses:\n"
        "  - {pass: multiply, name: one}\n"
        "  - {pass: multiply, name: two, after: source, factor: 2.0}\n"
        "  - {pass: together, name: first, after: one, inputs: {prefill: one, decode: two}}\n"
        "  - {pass: together, name: second, after: two, inputs: {prefill: one, decode: two}}\n"
    )
    report = run(load_recipe(recipe), store=Store(tmp_path / "store"), runs=tmp_path / "runs", measure=False).report
    for name in ("first", "second"):
        effect = report.stage(name).effect
        assert effect is not None
        assert [(part.name, part.same_as) for part in effect.components] == [("prefill", "one"), ("decode", "two")]
    text = render_text(report)
    assert "prefill as one, decode as two" in " ".join(text.split())
    assert "consists of prefill as one and decode as two (2 nodes)" in render_markdown(report)
    assert "prefill as one and decode as two" in render_html(report)
