"""Examples of extreme classification: sparse features, and a few of very many labels each.

The reader takes the sparse text format of the Extreme Classification Repository. The generator
invents data of the shape of its sets: labels follow Zipf's law and lie in clusters, an example's
words tell its labels, their cluster, or nothing. What a label means is computed from a keyed mixer
when it is needed, so nothing of the size of labels times features is ever held.
Source of format and shapes: Bhatia et al., "The extreme classification repository" (2016).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privrec.data.folder import table_files
from privrec.data.problems import bad_file, bad_line, shown
from privrec.embedding.hashing import finalise
from privrec.errors import UsageError
from privrec.randomness import rng_for

Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float32]
NO_LABEL = -1
# Python reads more than the format has: 1_0, and digits of other scripts.
_HEAD = re.compile(r"\s*([0-9]{1,18})\s+([0-9]{1,18})\s+([0-9]{1,18})\s*")
_LINE = re.compile(r"[-0-9,]*(?:[ \t]+[-0-9]+:[-+.0-9A-Za-z]+)*\s*")
_LONGEST = 1 << 20  # characters of a line, which take a hundred times their size while it is read
_OWN, _CLUSTER = 0.5, 0.25  # shares of words that tell a label, and its cluster
_LABEL_WORDS, _CLUSTER_WORDS = 12, 96


@dataclass(frozen=True, eq=False)
class Examples:
    """Sparse examples, row after row.

    Args:
        ends: where the features of each example end, int64 of shape ``(m,)``.
        features: int64, each in ``[0, n_features)``.
        values: float32, one a feature.
        label_ends: where the labels of each example end, shape ``(m,)``.
        labels: int64, each in ``[0, n_labels)``.
        n_features: size of the vocabulary.
        n_labels: number of labels.
    """

    ends: Int64Array
    features: Int64Array
    values: FloatArray
    label_ends: Int64Array
    labels: Int64Array
    n_features: int
    n_labels: int

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, rows: NDArray[np.integer]) -> Examples:
        """Some examples, in the order of ``rows``."""
        chosen, ends = _chosen(self.ends, rows)
        labels, label_ends = _chosen(self.label_ends, rows)
        return Examples(
            ends, self.features[chosen], self.values[chosen],
            label_ends, self.labels[labels], self.n_features, self.n_labels,
        )  # fmt: skip

    def batches(self, size: int, order: NDArray[np.integer] | None = None) -> Iterator[Examples]:
        """The examples in parts of ``size``, in an order of rows; in their own where None."""
        rows = np.arange(len(self)) if order is None else order
        return (self.take(rows[start : start + size]) for start in range(0, len(rows), size))

    def padded_labels(self) -> Int64Array:
        """Labels of each example in a row, filled up by -1, shape ``(m, most)``."""
        counts = np.diff(self.label_ends, prepend=0)
        padded = np.full((len(self), max(1, int(counts.max(initial=1)))), NO_LABEL)
        row = np.repeat(np.arange(len(self)), counts)
        padded[row, np.arange(len(self.labels)) - np.repeat(self.label_ends - counts, counts)] = (
            self.labels
        )
        return padded

    def hashed(self, features: int) -> Examples:
        """The same examples with features hashed down to a smaller vocabulary.

        Args:
            features: size of it; a feature keeps its value and meets others in its place.
        """
        words = finalise(self.features.astype(np.uint64)) % np.uint64(features)
        return Examples(
            self.ends, words.astype(np.int64), self.values,
            self.label_ends, self.labels, features, self.n_labels,
        )  # fmt: skip


@dataclass(frozen=True)
class Invented:
    """What generated data look like.

    Args:
        features: size of the vocabulary, at least 1.
        labels: number of labels, at least 1.
        words: features of an example, at least 1.
        labels_each: mean labels of an example, at least 1.
        clusters: clusters of labels, at most as many as labels.
        zipf: exponent of the labels' frequencies, at least 0.
        seed: of everything.

    Raises:
        UsageError: when a value is out of its range.
    """

    features: int
    labels: int
    words: int = 64
    labels_each: float = 1.0
    clusters: int = 1000
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("features", "labels", "words", "labels_each", "clusters"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at least 1; raise it")
        if self.clusters > self.labels or self.zipf < 0:
            raise UsageError(
                f"clusters = {self.clusters}, zipf = {self.zipf}: at most {self.labels} clusters "
                "for as many labels, and an exponent of 0 or more; change them"
            )

    def examples(self, count: int, part: str = "train") -> Examples:
        """``count`` examples; parts of other names are independent draws of the same world."""
        rng = rng_for(self.seed, "extreme", part)
        first = _zipf(rng, self.labels, self.zipf, count)
        more = rng.poisson(self.labels_each - 1, count)
        owner = np.repeat(np.arange(count), more)
        clusters = first % self.clusters
        within = -(-(self.labels - clusters[owner]) // self.clusters)
        also = clusters[owner] + self.clusters * _zipf(rng, within, self.zipf, len(owner))
        rows = np.concatenate((np.arange(count), owner))
        # An example names a label once.
        pairs = np.unique(rows * np.int64(self.labels) + np.concatenate((first, also)))
        rows, labels = pairs // self.labels, pairs % self.labels
        label_ends = np.cumsum(np.bincount(rows, minlength=count))
        features = self._words(rng, count, labels, label_ends)
        values = np.full(features.size, self.words**-0.5, np.float32)
        ends = np.arange(1, count + 1) * self.words
        return Examples(ends, features, values, label_ends, labels, self.features, self.labels)

    def _words(
        self, rng: np.random.Generator, count: int, labels: Int64Array, ends: Int64Array
    ) -> Int64Array:
        shape = (count, self.words)
        counts = np.diff(ends, prepend=0)[:, None]
        told = labels[ends[:, None] - counts + (rng.random(shape) * counts).astype(np.int64)]
        kind = rng.random(shape)
        words = _zipf(rng, self.features, 1.0, shape)
        own = kind < _OWN
        which = rng.integers(0, _LABEL_WORDS, shape)
        words[own] = self._meant(told[own], which[own], 1)
        near = ~own & (kind < _OWN + _CLUSTER)
        which = rng.integers(0, _CLUSTER_WORDS, shape)
        words[near] = self._meant(told[near] % self.clusters, which[near], 2)
        return words.ravel()

    def _meant(self, subject: Int64Array, which: Int64Array, kind: int) -> Int64Array:
        """The words that tell a label or a cluster, from the mixer."""
        key = np.uint64(2 * self.seed + kind) << np.uint64(40)
        mixed = finalise(finalise(subject.astype(np.uint64) + key) + which.astype(np.uint64))
        return (mixed % np.uint64(self.features)).astype(np.int64)


AMAZON_670K = Invented(135_909, 670_091, words=75, labels_each=5.45, clusters=4096)
"""The shape of Amazon-670K; the repository's split has 490,449 and 153,025 examples."""

DELICIOUS_200K = Invented(782_585, 205_443, words=301, labels_each=75.54, clusters=1024)
"""The shape of Delicious-200K; the repository's split has 196,606 and 100,095 examples."""


def read_extreme(path: Path) -> Examples:
    """Examples of a file in the repository's format: a head line, then ``1,5 0:0.5 7:1.25`` lines.

    Args:
        path: text, plain or packed by gzip or alone in a zip archive; the head line has the
            numbers of examples, features and labels.

    Raises:
        DataError: when the file is missing, or a line breaks the format.
    """
    files = table_files(path, needed=False)
    if len(files) != 1:
        raise bad_file(str(path), "cannot be read", "it must be a text file", "check the path")
    (folder, name), label = files[0], str(path)
    lines = folder.lines(name)
    size = _head(next(lines), label)
    labels, features, values = array("q"), array("q"), array("f")
    label_ends, ends = array("q"), array("q")
    for number, line in enumerate(lines, 2):
        own, places, weights = _parsed(line, size, label, number)
        labels.extend(own)
        features.extend(places)
        values.extend(weights)
        label_ends.append(len(labels))
        ends.append(len(features))
    if len(ends) != size[0]:
        raise bad_file(
            label, f"{len(ends)} examples", f"its first line promises {size[0]}",
            "fetch the whole file again, or correct the first line",
        )  # fmt: skip
    return Examples(
        np.array(ends), np.array(features), np.array(values),
        np.array(label_ends), np.array(labels), size[1], size[2],
    )  # fmt: skip


def _head(line: str, label: str) -> tuple[int, int, int]:
    found = _HEAD.fullmatch(line)
    points, features, labels = map(int, found.groups()) if found else (0, 0, 0)
    if min(points, features, labels) < 1:
        rule = "the first line has the numbers of examples, features and labels"
        raise bad_line(label, 1, shown(line), rule, "write these three numbers")
    return points, features, labels


def _parsed(
    line: str, size: tuple[int, int, int], label: str, number: int
) -> tuple[list[int], list[int], list[float]]:
    if len(line) > _LONGEST:
        rule, remedy = f"an example has at most {_LONGEST}", "correct it, or split the example"
        raise bad_line(label, number, f"{len(line)} characters", rule, remedy)
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
        raise bad_line(label, number, shown(line), rule, "correct the line") from None
    for name, found, most in (("feature", features, size[1]), ("label", labels, size[2])):
        wrong = next((each for each in found if not 0 <= each < most), None)
        if wrong is not None:
            rule = f"{name}s are numbered from 0 to {most - 1}, as the first line says"
            found_one = f"{name} {wrong if abs(wrong) < 10**40 else shown(str(wrong))}"
            raise bad_line(label, number, found_one, rule, "correct it, or the first line")
    if not np.isfinite(values).all():
        rule = "a value must be a finite number of float32"
        raise bad_line(label, number, shown(line), rule, "correct the line")
    return labels, features, values.tolist()


def _chosen(ends: Int64Array, rows: NDArray[np.integer]) -> tuple[Int64Array, Int64Array]:
    """Places of the entries of some rows, and where each of them ends among those."""
    counts = np.diff(ends, prepend=0)[rows]
    new = np.cumsum(counts)
    return np.arange(new[-1] if len(new) else 0) + np.repeat(ends[rows] - new, counts), new


def _zipf(
    rng: np.random.Generator,
    n: int | Int64Array,
    exponent: float,
    shape: int | tuple[int, ...],
) -> Int64Array:
    """Ranks below ``n`` by a power law, from the inverse of its continuous distribution."""
    u = rng.random(shape)
    if exponent == 1:
        places = np.exp(u * np.log(np.asarray(n) + 1.0)) - 1
    else:
        power = 1 - exponent
        places = (u * ((np.asarray(n) + 1.0) ** power - 1) + 1) ** (1 / power) - 1
    ranks: Int64Array = np.minimum(places.astype(np.int64), np.asarray(n) - 1)
    return ranks
