"""One device: its history and its private state, and the one thing that it says."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import Histories
from privrec.device.examples import NoiseRoots
from privrec.device.negatives import Functions
from privrec.device.round import Protection, Round, digest, model_digests
from privrec.device.tier import Tier
from privrec.device.train import Trained, Trainer
from privrec.device.update import BoundedUpdate, RawUpdate, Upload
from privrec.errors import ReleaseRefused
from privrec.models.layout import Layout
from privrec.privacy.mechanism import noise_seeds
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Coins

FloatArray = NDArray[np.float32]


def hash_functions(root: SecretRoot, round: Round) -> Functions:
    """Streams for the hash functions of a round, by user, from the devices' secret.

    Promise: no two users and no two rounds share one.
    """
    return lambda user: root.stream("lsh", *round.context, user)


def noise_roots(root: SecretRoot, round: Round) -> NoiseRoots:
    """Secrets of the noise between local steps of a round, by user and digest of the input.

    Promise: the same round, user and input have the same noise, any other independent noise.
    """
    return lambda user, given: SecretRoot(
        root.tag("local noise", *round.context, user, given), is_known=root.is_known
    )


@dataclass
class Device:
    """A user's own device.

    Promise: the history and the private state leave it by no method; :meth:`answer` gives a clipped
    and encoded update and nothing else, and :meth:`upload` adds the device's own noise to it.

    Args:
        user: the user's index, which names its draws.
        history: its items; those that its tier does not hold have no part in the round.
        tier: what it holds of the shared vector.
        weaker: layouts of the tiers below, the stronger first: the bands of its prefix.
        trainer: local training in the tier's memory.
        protection: bounds, grid, ring and noise.
        root: the device's secret, for stochastic rounding and noise.
        state: user vector and bias, shape ``(user_dim,)``; zeros for a new user.
    """

    user: int
    history: NDArray[np.int32]
    tier: Tier
    weaker: tuple[Layout, ...]
    trainer: Trainer
    protection: Protection
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
        noise: NoiseRoots | None = None,
    ) -> Trained:
        """The device's local round in its own memory, before any protection."""
        bounds = np.array([0, len(self.history)])
        mine = Histories(np.array([self.user]), bounds, self.history)
        held = mine.below(self.trainer.recommender.vectors.items)
        state = self.state[None]
        return self.trainer.train(
            weights, held, state, key, unobserved, functions=functions, noise=noise
        )

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
        digests = model_digests(coefficients, self.layouts)
        if digests != round.model_digests[: len(digests)]:
            raise ReleaseRefused(
                f"round {round.index}: the model received has another digest than the round's; "
                "ask the server for the round again"
            )
        view = self.tier.view(coefficients)
        functions, noise = self.functions(round), noise_roots(self.root, round)
        return self.protect(round, self.train(view, key, functions=functions, noise=noise))

    def protect(self, round: Round, trained: Trained) -> BoundedUpdate:
        """Keep the new private state, and give the bounded update of a local round."""
        coins = self.root.stream("rounding", *round.context, self.user, digest(self.state))
        self.state = trained.states[0]
        update = self.tier.lift(trained.update)
        return privatize(update, self.protection, round, self.tier, self.weaker, coins)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of its tier and those below, the strongest first."""
        return (self.tier.layout, *self.weaker)

    def noise_seeds(self, round: Round) -> tuple[bytes, ...]:
        """The secret seeds of its noise in this attempt, one for each band; none without shares."""
        if self.protection.shares is None:
            return ()
        return noise_seeds(self.root, len(self.layouts), *round.context, self.user)

    def upload(self, round: Round, bounded: BoundedUpdate) -> Upload:
        """The whole vector that this device puts into the sum, with its noise."""
        return bounded.upload(self.layouts, self.protection.shares, self.noise_seeds(round))


def privatize(
    update: RawUpdate,
    protection: Protection,
    round: Round,
    tier: Tier,
    weaker: tuple[Layout, ...],
    coins: Coins,
) -> BoundedUpdate:
    """The bounded update of devices of a tier, rotated first where the ring needs it.

    Args:
        update: lifted, of one or many devices.
        protection: bounds, grid and ring.
        round: the round, whose rotation is public.
        tier: of the devices.
        weaker: layouts of the tiers below, the stronger first.
        coins: decide the rounding.
    """
    layouts, encoding = (tier.layout, *weaker), protection.encoding
    rotation = protection.rotation(round, layouts)
    if rotation is None:
        return update.bound(encoding, coins, tier.weight)
    return update.bound_turned(encoding, coins, tier.weight, rotation, layouts)
