"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cohort(coins: NDArray[np.uint64], sampling_rate: float) -> NDArray[np.int64]:
    """The users whose coin came up: Poisson sampling, each user by itself.

    The accounted amplification holds for exactly this law: the size is random, may be zero, and is
    never forced or drawn again. It also needs coins that no recipient knows and that no two
    attempts share. At a rate of 1 everybody takes part.

    Args:
        coins: a uniform 64-bit word for each user.
        sampling_rate: chance of each user, in (0, 1].

    Returns:
        Sorted user indices.
    """
    if sampling_rate >= 1:
        return np.arange(len(coins))
    return np.flatnonzero(coins < np.uint64(int(sampling_rate * 2**64)))
