"""Losses of implicit feedback, with what a device needs to descend them.

Each takes scores of shape ``(m, k)`` and the samples behind them, and gives three things a device:
the summed loss ``(m,)``, its gradient on the scores ``(m, k)``, and a curvature ``(m, k)`` whose
diagonal is never below the Hessian at those scores, for the Newton steps of a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


@dataclass(frozen=True)
class Samples:
    """What the scored items are.

    Args:
        valid: 1 where a sample counts, 0 for padding and for negatives that are in the history;
            shape ``(m, k)``. Over the whole catalogue: 1 where the item is in the history.
        positives: how many of the ``k`` samples are positives; they come first, then as many
            negatives for each of them in turn. 0 over the whole catalogue.
        weights: logarithm of how many items each negative stands for, shape ``(m, k)``; None when
            each stands for itself. The sampled softmax alone looks at them.
    """

    valid: Tensor
    positives: int
    weights: Tensor | None = None


Graded = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Samples], Graded]


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
    counts = valid[:, p:].reshape(m, p, -1) * valid[:, :p, None]
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
    """Softmax over the whole catalogue: nothing is sampled, so nothing is lost to sampling."""
    history = samples.valid
    count = history.sum(1, keepdim=True)
    logs = torch.log_softmax(scores, dim=1)
    expected = torch.exp(logs).mul_(count)
    return -(logs * history).sum(1), expected - history, expected


def ials(scores: Tensor, samples: Samples) -> Graded:
    """Squares of implicit ALS on the history: the part that :mod:`.implicit` does not carry."""
    valid = samples.valid
    missing = (1 - scores) * valid
    return missing.square().sum(1) / 2, -missing, valid


LOSSES: dict[str, Loss] = {
    "bce": bce,
    "bpr": bpr,
    "softmax": sampled_softmax,
    "full_softmax": full_softmax,
    "ials": ials,
}

DAMPED = frozenset({"softmax", "full_softmax"})
"""Losses whose curvature can grow along a step, so that a whole Newton step may overshoot. That of
the others bounds the loss everywhere."""

WHOLE_CATALOGUE = frozenset({"full_softmax"})
"""Losses that look at every item instead of sampled ones."""

IMPLICIT = frozenset({"ials"})
"""Losses with a part over all items that is never sampled (:mod:`privrec.models.implicit`)."""
