"""A partition of a layer's neurons around centres, of which a query visits the best few.

A cell is a learned code: the centre that a neuron lies nearest to, where a drawn hash function
cuts space blindly. A query's product with a centre is the mean product of its cell, so the cells
are visited in that order.
Sources: Lloyd, "Least squares quantization in PCM" (IEEE Trans. Inf. Theory 1982); Jégou, Douze &
Schmid, "Product quantization for nearest neighbor search" (PAMI 2011), for the inverted file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.randomness import SecureStream
from privrec.search.memory import ItemMemory
from privrec.search.select import uniform
from privrec.search.tables import Items

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
