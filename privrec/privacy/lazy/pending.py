"""What rows owe: the variance of the steps since each was settled, and how a row drifts meanwhile.

:class:`PendingNoise` is for plain steps: a row owes ``V_t - V_s``, the difference of two running
sums, so that step sizes, noise multipliers and clipping bounds may change from step to step.

:class:`PendingSteps` is for momentum and weight decay. The state ``x = (value, velocity)`` of a
coefficient follows ``x_k = A_k x_(k-1) + b_k (g_k + n_k)``. A row without gradients goes from step
``s`` to ``t`` by ``x_t = F x_s + noise``, where ``F`` is the product of the ``A_k`` and the noise
is Gaussian of a covariance ``Q``. Blocks ``(i 2^L, (i + 1) 2^L]`` of steps are composed once, and
any interval is put together from at most ``2 log2(t)`` of them: exact for every schedule, and no
inverse, which momentum would make useless.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.privacy.lazy.stream import Variances, step_up

Steps = NDArray[np.integer[Any]]
Matrices = NDArray[np.float64]

_INFLATION = 1 + 1e-11
_FIRST = 1 << 10


@dataclass(frozen=True)
class LinearStep:
    """One step of stochastic gradient descent, as the linear map that it is.

    With ``g' = g + n + weight_decay p`` and ``v' = momentum v + g'``: ``p' = p - lr v'``, or
    ``p - lr (g' + momentum v')`` with Nesterov's momentum, as ``torch.optim.SGD`` has them. Without
    momentum ``p' = p - lr g'``, and ``v`` stays for a step that has it again.

    Args:
        lr: step size, at least 0.
        momentum: at least 0.
        weight_decay: at least 0.
        nesterov: whether the step looks ahead.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} = {value}: it must be a finite number of at least 0")

    @property
    def is_plain(self) -> bool:
        """Whether a row without gradient and noise stays where it is."""
        return not (self.momentum or self.weight_decay)

    @property
    def gain(self) -> NDArray[np.float64]:
        """``b``: what a unit of gradient does to value and velocity."""
        ahead = 1 + self.momentum if self.nesterov else 1.0
        return np.array([-self.lr * ahead, 1.0 if self.momentum else 0.0])

    @property
    def matrix(self) -> Matrices:
        """``A``: where value and velocity go by themselves, shape ``(2, 2)``."""
        kept = np.array([[1.0, 0.0], [0.0, self.momentum or 1.0]])
        decay = np.outer(self.gain, [self.weight_decay, 0.0])
        ahead = self.momentum if self.nesterov else 1.0
        kept[0, 1] = -self.lr * self.momentum * ahead
        return np.asarray(kept + decay)


class PendingNoise:
    """Running sums of variance, rounded up; stamps count steps since everything was settled."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all steps: nothing is owed."""
        self._sums = np.zeros(_FIRST)
        self.steps = 0

    def append(self, variance: float) -> None:
        """Enter a step of this variance."""
        total, variance = float(self._sums[self.steps]), float(variance)
        after = total + variance
        added = after - total
        if (total - (after - added)) + (variance - added) > 0:  # what rounding lost (Knuth)
            after = math.nextafter(after, math.inf)
        self._sums = _grown(self._sums, self.steps + 2)
        self.steps += 1
        self._sums[self.steps] = after

    def since(self, stamps: Steps) -> Variances:
        """Variance owed from each stamp until now, never below the sum of its steps."""
        owed: Variances = np.subtract(self._sums[self.steps], self._sums.take(stamps))
        step_up(owed, owed > 0)
        return owed


@dataclass(frozen=True)
class Interval:
    """How rows get from their stamps to now.

    Args:
        drift: ``F``, shape ``(n, 2, 2)``.
        noise: ``Q``, shape ``(n, 2, 2)``.
    """

    drift: Matrices
    noise: Matrices

    def factor(self) -> tuple[NDArray[np.float64], ...]:
        """Cholesky's factor of ``Q``: ``l11, l21, l22``, each of shape ``(n,)``."""
        a, b, d = self.noise[:, 0, 0], self.noise[:, 1, 0], self.noise[:, 1, 1]
        # A step size of 0 leaves the value alone while the velocity takes the noise.
        first = np.sqrt(a * _INFLATION)
        cross = np.divide(b, first, out=np.zeros_like(b), where=first > 0)
        rest = np.sqrt(np.maximum(0.0, d * _INFLATION - cross**2))
        return first, cross, rest


class PendingSteps:
    """Composed blocks of steps, for momentum and weight decay."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all steps: nothing is owed, and nothing moves."""
        self._drift = np.zeros((2 * _FIRST, 2, 2))
        self._noise = np.zeros((2 * _FIRST, 2, 2))
        self.steps = 0

    def append(self, update: LinearStep, variance: float) -> None:
        """Enter a step; ``variance`` is that of the noise in the gradient."""
        step, self.steps = self.steps, self.steps + 1
        self._drift = _grown(self._drift, 2 * self.steps)
        self._noise = _grown(self._noise, 2 * self.steps)
        gain = update.gain
        self._put(_place(0, step), update.matrix, variance * np.outer(gain, gain))
        level = 0
        while self.steps % (2 << level) == 0:
            # Blocks (i, level) and (i + 1, level) have just become complete together.
            second = (self.steps >> level) - 1
            one, two = _place(level, second - 1), _place(level, second)
            level += 1
            self._put(_place(level, second // 2), *self._then(one, two))

    def since(self, drift_from: Steps, noise_from: Steps) -> Interval:
        """From stamps until now; drift and noise may start at stamps of their own."""
        drift, _ = self._between(drift_from)
        _, noise = self._between(noise_from)
        return Interval(drift, noise)

    def _between(self, stamps: Steps) -> tuple[Matrices, Matrices]:
        distinct, inverse = np.unique(stamps, return_inverse=True)
        at = distinct.astype(np.int64)
        drift = np.broadcast_to(np.eye(2), (len(at), 2, 2)).copy()
        noise = np.zeros((len(at), 2, 2))
        while len(moving := np.flatnonzero(at < self.steps)):
            here = at[moving]
            level = _level(here, self.steps - here)
            place = (here >> level << (level + 1)) + (1 << level) - 1
            F = self._drift[place]
            drift[moving] = F @ drift[moving]
            noise[moving] = F @ noise[moving] @ F.transpose(0, 2, 1) + self._noise[place]
            at[moving] += 1 << level
        return drift[inverse], noise[inverse]

    def _then(self, one: int, two: int) -> tuple[Matrices, Matrices]:
        F = self._drift[two]
        return F @ self._drift[one], F @ self._noise[one] @ F.T + self._noise[two]

    def _put(self, place: int, drift: Matrices, noise: Matrices) -> None:
        self._drift[place], self._noise[place] = drift, noise


def _place(level: int, index: int) -> int:
    """Place of a block among all blocks in order, so that levels share one growing array."""
    return (index << (level + 1)) + (1 << level) - 1


def _level(at: Steps, left: Steps) -> Steps:
    """The largest block that starts at ``at`` and ends within ``left`` steps."""
    aligned = np.where(at == 0, np.int64(1) << 62, at & -at)
    fits = np.minimum(aligned, left)
    return (np.frexp(fits.astype(np.float64))[1] - 1).astype(np.int64)


def _grown(array: NDArray[np.float64], needed: int) -> NDArray[np.float64]:
    if needed <= len(array):
        return array
    larger = np.zeros((2 * needed, *array.shape[1:]))
    larger[: len(array)] = array
    return larger
