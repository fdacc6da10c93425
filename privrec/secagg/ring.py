"""From clipped floats to integers that can be summed exactly, with a checked bound on their norm.

Integers make the sum independent of its order and let noise be exact. Rounding is stochastic, hence
unbiased, and conditional: it is drawn again until the rounded vector is provably short, so that
the sensitivity of the integer sum is hardly larger than that of the clipped one.

Wrapping around in the ring costs no privacy, since it is done to what is released already, but it
spoils the sum: how likely it is in the worst case, with all updates the same, is bounded before a
round starts. In the ring of ``2^16`` a public random :class:`Rotation` makes it unlikely.
Source: Kairouz, Liu & Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation" (ICML 2021), section 4.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.errors import ReleaseRefused, UsageError
from privrec.randomness import SecureStream

RING_BITS = 32
LARGEST_WRAP = 1e-9
"""Largest probability with which a sum may wrap around anywhere in a band, in a round."""
_COINS = np.float32(1 / 65536)
_TRIES = 64
_NUMBERS_AT_ONCE = 1 << 16  # so that they stay in a cache


class Coins(Protocol):
    """A source of uniform 16-bit words; a :class:`~privrec.randomness.SecureStream` is one."""

    def uint16(self, size: int) -> NDArray[np.uint16]: ...


@dataclass(frozen=True)
class Encoding:
    """Fixed-point integers of vectors whose L2 norm is at most ``clip_norm``.

    Promise: every vector that :meth:`encode` returns has an integer L2 norm of at most
    :attr:`bound`, checked in exact arithmetic, whatever was put in. So ``bound`` is the sensitivity
    of the integer sum when one device's vector is replaced by zeros.

    Attributes:
        dimension: public number of coefficients of the whole vector; never a device's own count of
            non-zeros, which would be private.
        scale_bits: the grid has ``2^scale_bits`` steps to the clip norm, 1 to 20; not
            necessarily a whole number.
    """

    clip_norm: float
    dimension: int
    scale_bits: float = 13

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

    def encode(self, values: NDArray[np.float32], coins: Coins) -> NDArray[np.int32]:
        """Round each row to integers, unbiased but for the condition on its norm; zeros stay zeros.

        ``values`` has shape ``(m, k)``. ReleaseRefused is raised for a row that keeps exceeding the
        bound: it was never clipped.
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

    def decode(self, integers: NDArray[np.int64], cohort: float = 1.0) -> NDArray[np.float64]:
        """The sum in units of the input, or the mean over an expected cohort."""
        decoded: NDArray[np.float64] = integers * np.float64(1 / (self.scale * cohort))
        return decoded

    def _round(self, values: NDArray[np.float32], coins: Coins) -> NDArray[np.float32]:
        rounded = coins.uint16(values.size).reshape(values.shape).astype(np.float32)
        rounded *= _COINS
        rounded += values * np.float32(self.scale)
        return np.floor(rounded, out=rounded)

    def _too_long(self, integers: NDArray[np.float32]) -> NDArray[np.intp]:
        # float64 sums of squared integers of this size are exact (below 2^53), in any order.
        return np.flatnonzero(~(squared_norms(integers) <= self.squared_bound))


def squared_norms(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared L2 norm of each row, summed in double precision, a part of the rows at a time."""
    norms, step = np.empty(len(values)), max(1, _NUMBERS_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        wide = values[start : start + step].astype(np.float64)
        norms[start : start + step] = (wide[:, None] @ wide[:, :, None])[:, 0, 0]
    return norms


@dataclass(frozen=True)
class Load:
    """What a band of ``size`` coefficients puts into the ring at most.

    Attributes:
        devices: most devices that add to it.
        noise: variance of all their noise together over the squared sensitivity
            (``Encoding.squared_bound``); with shares, ``devices / m`` times the squared noise
            multiplier; 0 when noise is added elsewhere.
        spread: over how many coefficients a rotation spreads each (:func:`spread`); 1 without one.
    """

    size: int
    devices: int
    noise: float
    spread: int = 1


@dataclass(frozen=True)
class Ring:
    """Integers modulo ``2^bits``.

    Promise: ``leave(enter(a) + enter(b))`` is ``a + b`` wherever that lies in
    ``[-2^(bits-1), 2^(bits-1))``, and elsewhere differs from it by a multiple of ``2^bits``.
    16 bits are for half the upload and small cohorts.
    """

    bits: Literal[16, 32] = 32

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element: unsigned, so that sums wrap around."""
        return np.dtype(f"uint{self.bits}")

    @property
    def half(self) -> int:
        """The first positive integer that wraps around."""
        return 1 << (self.bits - 1)

    def enter(self, integers: NDArray[np.signedinteger]) -> NDArray[np.unsignedinteger]:
        """Integers as elements of the ring, the same shape."""
        return integers.astype(self.dtype)

    def leave(self, elements: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
        """The integers nearest to zero that elements stand for, int64 of the same shape."""
        return elements.astype(self.dtype, copy=False).view(f"int{self.bits}").astype(np.int64)

    def wrap_probability(self, encoding: Encoding, load: Load) -> float:
        """Probability that the sum of a band wraps around anywhere, from above.

        All updates may be the same and as long as they can be. Without rotation a coefficient of
        their sum is at most ``n B``. With it, it is sub-Gaussian of variance ``(n s C)² / D`` for
        rotated vectors, to which rounding adds at most 1 a device; either bound may be the better
        one. The noise is independent and sub-Gaussian of its own variance.
        """
        noise = load.noise * encoding.squared_bound
        certain = self.half - 1 - load.devices * math.ceil(encoding.bound)
        rotated = self.half - 1 - _STEP * load.devices
        signal = (load.devices * _LENGTH * 2.0**encoding.scale_bits) ** 2 / load.spread
        bounds = [_beyond(certain, noise)]
        if load.spread > 1:
            bounds.append(_beyond(rotated, signal + noise))
        return min(1.0, 2 * load.size * min(bounds))

    def check(self, encoding: Encoding, load: Load) -> None:
        """Refuse a round whose :meth:`wrap_probability` exceeds :data:`LARGEST_WRAP`."""
        found = self.wrap_probability(encoding, load)
        if found <= LARGEST_WRAP:
            return
        fitting = self.fitting_scale_bits(encoding, load)
        remedy = f"lower privacy.scale_bits to {fitting:g}" if fitting else "take fewer devices"
        raise UsageError(
            f"the sum of {load.devices} devices in a band of {load.size} coefficients could wrap "
            f"around in the 2^{self.bits} ring (probability {found:.1e}, at most {LARGEST_WRAP:g} "
            f"is allowed) at privacy.scale_bits = {encoding.scale_bits}; {remedy}"
            + (", or use the ring of 2^32" if self.bits < RING_BITS else "")
        )

    def fitting_scale_bits(self, encoding: Encoding, load: Load) -> float:
        """The finest scale, in eighths from 20 to 1, that :meth:`check` lets pass; 0 for none.

        The noise is in proportion to the sensitivity, so it grows and shrinks with the scale. The
        finer the scale, the less the rounding adds to the sensitivity.
        """
        grids = (replace(encoding, scale_bits=eighths / 8) for eighths in range(160, 7, -1))
        fit = (grid for grid in grids if self.wrap_probability(grid, load) <= LARGEST_WRAP)
        return next((grid.scale_bits for grid in fit), 0)


_STEP = 1.125  # most that rounding adds to a coefficient, float32 products included
_LENGTH = 1 + 1e-4  # norm of a clipped and rotated float32 vector over the clip norm


def _beyond(room: float, variance: float) -> float:
    """Probability that noise goes beyond ``room`` on one side, from above."""
    if room <= 0:
        return 1.0
    if variance == 0:
        return 0.0
    return math.exp(-(room**2) / (2 * variance))


SEED_BYTES = 32


@dataclass(frozen=True)
class Rotation:
    """Random signs and Hadamard matrices, band by band, after which no coefficient can stand out.

    They spread every vector evenly: a coefficient of the rotated sum ``x`` is ``Σ ±xᵢ / √D``, which
    exceeds ``u`` with a probability of at most ``2 exp(-u² D / 2‖x‖²)`` (Hoeffding). Bands are
    rotated one by one, so that prefixes stay prefixes, and the rotation is orthonormal, so that
    norms, and noise of one variance in all coefficients, stay what they are.

    Nothing is padded: Hadamard matrices of the orders ``2^a``, ``12 · 2^a`` and ``20 · 2^a`` are
    used (Paley 1933), of which the largest order ``D`` that fits is at least three quarters of a
    band (from 12 coefficients on); it is applied to its first ``D`` coefficients and then, with
    signs of its own, to its last ``D``. So each coefficient was spread over ``D`` in the last step
    that touched it.

    Promise: a function of the bands' ``sizes`` and the ``seed``, the same on every platform; up to
    rounding of floats, :meth:`undo` is the inverse of :meth:`apply`, and both keep every norm. The
    seed, 32 public bytes, is the same for all devices and depends on no update.
    """

    sizes: tuple[int, ...]
    seed: bytes

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise UsageError(f"bands of {self.sizes} coefficients: each must have at least 1")
        if len(self.seed) != SEED_BYTES:
            raise UsageError(
                f"a rotation seed of {len(self.seed)} bytes: it must have {SEED_BYTES}; "
                "use a SHA-256 digest of run, round and attempt"
            )

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rotate vectors, float32 of shape ``(m, k)`` where ``k`` ends with a band, to new ones."""
        rotated = values.copy()
        for part, band in self._parts(rotated):
            for window, places in enumerate(_windows(part.shape[1])):
                piece = part[:, places]
                piece *= self._signs(band, window, piece.shape[1])
                _transform(piece)
        return rotated

    def undo(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rotate vectors, or their sum, back; as :meth:`apply`, in float64."""
        rotated = values.copy()
        for part, band in self._parts(rotated):
            for window, places in reversed(list(enumerate(_windows(part.shape[1])))):
                piece = part[:, places]
                _transform(piece, backwards=True)
                piece *= self._signs(band, window, piece.shape[1])
        return rotated

    def _parts(self, values: NDArray[np.floating]) -> list[tuple[NDArray[np.floating], int]]:
        """Views of the bands that vectors hold."""
        ends = np.cumsum(self.sizes).tolist()
        if values.shape[1] not in ends:
            raise UsageError(
                f"vectors of {values.shape[1]} coefficients: prefixes of the bands have {ends}"
            )
        held = ends.index(values.shape[1]) + 1
        starts = [0, *ends]
        return [(values[:, starts[b] : ends[b]], b) for b in range(held)]

    def _signs(self, band: int, window: int, size: int) -> NDArray[np.int8]:
        name = self.seed + band.to_bytes(4, "little") + window.to_bytes(4, "little")
        stream = SecureStream(hashlib.sha256(b"privrec rotation" + name).digest())
        packed = np.frombuffer(stream.bytes(-(-size // 8)), np.uint8)
        bits = np.unpackbits(packed, count=size, bitorder="little")
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def spread(size: int) -> int:
    """Over how many coefficients each one of a band of ``size`` is spread."""
    orders = [1 << size.bit_length() - 1]
    orders += [core << (size // core).bit_length() - 1 for core in (12, 20) if core <= size]
    return max(orders)


def _windows(size: int) -> list[slice]:
    order = spread(size)
    first, last = slice(0, order), slice(size - order, size)
    return [first] if order == size else [first, last]


def _transform(values: NDArray[np.floating], *, backwards: bool = False) -> None:
    """Multiply each row by an orthonormal Hadamard matrix, in place."""
    rows, order = values.shape
    # An order is a power of two times an odd part of 1, 3 or 5, which 12 and 20 have.
    core = {3: 12, 5: 20}.get(order // (order & -order), min(order, 16))
    matrix = _hadamard(core).astype(values.dtype)
    work = np.ascontiguousarray(values).reshape(-1, core) @ (matrix if backwards else matrix.T)
    work = work.reshape(rows, order)
    step = core
    while step < order:
        pairs = work.reshape(rows, -1, 2, step)
        difference = pairs[:, :, 0] - pairs[:, :, 1]
        pairs[:, :, 0] += pairs[:, :, 1]
        pairs[:, :, 1] = difference
        step *= 2
    np.multiply(work, values.dtype.type(1 / math.sqrt(order)), out=values)


@lru_cache(maxsize=8)
def _hadamard(order: int) -> NDArray[np.int8]:
    """A matrix of ±1 with orthogonal rows, of an order that is a power of two, 12 or 20."""
    if order & (order - 1):  # Paley, for a prime of the form 4k + 3
        prime = order - 1
        places = np.arange(prime)
        character = np.where(np.isin(places, places[1:] ** 2 % prime), 1, -1)
        character[0] = 0
        skew = np.zeros((order, order), np.int64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = character[(places[:, None] - places) % prime]
        return (skew + np.eye(order, dtype=np.int64)).astype(np.int8)
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
