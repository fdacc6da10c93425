"""Lower bounds on ε from what an attacker guessed right about canaries.

A canary is a user whose whole update the auditor chooses. Whoever can tell canaries that took part
from canaries that did not shows that ε is at least so much; no attack shows that it is not more.

**One run** (Steinke, Nasr & Jagielski, "Privacy Auditing with One (1) Training Run", 2023,
theorem 5.2). Each of ``m`` canaries takes part with probability one half, independently. Of ``r``
guesses ``v`` are right. Under (ε, δ) privacy the right ones are stochastically dominated by
``Binomial(r, 1 / (1 + exp(-ε)))``, up to an addition of at most ``2 m δ α``. The bound holds for
every attack and every distribution.

**One shot** (Andrew et al., "One-shot Empirical Privacy Estimation for Federated Learning", 2023).
Canaries are random directions, and the cosine of each with what was released is Gaussian with a
variance known in advance where the canary took no part. What the canaries that took part show is
fitted by a Gaussian, and ε is that of telling the two apart. It is sharper, and an estimate: it
holds as far as the cosines are Gaussian, which high dimensions make them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privrec.errors import UsageError
from privrec.privacy.accountant import gaussian

LARGEST = 100.0
"""Bounds stop here: no number of canaries that fits a machine shows more."""


@dataclass(frozen=True)
class Guesses:
    """What an attacker achieved in one run.

    Args:
        canaries: ``m``, each of which took part with probability one half, at least 1.
        made: ``r``, guesses that were made; about the others the attacker abstained.
        right: ``v`` of them.

    Raises:
        UsageError: when ``right <= made <= canaries`` does not hold.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.canaries < 1:
            raise UsageError(
                f"{self.right} of {self.made} guesses right about {self.canaries} canaries: there "
                "must be at least one canary, a guess at most about each, and no more right ones"
            )

    @classmethod
    def of(cls, scores: NDArray[np.float64], present: NDArray[np.bool_], made: int) -> Guesses:
        """Guess "present" of the highest scores and "absent" of the lowest, half of ``made`` each.

        Args:
            scores: of each canary, shape ``(m,)``; larger ones speak for its presence.
            present: which canaries took part, shape ``(m,)``.
            made: how many guesses, chosen before the scores were seen; an odd one is left out.
        """
        half = min(made, len(scores)) // 2
        order = np.argsort(scores, kind="stable")
        right = int(present[order[len(order) - half :]].sum()) + int((~present[order[:half]]).sum())
        return cls(len(scores), 2 * half, right)

    def p_value(self, epsilon: float, delta: float) -> float:
        """Probability of at least so many right guesses under (ε, δ) privacy, from above."""
        if not self.made:
            return 1.0
        chance = 1 / (1 + math.exp(-epsilon))
        beta = float(stats.binom.sf(self.right - 1, self.made, chance))
        below = stats.binom.pmf(np.arange(self.right - 1, -1, -1), self.made, chance)
        alpha = float((np.cumsum(below) / np.arange(1, self.right + 1)).max(initial=0.0))
        return min(1.0, beta + 2 * self.canaries * delta * alpha)

    def chance(self, strength: float) -> float:
        """Probability of at least so many right guesses, if scores are what noise makes of them.

        Args:
            strength: separation of the scores of canaries with and without part, in standard
                deviations of either, both of them Gaussian.

        Returns:
            An upper bound but for events as rare as six standard deviations: the guesses are taken
            to be about the outermost scores that chance may have left.
        """
        half = self.made / 2
        if not half:
            return 1.0
        tail = half / self.canaries * max(0.1, 1 - 6 / math.sqrt(half))
        return float(stats.binom.sf(self.right - 1, self.made, _accuracy(tail, strength)))

    def lower_bound(self, delta: float, confidence: float) -> float:
        """The largest ε that is refuted with this confidence; 0 when none is.

        Args:
            delta: the δ of the claim that is tested.
            confidence: in (0, 1).
        """
        if self.p_value(0.0, delta) > 1 - confidence:
            return 0.0
        low, high = 0.0, LARGEST
        while high - low > 1e-4:
            middle = (low + high) / 2
            refuted = self.p_value(middle, delta) <= 1 - confidence
            low, high = (middle, high) if refuted else (low, middle)
        return low


def best_guesses(canaries: int, strength: float, delta: float, confidence: float) -> int:
    """How many guesses promise the highest bound, from what is claimed and from nothing else.

    Args:
        canaries: how many there are.
        strength: separation of the scores of canaries with and without part, in standard
            deviations of either.
        delta: the δ of the claim.
        confidence: of the bound.

    Returns:
        An even number of at most ``canaries``.
    """
    best, found = 0, -1.0
    for share in np.geomspace(max(1e-3, 2 / canaries), 1.0, 24):
        made = 2 * max(1, round(share * canaries / 2))
        right = math.floor(made * _accuracy(made / canaries / 2, strength))
        bound = Guesses(max(canaries, made), made, right).lower_bound(delta, confidence)
        if bound >= found and made <= canaries:
            best, found = made, bound
    return best


def _accuracy(tail: float, strength: float) -> float:
    """Share of right guesses on one tail of the mixture of two Gaussians."""
    reach = 10 + strength
    at = np.linspace(-reach, reach, 8001)
    above = (stats.norm.sf(at - strength / 2) + stats.norm.sf(at + strength / 2)) / 2
    threshold = at[int(np.searchsorted(-above, -min(tail, 0.5)))]
    own = float(stats.norm.sf(threshold - strength / 2))
    other = float(stats.norm.sf(threshold + strength / 2))
    return own / (own + other) if own + other else 1.0


@dataclass(frozen=True)
class Separation:
    """How far the cosines of canaries that took part lie from those of canaries that did not.

    Args:
        estimate: in standard deviations.
        least: the same from below, with the confidence that was asked for.
    """

    estimate: float
    least: float

    def epsilon(self, delta: float) -> float:
        """ε of two Gaussians that far apart."""
        return gaussian(self.estimate, delta) if self.estimate > 0 else 0.0

    def lower_bound(self, delta: float) -> float:
        """ε of two Gaussians as far apart as is certain with the confidence asked for."""
        return gaussian(self.least, delta) if self.least > 0 else 0.0


def separation(cosines: Sequence[float], dimension: int, confidence: float) -> Separation:
    """The Gaussian fit of the one-shot estimate.

    Args:
        cosines: of each canary with what was released, at least 2.
        dimension: coefficients of what was released; without its canary a cosine has a variance
            of ``1 / dimension``.
        confidence: of the bound from below.

    Returns:
        The mean over the larger of the two deviations, so that a spread that has other reasons
        than noise is never taken for privacy lost.
    """
    values = np.asarray(cosines, np.float64)
    if len(values) < 2 or dimension < 1:
        raise UsageError(
            f"{len(values)} cosines in {dimension} dimensions: the fit needs two canaries or more"
        )
    mean, own = float(values.mean()), float(values.std(ddof=1))
    deviation = max(own, 1 / math.sqrt(dimension))
    margin = float(stats.t.ppf(confidence, len(values) - 1)) * own / math.sqrt(len(values))
    return Separation(mean / deviation, (mean - margin) / deviation)
