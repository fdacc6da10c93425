"""A place that holds data files: a directory, or a zip archive read without unpacking it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from privrec.data.problems import bad_file
from privrec.errors import DataError

_CHUNK = 1 << 22  # bytes read at a time: small enough that the parser's arrays stay in cache
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Folder:
    """Files beside each other in a directory or in a folder of a zip archive.

    Args:
        root: the directory, or the archive.
        inside: the folder within the archive with a trailing slash; empty for a directory.
    """

    root: Path
    inside: str = ""

    def label(self, name: str) -> str:
        """The path of a file as an error message names it."""
        return str(self.root / f"{self.inside}{name}")

    def names(self) -> list[str]:
        """Names of the files that lie directly here, sorted."""
        if self.root.is_dir():
            return sorted(path.name for path in self.root.iterdir() if path.is_file())
        tails = (name.removeprefix(self.inside) for name in _members(self.root, self.inside))
        return sorted(tail for tail in tails if tail and "/" not in tail)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        if self.root.is_dir():
            return (self.root / name).is_file()
        return f"{self.inside}{name}" in _members(self.root, self.inside)

    def read(self, name: str) -> bytes:
        """The whole content of a small file, without a byte-order mark.

        Raises:
            DataError: when it is missing, cannot be read, is damaged, empty or UTF-16.
        """
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content in pieces of whole lines, each ending in a newline, line ends unified.

        Blank lines at the very end are left out; memory stays at a few chunks.

        Raises:
            DataError: when it is missing, cannot be read, is damaged, empty or UTF-16.
        """
        label = self.label(name)
        with _readable(label), self._open(name) as stream:
            yield from _whole_lines(stream, label)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.root.is_dir():
            with (self.root / name).open("rb") as stream:
                yield stream
            return
        with zipfile.ZipFile(self.root) as archive, archive.open(f"{self.inside}{name}") as stream:
            yield stream


def find_folder(root: Path, names: Sequence[str], markers: Sequence[str]) -> Folder | None:
    """The folder that holds one of the marker files: ``root`` itself or something right below it.

    Args:
        root: a directory or a zip archive.
        names: folder names to look for below ``root``, as directories or as ``NAME.zip``.
        markers: file names, any of which shows that the folder is the right one.

    Returns:
        The first that fits, plain directories before archives; None when there is none.

    Raises:
        DataError: when an archive of that name is damaged.
    """
    for folder in (root, *(root / name for name in names)):
        if any((folder / marker).is_file() for marker in markers):
            return Folder(folder)
    for archive in (root, *(root / f"{name}.zip" for name in names)):
        found = _inside(archive, markers) if archive.is_file() else None
        if found is not None:
            return found
    return None


def _inside(archive: Path, markers: Sequence[str]) -> Folder | None:
    if archive.suffix.lower() != ".zip":
        return None
    members = _members(archive, "")
    for marker in markers:
        for name in sorted(members):
            if name == marker or name.endswith(f"/{marker}"):
                return Folder(archive, name[: len(name) - len(marker)])
    return None


def _members(archive: Path, inside: str) -> set[str]:
    with _readable(str(archive)), zipfile.ZipFile(archive) as opened:
        return {name for name in opened.namelist() if name.startswith(inside)}


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """Turn what can go wrong while reading into errors that name the file."""
    try:
        yield
    except FileNotFoundError as error:
        rule, remedy = "the data set needs it", "put it there, or point --data at another folder"
        raise bad_file(label, "there is no such file", rule, remedy) from error
    except _DAMAGE as error:
        found = f"the archive is damaged or cut off ({error})"
        rule = "a zip archive must be complete"
        raise bad_file(label, found, rule, "delete it and download it again") from error
    except (OSError, KeyError, RuntimeError) as error:
        rule = "the file must be readable"
        remedy = "check its permissions, or unpack the archive"
        raise bad_file(label, f"it cannot be read ({error})", rule, remedy) from error


def _whole_lines(stream: IO[bytes], label: str) -> Iterator[bytes]:
    rest = _without_mark(stream.read(_CHUNK), label)
    empty = True
    while rest:
        more = stream.read(_CHUNK)
        if more:
            # Blank lines wait for what follows: at the end of the file they are no lines.
            body = len(rest[: rest.rfind(b"\n") + 1].rstrip(b"\r\n"))
            cut = rest.index(b"\n", body) + 1 if body else 0
            piece, rest = rest[:cut], rest[cut:] + more
        else:
            piece, rest = rest.rstrip(b"\r\n"), b""
            piece += b"\n" if piece else b""
        if piece:
            empty = False
            yield piece.replace(b"\r\n", b"\n") if b"\r" in piece else piece
    if empty:
        raise bad_file(label, "the file is empty", "it must hold data", "copy or download it again")


def _without_mark(start: bytes, label: str) -> bytes:
    if start.startswith(_UTF16):
        rule, remedy = "the text must be in an 8-bit encoding", "save it again as UTF-8"
        raise bad_file(label, "line 1 starts as UTF-16 text", rule, remedy)
    return start.removeprefix(_UTF8_MARK)


def decoded(content: bytes, label: str, encoding: str) -> str:
    """Text of a file in its encoding.

    Args:
        content: the bytes.
        label: the path, for the error.
        encoding: a name that Python knows; ``"utf-8 or latin-1"`` takes the first that fits.

    Raises:
        DataError: when a byte does not fit, with its line; or when the encoding is unknown.
    """
    if encoding == "utf-8 or latin-1":
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(content, label, encoding, error) from error
    except LookupError as error:
        rule = "it must be one that Python knows"
        remedy = "set data.encoding to utf-8 or latin-1"
        raise bad_file(label, f"unknown encoding {encoding!r}", rule, remedy) from error


def _undecodable(content: bytes, label: str, encoding: str, error: UnicodeDecodeError) -> DataError:
    line = content.count(b"\n", 0, error.start) + 1
    byte = content[error.start : error.start + 1].hex()
    return bad_file(
        f"{label}, line {line}",
        f"byte 0x{byte} is not {encoding}",
        f"the file must be {encoding} throughout",
        "save it as UTF-8, or set data.encoding to what it is (such as latin-1)",
    )
