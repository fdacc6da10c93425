"""The items as a device searches them: rows gathered from the compressed memory, chunk by chunk.

A row is the item's vector, followed by its bias where items have one; a query then ends in a 1.
Neither the table nor anything of its size is ever held.

A short summary of the public item table that a server makes and a device searches.

Rows are projected on their leading directions and kept as 8-bit integers: 32 bytes an item, for
any length of vector. Every device gets the same sketch, and nothing about a device goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError

FloatArray = NDArray[np.float32]
CHUNK = 8192
"""Items at a time: rows and what is computed from them stay in a level-2 cache or near it."""

_DOUBLED = 1 << 22
"""Largest memory, in floats, of which a signed copy is made for the time of a pass."""
_SAMPLE = 1 << 14


@dataclass(frozen=True)
class ItemMemory:
    """A catalogue in its memory.

    Args:
        table: where item vectors lie: a :class:`~privrec.embedding.subspace.Subspace`, whole or
            folded, or another table.
        memory: its blocks, float32 of shape ``(slots, block)``.
        biases: where item biases lie and their memory of shape ``(slots, 1)``, or None.

    Raises:
        UsageError: when a memory has not the shape that its table asks for.
    """

    table: Table
    memory: FloatArray
    biases: tuple[Table, FloatArray] | None = None

    def __post_init__(self) -> None:
        _check_shape("memory", self.memory, self.table)
        if self.biases is not None:
            _check_shape("biases", self.biases[1], self.biases[0])

    @property
    def items(self) -> int:
        """Number of items."""
        return self.table.items

    @property
    def dim(self) -> int:
        """Length of a row: the vector's, and one more for a bias."""
        return self.table.dim + (self.biases is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory itself."""
        return self.memory.nbytes + (0 if self.biases is None else self.biases[1].nbytes)

    @property
    def pass_bytes(self) -> int:
        """Most bytes that :meth:`chunks` and :meth:`products` hold at a time."""
        size = min(CHUNK, self.items)
        doubled = 2 * self.memory.nbytes if self._is_doubled else 0
        places = size * self.table.parts * 48
        return doubled + places + size * (self.table.dim + self.dim) * 4

    def unfolded(self) -> ItemMemory:
        """The same items with every row gathered, for a machine that plays many devices."""
        table = PlainTable.of(self.items, self.table.dim, block=self.table.block)
        memory = np.concatenate([vectors.copy() for _, vectors in self._vectors()])
        small = self.biases
        if small is not None:
            plain = PlainTable.of(self.items, 1, block=1)
            small = plain, self._biases_of(small, np.arange(self.items))[:, None]
        return ItemMemory(table, memory.reshape(table.slots, table.block), small)

    def rows(self, items: NDArray[np.integer]) -> FloatArray:
        """Rows of some items, shape ``(k, dim)``."""
        vectors: FloatArray = self.table.gather(self.memory, items)
        if self.biases is None:
            return vectors
        return np.concatenate((vectors, self._biases_of(self.biases, items)[:, None]), axis=1)

    def chunks(self) -> Iterator[tuple[int, FloatArray]]:
        """All rows in order, as ``(first item, rows)``.

        The rows are a view that the next step overwrites; they must not be changed.
        """
        widened = None
        for start, vectors in self._vectors():
            if self.biases is None:
                yield start, vectors
                continue
            if widened is None:
                widened = np.empty((len(vectors), self.dim), np.float32)
            rows = widened[: len(vectors)]
            rows[:, :-1] = vectors
            rows[:, -1] = self._biases_of(self.biases, np.arange(start, start + len(rows)))
            yield start, rows

    def products(self, query: FloatArray) -> Iterator[tuple[int, FloatArray]]:
        """Products of all rows with one query, as ``(first item, products)``.

        Each memory block is multiplied once by each part of the query, and items gather numbers
        instead of blocks.

        Args:
            query: shape ``(dim,)``.
        """
        table = self.table
        parts = query[: table.dim].reshape(table.parts, table.block)
        # One row a block: the parts' products with it lie together.
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
                items = np.arange(start, start + len(values))
                values += query[-1] * self._biases_of(self.biases, items)
            yield start, values

    @cached_property
    def centre(self) -> FloatArray:
        """Mean row of an evenly spaced sample of items, shape ``(dim,)``.

        Taking the same vector from every item changes no softmax and no ranking, so a sample will
        do. It rids the items of their common direction, which would put most into one bucket.
        """
        step = -(-self.items // _SAMPLE)
        mean: FloatArray = self.rows(np.arange(0, self.items, step)).mean(axis=0)
        return mean

    @property
    def _is_doubled(self) -> bool:
        return self.memory.size <= _DOUBLED

    def _vectors(self) -> Iterator[tuple[int, FloatArray]]:
        table = self.table
        if isinstance(table, PlainTable) and not table.by_part:
            whole = self.memory.reshape(table.items, table.dim)
            yield from (
                (start, whole[start : start + CHUNK]) for start in range(0, len(whole), CHUNK)
            )
            return
        # A lookup in the memory and its negative saves a pass over all gathered rows.
        scale, source = np.float32(table.scale), self.memory
        if self._is_doubled:
            source = np.empty((2 * table.slots, table.block), np.float32)
            np.multiply(self.memory, scale, out=source[: table.slots])
            np.negative(source[: table.slots], out=source[table.slots :])
        buffer = np.empty((min(CHUNK, table.items) * table.parts, table.block), np.float32)
        for start in range(0, table.items, CHUNK):
            part = np.arange(start, min(table.items, start + CHUNK))
            blocks = buffer[: len(part) * table.parts]
            if self._is_doubled:
                slots = table.locate_doubled(part)
                np.take(source, slots.ravel(), axis=0, out=blocks, mode="clip")
            else:
                slots, signs = table.locate(part)
                np.take(source, slots.ravel(), axis=0, out=blocks, mode="clip")
                blocks *= signs.reshape(-1, 1) * scale
            yield start, blocks.reshape(len(part), table.dim)

    @staticmethod
    def _biases_of(biases: tuple[Table, FloatArray], items: NDArray[np.integer]) -> FloatArray:
        table, memory = biases
        values: FloatArray = table.gather(memory, items)[:, 0]
        return values


def _check_shape(name: str, memory: FloatArray, table: Table) -> None:
    wanted = (table.slots, table.block)
    if memory.shape != wanted:
        raise UsageError(
            f"{name} of shape {memory.shape}: its table has {wanted[0]} blocks of {wanted[1]} "
            "floats; hand over the memory that belongs to the table"
        )


RANK = 32
_LARGEST = 127
_PROBES, _BEST = 32, 10
_RANGE = 4.0  # standard deviations that the 8 bits span


@dataclass(frozen=True)
class Sketch:
    """Rows of rank 32 or less, in 8 bits a number.

    Args:
        codes: int8 of shape ``(n, rank)``.
        basis: what a query is multiplied with, shape ``(dim, rank)``; it carries the codes' scales.
        recall: how much of the exact best items it finds, as its maker measured on public queries.
    """

    codes: NDArray[np.int8]
    basis: FloatArray
    recall: float

    @classmethod
    def of(cls, items: ItemMemory, rank: int = RANK, probes: FloatArray | None = None) -> Sketch:
        """The sketch of a catalogue, in two passes: its covariance, then its codes.

        Args:
            items: the catalogue, as everybody knows it.
            rank: directions kept; all of them where vectors are shorter.
            probes: public queries to measure its recall on, shape ``(q, dim)``; by default rows of
                the catalogue itself.
        """
        rank = min(rank, items.dim)
        covariance = np.zeros((items.dim, items.dim))
        for _, rows in items.chunks():
            centred = rows - items.centre
            covariance += centred.T @ centred
        variances, vectors = np.linalg.eigh(covariance / items.items)
        leading = vectors[:, ::-1][:, :rank]
        spread = np.sqrt(variances[::-1][:rank].clip(min=np.finfo(np.float32).tiny))
        step = (_RANGE * spread / _LARGEST).astype(np.float32)
        forward, codes = leading.astype(np.float32), np.empty((items.items, rank), np.int8)
        for start, rows in items.chunks():
            scaled = (rows @ forward - items.centre @ forward) / step
            np.rint(scaled, out=scaled)
            codes[start : start + len(rows)] = scaled.clip(-_LARGEST, _LARGEST)
        if probes is None:
            probes = items.rows(np.linspace(0, items.items - 1, _PROBES).astype(np.int64))
            probes = probes - items.centre
        made = cls(codes, forward * step, 0.0)
        return replace(made, recall=made.measured(items, probes))

    def measured(self, items: ItemMemory, probes: FloatArray) -> float:
        """Share of each probe's exact best ten that are among the best percent of the sketch."""
        exact = np.concatenate([rows @ probes.T for _, rows in items.chunks()])
        close = np.concatenate([values for _, values in self.values(probes)])
        best, found = min(_BEST, items.items), max(_BEST, items.items // 100)
        right = np.argsort(-exact, axis=0)[:best]
        edge = -np.sort(-close, axis=0)[min(found, items.items) - 1]
        return float((np.take_along_axis(close, right, axis=0) >= edge).mean())

    def encoded(self, centred: FloatArray) -> NDArray[np.int8]:
        """Codes that rows less their centre have in this sketch, shape ``(m, rank)``."""
        scaled = centred @ (self.basis / np.square(self.basis).sum(axis=0))
        codes: NDArray[np.int8] = np.rint(scaled).clip(-_LARGEST, _LARGEST).astype(np.int8)
        return codes

    @property
    def nbytes(self) -> int:
        """Bytes that a device keeps."""
        return self.codes.nbytes + self.basis.nbytes

    def values(self, queries: FloatArray) -> Iterator[tuple[int, FloatArray]]:
        """Approximate products, but for a number a query, as ``(first item, (m, q))``.

        Args:
            queries: shape ``(q, dim)``.
        """
        short = (queries @ self.basis).T
        for start in range(0, len(self.codes), CHUNK):
            yield start, self.codes[start : start + CHUNK].astype(np.float32) @ short
