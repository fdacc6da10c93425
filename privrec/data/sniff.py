"""What a table of somebody's own looks like: separator, header, and which column is which.

Names tell, and where there is no header the order and the look of the cells. What was taken is a
proposal, with its reasons, for a person to read; a scenario made of it says all of it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet

from privrec.data.files import BLANKS, PARQUET, File, bad_file, shown, table_files
from privrec.data.tables import DAY_MONTH, Names, usual_separator

_SEPARATORS = (",", "\t", ";", "|", "::")
_LINES = 200
_USERS = [
    "user", "reviewer", "customer", "client", "member", "visitor", "person", "account",
    "reader", "listener", "viewer", "buyer", "player", "student", "subscriber", "patient",
    "device", "household",
]  # fmt: skip
_ITEMS = [
    "item", "movie", "film", "product", "article", "track", "song", "artist", "album",
    "book", "isbn", "asin", "parentasin", "sku", "stock", "game", "app", "video", "show",
    "series", "anime", "business", "venue", "location", "poi", "place", "hotel",
    "restaurant", "recipe", "news", "page", "course", "job", "content", "listing", "offer",
]  # fmt: skip
_TIMES = [
    "timestamp", "time", "datetime", "date", "ts", "unixreviewtime", "createdat", "created",
    "eventtime", "ratedat", "orderdate", "orderedat", "invoicedate", "purchasedat",
    "viewedat", "reviewtime", "unixtime", "when",
]  # fmt: skip
_RATINGS = [
    "rating", "ratings", "stars", "score", "overall", "bookrating", "userrating",
    "reviewrating", "grade",
]  # fmt: skip
_IDS = ("id", "", "uuid", "key", "code", "no", "number")
_TITLES = [f"{noun}{end}" for noun in _ITEMS for end in ("title", "name")]
_NAMES: Mapping[str, Sequence[str]] = {
    "user": ["uid", *(noun + end for noun in _USERS for end in (*_IDS, "name"))],
    "item": ["iid", *(noun + end for noun in _ITEMS for end in _IDS)],
    "time": _TIMES,
    "rating": _RATINGS,
    "title": ["title", "name", *_TITLES, "description"],
}
"""Names of columns, in small letters and digits alone, the surest first."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
_DATE = re.compile(rf"[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}.*|{DAY_MONTH}")
_EPOCH = 1e8  # seconds: 1973; no rating is as large


@dataclass(frozen=True)
class Look:
    """Keys of ``[data]`` for a table, and why: what, what was taken, and the reason."""

    keys: Mapping[str, Any]
    reasons: Sequence[tuple[str, str, str]]


def look_at(
    path: Path,
    given: Mapping[str, Any] = MappingProxyType({}),
    *,
    needed: Sequence[str] = ("user", "item"),
) -> Look:
    """Propose how to read a table, from its first 200 lines or its schema.

    Args:
        given: keys of ``[data]`` that are settled: they are taken as they are.
        needed: what there must be a column of.

    Raises:
        DataError: where a column that is needed is not recognised.
    """
    file = table_files(path)[0]
    reasons: list[tuple[str, str, str]] = []
    keys: dict[str, Any] = {"source": "table", "path": str(path)}
    if file.suffix in PARQUET:
        rows = [_schema(file)]
    else:
        lines = list(islice(file.lines(given.get("encoding", "utf-8")), _LINES))
        mark, why = _separator(file, lines, given.get("separator"))
        keys["separator"] = mark
        reasons.append(("separator", shown(mark), why))
        rows = [[cell.strip() for cell in _fields(line, mark)] for line in lines]
    if _has_header(rows):
        columns, why = _by_name(rows[0]), "its name"
    else:
        columns, why = _by_place(rows), "the order and the look of cells, without a header"
    for role in ("user", "item", "time", "rating", "title"):
        key = f"{role}_column"
        if key in given:
            keys[key] = given[key]
            reasons.append((role, str(given[key]), "said"))
        elif role in columns:
            keys[key] = columns[role]
            unused = role == "rating" and "min_rating" not in given
            said = f"{why}; ignored unless data.min_rating is set" if unused else why
            reasons.append((role, str(columns[role]), said))
    for role in needed:
        if f"{role}_column" not in keys:
            names = ", ".join(map(shown, rows[0][:20]))
            rule = f"none of them is known as a column of {role}s"
            remedy = f"say which: -s data.{role}_column=NAME"
            raise bad_file(f"{file}, line 1", f"columns {names}", rule, remedy)
    return Look({**keys, **given}, reasons)


def separator_of(file: File, names: Names, encoding: str = "utf-8") -> str:
    """What separates the fields of a text: with it, its first line has the named columns.

    What is usual for the file's name comes first, and is also taken where none does.
    """
    first, usual = next(file.lines(encoding)), usual_separator(file)

    def fits(mark: str) -> bool:
        cells = [cell.strip(BLANKS) for cell in _fields(first, mark)]
        numbers = [name for name in names if isinstance(name, int)]
        if numbers:
            return len(cells) >= max(*numbers, 2)
        return all(name in cells for name in names)

    return next(filter(fits, (usual, *_SEPARATORS)), usual)


def _fields(line: str, mark: str) -> list[str]:
    """The fields of one line, without the quotes around them where quotes have a meaning."""
    if len(mark) > 1 or mark == "\t":
        return line.split(mark)
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error:
        return line.split(mark)


def _schema(file: File) -> list[str]:
    with file.open() as stream:
        try:
            return list(pyarrow.parquet.read_schema(stream).names)
        except (pyarrow.ArrowException, OSError) as error:
            rule, remedy = "the file must be complete and of that format", "copy it again"
            raise bad_file(file, "it cannot be read as Parquet", rule, remedy) from error


def _separator(file: File, lines: Sequence[str], given: str | None) -> tuple[str, str]:
    """The separator with most fields among those that give nearly all lines the same number."""
    if given is not None:
        return given, "said"
    best, most = "", 1
    for mark in (usual_separator(file), *_SEPARATORS):
        widths = [len(_fields(line, mark)) for line in lines]
        # A few lines may be parts of cells with line feeds in quotes.
        if widths.count(widths[0]) >= 0.9 * len(widths) and widths[0] > most:
            best, most = mark, widths[0]
    if not best:
        rule = "a comma, a tab, a semicolon, a bar or two colons divide all lines alike"
        remedy = "say what does: -s data.separator=CHARACTER"
        raise bad_file(file, f"line 1 is {shown(lines[0])}", rule, remedy)
    return best, f"{most} fields in a line"


def _plain(name: str) -> str:
    """A name in small letters and digits; RecBole's ``user_id:token`` without the type."""
    return re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower())


def _by_name(header: Sequence[str]) -> dict[str, str | int]:
    plain, found = [_plain(name) for name in header], dict[str, str | int]()
    for role, names in _NAMES.items():
        taken = found.values()
        free = {plain[at]: at for at in reversed(range(len(plain))) if header[at] not in taken}
        known = next((name for name in names if name in free), None)
        if known is not None:
            found[role] = header[free[known]]
    return found


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row has names: known ones, or text above numbers."""
    if _by_name(rows[0]) or len(rows) == 1:
        return True
    columns = zip(*(row for row in rows if len(row) == len(rows[0])), strict=True)
    return any(
        not _NUMBER.fullmatch(first) and all(map(_NUMBER.fullmatch, rest))
        for first, *rest in columns
    )


def _by_place(rows: Sequence[Sequence[str]]) -> dict[str, str | int]:
    """User and item are the first two columns; a time and a rating are known by their cells."""
    found: dict[str, str | int] = {"user": 1, "item": 2}
    columns = list(zip(*(row for row in rows if len(row) == len(rows[0])), strict=True))
    for number, cells in list(enumerate(columns, 1))[2:]:
        numeric = all(map(_NUMBER.fullmatch, cells))
        if all(map(_DATE.fullmatch, cells)) or (
            numeric and all(float(cell) >= _EPOCH for cell in cells)
        ):
            found.setdefault("time", number)
        elif numeric and len(set(cells)) <= 21:
            found.setdefault("rating", number)
    return found
