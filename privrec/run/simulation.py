"""Devices that are simulated in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privrec.device.device import Cohort, Deferred, Device, Draws
from privrec.device.tier import Federation, LocalModel, Tier
from privrec.device.update import Aggregate, BoundedUpdate, Protection, Round, digest
from privrec.randomness import SecretRoot, rng_for
from privrec.run.summing import SUMMING, Enrolled, Participant
from privrec.secagg.messages import Stage


def cohort(coins: NDArray[np.uint64], sampling_rate: float) -> NDArray[np.int64]:
    """Sample the users whose coin came up: Poisson sampling, each user by itself.

    The accounted amplification holds for exactly this law: the size is random, may be zero, and is
    never forced or drawn again. It also needs coins that no recipient knows and that no two
    attempts share, a uniform 64-bit word for each user. At a rate of 1 everybody takes part.

    Returns:
        Sorted user indices.
    """
    if sampling_rate >= 1:
        return np.arange(len(coins))
    return np.flatnonzero(coins < np.uint64(int(sampling_rate * 2**64)))


FloatArray = NDArray[np.float32]
Rows = list[NDArray[np.int64]]
Answers = tuple[NDArray[np.int64], BoundedUpdate, FloatArray]
_EXCHANGES = (Stage.SHARES, Stage.MASKED, Stage.CONFIRM, Stage.UNMASK)


@dataclass
class Simulation:
    """The devices of a data set, sampled and trained in this process.

    Attributes:
        cohorts: the devices of each tier.
        population: how many there are, those that hold nothing included.
        enrolled: the devices' secret, of which cohorts and batches of devices have their own
            streams, and their keys.
        seed: of the samples, and of cohorts where nothing is accounted.
        dropout_rate: chance of each device of a cohort to fall silent in one of the exchanges.
        engine: ``"cohort"`` trains batches; ``"device"`` trains devices one at a time.
        secure_sum: ``"exact"`` adds integers; ``"full"`` runs the protocol, for the same sum.
        deferred: noise between local steps since this object was made, which is private.
    """

    federation: Federation
    cohorts: tuple[Cohort[Any], ...]
    population: int
    protection: Protection
    enrolled: Enrolled
    seed: int
    sampling_rate: float
    dropout_rate: float = 0.0
    engine: Literal["cohort", "device"] = "cohort"
    secure_sum: Literal["exact", "full"] = "exact"
    deferred: Deferred = field(default_factory=Deferred, init=False)
    _before: tuple[int, Rows, list[FloatArray]] | None = field(default=None, init=False)

    @property
    def root(self) -> SecretRoot:
        """The devices' secret."""
        return self.enrolled.root

    @property
    def states(self) -> tuple[FloatArray, ...]:
        """Private states of the devices, by tier."""
        return tuple(cohort.states for cohort in self.cohorts)

    @property
    def absent(self) -> NDArray[np.int64]:
        """Users whose devices hold nothing and take no part."""
        members = np.concatenate([cohort.users for cohort in self.cohorts])
        return np.setdiff1d(np.arange(self.population), members)

    def collect(self, round: Round, weights: FloatArray) -> Aggregate:
        """See :meth:`privrec.run.loop.Transport.collect`."""
        rows = self.rows(self.sample(round))
        self._rewind(round.index, rows)
        cohort, loss = self._participants(round, rows), 0.0
        made = SUMMING[self.secure_sum]
        summing = made(round, self.federation, self.protection, cohort, self.enrolled)
        left = self.rows(np.array([p.user for p in cohort if p.survives], np.int64))
        for tier, mine in zip(self.federation.tiers, left, strict=True):
            for users, update, losses in self.answers(round, weights, tier, mine):
                summing.add(tier, users, update)
                loss += float(losses.sum(dtype=np.float64, where=np.isfinite(losses)))
        size = sum(map(len, left))
        return Aggregate(summing.total(), len(cohort), loss / size if size else None)

    def sample(self, round: Round) -> NDArray[np.int64]:
        """Sample the round's cohort, as sorted user indices.

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
        """Return those of the users whose tier trains, as rows of each tier's cohort."""
        chosen = np.zeros(self.population, np.bool_)
        chosen[users] = True
        return [
            np.flatnonzero(chosen[cohort.users] & (tier.weight > 0))
            for tier, cohort in zip(self.federation.tiers, self.cohorts, strict=True)
        ]

    def _participants(self, round: Round, rows: Rows) -> list[Participant]:
        """The round's cohort, with the exchange at which each device leaves, if it does."""
        users = [cohort.users[mine] for cohort, mine in zip(self.cohorts, rows, strict=True)]
        leaves = np.full(self.population, Stage.DONE)
        if self.dropout_rate:
            coins = self.root.stream("dropouts", *round.context).uint64(self.population)
            chance = coins * 2.0**-64 / self.dropout_rate  # in units of the rate: uniform below 1
            leaves = np.where(chance < 1, (chance * len(_EXCHANGES)).astype(int), Stage.DONE)
        return [
            Participant(user, tier, Stage(leaves[user]))
            for tier, mine in zip(self.federation.tiers, users, strict=True)
            for user in mine.tolist()
        ]

    def _rewind(self, index: int, rows: Rows) -> None:
        if self._before is not None and self._before[0] == index:
            for cohort, mine, states in zip(self.cohorts, *self._before[1:], strict=True):
                cohort.states[mine] = states
        before = [c.states[mine] for c, mine in zip(self.cohorts, rows, strict=True)]
        self._before = (index, rows, before)

    def answers(
        self, round: Round, weights: FloatArray, tier: Tier, rows: NDArray[np.int64]
    ) -> Iterator[Answers]:
        """Make what ``rows`` of a tier put into the sum, by batch; their private states move on.

        Yields:
            Users, their bounded updates and their losses, which nobody outside a simulation sees.
        """
        if not len(rows):
            return
        key = int(rng_for(self.seed, "samples", round.index).integers(2**63))
        cohort, view = self.cohorts[tier.index], tier.view(self.federation.prefix(weights, tier))
        if self.engine == "device":
            yield from self._one_by_one(round, view, tier, rows, key)
            return
        for batch, trained in cohort.train(view, rows, Draws.of(self.root, round, key)):
            self.deferred += trained.deferred
            before, users = digest(cohort.states[batch]), cohort.users[batch]
            coins = self.root.stream("rounding", *round.context, users.tobytes(), before)
            cohort.states[batch] = trained.states
            update, held = tier.lift(trained.update), self.federation.layouts_of(tier)
            bounded = update.bound(self.protection, round, held, coins, tier.weight)
            yield users, bounded, trained.losses

    def _one_by_one(
        self, round: Round, view: FloatArray, tier: Tier, rows: NDArray[np.int64], key: int
    ) -> Iterator[Answers]:
        cohort, draws = self.cohorts[tier.index], Draws.of(self.root, round, key)
        model = LocalModel(cohort.learner.view, view)
        for row in rows.tolist():
            user, data, state = int(cohort.users[row]), cohort.data.of(row), cohort.states[row]
            keeps = cohort.learner, self.protection, self.root, state.copy()
            device = Device(user, data, tier, self.federation.layouts_of(tier), *keeps)
            trained = device.train(model, draws)
            self.deferred += trained.deferred
            yield cohort.users[[row]], device.protect(round, trained), trained.losses
            cohort.states[row] = device.state
