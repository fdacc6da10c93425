"""Texts and their labels from a user's own table, and texts as bags of hashed words."""

from __future__ import annotations

import difflib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privrec.data.extreme import Examples
from privrec.data.files import records
from privrec.data.folder import Folder, decoded
from privrec.data.problems import bad_file, bad_line
from privrec.embedding.hashing import finalise
from privrec.errors import DataError

Tokens = Literal["blanks", "words"]
SPLITS: dict[Tokens, Callable[[str], list[str]]] = {
    "blanks": str.split,
    "words": re.compile(r"\w+").findall,
}
"""How a text becomes tokens: what stands between blanks, as in fastText and in the texts of
:mod:`privrec.data.text`; or runs of letters, digits and underscores, which drops signs (``-5`` is
``5``) and breaks words at the combining marks of scripts such as Devanagari."""
Label: TypeAlias = str | int | float


@dataclass(frozen=True)
class Labelled:
    """Texts, one a row, with the labels of each.

    Args:
        texts: what each row says.
        labels: of each row, at least one each, all of one type; empty where none were asked for.
    """

    texts: tuple[str, ...]
    labels: tuple[tuple[Label, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)


def read_labelled(
    path: Path, text: Sequence[str], label: str | None, *, between: str | None = None,
    tokens: Tokens = "blanks",
) -> Labelled:  # fmt: skip
    """Rows of a CSV or TSV file with named columns, in UTF-8.

    Args:
        path: ``.tsv`` is separated by tabs, everything else by commas.
        text: columns that are read; of several, each word carries its column's name, so that
            tables of categories work as texts do.
        label: column of the label; None where labels are not needed.
        between: what separates several labels in a cell; None, a cell is one label.
        tokens: how cells are split where each word carries its column's name.

    Raises:
        DataError: when the file, a column or a line is not as it must be; it names the line.
    """
    name = str(path)
    if not path.is_file():
        raise bad_file(name, "no such file", "a table is read from a file", "check the path")
    content = decoded(Folder(path.parent).read(path.name), name, "utf-8").removeprefix("\ufeff")
    rows = records(content, "\t" if path.suffix.lower() == ".tsv" else ",", name)
    header = [cell.strip() for cell in next(rows, (0, []))[1]]
    wanted = [_column(header, each, name) for each in text]
    target = None if label is None else _column(header, label, name)
    texts, labels = [], []
    for line, cells in rows:
        if not cells:
            continue
        if len(cells) != len(header):
            rule = f"the header has {len(header)}"
            raise bad_line(name, line, f"{len(cells)} fields", rule, "quote separators in a field")
        texts.append(_joined([cells[at] for at in wanted], text, SPLITS[tokens]))
        if target is not None and label is not None:
            labels.append(_labels(cells[target], between, label, name, line))
    if not texts:
        raise bad_file(name, "there is no row", "data follow the header", "copy the file again")
    return Labelled(tuple(texts), tuple(labels))


def _column(header: Sequence[str], wanted: str, file: str) -> int:
    if header.count(wanted) == 1:
        return header.index(wanted)
    near = difflib.get_close_matches(wanted, header, n=1)
    guess = f"; perhaps {near[0]!r}" if near and wanted not in header else ""
    times = "twice or more" if wanted in header else "not"
    raise bad_line(
        file, 1, f"column {wanted!r} is {times} among {', '.join(map(repr, header)) or 'nothing'}",
        "every column that is read is there once",
        f"name the columns as the header does{guess}",
    )  # fmt: skip


def _joined(cells: Sequence[str], columns: Sequence[str], split: Callable[[str], list[str]]) -> str:
    if len(cells) == 1:
        return cells[0]
    words = (
        f"{'_'.join(split(column))}_{word}"
        for column, cell in zip(columns, cells, strict=True)
        for word in split(cell)
    )
    return " ".join(words)


def _labels(cell: str, between: str | None, column: str, file: str, line: int) -> tuple[str, ...]:
    parts = [cell] if between is None else cell.split(between)
    found = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        rule = "every row that is learned from has a label"
        raise bad_line(
            file, line, f"column {column!r} is empty", rule, "fill it in, or remove the line"
        )
    return found


def bags(texts: Iterable[str], features: int, tokens: Tokens = "blanks") -> Examples:
    """Texts as bags of hashed words, with no vocabulary to be learned, kept or shared.

    A word's value is ``1 + log(count)``, scaled so that a text has length one. A text without
    words has no features.

    Args:
        texts: case does not count.
        features: size of the hashed vocabulary.
        tokens: how texts are split.
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
    places = _hashed(list(known), features)
    values = 1 + np.log(np.array(counts, np.float32))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    norms = np.sqrt(np.bincount(rows, values**2, minlength=len(lengths)))
    values /= norms[rows]
    nothing = np.zeros(0, np.int64)
    ends = np.cumsum(lengths)
    empty = np.zeros(len(lengths), np.int64)
    return Examples(
        ends, places[np.array(words, np.int64)], values.astype(np.float32),
        empty, nothing, features, 1,
    )  # fmt: skip


def _hashed(words: Sequence[str], features: int) -> NDArray[np.int64]:
    sums = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    return (finalise(sums) % np.uint64(features)).astype(np.int64)


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
