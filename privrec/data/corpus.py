"""Texts and labelled examples of devices, and their splits.

Every device owns one text, or a few examples, and devices are held out whole. Words (or labels) are
numbered by how common they are, the unknown one first, so that a vocabulary of any size is a prefix
of the numbering, as with popular items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from privrec.data.files import bad_file
from privrec.data.interactions import Holdout, Interactions, ItemLists, entries
from privrec.embedding.subspace import finalise

Int64Array = NDArray[np.int64]

UNKNOWN = "<unk>"
UNKNOWN_ID = 0
NO_LABEL = -1
EVERY = 10
"""One device in so many is held out."""

_FIRST: dict[Holdout, int] = {"test": 9, "validation": 4}


@dataclass(frozen=True, eq=False)
class Examples:
    """Sparse examples, row after row, of features below ``n_features`` and labels likewise.

    Attributes:
        ends: where the features of each example end, int64 [m].
        label_ends: where its labels end, int64 [m].
    """

    ends: Int64Array
    features: Int64Array
    values: NDArray[np.float32]
    label_ends: Int64Array
    labels: Int64Array
    n_features: int
    n_labels: int

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, rows: NDArray[np.integer]) -> Examples:
        """Some examples, in the order of ``rows``."""
        (words, ends), (labels, label_ends) = (
            entries(np.append(0, each), rows) for each in (self.ends, self.label_ends)
        )
        return replace(
            self,
            ends=ends[1:],
            features=self.features[words],
            values=self.values[words],
            label_ends=label_ends[1:],
            labels=self.labels[labels],
        )

    def batches(self, size: int, order: NDArray[np.integer] | None = None) -> Iterator[Examples]:
        """The examples in parts of ``size``, in an order of rows; in their own where None."""
        rows = np.arange(len(self)) if order is None else order
        return (self.take(rows[start : start + size]) for start in range(0, len(rows), size))

    def padded_labels(self) -> Int64Array:
        """Labels of each example in a row, filled up by :data:`NO_LABEL`, shape ``(m, most)``."""
        counts = np.diff(self.label_ends, prepend=0)
        padded = np.full((len(self), max(1, int(counts.max(initial=1)))), NO_LABEL)
        padded[np.arange(padded.shape[1]) < counts[:, None]] = self.labels
        return padded

    def hashed(self, features: int) -> Examples:
        """Hash features down to this many; one keeps its value and meets others in its place."""
        words = finalise(self.features.astype(np.uint64)) % np.uint64(features)
        return replace(self, features=words.astype(np.int64), n_features=features)


@dataclass(frozen=True, eq=False)
class Corpus(ItemLists):
    """Texts of devices, one after the other, as word numbers in reading order: ``items``.

    Those below zero are no words of the vocabulary, see :func:`dealt`. ``names`` are of the
    articles, one a device; the first of ``words``, the vocabulary, is :data:`UNKNOWN`.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def n_items(self) -> int:
        """Size of the vocabulary."""
        return len(self.words)

    def item_counts(self) -> Int64Array:
        """How often each word occurs, int64 [n_items]."""
        return np.bincount(self.items[self.items >= 0], minlength=self.n_items).astype(np.int64)

    @cached_property
    def distinct(self) -> Interactions:
        """Which words each device uses, each named once: what a private count is made of."""
        named = self.items >= 0
        pairs = np.unique(self.users[named] * np.int64(self.n_items) + self.items[named])
        bounds = np.searchsorted(pairs, np.arange(self.n_users + 1) * self.n_items)
        items = (pairs % self.n_items).astype(np.int32)
        ids = np.array(self.names, object), np.array(self.words, object)
        return Interactions(bounds.astype(np.int64), items, None, *ids)

    def select(self, rows: NDArray[np.integer]) -> Corpus:
        """The texts of some devices, in the order of ``rows``."""
        places, indptr = entries(self.indptr, rows)
        names = tuple(self.names[row] for row in rows)
        return replace(self, indptr=indptr, items=self.items[places], names=names)

    def renumbered(self, order: Int64Array, size: int | None = None) -> Corpus:
        """Number words anew; those beyond the first ``size``, at least 1, become unknown.

        ``order`` has the present position of each new one, the unknown word first.
        """
        kept = order[:size]
        new = np.full(self.n_items, UNKNOWN_ID, np.int32)
        new[kept] = np.arange(len(kept), dtype=np.int32)
        items = np.where(self.items < 0, self.items, new[self.items.clip(min=0)])
        return replace(self, items=items, words=tuple(self.words[word] for word in kept))


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts of the devices that train, and of those that are held out; ``source`` is for people.

    At most ``vocabulary`` words are kept once they are numbered; all, where it is None.
    """

    train: Corpus
    heldout: Corpus
    holdout: Holdout
    source: str
    vocabulary: int | None = None

    @property
    def n_items(self) -> int:
        """Words that the model is to know."""
        return min(self.train.n_items, self.vocabulary or self.train.n_items)

    def renumbered(self, order: Int64Array) -> TextSplit:
        """As :meth:`Corpus.renumbered`, of both parts, cut to the vocabulary."""
        train = self.train.renumbered(order, self.n_items)
        return replace(self, train=train, heldout=self.heldout.renumbered(order, self.n_items))

    def describe(self) -> dict[str, int | float | str | bool]:
        """Figures of the split, ready for JSON."""
        train, named = self.train, np.append(0, np.cumsum(self.train.items >= 0))
        counts = np.diff(named[train.indptr])
        return {
            "users": train.n_users,
            "items": self.n_items,
            "interactions": int(counts.sum()),
            "heldout": int((self.heldout.items >= 0).sum()),
            "tested_users": self.heldout.n_users,
            "shortest_history": int(counts.min()),
            "median_history": float(np.median(counts)),
            "longest_history": int(counts.max()),
            "holdout": self.holdout,
            "text": self.source,
        }


def split_devices(corpus: Corpus, holdout: Holdout, source: str) -> TextSplit:
    """Hold out every tenth device; the same one whatever else is asked for.

    With ``"validation"`` it is another tenth, and the test devices are left out altogether.
    """
    if corpus.n_users < EVERY:
        found, rule = f"{corpus.n_users} articles", f"a split needs {EVERY} or more"
        raise bad_file(source, found, rule, "name a text with more '= Title =' lines")
    place = np.arange(corpus.n_users) % EVERY
    out = place == _FIRST[holdout]
    train, heldout = np.flatnonzero(~out & (place != _FIRST["test"])), np.flatnonzero(out)
    return TextSplit(corpus.select(train), corpus.select(heldout), holdout, source)


def dealt(examples: Examples, each: int) -> Corpus:
    """Deal examples to devices in order, ``each`` a device; drop the incomplete remainder.

    A device's row has the words of an example, then its labels. A label is a token like any other,
    from 1 on. A word is a negative token, ``-1 - word``, and no part of the vocabulary: it is
    neither counted nor numbered anew.
    """
    devices = len(examples) // each
    examples = examples.take(np.arange(devices * each))
    counts = np.diff(examples.ends, prepend=0), np.diff(examples.label_ends, prepend=0)
    rows = np.arange(len(examples))
    owner = np.concatenate([np.repeat(rows, count) for count in counts])
    # A stable sort by example leaves its words before its labels.
    order = np.argsort(owner, kind="stable")
    tokens = np.concatenate((-1 - examples.features, examples.labels + 1))[order]
    ends = (examples.ends + examples.label_ends)[each - 1 :: each]
    return Corpus(
        np.append(0, ends).astype(np.int64),
        tokens.astype(np.int32),
        tuple(f"device {number + 1}" for number in range(devices)),
        (UNKNOWN, *(str(number) for number in range(examples.n_labels))),
    )


def examples_in(tokens: NDArray[np.integer]) -> Examples:
    """The examples that a row of tokens holds, see :func:`dealt`; one empty one without any word.

    A word of an example that has ``k`` of them counts ``1 / √k``: all are of length 1. Unknown
    labels are left out.
    """
    words = tokens < 0
    starts = words & ~np.concatenate(([False], words))[:-1]
    owner, count = np.cumsum(starts) - 1, max(1, int(starts.sum()))
    labels = ~words & (tokens != UNKNOWN_ID) & (owner >= 0)
    counts = np.bincount(owner[words], minlength=count)
    features = -1 - tokens[words].astype(np.int64)
    named = tokens[labels].astype(np.int64)
    return Examples(
        np.cumsum(counts),
        features,
        np.repeat(counts, counts).astype(np.float32) ** -0.5,
        np.cumsum(np.bincount(owner[labels], minlength=count)),
        named,
        int(features.max(initial=0)) + 1,
        int(named.max(initial=0)) + 1,
    )
