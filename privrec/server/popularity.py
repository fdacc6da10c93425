"""Item biases from a released popularity: the first thing that a private federation can learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.subspace import Subspace


def log_popularity(
    biases: Subspace, counts: NDArray[np.float64], floor: float
) -> NDArray[np.float32]:
    """Log shares of the items as a bias memory; post-processing of a noisy sum.

    With them as biases, a softmax over the catalogue starts at the popularity itself, and user
    vectors need only say how a user differs from everybody.

    Args:
        biases: where item biases lie, without signs.
        counts: the released sum over bias slots, in votes (a device's whole history is one vote).
        floor: votes below which a count is noise, above 0; smaller ones are raised to it.

    Returns:
        float32 of shape ``(slots,)``; colliding items share a count.
    """
    items = np.arange(biases.items)
    votes = biases.gather(counts.astype(np.float32)[:, None], items)[:, 0]
    logs = np.log(np.maximum(votes, floor))
    logs -= np.logaddexp.reduce(logs)
    memory = np.zeros((biases.slots, 1), np.float32)
    biases.scatter_add(memory, items, logs.astype(np.float32)[:, None])
    shared = np.bincount(biases.locate(items)[0].ravel(), minlength=biases.slots)
    result: NDArray[np.float32] = memory[:, 0] / np.maximum(shared, 1).astype(np.float32)
    return result
