"""What a device is told of a round, and what it may say, as types that carry its protection.

``RawUpdate`` is what training gave and never leaves a device; ``BoundedUpdate`` is clipped and
encoded, and is the only thing that can be summed. Both hold a batch of one or many devices, and
only the coefficients that were touched: all others are zero. ``Upload`` is the whole vector of one
device in the order of the wire, with the device's own noise where devices add it. What is said of a
history before the first round is a :class:`Counting`, and after the last an :class:`Evaluating`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import add_rows
from privrec.errors import ReleaseRefused
from privrec.models.layout import Layout, band_sizes, bands, from_wire, to_wire
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import PREPARATION
from privrec.privacy.mechanism import Shares, noise_seeds
from privrec.randomness import SecretRoot
from privrec.secagg.keys import statement
from privrec.secagg.ring import Coins, Encoding, Ring, Rotation, squared_norms
from privrec.secagg.roster import Terms

if TYPE_CHECKING:
    from privrec.device.samples import Histories

SMALL_RING_BITS = 16


@dataclass(frozen=True)
class Round:
    """One attempt at one round: what runs is what is charged.

    Args:
        attempt: 0, or more when a round had to be drawn anew.
        plan_digest: of the scenario that the devices agreed to.
        model_digests: of the weights that the devices start from, one for each band, the one that
            every tier holds first. A device checks those of its own prefix.
    """

    run_id: str
    index: int
    attempt: int
    event: RoundEvent
    plan_digest: str
    model_digests: tuple[bytes, ...]

    @property
    def context(self) -> tuple[str | int | bytes, ...]:
        """What binds every secret draw to this attempt: same context and input, same noise."""
        model = hashlib.sha256(b"".join(self.model_digests)).digest()
        return (self.run_id, self.index, self.attempt, self.plan_digest, model)


def model_digests(weights: NDArray[Any], layouts: Sequence[Layout]) -> tuple[bytes, ...]:
    """SHA-256 of each band of a vector of the first layout, the weakest tier's first."""
    return tuple(digest(*parts) for parts in bands(weights, layouts))


def digest(*arrays: NDArray[Any]) -> bytes:
    """SHA-256 of the bytes of arrays, one after the other."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)
    return sha.digest()


@dataclass(frozen=True)
class Protection:
    """From a trained update to integers that may be summed, the same in every round of a run.

    Args:
        encoding: clip norm and grid, and with them the sensitivity of a sum.
        ring: the small one needs every update rotated.
        shares: the noise that each device adds itself, or None where it adds none.
        minimums: fewest survivors of each band, the band that all devices hold first; without
            them a sum of any number of devices is taken.
    """

    encoding: Encoding
    ring: Ring = field(default_factory=Ring)
    shares: Shares | None = None
    minimums: tuple[int, ...] = ()

    @property
    def removes_excess(self) -> bool:
        """Whether devices beyond a band's fewest give the seeds of their noise away."""
        return self.shares is not None and self.shares.remove_excess

    def noise_seeds(
        self, root: SecretRoot, round: Round, bands: int, user: int
    ) -> tuple[bytes, ...]:
        """A device's secret seeds in this attempt, one for each band; none without shares."""
        return noise_seeds(root, bands, *round.context, user) if self.shares else ()

    def rotation(self, round: Round, layouts: Sequence[Layout]) -> Rotation | None:
        """The public rotation of a round, of the bands that these tiers have; None for none.

        It depends on no update, and is another one in each attempt.
        """
        if self.ring.bits != SMALL_RING_BITS:
            return None
        seed = statement("rotation", round.run_id, round.index, round.attempt)
        return Rotation(band_sizes(layouts), seed)

    def terms(self, round: Round, layouts: Sequence[Layout]) -> Terms:
        """The terms of a round, as the server states them and as each device holds it to them."""
        return Terms(
            round.run_id,
            round.index,
            round.attempt,
            statement("plan", round.plan_digest, json.dumps(round.event.to_json(), sort_keys=True)),
            tuple(layout.size for layout in reversed(layouts)),
            self.minimums or (1,) * len(layouts),
            self.ring.bits,
            self.removes_excess,
        )


@dataclass(frozen=True)
class Address:
    """Where the touched coefficients of each device lie in the shared vector, of its own layout.

    A row of values is ``[head | memory blocks | biases]``, as in the vector itself. ``blocks`` are
    slots, ``(m, k_blocks)``, or ``(1, k_blocks)`` when all name the same; ``biases`` likewise. None
    is named twice with a value other than zero.
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
        blocks, biases = self.blocks.shape[1], self.biases.shape[1]
        return int(self.layout.head + blocks * self.layout.block + biases)

    def split(self, values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Rows of values as heads, blocks ``(m, k_blocks, block)`` and biases ``(m, k, 1)``."""
        head, block, named = self.layout.head, self.layout.block, self.blocks.shape[1]
        end = head + named * block
        blocks = values[:, head:end].reshape(len(values), named, block)
        return values[:, :head], blocks, values[:, end:, None]


@dataclass(frozen=True)
class RawUpdate:
    """New coefficients minus old ones, before any protection: private, never sent."""

    values: NDArray[Any]
    address: Address

    def bound(
        self,
        protection: Protection,
        round: Round,
        layouts: Sequence[Layout],
        coins: Coins,
        weight: float = 1.0,
    ) -> BoundedUpdate:
        """Clip each device's whole update to ``clip_norm`` in L2 and round it to integers.

        Where the ring needs it, each band is rotated in between, and all is touched then. Promise:
        each row of the result has an integer norm of at most ``encoding.bound``. An update that is
        not finite becomes zero, so that it cannot be told from an idle device.

        ``layouts`` are those of the devices' tier and those below, the strongest first; ``coins``
        decide the rounding; ``weight``, in [0, 1], is a public factor of the clipped update.
        """
        encoding, rotation = protection.encoding, protection.rotation(round, layouts)
        clipped = clip(self.values, encoding.clip_norm)
        if weight != 1:
            clipped = clipped * np.float32(weight)
        if rotation is None:
            return BoundedUpdate(encoding.encode(clipped, coins), self.address)
        turned = rotation.apply(to_wire(self.dense(clipped), layouts))
        integers = encoding.encode(from_wire(turned, layouts), coins)
        return BoundedUpdate(integers, Address.whole(self.address.layout))

    def dense(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values at this update's address as whole vectors, shape ``(m, size)``."""
        address, m = self.address, len(values)
        head, *sections = address.split(values)
        parts, named = [head], (address.blocks, address.biases)
        sizes = address.layout.slots, address.layout.bias_slots
        for names, slots, section in zip(named, sizes, sections, strict=True):
            width = section.shape[2]
            whole = np.zeros((m * slots, width), np.float32)
            rows = names + slots * np.arange(m)[:, None]
            add_rows(whole, rows.ravel(), section.reshape(-1, width))
            parts.append(whole.reshape(m, slots * width))
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class SummedExamples(RawUpdate):
    """Sums of integers that were bounded example by example: private until they have noise.

    Of whole vectors; see :mod:`privrec.device.example_shares`.
    """

    def bound(
        self,
        protection: Protection,
        round: Round,
        layouts: Sequence[Layout],
        coins: Coins,
        weight: float = 1.0,
    ) -> BoundedUpdate:
        """Clamp each coefficient to ``clip_norm``, which the ring has room for.

        Promise: no two sums are further apart than before, in any coefficient, so that an example
        moves what is clamped by no more than it moved the sum. Nothing is rounded again.
        """
        most = math.floor(2**protection.encoding.scale_bits)
        return BoundedUpdate(self.values.clip(-most, most).astype(np.int32), self.address)


@dataclass(frozen=True)
class BoundedUpdate:
    """Clipped and encoded integers: each device's part of the sum, of known sensitivity."""

    integers: NDArray[np.int32]
    address: Address

    def add_to(self, total: NDArray[np.signedinteger], layout: Layout | None = None) -> None:
        """Add the sum of all rows to ``total``, in place.

        Of the sections of its ``layout``, by default the device's own, the device's are prefixes.
        """
        layout = layout or self.address.layout
        head, blocks, biases = self.address.split(self.integers)
        total[: head.shape[1]] += head.sum(0, dtype=total.dtype)
        for target, slots, values in (
            (layout.memory_of(total), self.address.blocks, blocks),
            (layout.biases_of(total)[:, None], self.address.biases, biases),
        ):
            if len(slots) < len(values):
                values = values.sum(axis=0, keepdims=True, dtype=np.int64)
            rows = values.reshape(-1, target.shape[1]).astype(total.dtype, copy=False)
            add_rows(target, slots.ravel(), rows)

    def rows(self) -> Iterator[BoundedUpdate]:
        """The updates of each device by itself."""
        address, layout = self.address, self.address.layout
        for row in range(len(self.integers)):
            blocks, biases = (n[[row % len(n)]] for n in (address.blocks, address.biases))
            yield BoundedUpdate(self.integers[[row]], Address(blocks, biases, layout))

    def upload(
        self, layouts: Sequence[Layout], shares: Shares | None, seeds: Sequence[bytes]
    ) -> Upload:
        """What one device puts into the sum, with its noise, if any, by a seed for each band."""
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

    The number of devices in the ``cohort`` is the operator's own knowledge, kept out of every file;
    the mean training ``loss`` is known in simulation only, and outside the guarantee.
    """

    total: NDArray[np.int64]
    cohort: int
    loss: float | None


_SURELY, _FEW = 0.99, 1 << 22  # a float32 norm of so few numbers is off by less than 1 %


def clip(values: NDArray[np.float32], clip_norm: float) -> NDArray[np.float32]:
    """Scale each row down to an L2 norm of at most ``clip_norm``; broken rows become zeros."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt((values[:, None] @ values[:, :, None])[:, 0, 0]).astype(np.float64)
        sound = np.isfinite(norms)
        if values.shape[1] > _FEW or (norms[sound] > _SURELY * clip_norm).any():
            # A float32 norm of millions of numbers is off by 1e-5: too much for a fine grid.
            norms = np.sqrt(squared_norms(values))
            norms *= 1 + 1e-6  # products with a factor are rounded
        factors = np.minimum(1, clip_norm / np.maximum(norms, np.finfo(np.float32).tiny))
        if sound.all() and factors.min(initial=1) == 1:
            return values
        clipped: NDArray[np.float32] = values * factors.astype(np.float32)[:, None]
    clipped[~sound] = 0
    return clipped


# --------------------------------------------------------------------------- beside the rounds

Order = NDArray[np.int64]
"""For each place in the order the number of an item in the catalogue, shape ``(n,)``."""


@dataclass(frozen=True)
class SideSum:
    """A secure sum like that of a round, once before the first or after the last one.

    It is of vectors between 0 and 1, of which no more than so many entries are not 0, in the same
    whole number of steps. So the bound of their norm is exact.

    Args:
        size: entries of a vector.
        most: entries that may be other than 0.
        step: what 1 is, in steps of the integer grid: fine enough for noise in shares.
        event: what an attempt is charged as; everybody takes part.
        protection: of one band, that of the vectors.
    """

    size: int
    most: int
    step: int
    event: RoundEvent
    protection: Protection

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of the vectors, which devices of all capacities send alike."""
        return (Layout(0, self.size, 1, 0),)

    @property
    def bound(self) -> float:
        """L2 sensitivity of the sum when one history is replaced by none."""
        return self.step * math.sqrt(self.most)


FIGURES = ("loss", "hits", "count")
"""What an :class:`Evaluating` sums of each user, each in [0, 1]."""


@dataclass(frozen=True)
class Evaluating(SideSum):
    """The sum of every user's :data:`FIGURES`, by the model after the last round.

    Its ``index`` follows those of all rounds: devices take part in ascending order.
    """

    index: int

    def round(self, run_id: str, attempt: int, plan_digest: str, model: Sequence[bytes]) -> Round:
        """One attempt, bound to the digests of all bands of the model that is evaluated.

        A server that had two devices evaluate two models would have them in two sums.
        """
        whole = hashlib.sha256(b"".join(model)).digest()
        return Round(run_id, self.index, attempt, self.event, plan_digest, (whole,))

    def bounded(self, figures: NDArray[np.float64]) -> BoundedUpdate:
        """What devices put into the sum, by their figures, ``(m, 3)``, before their noise.

        Promise: whatever the figures are, each counts for no less than 0 and no more than 1.
        """
        within = np.nan_to_num(figures, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
        integers = np.rint(within * self.step).astype(np.int32)
        return BoundedUpdate(integers, Address.whole(self.layouts[0]))


@dataclass(frozen=True)
class Counting(SideSum):
    """One count of the items of a catalogue, of which a user counts some.

    Vectors are of 0 and 1, and nothing is rounded. The order of the items by the noisy counts is
    bound to all rounds that follow, by their plan: a server that told two devices of two orders
    would have them in two rounds.
    """

    @property
    def items(self) -> int:
        """Size of the catalogue."""
        return self.size

    def round(self, run_id: str, attempt: int, plan_digest: str) -> Round:
        """One attempt at the count, for which devices are sent no model."""
        return Round(run_id, PREPARATION, attempt, self.event, plan_digest, (digest(),))

    def bounded(self, data: Histories, root: SecretRoot, round: Round) -> BoundedUpdate:
        """What devices put into the sum, before their noise.

        Promise: an item counts once, whatever a history names twice; of a history that has more
        items than count, which do is uniform, and drawn from the devices' secret, for each user by
        itself.
        """
        pairs = data.pairs(self.items)
        rows, users = pairs // self.items, data.users.tolist()
        starts = np.searchsorted(rows, np.arange(len(users) + 1))
        for row in np.flatnonzero(np.diff(starts) > self.most).tolist():
            own = pairs[starts[row] : starts[row + 1]]
            lots = root.stream("popularity", *round.context, users[row]).uint64(len(own))
            own[:] = own[np.argsort(lots, kind="stable")]
        places = np.arange(len(pairs)) - starts[rows]
        counted = places < self.most
        width = min(self.most, int(np.diff(starts).max(initial=0)))
        blocks = np.zeros((len(users), width), np.int64)
        integers = np.zeros(blocks.shape, np.int32)
        blocks[rows[counted], places[counted]] = pairs[counted] % self.items
        integers[rows[counted], places[counted]] = self.step
        address = Address(blocks, np.zeros((1, 0), np.int64), self.layouts[0])
        return BoundedUpdate(integers, address)


def by_counts(counts: NDArray[np.integer]) -> Order:
    """The order of items by their counts, the largest first."""
    return np.argsort(-counts, kind="stable")


def agreed_places(packed: bytes, items: int, told: bytes) -> NDArray[np.int32]:
    """The place of each item in the order that a device was sent, the bytes of an :data:`Order`.

    ReleaseRefused unless its digest is the one that the round is bound to: a server that gave each
    device another order could tell its part of a sum from the others'. Refused, too, is what is no
    order of the catalogue.
    """
    order = np.frombuffer(packed if len(packed) == 8 * items else b"", np.int64)
    if digest(order) != told or not np.array_equal(np.sort(order), np.arange(items)):
        raise ReleaseRefused(
            f"an order of the {items} items that is not the one that the round is bound to; "
            "nothing is answered"
        )
    places = np.empty(items, np.int32)
    places[order] = np.arange(items, dtype=np.int32)
    return places
