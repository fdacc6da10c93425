"""A write-ahead journal for a lazily noised table, so that no noise is drawn twice across a crash.

What changes the table is appended, flushed to disk, and only then done and seen. Each entry is
chained to the one before, and the chain's digest names the noise that an entry draws. So replaying
the journal on the last snapshot draws the very same noise, an entry that a crash tore had not been
seen by anybody, and whatever follows instead of it has noise of its own.

The journal holds updates before their noise: it is as secret as they are, and its owner's alone.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from privrec.errors import IntegrityError
from privrec.storage import sync_directory

_HEAD = struct.Struct("<cQ")
_DIGEST_BYTES = 32


class Disk(Protocol):
    """The writes that a journal makes; each of them is durable when it returns."""

    def append(self, path: Path, content: bytes) -> None:
        """Put ``content`` at the end of a file, which is made when missing."""

    def cut(self, path: Path, size: int) -> None:
        """Cut a file to its first ``size`` bytes."""

    def replace(self, path: Path, content: bytes) -> None:
        """Replace a whole file: a crash leaves the old one or the new one."""

    def read(self, path: Path) -> bytes | None:
        """All of a file, None when there is none."""

    def remove(self, path: Path) -> None:
        """Remove a file, if there is one."""


class Files:
    """The disk itself; files are readable by their owner alone."""

    def append(self, path: Path, content: bytes) -> None:
        fresh = not path.exists()
        self._write(path, content, os.O_APPEND)
        if fresh:
            sync_directory(path.parent)

    def cut(self, path: Path, size: int) -> None:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def replace(self, path: Path, content: bytes) -> None:
        fresh = path.with_name(path.name + ".new")
        self._write(fresh, content, os.O_TRUNC)
        fresh.replace(path)
        sync_directory(path.parent)

    def read(self, path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _write(self, path: Path, content: bytes, how: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


class Journal:
    """Snapshots of a table and the entries since the last one, below one directory.

    Promise: :meth:`append` returns when the entry is durable; :meth:`entries` gives exactly the
    entries that were durable, in their order.

    Args:
        directory: an existing directory of its own.
        disk: what writes; files when None.
        name: of the table, among those whose noise comes from the same root.
    """

    def __init__(self, directory: Path, disk: Disk | None = None, *, name: str = "") -> None:
        self._directory, self._disk = directory, disk or Files()
        self._snapshot = directory / "snapshot"
        self.head = hashlib.sha256(b"lazy noise journal" + name.encode()).digest()
        """Digest of the chain so far; it names the noise of what comes next."""
        self._first = b""

    @property
    def is_begun(self) -> bool:
        """Whether there is a snapshot that entries follow."""
        return bool(self._first)

    def begin(self, snapshot: bytes) -> None:
        """Replace the snapshot; the entries before it are forgotten."""
        old = self._log() if self.is_begun else None
        digest = hashlib.sha256(self.head + snapshot).digest()
        self._disk.replace(self._snapshot, digest + hashlib.sha256(snapshot).digest() + snapshot)
        self._first = self.head = digest
        if old is not None:
            self._disk.remove(old)

    def snapshot(self) -> bytes:
        """The last snapshot.

        Raises:
            IntegrityError: when there is none, or it is not what was written.
        """
        content = self._disk.read(self._snapshot)
        if content is None:
            raise IntegrityError(
                f"{self._snapshot}: there is no snapshot; the journal was never begun, or the file "
                "was removed. Restore it or start anew"
            )
        self._first = self.head = content[:_DIGEST_BYTES]
        check, kept = content[_DIGEST_BYTES : 2 * _DIGEST_BYTES], content[2 * _DIGEST_BYTES :]
        if hashlib.sha256(kept).digest() != check:
            raise IntegrityError(
                f"{self._snapshot}: its content is not what was written; restore the file"
            )
        return kept

    def append(self, kind: bytes, content: bytes) -> bytes:
        """Write an entry ahead of what it says; returns the digest that names its noise."""
        head = _HEAD.pack(kind, len(content))
        digest = self._after(head + content)
        self._disk.append(self._log(), head + content + digest)
        self.head = digest
        return digest

    def entries(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Kind, content and digest of each entry since the snapshot; a torn tail is cut off.

        Raises:
            IntegrityError: when whole entries follow one that is not what was written.
        """
        content = self._disk.read(self._log()) or b""
        at = 0
        while at + _HEAD.size <= len(content):
            kind, size = _HEAD.unpack_from(content, at)
            end = at + _HEAD.size + size
            body, digest = content[at:end], content[end : end + _DIGEST_BYTES]
            if len(digest) < _DIGEST_BYTES:
                break
            if digest != self._after(body):
                raise IntegrityError(
                    f"{self._log()}: the entry at byte {at} is not what was written; restore the "
                    "file, or start anew from the last release"
                )
            self.head = digest
            yield kind, body[_HEAD.size :], digest
            at = end + _DIGEST_BYTES
        if at < len(content):
            self._disk.cut(self._log(), at)

    def _after(self, entry: bytes) -> bytes:
        return hashlib.sha256(self.head + entry).digest()

    def _log(self) -> Path:
        return self._directory / f"journal-{self._first.hex()[:16]}"
