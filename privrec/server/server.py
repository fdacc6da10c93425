"""The server: plans rounds, releases noisy sums, and improves the model with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privrec.device.tier import Federation
from privrec.device.update import Aggregate, Protection, Round, digest, model_digests
from privrec.models.layout import bands, from_wire, to_wire
from privrec.models.losses import curvature, pressure
from privrec.privacy.events import RoundEvent
from privrec.privacy.mechanism import rounded_gaussian
from privrec.randomness import SecretRoot
from privrec.scenario.load import Train
from privrec.server.optimizer import Optimizer

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class RoundPlan:
    """What stays the same in every round of a run.

    Attributes:
        digest: of the scenario that all parties agreed to.
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


def released_sum(round: Round, total: NDArray[np.int64], bound: float, root: SecretRoot) -> Release:
    """A sum of sensitivity ``bound`` as it may be released, where devices did not add the noise.

    Promise: central noise is that of the round's own event, Gaussian with standard deviation
    ``noise_multiplier * bound`` on every coefficient, also of an empty cohort, and a function of
    the round and the sum under ``root``: another input gets independent noise.
    """
    summed = released = digest(total)
    context = (*round.context, summed)
    if round.event.mechanism == "gaussian":
        sigma = round.event.noise_multiplier * bound
        total = total + rounded_gaussian(root.stream("noise", *context), sigma, len(total))
        released = digest(total)
    return Release(round, total, root.tag("release", *context, released))


@dataclass
class Server:
    """The model and its optimiser; it sees sums alone.

    ``weights`` are the shared vector in nested coordinates, after ``index`` rounds; ``mean`` is
    their running mean, before its correction for the start.
    """

    plan: RoundPlan
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
        """Return the next round, for the ledger to charge and the transport to carry out."""
        plan = self.plan
        model = model_digests(self.weights, plan.federation.layouts)
        return Round(plan.run_id, self.index, attempt, plan.event, plan.digest, model)

    def release(self, round: Round, aggregate: Aggregate, root: SecretRoot) -> Release:
        """Add the round's central noise to the integer sum, where devices did not add their own.

        See :func:`released_sum`.
        """
        return released_sum(round, aggregate.total, self.plan.protection.encoding.bound, root)

    def decode(self, release: Release) -> FloatArray:
        """Return the mean update of a released sum, turned back where updates were rotated."""
        plan, layouts = self.plan, self.plan.federation.layouts
        mean = plan.protection.encoding.decode(release.total, plan.expected_cohort)
        if rotation := plan.protection.rotation(release.round, layouts):
            mean = from_wire(rotation.undo(to_wire(mean[None], layouts)), layouts)[0]
        return mean.astype(np.float32)

    def apply(self, release: Release) -> None:
        """Take the optimiser's step on a released sum."""
        plan, update = self.plan, self.decode(release)
        self.completion.complete(update, self.weights)
        gram = plan.federation.layout.gram_of(self.weights)
        kept = gram.copy()  # it travels with the weights, but is none that would decay
        self.optimizer.step(self.weights, update, self.index)
        gram[...] = kept
        self.index += 1
        self.mean += (1 - np.float32(plan.average)) * (self.weights - self.mean)


@dataclass(frozen=True)
class Completion:
    """From the mean of what devices sent to the change that it asks of the whole vector.

    It looks at released values and constants fixed before the run alone: it costs no privacy.

    Attributes:
        implicit: settings of implicit ALS (:mod:`privrec.models.losses`), where that is the loss.
        aggregation: ``"contributors"`` divides each band by the share of training devices that hold
            it, so that it is the mean over those instead of over all. With ``"fair_averaging"``
            what a device does not hold counts as zero instead of as unchanged: the plain average of
            lifted weights, as FAIR takes it.
        local_lr: step size of each tier's devices, which the server's part of implicit ALS has too.
    """

    federation: Federation
    implicit: Train | None
    aggregation: str
    local_lr: tuple[float, ...] = ()

    def complete(self, update: FloatArray, weights: FloatArray) -> None:
        """Turn the mean over the expected cohort into the change of the weights, in place.

        The Gram matrix of the weights moves on.
        """
        if self.implicit is not None:
            self._add_unobserved(update, weights, self.implicit)
        layouts, holders = self.federation.layouts, self.federation.holders
        changed, before = bands(update, layouts), bands(weights, layouts)
        for band, old, share in zip(changed, before, holders, strict=True):
            for part, start in zip(band, old, strict=True):
                if self.aggregation == "contributors" and share:
                    part /= np.float32(share)
                if self.aggregation == "fair_averaging":
                    part -= np.float32(1 - share) * start

    def _add_unobserved(self, update: FloatArray, weights: FloatArray, implicit: Train) -> None:
        """Add what the loss over all items asks, and take over the users' Gram matrix."""
        federation, layout = self.federation, self.federation.layout
        known, sent = layout.gram_of(weights), layout.gram_of(update)
        holders = np.zeros(layout.gram, np.float32)  # of each entry: in ``dims`` some have fewer
        for tier in federation.tiers:
            holders[: tier.layout.gram] += np.float32(federation.fraction(tier))
        first = not known.any()
        rate = np.float32(1 if first else implicit.gram_rate)
        released = known + rate * (sent / np.where(holders > 0, holders, 1) - known)
        newton = implicit.server_optimizer == "newton"  # then devices precondition their gradient
        for tier in federation.tiers:
            step = federation.fraction(tier) * self.local_lr[tier.index]
            if not step or (newton and first):
                continue
            vectors, matrix = tier.model.vectors, None
            if not newton:
                alpha, rho = implicit.unobserved_weight, implicit.item_l2
                matrix = curvature(released, vectors.dim, alpha, rho)
            # What the tier's devices ask of all their items.
            asked = tier.view(federation.prefix(weights, tier))
            memory = tier.layout.memory_of(asked)
            memory[...] = pressure(vectors, memory, matrix)
            memory *= np.float32(step)
            own = layout.memory_of(update)[: tier.layout.slots]
            own -= tier.layout.memory_of(tier.coefficients(asked))
        known[...], sent[...] = released, 0
