"""A device: its history and its private state, and the one thing that it says.

:class:`Device` is a user's own; a :class:`Cohort` is many simulated ones, trained as batches by the
same :class:`Learner`. Padding and batching change float rounding alone: before integer encoding
the two agree to ``TOLERANCE``, except where a rectifier's input lies within rounding of zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from privrec.device.local import LocalModel
from privrec.device.samples import EACH, Functions, Histories, Items
from privrec.device.tier import ModelView, Tier
from privrec.device.update import (
    BoundedUpdate,
    Protection,
    RawUpdate,
    Round,
    Upload,
    digest,
    model_digests,
)
from privrec.errors import ReleaseRefused, UsageError
from privrec.models.layout import Layout
from privrec.randomness import SecretRoot

FloatArray = NDArray[np.float32]

TOLERANCE = 1e-5
"""Largest difference from the one-device code, relative to the update's largest coefficient."""
MANY = 16
"""Devices from which on a simulation gathers the rows that they search once for all of them."""

NoiseRoots = Callable[[int, bytes], SecretRoot]
"""What a device draws the noise of a round from, by its user and a digest of its input."""


def _without_secret(*_: object) -> NoReturn:
    raise UsageError(
        "hash functions and noise of devices are drawn from a secret; hand over the devices' root"
    )


@dataclass(frozen=True)
class Draws:
    """What the draws of devices in one round derive from.

    ``key`` decides what is drawn by chance and is no secret. ``functions`` are secret streams for
    hash functions, and ``noise`` secret roots of noise between the devices' own steps, by user.
    """

    key: int
    functions: Functions = _without_secret
    noise: NoiseRoots = _without_secret

    @classmethod
    def of(cls, root: SecretRoot, round: Round, key: int) -> Draws:
        """Draws of a round from the devices' secret.

        Promise: no two users and no two rounds share a stream of functions; the same round, user
        and input have the same noise, any other independent noise.
        """

        def noise(user: int, given: bytes) -> SecretRoot:
            tag = root.tag("local noise", *round.context, user, given)
            return SecretRoot(tag, is_known=root.is_known)

        return cls(key, lambda user: root.stream("lsh", *round.context, user), noise)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of local training, those of the scenario's ``[train]`` table.

    With ``newton`` devices precondition their step, see :mod:`privrec.models.losses`; ``config`` is
    the table itself, of which a selector may have keys of its own.
    """

    loss: str
    newton: bool
    max_samples: int | None
    user_steps: int
    user_lr: float
    user_l2: float
    serve_steps: int
    local_steps: int
    local_lr: float
    negatives: int = 0
    serve_negatives: int = 0
    recency: float = 0.0
    serve_recency: float = 0.0
    unobserved_weight: float = 0.0
    item_l2: float = 0.0
    rank_power: float = 0.0
    shared_curvature: bool = False
    selector: str = EACH
    budget: float = 0.01
    selected: float = 0.5
    frequent: float = 0.0
    serve_budget: float | None = None
    config: Any = None


@dataclass(frozen=True)
class Deferred:
    """Item blocks that noise was ``drawn`` for, of those that eager noise would draw, ``owed``."""

    drawn: int = 0
    owed: int = 0

    def __add__(self, other: Deferred) -> Deferred:
        return Deferred(self.drawn + other.drawn, self.owed + other.owed)

    @property
    def share(self) -> float | None:
        """Share of the draws that deferral saved, in [0, 1); None where nothing was owed."""
        return 1 - self.drawn / self.owed if self.owed else None


@dataclass(frozen=True)
class Trained:
    """What a batch of devices has after its local steps: private, all of it.

    The new ``states``, ``(m, state_dim)``, stay on the devices; ``losses``, ``(m,)``, are means
    before the step on the shared parameters.
    """

    update: RawUpdate
    states: FloatArray
    losses: FloatArray
    deferred: Deferred = field(default_factory=Deferred)


class Learner(ABC):
    """Local training of one tier's model; the same for one device and for a batch of them."""

    view: ModelView[Any]
    settings: Settings

    @property
    @abstractmethod
    def state_dim(self) -> int:
        """Length of a device's private state."""

    @abstractmethod
    def held(self, data: Histories) -> Histories:
        """The devices' data as far as their tier holds it."""

    @abstractmethod
    def batches(self, lengths: Items) -> Iterator[Items]:
        """Places of the devices with data of these lengths, in parts that train together."""

    @abstractmethod
    def train(
        self, model: LocalModel[Any], data: Histories, states: FloatArray, draws: Draws
    ) -> Trained:
        """One round's training on ``m`` devices, each on its own copy of what it touches.

        Neither the model they were sent nor their private ``states``, ``(m, state_dim)``, change.
        UsageError when ``draws`` lack a secret that is needed.
        """


L = TypeVar("L", bound=Learner)


@dataclass
class Cohort(Generic[L]):
    """Simulated devices of one tier, in ascending order of their users.

    Their private ``states``, ``(devices, state_dim)``, are changed by whoever runs a round.
    """

    learner: L
    data: Histories
    states: FloatArray

    @classmethod
    def of(cls, learner: L, data: Histories) -> Cohort[L]:
        """New devices, with private states of zeros."""
        states = np.zeros((len(data.users), learner.state_dim), np.float32)
        return cls(learner, learner.held(data), states)

    @property
    def users(self) -> Items:
        """Whose devices they are, ascending."""
        return self.data.users

    def model(self, weights: FloatArray) -> LocalModel[Any]:
        """What all of them are sent; ``weights`` are the tier's vector in memory form."""
        return LocalModel(self.learner.view, weights, resident=len(self.states) >= MANY)

    def batches(self, rows: Items) -> list[Items]:
        """Some rows, in parts that train together."""
        return [rows[places] for places in self.learner.batches(self.data.lengths[rows])]


@dataclass
class Device:
    """A user's own device.

    Promise: the history and the private state leave it by no method; :meth:`answer` gives a clipped
    and encoded update and nothing else, and :meth:`upload` adds the device's own noise to it.

    Args:
        layouts: of its tier and those below, the strongest first: the bands of its prefix.
        root: its secret, for hash functions, stochastic rounding and noise.
        state: shape ``(state_dim,)``; zeros for a new user.
    """

    user: int
    history: NDArray[np.int32]
    tier: Tier
    layouts: tuple[Layout, ...]
    learner: Learner
    protection: Protection
    root: SecretRoot
    state: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        if not len(self.state):
            self.state = np.zeros(self.learner.state_dim, np.float32)

    def train(self, model: LocalModel[Any], draws: Draws) -> Trained:
        """The device's local round in its own memory, before any protection."""
        held = self.learner.held(Histories.alone(self.user, self.history))
        return self.learner.train(model, held, self.state[None], draws)

    def answer(self, round: Round, coefficients: FloatArray, key: int) -> BoundedUpdate:
        """Train on the model it was sent, keep the new private state, and give the bounded update.

        ``coefficients`` are the tier's prefix of the model, and ``key`` draws the round's samples.
        ReleaseRefused when they are not of the model that the round names.
        """
        model = received(round, coefficients, self.tier, self.layouts, self.learner.view)
        return self.protect(round, self.train(model, Draws.of(self.root, round, key)))

    def protect(self, round: Round, trained: Trained) -> BoundedUpdate:
        """Keep the new private state, and give the bounded update of a local round."""
        coins = self.root.stream("rounding", *round.context, self.user, digest(self.state))
        self.state = trained.states[0]
        update = self.tier.lift(trained.update)
        return update.bound(self.protection, round, self.layouts, coins, self.tier.weight)

    def noise_seeds(self, round: Round) -> tuple[bytes, ...]:
        """The secret seeds of its noise in this attempt, one for each band; none without shares."""
        return self.protection.noise_seeds(self.root, round, len(self.layouts), self.user)

    def upload(self, round: Round, bounded: BoundedUpdate) -> Upload:
        """The whole vector that this device puts into the sum, with its noise."""
        return bounded.upload(self.layouts, self.protection.shares, self.noise_seeds(round))


def received(
    round: Round,
    coefficients: FloatArray,
    tier: Tier,
    layouts: Sequence[Layout],
    view: ModelView[Any],
) -> LocalModel[Any]:
    """The model that devices of a tier were sent as ``coefficients``, its prefix.

    ``layouts`` are of the tier and those below. ReleaseRefused unless it is the round's own model.
    """
    digests = model_digests(coefficients, layouts)
    if digests != round.model_digests[: len(digests)]:
        raise ReleaseRefused(
            f"round {round.index}: the model received has another digest than the round's; "
            "ask the server for the round again"
        )
    return LocalModel(view, tier.view(coefficients))
