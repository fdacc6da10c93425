"""Which output neurons a device trains, within a budget, and how many words each stands for.

The words of the device's own text are always active. Of the rest of the budget a part is public
(the most common words), a part is selected by hidden states of the device, and what is left is
drawn by chance from all others, each standing for as many of them as were not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecretRoot
from privrec.search.active import active_set

FloatArray = NDArray[np.float32]
Items = NDArray[np.int64]
Find = Callable[[FloatArray, int, Items], Items]
"""Neurons near to hidden states: queries, how many, which not; ascending, maybe fewer."""

QUERIES = 16
"""Hidden states that a device searches with: some of its positions, evenly spread."""

_BY_CHANCE = b"neurons by chance are the round's, and no secret"


@dataclass(frozen=True)
class Output:
    """How wide the output layer of a device is.

    Args:
        words: size of the vocabulary, ordered by how common the words are.
        share: of the neurons that are active, in (0, 1].
        selected: share of the budget that is selected by hidden states, in [0, 1].
        frequent: share of the budget that is the most common words, in [0, 1]; together at most 1.
    """

    words: int
    share: float = 1.0
    selected: float = 0.0
    frequent: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share = {self.share}: must lie above 0 and at most 1; change it")
        parts = (self.selected, self.frequent, self.selected + self.frequent)
        if not all(0 <= part <= 1 for part in parts):
            raise UsageError(
                f"selected = {self.selected}, frequent = {self.frequent}: shares of a budget, "
                "together at most 1; lower one of them"
            )

    @property
    def budget(self) -> int:
        """Active neurons, exactly."""
        return max(1, round(self.share * self.words))

    def active(self, own: Items, queries: FloatArray, find: Find | None, key: int, user: int
    ) -> Active:  # fmt: skip
        """The active neurons of one device.

        Args:
            own: words of its text, ascending, at most :attr:`budget` of them.
            queries: its hidden states, shape ``(q, dim)``.
            find: who selects; None for nobody.
            key: the round's key, for the draw by chance.
            user: whose draw it is.
        """
        room = max(0, self.budget - len(own))
        common = self._common(own, round(self.frequent * room))
        wanted = min(round(self.selected * room), room - len(common))
        chosen = np.zeros(0, np.int64)
        if find is not None and wanted and np.isfinite(queries).all():
            chosen = find(queries, wanted, np.union1d(own, common))
        stream = SecretRoot.known(_BY_CHANCE).stream("neurons", key, user)
        found = active_set(own, np.concatenate((common, chosen)), self.budget, self.words, stream)
        items, logs = found.neurons.numpy(), found.log_weights.numpy()
        order = np.argsort(items)
        return Active(items[order], logs[order])

    def _common(self, own: Items, count: int) -> Items:
        """The ``count`` most common words that are not the device's own anyway."""
        first = np.arange(min(self.words, len(own) + count))
        return np.setdiff1d(first, own, assume_unique=True)[:count]


@dataclass(frozen=True)
class Active:
    """Neurons that take part, ascending without repeats, and the logarithms of their weights."""

    items: Items
    logs: FloatArray

    def places(self, words: NDArray[np.integer]) -> Items:
        """Where words lie among the neurons, of the shape of ``words``; all of them are active."""
        return np.searchsorted(self.items, words)


def spread(count: int, most: int = QUERIES) -> Items:
    """Positions of an even sample."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
