"""Settings that work with noise, from how many users, items and interactions there are.

They are those of ``scenarios/ml-1m-dp.toml``, carried over to other sizes. What has to be carried
over is the step of the server, the shorter of two:

- As long as the task needs. The update of a user of ``h`` items, clipped to the norm ``C``, moves
  each of them by about ``C / sqrt(h)``. Of ``m`` items each has ``h / m`` of the users, so the mean
  over users moves an item by about ``C * sqrt(h) / m``, and in ``rounds`` steps its vector is to
  travel a fixed way: ``lr = REACH * m / (C * sqrt(h) * rounds)``.
- As short as the noise demands. In a coordinate it piles up to ``lr * C * sigma * sqrt(rounds) /
  users``, and ``sigma = sqrt(rounds) / mu`` where the run as a whole is as hard to see through as
  one Gaussian of mean ``mu``: ``lr = NOISE * users * mu / (C * rounds)``.
"""

from __future__ import annotations

import math
from typing import Any

REACH, NOISE = 5.0, 0.15
ROUNDS = 40
DIM = 16
CLIP_NORM = 1.0
WHOLE_CATALOGUE = 20_000
"""Items up to which a device computes the softmax over all of them; of more, it samples so many."""


def private_settings(
    users: int, items: int, interactions: int, *, epsilon: float = 8.0
) -> dict[str, dict[str, Any]]:
    """Tables of a scenario for implicit feedback at a user-level ``epsilon``.

    Everybody takes part in each of a few rounds, so that ``epsilon`` holds also against somebody
    who knows every cohort. The three counts show in the settings: they are public from there on.
    """
    delta = delta_for(users)
    far = REACH * items / (CLIP_NORM * math.sqrt(interactions / users) * ROUNDS)
    quiet = NOISE * users * _mean_of(epsilon, delta) / (CLIP_NORM * ROUNDS)
    train: dict[str, Any] = {
        "rounds": ROUNDS,
        "loss": "full_softmax",
        "user_steps": 2,
        "server_optimizer": "fedavg",
        "server_lr": _two_digits(min(far, quiet)),
    }
    if items > WHOLE_CATALOGUE:
        budget = _two_digits(WHOLE_CATALOGUE / items)
        train |= {"selector": "uniform", "budget": budget, "serve_budget": 1.0}
    return {
        "model": {"kind": "gmf", "dim": DIM, "block": DIM, "init_std": 0.02},
        "devices": {"population": users, "sampling": "everybody"},
        "train": train,
        "privacy": {
            "noise": "central",
            "clip_norm": CLIP_NORM,
            "epsilon": epsilon,
            "delta": delta,
            "budget_against": "server",
        },
    }


def delta_for(users: int) -> float:
    """The largest power of ten that is at most a tenth of one over the users, and at most 1e-5."""
    return float(f"1e-{max(5, math.ceil(math.log10(10 * users)))}")


def _mean_of(epsilon: float, delta: float) -> float:
    """Mean of a Gaussian as hard to see through, by zCDP: for a step's length, not for a promise.

    Source: Bun and Steinke, "Concentrated Differential Privacy" (TCC 2016), proposition 1.3.
    """
    log = math.log(1 / delta)
    return math.sqrt(2) * (math.sqrt(log + epsilon) - math.sqrt(log))


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
