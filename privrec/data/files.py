"""A user's own table with named columns: CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.delimited import Kind, fast_columns
from privrec.data.folder import Folder, decoded
from privrec.data.interactions import Interactions
from privrec.data.problems import bad_file, bad_line, line_namer, shown
from privrec.errors import UsageError

Int64Array = NDArray[np.int64]

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_MICROSECONDS = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class TableFormat:
    """How to read a table.

    Args:
        user_column: header of the column of user ids.
        item_column: header of the column of item ids.
        time_column: header of the column of times, numbers or ISO 8601; None: in file order.
        separator: one character; None: a tab for ``.tsv`` and a comma otherwise.
        encoding: of a text file.
    """

    user_column: str
    item_column: str
    time_column: str | None = None
    separator: str | None = None
    encoding: str = "utf-8"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read: user, item and maybe time."""
        names = (self.user_column, self.item_column)
        return names if self.time_column is None else (*names, self.time_column)


def read_table(path: Path, form: TableFormat) -> Interactions:
    """A user's own table: CSV, TSV or (with the extra ``data``) Parquet, one interaction a row.

    Ids that are all whole numbers become numbers (leading zeros do not count), otherwise all of
    them are text. Times that are all whole numbers are kept, Parquet's dates in their own unit;
    decimal numbers and dates written as text (without a zone: UTC) become microseconds.

    Args:
        path: the file; ``.parquet`` and ``.pq`` are Parquet, everything else is text.
        form: which columns, and how the text is written.

    Raises:
        DataError: when the file or a line is malformed, a column is missing, or a pair repeats.
        UsageError: when a Parquet file is given and pyarrow is not installed.
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        return _from_columns(_parquet_columns(path, form), lambda row: f"{path}, row {row + 1}")
    table = _fast_table(path, form)
    if table is not None:
        return _from_columns(table, line_namer(str(path), 2))
    columns, lines = _text_columns(path, form)
    return _from_columns(columns, lambda row: f"{path}, line {lines[row]}")


def _from_columns(columns: Sequence[NDArray[Any]], where: Callable[[int], str]) -> Interactions:
    users, items, *times = columns
    return Interactions.from_pairs(users, items, times[0] if times else None, where=where)


def _fast_table(path: Path, form: TableFormat) -> list[Int64Array] | None:
    """The columns of a plain file of numbers; None when it needs the general reader."""
    separator = _separator(path, form).encode()
    if len(separator) != 1 or form.encoding.lower() not in ("utf-8", "latin-1"):
        return None
    chunks = Folder(path.parent).chunks(path.name)
    header, _, rest = next(chunks).partition(b"\n")
    names = header.decode("latin-1").split(separator.decode())
    if any(names.count(name) != 1 for name in form.columns):
        return None
    kinds: list[Kind] = ["id" if name in form.columns else "text" for name in names]
    parts: list[list[Int64Array]] = []
    for data in chain([rest] if rest else [], chunks):
        columns = None if b'"' in data else fast_columns(data, kinds, separator)
        if columns is None:
            return None
        parts.append(columns)
    found = [np.concatenate(column) for column in zip(*parts, strict=True)]
    kept = [name for name in names if name in form.columns]
    return [found[kept.index(name)] for name in form.columns] if found else None


def _separator(path: Path, form: TableFormat) -> str:
    if form.separator is not None:
        return form.separator
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _text_columns(path: Path, form: TableFormat) -> tuple[list[NDArray[Any]], Sequence[int]]:
    """The columns by the general reader, and the line on which each row ends."""
    label = str(path)
    text = decoded(Folder(path.parent).read(path.name), label, form.encoding)
    rows = records(text, _separator(path, form), label)
    _, header = next(rows)
    where = _column_numbers(header, form, f"{label}, line 1")
    lines: list[int] = []
    cells: list[tuple[str, ...]] = []
    for line, fields in rows:
        if len(fields) != len(header):
            found = f"{len(fields)} field{'s'[: len(fields) != 1]}" if fields else "no text"
            rule = f"the header has {len(header)}"
            raise bad_line(label, line, found, rule, "correct the line, or quote its separators")
        lines.append(line)
        cells.append(tuple(fields[at].strip() for at in where))
    if not cells:
        rule, remedy = "the header must be followed by data", "copy the file again"
        raise bad_file(label, "there is no row", rule, remedy)
    return _typed(cells, lines, form, label), lines


def records(text: str, separator: str, label: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of delimited text, each with the number of the line on which it ends.

    Args:
        text: of a whole file.
        separator: one character.
        label: the file, for errors.

    Raises:
        DataError: when quotes are not closed, or a field is longer than a field may be.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        rule = "quotes must be closed and separators inside a field quoted"
        raise bad_line(label, reader.line_num, str(error), rule, "correct the line") from error


def _column_numbers(header: Sequence[str], form: TableFormat, label: str) -> list[int]:
    names = [name.strip() for name in header]
    if len(set(form.columns)) < len(form.columns):
        rule = "users, items and times are different columns"
        raise bad_file(label, f"columns {form.columns}", rule, "set data.user_column and so on")
    for name in form.columns:
        if names.count(name) != 1:
            raise _no_column(name, names, label)
    return [names.index(name) for name in form.columns]


def _no_column(name: str, names: Sequence[str], label: str) -> Exception:
    times = "twice or more" if name in names else "not"
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" (perhaps {near[0]!r})" if near and name not in names else ""
    return bad_file(
        label,
        f"column {name!r} is {times} among {', '.join(map(repr, names))}",
        "every column that is read must be there once",
        f"set data.user_column, item_column or time_column to a name in the header{guess}, and "
        "data.separator to what separates them",
    )


def _typed(
    cells: Sequence[tuple[str, ...]], lines: Sequence[int], form: TableFormat, label: str
) -> list[NDArray[Any]]:
    users, items, *times = zip(*cells, strict=True)
    columns = [
        _ids(users, lines, form.user_column, label),
        _ids(items, lines, form.item_column, label),
    ]
    return columns + [_times(values, lines, str(form.time_column), label) for values in times]


def _ids(cells: Sequence[str], lines: Sequence[int], name: str, label: str) -> NDArray[Any]:
    for line in compress(lines, (not cell for cell in cells)):
        rule, remedy = "every row needs an id", "fill it in, or remove the line"
        raise bad_line(label, line, f"column {name!r} is empty", rule, remedy)
    if all(map(_WHOLE.fullmatch, cells)):
        return np.array([int(cell) for cell in cells], np.int64)
    return np.array(cells)


def _times(cells: Sequence[str], lines: Sequence[int], name: str, label: str) -> Int64Array:
    if all(map(_WHOLE.fullmatch, cells)):
        return np.array([int(cell) for cell in cells], np.int64)
    read = _decimal if _is_number(cells[0]) else _date
    times = [read(cell) for cell in cells]
    for line, cell in compress(zip(lines, cells, strict=True), (time is None for time in times)):
        kind = "a finite number" if read is _decimal else "a date as in 2024-05-31T18:00:00"
        rule = f"it must be {kind}, as in the first row"
        raise bad_line(label, line, f"{name} {shown(cell)}", rule, "correct it, or remove the line")
    return np.array(times, np.int64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _decimal(cell: str) -> int | None:
    """Microseconds from a decimal number of seconds; None if it is not one."""
    value = float(cell) * _MICROSECONDS if _is_number(cell) else math.nan
    return round(value) if abs(value) < 2**62 else None


def _date(cell: str) -> int | None:
    """Microseconds since 1970 from a date; None if it is not one."""
    try:
        date = datetime.fromisoformat(cell)
    except ValueError:
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def _parquet_columns(path: Path, form: TableFormat) -> list[NDArray[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: Parquet needs pyarrow, which is not installed; install the extra "
            "privrec[data], or save the table as CSV"
        ) from error
    try:
        names = pyarrow.parquet.read_schema(path).names
        _column_numbers(names, form, str(path))
        table = pyarrow.parquet.read_table(path, columns=list(form.columns))
    except (pyarrow.ArrowException, OSError) as error:
        found = f"it cannot be read as Parquet ({str(error).splitlines()[0]})"
        rule = "the file must be complete and of that format"
        raise bad_file(str(path), found, rule, "copy it again, or save it as CSV") from error
    if not table.num_rows:
        raise bad_file(str(path), "there is no row", "it must hold data", "write it again")
    return [
        _parquet_column(table.column(name), name, str(path), time=name == form.time_column)
        for name in form.columns
    ]


def _parquet_column(column: Any, name: str, label: str, *, time: bool) -> NDArray[Any]:
    import pyarrow

    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 1
        found = f"column {name!r} is empty in row {row}"
        raise bad_file(label, found, "every row needs a value", "fill it in, or remove the row")
    kind = column.type
    if pyarrow.types.is_integer(kind):
        return np.asarray(column.to_numpy()).astype(np.int64)
    if time and (pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind)):
        days = pyarrow.types.is_date32(kind)
        counted = column.cast(pyarrow.int32() if days else pyarrow.int64())
        return np.asarray(counted.to_numpy()).astype(np.int64)
    cells = [str(cell) for cell in column.to_pylist()]
    rows = range(1, len(cells) + 1)
    return (_times if time else _ids)(cells, rows, name, f"{label}, as rows")
