"""Hash tables that are built, queried and discarded one at a time, and signatures that are ranked.

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
from privrec.search.families import ROOM, Family, Hash, Shape, Signs, draw
from privrec.search.memory import CHUNK, ItemMemory

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]

TABLES_A_PASS = 8
"""Tables that share a pass over the items."""

_CODES = 1 << 16


def serial(
    items: ItemMemory, queries: FloatArray, family: Family, shape: Shape, stream: SecureStream
) -> Iterator[Items]:
    """Items that share a bucket with a query, table after table.

    Whoever takes from this generator stops when it has enough: tables of later passes are then
    never drawn. Items are centred before they are hashed, which changes no ranking of theirs.

    Args:
        items: the catalogue.
        queries: vectors of length ``items.dim``, shape ``(q, dim)``.
        family: of the hash functions.
        shape: how many.
        stream: the device's own secret stream.

    Yields:
        For each table the items, ascending, that no earlier table has found.
    """
    seen = np.zeros(items.items, np.bool_)
    found = np.empty((min(TABLES_A_PASS, shape.tables), items.items), np.bool_)
    for first in range(0, shape.tables, TABLES_A_PASS):
        few = replace(shape, tables=min(TABLES_A_PASS, shape.tables - first))
        _look_up(items, queries, draw(family, items.dim, few, stream), found)
        for hits in found[: few.tables]:
            hits &= ~seen
            seen |= hits
            yield np.flatnonzero(hits)


def serial_bytes(items: ItemMemory, shape: Shape) -> int:
    """Most bytes that :func:`serial` holds at a time, beside the memory."""
    tables, size = min(TABLES_A_PASS, shape.tables), min(CHUNK, items.items)
    signs = min(CHUNK * tables, ROOM // shape.bits) * (4 * shape.bits + 16)
    held = items.items * (tables + 2) + tables * _CODES + 4 * items.dim * tables * shape.bits
    return items.pass_bytes + signs + 4 * size * tables + held


def _look_up(
    items: ItemMemory, queries: FloatArray, hashed: Hash, found: NDArray[np.bool_]
) -> None:
    """Write whether each item shares a bucket with some query, one row of ``found`` a table."""
    tables = hashed.shape.tables
    wanted = np.zeros((tables, _CODES), np.bool_)
    wanted[np.arange(tables), hashed.codes(queries)] = True
    for start, rows in items.chunks():
        codes = hashed.codes(rows, items.centre)
        for table in range(tables):
            part = found[table, start : start + len(rows)]
            np.take(wanted[table], codes[:, table], out=part, mode="clip")


@dataclass(frozen=True)
class Buckets:
    """One table as lists, for many queries that each want their own.

    Args:
        order: items by code, ascending within one.
        ends: where the items of each code end in ``order``.
        hashed: the function; it has one table.
    """

    order: NDArray[np.int32]
    ends: Items
    hashed: Hash

    @classmethod
    def of(cls, items: ItemMemory, hashed: Hash) -> Buckets:
        """Hash all items and sort them by their codes."""
        codes = np.empty(items.items, np.uint16)
        for start, rows in items.chunks():
            codes[start : start + len(rows)] = hashed.codes(rows, items.centre)[:, 0]
        # A stable sort of 16-bit words is a radix sort.
        order = np.argsort(codes, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(codes, minlength=1 << hashed.shape.bits))
        return cls(order, ends, hashed)

    def codes_of(self, items: Items) -> NDArray[np.uint16]:
        """The codes under which some items are listed."""
        where = np.empty(len(self.order), np.uint16)
        where[self.order] = np.repeat(
            np.arange(len(self.ends), dtype=np.uint16), np.diff(self.ends, prepend=0)
        )
        return where[items]

    def lists(self, queries: FloatArray) -> list[Items]:
        """The items in each query's bucket, ascending.

        Args:
            queries: shape ``(q, dim)``.
        """
        return self.within(self.hashed.codes(queries)[:, 0])

    def within(self, codes: NDArray[np.uint16]) -> list[Items]:
        """The items of some buckets, ascending.

        Args:
            codes: shape ``(q,)``.
        """
        codes = codes.astype(np.int64)
        starts = np.where(codes > 0, self.ends[codes - 1], 0)
        return [
            self.order[a:b].astype(np.int64) for a, b in zip(starts, self.ends[codes], strict=True)
        ]


@dataclass(frozen=True)
class Signatures:
    """Long codes of all items, ranked by how many bits differ from a query's.

    Args:
        words: shape ``(words, n)``: a signature is a column, so that words are read in a row.
        hashed: the functions.
    """

    words: NDArray[np.uint64]
    hashed: Signs

    @classmethod
    def of(cls, items: ItemMemory, hashed: Signs) -> Signatures:
        """Sign all items: 32 bytes each at 256 bits."""
        count = -(-hashed.matrix.shape[1] // 64)
        words = np.empty((count, items.items), np.uint64)
        for start, rows in items.chunks():
            words[:, start : start + len(rows)] = hashed.signatures(rows, items.centre).T
        return cls(words, hashed)

    def distances(self, query: FloatArray) -> NDArray[np.uint16]:
        """Bits in which each item differs from one query, shape ``(n,)``."""
        return _differing(self.words, self.hashed.signatures(query[None])[0])


def distances(items: ItemMemory, queries: FloatArray, hashed: Signs) -> NDArray[np.uint16]:
    """Fewest bits in which each item differs from any of a few queries, shape ``(n,)``.

    Signatures are forgotten chunk by chunk: nothing is held but the distances.

    Args:
        items: the catalogue.
        queries: shape ``(q, dim)``.
        hashed: the functions.
    """
    wanted = hashed.signatures(queries)
    fewest = np.empty(items.items, np.uint16)
    for start, rows in items.chunks():
        words = np.ascontiguousarray(hashed.signatures(rows, items.centre).T)
        part = fewest[start : start + len(rows)]
        part[...] = _differing(words, wanted[0])
        for query in wanted[1:]:
            np.minimum(part, _differing(words, query), out=part)
    return fewest


def estimates(items: ItemMemory, queries: FloatArray, hashed: Signs) -> FloatArray:
    """Estimated products of each centred item with the query that likes it best, shape ``(n,)``.

    The share of bits that differ estimates the angle, and an item's length is known: items of one
    angle are told apart, which bits alone cannot.

    Args:
        items: the catalogue.
        queries: shape ``(q, dim)``.
        hashed: the functions.
    """
    wanted, count = hashed.signatures(queries), hashed.matrix.shape[1]
    cosine = np.cos(np.arange(count + 1) * (np.pi / count)).astype(np.float32)
    lengths, centre = np.sqrt(np.square(queries).sum(axis=1)), items.centre
    likely = np.empty(items.items, np.float32)
    for start, rows in items.chunks():
        words = np.ascontiguousarray(hashed.signatures(rows, centre).T)
        part = likely[start : start + len(rows)]
        part[...] = -np.inf
        for query, length in zip(wanted, lengths, strict=True):
            np.maximum(part, cosine[_differing(words, query)] * length, out=part)
        squares = np.einsum("ij,ij->i", rows, rows) - rows @ (2 * centre) + centre @ centre
        part *= np.sqrt(squares.clip(min=0))
    return likely


def nearest(distance: NDArray[np.uint16], budget: int) -> Items:
    """The ``budget`` items of the smallest distances, ascending; of equal ones the first.

    Distances have few values, so counting them costs less than a partial sort.
    """
    counts = np.cumsum(np.bincount(distance))
    edge = int(np.searchsorted(counts, min(budget, len(distance))))
    inside = np.flatnonzero(distance < edge)
    border = np.flatnonzero(distance == edge)[: budget - len(inside)]
    return np.sort(np.concatenate((inside, border)))


def _differing(words: NDArray[np.uint64], query: NDArray[np.uint64]) -> NDArray[np.uint16]:
    count = np.zeros(words.shape[1], np.uint16)
    for word, wanted in zip(words, query, strict=True):
        count += popcount(word ^ wanted)
    return count


def popcount(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Ones in each word, shape ``(n,)``."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words))
    bytes_of = words.view(np.uint8).reshape(len(words), 8)
    return np.asarray(_BYTE_COUNTS[bytes_of].sum(1, dtype=np.uint8))


_BYTE_COUNTS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
