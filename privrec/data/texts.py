"""Readers of texts and of labelled examples: files to devices that train and that are held out.

Articles are text files in which a line ``= Title =`` opens one, as WikiText has them. Examples are
in the sparse format of the Extreme Classification Repository (Bhatia et al., 2016), or texts and
their labels in a user's own table, as bags of hashed words.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from privrec.data.corpus import (
    EVERY,
    UNKNOWN,
    UNKNOWN_ID,
    Corpus,
    Examples,
    TextSplit,
    dealt,
    split_devices,
)
from privrec.data.files import BLANKS, File, bad_file, find, places, read_ids, shown, table_files
from privrec.embedding.subspace import finalise
from privrec.errors import DataError
from privrec.randomness import rng_for
from privrec.scenario.schema import Data

END = "<eos>"
EMBEDDED = Path(__file__).with_name("articles.txt")

_TITLE = re.compile(r"^\s*= ([^=].*?) =\s*$")
_SHORTEST = 2  # tokens; a text of one word has no next one
_MOST = 2**31 - 2  # a token is an int32, and label 0 is the unknown one
# Python reads more than the format has: 1_0, and digits of other scripts.
_HEAD = re.compile(r"\s*([0-9]{1,18})\s+([0-9]{1,18})\s+([0-9]{1,18})\s*")
_LINE = re.compile(r"[-0-9,]*(?:[ \t]+[-0-9]+:[-+.0-9A-Za-z]+)*\s*")
_LONGEST = 1 << 20  # characters of a line, which take a hundred times their size while it is read


def load_articles(config: Data, data_dir: Path | None) -> TextSplit:
    """Load the texts of the first place that has any; where none is named, those of the package.

    Words are numbered by their first occurrence.
    """
    roots, files, source = places(config.path, data_dir), [EMBEDDED], "embedded"
    if roots:
        remedy = "point --data (or data.path, or PRIVREC_DATA) at a text file or a folder of them"
        files = find(roots, _texts_in, ".txt", "a text source needs one", remedy)
        source = files[0].parent.name
    words = None
    if config.words is not None:
        beside = (data_dir or Path()) / config.words
        words = read_ids(beside if beside.is_file() else Path(config.words))
    return split_devices(read_articles(files, words), config.holdout, source)


def _texts_in(root: Path) -> list[Path]:
    """The text files of a place, by name."""
    if root.is_file():
        return [root]
    return sorted(root.glob("*.txt")) or sorted((root / "wikitext-2").glob("*.txt"))


def read_articles(files: Sequence[Path], words: Sequence[str] | None = None) -> Corpus:
    """Read articles of text files, tokenised by blanks; a line ``= Title =`` opens one.

    Each line that is not empty ends in :data:`END`. A file without titles is one article. Words
    that are not among ``words`` are unknown; without those, the vocabulary is all words of the
    text, in order of their first occurrence.
    """
    articles = [
        (name, text) for path in files for name, text in _articles(path) if len(text) >= _SHORTEST
    ]
    if not articles:
        searched = ", ".join(map(str, files))
        raise bad_file(searched, "no article", "a text has words", "name a file with text")
    texts = [text for _, text in articles]
    known = {UNKNOWN: UNKNOWN_ID}
    for word in chain.from_iterable(texts) if words is None else (END, *words):
        known.setdefault(word, len(known))
    numbers = (known.get(word, UNKNOWN_ID) for word in chain.from_iterable(texts))
    return Corpus(
        np.cumsum([0, *map(len, texts)]).astype(np.int64),
        np.fromiter(numbers, np.int32),
        tuple(name for name, _ in articles),
        tuple(known),
    )


def _articles(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Names and tokens of a file's articles."""
    name, begun = path.stem, False
    tokens: list[str] = []
    for line in File(path).lines():
        if title := _TITLE.match(line):
            if begun or tokens:
                yield name, tokens
            name, tokens, begun = title[1], [], True
        if found := line.split():
            tokens += [*found, END]
    yield name, tokens


def load_examples(config: Data, data_dir: Path | None) -> TextSplit:
    """Load the examples of a file that have features and labels; deal them to devices at random.

    The file is the one that is named, or else the only one in a folder. The values of features are
    not used.
    """

    def look(root: Path) -> Path | None:
        texts = [root] if root.is_file() else sorted(root.glob("*.txt"))
        return texts[0] if len(texts) == 1 else None

    # A folder that is given beside a path is where the path begins, and no place of its own.
    roots = [r for r in places(config.path, data_dir) if config.path is None or r != data_dir]
    rule = "labels lie in one file of the Extreme Classification Repository's sparse format"
    path = find(roots, look, "file", rule, "point --data (or data.path) at it")
    examples, each = _whole(read_extreme(path)), config.interactions_per_user
    if max(examples.n_features, examples.n_labels) > _MOST:
        found = f"{examples.n_features} features, {examples.n_labels} labels"
        rule = f"at most {_MOST} of each can be numbered"
        raise bad_file(path, found, rule, "use a smaller numbering", line=1)
    if len(examples) < EVERY * each:
        rule = f"{EVERY} devices of {each} are the fewest that can be split"
        remedy = "lower data.interactions_per_user"
        raise bad_file(path, f"{len(examples)} examples", rule, remedy)
    order = rng_for(config.seed, "labels", "devices").permutation(len(examples))
    return split_devices(dealt(examples.take(order), each), config.holdout, path.stem)


def _whole(examples: Examples) -> Examples:
    """Examples that have words and labels, each label of theirs once."""
    row = np.repeat(np.arange(len(examples)), np.diff(examples.label_ends, prepend=0))
    named = np.unique(row * np.int64(examples.n_labels) + examples.labels)
    row, labels = np.divmod(named, examples.n_labels)
    counts = np.bincount(row, minlength=len(examples))
    once = replace(examples, labels=labels, label_ends=np.cumsum(counts))
    words = np.diff(examples.ends, prepend=0)
    return once.take(np.flatnonzero((words > 0) & (counts > 0)))


def read_extreme(path: Path) -> Examples:
    """Read examples of the repository's format: a head line, then ``1,5 0:0.5 7:1.25`` lines.

    The head line has the numbers of examples, features and labels. The text may be packed by gzip.
    """
    if not path.is_file():
        raise bad_file(path, "cannot be read", "it must be a text file", "check the path")
    lines = File(path).lines()
    head = next(lines)
    found = _HEAD.fullmatch(head)
    size = tuple(map(int, found.groups())) if found else (0, 0, 0)
    if min(size) < 1:
        rule = "the first line has the numbers of examples, features and labels"
        raise bad_file(path, shown(head), rule, "write these three numbers", line=1)
    labels, features, values = array("q"), array("q"), array("f")
    label_ends, ends = array("q"), array("q")
    for number, line in enumerate(lines, 2):
        own, places, weights = _parsed(line, size[1:], path, number)
        labels.extend(own)
        features.extend(places)
        values.extend(weights)
        label_ends.append(len(labels))
        ends.append(len(features))
    if len(ends) != size[0]:
        rule = f"its first line promises {size[0]}"
        remedy = "fetch the whole file again, or correct the first line"
        raise bad_file(path, f"{len(ends)} examples", rule, remedy)
    return Examples(
        np.array(ends),
        np.array(features),
        np.array(values),
        np.array(label_ends),
        np.array(labels),
        *size[1:],
    )


def _parsed(
    line: str, size: Sequence[int], path: Path, number: int
) -> tuple[list[int], list[int], list[float]]:
    """Labels, features and values of a line."""
    if len(line) > _LONGEST:
        rule, remedy = f"an example has at most {_LONGEST}", "correct it, or split the example"
        raise bad_file(path, f"{len(line)} characters", rule, remedy, number)
    own, _, rest = line.partition(" ")
    pairs = [word.split(":") for word in rest.split()]
    try:
        if not _LINE.fullmatch(line):
            raise ValueError
        labels = [int(word) for word in own.split(",") if word]
        features = [int(feature) for feature, _ in pairs]
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            values = np.array([float(value) for _, value in pairs]).astype(np.float32)
    except ValueError:
        rule = "a line has labels between commas, a blank, and features as index:value"
        raise bad_file(path, shown(line), rule, "correct the line", number) from None
    for name, found, most in zip(("feature", "label"), (features, labels), size, strict=True):
        wrong = next((each for each in found if not 0 <= each < most), None)
        if wrong is not None:
            rule = f"{name}s are numbered from 0 to {most - 1}, as the first line says"
            found_one = f"{name} {wrong if abs(wrong) < 10**40 else shown(str(wrong))}"
            raise bad_file(path, found_one, rule, "correct it, or the first line", number)
    if not np.isfinite(values).all():
        rule = "a value must be a finite number of float32"
        raise bad_file(path, shown(line), rule, "correct the line", number)
    return labels, features, values.tolist()


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
        text: columns that are read; of several, each word, as ``tokens`` splits them, carries its
            column's name, so that tables of categories work as texts do.
        label: column of the label; None where labels are not needed.
        between: what separates several labels in a cell; None, a cell is one label.
    """
    # Imported when a file is read, as Arrow takes a tenth of a second.
    from privrec.data.tables import read_columns

    wanted = list(dict.fromkeys([*text, *([] if label is None else [label])]))
    columns = read_columns(table_files(path), wanted, remedy="name the columns as the header does")
    found, where = {column.name: column.texts() for column in columns}, columns[0].where
    labels = [] if label is None else found[label]
    return Labelled(
        tuple(
            _joined(cells, text, SPLITS[tokens])
            for cells in zip(*(found[each] for each in text), strict=True)
        ),
        tuple(_labels(cell, between, str(label), where(row)) for row, cell in enumerate(labels)),
    )


def _joined(cells: Sequence[str], columns: Sequence[str], split: Callable[[str], list[str]]) -> str:
    if len(cells) == 1:
        return cells[0]
    named = zip(columns, cells, strict=True)
    return " ".join(
        f"{'_'.join(split(name))}_{word}" for name, cell in named for word in split(cell)
    )


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
    for found in (Counter(split(text.lower())) for text in texts):
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
    """All labels, the most frequent first; fewer than two are refused: nothing could be learned."""
    counts = Counter(label for row in rows for label in row)
    if len(counts) < 2:
        raise DataError(
            f"{len(counts)} distinct labels in {len(rows)} rows: at least two are told apart; "
            "check which column has the labels"
        )
    return tuple(sorted(counts, key=lambda label: (-counts[label], label)))
