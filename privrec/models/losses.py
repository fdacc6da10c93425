"""Losses of implicit feedback over one device's positives and sampled negatives.

Each takes scores of shape ``(m, p + p * r)``: ``p`` positives, then ``r`` negatives for each in
turn; ``valid`` is 1 where a sample counts and 0 where it is padding or a negative that turned out
to be in the history. Each gives the summed loss of each device and its gradient on the scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

Loss = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def bce(scores: Tensor, valid: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy: positives are ones, negatives zeros (He et al. 2017, equation 7)."""
    gradient = torch.sigmoid(scores)
    gradient[:, :positives] -= 1
    value = softplus(scores)
    value[:, :positives] -= scores[:, :positives]
    return (value * valid).sum(1), gradient.mul_(valid)


def bpr(scores: Tensor, valid: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """Bayesian personalised ranking: each positive above its own negatives (Rendle et al. 2009)."""
    m = len(scores)
    pair = (m, positives, -1)
    ahead = scores[:, :positives, None] - scores[:, positives:].reshape(pair)
    counts = valid[:, positives:].reshape(pair) * valid[:, :positives, None]
    push = torch.sigmoid(-ahead).mul_(counts)
    gradient = torch.cat((-push.sum(2), push.reshape(m, -1)), dim=1)
    return -(logsigmoid(ahead) * counts).sum((1, 2)), gradient


def softmax(scores: Tensor, valid: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """Sampled softmax: each positive against all of the device's negatives at once."""
    negatives = scores[:, positives:].masked_fill(valid[:, positives:] == 0, -torch.inf)
    floor = torch.logsumexp(negatives, dim=1, keepdim=True).clamp_min(-1e4)
    behind = floor - scores[:, :positives]
    pull = torch.sigmoid(behind).mul_(valid[:, :positives])
    spread = torch.exp(negatives - floor) * pull.sum(1, keepdim=True)
    value = (softplus(behind) * valid[:, :positives]).sum(1)
    return value, torch.cat((-pull, spread), dim=1)


LOSSES: dict[str, Loss] = {"bce": bce, "bpr": bpr, "softmax": softmax}
