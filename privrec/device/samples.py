"""What devices look at in a round: their own items, and what those are contrasted with.

A device draws from its own key, so that alone it draws what it draws among others. Each positive
has uniform negatives of its own, or all of them share a budget of ``B`` items of the catalogue.
What is drawn within a budget is a sample of what a softmax would sum over, so each carries the
logarithm of how many it stands for. What is selected, by the device's own vectors and functions of
its own, stands for itself; a part by chance always remains beside it, since training on nothing
but hard negatives collapses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.subspace import GOLDEN, finalise, splitmix64
from privrec.embedding.table import distinct, representatives
from privrec.randomness import SecureStream
from privrec.search.memory import outside
from privrec.search.select import Search, mix, select

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]

EACH = "each"
CHANCE = frozenset({"uniform", "popularity"})
POPULARITY_POWER = 0.75

_SPARSE = 64  # catalogues this much larger than what is asked for are not marked as a whole
_REFINED = 0x5E1E_C7ED
_WORD = 2.0**-32


@dataclass(frozen=True)
class Histories:
    """Data of ``m`` devices, one after the other: items, or the tokens of texts or examples.

    ``users`` names each device's draws; ``indptr``, shape ``(m + 1,)``, bounds its ``items``.
    """

    users: Items
    indptr: Items
    items: NDArray[np.int32]

    @classmethod
    def alone(cls, user: int, items: NDArray[np.int32]) -> Histories:
        """Of a single device."""
        return cls(np.array([user]), np.array([0, len(items)]), items)

    @property
    def lengths(self) -> Items:
        """Items of each device, shape ``(m,)``."""
        return np.diff(self.indptr)

    @property
    def ages(self) -> Items:
        """The place of each item from the end of its history, 1 for the last."""
        return np.repeat(self.indptr[1:], self.lengths) - np.arange(self.indptr[-1])

    def of(self, row: int) -> NDArray[np.int32]:
        """The items of one device."""
        return self.items[self.indptr[row] : self.indptr[row + 1]]

    def select(self, rows: Items) -> Histories:
        """The data of some of the devices, in the order of ``rows``."""
        lengths = self.lengths[rows]
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        offsets = np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return Histories(self.users[rows], indptr, self.items[offsets + np.arange(indptr[-1])])

    def below(self, held: int) -> Histories:
        """The histories less the items beyond the first ``held``."""
        kept = self.items < held
        before = np.concatenate(([0], np.cumsum(kept)))
        return Histories(self.users, before[self.indptr], self.items[kept])

    def marks(self, n_items: int) -> NDArray[np.bool_]:
        """Which items of a catalogue each history has, shape ``(m, n_items)``."""
        marks = np.zeros((len(self.users), n_items), dtype=np.bool_)
        marks[np.repeat(np.arange(len(marks)), self.lengths), self.items] = True
        return marks

    def have(self, items: Items, n_items: int) -> NDArray[np.bool_]:
        """Which ``items`` of a catalogue, ``(m, k)``, each history has."""
        if n_items <= _SPARSE * items.shape[1]:
            return np.take_along_axis(self.marks(n_items), items, axis=1)
        pairs = self.pairs(n_items)
        wanted = items + n_items * np.arange(len(items))[:, None]
        found = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
        return np.asarray(pairs[found] == wanted) if len(pairs) else np.zeros(items.shape, np.bool_)

    def pairs(self, n_items: int) -> Items:
        """Ascending numbers of all pairs that occur: the device's row times ``n_items``, plus it.

        They stand for the histories as one set of a catalogue of ``m * n_items``.
        """
        rows = np.repeat(np.arange(len(self.users)), self.lengths)
        return distinct(rows * n_items + self.items)

    def sets(self) -> list[Items]:
        """Each history's items, ascending and without repeats."""
        return [distinct(self.of(row)).astype(np.int64) for row in range(len(self.users))]


@dataclass(frozen=True)
class Batch:
    """Items that ``m`` devices train on, ``k`` each: their samples, or the whole catalogue.

    ``valid``, ``positives`` and ``weights`` are as in :class:`~privrec.models.losses.Samples`.
    ``items`` are of the shape ``(1, k)`` when all devices look at the same; padding names item 0.
    ``first`` is the sample that stands for each one's item; None when none is named twice.
    """

    items: Items
    valid: FloatArray
    positives: int
    first: Items | None
    weights: FloatArray | None = None


@dataclass(frozen=True)
class Sampler:
    """Draws each device's samples: positives, and fresh negatives out of its history.

    ``negatives`` are for each positive, unless there is a ``budget`` for all together; ``most``
    bounds the positives in a round; ``whole`` looks at all ``n_items`` it holds, without samples.
    With ``recency`` the k-th last item of a history counts ``k ** -recency``, and its own negatives
    as much.
    """

    n_items: int
    negatives: int
    most: int | None
    whole: bool = False
    budget: NegativeBudget | None = None
    recency: float = 0.0

    def width(self, lengths: Items) -> Items:
        """Samples that devices with histories of these lengths train on."""
        if self.whole:
            return np.full_like(lengths, self.n_items)
        used = np.maximum(self._used(lengths), 1)
        return used * (1 + self.negatives) if self.budget is None else used + self.budget.size

    def _used(self, lengths: Items) -> Items:
        return lengths if self.most is None else lengths.clip(max=self.most)

    def draw(self, histories: Histories, key: int) -> Batch:
        """Samples of each device; the same key and user give the same.

        The positives are the history, or a window of it at a random place if ``most`` is less.
        """
        if self.whole:
            valid = np.zeros((len(histories.users), self.n_items), np.float32)
            rows = np.repeat(np.arange(len(valid)), histories.lengths)
            valid[rows, histories.items] = self._weights(histories.ages)
            return Batch(np.arange(self.n_items)[None], valid, 0, None)
        used = self._used(histories.lengths)
        lengths = np.maximum(histories.lengths, 1)[:, None]
        place = np.arange(max(1, used.max(initial=0)))
        start = (splitmix64(key, histories.users) >> np.uint64(33)).astype(np.int64)[:, None]
        index = histories.indptr[:-1, None] + (start + place) % lengths
        present = place < used[:, None]
        padded = np.append(histories.items, np.int32(0))
        positives = np.where(present, padded[np.where(present, index, 0)], 0).astype(np.int64)
        counted = np.where(present, self._weights(histories.indptr[1:, None] - index), 0)
        weights = None
        if self.budget is not None:
            negatives, logs, fresh = self.budget.draw(histories, key)
            weights = np.concatenate((np.zeros(positives.shape, np.float32), logs), axis=1)
        else:
            count = positives.shape[1] * self.negatives
            negatives = uniform(key, histories.users, count, self.n_items)
            fresh = np.repeat(counted, self.negatives, axis=1)
            if count:
                fresh[histories.have(negatives, self.n_items)] = 0
        items = np.concatenate((positives, negatives), axis=1)
        counts = np.concatenate((counted, fresh), axis=1).astype(np.float32)
        first = representatives(items, self.n_items)
        return Batch(items, counts, positives.shape[1], first, weights)

    def _weights(self, ages: Items) -> FloatArray:
        """What items count, of an age of 1 for the last of a history."""
        return ages.clip(min=1).astype(np.float32) ** np.float32(-self.recency)


@dataclass(frozen=True)
class NegativeBudget:
    """How many negatives, from 1 to ``n_items``, a device has for all of its positives, and which.

    Args:
        selector: ``"uniform"``, ``"popularity"``, or one of :mod:`privrec.search.select`.
        selected: share of the budget that is selected, below 1; the rest is uniform.
        popularity: where popular items are drawn more often, see :func:`popularity_of`.
    """

    n_items: int
    size: int
    selector: str
    selected: float
    popularity: NDArray[np.float64] | None = None

    @property
    def is_selective(self) -> bool:
        """Whether negatives are chosen by score."""
        return self.selector not in CHANCE and self.size < self.n_items

    def draw(self, histories: Histories, key: int) -> tuple[Items, FloatArray, NDArray[np.bool_]]:
        """Negatives by chance: items, log weights, and which count, each of shape ``(m, size)``.

        A budget with room for every item draws nothing: each counts once that is not a positive.
        """
        if self.size == self.n_items:
            valid = ~histories.marks(self.n_items)
            items = np.broadcast_to(np.arange(self.n_items), valid.shape)
            return items, np.zeros(valid.shape, np.float32), valid
        if self.popularity is not None:
            return self._popular(self.popularity, histories, key)
        m, n = len(histories.users), self.n_items
        starts = np.arange(m + 1)[:, None] * n
        pairs = histories.pairs(n)
        before = np.searchsorted(pairs, starts)
        left = n - np.diff(before, axis=0)
        some = np.maximum(1, left)
        places = uniform(key, histories.users, self.size, some)
        # All catalogues one after the other, less all histories.
        items = outside(pairs, places + (starts - before)[:-1]) - starts[:-1]
        weights = np.broadcast_to(np.log(some / self.size), items.shape).astype(np.float32)
        present = histories.lengths[:, None] < n
        return np.where(left, items, 0), weights, np.broadcast_to(present, items.shape).copy()

    def _popular(
        self, cumulative: NDArray[np.float64], histories: Histories, key: int
    ) -> tuple[Items, FloatArray, NDArray[np.bool_]]:
        words = uniform(key, histories.users, self.size, 1 << 32)
        items = np.searchsorted(cumulative, (words + 0.5) * _WORD, side="right")
        items = items.clip(max=self.n_items - 1)
        chances = np.diff(cumulative, prepend=0.0)
        weights, valid = np.empty(items.shape, np.float32), np.empty(items.shape, np.bool_)
        for row, history in enumerate(histories.sets()):
            valid[row] = ~np.isin(items[row], history)
            kept = max(1, int(valid[row].sum()))
            remaining = max(1 - chances[history].sum(), np.finfo(np.float64).tiny)
            weights[row] = np.log(remaining / (kept * chances[items[row]]))
        return items, weights, valid

    def refine(
        self,
        batch: Batch,
        histories: Histories,
        queries: FloatArray,
        search: Search,
        functions: Functions,
        key: int,
    ) -> Batch:
        """The batch with a part of its negatives selected, and the others uniform over the rest.

        ``queries``, shape ``(m, search.items.dim)``, and ``functions`` are the devices' own.
        """
        items, weights = batch.items.copy(), np.zeros(batch.items.shape, np.float32)
        valid, first = batch.valid.copy(), batch.positives
        wanted = round(self.selected * self.size)
        for row, history in enumerate(histories.sets()):
            user, query = histories.users[row : row + 1], queries[row : row + 1]
            stream, chosen = functions(int(user[0])), np.zeros(0, np.int64)
            # A user vector of zeros, or of what is no number, likes nothing better than the rest.
            if wanted and query.any() and np.isfinite(query).all():
                chosen = chosen_by(self.selector, search, stream)(query, wanted, history)
            left = self.n_items - len(history) - len(chosen)
            count = self.size - len(chosen)
            places = uniform(key ^ _REFINED, user, count, max(1, left))[0]
            if not left:
                valid[row, first + len(chosen) :] = 0
                places = places[:0]
            found, logs = mix(chosen, history, places, self.n_items)
            items[row, first : first + len(found)] = found
            weights[row, first : first + len(found)] = logs
        again = representatives(items, self.n_items)
        return replace(batch, items=items, valid=valid, first=again, weights=weights)


def popularity_of(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Cumulative probabilities in proportion to ``(count + 1)^0.75`` of public counts, ``(n,)``."""
    weights = (np.maximum(counts, 0) + 1.0) ** POPULARITY_POWER
    return np.asarray(np.cumsum(weights) / weights.sum())


Functions = Callable[[int], SecureStream]
"""A device's own secret stream for its hash functions, by its user."""

Find = Callable[[FloatArray, int, Items], Items]
"""``find(queries, count, exclude)``: at most ``count`` ascending items near some finite queries."""


def chosen_by(selector: str, search: Search, stream: SecureStream) -> Find:
    """A device's own selection, from its own memory and by functions of its own."""
    return lambda queries, count, exclude: select(
        selector, search, queries, count, stream, exclude=exclude
    )


def uniform(
    key: int | NDArray[np.uint64],
    users: NDArray[np.int64],
    count: int,
    n: int | NDArray[np.int64],
) -> NDArray[np.int64]:
    """Keyed draws from ``[0, n)``, shape ``(m, count)``: each user has a stream of splitmix64.

    There is one key, or one for each user; and one ``n`` of at most 2^32, or ``(m, 1)``. The bias
    is below ``n / 2^32``.
    """
    seeds = splitmix64(~key, users)[:, None]
    steps = np.arange(1, (count + 1) // 2 + 1, dtype=np.uint64) * GOLDEN
    words = finalise(seeds + steps).view(np.uint32)[:, :count].astype(np.uint64)
    words *= np.asarray(n, np.uint64)
    words >>= np.uint64(32)
    return words.astype(np.int64)
