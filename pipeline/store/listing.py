"""What lies in the store, for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.store.roots import pins
from pipeline.store.store import Store


class Row(Frozen):
    """One stage's artifact."""

    created: str
    recipe: str
    stage: str
    pass_name: str
    key: str
    artifact: str
    format: str
    size_bytes: int = Field(description="written out alone, referenced files counted")
    stored_bytes: int = Field(description="of its blobs; files that it references are not in the store")
    unique_bytes: int = Field(description="of the blobs that no other artifact has: what goes if only this goes")
    pinned: bool


class Listing(Frozen):
    """All stages, and what the whole store takes."""

    folder: str
    total_bytes: int = Field(description="of all files of the store")
    blobs_bytes: int
    stages: tuple[Row, ...] = Field(description="the newest first")
    damaged: int = Field(description="stages whose artifact is missing or damaged, not listed")


def list_store(store: Store) -> Listing:
    """A row for every stage whose artifact is whole, the newest first."""
    records = list(store.records())
    found = [(r, a) for r in records if (a := store.artifact(r.artifact)) is not None]
    blobs = {a.digest: {e.digest: e.size_bytes for _, e in a.manifest.entries() if not e.path} for _, a in found}
    holders = Counter(digest for held in blobs.values() for digest in held)
    pinned = pins(store)
    rows = tuple(
        Row(
            created=record.created,
            recipe=record.recipe,
            stage=record.stage,
            pass_name=record.pass_name,
            key=record.key,
            artifact=artifact.digest,
            format=artifact.format,
            size_bytes=artifact.manifest.size_bytes,
            stored_bytes=sum(blobs[artifact.digest].values()),
            unique_bytes=sum(s for d, s in blobs[artifact.digest].items() if holders[d] == 1),
            pinned=artifact.digest in pinned,
        )
        for record, artifact in found
    )
    return Listing(
        folder=str(store.root),
        total_bytes=_bytes_below(store.root),
        blobs_bytes=_bytes_below(store.blobs),
        stages=rows,
        damaged=len(records) - len(rows),
    )


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:  # another process removed it meanwhile
            continue
    return total
