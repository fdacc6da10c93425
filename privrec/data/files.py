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
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from privrec.data.cells import (
    Cells,
    Int64Array,
    Where,
    as_whole,
    ids,
    is_position,
    is_text,
    is_whole,
    times,
)
from privrec.data.folder import Folder, suffix, table_files, unified
from privrec.data.interactions import Duplicates, Interactions
from privrec.data.problems import BLANKS, bad_file, bad_line, shown

_ROWS = 1 << 16  # of quoted text, held as Python's strings at a time
_JOINT = "\x1f"  # in place of a separator of several characters
_MOST_COLUMNS = 10**5
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
    if (
        len(set(names)) < len(names)
        or len({type(name) for name in names}) > 1
        or (isinstance(names[0], int) and min(map(int, names)) < 1)
    ):
        rule = "users, items and times are different columns, all by name or all by number from 1"
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
        if len(files) > 1 and folder.is_empty(name):
            continue
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

    spots = [(rows, label) for _, rows, label in parts]

    def where(row: int) -> str:
        at = bisect_right(ends, row)
        rows, label = spots[at]
        return f"{label} {rows[row - int(ends[at])]}"

    columns = zip(*(cells for cells, _, _ in parts), strict=True)
    return Columns([_joined(column, where, ends) for column in columns], where)


def _joined(arrays: Sequence[Cells], where: Where, ends: NDArray[Any]) -> Cells:
    """Arrays after each other; numbers and text of different parts are text."""
    kinds = {array.type for array in arrays if len(array)}
    if len(kinds) > 1:
        wrong = next((kind for kind in kinds if not (is_whole(kind) or is_text(kind))), None)
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


# -------------------------------------------------------------------------------------- text


def _text(
    folder: Folder, name: str, names: Sequence[str | int], mark: str, encoding: str,
    width: int | None, remedy: str,
) -> Iterator[tuple[list[Cells], Sequence[int], str]]:  # fmt: skip
    """Arrays of the columns, piece by piece, with the line that each row ends on."""
    label, line = folder.label(name), 1
    at: list[int] | None = None
    pieces = folder.chunks(name, encoding)
    if any(sign in mark for sign in '"\0\n\r'):
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
    if len(fields) > _MOST_COLUMNS:
        rule = f"a table has at most {_MOST_COLUMNS} columns"
        raise bad_file(label, f"{len(fields)} fields", rule, "check data.separator")
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
        numbers = as_whole(pyarrow.chunked_array([tokens.flatten()]))
        if numbers is None or (numbers.size and numbers.min() < 0):
            at, cell = next(
                (at, cell)
                for at, cells in enumerate(tokens.to_pylist())
                for cell in cells
                if not is_position(cell)
            )
            rule = f"{noun}s are whole numbers from 0, without leading zeros"
            remedy = "number them from 0, or use a table source for other ids"
            raise bad_line(label, line + at, f"{noun} {shown(cell)}", rule, remedy)
        parts.append((numbers, compute.list_value_length(tokens).to_numpy()))
        line += len(lines)
    values, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
    return values, counts


# ----------------------------------------------------------------------------------- Parquet


def _parquet(
    folder: Folder, name: str, names: Sequence[str | int], remedy: str
) -> tuple[list[Cells], Sequence[int], str]:
    label = folder.label(name)
    with folder.open(name) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            # Rows that are alike take no room in the file, and eight bytes or more in memory.
            folder.check_unpacked(name, 8 * file.metadata.num_rows)
            header = file.schema_arrow.names
            read = [header[at] for at in _places(header, names, label, remedy)]
            table = file.read(columns=read, use_threads=False)
            columns = [table.column(each) for each in read]
            for column in columns:
                column.validate(full=True)
        except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            found = f"it cannot be read as Parquet ({shown(str(error).splitlines()[0], 200)})"
            rule = "the file must be complete and of that format"
            raise bad_file(label, found, rule, "copy it again, or save it as CSV") from error
    rows = range(1, table.num_rows + 1)
    return [_undictionaried(column) for column in columns], rows, f"{label}, row"


def _undictionaried(column: Cells) -> Cells:
    kind = column.type
    column = column.cast(kind.value_type) if pyarrow.types.is_dictionary(kind) else column
    return column.combine_chunks()
