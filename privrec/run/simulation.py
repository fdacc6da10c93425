"""Devices that are simulated in this process, and how their updates become a sum.

The sum is taken as plain integers or by the whole protocol. Both take the same integers and the
same noise, so that both give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privrec.device.device import Cohort, Deferred, Device, Draws
from privrec.device.local import LocalModel
from privrec.device.tier import Federation, Tier
from privrec.device.update import Aggregate, BoundedUpdate, Protection, Round, SideSum, digest
from privrec.errors import ReleaseRefused
from privrec.models.layout import Layout, from_wire
from privrec.privacy.mechanism import Shares, noise_seeds
from privrec.randomness import SecretRoot, rng_for
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import DeviceKey, PrekeyBook
from privrec.secagg.messages import Stage
from privrec.secagg.roster import ListedDevices
from privrec.secagg.server import SecureSum, ServerSession
from privrec.secagg.sharing import Graph
from privrec.workers import Take, Workers, shared

FloatArray = NDArray[np.float32]
Integers = NDArray[np.int64]
Rows = list[NDArray[np.int64]]
Answers = tuple[NDArray[np.int64], BoundedUpdate, FloatArray]
_EXCHANGES = (Stage.SHARES, Stage.MASKED, Stage.CONFIRM, Stage.UNMASK)
_AT_ONCE = 4096  # devices whose part in a side sum is made at once

# --------------------------------------------------------------------------- sums


@dataclass(frozen=True)
class Participant:
    """A device of a round's cohort, by the number of its tier; it answers until it ``leaves``."""

    user: int
    tier: int
    leaves: Stage = Stage.DONE

    @property
    def survives(self) -> bool:
        """Whether its update is in the sum."""
        return self.leaves > Stage.MASKED


@dataclass
class Enrolled:
    """The simulated devices as the protocol knows them: their secret and their keys."""

    root: SecretRoot
    policy: Policy
    _books: dict[int, PrekeyBook] = field(default_factory=dict, init=False)

    def book(self, user: int) -> PrekeyBook:
        """The keys of one device."""
        if user not in self._books:
            self._books[user] = PrekeyBook(DeviceKey.derive(self.root, "user", user), self.root)
        return self._books[user]

    def identity(self, user: int) -> bytes:
        """The public key that a device is known by."""
        return self.book(user).key.public


@dataclass
class Summing(ABC):
    """One round's sum in the making, which is refused when too few devices answer.

    ``layouts`` are those of all tiers, the strongest first. The order of identities decides whose
    noise is taken off.
    """

    round: Round
    layouts: tuple[Layout, ...]
    protection: Protection
    cohort: Sequence[Participant]
    enrolled: Enrolled

    @abstractmethod
    def __post_init__(self) -> None:
        """Go up to where updates are due."""

    @abstractmethod
    def add(self, tier: int, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        """Put in the updates of survivors of a tier, in the order of ``users``."""

    @abstractmethod
    def total(self) -> Integers:
        """The sum over all survivors, in the layout of the shared vector."""

    def bands(self, device: Participant) -> int:
        """How many bands a device holds, from the one that all hold."""
        return len(self.layouts) - device.tier


class Plain(Summing):
    """The sum of the same integers without masks: fast, and no secret to the server.

    Rounds end without a sum as they do in the protocol when too few devices are left. Not looked at
    are neighbourhoods of the sparse graph, in which a device may miss more than in the whole.
    """

    def __post_init__(self) -> None:
        self._sum, self._has_noise = np.zeros(self.layouts[0].size, np.int64), False
        if self.protection.shares is not None:
            self.protection.shares.prepare()  # here, or each worker of each round would do it
        if self.protection.minimums:
            self._check_turnout()

    def add(self, tier: int, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        update.add_to(self._sum, self.layouts[0])

    def part(self, take: Take = enumerate) -> Integers:
        """What was added here, and the noise of survivors, who are shared out."""
        if self.protection.shares is not None:
            noise = self._noise(self.protection.shares, take)
            self._sum += from_wire(noise, self.layouts)
        return self._sum

    def gather(self, parts: Sequence[Integers]) -> None:
        """Put together what all workers had; with that the noise of all survivors is in."""
        self._sum, self._has_noise = np.sum(parts, axis=0), True

    def total(self) -> Integers:
        if not self._has_noise:
            self.gather([self.part()])
        ring = self.protection.ring
        return ring.leave(ring.enter(self._sum))

    def _check_turnout(self) -> None:
        quorum, bands = Graph().quorum(len(self.cohort)), range(len(self.layouts))
        for stage in _EXCHANGES:
            held = [self.bands(p) for p in self.cohort if p.leaves > stage]
            counts = [sum(each > band for each in held) for band in bands]
            # Once survivors are confirmed, only as many are needed as give secrets back.
            least = self.protection.minimums if stage < Stage.UNMASK else (0 for _ in bands)
            if len(held) < quorum or any(c < few for c, few in zip(counts, least, strict=True)):
                raise ReleaseRefused(
                    "too few devices are left of a round's cohort, or of a band's holders; the "
                    "round ends without a sum, and stays charged"
                )

    def _noise(self, shares: Shares, take: Take) -> Integers:
        """Those taken of the shares that are left in the sum, in the order of the wire."""
        root, context = self.enrolled.root, self.round.context
        survivors = [p for p in self.cohort if p.survives]
        if shares.remove_excess:
            survivors.sort(key=lambda each: self.enrolled.identity(each.user))
        parts = []
        for band in range(len(self.layouts)):
            holders = [p for p in survivors if self.bands(p) > band]
            signed = {p.user for p in holders if p.leaves > Stage.CONFIRM}
            removed = set(shares.removed(band, [p.user for p in holders], signed))
            total = np.zeros(shares.bands[band].size, np.int64)
            for _, user in take([p.user for p in holders if p.user not in removed]):
                seed = noise_seeds(root, band + 1, *context, user)[band]
                total += shares.draw_band(band, seed)
            parts.append(total)
        return np.concatenate(parts)


class Secure(Summing):
    """The whole protocol with a session for every device; the server sees masked vectors alone."""

    def __post_init__(self) -> None:
        enrolled, terms = self.enrolled, self.protection.terms(self.round, self.layouts)
        self._devices = {enrolled.identity(p.user): p for p in self.cohort}
        self._names = {p.user: name for name, p in self._devices.items()}
        anchor, agreed = ListedDevices(self._devices), replace(enrolled.policy, agreed=terms)
        books = {name: enrolled.book(p.user) for name, p in self._devices.items()}
        self._clients = {name: ClientSession(book, anchor, agreed) for name, book in books.items()}
        prekeys = [books[name].issue(1, p.tier)[0] for name, p in self._devices.items()]
        self._server = ServerSession(terms, prekeys, anchor)
        self._server.publish(self.round.model_digests)
        for name, message in self._asked():
            dealt = self._seeds(name) if self.protection.removes_excess else ()
            self._server.receive(name, self._clients[name].shares(message, dealt))
        self._server.advance()
        self._deals = dict(self._asked())

    def add(self, tier: int, users: NDArray[np.int64], update: BoundedUpdate) -> None:
        layouts = self.layouts[tier:]
        seen = self.round.model_digests[: len(layouts)]
        for user, mine in zip(users.tolist(), update.rows(), strict=True):
            name = self._names[user]
            upload = mine.upload(layouts, self.protection.shares, self._seeds(name))
            masked = self._clients[name].masked(self._deals.pop(name), upload.integers, seen)
            self._server.receive(name, masked)

    def total(self) -> Integers:
        self._server.advance()
        for answer in (ClientSession.confirm, ClientSession.unmask):
            for name, message in self._asked():
                self._server.receive(name, answer(self._clients[name], message))
            self._server.advance()
        return unmask(self._server.result, self.protection, self.layouts)

    def _asked(self) -> Iterator[tuple[bytes, bytes]]:
        """The devices that are still there, and what they are sent."""
        for name, message in self._server.outbox().items():
            if self._devices[name].leaves > self._server.stage:
                yield name, message

    def _seeds(self, name: bytes) -> Sequence[bytes]:
        if self.protection.shares is None:
            return ()
        device, context = self._devices[name], self.round.context
        return noise_seeds(self.enrolled.root, self.bands(device), *context, device.user)


def unmask(result: SecureSum, protection: Protection, layouts: Sequence[Layout]) -> Integers:
    """The sum that the protocol gave, less noise in excess, in the layout of the shared vector."""
    total = result.total.astype(np.int64)
    if protection.shares is not None and protection.removes_excess:
        total -= protection.shares.excess(result.excess)
    ring = protection.ring
    return from_wire(ring.leave(ring.enter(total)), layouts)


SUMMING: Mapping[str, type[Summing]] = {"exact": Plain, "full": Secure}


# --------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Share:
    """What one of the workers did in a round, beside moving the private states on.

    ``sum`` is of its updates and its part of the noise, empty where the protocol adds them;
    ``losses`` are those of the users whom it trained.
    """

    sum: Integers
    losses: list[tuple[NDArray[np.int64], FloatArray]]
    deferred: Deferred


def cohort(coins: NDArray[np.uint64], sampling_rate: float) -> NDArray[np.int64]:
    """Sample the users whose coin came up, in order: Poisson sampling, each user by itself.

    The accounted amplification holds for exactly this law: the size is random, may be zero, and is
    never forced or drawn again. It also needs coins that no recipient knows and that no two
    attempts share, a uniform 64-bit word for each user. At a rate of 1 everybody takes part.
    """
    if sampling_rate >= 1:
        return np.arange(len(coins))
    return np.flatnonzero(coins < np.uint64(int(sampling_rate * 2**64)))


def leaving(
    root: SecretRoot, round: Round, population: int, dropout_rate: float
) -> NDArray[np.int64]:
    """Draw the :class:`Stage` at which each device falls silent, ``DONE`` where it does not."""
    leaves = np.full(population, Stage.DONE)
    if dropout_rate:
        coins = root.stream("dropouts", *round.context).uint64(population)
        chance = coins * 2.0**-64 / dropout_rate  # in units of the rate: uniform below 1
        leaves = np.where(chance < 1, (chance * len(_EXCHANGES)).astype(int), Stage.DONE)
    return leaves


def side_sum(
    wanted: SideSum,
    round: Round,
    users: NDArray[np.int64],
    bounded: Callable[[NDArray[np.int64]], BoundedUpdate],
    enrolled: Enrolled,
    secure_sum: Literal["exact", "full"],
    dropout_rate: float,
) -> Integers:
    """Sum what the devices of some users put in, with the noise of those that add their own.

    ``bounded`` gives it by places in ``users``. ReleaseRefused when too few of them answer.
    """
    root = enrolled.root
    leaves = leaving(root, round, int(users.max(initial=-1)) + 1, dropout_rate)[users]
    cohort = [Participant(*each) for each in zip(users.tolist(), repeat(0), map(Stage, leaves))]
    made, protection = SUMMING[secure_sum], wanted.protection
    summing = made(round, wanted.layouts, protection, cohort, enrolled)
    left = np.flatnonzero(leaves > Stage.MASKED)
    for start in range(0, len(left), _AT_ONCE):
        some = left[start : start + _AT_ONCE]
        summing.add(0, users[some], bounded(some))
    return summing.total()


@dataclass
class Simulation:
    """The devices of a data set, sampled and trained in this process.

    Attributes:
        cohorts: the devices of each tier.
        population: how many there are, those that hold nothing included.
        seed: of the samples, and of cohorts where nothing is accounted.
        dropout_rate: chance of each device of a cohort to fall silent in one of the exchanges.
        engine: ``"cohort"`` trains batches; ``"device"`` trains devices one at a time.
        secure_sum: see :data:`SUMMING`; both give the same sum.
        workers: processes that train for an ``"exact"`` sum, for the same bits as one; the protocol
            keeps its sessions in this one. They are forked in the first round.
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
    workers: int = 1
    deferred: Deferred = field(default_factory=Deferred, init=False)
    _before: tuple[int, Rows, list[FloatArray]] | None = field(default=None, init=False)
    _workers: Workers[Share] | None = field(default=None, init=False)
    _weights: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32), init=False)

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
        summing, left = self._begin(round)
        self._rewind(round.index, left)
        if self.workers > 1 and isinstance(summing, Plain):
            shares = self._forked(weights).ask(round)
        else:
            shares = [self._share(enumerate, summing, left, round, weights)]
        # In the order of users, whoever trained them: a float sum depends on it.
        losses = np.zeros(self.population, np.float32)
        for share in shares:
            for users, found in share.losses:
                losses[users] = found
            self.deferred += share.deferred
        if isinstance(summing, Plain):
            summing.gather([share.sum for share in shares])
        loss, size = float(losses.sum(dtype=np.float64)), sum(map(len, left))
        return Aggregate(summing.total(), len(summing.cohort), loss / size if size else None)

    def _forked(self, weights: FloatArray) -> Workers[Share]:
        """The workers, for whom ``weights`` lie where they see them, and states where all do."""
        if self._workers is None or not self._workers.close.alive:
            for cohort in self.cohorts:
                cohort.states = shared(cohort.states)
            self._weights = shared(weights)
            self._workers = Workers(self.workers, self._answer)
        self._weights[...] = weights
        return self._workers

    def _answer(self, take: Take, round: Round) -> Share:
        """A worker's part in a round, of which it draws the cohort as all do."""
        return self._share(take, *self._begin(round), round, self._weights)

    def _begin(self, round: Round) -> tuple[Summing, Rows]:
        """Sample the round's cohort, and go to where updates of its survivors are due."""
        rows = self.rows(self.sample(round))
        users = [held.users[mine] for held, mine in zip(self.cohorts, rows, strict=True)]
        leaves = leaving(self.root, round, self.population, self.dropout_rate)
        cohort = [
            Participant(user, tier.index, Stage(leaves[user]))
            for tier, mine in zip(self.federation.tiers, users, strict=True)
            for user in mine.tolist()
        ]
        made, layouts = SUMMING[self.secure_sum], self.federation.layouts
        left = self.rows(np.array([p.user for p in cohort if p.survives], np.int64))
        return made(round, layouts, self.protection, cohort, self.enrolled), left

    def _share(
        self, take: Take, summing: Summing, left: Rows, round: Round, weights: FloatArray
    ) -> Share:
        """Train the batches that are taken, in whatever process this is."""
        before, self.deferred = self.deferred, Deferred()
        losses = []
        for tier, mine in zip(self.federation.tiers, left, strict=True):
            for users, update, loss in self.answers(round, weights, tier, mine, take):
                summing.add(tier.index, users, update)
                losses.append((users, np.where(np.isfinite(loss), loss, 0)))
        deferred, self.deferred = self.deferred, before
        part = summing.part(take) if isinstance(summing, Plain) else np.zeros(0, np.int64)
        return Share(part, losses, deferred)

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

    def _rewind(self, index: int, rows: Rows) -> None:
        if self._before is not None and self._before[0] == index:
            for cohort, mine, states in zip(self.cohorts, *self._before[1:], strict=True):
                cohort.states[mine] = states
        before = [c.states[mine] for c, mine in zip(self.cohorts, rows, strict=True)]
        self._before = (index, rows, before)

    def answers(
        self,
        round: Round,
        weights: FloatArray,
        tier: Tier,
        rows: NDArray[np.int64],
        take: Take = enumerate,
    ) -> Iterator[Answers]:
        """Yield users, bounded updates and losses of ``rows`` of a tier; their states move on.

        Their batches are shared out by ``take``.
        """
        if not len(rows):
            return
        key = int(rng_for(self.seed, "samples", round.index).integers(2**63))
        cohort, view = self.cohorts[tier.index], tier.view(self.federation.prefix(weights, tier))
        if self.engine == "device":
            yield from self._one_by_one(round, view, tier, rows, key, take)
            return
        model, draws = cohort.model(view), Draws.of(self.root, round, key)
        for _, batch in take(cohort.batches(rows)):
            data, states = cohort.data.select(batch), cohort.states[batch]
            trained = cohort.learner.train(model, data, states, draws)
            self.deferred += trained.deferred
            before, users = digest(states), cohort.users[batch]
            coins = self.root.stream("rounding", *round.context, users.tobytes(), before)
            cohort.states[batch] = trained.states
            update, held = tier.lift(trained.update), self.federation.layouts_of(tier)
            bounded = update.bound(self.protection, round, held, coins, tier.weight)
            yield users, bounded, trained.losses

    def _one_by_one(
        self,
        round: Round,
        view: FloatArray,
        tier: Tier,
        rows: NDArray[np.int64],
        key: int,
        take: Take,
    ) -> Iterator[Answers]:
        cohort, draws = self.cohorts[tier.index], Draws.of(self.root, round, key)
        model = LocalModel(cohort.learner.view, view)
        held = self.federation.layouts_of(tier)
        for _, row in take(rows.tolist()):
            owns = int(cohort.users[row]), cohort.data.of(row), tier, held
            keeps = cohort.learner, self.protection, self.root, cohort.states[row].copy()
            device = Device(*owns, *keeps)
            trained = device.train(model, draws)
            self.deferred += trained.deferred
            yield cohort.users[[row]], device.protect(round, trained), trained.losses
            cohort.states[row] = device.state
