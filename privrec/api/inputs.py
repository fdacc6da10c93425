"""Interactions as people have them in memory: data frames, arrays, matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from pyarrow import types
from scipy import sparse

from privrec.errors import DataError, UsageError
from privrec.randomness import rng_for

COLUMNS = ("user", "item", "time")
"""What the columns are called of what has no names."""


def as_table(data: Any, seed: int) -> pyarrow.Table:
    """Return interactions as an Arrow table, a row each.

    Args:
        data: anything that Arrow reads, such as a data frame of pandas or polars; a mapping of
            columns; an array ``(m, 2)`` of users and items or ``(m, 3)`` with times, or as many
            arrays ``(m,)``; or a matrix of SciPy, users by items, where what is not zero is an
            interaction.
        seed: a matrix has no order, so its interactions are put into one by chance: what is held
            out is the last of each user.
    """
    try:
        if hasattr(data, "__arrow_c_stream__"):
            table = pyarrow.table(data)
        elif isinstance(data, Mapping):
            table = pyarrow.table(dict(data))
        elif sparse.issparse(data):
            table = _of_matrix(data, seed)
        else:
            table = _of_arrays(data)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"interactions of type {type(data).__name__}: they cannot be read as columns "
            f"({error}); give a path, a data frame, arrays of users, items and perhaps times, or "
            "a matrix of SciPy"
        ) from None
    if not table.num_rows:
        raise DataError("no interactions: a data set needs at least one; check what is given")
    for place, name in enumerate(table.column_names):
        if types.is_dictionary(kind := table.schema.types[place]):  # a categorical column
            table = table.set_column(place, name, table.column(place).cast(kind.value_type))
    return table


def _of_matrix(data: Any, seed: int) -> pyarrow.Table:
    matrix = sparse.coo_array(data, copy=True)
    matrix.sum_duplicates()
    places = np.flatnonzero(matrix.data)
    places = rng_for(seed, "data", "matrix").permutation(places)
    users, items = (axis[places].astype(np.int64) for axis in matrix.coords)
    return pyarrow.table([users, items], names=COLUMNS[:2])


def _of_arrays(data: Any) -> pyarrow.Table:
    if isinstance(data, np.ndarray) and data.dtype.names:
        return pyarrow.table({name: data[name] for name in data.dtype.names})
    if isinstance(data, np.ndarray) and data.ndim == 2 and data.shape[1] in (2, 3):
        columns: Sequence[Any] = list(np.ascontiguousarray(data.T))
    elif isinstance(data, tuple) and len(data) in (2, 3):
        columns = [np.asarray(column) for column in data]
    else:
        raise TypeError("neither columns nor an array of two or three of them")
    return pyarrow.table([pyarrow.array(each) for each in columns], names=COLUMNS[: len(columns)])


@contextmanager
def stored(table: pyarrow.Table) -> Iterator[Path]:
    """Keep a table in a file of its owner's alone while it is read, by the rules of all files.

    An error about its content does not name the file, which is gone by then.
    """
    with TemporaryDirectory(prefix="privrec-") as folder:
        path = Path(folder) / "table.parquet"
        try:
            pyarrow.parquet.write_table(table, path)
        except pyarrow.ArrowException as error:
            raise UsageError(
                f"a column cannot be stored ({error}); leave out what is neither number nor text"
            ) from None
        try:
            yield path
        except DataError as error:
            raise type(error)(str(error).replace(str(path), "the table")) from None
