"""Text as next-word prediction needs it: articles that belong to devices, and a vocabulary.

Every article is one device's own text, and devices are held out whole. Words are numbered by how
common they are, the unknown word first, so that a vocabulary of any size is a prefix of the
numbering, as with popular items.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.data.folder import Folder
from privrec.data.interactions import Holdout, Interactions, SourceConfig
from privrec.data.listed import read_ids
from privrec.data.problems import bad_file
from privrec.errors import UsageError
from privrec.randomness import rng_for

UNKNOWN = "<unk>"
END = "<eos>"
UNKNOWN_ID = 0
EMBEDDED = Path(__file__).with_name("articles.txt")

Int64Array = NDArray[np.int64]

_TITLE = re.compile(r"^\s*= ([^=].*?) =\s*$")
EVERY = 10
"""One device in so many is held out."""

_FIRST = {"test": 9, "validation": 4}
_SHORTEST = 2  # tokens; a text of one word has no next one
_FOLLOWERS = 4
_FOLLOWS = 0.6  # chance that a synthetic word is one of those that follow the last
_TOPICAL = 0.5  # chance, else, that it is of the device's own topic
_ZIPF = 1.0


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts of devices, one after the other, as word numbers.

    Tokens below zero are no words of the vocabulary, see :mod:`privrec.data.labels`.

    Args:
        names: of the articles, one a device.
        indptr: int64 [devices + 1]; device ``u`` owns ``tokens[indptr[u]:indptr[u + 1]]``.
        tokens: int32 positions in ``words``, in reading order.
        words: the vocabulary; the first is :data:`UNKNOWN`.
    """

    names: tuple[str, ...]
    indptr: Int64Array
    tokens: NDArray[np.int32]
    words: tuple[str, ...]

    @property
    def n_users(self) -> int:
        """Number of devices."""
        return len(self.names)

    @property
    def n_items(self) -> int:
        """Size of the vocabulary."""
        return len(self.words)

    @property
    def counts(self) -> Int64Array:
        """Tokens of each device, int64 [devices]."""
        return np.diff(self.indptr)

    @property
    def items(self) -> NDArray[np.int32]:
        """The tokens, by the name that histories have for them."""
        return self.tokens

    def item_counts(self) -> Int64Array:
        """How often each word occurs, int64 [n_items]."""
        return np.bincount(self.tokens[self.tokens >= 0], minlength=self.n_items).astype(np.int64)

    @cached_property
    def distinct(self) -> Interactions:
        """Which words each device uses, each named once: what a private count is made of."""
        named = self.tokens >= 0
        owners = np.repeat(np.arange(self.n_users), self.counts)[named]
        pairs = np.unique(owners * self.n_items + self.tokens[named])
        bounds = np.searchsorted(pairs, np.arange(self.n_users + 1) * self.n_items)
        return Interactions(
            bounds.astype(np.int64),
            (pairs % self.n_items).astype(np.int32),
            None,
            np.array(self.names, object),
            np.array(self.words, object),
        )

    def select(self, rows: NDArray[np.integer]) -> Corpus:
        """The texts of some devices, in the order of ``rows``."""
        parts = [self.tokens[self.indptr[row] : self.indptr[row + 1]] for row in rows]
        bounds = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64)
        tokens = np.concatenate(parts) if parts else self.tokens[:0]
        return Corpus(tuple(self.names[row] for row in rows), bounds, tokens, self.words)

    def renumbered(self, order: Int64Array, size: int | None = None) -> Corpus:
        """The same texts with words numbered anew, and rare ones unknown.

        Args:
            order: int64 [n_items], the present position of each new one; the unknown word first.
            size: words that are kept, at least 1; None, all.
        """
        kept = order[:size]
        new = np.full(self.n_items, UNKNOWN_ID, np.int32)
        new[kept] = np.arange(len(kept), dtype=np.int32)
        tokens = np.where(self.tokens < 0, self.tokens, new[self.tokens.clip(min=0)])
        return replace(self, tokens=tokens, words=tuple(self.words[word] for word in kept))


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts of the devices that train, and of those that are held out.

    Args:
        train: every training device's text.
        heldout: texts that no device trains on.
        holdout: ``"test"`` or ``"validation"``.
        source: where the text comes from, in words.
        vocabulary: most words that are kept once they are numbered; None, all.
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
        return replace(
            self,
            train=self.train.renumbered(order, self.n_items),
            heldout=self.heldout.renumbered(order, self.n_items),
        )

    def describe(self) -> dict[str, int | float | str | bool]:
        """Figures of the split, ready for JSON."""
        train, named = self.train, np.concatenate(([0], np.cumsum(self.train.tokens >= 0)))
        counts = np.diff(named[train.indptr])
        return {
            "users": train.n_users,
            "items": self.n_items,
            "interactions": int((train.tokens >= 0).sum()),
            "heldout": int((self.heldout.tokens >= 0).sum()),
            "tested_users": self.heldout.n_users,
            "shortest_history": int(counts.min()),
            "median_history": float(np.median(counts)),
            "longest_history": int(counts.max()),
            "holdout": self.holdout,
            "text": self.source,
        }


class TextConfig(SourceConfig, Protocol):
    """What :func:`load_text` asks of a scenario's ``[data]`` table."""

    @property
    def words(self) -> str | None: ...
    @property
    def vocabulary(self) -> int | None: ...


def load_text(config: TextConfig, *, data_dir: Path | None = None) -> TextSplit:
    """The texts that a scenario asks for, with words in order of their first occurrence.

    Args:
        config: ``[data]`` of a scenario, whose source is ``"text"`` or ``"synthetic_text"``.
        data_dir: what ``--data`` says; ``config.path`` is then looked for inside it first. With
            neither, the text is the small one that comes with the package.

    Raises:
        DataError: when there is no text, or it has too few articles.
    """
    if config.source == "synthetic_text":
        return replace(_synthetic(config), vocabulary=config.vocabulary)
    files = _files(config.path, data_dir)
    source = "embedded" if files == [EMBEDDED] else files[0].parent.name
    words = None if config.words is None else read_ids(_beside(config.words, data_dir))
    split = split_devices(read_articles(files, words), config.holdout, source)
    return replace(split, vocabulary=config.vocabulary)


def read_articles(files: Sequence[Path], words: Sequence[str] | None = None) -> Corpus:
    """Articles of text files, tokenised by blanks; a line ``= Title =`` opens one.

    Each line that is not empty ends in :data:`END`. A file without titles is one article.

    Args:
        files: UTF-8 texts.
        words: the vocabulary, from elsewhere; words that it lacks are unknown. None: all words of
            the text, in order of their first occurrence.

    Raises:
        DataError: when a file is not UTF-8, or has no text.
    """
    names: list[str] = []
    texts: list[list[str]] = []
    for path in files:
        for name, text in _articles(path):
            if len(text) >= _SHORTEST:
                names.append(name)
                texts.append(text)
    if not texts:
        places = ", ".join(str(path) for path in files)
        raise bad_file(places, "no article", "a text has words", "name a file with text")
    known = {UNKNOWN: UNKNOWN_ID}
    if words is None:
        for word in chain.from_iterable(texts):
            known.setdefault(word, len(known))
    else:
        for word in (END, *words):
            known.setdefault(word, len(known))
    numbers = (known.get(word, UNKNOWN_ID) for word in chain.from_iterable(texts))
    tokens = np.fromiter(numbers, np.int32)
    bounds = np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int64)
    return Corpus(tuple(names), bounds, tokens, tuple(known))


def split_devices(corpus: Corpus, holdout: Holdout, source: str) -> TextSplit:
    """Every tenth device held out; the same one whatever else is asked for.

    Args:
        corpus: all devices.
        holdout: which tenth. With ``"validation"`` the test devices are left out altogether.
        source: where the data comes from, in words.

    Raises:
        DataError: when there are fewer than ten devices.
    """
    place = np.arange(corpus.n_users) % EVERY
    if corpus.n_users < EVERY:
        raise bad_file(
            source, f"{corpus.n_users} articles", f"a split needs {EVERY} or more",
            "name a text with more '= Title =' lines",
        )  # fmt: skip
    out = place == _FIRST[holdout]
    left = place == _FIRST["test"]
    train, heldout = np.flatnonzero(~out & ~left), np.flatnonzero(out)
    return TextSplit(corpus.select(train), corpus.select(heldout), holdout, source)


def generate_text(
    *, devices: int, words: int, topics: int, tokens_per_device: int, seed: int
) -> Corpus:
    """Invented texts: the same arguments give the same ones.

    A word is one of four that follow the last one, the first of them in half of the cases; or else
    one of the device's topic or of the whole vocabulary, by Zipf's law. So a model can learn what
    follows what, and what a topic is about, over a vocabulary of any size.

    Args:
        devices: number of texts, at least 1.
        words: size of the vocabulary with the unknown word, at least 16.
        topics: groups of words, at most ``words / 16``.
        tokens_per_device: length of each text, at least 2.
        seed: any integer.

    Raises:
        UsageError: when a value is out of its range.
    """
    if words < 16 or not 1 <= topics <= words // 16 or tokens_per_device < _SHORTEST:
        raise UsageError(
            f"words = {words}, topics = {topics}, tokens_per_device = {tokens_per_device}: a text "
            "has 16 words or more, a topic for at most every 16th, and 2 tokens; raise the words"
        )
    rng = rng_for(seed, "text")
    known = words - 1
    cumulative = np.cumsum(1.0 / np.arange(1, known + 1) ** _ZIPF)
    followers = _zipf(rng, cumulative, (known, _FOLLOWERS))
    topic = rng.integers(topics, size=devices)
    tokens = np.empty((devices, tokens_per_device), np.int32)
    tokens[:, 0] = _zipf(rng, cumulative, devices)
    odds = np.cumsum([0.5, 0.25, 0.15, 0.1])
    for at in range(1, tokens_per_device):
        free = _zipf(rng, cumulative, devices)
        # A topic is every so-many-th word: the nearest one of the topic to a word drawn by Zipf.
        own = np.minimum(free // topics * topics + topic, known - 1)
        free = np.where(rng.random(devices) < _TOPICAL, own, free)
        rank = np.minimum(np.searchsorted(odds, rng.random(devices)), _FOLLOWERS - 1)
        next_one = followers[tokens[:, at - 1], rank]
        tokens[:, at] = np.where(rng.random(devices) < _FOLLOWS, next_one, free)
    names = tuple(f"text {number + 1}" for number in range(devices))
    bounds = np.arange(devices + 1, dtype=np.int64) * tokens_per_device
    vocabulary = (UNKNOWN, *(f"w{number}" for number in range(known)))
    return Corpus(names, bounds, (tokens + 1).astype(np.int32).ravel(), vocabulary)


def _synthetic(config: TextConfig) -> TextSplit:
    """``config.users`` texts to train on, and others of the same law to be held out."""
    corpus = generate_text(
        devices=with_heldout(config.users),
        words=config.items,
        topics=config.clusters,
        tokens_per_device=config.interactions_per_user,
        seed=config.seed,
    )
    return split_after(corpus, config.users, config.holdout)


def with_heldout(users: int) -> int:
    """Synthetic devices in all, of which so many are to train."""
    return users + 2 * max(1, users // (EVERY - 1))


def split_after(corpus: Corpus, users: int, holdout: Holdout) -> TextSplit:
    """The first devices of synthetic ones to train on, and as many as are asked of the others.

    Args:
        corpus: :func:`with_heldout` of them.
        users: those that train.
        holdout: which of the others.
    """
    out = (corpus.n_users - users) // 2
    first = users if holdout == "validation" else users + out
    train, heldout = np.arange(users), np.arange(first, first + out)
    return TextSplit(corpus.select(train), corpus.select(heldout), holdout, "synthetic")


def _zipf(
    rng: np.random.Generator, cumulative: NDArray[np.float64], shape: int | tuple[int, ...]
) -> Int64Array:
    places = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return np.asarray(np.minimum(places, len(cumulative) - 1), np.int64)


def _articles(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Names and tokens of a file's articles."""
    name, begun = path.stem, False
    tokens: list[str] = []
    for line in Folder(path.parent).lines(path.name):
        title = _TITLE.match(line)
        if title is not None:
            if begun or tokens:
                yield name, tokens
            name, tokens, begun = title[1], [], True
        found = line.split()
        if found:
            tokens += [*found, END]
    yield name, tokens


def _beside(name: str, data_dir: Path | None) -> Path:
    inside = None if data_dir is None else data_dir / name
    return inside if inside is not None and inside.is_file() else Path(name)


def _files(path: str | None, data_dir: Path | None) -> list[Path]:
    """The text files that are meant, in order of their names."""
    if path is None and data_dir is None:
        return [EMBEDDED]
    roots = [] if data_dir is None else [data_dir]
    if path is not None:
        roots = [*(root / path for root in roots), *roots, Path(path)]
    for root in roots:
        if root.is_file():
            return [root]
        for folder in (root, root / "wikitext-2"):
            texts = sorted(folder.glob("*.txt"))
            if texts:
                return texts
    raise bad_file(
        ", ".join(map(str, roots)), "no .txt there", "a text source needs one",
        "point --data (or data.path, or PRIVREC_DATA) at a text file or a folder of them",
    )  # fmt: skip
