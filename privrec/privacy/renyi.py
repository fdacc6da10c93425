"""Rényi divergences at whole orders: of Skellam noise, of Gaussian noise, sampled or not.

They bound ε where no privacy loss distribution is known: the worst shift of many coefficients under
Skellam noise is not, since its tails are heavier than a Gaussian's.

A sampled round compares ``(1 - q) P + q Q`` with ``P``, in both directions. Since the noise is
symmetric and the shift a whole vector, a reflection of the grid swaps ``P`` and ``Q``, and the
divergence of the mixture from ``P`` is the larger one (Mironov, Talwar & Zhang 2019, theorem 5).
Its moment of order α is ``Σ_k C(α, k) (1-q)^(α-k) q^k E_P[(Q/P)^k]``, whose terms the divergences
of the unsampled round bound.
Sources: Agarwal, Kairouz & Liu (2021), theorem 3.5, for Skellam noise; Canonne, Kamath & Steinke
(2020), proposition 12, for ε.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from privrec.privacy.closeness import Grid

ORDERS = (*range(2, 65), *range(68, 129, 4), *range(144, 513, 16))
_PLAIN = 1e-12


@dataclass(frozen=True)
class Part:
    """Identical rounds: Skellam noise on a grid, or Gaussian noise where there is none.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity, above 0.
        sampling_rate: probability with which each user is sampled, in (0, 1].
        count: how many of them, at least 1.
        grid: the grid of Skellam noise.
    """

    noise_multiplier: float
    sampling_rate: float
    count: int
    grid: Grid | None = None


def epsilon(parts: Sequence[Part], delta: float) -> float:
    """An upper bound on ε of a composition, by the best whole order.

    Args:
        parts: what is composed; the order does not matter.
        delta: in (0, 1).

    Returns:
        ε, at least 0; infinity when no order has a bound.
    """
    found = [
        divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in ORDERS
        if (divergence := sum(part.count * sampled(part, order) for part in parts)) < math.inf
    ]
    return max(0.0, min(found, default=math.inf))


@lru_cache(maxsize=4096)
def sampled(part: Part, order: int) -> float:
    """Rényi divergence of one round of a part, of a whole order of at least 2, from above."""
    whole, rate = plain(part, order), part.sampling_rate
    if rate >= 1 - _PLAIN or math.isinf(whole):
        return whole
    logs = [_log_term(part, order, k) for k in range(order + 1)]
    top = max(logs)
    moment = top + math.log(math.fsum(math.exp(log - top) for log in logs))
    return min(whole, moment / (order - 1))


def plain(part: Part, order: int) -> float:
    """The same without sampling."""
    gaussian = order / 2 / part.noise_multiplier / part.noise_multiplier
    return gaussian if part.grid is None else gaussian + _surcharge(part, part.grid, order)


def _surcharge(part: Part, grid: Grid, order: int) -> float:
    """What Skellam noise costs more than a Gaussian of its variance; infinity beyond the bound."""
    squared = grid.squared_sensitivity
    variance = part.noise_multiplier**2 * squared
    if order >= 1 + 2 * variance / math.sqrt(squared):
        return math.inf
    # Whole vectors of L2 norm B have an L1 norm of at most B² and of at most B √d.
    length = min(float(squared), math.sqrt(squared * grid.dimension))
    fine = ((2 * order - 1) * squared + 6 * length) / (4 * variance**2)
    return min(fine, 3 * length / (2 * variance))


def _log_term(part: Part, order: int, k: int) -> float:
    """Logarithm of the k-th term of the moment of the mixture."""
    rate = part.sampling_rate
    ways = math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
    weight = (order - k) * math.log1p(-rate) + k * math.log(rate)
    return ways + weight + ((k - 1) * plain(part, k) if k > 1 else 0.0)
