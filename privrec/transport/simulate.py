"""Simulated devices in this process, as batched cohorts or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privrec.device.cohort import Cohort
from privrec.device.device import Device, hash_functions
from privrec.device.round import Round, digest
from privrec.device.tier import Federation, Tier
from privrec.device.update import Aggregate, BoundedUpdate
from privrec.randomness import SecretRoot, rng_for
from privrec.secagg.ring import Encoding
from privrec.server.sampling import cohort

FloatArray = NDArray[np.float32]
Rows = list[NDArray[np.int64]]


@dataclass
class Simulation:
    """The devices of a data set, sampled and trained in this process.

    Args:
        federation: the tiers.
        cohorts: the devices of each tier.
        population: all devices, those that hold nothing included.
        encoding: clip norm and grid.
        root: the devices' secret; cohorts and batches of devices have their own streams of it.
        seed: of the samples, and of cohorts where nothing is accounted.
        sampling_rate: chance of each device in a round.
        engine: ``"cohort"`` trains batches; ``"device"`` trains devices one at a time.
    """

    federation: Federation
    cohorts: tuple[Cohort, ...]
    population: int
    encoding: Encoding
    root: SecretRoot
    seed: int
    sampling_rate: float
    engine: Literal["cohort", "device"] = "cohort"
    _before: tuple[int, Rows, list[FloatArray]] | None = field(default=None, init=False)

    @property
    def absent(self) -> NDArray[np.int64]:
        """Users whose devices hold nothing and take no part."""
        members = np.concatenate([cohort.histories.users for cohort in self.cohorts])
        return np.setdiff1d(np.arange(self.population), members)

    def collect(self, round: Round, weights: FloatArray) -> Aggregate:
        """See :meth:`privrec.transport.base.Transport.collect`."""
        rows = self.rows(self.sample(round))
        self._rewind(round.index, rows)
        total = np.zeros(len(weights), np.int64)
        loss, layout = 0.0, self.federation.layout
        for tier, mine in zip(self.federation.tiers, rows, strict=True):
            for update, losses in self._answers(round, weights, tier, mine):
                update.add_to(total, layout)
                loss += float(losses.sum(dtype=np.float64, where=np.isfinite(losses)))
        size = sum(map(len, rows))
        return Aggregate(total, size, loss / size if size else None)

    def sample(self, round: Round) -> NDArray[np.int64]:
        """The round's cohort, as sorted user indices.

        Promise: where privacy is accounted, the coins are secret and those of different attempts
        and runs independent, which amplification by sampling rests on. Without a guarantee they
        come from the seed, so that a run repeats.
        """
        if round.event.is_private:
            coins = self.root.stream("cohort", *round.context).uint64(self.population)
        else:
            seeded = rng_for(self.seed, "cohort", round.index)
            coins = seeded.integers(0, 2**64, self.population, dtype=np.uint64)
        return cohort(coins, self.sampling_rate)

    def rows(self, users: NDArray[np.int64]) -> Rows:
        """Those of the users whose tier trains, as rows of each tier's cohort."""
        chosen = np.zeros(self.population, np.bool_)
        chosen[users] = True
        return [
            np.flatnonzero(chosen[cohort.histories.users] & (tier.weight > 0))
            for tier, cohort in zip(self.federation.tiers, self.cohorts, strict=True)
        ]

    def _rewind(self, index: int, rows: Rows) -> None:
        if self._before is not None and self._before[0] == index:
            for cohort, mine, states in zip(self.cohorts, *self._before[1:], strict=True):
                cohort.states[mine] = states
        before = [c.states[mine] for c, mine in zip(self.cohorts, rows, strict=True)]
        self._before = (index, rows, before)

    def _answers(
        self, round: Round, weights: FloatArray, tier: Tier, rows: NDArray[np.int64]
    ) -> Iterator[tuple[BoundedUpdate, FloatArray]]:
        """Bounded updates and losses, a batch at a time; the devices' states move on."""
        if not len(rows):
            return
        key = int(rng_for(self.seed, "samples", round.index).integers(2**63))
        cohort, view = self.cohorts[tier.index], tier.view(self.federation.prefix(weights, tier))
        if self.engine == "device":
            yield from self._one_by_one(round, view, tier, rows, key)
            return
        for batch, trained in cohort.train(view, rows, key, hash_functions(self.root, round)):
            before, users = digest(cohort.states[batch]), cohort.histories.users[batch]
            coins = self.root.stream("rounding", *round.context, users.tobytes(), before)
            cohort.states[batch] = trained.states
            update = tier.lift(trained.update)
            yield update.bound(self.encoding, coins, tier.weight), trained.losses

    def _one_by_one(
        self, round: Round, view: FloatArray, tier: Tier, rows: NDArray[np.int64], key: int
    ) -> Iterator[tuple[BoundedUpdate, FloatArray]]:
        cohort = self.cohorts[tier.index]
        unobserved = cohort.trainer.unobserved(view)
        for row in rows:
            mine = cohort.histories.select(np.array([row]))
            device = Device(
                int(mine.users[0]), mine.items, tier, self.federation.weaker(tier),
                cohort.trainer, self.encoding, self.root, cohort.states[row].copy(),
            )  # fmt: skip
            trained = device.train(view, key, unobserved, device.functions(round))
            yield device.protect(round, trained), trained.losses
            cohort.states[row] = device.state
