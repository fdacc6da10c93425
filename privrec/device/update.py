"""What a device may say, as types that carry how far it has been protected.

``RawUpdate`` is what training gave and never leaves a device; ``BoundedUpdate`` is clipped and
encoded, and is the only thing that can be summed. Both hold a batch of one or many devices, and
only the coefficients that were touched: all others are zero. ``Upload`` is the whole vector of one
device in the order of the wire, with the device's own noise where devices add it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import add_rows
from privrec.models.layout import Layout, from_wire, to_wire
from privrec.privacy.mechanism import Shares
from privrec.secagg.ring import Coins, Encoding, Rotation


@dataclass(frozen=True)
class Address:
    """Where the touched coefficients of each device lie in the shared vector.

    A row of values is ``[head | memory blocks | biases]``, in the order of the vector itself.
    No block or bias is named twice with a value other than zero.

    Args:
        blocks: memory slots, shape ``(m, k_blocks)``, or ``(1, k_blocks)`` when all name the same.
        biases: bias slots, likewise.
        layout: sections of the vector that the places are in, the device's own.
    """

    blocks: NDArray[np.int64]
    biases: NDArray[np.int64]
    layout: Layout

    @classmethod
    def whole(cls, layout: Layout) -> Address:
        """Of all coefficients, in their order."""
        return cls(np.arange(layout.slots)[None], np.arange(layout.bias_slots)[None], layout)

    @property
    def width(self) -> int:
        """Coefficients in a row of values."""
        layout = self.layout
        return int(layout.head + self.blocks.shape[1] * layout.block + self.biases.shape[1])


@dataclass(frozen=True)
class RawUpdate:
    """New coefficients minus old ones, before any protection: private, never sent.

    Args:
        values: float32 of shape ``(m, width)``.
        address: where the values belong.
    """

    values: NDArray[np.float32]
    address: Address

    def bound(self, encoding: Encoding, coins: Coins, weight: float = 1.0) -> BoundedUpdate:
        """Clip each device's whole update to ``clip_norm`` in L2 and round it to integers.

        Promise: each row of the result has an integer norm of at most ``encoding.bound``. An update
        that is not finite becomes zero, so that it cannot be told from an idle device.

        Args:
            encoding: clip norm and grid.
            coins: decide the rounding.
            weight: public factor of the clipped update, in [0, 1].
        """
        clipped = self._clipped(encoding, weight)
        return BoundedUpdate(encoding.encode(clipped, coins), self.address)

    def bound_turned(
        self,
        encoding: Encoding,
        coins: Coins,
        weight: float,
        rotation: Rotation,
        layouts: Sequence[Layout],
    ) -> BoundedUpdate:
        """As :meth:`bound`, of the clipped update rotated band by band, in which all is touched.

        Args:
            encoding: clip norm and grid.
            coins: decide the rounding.
            weight: public factor of the clipped update, in [0, 1].
            rotation: of the bands that the device holds.
            layouts: of the device's tier and those below, the strongest first.
        """
        layout = self.address.layout
        dense = self._dense(self._clipped(encoding, weight))
        turned = from_wire(rotation.apply(to_wire(dense, layouts)), layouts)
        return BoundedUpdate(encoding.encode(turned, coins), Address.whole(layout))

    def _clipped(self, encoding: Encoding, weight: float) -> NDArray[np.float32]:
        clipped = clip(self.values, encoding.clip_norm)
        return clipped if weight == 1 else clipped * np.float32(weight)

    def _dense(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whole vectors, shape ``(m, size)``."""
        address, layout, m = self.address, self.address.layout, len(values)
        end = layout.head + address.blocks.shape[1] * layout.block
        parts = [values[:, : layout.head]]
        sections = (
            (address.blocks, layout.slots, layout.block, values[:, layout.head : end]),
            (address.biases, layout.bias_slots, 1, values[:, end:]),
        )
        for names, slots, width, section in sections:
            whole = np.zeros((m * slots, width), np.float32)
            rows = names + slots * np.arange(m)[:, None]
            add_rows(whole, rows.ravel(), section.reshape(-1, width))
            parts.append(whole.reshape(m, -1))
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class BoundedUpdate:
    """Clipped and encoded integers: one device's share of the sum, of known sensitivity."""

    integers: NDArray[np.int32]
    address: Address

    def add_to(self, total: NDArray[np.signedinteger], layout: Layout | None = None) -> None:
        """Add the sum of all rows to ``total``, in place.

        Args:
            total: integer vector of ``layout.size``.
            layout: sections of ``total``, of which the device's own are prefixes; by default the
                device's own.
        """
        own, address = self.address.layout, self.address
        layout = layout or own
        end = own.head + address.blocks.shape[1] * own.block
        total[: own.head] += self.integers[:, : own.head].sum(0, dtype=total.dtype)
        _add(layout.memory_of(total), address.blocks, self.integers[:, own.head : end])
        _add(layout.biases_of(total)[:, None], address.biases, self.integers[:, end:])

    def rows(self) -> Iterator[BoundedUpdate]:
        """The updates of each device by itself."""
        address, layout = self.address, self.address.layout
        for row, integers in enumerate(self.integers):
            blocks, biases = (
                names[min(row, len(names) - 1)][None] for names in (address.blocks, address.biases)
            )
            yield BoundedUpdate(integers[None], Address(blocks, biases, layout))

    def upload(
        self, layouts: Sequence[Layout], shares: Shares | None, seeds: Sequence[bytes]
    ) -> Upload:
        """What the one device of this update puts into the sum.

        Args:
            layouts: of the device's tier and those below, the strongest first.
            shares: the noise that devices add, or None.
            seeds: of this device's noise, one for each band that it holds; none without shares.
        """
        integers = to_wire(self.vector(), layouts)
        return Upload(integers if shares is None else integers + shares.draw(seeds))

    def vector(self) -> NDArray[np.int32]:
        """The whole vector that one device uploads: 4 bytes for each coefficient that it holds."""
        total = np.zeros(self.address.layout.size, dtype=np.int32)
        self.add_to(total)
        return total


@dataclass(frozen=True)
class Upload:
    """One device's vector for the sum: bounded, noised where devices add noise, in wire order."""

    integers: NDArray[np.int32]


@dataclass(frozen=True)
class Aggregate:
    """The sum over a cohort, which is all that the server learns.

    Args:
        total: int64 vector of ``layout.size``.
        cohort: devices that took part; the operator's own knowledge, kept out of every file.
        loss: mean training loss, known in simulation only and outside the guarantee.
    """

    total: NDArray[np.int64]
    cohort: int
    loss: float | None


def _add(
    target: NDArray[np.signedinteger], slots: NDArray[np.int64], values: NDArray[np.signedinteger]
) -> None:
    if len(slots) < len(values):
        values = values.sum(axis=0, keepdims=True, dtype=np.int64)
    rows = values.reshape(-1, target.shape[1]).astype(target.dtype, copy=False)
    add_rows(target, slots.ravel(), rows)


_SURELY, _FEW = 0.99, 1 << 22  # a float32 norm of so few numbers is off by less than 1 %


def clip(values: NDArray[np.float32], clip_norm: float) -> NDArray[np.float32]:
    """Scale each row down to an L2 norm of at most ``clip_norm``; broken rows become zeros."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt((values[:, None] @ values[:, :, None])[:, 0, 0]).astype(np.float64)
        sound = np.isfinite(norms)
        if values.shape[1] > _FEW or (norms[sound] > _SURELY * clip_norm).any():
            # A float32 norm of millions of numbers is off by 1e-5: too much for a fine grid.
            norms = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
            norms *= 1 + 1e-6  # products with a factor are rounded
        factors = np.minimum(1, clip_norm / np.maximum(norms, np.finfo(np.float32).tiny))
        if sound.all() and factors.min(initial=1) == 1:
            return values
        clipped: NDArray[np.float32] = values * factors.astype(np.float32)[:, None]
    clipped[~sound] = 0
    return clipped
