"""Results that the store remembers: only what it does not know is found out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.plan import digest_of
from pipeline.store import Store

Thing = TypeVar("Thing", bound=Hashable)
Result = TypeVar("Result", bound=BaseModel)


def remembered(
    store: Store,
    model: type[Result],
    things: Mapping[Thing, Mapping[str, Any]],
    find_out: Callable[[list[Thing]], Iterable[tuple[Thing, Result]]] | None,
) -> dict[Thing, Result]:
    """The result of each of `things`, given with all that it depends on, in their order; without those that have none.

    `find_out` is given what the store does not know, where there is any, and yields what it finds: each result is
    stored at once, so that an interruption loses no other. It may leave some out. None: nothing is found out.
    """
    keys = {thing: digest_of(dict(depends_on)) for thing, depends_on in things.items()}
    found = {thing: result for thing, key in keys.items() if (result := _known(store, model, key)) is not None}
    unknown = [thing for thing in keys if thing not in found]
    if unknown and find_out is not None:
        for thing, result in find_out(unknown):
            store.put_measurement(keys[thing], result.model_dump(mode="json"))
            found[thing] = result
    return {thing: found[thing] for thing in keys if thing in found}


def _known(store: Store, model: type[Result], key: str) -> Result | None:
    """The result under `key`; None where there is none, or one that another version wrote."""
    found = store.measurement(key)
    try:
        return None if found is None else model.model_validate(found)
    except ValidationError:
        return None
