"""Scores of items for users whose private states were fitted to the released weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.device.train import Recommender

FloatArray = NDArray[np.float32]
_ITEMS_AT_ONCE = 8192


@dataclass(frozen=True)
class Scorer:
    """Scores with one set of weights; the table is gathered in parts and never held.

    Args:
        recommender: the meaning of the weights.
        weights: the shared vector.
        states: private states by user, shape ``(users, user_dim)``.
    """

    recommender: Recommender
    weights: FloatArray
    states: FloatArray

    def __call__(
        self, users: NDArray[np.integer], candidates: NDArray[np.integer] | None
    ) -> FloatArray:
        """Scores of each user's candidates ``(m, c)``, or of all items when there are none."""
        parts = [self._part(users, items) for items in self._items()]
        full = np.concatenate(parts, axis=1)
        return full if candidates is None else np.take_along_axis(full, candidates, axis=1)

    def _items(self) -> Iterator[NDArray[np.int64]]:
        n_items = self.recommender.vectors.items
        for start in range(0, n_items, _ITEMS_AT_ONCE):
            yield np.arange(start, min(n_items, start + _ITEMS_AT_ONCE))

    def _part(self, users: NDArray[np.integer], items: NDArray[np.int64]) -> FloatArray:
        parts = self.recommender
        table = parts.vectors.gather(parts.layout.memory_of(self.weights), items)
        dense = torch.from_numpy(parts.layout.dense_of(self.weights))
        own = torch.from_numpy(self.states[users])
        scores: FloatArray = parts.model.rank(own, torch.from_numpy(table), dense).numpy()
        if parts.biases is not None:
            memory = parts.layout.biases_of(self.weights)[:, None]
            scores += parts.biases.gather(memory, items)[:, 0]
        return scores
