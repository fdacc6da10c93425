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
from typing import Any, TypeAlias

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from privrec.data.folder import Folder, suffix, table_files, unified
from privrec.data.interactions import Duplicates, Interactions
from privrec.data.problems import bad_file, bad_line, shown

Int64Array = NDArray[np.int64]
Cells: TypeAlias = Any  # a chunked array of Arrow, which has no types
Where: TypeAlias = Callable[[int], str]

_BLANKS = " \t\n\v\f\r"
_ROWS = 1 << 16  # of quoted text, held as Python's strings at a time
_JOINT = "\x1f"  # in place of a separator of several characters
_DECIMALS = 9
_LONGEST = csv.field_size_limit()


@dataclass(frozen=True)
class TableFormat:
    """How to read a table.

    Args:
        user_column: header of the column of user ids; or its number, from 1, in a text table
            that has no header.
        item_column: the same of item ids.
        time_column: the same of times, numbers or ISO 8601; None: in file order.
        separator: one character; None: a tab for ``.tsv`` and a comma otherwise.
        encoding: of a text file.
        duplicates: see :meth:`Interactions.from_pairs`.
    """

    user_column: str | int
    item_column: str | int
    time_column: str | int | None = None
    separator: str | None = None
    encoding: str = "utf-8"
    duplicates: Duplicates = "refuse"


def read_table(path: Path, form: TableFormat) -> Interactions:
    """A user's own table, one interaction a row.

    Ids are numbers if all of a column are whole numbers of 64 bits as they are usually written
    (``7``, not ``007``), otherwise all of them are text as it stands. Times are kept if they are
    whole numbers; decimals and dates written as text (without a zone: UTC) become whole numbers of
    the smallest unit that keeps them exactly. Blanks around a cell do not count.

    Args:
        path: a file, a folder or a zip archive, see :func:`table_files`; ``.parquet`` and ``.pq``
            are Parquet, everything else is text.
        form: which columns, and how the text is written.

    Raises:
        DataError: when the file or a line is malformed, a column is missing, or a pair repeats.
    """
    names = [form.user_column, form.item_column]
    names += [] if form.time_column is None else [form.time_column]
    if len(set(names)) < len(names) or len({type(name) for name in names}) > 1:
        rule = "users, items and times are different columns, all by name or all by number"
        raise bad_file(str(path), f"columns {names}", rule, "set data.user_column and so on")
    read = read_columns(table_files(path), names, form.separator, form.encoding)
    users, items = (ids(read.cells[at], str(names[at]), read.where) for at in (0, 1))
    when = None if len(names) < 3 else times(read.cells[2], str(names[2]), read.where)
    return Interactions.from_pairs(users, items, when, where=read.where, duplicates=form.duplicates)


@dataclass(frozen=True)
class Columns:
    """Cells of some columns.

    Args:
        cells: chunked arrays of Arrow, of one length.
        where: names a row, as ``file, line`` or ``file, row``.
    """

    cells: list[Cells]
    where: Where


def read_columns(
    files: Sequence[tuple[Folder, str]],
    names: Sequence[str | int],
    separator: str | None = None,
    encoding: str = "utf-8",
    width: int | None = None,
    remedy: str = "set data.user_column, item_column or time_column to a name in the header",
) -> Columns:
    """Some columns of a table of one or more files, in the order of ``names``.

    In text, quotes may surround a cell, unless the separator is a tab or several characters.

    Args:
        files: one after the other; parts may be empty, but not all of them.
        names: of the columns in the header; or their numbers, from 1, where there is none.
        separator: one or more characters; None: a tab for ``.tsv`` and a comma otherwise.
        encoding: of text.
        width: how many fields a line without a header must have; None: as many as the first.
        remedy: what to do about a column that is not there.

    Raises:
        DataError: when a file or line is malformed, or a column is missing or there twice.
    """
    parts: list[tuple[list[Cells], Sequence[int], str]] = []
    for folder, name in files:
        if suffix(name) in (".parquet", ".pq"):
            parts.append(_parquet(folder, name, names, remedy))
        else:
            mark = separator or ("\t" if suffix(name) == ".tsv" else ",")
            parts += _text(folder, name, names, mark, encoding, width, remedy)
    ends = np.cumsum([len(rows) for _, rows, _ in parts])
    if not ends.size or not ends[-1]:
        rule, remedy = "a table must hold data", "copy the file again"
        label = files[0][0].label(files[0][1])
        raise bad_file(label, "there is no row", rule, remedy)

    def where(row: int) -> str:
        at = bisect_right(ends, row)
        _, rows, label = parts[at]
        return f"{label} {rows[row - int(ends[at])]}"

    columns = zip(*(cells for cells, _, _ in parts), strict=True)
    return Columns([_joined(column, where, ends) for column in columns], where)


def _joined(arrays: Sequence[Cells], where: Where, ends: NDArray[Any]) -> Cells:
    """Arrays after each other; numbers and text of different parts are text."""
    kinds = {array.type for array in arrays if len(array)}
    if len(kinds) > 1:
        wrong = next((kind for kind in kinds if not (_is_whole(kind) or _is_text(kind))), None)
        if wrong is not None:
            first = arrays[0].type
            at = next(at for at, array in enumerate(arrays) if array.type != first)
            raise bad_file(
                where(int(ends[at]) - 1), f"a column of type {arrays[at].type}",
                f"all parts of a table have the same types, and it is {first} before",
                "write the parts alike",
            )  # fmt: skip
        kinds = {pyarrow.large_string()}
    kind = next(iter(kinds))
    return pyarrow.chunked_array([array.cast(kind) for array in arrays if len(array)])


def _is_text(kind: Any) -> bool:
    types = pyarrow.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_whole(kind: Any) -> bool:
    return bool(pyarrow.types.is_integer(kind))


# -------------------------------------------------------------------------------------- text


def _text(
    folder: Folder, name: str, names: Sequence[str | int], mark: str, encoding: str,
    width: int | None, remedy: str,
) -> Iterator[tuple[list[Cells], Sequence[int], str]]:  # fmt: skip
    """Arrays of the columns, piece by piece, with the line that each row ends on."""
    label, line = folder.label(name), 1
    at: list[int] | None = None
    pieces = folder.chunks(name, encoding)
    if mark in ('"', "\n", "\r"):
        rule, remedy = "cells are separated by another character", "set data.separator"
        raise bad_file(label, f"separator {mark!r}", rule, remedy)
    for piece in pieces:
        if len(mark) == 1 and mark != "\t" and ('"' in piece or not mark.isascii()):
            rows = _quoted(chain([piece], pieces), mark, label, line)
            if at is None:
                number, fields = next(rows)
                place = f"{label}, line {number}"
                at, width, headed = _header(fields, names, width, place, remedy)
                rows = rows if headed else chain([(number, fields)], rows)
            yield from _batches(rows, at, width or 0, label, names)
            return
        text = unified(piece, label, line)
        if at is None:
            first, _, rest = text.partition("\n")
            fields, place = first.split(mark), f"{label}, line 1"
            at, width, headed = _header(fields, names, width, place, remedy)
            text, line = (rest, 2) if headed else (text, 1)
        if text:
            cells = _plain(text, mark, at, width or 0, label, line, names)
            count = len(cells[0])
            yield cells, range(line, line + count), f"{label}, line"
            line += count


def _header(
    fields: Sequence[str], names: Sequence[str | int], width: int | None, label: str, remedy: str
) -> tuple[list[int], int, bool]:
    """Places of the columns in the first line, how many it has, and whether it is a header."""
    if isinstance(names[0], int):
        most = max(name for name in names if isinstance(name, int))
        if width is None and most > len(fields):
            rule = f"column {most} is to be read"
            remedy = "set data.user_column and so on, and data.separator to what separates them"
            raise bad_file(label, f"{len(fields)} fields", rule, remedy)
        return [int(name) - 1 for name in names], width or len(fields), False
    return _places(fields, names, label, remedy), len(fields), True


def _places(
    header: Sequence[str], names: Sequence[str | int], label: str, remedy: str
) -> list[int]:
    found = [cell.strip(_BLANKS) for cell in header]
    for name in names:
        if isinstance(name, int):
            rule, remedy = "Parquet names its columns", f"name them: {', '.join(found)}"
            raise bad_file(label, f"column {name}", rule, remedy)
        if found.count(name) != 1:
            times = "twice or more" if name in found else "not"
            near = difflib.get_close_matches(name, found, n=1)
            guess = f" (perhaps {near[0]!r})" if near and name not in found else ""
            raise bad_file(
                label, f"column {name!r} is {times} among {', '.join(map(shown, found[:20]))}",
                "every column that is read must be there once",
                f"{remedy}{guess}, or give its number if there is no header; check the separator",
            )  # fmt: skip
    return [found.index(str(name)) for name in names]


def _plain(
    text: str, mark: str, at: Sequence[int], width: int, label: str, line: int,
    names: Sequence[str | int],
) -> list[Cells]:  # fmt: skip
    """Columns of whole lines in which no quote has a meaning."""
    if len(mark) > 1:
        if _JOINT in text:
            number = line + text.count("\n", 0, text.index(_JOINT))
            rule, remedy = "it stands in no such file", "correct the line"
            raise bad_line(label, number, "character U+001F", rule, remedy)
        text = text.replace(mark, _JOINT)
    blank = 0 if text[0] == "\n" else text.find("\n\n") + 1
    if width > 1 and text[blank] == "\n":
        raise _wrong_width([], width, mark, names, label, line + text.count("\n", 0, blank))
    wrong: list[int] = []

    def skip(row: Any) -> str:
        wrong.append(row.number)
        return "skip"

    data = text.encode()
    table = pyarrow.csv.read_csv(
        pyarrow.BufferReader(data),
        pyarrow.csv.ReadOptions(
            use_threads=False, block_size=len(data) + 1,
            column_names=[str(place) for place in range(width)],
        ),
        pyarrow.csv.ParseOptions(
            delimiter=_JOINT if len(mark) > 1 else mark, quote_char=False, double_quote=False,
            ignore_empty_lines=False, invalid_row_handler=skip,
        ),
        pyarrow.csv.ConvertOptions(
            check_utf8=False, strings_can_be_null=False, include_columns=[str(p) for p in at],
            column_types={str(place): pyarrow.string() for place in at},
        ),
    )  # fmt: skip
    if wrong:
        fields = text.split("\n", wrong[0])[wrong[0] - 1].split(_JOINT if len(mark) > 1 else mark)
        raise _wrong_width(fields, width, mark, names, label, line + wrong[0] - 1)
    return [table.column(place).combine_chunks() for place in range(len(at))]


def _quoted(
    pieces: Iterator[str], mark: str, label: str, line: int
) -> Iterator[tuple[int, list[str]]]:
    """Rows of text with quotes, each with the number of the line on which it ends."""
    # Only a line feed ends a line here: a carriage return within quotes is part of the cell.
    lines = (f"{row}\n" for piece in pieces for row in piece[:-1].split("\n"))
    reader = csv.reader(lines, delimiter=mark, strict=True)
    try:
        for fields in reader:
            yield line - 1 + reader.line_num, fields
    except csv.Error as error:
        rule = "quotes must be closed and separators inside a field quoted"
        if "limit" in str(error):
            rule = f"a file with quotes has cells of at most {_LONGEST} characters"
        number, found = line - 1 + reader.line_num, str(error)
        raise bad_line(label, number, found, rule, "correct the line") from error


def _batches(
    rows: Iterator[tuple[int, list[str]]], at: Sequence[int], width: int, label: str,
    names: Sequence[str | int],
) -> Iterator[tuple[list[Cells], Sequence[int], str]]:  # fmt: skip
    lines: list[int] = []
    cells: list[list[str]] = [[] for _ in at]
    for number, fields in rows:
        # An empty line is one empty cell, as it is where there are no quotes.
        if len(fields or [""]) != width:
            raise _wrong_width(fields, width, None, names, label, number)
        lines.append(number)
        for column, place in zip(cells, at, strict=True):
            column.append(fields[place] if fields else "")
        if len(lines) == _ROWS:
            yield [pyarrow.array(column) for column in cells], lines, f"{label}, line"
            lines, cells = [], [[] for _ in at]
    yield [pyarrow.array(column, pyarrow.string()) for column in cells], lines, f"{label}, line"


def _wrong_width(
    fields: Sequence[str], width: int, mark: str | None, names: Sequence[str | int], label: str,
    line: int,
) -> Exception:  # fmt: skip
    found = f"{len(fields)} field{'s'[: len(fields) != 1]}" if fields else "no text"
    if isinstance(names[0], str):
        rule, remedy = f"the header has {width}", "correct the line, or quote its separators"
    else:
        between = "" if mark is None else f", separated by {shown(mark)}"
        rule, remedy = f"a line has {width}{between}", "correct the line, or remove it"
        found += f" in {shown((mark or ' ').join(fields))}" if fields else ""
    return bad_line(label, line, found, rule, remedy)


def read_lists(
    folder: Folder, name: str, noun: str, misshapen: Callable[[str], tuple[str, str, str] | None],
    mark: str | None = None, pair: str | None = None,
) -> tuple[Int64Array, Int64Array]:  # fmt: skip
    """The whole numbers on every line of a file, and how many each line has.

    Args:
        folder: where the file lies.
        name: the file.
        noun: what a number is, for errors.
        misshapen: of a line: what is wrong with it, the rule and the remedy; None: nothing.
        mark: between numbers; None: blanks.
        pair: a pattern of two numbers that a line begins with; None: there is none.

    Raises:
        DataError: at the first line that is misshapen or has anything but whole numbers from 0.
    """
    compute, label, line = pyarrow.compute, folder.label(name), 1
    parts: list[tuple[Int64Array, Int64Array]] = []
    for piece in folder.chunks(name):
        lines = unified(piece, label, line)[:-1].split("\n")
        for at, each in enumerate(lines, line):
            if wrong := misshapen(each):
                raise bad_line(label, at, *wrong)
        text = pyarrow.array(lines, pyarrow.large_string())
        if pair is not None:
            text = compute.replace_substring_regex(text, pair, "\\1\t\\2\t", max_replacements=1)
        if mark is None:
            tokens = compute.ascii_split_whitespace(compute.ascii_trim_whitespace(text))
        else:
            tokens = compute.split_pattern(text, mark)
        numbers = _whole(pyarrow.chunked_array([tokens.flatten()]))
        if numbers is None or (numbers.size and numbers.min() < 0):
            at, cell = next(
                (at, cell)
                for at, cells in enumerate(tokens.to_pylist())
                for cell in cells
                if not _is_position(cell)
            )
            rule = f"{noun}s are whole numbers from 0, without leading zeros"
            remedy = "number them from 0, or use a table source for other ids"
            raise bad_line(label, line + at, f"{noun} {shown(cell)}", rule, remedy)
        parts.append((numbers, compute.list_value_length(tokens).to_numpy()))
        line += len(lines)
    values, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
    return values, counts


def _is_position(cell: str) -> bool:
    number = _whole_cell(cell)
    return number is not None and bool(number[0] >= 0)


# ----------------------------------------------------------------------------------- Parquet


def _parquet(
    folder: Folder, name: str, names: Sequence[str | int], remedy: str
) -> tuple[list[Cells], Sequence[int], str]:
    label = folder.label(name)
    with folder.open(name) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            _places(file.schema_arrow.names, names, label, remedy)
            table = file.read(columns=[str(each) for each in names], use_threads=False)
            columns = [table.column(str(each)) for each in names]
            for column in columns:
                column.validate(full=True)
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            found = f"it cannot be read as Parquet ({shown(str(error).splitlines()[0], 200)})"
            rule = "the file must be complete and of that format"
            raise bad_file(label, found, rule, "copy it again, or save it as CSV") from error
    rows = range(1, table.num_rows + 1)
    return [_undictionaried(column) for column in columns], rows, f"{label}, row"


def _undictionaried(column: Cells) -> Cells:
    kind = column.type
    column = column.cast(kind.value_type) if pyarrow.types.is_dictionary(kind) else column
    return column.combine_chunks()


# ------------------------------------------------------------------------------- ids and times


def ids(cells: Cells, name: str, where: Where) -> Int64Array | Cells:
    """The ids in a column: int64 if all are whole numbers, else text as it stands.

    Args:
        cells: text or whole numbers.
        name: of the column, for errors.
        where: names a row.

    Raises:
        DataError: when a cell is empty, or the column holds what is no id; it names the row.
    """
    if not (_is_whole(cells.type) or _is_text(cells.type)):
        _refuse_missing(cells, name, where, "id")
        raise _wrong_type(cells, name, where, "ids are whole numbers or text")
    text = _trimmed(cells, name, where, "id")
    numbers = _whole(text)
    if numbers is not None:
        return numbers
    text = text.cast(pyarrow.large_string())
    row = _first(pyarrow.compute.match_substring(text, "\0"))
    if row is not None:
        rule, remedy = "an id has no NUL character", "correct it, or remove the row"
        raise bad_file(where(row), f"{name} {shown(text[row].as_py())}", rule, remedy)
    return text


def texts_in(cells: Cells, name: str, where: Where) -> list[str]:
    """The texts in a column as they stand; what is missing is an empty one.

    Args:
        cells: text or whole numbers.
        name: of the column, for errors.
        where: names a row.

    Raises:
        DataError: when the column holds anything else.
    """
    if not (_is_whole(cells.type) or _is_text(cells.type)):
        raise _wrong_type(cells, name, where, "texts are text or whole numbers")
    return [cell or "" for cell in _each(cells.cast(pyarrow.large_string()))]


def whole_numbers(cells: Cells, name: str, where: Where, least: int | None = 0) -> Int64Array:
    """A column of text as whole numbers, as they are usually written.

    Args:
        cells: text.
        name: of the column, for errors.
        where: names a row.
        least: no number is below; None: any is right.

    Raises:
        DataError: when a cell is no such number; it names the row.
    """
    numbers = _whole(cells)
    if numbers is None:
        numbers = _whole(pyarrow.compute.ascii_trim_whitespace(cells))
    if numbers is None:
        row, cell = next(
            (row, cell)
            for row, cell in enumerate(_each(cells))
            if _whole_cell(cell.strip(_BLANKS)) is None
        )
        rule = "it must be a whole number that 64 bits hold, without leading zeros"
        raise bad_file(where(row), f"{name} {shown(cell)}", rule, _hint(cell.strip(_BLANKS)))
    low = np.flatnonzero(numbers < least) if least is not None else numbers[:0]
    if low.size:
        found, remedy = f"{name} '{numbers[low[0]]}'", "number ids from 0"
        raise bad_file(where(int(low[0])), found, "an id must not be negative", remedy)
    return numbers


def refuse_infinite(cells: Cells, name: str, where: Where) -> None:
    """Check that a column of text holds finite numbers, which are not kept.

    Raises:
        DataError: at the first cell that is none.
    """
    row: int | None = None
    try:
        found = cells.cast(pyarrow.float64())
        row = _first(pyarrow.compute.invert(pyarrow.compute.is_finite(found)))
    except pyarrow.ArrowInvalid:
        numbers = (float(cell) if _is_number(cell) else math.nan for cell in _each(cells))
        row = next((row for row, each in enumerate(numbers) if not math.isfinite(each)), None)
    if row is not None:
        rule, remedy = "it must be a finite number", "correct the line, or remove it"
        raise bad_file(where(row), f"{name} {shown(cells[row].as_py())}", rule, remedy)


def times(cells: Cells, name: str, where: Where) -> Int64Array:
    """The times in a column, in whatever unit keeps all of them exactly.

    Args:
        cells: numbers, dates, or text of either.
        name: of the column, for errors.
        where: names a row.

    Raises:
        DataError: when a cell is empty or no time, or the column holds none; it names the row.
    """
    types, kind = pyarrow.types, cells.type
    if types.is_timestamp(kind) or types.is_date(kind):
        _refuse_missing(cells, name, where, "time")
        whole = cells.cast(pyarrow.int32() if types.is_date32(kind) else pyarrow.int64())
        return np.asarray(whole.cast(pyarrow.int64()).to_numpy())
    if not (_is_whole(kind) or _is_text(kind) or types.is_floating(kind)):
        _refuse_missing(cells, name, where, "time")
        raise _wrong_type(cells, name, where, "times are numbers, dates, or text of either")
    text = _trimmed(cells, name, where, "time")
    numbers = _whole(text)
    if numbers is not None:
        return numbers
    text = text.cast(pyarrow.large_string())
    dated = not _is_number(text[0].as_py())
    found = _dates(text) if dated else _decimals(text)
    if isinstance(found, int):
        rule = (
            "it must be a date as in 2024-05-31T18:00:00, in the years 1 to 9999; to the "
            "nanosecond, all of them in 1678 to 2261"
            if dated
            else f"it must be a finite number of at most {_DECIMALS} decimals, that 64 bits hold "
            "with as many as any row has"
        ) + ", as in the first row"
        cell = text[found].as_py()
        remedy = "correct it, or remove the line"
        raise bad_file(where(found), f"{name} {shown(cell)}", rule, remedy)
    return found


def _trimmed(cells: Cells, name: str, where: Where, noun: str) -> Cells:
    """Cells as text without blanks around it, none of them empty; whole numbers as they are."""
    _refuse_missing(cells, name, where, noun)
    if _is_whole(cells.type):
        return cells
    text = pyarrow.compute.ascii_trim_whitespace(
        cells if _is_text(cells.type) and not pyarrow.types.is_string_view(cells.type)
        else cells.cast(pyarrow.large_string())
    )  # fmt: skip
    row = _first(pyarrow.compute.equal(text, ""))
    if row is not None:
        raise _empty(name, where(row), noun)
    return text


def _refuse_missing(cells: Cells, name: str, where: Where, noun: str) -> None:
    row = _first(cells.is_null(nan_is_null=True)) if len(cells) else None
    if row is not None:
        raise _empty(name, where(row), noun)


def _empty(name: str, where: str, noun: str) -> Exception:
    rule = f"every row needs {'an' if noun == 'id' else 'a'} {noun}"
    return bad_file(where, f"column {name!r} is empty", rule, "fill it in, or remove the row")


def _wrong_type(cells: Cells, name: str, where: Where, rule: str) -> Exception:
    found = f"column {name!r} has values of type {cells.type}"
    return bad_file(where(0), found, rule, "write the column as one of these")


def _first(marks: Cells) -> int | None:
    """The first row that is marked."""
    row = pyarrow.compute.index(marks, True).as_py()
    return None if row < 0 else int(row)


def _each(cells: Cells) -> Iterator[str]:
    return (cell for chunk in cells.chunks for cell in chunk.to_pylist())


def _whole(cells: Cells) -> Int64Array | None:
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


def _whole_cell(cell: str) -> Int64Array | None:
    return _whole(pyarrow.chunked_array([[cell]]))


def _hint(cell: str) -> str:
    if not cell:
        return "fill it in, or remove the line"
    if cell[0].isalpha() and cell.isascii():
        return "remove a header line, or replace names by numbers (a table source takes names)"
    return "correct the line; check the separator and the encoding"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _decimals(text: Cells) -> Int64Array | int:
    """Numbers times the power of ten that makes all of them whole; or the row of a bad one."""

    def read(cells: Cells, places: int) -> Cells:
        exact = cells.cast(pyarrow.decimal128(38, _DECIMALS)).cast(pyarrow.decimal128(38, places))
        digits = [part.view(pyarrow.decimal128(38, 0)) for part in exact.chunks]
        return pyarrow.chunked_array(digits).cast(pyarrow.int64())

    return _exactly(text, read, range(_DECIMALS + 1))


def _dates(text: Cells) -> Int64Array | int:
    """Times since 1970 from dates; or the row of one that is none."""

    def read(cells: Cells, unit: str) -> Cells:
        compute = pyarrow.compute
        nothing, midnight, zone = (pyarrow.scalar(end, cells.type) for end in ("", "T00:00", "Z"))
        day = compute.match_substring_regex(cells, "^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
        dated = compute.binary_join_element_wise(cells, midnight, nothing)
        full = compute.if_else(day, dated, cells)
        zoned = compute.match_substring_regex(full, "^.{11}.*(Z|[+-][0-9:]+)$")
        universal = compute.binary_join_element_wise(full, zone, nothing)
        full = compute.if_else(zoned, full, universal)
        return full.cast(pyarrow.timestamp(unit, "UTC")).cast(pyarrow.int64())

    return _exactly(text, read, ("ns", "us"))


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

    def lost(row: int, among: Sequence[Any]) -> bool:
        return all(found(text.slice(row, 1), unit) is None for unit in among)

    rows = range(len(text))
    bad = next((row for row in rows if lost(row, units)), None)
    return bad if bad is not None else next(row for row in rows if lost(row, units[-1:]))
