"""Hash tables that are built, queried and discarded one at a time.

A table is never held: the queries' codes are known first, so as codes of the items come out of a
pass over the memory, each is looked up in a bitmap of wanted codes and forgotten. A few tables
share a pass, since gathering the items is the larger part of one table's work. What is held at a
time does not depend on how many tables there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privrec.randomness import SecureStream
from privrec.search.families import ROOM, Family, Shape, Signs, draw
from privrec.search.memory import CHUNK, ItemMemory, Items

FloatArray = NDArray[np.float32]

TABLES_A_PASS = 8
"""Tables that share a pass over the items."""

_CODES = 1 << 16


def serial(
    items: ItemMemory, queries: FloatArray, family: Family, shape: Shape, stream: SecureStream
) -> Iterator[Items]:
    """Yield the items that share a bucket with a query, table after table.

    Whoever takes from this generator stops when it has enough: tables of later passes are then
    never drawn. Items are centred before they are hashed, which changes no ranking of theirs.

    Args:
        queries: shape ``(q, items.dim)``.
        stream: the device's own secret stream.

    Yields:
        For each table the items, ascending, that no earlier table has found.
    """
    seen = np.zeros(items.items, np.bool_)
    found = np.empty((min(TABLES_A_PASS, shape.tables), items.items), np.bool_)
    for first in range(0, shape.tables, TABLES_A_PASS):
        few = replace(shape, tables=min(TABLES_A_PASS, shape.tables - first))
        hashed = draw(family, items.dim, few, stream)
        each = np.arange(few.tables)
        wanted = np.zeros((few.tables, _CODES), np.bool_)
        wanted[each, hashed.codes(queries)] = True
        for start, rows in items.chunks():
            codes = hashed.codes(rows, items.centre)
            for table in each:
                part = found[table, start : start + len(rows)]
                np.take(wanted[table], codes[:, table], out=part, mode="clip")
        for hits in found[: few.tables]:
            hits &= ~seen
            seen |= hits
            yield np.flatnonzero(hits)


def serial_bytes(items: ItemMemory, shape: Shape) -> int:
    """Return the most bytes that :func:`serial` holds at a time, beside the memory."""
    tables, size = min(TABLES_A_PASS, shape.tables), min(CHUNK, items.items)
    signs = min(CHUNK * tables, ROOM // shape.bits) * (4 * shape.bits + 16)
    held = items.items * (tables + 2) + tables * _CODES + 4 * items.dim * tables * shape.bits
    return items.pass_bytes + signs + 4 * size * tables + held


@dataclass(frozen=True)
class Buckets:
    """One table as lists, for many queries that each want their own.

    Attributes:
        order: items by code, ascending within one.
        ends: where the items of each code end in ``order``.
        hashed: the function; it has one table.
    """

    order: NDArray[np.int32]
    ends: Items
    hashed: Signs

    @classmethod
    def of(cls, items: ItemMemory, hashed: Signs) -> Buckets:
        """Hash all items and sort them by their codes."""
        codes = np.empty(items.items, np.uint16)
        for start, rows in items.chunks():
            codes[start : start + len(rows)] = hashed.codes(rows, items.centre)[:, 0]
        # A stable sort of 16-bit words is a radix sort.
        order = np.argsort(codes, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(codes, minlength=1 << hashed.shape.bits))
        return cls(order, ends, hashed)

    def codes_of(self, items: Items) -> NDArray[np.uint16]:
        """Return the codes under which some items are listed."""
        where = np.empty(len(self.order), np.uint16)
        where[self.order] = np.repeat(
            np.arange(len(self.ends), dtype=np.uint16), np.diff(self.ends, prepend=0)
        )
        return where[items]

    def lists(self, codes: NDArray[np.uint16]) -> list[Items]:
        """Return the items of some buckets, ascending within each.

        Args:
            codes: of the buckets, shape ``(q,)``.
        """
        codes = codes.astype(np.int64)
        starts = np.where(codes > 0, self.ends[codes - 1], 0)
        return [
            self.order[a:b].astype(np.int64) for a, b in zip(starts, self.ends[codes], strict=True)
        ]
