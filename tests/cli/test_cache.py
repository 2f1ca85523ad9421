"""`pipeline cache`: what lies in the store, whether it is whole, and what of it is still needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.artifact import CacheLayout, Component, Interface, Manifest
from pipeline.store import Store, integrity
from pipeline.store.leases import gate
from pipeline.store.writer import OutputWriter

pytestmark = pytest.mark.usefixtures("plugins", "store")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(
        f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses:\n"
        "  - pass: mark\n    value: 3\n  - pass: write\n    after: source\n    text: some bytes\n"
    )
    return file


@pytest.fixture
def filled(plugins: Path, store: Store, cli: Cli, recipe: Path) -> Path:
    assert cli("run", recipe, "--no-measure")[0] == 0
    return recipe


def rows(cli: Cli) -> dict[str, dict[str, object]]:
    return {row["stage"]: row for row in json.loads(cli("cache", "list", "--json")[1])["stages"]}


def blob(store: Store) -> Path:
    return next(p for p in store.blobs.rglob("*") if p.is_file())


def damage(path: Path, data: bytes, *, keep_time: bool = False) -> None:
    stat = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns) if keep_time else (7, 7))


def statuses(cli: Cli, recipe: Path) -> dict[str, tuple[str, str | None]]:
    code, out, err = cli("run", recipe, "--no-measure", "--json")
    assert code == 0, err
    return {s["name"]: (s["status"], s["reason"]) for s in json.loads(out)["stages"]}


def test_path_prints_the_folder(cli: Cli, store: Store) -> None:
    assert cli("cache", "path")[1].strip() == str(store.root)


def test_an_empty_store_is_listed_verified_and_collected(cli: Cli) -> None:
    assert rows(cli) == {}
    assert "nothing is damaged" in cli("cache", "verify")[1]
    assert "kept artifacts: 0" in cli("cache", "gc")[1]


@pytest.mark.usefixtures("filled")
def test_stages_are_listed_with_what_would_be_freed_and_the_total(cli: Cli, store: Store) -> None:
    found = rows(cli)
    assert set(found) == {"source", "mark", "write"}
    assert found["source"]["stored_bytes"] == 0
    assert found["write"]["unique_bytes"] == len("some bytes")
    listing = json.loads(cli("cache", "list", "--json")[1])
    assert listing["blobs_bytes"] == len("some bytes")
    assert listing["total_bytes"] == sum(p.stat().st_size for p in store.root.rglob("*") if p.is_file())
    out = cli("cache", "list")[1]
    assert "mark" in out
    assert f"stages: 3; the store takes 0.0 MB in {store.root}" in out


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("how", ["name", "digest", "key"])
def test_an_artifact_is_shown_by_name_digest_or_key(how: str, cli: Cli, checkpoint: Path) -> None:
    row = rows(cli)["write"]
    name = {"name": "r/write", "digest": str(row["artifact"])[:10], "key": str(row["key"])[:10]}[how]
    code, out, _ = cli("cache", "show", name)
    assert code == 0
    assert f"artifact {row['artifact']}" in out
    assert "note.txt, 10 B, blob " in out
    assert f"refers to {checkpoint / 'model.safetensors'}" in out
    assert "1 tensors float32, 0.0 MB" in out
    assert f"key {str(row['key'])[:12]}: r/write" in out
    assert "kept for the run " in out
    shown = json.loads(cli("cache", "show", name, "--json")[1])
    assert (shown["problem"], shown["lineage"]["pass_name"]) == (None, "write")


def test_components_and_when_each_of_them_runs_are_shown(cli: Cli, store: Store) -> None:
    with store.staging() as staging:
        entry = OutputWriter(staging).file("model.onnx", b"a graph")
        part = Component(format="onnx", files={"model.onnx": entry})
        layout = CacheLayout(layers=2, kv_heads=2, head_dim=16, in_place=True)
        made = store.publish(
            staging,
            Manifest(
                format="onnx",
                components={"prefill": part, "decode": part},
                interface=Interface(cache=layout),
                execution={"phases": {"crossover_tokens": 16}},
            ),
        )
    out = cli("cache", "show", made.digest)[1]
    assert "component prefill (onnx)" in out
    assert "component decode (onnx)" in out
    assert "cache: 2 layers of [B, 2, T, 16] float32, keys and values, extended in place" in out
    assert "execution phases crossover_tokens 16" in out


@pytest.mark.usefixtures("filled")
def test_an_unknown_artifact_ends_with_2_and_the_nearest_name(cli: Cli) -> None:
    code, _, err = cli("cache", "show", "r/wriet")
    assert code == 2
    assert "did you mean 'r/write'?" in err


@pytest.mark.usefixtures("filled")
def test_a_damaged_artifact_is_shown_as_such(cli: Cli, store: Store) -> None:
    blob(store).unlink()
    assert "DAMAGED: the blob of note.txt is missing" in cli("cache", "show", "r/write")[1]
    assert "missing or damaged, not shown: 1" in cli("cache", "list")[1]


def test_verify_finds_an_edit_that_kept_size_and_time_and_the_next_run_mends_it(
    cli: Cli, filled: Path, store: Store
) -> None:
    path = blob(store)
    damage(path, b"SOME BYTES", keep_time=True)
    code, out, _ = cli("cache", "verify")
    assert code == 1
    assert f"changed blob: {path}: other bytes than it was stored with\n  needed by r/write" in out
    found = statuses(cli, filled)
    assert found["mark"] == ("cached", None)
    assert found["write"][0] == "ran"
    assert "made again" in str(found["write"][1])
    assert path.read_bytes() == b"some bytes"
    assert cli("cache", "verify")[0] == 0


@pytest.mark.parametrize("keep_time", [True, False])
def test_verify_deletes_what_is_damaged_and_only_that(keep_time: bool, cli: Cli, filled: Path, store: Store) -> None:
    path = blob(store)
    damage(path, b"SOME BYTES", keep_time=keep_time)
    code, out, _ = cli("cache", "verify", "--delete")
    assert code == 0
    assert "deleted 3 files of the store" in out  # the blob, the manifest, the record
    assert not path.exists()
    assert set(rows(cli)) == {"source", "mark"}
    assert cli("cache", "verify")[0] == 0
    assert {name: status for name, (status, _) in statuses(cli, filled).items()} == {
        "source": "cached",
        "mark": "cached",
        "write": "ran",
    }


def test_verify_names_cut_and_missing_and_unreadable_files(cli: Cli, filled: Path, store: Store) -> None:
    damage(blob(store), b"some")
    manifests = {json.loads(p.read_text())["lineage"]["stage"]: p for p in (store.root / "artifacts").rglob("*.json")}
    manifests["mark"].unlink()
    manifests["source"].write_text('{"half":')
    found = json.loads(cli("cache", "verify", "--json")[1])
    damages = {d["stages"][0]: (d["kind"], d["fault"]) for d in found["damages"]}
    assert damages == {
        "r/write": ("blob", "cut"),
        "r/mark": ("manifest", "missing"),
        "r/source": ("manifest", "unreadable"),
    }
    assert {status for status, _ in statuses(cli, filled).values()} == {"ran"}
    assert cli("cache", "verify")[0] == 0


def test_a_changed_checkpoint_is_told_and_never_deleted(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(checkpoint, mine)
    recipe = tmp_path / "m.yaml"
    recipe.write_text(f"version: 1\nname: m\nmodel: {{path: {mine}}}\npasses: [{{pass: mark}}]\n")
    assert cli("run", recipe, "--no-measure")[0] == 0
    file = mine / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, out, _ = cli("cache", "verify", "--delete")
    assert code == 0
    assert f"changed file outside: {file}" in out
    assert "needed by m/mark, m/source" in out
    assert file.read_bytes() == bytes(data)
    assert rows(cli) == {}


@pytest.fixture
def moved(cli: Cli, tmp_path: Path, checkpoint: Path) -> tuple[Path, Path]:
    """Where a model was when it was first run, and where it was used from after it was moved."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(checkpoint, old)
    recipe = tmp_path / "moving.yaml"
    for place in (old, new):
        if place == new:
            old.rename(new)
        recipe.write_text(f"version: 1\nname: m\nmodel: {{path: {place}}}\npasses: [{{pass: mark}}]\n")
        assert cli("run", recipe, "--no-measure")[0] == 0
    return old, new


def manifests(store: Store) -> set[Path]:
    return set((store.root / "artifacts").rglob("*.json"))


def test_a_model_that_was_moved_and_used_from_there_is_whole(cli: Cli, store: Store, moved: tuple[Path, Path]) -> None:
    for path in manifests(store):  # as they were made before the move
        path.write_text(path.read_text().replace(str(moved[1]), str(moved[0])))
    before = manifests(store)
    assert all(not isinstance(store.examine(path.stem), str) for path in before)
    code, out, _ = cli("cache", "verify", "--delete")
    assert (code, "nothing is damaged" in out) == (0, True)
    assert manifests(store) == before


def test_a_moved_model_whose_bytes_changed_is_told_and_its_artifacts_go(
    cli: Cli, store: Store, moved: tuple[Path, Path]
) -> None:
    for path in manifests(store):
        path.write_text(path.read_text().replace(str(moved[1]), str(moved[0])))
    file = moved[1] / "model.safetensors"
    damage(file, file.read_bytes()[:-1] + b"!", keep_time=True)
    code, out, _ = cli("cache", "verify", "--delete")
    assert code == 0
    assert f"missing file outside: {moved[0] / 'model.safetensors'}" in out
    assert manifests(store) == set()
    assert file.exists()


def test_what_was_mended_while_verify_read_is_not_deleted(
    filled: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = blob(store), manifests(store)
    damage(path, b"SOME BYTES")
    (broken,) = [p for p in before if json.loads(p.read_text())["lineage"]["stage"] == "mark"]
    text = broken.read_text()
    broken.write_text("{")

    @contextmanager
    def another_run_was_first(root: Path, *, alone: bool) -> Iterator[bool]:
        damage(path, b"some bytes")
        broken.write_text(text)
        with gate(root, alone=alone) as held:
            yield held

    monkeypatch.setattr(integrity, "gate", another_run_was_first)
    found = integrity.verify_store(store, delete=True)
    assert (len(found.damages), found.deleted) == (2, 0)
    assert manifests(store) == before
    assert path.read_bytes() == b"some bytes"


def test_a_record_that_names_another_artifact_by_now_is_not_deleted(
    filled: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(blob(store), b"SOME BYTES")
    rooms = {p: json.loads(p.read_text()) for p in (store.root / "stages").rglob("*.json")}
    (record,) = [p for p, said in rooms.items() if said["stage"] == "write"]

    @contextmanager
    def another_run_was_first(root: Path, *, alone: bool) -> Iterator[bool]:
        record.write_text(json.dumps({**rooms[record], "artifact": "0" * 64}))
        with gate(root, alone=alone) as held:
            yield held

    monkeypatch.setattr(integrity, "gate", another_run_was_first)
    assert integrity.verify_store(store, delete=True).deleted == 2  # the blob, the manifest
    assert record.exists()


def test_a_pinned_artifact_that_is_damaged_goes_too(cli: Cli, filled: Path, store: Store) -> None:
    assert cli("cache", "pin", "r/write")[0] == 0
    damage(blob(store), b"SOME BYTES")
    assert cli("cache", "verify", "--delete")[0] == 0
    assert set(rows(cli)) == {"source", "mark"}


def test_gc_removes_kernels_that_were_not_used_for_long(cli: Cli, store: Store) -> None:
    compiled = store.root / "compiled"
    ages = {"a" * 64: 31, "b" * 64: 29, "toolchain": 400, ".0123456789abcdef": 1, "mine": 400}
    for name, days in ages.items():
        (compiled / name / "ab").mkdir(parents=True)
        (compiled / name / "ab" / "kernel.so").write_bytes(bytes(500_000))
        os.utime(compiled / name, (time.time() - days * 86_400,) * 2)
    assert "would remove compiled kernels: 2, 1.0 MB" in cli("cache", "gc", "--dry-run")[1]
    assert {p.name for p in compiled.iterdir()} == set(ages)
    assert "removed compiled kernels: 2, 1.0 MB" in cli("cache", "gc")[1]
    assert {p.name for p in compiled.iterdir()} == {"b" * 64, "toolchain", "mine"}


def test_gc_keeps_what_a_runs_folder_needs_and_removes_it_with_the_folder(cli: Cli, filled: Path, store: Store) -> None:
    out = cli("cache", "gc")[1]
    assert "kept artifacts: 3 (3 for runs)" in out
    assert {status for status, _ in statuses(cli, filled).values()} == {"cached"}
    shutil.rmtree("runs")
    before = sorted(p for p in store.root.rglob("*") if p.is_file() and "locks" not in p.parts)
    out = cli("cache", "gc", "--dry-run")[1]
    assert "would remove artifacts: 3" in out
    assert "  r/write" in out
    assert before == sorted(p for p in store.root.rglob("*") if p.is_file() and "locks" not in p.parts)
    freed = json.loads(cli("cache", "gc", "--json")[1])
    removed = {part["kind"]: part for part in freed["removed"]}
    assert removed["artifacts"]["count"] == 3
    assert removed["blobs"]["bytes"] == len("some bytes")
    assert rows(cli) == {}
    assert [
        p
        for room in ("blobs", "artifacts", "stages", "logs", "content", "runs", "leases")
        for p in (store.root / room).rglob("*")
    ] == []


def test_gc_touches_no_file_outside_the_store(cli: Cli, filled: Path, checkpoint: Path) -> None:
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in checkpoint.iterdir()}
    shutil.rmtree("runs")
    assert cli("cache", "gc")[0] == 0
    assert before == {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in checkpoint.iterdir()}
    assert filled.exists()


@pytest.mark.usefixtures("filled")
def test_a_pinned_artifact_stays_until_it_is_unpinned(cli: Cli) -> None:
    shutil.rmtree("runs")
    assert cli("cache", "pin", "r/write", "--note", "for the talk")[0] == 0
    assert "kept artifacts: 1 (1 for pins)" in cli("cache", "gc")[1]
    assert set(rows(cli)) == {"write"}
    assert "pinned: for the talk" in cli("cache", "show", "r/write")[1]
    assert " pinned" in cli("cache", "list")[1]
    assert cli("cache", "unpin", "r/write")[0] == 0
    assert cli("cache", "unpin", "r/write")[0] == 2
    cli("cache", "gc")
    assert rows(cli) == {}


@pytest.mark.usefixtures("filled")
def test_what_was_used_lately_stays_where_only_old_things_may_go(cli: Cli, store: Store) -> None:
    shutil.rmtree("runs")
    write = rows(cli)["write"]
    for room, name in (("stages", write["key"]), ("artifacts", write["artifact"])):
        os.utime(store.place(room, str(name)), (0, 0))
    assert "kept artifacts: 2 (2 for used lately)" in cli("cache", "gc", "--older-than", "1")[1]
    assert set(rows(cli)) == {"source", "mark"}


def test_only_the_last_runs_of_a_recipe_keep_artifacts_where_asked(cli: Cli, filled: Path) -> None:
    cli("run", filled, "--no-measure", "--set", "passes.mark.value=5")
    assert json.loads(cli("cache", "gc", "--json")[1])["kept_artifacts"] == 4
    assert json.loads(cli("cache", "gc", "--keep-last", "1", "--json")[1])["kept_artifacts"] == 3


def test_gc_leaves_alone_what_a_running_process_uses_and_sweeps_what_a_dead_one_left(
    cli: Cli, filled: Path, store: Store
) -> None:
    mark = str(rows(cli)["mark"]["artifact"])
    shutil.rmtree("runs")
    hidden = Path("runs/r/.20260101-000000-abcd").absolute()
    hidden.mkdir(parents=True)
    code = f"""
import sys
from pathlib import Path
from pipeline.store import Store
store = Store(Path({str(store.root)!r}))
with store.lease(Path({str(hidden)!r})), store.staging() as staging, store.lock("k"):
    assert store.artifact({mark!r})
    (staging / "half").write_bytes(b"x" * 1000)
    print("ready", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    try:
        assert "kept artifacts: 1 (1 for running processes)" in cli("cache", "gc")[1]
        assert set(rows(cli)) == {"mark"}
        assert hidden.is_dir()
        assert len([p for p in (store.root / "tmp").iterdir() if p.is_dir()]) == 1
        assert (store.root / "locks" / "k.lock").exists()
    finally:
        process.kill()
        process.wait()
    out = cli("cache", "gc")[1]
    assert f"removed unfinished runs: 1\n  {hidden}" in out
    assert "removed unfinished work: 1" in out
    assert not hidden.exists()
    assert list((store.root / "tmp").iterdir()) == []
    assert not (store.root / "locks" / "k.lock").exists()
    assert rows(cli) == {}
    assert filled.exists()


def test_a_lease_of_a_dead_process_has_no_folder_removed_but_a_runs(cli: Cli, store: Store, tmp_path: Path) -> None:
    precious = tmp_path / ".ssh"
    precious.mkdir()
    (store.root / "leases").mkdir(parents=True)
    (store.root / "leases" / "x.jsonl").write_text(json.dumps({"pid": 1, "folder": str(precious)}) + "\n")
    assert cli("cache", "gc")[0] == 0
    assert precious.is_dir()


@pytest.mark.usefixtures("filled")
def test_results_that_nobody_asked_for_in_long_go_and_recent_ones_stay(cli: Cli, store: Store) -> None:
    store.put_measurement("a" * 64, {"x": 1})
    store.put_measurement("b" * 64, {"x": 1})
    for name in "ab":
        os.utime(store.place("measurements", name * 64), (0, 0))
    assert store.measurement("a" * 64) == {"x": 1}  # asked for: young again
    cli("cache", "gc")
    assert store.measurement("a" * 64) == {"x": 1}
    assert store.measurement("b" * 64) is None


def test_the_page_on_the_store_names_only_options_that_there_are(cli: Cli) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    verbs = set(re.findall(r"pipeline cache ([a-z]+)", page))
    helps = {verb: cli("cache", verb, "--help") for verb in verbs}
    assert {code for code, _, _ in helps.values()} == {0}
    known = {option for _, out, _ in helps.values() for option in re.findall(r"--[a-z][a-z-]+", out)}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) - {"--set", "--force", "--no-measure"} <= known
    assert verbs == {"path", "list", "show", "verify", "gc", "pin", "unpin"}
