import mmap
import os
import subprocess
import sys
from pathlib import Path

from pipeline.measure.memory import MemorySampler, tree_memory

MB = 2**20
CHILD = "import sys; held = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"


def child() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_memory_that_is_held_inside_the_block_is_seen() -> None:
    before = tree_memory(os.getpid()).memory_bytes
    with MemorySampler(os.getpid()) as sampler:
        held = bytearray(b"x") * (64 * MB)
        sampler.sample()
    assert len(held) == 64 * MB
    assert sampler.peak_memory_bytes - before > 60 * MB


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    with MemorySampler(os.getpid()) as sampler:
        held = bytearray(b"x") * (64 * MB)
        sampler.sample()
        del held
        now = sampler.sample()
    assert sampler.peak_memory_bytes > now.memory_bytes + 60 * MB


def test_children_count() -> None:
    before = tree_memory(os.getpid()).memory_bytes
    process = child()
    try:
        assert tree_memory(os.getpid()).memory_bytes - before > 60 * MB
    finally:
        process.communicate()


def test_children_of_other_threads_count() -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = tree_memory(os.getpid()).memory_bytes
    with ThreadPoolExecutor(1) as pool:
        process = pool.submit(child).result()
        try:
            assert tree_memory(os.getpid()).memory_bytes - before > 60 * MB
        finally:
            process.communicate()


def test_pages_of_a_mapped_file_count_as_rss_only(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 * MB))
    before = tree_memory(os.getpid())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, 64 * MB, 4096)) == 0
        after = tree_memory(os.getpid())
    assert after.rss_bytes - before.rss_bytes > 60 * MB
    assert after.memory_bytes - before.memory_bytes < 8 * MB


def test_a_process_that_is_gone_has_no_memory() -> None:
    process = child()
    process.communicate()
    assert tree_memory(process.pid) == (0, 0)
