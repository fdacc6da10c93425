"""Hash functions that a device draws for itself, and the tables that it makes of them.

A device draws its functions, and how many of them it uses, from its own secret stream: nothing of
them is ever sent, and no two devices share one. ``simhash``, ``pghash`` and ``block_sign`` are
signs of Gaussian projections, ``sign(<a, x>)``, that differ in how ``a`` is made.
Sources: Charikar, "Similarity estimation techniques from rounding algorithms" (STOC 2002);
Rabbani, Bornstein & Huang, "Large-scale distributed learning via private on-device LSH"
(NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.memory import FloatArray, ItemMemory, Items

Family = Literal["simhash", "pghash", "block_sign"]
FAMILIES: tuple[Family, ...] = ("simhash", "pghash", "block_sign")

ROOM = 1 << 18  # projections at a time: 1 MiB of float32, which stays in a level-2 cache
_TABLES_A_PASS = 8  # tables that share a pass over the items
_WORD = 16  # bits in a code's integer
_CODES = 1 << _WORD
_LONGEST = 4096
_FEWEST, _MOST = 12, 28  # tables that a device may choose to build
FOLD = 32  # length to which ``pghash`` folds a vector


@dataclass(frozen=True)
class Shape:
    """How many functions: a code has ``bits`` of them, and there are ``tables`` codes.

    ``pghash`` folds a vector to the length ``fold``, and ``block_sign`` has blocks of ``block``.
    """

    bits: int
    tables: int = 1
    fold: int = FOLD
    block: int = 16

    def __post_init__(self) -> None:
        limits = {"bits": _LONGEST, "tables": 10_000, "fold": _LONGEST, "block": _LONGEST}
        for name, most in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UsageError(f"{name} = {value}: must lie in 1 to {most}; choose one that does")


def own_shape(items: int, budget: int, stream: SecureStream, block: int) -> Shape:
    """Draw the shape that one device chooses for itself.

    A table's bucket should hold about as many items as the budget has for a table; the device then
    moves one bit up or down, so that not even the shape is known to others.
    """
    coins = stream.uint32(2)
    tables = _FEWEST + int(coins[0]) % (_MOST - _FEWEST + 1)
    load = max(1.0, 2 * budget / tables)
    bits = round(np.log2(max(2.0, items / load))) + int(coins[1]) % 3 - 1
    return Shape(min(_WORD, max(2, bits)), tables, block=block)


def draw(family: Family, dim: int, shape: Shape, stream: SecureStream) -> Signs:
    """Draw hash functions of a family for vectors of length ``dim``; codes of up to 16 bits."""
    if shape.bits > _WORD:
        raise UsageError(
            f"bits = {shape.bits}: the code of a table has at most {_WORD}; use fewer bits, or "
            "rank signatures"
        )
    return Signs(projection(family, dim, shape, stream), shape)


def projection(family: Family, dim: int, shape: Shape, stream: SecureStream) -> FloatArray:
    """Draw the vectors ``a`` of a sign family, as columns: shape ``(dim, tables * bits)``.

    ``simhash``: Gaussian. ``pghash``: ``S F`` with Gaussian ``S`` over vectors folded to ``c``, so
    a column repeats itself every ``c`` numbers. ``block_sign``: one Gaussian block a column,
    repeated with a fresh sign for every block.
    """
    count = shape.bits * shape.tables
    length = {"simhash": dim, "pghash": shape.fold, "block_sign": shape.block}[family]
    drawn = min(length, dim)
    times = -(-dim // drawn)
    signs = np.ones((times, count), np.float32)
    if family == "block_sign":
        signs -= 2 * (stream.uint32(times * count) >> np.uint32(31)).reshape(times, count)
    block = stream.normal(drawn * count).astype(np.float32).reshape(drawn, count)
    return (signs[:, None] * block).reshape(times * drawn, count)[:dim]


def signature(dim: int, bits: int, stream: SecureStream) -> Signs:
    """Draw the functions of a long code that is ranked by how many of its bits differ.

    Promise: each bit differs with probability ``angle(x, y) / π``, as with ``simhash``. The vectors
    are orthogonal in groups of ``dim``, so that the share of bits that differ scatters less about
    the angle than with independent ones.
    Source: Ji et al., "Super-bit locality-sensitive hashing" (NIPS 2012), theorem 2.
    """
    columns = min(dim, bits)
    groups = -(-bits // columns)
    drawn = stream.normal(groups * dim * columns).reshape(groups, dim, columns)
    bases = np.concatenate(list(np.linalg.qr(drawn)[0]), axis=1)
    return Signs(np.ascontiguousarray(bases[:, :bits], np.float32), Shape(bits))


@dataclass(frozen=True)
class Signs:
    """Codes made of signs of projections on the columns of ``matrix``."""

    matrix: FloatArray
    shape: Shape

    def codes(self, rows: FloatArray, centre: FloatArray | None = None) -> NDArray[np.uint16]:
        """Return one code of each table for each row less the centre, shape ``(m, tables)``."""
        packed = self._packed(rows, centre, self.shape.tables, self.shape.bits, _WORD)
        return packed.view("<u2").reshape(len(rows), self.shape.tables)

    def signatures(self, rows: FloatArray, centre: FloatArray | None = None) -> NDArray[np.uint64]:
        """Return all bits of each row together, shape ``(m, ceil(tables * bits / 64))``."""
        count = self.matrix.shape[1]
        packed = self._packed(rows, centre, 1, count, -(-count // 64) * 64)
        return packed.view("<u8").reshape(len(rows), -1)

    def _packed(
        self, rows: FloatArray, centre: FloatArray | None, groups: int, bits: int, width: int
    ) -> NDArray[np.uint8]:
        """Bits of each group, padded with zeros to ``width``, eight a byte."""
        # In parts that stay in a level-2 cache; padding stays zero.
        count = max(1, min(len(rows), ROOM // self.matrix.shape[1]))
        values = np.empty((count, self.matrix.shape[1]), np.float32)
        decided = np.zeros((count, groups, width), np.bool_)
        # Projecting the centre once costs nothing; taking it from every row would cost a pass.
        above = np.float32(0) if centre is None else (centre @ self.matrix).reshape(groups, bits)
        packed = np.empty((len(rows), groups * width // 8), np.uint8)
        matrix = torch.from_numpy(self.matrix)
        for start in range(0, len(rows), len(values)):
            part = torch.from_numpy(rows[start : start + len(values)])
            projected, ones = values[: len(part)], decided[: len(part)]
            torch.mm(part, matrix, out=torch.from_numpy(projected))
            np.greater(projected.reshape(-1, groups, bits), above, out=ones[..., :bits])
            ready = np.packbits(ones.reshape(-1), bitorder="little")
            packed[start : start + len(part)] = ready.reshape(len(part), -1)
        return packed


def serial(
    items: ItemMemory, queries: FloatArray, family: Family, shape: Shape, stream: SecureStream
) -> Iterator[Items]:
    """Yield, table after table, the items that share a bucket with a query in none before it.

    They are ascending, and centred before they are hashed, which changes no ranking of theirs.
    Tables of later passes are never drawn when enough was taken, and none is ever held: the
    queries' codes are known first, so the items' are looked up in a bitmap of wanted codes and
    forgotten. A few tables share a pass, since gathering the items is most of one table's work.
    """
    seen = np.zeros(items.items, np.bool_)
    found = np.empty((min(_TABLES_A_PASS, shape.tables), items.items), np.bool_)
    for first in range(0, shape.tables, _TABLES_A_PASS):
        few = replace(shape, tables=min(_TABLES_A_PASS, shape.tables - first))
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


@dataclass(frozen=True)
class Buckets:
    """One table as lists: ``order`` has the items code by code, ascending, up to its ``ends``."""

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
        codes = np.arange(len(self.ends), dtype=np.uint16)
        where = np.empty(len(self.order), np.uint16)
        where[self.order] = np.repeat(codes, np.diff(self.ends, prepend=0))
        return where[items]

    def lists(self, codes: NDArray[np.uint16]) -> list[Items]:
        """Return the items of the buckets of some codes, ascending within each."""
        codes = codes.astype(np.int64)
        starts = np.where(codes > 0, self.ends[codes - 1], 0)
        parts = zip(starts, self.ends[codes], strict=True)
        return [self.order[start:end].astype(np.int64) for start, end in parts]
