"""MovieLens as its publisher lays it out.

Source: Harper & Konstan, "The MovieLens Datasets" (TiiS 2015).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.cells import Where, refuse_infinite, whole_numbers
from privrec.data.files import read_columns
from privrec.data.folder import Folder
from privrec.data.interactions import Interactions
from privrec.data.problems import bad_file, line_namer, shown
from privrec.errors import DataError

Int64Array = NDArray[np.int64]
WHOLE = re.compile("[0-9]{1,18}")


@dataclass(frozen=True)
class Layout:
    """Where one release of MovieLens keeps what.

    Args:
        folders: names its folder goes by.
        ratings: file of the ratings.
        separator: between its fields.
        columns: of user, item, rating and time: in its header, or by number.
        titles: file of the titles.
        title_separator: between its fields; None for quoted comma-separated values.
    """

    folders: tuple[str, ...]
    ratings: str
    separator: str
    columns: tuple[str, ...] | tuple[int, ...]
    titles: str
    title_separator: str | None


_NUMBERED = (1, 2, 3, 4)
_NAMED = ("userId", "movieId", "rating", "timestamp")
LAYOUTS: Mapping[str, Layout] = {
    "ml-100k": Layout(("ml-100k",), "u.data", "\t", _NUMBERED, "u.item", "|"),
    "ml-1m": Layout(("ml-1m",), "ratings.dat", "::", _NUMBERED, "movies.dat", "::"),
    "ml-10m": Layout(("ml-10m", "ml-10M100K"), "ratings.dat", "::", _NUMBERED, "movies.dat", "::"),
    "ml-20m": Layout(("ml-20m",), "ratings.csv", ",", _NAMED, "movies.csv", None),
    "ml-25m": Layout(("ml-25m",), "ratings.csv", ",", _NAMED, "movies.csv", None),
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
    users, items, times, where = read_ratings(
        folder, layout.ratings, layout.columns, layout.separator
    )
    item_ids = np.unique(items)
    titles = read_titles(folder, layout, item_ids)
    return Interactions.from_pairs(
        users, items, times, item_ids=item_ids, titles=titles, where=where
    )


def read_ratings(
    folder: Folder, name: str, columns: tuple[str, ...] | tuple[int, ...], separator: str
) -> tuple[Int64Array, Int64Array, Int64Array, Where]:
    """Users, items and times of a file of ratings, and what names a row of it.

    Args:
        folder: where the file lies.
        name: the file.
        columns: of user, item, rating and time: in its header, or by number.
        separator: between its fields.

    Raises:
        DataError: when a line is malformed; a rating must be a number, and is not kept.
    """
    read = read_columns([(folder, name)], columns, separator, width=4)
    user, item, rating, time = read.cells
    users = whole_numbers(user, "user", read.where)
    items = whole_numbers(item, "item", read.where)
    refuse_infinite(rating, "rating", read.where)
    return users, items, whole_numbers(time, "time", read.where, least=None), read.where


def read_titles(folder: Folder, layout: Layout, item_ids: NDArray[Any]) -> tuple[str, ...] | None:
    """A title for each item id, or None when the file of titles is not there."""
    if not folder.has(layout.titles):
        return None
    rows: Iterable[Sequence[str]]
    if layout.title_separator is None:
        read = read_columns([(folder, layout.titles)], ("movieId", "title"))
        rows, where = zip(*(cells.to_pylist() for cells in read.cells), strict=True), read.where
    else:
        rows = [line.split(layout.title_separator) for line in old_text(folder, layout.titles)]
        where = line_namer(folder.label(layout.titles))
    known = {}
    for row, fields in enumerate(rows):
        if len(fields) < 2 or not WHOLE.fullmatch(fields[0]):
            raise bad_file(
                where(row), f"{shown('|'.join(fields))} has no id and title",
                "a line starts with the item's id and its title",
                "use the publisher's own file, or remove it",
            )  # fmt: skip
        known[int(fields[0])] = fields[1].strip()
    return tuple(known.get(item, f"item {item}") for item in item_ids.tolist())


def old_text(folder: Folder, name: str) -> list[str]:
    """Lines in UTF-8 or Latin-1: the publisher's older files are Latin-1, copies often UTF-8."""
    try:
        return list(folder.lines(name))
    except DataError:
        return list(folder.lines(name, "latin-1"))
