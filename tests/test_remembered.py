from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.plan import digest_of
from pipeline.remembered import remembered
from pipeline.store import Store


class Length(BaseModel):
    letters: int


THINGS = {word: {"length of": word} for word in ("one", "three", "seven")}


@pytest.fixture
def memory(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def count(words: list[str]) -> Iterator[tuple[str, Length]]:
    for word in words:
        yield word, Length(letters=len(word))


def test_what_is_known_is_not_found_out_again_and_the_order_is_that_of_the_things(memory: Store) -> None:
    remembered(memory, Length, {"three": THINGS["three"]}, count)
    asked: list[list[str]] = []

    def spy(words: list[str]) -> Iterator[tuple[str, Length]]:
        asked.append(words)
        return count(words)

    found = remembered(memory, Length, THINGS, spy)
    assert asked == [["one", "seven"]]
    assert [(word, length.letters) for word, length in found.items()] == [("one", 3), ("three", 5), ("seven", 5)]
    assert remembered(memory, Length, THINGS, spy) == found
    assert len(asked) == 1


def test_without_a_way_to_find_out_there_is_only_what_is_known(memory: Store) -> None:
    remembered(memory, Length, {"one": THINGS["one"]}, count)
    assert list(remembered(memory, Length, THINGS, None)) == ["one"]


def test_what_depends_on_something_else_is_another_result(memory: Store) -> None:
    remembered(memory, Length, {"one": {"length of": "one", "version": 1}}, count)
    assert remembered(memory, Length, {"one": {"length of": "one", "version": 2}}, None) == {}


def test_results_before_an_interruption_are_kept(memory: Store) -> None:
    def interrupted(words: list[str]) -> Iterator[tuple[str, Length]]:
        yield from count(words[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remembered(memory, Length, THINGS, interrupted)
    assert list(remembered(memory, Length, THINGS, None)) == ["one"]


def test_what_another_version_wrote_is_found_out_anew(memory: Store) -> None:
    memory.put_measurement(digest_of(THINGS["one"]), {"characters": 3})
    assert remembered(memory, Length, {"one": THINGS["one"]}, count) == {"one": Length(letters=3)}
