"""How the server turns the mean update of a round into new weights, and how its step size moves.

All of it is post-processing of what was released, so none of it costs privacy.
Source: Reddi et al., "Adaptive Federated Optimization" (ICLR 2021); decoupled decay after
Loshchilov & Hutter (ICLR 2019).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda done, left, warmup: 1.0,
    "cosine": lambda done, left, warmup: (1 + math.cos(math.pi * (done / left))) / 2,
    "linear": lambda done, left, warmup: 1 - done / left,
    # Averages then converge to the optimum of a strongly convex problem (Li et al., "On the
    # Convergence of FedAvg on Non-IID Data", ICLR 2020).
    "inverse": lambda done, left, warmup: (warmup + 1) / (warmup + done + 1),
}
"""Factor of the step size by rounds done since the warm-up, rounds after it, and its length."""


@dataclass(frozen=True)
class Schedule:
    """The course of the server's step size over the run, by one of :data:`SCHEDULES`.

    ``"cosine"`` and ``"linear"`` end at zero; in a warm-up the step size rises linearly from zero.
    """

    kind: str
    rounds: int
    warmup_rounds: int

    def factor(self, index: int) -> float:
        """Return the factor of the step size in round ``index``, counted from 0."""
        if index < self.warmup_rounds:
            return (index + 1) / (self.warmup_rounds + 1)
        left = max(1, self.rounds - self.warmup_rounds)
        return SCHEDULES[self.kind](index - self.warmup_rounds, left, self.warmup_rounds)


@dataclass
class Optimizer(ABC):
    """Moves the weights, in place, by what a kind of optimiser makes of an update.

    They shrink by ``rate * weight_decay`` a round, the rate as scheduled. ``moments`` are the
    optimiser's memory, named arrays of the weights' shape.
    """

    rate: float
    schedule: Schedule
    weight_decay: float = 0.0
    moments: dict[str, FloatArray] = field(default_factory=dict, kw_only=True)

    def step(self, weights: FloatArray, update: FloatArray, index: int) -> None:
        """Move ``weights``, in place, along the mean change that round ``index`` asks for."""
        rate = self.rate * self.schedule.factor(index)
        weights *= np.float32(1 - rate * self.weight_decay)
        weights += np.float32(rate) * self.direction(update, index)

    @abstractmethod
    def direction(self, update: FloatArray, index: int) -> FloatArray:
        """Return the direction of the step; the optimiser's memory moves on."""

    def moment(self, name: str, like: FloatArray) -> FloatArray:
        """Return the memory of that name, zeros at first."""
        return self.moments.setdefault(name, np.zeros_like(like))


class FedAvg(Optimizer):
    """The update as it is: an average of the devices' changes."""

    def direction(self, update: FloatArray, index: int) -> FloatArray:
        """See :meth:`Optimizer.direction`."""
        return update


@dataclass
class Sgd(Optimizer):
    """Stochastic gradient descent with Polyak's momentum."""

    momentum: float = 0.9

    def direction(self, update: FloatArray, index: int) -> FloatArray:
        """See :meth:`Optimizer.direction`."""
        velocity = self.moment("velocity", update)
        velocity *= np.float32(self.momentum)
        velocity += update
        return velocity


@dataclass
class FedAdam(Optimizer):
    """Adam with both moments corrected for their start; ``adam_eps`` joins the second's root."""

    beta1: float = 0.9
    beta2: float = 0.99
    adam_eps: float = 1e-8

    def direction(self, update: FloatArray, index: int) -> FloatArray:
        """See :meth:`Optimizer.direction`."""
        first, second = self.moment("first", update), self.moment("second", update)
        first += np.float32(1 - self.beta1) * (update - first)
        second += np.float32(1 - self.beta2) * (update * update - second)
        unbiased = first / np.float32(1 - self.beta1 ** (index + 1))
        root = np.sqrt(second / np.float32(1 - self.beta2 ** (index + 1)))
        return np.asarray(unbiased / (root + np.float32(self.adam_eps)))
