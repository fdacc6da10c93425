"""Columns of numbers from delimited text: a vectorised parser, with a strict one behind it.

The strict parser goes line by line and defines what is right; the fast one understands the common
case and gives up on anything else. So a good file costs array operations only, and a bad one is
read a second time, from the chunk that failed, to name its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privrec.data.folder import Folder
from privrec.data.problems import bad_line, shown

Int64Array = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Kind: TypeAlias = Literal["id", "rating", "time", "text"]

_NEWLINE = ord("\n")
_ZERO = ord("0")
_POINT = np.uint8(ord("."))
_LONGEST = 18  # digits that fit into int64 whatever they are
_WHOLE = re.compile(rb"[+-]?[0-9]+")


@dataclass(frozen=True)
class Column:
    """One column of a delimited file.

    Args:
        name: as error messages call it.
        kind: ``id`` is a whole number from 0, ``time`` a whole number, ``rating`` a finite number
            that is checked and not kept, ``text`` anything, not kept.
    """

    name: str
    kind: Kind


def read_columns(
    folder: Folder,
    name: str,
    columns: Sequence[Column],
    *,
    separator: bytes,
    header: bytes | None = None,
) -> list[Int64Array]:
    """The ``id`` and ``time`` columns of a file, in the order of ``columns``.

    Args:
        folder: where the file lies.
        name: the file.
        columns: what every line holds.
        separator: one or more bytes.
        header: the exact first line, or None when the file starts with data.

    Returns:
        One int64 array [lines] for each kept column; row ``r`` is line ``r + 1``, or ``r + 2``
        under a header.

    Raises:
        DataError: when a line has other fields than ``columns``, or a value breaks its rule.
    """
    label = folder.label(name)
    line = 1
    parts: list[list[Int64Array]] = []
    for chunk in folder.chunks(name):
        data = _after_header(chunk, header, label) if line == 1 and header is not None else chunk
        line += chunk.count(b"\n") - data.count(b"\n")
        if data:
            parts.append(_parse(data, columns, separator, label, line))
        line += data.count(b"\n")
    if not parts:
        rule = "the header must be followed by data"
        raise bad_line(label, 1, "the file ends here", rule, "copy or download it again")
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def fast_columns(data: bytes, kinds: Sequence[Kind], separator: bytes) -> list[Int64Array] | None:
    """The kept columns of whole lines by array operations, or None when anything is unusual.

    Args:
        data: whole lines, each ending in a newline.
        kinds: of each column.
        separator: one or more bytes.

    Returns:
        One int64 array [lines] for each ``id`` and ``time`` column.
    """
    if len(separator) > 1:
        data, separator = data.replace(separator, b"\t"), b"\t"
    text = np.frombuffer(data, np.uint8)
    spans = _fields(text, ord(separator), len(kinds))
    if spans is None:
        return None
    kept: list[Int64Array] = []
    for starts, ends, kind in zip(*(span.T for span in spans), kinds, strict=True):
        if kind == "rating" and not _decimal(text, starts, ends):
            return None
        if kind in ("id", "time"):
            values = digits(text, starts, ends)
            if values is None:
                return None
            kept.append(values)
    return kept


def digits(text: Bytes, starts: Int64Array, ends: Int64Array) -> Int64Array | None:
    """Decimal numbers in ``text[starts:ends]``, or None unless each is 1 to 18 digits.

    Args:
        text: uint8, the file.
        starts: int64 [m].
        ends: int64 [m], exclusive.
    """
    if not starts.size:
        return np.empty(0, np.int64)
    lengths = ends - starts
    longest = int(lengths.max())
    if lengths.min() < 1 or longest > _LONGEST:
        return None
    values = np.zeros(starts.size, np.int64)
    for back in range(longest, 0, -1):
        at = ends - back
        digit = text[np.maximum(at, 0)] - np.uint8(_ZERO)  # below "0" wraps around to above 9
        digit[at < starts] = 0
        if digit.max() > 9:
            return None
        values *= 10
        values += digit
    return values


def _fields(text: Bytes, separator: int, width: int) -> tuple[Int64Array, Int64Array] | None:
    """Start and end of every field, int64 [lines, width] each, or None when a line differs."""
    newlines = text == _NEWLINE
    flat = np.flatnonzero(newlines | (text == separator))
    if flat.size % width:
        return None
    starts = np.concatenate(([0], flat[:-1] + 1)).reshape(-1, width)
    ends = flat.reshape(-1, width)
    closes = newlines[ends]
    if not closes[:, -1].all() or closes[:, :-1].any():
        return None
    return starts, ends


def _decimal(text: Bytes, starts: Int64Array, ends: Int64Array) -> bool:
    """Whether every field is digits with at most one point among or before them."""
    lengths = ends - starts
    if lengths.min() < 1 or lengths.max() > _LONGEST:
        return False
    points = np.zeros(starts.size, np.int64)
    for back in range(int(lengths.max()), 0, -1):
        at = ends - back
        character = text[np.maximum(at, 0)]
        inside = at >= starts
        point = inside & (character == _POINT)
        points += point
        if (inside & ~point & (character - np.uint8(_ZERO) > 9)).any():
            return False
    return bool(((points <= 1) & (lengths > points)).all())


def _after_header(chunk: bytes, header: bytes, label: str) -> bytes:
    first, _, rest = chunk.partition(b"\n")
    if first.strip() != header:
        rule = f"the header must be {shown(header)}"
        raise bad_line(label, 1, f"header {shown(first)}", rule, "use the publisher's own file")
    return rest


def _parse(
    data: bytes, columns: Sequence[Column], separator: bytes, label: str, line: int
) -> list[Int64Array]:
    fast = fast_columns(data, [column.kind for column in columns], separator)
    return strict_columns(data, columns, separator, label, line) if fast is None else fast


def strict_columns(
    data: bytes, columns: Sequence[Column], separator: bytes, label: str, line: int
) -> list[Int64Array]:
    """The kept columns line by line: slower, and the definition of what is right.

    Args:
        data: whole lines, each ending in a newline.
        columns: what every line holds.
        separator: one or more bytes.
        label: the file, for errors.
        line: number of the first line of ``data``.

    Raises:
        DataError: at the first line that breaks a rule.
    """
    kept: list[list[int]] = [[] for column in columns if column.kind in ("id", "time")]
    for number, text in enumerate(data[:-1].split(b"\n"), line):
        fields = text.split(separator)
        if len(fields) != len(columns):
            raise _wrong_width(text, fields, columns, separator, label, number)
        values = []
        for field, column in zip(fields, columns, strict=True):
            if column.kind == "rating":
                _check_rating(field, column, label, number)
            elif column.kind != "text":
                values.append(_whole_number(field, column, label, number))
        for target, value in zip(kept, values, strict=True):
            target.append(value)
    return [np.array(values, np.int64) for values in kept]


def _wrong_width(
    text: bytes,
    fields: Sequence[bytes],
    columns: Sequence[Column],
    separator: bytes,
    label: str,
    line: int,
) -> Exception:
    found = f"{len(fields)} field{'s'[: len(fields) != 1]} in {shown(text)}" if text else "no text"
    names = ", ".join(column.name for column in columns)
    rule = f"a line has {len(columns)} ({names}), separated by {shown(separator)}"
    return bad_line(label, line, found, rule, "correct the line, or remove it")


def _whole_number(field: bytes, column: Column, label: str, line: int) -> int:
    text = field.strip()
    if not _WHOLE.fullmatch(text):
        rule = "it must be a whole number"
        raise bad_line(label, line, f"{column.name} {shown(field)}", rule, _hint(text))
    found = f"{column.name} {shown(text)}"
    if len(text) > _LONGEST:
        rule = f"it must have no more than {_LONGEST} characters"
        raise bad_line(label, line, found, rule, "correct the line")
    if column.kind == "id" and text.startswith(b"-"):
        raise bad_line(label, line, found, "an id must not be negative", "number ids from 0")
    return int(text)


def _check_rating(field: bytes, column: Column, label: str, line: int) -> None:
    text = field.strip()
    try:
        finite = math.isfinite(float(text))
    except ValueError:
        finite = False
    if not finite:
        rule, remedy = "it must be a finite number", "correct the line, or remove it"
        raise bad_line(label, line, f"{column.name} {shown(text)}", rule, remedy)


def _hint(text: bytes) -> str:
    if not text:
        return "fill it in, or remove the line"
    if text[:1].isalpha() and text.isascii():
        return "remove a header line, or replace names by numbers (a table source takes names)"
    return "correct the line; check the separator and the encoding"
