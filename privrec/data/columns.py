"""A column of a table: its cells as ids, numbers, times or text, or an error that names one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from pyarrow import compute, types

from privrec.data.files import bad_file, shown
from privrec.data.interactions import Where
from privrec.errors import DataError

Int64Array = NDArray[np.int64]
Cells: TypeAlias = Any  # a chunked array of Arrow, which has no types

_AMEND = "fill it in or correct it, or remove the line"
_DECIMALS = 9
DAY_MONTH = (
    r"^(?P<first>[0-9]{1,2})[/.-](?P<second>[0-9]{1,2})[/.-](?P<year>[0-9]{4})"
    r"(?:[ T,]+(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<seconds>[0-9]{2}))?"
    r" ?(?P<half>[AaPp][Mm])?)?$"
)
_EXAMPLE = {"day": "31/12/2024 18:00", "month": "12/31/2024 18:00"}


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
        self._check_type(is_text(self.cells.type), "ids are whole numbers or text")
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
        self._check_type(is_text(self.cells.type), "texts are text or whole numbers")
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
        self._check_type(is_text(kind) or types.is_floating(kind) or types.is_decimal(kind), rule)
        self._refuse_empty(self.cells.is_null(), "a number")
        cells = self._trimmed("a number") if is_text(kind) else self.cells
        if (found := _finite(cells)) is None:
            row = next(row for row in range(len(cells)) if _finite(cells.slice(row, 1)) is None)
            raise self._bad_cell(row, str(cells[row]), "it must be a finite number", _AMEND)
        return found

    def day_first(self) -> bool | None:
        """Whether the column's dates such as 31/12/2024 begin with the day; None: it has none such.

        A column where every date could be read either way is refused, as is one of both kinds.
        """
        if not is_text(self.cells.type):
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
        self._check_type(is_text(kind) or types.is_floating(kind), rule)
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
        if not is_text(cells.type) or types.is_string_view(cells.type):
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


def is_text(kind: Any) -> bool:
    """Return whether a type of Arrow is text."""
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
