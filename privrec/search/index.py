"""Indexes of a wide layer that are kept for many batches, and when they are made anew.

Families, signatures and the sketch are those of a device's own search; here they outlive one
query. An index never changes what a neuron computes, only which neurons are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.hashing import FAMILIES, Buckets, Family, Shape, Signs, draw, signature
from privrec.search.memory import CHUNK, FloatArray, ItemMemory, Items, evenly, uniform

SIGNATURE = 256  # bits of a signature that is ranked
_SAMPLE = 4096  # neurons whose codes are compared to tell how many have changed

RANK = 32  # directions that a sketch keeps
_LARGEST, _RANGE = 127, 4.0  # of its 8 bits, and the standard deviations that they span
_MOVED = 8  # steps of a quarter of a standard deviation: less changes no ranking that matters
_PROBES, _BEST = 32, 10

_CELLS, _FEWEST = 1024, 16  # most cells; fewer where one would hold less than so many neurons
_TRAINED_ON, _ROUNDS = 64, 8  # neurons a cell that centres are fitted to, and passes over them


class Index(Protocol):
    """A way to find neurons that score high."""

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """Return at most ``budget`` neurons for all queries ``(q, dim)``, the most wanted first."""

    def one(self, query: FloatArray, budget: int) -> Items:
        """Return candidates of one query of shape ``(dim,)``, about ``budget``, in any order."""
        return self.batch(query[None], budget)

    def changed(self, items: ItemMemory) -> float:
        """Return the share of the codes of a sample that would be other ones now."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""


@dataclass(frozen=True)
class Rebuild:
    """When an index is made anew: ``every`` so many steps, or when enough codes have changed.

    Those of a sample are looked at each ``check`` steps, and a share above ``changed``, in (0, 1),
    is enough. None rules either out.
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
        """Return whether an index of an age in steps has to be made anew."""
        if not age:
            return False
        if self.every is not None and age >= self.every:
            return True
        if self.changed is None or age % self.check:
            return False
        return index.changed(items) > self.changed


def most_wanted(values: FloatArray, budget: int) -> Items:
    """Return the neurons of the highest values, the highest first."""
    budget = min(budget, len(values))
    chosen = np.argpartition(values, -max(1, budget))[len(values) - budget :]
    return chosen[np.argsort(-values[chosen], kind="stable")]


def highest(scores: Iterator[FloatArray]) -> FloatArray:
    """Return the highest score of each item for any query, of chunks ``(m, q)``."""
    return np.concatenate([part.max(axis=1) for part in scores])


def _sample(items: int) -> Items:
    """An evenly spaced sample of neurons."""
    return evenly(items, min(items, _SAMPLE))


@dataclass(frozen=True)
class Tables(Index):
    """Hash tables of one function each: who shares buckets with the queries, by how often."""

    tables: tuple[Buckets, ...]
    centre: FloatArray

    @classmethod
    def of(cls, family: Family, items: ItemMemory, shape: Shape, stream: SecureStream) -> Tables:
        """Draw functions, and hash and sort all neurons, table after table."""
        one = replace(shape, tables=1)
        drawn = (draw(family, items.dim, one, stream) for _ in range(shape.tables))
        return cls(tuple(Buckets.of(items, each) for each in drawn), items.centre)

    def batch(self, queries: FloatArray, budget: int) -> Items:
        each = (table.lists(table.hashed.codes(queries)[:, 0]) for table in self.tables)
        found = np.concatenate([part for lists in each for part in lists])
        times = np.bincount(found, minlength=len(self.tables[0].order)).astype(np.float32)
        wanted = most_wanted(times, budget)
        return wanted[times[wanted] > 0]

    def changed(self, items: ItemMemory) -> float:
        sample = _sample(items.items)
        rows = items.rows(sample)
        pairs = [(t.hashed.codes(rows, self.centre)[:, 0], t.codes_of(sample)) for t in self.tables]
        return float(np.mean([now != then for now, then in pairs]))

    @property
    def nbytes(self) -> int:
        return sum(table.order.nbytes + table.ends.nbytes for table in self.tables)


@dataclass(frozen=True)
class Signatures(Index):
    """Signs of each centred neuron, as columns of ``words``, and its length.

    The share of bits that differ estimates an angle, and lengths are known: neurons of one angle
    are told apart, which bits alone cannot.
    """

    words: NDArray[np.uint64]
    lengths: FloatArray
    centre: FloatArray
    hashed: Signs

    @classmethod
    def in_chunks(cls, items: ItemMemory, hashed: Signs) -> Iterator[Signatures]:
        """Sign all neurons, chunk by chunk: 32 bytes each at 256 bits."""
        centre = items.centre
        for _, rows in items.chunks():
            words = np.ascontiguousarray(hashed.signatures(rows, centre).T)
            squares = np.einsum("ij,ij->i", rows, rows) - rows @ (2 * centre) + centre @ centre
            yield cls(words, np.sqrt(squares.clip(min=0)), centre, hashed)

    @classmethod
    def of(cls, items: ItemMemory, hashed: Signs) -> Signatures:
        """Sign all neurons together."""
        parts = list(cls.in_chunks(items, hashed))
        words = np.concatenate([part.words for part in parts], axis=1)
        return cls(words, np.concatenate([part.lengths for part in parts]), items.centre, hashed)

    def values(self, queries: FloatArray) -> FloatArray:
        """Return the estimated product of each neuron with the query that likes it best."""
        count = self.hashed.matrix.shape[1]
        cosine = np.cos(np.arange(count + 1) * (np.pi / count))  # of each number of differing bits
        likely = np.full(len(self.lengths), -np.inf, np.float32)
        for query, wanted in zip(queries, self.hashed.signatures(queries), strict=True):
            differing = np.zeros(len(likely), np.uint16)
            for word, own in zip(self.words, wanted, strict=True):
                differing += np.bitwise_count(word ^ own)
            estimated = (cosine * np.linalg.norm(query)).astype(np.float32)
            np.maximum(likely, np.take(estimated, differing), out=likely)
        return likely * self.lengths

    def batch(self, queries: FloatArray, budget: int) -> Items:
        return most_wanted(self.values(queries), budget)

    def changed(self, items: ItemMemory) -> float:
        """The share of bits: of 256 some always change."""
        sample = _sample(items.items)
        now = self.hashed.signatures(items.rows(sample), self.centre)
        differing = int(np.bitwise_count(now ^ self.words[:, sample].T).sum())
        return float(differing / (len(sample) * self.hashed.matrix.shape[1]))

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.lengths.nbytes + self.hashed.matrix.nbytes


@dataclass(frozen=True)
class Sketch(Index):
    """Rows on their leading directions, in 8 bits a number: 32 bytes an item at any length.

    A server makes one of its public item table, and every device gets the same; nothing about a
    device goes back.

    Codes are ``(n, rank)``. A query is multiplied with the ``basis`` ``(dim, rank)``, which carries
    the codes' scales. ``recall`` is how much of the exact best items it finds, as its maker
    measured on public queries; ``centre`` was taken from the rows.
    """

    codes: NDArray[np.int8]
    basis: FloatArray
    recall: float
    centre: FloatArray

    @classmethod
    def of(cls, items: ItemMemory, rank: int = RANK, probes: FloatArray | None = None) -> Sketch:
        """Sketch a catalogue: its covariance, then its codes.

        Its recall is measured on public queries ``(q, dim)``, by default on its own rows.
        """
        rank = min(rank, items.dim)
        covariance = np.zeros((items.dim, items.dim))
        for _, rows in items.chunks():
            centred = rows - items.centre
            covariance += centred.T @ centred
        variances, vectors = np.linalg.eigh(covariance / items.items)
        forward = vectors[:, ::-1][:, :rank].astype(np.float32)
        spread = np.sqrt(variances[::-1][:rank].clip(min=np.finfo(np.float32).tiny))
        step = (_RANGE * spread / _LARGEST).astype(np.float32)
        codes = np.empty((items.items, rank), np.int8)
        for start, rows in items.chunks():
            projected = rows @ forward - items.centre @ forward
            codes[start : start + len(rows)] = _eight_bits(projected / step)
        if probes is None:
            probes = items.rows(evenly(items.items, _PROBES)) - items.centre
        made = cls(codes, forward * step, 0.0, items.centre)
        return replace(made, recall=made._recall(items, probes))

    def _recall(self, items: ItemMemory, probes: FloatArray) -> float:
        """Share of each probe's exact best ten that are among the best percent of the sketch."""
        exact = np.concatenate([rows @ probes.T for _, rows in items.chunks()])
        close = np.concatenate(list(self.values(probes)))
        best, found = min(_BEST, items.items), max(_BEST, items.items // 100)
        right = np.argsort(-exact, axis=0)[:best]
        edge = -np.sort(-close, axis=0)[min(found, items.items) - 1]
        return float((np.take_along_axis(close, right, axis=0) >= edge).mean())

    def values(self, queries: FloatArray) -> Iterator[FloatArray]:
        """Yield approximate products, but for a number a query, chunk by chunk, ``(m, q)``."""
        short = (queries @ self.basis).T
        for start in range(0, len(self.codes), CHUNK):
            yield self.codes[start : start + CHUNK].astype(np.float32) @ short

    def batch(self, queries: FloatArray, budget: int) -> Items:
        return most_wanted(highest(self.values(queries)), budget)

    def changed(self, items: ItemMemory) -> float:
        """In units of the codes' spread, so that a step is a change."""
        sample = _sample(items.items)
        inverse = self.basis / np.square(self.basis).sum(axis=0)
        now = _eight_bits((items.rows(sample) - self.centre) @ inverse)
        moved = np.abs(now.astype(np.int16) - self.codes[sample])
        return float((moved > _MOVED).mean())

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.basis.nbytes


def _eight_bits(scaled: FloatArray) -> NDArray[np.int8]:
    return np.rint(scaled).clip(-_LARGEST, _LARGEST).astype(np.int8)


@dataclass(frozen=True)
class Cells(Index):
    """A partition of the neurons around centres, of which a query visits the best few.

    A cell is a learned code: the centre that a neuron lies nearest to, where a drawn hash function
    cuts space blindly. A query's product with a centre is the mean product of its cell, so the
    cells are visited in that order. ``order`` lists neurons cell by cell, up to their ``ends``.
    Sources: Lloyd, "Least squares quantization in PCM" (IEEE Trans. Inf. Theory 1982); Jégou, Douze
    & Schmid, "Product quantization for nearest neighbor search" (PAMI 2011), for the inverted file.
    """

    centres: FloatArray
    order: Items
    ends: Items

    @classmethod
    def of(cls, items: ItemMemory, stream: SecureStream) -> Cells:
        """Fit centres to a drawn sample of neurons, and put each neuron into the nearest's cell."""
        count = max(1, min(_CELLS, items.items // _FEWEST))
        rows = items.rows(uniform(items.items, _TRAINED_ON * count, stream, np.zeros(0, np.int64)))
        centres = rows[evenly(len(rows), count)]
        for _ in range(_ROUNDS):
            near = _nearest(rows, centres)
            sums = torch.zeros(centres.shape)
            sums.index_add_(0, torch.from_numpy(near), torch.from_numpy(rows))
            sizes = np.bincount(near, minlength=count)
            filled = sizes > 0
            centres[filled] = sums.numpy()[filled] / sizes[filled, None]
        cell = np.concatenate([_nearest(part, centres) for _, part in items.chunks()])
        order = np.argsort(cell.astype(np.uint16), kind="stable")
        return cls(centres, order, np.cumsum(np.bincount(cell, minlength=count)))

    def batch(self, queries: FloatArray, budget: int) -> Items:
        """Each query's best cell comes before any query's second."""
        liked = queries @ self.centres.T
        # Ranks are compared, not products: queries differ in length.
        count = min(len(self.centres), 1 + 2 * budget * len(self.centres) // len(self.order))
        best = np.argpartition(-liked, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(liked, best, axis=1)
        best = np.take_along_axis(best, np.argsort(-values, axis=1), axis=1)
        _, first = np.unique(best.T, return_index=True)
        return self._members(best.T.ravel()[np.sort(first)], budget)[:budget]

    def one(self, query: FloatArray, budget: int) -> Items:
        """Cells are whole."""
        return self._members(np.argsort(-(self.centres @ query)), budget)

    def _members(self, cells: Items, budget: int) -> Items:
        """Neurons of as many of the cells as it takes to have ``budget``."""
        sizes = np.diff(self.ends, prepend=0)[cells]
        last = int(np.searchsorted(np.cumsum(sizes), budget)) + 1
        places = zip(self.ends[cells[:last]], sizes[:last], strict=True)
        return np.concatenate([self.order[end - size : end] for end, size in places])

    def changed(self, items: ItemMemory) -> float:
        """The share that lies nearest to another centre now."""
        places = _sample(items.items)
        cells = np.searchsorted(self.ends, places, side="right")
        return float((_nearest(items.rows(self.order[places]), self.centres) != cells).mean())

    @property
    def nbytes(self) -> int:
        return self.centres.nbytes + self.order.nbytes + self.ends.nbytes


def _nearest(rows: FloatArray, centres: FloatArray) -> Items:
    """The centre nearest to each row; a row's own length decides nothing."""
    half = np.einsum("ij,ij->i", centres, centres) / 2
    products = torch.from_numpy(rows) @ torch.from_numpy(centres.T)
    return cast(Items, (products - torch.from_numpy(half)).argmax(dim=1).numpy())


INDEXES: dict[str, Callable[[ItemMemory, Shape, SecureStream], Index]] = {
    "hamming": lambda items, _, s: Signatures.of(items, signature(items.dim, SIGNATURE, s)),
    "sketch": lambda items, _, __: Sketch.of(items, probes=items.rows(np.zeros(1, np.int64))),
    "cells": lambda items, _, stream: Cells.of(items, stream),
    **{family: partial(Tables.of, family) for family in FAMILIES},
}
"""What makes an index of a layer as it is now, of the shape of tables (of no effect on other
kinds) and the stream of hash functions or first cells."""
