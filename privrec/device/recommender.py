"""What devices train: a model over item vectors, and the hyper-parameters of local training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privrec.device.negatives import EACH
from privrec.embedding.table import Table
from privrec.models.layout import Layout
from privrec.models.ncf import NCF
from privrec.search.memory import ItemMemory

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Recommender:
    """The shared parameters' meaning: a model over item vectors in a subspace.

    Args:
        model: the scorer.
        vectors: where item vectors lie.
        biases: where item biases lie, or None.
        layout: sections of the shared vector.
    """

    model: NCF
    vectors: Table
    biases: Table | None
    layout: Layout

    def searched(self, weights: FloatArray) -> ItemMemory:
        """The catalogue as a device searches it.

        Args:
            weights: the shared vector in memory form.
        """
        biases = None
        if self.biases is not None:
            biases = self.biases, self.layout.biases_of(weights)[:, None]
        return ItemMemory(self.vectors, self.layout.memory_of(weights), biases)

    def tabulated(self) -> Recommender:
        """The same with its places looked up, for a machine that plays many devices."""
        biases = None if self.biases is None else self.biases.tabulated()
        return replace(self, vectors=self.vectors.tabulated(), biases=biases)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of local training, those of the scenario's ``[train]`` table."""

    loss: str
    negatives: int
    unobserved_weight: float
    item_l2: float
    newton: bool
    max_samples: int | None
    user_steps: int
    user_lr: float
    user_l2: float
    serve_steps: int
    serve_negatives: int
    local_steps: int
    local_lr: float
    selector: str = EACH
    budget: float = 0.01
    selected: float = 0.5
    serve_budget: float | None = None

    def serving(self) -> Settings:
        """These, for fitting a user vector to a whole history with more negatives."""
        budget = self.serve_budget or self.budget
        return replace(self, negatives=self.serve_negatives, budget=budget, max_samples=None)
