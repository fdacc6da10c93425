"""The two sides of the benchmark of wide outputs: a dense PyTorch layer, and a sparse one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from privrec.data.corpus import Examples
from privrec.data.synthetic import Invented
from privrec.models.classifier import BagOfWords, ExtremeClassifier
from privrec.models.sparse_output import RowAdam, SparseOutput
from privrec.randomness import SecretRoot, rng_for

AMAZON_670K = Invented(135_909, 670_091, words=75, labels_each=5.45, clusters=4096)
"""The shape of Amazon-670K; the repository's split has 490,449 and 153,025 examples."""

DELICIOUS_200K = Invented(782_585, 205_443, words=301, labels_each=75.54, clusters=1024)
"""The shape of Delicious-200K; the repository's split has 196,606 and 100,095 examples."""

TINY = 1e-8
"""Standard deviation of the first weights of both outputs: as good as none."""


def precision(best: Iterable[int], examples: Examples) -> float:
    """P@1: share of examples whose best label is one of their own."""
    first = np.fromiter(best, np.int64, len(examples))
    return float((examples.padded_labels() == first[:, None]).any(axis=1).mean())


@dataclass
class Trained:
    """A model, what its training took, and how good it is.

    Args:
        first: the label put first for each row of hidden vectors, by exact scores of all labels.
        words: from examples to hidden vectors.
        rate: step size.
        seconds: of training steps alone, evaluation left out.
        steps: taken.
        reached: P@1 on examples that are not trained on.
    """

    first: Callable[[torch.Tensor], torch.Tensor]
    words: BagOfWords
    rate: float
    seconds: float = 0.0
    steps: int = 0
    reached: float = 0.0

    def evaluate(self, test: Examples) -> float:
        """P@1 by exact scores of all labels, also of the sparse layer."""
        with torch.no_grad():
            best = [self.first(self.words(part)) for part in test.batches(128)]
        self.reached = precision(torch.cat(best).tolist(), test)
        return self.reached


def epochs(train: Examples, batch: int, most: int) -> Iterator[Examples]:
    """Batches of one epoch after another; both sides get the same ones in the same order."""
    for epoch in range(most):
        yield from train.batches(batch, rng_for(0, "bolt", epoch).permutation(len(train)))


class Dense:
    """Words to hidden vector as the sparse side has it, then a dense layer and fused Adam."""

    def __init__(self, features: int, labels: int, dim: int, lr: float) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(labels, dim))
        self.bias = torch.nn.Parameter(torch.zeros(labels))
        words = BagOfWords(features, dim)
        self.trained = Trained(lambda hidden: self.scores(hidden).argmax(1), words, lr)
        self._below = RowAdam(words.parameters(), lr=lr)
        self._output = torch.optim.Adam([self.weight, self.bias], lr=lr, fused=True)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, hidden, self.weight.T)

    def step(self, examples: Examples) -> None:
        """One step of the full softmax."""
        labels = torch.from_numpy(examples.padded_labels())
        started, real = time.perf_counter(), labels >= 0
        scores = self.scores(self.trained.words(examples))
        own = torch.where(real, scores.gather(1, labels.clamp(min=0)), 0.0).sum(1) / real.sum(1)
        loss = (torch.logsumexp(scores, 1) - own).mean()
        self._below.zero_grad()
        self._output.zero_grad()
        loss.backward()
        self._below.step()
        self._output.step()
        self.trained.seconds += time.perf_counter() - started
        self.trained.steps += 1


class Sparse:
    """The same with a sparse output."""

    def __init__(self, features: int, labels: int, dim: int, lr: float, share: float) -> None:
        self.layer = SparseOutput(
            labels, dim, share=share, selector="cells", selected=0.0, init_std=TINY,
            root=SecretRoot.known(b"bolt"),
        )  # fmt: skip
        model = ExtremeClassifier(features, self.layer)
        self.model, self._optimizer = model, RowAdam(model.parameters(), lr=lr)
        self.trained = Trained(self._first, model.words, lr)

    def _first(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.layer.bias is not None
        return torch.addmm(self.layer.bias[:, 0], hidden, self.layer.weight.T).argmax(1)

    def step(self, examples: Examples) -> None:
        """One step of the sampled softmax."""
        started = time.perf_counter()
        self._optimizer.zero_grad()
        self.model.loss(examples).backward()
        self._optimizer.step()
        self.trained.seconds += time.perf_counter() - started
        self.trained.steps += 1


def queries(sparse: Sparse, hidden: torch.Tensor) -> tuple[list[float], list[float], list[bool]]:
    """Seconds of dense and sparse single queries in turn, and whether the best label agrees."""
    layer = sparse.layer.eval()
    assert layer.bias is not None
    weight, bias = layer.weight.detach(), layer.bias.detach()[:, 0].clone()
    layer.topk(hidden[0], 1)  # builds the index
    whole, few, agree = [], [], []
    with torch.no_grad():
        for query in hidden:
            started = time.perf_counter()
            best = int(torch.addmv(bias, weight, query).argmax())
            middle = time.perf_counter()
            found = int(layer.topk(query, 1)[1])
            few.append(time.perf_counter() - middle)
            whole.append(middle - started)
            agree.append(best == found)
    return whole, few, agree


def distinct(sparse: Sparse, hidden: torch.Tensor) -> int:
    """How many labels are some query's best: one that all share would be found by anything."""
    with torch.no_grad():
        return len(np.unique(torch.cat([sparse._first(part) for part in hidden.split(128)])))
