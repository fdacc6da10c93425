"""Which neurons of a wide output layer take part in a batch, to an exact budget.

First the labels of the batch, always; then what a selector found; then as many others by chance as
the budget still has room for. The set is one for the whole batch: what is counted is the union,
not one example's share of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.memory import Items, uniform

NO_LABEL = -1
"""Fills up the rows of examples that have fewer labels than others."""


@dataclass(frozen=True)
class ActiveSet:
    """The neurons of a batch, without repeats.

    Attributes:
        neurons: int64 of shape ``(A,)``; labels ascending, then selected ascending, then uniform
            ascending.
        log_weights: float32 of shape ``(A,)``: logarithm of how many neurons each one stands for
            in a sum over the layer. Labels and selected ones stand for themselves; a uniform one
            for its share of all that are left.
        labels: how many of them are labels of the batch.
        selected: how many were selected.
        width: neurons of the layer.
    """

    neurons: Tensor
    log_weights: Tensor
    labels: int
    selected: int
    width: int

    def __len__(self) -> int:
        return len(self.neurons)

    @property
    def uniform(self) -> int:
        """How many were drawn by chance."""
        return len(self.neurons) - self.labels - self.selected

    @property
    def share(self) -> float:
        """Active neurons of the whole batch over those of the layer."""
        return len(self.neurons) / self.width

    def places(self, labels: Tensor) -> Tensor:
        """Return where each label of this batch stands among the neurons; 0 for no label."""
        places = torch.searchsorted(self.neurons[: self.labels], labels)
        return places.clamp_(max=max(0, self.labels - 1))

    def __str__(self) -> str:
        return (
            f"{len(self)} of {self.width} neurons ({100 * self.share:.2f} %): "
            f"{self.labels} labels, {self.selected} selected, {self.uniform} uniform"
        )


def distinct_labels(labels: Tensor, width: int) -> Items:
    """Return the labels of a batch, ascending, without repeats and :data:`NO_LABEL`.

    Raises:
        UsageError: when one is out of its range.
    """
    found: Items = np.unique(labels.detach().cpu().numpy().astype(np.int64, copy=False))
    if len(found) and found[0] == NO_LABEL:
        found = found[1:]
    if len(found) and not (found[0] >= 0 and found[-1] < width):
        wrong = int(found[0] if found[0] < 0 else found[-1])
        raise UsageError(
            f"label {wrong}: a layer of {width} neurons has labels 0 to {width - 1}; number labels "
            "from 0, or make the layer wider"
        )
    return found


def active_set(
    labels: Items, selected: Items, budget: int, width: int, stream: SecureStream
) -> ActiveSet:
    """Join labels, selected neurons and uniform ones: ``min(budget, width)`` in all, exactly.

    Args:
        labels: of the batch, ascending, without repeats.
        selected: neurons in the order in which they are wanted; labels among them and what is
            beyond the budget are left out.
        stream: for the uniform ones.

    Raises:
        UsageError: when the labels alone are more than the budget.
    """
    budget = min(budget, width)
    if len(labels) > budget:
        raise UsageError(
            f"{len(labels)} distinct labels in a batch and a budget of {budget} neurons: labels "
            "are always active; raise the share of the layer, or take smaller batches"
        )
    if budget == width:
        fresh, drawn = np.delete(np.arange(width), labels), labels[:0]
    else:
        fresh = selected[~np.isin(selected, labels)]
        _, first = np.unique(fresh, return_index=True)
        fresh = np.sort(fresh[np.sort(first)][: budget - len(labels)])
        taken = np.union1d(labels, fresh)
        drawn = uniform(width - len(taken), budget - len(taken), stream, taken)
    certain = len(labels) + len(fresh)
    weights = torch.zeros(budget)
    if len(drawn):
        weights[certain:] = float(np.log((width - certain) / len(drawn)))
    neurons = torch.from_numpy(np.concatenate((labels, fresh, drawn)))
    return ActiveSet(neurons, weights, len(labels), len(fresh), width)
