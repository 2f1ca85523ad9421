"""What differs between two stages of a run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.diff import Diff, Group, diff_stages
from pipeline.diff_page import diff_as_html, diff_as_text, facts, headline, places_in_words
from pipeline.errors import PipelineError, RecipeError
from pipeline.report.folder import REPORT
from pipeline.report.schema import ArtifactFacts, Lock, Report, StageReport
from pipeline.store import Store


def _shared(name: str, folder: str) -> ModuleType:
    """A module of another folder of tests, loaded once for all test modules."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


tiny_models = _shared("tiny_models", "runtime")
fused_llama = _shared("fused_llama", "measure")


class House:
    """A run of made artifacts: its folder, and the store that has them."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.stages: dict[str, Artifact | None] = {}

    def publish(self, name: str, artifact: Artifact) -> Artifact:
        with self.store.staging() as staging:
            self.stages[name] = made = self.store.publish(staging, artifact.manifest)
        return made

    def write(self) -> None:
        stages = [
            StageReport.model_validate(
                {"name": name, "pass": name, "params": {}, "parent": None, "status": "ran" if a else "failed"}
                | ({"artifact": _facts(a)} if a else {"reason": "it did not like the model"})
            )
            for name, a in self.stages.items()
        ]
        report = Report(
            recipe="tiny",
            run="1",
            created="2026-01-01T00:00:00+00:00",
            wall_s=1.0,
            lock=Lock(packages={}, seed=0, digests={}),
            host={},
            hardware={"device": "cpu"},
            threads=1,
            baseline="first",
            stages=tuple(stages),
        )
        home = self.folder / "runs" / "tiny" / "latest"
        home.mkdir(parents=True, exist_ok=True)
        (home / REPORT).write_text(report.to_json())

    def diff(self, first: str, second: str) -> Diff:
        return diff_stages("tiny", first, second, store=self.store, runs=self.folder / "runs")


def _facts(artifact: Artifact) -> ArtifactFacts:
    size = artifact.manifest.size_bytes
    weights = artifact.manifest.weights_bytes
    return ArtifactFacts(
        digest=artifact.digest, format=artifact.format, size_bytes=size, weights_bytes=weights, unique_bytes=0
    )


@pytest.fixture
def house(tmp_path: Path, store: Store) -> House:
    """Stages first, same, dropped (with an Identity more), trained, static, half and failed."""
    made: dict[str, dict[str, Any]] = {
        "first": {},
        "same": {"prefix": "other/"},
        "longer": {"extra_identity": True},
        "trained": {"seed": 1},
        "static": {"execution": {"cache": "static"}},
        "half": {"weight_dtype": "bfloat16"},
    }
    found = House(tmp_path, store)
    for name, how in made.items():
        found.publish(name, tiny_models.onnx_artifact(tmp_path / name, **how))
    found.stages["failed"] = None
    found.write()
    return found


def told(diff: Diff) -> dict[str, str]:
    return {fact.what: fact.how for fact in facts(diff)}


def test_a_stage_does_not_differ_from_itself_nor_from_one_with_other_names(house: House) -> None:
    assert house.diff("first", "first").equal
    other = house.diff("first", "same")
    assert other.equal
    assert other.digests[0] != other.digests[1]
    assert headline(other).startswith("They do not differ")
    assert other.groups == ()


def test_an_operator_more_is_told_with_its_neighbours(house: House) -> None:
    found = house.diff("first", "longer")
    assert not found.equal
    assert told(found)["Identity"] == "0 -> 1"
    (group,) = found.groups
    assert (group.gone, group.new) == ({}, {"Identity": 1})
    assert group.region is not None
    assert [(row.operator, row.change) for row in group.region.after] == [
        ("Reshape", "kept"),
        ("Identity", "new"),
        ("MatMul", "kept"),
    ]


def test_the_order_of_the_stages_is_that_of_the_question(house: House) -> None:
    found = house.diff("longer", "first")
    assert told(found)["Identity"] == "1 -> 0"
    assert found.groups[0].gone == {"Identity": 1}


def test_other_weights_are_told_though_no_node_differs(house: House) -> None:
    found = house.diff("first", "trained")
    assert (found.effect.kind, found.groups, found.weights) == ("weights", (), (3, 3))
    assert headline(found) == "Other weights."


def test_another_execution_block_is_told_by_its_keys(house: House) -> None:
    found = house.diff("first", "static")
    assert found.execution == {"cache": (None, "static")}
    assert told(found)["execution.cache"] == '- -> "static"'
    assert headline(found) == "The same model, to be loaded in another way."


def test_data_types_sizes_and_casts_are_told(house: House) -> None:
    rows = told(house.diff("first", "half"))
    assert rows["data type bfloat16"] == "0 -> 3"
    assert rows["Cast"] == "0 -> 3"
    assert "size" in rows


def test_a_conversion_is_told_as_such(house: House) -> None:
    source = tiny_models.torch_artifact(tiny_models.save_llama(house.folder / "llama"))
    house.publish("source", source)
    house.write()
    found = house.diff("source", "first")
    assert headline(found) == "Another format: torch became onnx."
    counts = [part.split(" ", 1) for part in told(found)["operators"].split(", ")]
    assert sum(int(count) for count, _ in counts) == found.effect.nodes[1]  # type: ignore[index]
    assert [int(count) for count, _ in counts] == sorted((int(count) for count, _ in counts), reverse=True)
    assert "MatMul" not in told(found)
    assert found.groups == ()
    assert told(found)["format"] == "torch -> onnx"
    assert "interface.inputs.tokens" in told(found)


def test_roles_that_are_numbered_are_told_once(house: House) -> None:
    first = house.stages["first"]
    assert first is not None
    inputs = {**first.interface.inputs, **{f"past.k[{number}]": f"k{number}" for number in range(1, 30)}}
    interface = first.interface.model_copy(update={"inputs": inputs})
    house.publish("deep", Artifact(first.manifest.model_copy(update={"interface": interface}), first.blobs))
    house.write()
    rows = told(house.diff("first", "deep"))
    assert [what for what in rows if what.startswith("interface")] == ["interface.inputs.past.k[1] and 28 alike"]


def test_an_unknown_stage_is_refused_with_the_nearest(house: House) -> None:
    with pytest.raises(RecipeError) as raised:
        house.diff("first", "longr")
    assert "no stage 'longr'" in raised.value.message
    assert "longer" in str(raised.value.hint)


def test_a_stage_without_an_artifact_says_why(house: House) -> None:
    with pytest.raises(RecipeError, match="failed has no artifact: in this run it failed: it did not like the model"):
        house.diff("first", "failed")


def test_an_artifact_that_is_gone_says_to_run_again(house: House) -> None:
    longer = house.stages["longer"]
    assert longer is not None
    house.store.place("artifacts", longer.digest).unlink()
    with pytest.raises(RecipeError) as raised:
        house.diff("first", "longer")
    assert "the artifact of longer cannot be read" in raised.value.message
    assert "run the recipe tiny again" in str(raised.value.hint)


def test_weights_that_are_gone_say_so_too(house: House) -> None:
    (house.folder / "longer" / "weights.bin").unlink()
    with pytest.raises(RecipeError, match="the artifact of longer cannot be read"):
        house.diff("first", "longer")


def test_an_unknown_run_is_refused(house: House) -> None:
    with pytest.raises(RecipeError, match="there is no run nothing"):
        diff_stages("nothing", "a", "b", store=house.store, runs=house.folder / "runs")


def test_text_and_page_hold_the_drawing_and_every_fact(house: House) -> None:
    found = house.diff("first", "longer")
    text, page = diff_as_text(found), diff_as_html(found)
    assert text.startswith("first -> longer of tiny/1\nAnother graph.")
    assert "  +   2 Identity  <- 1" in text
    assert page.count("<svg") == 2
    for fact in facts(found):
        assert fact.what in text
        assert fact.what in page


def test_the_page_needs_nothing_else_and_escapes_what_is_not_ours(house: House) -> None:
    first = house.stages["first"]
    assert first is not None
    manifest = first.manifest.model_copy(update={"execution": {"<script>": "<b>"}})
    house.publish("evil", Artifact(manifest, first.blobs))
    house.write()
    page = diff_as_html(house.diff("first", "evil"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search("https?:", page)


def test_the_page_runs_and_loads_nothing(house: House) -> None:
    page = diff_as_html(house.diff("first", "longer"))
    assert (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'" in page
    )


def test_control_characters_are_made_visible_wherever_they_come_from(house: House) -> None:
    first = house.stages["first"]
    assert first is not None
    manifest = first.manifest.model_copy(
        update={"execution": {"\x1b[2J": "\x9b31m"}, "transforms": ({"transform": "\x07"},)}
    )
    house.publish("evil", Artifact(manifest, first.blobs))
    house.write()
    text = diff_as_text(house.diff("first", "evil"))
    assert r"execution.\x1b[2J" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_weights_that_were_copied_elsewhere_are_no_new_bytes(house: House) -> None:
    house.publish("moved", tiny_models.onnx_artifact(house.folder / "moved", shift=4096))
    house.write()
    found = house.diff("first", "moved")
    assert (found.effect.kind, found.weights, found.equal) == ("none", (0, 3), True)
    assert house.diff("longer", "moved").weights == (0, 3)


def test_a_weight_that_no_node_reads_makes_a_difference_of_size_alone(house: House) -> None:
    first = house.stages["first"]
    assert first is not None
    unread = first.component.tensors["head"].model_copy(update={"offset": 8, "length": 1600, "shape": (400,)})
    tensors = {**first.component.tensors, "unread": unread}
    component = first.component.model_copy(update={"tensors": tensors})
    more = Artifact(first.manifest.model_copy(update={"components": {"model": component}}), first.blobs)
    house.publish("more", more)
    house.write()
    found = house.diff("first", "more")
    assert (found.effect.kind, found.equal) == ("none", False)
    assert headline(found).startswith("The same graph with the same weights; one keeps weights that no node reads")
    assert "weights" in told(found)


def test_what_cannot_be_compared_is_an_error_without_a_traceback(house: House) -> None:
    first = house.stages["first"]
    assert first is not None
    (house.folder / "garbage.onnx").write_bytes(b"\xffno graph")
    files = {**first.component.files, "model.onnx": tiny_models.entry_of(house.folder / "garbage.onnx")}
    component = first.component.model_copy(update={"files": files})
    house.publish(
        "garbage", Artifact(first.manifest.model_copy(update={"components": {"model": component}}), first.blobs)
    )
    house.write()
    with pytest.raises(PipelineError, match="first and garbage cannot be compared: "):
        house.diff("first", "garbage")
    with pytest.raises(PipelineError, match="garbage and first cannot be compared: "):
        house.diff("garbage", "first")


@pytest.fixture
def phases(house: House) -> House:
    """Beside the others, `both` of first for prompts and longer for single tokens, and `later` of first and trained."""
    for name, decode in (("both", "longer"), ("later", "trained")):
        house.publish(name, fused_llama.two_phases(house.stages["first"], house.stages[decode]))
    house.write()
    return house


def test_a_stage_of_two_graphs_is_told_by_those_that_it_is_made_of(phases: House) -> None:
    for parent, same, other in (("first", "prefill", "decode"), ("longer", "decode", "prefill")):
        found = phases.diff(parent, "both")
        assert headline(found) == (
            f"Other components: both has the components prefill and decode; {same} is what {parent} is."
        )
        assert not found.equal
        assert told(found)[f"component {same} of both"].endswith(f"nodes, graph and weights of {parent}")
        assert told(found)[f"component {other} of both"].endswith(f"nodes, another graph than {parent}")
        assert [group.component for group in found.groups] == [other]
        assert places_in_words(found.groups[0]) == f"{other}: part 1 of the graph"


def test_two_graphs_before_one_are_told_in_the_same_words(phases: House) -> None:
    found = phases.diff("both", "first")
    assert headline(found) == "Other components: both has the components prefill and decode; prefill is what first is."
    assert told(found)["component decode of both"] == "23 nodes, another graph than first"
    assert told(found)["nodes"] == "45 -> 22"
    assert "1 -> 0 Identity" in told(found)["operators"]
    assert found.groups[0].gone == {"Identity": 1}


def test_stages_of_two_graphs_each_are_compared_graph_by_graph(phases: House) -> None:
    found = phases.diff("both", "later")
    assert headline(found) == "Other weights."
    assert told(found)["component prefill of later"] == "22 nodes, graph and weights of both/prefill"
    assert told(found)["component decode of later"] == "23 → 22 nodes, other weights than both"
    assert phases.diff("both", "both").equal


def test_a_page_and_a_text_can_be_made_of_stages_of_two_graphs(phases: House) -> None:
    found = phases.diff("first", "both")
    page, text = diff_as_html(found), diff_as_text(found)
    for words in ("prefill is what first is", "another graph than first", "decode: part 1 of the graph"):
        assert words in page
        assert words in text


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([f"layer {n}" for n in range(22)], "layers 0-21 (22 alike)"),
        (["layer 0", "layer 2", "layer 3"], "layers 0, 2-3 (3 alike)"),
        (["layer 5"], "layer 5"),
        ([""], "outside the layers"),
        (["layer 1 (encoder.block)", "layer 2 (encoder.block)"], "layers 1-2 (encoder.block) (2 alike)"),
        (["part 1 of the graph", "part 2 of the graph"], "part 1 of the graph, part 2 of the graph (2 alike)"),
    ],
)
def test_layers_that_follow_each_other_are_joined(places: list[str], words: str) -> None:
    group = Group(component="model", places=tuple(places), gone={}, new={}, rewired=0)
    assert places_in_words(group) == words
