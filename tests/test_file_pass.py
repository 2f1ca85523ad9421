"""A pass in a file beside its recipe: found below its folder, read without being run, run where that is allowed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, RecipeError
from pipeline.file_pass import CodeFile, find_code, import_class, names_file, read_class
from pipeline.plugin import Registry, UnreadPass
from pipeline.recipe import load_recipe
from pipeline.recipe.names import stage_name
from pipeline.resolve import plan_recipe
from pipeline.run import run
from pipeline.store import Store
from pipeline.why import explain_stage

MARK = '''
from pathlib import Path

from pipeline import Artifact, Pass, PassParams

Path(__file__).with_name("ran").touch()


class MarkIt(Pass):
    """Set a key of the execution block."""

    name, version = "mark_it", 1
    accepts, produces = {"torch"}, "torch"

    class Params(PassParams):
        value: int = 1

    def run(self, artifact, params, context):
        execution = {**artifact.manifest.execution, "mark": params.value}
        return Artifact(artifact.manifest.model_copy(update={"execution": execution}), artifact.blobs)
'''

RECIPE = """
version: 1
name: marked
model: {{path: {model}}}
passes:
  - pass: ./mark.py:MarkIt
    value: 3
"""


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path) -> Path:
    (tmp_path / "mark.py").write_text(MARK)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=checkpoint))
    return file


def plan(recipe: Path, store: Store, code: str = "run"):
    return plan_recipe(load_recipe(recipe), store=store, code=code).stage("mark_it")


def code(file: Path, class_name: str = "MarkIt") -> CodeFile:
    found = find_code(f"./{file.name}:{class_name}", file.parent)
    assert found is not None
    return found


def written(folder: Path, text: str) -> Path:
    (folder / "mark.py").write_text(text)
    return folder / "mark.py"


def test_a_registered_passs_name_means_no_file(tmp_path: Path) -> None:
    assert not names_file("export_onnx")
    assert find_code("export_onnx", tmp_path) is None


@pytest.mark.parametrize(
    ("given", "name"),
    [("./a.py:MyPass", "my_pass"), ("a/b.py:HTMLWriter2", "html_writer2"), ("./a.py:swap", "swap"), ("fuse", "fuse")],
)
def test_a_stage_is_named_after_the_class(given: str, name: str) -> None:
    assert stage_name(given) == name


@pytest.mark.parametrize("given", ["./mark.py", "mark:MarkIt/", "./mark.txt:MarkIt", "./mark.py:", "./mark.py:1"])
def test_what_is_half_a_file_pass_is_told_how_to_write_one(tmp_path: Path, given: str) -> None:
    with pytest.raises(RecipeError, match=r"write \./FILE\.py:CLASS"):
        find_code(given, tmp_path)


def test_a_file_outside_the_recipes_folder_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    outside = written(tmp_path, MARK)
    (home / "link.py").symlink_to(outside)
    for given in ("../mark.py:MarkIt", f"{outside}:MarkIt", "./link.py:MarkIt", "./sub/../../mark.py:MarkIt"):
        with pytest.raises(RecipeError, match="outside the folder of the recipe"):
            find_code(given, home)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.py cannot be read: No such file"):
        find_code("./absent.py:MarkIt", tmp_path)


def test_what_a_class_says_of_itself_is_read_and_not_run(tmp_path: Path) -> None:
    said = read_class(code(written(tmp_path, MARK)))
    assert said == {
        "__doc__": "Set a key of the execution block.",
        "name": "mark_it",
        "version": 1,
        "accepts": {"torch"},
        "produces": "torch",
    }
    assert not (tmp_path / "ran").exists()


def test_what_is_computed_is_not_known_without_running(tmp_path: Path) -> None:
    text = "class A:\n    accepts: set = set(FORMATS)\n    produces: str = 'onnx'\n"
    assert read_class(code(written(tmp_path, text), "A")) == {"__doc__": None, "produces": "onnx"}


def test_a_syntax_error_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mark\.py:2:\d+: this is no Python"):
        read_class(code(written(tmp_path, "x = 1\nclass A(:\n")))


def test_a_class_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'MarkIt'"):
        read_class(code(written(tmp_path, MARK), "MarkId"))


def test_a_file_is_run_once_and_leaves_no_bytecode(tmp_path: Path) -> None:
    file = written(tmp_path, MARK + "# of this test alone\n")  # the process has run the other already
    found = Registry(code="run").load("x", code(file))
    assert Registry(code="run").load("x", code(file)) is found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark.py", "ran"]


def test_a_file_that_fails_to_import_is_told_with_the_line(tmp_path: Path) -> None:
    file = written(tmp_path, "import math\n\nmath.sqrt(-1)\n")
    with pytest.raises(PipelineError, match=r"cannot be imported: ValueError: .* \(line 3\)"):
        import_class(code(file))
    assert not [name for name in sys.modules if name.endswith(code(file).digest[:16])]


def test_a_second_file_beside_it_is_no_module_of_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    with pytest.raises(PipelineError, match="such a pass is one file; with more than one make a package"):
        import_class(code(written(tmp_path, "import beside\n")))


def test_a_file_that_changes_between_plan_and_run_is_refused(tmp_path: Path) -> None:
    found = code(written(tmp_path, "class A: ...\n"), "A")
    written(tmp_path, "class A: ...\n# changed\n")
    with pytest.raises(PipelineError, match="was changed while the plan ran"):
        import_class(found)


def test_without_leave_its_code_does_not_run(recipe: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:6:5: the pass is code in (?s:.*)--allow-code") as caught:
        run(load_recipe(recipe), store=store, runs=tmp_path / "runs")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "runs").exists()


def test_a_plan_says_what_it_can_without_running_the_code(recipe: Path, store: Store, tmp_path: Path) -> None:
    stage = plan(recipe, store, "read")
    assert (stage.status, stage.produces, stage.pass_name) == ("may hit", "torch", "mark.py:MarkIt")
    assert not (tmp_path / "ran").exists()


def test_a_plan_without_running_still_refuses_what_does_not_fit(recipe: Path, store: Store) -> None:
    (recipe.parent / "mark.py").write_text(MARK.replace('{"torch"}', '{"onnx"}'))
    with pytest.raises(RecipeError, match=r"'MarkIt' takes onnx, and the stage 'source' yields torch"):
        plan(recipe, store, "read")


def test_its_parameters_are_checked_once_it_may_run(recipe: Path, store: Store) -> None:
    recipe.write_text(recipe.read_text().replace("value: 3", "valeu: 3"))
    assert plan(recipe, store, "read").status == "may hit"
    with pytest.raises(RecipeError, match="unknown key 'valeu'; did you mean 'value'"):
        plan(recipe, store)


def test_its_source_is_part_of_the_key_and_its_place_is_not(recipe: Path, store: Store, tmp_path: Path) -> None:
    key = plan(recipe, store).key
    (tmp_path / "mark.py").write_text(MARK + "\n# a remark\n")
    assert plan(recipe, store).key != key
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.py").write_text(MARK)
    recipe.write_text(recipe.read_text().replace("./mark.py", "deep/other.py"))
    assert plan(recipe, store).key == key


def test_it_runs_is_cached_and_is_kept_with_the_run(recipe: Path, store: Store, tmp_path: Path) -> None:
    first = run(load_recipe(recipe), store=store, runs=tmp_path / "runs", measure=False, allow_code=True)
    stage = first.report.stage("mark_it")
    assert (stage.status, stage.pass_) == ("ran", "mark.py:MarkIt")
    kept = first.folder / "code" / "mark_it" / "mark.py"
    assert kept.read_text() == MARK
    assert "./code/mark_it/mark.py:MarkIt" in (first.folder / "recipe.yaml").read_text()
    assert json.loads((first.folder / "plan.json").read_text())["stages"][1]["params"] == {"value": 3}

    (tmp_path / "mark.py").unlink()
    again = run(
        load_recipe(first.folder / "recipe.yaml"), store=store, runs=tmp_path / "runs", measure=False, allow_code=True
    )
    assert again.report.stage("mark_it").status == "cached"


def test_a_group_may_bring_code_that_lies_beside_it(recipe: Path, store: Store, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "mark.py").rename(shared / "mark.py")
    (shared / "marks.yaml").write_text("version: 1\npasses:\n  - pass: ./mark.py:MarkIt\n")
    text = recipe.read_text().partition("passes:")[0]
    recipe.write_text(text + "passes:\n  - group: shared/marks.yaml\n    name: g\n")
    planned = plan_recipe(load_recipe(recipe), store=store, code="run")
    assert [stage.name for stage in planned.stages] == ["source", "g_mark_it"]


def test_set_reaches_a_stage_by_the_classs_name(recipe: Path, store: Store) -> None:
    planned = plan_recipe(load_recipe(recipe, ["passes.mark_it.value=9"]), store=store, code="run")
    assert planned.stage("mark_it").params == {"value": 9}


def test_a_matrix_over_it_loads_without_running_it(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "matrix:\n  - {passes.mark_it.value: 1}\n  - {passes.mark_it.value: 2}\n")
    assert load_recipe(recipe, cell=1).stages[0].params == {"value": 2}
    assert not (tmp_path / "ran").exists()


def test_an_unread_pass_that_says_nothing_takes_anything(tmp_path: Path) -> None:
    found = Registry(code="read").load("x", code(written(tmp_path, "class A: ...\n"), "A"))
    assert issubclass(found, UnreadPass)
    accepts, produces = found.formats(found.Params())
    assert accepts == {"onnx", "torch"}
    assert produces in accepts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class A(:\n", r"mark\.py:1:\d+: this is no Python"),
        ("import no_such_module\n", r"recipe\.yaml:6:5: mark\.py cannot be imported: ModuleNotFoundError.*\(line 1\)"),
        ("class MarkId: ...\n", r"recipe\.yaml:6:5: .*mark\.py has no class 'MarkIt'\n  did you mean 'MarkId'"),
        ("class MarkIt: ...\n", r"recipe\.yaml:6:5: MarkIt of mark\.py is not a subclass of pipeline\.Pass"),
    ],
)
def test_a_file_that_will_not_do_is_a_wrong_recipe(recipe: Path, store: Store, text: str, message: str) -> None:
    written(recipe.parent, text)
    with pytest.raises(RecipeError, match=message):
        plan(recipe, store)


def test_why_compares_the_text_and_runs_nothing(recipe: Path, store: Store, tmp_path: Path) -> None:
    run(load_recipe(recipe), store=store, runs=tmp_path / "runs", measure=False, allow_code=True)
    (tmp_path / "ran").unlink(missing_ok=True)

    def asked():
        return explain_stage(plan_recipe(load_recipe(recipe), store=store), "mark_it", store)

    assert "its file is as it was" in asked().reason
    written(tmp_path, MARK + "# changed\n")
    assert [change.what for change in asked().changes] == ["code"]
    assert not (tmp_path / "ran").exists()


def test_a_pass_in_a_file_is_not_among_the_installed() -> None:
    with pytest.raises(RecipeError, match="is a pass in a file, which has no place among"):
        Registry().info("./x.py:X")
