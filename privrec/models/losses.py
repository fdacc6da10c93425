"""Losses of implicit feedback, with what a device needs to descend them.

Each takes scores of shape ``(m, k)`` and the samples behind them, and gives three things a device:
the summed loss ``(m,)``, its gradient on the scores ``(m, k)``, and a curvature ``(m, k)`` whose
diagonal is never below the Hessian at those scores, for the Newton steps of a device.

Implicit ALS samples no negatives: two small Gram matrices stand for them. The loss of a user ``u``
is ``½ Σ_history (u·v_i - 1)² + ½ α Σ_all (u·v_i)²``, and item vectors have a penalty
``½ ρ |v_i|²``. Both sums over all items are short. The user's share needs only
``G = Σ_i v_i v_iᵀ``. In the mean over users, the item gradient is ``v_i (α S + ρ I)`` less what
the histories say, with ``S`` the mean of ``u uᵀ``. So devices send their histories' gradient and
``u uᵀ``, the server works out the rest for every item, touched or not, and no negative is ever
sampled or sent.

Since the mean of ``u uᵀ`` is public once it is released, devices may multiply their gradient by
``P = (α S + ρ I)^-1``: a Newton step in all but each item's own history, which converges where that
part is small (large ``α``), and may not elsewhere. What is left for the server is then ``v_i``.
Source: Hu, Koren & Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008);
Rendle et al., "iALS++" (2021), for the form of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from privrec.embedding.table import Table
from privrec.scenario.kinds import LOSSES

Array = NDArray[Any]
_ITEMS_AT_ONCE = 8192


def pack(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """``u uᵀ`` of each row ``u``, packed row by row below the diagonal.

    Promise: the packed row has the matrix's Frobenius norm, ``|u|²``; and packing the first
    coordinates of ``u`` gives a prefix, so that vectors of several lengths share one section.
    """
    rows, columns, factors = _places(vectors.shape[1])
    packed = vectors[:, rows] * vectors[:, columns]
    packed *= factors
    return packed


def unpack(packed: Array, dim: int) -> Array:
    """The symmetric matrix, shape ``(dim, dim)``, of a packed one that is at least as large."""
    rows, columns, factors = _places(dim)
    matrix = np.empty((dim, dim), packed.dtype)
    matrix[rows, columns] = packed[: len(rows)] / factors
    matrix[columns, rows] = matrix[rows, columns]
    return matrix


def item_gram(table: Table, memory: NDArray[np.float32]) -> NDArray[np.float32]:
    """``Σ_i v_i v_iᵀ`` over all items of a table, shape ``(dim, dim)``, in parts."""
    gram = np.zeros((table.dim, table.dim))
    for items in table.in_parts(_ITEMS_AT_ONCE):
        rows = table.gather(memory, items)
        gram += rows.T @ rows
    return gram.astype(np.float32)


def curvature(
    users: NDArray[np.float32], dim: int, unobserved_weight: float, item_l2: float
) -> NDArray[np.float32]:
    """``α S + ρ I``, shape ``(dim, dim)``: what the loss over all items multiplies each item by.

    ``users`` is ``S``, packed, of vectors at least ``dim`` long; what noise made of it is taken as
    if it were a Gram matrix. ``unobserved_weight`` is ``α``, and ``item_l2`` is ``ρ``, above 0.
    """
    values, vectors = np.linalg.eigh(unpack(users, dim).astype(np.float64))
    weighted = vectors * (unobserved_weight * values.clip(min=0) + item_l2)
    return np.asarray(weighted @ vectors.T, np.float32)


def pressure(
    table: Table, memory: NDArray[np.float32], matrix: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """``v_i M`` for every item, added up in the blocks of a table's memory; None, ``M`` is 1."""
    if matrix is None:
        return memory * table.load[:, None]
    pushed = np.zeros_like(memory)
    for items in table.in_parts(_ITEMS_AT_ONCE):
        table.scatter_add(pushed, items, table.gather(memory, items) @ matrix)
    return pushed


@cache
def _places(dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    rows, columns = np.tril_indices(dim)
    # Each entry off the diagonal stands for two equal ones.
    factors = np.where(rows == columns, 1, np.sqrt(2)).astype(np.float32)
    return rows, columns, factors


@dataclass(frozen=True)
class Samples:
    """What the scored items are.

    Attributes:
        valid: what a sample counts, 1 unless its items are weighed; 0 for padding and for negatives
            that are in the history; shape ``(m, k)``. Over the whole catalogue: what an item of the
            history counts, and 0 elsewhere.
        positives: how many of the ``k`` samples are positives; they come first, then as many
            negatives for each of them in turn. 0 over the whole catalogue.
        weights: logarithm of how many items each negative stands for, shape ``(m, k)``; None when
            each stands for itself. Of use to the sampled softmax alone.
    """

    valid: Tensor
    positives: int
    weights: Tensor | None = None


Graded = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of a recommender, and what it asks of those who use it.

    Attributes:
        grade: scores and samples to the summed loss, its gradient and curvature, see this module.
        damped: whether its curvature can grow along a step, so that a whole Newton step may
            overshoot. That of the others bounds the loss everywhere.
        whole_catalogue: whether it looks at every item where no budget of negatives is given.
        implicit: whether it has a part over all items that is never sampled, see this module.
    """

    grade: Callable[[Tensor, Samples], Graded]
    damped: bool = False
    whole_catalogue: bool = False
    implicit: bool = False


def bce(scores: Tensor, samples: Samples) -> Graded:
    """Binary cross-entropy: positives are ones, negatives zeros (He et al. 2017, equation 7).

    The curvature is that of the quadratic bound of Jaakkola & Jordan (2000).
    """
    p, valid = samples.positives, samples.valid
    half = torch.tanh(scores / 2)
    gradient = half / 2 + 0.5
    gradient[:, :p] -= 1
    value = softplus(scores)
    value[:, :p] -= scores[:, :p]
    curvature = torch.where(scores.abs() < 1e-3, 0.25, half / (2 * scores))
    return (value * valid).sum(1), gradient.mul_(valid), curvature.mul_(valid)


def bpr(scores: Tensor, samples: Samples) -> Graded:
    """Bayesian personalised ranking: each positive above its own negatives (Rendle et al. 2009)."""
    p, valid, m = samples.positives, samples.valid, len(scores)
    ahead = scores[:, :p, None] - scores[:, p:].reshape(m, p, -1)
    counts = valid[:, p:].reshape(m, p, -1)
    push = torch.sigmoid(-ahead).mul_(counts)
    gradient = torch.cat((-push.sum(2), push.reshape(m, -1)), dim=1)
    # (a - b)^2 <= 2 a^2 + 2 b^2, and the logistic curvature is at most 1/4.
    bound = counts / 2
    curvature = torch.cat((bound.sum(2), bound.reshape(m, -1)), dim=1)
    return -(logsigmoid(ahead) * counts).sum((1, 2)), gradient, curvature


def sampled_softmax(scores: Tensor, samples: Samples) -> Graded:
    """Softmax of each positive against all of the device's negatives at once.

    A negative that was drawn with probability ``q`` stands for ``1 / q`` items in the sum (Bengio &
    Senécal, "Adaptive importance sampling to accelerate training of a neural probabilistic
    language model", 2008: the logQ correction).
    """
    p, valid = samples.positives, samples.valid
    drawn = scores[:, p:]
    if samples.weights is not None:
        drawn = drawn + samples.weights[:, p:]
    negatives = drawn.masked_fill(valid[:, p:] == 0, -torch.inf)
    floor = torch.logsumexp(negatives, dim=1, keepdim=True).clamp_min(-1e4)
    behind = floor - scores[:, :p]
    pull = torch.sigmoid(behind).mul_(valid[:, :p])
    spread = torch.exp(negatives - floor) * pull.sum(1, keepdim=True)
    value = (softplus(behind) * valid[:, :p]).sum(1)
    curvature = torch.cat((valid[:, :p] - pull, spread), dim=1)
    return value, torch.cat((-pull, spread), dim=1), curvature


def full_softmax(scores: Tensor, samples: Samples) -> Graded:
    """Softmax over the whole catalogue, positives included: its gradient is a residual.

    Of a sample, positives stand for themselves and negatives for as many as their weights say, as
    in :func:`sampled_softmax`. What is predicted already has next to no gradient, so a clipped
    update has more room for the rest than under the sampled softmax, whose positives are not
    weighed against each other.
    """
    history = samples.valid
    if samples.weights is not None:
        scores = scores + samples.weights
    if samples.positives:
        left = torch.where(history > 0, 0.0, -1e4)  # a device without samples stays finite
        scores = scores + left
        history = history * (torch.arange(history.shape[1]) < samples.positives)
    count = history.sum(1, keepdim=True)
    logs = torch.log_softmax(scores, dim=1)
    expected = torch.exp(logs).mul_(count)
    return -(logs * history).sum(1), expected - history, expected


def ials(scores: Tensor, samples: Samples) -> Graded:
    """Squares of implicit ALS on the history; the part over all items goes by Gram matrices."""
    valid = samples.valid
    missing = 1 - scores
    return (missing.square() * valid).sum(1) / 2, -missing * valid, valid


BCE = Loss(bce)
BPR = Loss(bpr)
SOFTMAX = Loss(sampled_softmax, damped=True)
FULL_SOFTMAX = Loss(full_softmax, damped=True, whole_catalogue=True)
IALS = Loss(ials, implicit=True)


def loss_of(name: str) -> Loss:
    """Return the loss that a scenario calls so."""
    return cast(Loss, LOSSES[name].load())


def sampled_loss(
    hidden: Tensor, rows: Tensor, biases: Tensor, logs: Tensor, places: Tensor
) -> Tensor:
    """Mean cross-entropy of hidden vectors ``(p, dim)`` over ``k`` active neurons.

    Where each neuron stands for ``w`` words, the sum over words in the softmax is estimated without
    bias, as in :func:`sampled_softmax`; with all words active it is the full softmax.

    Args:
        rows: vectors of the active neurons, shape ``(k, dim)``, which have ``biases`` ``(k,)``.
        logs: logarithms of how many words each stands for, shape ``(k,)``; 0 for every target.
        places: where targets lie among the neurons: one for each row, shape ``(p,)``, or several,
            shape ``(p, labels)``, filled up by -1, of which the mean counts.
    """
    scores = torch.addmm(biases + logs, hidden, rows.T)
    if places.ndim == 1:
        return cross_entropy(scores, places)
    return softmax_loss(scores, places.clamp(min=0), places >= 0)


def softmax_loss(scores: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy of examples with several labels each, the mean over an example's labels.

    ``scores`` ``(b, A)`` are those of the active neurons, with the logarithms of how many each
    stands for; ``places`` ``(b, m)`` of the labels among them are no padding where ``real``.
    """
    total = torch.logsumexp(scores, dim=1)
    own = torch.where(real, scores.gather(1, places), 0.0).sum(1) / real.sum(1).clamp(min=1)
    return torch.where(real.any(1), total - own, 0.0).mean()
