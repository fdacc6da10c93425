"""Extreme classification: a sparse bag of words, one hidden layer, and a wide sparse output.

:class:`ExtremeClassifier` trains on one machine. :class:`WordBag` is the same network as a function
of one flat vector, which is what devices of a federation share.

Source: Chen et al., "SLIDE" (MLSys 2020), whose network this is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from privrec.data.corpus import Examples
from privrec.models.sparse_output import Loss, SparseOutput
from privrec.randomness import rng_for
from privrec.search.active import ActiveSet


class BagOfWords(nn.Module):
    """A hidden vector ``relu(Σ value · row + bias)`` of the words of an example.

    Args:
        features: size of the vocabulary.
        dim: length of the hidden vector.
        seed: of the first weights.
    """

    def __init__(self, features: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        drawn = rng_for(seed, "words").standard_normal((features, dim), np.float32)
        drawn *= np.float32(dim**-0.5)
        self.weight = nn.Parameter(torch.from_numpy(drawn))
        self.bias = nn.Parameter(torch.zeros(1, dim))

    def forward(self, examples: Examples) -> Tensor:
        """Hidden vectors, shape ``(m, dim)``; the gradient of the words is sparse."""
        starts = np.concatenate(([0], examples.ends[:-1]))
        summed = functional.embedding_bag(
            torch.from_numpy(examples.features), self.weight, torch.from_numpy(starts),
            mode="sum", sparse=True, per_sample_weights=torch.from_numpy(examples.values),
        )  # fmt: skip
        return torch.relu(summed + self.bias)


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


class ExtremeClassifier(nn.Module):
    """Words to hidden vector to labels.

    Args:
        features: size of the vocabulary.
        output: the layer of labels; its ``dim`` is the hidden vector's length.
        seed: of the first weights of the words.
    """

    def __init__(self, features: int, output: SparseOutput, *, seed: int = 0) -> None:
        super().__init__()
        self.words, self.output = BagOfWords(features, output.dim, seed=seed), output

    def loss(
        self, examples: Examples, kind: Loss = "softmax", active: ActiveSet | None = None
    ) -> Tensor:
        """Mean loss of a batch; see :meth:`privrec.models.sparse_output.SparseOutput.loss`."""
        labels = torch.from_numpy(examples.padded_labels())
        return self.output.loss(self.words(examples), labels, kind, active)

    @torch.no_grad()
    def topk(self, examples: Examples, k: int) -> tuple[Tensor, Tensor]:
        """Scores and labels of the best ``k`` of each example, shape ``(m, k)``."""
        return self.output.topk(cast(Tensor, self.words(examples)), k)


def precision(best: Iterable[int], examples: Examples) -> float:
    """P@1: share of examples whose best label is one of their own.

    Args:
        best: the label put first for each example.
        examples: with their labels.
    """
    first = np.fromiter(best, np.int64, len(examples))
    return float((examples.padded_labels() == first[:, None]).any(axis=1).mean())
