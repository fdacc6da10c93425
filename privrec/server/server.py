"""The server: plans rounds, releases noisy sums, and improves the model with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privrec.device.tier import Federation
from privrec.device.update import Aggregate, Protection, Round, digest, model_digests
from privrec.models.layout import from_wire, to_wire
from privrec.privacy.events import RoundEvent
from privrec.privacy.mechanism import rounded_gaussian
from privrec.randomness import SecretRoot
from privrec.server.completion import Completion
from privrec.server.optimizer import Optimizer

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """What stays the same in every round of a run.

    Args:
        run_id: the run.
        digest: of the scenario that all parties agreed to.
        event: the privacy event of each round.
        protection: bounds and grid, with the sensitivity, ring and noise.
        federation: the tiers of devices.
        expected_cohort: training devices times sampling rate, the fixed divisor of every sum. A
            realised count would be private.
        average: decay of the running mean of the weights that is released; 0 releases the last.
        examples: what a round costs an example of a device in it, where devices protect examples.
    """

    run_id: str
    digest: str
    event: RoundEvent
    protection: Protection
    federation: Federation
    expected_cohort: float
    average: float
    examples: RoundEvent | None = None


@dataclass(frozen=True)
class Release:
    """A sum with its noise, of a round, and the tag that the ledger keeps of it."""

    round: Round
    total: NDArray[np.int64]
    tag: bytes


@dataclass
class Server:
    """The model and its optimiser; it sees sums alone.

    Args:
        plan: what stays the same.
        weights: the shared vector in nested coordinates, float32.
        completion: turns a mean of what devices sent into a change of the weights.
        optimizer: takes a step along that change.
        index: rounds that were applied.
        mean: the running mean of the weights, before its correction for the start.
    """

    plan: Plan
    weights: FloatArray
    completion: Completion
    optimizer: Optimizer
    index: int = 0
    mean: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.mean = np.zeros_like(self.weights)

    @property
    def released(self) -> FloatArray:
        """The weights that recipients get: the last ones, or their running mean."""
        decay = self.plan.average
        if decay == 0 or self.index == 0:
            return self.weights
        return self.mean / np.float32(1 - decay**self.index)

    def next_round(self, attempt: int) -> Round:
        """The next round, for the ledger to charge and the transport to carry out."""
        plan = self.plan
        model = model_digests(self.weights, plan.federation.layouts)
        return Round(plan.run_id, self.index, attempt, plan.event, plan.digest, model)

    def release(self, round: Round, aggregate: Aggregate, root: SecretRoot) -> Release:
        """Add the round's central noise to the integer sum, where devices did not add their own.

        Promise: central noise is that of the round's own event, Gaussian with standard deviation
        ``noise_multiplier * encoding.bound`` on every coefficient, and a function of the round and
        the sum under ``root``: the same input gets the same noise, another independent noise.

        Args:
            round: the round that was charged.
            aggregate: the exact sum over its cohort; also that of an empty cohort is noised.
            root: the server's secret.
        """
        total = aggregate.total
        summed = released = digest(total)
        context = (*round.context, summed)
        if round.event.mechanism == "gaussian":
            sigma = round.event.noise_multiplier * self.plan.protection.encoding.bound
            total = total + rounded_gaussian(root.stream("noise", *context), sigma, len(total))
            released = digest(total)
        return Release(round, total, root.tag("release", *context, released))

    def apply(self, release: Release) -> None:
        """Take the optimiser's step on a released sum."""
        plan = self.plan
        update = self._decoded(release)
        self.completion.complete(update, self.weights)
        gram = plan.federation.layout.gram_of(self.weights)
        kept = gram.copy()  # it travels with the weights, but is none that would decay
        self.optimizer.step(self.weights, update, self.index)
        gram[...] = kept
        self.index += 1
        decay = np.float32(plan.average)
        self.mean += (1 - decay) * (self.weights - self.mean)

    def _decoded(self, release: Release) -> FloatArray:
        """The mean update of a released sum, turned back where updates were rotated."""
        plan, layouts = self.plan, self.plan.federation.layouts
        update = plan.protection.encoding.decode(release.total, plan.expected_cohort)
        rotation = plan.protection.rotation(release.round, layouts)
        if rotation is not None:
            update = from_wire(rotation.undo(to_wire(update[None], layouts)), layouts)[0]
        return update.astype(np.float32)
