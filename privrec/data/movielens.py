"""MovieLens as its publisher lays it out.

Source: Harper & Konstan, "The MovieLens Datasets" (TiiS 2015).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.delimited import Column, read_columns
from privrec.data.folder import Folder, decoded
from privrec.data.interactions import Interactions
from privrec.data.problems import bad_line, line_namer, shown

RATING_COLUMNS = (
    Column("user", "id"),
    Column("item", "id"),
    Column("rating", "rating"),
    Column("time", "time"),
)
TEXT_ENCODING = (
    "utf-8 or latin-1"  # the publisher's older files are latin-1, copies of them often UTF-8
)


@dataclass(frozen=True)
class Layout:
    """Where one release of MovieLens keeps what.

    Args:
        folders: names its folder goes by.
        ratings: file of the ratings.
        separator: between its fields.
        header: its first line, or None.
        titles: file of the titles.
        title_separator: between its fields; None for quoted comma-separated values.
    """

    folders: tuple[str, ...]
    ratings: str
    separator: bytes
    header: bytes | None
    titles: str
    title_separator: str | None


_CSV_HEADER = b"userId,movieId,rating,timestamp"
LAYOUTS: Mapping[str, Layout] = {
    "ml-100k": Layout(("ml-100k",), "u.data", b"\t", None, "u.item", "|"),
    "ml-1m": Layout(("ml-1m",), "ratings.dat", b"::", None, "movies.dat", "::"),
    "ml-10m": Layout(("ml-10m", "ml-10M100K"), "ratings.dat", b"::", None, "movies.dat", "::"),
    "ml-20m": Layout(("ml-20m",), "ratings.csv", b",", _CSV_HEADER, "movies.csv", None),
    "ml-25m": Layout(("ml-25m",), "ratings.csv", b",", _CSV_HEADER, "movies.csv", None),
}


def read_movielens(folder: Folder, layout: Layout) -> Interactions:
    """All ratings of a release as interactions, whatever the rating was.

    Args:
        folder: where its files lie.
        layout: which release it is.

    Returns:
        Users and items that occur in the ratings, in the order of their ids; titles where the
        file of titles is there.

    Raises:
        DataError: when a line is malformed or a user rated an item twice.
    """
    users, items, times = read_columns(
        folder, layout.ratings, RATING_COLUMNS, separator=layout.separator, header=layout.header
    )
    where = line_namer(folder.label(layout.ratings), 1 + (layout.header is not None))
    item_ids = np.unique(items)
    titles = read_titles(folder, layout, item_ids)
    return Interactions.from_pairs(
        users, items, times, item_ids=item_ids, titles=titles, where=where
    )


def read_titles(folder: Folder, layout: Layout, item_ids: NDArray[Any]) -> tuple[str, ...] | None:
    """A title for each item id, or None when the file of titles is not there."""
    if not folder.has(layout.titles):
        return None
    known = _readread_titles(folder, layout)
    return tuple(known.get(item, f"item {item}") for item in item_ids.tolist())


def _readread_titles(folder: Folder, layout: Layout) -> dict[int, str]:
    label = folder.label(layout.titles)
    content = folder.read(layout.titles)
    if layout.title_separator is None:
        rows = _quoted_rows(decoded(content, label, "utf-8"))
    else:
        lines = decoded(content, label, TEXT_ENCODING).removesuffix("\n").split("\n")
        rows = [(at, line.split(layout.title_separator)) for at, line in enumerate(lines, 1)]
    return dict(_titled(fields, label, line) for line, fields in rows)


def _quoted_rows(text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text))
    next(reader, None)
    return [(reader.line_num, fields) for fields in reader]


def _titled(fields: Sequence[str], label: str, line: int) -> tuple[int, str]:
    if len(fields) >= 2 and fields[0].isdecimal():
        return int(fields[0]), fields[1].strip()
    rule = "a line starts with the item's id and its title"
    found = f"{shown('|'.join(fields))} has no id and title"
    raise bad_line(label, line, found, rule, "use the publisher's own file, or remove it")
