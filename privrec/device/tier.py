"""What devices of one capacity hold: a prefix of the shared vector, and the model in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from privrec.device.update import Address, RawUpdate
from privrec.embedding.nested import Nested
from privrec.embedding.table import Table, merged, representatives
from privrec.models.layout import Layout, Network

FloatArray = NDArray[np.float32]
N = TypeVar("N", bound=Network, covariant=True)


@dataclass(frozen=True)
class ModelView(Generic[N]):
    """What a shared vector means: a network over vectors and biases of items, words or labels.

    Attributes:
        dense: weights of the network, which lengths follow from without it.
        make: gives the network when it is first used, and imports what computes it.
        gram: coefficients of the users' Gram matrix, see :class:`~privrec.models.layout.Layout`.
        features: public ones of each item, ``(n, q)``, which stand beside its learned vector:
            users weigh them, nobody trains them, and they are no part of the shared vector. Those
            of items that ``vectors`` does not hold come last.
    """

    dense: int
    make: Callable[[], N] = field(compare=False, repr=False)
    vectors: Table
    biases: Table | None
    gram: int = 0
    features: FloatArray | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls, network: Network, vectors: Table, biases: Table | None, gram: int = 0
    ) -> ModelView[Any]:
        """A view by a network that is there already."""
        return ModelView(network.dense, lambda: network, vectors, biases, gram)

    @cached_property
    def network(self) -> N:
        """What scores come from."""
        return self.make()

    @cached_property
    def layout(self) -> Layout:
        """Of the shared vector."""
        slots = 0 if self.biases is None else self.biases.slots
        vectors = self.vectors
        return Layout(self.dense, vectors.slots, vectors.block, slots, self.gram)

    def featured(self, features: FloatArray) -> ModelView[Any]:
        """The same with public features of all items, of a network that takes some."""
        network: Any = self.network
        wider = network.featured(features.shape[1])
        return replace(self, features=features, make=lambda: wider)

    def tabulated(self) -> ModelView[N]:
        """The same with its places looked up, for a machine that plays many devices."""
        biases = None if self.biases is None else self.biases.tabulated()
        return replace(self, vectors=self.vectors.tabulated(), biases=biases)


@dataclass(frozen=True)
class Tier:
    """One capacity of a federation.

    Its vector comes in two forms of the same layout: coefficients in nested coordinates, which
    travel and add up across tiers, and memory, which the model reads.

    Args:
        index: its place in the chain, 0 for the strongest.
        capacity: the memory it holds over the whole one, a power of two of at most 1.
        share: of all devices, public.
        weight: public factor of its updates, in [0, 1]; 0 for devices that do not train.
        vectors: nested coordinates of the item vectors, for all tiers; ``biases`` likewise.
    """

    index: int
    capacity: float
    share: float
    weight: float
    model: ModelView[Any]
    vectors: Nested
    biases: Nested | None

    @property
    def layout(self) -> Layout:
        """Of the tier's vector, in both of its forms."""
        return self.model.layout

    def view(self, coefficients: FloatArray) -> FloatArray:
        """The tier's memory form of its coefficients, a copy."""
        vector = coefficients.copy()
        self.vectors.to_memory(self.layout.memory_of(vector), self.index)
        if self.biases is not None:
            self.biases.to_memory(self.layout.biases_of(vector)[:, None], self.index)
        return vector

    def coefficients(self, vector: FloatArray) -> FloatArray:
        """The coefficients of a vector in memory form, a copy: the inverse of :meth:`view`."""
        changed = vector.copy()
        self.vectors.to_coefficients(self.layout.memory_of(changed), self.index)
        if self.biases is not None:
            self.biases.to_coefficients(self.layout.biases_of(changed)[:, None], self.index)
        return changed

    def lift(self, update: RawUpdate) -> RawUpdate:
        """A change of the memory as a change of coefficients.

        Promise: each device's norm stays as it is, and no coefficient is named twice with a value
        other than zero.
        """
        head, *sections = update.address.split(update.values)
        names, parts, m = [update.address.blocks, update.address.biases], [head], len(head)
        sizes = self.layout.slots, self.layout.bias_slots
        for at, coordinates in enumerate((self.vectors, self.biases)):
            if coordinates is None:
                continue
            spread = coordinates.spread(names[at], self.index)
            if spread is None:  # memory and coefficients of such a tier are the same
                return update
            reached, factors = spread
            names[at] = reached.reshape(len(reached), -1)
            changes = sections[at][:, :, None] * factors.astype(np.float32)[..., None]
            changes = changes.reshape(m, names[at].shape[1], -1)
            parts.append(merged(changes, representatives(names[at], sizes[at])).reshape(m, -1))
        return RawUpdate(np.concatenate(parts, axis=1), Address(names[0], names[1], self.layout))


@dataclass(frozen=True)
class Federation:
    """All tiers, the strongest first; each holds a prefix of what the one before holds.

    The share ``absent`` of the devices hold nothing and take no part; they know what is popular.
    """

    tiers: tuple[Tier, ...]
    absent: float = 0.0

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of each tier; the first is that of the shared vector."""
        return tuple(tier.layout for tier in self.tiers)

    @property
    def layout(self) -> Layout:
        """Of the shared vector."""
        return self.tiers[0].layout

    def prefix(self, coefficients: FloatArray, tier: Tier) -> FloatArray:
        """What a tier is sent of the shared vector."""
        return self.layout.prefix_of(coefficients, tier.layout)

    def layouts_of(self, tier: Tier) -> tuple[Layout, ...]:
        """Layouts of a tier and those below, the strongest first: the bands of its prefix."""
        return self.layouts[tier.index :]

    def fraction(self, tier: Tier) -> float:
        """A tier's part of the mean over the training devices, by public shares and weights.

        Tiers are drawn without regard to the users, so it is that of a mean over users too.
        """
        training = sum(each.share for each in self.tiers if each.weight)
        return tier.share * tier.weight / training

    @property
    def holders(self) -> tuple[float, ...]:
        """Share of the training devices that hold each band, the weakest tier's band first."""
        shares = np.array([tier.share if tier.weight else 0.0 for tier in self.tiers])
        return tuple((np.cumsum(shares) / shares.sum())[::-1])
