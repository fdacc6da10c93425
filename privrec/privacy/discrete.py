"""The exact sampler of integer noise: the discrete Gaussian.

Tables are built in integers alone, so that everybody who holds the seed of a draw gets the same
draw, and how far a draw is from its distribution is proved, not measured.

A table is Walker's: with ``N = 2^k`` columns of equal mass ``2^(256-k)``, each split between its
own outcome and one other. A 32-bit word names the column with its first ``k`` bits and a place in
it with the others. The word decides unless it equals the first 32 bits of the threshold; then 224
further bits do. So a draw costs 4 bytes and two look-ups, and its probabilities are whole multiples
of ``2^-256``. The time of a draw depends on ties, so it says a little of the keystream that is used
up, and nothing of data.

Let ``v`` be the variance parameter: ``P(x) ∝ exp(-x² / 2v)``. Wide Gaussians are sums of narrow
ones, ``X = X₁ + j X₂`` with ``v = v₁ + j² v₂``. In ``P(X = x)`` the sum over ``X₂`` is a Gaussian
sum over shifted integers of variance ``τ² = v₁ v₂ / (v₁ + j² v₂)``, which by Poisson's summation
formula is ``τ √2π (1 + e)`` with ``|e| <= 2 Σ exp(-2π² τ² r²)``. Here ``v₁ = 9 j²``, hence
``τ² > 8.99`` and ``|e| < 2^-254``: the sum has the right distribution up to that relative error.

Total variation of a draw from its distribution is at most :data:`SLACK`, the sum of, for at most
five tables: the tail left out beyond 18.5 deviations (``2 exp(-171) < 2^-245``, since the discrete
Gaussian is sub-Gaussian); rounding of ``K < 2^17``
probabilities to multiples of ``2^-256``; arithmetic in 448 bits (errors below ``2^-350``); and
``2^-254`` for each sum. That is below ``5 (2^-245 + 2^-239 + 2^-253) < 2^-236``.
Sources: Canonne, Kamath & Steinke, "The Discrete Gaussian for Differential Privacy" (2020); Walker
(1977), Vose (1991) for the table; Micciancio & Peikert (2013) for sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream

SLACK = 2.0**-236
"""Largest total variation of one draw from its distribution."""
LEAST_VARIANCE = Fraction(1, 16)
LARGEST_VARIANCE = Fraction(2**44)

_MASS_BITS = 256
_WORD_BITS = 32
_TIE_BYTES = (_MASS_BITS - _WORD_BITS) // 8
_WORK_BITS = 448
_ONE = 1 << _WORK_BITS
_TAIL = Fraction(685, 2)  # 18.5 deviations, squared and rounded up
_NARROW = 1 << 20  # variance up to which one table is used
_RATIO = 9  # v₁ / j²
_BLOCK = 1 << 15


def discrete_gaussian(stream: SecureStream, variance: Fraction, size: int) -> NDArray[np.int32]:
    """Independent draws of the discrete Gaussian ``N_Z(0, variance)``.

    Promise: a function of the stream, the variance and the size, the same on every platform; each
    draw is within a total variation of :data:`SLACK` of ``P(x) ∝ exp(-x² / (2 variance))``.

    Args:
        stream: the secure stream of this draw.
        variance: the parameter ``σ²`` in squared integer steps, from 1/16 to 2^44.
        size: number of draws.

    Returns:
        int32 of shape ``(size,)``.

    Raises:
        UsageError: when the variance is outside its range.
    """
    check_variance(variance)
    return _gaussian(variance).draw(stream, size)


def check_variance(variance: Fraction) -> None:
    """Refuse a variance that the tables are not made for.

    Raises:
        UsageError: when it lies below 1/16 or above 2^44 squared steps.
    """
    if not LEAST_VARIANCE <= variance <= LARGEST_VARIANCE:
        raise UsageError(
            f"noise of variance {float(variance):g} squared steps a device: it must lie between "
            f"{float(LEAST_VARIANCE):g} and {float(LARGEST_VARIANCE):g}; check "
            "privacy.noise_multiplier and privacy.scale_bits"
        )


class AliasTable:
    """Walker's table of a distribution on consecutive integers.

    Promise: draws have exactly the probabilities ``masses[i] / 2^256``, as far as the words of the
    stream are uniform.

    Args:
        first: the outcome of ``masses[0]``.
        masses: whole numbers, at least 0, that add up to ``2^256``.
    """

    def __init__(self, first: int, masses: list[int]) -> None:
        bits = max(1, (len(masses) - 1).bit_length())
        thresholds, others = _alias(masses, bits)
        low = 8 * _TIE_BYTES
        self._shift = _WORD_BITS - bits
        self._marks = np.array(
            [(column << self._shift) + (t >> low) for column, t in enumerate(thresholds)], np.uint32
        )
        rest = (1 << low) - 1
        self._rests = b"".join((t & rest).to_bytes(_TIE_BYTES, "little") for t in thresholds)
        self._outcomes = np.empty(2 << bits, np.int32)
        self._outcomes[0::2] = np.array(others) + first
        self._outcomes[1::2] = np.arange(1 << bits) + first

    def draw(self, stream: SecureStream, out: NDArray[np.int32]) -> None:
        """Fill ``out`` with independent draws."""
        words = stream.uint32(len(out))
        place = np.empty(len(out), np.intp)
        np.right_shift(words, self._shift, out=place, casting="unsafe")
        marks = self._marks.take(place, mode="clip")
        ties = np.flatnonzero(words == marks)
        place <<= 1
        place += words < marks
        self._outcomes.take(place, out=out, mode="clip")
        for index in ties:
            column = int(place[index]) >> 1
            out[index] = self._outcomes[2 * column + self._is_own(column, stream)]

    def _is_own(self, column: int, stream: SecureStream) -> bool:
        start = column * _TIE_BYTES
        threshold = int.from_bytes(self._rests[start : start + _TIE_BYTES], "little")
        return int.from_bytes(stream.bytes(_TIE_BYTES), "little") < threshold


@dataclass(frozen=True)
class Sampler:
    """Independent draws of ``Σ factor · X`` over a few tables."""

    parts: tuple[tuple[int, AliasTable], ...]

    def draw(self, stream: SecureStream, size: int) -> NDArray[np.int32]:
        """``size`` draws, int32; the stream is read block by block."""
        out = np.empty(size, np.int32)
        buffer = np.empty(min(size, _BLOCK), np.int32)
        for start in range(0, size, _BLOCK):
            block = out[start : start + _BLOCK]
            self.parts[0][1].draw(stream, block)
            for factor, table in self.parts[1:]:
                part = buffer[: len(block)]
                table.draw(stream, part)
                part *= np.int32(factor)
                block += part
        return out


@lru_cache(maxsize=16)
def _gaussian(variance: Fraction) -> Sampler:
    """The table of a narrow Gaussian, or of the parts of a wide one; the first has factor 1."""
    parts, factor = [], 1
    while variance > _NARROW:
        step = _step(variance)
        parts.append((factor, _gaussian_table(Fraction(_RATIO * step**2))))
        factor, variance = factor * step, variance / step**2 - _RATIO
    return Sampler((*parts, (factor, _gaussian_table(variance))))


def _step(variance: Fraction) -> int:
    """The smallest step that leaves a narrow rest, or the largest whose own part is narrow."""
    enough = math.isqrt(math.ceil(variance / (_NARROW + _RATIO)) - 1) + 1
    return min(enough, math.isqrt(_NARROW // _RATIO))


@lru_cache(maxsize=16)
def _gaussian_table(variance: Fraction) -> AliasTable:
    half = math.isqrt(math.ceil(_TAIL * variance)) + 2
    weight, ratio = _ONE, _exp(1 / (2 * variance))
    square = ratio * ratio >> _WORK_BITS
    weights = [weight]
    for _ in range(half):
        weight = weight * ratio >> _WORK_BITS
        ratio = ratio * square >> _WORK_BITS
        weights.append(weight)
    return AliasTable(-half, _masses(weights[:0:-1] + weights))


def _masses(weights: list[int]) -> list[int]:
    """Weights as probabilities in units of ``2^-256``; what rounding loses goes to the largest."""
    total = sum(weights)
    masses = [(weight << _MASS_BITS) // total for weight in weights]
    masses[weights.index(max(weights))] += (1 << _MASS_BITS) - sum(masses)
    return masses


def _alias(masses: list[int], bits: int) -> tuple[list[int], list[int]]:
    """Thresholds and other outcomes of each column (Vose's construction, exact in integers)."""
    full = 1 << (_MASS_BITS - bits)
    left = masses + [0] * ((1 << bits) - len(masses))
    thresholds, others = [0] * len(left), list(range(len(left)))
    small = [column for column, mass in enumerate(left) if mass < full]
    large = [column for column, mass in enumerate(left) if mass >= full]
    while small:
        column, giver = small.pop(), large[-1]
        thresholds[column], others[column] = left[column], giver
        left[giver] -= full - left[column]
        if left[giver] < full:
            small.append(large.pop())
    # Columns that are left are full of their own outcome, which both halves of them name.
    return thresholds, others


def _exp(x: Fraction) -> int:
    """``exp(-x)`` in units of ``2^-448``, for ``x`` from 0 to 8, good to ``2^-400``."""
    guard = 64
    one = 1 << (_WORK_BITS + guard)
    argument = one * x.numerator // x.denominator
    total, term, order = one, one, 0
    while term:
        order += 1
        term = term * argument // (order * one)
        total += -term if order % 2 else term
    return total >> guard
