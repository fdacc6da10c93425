"""A huge embedding table that lives in a small memory: FAIR's random subspace, in blocks.

The virtual table has ``items`` rows of ``dim`` numbers. Part ``b`` of row ``i`` is
``sign_b(i) * memory[slot_b(i)]``, one block of ``block`` numbers, with slot and sign from the keyed
hash of :mod:`privrec.embedding.hashing`. Nothing of size ``items * dim`` is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from privrec.embedding.hashing import permute, splitmix64
from privrec.errors import UsageError

FloatArray = NDArray[np.float32]
_SIGN_KEY = 0x5EED_5167


@dataclass(frozen=True)
class Subspace:
    """The map from items to signed slots of a memory of ``slots`` blocks of ``block`` floats.

    All holders of the same ``key`` agree on every slot, so their memories can be summed. When the
    memory is large enough (``slots >= items * parts``) the map is a keyed bijection: nothing
    collides, and the same code serves a table that is not compressed.

    Args:
        items: number of rows of the virtual table, at least 1.
        dim: length of a row, a positive multiple of ``block``.
        block: numbers in a block, at least 1; 16 to 32 gathers fastest.
        slots: blocks in the memory, a power of two.
        key: the shared key of the hash.
        folds: how often the memory was halved; the hash is taken before folding.

    Raises:
        UsageError: when a value is out of its range.
    """

    items: int
    dim: int
    block: int
    slots: int
    key: int
    folds: int = 0

    def __post_init__(self) -> None:
        _check(self.items >= 1, f"items = {self.items}", "at least 1")
        _check(self.block >= 1, f"block = {self.block}", "at least 1")
        _check(
            self.dim >= self.block and self.dim % self.block == 0,
            f"dim = {self.dim}",
            f"a positive multiple of block = {self.block}",
        )
        _check(
            self.slots >= 1 and self.slots & (self.slots - 1) == 0,
            f"slots = {self.slots}",
            "a power of two (so that halving nests)",
        )

    @classmethod
    def sized(
        cls, items: int, dim: int, *, block: int, key: int, compression: float = 1.0
    ) -> Subspace:
        """The subspace whose memory is the virtual table's size divided by ``compression``.

        The number of slots is rounded to a power of two: up when nothing is to be compressed (so
        that nothing collides), else to the nearest. :attr:`compression` tells what came out.

        Raises:
            UsageError: when ``compression`` is below 1 or another value is out of its range.
        """
        _check(compression >= 1, f"compression = {compression}", "at least 1")
        wanted = max(1.0, items * (dim // max(1, block)) / compression)
        power = np.ceil(np.log2(wanted)) if compression == 1 else np.round(np.log2(wanted))
        return cls(items, dim, block, 1 << int(power), key)

    @property
    def parts(self) -> int:
        """Blocks in a row of the virtual table."""
        return self.dim // self.block

    @property
    def size(self) -> int:
        """Floats in the memory."""
        return self.slots * self.block

    @property
    def compression(self) -> float:
        """Floats of the real table (items times dim) over those of the memory."""
        return self.items * self.dim / self.size

    @property
    def injective(self) -> bool:
        """Whether no two parts share a slot."""
        return self.folds == 0 and self.slots >= self.items * self.parts

    def folded(self, times: int) -> Subspace:
        """The same subspace in a memory halved ``times`` times: ``slot mod (slots / 2^times)``.

        Raises:
            UsageError: when the memory does not have that many halves.
        """
        _check(
            0 <= times < self.slots.bit_length(),
            f"times = {times}",
            f"0 to {self.slots.bit_length() - 1} for {self.slots} slots",
        )
        return replace(self, slots=self.slots >> times, folds=self.folds + times)

    def locate(self, items: NDArray[np.integer]) -> tuple[NDArray[np.int64], FloatArray]:
        """Slots and signs of the parts of each item, computed on the fly.

        Args:
            items: item indices in ``[0, items)``, of any shape.

        Returns:
            ``(slots, signs)``, each of shape ``items.shape + (parts,)``.
        """
        position = np.asarray(items, dtype=np.int64)[..., None] * self.parts + np.arange(self.parts)
        unfolded = self.slots << self.folds
        if unfolded >= self.items * self.parts:
            slots = permute(self.key, position, unfolded.bit_length() - 1)
        else:
            slots = splitmix64(self.key, position)
        slots &= np.uint64(self.slots - 1)
        negative = splitmix64(self.key ^ _SIGN_KEY, position) >> np.uint64(63)
        return slots.astype(np.int64), 1 - 2 * negative.astype(np.float32)

    def gather(self, memory: FloatArray, items: NDArray[np.integer]) -> FloatArray:
        """Rows of the virtual table.

        Args:
            memory: float array of shape ``(slots, block)``.
            items: item indices, of any shape.

        Returns:
            float array of shape ``items.shape + (dim,)``.
        """
        slots, signs = self.locate(items)
        rows = np.take(memory, slots, axis=0)
        rows *= signs[..., None]
        return rows.reshape((*slots.shape[:-1], self.dim))

    def scatter_add(
        self, memory: NDArray[Any], items: NDArray[np.integer], rows: NDArray[Any]
    ) -> None:
        """Add ``rows`` to the memory in place: the adjoint of :meth:`gather`.

        Args:
            memory: array of shape ``(slots, block)``, changed in place.
            items: item indices of any shape; repeated ones add up.
            rows: array of shape ``items.shape + (dim,)``.
        """
        slots, signs = self.locate(items)
        add_rows(memory, slots.ravel(), rows.reshape(-1, self.block), signs.ravel())


class TabulatedSubspace(Subspace):
    """The same map with every place looked up instead of computed.

    For one machine that plays many devices; a device has no room for a table of the catalogue.
    """

    @classmethod
    def of(cls, subspace: Subspace) -> TabulatedSubspace:
        """``subspace`` with its places computed once, at ``12 * parts`` bytes an item."""
        return cls(**{name: getattr(subspace, name) for name in Subspace.__dataclass_fields__})

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], FloatArray]:
        return super().locate(np.arange(self.items))

    def locate(self, items: NDArray[np.integer]) -> tuple[NDArray[np.int64], FloatArray]:
        """See :meth:`Subspace.locate`."""
        slots, signs = self._places
        return np.take(slots, items, axis=0), np.take(signs, items, axis=0)


def add_rows(
    target: NDArray[Any], index: NDArray[Any], rows: NDArray[Any], signs: NDArray[Any] | None = None
) -> None:
    """``target[index] += signs * rows`` with repeated indices summed, in place and in index order.

    It is a product with a sparse matrix of one signed entry a column, which runs at memory speed
    where element-wise accumulation costs ten times as much.

    Args:
        target: array of shape ``(n, width)``.
        index: row indices of shape ``(k,)``.
        rows: array of shape ``(k, width)`` and of the target's type.
        signs: factors of shape ``(k,)``; ones when absent.
    """
    entries = np.ones(len(index), rows.dtype) if signs is None else signs.astype(rows.dtype)
    columns = np.arange(len(index) + 1)
    matrix = sparse.csc_array((entries, index, columns), shape=(len(target), len(index)))
    target += matrix @ rows


def _check(holds: bool, value: str, rule: str) -> None:
    if not holds:
        raise UsageError(f"{value}: must be {rule}; change it in the [model] table")
