"""A table of somebody's own as a data set: which rows count, and what items are called.

What is left out is counted, for whoever describes the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import compute

from privrec.data.files import PARQUET, File, bad_file, table_files
from privrec.data.interactions import Interactions
from privrec.data.sniff import separator_of
from privrec.data.tables import Column, Names, read_columns
from privrec.scenario.schema import Data

_WORDS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", "::": "two colons"}


def read_table(path: Path, form: Data) -> Interactions:
    """Read a user's own table, one interaction a row; see :func:`~privrec.data.files.table_files`.

    Ids are numbers if all of a column are whole numbers of 64 bits as they are usually written
    (``7``, not ``007``), otherwise all of them are text as it stands. Times are kept if they are
    whole numbers; decimals and dates written as text (without a zone: UTC) become whole numbers of
    the smallest unit that keeps them exactly. Blanks around a cell do not count.

    Rows below ``min_rating`` are left out first, then all but one of each user and item, then users
    and items with too few of each other (:meth:`~privrec.data.interactions.Interactions.core`).
    """
    roles = {"user": form.user_column, "item": form.item_column}
    roles |= {} if form.time_column is None else {"time": form.time_column}
    roles |= {} if form.min_rating is None else {"rating": form.rating_column}
    if form.titles is None and form.title_column is not None:
        roles["title"] = form.title_column
    names = list(roles.values())
    if len(set(names)) < len(names) or len({type(name) for name in names}) > 1:
        rule = f"{', '.join(roles)} are different columns, all by name or all by number from 1"
        raise bad_file(path, f"columns {names}", rule, "set data.user_column and so on")
    files = table_files(path)
    separator = form.separator or _separator(files, names, form.encoding)
    read = read_columns(files, names, separator, form.encoding)
    columns = dict(zip(roles, read, strict=True))
    facts: dict[str, int | str] = {}
    if separator is not None:
        facts["separator"] = _WORDS.get(separator, separator)
    users, items = columns["user"].ids(), columns["item"].ids()
    times, rows, where = None, np.arange(len(users)), columns["user"].where
    if "time" in columns:
        order = form.day_first if form.day_first is not None else columns["time"].day_first()
        times = columns["time"].times(order)
        facts |= {} if order is None else {"dates": "day first" if order else "month first"}
    if "rating" in columns:
        rows = np.flatnonzero(columns["rating"].numbers() >= form.min_rating)
        facts["low_ratings_left_out"] = len(users) - rows.size
        if not rows.size:
            rule = f"no row has at least data.min_rating = {form.min_rating:g}"
            raise bad_file(path, f"column {form.rating_column!r}", rule, "lower data.min_rating")
        users, items = users.take(rows), items.take(rows)
        times = None if times is None else times[rows]
    found = Interactions.from_pairs(
        users, items, times, where=lambda row: where(int(rows[row])), duplicates=form.duplicates
    )
    found = replace(found, facts={**facts, **found.facts})
    if form.min_user > 1 or form.min_item > 1:
        found = found.core(form.min_user, form.min_item)
    if form.titles is not None:
        return replace(found, titles=_titled(found, *_listed(path, form)))
    if "title" in columns:
        return replace(found, titles=_titled(found, columns["item"], columns["title"]))
    return found


def _separator(files: Sequence[File], names: Names, encoding: str) -> str | None:
    """What separates the fields of the first part that has some; None where none is a text."""
    texts = (file for file in files if file.suffix not in PARQUET and not file.is_empty())
    return next((separator_of(file, names, encoding) for file in texts), None)


def _listed(table: Path, form: Data) -> list[Column]:
    """Items and titles, from the file that lists them."""
    beside = table if table.is_dir() else table.parent
    places = [place for place in (beside / form.titles, Path(form.titles)) if place.exists()]
    if not places:
        rule = f"data.titles names a file in {beside} or in the working directory"
        raise bad_file(form.titles, "there is no such file", rule, "correct the path")
    files, names = table_files(places[0]), [form.item_column, form.title_column or "title"]
    if isinstance(form.item_column, int):
        names = [1, form.title_column or 2]
    separator = _separator(files, names, form.encoding)
    remedy = "name them by data.item_column and data.title_column"
    return read_columns(files, names, separator, form.encoding, remedy=remedy)


def _titled(found: Interactions, items: Column, titles: Column) -> tuple[str, ...]:
    """The first title that each item has; one without is called by its id."""
    text = compute.ascii_trim_whitespace(pyarrow.chunked_array([titles.texts()], "large_string"))
    ids = compute.ascii_trim_whitespace(items.cells.cast(pyarrow.large_string()))
    known = compute.not_equal(text, "")
    ids, text = ids.filter(known).combine_chunks().dictionary_encode(), text.filter(known)
    first = np.unique(ids.indices.to_numpy(), return_index=True)[1]
    title_of = dict(zip(ids.dictionary.to_pylist(), text.take(first).to_pylist(), strict=True))
    called = [title_of.get(str(item)) for item in found.item_ids.tolist()]
    if not any(called):
        rule = "none of its ids is that of an item of the table"
        remedy = "check data.item_column, or remove data.titles and data.title_column"
        raise bad_file(items.where(0), f"column {items.name!r}", rule, remedy)
    return tuple(
        title or f"item {item}" for title, item in zip(called, found.item_ids, strict=True)
    )
