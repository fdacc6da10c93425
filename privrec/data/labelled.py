"""Texts and their labels from a user's own table, and texts as bags of hashed words."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from privrec.data.corpus import Examples
from privrec.data.files import BLANKS, bad_file, table_files
from privrec.embedding.hashing import finalise
from privrec.errors import DataError

Tokens = Literal["blanks", "words"]
SPLITS: dict[Tokens, Callable[[str], list[str]]] = {
    "blanks": str.split,
    "words": re.compile(r"\w+").findall,
}
"""How a text becomes tokens: what stands between blanks, as in fastText and in the texts of
:mod:`privrec.data.texts`; or runs of letters, digits and underscores, which drops signs (``-5`` is
``5``) and breaks words at the combining marks of scripts such as Devanagari."""
Label: TypeAlias = str | int | float


@dataclass(frozen=True)
class Labelled:
    """Texts, one a row, with the labels of each, of one type; none at all if not asked for."""

    texts: tuple[str, ...]
    labels: tuple[tuple[Label, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)


def read_labelled(
    path: Path,
    text: Sequence[str],
    label: str | None,
    *,
    between: str | None = None,
    tokens: Tokens = "blanks",
) -> Labelled:
    """Read rows of a table with named columns; a text is kept as it stands, blanks included.

    Args:
        path: see :func:`~privrec.data.files.table_files`; text is UTF-8.
        text: columns that are read; of several, each word carries its column's name, so that
            tables of categories work as texts do.
        label: column of the label; None where labels are not needed.
        between: what separates several labels in a cell; None, a cell is one label.
        tokens: how cells are split where each word carries its column's name.
    """
    # Imported when a file is read, as Arrow takes a tenth of a second.
    from privrec.data.tables import read_columns

    wanted = list(dict.fromkeys([*text, *([] if label is None else [label])]))
    columns = read_columns(table_files(path), wanted, remedy="name the columns as the header does")
    found = {column.name: column.texts() for column in columns}
    texts = zip(*(found[each] for each in text), strict=True)
    labels = () if label is None else found[label]
    return Labelled(
        tuple(_joined(cells, text, SPLITS[tokens]) for cells in texts),
        tuple(
            _labels(cell, between, str(label), columns[0].where(row))
            for row, cell in enumerate(labels)
        ),
    )


def _joined(cells: Sequence[str], columns: Sequence[str], split: Callable[[str], list[str]]) -> str:
    if len(cells) == 1:
        return cells[0]
    words = (
        f"{'_'.join(split(column))}_{word}"
        for column, cell in zip(columns, cells, strict=True)
        for word in split(cell)
    )
    return " ".join(words)


def _labels(cell: str, between: str | None, column: str, where: str) -> tuple[str, ...]:
    parts = [cell] if between is None else cell.split(between)
    found = tuple(dict.fromkeys(own for part in parts if (own := part.strip(BLANKS))))
    if not found:
        rule = "every row that is learned from has a label"
        raise bad_file(where, f"column {column!r} is empty", rule, "fill it in, or remove the row")
    return found


def bags(texts: Iterable[str], features: int, tokens: Tokens = "blanks") -> Examples:
    """Turn texts into bags of hashed words, with no vocabulary to be learned, kept or shared.

    A word's value is ``1 + log(count)``, scaled so that a text has length one; case does not
    count. A text without words has no features.
    """
    split = SPLITS[tokens]
    known: dict[str, int] = {}
    words: list[int] = []
    counts: list[int] = []
    lengths: list[int] = []
    for text in texts:
        found = Counter(split(text.lower()))
        words.extend(known.setdefault(word, len(known)) for word in found)
        counts.extend(found.values())
        lengths.append(len(found))
    sums = np.array([zlib.crc32(word.encode()) for word in known], np.uint64)
    places = (finalise(sums) % np.uint64(features)).astype(np.int64)
    values = 1 + np.log(np.array(counts, np.float32))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    norms = np.sqrt(np.bincount(rows, values**2, minlength=len(lengths)))
    return Examples(
        np.cumsum(lengths),
        places[np.array(words, np.int64)],
        (values / norms[rows]).astype(np.float32),
        np.zeros(len(lengths), np.int64),
        np.zeros(0, np.int64),
        features,
        1,
    )


def labels_of(rows: Sequence[Sequence[Label]]) -> tuple[Label, ...]:
    """All labels, the most frequent first.

    Raises:
        DataError: when there are fewer than two: nothing could be learned.
    """
    counts = Counter(label for row in rows for label in row)
    if len(counts) < 2:
        raise DataError(
            f"{len(counts)} distinct labels in {len(rows)} rows: at least two are told apart; "
            "check which column has the labels"
        )
    return tuple(sorted(counts, key=lambda label: (-counts[label], label)))
