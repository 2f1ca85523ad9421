"""Files that appear whole or not at all, and digests that are computed once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# A file changed within one tick of its timestamp right after it was digested would keep its mtime: a digest is
# remembered only when the file had been quiet for longer than any file system's tick.
QUIET_NS = 2_000_000_000


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` aside, fsync it, and rename it to `path`. Creates the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's contents, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy contents only: as a reflink where the file system can, else inside the kernel where it can."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            import fcntl

            fcntl.ioctl(writer.fileno(), 0x40049409, reader.fileno())  # FICLONE: share the extents
        except (ImportError, OSError):  # another file system, or one without reflinks
            shutil.copyfileobj(reader, writer, 1 << 20)


class DigestMemory:
    """Digests of files by (device, inode, size, mtime), so that an unchanged file is read once.

    One small file an entry: any number of processes may add at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(self, path: Path) -> str:
        """SHA-256 of the file at `path`, from memory where its identity is unchanged.

        Raises: OSError where it cannot be read.
        """
        stat = path.stat()
        identity, entry = self._identity(path)
        try:
            remembered = json.loads(entry.read_text())
            if remembered["identity"] == identity:
                return str(remembered["digest"])
        except (OSError, ValueError, KeyError, TypeError):  # not seen before, or a damaged entry: read the file
            remembered = None
        began = time.time_ns()
        digest = sha256_of(path)
        after = path.stat()
        unchanged = (after.st_size, after.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        if unchanged and began - stat.st_mtime_ns > QUIET_NS:
            with suppress(OSError):  # a full disk, or a store that may only be read: it is read again next time
                write_atomically(entry, json.dumps({"identity": identity, "digest": digest}).encode())
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """Record a digest that was computed while the file was written, by the only one who writes it."""
        identity, entry = self._identity(path)
        write_atomically(entry, json.dumps({"identity": identity, "digest": digest}).encode())

    def forget(self, path: Path) -> None:
        """Have the file at `path` read when it is next asked for."""
        self._identity(path)[1].unlink(missing_ok=True)

    def _identity(self, path: Path) -> tuple[str, Path]:
        stat = path.stat()
        identity = f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"
        return identity, self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
