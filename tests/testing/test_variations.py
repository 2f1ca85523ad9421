"""Other valid values of parameters are found from their types."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from pipeline import PassParams
from pipeline.testing.variations import variations


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(PassParams):
    depth: int = Field(3, ge=3, le=4)


class Params(PassParams):
    yes: bool = False
    one_of: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    at_the_top: int = Field(8, ge=1, le=8)
    between: float = Field(0.5, gt=0.4, lt=0.6)
    even: int = Field(2, multiple_of=2)
    text: str = "x"
    short: str = Field("ab", max_length=2)
    maybe: int | None = None
    either: int | Literal["auto"] = "auto"
    items: list[int] = Field([1], min_length=1)
    pair: tuple[int, int] = (1, 2)
    table: dict[str, float] = Field(default_factory=dict)
    inner: Inner = Inner()
    file: Path | None = None


@pytest.mark.parametrize("name", [name for name in Params.model_fields if name != "pair"])
def test_another_valid_value_is_found(name: str, tmp_path: Path) -> None:
    found = variations(Params, {}, tmp_path)[name]
    assert found is not None
    before, after = (Params.model_validate_json(_json(params)) for params in found)
    assert getattr(before, name) != getattr(after, name)
    assert [n for n in Params.model_fields if getattr(before, n) != getattr(after, n)] == [name]


def test_where_none_is_found_one_can_be_given(tmp_path: Path) -> None:
    assert variations(Params, {}, tmp_path)["pair"] is None
    found = variations(Params, {}, tmp_path, {"pair": [3, 4]})["pair"]
    assert found is not None
    assert found.after == {"pair": [3, 4]}


def test_what_validation_wants_besides_is_changed_on_both_sides(tmp_path: Path) -> None:
    class Linked(PassParams):
        kind: Literal["plain", "sized"] = "plain"
        size: int | None = Field(None, ge=2)

        @model_validator(mode="after")
        def _fit(self) -> Linked:
            if self.size is not None and self.kind == "plain":
                raise ValueError("only sized ones have a size")
            return self

    found = variations(Linked, {}, tmp_path)["size"]
    assert found is not None
    assert found.before == {"kind": "sized"}
    assert found.after["kind"] == "sized"
    assert found.after["size"] >= 2


def test_what_goes_with_the_current_value_alone_is_left_out(tmp_path: Path) -> None:
    class Linked(PassParams):
        kind: Literal["plain", "sized"] = "plain"
        size: int = 1

        @model_validator(mode="after")
        def _fit(self) -> Linked:
            if self.size != 1 and self.kind == "plain":
                raise ValueError("only sized ones have a size")
            return self

    found = variations(Linked, {"kind": "sized", "size": 4}, tmp_path)["kind"]
    assert found == ({"kind": "sized"}, {"kind": "plain"})


def test_a_file_of_other_contents_is_made(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    found = variations(Params, {"file": str(tmp_path / "mine.txt")}, tmp_path)["file"]
    assert found is not None
    assert Path(found.after["file"]).read_text() != "mine"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def _json(params: dict[str, Any]) -> str:
    import json

    return json.dumps(params)
