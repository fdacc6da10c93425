"""Columns of a table, as text or numbers: CSV, TSV and Parquet, plain, packed or in parts.

Arrow reads what is plain, and the ``csv`` module, whose rules for quotes are strict, what has
quotes. A cell keeps its value or is refused with its line; ids and times are told from text by one
rule, so that the same rows give the same data set in every format.
"""

from __future__ import annotations

import csv
import difflib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from pyarrow import compute, types
from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

from privrec.data.files import BLANKS, PARQUET, File, bad_file, shown
from privrec.data.interactions import Where
from privrec.errors import DataError

Int64Array = NDArray[np.int64]
Cells: TypeAlias = Any  # a chunked array of Arrow, which has no types
Names: TypeAlias = Sequence[str | int]

_AMEND = "fill it in or correct it, or remove the line"
_DECIMALS = 9
_ROWS = 1 << 16  # of quoted text, held as Python's strings at a time
_JOINT = "\x1f"  # in place of a separator of several characters
_MOST_COLUMNS = 10**5
_LONGEST = csv.field_size_limit()
DAY_MONTH = (
    r"^(?P<first>[0-9]{1,2})[/.-](?P<second>[0-9]{1,2})[/.-](?P<year>[0-9]{4})"
    r"(?:[ T,]+(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<seconds>[0-9]{2}))?"
    r" ?(?P<half>[AaPp][Mm])?)?$"
)
_EXAMPLE = {"day": "31/12/2024 18:00", "month": "12/31/2024 18:00"}


# ----------------------------------------------------------------------------- cells of a column


@dataclass(frozen=True)
class Column:
    """Cells of one column, which are read as ids, whole numbers, times or texts.

    A cell that is not is refused with its row, by ``where``: ``file, line`` or ``file, row``.
    """

    name: str
    cells: Cells
    where: Where

    def ids(self) -> Int64Array | Cells:
        """The ids: int64 if all are whole numbers, else text as it stands."""
        self._refuse_empty(self.cells.is_null(nan_is_null=True), "an id")
        self._check_type(_is_text(self.cells.type), "ids are whole numbers or text")
        text = self._trimmed("an id")
        numbers = _as_whole(text)
        if numbers is not None:
            return numbers
        text = text.cast(pyarrow.large_string())
        row = _first(compute.match_substring(text, "\0"))
        if row is not None:
            raise self._bad_cell(row, text[row].as_py(), "an id has no NUL character", _AMEND)
        return text

    def texts(self) -> list[str]:
        """The texts as they stand; what is missing is an empty one."""
        self._check_type(_is_text(self.cells.type), "texts are text or whole numbers")
        return [cell or "" for cell in _each(self.cells.cast(pyarrow.large_string()))]

    def whole_numbers(self, least: int | None = 0) -> Int64Array:
        """The numbers in a column of text, as they are usually written; none is below ``least``."""
        text = compute.ascii_trim_whitespace(self.cells)
        numbers = _as_whole(text)
        if numbers is None:
            row, cell = next(
                (row, cell)
                for row, cell in enumerate(_each(text))
                if _as_whole(pyarrow.chunked_array([[cell]])) is None
            )
            rule = "it must be a whole number that 64 bits hold, without leading zeros"
            remedy = "correct the line; check the separator and the encoding"
            if not cell:
                remedy = _AMEND
            elif cell[0].isalpha() and cell.isascii():
                remedy = "remove a header line, or replace names by numbers (a table has names)"
            raise self._bad_cell(row, cell, rule, remedy)
        low = np.flatnonzero(numbers < least) if least is not None else numbers[:0]
        if low.size:
            cell, rule = str(numbers[low[0]]), "an id must not be negative"
            raise self._bad_cell(int(low[0]), cell, rule, "number ids from 0")
        return numbers

    def numbers(self) -> NDArray[np.float64]:
        """The finite numbers in the column, float64."""
        kind, rule = self.cells.type, "numbers, or text of them, are read here"
        self._check_type(_is_text(kind) or types.is_floating(kind) or types.is_decimal(kind), rule)
        self._refuse_empty(self.cells.is_null(), "a number")
        cells = self._trimmed("a number") if _is_text(kind) else self.cells
        if (found := _finite(cells)) is None:
            row = next(row for row in range(len(cells)) if _finite(cells.slice(row, 1)) is None)
            raise self._bad_cell(row, str(cells[row]), "it must be a finite number", _AMEND)
        return found

    def day_first(self) -> bool | None:
        """Whether the column's dates such as 31/12/2024 begin with the day; None: it has none such.

        A column where every date could be read either way is refused, as is one of both kinds.
        """
        if not _is_text(self.cells.type):
            return None
        text = self._trimmed("a time")
        found = compute.extract_regex(text, DAY_MONTH)
        if not found.is_valid()[0].as_py():
            return None
        beyond = (
            compute.greater(compute.struct_field(found, place).cast(pyarrow.int64()), 12)
            for place in (0, 1)
        )
        days = [_first(marks) for marks in beyond]
        remedy = "set data.day_first = true, or false where the month comes first"
        if days == [None, None]:
            rule = "the day or the month may come first, and no row of the column tells which"
            raise self._bad_cell(0, text[0].as_py(), rule, remedy)
        if None not in days:
            early, late = sorted(row for row in days if row is not None)
            rule = f"day and month stand the other way round in {self.where(early)}"
            raise self._bad_cell(late, text[late].as_py(), rule, "write all dates alike")
        return days[0] is not None

    def times(self, day_first: bool | None = None) -> Int64Array:
        """The times of numbers, dates or text of either, in a unit that keeps all exactly.

        ``day_first`` says how dates such as 31/12/2024 begin, as :meth:`day_first` finds it.
        """
        self._refuse_empty(self.cells.is_null(nan_is_null=True), "a time")
        kind = self.cells.type
        if types.is_timestamp(kind) or types.is_date(kind):
            whole = self.cells.cast(pyarrow.int32() if types.is_date32(kind) else pyarrow.int64())
            return np.asarray(whole.cast(pyarrow.int64()).to_numpy())
        rule = "times are numbers, dates, or text of either"
        self._check_type(_is_text(kind) or types.is_floating(kind), rule)
        text = self._trimmed("a time")
        numbers = _as_whole(text)
        if numbers is not None:
            return numbers
        text = text.cast(pyarrow.large_string())
        if day_first is not None:
            times, wrong = _calendar(text, day_first)
            if wrong.any():
                row, order = int(wrong.argmax()), "day" if day_first else "month"
                rule = f"it must be a date that begins with the {order}, as in {_EXAMPLE[order]}"
                raise self._bad_cell(row, text[row].as_py(), rule, _AMEND)
            return times
        read: Callable[[Cells, Any], Cells]
        units: Sequence[Any]
        if _is_number(text[0].as_py()):
            read, units = _decimals, range(_DECIMALS + 1)
            rule = f"a finite number of at most {_DECIMALS} decimals, that 64 bits hold with as "
            rule += "many as any row has"
        else:
            read, units = _dates, ("ns", "us")
            rule = "a date as in 2024-05-31T18:00:00, in the years 1 to 9999; to the nanosecond, "
            rule += "all of them in 1678 to 2261"
        if (kept := _exactly(text, read, units)) is not None:
            return kept
        alone = (_exactly(text.slice(row, 1), read, units[-1:]) for row in range(len(text)))
        row = next(row for row, time in enumerate(alone) if time is None)
        rule = f"it must be {rule}, as in the first row"
        raise self._bad_cell(row, text[row].as_py(), rule, _AMEND)

    def _trimmed(self, noun: str) -> Cells:
        """Text without blanks around it, none of it empty; whole numbers as they are."""
        cells = self.cells
        if types.is_integer(cells.type):
            return cells
        if not _is_text(cells.type) or types.is_string_view(cells.type):
            cells = cells.cast(pyarrow.large_string())
        text = compute.ascii_trim_whitespace(cells)
        self._refuse_empty(compute.equal(text, ""), noun)
        return text

    def _refuse_empty(self, marks: Cells, noun: str) -> None:
        row = _first(marks)
        if row is not None:
            found, rule = f"column {self.name!r} is empty", f"every row needs {noun}"
            raise bad_file(self.where(row), found, rule, "fill it in, or remove the row")

    def _bad_cell(self, row: int, cell: str, rule: str, remedy: str) -> DataError:
        return bad_file(self.where(row), f"{self.name} {shown(cell)}", rule, remedy)

    def _check_type(self, right: bool, rule: str) -> None:
        """Refuse a column that is neither of the right type nor of whole numbers."""
        if not right and not types.is_integer(self.cells.type):
            found = f"column {self.name!r} has values of type {self.cells.type}"
            raise bad_file(self.where(0), found, rule, "write the column as one of these")


def _is_text(kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _first(marks: Cells) -> int | None:
    row = compute.index(marks, True).as_py()
    return None if row < 0 else int(row)


def _each(cells: Cells) -> Iterator[str]:
    return (cell for chunk in cells.chunks for cell in chunk.to_pylist())


def _as_whole(cells: Cells) -> Int64Array | None:
    """Numbers whose usual way of writing is the cells, int64; None where there are none such."""
    try:
        numbers = cells.cast(pyarrow.int64())
    except pyarrow.ArrowInvalid:
        return None
    if not types.is_integer(cells.type):
        # Arrow also reads 007 and 0x7, other texts than 7: two ids must not become one.
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


def _decimals(cells: Cells, places: int) -> Cells:
    """Numbers times ten to the power of ``places``, which makes all of them whole."""
    exact = cells.cast(pyarrow.decimal128(38, _DECIMALS)).cast(pyarrow.decimal128(38, places))
    digits = [part.view(pyarrow.decimal128(38, 0)) for part in exact.chunks]
    return pyarrow.chunked_array(digits).cast(pyarrow.int64())


def _dates(cells: Cells, unit: str) -> Cells:
    """Times since 1970 from dates."""
    nothing, midnight, zone = (pyarrow.scalar(end, cells.type) for end in ("", "T00:00", "Z"))
    day = compute.match_substring_regex(cells, "^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    dated = compute.binary_join_element_wise(cells, midnight, nothing)
    full = compute.if_else(day, dated, cells)
    zoned = compute.match_substring_regex(full, "^.{11}.*(Z|[+-][0-9:]+)$")
    universal = compute.binary_join_element_wise(full, zone, nothing)
    full = compute.if_else(zoned, full, universal)
    return full.cast(pyarrow.timestamp(unit, "UTC")).cast(pyarrow.int64())


def _finite(cells: Cells) -> NDArray[np.float64] | None:
    """Numbers, float64; None where not all of them are finite numbers."""
    with suppress(pyarrow.ArrowInvalid):
        found = np.asarray(cells.cast(pyarrow.float64()).to_numpy())
        return found if np.isfinite(found).all() else None
    return None


def _calendar(cells: Cells, day_first: bool) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Seconds since 1970 of dates such as 31/12/2024 6:46 PM, and which rows are none such."""
    found = compute.extract_regex(cells, DAY_MONTH)
    parts = [compute.fill_null(compute.struct_field(found, place), "") for place in range(7)]
    first, other, year, hour, minute, second = (
        np.asarray(compute.if_else(compute.equal(part, ""), "0", part).cast("int64").to_numpy())
        for part in parts[:6]
    )
    day, month = (first, other) if day_first else (other, first)
    half = compute.ascii_upper(parts[6])
    halved, late = (np.asarray(compute.equal(half, end).to_numpy()) for end in ("", "PM"))
    halved = ~halved
    wrong = halved & ((hour < 1) | (hour > 12))
    hour = np.where(halved, hour % 12 + 12 * late, hour)  # twelve is the first hour of a half
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    wrong |= (month < 1) | (month > 12) | (days.astype("datetime64[M]") != months)
    wrong |= (hour > 23) | (minute > 59) | (second > 59)
    return days.astype(np.int64) * 86_400 + hour * 3600 + minute * 60 + second, wrong


def _exactly(
    text: Cells, read: Callable[[Cells, Any], Cells], units: Sequence[Any]
) -> Int64Array | None:
    """What is read in the first unit that keeps every cell; None where none does."""
    for unit in units:
        with suppress(pyarrow.ArrowInvalid):
            return np.asarray(read(text, unit).to_numpy())
    return None


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

    Args:
        files: parts of one table; some may be empty, but not all of them. ``.parquet`` and ``.pq``
            are Parquet, everything else is text.
        names: in the header; or numbers, from 1, where there is none.
        separator: one or more characters; None: a tab for ``.tsv`` and a comma otherwise.
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
            mark = separator or usual_separator(file)
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


def usual_separator(file: File) -> str:
    """What separates fields in a file of this name."""
    return "\t" if file.suffix == ".tsv" else ","


def _joined(arrays: Sequence[Cells], where: Where, ends: NDArray[Any]) -> Cells:
    """Arrays after each other; numbers and text of different parts are text."""
    kinds = {array.type for array in arrays if len(array)}
    if len(kinds) > 1:
        if not all(types.is_integer(kind) or _is_text(kind) for kind in kinds):
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
