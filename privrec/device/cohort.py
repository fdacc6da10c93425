"""Many simulated devices as one batched tensor program: the fast path.

The same training code as one :class:`~privrec.device.device.Device`, on batches of devices of
similar history length. Padding and batching change float rounding alone: before integer encoding
the two agree to ``TOLERANCE``, except where a rectifier's input lies within rounding of zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import Histories
from privrec.device.examples import NoiseRoots
from privrec.device.negatives import Functions
from privrec.device.train import Trained, Trainer
from privrec.search.select import Search

TOLERANCE = 1e-5
"""Largest difference from the one-device code, relative to the update's largest coefficient."""

SAMPLES_IN_BATCH = 12288
"""Samples trained at once, so that a batch's tensors stay in a core's cache."""

SHARED_SAMPLES_IN_BATCH = 65536
"""The same where all devices look at the whole catalogue, whose part of the work they share."""

COEFFICIENTS_IN_BATCH = 1 << 20
"""Coefficients of the updates made at once where every device's update has noise everywhere."""

MANY = 16
"""Devices from which on a simulation gathers the rows that they search once for all of them."""

FloatArray = NDArray[np.float32]


class Learners(Protocol):
    """The devices of one tier as a simulation knows them, whatever they learn."""

    states: FloatArray

    @property
    def users(self) -> NDArray[np.int64]:
        """Whose devices they are, ascending."""
        ...

    def train(
        self,
        weights: FloatArray,
        rows: NDArray[np.int64],
        key: int,
        functions: Functions,
        noise: NoiseRoots,
    ) -> Iterator[tuple[NDArray[np.int64], Trained]]:
        """One round's local training of ``rows``, some at a time; states are left unchanged.

        Args:
            weights: the tier's vector in memory form.
            rows: places in :attr:`users`, ascending.
            key: the round's key, which decides what is drawn by chance and is no secret.
            functions: the devices' secret streams, by user.
            noise: the devices' secret roots of noise between their own steps, by user.
        """
        ...


@dataclass
class Cohort:
    """Simulated devices of one tier: their histories and private states, row by row.

    Args:
        trainer: local training.
        histories: of the devices, in ascending order of their users.
        states: private states, shape ``(devices, user_dim)``; changed by whoever runs a round.
    """

    trainer: Trainer
    histories: Histories
    states: FloatArray

    @classmethod
    def of(cls, trainer: Trainer, histories: Histories) -> Cohort:
        """New devices, with private states of zeros, of what they can hold of their histories."""
        held = histories.below(trainer.recommender.vectors.items)
        user_dim = trainer.recommender.model.user_dim
        return cls(trainer, held, np.zeros((len(held.users), user_dim), np.float32))

    @property
    def users(self) -> NDArray[np.int64]:
        """Whose devices they are, ascending."""
        return self.histories.users

    def train(
        self,
        weights: FloatArray,
        rows: NDArray[np.int64],
        key: int,
        functions: Functions | None = None,
        noise: NoiseRoots | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], Trained]]:
        """See :meth:`Learners.train`."""
        trainer = self.trainer
        unobserved, search = trainer.unobserved(weights), self._search(weights, trainer)
        for batch in self.batches(rows, trainer):
            histories, states = self.histories.select(batch), self.states[batch]
            yield (
                batch,
                trainer.train(
                    weights, histories, states, key, unobserved, search, functions, noise
                ),
            )

    def serve(
        self, weights: FloatArray, key: int, functions: Functions | None = None
    ) -> FloatArray:
        """Private states of all devices fitted from nothing to fixed items, as ``states``."""
        fitted, trainer = np.zeros_like(self.states), self.trainer
        unobserved, search = trainer.unobserved(weights), self._search(weights, trainer.serving)
        for batch in self.batches(np.arange(len(fitted)), trainer.serving):
            mine = self.histories.select(batch)
            fitted[batch] = trainer.serve(weights, mine, key, unobserved, search, functions)
        return fitted

    def _search(self, weights: FloatArray, trainer: Trainer) -> Search | None:
        return trainer.search(weights, resident=len(self.states) >= MANY)

    def batches(self, rows: NDArray[np.int64], trainer: Trainer) -> Iterator[NDArray[np.int64]]:
        """``rows`` by length of history, cut where a padded batch would outgrow the cache."""
        lengths = self.histories.lengths[rows]
        order = np.argsort(lengths, kind="stable")
        sampler = trainer.sampler
        most = SHARED_SAMPLES_IN_BATCH if sampler.whole else SAMPLES_IN_BATCH
        widths = sampler.width(lengths[order])
        if trainer.examples is not None:
            # Each device's update is as long as the vector, and its noise is what takes the time.
            most = COEFFICIENTS_IN_BATCH
            widths = np.full_like(widths, trainer.recommender.layout.size)
        start = 0
        while start < len(order):
            # Sorted by length, the last device of a batch sets its width.
            ahead = widths[start : start + most]
            padded = ahead * np.arange(1, len(ahead) + 1)
            size = max(1, int(np.searchsorted(padded, most, side="right")))
            yield rows[order[start : start + size]]
            start += size
