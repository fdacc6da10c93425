"""What it costs that small cohorts release nothing: the δ of rounds with distributed noise.

Central noise is added to any sum, also to that of nobody. Distributed noise is not there when
nobody is, so that a round with fewer than its fewest devices ends without a release. Who is
sampled depends on no history, and so neither does the end of a round, but it spoils the secrecy of
sampling a little: with exactly one device too few among the others, a release shows that the user
in question took part.

Fix the coins of all others. If enough of them are sampled in every band, the round is the sampled
mechanism as accounted; if two or more are missing, it never releases. There remains, for a band of
``N`` devices that needs ``n``, the case of ``n - 1`` others, of probability ``P[Bin(N-1, q) =
n-1]``, in which something is released with probability ``q``. The three cases have the same
probabilities for two neighbouring histories, so the case adds its ``q P[Bin(N-1, q) = n-1]``, which
is at most ``P[Bin(N, q) < n] max(1, q / (1-q))``, to δ, whatever ε is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privrec.errors import UsageError
from privrec.privacy.closeness import SMALL_COHORTS_SHARE


@dataclass(frozen=True)
class Crowd:
    """The devices of one band, and how many of them a round needs.

    Args:
        population: devices that hold the band and train, at least 0.
        least: fewest of them that a release needs, at least 1.
    """

    population: int
    least: int


def small_cohort(crowds: Sequence[Crowd], sampling_rate: float) -> float:
    """Probability that a round is called off, from above: that some band has too few devices.

    Args:
        crowds: the bands.
        sampling_rate: probability with which each device takes part, in (0, 1]; with drop-outs that
            depend on no history, that with which it takes part and stays.
    """
    return min(1.0, sum(_below(crowd, sampling_rate) for crowd in crowds))


def small_cohort_delta(crowds: Sequence[Crowd], sampling_rate: float, rounds: int) -> float:
    """What ``rounds`` rounds add to δ because small cohorts release nothing.

    Args:
        crowds: the bands.
        sampling_rate: as for :func:`small_cohort`.
        rounds: how many, at least 0.

    Returns:
        ``T · P[k < n]``, and ``q / (1 - q)`` times as much for ``q`` above one half; in [0, 1].
    """
    if sampling_rate == 1:
        return 0.0  # there is no secrecy of sampling to spoil
    odds = max(1.0, sampling_rate / (1 - sampling_rate))
    return min(1.0, rounds * odds * small_cohort(crowds, sampling_rate))


def check_small_cohorts(
    crowds: Sequence[Crowd], sampling_rate: float, rounds: int, delta: float
) -> float:
    """The δ that is left for the noise, when small cohorts are rare enough.

    Args:
        crowds: the bands.
        sampling_rate: as for :func:`small_cohort`.
        rounds: how many are planned.
        delta: the δ of the claim.

    Returns:
        ``delta`` less :func:`small_cohort_delta`; the δ to compute ε at.

    Raises:
        UsageError: when small cohorts would take more than a hundredth of δ, or a band has fewer
            devices than it needs.
    """
    for crowd in crowds:
        if crowd.population < crowd.least:
            raise UsageError(
                f"a band of {crowd.population} devices that needs {crowd.least} in a round: it "
                "would never release; lower the fewest devices of a round or add devices"
            )
    taken = small_cohort_delta(crowds, sampling_rate, rounds)
    if taken > SMALL_COHORTS_SHARE * delta:
        fewest = min(crowds, key=lambda crowd: crowd.population * sampling_rate / crowd.least)
        raise UsageError(
            f"{rounds} rounds at sampling_rate {sampling_rate}: too few of the {fewest.population} "
            f"devices of a band for its least, {fewest.least}, come together often enough to add "
            f"{taken:.1e} to delta, more than a hundredth of {delta:g}; raise the sampling rate or "
            "lower the fewest devices of a round"
        )
    return delta - taken


def _below(crowd: Crowd, rate: float) -> float:
    from scipy.special import bdtr

    if crowd.least > crowd.population:
        return 1.0
    return float(bdtr(crowd.least - 1, crowd.population, rate))
