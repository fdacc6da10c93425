"""The discrete Gaussian: an exact sampler, and how near sums of shares come to what is accounted.

**Sampler.** Tables are built in integers alone, so that everybody who holds the seed of a draw gets
the same draw, and how far a draw is from its distribution is proved, not measured. A table is
Walker's: of ``N = 2^k`` columns of equal mass ``2^(256-k)``, each is split between its own outcome
and one other. The first ``k`` bits of a 32-bit word name the column and the others a place in it.
The word decides unless it equals the first 32 bits of the threshold; then 224 further bits do. So a
draw costs 4 bytes and two look-ups, and its probabilities are whole multiples of ``2^-256``. Its
time depends on ties, so it says a little of the keystream that is used up, and nothing of data.

Let ``v`` be the variance parameter: ``P(x) ∝ exp(-x² / 2v)``. Wide Gaussians are sums of narrow
ones, ``X = X₁ + j X₂`` with ``v = v₁ + j² v₂``. In ``P(X = x)`` the sum over ``X₂`` is a Gaussian
sum over shifted integers of variance ``τ² = v₁ v₂ / (v₁ + j² v₂)``, which by Poisson's summation
formula is ``τ √2π (1 + e)`` with ``|e| <= 2 Σ exp(-2π² τ² r²)``. Here ``v₁ = 9 j²``, hence
``τ² > 8.99`` and ``|e| < 2^-254``: the sum has the right distribution up to that relative error.

Total variation of a draw from its distribution is at most :data:`SLACK`, the sum of, for at most
five tables: the tail left out beyond 18.5 deviations (``2 exp(-171) < 2^-245``, since the discrete
Gaussian is sub-Gaussian); rounding of ``K < 2^17`` probabilities to multiples of ``2^-256``;
arithmetic in 448 bits (errors below ``2^-350``); and ``2^-254`` for each sum. That is below
``5 (2^-245 + 2^-239 + 2^-253) < 2^-236``.

**Shares.** A round releases ``f + Σ Zᵢ`` where ``f`` is an integer vector of L2 sensitivity ``B``
and ``m`` honest shares ``Zᵢ`` have the variance parameter ``s² = σ² / m`` in each of ``d``
coefficients. More shares than ``m`` are independent noise on top, hence post-processing.

**Sum of discrete Gaussians.** Let ``a = k s²``. The law of ``N_Z(0, a) + N_Z(0, s²)`` at ``x`` is
``exp(-x² / 2(a + s²))`` times a Gaussian sum over shifted integers of variance
``τ² = s² k / (k + 1)``. By Poisson's summation formula that sum is, at a shift ``μ``,
``√(2π) τ (1 + 2 Σ_{r>=1} exp(-2π² τ² r²) cos 2πrμ)``: within ``1 ± e(τ²)`` of a constant,
``e(τ²) = 2 Σ_{r>=1} exp(-2π² τ² r²)``. So the law is ``q h / E_q[h]`` for
``q = N_Z(0, (k + 1) s²)`` and an ``h`` within ``1 ± e``, and so is ``E_q[h]``: the log-ratio of the
two is at most ``log (1 + e) / (1 - e) = 2 artanh e``, which is ``4 exp(-2π² τ²)`` to first order
(2 for both signs of the cosine, 2 for ``h`` and its mean). One more independent share keeps the
log-ratio of what was summed before: by induction that of the whole sum to ``N_Z(0, σ²)`` is at most
``Σ_{k=1}^{m-1} 2 artanh e(s² k / (k + 1))``. (Kairouz, Liu & Steinke 2021, theorem 1, has the same
exponents with a constant of 10, which is larger than the derivation needs.)

**Discrete Gaussian and Gaussian.** Round ``X ~ N(f, σ² - ρ)`` to ``Y ~ N_Z(X, ρ)``, a discrete
Gaussian with centre ``X`` (randomised rounding, Peikert 2010, theorem 3.1). Since the normaliser of
``N_Z(X, ρ)`` is within ``1 ± e(ρ)`` of ``√2πρ``, ``Y`` has within ``2 artanh e(ρ)`` the law of
``f + N_Z(0, σ²)``, and ``Y`` is post-processing of the Gaussian mechanism of variance ``σ² - ρ``.

**Together.** The release has within a log-ratio of ``K = d (sum + rounding)``, on every set, the
law of a post-processing of the Gaussian mechanism of noise multiplier ``√(σ² - ρ) / B``. The same
holds of mixtures (Poisson sampling) and, with ``K`` added up, of adaptive compositions. If that
mechanism is ``(ε, δ)`` private, the release is ``(ε + 2K, exp(K) δ)`` private. If the draws of
the honest shares are within total variation ``t`` of theirs, ``δ`` grows by ``(1 + exp(ε)) t``.
That the keystream is as good as random is the assumption behind all of this.

**Small cohorts.** Distributed noise is not there when nobody is, so a round with fewer than its
fewest devices ends without a release. Who is sampled depends on no history, and so neither does the
end of a round, but it spoils the secrecy of sampling a little: with exactly one device too few
among the others, a release shows that the user in question took part.

Fix the coins of all others. If enough of them are sampled in every band, the round is the sampled
mechanism as accounted; if two or more are missing, it never releases. There remains, for a band of
``N`` devices that needs ``n``, the case of ``n - 1`` others, of probability ``P[Bin(N-1, q) =
n-1]``, in which something is released with probability ``q``. The three cases have the same
probabilities for two neighbouring histories, so the case adds its ``q P[Bin(N-1, q) = n-1]``, which
is at most ``P[Bin(N, q) < n] max(1, q / (1-q))``, to δ, whatever ε is.

Sources: Canonne, Kamath & Steinke, "The Discrete Gaussian for Differential Privacy" (2020); Walker
(1977), Vose (1991) for the table; Micciancio & Peikert (2013) for sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
SHARE_OF_DELTA = 1e-3
"""Largest part of δ that the samplers may take."""
SMALL_COHORTS_SHARE = 0.01
"""Largest part of δ that small cohorts may take."""
LARGEST_LOG_RATIO = 1e-10
"""Largest log-ratio of one round to what is accounted for it."""

_MASS_BITS = 256
_WORD_BITS = 32
_TIE_BYTES = (_MASS_BITS - _WORD_BITS) // 8
_WORK_BITS = 448
_TAIL = Fraction(685, 2)  # 18.5 deviations, squared and rounded up
_NARROW = 1 << 20  # variance up to which one table is used
_RATIO = 9  # v₁ / j²
_BLOCK = 1 << 15
_ROUNDING = 3.0  # ρ
_FEW = 64


def discrete_gaussian(stream: SecureStream, variance: Fraction, size: int) -> NDArray[np.int32]:
    """Independent draws of the discrete Gaussian ``N_Z(0, variance)``, in squared integer steps.

    Promise: a function of the stream, the variance and the size, the same on every platform; each
    draw is within a total variation of :data:`SLACK` of ``P(x) ∝ exp(-x² / (2 variance))``.
    """
    check_variance(variance)
    (_, first), *others = _parts(variance)
    out = np.empty(size, np.int32)
    buffer = np.empty(min(size, _BLOCK), np.int32)
    for start in range(0, size, _BLOCK):
        block = out[start : start + _BLOCK]
        first.draw(stream, block)
        for factor, table in others:
            part = buffer[: len(block)]
            table.draw(stream, part)
            part *= np.int32(factor)
            block += part
    return out


def check_variance(variance: Fraction) -> None:
    """Raise UsageError for a variance that no table is made for: below 1/16 or above 2^44."""
    if not LEAST_VARIANCE <= variance <= LARGEST_VARIANCE:
        raise UsageError(
            f"noise of variance {float(variance):g} squared steps a device: it must lie between "
            f"{float(LEAST_VARIANCE):g} and {float(LARGEST_VARIANCE):g}; check "
            "privacy.noise_multiplier and privacy.scale_bits"
        )


@lru_cache(maxsize=16)
def _parts(variance: Fraction) -> tuple[tuple[int, AliasTable], ...]:
    """Factors and tables of the Gaussians that a wide one is the sum of; the first has factor 1."""
    parts, factor = [], 1
    while variance > _NARROW:
        # The smallest step that leaves a narrow rest, or the largest whose own part is narrow.
        enough = math.isqrt(math.ceil(variance / (_NARROW + _RATIO)) - 1) + 1
        step = min(enough, math.isqrt(_NARROW // _RATIO))
        parts.append((factor, _gaussian_table(Fraction(_RATIO * step**2))))
        factor, variance = factor * step, variance / step**2 - _RATIO
    return (*parts, (factor, _gaussian_table(variance)))


@lru_cache(maxsize=16)
def _gaussian_table(variance: Fraction) -> AliasTable:
    half = math.isqrt(math.ceil(_TAIL * variance)) + 2
    weight, ratio = 1 << _WORK_BITS, _exp(1 / (2 * variance))
    square = ratio * ratio >> _WORK_BITS
    weights = [weight]
    for _ in range(half):
        weight = weight * ratio >> _WORK_BITS
        ratio = ratio * square >> _WORK_BITS
        weights.append(weight)
    weights = weights[:0:-1] + weights
    total = sum(weights)
    masses = [(weight << _MASS_BITS) // total for weight in weights]
    masses[half] += (1 << _MASS_BITS) - sum(masses)  # what rounding loses goes to the largest
    return AliasTable(-half, masses)


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


class AliasTable:
    """Walker's table of a distribution on consecutive integers, from ``first`` on.

    Promise: draws have exactly the probabilities ``masses[i] / 2^256``, as far as the words of the
    stream are uniform. Masses are whole numbers, at least 0, that add up to ``2^256``.
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
            threshold = self._rests[column * _TIE_BYTES : (column + 1) * _TIE_BYTES]
            word = int.from_bytes(stream.bytes(_TIE_BYTES), "little")
            is_own = word < int.from_bytes(threshold, "little")
            out[index] = self._outcomes[2 * column + is_own]


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


@dataclass(frozen=True)
class Grid:
    """What a round of distributed noise is made of, as far as privacy depends on it.

    Attributes:
        squared_sensitivity: largest squared L2 norm of one device's integers, ``B²``.
        dimension: coefficients of the whole sum.
        shares: ``m``, the shares that the accounted variance is made of: fewest survivors less
            colluders, in the band where that is most.
        excess_removed: whether the sum always keeps the same number of shares, so that its
            variance does not tell how many devices took part.
        small_cohort_delta: what small cohorts add to the δ of a round, in [0, 1).
    """

    squared_sensitivity: int
    dimension: int
    shares: int
    excess_removed: bool
    small_cohort_delta: float = 0.0

    def __post_init__(self) -> None:
        for name in ("squared_sensitivity", "dimension", "shares"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} {value!r}: it must be a whole number of at least 1")
        if type(self.excess_removed) is not bool:
            raise UsageError(f"excess_removed {self.excess_removed!r}: it must be true or false")
        spoiled = self.small_cohort_delta
        if type(spoiled) is not float or not 0 <= spoiled < 1:
            raise UsageError(f"small_cohort_delta {spoiled!r}: it must be a number in [0, 1)")

    def deviation(self, noise_multiplier: float) -> float:
        """Standard deviation of one share, in integer steps."""
        return noise_multiplier * math.sqrt(self.squared_sensitivity) / math.sqrt(self.shares)

    def log_ratio(self, noise_multiplier: float) -> float:
        """``K`` of discrete Gaussian shares; infinity when they are too narrow for any bound."""
        share = self.deviation(noise_multiplier) ** 2
        if share * self.shares <= _ROUNDING:
            return math.inf
        return self.dimension * (_of_sum(share, self.shares) + _apart(_ROUNDING))

    def multiplier(self, noise_multiplier: float) -> float:
        """Noise multiplier of the Gaussian mechanism that discrete Gaussian shares amount to."""
        return math.sqrt(noise_multiplier**2 - _ROUNDING / self.squared_sensitivity)

    def slack(self, noise_multiplier: float) -> Slack:
        """How far a round is from that mechanism; every honest draw has the samplers' SLACK."""
        draws = self.dimension * self.shares
        return Slack(self.log_ratio(noise_multiplier), draws * SLACK, self.small_cohort_delta)

    def check(self, noise_multiplier: float) -> None:
        """Raise UsageError for a round of a log-ratio above :data:`LARGEST_LOG_RATIO`."""
        if not self.log_ratio(noise_multiplier) <= LARGEST_LOG_RATIO:
            raise UsageError(
                f"distributed noise of {self.deviation(noise_multiplier):.3g} integer steps a "
                f"device: sums of {self.shares} such shares in {self.dimension} coefficients are "
                f"{self.log_ratio(noise_multiplier):.1e} away from what is accounted, and at most "
                f"{LARGEST_LOG_RATIO:g} is allowed; raise privacy.scale_bits or the noise"
            )


@dataclass(frozen=True)
class Slack:
    """How far releases are from what is accounted, added up over rounds.

    ``log_ratio`` is ``K``, ``variation`` that of the samplers, ``spoiled`` the δ of small cohorts.
    """

    log_ratio: float = 0.0
    variation: float = 0.0
    spoiled: float = 0.0

    def inner(self, delta: float) -> float:
        """The δ that is left for the mechanism that is accounted."""
        if self == Slack():
            return delta
        left = delta - min(self.spoiled, SMALL_COHORTS_SHARE * delta)
        return left * (1 - SHARE_OF_DELTA) * math.exp(-self.log_ratio)

    def outer(self, epsilon: float, delta: float) -> float:
        """ε of the releases, given that of the accounted mechanism at :meth:`inner`.

        Infinite when samplers or small cohorts would take more of δ than their share.
        """
        total = epsilon + 2 * self.log_ratio
        taken = self.variation * (1 + math.exp(min(total, 700.0)))
        within = self.spoiled <= SMALL_COHORTS_SHARE * delta
        return total if taken <= SHARE_OF_DELTA * delta and within else math.inf


def _of_sum(share: float, shares: int) -> float:
    """Log-ratio of the sum of discrete Gaussians to one, in a coefficient."""
    first = min(shares - 1, _FEW)
    exact = sum(_apart(share * k / (k + 1)) for k in range(1, first + 1))
    # The terms fall as k grows, so that the next one bounds all that are left.
    return exact + (shares - 1 - first) * _apart(share * (first + 1) / (first + 2))


def _apart(variance: float) -> float:
    """``2 artanh e(variance)``: Poisson's summation formula as a log-ratio, from above."""
    x = math.exp(-2 * math.pi**2 * variance)
    ripple = 2 * x / (1 - x)
    return 2 * math.atanh(ripple) if ripple < 1 else math.inf


def small_cohort_delta(
    crowds: Sequence[tuple[int, int]], sampling_rate: float, rounds: int
) -> float:
    """What ``rounds`` rounds add to δ because small cohorts release nothing, in [0, 1].

    ``T · P[k < n]``, summed over the bands, and ``q / (1 - q)`` times as much for ``q`` above one
    half. ``crowds`` has the devices of each band that hold it and train, and the fewest that a
    release needs; ``sampling_rate`` is the probability to take part and stay, in (0, 1], where
    drop-outs depend on no history.
    """
    from scipy.special import bdtr

    if sampling_rate == 1:
        return 0.0  # there is no secrecy of sampling to spoil
    below = sum(
        float(bdtr(least - 1, population, sampling_rate)) if least <= population else 1.0
        for population, least in crowds
    )
    odds = max(1.0, sampling_rate / (1 - sampling_rate))
    return min(1.0, rounds * odds * below)


def check_small_cohorts(
    crowds: Sequence[tuple[int, int]], sampling_rate: float, rounds: int, delta: float
) -> float:
    """What one round adds to δ because small cohorts release nothing.

    UsageError when all rounds take more than a hundredth of δ, or a band can never release.
    """
    for population, least in crowds:
        if population < least:
            raise UsageError(
                f"a band of {population} devices that needs {least} in a round: it would never "
                "release; lower the fewest devices of a round or add devices"
            )
    taken = small_cohort_delta(crowds, sampling_rate, rounds)
    if taken > SMALL_COHORTS_SHARE * delta:
        population, least = min(crowds, key=lambda crowd: crowd[0] * sampling_rate / crowd[1])
        raise UsageError(
            f"{rounds} rounds at sampling_rate {sampling_rate}: too few of the {population} "
            f"devices of a band for its least, {least}, come together often enough to add "
            f"{taken:.1e} to delta, more than a hundredth of {delta:g}; raise the sampling rate or "
            "lower the fewest devices of a round"
        )
    return small_cohort_delta(crowds, sampling_rate, 1)
