"""Which weights of two artifacts hold the same bytes, wherever they lie; as few bytes are read as can be."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.artifact import Artifact
from pipeline.measure.fingerprint import Place, bytes_of

HEAD_BYTES = 4096
"""Tensors that differ do so in their first bytes; only where these are equal is the rest read."""


@dataclass(frozen=True)
class Contents:
    """What is known of the weights of two artifacts without reading them again."""

    of: Mapping[Place, Hashable]
    """Of every place of both: equal where one holds the bytes of the other."""
    both: Mapping[Place, Hashable]
    """Those that both artifacts have."""


@dataclass(frozen=True)
class _Stored:
    """A tensor of an artifact."""

    artifact: Artifact
    component: str
    name: str

    def digest(self, limit: int | None = None) -> bytes:
        """SHA-256 of its first `limit` bytes, or of all."""
        data = bytes_of(self.artifact.tensor(self.name, self.component))[:limit]
        return hashlib.sha256(data.data).digest()


def contents_of(before: Artifact, after: Artifact) -> Contents:
    """Compare the weights of two artifacts.

    Equal places are not read. One that only one of them has is read where the other has a tensor of the same length
    that begins alike. Raises: OSError where a file cannot be read.
    """
    old, new = _places(before), _places(after)
    lone = old.keys() ^ new.keys()
    found: dict[Place, Hashable] = {place: place for place in (*old, *new)}
    for group in _alike(lone, old, new, limit=0):
        for nearer in _alike(lone, old, new, limit=HEAD_BYTES, within=group):
            for place in nearer:
                found[place] = (old.get(place) or new[place]).digest()
    shared = {found[place] for place in old} & {found[place] for place in new}
    return Contents(found, {place: content for place, content in found.items() if content in shared})


def places_of(artifact: Artifact) -> set[Place]:
    """Where its weights lie."""
    return set(_places(artifact))


def _places(artifact: Artifact) -> dict[Place, _Stored]:
    parts = artifact.manifest.components.items()
    return {
        (part.files[ref.file].digest, ref.offset, ref.length): _Stored(artifact, component, name)
        for component, part in parts
        for name, ref in part.tensors.items()
    }


def _alike(
    lone: set[Place],
    old: Mapping[Place, _Stored],
    new: Mapping[Place, _Stored],
    *,
    limit: int,
    within: set[Place] | None = None,
) -> Iterator[set[Place]]:
    """Places of equal length whose first `limit` bytes are equal, that both artifacts have, and one of them alone."""
    groups: dict[Hashable, set[Place]] = defaultdict(set)
    for place in within if within is not None else old.keys() | new.keys():
        head = (old.get(place) or new[place]).digest(limit) if limit else b""
        groups[place[2], head].add(place)
    for group in groups.values():
        if group & lone and group & old.keys() and group & new.keys():
            yield group
