"""What becomes damaged in the store is noticed by the next run, made again, and told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.execute import StageResult
from pipeline.store import Store

Run = Callable[..., dict[str, StageResult]]

PASSES = "[{pass: write, text: some bytes}]"


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def blob(store: Store) -> Path:
    return next(p for p in store.blobs.rglob("*") if p.is_file())


def of_stage(room: Path, stage: str) -> Path:
    """The file of a room that tells of a stage."""
    return next(p for p in room.rglob("*.json") if f'"{stage}"' in p.read_text())


def missing_blob(store: Store) -> None:
    blob(store).unlink()


def cut_blob(store: Store) -> None:
    rewrite(blob(store), b"some")


def edited_blob(store: Store) -> None:
    rewrite(blob(store), b"SOME BYTES")


def empty_blob(store: Store) -> None:
    rewrite(blob(store), b"")


def missing_manifest(store: Store) -> None:
    of_stage(store.root / "artifacts", "write").unlink()


def half_a_manifest(store: Store) -> None:
    path = of_stage(store.root / "artifacts", "write")
    path.write_bytes(path.read_bytes()[:100])


def edited_manifest(store: Store) -> None:
    path = of_stage(store.root / "artifacts", "write")
    data = json.loads(path.read_text())
    data["execution"]["dtype"] = "float16"
    path.write_text(json.dumps(data))


def half_a_record(store: Store) -> None:
    path = of_stage(store.root / "stages", "write")
    path.write_bytes(path.read_bytes()[:100])


def record_of_another_shape(store: Store) -> None:
    of_stage(store.root / "stages", "write").write_text("[1, 2]")


def record_of_bytes(store: Store) -> None:
    of_stage(store.root / "stages", "write").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (missing_blob, "the blob of note.txt is missing"),
        (cut_blob, "the blob of note.txt has 4 bytes instead of 10"),
        (edited_blob, "the blob of note.txt has other bytes than it was stored with"),
        (empty_blob, "the blob of note.txt has 0 bytes instead of 10"),
        (missing_manifest, "its manifest is missing"),
        (half_a_manifest, "its manifest is damaged"),
        (edited_manifest, "its manifest was changed"),
        (half_a_record, "its record is damaged"),
        (record_of_another_shape, "its record is damaged"),
        (record_of_bytes, "its record is damaged"),
    ],
)
def test_what_is_damaged_is_made_again_and_told(
    harm: Callable[[Store], None], words: str, run_passes: Run, store: Store
) -> None:
    before = run_passes(PASSES)["write"]
    for pointer in (store.root / "content").rglob("*.json"):  # else an equal artifact may be found by its contents
        pointer.unlink()
    harm(store)
    after = run_passes(PASSES)
    assert after["source"].status == "cached"
    assert after["write"].status == "ran"
    assert words in str(after["write"].reason)
    assert str(after["write"].reason).startswith("made again: in the store, ")
    assert after["write"].artifact == before.artifact
    again = run_passes(PASSES)["write"]
    assert (again.status, again.reason) == ("cached", None)
    assert blob(store).read_bytes() == b"some bytes"


@pytest.mark.parametrize("text", ['{"key"', "[]", "{}", '"x"'])
def test_a_damaged_pointer_by_contents_counts_as_missing(text: str, run_passes: Run, store: Store) -> None:
    run_passes(PASSES)
    for pointer in (store.root / "content").rglob("*.json"):
        pointer.write_text(text)
    results = run_passes("[{pass: same}, {pass: write, text: some bytes}]")
    assert {result.status for result in results.values()} <= {"ran", "cached"}
    assert results["write"].status == "ran"


@pytest.mark.parametrize("text", ['{"iden', "[]", "7"])
def test_damaged_memories_of_digests_and_places_count_as_missing(text: str, run_passes: Run, store: Store) -> None:
    run_passes(PASSES)
    for room in ("digests", "references"):
        for path in [p for p in (store.root / room).rglob("*") if p.is_file()]:
            path.write_text(text)
    assert {result.status for result in run_passes(PASSES).values()} == {"cached"}
