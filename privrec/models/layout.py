"""How the shared parameters lie in one vector: ``[dense | gram | memory | biases]``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Network(Protocol):
    """The dense part of a model."""

    @property
    def dense(self) -> int:
        """Number of dense weights."""

    def initial_dense(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Its weights before the first round."""


@dataclass(frozen=True)
class Layout:
    """Sections of the shared vector, those that every device holds first.

    They are dense weights; under an implicit loss (:mod:`privrec.models.losses`) the coefficients
    of the users' mean Gram matrix, which is no weight but travels with them; the item memory, of
    ``slots`` blocks of ``block`` floats; and item biases, where the model has some.
    """

    dense: int
    slots: int
    block: int
    bias_slots: int
    gram: int = 0

    @property
    def size(self) -> int:
        """Coefficients in the whole vector: its public dimension."""
        return self.head + self.slots * self.block + self.bias_slots

    @property
    def head(self) -> int:
        """Coefficients before the item memory, which no tier goes without."""
        return self.dense + self.gram

    def dense_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the dense weights."""
        return vector[: self.dense]

    def gram_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the users' Gram matrix, shape ``(gram,)``."""
        return vector[self.dense : self.head]

    def memory_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the item memory, shape ``(slots, block)``."""
        end = self.head + self.slots * self.block
        return vector[self.head : end].reshape(self.slots, self.block)

    def biases_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the item biases, shape ``(bias_slots,)``."""
        return vector[self.size - self.bias_slots :]

    def prefix_of(self, vector: NDArray[Any], weaker: Layout) -> NDArray[Any]:
        """A copy of what a weaker layout holds of this one's vector."""
        memory = self.memory_of(vector)[: weaker.slots].ravel()
        biases = self.biases_of(vector)[: weaker.bias_slots]
        return np.concatenate((vector[: weaker.head], memory, biases))


def packed_size(dim: int) -> int:
    """Coefficients of a packed symmetric ``dim × dim`` matrix."""
    return dim * (dim + 1) // 2


def bands(vector: NDArray[Any], layouts: Sequence[Layout]) -> Iterator[list[NDArray[Any]]]:
    """The parts of a vector that each tier adds to the next weaker one's, the weakest tier first.

    One after the other they are the vector in the order of the wire, in which every tier's own
    vector is a prefix. Each is views of the head (in the first band only), item memory and biases.
    ``vector`` is of the first of the layouts, which are those of all tiers, the strongest first.
    """
    whole = layouts[0]
    nothing = replace(whole, slots=0, bias_slots=0, dense=0, gram=0)
    for inner, outer in pairwise((nothing, *reversed(layouts))):
        yield [
            vector[inner.head : outer.head],
            whole.memory_of(vector)[inner.slots : outer.slots].ravel(),
            whole.biases_of(vector)[inner.bias_slots : outer.bias_slots],
        ]


def band_sizes(layouts: Sequence[Layout]) -> tuple[int, ...]:
    """Coefficients of each band, the weakest tier's first; layouts have the strongest first."""
    sizes = [0, *(layout.size for layout in reversed(layouts))]
    return tuple(longer - shorter for shorter, longer in pairwise(sizes))


def to_wire(vectors: NDArray[Any], layouts: Sequence[Layout]) -> NDArray[Any]:
    """Vectors in the order of the wire, band after band, in which weaker ones are prefixes.

    Vectors lie along the last axis; ``layouts`` are those of the tiers from theirs on, the
    strongest first. A single tier's order is that of the wire: its vectors are given as they are.
    """
    return vectors if len(layouts) == 1 else vectors[..., _wire_order(tuple(layouts))]


def from_wire(vectors: NDArray[Any], layouts: Sequence[Layout]) -> NDArray[Any]:
    """The inverse of :func:`to_wire`."""
    if len(layouts) == 1:
        return vectors
    ordered = np.empty_like(vectors)
    ordered[..., _wire_order(tuple(layouts))] = vectors
    return ordered


@lru_cache(maxsize=16)
def _wire_order(layouts: tuple[Layout, ...]) -> NDArray[np.int64]:
    places = np.arange(layouts[0].size)
    return np.concatenate([part for parts in bands(places, layouts) for part in parts])
