"""One device: its history and its private state, and the one thing that it says."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import Histories
from privrec.device.negatives import Functions
from privrec.device.round import Round, digest, model_digests
from privrec.device.tier import Tier
from privrec.device.train import Trained, Trainer
from privrec.device.update import BoundedUpdate
from privrec.errors import ReleaseRefused
from privrec.models.layout import Layout
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding

FloatArray = NDArray[np.float32]


def hash_functions(root: SecretRoot, round: Round) -> Functions:
    """Streams for the hash functions of a round, by user, from the devices' secret.

    Promise: no two users and no two rounds share one.
    """
    return lambda user: root.stream("lsh", *round.context, user)


@dataclass
class Device:
    """A user's own device.

    Promise: the history and the private state leave it by no method; :meth:`answer` gives a clipped
    and encoded update and nothing else.

    Args:
        user: the user's index, which names its draws.
        history: its items; those that its tier does not hold have no part in the round.
        tier: what it holds of the shared vector.
        weaker: layouts of the tiers below, the stronger first: the bands of its prefix.
        trainer: local training in the tier's memory.
        encoding: clip norm and grid.
        root: the device's secret, for stochastic rounding.
        state: user vector and bias, shape ``(user_dim,)``; zeros for a new user.
    """

    user: int
    history: NDArray[np.int32]
    tier: Tier
    weaker: tuple[Layout, ...]
    trainer: Trainer
    encoding: Encoding
    root: SecretRoot
    state: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        if not len(self.state):
            self.state = np.zeros(self.trainer.recommender.model.user_dim, np.float32)

    def train(
        self,
        weights: FloatArray,
        key: int,
        unobserved: FloatArray | None = None,
        functions: Functions | None = None,
    ) -> Trained:
        """The device's local round in its own memory, before any protection."""
        bounds = np.array([0, len(self.history)])
        mine = Histories(np.array([self.user]), bounds, self.history)
        held = mine.below(self.trainer.recommender.vectors.items)
        state = self.state[None]
        return self.trainer.train(weights, held, state, key, unobserved, functions=functions)

    def functions(self, round: Round) -> Functions:
        """The device's own stream for the hash functions of a round, which never leaves it."""
        return hash_functions(self.root, round)

    def answer(self, round: Round, coefficients: FloatArray, key: int) -> BoundedUpdate:
        """Train on the model it was sent, keep the new private state, and give the bounded update.

        Args:
            round: the round that it answers.
            coefficients: the tier's prefix of the model, as the round's digests name it.
            key: the round's key for samples.

        Raises:
            ReleaseRefused: when ``coefficients`` are not of the model that the round names.
        """
        digests = model_digests(coefficients, (self.tier.layout, *self.weaker))
        if digests != round.model_digests[: len(digests)]:
            raise ReleaseRefused(
                f"round {round.index}: the model received has another digest than the round's; "
                "ask the server for the round again"
            )
        view = self.tier.view(coefficients)
        return self.protect(round, self.train(view, key, functions=self.functions(round)))

    def protect(self, round: Round, trained: Trained) -> BoundedUpdate:
        """Keep the new private state, and give the bounded update of a local round."""
        coins = self.root.stream("rounding", *round.context, self.user, digest(self.state))
        self.state = trained.states[0]
        update = self.tier.lift(trained.update)
        return update.bound(self.encoding, coins, self.tier.weight)
