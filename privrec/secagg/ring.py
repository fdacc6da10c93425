"""From clipped floats to integers that can be summed exactly, with a checked bound on their norm.

Integers make the sum independent of its order and let noise be exact. Rounding is stochastic, hence
unbiased, and conditional: it is drawn again until the rounded vector is provably short, so that
the sensitivity of the integer sum is hardly larger than that of the clipped one.
Source: Kairouz, Liu & Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation" (ICML 2021), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError

RING_BITS = 32
_COINS = np.float32(1 / 65536)
_TRIES = 64


class Coins(Protocol):
    """A source of uniform 16-bit words; a :class:`~privrec.randomness.SecureStream` is one."""

    def uint16(self, size: int) -> NDArray[np.uint16]: ...


@dataclass(frozen=True)
class Encoding:
    """Fixed-point integers of vectors whose L2 norm is at most ``clip_norm``.

    Promise: every vector that :meth:`encode` returns has an integer L2 norm of at most
    :attr:`bound`, checked in exact arithmetic, whatever was put in. So ``bound`` is the sensitivity
    of the integer sum when one device's vector is replaced by zeros.

    Args:
        clip_norm: largest L2 norm of an input vector, above 0.
        dimension: public number of coefficients of the whole vector, at least 1; never a device's
            own count of non-zeros, which would be private.
        scale_bits: the grid has ``2^scale_bits`` steps to the clip norm, 1 to 20.
    """

    clip_norm: float
    dimension: int
    scale_bits: int = 13

    @property
    def scale(self) -> float:
        """Integer steps in a unit of the input."""
        return float(2**self.scale_bits / self.clip_norm)

    @property
    def squared_bound(self) -> int:
        """Largest squared norm of an encoded vector, an integer.

        The smaller of the certain bound and the one that an unconditional rounding meets with
        probability at least ``1 - exp(-1/2)``, so that a few draws are enough.
        """
        radius, k = float(2**self.scale_bits), float(self.dimension)
        certain = (radius + math.sqrt(k)) ** 2
        likely = radius**2 + k / 4 + (radius + math.sqrt(k) / 2)
        return math.floor(min(certain, likely))

    @property
    def bound(self) -> float:
        """L2 sensitivity of the integer sum, the root of :attr:`squared_bound`."""
        return math.sqrt(self.squared_bound)

    def check_capacity(self, devices: int) -> None:
        """Refuse a cohort whose sum could wrap around in the ring of ``2^32``.

        Raises:
            UsageError: when ``devices`` vectors of the largest norm could exceed the ring.
        """
        most = 2 ** (RING_BITS - 1) // math.ceil(self.bound)
        if devices > most:
            raise UsageError(
                f"a cohort of {devices} devices: at most {most} fit the 2^{RING_BITS} ring at "
                f"privacy.scale_bits = {self.scale_bits}; lower scale_bits or the sampling rate"
            )

    def encode(self, values: NDArray[np.float32], coins: Coins) -> NDArray[np.int32]:
        """Round each row to integers, unbiased but for the condition on its norm.

        Args:
            values: float32 of shape ``(m, k)``; each row has an L2 norm of at most ``clip_norm``.
            coins: the secure stream that decides the rounding.

        Returns:
            int32 of shape ``(m, k)``; zeros stay zeros.

        Raises:
            ReleaseRefused: when a row keeps exceeding the bound, so it was never clipped.
        """
        rounded = self._round(values, coins)
        pending = self._too_long(rounded)
        for _ in range(_TRIES):
            if not len(pending):
                return rounded.astype(np.int32)
            rounded[pending] = self._round(values[pending], coins)
            pending = pending[self._too_long(rounded[pending])]
        raise ReleaseRefused(
            f"{len(pending)} updates exceed the integer bound {self.bound:.1f} after {_TRIES} "
            f"roundings: their norm is above clip_norm = {self.clip_norm}; clip before encoding"
        )

    def decode(self, integers: NDArray[np.int64]) -> NDArray[np.float64]:
        """The sum in units of the input."""
        return integers / self.scale

    def _round(self, values: NDArray[np.float32], coins: Coins) -> NDArray[np.float32]:
        rounded = coins.uint16(values.size).reshape(values.shape).astype(np.float32)
        rounded *= _COINS
        rounded += values * np.float32(self.scale)
        return np.floor(rounded, out=rounded)

    def _too_long(self, integers: NDArray[np.float32]) -> NDArray[np.intp]:
        # A float32 sum is off by less than its number of terms times 2^-24, so it can clear a row.
        rough = (integers[:, None] @ integers[:, :, None])[:, 0, 0].astype(np.float64)
        doubtful = np.flatnonzero(
            ~(rough * (1 + integers.shape[1] * 2.0**-23) <= self.squared_bound)
        )
        # float64 sums of squared integers of this size are exact (below 2^53).
        wide = integers[doubtful].astype(np.float64)
        long = ~(np.einsum("ij,ij->i", wide, wide) <= self.squared_bound)
        return doubtful[np.asarray(long, np.bool_)]
