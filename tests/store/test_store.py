"""The store: what is published is whole, found again, and noticed when it is damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact import Artifact, Component, FileEntry, Interface, Manifest, blob_path
from pipeline.errors import HostError
from pipeline.files import DigestMemory, sha256_of, write_atomically
from pipeline.store import StageRecord, Store, default_store_path
from pipeline.store.writer import ALIGNMENT, OutputWriter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, data: bytes = b"weights", *, referenced: Path | None = None) -> Artifact:
    with store.staging() as staging:
        entry = store.reference(referenced) if referenced else OutputWriter(staging).file("w", data)
        part = Component(format="torch", files={"w": entry})
        made = Manifest(format="torch", components={"model": part}, interface=Interface())
        return store.publish(staging, made)


def record(artifact: Artifact, key: str = "k" * 64, **changes: object) -> StageRecord:
    fields = {
        "key": key,
        "artifact": artifact.digest,
        "recipe": "r",
        "stage": "s",
        "pass_name": "p",
        "ingredients": {},
        "created": "2026-01-01T00:00:00+00:00",
        **changes,
    }
    return StageRecord(**fields)  # type: ignore[arg-type]


def test_what_is_published_is_found_by_its_digest(store: Store) -> None:
    made = publish(store)
    found = store.artifact(made.digest)
    assert found == made
    assert found.file("w").read_bytes() == b"weights"


def test_a_blob_is_read_only_has_one_link_and_is_named_by_its_contents(store: Store) -> None:
    path = publish(store).file("w")
    assert path is not None
    stat = path.stat()
    assert (stat.st_mode & 0o222, stat.st_nlink) == (0, 1)
    assert path.name == sha256_of(path)


def test_equal_contents_are_stored_once(store: Store) -> None:
    assert publish(store).digest == publish(store).digest
    assert len([p for p in store.blobs.rglob("*") if p.is_file()]) == 1


def test_an_artifact_with_a_missing_or_cut_blob_is_not_there(store: Store) -> None:
    made = publish(store)
    path = made.file("w")
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"cut")
    assert store.artifact(made.digest) is None
    path.unlink()
    assert store.artifact(made.digest) is None


def test_an_edited_blob_is_noticed_though_its_size_is_the_same(store: Store) -> None:
    made = publish(store)
    path = made.file("w")
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(7, 7))
    assert store.artifact(made.digest) is None
    publish(store)
    assert store.artifact(made.digest) is not None
    assert path.read_bytes() == b"weights"


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"is not a folder\n  set PIPELINE_STORE"):
        Store(tmp_path / "file")


def test_a_damaged_artifact_is_repaired_by_publishing_it_again(store: Store) -> None:
    made = publish(store)
    path = made.file("w")
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"cut")
    publish(store)
    found = store.artifact(made.digest)
    assert found is not None
    assert found.file("w").read_bytes() == b"weights"


def test_a_damaged_manifest_or_record_counts_as_missing(store: Store) -> None:
    made = publish(store)
    store.put_record(record(made), own="o", inputs="i")
    (store.root / "stages" / "kk" / f"{'k' * 64}.json").write_text('{"half":')
    assert store.stage_record("k" * 64) is None
    next((store.root / "artifacts").rglob("*.json")).write_text("{}")
    assert store.artifact(made.digest) is None


def test_a_referenced_file_is_left_where_it_is(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(b"user's")
    before = file.stat()
    made = publish(store, referenced=file)
    assert made.file("w") == file
    assert not list(store.blobs.rglob("*")) or not any(p.is_file() for p in store.blobs.rglob("*"))
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (before.st_ino, before.st_mtime_ns, before.st_nlink)


def test_a_referenced_file_that_was_only_touched_is_still_good(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(b"user's")
    made = publish(store, referenced=file)
    os.utime(file, ns=(1, 1))
    assert store.artifact(made.digest) is not None


def test_a_referenced_file_that_changed_makes_the_artifact_missing(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(b"user's")
    made = publish(store, referenced=file)
    file.write_bytes(b"other!")
    os.utime(file, ns=(5, 5))
    assert store.artifact(made.digest) is None


def test_a_referenced_file_that_moved_is_found_where_its_contents_were_seen(store: Store, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"user's")
    made = publish(store, referenced=old)
    new.write_bytes(b"user's")
    publish(store, referenced=new)
    old.unlink()
    found = store.artifact(made.digest)
    assert found is not None
    assert found.file("w") == new


def test_a_link_is_followed_to_the_file_that_it_names(store: Store, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert store.reference(tmp_path / "link").path == str(tmp_path / "real")


def test_a_stage_is_found_by_its_key_and_by_the_contents_of_its_inputs(store: Store) -> None:
    made = publish(store)
    assert store.stage_record("k" * 64) is None
    assert not store.may_hit("own")
    store.put_record(record(made), own="own", inputs="in")
    assert store.stage_record("k" * 64) == record(made)
    assert store.record_by_content("own", "in") == record(made)
    assert store.record_by_content("own", "other") is None
    assert store.may_hit("own")


def test_a_stage_whose_artifact_is_damaged_is_not_found(store: Store) -> None:
    made = publish(store)
    store.put_record(record(made), own="own", inputs="in")
    path = made.file("w")
    assert path is not None
    path.unlink()
    assert store.stage_record("k" * 64) is None
    assert store.record_by_content("own", "in") is None


def test_records_come_with_the_newest_first(store: Store) -> None:
    made = publish(store)
    for key, day in (("a" * 64, "1"), ("b" * 64, "3"), ("c" * 64, "2")):
        store.put_record(record(made, key, created=f"2026-01-0{day}T00:00:00+00:00"), own=key, inputs="i")
    assert [r.key[0] for r in store.records()] == ["b", "c", "a"]


def test_staging_is_gone_afterwards_whatever_happens(store: Store) -> None:
    with pytest.raises(RuntimeError), store.staging() as staging:
        (staging / "half").write_bytes(b"x")
        raise RuntimeError
    assert list((store.root / "tmp").iterdir()) == []


def test_staging_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(store: Store, tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pipeline.store import Store\n"
        f"s = Store(Path({str(store.root)!r}))\n"
        "with s.staging() as folder:\n    (folder / 'half').write_bytes(b'x')\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    left = [p for p in (store.root / "tmp").iterdir() if p.is_dir()]
    assert len(left) == 1
    with store.staging() as mine, store.staging() as other:
        assert {p for p in (store.root / "tmp").iterdir() if p.is_dir()} == {mine, other}


def test_a_lock_is_given_back_when_its_holder_dies(store: Store) -> None:
    code = (
        "import os\nfrom pathlib import Path\nfrom pipeline.store import Store\n"
        f"with Store(Path({str(store.root)!r})).lock('k'):\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    with store.lock("k"):
        pass


def test_the_stores_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "a"))
    assert default_store_path() == tmp_path / "a"
    monkeypatch.delenv("PIPELINE_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_store_path() == tmp_path / "b" / "pipeline"


def test_a_digest_is_remembered_only_for_a_file_that_had_been_quiet(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "digests")
    file = tmp_path / "f"
    file.write_bytes(b"1")
    memory.digest(file)
    assert not (tmp_path / "digests").exists()  # it could change again within the same tick of its timestamp
    os.utime(file, ns=(1, 1))
    memory.digest(file)
    assert len(list((tmp_path / "digests").iterdir())) == 1


def test_a_remembered_digest_is_not_used_for_other_contents(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "digests")
    file = tmp_path / "f"
    file.write_bytes(b"1")
    os.utime(file, ns=(1, 1))
    first = memory.digest(file)
    file.write_bytes(b"2")
    os.utime(file, ns=(2, 2))
    assert memory.digest(file) == sha256_of(file) != first


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "f", "not bytes")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_a_pack_begin_at_page_boundaries_and_are_streamed(tmp_path: Path) -> None:
    output = OutputWriter(tmp_path)
    first = output.tensor(np.arange(3, dtype=np.int32))
    second = output.tensor(np.arange(4, dtype=np.float64).reshape(2, 2).T)
    assert (first.offset, second.offset, second.shape) == (0, ALIGNMENT, (2, 2))
    assert output.pack_path().stat().st_size == ALIGNMENT + 32
    packed = output.close_pack()
    assert packed is not None
    name, entry = packed
    data = (tmp_path / "blobs" / entry.digest).read_bytes()
    assert name == f"weights/{entry.digest}"
    assert np.frombuffer(data[ALIGNMENT:]).tolist() == [0, 2, 1, 3]
    assert output.close_pack() is None


def test_a_pass_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave its folder"):
        OutputWriter(tmp_path).file("../escape", b"")


def test_blob_paths_are_sharded(tmp_path: Path) -> None:
    assert blob_path(tmp_path, "ab" + "0" * 62).parent == tmp_path / "ab"
    assert FileEntry(digest="ab" + "0" * 62, size_bytes=0).path is None
