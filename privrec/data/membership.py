"""Which user has which item, answered for whole arrays at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_BITMAP_BITS = 1 << 26  # 8 MiB: beyond it, a search in sorted keys costs less than the memory


class Membership:
    """Which (user, item) pairs occur: a bitmap when that is small, else sorted keys.

    Args:
        users: [m] positions.
        items: [m] positions.
        n_users: U.
        n_items: n.
    """

    def __init__(
        self, users: NDArray[np.integer], items: NDArray[np.integer], n_users: int, n_items: int
    ) -> None:
        self._n_items = n_items
        keys = self._key(users, items)
        self._bitmap: NDArray[np.uint8] | None = None
        if n_users * n_items <= _BITMAP_BITS:
            flags = np.zeros(n_users * n_items, np.bool_)
            flags[keys] = True
            self._bitmap = np.packbits(flags, bitorder="little")
        self._keys = np.sort(keys) if self._bitmap is None else keys[:0]

    def contains(self, users: NDArray[np.integer], items: NDArray[np.integer]) -> BoolArray:
        """Whether each pair occurs; the two arrays broadcast and the result has their shape.

        Args:
            users: positions in ``0..U-1``.
            items: positions in ``0..n-1``.
        """
        keys = self._key(users, items)
        if self._bitmap is not None:
            bits = self._bitmap[keys >> 3] >> (keys & 7).astype(np.uint8)
            return np.asarray(bits & np.uint8(1), np.bool_)
        if not self._keys.size:
            return np.zeros(keys.shape, np.bool_)
        found = np.minimum(np.searchsorted(self._keys, keys), self._keys.size - 1)
        return np.asarray(self._keys[found] == keys)

    def _key(self, users: NDArray[np.integer], items: NDArray[np.integer]) -> Int64Array:
        return np.asarray(users).astype(np.int64) * self._n_items + np.asarray(items)
