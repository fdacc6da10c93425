"""What a device is told of the round that it takes part in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.models.layout import Layout, bands
from privrec.privacy.events import RoundEvent


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
