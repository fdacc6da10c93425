"""Invented data: interactions, texts and labelled examples, each with something to be learned.

The same arguments give the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.corpus import EVERY, UNKNOWN, Corpus, Examples, TextSplit, dealt
from privrec.data.interactions import Interactions, Split, leave_last_out
from privrec.embedding.subspace import finalise, splitmix64
from privrec.randomness import rng_for
from privrec.scenario.schema import Data

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
Shape = int | tuple[int, ...]

_POPULARITY_EXPONENT = 0.8
_OWN_GROUP = 25.0  # how many times likelier an item of one's own group is than another's
_LENGTH_SPREAD = 0.5  # standard deviation of the logarithm of a history's length
_DRAWS = 1 << 18  # interactions drawn at a time
_NUMBERS = 40  # bits of the number of a draw
_START = 1_600_000_000  # seconds since 1970
_MEAN_GAP_S = 6 * 3600.0

_FOLLOWERS = (0.5, 0.25, 0.15, 0.1)  # how often each of the words that follow one does
_FOLLOWS = 0.6  # chance that a word is one of those that follow the last
_TOPICAL = 0.5  # chance, else, that it is of the device's own topic

_OWN, _CLUSTER = 0.5, 0.25  # shares of words that tell a label, and its cluster
_LABEL_WORDS, _CLUSTER_WORDS = 12, 96


def load_interactions(config: Data, data_dir: Path | None) -> Split:
    """Invent the interactions that a scenario asks for."""
    return leave_last_out(generate(config).interactions, holdout=config.holdout)


def load_articles(config: Data, data_dir: Path | None) -> TextSplit:
    """Invent ``config.users`` texts to train on, and others of the same law to be held out."""
    return _with_heldout(config, partial(_texts, config))


def load_examples(config: Data, data_dir: Path | None) -> TextSplit:
    """Invent the labelled examples of ``config.users`` devices, and of others to be held out."""
    each = config.interactions_per_user
    world = Invented(
        config.features,
        config.items - 1,
        labels_each=config.labels_each,
        clusters=config.clusters,
        seed=config.seed,
    )
    return _with_heldout(config, lambda devices: dealt(world.examples(devices * each), each))


def _with_heldout(config: Data, invent: Callable[[int], Corpus]) -> TextSplit:
    """Train on the first devices; of the others, test and validation hold out one half each."""
    users, out = config.users, max(1, config.users // (EVERY - 1))
    corpus = invent(users + 2 * out)
    first = users if config.holdout == "validation" else users + out
    train, heldout = corpus.select(np.arange(users)), corpus.select(np.arange(first, first + out))
    return TextSplit(train, heldout, config.holdout, "synthetic")


# ------------------------------------------------------------------------------------ interactions


@dataclass(frozen=True, eq=False)
class Planted:
    """A synthetic data set together with what generated it.

    Every user belongs to one of several groups of taste and every item too. A history is drawn item
    by item, without repetition, with probability proportional to the item's popularity (a power
    law), times a factor for an item of the user's own group. So the last item is drawn, given the
    earlier ones, from exactly those weights over the items not yet seen: ranking by them is the
    best that anyone can do. Times are in seconds, ``popularity`` [n] is the power law, and
    ``user_groups`` [U] and ``item_groups`` [n] are the groups.
    """

    interactions: Interactions
    popularity: Float64Array
    user_groups: Int64Array
    item_groups: Int64Array

    def weights(self, users: NDArray[np.integer]) -> Float64Array:
        """Unnormalised probability of every item as a user's next one, [m, n]."""
        own = self.user_groups[users][:, None] == self.item_groups
        return self.popularity * np.where(own, _OWN_GROUP, 1.0)


class _Titles(Sequence[Any]):
    """Titles of items by their groups, made when one is read: a catalogue may be large."""

    def __init__(self, groups: Int64Array) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return self._groups.size

    def __getitem__(self, item: Any) -> Any:
        return f"Item {range(len(self))[item] + 1} of group {self._groups[item] + 1}"


def generate(config: Data) -> Planted:
    """Invent the interactions of ``data.source = "synthetic"``; ids are counted from 1.

    Lengths of histories vary around their mean, between 2 and half of the catalogue.
    """
    users, items = config.users, config.items
    rng = rng_for(config.seed, "data", "synthetic")
    popularity = rng.permutation((1.0 + np.arange(items)) ** -_POPULARITY_EXPONENT)
    item_groups = rng.permutation(np.arange(items) % config.clusters)
    user_groups = rng.permutation(np.arange(users) % config.clusters)
    drift = _LENGTH_SPREAD**2 / 2  # makes the mean of the log-normal factor one
    factor = np.exp(rng.normal(-drift, _LENGTH_SPREAD, users))
    wanted = np.rint(config.interactions_per_user * factor)
    lengths = np.clip(wanted, 2, items // 2).astype(np.int64)
    indptr = np.append(0, np.cumsum(lengths))
    key, times = int(rng.integers(2**63)), _times(rng, lengths)
    interactions = Interactions(
        indptr,
        _histories(key, popularity, user_groups, item_groups, indptr),
        times,
        np.arange(1, users + 1),
        np.arange(1, items + 1),
        _Titles(item_groups),
    )
    return Planted(interactions, popularity, user_groups, item_groups)


def _histories(
    key: int,
    popularity: Float64Array,
    user_groups: Int64Array,
    item_groups: Int64Array,
    indptr: Int64Array,
) -> NDArray[np.int32]:
    """All histories one after another, int32 [indptr[-1]], earliest item first.

    The items of a sequence of independent draws, each where it occurs first, are successive draws
    without repetition. Where a sequence has too few of them, one of twice its length is drawn, of
    which it is the beginning: draw ``k`` of a user is a fixed function of the key, the user and
    ``k``. So the work is linear in interactions, whatever the users and items.
    """
    order = np.argsort(item_groups, kind="stable").astype(np.int32)
    # A draw is a place on a line: all items by their popularity, group after group; and beyond
    # them the own group's once more, stretched to what it has beyond another's.
    edges = np.append(0.0, np.cumsum(popularity[order]))
    sizes = np.bincount(item_groups)
    begins = edges[np.cumsum(sizes) - sizes]
    ends = edges[-1] + (_OWN_GROUP - 1) * np.diff(np.append(begins, edges[-1]))

    def items(users: Int64Array, numbers: Int64Array) -> NDArray[np.int32]:
        groups = user_groups[users]
        uniform = (splitmix64(key, (users << _NUMBERS) + numbers) >> np.uint64(11)) * 2.0**-53
        place = uniform * ends[groups]
        beyond = place >= edges[-1]
        again = (place[beyond] - edges[-1]) / (_OWN_GROUP - 1)
        place[beyond] = begins[groups[beyond]] + again
        at: Int64Array = np.searchsorted(edges, place, side="right") - 1
        return np.asarray(order[at.clip(max=order.size - 1)], np.int32)

    lengths, out = np.diff(indptr), np.empty(indptr[-1], np.int32)
    step = max(1, _DRAWS * lengths.size // int(indptr[-1]))
    for start in range(0, lengths.size, step):
        users = np.arange(start, min(start + step, lengths.size))
        draws = lengths[users] * 5 // 4 + 4
        while users.size:
            rows = np.repeat(np.arange(users.size), draws)
            numbers = np.arange(rows.size) - (np.cumsum(draws) - draws)[rows]
            item = items(users[rows], numbers)
            first = np.unique(rows * order.size + item, return_index=True)[1]
            first.sort()
            rows, item = rows[first], item[first]
            found = np.bincount(rows, minlength=users.size)
            rank = np.arange(rows.size) - (np.cumsum(found) - found)[rows]
            kept = rank < lengths[users[rows]]
            out[indptr[users[rows[kept]]] + rank[kept]] = item[kept]
            short = found < lengths[users]
            users, draws = users[short], 2 * draws[short]
    return out


def _times(rng: np.random.Generator, lengths: Int64Array) -> Int64Array:
    """Seconds since 1970, strictly increasing within a user."""
    gaps = 1 + rng.exponential(_MEAN_GAP_S, int(lengths.sum())).astype(np.int64)
    total = np.cumsum(gaps)
    before = np.repeat((total - gaps)[np.cumsum(lengths) - lengths], lengths)
    return np.asarray(_START + total - before)


# -------------------------------------------------------------------------------- texts and labels


def _texts(config: Data, devices: int) -> Corpus:
    """Invent texts of ``config.interactions_per_user`` words each.

    A word is one of four that follow the last one, the first of them in half of the cases; or else
    one of the device's topic or of the whole vocabulary, by Zipf's law. So a model can learn what
    follows what, and what a topic is about, over a vocabulary of any size.
    """
    topics, each, known = config.clusters, config.interactions_per_user, config.items - 1
    rng = rng_for(config.seed, "text")
    cumulative = np.cumsum(1.0 / np.arange(1, known + 1))
    followers = _tabled_zipf(rng, cumulative, (known, len(_FOLLOWERS)))
    topic = rng.integers(topics, size=devices)
    tokens = np.empty((devices, each), np.int32)
    tokens[:, 0] = _tabled_zipf(rng, cumulative, devices)
    odds = np.cumsum(_FOLLOWERS)
    for at in range(1, each):
        free = _tabled_zipf(rng, cumulative, devices)
        # A topic is every n-th word: the nearest one of the topic to a word drawn by Zipf's law.
        own = np.minimum(free // topics * topics + topic, known - 1)
        free = np.where(rng.random(devices) < _TOPICAL, own, free)
        rank = np.minimum(np.searchsorted(odds, rng.random(devices)), len(_FOLLOWERS) - 1)
        next_one = followers[tokens[:, at - 1], rank]
        tokens[:, at] = np.where(rng.random(devices) < _FOLLOWS, next_one, free)
    bounds = np.arange(devices + 1, dtype=np.int64) * each
    names = tuple(f"text {number + 1}" for number in range(devices))
    vocabulary = (UNKNOWN, *(f"w{number}" for number in range(known)))
    return Corpus(bounds, (tokens + 1).astype(np.int32).ravel(), names, vocabulary)


@dataclass(frozen=True)
class Invented:
    """A world of labelled examples, of the shape of extreme classification's sets.

    Labels follow Zipf's law, of exponent ``zipf``, and lie in clusters. An example has ``words``
    out of ``features``, which tell its labels, their cluster, or nothing. What a label means is
    computed from a keyed mixer when it is needed: nothing of labels times features is ever held.
    """

    features: int
    labels: int
    words: int = 64
    labels_each: float = 1.0
    clusters: int = 1000
    zipf: float = 1.0
    seed: int = 0

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
        rows, labels = np.divmod(pairs, self.labels)
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


def _tabled_zipf(rng: np.random.Generator, cumulative: Float64Array, shape: Shape) -> Int64Array:
    """Ranks by the law of which a table has the cumulative weights."""
    places = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return np.asarray(np.minimum(places, len(cumulative) - 1), np.int64)


def _zipf(
    rng: np.random.Generator, n: int | Int64Array, exponent: float, shape: Shape
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
