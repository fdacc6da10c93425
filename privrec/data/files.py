"""Input files: where they lie, how their bytes become text, and how an error names them."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from codecs import getincrementaldecoder, lookup
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from privrec.errors import DataError

BLANKS = " \t\n\v\f\r"
"""What does not count around a cell, an id or a label."""

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


def bad_file(file: str, found: str, rule: str, remedy: str, line: int | None = None) -> DataError:
    """Word an error about an input file: where, what is there, what would be right, what to do.

    Lines are counted from 1, a header included.
    """
    # A member of an archive may be named by anything, a line feed too.
    place = file if file.isprintable() else repr(file)
    if line is not None:
        place += f", line {line}"
    return DataError(f"{place}: {found}; {rule}; {remedy}")


def shown(text: str, most: int = 60) -> str:
    """Quote a value for an error message: printable, and at most ``most`` characters long."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


@dataclass(frozen=True)
class File:
    """A file; or, with ``member``, one inside the zip archive ``path``, which is not unpacked."""

    path: Path
    member: str | None = None

    @property
    def label(self) -> str:
        """The path as errors name it."""
        return str(self.path if self.member is None else self.path / self.member)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name if self.member is None else self.member.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """What the name ends in, without ``.gz``."""
        return Path(self.name.lower().removesuffix(".gz")).suffix

    def exists(self) -> bool:
        """Whether there is such a file."""
        if self.member is None:
            return self.path.is_file()
        return self.member in _members(self.path)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes, unpacked if it is a gzip file; DataError when missing or damaged."""
        with _readable(self.label), ExitStack() as stack:
            if self.member is None:
                stream: IO[bytes] = stack.enter_context(self.path.open("rb"))
            else:
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                stream = stack.enter_context(archive.open(self.member))
            packed = stream.read(2) == _GZIP
            stream.seek(0)
            yield gzip.GzipFile(fileobj=stream) if packed else stream  # type: ignore[misc]

    def check_unpacked(self, size: int) -> None:
        """Refuse a file of ``size`` bytes, once unpacked: over 16 MiB and 100 times its own."""
        if size > max(_HARMLESS, _TIMES_PACKED * self.path.stat().st_size):
            found = f"it unpacks to more than {_TIMES_PACKED} times its size"
            rule, remedy = "it could fill the memory", "unpack it if you trust it"
            raise bad_file(self.label, found, rule, remedy)

    def is_empty(self) -> bool:
        """Whether it has no byte, unpacked."""
        with self.open() as stream:
            return not stream.read(1)

    def chunks(self, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """The text in pieces of whole lines, each with the number of its first line.

        Every piece ends in a newline; other line ends are as they stand in the file. A byte-order
        mark and blank lines at the very end are left out. Memory stays at a few chunks, or a few
        of the longest line. A file that is damaged, empty or not of this encoding is refused.
        """
        line = 1
        with self.open() as stream:
            for piece in _whole_lines(self._decoded(stream, encoding)):
                yield line, piece
                line += piece.count("\n")
        if line == 1:
            rule, remedy = "it must hold data", "copy or download it again"
            raise bad_file(self.label, "the file is empty", rule, remedy)

    def unified(self, piece: str, line: int) -> str:
        """A piece of :meth:`chunks` with nothing but line feeds between its lines.

        A carriage return within a line, where only some programs see the line's end, is refused.
        """
        if "\r" in piece:
            piece = piece.replace("\r\n", "\n")
        if "\r" in piece:
            rule = "lines end in a line feed, with or without a carriage return before it"
            remedy = "save the file with such line ends"
            line += piece.count("\n", 0, piece.index("\r"))
            raise bad_file(self.label, "a carriage return", rule, remedy, line=line)
        return piece

    def lines(self, encoding: str = "utf-8") -> Iterator[str]:
        """The lines of a text, without their ends; raises as :meth:`chunks` and `unified` do."""
        for line, piece in self.chunks(encoding):
            yield from self.unified(piece, line)[:-1].split("\n")

    def _decoded(self, stream: IO[bytes], encoding: str) -> Iterator[str]:
        """The text of a stream, piece by piece, without its byte-order mark."""
        decoder = getincrementaldecoder(encoding)()
        wide = lookup(encoding).name.startswith(("utf-16", "utf-32"))
        size, line, start, block = 0, 1, True, b" "
        while block:
            block = stream.read(_CHUNK)
            size += len(block)
            self.check_unpacked(size)
            if start:
                self._refuse_packed(block, wide=wide)
            try:
                text = decoder.decode(block, final=not block)
                text.encode()  # some encodings can write what is no character
            except ValueError as error:
                raise self._undecodable(encoding, line, error) from error
            line += text.count("\n")
            yield text.removeprefix("\ufeff") if start else text
            start = start and not text

    def _refuse_packed(self, start: bytes, *, wide: bool) -> None:
        for mark, packer in _PACKED.items():
            if start.startswith(mark):
                found, rule = f"the file is packed by {packer}", "text or gzip is read here"
                raise bad_file(self.label, found, rule, "unpack it")
        if start.startswith(_UTF16) and not wide:
            rule, remedy = "the text must be UTF-8", "save it so, or set data.encoding to utf-16"
            raise bad_file(self.label, "line 1 starts as UTF-16 text", rule, remedy)

    def _undecodable(self, encoding: str, line: int, error: ValueError) -> DataError:
        found = f"it is not {encoding}"
        if isinstance(error, UnicodeDecodeError):
            line += error.object[: error.start].decode(encoding, "ignore").count("\n")
            found = f"byte 0x{error.object[error.start : error.start + 1].hex()} is not {encoding}"
        rule = f"the file must be {encoding} throughout"
        remedy = "save it as UTF-8, or set data.encoding to what it is (such as latin-1)"
        return bad_file(self.label, found, rule, remedy, line=line)


@dataclass(frozen=True)
class Folder:
    """A directory; or, with ``inside``, a folder within a zip archive, by its name up to ``/``."""

    root: Path
    inside: str | None = None

    @property
    def label(self) -> str:
        """The path as errors name it."""
        return str(self.root if not self.inside else self.root / self.inside)

    def file(self, name: str) -> File:
        """The file of that name, whether it is there or not."""
        if self.inside is None:
            return File(self.root / name)
        return File(self.root, f"{self.inside}{name}")

    def files(self) -> list[File]:
        """The files that lie directly here, by name."""
        if self.inside is None:
            with _readable(str(self.root)):
                return [File(path) for path in sorted(self.root.iterdir()) if path.is_file()]
        found = (File(self.root, member) for member in sorted(_members(self.root)))
        return [file for file in found if file.member == f"{self.inside}{file.name}" and file.name]


def places(path: str | None, data_dir: Path | None) -> list[Path]:
    """List where data is looked for, first choice first: ``--data``, then ``data.path``."""
    inside = [] if data_dir is None else [data_dir]
    if path is None:
        return inside
    return [*(place / path for place in inside), *inside, Path(path)]


def find_folder(root: Path, names: Sequence[str], markers: Sequence[str]) -> Folder | None:
    """Find the folder that has one of the marker files; None when there is none.

    Args:
        root: a directory or a zip archive; looked at first.
        names: of folders below ``root``, as directories or, looked at last, as ``NAME.zip``.
    """
    for folder in (root, *(root / name for name in names)):
        if any((folder / marker).is_file() for marker in markers):
            return Folder(folder)
    for archive in (root, *(root / f"{name}.zip" for name in names)):
        if archive.suffix.lower() != ".zip" or not archive.is_file():
            continue
        members = sorted(_members(archive))
        for marker in markers:
            for name in members:
                if name == marker or name.endswith(f"/{marker}"):
                    return Folder(archive, name.removesuffix(marker))
    return None


def table_files(path: Path, *, needed: bool = True) -> list[File]:
    """List the files of a table: one, or the part files that Spark and others write, in order.

    Args:
        path: the file itself, plain or packed by gzip; or a folder or zip archive that has one
            table, or nothing but part files (``part-00000…``, ``…-00000-of-00005…``).
        needed: whether a path without a table is an error; or else nothing is returned.

    Raises:
        DataError: when there is no table, or several, or an archive is damaged or has none.
    """
    if path.is_file() and not _is_zip(path):
        return [File(path)]
    if path.is_file():
        members = (name for name in _members(path) if not name.startswith("__MACOSX/"))
        files = [File(path, name) for name in members if not name.endswith("/")]
    else:
        files = Folder(path).files() if path.is_dir() else []
    files = [file for file in files if not file.name.startswith((".", "_"))]
    tables = [file for file in files if file.suffix in _TABLES or _PART.match(file.name)]
    if len(tables) > 1 and not all(_PART.match(file.name) for file in tables):
        rule = "one is read, or several that are named as parts of one: part-00000, part-00001"
        remedy = "set data.path to one of them" + " after unpacking" * path.is_file()
        raise bad_file(str(path), f"{len(tables)} tables", rule, remedy)
    if not tables and path.is_file():
        rule, remedy = "a .csv, .tsv or .parquet is read from it", "unpack it and name the table"
        raise bad_file(str(path), f"a zip archive of {len(files)} other files", rule, remedy)
    if not tables and needed:
        rule = "a file, a folder or a zip archive with a .csv, .tsv or .parquet is read"
        found = "no table is there" if path.exists() else "no such file"
        raise bad_file(str(path), found, rule, "check the path")
    return sorted(tables, key=_part_order)


def _part_order(file: File) -> tuple[str, str]:
    """Part 10 comes after part 9."""
    folder = (file.member or "").rpartition("/")[0]
    return folder, re.sub(r"\d+", lambda number: number[0].zfill(40), file.name)


def _is_zip(path: Path) -> bool:
    with _readable(str(path)), path.open("rb") as stream:
        return stream.read(4) == _ZIP or path.suffix.lower() == ".zip"


def _members(archive: Path) -> set[str]:
    with _readable(str(archive)), zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        rule, remedy = "an archive has each file once", "pack it again"
        raise bad_file(str(archive), f"{shown(again)} is in it twice", rule, remedy)
    return set(names)


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """Turn what can go wrong while reading into errors that name the file."""
    try:
        yield
    except FileNotFoundError as error:
        rule, remedy = "the data set needs it", "put it there, or point --data at another folder"
        raise bad_file(label, "there is no such file", rule, remedy) from error
    except _DAMAGE as error:
        found, rule = f"the archive is damaged or cut off ({error})", "an archive must be complete"
        raise bad_file(label, found, rule, "delete it and download it again") from error
    except (OSError, KeyError, RuntimeError) as error:
        found, rule = f"it cannot be read ({error})", "the file must be readable"
        remedy = "check its permissions, or unpack the archive"
        raise bad_file(label, found, rule, remedy) from error


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


# ------------------------------------------------------------------- files of one id a line


def read_ids(path: Path) -> list[str]:
    """Read a UTF-8 file of one id a line; blanks around ids and empty lines do not count."""
    rule = "it must be a text file of ids, one a line"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        found = f"it could not be read ({error.strerror})"
        raise bad_file(str(path), found, rule, "correct the path") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is not UTF-8"
        raise bad_file(str(path), found, rule, "save it as UTF-8") from None
    # Only line feeds: str.splitlines would cut an id at a vertical tab or a line separator.
    return _some(path, [entry for line in text.split("\n") if (entry := line.strip(BLANKS))])


def read_catalogue(path: Path) -> dict[str, int]:
    """Read the place of each item from a file that lists a whole catalogue in its order.

    An item that stands there twice is refused: all that follow would have another place than in
    the model.
    """
    places: dict[str, int] = {}
    for name in read_ids(path):
        if name in places:
            rule, remedy = "a catalogue has each item once", "use the server's own list"
            raise bad_file(str(path), f"item {shown(name)} again", rule, remedy)
        places[name] = len(places)
    return places


def read_history(path: Path, catalogue: Container[str]) -> list[str]:
    """Read the items that a file lists, whether the catalogue has them or not.

    A line that begins with ``#`` is a comment unless the catalogue has an item of that name.
    """
    return _some(path, [name for name in read_ids(path) if name[0] != "#" or name in catalogue])


def _some(path: Path, ids: list[str]) -> list[str]:
    if not ids:
        remedy = "write item ids into it, one a line"
        raise bad_file(str(path), "it names no item", "at least one is needed", remedy)
    return ids
