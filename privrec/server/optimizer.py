"""How the server turns the mean update of a round into new weights.

All of it is post-processing of what was released, so none of it costs privacy.
Source: Reddi et al., "Adaptive Federated Optimization" (ICLR 2021); decoupled decay after
Loshchilov & Hutter (ICLR 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Schedule:
    """The course of the server's step size over the run.

    Args:
        kind: ``"constant"``; ``"cosine"`` or ``"linear"``, which end at zero; or ``"inverse"``,
            one over the rounds so far, for which averages converge to the optimum of a strongly
            convex problem (Li et al., "On the Convergence of FedAvg on Non-IID Data", ICLR 2020).
        rounds: length of the run.
        warmup_rounds: rounds in which the step size rises linearly from zero.
    """

    kind: str
    rounds: int
    warmup_rounds: int

    def factor(self, index: int) -> float:
        """Factor of the step size in round ``index``, counted from 0."""
        if index < self.warmup_rounds:
            return (index + 1) / (self.warmup_rounds + 1)
        if self.kind == "inverse":
            return (self.warmup_rounds + 1) / (index + 1)
        span = max(1, self.rounds - self.warmup_rounds)
        progress = (index - self.warmup_rounds) / span
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        return 1 - progress if self.kind == "linear" else 1.0


@dataclass
class Optimizer:
    """FedAvg, momentum SGD or FedAdam on the weights, in place.

    Args:
        kind: ``"fedavg"``, ``"sgd"`` or ``"fedadam"``; ``"newton"`` is an average of what devices
            have preconditioned already.
        rate: step size before the schedule.
        schedule: its course.
        momentum: of ``"sgd"``.
        betas: decays of FedAdam's two moments.
        eps: added to the root of FedAdam's second moment.
        weight_decay: the weights shrink by ``rate * weight_decay`` a round.
        moments: the optimiser's memory, named arrays of the weights' shape.
    """

    kind: str
    rate: float
    schedule: Schedule
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    moments: dict[str, FloatArray] = field(default_factory=dict)

    def step(self, weights: FloatArray, update: FloatArray, index: int) -> None:
        """Move ``weights`` along ``update`` (the mean change that the cohort asks for).

        Args:
            weights: float32 vector, changed in place.
            update: float32 vector of the same length.
            index: the round, counted from 0.
        """
        rate = self.rate * self.schedule.factor(index)
        weights *= np.float32(1 - rate * self.weight_decay)
        if self.kind == "fedadam":
            weights += np.float32(rate) * self._adam(update, index)
        elif self.kind == "sgd":
            weights += np.float32(rate) * self._heavy_ball(update)
        else:
            weights += np.float32(rate) * update

    def _heavy_ball(self, update: FloatArray) -> FloatArray:
        velocity = self._moment("velocity", update)
        velocity *= np.float32(self.momentum)
        velocity += update
        return velocity

    def _adam(self, update: FloatArray, index: int) -> FloatArray:
        beta1, beta2 = self.betas
        first, second = self._moment("first", update), self._moment("second", update)
        first += np.float32(1 - beta1) * (update - first)
        second += np.float32(1 - beta2) * (update * update - second)
        unbiased = first / np.float32(1 - beta1 ** (index + 1))
        root = np.sqrt(second / np.float32(1 - beta2 ** (index + 1)))
        ratio: FloatArray = unbiased / (root + np.float32(self.eps))
        return ratio

    def _moment(self, name: str, like: FloatArray) -> FloatArray:
        return self.moments.setdefault(name, np.zeros_like(like))
