"""Input files: where they lie, how their bytes become text, and how an error names them."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from codecs import getincrementaldecoder, lookup
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

from privrec.errors import DataError

Place: TypeAlias = Path | zipfile.Path
"""A file or folder; or one inside a zip archive, which is not unpacked."""
T = TypeVar("T")

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
PARQUET = (".parquet", ".pq")
_TABLES = (".csv", ".tsv", *PARQUET)
_PART = re.compile(r"part[-.]|.*-\d+-of-\d+")


def bad_file(
    file: object, found: str, rule: str, remedy: str, line: int | None = None
) -> DataError:
    """Word an error about an input file: where, what is there, what would be right, what to do.

    Lines are counted from 1, a header included.
    """
    # A member of an archive may be named by anything, a line feed too.
    place = str(file) if str(file).isprintable() else repr(str(file))
    if line is not None:
        place += f", line {line}"
    return DataError(f"{place}: {found}; {rule}; {remedy}")


def shown(text: str, most: int = 60) -> str:
    """Quote a value for an error message: printable, and at most ``most`` characters long."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


@dataclass(frozen=True)
class File:
    """A file, whether it is there or not; errors name it by its path."""

    path: Place

    def __str__(self) -> str:
        return str(self.path)

    @property
    def suffix(self) -> str:
        """What the name ends in, without ``.gz``."""
        return Path(self.path.name.lower().removesuffix(".gz")).suffix

    def is_empty(self) -> bool:
        """Whether it has no byte."""
        with self.open() as stream:
            return not stream.read(1)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes, unpacked if it is a gzip file; DataError when missing or damaged."""
        with _readable(self.path), ExitStack() as stack:
            path = self.path
            if isinstance(path, zipfile.Path):
                opened = stack.enter_context(zipfile.ZipFile(str(path.root.filename)))
                path = zipfile.Path(opened, path.at)
            stream = stack.enter_context(path.open("rb"))
            packed = stream.read(2) == _GZIP
            stream.seek(0)
            yield gzip.GzipFile(fileobj=stream) if packed else stream  # type: ignore[misc]

    def check_unpacked(self, size: int) -> None:
        """Refuse a file of ``size`` bytes, once unpacked: over 16 MiB and 100 times its own."""
        path = self.path if isinstance(self.path, Path) else Path(str(self.path.root.filename))
        if size > max(_HARMLESS, _TIMES_PACKED * path.stat().st_size):
            found = f"it unpacks to more than {_TIMES_PACKED} times its size"
            rule, remedy = "it could fill the memory", "unpack it if you trust it"
            raise bad_file(self, found, rule, remedy)

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
            raise bad_file(self, "the file is empty", "it must hold data", "download it again")

    def unified(self, piece: str, line: int) -> str:
        """A piece of :meth:`chunks` with nothing but line feeds between its lines.

        A carriage return within a line, where only some programs see the line's end, is refused.
        """
        piece = piece.replace("\r\n", "\n")
        if "\r" in piece:
            rule = "lines end in a line feed, with or without a carriage return before it"
            line += piece.count("\n", 0, piece.index("\r"))
            raise bad_file(self, "a carriage return", rule, "save it with such line ends", line)
        return piece

    def lines(self, encoding: str = "utf-8") -> Iterator[str]:
        """The lines of a text, without their ends; raises as :meth:`chunks` and `unified` do."""
        for line, piece in self.chunks(encoding):
            yield from self.unified(piece, line)[:-1].split("\n")

    def _decoded(self, stream: IO[bytes], encoding: str) -> Iterator[str]:
        """The text of a stream, piece by piece, without its byte-order mark."""
        decoder = getincrementaldecoder(encoding)()
        size, line, start, block = 0, 1, True, b" "
        while block:
            block = stream.read(_CHUNK)
            size += len(block)
            self.check_unpacked(size)
            if start:
                self._refuse_packed(block, encoding)
            try:
                text = decoder.decode(block, final=not block)
                text.encode()  # some encodings can write what is no character
            except ValueError as error:
                found = f"it is not {encoding}"
                if isinstance(error, UnicodeDecodeError):
                    before, byte = error.object[: error.start], error.object[error.start :][:1]
                    line += before.decode(encoding, "ignore").count("\n")
                    found = f"byte 0x{byte.hex()} is not {encoding}"
                rule = f"the file must be {encoding} throughout"
                remedy = "save it as UTF-8, or set data.encoding to what it is (such as latin-1)"
                raise bad_file(self, found, rule, remedy, line) from error
            line += text.count("\n")
            yield text.removeprefix("\ufeff") if start else text
            start = start and not text

    def _refuse_packed(self, start: bytes, encoding: str) -> None:
        packer = next((_PACKED[mark] for mark in _PACKED if start.startswith(mark)), None)
        if packer is not None:
            found = f"the file is packed by {packer}"
            raise bad_file(self, found, "text or gzip is read here", "unpack it")
        wide = lookup(encoding).name.startswith(("utf-16", "utf-32"))
        if start.startswith(_UTF16) and not wide:
            rule, remedy = "the text must be UTF-8", "save it so, or set data.encoding to utf-16"
            raise bad_file(self, "line 1 starts as UTF-16 text", rule, remedy)


def places(path: str | None, data_dir: Path | None) -> list[Path]:
    """List where data is looked for, first choice first: ``--data``, then ``data.path``."""
    inside = [] if data_dir is None else [data_dir]
    if path is None:
        return inside
    return [*(place / path for place in inside), *inside, Path(path)]


def find(
    roots: Sequence[Path], look: Callable[[Path], T | None], wanted: str, rule: str, remedy: str
) -> T:
    """What ``look`` finds at the first root where it finds something; DataError where nowhere."""
    for root in roots:
        if found := look(root):
            return found
    searched = ", ".join(map(str, roots)) or "data.path"
    raise bad_file(searched, f"no {wanted} there", rule, remedy)


def find_folder(root: Path, names: Sequence[str], markers: Sequence[str]) -> Place | None:
    """Find the folder that has one of the marker files; None when there is none.

    Args:
        root: a directory or a zip archive; looked at first.
        names: of folders below ``root``, as directories or, looked at last, as ``NAME.zip``.
    """
    for folder in (root, *(root / name for name in names)):
        if any((folder / marker).is_file() for marker in markers):
            return folder
    for archive in (root, *(root / f"{name}.zip" for name in names)):
        if archive.suffix.lower() == ".zip" and archive.is_file():
            files = _members(archive)
            marked = (file for marker in markers for file in files if file.name == marker)
            if (found := next(marked, None)) is not None:
                return zipfile.Path(found.root, found.at.removesuffix(found.name))
    return None


def files_in(folder: Place) -> list[File]:
    """List the files that lie directly in a folder, by name."""
    with _readable(folder):
        found: list[Place] = list(folder.iterdir())
        return [File(path) for path in sorted(found, key=str) if path.is_file()]


def is_table(path: Path) -> bool:
    """Whether a path is named as a table is, packed or not, or is a folder, as of parts."""
    return path.is_dir() or File(path).suffix in (*_TABLES, ".zip")


def table_files(path: Path, *, needed: bool = True) -> list[File]:
    """List the files of a table: one, or the part files that Spark and others write, in order.

    Args:
        path: the file itself, plain or packed by gzip; or a folder or zip archive that has one
            table, or nothing but part files (``part-00000…``, ``…-00000-of-00005…``).
        needed: whether a path without a table is an error; or else nothing is returned.
    """
    packed = path.is_file()
    if packed:
        with _readable(path), path.open("rb") as stream:
            if stream.read(4) != _ZIP and path.suffix.lower() != ".zip":
                return [File(path)]
        members = _members(path)
        files = [File(member) for member in members if not member.at.startswith("__MACOSX/")]
    else:
        files = files_in(path) if path.is_dir() else []
    files = [file for file in files if not file.path.name.startswith((".", "_"))]
    tables = [file for file in files if file.suffix in _TABLES or _PART.match(file.path.name)]
    if len(tables) > 1 and not all(_PART.match(file.path.name) for file in tables):
        rule = "one is read, or several that are named as parts of one: part-00000, part-00001"
        remedy = "set data.path to one of them" + " after unpacking" * packed
        raise bad_file(path, f"{len(tables)} tables", rule, remedy)
    if not tables and packed:
        rule, remedy = "a .csv, .tsv or .parquet is read from it", "unpack it and name the table"
        raise bad_file(path, f"a zip archive of {len(files)} other files", rule, remedy)
    if not tables and needed:
        rule = "a file, a folder or a zip archive with a .csv, .tsv or .parquet is read"
        found = "no table is there" if path.exists() else "no such file"
        raise bad_file(path, found, rule, "check the path")
    return sorted(tables, key=_part_order)


def _part_order(file: File) -> tuple[str, str]:
    """Part 10 comes after part 9."""
    name = re.sub(r"\d+", lambda number: number[0].zfill(40), file.path.name)
    return str(file).removesuffix(file.path.name), name


def _members(archive: Path) -> list[zipfile.Path]:
    """The files in a zip archive, by name."""
    with _readable(archive), zipfile.ZipFile(archive) as opened:
        names = sorted(opened.namelist())
    again = next((name for name, other in pairwise(names) if name == other), None)
    if again is not None:
        rule, remedy = "an archive has each file once", "pack it again"
        raise bad_file(archive, f"{shown(again)} is in it twice", rule, remedy)
    return [zipfile.Path(opened, name) for name in names if not name.endswith("/")]


@contextmanager
def _readable(place: object) -> Iterator[None]:
    """Turn what can go wrong while reading into errors that name the file."""
    try:
        yield
    except FileNotFoundError as error:
        rule, remedy = "the data set needs it", "put it there, or point --data at another folder"
        raise bad_file(place, "there is no such file", rule, remedy) from error
    except _DAMAGE as error:
        found, rule = f"the archive is damaged or cut off ({error})", "an archive must be complete"
        raise bad_file(place, found, rule, "delete it and download it again") from error
    except (OSError, KeyError, RuntimeError) as error:
        found, rule = f"it cannot be read ({error})", "the file must be readable"
        remedy = "check its permissions, or unpack the archive"
        raise bad_file(place, found, rule, remedy) from error


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
        raise bad_file(path, found, rule, "correct the path") from None
    except UnicodeDecodeError as error:
        raise bad_file(path, f"byte {error.start} is not UTF-8", rule, "save it as UTF-8") from None
    # Only line feeds: str.splitlines would cut an id at a vertical tab or a line separator.
    return _some(path, [entry for line in text.split("\n") if (entry := line.strip(BLANKS))])


def read_catalogue(path: Path) -> dict[str, int]:
    """Read the place of each item from a file that lists a whole catalogue in its order.

    An item that stands there twice is refused: all that follow would have another place than in
    the model.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(read_ids(path)):
        if places.setdefault(name, place) != place:
            rule, remedy = "a catalogue has each item once", "use the server's own list"
            raise bad_file(path, f"item {shown(name)} again", rule, remedy)
    return places


def read_history(path: Path, catalogue: Container[str]) -> list[str]:
    """Read the items that a file lists, whether the catalogue has them or not.

    A line that begins with ``#`` is a comment unless the catalogue has an item of that name.
    """
    return _some(path, [name for name in read_ids(path) if name[0] != "#" or name in catalogue])


def _some(path: Path, ids: list[str]) -> list[str]:
    if not ids:
        remedy = "write item ids into it, one a line"
        raise bad_file(path, "it names no item", "at least one is needed", remedy)
    return ids
