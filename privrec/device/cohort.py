"""Many simulated devices as one batched tensor program: the fast path.

The same training code as one :class:`~privrec.device.device.Device`, on batches of devices of
similar history length. Padding and batching change float rounding alone: before integer encoding
the two agree to ``TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import Histories
from privrec.device.train import Trained, Trainer

TOLERANCE = 1e-5
"""Largest difference from the one-device code, relative to the update's largest coefficient."""

SAMPLES_IN_BATCH = 12288
"""Samples trained at once, so that a batch's tensors stay in a core's cache."""

SHARED_SAMPLES_IN_BATCH = 65536
"""The same where all devices look at the whole catalogue, whose part of the work they share."""

FloatArray = NDArray[np.float32]


@dataclass
class Cohort:
    """All simulated devices: their histories and private states, by user.

    Args:
        trainer: local training.
        histories: of every user, in the order of their indices.
        states: private states, shape ``(users, user_dim)``; changed by whoever runs a round.
    """

    trainer: Trainer
    histories: Histories
    states: FloatArray

    @classmethod
    def of(cls, trainer: Trainer, indptr: NDArray[np.int64], items: NDArray[np.int32]) -> Cohort:
        """New devices, with private states of zeros."""
        users = len(indptr) - 1
        states = np.zeros((users, trainer.recommender.model.user_dim), np.float32)
        return cls(trainer, Histories(np.arange(users), indptr, items), states)

    def train(
        self, weights: FloatArray, users: NDArray[np.int64], key: int
    ) -> Iterator[tuple[NDArray[np.int64], Trained]]:
        """One round's local training of ``users``, batch by batch; states are left unchanged."""
        for batch in self.batches(users):
            histories, states = self.histories.select(batch), self.states[batch]
            yield batch, self.trainer.train(weights, histories, states, key)

    def serve(self, weights: FloatArray, users: NDArray[np.int64], key: int) -> FloatArray:
        """Private states fitted from nothing to fixed items, shape ``(len(users), user_dim)``."""
        fitted = np.zeros((len(self.states), self.states.shape[1]), np.float32)
        for batch in self.batches(users):
            fitted[batch] = self.trainer.serve(weights, self.histories.select(batch), key)
        return fitted[users]

    def batches(self, users: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """``users`` by length of history, cut where a padded batch would outgrow the cache."""
        lengths = self.histories.lengths[users]
        order = np.argsort(lengths, kind="stable")
        sampler = self.trainer.sampler
        most = SHARED_SAMPLES_IN_BATCH if sampler.whole else SAMPLES_IN_BATCH
        widths = sampler.width(lengths[order])
        start = 0
        while start < len(order):
            # Sorted by length, the last device of a batch sets its width.
            ahead = widths[start : start + most]
            padded = ahead * np.arange(1, len(ahead) + 1)
            size = max(1, int(np.searchsorted(padded, most, side="right")))
            yield users[order[start : start + size]]
            start += size
