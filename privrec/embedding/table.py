"""What every embedding table here is: rows made of signed blocks of one small memory.

Part ``b`` of row ``i`` is ``scale * sign_b(i) * memory[slot_b(i)]``, one block of ``block``
numbers. Where slots and signs come from is the business of :class:`Table`'s kinds: a hash
(:class:`~privrec.embedding.subspace.Subspace`) or the item's own place (:class:`PlainTable`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from privrec.errors import UsageError

FloatArray = NDArray[np.float32]
T = TypeVar("T", bound=np.integer[Any])
_SPARSE = 4
_RARE = 64  # names this much rarer than their places are sorted instead of tabulated
_ITEMS_AT_ONCE = 1 << 16
Places = tuple[NDArray[np.int64], FloatArray]


@dataclass(frozen=True)
class Table(ABC):
    """A table of ``items`` rows of ``dim`` numbers in a memory of ``slots`` blocks of ``block``.

    ``dim`` is a multiple of ``block``, and blocks of 16 to 32 numbers gather fastest. A value out
    of its range is refused.
    """

    items: int
    dim: int
    block: int
    slots: int

    def __post_init__(self) -> None:
        check_size(self.items >= 1, f"items = {self.items}", "at least 1")
        check_size(self.block >= 1, f"block = {self.block}", "at least 1")
        whole = self.dim >= self.block and self.dim % self.block == 0
        check_size(whole, f"dim = {self.dim}", f"a positive multiple of block = {self.block}")

    @property
    def parts(self) -> int:
        """Blocks in a row."""
        return self.dim // self.block

    @property
    def size(self) -> int:
        """Floats in the memory."""
        return self.slots * self.block

    @property
    def compression(self) -> float:
        """Floats of the table (items times dim) over those of the memory."""
        return self.items * self.dim / self.size

    @property
    def scale(self) -> float:
        """The factor of every block in its row."""
        return 1.0

    @property
    def injective(self) -> bool:
        """Whether no two parts share a slot."""
        return True

    def tabulated(self) -> Table:
        """The same table, with places that are costly to compute looked up instead.

        For one machine that plays many devices; a device has no room for places of the catalogue.
        """
        return self

    @abstractmethod
    def locate(self, items: NDArray[np.integer]) -> Places:
        """Slots and signs of the parts of items of any shape ``(*s)``, each ``(*s, parts)``."""

    def locate_doubled(self, items: NDArray[np.integer]) -> NDArray[np.int64]:
        """Places in the memory followed by its negative: slots, plus ``slots`` where negative."""
        slots, signs = self.locate(items)
        return np.asarray(slots + (signs < 0) * np.int64(self.slots))

    @cached_property
    def load(self) -> FloatArray:
        """Parts that share each block, times ``scale²``, shape ``(slots,)``.

        It is what gathering all rows and scattering them back multiplies a block by.
        """
        load = np.zeros(self.slots, np.float32)
        for items in self.in_parts(_ITEMS_AT_ONCE):
            load += np.bincount(self.locate(items)[0].ravel(), minlength=self.slots)
        return load * np.float32(self.scale**2)

    def in_parts(self, most: int) -> Iterator[NDArray[np.int64]]:
        """All items in order, so many at a time."""
        for start in range(0, self.items, most):
            yield np.arange(start, min(self.items, start + most))

    def gather(self, memory: NDArray[Any], items: NDArray[np.integer]) -> NDArray[Any]:
        """Rows of items of any shape ``(*s)``, of shape ``(*s, dim)`` and the memory's type.

        ``memory`` has the shape ``(slots, block)``.
        """
        slots, signs = self.locate(items)
        rows = np.take(memory, slots, axis=0)
        rows *= signs[..., None]
        if self.scale != 1:
            rows *= self.scale
        return rows.reshape((*slots.shape[:-1], self.dim))

    def scatter_add(
        self, memory: NDArray[Any], items: NDArray[np.integer], rows: NDArray[Any]
    ) -> None:
        """Add ``rows`` to the memory in place: the adjoint of :meth:`gather`.

        Repeated items add up.
        """
        slots, signs = self.locate(items)
        blocks = rows.reshape(-1, self.block)
        if self.scale != 1:
            blocks = blocks * self.scale
        add_rows(memory, slots.ravel(), blocks, signs.ravel())


@dataclass(frozen=True)
class PlainTable(Table):
    """A table that is its own memory, block by block, without hash or sign.

    With ``by_part`` the first parts of all items come first, then all second ones; otherwise the
    parts of an item lie together. So a prefix of the memory is the first dimensions of all items,
    or the first items in full.
    """

    by_part: bool = False

    @classmethod
    def of(cls, items: int, dim: int, *, block: int, by_part: bool = False) -> PlainTable:
        """The plain table of that size."""
        return cls(items, dim, block, items * (dim // max(1, block)), by_part)

    def locate(self, items: NDArray[np.integer]) -> Places:
        """Slots by the item's own place, and signs of 1."""
        item, part = np.asarray(items, np.int64)[..., None], np.arange(self.parts)
        slots = part * self.items + item if self.by_part else item * self.parts + part
        return slots, np.ones(slots.shape, np.float32)


def distinct(names: NDArray[T]) -> NDArray[T]:
    """``np.unique`` of a vector by sorting, several times faster than by its table of hashes."""
    found = np.sort(names)
    return found[np.append(True, found[1:] != found[:-1])] if len(found) else found


def add_rows(
    target: NDArray[Any], index: NDArray[Any], rows: NDArray[Any], signs: NDArray[Any] | None = None
) -> None:
    """``target[index] += signs * rows`` with repeated indices summed, in place and in index order.

    It is a product with a sparse matrix of one signed entry a column, which runs at memory speed
    where element-wise accumulation costs ten times as much. Where few rows of a large target
    change, nothing of its size is made. ``rows`` are of the target's type.
    """
    if len(target) > _SPARSE * len(index):
        index, place = np.unique(index, return_inverse=True)
        target[index] += _summed(len(index), place, rows, signs)
    else:
        target += _summed(len(target), index, rows, signs)


def _summed(
    size: int, index: NDArray[Any], rows: NDArray[Any], signs: NDArray[Any] | None
) -> NDArray[Any]:
    entries = np.ones(len(index), rows.dtype) if signs is None else signs.astype(rows.dtype)
    columns = np.arange(len(index) + 1)
    matrix = sparse.csc_array((entries, index, columns), shape=(size, len(index)))
    return np.asarray(matrix @ rows)


def representatives(names: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """For each name in ``[0, size)`` of a row, the place of the last of its equals, ``(m, k)``.

    Writing every place into a table of names and reading it back elects one, in time linear in the
    names; where the table would be far larger than the names, they are sorted.
    """
    m, k = names.shape
    rows = np.arange(m)[:, None]
    if size > _RARE * k:
        flat = (names + rows * size).ravel()
        order = np.argsort(flat, kind="stable")
        ends = np.append(flat[order][1:] != flat[order][:-1], np.True_)
        places = np.empty_like(order)
        places[order] = order[ends][np.cumsum(ends) - ends]
        return np.asarray(places.reshape(m, k) - rows * k, np.int64)
    table = np.empty((m, size), np.int64)
    table[rows, names] = np.arange(k)
    return table[rows, names]


def merged(values: NDArray[np.float32], owners: NDArray[np.int64]) -> NDArray[np.float32]:
    """Values ``(m, k, width)`` of equal names summed at their representative; zeros elsewhere.

    ``owners`` are the places that :func:`representatives` gives, shape ``(m or 1, k)``.
    """
    m, k, width = values.shape
    together = np.zeros((m * k, width), values.dtype)
    add_rows(together, flattened(owners, m), values.reshape(-1, width))
    return together.reshape(m, k, width)


def flattened(places: NDArray[np.int64], m: int) -> NDArray[np.int64]:
    """Places in rows ``(m or 1, k)`` as places in the flattened batch of ``m`` rows."""
    return np.ravel(places + np.arange(m)[:, None] * places.shape[1])


def check_size(holds: bool, value: str, rule: str) -> None:
    """Refuse a size of ``[model]`` that breaks its rule, with a :class:`UsageError`."""
    if not holds:
        raise UsageError(f"{value}: must be {rule}; change it in the [model] table")
