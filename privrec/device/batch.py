"""The samples that devices train on in one round: their positives and fresh negatives, padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.hashing import finalise, splitmix64
from privrec.embedding.table import add_rows

Items = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SPARSE = 64  # names this much rarer than their places are sorted instead of tabulated


@dataclass(frozen=True)
class Histories:
    """Histories of ``m`` devices, one after the other.

    Args:
        users: who they are, shape ``(m,)``; decides each device's draws.
        indptr: bounds of each history, shape ``(m + 1,)``.
        items: all histories' items, shape ``(indptr[-1],)``.
    """

    users: NDArray[np.int64]
    indptr: NDArray[np.int64]
    items: NDArray[np.int32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Items in each history, shape ``(m,)``."""
        return np.diff(self.indptr)

    def select(self, rows: NDArray[np.int64]) -> Histories:
        """The histories of some of the devices, in the order of ``rows``."""
        lengths = self.lengths[rows]
        indptr = np.concatenate(([0], np.cumsum(lengths)))
        offsets = np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return Histories(self.users[rows], indptr, self.items[offsets + np.arange(indptr[-1])])

    def below(self, held: int) -> Histories:
        """What is left of the histories for devices that hold the first ``held`` items."""
        kept = self.items < held
        before = np.concatenate(([0], np.cumsum(kept)))
        return Histories(self.users, before[self.indptr], self.items[kept])


@dataclass(frozen=True)
class Batch:
    """Items that ``m`` devices train on: their samples, or the whole catalogue.

    Args:
        items: item indices, shape ``(m, k)``, or ``(1, k)`` when all devices look at the same;
            padding names item 0.
        valid: shape ``(m, k)``, see :class:`~privrec.models.losses.Samples`.
        positives: the padded number of positives, see there.
        first: for each sample, the one of its row that stands for its item, shape ``(m, k)``; None
            when no item is named twice.
        weights: logarithm of how many items each sample stands for, shape ``(m, k)``; None when
            each stands for itself.
    """

    items: NDArray[np.int64]
    valid: NDArray[np.float32]
    positives: int
    first: NDArray[np.int64] | None
    weights: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Sampler:
    """Draws each device's samples from its own key, so that a device alone draws the same.

    Args:
        n_items: size of the catalogue.
        negatives: negatives for each positive.
        most: most positives a device uses in a round; None for its whole history.
        whole: look at the whole catalogue instead of samples.
        shared: negatives for all positives together, drawn elsewhere
            (:mod:`privrec.device.negatives`); 0 for ``negatives`` each.
    """

    n_items: int
    negatives: int
    most: int | None
    whole: bool = False
    shared: int = 0

    def width(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples that devices with histories of these lengths train on."""
        if self.whole:
            return np.full_like(lengths, self.n_items)
        used = lengths if self.most is None else lengths.clip(max=self.most)
        if self.shared:
            return np.maximum(used, 1) + self.shared
        return np.maximum(used, 1) * (1 + self.negatives)

    def draw(self, histories: Histories, key: int) -> Batch:
        """Samples of each device: positives, and uniform negatives out of its history.

        The positives are the history, or a window of it at a random place if ``most`` is less.

        Args:
            histories: of the devices to sample for.
            key: the round's key; the same key and user give the same samples.
        """
        if self.whole:
            marks = self._marks(histories).astype(np.float32)
            return Batch(np.arange(self.n_items)[None], marks, 0, None)
        positives, present = self.positives(histories, key)
        if not self.negatives:
            return self._batch(positives, present, positives.shape[1])
        count = positives.shape[1] * self.negatives
        negatives = uniform(key, histories.users, count, self.n_items)
        fresh = np.repeat(present, self.negatives, axis=1)
        fresh &= ~np.take_along_axis(self._marks(histories), negatives, axis=1)
        items = np.concatenate((positives, negatives), axis=1)
        return self._batch(items, np.concatenate((present, fresh), axis=1), positives.shape[1])

    def positives(self, histories: Histories, key: int) -> tuple[Items, NDArray[np.bool_]]:
        """Each device's positives, padded, and which are no padding: both ``(m, most)``."""
        used = histories.lengths if self.most is None else histories.lengths.clip(max=self.most)
        return self._positives(histories, used, key)

    def _batch(self, items: NDArray[np.int64], valid: NDArray[np.bool_], positives: int) -> Batch:
        first = representatives(items, self.n_items)
        return Batch(items, valid.astype(np.float32), positives, first)

    def _positives(
        self, histories: Histories, used: NDArray[np.int64], key: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        lengths = np.maximum(histories.lengths, 1)[:, None]
        place = np.arange(max(1, used.max(initial=0)))
        start = (splitmix64(key, histories.users) >> np.uint64(33)).astype(np.int64)[:, None]
        index = histories.indptr[:-1, None] + (start + place) % lengths
        present = place < used[:, None]
        padded = np.append(histories.items, np.int32(0))
        return np.where(present, padded[np.where(present, index, 0)], 0).astype(np.int64), present

    def _marks(self, histories: Histories) -> NDArray[np.bool_]:
        m = len(histories.users)
        marks = np.zeros((m, self.n_items), dtype=np.bool_)
        marks[np.repeat(np.arange(m), histories.lengths), histories.items] = True
        return marks


def representatives(names: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """For each name of a row, the one place in that row that stands for all its equals.

    Writing every place into a table of names and reading it back elects one, in time linear in the
    names; where the table would be far larger than the names, they are sorted.

    Args:
        names: integers in ``[0, size)``, shape ``(m, k)``.
        size: number of possible names.

    Returns:
        Places in ``[0, k)``, shape ``(m, k)``; the last of equal names stands for all.
    """
    m, k = names.shape
    rows = np.arange(m)[:, None]
    if size > _SPARSE * k:
        places: NDArray[np.int64] = _last_by_sorting(names + rows * size).reshape(m, k) - rows * k
        return places
    table = np.empty((m, size), np.int64)
    table[rows, names] = np.arange(k)
    return table[rows, names]


def _last_by_sorting(names: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of all names, the last place of its equals in the flattened array."""
    flat = names.ravel()
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    ends = np.append(ordered[1:] != ordered[:-1], np.True_)
    group = np.cumsum(ends) - ends
    places = np.empty_like(order)
    places[order] = order[ends][group]
    return places


def merged(values: NDArray[np.float32], owners: NDArray[np.int64]) -> NDArray[np.float32]:
    """Values of equal names put together where their representative is; zeros elsewhere.

    Args:
        values: shape ``(m, k, width)``.
        owners: as :func:`representatives` gives them, shape ``(m or 1, k)``.
    """
    m, k, width = values.shape
    together = np.zeros((m * k, width), values.dtype)
    add_rows(together, flattened(owners, m), values.reshape(-1, width))
    return together.reshape(m, k, width)


def flattened(places: NDArray[np.int64], m: int) -> NDArray[np.int64]:
    """Places in rows ``(m or 1, k)`` as places in the flattened batch of ``m`` rows."""
    flat: NDArray[np.int64] = places + np.arange(m)[:, None] * places.shape[1]
    return flat.ravel()


def uniform(key: int, users: NDArray[np.int64], count: int, n: int) -> NDArray[np.int64]:
    """Keyed draws from ``[0, n)``: user ``u`` has its own stream of splitmix64.

    Args:
        key: the round's key.
        users: user indices, shape ``(m,)``.
        count: draws for each user.
        n: number of outcomes, at most 2^32; the bias is below ``n / 2^32``.

    Returns:
        int64 of shape ``(m, count)``.
    """
    seeds = splitmix64(~key, users)[:, None]
    steps = np.arange(1, (count + 1) // 2 + 1, dtype=np.uint64) * _GOLDEN
    words = finalise(seeds + steps).view(np.uint32)[:, :count].astype(np.uint64)
    words *= np.uint64(n)
    words >>= np.uint64(32)
    return words.astype(np.int64)
