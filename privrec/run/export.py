"""Results to take away: lists of recommendations, and the items of a model, as files for others."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.run.recommend import NONE, Lists, TrainedModel

TABLES = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}
"""What writes a table of recommendations, by the ending of its file."""
ITEMS = (".parquet", ".npz")
"""Endings of a file of items."""


def check_ending(path: Path, endings: Iterable[str]) -> None:
    """Raise UsageError for a file that is written in none of these formats, or cannot be."""
    if path.suffix.lower() not in endings:
        raise UsageError(f"{path}: the ending says the format, and is one of {', '.join(endings)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: its folder is not there; make it, or name another")


def tables_of(
    model: TrainedModel, lists: Iterable[Lists], users: NDArray[Any] | None = None
) -> Iterator[pyarrow.Table]:
    """Yield lists as Arrow tables, a row for each recommendation.

    Columns are ``user`` (where the ids of the ``users`` are given, in the order of the lists),
    ``rank`` from 1, ``item``, ``title`` where the data has titles, and ``score``.
    """
    names = {"item": pyarrow.array(model.catalogue.ids)}
    if model.catalogue.titles is not None:
        names["title"] = pyarrow.array(model.catalogue.titles, pyarrow.string())
    owners, start = None if users is None else pyarrow.array(users), 0
    for items, scores in lists:
        kept = items != NONE
        rows, places = np.nonzero(kept)
        columns = {} if owners is None else {"user": owners.take(pyarrow.array(start + rows))}
        columns["rank"] = pyarrow.array((places + 1).astype(np.int32))
        columns |= {name: each.take(pyarrow.array(items[kept])) for name, each in names.items()}
        yield pyarrow.table({**columns, "score": pyarrow.array(scores[kept])})
        start += len(items)


def write_tables(path: Path, tables: Iterator[pyarrow.Table]) -> int:
    """Write tables of the same columns, one after the other, and return the number of rows.

    The file is Parquet or CSV by its ending, and appears whole.
    """
    check_ending(path, TABLES)
    first, count = next(tables), 0
    with _appearing(path) as draft, TABLES[path.suffix.lower()](draft, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)
            count += table.num_rows
    return count


def write_items(path: Path, model: TrainedModel) -> int:
    """Write the ids, titles, vectors and biases of a model's items, and return their number.

    A user's scores are the products of the vectors with the user's own, plus the biases. Parquet
    has columns ``item``, ``title``, ``vector`` and ``bias``; NPZ has arrays ``ids``, ``titles``,
    ``vectors`` ``(n, dim)`` and ``biases`` ``(n,)``, which NumPy reads without pickles.

    Raises:
        UsageError: when scores of the model come from a network.
    """
    check_ending(path, ITEMS)
    if model.local.view.network.tower:
        raise UsageError(
            f'model.kind = "{model.scenario.model.kind}": a network makes the scores of its items, '
            "and no product of vectors; serve it by privrec.load"
        )
    count, titles = len(model.vectors), model.catalogue.titles
    ids, named = model.catalogue.ids[:count], None if titles is None else list(titles[:count])
    with _appearing(path) as draft:
        if path.suffix.lower() == ".npz":
            arrays: dict[str, Any] = {"ids": np.array(ids.tolist()), "vectors": model.vectors}
            arrays |= {} if named is None else {"titles": np.array(named, str)}
            with draft.open("wb") as file:
                np.savez(file, allow_pickle=False, biases=model.biases, **arrays)
        else:
            dim = model.vectors.shape[1]
            flat = pyarrow.array(model.vectors.ravel())
            columns: dict[str, Any] = {"item": ids} | ({} if named is None else {"title": named})
            columns |= {"vector": pyarrow.FixedSizeListArray.from_arrays(flat, dim)}
            pyarrow.parquet.write_table(pyarrow.table({**columns, "bias": model.biases}), draft)
    return count


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its name when all went well, else vanishes."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
