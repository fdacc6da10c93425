"""Columns of a table, as text or numbers: CSV, TSV and Parquet, plain, packed or in parts.

Arrow reads what is plain, and the ``csv`` module, whose rules for quotes are strict, what has
quotes. A cell keeps its value or is refused with its line; ids and times are told from text by one
rule, so that the same rows give the same data set in every format.
"""

from __future__ import annotations

import csv
import difflib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from pyarrow import compute, types
from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

from privrec.data.columns import Cells, Column, Int64Array, is_text
from privrec.data.files import BLANKS, PARQUET, File, bad_file, shown
from privrec.data.interactions import Where
from privrec.errors import DataError

Names: TypeAlias = Sequence[str | int]

_ROWS = 1 << 16  # of quoted text, held as Python's strings at a time
_JOINT = "\x1f"  # in place of a separator of several characters
_MOST_COLUMNS = 10**5
_LONGEST = csv.field_size_limit()
SEPARATORS = (",", "\t", ";", "|", "::")


class _Part(NamedTuple):
    """Some rows of the wanted columns, and what an error calls each of them."""

    cells: list[Cells]
    numbers: Sequence[int]
    label: str


def read_columns(
    files: Sequence[File],
    names: Names,
    separator: str | None = None,
    encoding: str = "utf-8",
    *,
    width: int | None = None,
    called: Sequence[str] | None = None,
    quotes: bool = True,
    remedy: str = "set data.user_column, item_column or time_column to a name in the header",
) -> list[Column]:
    """Read some columns of a table of one or more files, in the order of ``names``.

    Args:
        files: parts of one table; some may be empty, but not all of them. ``.parquet`` and ``.pq``
            are Parquet, everything else is text.
        names: in the header; or numbers, from 1, where there is none.
        separator: one or more characters; None: as :func:`separator_of` finds it.
        width: how many fields a line without a header must have; None: as many as the first.
        called: what errors call the columns; None: by ``names``.
        quotes: whether they may surround a cell; not where tabs or several characters separate.
    """
    parts: list[_Part] = []
    for file in files:
        if len(files) > 1 and file.is_empty():
            continue
        if file.suffix in PARQUET:
            parts.append(_parquet(file, names, remedy))
        else:
            mark = separator or separator_of(file, names, encoding)
            quoted = quotes and len(mark) == 1 and mark != "\t"
            parts += _Text(file, names, mark, width or 0, remedy).parts(encoding, quoted)
    ends = np.cumsum([len(part.numbers) for part in parts])
    if not ends.size or not ends[-1]:
        raise bad_file(files[0], "there is no row", "a table must hold data", "copy it again")
    spots = [(part.numbers, part.label) for part in parts]  # without the cells, to free them

    def where(row: int) -> str:
        at = bisect_right(ends, row)
        numbers, label = spots[at]
        return f"{label} {numbers[row - int(ends[at])]}"

    columns = zip(*(part.cells for part in parts), strict=True)
    joined = [_joined(column, where, ends) for column in columns]
    called = called or [str(name) for name in names]
    return [Column(name, cells, where) for name, cells in zip(called, joined, strict=True)]


def separator_of(file: File, names: Names, encoding: str = "utf-8") -> str:
    """What separates the fields of a text: with it, its first line has the columns.

    A tab for ``.tsv`` and a comma otherwise come first, and are also taken where none does.
    """
    first = next(file.lines(encoding))
    usual = "\t" if file.suffix == ".tsv" else ","

    def fits(mark: str) -> bool:
        cells = [cell.strip(BLANKS) for cell in fields_of(first, mark)]
        numbers = [name for name in names if isinstance(name, int)]
        if numbers:
            return len(cells) >= max(*numbers, 2)
        return all(name in cells for name in names)

    return next(filter(fits, (usual, *SEPARATORS)), usual)


def fields_of(line: str, mark: str) -> list[str]:
    """The fields of one line, without the quotes around them where quotes have a meaning."""
    if len(mark) > 1 or mark == "\t":
        return line.split(mark)
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error:
        return line.split(mark)


def _joined(arrays: Sequence[Cells], where: Where, ends: NDArray[Any]) -> Cells:
    """Arrays after each other; numbers and text of different parts are text."""
    kinds = {array.type for array in arrays if len(array)}
    if len(kinds) > 1:
        if not all(types.is_integer(kind) or is_text(kind) for kind in kinds):
            first = arrays[0].type
            at = next(at for at, array in enumerate(arrays) if array.type != first)
            found = f"a column of type {arrays[at].type}"
            rule = f"all parts of a table have the same types, and it is {first} before"
            raise bad_file(where(int(ends[at]) - 1), found, rule, "write the parts alike")
        kinds = {pyarrow.large_string()}
    kind = next(iter(kinds))
    return pyarrow.chunked_array([array.cast(kind) for array in arrays if len(array)])


def _places(header: Sequence[str], names: Names, place: str, remedy: str) -> list[int]:
    """Where the named columns stand in a header."""
    found = [cell.strip(BLANKS) for cell in header]
    for name in names:
        if isinstance(name, int):
            rule, remedy = "Parquet names its columns", f"name them: {', '.join(found)}"
            raise bad_file(place, f"column {name}", rule, remedy)
        if found.count(name) != 1:
            times = "twice or more" if name in found else "not"
            near = difflib.get_close_matches(name, found, n=1)
            guess = f" (perhaps {near[0]!r})" if near and name not in found else ""
            raise bad_file(
                place,
                f"column {name!r} is {times} among {', '.join(map(shown, found[:20]))}",
                "every column that is read must be there once",
                f"{remedy}{guess}, or give its number if there is no header; check the separator",
            )
    return [found.index(str(name)) for name in names]


def _parquet(file: File, names: Names, remedy: str) -> _Part:
    with file.open() as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            # Rows that are alike take no room in the file, and eight bytes or more in memory.
            file.check_unpacked(8 * table.metadata.num_rows)
            header = table.schema_arrow.names
            read = [header[at] for at in _places(header, names, str(file), remedy)]
            table = table.read(columns=read, use_threads=False)
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            found = f"it cannot be read as Parquet ({shown(str(error).splitlines()[0], 200)})"
            rule = "the file must be complete and of that format"
            raise bad_file(file, found, rule, "copy it again, or save it as CSV") from error
    columns = [
        column.cast(column.type.value_type) if types.is_dictionary(column.type) else column
        for column in map(table.column, read)
    ]
    cells = [column.combine_chunks() for column in columns]
    return _Part(cells, range(1, table.num_rows + 1), f"{file}, row")


@dataclass
class _Text:
    """Columns of one text file, piece by piece.

    The first line tells ``at``, the places of the columns, and ``width``, where that is 0.
    """

    file: File
    names: Names
    mark: str
    width: int
    remedy: str
    at: Sequence[int] = ()

    def parts(self, encoding: str, quotes: bool) -> Iterator[_Part]:
        if any(sign in self.mark for sign in '"\0\n\r'):
            found, rule = f"separator {self.mark!r}", "cells are separated by another character"
            raise bad_file(self.file, found, rule, "set data.separator")
        pieces = self.file.chunks(encoding)
        for line, piece in pieces:
            if quotes and ('"' in piece or not self.mark.isascii()):
                yield from self._quoted(chain([piece], (text for _, text in pieces)), line)
                return
            text = self.file.unified(piece, line)
            if not self.at:
                first, _, rest = text.partition("\n")
                if self._is_header(first.split(self.mark), line):
                    text, line = rest, line + 1
            if text:
                yield self._plain(text, line)

    def _is_header(self, fields: Sequence[str], line: int) -> bool:
        """Find the columns by the first line; whether it is a header."""
        place = f"{self.file}, line {line}"
        if len(fields) > _MOST_COLUMNS:
            rule = f"a table has at most {_MOST_COLUMNS} columns"
            raise bad_file(place, f"{len(fields)} fields", rule, "check data.separator")
        numbers = [name for name in self.names if isinstance(name, int)]
        if not numbers:
            self.at = _places(fields, self.names, place, self.remedy)
            self.width = len(fields)
            return True
        self.at, self.width = [number - 1 for number in numbers], self.width or len(fields)
        if max(numbers) > self.width:
            rule = f"column {max(numbers)} is to be read"
            remedy = "set data.user_column and so on, and data.separator to what separates them"
            raise bad_file(place, f"{len(fields)} fields", rule, remedy)
        return False

    def _plain(self, text: str, line: int) -> _Part:
        """Columns of whole lines in which no quote has a meaning."""
        mark = self.mark
        if len(mark) > 1:
            if _JOINT in text:
                line += text.count("\n", 0, text.index(_JOINT))
                rule, remedy = "it stands in no such file", "correct the line"
                raise bad_file(self.file, "character U+001F", rule, remedy, line)
            text, mark = text.replace(mark, _JOINT), _JOINT
        blank = 0 if text[0] == "\n" else text.find("\n\n") + 1
        if self.width > 1 and text[blank] == "\n":
            raise self._wrong_width([], line + text.count("\n", 0, blank))
        wrong: list[int] = []

        def skip(row: Any) -> str:
            wrong.append(row.number)
            return "skip"

        data, wanted = text.encode(), [str(place) for place in self.at]
        read = ReadOptions(use_threads=False, block_size=len(data) + 1)
        read.column_names = [str(place) for place in range(self.width)]
        parse = ParseOptions(delimiter=mark, quote_char=False, invalid_row_handler=skip)
        parse.double_quote = parse.ignore_empty_lines = False
        convert = ConvertOptions(include_columns=wanted)
        convert.column_types = dict.fromkeys(wanted, pyarrow.string())
        convert.check_utf8 = convert.strings_can_be_null = False
        table = read_csv(pyarrow.BufferReader(data), read, parse, convert)
        if wrong:
            fields = text.split("\n", wrong[0])[wrong[0] - 1].split(mark)
            raise self._wrong_width(fields, line + wrong[0] - 1)
        cells = [table.column(place).combine_chunks() for place in range(len(wanted))]
        return _Part(cells, range(line, line + table.num_rows), f"{self.file}, line")

    def _quoted(self, pieces: Iterator[str], start: int) -> Iterator[_Part]:
        """Columns of the rest of a file that has quotes; a row is numbered by its last line."""
        # Only a line feed ends a line here: a carriage return within quotes is part of the cell.
        lines = (f"{row}\n" for piece in pieces for row in piece[:-1].split("\n"))
        reader = csv.reader(lines, delimiter=self.mark, strict=True)
        rows: list[tuple[str, ...]] = []
        numbers: list[int] = []

        def part() -> _Part:
            cells = [pyarrow.array(column) for column in zip(*rows, strict=True)]
            return _Part(cells, numbers, f"{self.file}, line")

        try:
            for fields in reader:
                line = start - 1 + reader.line_num
                if not self.at and self._is_header(fields, line):
                    continue
                fields = fields or [""]  # as an empty line is where there are no quotes
                if len(fields) != self.width:
                    raise self._wrong_width(fields, line)
                numbers.append(line)
                rows.append(tuple(fields[place] for place in self.at))
                if len(rows) == _ROWS:
                    yield part()
                    rows, numbers = [], []
        except csv.Error as error:
            rule = "quotes must be closed and separators inside a field quoted"
            if "limit" in str(error):
                rule = f"a file with quotes has cells of at most {_LONGEST} characters"
            line = start - 1 + reader.line_num
            raise bad_file(self.file, str(error), rule, "correct the line", line) from error
        if rows:
            yield part()

    def _wrong_width(self, fields: Sequence[str], line: int) -> DataError:
        found = f"{len(fields)} field{'s'[: len(fields) != 1]}" if any(fields) else "no text"
        rule, remedy = f"the header has {self.width}", "correct the line, or quote its separators"
        if isinstance(self.names[0], int):
            rule = f"a line has {self.width}, separated by {shown(self.mark)}"
            found += f" in {shown(self.mark.join(fields))}" if fields else ""
        return bad_file(self.file, found, rule, remedy, line)


# -------------------------------------------------------------------------- lists of whole numbers


def read_lists(file: File, noun: str, rule: str) -> tuple[Int64Array, Int64Array]:
    """Read the whole numbers from 0 between blanks on every line, and how many each line has.

    A line without any is not what ``rule`` says a line is.
    """
    values: list[Int64Array] = []
    counts: list[Int64Array] = []
    for line, piece in file.chunks():
        lines = file.unified(piece, line)[:-1].split("\n")
        empty = next((at for at, text in enumerate(lines, line) if not text.strip()), None)
        if empty is not None:
            raise bad_file(file, "no text", rule, "remove the line", empty)
        text = compute.ascii_trim_whitespace(pyarrow.array(lines, pyarrow.large_string()))
        numbers = compute.ascii_split_whitespace(text)
        counts.append(compute.list_value_length(numbers).to_numpy())

        def where(row: int, start: int = line, lists: Cells = numbers) -> str:
            return f"{file}, line {start + compute.list_parent_indices(lists)[row].as_py()}"

        cells = pyarrow.chunked_array([numbers.flatten()])
        values.append(Column(noun, cells, where).whole_numbers())
    return np.concatenate(values), np.concatenate(counts)
