"""A place that holds data files: a directory, or a zip archive read without unpacking it."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from codecs import getincrementaldecoder, lookup
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from privrec.data.problems import bad_file, bad_line, shown

_CHUNK = 1 << 22  # bytes read at a time: memory stays at a few of them
# What unpacks to more was made to fill the memory: a table shrinks tenfold or so.
_HARMLESS, _TIMES_PACKED = 1 << 24, 100
_DAMAGE = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)
_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
_PACKED = {
    _GZIP: "gzip twice",
    _ZIP: "zip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_PART = re.compile(r"part[-.]|.*-\d+-of-\d+")


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
            with _readable(str(self.root)):
                return sorted(path.name for path in self.root.iterdir() if path.is_file())
        tails = (name.removeprefix(self.inside) for name in _members(self.root, self.inside))
        return sorted(tail for tail in tails if tail and "/" not in tail)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        if self.root.is_dir():
            return (self.root / name).is_file()
        return f"{self.inside}{name}" in _members(self.root, self.inside)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """The bytes of a file, unpacked if it is a gzip file.

        Raises:
            DataError: when it is missing, cannot be read, or is damaged.
        """
        with _readable(self.label(name)), self._raw(name) as stream:
            packed = stream.read(2) == _GZIP
            stream.seek(0)
            yield gzip.GzipFile(fileobj=stream) if packed else stream  # type: ignore[misc]

    def check_unpacked(self, name: str, size: int) -> None:
        """Refuse what unpacks to very much more than the file has.

        Args:
            name: the file.
            size: bytes that it has at least when it is unpacked.

        Raises:
            DataError: when a packed file holds more than 16 MiB and 100 times its own size.
        """
        path = self.root / name if self.root.is_dir() else self.root
        if size > max(_HARMLESS, _TIMES_PACKED * path.stat().st_size):
            found = f"it unpacks to more than {_TIMES_PACKED} times its size"
            rule, remedy = "it could fill the memory", "unpack it if you trust it"
            raise bad_file(self.label(name), found, rule, remedy)

    def is_empty(self, name: str) -> bool:
        """Whether a file has no byte, unpacked."""
        with self.open(name) as stream:
            return not stream.read(1)

    def chunks(self, name: str, encoding: str = "utf-8") -> Iterator[str]:
        """The text in pieces of whole lines, each ending in a newline.

        Line ends are as they stand in the file. A byte-order mark and blank lines at the very end
        are left out. Memory stays at a few chunks, or a few of the longest line.

        Raises:
            DataError: when the file is missing, cannot be read, is damaged or empty, or when its
                bytes are not text in this encoding, with the line.
        """
        empty = True
        with self.open(name) as stream:
            for piece in _whole_lines(self._decoded(stream, name, encoding)):
                empty = False
                yield piece
        if empty:
            rule, remedy = "it must hold data", "copy or download it again"
            raise bad_file(self.label(name), "the file is empty", rule, remedy)

    def lines(self, name: str, encoding: str = "utf-8") -> Iterator[str]:
        """The lines of a text, without their ends.

        Raises:
            DataError: as :meth:`chunks` does, or when a line has a carriage return within.
        """
        line = 1
        for piece in self.chunks(name, encoding):
            text = unified(piece, self.label(name), line)
            line += text.count("\n")
            yield from text[:-1].split("\n")

    def _decoded(self, stream: IO[bytes], name: str, encoding: str) -> Iterator[str]:
        """The text of a stream, piece by piece, without its byte-order mark."""
        label, size = self.label(name), 0
        try:
            b"".decode(encoding)  # refuses what is no encoding of text
            decoder = getincrementaldecoder(encoding)()
            wide = lookup(encoding).name.startswith(("utf-16", "utf-32"))
        except LookupError as error:
            rule = "it must be one that Python knows"
            remedy = "set data.encoding to utf-8 or latin-1"
            raise bad_file(label, f"unknown encoding {encoding!r}", rule, remedy) from error
        line, start, block = 1, True, b" "
        while block:
            block = stream.read(_CHUNK)
            size += len(block)
            self.check_unpacked(name, size)
            if start:
                _refuse_packed(block, label, wide=wide)
            try:
                text = decoder.decode(block, final=not block)
                text.encode()  # some encodings can write what is no character
            except ValueError as error:
                raise _undecodable(block, label, encoding, line, error) from error
            line += text.count("\n")
            yield text.removeprefix("\ufeff") if start else text
            start = start and not text

    @contextmanager
    def _raw(self, name: str) -> Iterator[IO[bytes]]:
        if self.root.is_dir():
            with (self.root / name).open("rb") as stream:
                yield stream
            return
        with zipfile.ZipFile(self.root) as archive, archive.open(f"{self.inside}{name}") as stream:
            yield stream


def unified(piece: str, label: str, line: int) -> str:
    """Whole lines with line feeds alone between them.

    Args:
        piece: as :meth:`Folder.chunks` gives it.
        label: the file, for errors.
        line: number of its first line.

    Raises:
        DataError: when a carriage return stands within a line, which some programs take for the
            line's end and others do not.
    """
    if "\r" in piece:
        piece = piece.replace("\r\n", "\n")
        if "\r" in piece:
            raise bad_line(
                label, line + piece.count("\n", 0, piece.index("\r")), "a carriage return",
                "lines end in a line feed, with or without a carriage return before it",
                "save the file with such line ends",
            )  # fmt: skip
    return piece


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


def table_files(path: Path, *, needed: bool = True) -> list[tuple[Folder, str]]:
    """The files of a table: one, or the part files that Spark and others write, in their order.

    Args:
        path: the file itself, plain or packed by gzip; or a folder or zip archive that has one
            table, or nothing but part files (``part-00000…``, ``…-00000-of-00005…``).
        needed: whether a path without a table is an error; or else nothing is returned.

    Raises:
        DataError: when there is no table, or several, or an archive is damaged or has none.
    """
    if not path.is_file():
        files = [(Folder(path), name) for name in (Folder(path).names() if path.is_dir() else ())]
    elif _is_zip(path):
        cut = (name.rpartition("/") for name in _members(path, "") if name[-1:] != "/")
        files = [(Folder(path, folder + slash), name) for folder, slash, name in cut]
        files = [file for file in files if not file[0].inside.startswith("__MACOSX/")]
    else:
        return [(Folder(path.parent), path.name)]
    named = [(each, name) for each, name in files if not name.startswith((".", "_"))]
    tables = [(each, name) for each, name in named if suffix(name) in _TABLES or _PART.match(name)]
    if len(tables) > 1 and not all(_PART.match(name) for _, name in tables):
        raise bad_file(
            str(path), f"{len(tables)} tables",
            "one is read, or several that are named as parts of one: part-00000, part-00001",
            "set data.path to one of them" + " after unpacking" * path.is_file(),
        )  # fmt: skip
    if not tables and needed and not path.is_file():
        rule = "a file, a folder or a zip archive with a .csv, .tsv or .parquet is read"
        found = "no table is there" if path.exists() else "no such file"
        raise bad_file(str(path), found, rule, "check the path")
    if not tables and path.is_file():
        rule, remedy = "a .csv, .tsv or .parquet is read from it", "unpack it and name the table"
        raise bad_file(str(path), f"a zip archive of {len(named)} other files", rule, remedy)
    # Part 10 comes after part 9.
    return sorted(tables, key=lambda file: (file[0].inside, re.sub(r"\d+", _wide, file[1])))


def _wide(number: re.Match[str]) -> str:
    return number[0].zfill(40)


def suffix(name: str) -> str:
    """What a file's name ends in, without ``.gz``."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _is_zip(path: Path) -> bool:
    with _readable(str(path)), path.open("rb") as stream:
        return stream.read(4) == _ZIP or path.suffix.lower() == ".zip"


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
        names = opened.namelist()
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        rule, remedy = "an archive has each file once", "pack it again"
        raise bad_file(str(archive), f"{shown(again)} is in it twice", rule, remedy)
    return {name for name in names if name.startswith(inside)}


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
        rule = "an archive must be complete"
        raise bad_file(label, found, rule, "delete it and download it again") from error
    except (OSError, KeyError, RuntimeError) as error:
        rule = "the file must be readable"
        remedy = "check its permissions, or unpack the archive"
        raise bad_file(label, f"it cannot be read ({error})", rule, remedy) from error


def _whole_lines(texts: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for text in texts:
        # Blank lines wait for what follows: at the end of the file they are no lines.
        cut = text.rfind("\n", 0, len(text.rstrip("\r\n"))) + 1
        if cut:
            yield "".join((*held, text[:cut]))
            held = []
        held.append(text[cut:])
    last = "".join(held).rstrip("\r\n")
    if last:
        yield f"{last}\n"


def _refuse_packed(start: bytes, label: str, *, wide: bool) -> None:
    for mark, name in _PACKED.items():
        if start.startswith(mark):
            rule, remedy = "text or gzip is read here", "unpack it"
            raise bad_file(label, f"the file is packed by {name}", rule, remedy)
    if start.startswith(_UTF16) and not wide:
        rule, remedy = "the text must be UTF-8", "save it so, or set data.encoding to utf-16"
        raise bad_file(label, "line 1 starts as UTF-16 text", rule, remedy)


def _undecodable(
    block: bytes, label: str, encoding: str, line: int, error: ValueError
) -> Exception:
    found = f"it is not {encoding}"
    if isinstance(error, UnicodeDecodeError):
        line += error.object[: error.start].decode(encoding, "ignore").count("\n")
        found = f"byte 0x{error.object[error.start : error.start + 1].hex()} is not {encoding}"
    return bad_line(
        label, line, found, f"the file must be {encoding} throughout",
        "save it as UTF-8, or set data.encoding to what it is (such as latin-1)",
    )  # fmt: skip
