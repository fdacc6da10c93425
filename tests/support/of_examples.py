"""Small recommenders whose single examples are to be hidden, and settings that allow for it."""

from __future__ import annotations

from privrec.device.device import Settings
from privrec.device.tier import ModelView
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable
from privrec.models.ncf import NCF

ITEMS, DIM, BLOCK = 24, 8, 4


def recommender(kind: str = "gmf", *, compressed: bool = False) -> ModelView[NCF]:
    ncf = NCF.of(kind, DIM, (6,))
    if compressed:
        vectors = Subspace.sized(ITEMS, DIM, block=BLOCK, key=3, compression=4.0)
        biases = Subspace.sized(ITEMS, 1, block=1, key=5, compression=4.0)
    else:
        vectors = PlainTable.of(ITEMS, DIM, block=BLOCK)
        biases = PlainTable.of(ITEMS, 1, block=1)
    return ModelView.of(ncf, vectors, biases)


def settings_of(loss: str, steps: int, rate: float) -> Settings:
    """Of noisy steps with three negatives an example; they look at nothing else."""
    return Settings(
        loss=loss, newton=False, max_samples=None, user_steps=2, user_lr=1.0, user_l2=0.3,
        serve_steps=3, local_steps=steps, local_lr=rate, negatives=3, serve_negatives=6,
        unobserved_weight=0.1, item_l2=0.01,
    )  # fmt: skip
