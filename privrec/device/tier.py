"""What devices of one capacity hold: a prefix of the shared vector, and the model in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import merged, representatives
from privrec.device.update import Address, RawUpdate
from privrec.embedding.nested import Nested, Spread
from privrec.embedding.table import Table
from privrec.models.layout import Layout

FloatArray = NDArray[np.float32]


class Network(Protocol):
    """The dense part of a model."""

    def initial_dense(self, rng: np.random.Generator) -> FloatArray:
        """Its weights before the first round."""
        ...


class ModelView(Protocol):
    """What a shared vector means, whatever is learnt: a network over rows of a table."""

    @property
    def model(self) -> Network: ...
    @property
    def vectors(self) -> Table: ...
    @property
    def biases(self) -> Table | None: ...
    @property
    def layout(self) -> Layout: ...


@dataclass(frozen=True)
class Tier:
    """One capacity of a federation.

    Its vector comes in two forms of the same layout: coefficients in nested coordinates, which
    travel and add up across tiers, and memory, which a recommender reads.

    Args:
        index: its place in the chain, 0 for the strongest.
        capacity: the memory it holds over the whole one, a power of two of at most 1.
        share: of all devices, public.
        weight: public factor of its updates, in [0, 1]; 0 for devices that do not train.
        recommender: over the tier's own memory.
        vectors: nested coordinates of the item vectors, for all tiers.
        biases: those of the item biases, or None.
    """

    index: int
    capacity: float
    share: float
    weight: float
    recommender: ModelView
    vectors: Nested
    biases: Nested | None

    @property
    def layout(self) -> Layout:
        """Of the tier's vector, in both of its forms."""
        return self.recommender.layout

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
        address, values = update.address, update.values
        blocks = self.vectors.spread(address.blocks, self.index)
        if blocks is None:
            return update
        layout = self.layout
        end = layout.head + address.blocks.shape[1] * layout.block
        names, changed = _lifted(values[:, layout.head : end], blocks, layout.slots)
        lifted = [values[:, : layout.head], changed]
        bias_names = address.biases
        if self.biases is not None:
            spread = self.biases.spread(address.biases, self.index)
            if spread is not None:
                bias_names, changed = _lifted(values[:, end:], spread, layout.bias_slots)
                lifted.append(changed)
        return RawUpdate(np.concatenate(lifted, axis=1), Address(names, bias_names, layout))


@dataclass(frozen=True)
class Federation:
    """All tiers of a federation, the strongest first; what is public about them.

    Args:
        tiers: one chain: each holds a prefix of what the one before holds.
        absent: share of devices that hold nothing and take no part; they know what is popular.
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
        """What a tier is sent of the shared vector, in its own layout."""
        return self.layout.prefix_of(coefficients, tier.layout)

    def weaker(self, tier: Tier) -> tuple[Layout, ...]:
        """Layouts of the tiers below one, the stronger first."""
        return self.layouts[tier.index + 1 :]

    def fraction(self, tier: Tier) -> float:
        """A tier's part of the mean over the training devices, by public shares and weights.

        Tiers are drawn without regard to the users, so a tier's part of a mean over users is its
        share of it.
        """
        training = sum(each.share for each in self.tiers if each.weight)
        return tier.share * tier.weight / training

    @property
    def holders(self) -> tuple[float, ...]:
        """Share of the training devices that hold each band, the weakest tier's band first."""
        shares = np.array([tier.share if tier.weight else 0.0 for tier in self.tiers])
        return tuple((np.cumsum(shares) / shares.sum())[::-1])


def _lifted(values: FloatArray, spread: Spread, size: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Names of the coefficients that a change reaches, ``(m or 1, k)``, and their changes."""
    m, (named, count, reach) = len(values), spread.names.shape
    names = spread.names.reshape(named, count * reach)
    factors = spread.factors.astype(np.float32)[..., None]
    changes = (values.reshape(m, count, 1, -1) * factors).reshape(m, count * reach, -1)
    return names, merged(changes, representatives(names, size)).reshape(m, -1)
