"""What all tests share: one thread, no clock in Hypothesis, and federations of mixed capacity."""

from __future__ import annotations

import logging
import os

# Before NumPy and torch are loaded, and for the processes that tests start: workers of several
# threads each fight over the cores, and the last bits of a sum depend on the number of threads.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from parts import Parts, assemble

from privrec import data
from privrec.data import Split
from privrec.device.tier import Federation, Tier
from privrec.models.losses import pack
from privrec.randomness import SecretRoot
from privrec.scenario.load import Scenario

# The same examples everywhere, and nothing that a busy machine could fail.
hypothesis.settings.register_profile(
    "privrec",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("privrec")

USERS, ITEMS, DIM = 36, 48, 8
SYSTEMS: dict[str, dict[str, Any]] = {
    "fold": {},
    "rows": {"devices.popularity": "public"},
    "dims": {"devices.nesting": "dims"},
}
MIXED = f"""
name = "mixed"
[data]
users = {USERS}
items = {ITEMS}
clusters = 3
interactions_per_user = 8
[model]
dim = {DIM}
block = 2
init_std = 0.4
[devices]
sampling_rate = 0.5
[train]
rounds = 4
user_steps = 2
[privacy]
noise = "none"
clip_norm = 0.5
"""


@dataclass(frozen=True)
class Mixed:
    """The parts of a run of mixed capacities, and what they were made from."""

    scenario: Scenario
    split: Split
    parts: Parts

    @property
    def federation(self) -> Federation:
        return self.parts.federation

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return self.federation.tiers

    def weights(self, seed: int = 0) -> np.ndarray:
        """Coefficients as in the midst of a run, with a users' Gram matrix where one is kept."""
        rng, layout = np.random.default_rng(seed), self.federation.layout
        weights = rng.normal(0, 0.4, layout.size).astype(np.float32)
        if layout.gram:
            users = rng.normal(0, 0.4, (20, self.tiers[0].model.vectors.dim))
            layout.gram_of(weights)[...] = pack(users.astype(np.float32)).mean(0)
        return weights


def make_mixed(
    system: str = "fold",
    capacities: Sequence[float] = (1.0, 0.5, 0.25),
    *,
    shares: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    **changes: Any,
) -> Mixed:
    """Tiers of one system; further keys with ``__`` for the dot; implicit ALS as it needs it."""
    shares = shares or [1 / len(capacities)] * len(capacities)
    tiers = [
        {"capacity": capacity, "share": share, "weight": weight}
        for capacity, share, weight in zip(
            capacities, shares, weights or [1.0] * len(capacities), strict=True
        )
    ]
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    if settings.get("model.kind") == "neumf":
        settings = {"model.hidden": (6, 5), **settings}
    if settings.get("train.loss") == "ials":
        settings = {"model.item_bias": False, **settings}
    settings = {**SYSTEMS[system], "devices.tiers": tiers, **settings}
    scenario = Scenario.from_toml(MIXED).with_settings(settings)
    split = data.load(scenario.data, data_dir=None)
    parts = assemble(scenario, split.train, "run", SecretRoot.known(b"devices"))
    return Mixed(scenario, split, parts)


@pytest.fixture
def mixed() -> Callable[..., Mixed]:
    return make_mixed


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secrets of the test's own."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def flower_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's log as it is at first: some of its own parts silence it for a whole process."""
    for name in ("flwr", "flwr.privrec"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
