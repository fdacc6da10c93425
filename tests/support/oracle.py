"""The best that anyone can do on synthetic interactions, computed from what generated them.

The last item of a history is drawn, given the earlier ones, from the planted weights over the items
not yet seen: ranking by them is the best possible, and its expected hit ratio is a sum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privrec.data import Planted, Split

Items = NDArray[np.integer]


def oracle_of(made: Planted) -> Callable[[Items, Items | None], NDArray[np.float32]]:
    """The best possible scores, as :func:`privrec.evaluate.metrics.evaluate` takes them."""

    def scores(users: Items, candidates: Items | None) -> NDArray[np.float32]:
        weights = made.weights(users)
        if candidates is not None:
            weights = np.take_along_axis(weights, np.asarray(candidates), axis=1)
        return weights.astype(np.float32)

    return scores


def expected_hr(made: Planted, split: Split, k: int) -> float:
    """The hit ratio at ``k`` in full ranking that no recommender can exceed in expectation.

    The oracle reaches it in expectation over the held-out items, given ``train``, of a ``test``
    split by :func:`~privrec.data.interactions.leave_last_out` (of ``validation`` it holds only
    nearly, since the number of items drawn after is not accounted for).
    """
    tested = np.flatnonzero(split.heldout.counts)
    weights = made.weights(tested)
    weights[split.train.rows_of(tested)] = 0.0
    best = -np.partition(-weights, min(k, weights.shape[1]) - 1, axis=1)[:, :k]
    return float((best.sum(axis=1) / weights.sum(axis=1)).mean())
