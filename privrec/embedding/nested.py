"""Nested coordinates: one vector whose prefixes are the memories of weaker devices.

An orthonormal coordinate system of the memory is ordered so that each tier of devices holds a
prefix of it. Then a download is a prefix, an upload is a prefix, and the sum of prefixes padded
with zeros is the sum of what the updates mean for the whole memory. Since the system is
orthonormal, an update has the same norm in both, so one clip norm and one noise serve all tiers.

Three systems. ``fold``: tiers hold the memory that is constant on the classes of slots modulo a
power of two (FAIR's collapse), in Haar coordinates, coarsest first. ``rows``: the first items in
full. ``dims``: the first dimensions of all items. The latter two need no change of coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table, check_size

Array = NDArray[Any]
Spread = tuple[NDArray[np.int64], NDArray[np.float64]]
"""The coefficient blocks that each changed block reaches, ``slots.shape + (reach,)``, and by what
factors; the squares of a block's factors add up to 1."""


@dataclass(frozen=True)
class Nested:
    """Plain coordinates: the memory as it is, of which weaker tiers hold a prefix.

    ``tables`` has each tier's table in its own memory, the strongest first.
    """

    tables: tuple[Table, ...]

    def to_memory(self, prefix: Array, tier: int) -> None:
        """Turn a tier's coefficients, ``(slots, block)``, into its memory, in place."""

    def to_coefficients(self, memory: Array, tier: int) -> None:
        """Turn a tier's memory into its coefficients, in place: the inverse."""

    def spread(self, slots: NDArray[np.int64], tier: int) -> Spread | None:
        """Which coefficients a change of blocks of a tier's memory changes; None for the same."""
        return None


@dataclass(frozen=True)
class Folds(Nested):
    """Haar coordinates along the fold: ``[A_F | D_F | ... | D_1]``.

    A step takes the two halves of a memory to ``(top + bottom) / √2`` and
    ``(top - bottom) / √2``, and goes on with the first half, down to the weakest tier. The first
    ``slots / 2^j`` coefficients rebuild the memory folded ``j`` times, in the isometric scale of
    :class:`~privrec.embedding.subspace.Subspace`. Each step is its own inverse.
    """

    def to_memory(self, prefix: Array, tier: int) -> None:
        for half in self._halves(tier):
            _butterfly(prefix[:half], prefix[half : 2 * half])

    def to_coefficients(self, memory: Array, tier: int) -> None:
        for half in reversed(self._halves(tier)):
            _butterfly(memory[:half], memory[half : 2 * half])

    def spread(self, slots: NDArray[np.int64], tier: int) -> Spread | None:
        """One detail for each halving, and the coarsest average."""
        halves = self._halves(tier)
        if not halves:
            return None
        half = np.array(halves)
        place = slots[..., None] & (half - 1)
        above = (slots[..., None] & half) != 0
        steps = np.arange(len(halves), 0, -1)
        factors = np.where(above, -1.0, 1.0) * 2.0 ** (-steps / 2)
        coarse = np.full((*slots.shape, 1), 2.0 ** (-len(halves) / 2))
        names = np.concatenate((place[..., :1], place + half), axis=-1)
        return names, np.concatenate((coarse, factors), axis=-1)

    def _halves(self, tier: int) -> list[int]:
        """Sizes of the halves from the weakest tier's memory up to this tier's."""
        least, own = self.tables[-1].slots, self.tables[tier].slots
        return [1 << bit for bit in range(least.bit_length() - 1, own.bit_length() - 1)]


def nested(table: Table, halvings: Sequence[int]) -> Nested:
    """Nested coordinates for tiers that hold ``2^-h`` of a table's memory, ``h`` ascending.

    A :class:`Subspace` nests by ``fold``, a :class:`PlainTable` by ``rows`` or, when it lies by
    part, by ``dims``. A tier that would hold nothing, or nothing that nests, is refused.
    """
    tables = tuple(_weaker(table, halving) for halving in halvings)
    return Folds(tables) if isinstance(table, Subspace) else Nested(tables)


def _weaker(table: Table, halving: int) -> Table:
    if isinstance(table, Subspace):
        return table.folded(halving)
    items, dim = table.items, table.dim
    by_part = isinstance(table, PlainTable) and table.by_part
    capacity = f"capacity 1/{1 << halving} of"
    if not by_part:
        items >>= halving
        check_size(items >= 1, f"{capacity} {table.items} items", "an item")
    elif halving:
        nests = dim % (table.block << halving) == 0
        check_size(nests, f"{capacity} dim = {dim}", f"a multiple of block = {table.block}")
        dim >>= halving
    return PlainTable.of(items, dim, block=table.block, by_part=by_part)


def _butterfly(first: Array, second: Array) -> None:
    """``(a, b) -> ((a + b) / √2, (a - b) / √2)`` in place, in parts that stay in the cache."""
    root = first.dtype.type(np.sqrt(0.5))
    step = max(1, (1 << 14) // max(1, first.shape[1]))
    for start in range(0, len(first), step):
        a, b = first[start : start + step], second[start : start + step]
        a *= root
        b *= root
        a += b
        b *= -2
        b += a
