"""What rows under lazy noise owe, how they drift meanwhile, and the draw that pays.

:class:`PendingNoise` is for plain steps: a row owes ``V_t - V_s``, the difference of two running
sums, so that step sizes, noise multipliers and clipping bounds may change from step to step.

:class:`PendingSteps` is for momentum and weight decay. The state ``x = (value, velocity)`` of a
coefficient follows ``x_k = A_k x_(k-1) + b_k (g_k + n_k)``. A row without gradients goes from step
``s`` to ``t`` by ``x_t = F x_s + noise``, where ``F`` is the product of the ``A_k`` and the noise
is Gaussian of a covariance ``Q``. Blocks ``(i 2^L, (i + 1) 2^L]`` of steps are composed once, and
any interval is made of at most ``2 log2(t)`` of them: exact for every schedule, and no inverse,
which momentum would make useless.

:class:`Normals` draws, in cache-sized blocks, float32 deviates by Box-Muller on 32-bit uniforms of
the keystream. A word below 2^8, one in 16 million, is continued by 64 further bits, so that the
tail reaches 11.5 deviations and is not cut where 32 bits end. Floating point has a caveat that
integers do not have: which floats a sum can take depends on what the noise was added to (Mironov,
"On significance of the least significant bits", 2012).
"""

from __future__ import annotations

import math
import os
import secrets
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.errors import ReleaseRefused, UsageError
from privrec.randomness import ROOT_BYTES, SecretRoot, SecureStream

Values: TypeAlias = NDArray[Any]
"""A table of float32 or float64, shape ``(rows, width)``."""
Variances: TypeAlias = NDArray[np.float64]
Steps: TypeAlias = NDArray[np.integer[Any]]
Matrices: TypeAlias = NDArray[np.float64]

_INFLATION = 1 + 1e-11
_FIRST = 1 << 10
_PAIRS = 1 << 16  # enough that the calls cost little, few enough for the cache
_RARE = 1 << 8
_SPARE = 1 << 35  # more than one draw takes; the next one opens another stream


@dataclass(frozen=True)
class LinearStep:
    """One step of stochastic gradient descent, as the linear map that it is.

    With ``g' = g + n + weight_decay p`` and ``v' = momentum v + g'``: ``p' = p - lr v'``, or
    ``p - lr (g' + momentum v')`` with Nesterov's momentum, as ``torch.optim.SGD`` has them. Without
    momentum ``p' = p - lr g'``, and ``v`` stays for a step that has it again. All but ``nesterov``
    are at least 0.
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
    def gain(self) -> NDArray[np.float64]:
        """``b``: what a unit of gradient does to value and velocity."""
        ahead = 1 + self.momentum if self.nesterov else 1.0
        return np.array([-self.lr * ahead, 1.0 if self.momentum else 0.0])

    @property
    def matrix(self) -> Matrices:
        """``A``: where value and velocity go by themselves, shape ``(2, 2)``."""
        ahead = self.momentum if self.nesterov else 1.0
        kept = np.array([[1.0, -self.lr * self.momentum * ahead], [0.0, self.momentum or 1.0]])
        return np.asarray(kept + np.outer(self.gain, [self.weight_decay, 0.0]))


class PendingNoise:
    """Running sums of variance, rounded up; stamps count steps since everything was settled."""

    def __init__(self) -> None:
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


class PendingSteps:
    """Composed blocks of steps, for momentum and weight decay."""

    def __init__(self) -> None:
        self._drift = np.zeros((2 * _FIRST, 2, 2))
        self._noise = np.zeros((2 * _FIRST, 2, 2))
        self.steps = 0

    def append(self, update: LinearStep, variance: float) -> None:
        """Enter a step; ``variance`` is that of the noise in the gradient."""
        step, self.steps = self.steps, self.steps + 1
        self._drift = _grown(self._drift, 2 * self.steps)
        self._noise = _grown(self._noise, 2 * self.steps)
        place, gain = _place(0, step), update.gain
        self._drift[place] = update.matrix
        self._noise[place] = variance * np.outer(gain, gain)
        level = 0
        while self.steps % (2 << level) == 0:
            # Blocks (i, level) and (i + 1, level) have just become complete together.
            second = (self.steps >> level) - 1
            one, two = _place(level, second - 1), _place(level, second)
            level += 1
            both, F = _place(level, second // 2), self._drift[two]
            self._drift[both] = F @ self._drift[one]
            self._noise[both] = F @ self._noise[one] @ F.T + self._noise[two]

    def since(self, stamps: Steps) -> tuple[Matrices, Matrices]:
        """``F`` and ``Q`` of rows from their stamps until now, shape ``(n, 2, 2)``."""
        distinct, inverse = np.unique(stamps, return_inverse=True)
        at = distinct.astype(np.int64)
        drift = np.broadcast_to(np.eye(2), (len(at), 2, 2)).copy()
        noise = np.zeros((len(at), 2, 2))
        while len(moving := np.flatnonzero(at < self.steps)):
            here = at[moving]
            # The largest block that starts here and ends by now.
            aligned = np.where(here == 0, np.int64(1) << 62, here & -here)
            fits = np.minimum(aligned, self.steps - here).astype(np.float64)
            level = (np.frexp(fits)[1] - 1).astype(np.int64)
            place = (here >> level << (level + 1)) + (1 << level) - 1
            F = self._drift[place]
            drift[moving] = F @ drift[moving]
            noise[moving] = F @ noise[moving] @ F.transpose(0, 2, 1) + self._noise[place]
            at[moving] += 1 << level
        return drift[inverse], noise[inverse]


def factor(noise: Matrices) -> tuple[Variances, Variances, Variances]:
    """Cholesky's factor of ``Q``, slightly larger: ``l11, l21, l22``, each of shape ``(n,)``."""
    a, b, d = noise[:, 0, 0], noise[:, 1, 0], noise[:, 1, 1]
    # A step size of 0 leaves the value alone while the velocity takes the noise.
    first = np.sqrt(a * _INFLATION)
    cross = np.divide(b, first, out=np.zeros_like(b), where=first > 0)
    return first, cross, np.sqrt(np.maximum(0.0, d * _INFLATION - cross**2))


def _place(level: int, index: int) -> int:
    """Place of a block among all blocks in order, so that levels share one growing array."""
    return (index << (level + 1)) + (1 << level) - 1


def _grown(array: NDArray[np.float64], needed: int) -> NDArray[np.float64]:
    if needed <= len(array):
        return array
    larger = np.zeros((2 * needed, *array.shape[1:]))
    larger[: len(array)] = array
    return larger


class Normals:
    """Normal deviates in float32, added to rows of a float table.

    Promise: the same root, by default the operating system's, gives the same noise for the same
    sequence of shapes, another independent noise, and no byte of the keystream is used twice.
    """

    def __init__(self, root: SecretRoot | None = None) -> None:
        self._root = root or SecretRoot(secrets.token_bytes(ROOT_BYTES))
        self._process = os.getpid()
        self._streams = 0
        self._stream: SecureStream | None = None
        self._make_buffers(_PAIRS)

    def add(self, out: Values, variances: Variances) -> None:
        """Add ``N(0, variances[i] I)`` to row ``i`` of ``out``, independent of all other draws.

        Variances are rounded up to float32. ReleaseRefused after a fork, which would repeat draws.
        """
        stream = self._open()
        step = max(1, _PAIRS // -(-out.shape[1] // 2))
        table = torch.from_numpy(out)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            self._add_block(stream, table[part], rounded_up(variances[part]))

    def _open(self) -> SecureStream:
        if os.getpid() != self._process:
            raise ReleaseRefused(
                f"lazy noise of process {self._process} was asked for after a fork, in process "
                f"{os.getpid()}: both would draw the same; make the optimiser after the fork"
            )
        if self._stream is None or self._stream.left <= _SPARE:
            self._streams += 1
            self._stream = self._root.stream("lazy noise", self._streams)
        return self._stream

    def _make_buffers(self, pairs: int) -> None:
        self._turn = torch.empty(pairs)
        self._bytes = np.empty(8 * pairs + 16, np.uint8)

    def _add_block(self, stream: SecureStream, out: Tensor, variances: NDArray[np.float32]) -> None:
        rows, width = out.shape
        half = -(-width // 2)
        pairs = rows * half
        if pairs > len(self._turn):  # one very wide row
            self._make_buffers(pairs)
        words = stream.uint32(2 * pairs, self._bytes)
        angle = torch.from_numpy(words[pairs:].view(np.float32)).view(rows, half)
        radius = _log_uniform(words[:pairs], stream).view(rows, half)
        radius.mul_(torch.from_numpy(variances).mul_(-2.0)[:, None]).sqrt_()
        angle.copy_(torch.from_numpy(words[pairs:].view(np.int32)).view(rows, half))
        angle.mul_(math.pi * 2.0**-31)
        turn = torch.cos(angle, out=self._turn[:pairs].view(rows, half))
        out[:, :half].addcmul_(radius, turn)
        rest = width - half
        out[:, half:].addcmul_(radius[:, :rest], angle.sin_()[:, :rest])


def rounded_up(variances: Variances) -> NDArray[np.float32]:
    """Variances in float32, never below what they were."""
    short = variances.astype(np.float32)
    step_up(short, short < variances)
    return short


def step_up(values: Values, where: NDArray[np.bool_]) -> None:
    """Put the next larger float in the place of some floats of at least 0."""
    bits = values.view(f"i{values.itemsize}")  # ordered as such floats are
    bits += where


def _log_uniform(words: NDArray[np.uint32], stream: SecureStream) -> Tensor:
    """``ln u`` of the uniform ``u`` that each word stands for, from -67 to 0, in their place."""
    rare = np.flatnonzero(words < _RARE) if words.min() < _RARE else None
    if rare is not None:  # words that 32 bits are too few for get 96
        rest = (stream.uint64(len(rare)) + 0.5) * 2.0**-64
        uniforms = torch.from_numpy(((words[rare] + rest) * 2.0**-32).astype(np.float32))
    # Floats take the places of words one by one: half the room, so that it all stays in the cache.
    out = torch.from_numpy(words.view(np.float32))
    out.copy_(torch.from_numpy(words)).mul_(2.0**-32)
    if rare is not None:
        out[rare] = uniforms
    return out.log_()
