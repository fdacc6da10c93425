"""What a device is told of the round that it takes part in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        model_digest: digest of the weights that the devices start from.
    """

    run_id: str
    index: int
    attempt: int
    event: RoundEvent
    plan_digest: str
    model_digest: bytes

    @property
    def context(self) -> tuple[str | int | bytes, ...]:
        """What binds every secret draw to this attempt: same context and input, same noise."""
        return (self.run_id, self.index, self.attempt, self.plan_digest, self.model_digest)


def digest(array: NDArray[Any]) -> bytes:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).digest()
