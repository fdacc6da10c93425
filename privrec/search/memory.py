"""The items as a device searches them: rows gathered from the compressed memory, chunk by chunk.

A row is the item's vector, followed by its bias where items have one; a query then ends in a 1.
Neither the table nor anything of its size is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.randomness import SecureStream

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
CHUNK = 8192
"""Items at a time: rows and what is computed from them stay in a level-2 cache or near it."""

_DOUBLED = 1 << 22
"""Largest memory, in floats, of which a signed copy is made for the time of a pass."""
_SAMPLE = 1 << 14


@dataclass(frozen=True)
class ItemMemory:
    """A catalogue: a table of vectors and its float32 memory, and the same of biases if any."""

    table: Table
    memory: FloatArray
    biases: tuple[Table, FloatArray] | None = None

    def __post_init__(self) -> None:
        biases = [] if self.biases is None else [("biases", *self.biases)]
        for name, table, memory in [("memory", self.table, self.memory), *biases]:
            if memory.shape != (table.slots, table.block):
                raise UsageError(
                    f"{name} of shape {memory.shape}: its table has {table.slots} blocks of "
                    f"{table.block} floats; hand over the memory that belongs to the table"
                )

    @property
    def items(self) -> int:
        """Number of items."""
        return self.table.items

    @property
    def dim(self) -> int:
        """Length of a row: the vector's, and one more for a bias."""
        return self.table.dim + (self.biases is not None)

    def unfolded(self) -> ItemMemory:
        """Gather every row of the same items, for a machine that plays many devices."""
        table = PlainTable.of(self.items, self.table.dim, block=self.table.block)
        memory = np.concatenate([vectors.copy() for _, vectors in self._vectors()])
        biases = None
        if self.biases is not None:
            values = self._biases_of(np.arange(self.items))[:, None]
            biases = PlainTable.of(self.items, 1, block=1), values
        return ItemMemory(table, memory.reshape(table.slots, table.block), biases)

    def rows(self, items: NDArray[np.integer]) -> FloatArray:
        """Return the rows of some items, shape ``(k, dim)``."""
        vectors: FloatArray = self.table.gather(self.memory, items)
        if self.biases is None:
            return vectors
        return np.concatenate((vectors, self._biases_of(items)[:, None]), axis=1)

    def scores(self, items: NDArray[np.integer], query: FloatArray) -> FloatArray:
        """Return the products of some rows with one query, shape ``(k,)``."""
        values: FloatArray = self.table.gather(self.memory, items) @ query[: self.table.dim]
        return values if self.biases is None else values + query[-1] * self._biases_of(items)

    def chunks(self) -> Iterator[tuple[int, FloatArray]]:
        """Yield ``(first item, rows)`` in order: read-only views that the next step overwrites."""
        if self.biases is None:
            yield from self._vectors()
            return
        widened = np.empty((min(CHUNK, self.items), self.dim), np.float32)
        for start, vectors in self._vectors():
            rows = widened[: len(vectors)]
            rows[:, :-1] = vectors
            rows[:, -1] = self._biases_of(np.arange(start, start + len(rows)))
            yield start, rows

    def products(self, query: FloatArray) -> Iterator[FloatArray]:
        """Yield the products of all rows with one query, chunk by chunk."""
        table = self.table
        parts = query[: table.dim].reshape(table.parts, table.block)
        # Each block is multiplied once by each part of the query, and items gather numbers.
        pushed = (self.memory @ parts.T * np.float32(table.scale)).ravel()
        part = np.arange(table.parts)
        for start in range(0, self.items, CHUNK):
            slots, signs = table.locate(np.arange(start, min(self.items, start + CHUNK)))
            slots *= table.parts
            slots += part
            terms = np.take(pushed, slots)
            terms *= signs
            values = terms.sum(axis=1)
            if self.biases is not None:
                values += query[-1] * self._biases_of(np.arange(start, start + len(values)))
            yield values

    @cached_property
    def centre(self) -> FloatArray:
        """Mean row of an evenly spaced sample of items, shape ``(dim,)``.

        Taking the same vector from every item changes no softmax and no ranking, but rids them of
        their common direction, which would put most into one bucket.
        """
        sample = np.arange(0, self.items, -(-self.items // _SAMPLE))
        return cast(FloatArray, self.rows(sample).mean(axis=0))

    def _vectors(self) -> Iterator[tuple[int, FloatArray]]:
        table = self.table
        if isinstance(table, PlainTable) and not table.by_part:
            whole = self.memory.reshape(table.items, table.dim)
            for start in range(0, len(whole), CHUNK):
                yield start, whole[start : start + CHUNK]
            return
        # A lookup in the memory and its negative saves a pass over all gathered rows.
        scale, source = np.float32(table.scale), self.memory
        is_doubled = self.memory.size <= _DOUBLED
        if is_doubled:
            source = np.empty((2 * table.slots, table.block), np.float32)
            np.multiply(self.memory, scale, out=source[: table.slots])
            np.negative(source[: table.slots], out=source[table.slots :])
        buffer = np.empty((min(CHUNK, table.items) * table.parts, table.block), np.float32)
        for start in range(0, table.items, CHUNK):
            part = np.arange(start, min(table.items, start + CHUNK))
            blocks = buffer[: len(part) * table.parts]
            if is_doubled:
                slots = table.locate_doubled(part)
                np.take(source, slots.ravel(), axis=0, out=blocks, mode="clip")
            else:
                slots, signs = table.locate(part)
                np.take(source, slots.ravel(), axis=0, out=blocks, mode="clip")
                blocks *= signs.reshape(-1, 1) * scale
            yield start, blocks.reshape(len(part), table.dim)

    def _biases_of(self, items: NDArray[np.integer]) -> FloatArray:
        table, memory = cast(tuple[Table, FloatArray], self.biases)
        return cast(FloatArray, table.gather(memory, items)[:, 0])


def evenly(n: int, count: int) -> Items:
    """Return ``count`` numbers from 0 to ``n - 1``, evenly spaced, ascending."""
    return np.linspace(0, n - 1, count).astype(np.int64)


def outside(excluded: Items, places: Items) -> Items:
    """Return the items at places of the catalogue less some, which are ascending and distinct."""
    gaps = excluded - np.arange(len(excluded))
    return places + np.searchsorted(gaps, places, side="right")


def uniform(left: int, budget: int, stream: SecureStream, without: Items) -> Items:
    """Return ``budget`` distinct items, ascending, uniform over the ``left`` others.

    Items ``without`` are never drawn, and are ascending and distinct.
    """
    budget = min(budget, left)
    if 2 * budget > left:
        return outside(without, np.sort(np.argsort(stream.uint64(left))[:budget]))
    places = np.zeros(0, np.int64)
    while len(places) < budget:
        more = (stream.uint64(2 * budget) % np.uint64(left)).astype(np.int64)
        # In order of their draw, so that being distinct favours no item.
        together = np.concatenate((places, more))
        _, first = np.unique(together, return_index=True)
        places = together[np.sort(first)][:budget]
    return outside(without, np.sort(places))
