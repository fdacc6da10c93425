"""What a device is told of its round, and what everybody agrees on about protecting an update."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.models.layout import Layout, band_sizes, bands
from privrec.privacy.events import RoundEvent
from privrec.privacy.mechanism import Shares
from privrec.secagg.keys import statement
from privrec.secagg.ring import Encoding, Ring, Rotation
from privrec.secagg.roster import Terms


@dataclass(frozen=True)
class Round:
    """One attempt at one round: what runs is what is charged.

    Args:
        run_id: the run it belongs to.
        index: the round, counted from 0.
        attempt: 0, or more when a round had to be drawn anew.
        event: its privacy event.
        plan_digest: digest of the scenario that the devices agreed to.
        model_digests: digests of the weights that the devices start from, one for each band, the
            one that every tier holds first. A device checks those of its own prefix.
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
    """SHA-256 of each band of a vector, the weakest tier's first.

    Args:
        weights: of the first layout.
        layouts: of the tiers up to the vector's own, the strongest first.
    """
    digests = []
    for parts in bands(weights, layouts):
        sha = hashlib.sha256()
        for part in filter(len, parts):
            sha.update(np.ascontiguousarray(part).data.cast("B"))
        digests.append(sha.digest())
    return tuple(digests)


def digest(array: NDArray[Any]) -> bytes:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).digest()


SMALL_RING_BITS = 16


@dataclass(frozen=True)
class Protection:
    """From a trained update to integers that may be summed, the same in every round of a run.

    Args:
        encoding: clip norm and grid, and with them the sensitivity of a sum.
        ring: in which sums are taken; the small one needs every update rotated.
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

    def rotation(self, round: Round, layouts: Sequence[Layout]) -> Rotation | None:
        """The public rotation of a round, of the bands that these tiers have; None for none.

        It depends on no update, and is another one in each attempt.
        """
        if self.ring.bits != SMALL_RING_BITS:
            return None
        seed = statement("rotation", round.run_id, round.index, round.attempt)
        return Rotation(band_sizes(layouts), seed)

    def terms(self, round: Round, layouts: Sequence[Layout]) -> Terms:
        """The terms of a round, as the server states them and as each device holds it to them.

        Args:
            round: the round.
            layouts: of all tiers, the strongest first.
        """
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
