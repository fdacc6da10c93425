"""A partition of a layer's neurons around centres, of which a query visits the best few.

A cell is a learned code: the centre that a neuron lies nearest to, where a drawn hash function
cuts space blindly. A query's product with a centre is the mean product of its cell, so the cells
are visited in that order.
Sources: Lloyd, "Least squares quantization in PCM" (IEEE Trans. Inf. Theory 1982); Jégou, Douze &
Schmid, "Product quantization for nearest neighbor search" (PAMI 2011), for the inverted file.

Indexes of a layer that are kept for many batches, and when they are made anew.

Families, tables, signatures and the sketch are those of a device's own search; here they outlive
one query. An index never changes what a neuron computes, only which neurons are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.families import FAMILIES, Family, Shape, draw, signature
from privrec.search.memory import ItemMemory, Sketch
from privrec.search.select import SIGNATURE, uniform
from privrec.search.tables import Buckets, Items, Signatures

FloatArray = NDArray[np.float32]
CELLS = 1024
"""Most cells; fewer where a cell would hold less than :data:`FEWEST` neurons."""
FEWEST = 16
SAMPLE = 4096
"""Neurons whose cells are compared to tell how many have changed."""
_TRAINED_ON, _ROUNDS = 64, 8  # neurons a cell that centres are fitted to, and passes over them


@dataclass(frozen=True)
class Cells:
    """Neurons by cell.

    Args:
        centres: one a cell, shape ``(C, dim)``.
        order: neurons by cell, ascending within one.
        ends: where each cell ends in ``order``.
    """

    centres: FloatArray
    order: Items
    ends: Items

    @classmethod
    def of(cls, items: ItemMemory, stream: SecureStream, count: int | None = None) -> Cells:
        """Fit centres to a sample of neurons, and put every neuron into the nearest one's cell.

        Args:
            items: the layer.
            stream: draws the sample.
            count: cells; about :data:`CELLS` where not said.
        """
        count = count or max(1, min(CELLS, items.items // FEWEST))
        few = uniform(items.items, _TRAINED_ON * count, stream, np.zeros(0, np.int64))
        centres = _fitted(items.rows(few), count)
        cell = np.empty(items.items, np.int64)
        for start, rows in items.chunks():
            cell[start : start + len(rows)] = _nearest(rows, centres)
        order = np.argsort(cell.astype(np.uint16 if count <= 1 << 16 else np.int64), kind="stable")
        return cls(centres, order, np.cumsum(np.bincount(cell, minlength=count)))

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """Neurons of the cells that the queries like best, each query's best cell before any's
        second; up to ``budget``.

        Args:
            queries: shape ``(q, dim)``.
            budget: at least 1.
        """  # noqa: D205
        liked = queries @ self.centres.T
        # Of each query its best cell has rank 0: ranks tell queries' wishes apart, not lengths.
        count = min(len(self.centres), 1 + 2 * budget * len(self.centres) // len(self.order))
        best = np.argpartition(-liked, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(liked, best, axis=1)
        best = np.take_along_axis(best, np.argsort(-values, axis=1), axis=1)
        _, first = np.unique(best.T, return_index=True)
        cells = best.T.ravel()[np.sort(first)]
        return self._members(cells, budget)[:budget]

    def one(self, query: FloatArray, budget: int) -> Items:
        """Neurons of the best cells of one query, whole cells until there are ``budget``."""
        return self._members(np.argsort(-(self.centres @ query)), budget)

    def _members(self, cells: Items, budget: int) -> Items:
        sizes = np.diff(self.ends, prepend=0)[cells]
        last = int(np.searchsorted(np.cumsum(sizes), budget)) + 1
        ends = self.ends[cells[:last]]
        return np.concatenate(
            [self.order[e - s : e] for e, s in zip(ends, sizes[:last], strict=True)]
        )

    def changed(self, items: ItemMemory) -> float:
        """Share of a sample of neurons that lie nearest to another centre now."""
        places = np.unique(np.linspace(0, items.items - 1, min(items.items, SAMPLE)).astype(int))
        cells = np.searchsorted(self.ends, places, side="right")
        return float((_nearest(items.rows(self.order[places]), self.centres) != cells).mean())

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.centres.nbytes + self.order.nbytes + self.ends.nbytes


def _fitted(rows: FloatArray, count: int) -> FloatArray:
    centres = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)].copy()
    for _ in range(_ROUNDS):
        cell = _nearest(rows, centres)
        sizes = np.bincount(cell, minlength=count)
        sums = torch.zeros(centres.shape)
        sums.index_add_(0, torch.from_numpy(cell), torch.from_numpy(rows))
        filled = sizes > 0
        centres[filled] = sums.numpy()[filled] / sizes[filled, None]
    return centres


def _nearest(rows: FloatArray, centres: FloatArray) -> Items:
    """The centre nearest to each row; a row's own length decides nothing."""
    half = np.einsum("ij,ij->i", centres, centres) / 2
    products = torch.from_numpy(rows) @ torch.from_numpy(centres.T)
    found: Items = (products - torch.from_numpy(half)).argmax(dim=1).numpy()
    return found


Kind = Literal["hamming", "sketch", "cells", "simhash", "pghash", "pghash_d", "block_sign"]
KINDS: tuple[Kind, ...] = ("hamming", "sketch", "cells", *FAMILIES)
"""Indexes that can be held; ``scan`` and ``uniform`` need none."""

"""Neurons whose codes are compared to tell how many have changed."""


@dataclass(frozen=True)
class Rebuild:
    """When an index is made anew.

    Args:
        every: steps between rebuilds, at least 1; None, never by count.
        changed: share of codes in (0, 1) beyond which it is rebuilt; None, codes are not looked at.
        check: steps between two looks at the codes of a sample, at least 1.

    Raises:
        UsageError: when a value is out of its range.
    """

    every: int | None = None
    changed: float | None = 0.01
    check: int = 50

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("check", self.check)):
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value}: steps are at least 1; raise it")
        if self.changed is not None and not 0 < self.changed < 1:
            raise UsageError(f"changed = {self.changed}: is a share above 0 and below 1")

    def due(self, age: int, index: Index, items: ItemMemory) -> bool:
        """Whether an index of an age in steps has to be made anew."""
        if age == 0:
            return False
        if self.every is not None and age >= self.every:
            return True
        if self.changed is None or age % self.check:
            return False
        return index.changed(items) > self.changed


class Index(Protocol):
    """A way to find neurons that score high."""

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """Neurons for a batch together, the most wanted first, without repeats; up to ``budget``.

        Args:
            queries: shape ``(q, dim)``.
            budget: at least 1.
        """
        ...

    def one(self, query: FloatArray, budget: int) -> Items:
        """Candidates of one query, about ``budget`` of them, in any order.

        Args:
            query: shape ``(dim,)``.
            budget: at least 1.
        """
        ...

    def changed(self, items: ItemMemory) -> float:
        """Share of the codes of a sample that would be other ones now."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        ...


def build(kind: Kind, items: ItemMemory, shape: Shape, stream: SecureStream) -> Index:
    """An index of a kind over a layer as it is now.

    Args:
        kind: one of :data:`KINDS`.
        items: the layer.
        shape: of the tables; of no effect on other kinds.
        stream: for hash functions and first cells.

    Raises:
        UsageError: for an unknown kind, or a shape that the kind cannot have.
    """
    if kind == "hamming":
        return HeldSignatures.of(items, stream)
    if kind == "sketch":
        return HeldSketch(Sketch.of(items, probes=items.rows(np.zeros(1, np.int64))), items.centre)
    if kind == "cells":
        return Cells.of(items, stream)
    if kind in FAMILIES:
        return HeldTables.of(kind, items, shape, stream)
    raise UsageError(f'selector = "{kind}": is none of {", ".join(KINDS)}, scan and uniform')


def sampled(items: int) -> Items:
    """An evenly spaced sample of neurons."""
    found: Items = np.unique(np.linspace(0, items - 1, min(items, SAMPLE)).astype(np.int64))
    return found


def most_wanted(values: FloatArray, budget: int) -> Items:
    """Neurons of the highest values, the highest first."""
    budget = min(budget, len(values))
    chosen = np.argpartition(values, len(values) - budget)[len(values) - budget :]
    found: Items = chosen[np.argsort(-values[chosen], kind="stable")]
    return found


@dataclass(frozen=True)
class HeldTables:
    """Hash tables: who shares buckets with the queries, by how often.

    Args:
        tables: one function each.
        centre: what was taken from neurons before they were hashed.
    """

    tables: tuple[Buckets, ...]
    centre: FloatArray
    width: int

    @classmethod
    def of(
        cls, family: Family, items: ItemMemory, shape: Shape, stream: SecureStream
    ) -> HeldTables:
        """Draw functions, and hash and sort all neurons, table after table."""
        one = replace(shape, tables=1)
        tables = tuple(
            Buckets.of(items, draw(family, items.dim, one, stream)) for _ in range(shape.tables)
        )
        return cls(tables, items.centre, items.items)

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """See :meth:`Index.batch`."""
        found = [part for table in self.tables for part in table.lists(queries)]
        times = np.bincount(np.concatenate(found), minlength=self.width).astype(np.float32)
        wanted = most_wanted(times, budget)
        return wanted[times[wanted] > 0]

    def one(self, query: FloatArray, budget: int) -> Items:
        """See :meth:`Index.one`."""
        return self.batch(query[None], budget)

    def changed(self, items: ItemMemory) -> float:
        """See :meth:`Index.changed`."""
        sample = sampled(items.items)
        rows, shares = items.rows(sample), []
        for table in self.tables:
            now = table.hashed.codes(rows, self.centre)[:, 0]
            shares.append(float((now != table.codes_of(sample)).mean()))
        return float(np.mean(shares))

    @property
    def nbytes(self) -> int:
        """See :attr:`Index.nbytes`."""
        return sum(table.order.nbytes + table.ends.nbytes for table in self.tables)


@dataclass(frozen=True)
class HeldSignatures:
    """256 signs a neuron and its length: the angle they estimate, times the length.

    Args:
        signed: the signatures.
        lengths: of the centred neurons.
        centre: what was taken from them.
    """

    signed: Signatures
    lengths: FloatArray
    centre: FloatArray

    @classmethod
    def of(cls, items: ItemMemory, stream: SecureStream) -> HeldSignatures:
        """Draw functions and sign all neurons."""
        centre, hashed = items.centre, signature(items.dim, SIGNATURE, stream)
        lengths = np.empty(items.items, np.float32)
        for start, rows in items.chunks():
            squares = np.einsum("ij,ij->i", rows, rows) - rows @ (2 * centre) + centre @ centre
            lengths[start : start + len(rows)] = np.sqrt(squares.clip(min=0))
        return cls(Signatures.of(items, hashed), lengths, centre)

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """See :meth:`Index.batch`."""
        likely = np.full(len(self.lengths), -np.inf, np.float32)
        for query in queries:
            np.maximum(likely, self._likely(query), out=likely)
        return most_wanted(likely, budget)

    def one(self, query: FloatArray, budget: int) -> Items:
        """See :meth:`Index.one`."""
        return most_wanted(self._likely(query), budget)

    def _likely(self, query: FloatArray) -> FloatArray:
        """Estimated product of each centred neuron with a query."""
        count = self.signed.hashed.matrix.shape[1]
        cosine = np.cos(np.arange(count + 1) * (np.pi / count)) * np.linalg.norm(query)
        likely: FloatArray = np.take(cosine.astype(np.float32), self.signed.distances(query))
        likely *= self.lengths
        return likely

    def changed(self, items: ItemMemory) -> float:
        """See :meth:`Index.changed`; of 256 bits some always do, so it is the share of bits."""
        sample = sampled(items.items)
        now = self.signed.hashed.signatures(items.rows(sample), self.centre)
        differing = np.unpackbits((now ^ self.signed.words[:, sample].T).view(np.uint8))
        return float(differing.sum() / (len(sample) * self.signed.hashed.matrix.shape[1]))

    @property
    def nbytes(self) -> int:
        """See :attr:`Index.nbytes`."""
        return self.signed.words.nbytes + self.lengths.nbytes + self.signed.hashed.matrix.nbytes


@dataclass(frozen=True)
class HeldSketch:
    """Neurons on their leading directions, in 8 bits a number.

    Args:
        sketch: the codes.
        centre: what was taken from neurons.
    """

    sketch: Sketch
    centre: FloatArray

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """See :meth:`Index.batch`."""
        values = [part.max(axis=1) for _, part in self.sketch.values(queries)]
        return most_wanted(np.concatenate(values), budget)

    def one(self, query: FloatArray, budget: int) -> Items:
        """See :meth:`Index.one`."""
        return self.batch(query[None], budget)

    def changed(self, items: ItemMemory) -> float:
        """See :meth:`Index.changed`: in units of the codes' spread, so that a step is a change."""
        sample = sampled(items.items)
        now = self.sketch.encoded(items.rows(sample) - self.centre)
        moved = np.abs(now.astype(np.int16) - self.sketch.codes[sample])
        return float((moved > _MOVED).mean())

    @property
    def nbytes(self) -> int:
        """See :attr:`Index.nbytes`."""
        return self.sketch.nbytes


_MOVED = 8  # steps of a quarter of a standard deviation: less changes no ranking that matters
