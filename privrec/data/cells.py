"""What the cells of a column are: ids, whole numbers, times or texts, in every format alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from privrec.data.problems import BLANKS, bad_file, shown

Int64Array = NDArray[np.int64]
Cells: TypeAlias = Any  # a chunked array of Arrow, which has no types
Where: TypeAlias = Callable[[int], str]

_DECIMALS = 9


def is_text(kind: Any) -> bool:
    """Whether a type of Arrow is text."""
    types = pyarrow.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_whole(kind: Any) -> bool:
    """Whether a type of Arrow is whole numbers."""
    return bool(pyarrow.types.is_integer(kind))


def ids(cells: Cells, name: str, where: Where) -> Int64Array | Cells:
    """The ids in a column: int64 if all are whole numbers, else text as it stands.

    Args:
        cells: text or whole numbers.
        name: of the column, for errors.
        where: names a row.

    Raises:
        DataError: when a cell is empty, or the column holds what is no id; it names the row.
    """
    if not (is_whole(cells.type) or is_text(cells.type)):
        _refuse_missing(cells, name, where, "id")
        raise _wrong_type(cells, name, where, "ids are whole numbers or text")
    text = _trimmed(cells, name, where, "id")
    numbers = as_whole(text)
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
    if not (is_whole(cells.type) or is_text(cells.type)):
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
    numbers = as_whole(cells)
    if numbers is None:
        numbers = as_whole(pyarrow.compute.ascii_trim_whitespace(cells))
    if numbers is None:
        row, cell = next(
            (row, cell)
            for row, cell in enumerate(_each(cells))
            if _whole_cell(cell.strip(BLANKS)) is None
        )
        rule = "it must be a whole number that 64 bits hold, without leading zeros"
        raise bad_file(where(row), f"{name} {shown(cell)}", rule, _hint(cell.strip(BLANKS)))
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
    if not (is_whole(kind) or is_text(kind) or types.is_floating(kind)):
        _refuse_missing(cells, name, where, "time")
        raise _wrong_type(cells, name, where, "times are numbers, dates, or text of either")
    text = _trimmed(cells, name, where, "time")
    numbers = as_whole(text)
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
    if is_whole(cells.type):
        return cells
    text = pyarrow.compute.ascii_trim_whitespace(
        cells if is_text(cells.type) and not pyarrow.types.is_string_view(cells.type)
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


def as_whole(cells: Cells) -> Int64Array | None:
    """Numbers whose usual way of writing is the cells, int64; None where there are none such."""
    try:
        numbers = cells.cast(pyarrow.int64())
    except pyarrow.ArrowInvalid:
        return None
    if not is_whole(cells.type):
        # Arrow also reads 007 and 0x7, other texts than 7: two ids must not become one.
        compute = pyarrow.compute
        led = compute.starts_with(cells, "0"), compute.greater(compute.binary_length(cells), 1)
        if compute.any(compute.or_(compute.and_(*led), compute.starts_with(cells, "-0"))).as_py():
            return None
    return np.asarray(numbers.to_numpy())


def _whole_cell(cell: str) -> Int64Array | None:
    return as_whole(pyarrow.chunked_array([[cell]]))


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


def is_position(cell: str) -> bool:
    """Whether a cell is a whole number from 0."""
    number = _whole_cell(cell)
    return number is not None and bool(number[0] >= 0)
