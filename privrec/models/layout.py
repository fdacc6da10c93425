"""How the shared parameters lie in one vector: ``[dense | memory | biases]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Layout:
    """Sections of the shared vector, dense weights first, so that a prefix always holds them.

    Args:
        dense: number of dense weights.
        slots: blocks of the item memory.
        block: floats in a block.
        bias_slots: item biases, 0 when the model has none.
    """

    dense: int
    slots: int
    block: int
    bias_slots: int

    @property
    def size(self) -> int:
        """Coefficients in the whole vector: its public dimension."""
        return self.dense + self.slots * self.block + self.bias_slots

    def dense_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the dense weights, shape ``(dense,)``."""
        return vector[: self.dense]

    def memory_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the item memory, shape ``(slots, block)``."""
        end = self.dense + self.slots * self.block
        return vector[self.dense : end].reshape(self.slots, self.block)

    def biases_of(self, vector: NDArray[Any]) -> NDArray[Any]:
        """View of the item biases, shape ``(bias_slots,)``."""
        return vector[self.size - self.bias_slots :]
