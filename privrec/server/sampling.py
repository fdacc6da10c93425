"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privrec.randomness import rng_for


def cohort(seed: int, index: int, population: int, sampling_rate: float) -> NDArray[np.int64]:
    """The simulated cohort of a round: each user by a coin of its own (Poisson sampling).

    The accounted amplification holds for exactly this law: the size is random, may be zero, and is
    never forced or drawn again. At a rate of 1 everybody takes part. In simulation the coins come
    from the named seed; they decide no secret.

    Args:
        seed: the run's seed.
        index: the round.
        population: number of users.
        sampling_rate: chance of each user, in (0, 1].

    Returns:
        Sorted user indices.
    """
    if sampling_rate >= 1:
        return np.arange(population)
    coins = rng_for(seed, "cohort", index).random(population)
    return np.flatnonzero(coins < sampling_rate)
