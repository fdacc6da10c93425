"""Two accountants for the composition of Gaussian rounds, sampled or not.

``pld`` is the one that counts: it composes the privacy loss distributions of dp-accounting, always
from above. ``rdp`` (dp-accounting) is a cross-check by other mathematics.

dp-accounting makes the distribution of one round. It is composed here, since the loop asks for ε
after every round: what does not depend on the number of rounds is kept, so that a further ε costs
about a millisecond instead of some hundred. A test holds it to dp-accounting's own composition.
Sources: Koskela et al. (2020) and Doroshenko et al., "Connect the Dots" (2022) for the
distributions; Balle & Wang (2018) for the Gaussian mechanism; Mironov et al. (2019) for RDP.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REFINEMENT = 0.005
_NEGLIGIBLE = 2e-5  # against the four decimals to which ε is shown
_LEVELS = 5
_TAIL = 1e-15
_ROUNDING = 2.0**-52
_ORDERS = np.outer([1.0, -1.0], 2.0 ** np.arange(-18, 0, 0.5)).ravel()  # a grid point
_MOST_POINTS = 1 << 24  # of a grid, by memory
_LARGE = 1e6  # an ε whose rounding errors are worth more than the last digits of δ
_PLAIN = 1e-12  # sampling above 1 - 1e-12 is treated as everybody, which costs more, never less


@dataclass(frozen=True)
class Rounds:
    """``count`` identical rounds of the Gaussian mechanism of sensitivity 1, each user sampled."""

    noise_multiplier: float
    sampling_rate: float
    count: int

    @property
    def everybody(self) -> bool:
        """Whether sampling hides nothing."""
        return self.sampling_rate >= 1 - _PLAIN


Composition = tuple[Rounds, ...]


@lru_cache(maxsize=4096)
def pld(rounds: Composition, delta: float) -> float:
    """An upper bound on ε by privacy loss distributions.

    Without sampling, the composition is one Gaussian mechanism, whose ε is known in closed form.
    With sampling, the losses are put on a grid from above (pessimistically), and the grid is made
    four times finer until ε moves by less than 0.5 %. The order of ``rounds`` does not matter.
    Where δ, in (0, 1), is below what double precision carries, ε is that of :func:`rdp`.
    """
    if all(part.everybody for part in rounds):
        return gaussian(_strength(rounds), delta)
    # A power of two that puts the loss of one round on some thousand points.
    sigma = min(part.noise_multiplier for part in rounds)
    step = 2.0 ** math.floor(math.log2((0.5 / sigma + 10) / sigma / 1024))
    best = _pld_on_grid(rounds, delta, step)
    for _ in range(_LEVELS):
        step /= 4
        before, best = best, min(best, _pld_on_grid(rounds, delta, step))
        if before == math.inf or before - best <= max(REFINEMENT * best, _NEGLIGIBLE):
            break
    # What double precision cannot carry, Rényi divergences still bound, only more loosely. To be
    # sampled never costs more than to take part in every round: divergences are convex.
    found = best if best < math.inf else rdp(rounds, delta)
    return min(found, gaussian(_strength(rounds), delta))


@lru_cache(maxsize=1024)
def rdp(rounds: Composition, delta: float) -> float:
    """An upper bound on ε by Rényi divergences: looser than :func:`pld`, never below it."""
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    # It reports each order that it leaves out, which only loosens the bound.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with np.errstate(all="ignore"):
            for part in rounds:
                event: Any = dp_event.GaussianDpEvent(part.noise_multiplier)
                if not part.everybody:
                    event = dp_event.PoissonSampledDpEvent(part.sampling_rate, event)
                accountant.compose(event, part.count)
            return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=4096)
def renyi(part: Rounds, order: int) -> float:
    """Rényi divergence of one of some identical rounds, of a whole order of at least 2.

    A sampled round compares ``(1 - q) P + q Q`` with ``P``; by symmetry of the noise that is the
    larger of the two directions (Mironov, Talwar & Zhang 2019, theorem 5). Its moment of order α is
    ``Σ_k C(α, k) (1-q)^(α-k) q^k E_P[(Q/P)^k]``, and ``log E_P[(Q/P)^k] = k (k - 1) / 2σ²``.
    """
    from scipy.special import gammaln, logsumexp

    sigma, rate = part.noise_multiplier, part.sampling_rate
    plain = order / 2 / sigma / sigma
    if part.everybody:
        return plain
    k = np.arange(order + 1)
    choose = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    weight = (order - k) * math.log1p(-rate) + k * math.log(rate)
    moment = float(logsumexp(choose + weight + k * (k - 1) / 2 / sigma / sigma))
    return min(plain, moment / (order - 1))


def gaussian(strength: float, delta: float) -> float:
    """The exact ε, at least 0, of a Gaussian mechanism or of any composition of them.

    ``strength`` is the root of the sum of ``1 / noise_multiplier²`` over the rounds, above 0.
    Balle & Wang (2018), theorem 8.
    """
    if gaussian_delta(strength, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(strength, high) > delta:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        holds = gaussian_delta(strength, middle) <= delta
        low, high = (low, middle) if holds else (middle, high)
    return high if high <= _LARGE else high * (1 + 1e-12)


def gaussian_delta(strength: float, epsilon: float) -> float:
    """The exact δ of a Gaussian mechanism at ``epsilon``; ``strength`` as for :func:`gaussian`."""
    from scipy.special import log_ndtr

    first = float(log_ndtr(strength / 2 - epsilon / strength))
    if epsilon > _LARGE:  # the second term would be lost in rounding; without it δ is from above
        return math.exp(first)
    second = epsilon + float(log_ndtr(-strength / 2 - epsilon / strength))
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


class _Losses(NamedTuple):
    """A privacy loss on a grid: ``mass[i]`` at ``(lowest + i) * step``, and some at infinity."""

    mass: Floats
    lowest: int
    at_infinity: float
    moments: Floats  # log E[exp(order * place)] at each of _ORDERS


_Sum = tuple[Floats, int, float]
"""A composed loss: the mass at grid points, the first of these, and what is lost of all mass."""
_LOST: _Sum = (np.zeros(1), 0, 1.0)  # all is lost, so that ε is infinite on this grid


def _strength(rounds: Sequence[Rounds]) -> float:
    return math.hypot(*(math.sqrt(part.count) / part.noise_multiplier for part in rounds))


def _pld_on_grid(rounds: Composition, delta: float, step: float) -> float:
    return max(
        _invert(mass, lowest, step, delta - lost) for mass, lowest, lost in _composed(rounds, step)
    )


@lru_cache(maxsize=6)
def _composed(rounds: Composition, step: float) -> list[_Sum]:
    """The loss of a composition in both directions; kept, since a curve asks at many δ."""
    plain = [part for part in rounds if part.everybody]
    parts = [Rounds(1 / _strength(plain), 1.0, 1)] if plain else []
    parts += [part for part in rounds if not part.everybody]
    both = zip(*(_one_round(p.noise_multiplier, p.sampling_rate, step) for p in parts), strict=True)
    return [_sum(losses, [part.count for part in parts]) for losses in both]


@lru_cache(maxsize=64)
def _one_round(sigma: float, rate: float, step: float) -> tuple[_Losses, _Losses]:
    """The losses of one round, for a user who is replaced by none and for the reverse."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    distribution = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=step,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    # dp-accounting has no public access to the masses; pyproject.toml keeps to the version read.
    return _losses(distribution._pmf_remove), _losses(distribution._pmf_add)


def _losses(pmf: Any) -> _Losses:
    from scipy.special import logsumexp

    dense = pmf.to_dense_pmf()
    mass = np.asarray(dense._probs, dtype=np.float64)
    places = dense._lower_loss + np.arange(len(mass), dtype=np.float64)
    with np.errstate(divide="ignore"):
        weights = np.log(mass)
    moments = np.array([logsumexp(weights + order * places) for order in _ORDERS])
    return _Losses(mass, int(dense._lower_loss), float(dense._infinity_mass), moments)


def _sum(parts: Sequence[_Losses], counts: Sequence[int]) -> _Sum:
    """The loss of ``counts[i]`` rounds of each ``parts[i]``, all on the same grid, from above."""
    lowest, highest = _window(parts, counts)
    if highest - lowest > _MOST_POINTS:
        return _LOST
    with np.errstate(over="ignore", invalid="ignore"):
        mass = _convolve(parts, counts, lowest, highest)
    if not np.isfinite(mass).all():  # rounded masses above 1, to the power of many rounds
        return _LOST
    finite = sum(n * math.log1p(-part.at_infinity) for part, n in zip(parts, counts, strict=True))
    margin = _ROUNDING * (len(mass) + sum(counts))
    return (mass, lowest, _TAIL + margin - math.expm1(finite))


def _window(parts: Sequence[_Losses], counts: Sequence[int]) -> tuple[int, int]:
    """Grid points outside of which a mass of at most ``_TAIL`` lies, by Chernoff's bound."""
    moments = np.sum([n * part.moments for part, n in zip(parts, counts, strict=True)], axis=0)
    bounds = (moments + math.log(2 / _TAIL)) / _ORDERS
    first = sum(n * part.lowest for part, n in zip(parts, counts, strict=True))
    last = first + sum(n * (len(part.mass) - 1) for part, n in zip(parts, counts, strict=True))
    lowest = max(first, math.floor(bounds[_ORDERS < 0].max()))
    return lowest, min(last, math.ceil(bounds[_ORDERS > 0].min()))


def _convolve(parts: Sequence[_Losses], counts: Sequence[int], lowest: int, highest: int) -> Floats:
    """The masses of the sum of all losses from ``lowest`` on, what lies outside wrapped around."""
    from scipy import fft

    size = fft.next_fast_len(highest - lowest + 1, real=True)
    spectrum: NDArray[np.complex128] = np.ones(size // 2 + 1, dtype=np.complex128)
    for part, count in zip(parts, counts, strict=True):
        rows = -(-len(part.mass) // size)
        wrapped = np.zeros(rows * size)
        wrapped[: len(part.mass)] = part.mass
        spectrum *= fft.rfft(wrapped.reshape(rows, size).sum(axis=0)) ** count
    start = sum(count * part.lowest for part, count in zip(parts, counts, strict=True))
    mass = np.roll(fft.irfft(spectrum, n=size), start - lowest)
    return np.maximum(mass, 0.0)


def _invert(mass: Floats, lowest: int, step: float, delta: float) -> float:
    """The smallest ε, at least 0, whose hockey-stick divergence is at most ``delta``."""
    if delta <= 0:
        return math.inf
    first = max(0, -lowest)  # losses below 0 never count for an ε of 0 or more
    mass, lowest = mass[first:], lowest + first
    decay = np.exp(-step * np.arange(len(mass) + 1))

    def sums(point: int) -> tuple[float, float]:
        above = mass[point:]
        return float(above.sum()), float(above @ decay[: len(above)])

    if not len(mass):
        return 0.0
    # The first grid point at which the divergence is at most delta, as it is at the last one.
    places = range(len(mass) - 1)
    high = bisect_left(places, True, key=lambda point: np.subtract(*sums(point)) <= delta)
    upper, lower = sums(high)
    if upper <= delta:
        return 0.0
    # Between two grid points the divergence is `upper - exp(ε - loss) lower`.
    return max(0.0, (lowest + high) * step + math.log((upper - delta) / lower))
