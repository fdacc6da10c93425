"""What the server makes of a released sum before its optimiser sees it: all of it public.

Constants fixed before the run scale the bands of the vector, and the items' share of an implicit
loss is added. Neither looks at anything but released values, so neither costs privacy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from privrec.device.tier import Federation, Tier
from privrec.models.layout import bands
from privrec.models.losses import curvature, pressure

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Implicit:
    """The server's part of implicit ALS (:mod:`privrec.models.losses`).

    Args:
        unobserved_weight: ``α``.
        item_l2: ``ρ``.
        gram_rate: how fast the users' Gram matrix follows that of the round, in (0, 1].
        local_lr: step size of each tier's devices, which the server's part has too.
        newton: whether devices precondition their gradient.
    """

    unobserved_weight: float
    item_l2: float
    gram_rate: float
    local_lr: tuple[float, ...]
    newton: bool

    def matrix(self, users: FloatArray, tier: Tier) -> FloatArray | None:
        """What every item of a tier is multiplied by; None for 1."""
        if self.newton:
            return None
        dim = tier.recommender.vectors.dim
        return curvature(users, dim, self.unobserved_weight, self.item_l2)


@dataclass(frozen=True)
class Completion:
    """From the mean of what devices sent to the change that it asks of the whole vector.

    Args:
        federation: the tiers.
        implicit: the loss over all items, where there is one.
        by_contributors: divide each band by the share of training devices that hold it, so that it
            is the mean over those; otherwise it is the mean over all.
        overwrites: what a device does not hold counts as zero instead of as unchanged: the plain
            average of lifted weights, as FAIR takes it.
    """

    federation: Federation
    implicit: Implicit | None
    by_contributors: bool
    overwrites: bool

    def complete(self, update: FloatArray, weights: FloatArray) -> None:
        """Turn the mean of the devices' vectors into the change of the weights, in place.

        Args:
            update: mean over the expected cohort, in nested coordinates.
            weights: the coefficients that the devices started from; their Gram matrix moves on.
        """
        if self.implicit is not None:
            self._add_unobserved(update, weights, self.implicit)
        if self.by_contributors or self.overwrites:
            self._scale_bands(update, weights)

    def _scale_bands(self, update: FloatArray, weights: FloatArray) -> None:
        layouts, holders = self.federation.layouts, self.federation.holders
        changed, before = bands(update, layouts), bands(weights, layouts)
        for band, old, share in zip(changed, before, holders, strict=True):
            for part, start in zip(band, old, strict=True):
                if self.by_contributors and share:
                    part /= np.float32(share)
                if self.overwrites:
                    part -= np.float32(1 - share) * start

    def _add_unobserved(self, update: FloatArray, weights: FloatArray, implicit: Implicit) -> None:
        """Add what the loss over all items asks, and take over the users' Gram matrix."""
        layout = self.federation.layout
        known, sent = layout.gram_of(weights), layout.gram_of(update)
        first = not known.any()
        released = known + np.float32(1 if first else implicit.gram_rate) * (
            sent / self._gram_holders - known
        )
        if not (implicit.newton and first):
            for tier in self.federation.tiers:
                self._push(update, weights, tier, implicit, released)
        known[...], sent[...] = released, 0

    def _push(
        self,
        update: FloatArray,
        weights: FloatArray,
        tier: Tier,
        implicit: Implicit,
        users: FloatArray,
    ) -> None:
        """Subtract what one tier's devices ask of all their items."""
        step = self.federation.fraction(tier) * implicit.local_lr[tier.index]
        if not step:
            return
        inner, vectors = tier.layout, tier.recommender.vectors
        asked = tier.view(self.federation.prefix(weights, tier))
        memory = inner.memory_of(asked)
        memory[...] = pressure(vectors, memory, implicit.matrix(users, tier))
        memory *= np.float32(step)
        asked = tier.coefficients(asked)
        self.federation.layout.memory_of(update)[: inner.slots] -= inner.memory_of(asked)

    @cached_property
    def _gram_holders(self) -> FloatArray:
        """Share of the devices whose Gram matrix has each entry; in ``dims`` some have fewer."""
        shares = np.zeros(self.federation.layout.gram, np.float32)
        for tier in self.federation.tiers:
            shares[: tier.layout.gram] += np.float32(self.federation.fraction(tier))
        return np.where(shares > 0, shares, 1)
