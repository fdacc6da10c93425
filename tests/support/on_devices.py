"""What tests of devices share: FAIR's lift and collapse, and updates that nothing rotates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from privrec.device.device import Cohort, Draws, Trained
from privrec.device.update import BoundedUpdate, Protection, RawUpdate, Round
from privrec.embedding.nested import Nested
from privrec.privacy.events import RoundEvent
from privrec.secagg.ring import Coins, Encoding


def lift(nested: Nested, memory: np.ndarray, tier: int) -> np.ndarray:
    """The whole memory that says the same as a tier's, shape ``(slots(0), block)``."""
    lifted = np.zeros((nested.tables[0].slots, memory.shape[1]), memory.dtype)
    lifted[: len(memory)] = memory
    nested.to_coefficients(lifted[: len(memory)], tier)
    nested.to_memory(lifted, 0)
    return lifted


def collapse(nested: Nested, memory: np.ndarray, tier: int) -> np.ndarray:
    """What a tier holds of a whole memory: its orthogonal projection."""
    coefficients = memory.copy()
    nested.to_coefficients(coefficients, 0)
    prefix = coefficients[: nested.tables[tier].slots].copy()
    nested.to_memory(prefix, tier)
    return prefix


def bounded(
    update: RawUpdate, encoding: Encoding, coins: Coins, weight: float = 1.0
) -> BoundedUpdate:
    """An update bounded for a ring that needs no rotation."""
    round = Round("run", 0, 0, RoundEvent("none", 0.0, 1.0), "plan", ())
    return update.bound(Protection(encoding), round, (update.address.layout,), coins, weight)


def trained_rows(
    cohort: Cohort[Any], weights: np.ndarray, rows: np.ndarray, draws: Draws
) -> Iterator[tuple[np.ndarray, Trained]]:
    """One round's local training of some rows, a batch at a time; states are left unchanged."""
    model = cohort.model(weights)
    for batch in cohort.batches(rows):
        data, states = cohort.data.select(batch), cohort.states[batch]
        yield batch, cohort.learner.train(model, data, states, draws)
