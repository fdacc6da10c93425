"""A model with its weights, and what a device derives from them: rows, what it searches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.device.tier import FloatArray, ModelView, N
from privrec.embedding.table import Table
from privrec.models.losses import item_gram
from privrec.search.index import Sketch
from privrec.search.memory import ItemMemory
from privrec.search.select import Search


@dataclass(frozen=True)
class LocalModel(Generic[N]):
    """A tier's model with its weights, and what devices derive from them once a round.

    Nobody changes the ``weights``, the shared vector in memory form. Where ``resident``, rows that
    are searched are gathered once for all devices that a machine plays; a device has no room.
    """

    view: ModelView[N]
    weights: FloatArray
    resident: bool = False

    @property
    def dense(self) -> FloatArray:
        """The dense weights, shape ``(dense,)``."""
        return self.view.layout.dense_of(self.weights)

    @property
    def memory(self) -> FloatArray:
        """Memory of the vectors, shape ``(slots, block)``."""
        return self.view.layout.memory_of(self.weights)

    @property
    def bias_memory(self) -> FloatArray:
        """Memory of the biases, shape ``(bias_slots, 1)``."""
        return self.view.layout.biases_of(self.weights)[:, None]

    def rows(self, items: NDArray[np.integer]) -> FloatArray:
        """Vectors of items of any shape, with their features: one dimension more."""
        learned, features = self.view.vectors.gather(self.memory, items), self.view.features
        return learned if features is None else np.concatenate((learned, features[items]), axis=-1)

    def biases(self, items: NDArray[np.integer]) -> FloatArray:
        """Biases of items, of their shape; zeros where the model has none."""
        if self.view.biases is None:
            return np.zeros(items.shape, np.float32)
        return self.view.biases.gather(self.bias_memory, items)[..., 0]

    @cached_property
    def gram(self) -> FloatArray:
        """``Σ v vᵀ`` over all items, shape ``(dim, dim)``."""
        return item_gram(self.view.vectors, self.memory)

    @cached_property
    def inputs(self) -> Tensor:
        """Of each item the row and then a 1 for the user's bias, ``(items, dim + 1)``."""
        rows = torch.from_numpy(self.rows(np.arange(self.view.vectors.items)))
        return torch.nn.functional.pad(rows, (0, 1), value=1.0)

    @cached_property
    def products(self) -> Tensor:
        """Lower halves of ``x xᵀ`` of all items, ``x`` a row and then a 1 for the user's bias.

        Their weighted sums are the curvatures of all devices that look at the whole catalogue.
        """
        one, other = torch.tril_indices(self.inputs.shape[1], self.inputs.shape[1])
        return self.inputs[:, one] * self.inputs[:, other]

    @cached_property
    def curvature(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors of ``Σ p x xᵀ``, ``p`` the softmax of the item biases.

        It is the curvature, for each positive, of the loss of a user of whom nothing is known.
        """
        biases = torch.from_numpy(self.biases(np.arange(self.view.vectors.items)))
        weighted = self.inputs * torch.softmax(biases, 0)[:, None]
        values, vectors = torch.linalg.eigh((weighted.T @ self.inputs).double())
        return values.clamp_min(0).to(weighted.dtype), vectors.to(weighted.dtype)

    @cached_property
    def items(self) -> ItemMemory:
        """The catalogue, or the output neurons, as a device searches them."""
        table = self.view.biases
        biases = None if table is None else (table, self.bias_memory)
        return ItemMemory(self.view.vectors, self.memory, biases)

    def search(self, selector: str, config: Any = None) -> Search:
        """What a selector searches, by the keys in ``config``; the sketch comes with its own."""
        sketch = self._sketch if selector == "sketch" else None
        return replace(self._plain, sketch=sketch, config=config)

    @cached_property
    def _plain(self) -> Search:
        return Search(self.items.unfolded() if self.resident else self.items)

    @cached_property
    def _sketch(self) -> Sketch:
        return Sketch.of(self._plain.items)


class Located:
    """The memory blocks behind some rows of a table, and how the rows are made of them.

    Of rows ``(m, k)``, ``slots`` names the blocks, ``(m, names)``, each as often as a row has it.
    Public ``features`` of all items, ``(items, q)``, follow in each row, and never change.
    """

    def __init__(
        self, table: Table, items: NDArray[np.int64], features: FloatArray | None = None
    ) -> None:
        slots, signs = table.locate(items)
        if table.scale != 1:
            signs = signs * np.float32(table.scale)
        self.slots = slots.reshape(len(items), items.shape[1] * table.parts)
        self.block = table.block
        self._shape = (items.shape[1], table.dim)
        self._signs = torch.from_numpy(signs.reshape(*self.slots.shape, 1))
        self._features = None if features is None else torch.from_numpy(features[items])

    def read(self, blocks: Tensor) -> Tensor:
        """Rows made of blocks ``(m, names, block)``, shape ``(m, k, dim + q)``."""
        rows = (blocks * self._signs).reshape(len(blocks), *self._shape)
        if self._features is None:
            return rows
        return torch.cat((rows, self._features.expand(len(rows), -1, -1)), dim=2)

    def spread(self, rows: Tensor) -> Tensor:
        """A change of rows as one of blocks: the adjoint of :meth:`read`, ``(m, names, block)``."""
        m, names = len(rows), self.slots.shape[1]
        return rows.reshape(m, names, self.block) * self._signs
