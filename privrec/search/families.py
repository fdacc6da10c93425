"""Families of hash functions that a device draws for itself.

A device draws its functions, and how many of them it uses, from its own secret stream: nothing of
them is ever sent, and no two devices share one.

``simhash``, ``pghash`` and ``block_sign`` are signs of Gaussian projections, ``sign(<a, x>)``, that
differ in how ``a`` is made.
Sources: Charikar, "Similarity estimation techniques from rounding algorithms" (STOC 2002);
Rabbani, Bornstein & Huang, "Large-scale distributed learning via private on-device LSH"
(NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.memory import CHUNK

FloatArray = NDArray[np.float32]
Family = Literal["simhash", "pghash", "block_sign"]
FAMILIES: tuple[Family, ...] = ("simhash", "pghash", "block_sign")

ROOM = 1 << 18
"""Projections at a time: 1 MiB of float32, which stays in a level-2 cache."""

_WORD = 16  # bits in a code's integer
_LONGEST = 4096
_FEWEST, _MOST = 12, 28  # tables that a device may choose to build


@dataclass(frozen=True)
class Shape:
    """How many functions: a code has ``bits`` of them, and there are ``tables`` codes.

    Args:
        bits: 1 to 16 for tables, any number for signatures that are ranked.
        tables: at least 1.
        fold: ``pghash``: length ``c`` of a folded vector.
        block: ``block_sign``: length of a block.

    Raises:
        UsageError: when a value is out of its range.
    """

    bits: int
    tables: int = 1
    fold: int = 32
    block: int = 16

    def __post_init__(self) -> None:
        limits = {"bits": _LONGEST, "tables": 10_000, "fold": _LONGEST, "block": _LONGEST}
        for name, most in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UsageError(f"{name} = {value}: must lie in 1 to {most}; choose one that does")


def own_shape(items: int, budget: int, stream: SecureStream, base: Shape) -> Shape:
    """Draw the shape that one device chooses for itself, from its own stream.

    A table's bucket should hold about as many items as the budget has for a table; the device then
    moves one bit up or down, so that not even the shape is known to others.

    Args:
        items: size of the catalogue.
        budget: items that it wants, at least 1.
        stream: the device's own.
        base: its ``fold`` and ``block`` are kept.
    """
    coins = stream.uint32(2)
    tables = _FEWEST + int(coins[0]) % (_MOST - _FEWEST + 1)
    load = max(1.0, 2 * budget / tables)
    bits = round(np.log2(max(2.0, items / load))) + int(coins[1]) % 3 - 1
    return Shape(min(_WORD, max(2, bits)), tables, base.fold, base.block)


def draw(family: Family, dim: int, shape: Shape, stream: SecureStream) -> Signs:
    """Draw hash functions of a family for vectors of length ``dim``.

    Args:
        shape: how many; at most 16 bits a code.
        stream: the device's own secret stream.

    Raises:
        UsageError: when a code would not fit its integer.
    """
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
    signs = None
    if family == "block_sign":
        blocks = -(-dim // shape.block)
        coins = stream.uint32(blocks * count) >> np.uint32(31)
        signs = 1 - 2 * coins.reshape(blocks, count).astype(np.float32)
    block = stream.normal(drawn * count).astype(np.float32).reshape(drawn, count)
    vectors = np.tile(block, (-(-dim // drawn), 1))[:dim]
    if signs is not None:
        vectors *= np.repeat(signs, shape.block, axis=0)[:dim]
    return vectors


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
    """Codes made of signs of projections.

    Args:
        matrix: as :func:`projection` gives it.
        shape: of the codes.
    """

    matrix: FloatArray
    shape: Shape
    _room: tuple[FloatArray, NDArray[np.bool_]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def codes(self, rows: FloatArray, centre: FloatArray | None = None) -> NDArray[np.uint16]:
        """Return one code of each table for each row less the centre, shape ``(m, tables)``."""
        tables, bits = self.shape.tables, self.shape.bits
        packed = self._packed(rows, centre, tables, bits, _WORD)
        return packed.view("<u2").reshape(len(rows), tables)

    def signatures(self, rows: FloatArray, centre: FloatArray | None = None) -> NDArray[np.uint64]:
        """Return all bits of each row together, shape ``(m, ceil(tables * bits / 64))``."""
        count = self.matrix.shape[1]
        packed = self._packed(rows, centre, 1, count, -(-count // 64) * 64)
        return packed.view("<u8").reshape(len(rows), -1)

    def _packed(
        self, rows: FloatArray, centre: FloatArray | None, groups: int, bits: int, width: int
    ) -> NDArray[np.uint8]:
        """Bits of each group, padded with zeros to ``width``, eight a byte."""
        values, decided = self._scratch(groups, width)
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

    def _scratch(self, groups: int, width: int) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Room for projections and bits that stays in a level-2 cache; padding stays zero."""
        if self._room is None or self._room[1].shape[1:] != (groups, width):
            count = max(1, min(CHUNK, ROOM // self.matrix.shape[1]))
            values = np.empty((count, self.matrix.shape[1]), np.float32)
            room = values, np.zeros((count, groups, width), np.bool_)
            object.__setattr__(self, "_room", room)
            return room
        return self._room
