"""Invented interactions whose best possible recommender is known.

Every user belongs to one of several groups of taste and every item too. A history is drawn item by
item, without repetition, with probability proportional to the item's popularity (a power law) times
a factor for an item of the user's own group. The last item is therefore drawn, given the earlier
ones, from exactly those weights over the items not yet seen: ranking by them is the best that
anyone can do, and its expected hit ratio is a sum that can be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.interactions import Interactions, Split, rows_of
from privrec.errors import DataError
from privrec.randomness import rng_for

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

_POPULARITY_EXPONENT = 0.8
_OWN_GROUP = 25.0  # how many times likelier an item of one's own group is than another's
_LENGTH_SPREAD = 0.5  # standard deviation of the logarithm of a history's length
_CELLS = 1 << 21  # user-item pairs drawn at a time
_START = 1_600_000_000  # seconds since 1970
_MEAN_GAP_S = 6 * 3600.0


@dataclass(frozen=True, eq=False)
class Planted:
    """A synthetic data set together with what generated it.

    Args:
        interactions: all of it, times in seconds.
        popularity: float64 [n], the power law.
        user_groups: int64 [U], the group of taste of each user.
        item_groups: int64 [n], the group that each item belongs to.
    """

    interactions: Interactions
    popularity: Float64Array
    user_groups: Int64Array
    item_groups: Int64Array

    def weights(self, users: NDArray[np.integer]) -> Float64Array:
        """Unnormalised probability of every item as a user's next one, float64 [m, n].

        Args:
            users: [m] positions.
        """
        own = self.user_groups[users][:, None] == self.item_groups[None, :]
        return self.popularity * np.where(own, _OWN_GROUP, 1.0)

    def oracle(
        self, users: NDArray[np.integer], candidates: NDArray[np.integer] | None
    ) -> Float32Array:
        """Return the best possible scores, as :func:`privrec.evaluate.metrics.evaluate` takes them.

        Args:
            users: [m] positions.
            candidates: [m, c] positions, or None for the whole catalogue.
        """
        weights = self.weights(users)
        if candidates is not None:
            weights = np.take_along_axis(weights, np.asarray(candidates), axis=1)
        return weights.astype(np.float32)

    def expected_hr(self, split: Split, k: int) -> float:
        """The hit ratio at ``k`` in full ranking that no recommender can exceed in expectation.

        Promise: the oracle reaches it in expectation over the held-out items, given ``train``, of
        a ``test`` split by :func:`~privrec.data.interactions.leave_last_out` (of ``validation``
        it holds only nearly, since the number of items drawn after is not accounted for).

        Args:
            split: leave-last-out of ``interactions``.
            k: length of the list.
        """
        tested = np.flatnonzero(split.heldout.counts)
        step = max(1, _CELLS // split.train.n_items)
        parts = [
            self._chances(split.train, tested[at : at + step], k)
            for at in range(0, tested.size, step)
        ]
        return float(np.concatenate(parts).mean())

    def _chances(self, train: Interactions, users: Int64Array, k: int) -> Float64Array:
        """Chance that the next item of each user is among the ``k`` likeliest unseen ones."""
        weights = self.weights(users)
        weights[rows_of(train.indptr, train.items, users)] = 0.0
        best = -np.partition(-weights, min(k, weights.shape[1]) - 1, axis=1)[:, :k]
        return np.asarray(best.sum(axis=1) / weights.sum(axis=1))


def generate(
    *, users: int, items: int, clusters: int, interactions_per_user: int, seed: int
) -> Planted:
    """A synthetic data set: the same arguments give the same one.

    Args:
        users: number of users, at least 1.
        items: size of the catalogue; ids are 1 to ``items``.
        clusters: groups of taste, at most ``items``.
        interactions_per_user: mean length of a history, at least 2; lengths vary around it and
            stay between 2 and half of the catalogue.
        seed: any integer.

    Raises:
        DataError: when the numbers do not fit each other.
    """
    _check(users, items, clusters, interactions_per_user)
    rng = rng_for(seed, "data", "synthetic")
    popularity = rng.permutation((1.0 + np.arange(items)) ** -_POPULARITY_EXPONENT)
    item_groups = rng.permutation(np.arange(items) % clusters)
    user_groups = rng.permutation(np.arange(users) % clusters)
    lengths = _lengths(rng, users, interactions_per_user, items // 2)
    owner = np.repeat(np.arange(users), lengths)
    chosen = _histories(rng, popularity, item_groups, user_groups, lengths)
    interactions = Interactions.from_pairs(
        owner + 1,
        chosen + 1,
        _times(rng, lengths),
        user_ids=np.arange(1, users + 1),
        item_ids=np.arange(1, items + 1),
        titles=[f"Item {item + 1} of group {group + 1}" for item, group in enumerate(item_groups)],
    )
    return Planted(interactions, popularity, user_groups, item_groups)


def _check(users: int, items: int, clusters: int, mean: int) -> None:
    if not 1 <= clusters <= items:
        raise DataError(
            f"synthetic data: {clusters} clusters of {items} items; a cluster needs at least one "
            "item; lower data.clusters or raise data.items"
        )
    if users < 1 or mean < 2 or mean > items // 2:
        raise DataError(
            f"synthetic data: {mean} interactions for each of {users} users out of {items} items; "
            "there must be a user, and a history has from 2 interactions to half of the catalogue; "
            "change data.users, data.interactions_per_user or data.items"
        )


def _lengths(rng: np.random.Generator, users: int, mean: int, most: int) -> Int64Array:
    drift = _LENGTH_SPREAD**2 / 2  # makes the mean of the log-normal factor one
    factor = np.exp(rng.normal(-drift, _LENGTH_SPREAD, users))
    return np.asarray(np.clip(np.rint(mean * factor), 2, most), np.int64)


def _histories(
    rng: np.random.Generator,
    popularity: Float64Array,
    item_groups: Int64Array,
    user_groups: Int64Array,
    lengths: Int64Array,
) -> Int64Array:
    """All histories one after another, int64 [sum of lengths], earliest item first.

    Every item gets an exponential waiting time of rate equal to its weight. The order of arrival
    is then the order of successive draws without repetition.
    """
    step = max(1, _CELLS // popularity.size)
    parts: list[NDArray[Any]] = []
    for at in range(0, lengths.size, step):
        own = user_groups[at : at + step, None] == item_groups
        waits = rng.standard_exponential(own.shape)
        waits /= popularity * np.where(own, _OWN_GROUP, 1.0)
        parts.append(_earliest(waits, lengths[at : at + step]))
    return np.concatenate(parts)


def _earliest(waits: Float64Array, lengths: Int64Array) -> Int64Array:
    longest = int(lengths.max())
    first = np.argpartition(waits, longest - 1, axis=1)[:, :longest]
    arrival = np.argsort(np.take_along_axis(waits, first, axis=1), axis=1)
    order = np.take_along_axis(first, arrival, axis=1)
    return order[np.arange(longest) < lengths[:, None]]


def _times(rng: np.random.Generator, lengths: Int64Array) -> Int64Array:
    """Seconds since 1970, strictly increasing within a user."""
    gaps = 1 + rng.exponential(_MEAN_GAP_S, int(lengths.sum())).astype(np.int64)
    total = np.cumsum(gaps)
    before = np.repeat((total - gaps)[np.cumsum(lengths) - lengths], lengths)
    return np.asarray(_START + total - before)
