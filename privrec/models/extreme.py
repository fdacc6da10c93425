"""A bag of words as a function of one flat vector, which is what devices of a federation share.

Source: Chen et al., "SLIDE" (MLSys 2020), whose network this is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from privrec.data.extreme import Examples


@dataclass(frozen=True)
class WordBag:
    """Hidden vectors ``relu(Σ value · row + bias)``, with rows and bias in one flat vector.

    Args:
        features: size of the vocabulary that words are hashed to.
        dim: length of the hidden vector.
    """

    features: int
    dim: int

    @property
    def dense(self) -> int:
        """Number of dense weights."""
        return (self.features + 1) * self.dim

    @property
    def shortest(self) -> int:
        """Output neurons that the smallest piece of training has to have."""
        return 1

    def initial_dense(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Gaussian rows and a bias of zeros, as one vector."""
        weights = rng.standard_normal(self.dense, np.float32) * np.float32(self.dim**-0.5)
        weights[-self.dim :] = 0
        return weights

    def hidden(self, examples: Examples, dense: Tensor) -> Tensor:
        """Hidden vectors, shape ``(m, dim)``.

        Args:
            examples: with features below :attr:`features`.
            dense: dense weights, shape ``(dense,)``.
        """
        rows = dense[: -self.dim].view(self.features, self.dim)
        starts = torch.from_numpy(np.concatenate(([0], examples.ends[:-1])))
        summed = functional.embedding_bag(
            torch.from_numpy(examples.features), rows, starts, mode="sum",
            per_sample_weights=torch.from_numpy(examples.values),
        )  # fmt: skip
        return torch.relu(summed + dense[-self.dim :])
