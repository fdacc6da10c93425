"""Simulated devices in this process, as a batched cohort or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privrec.device.cohort import Cohort
from privrec.device.device import Device
from privrec.device.round import Round, digest
from privrec.device.update import Aggregate, BoundedUpdate
from privrec.randomness import SecretRoot, rng_for
from privrec.secagg.ring import Encoding
from privrec.server.sampling import cohort

FloatArray = NDArray[np.float32]


@dataclass
class Simulation:
    """The devices of a data set, sampled and trained in this process.

    Args:
        devices: all of them.
        encoding: clip norm and grid.
        root: the devices' secret; cohorts and batches of devices have their own streams of it.
        seed: of the samples, and of cohorts where nothing is accounted.
        sampling_rate: chance of each device in a round.
        engine: ``"cohort"`` trains batches; ``"device"`` trains devices one at a time.
    """

    devices: Cohort
    encoding: Encoding
    root: SecretRoot
    seed: int
    sampling_rate: float
    engine: Literal["cohort", "device"] = "cohort"
    _before: tuple[int, NDArray[np.int64], FloatArray] | None = field(default=None, init=False)

    def collect(self, round: Round, weights: FloatArray) -> Aggregate:
        """See :meth:`privrec.transport.base.Transport.collect`."""
        users = self.sample(round)
        self._rewind(round.index, users)
        total = np.zeros(len(weights), np.int64)
        loss = 0.0
        for update, losses in self._answers(round, weights, users):
            update.add_to(total)
            loss += float(losses.sum(dtype=np.float64, where=np.isfinite(losses)))
        return Aggregate(total, len(users), loss / len(users) if len(users) else None)

    def sample(self, round: Round) -> NDArray[np.int64]:
        """The round's cohort, as sorted user indices.

        Promise: where privacy is accounted, the coins are secret and those of different attempts
        and runs independent, which amplification by sampling rests on. Without a guarantee they
        come from the seed, so that a run repeats.
        """
        population = len(self.devices.states)
        if round.event.is_private:
            coins = self.root.stream("cohort", *round.context).uint64(population)
        else:
            seeded = rng_for(self.seed, "cohort", round.index)
            coins = seeded.integers(0, 2**64, population, dtype=np.uint64)
        return cohort(coins, self.sampling_rate)

    def _rewind(self, index: int, users: NDArray[np.int64]) -> None:
        if self._before is not None and self._before[0] == index:
            self.devices.states[self._before[1]] = self._before[2]
        self._before = (index, users, self.devices.states[users])

    def _answers(
        self, round: Round, weights: FloatArray, users: NDArray[np.int64]
    ) -> Iterator[tuple[BoundedUpdate, FloatArray]]:
        """Bounded updates and losses, a batch at a time; the devices' states move on."""
        key = int(rng_for(self.seed, "samples", round.index).integers(2**63))
        if self.engine == "device":
            yield from self._one_by_one(round, weights, users, key)
            return
        for batch, trained in self.devices.train(weights, users, key):
            before = digest(self.devices.states[batch])
            coins = self.root.stream("rounding", *round.context, batch.tobytes(), before)
            self.devices.states[batch] = trained.states
            yield trained.update.bound(self.encoding, coins), trained.losses

    def _one_by_one(
        self, round: Round, weights: FloatArray, users: NDArray[np.int64], key: int
    ) -> Iterator[tuple[BoundedUpdate, FloatArray]]:
        devices = self.devices
        for user in users:
            history = devices.histories.select(np.array([user])).items
            own = devices.states[user].copy()
            device = Device(int(user), history, devices.trainer, self.encoding, self.root, own)
            trained = device.train(weights, key)
            yield device.protect(round, trained), trained.losses
            devices.states[user] = device.state
