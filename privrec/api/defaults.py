"""Settings that suit a data set's size, where nobody has chosen others."""

from __future__ import annotations

import math
from typing import Any

WHOLE_CATALOGUE = 50_000
"""Items up to which every device looks at all of them."""


def default_settings(users: int, items: int) -> dict[str, Any]:
    """Return settings, by dotted key, of a private recommender of so many users and items.

    Everybody takes part in each of a few rounds, so that the same ε holds against somebody who
    knows every cohort; users learn by a softmax over the whole catalogue where it is small enough;
    updates are averaged plainly. δ is the largest power of ten below a tenth of one over the users.
    """
    loss: dict[str, Any] = {"train.loss": "full_softmax"}
    if items > WHOLE_CATALOGUE:
        loss |= {"train.selector": "uniform", "train.budget": WHOLE_CATALOGUE / items}
    return {
        **loss,
        "model.dim": 32,
        "model.init_std": 0.02,
        "devices.sampling": "everybody",
        "train.rounds": 40,
        "train.user_steps": 2,
        "train.server_optimizer": "fedavg",
        # Steps grow with the catalogue: every update has the same norm, over more items.
        "train.server_lr": float(f"{6 * (items / 200) ** 0.6:.2g}"),
        "privacy.noise": "central",
        "privacy.clip_norm": 1.0,
        "privacy.epsilon": 8.0,
        "privacy.delta": min(1e-5, 10.0 ** (-math.ceil(math.log10(users)) - 1)),
    }
