"""Of each pass that breaks one promise, the kit names that and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.testing import Findings

pytestmark = pytest.mark.usefixtures("careless")

Check = Callable[..., Findings]

NO_SECOND_RUN = ("tolerance", "odd_model", "determinism")
"""Checks to leave out where one run shows what is asked for."""


def outcomes(found: Findings) -> dict[str, str]:
    """Checks that neither passed nor were skipped."""
    return {f.check: f.outcome for f in found if f.outcome not in ("passed", "skipped")}


def test_a_pass_that_keeps_all_promises_passes_all_checks(check: Check) -> None:
    found = check("careful")
    assert {f.check: f.outcome for f in found} == dict.fromkeys([f.check for f in found], "passed"), str(found)
    assert found.ok
    assert found["key"].message == "7 of 7 parameters changed it"
    assert (found.pass_name, found.origin) == ("careful", "careless 1.0")


def test_a_file_that_a_parameter_names_may_be_read(check: Check, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("words")
    assert outcomes(check("shouts", {"file": str(tmp_path / "words.txt")})) == {}


def test_a_relative_path_starts_where_the_caller_is(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    assert outcomes(check("shouts", {"file": "words.txt"}, skip=NO_SECOND_RUN)) == {}


def test_a_full_disk_says_nothing_of_the_pass(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.execute.stages.too_little_room", lambda store, needed: "the disk is full")
    found = check("careful", skip=["key"])
    assert (found.failed, found.host_lacks, found.ok) == ((), "the disk is full", False)


@pytest.mark.parametrize(
    ("name", "broken", "told"),
    [
        ("returns_nothing", "run", "returned NoneType where it promises 'torch'"),
        ("exotic", "declarations", "declares the unknown format 'abacus'"),
        ("picky", "declarations", "declares the unknown format 'papyrus'"),
        ("moonstruck", "declarations", "there is no context facet 'moon.phase'"),
        ("opaque", "parameters", "they cannot be put into JSON"),
        ("hidden", "key", "the parameter 'text' does not enter it"),
        ("litterer", "writes", "litter.txt"),
        ("homesick", "reads", "environment variables HOME"),
        ("moody", "reads", "environment variables CARELESS_MOOD (careless.py:"),
        ("impressionable", "reads", "environment variables IMPRESSIONABLE_MOOD (impressionable.py:"),
        ("nosy", "reads", "context facets seed (careless.py:"),
        ("dicey", "determinism", "two runs gave different note.txt"),
        ("unordered", "determinism", "two runs gave different note.txt"),
        ("braggart", "effect", "the pass tells of fuse_everything 5 of 5, and nothing was found changed"),
        ("clumsy", "odd_model", "KeyError"),
        ("coarse", "tolerance", "0.01 is allowed: if so much is meant, state it as the `tolerance` of an example"),
        ("stumbling", "formats", "KeyError"),
    ],
)
def test_the_broken_promise_is_named_and_no_other(check: Check, name: str, broken: str, told: str) -> None:
    found = check(name)
    stopped = {"run"} if broken == "writes" else set()  # by the engine, where that looks after it
    assert outcomes(found).keys() - stopped == {broken} - stopped, str(found)
    assert told in found[broken].message
    assert found[broken].outcome == "failed"
    assert not found.ok


def test_a_file_in_the_home_folder_is_named(check: Check) -> None:
    message = check("homesick", skip=NO_SECOND_RUN)["reads"].message
    assert f"{Path.home().resolve() / '.careless'} (careless.py:" in message
    assert "let a parameter of type Path name them" in message


def test_a_pass_that_writes_into_its_input_is_caught(check: Check, tmp_path: Path) -> None:
    found = check("scribbler", workspace=tmp_path)  # one of its own: it harms the model
    assert outcomes(found).keys() - {"run"} == {"input"}, str(found)
    assert str(tmp_path / "model" / "model.safetensors") in found["input"].message
    assert outcomes(check("careful", workspace=tmp_path)) == {}  # the model is as it was


def test_a_pass_that_never_ends_is_ended(check: Check) -> None:
    found = check("endless", timeout_s=1)
    assert outcomes(found) == {"run": "failed"}
    assert "it did not end: took longer than timeout_s: 1 s; it was in careless.py:" in found["run"].message


def test_a_pass_that_says_that_it_is_random_may_be(check: Check) -> None:
    found = check("frank")
    assert outcomes(found) == {}
    assert found["determinism"].message == "it says that two runs differ"


def test_a_pass_that_changes_nothing_is_a_warning(check: Check) -> None:
    found = check("idle")
    assert outcomes(found) == {"effect": "warning"}
    assert found.ok


def test_a_stated_tolerance_is_allowed(check: Check) -> None:
    assert outcomes(check("coarse", tolerance=20.0)) == {}


def test_what_cannot_be_foreseen_or_is_not_installed_is_a_warning(check: Check) -> None:
    found = check("shortsighted")
    assert outcomes(found) == {"declarations": "warning"}
    assert "ZeroDivisionError: no idea" in found["declarations"].message
    assert "a-library-that-nobody-has is not installed" in found["declarations"].message


def test_an_unknown_pass_and_a_wrong_parameter_are_the_callers_mistakes(check: Check) -> None:
    with pytest.raises(RecipeError, match="did you mean 'careful'"):
        check("carful")
    with pytest.raises(RecipeError, match="level should be less than or equal to 2"):
        check("careful", {"level": 3})


def test_a_class_that_is_not_the_installed_one_is_refused(check: Check) -> None:
    from pipeline import Pass

    class Careful(Pass):
        """Another one."""

        name = "careful"
        accepts, produces = frozenset({"torch"}), "torch"

    with pytest.raises(RecipeError, match="not the class that was given"):
        check(Careful)


def test_what_failed_is_shown_where_it_is_required_to_be_well(check: Check) -> None:
    with pytest.raises(AssertionError, match="failed   effect: the pass tells of fuse_everything"):
        check("braggart", skip=NO_SECOND_RUN).require_ok()
