"""Settings that work with noise, from how many users, items and interactions there are.

They are those of ``scenarios/frontier-ml-1m.toml``, carried over to other sizes; what decides was
found on the validation splits of MovieLens 1M and 100K. The step of the server is the shorter of:

- As long as the task needs. The update of a user of ``h`` items, clipped to the norm ``C``, moves
  each of them by about ``C / sqrt(h)``. Of ``m`` items each has ``h / m`` of the users, so the mean
  over users moves an item by about ``C * sqrt(h) / m``, and in ``rounds`` steps its vector is to
  travel a fixed way: ``lr = REACH * m / (C * sqrt(h) * rounds)``.
- As short as the noise demands. In a coordinate it piles up to ``lr * C * sigma * sqrt(rounds) /
  users``, and ``sigma = sqrt(rounds) / mu`` where the run as a whole is as hard to see through as
  one Gaussian of mean ``mu``: ``lr = NOISE * users * mu / (C * rounds)``.

Where interactions have times, the last ones count more in the fit that recommends
(``train.serve_recency``), which costs no budget: on MovieLens 100K HR@10 rises by 0.04, and where
order means nothing, as in invented tables, it falls by 0.01.

Vectors are long where an item's interactions times ``mu`` leave room for more than taste's first
few dimensions. Ranks of items, which cost budget, are left out: they helped on MovieLens 1M (HR@10
by 0.009), and did harm on MovieLens 100K, on Gowalla at ε = 2 and on invented tables. Where uploads
are limited, vectors are shorter: that costs less than to hash long ones into as much memory.
"""

from __future__ import annotations

import math
from typing import Any

from privrec.errors import UsageError

REACH, NOISE = 5.0, 0.3
ROUNDS = 40
SHORT, LONG = 8, 16
CLEAR = 300.0
"""Interactions of an item times ``mu``, from which vectors are ``LONG``."""
CLIP_NORM = 1.0
WHOLE_CATALOGUE = 20_000
"""Items up to which a device computes the softmax over all of them; of more, over a sample."""
SAMPLE = 1_024
RECENCY = 0.5


def private_settings(
    users: int,
    items: int,
    interactions: int,
    *,
    epsilon: float = 8.0,
    upload_bytes: float = math.inf,
    timed: bool = False,
) -> dict[str, dict[str, Any]]:
    """Tables of a scenario for implicit feedback at a user-level ``epsilon``.

    Everybody takes part in each of a few rounds, so that ``epsilon`` holds also against somebody
    who knows every cohort. The three counts show in the settings: they are public from there on.
    ``timed`` says that the data has times, by which the last items of a user are known.

    Raises:
        UsageError: when one number and a bias for each item is more than ``upload_bytes`` a round.
    """
    delta = delta_for(users)
    mu = _mean_of(epsilon, delta)
    far = REACH * items / (CLIP_NORM * math.sqrt(interactions / users) * ROUNDS)
    quiet = NOISE * users * mu / (CLIP_NORM * ROUNDS)
    dim = LONG if interactions * mu >= CLEAR * items else SHORT
    while dim > 1 and 4 * items * (dim + 1) > upload_bytes:
        dim //= 2
    if 4 * items * (dim + 1) > upload_bytes:
        raise UsageError(
            f"an upload of {upload_bytes:,.0f} bytes: {items:,} items take {8 * items:,} with one "
            "number and a bias each; allow as much, or leave out rare items by data.min_item"
        )
    train: dict[str, Any] = {
        "rounds": ROUNDS,
        "loss": "full_softmax",
        "user_steps": 2,
        "server_optimizer": "fedavg",
        "server_lr": _two_digits(min(far, quiet)),
    }
    if items > WHOLE_CATALOGUE:
        budget = _two_digits(SAMPLE / items)
        train |= {"selector": "uniform", "budget": budget, "serve_budget": 1.0}
    else:
        train |= {"user_steps": 4, "shared_curvature": True}
    if timed:
        train["serve_recency"] = RECENCY
    return {
        "model": {"kind": "gmf", "dim": dim, "block": dim, "init_std": 0.02},
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
