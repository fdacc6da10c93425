"""Public features of items, which a device weighs for itself: what it says of them is never sent.

A row of features stands beside the learned vector of its item. The user's weights for it are fitted
on the device as the rest of the private state is, so that features cost no privacy. What an item
is described by is public, as its title is; nothing here looks at who liked it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
_BUMPS = 9
_RANK_BUMPS = 7
_HEAD = 16.0  # ranks below it are alike
_MOST = 64  # of what describes items together


def of_categories(cells: Sequence[str], between: str = "|") -> FloatArray:
    """One column for each category that occurs, the rarer the larger; ``(items, categories)``.

    ``cells`` has the categories of each item with ``between`` between them, or nothing. A row has a
    norm of 1, or 0 where an item is in none; entries are as the root of ``log(items / members)``.
    """
    told = [[name for name in cell.split(between) if name] for cell in cells]
    names = sorted({name for own in told for name in own})
    column = {name: place for place, name in enumerate(names)}
    rows = np.zeros((len(told), len(names)), np.float32)
    for row, own in zip(rows, told, strict=True):
        row[[column[name] for name in own]] = 1
    rows *= np.sqrt(np.log(len(rows) / rows.sum(0)))
    return _normed(rows)


def of_numbers(values: NDArray[np.floating]) -> FloatArray:
    """Smooth bumps around quantiles of a number, for users to like a part of its range.

    ``values``, ``(items,)``, are NaN where unknown; such a row is zero, others have a norm of 1.
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return np.zeros((len(values), 0), np.float32)
    return _bumps(values, np.unique(np.quantile(known, np.linspace(0, 1, _BUMPS))))


def of_ranks(items: int) -> FloatArray:
    """Smooth bumps over the logarithm of the rank of items in the order of popularity.

    By these weights a device learns how far its user keeps to what is popular. Rows have a norm of
    1, and are the same for a prefix of the items as for all as long as ``items`` is.
    """
    ranks = np.log1p(np.arange(items) / _HEAD)
    return _bumps(ranks, np.linspace(0, ranks[-1], _RANK_BUMPS))


def centred(part: FloatArray) -> FloatArray:
    """Features with their means over the items taken off."""
    return np.asarray(part - part.mean(0), np.float32)


def together(parts: Sequence[FloatArray]) -> FloatArray:
    """Groups of features and the products of each with the next; ``(items, at most 64)``.

    Products let a user like some of a kind: comedies of the eighties, not all comedies and all that
    is from the eighties. Of all these columns, each around its mean, the principal components stay
    that tell items apart most, the first the most; each with its larger end above zero.
    """
    kept = [centred(part) for part in parts]
    products = [
        centred((one[:, :, None] * other[:, None, :]).reshape(len(one), -1))
        for one, other in pairwise(kept)
    ]
    table = np.concatenate((*kept, *products), axis=1).astype(np.float64)
    spread, axes = np.linalg.eigh(table.T @ table)
    told = np.flatnonzero(spread > 1e-6 * max(1.0, spread.max(initial=0.0)))[::-1][:_MOST]
    rows = table @ axes[:, told]
    ends = np.where(rows.max(0, initial=0) < -rows.min(0, initial=0), -1.0, 1.0)
    return np.asarray(rows * ends, np.float32)


def _bumps(values: NDArray[np.floating], centres: NDArray[np.float64]) -> FloatArray:
    """Gaussian bumps as wide as their centres are apart on average of their two sides."""
    if len(centres) < 2:  # one value tells no items apart
        return np.zeros((len(values), 0), np.float32)
    apart = np.diff(centres)
    widths = (np.append(apart[0], apart) + np.append(apart, apart[-1])) / 2
    rows = np.exp(-((values[:, None] - centres) ** 2) / (2 * widths**2))
    return _normed(np.where(np.isfinite(values)[:, None], rows, 0).astype(np.float32))


def _normed(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)
