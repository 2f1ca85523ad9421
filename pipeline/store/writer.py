"""The writer that a pass gets: bytes stream through it into blobs, and nothing else is written."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipeline.artifact import FileEntry, TensorRef, safe_name

if TYPE_CHECKING:
    import numpy as np

BLOBS = "blobs"
"""Where finished blobs wait in a staging folder."""

ALIGNMENT = 4096
"""Tensors begin at multiples of a page, so that each can be mapped by itself."""


class BlobStream:
    """One blob in the making. `close` gives its entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / f".{secrets.token_hex(8)}"
        self._file: BinaryIO = self.path.open("xb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)

    def align(self) -> int:
        """Pad with zeros to the next page boundary and return that offset."""
        if padding := -self.size_bytes % ALIGNMENT:
            self.write(bytes(padding))
        return self.size_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> FileEntry:
        """Make the blob durable and give it its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._hash.hexdigest()
        self.path = self.path.replace(self._folder / digest)
        return FileEntry(digest=digest, size_bytes=self.size_bytes)


class OutputWriter:
    """Collects the files of one artifact in a staging folder.

    Tensors added with `tensor` go one after another into a single pack, straight to disk: a pass that adds them as it
    makes them never holds more than one.
    """

    PACK = "weights/pending"

    def __init__(self, staging: Path) -> None:
        self._folder = staging / BLOBS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pack: BlobStream | None = None

    def file(self, name: str, data: bytes) -> FileEntry:
        """Write a small file and return its entry, to be put into a manifest under `name`.

        Raises: ValueError where `name` would leave its folder.
        """
        safe_name(name)
        stream = BlobStream(self._folder)
        stream.write(data)
        return stream.close()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what a library insists on writing to files. It goes away afterwards, and is on the same disk."""
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=self._folder.parent) as folder:
            yield Path(folder)

    def stream(self) -> BlobStream:
        """A file that is written piece by piece; its `close` gives the entry, to be put into a manifest."""
        return BlobStream(self._folder)

    def tensor(self, array: np.ndarray) -> TensorRef:
        """Append a tensor to the pack. The reference's file is `PACK` until `close_pack` names it."""
        import numpy as np

        if self._pack is None:
            self._pack = BlobStream(self._folder)
        offset = self._pack.align()
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._pack.write(data.data)
        return TensorRef(file=self.PACK, offset=offset, length=data.nbytes, dtype=array.dtype.name, shape=array.shape)

    def pack_path(self) -> Path:
        """Where the pack lies while it is written, flushed, so that a tensor can be read back."""
        if self._pack is None:
            raise ValueError("no tensor was written yet")
        self._pack.flush()
        return self._pack.path

    def close_pack(self) -> tuple[str, FileEntry] | None:
        """(name, entry) of the pack under its final name, None where no tensor was written."""
        if self._pack is None:
            return None
        entry, self._pack = self._pack.close(), None
        return weights_name(entry), entry


def weights_name(entry: FileEntry) -> str:
    """The name that a file of weights has in an ONNX component: its contents', so that equal graphs are equal bytes."""
    return f"weights/{entry.digest}"
