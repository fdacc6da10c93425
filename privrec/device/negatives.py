"""Negatives within a budget: what a device contrasts its history with, and what each stands for.

A budget of ``B`` items is a sample of the catalogue that a softmax would sum over, so each of them
carries the logarithm of how many items it stands for. Uniform and popular ones are drawn by the
round's key. Selected ones are those that the device's own user vector scores high: they are found
in the memory by functions of the device's own, and a uniform part always remains beside them,
since training on nothing but hard negatives collapses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import Batch, Histories, representatives, uniform
from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.memory import outside
from privrec.search.select import Search, Selector, mix, select

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
Functions = Callable[[int], SecureStream]
"""A device's own secret stream for its hash functions, by its user."""

EACH = "each"
CHANCE = frozenset({"uniform", "popularity"})
POPULARITY_POWER = 0.75
_REFINED = 0x5E1E_C7ED
_WORD = 2.0**-32


@dataclass(frozen=True)
class NegativeBudget:
    """How many negatives a device has for all of its positives together, and which.

    Args:
        n_items: items that the device holds.
        size: ``B``, at least 1.
        selector: ``"uniform"``, ``"popularity"``, or one of :mod:`privrec.search.select`.
        selected: share of the budget that is selected, below 1; the rest is uniform.
        popularity: for ``"popularity"``, the cumulative probabilities of the items, from public
            counts, shape ``(n_items,)``.
    """

    n_items: int
    size: int
    selector: str
    selected: float
    popularity: NDArray[np.float64] | None = None

    @property
    def is_selective(self) -> bool:
        """Whether negatives are chosen by score."""
        return self.selector not in CHANCE and self.selector != EACH and not self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether it has room for every item, so that nothing is sampled."""
        return self.size >= self.n_items

    def draw(
        self, histories: Histories, key: int, *, popular: bool
    ) -> tuple[Items, FloatArray, NDArray[np.bool_]]:
        """Negatives by chance alone, the same for a device alone as among others.

        A budget with room for every item draws nothing: each counts once that is not a positive.

        Args:
            histories: of ``m`` devices.
            key: the round's key.
            popular: whether popular items are drawn more often, where the budget says so.

        Returns:
            Items, their log weights, and which count, each of shape ``(m, size)``.
        """
        if self.is_whole:
            return self._every(histories)
        if popular and self.popularity is not None:
            return self._popular(self.popularity, histories, key)
        items = np.empty((len(histories.users), self.size), np.int64)
        weights = np.empty(items.shape, np.float32)
        for row, history in enumerate(_sets(histories)):
            left = self.n_items - len(history)
            user = histories.users[row : row + 1]
            places = uniform(key, user, self.size, max(1, left))[0]
            items[row] = outside(history, places) if left else 0
            weights[row] = np.log(max(1, left) / self.size)
        present = np.diff(histories.indptr)[:, None] < self.n_items
        return items, weights, np.broadcast_to(present, items.shape).copy()

    def _every(self, histories: Histories) -> tuple[Items, FloatArray, NDArray[np.bool_]]:
        shape = len(histories.users), self.n_items
        valid = np.ones(shape, np.bool_)
        valid[np.repeat(np.arange(shape[0]), histories.lengths), histories.items] = False
        items = np.broadcast_to(np.arange(self.n_items), shape)
        return items, np.zeros(shape, np.float32), valid

    def refine(
        self, batch: Batch, histories: Histories, queries: FloatArray, search: Search,
        functions: Functions | None, key: int,
    ) -> Batch:  # fmt: skip
        """The batch with a part of its negatives selected, and the others uniform over the rest.

        Args:
            batch: samples of ``m`` devices, positives first.
            histories: theirs.
            queries: theirs, shape ``(m, search.items.dim)``.
            search: the catalogue.
            functions: the devices' secret streams.
            key: the round's key, for the uniform part.

        Raises:
            UsageError: when there are no secret streams.
        """
        if functions is None:
            raise UsageError(
                f'train.selector = "{self.selector}": hash functions are drawn from a secret; hand '
                "over the devices' streams"
            )
        items, weights = batch.items.copy(), np.zeros(batch.items.shape, np.float32)
        valid, first = batch.valid.copy(), batch.positives
        for row, history in enumerate(_sets(histories)):
            user = histories.users[row : row + 1]
            chosen = self._selected(search, queries[row], functions(int(user[0])), history)
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
        return Batch(items, valid, first, again, weights)

    def _selected(
        self, search: Search, query: FloatArray, stream: SecureStream, history: Items
    ) -> Items:
        # A user vector of zeros likes nothing better than anything else.
        wanted = round(self.selected * self.size)
        if not wanted or not query.any() or not np.isfinite(query).all():
            return np.zeros(0, np.int64)
        selector: Selector = self.selector
        return select(selector, search, query[None], wanted, stream, exclude=history).items

    def _popular(
        self, cumulative: NDArray[np.float64], histories: Histories, key: int
    ) -> tuple[Items, FloatArray, NDArray[np.bool_]]:
        words = uniform(key, histories.users, self.size, 1 << 32)
        items = np.searchsorted(cumulative, (words + 0.5) * _WORD, side="right")
        items = items.clip(max=self.n_items - 1)
        chances = np.diff(cumulative, prepend=0.0)
        weights, valid = np.empty(items.shape, np.float32), np.empty(items.shape, np.bool_)
        for row, history in enumerate(_sets(histories)):
            valid[row] = ~np.isin(items[row], history)
            kept = max(1, int(valid[row].sum()))
            remaining = max(1 - chances[history].sum(), np.finfo(np.float64).tiny)
            weights[row] = np.log(remaining / (kept * chances[items[row]]))
        return items, weights, valid


def popularity_of(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Cumulative probabilities in proportion to ``(count + 1)^0.75``, shape ``(n,)``."""
    weights = (np.maximum(counts, 0) + 1.0) ** POPULARITY_POWER
    cumulative: NDArray[np.float64] = np.cumsum(weights) / weights.sum()
    return cumulative


def _sets(histories: Histories) -> list[Items]:
    """Each history's items, ascending and without repeats."""
    bounds = histories.indptr
    return [
        np.unique(histories.items[a:b]).astype(np.int64)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
