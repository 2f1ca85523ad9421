"""What lies in the store, for people."""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from pipeline.artifact import Frozen
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
    unique_bytes: int = Field(description="of the blobs that no other artifact has")


def list_store(store: Store) -> list[Row]:
    """A row for every stage whose artifact is whole, the newest first."""
    found = [(r, a) for r in store.records() if (a := store.artifact(r.artifact)) is not None]
    blobs = {a.digest: {e.digest: e.size_bytes for _, e in a.manifest.entries() if not e.path} for _, a in found}
    holders = Counter(digest for held in blobs.values() for digest in held)
    return [
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
        )
        for record, artifact in found
    ]
