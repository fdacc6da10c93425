"""Columns of a table, as text or numbers: CSV, TSV and Parquet, plain, packed or in parts.

Arrow reads what is plain, and the ``csv`` module, whose rules for quotes are strict, what has
quotes. A cell keeps its value or is refused with its line; ids and times are told from text by one
rule, so that the same rows give the same data set in every format.
"""

from __future__ import annotations

import csv
import difflib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from privrec.data.files import BLANKS, File, bad_file, shown, table_files
from privrec.data.interactions import Interactions, Where
from privrec.errors import DataError
from privrec.scenario.schema import Data

Int64Array = NDArray[np.int64]
Cells: TypeAlias = Any  # a chunked array of Arrow, which has no types
Names: TypeAlias = Sequence[str | int]

_DECIMALS = 9
_ROWS = 1 << 16  # of quoted text, held as Python's strings at a time
_JOINT = "\x1f"  # in place of a separator of several characters
_MOST_COLUMNS = 10**5
_LONGEST = csv.field_size_limit()


def read_table(path: Path, form: Data) -> Interactions:
    """Read a user's own table, one interaction a row.

    Ids are numbers if all of a column are whole numbers of 64 bits as they are usually written
    (``7``, not ``007``), otherwise all of them are text as it stands. Times are kept if they are
    whole numbers; decimals and dates written as text (without a zone: UTC) become whole numbers of
    the smallest unit that keeps them exactly. Blanks around a cell do not count.

    The path is as :func:`~privrec.data.files.table_files` takes it; ``.parquet`` and ``.pq`` are
    Parquet, everything else is text.

    Raises:
        DataError: when the file or a line is malformed, a column is missing, or a pair repeats.
    """
    names = [form.user_column, form.item_column]
    names += [] if form.time_column is None else [form.time_column]
    if len(set(names)) < len(names) or len({type(name) for name in names}) > 1:
        rule = "users, items and times are different columns, all by name or all by number from 1"
        raise bad_file(str(path), f"columns {names}", rule, "set data.user_column and so on")
    columns = read_columns(table_files(path), names, form.separator, form.encoding)
    users, items = (column.ids() for column in columns[:2])
    times = columns[2].times() if len(columns) > 2 else None
    where = columns[0].where
    return Interactions.from_pairs(users, items, times, where=where, duplicates=form.duplicates)


# ----------------------------------------------------------------------------- cells of a column


@dataclass(frozen=True)
class Column:
    """Cells of one column, and what they are: ids, whole numbers, times or texts.

    Every method that reads them raises a :class:`~privrec.errors.DataError` that names the first
    row whose cell is none of these: by ``where``, as ``file, line`` or ``file, row``.
    """

    name: str
    cells: Cells
    where: Where

    def ids(self) -> Int64Array | Cells:
        """The ids: int64 if all are whole numbers, else text as it stands."""
        self._refuse_empty(self.cells.is_null(nan_is_null=True), "id")
        if not (_is_whole(self.cells.type) or _is_text(self.cells.type)):
            raise self._wrong_type("ids are whole numbers or text")
        text = self._trimmed("id")
        numbers = _as_whole(text)
        if numbers is not None:
            return numbers
        text = text.cast(pyarrow.large_string())
        row = _first(pyarrow.compute.match_substring(text, "\0"))
        if row is not None:
            cell, rule = text[row].as_py(), "an id has no NUL character"
            raise self._bad_cell(row, cell, rule, "correct it, or remove the row")
        return text

    def texts(self) -> list[str]:
        """The texts as they stand; what is missing is an empty one."""
        if not (_is_whole(self.cells.type) or _is_text(self.cells.type)):
            raise self._wrong_type("texts are text or whole numbers")
        return [cell or "" for cell in _each(self.cells.cast(pyarrow.large_string()))]

    def whole_numbers(self, least: int | None = 0) -> Int64Array:
        """The numbers in a column of text, as they are usually written; none is below ``least``."""
        numbers = _as_whole(self.cells)
        if numbers is None:
            numbers = _as_whole(pyarrow.compute.ascii_trim_whitespace(self.cells))
        if numbers is None:
            row, cell = next(
                (row, cell)
                for row, cell in enumerate(_each(self.cells))
                if _as_whole(pyarrow.chunked_array([[cell.strip(BLANKS)]])) is None
            )
            rule = "it must be a whole number that 64 bits hold, without leading zeros"
            raise self._bad_cell(row, cell, rule, _hint(cell.strip(BLANKS)))
        low = np.flatnonzero(numbers < least) if least is not None else numbers[:0]
        if low.size:
            cell, rule = str(numbers[low[0]]), "an id must not be negative"
            raise self._bad_cell(int(low[0]), cell, rule, "number ids from 0")
        return numbers

    def check_finite(self) -> None:
        """Refuse a column of text with anything but finite numbers, which are not kept."""
        row: int | None = None
        try:
            found = self.cells.cast(pyarrow.float64())
            row = _first(pyarrow.compute.invert(pyarrow.compute.is_finite(found)))
        except pyarrow.ArrowInvalid:
            numbers = (float(c) if _is_number(c) else math.nan for c in _each(self.cells))
            row = next((row for row, each in enumerate(numbers) if not math.isfinite(each)), None)
        if row is not None:
            rule, remedy = "it must be a finite number", "correct the line, or remove it"
            raise self._bad_cell(row, self.cells[row].as_py(), rule, remedy)

    def times(self) -> Int64Array:
        """The times of numbers, dates or text of either, in a unit that keeps all exactly."""
        self._refuse_empty(self.cells.is_null(nan_is_null=True), "time")
        types, kind = pyarrow.types, self.cells.type
        if types.is_timestamp(kind) or types.is_date(kind):
            whole = self.cells.cast(pyarrow.int32() if types.is_date32(kind) else pyarrow.int64())
            return np.asarray(whole.cast(pyarrow.int64()).to_numpy())
        if not (_is_whole(kind) or _is_text(kind) or types.is_floating(kind)):
            raise self._wrong_type("times are numbers, dates, or text of either")
        text = self._trimmed("time")
        numbers = _as_whole(text)
        if numbers is not None:
            return numbers
        text = text.cast(pyarrow.large_string())
        dated = not _is_number(text[0].as_py())
        if dated:
            found = _exactly(text, _dates, ("ns", "us"))
        else:
            found = _exactly(text, _decimals, range(_DECIMALS + 1))
        if not isinstance(found, int):
            return found
        rule = (
            "it must be a date as in 2024-05-31T18:00:00, in the years 1 to 9999; to the "
            "nanosecond, all of them in 1678 to 2261"
            if dated
            else f"it must be a finite number of at most {_DECIMALS} decimals, that 64 bits hold "
            "with as many as any row has"
        ) + ", as in the first row"
        raise self._bad_cell(found, text[found].as_py(), rule, "correct it, or remove the line")

    def _trimmed(self, noun: str) -> Cells:
        """Text without blanks around it, none of it empty; whole numbers as they are."""
        cells = self.cells
        if _is_whole(cells.type):
            return cells
        if not _is_text(cells.type) or pyarrow.types.is_string_view(cells.type):
            cells = cells.cast(pyarrow.large_string())
        text = pyarrow.compute.ascii_trim_whitespace(cells)
        self._refuse_empty(pyarrow.compute.equal(text, ""), noun)
        return text

    def _refuse_empty(self, marks: Cells, noun: str) -> None:
        row = _first(marks)
        if row is not None:
            rule = f"every row needs {'an' if noun == 'id' else 'a'} {noun}"
            remedy = "fill it in, or remove the row"
            raise bad_file(self.where(row), f"column {self.name!r} is empty", rule, remedy)

    def _bad_cell(self, row: int, cell: str, rule: str, remedy: str) -> DataError:
        return bad_file(self.where(row), f"{self.name} {shown(cell)}", rule, remedy)

    def _wrong_type(self, rule: str) -> DataError:
        found = f"column {self.name!r} has values of type {self.cells.type}"
        return bad_file(self.where(0), found, rule, "write the column as one of these")


def _is_text(kind: Any) -> bool:
    types = pyarrow.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_whole(kind: Any) -> bool:
    return bool(pyarrow.types.is_integer(kind))


def _first(marks: Cells) -> int | None:
    row = pyarrow.compute.index(marks, True).as_py()
    return None if row < 0 else int(row)


def _each(cells: Cells) -> Iterator[str]:
    return (cell for chunk in cells.chunks for cell in chunk.to_pylist())


def _as_whole(cells: Cells) -> Int64Array | None:
    """Numbers whose usual way of writing is the cells, int64; None where there are none such."""
    try:
        numbers = cells.cast(pyarrow.int64())
    except pyarrow.ArrowInvalid:
        return None
    if not _is_whole(cells.type):
        # Arrow also reads 007 and 0x7, other texts than 7: two ids must not become one.
        compute = pyarrow.compute
        led = compute.starts_with(cells, "0"), compute.greater(compute.binary_length(cells), 1)
        if compute.any(compute.or_(compute.and_(*led), compute.starts_with(cells, "-0"))).as_py():
            return None
    return np.asarray(numbers.to_numpy())


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _hint(cell: str) -> str:
    if not cell:
        return "fill it in, or remove the line"
    if cell[0].isalpha() and cell.isascii():
        return "remove a header line, or replace names by numbers (a table source takes names)"
    return "correct the line; check the separator and the encoding"


def _decimals(cells: Cells, places: int) -> Cells:
    """Numbers times ten to the power of ``places``, which makes all of them whole."""
    exact = cells.cast(pyarrow.decimal128(38, _DECIMALS)).cast(pyarrow.decimal128(38, places))
    digits = [part.view(pyarrow.decimal128(38, 0)) for part in exact.chunks]
    return pyarrow.chunked_array(digits).cast(pyarrow.int64())


def _dates(cells: Cells, unit: str) -> Cells:
    """Times since 1970 from dates."""
    compute = pyarrow.compute
    nothing, midnight, zone = (pyarrow.scalar(end, cells.type) for end in ("", "T00:00", "Z"))
    day = compute.match_substring_regex(cells, "^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    dated = compute.binary_join_element_wise(cells, midnight, nothing)
    full = compute.if_else(day, dated, cells)
    zoned = compute.match_substring_regex(full, "^.{11}.*(Z|[+-][0-9:]+)$")
    universal = compute.binary_join_element_wise(full, zone, nothing)
    full = compute.if_else(zoned, full, universal)
    return full.cast(pyarrow.timestamp(unit, "UTC")).cast(pyarrow.int64())


def _exactly(
    text: Cells, read: Callable[[Cells, Any], Cells], units: Sequence[Any]
) -> Int64Array | int:
    """What is read in the first unit that keeps every cell; or the row of one that none keeps."""

    def found(cells: Cells, unit: Any) -> Cells | None:
        try:
            return read(cells, unit)
        except pyarrow.ArrowInvalid:
            return None

    for unit in units:
        numbers = found(text, unit)
        if numbers is not None:
            return np.asarray(numbers.to_numpy())

    return next(row for row in range(len(text)) if found(text.slice(row, 1), units[-1]) is None)


# ------------------------------------------------------------------------------ columns of files


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

    In text, quotes may surround a cell, unless the separator is a tab or several characters.

    Args:
        files: parts of one table; some may be empty, but not all of them.
        names: in the header; or numbers, from 1, where there is none.
        separator: one or more characters; None: a tab for ``.tsv`` and a comma otherwise.
        width: how many fields a line without a header must have; None: as many as the first.
        called: what errors call the columns; None: by ``names``.
        quotes: whether they may surround a cell at all.
        remedy: for a column that is not there.

    Raises:
        DataError: when a file or line is malformed, or a column is missing or there twice.
    """
    parts: list[_Part] = []
    for file in files:
        if len(files) > 1 and file.is_empty():
            continue
        if file.suffix in (".parquet", ".pq"):
            parts.append(_parquet(file, names, remedy))
        else:
            mark = separator or ("\t" if file.suffix == ".tsv" else ",")
            quoted = quotes and len(mark) == 1 and mark != "\t"
            parts += _Text(file, names, mark, width, remedy).parts(encoding, quoted)
    ends = np.cumsum([len(part.numbers) for part in parts])
    if not ends.size or not ends[-1]:
        rule, remedy = "a table must hold data", "copy the file again"
        raise bad_file(files[0].label, "there is no row", rule, remedy)
    spots = [(part.numbers, part.label) for part in parts]  # without the cells, to free them

    def where(row: int) -> str:
        at = bisect_right(ends, row)
        numbers, label = spots[at]
        return f"{label} {numbers[row - int(ends[at])]}"

    columns = zip(*(part.cells for part in parts), strict=True)
    joined = [_joined(column, where, ends) for column in columns]
    called = called or [str(name) for name in names]
    return [Column(name, cells, where) for name, cells in zip(called, joined, strict=True)]


def _joined(arrays: Sequence[Cells], where: Where, ends: NDArray[Any]) -> Cells:
    """Arrays after each other; numbers and text of different parts are text."""
    kinds = {array.type for array in arrays if len(array)}
    if len(kinds) > 1:
        if not all(_is_whole(kind) or _is_text(kind) for kind in kinds):
            first = arrays[0].type
            at = next(at for at, array in enumerate(arrays) if array.type != first)
            found = f"a column of type {arrays[at].type}"
            rule = f"all parts of a table have the same types, and it is {first} before"
            raise bad_file(where(int(ends[at]) - 1), found, rule, "write the parts alike")
        kinds = {pyarrow.large_string()}
    kind = next(iter(kinds))
    return pyarrow.chunked_array([array.cast(kind) for array in arrays if len(array)])


def _places(header: Sequence[str], names: Names, label: str, remedy: str) -> list[int]:
    """Where the named columns stand in a header."""
    found = [cell.strip(BLANKS) for cell in header]
    for name in names:
        if isinstance(name, int):
            rule, remedy = "Parquet names its columns", f"name them: {', '.join(found)}"
            raise bad_file(label, f"column {name}", rule, remedy)
        if found.count(name) != 1:
            times = "twice or more" if name in found else "not"
            near = difflib.get_close_matches(name, found, n=1)
            guess = f" (perhaps {near[0]!r})" if near and name not in found else ""
            raise bad_file(
                label,
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
            read = [header[at] for at in _places(header, names, file.label, remedy)]
            table = table.read(columns=read, use_threads=False)
            columns = [table.column(each) for each in read]
            for column in columns:
                column.validate(full=True)
        except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            found = f"it cannot be read as Parquet ({shown(str(error).splitlines()[0], 200)})"
            rule = "the file must be complete and of that format"
            raise bad_file(file.label, found, rule, "copy it again, or save it as CSV") from error
    categories = pyarrow.types.is_dictionary
    cells = [
        (each.cast(each.type.value_type) if categories(each.type) else each).combine_chunks()
        for each in columns
    ]
    return _Part(cells, range(1, table.num_rows + 1), f"{file.label}, row")


class _Text:
    """Columns of one text file, piece by piece."""

    def __init__(self, file: File, names: Names, mark: str, width: int | None, remedy: str) -> None:
        if any(sign in mark for sign in '"\0\n\r'):
            rule = "cells are separated by another character"
            raise bad_file(file.label, f"separator {mark!r}", rule, "set data.separator")
        self._file, self._names, self._mark, self._remedy = file, names, mark, remedy
        self._width = width or 0
        self._at: list[int] | None = None  # places of the columns, once the first line is read

    def parts(self, encoding: str, quotes: bool) -> Iterator[_Part]:
        pieces = self._file.chunks(encoding)
        for line, piece in pieces:
            mark = self._mark
            if quotes and ('"' in piece or not mark.isascii()):
                yield from self._quoted(chain([piece], (text for _, text in pieces)), line)
                return
            text = self._file.unified(piece, line)
            if self._at is None:
                first, _, rest = text.partition("\n")
                if self._is_header(first.split(mark), line):
                    text, line = rest, line + 1
            if text:
                yield self._plain(text, line)

    def _is_header(self, fields: Sequence[str], line: int) -> bool:
        """Find the columns by the first line; whether it is a header."""
        place = f"{self._file.label}, line {line}"
        if len(fields) > _MOST_COLUMNS:
            rule = f"a table has at most {_MOST_COLUMNS} columns"
            raise bad_file(place, f"{len(fields)} fields", rule, "check data.separator")
        numbers = [name for name in self._names if isinstance(name, int)]
        if not numbers:
            self._at = _places(fields, self._names, place, self._remedy)
            self._width = len(fields)
            return True
        if not self._width and max(numbers) > len(fields):
            rule = f"column {max(numbers)} is to be read"
            remedy = "set data.user_column and so on, and data.separator to what separates them"
            raise bad_file(place, f"{len(fields)} fields", rule, remedy)
        self._at = [number - 1 for number in numbers]
        self._width = self._width or len(fields)
        return False

    def _plain(self, text: str, line: int) -> _Part:
        """Columns of whole lines in which no quote has a meaning."""
        label, mark, at = self._file.label, self._mark, self._at or []
        if len(mark) > 1:
            if _JOINT in text:
                number = line + text.count("\n", 0, text.index(_JOINT))
                rule, remedy = "it stands in no such file", "correct the line"
                raise bad_file(label, "character U+001F", rule, remedy, line=number)
            text, mark = text.replace(mark, _JOINT), _JOINT
        blank = 0 if text[0] == "\n" else text.find("\n\n") + 1
        if self._width > 1 and text[blank] == "\n":
            raise self._wrong_width([], line + text.count("\n", 0, blank))
        wrong: list[int] = []

        def skip(row: Any) -> str:
            wrong.append(row.number)
            return "skip"

        data = text.encode()
        wanted, names = [str(place) for place in at], [str(each) for each in range(self._width)]
        read = pyarrow.csv.ReadOptions(
            use_threads=False, block_size=len(data) + 1, column_names=names
        )
        parse = pyarrow.csv.ParseOptions(
            delimiter=mark, quote_char=False, double_quote=False, invalid_row_handler=skip
        )
        parse.ignore_empty_lines = False
        convert = pyarrow.csv.ConvertOptions(check_utf8=False, strings_can_be_null=False)
        convert.include_columns = wanted
        convert.column_types = dict.fromkeys(wanted, pyarrow.string())
        table = pyarrow.csv.read_csv(pyarrow.BufferReader(data), read, parse, convert)
        if wrong:
            fields = text.split("\n", wrong[0])[wrong[0] - 1].split(mark)
            raise self._wrong_width(fields, line + wrong[0] - 1)
        cells = [table.column(place).combine_chunks() for place in range(len(at))]
        return _Part(cells, range(line, line + table.num_rows), f"{label}, line")

    def _quoted(self, pieces: Iterator[str], start: int) -> Iterator[_Part]:
        """Columns of the rest of a file that has quotes; a row is numbered by its last line."""
        # Only a line feed ends a line here: a carriage return within quotes is part of the cell.
        lines = (f"{row}\n" for piece in pieces for row in piece[:-1].split("\n"))
        reader = csv.reader(lines, delimiter=self._mark, strict=True)
        label = f"{self._file.label}, line"
        numbers: list[int] = []
        cells: list[list[str]] = []
        try:
            for fields in reader:
                line = start - 1 + reader.line_num
                if self._at is None and self._is_header(fields, line):
                    continue
                at = self._at or []
                cells = cells or [[] for _ in at]
                # An empty line is one empty cell, as it is where there are no quotes.
                if len(fields or [""]) != self._width:
                    raise self._wrong_width(fields, line)
                numbers.append(line)
                for column, place in zip(cells, at, strict=True):
                    column.append(fields[place] if fields else "")
                if len(numbers) == _ROWS:
                    yield _Part([pyarrow.array(column) for column in cells], numbers, label)
                    numbers, cells = [], []
        except csv.Error as error:
            rule = "quotes must be closed and separators inside a field quoted"
            if "limit" in str(error):
                rule = f"a file with quotes has cells of at most {_LONGEST} characters"
            number = start - 1 + reader.line_num
            file, found = self._file.label, str(error)
            raise bad_file(file, found, rule, "correct the line", line=number) from error
        if numbers:
            yield _Part([pyarrow.array(column) for column in cells], numbers, label)

    def _wrong_width(self, fields: Sequence[str], line: int) -> DataError:
        found = f"{len(fields)} field{'s'[: len(fields) != 1]}" if fields else "no text"
        if isinstance(self._names[0], str):
            rule = f"the header has {self._width}"
            remedy = "correct the line, or quote its separators"
        else:
            rule = f"a line has {self._width}, separated by {shown(self._mark)}"
            remedy = "correct the line, or remove it"
            found += f" in {shown(self._mark.join(fields))}" if fields else ""
        return bad_file(self._file.label, found, rule, remedy, line=line)


# -------------------------------------------------------------------------- lists of whole numbers


def read_lists(file: File, noun: str, rule: str) -> tuple[Int64Array, Int64Array]:
    """Read the whole numbers between blanks on every line, and how many each line has.

    Raises:
        DataError: at the first line that is empty (and not what ``rule`` says a line is), or has
            anything but whole numbers from 0.
    """
    compute = pyarrow.compute
    values: list[Int64Array] = []
    counts: list[Int64Array] = []
    for line, piece in file.chunks():
        lines = file.unified(piece, line)[:-1].split("\n")
        empty = next((at for at, text in enumerate(lines, line) if not text.strip()), None)
        if empty is not None:
            raise bad_file(file.label, "no text", rule, "remove the line", line=empty)
        text = compute.ascii_trim_whitespace(pyarrow.array(lines, pyarrow.large_string()))
        numbers = compute.ascii_split_whitespace(text)
        counts.append(compute.list_value_length(numbers).to_numpy())

        def where(row: int, start: int = line, lists: Cells = numbers) -> str:
            return f"{file.label}, line {start + compute.list_parent_indices(lists)[row].as_py()}"

        cells = pyarrow.chunked_array([numbers.flatten()])
        values.append(Column(noun, cells, where).whole_numbers())
    return np.concatenate(values), np.concatenate(counts)
