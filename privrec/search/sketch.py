"""A short summary of the public item table that a server makes and a device searches.

Rows are projected on their leading directions and kept as 8-bit integers: 32 bytes an item, for
any length of vector. Every device gets the same sketch, and nothing about a device goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privrec.search.memory import CHUNK, ItemMemory

FloatArray = NDArray[np.float32]
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
