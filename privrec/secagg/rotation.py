"""A public random rotation of each band, after which no coefficient can stand out.

In a small ring the sum of a thousand updates must not wrap around, and a coefficient in which all
devices agree might. Random signs and a Hadamard matrix spread every vector evenly: a coefficient of
the rotated sum ``x`` is ``Σ ±xᵢ / √D``, which exceeds ``u`` with a probability of at most
``2 exp(-u² D / 2‖x‖²)`` (Hoeffding).

Bands are rotated one by one, so that prefixes stay prefixes, and the rotation is orthonormal, so
that norms, and noise of one variance in all coefficients, stay what they are. Nothing is padded:
Hadamard matrices of the orders ``2^a``, ``12 · 2^a`` and ``20 · 2^a`` are used, of which the
largest order ``D`` that fits is at least three quarters of a band (from 12 coefficients on); it is
applied to its first ``D`` coefficients and then, with signs of its own, to its last ``D``. So each
coefficient was spread over ``D`` in the last step that touched it.
Sources: Kairouz, Liu & Steinke (2021), section 4; Paley (1933) for the orders 12 and 20.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream

SEED_BYTES = 32
_CORES = (16, 12, 20)  # orders of the dense factors


@dataclass(frozen=True)
class Rotation:
    """Random signs and Hadamard matrices, band by band.

    Promise: a function of the sizes and the seed, the same on every platform; up to rounding of
    floats, :meth:`undo` is the inverse of :meth:`apply`, and both keep every norm.

    Args:
        sizes: coefficients of each band, in their order, at least 1 each.
        seed: 32 public bytes, the same for all devices, that depend on no update; a digest of run,
            round and attempt.

    Raises:
        UsageError: when a value is outside its range.
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
        """Rotate vectors.

        Args:
            values: float32 of shape ``(m, k)``, where ``k`` ends with a band.

        Returns:
            A new array of the same shape and type.
        """
        turned = values.copy()
        for part, band in self._parts(turned):
            for window, places in enumerate(_windows(part.shape[1])):
                piece = part[:, places]
                piece *= self._signs(band, window, piece.shape[1])
                _transform(piece)
        return turned

    def undo(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rotate vectors, or their sum, back; as :meth:`apply`, in float64."""
        turned = values.copy()
        for part, band in self._parts(turned):
            for window, places in reversed(list(enumerate(_windows(part.shape[1])))):
                piece = part[:, places]
                _transform(piece, backwards=True)
                piece *= self._signs(band, window, piece.shape[1])
        return turned

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
    core = next((core for core in (12, 20) if _is_doubled(order, core)), min(order, _CORES[0]))
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


def _is_doubled(order: int, core: int) -> bool:
    times, rest = divmod(order, core)
    return rest == 0 and times & (times - 1) == 0 and times > 0


@lru_cache(maxsize=8)
def _hadamard(order: int) -> NDArray[np.int8]:
    """A matrix of ±1 with orthogonal rows, of an order that is a power of two, 12 or 20."""
    if order & (order - 1):
        return _paley(order - 1)
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley(prime: int) -> NDArray[np.int8]:
    """Paley's matrix of order ``prime + 1``, for a prime of the form ``4 k + 3``."""
    places = np.arange(prime)
    squares = np.isin(places, places[1:] ** 2 % prime)
    character = np.where(squares, 1, -1)
    character[0] = 0
    skew = np.zeros((prime + 1, prime + 1), np.int64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(places[:, None] - places) % prime]
    return (skew + np.eye(prime + 1, dtype=np.int64)).astype(np.int8)
