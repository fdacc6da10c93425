"""What the accounting takes for granted: a history replaced by none adds nothing to the sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parts import Parts, assemble

import privrec
from privrec import data
from privrec.device.device import Device
from privrec.randomness import SecretRoot
from privrec.server.server import Server

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("data.users=40", "data.items=60", "devices.population=40", "train.local_steps=2")
KNOWN = SecretRoot.known(b"a key for tests")


def parts_of(*settings: str) -> tuple[Parts, data.Split]:
    scenario = privrec.load_scenario(ROOT / "scenarios" / "quickstart.toml", (*SMALL, *settings))
    split = data.load(scenario.data, data_dir=None)
    return assemble(scenario, split.train, "run", KNOWN), split


def norm_of_answer(parts: Parts, history: np.ndarray, state: np.ndarray, index: int = 0) -> float:
    """Of a device of one tier, by default the strongest."""
    server: Server = parts.server
    federation, protection = parts.federation, server.plan.protection
    tier, learner = federation.tiers[index], parts.simulation.cohorts[index].learner
    private = state.astype(np.float32)[: tier.model.network.user_dim]
    device = Device(
        3, history, tier, federation.layouts_of(tier), learner, protection, KNOWN, private
    )  # fmt: skip
    coefficients = federation.prefix(server.weights, tier)
    vector = device.answer(server.next_round(0), coefficients, 5).vector()
    return float(np.linalg.norm(vector.astype(np.float64)))


TIERS = (
    "devices.tiers=[{capacity = 1.0, share = 0.5, weight = 0.5}, {capacity = 0.25, share = 0.5}]"
)
NESTINGS = {
    "fold": ("devices.nesting=fold",),
    "rows": ("devices.popularity=public",),
    "dims": ("devices.nesting=dims", "model.block=2"),
}
IALS = ("train.loss=ials", "model.item_bias=false", "train.local_steps=1")
LARGE = ("train.local_lr=1000.0", "model.init_std=0.5", "privacy.clip_norm=0.01")


@pytest.mark.parametrize("kind", ["gmf", "mlp", "neumf"])
@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax", "full_softmax"])
def test_a_device_without_history_adds_zero(kind: str, loss: str) -> None:
    parts, split = parts_of(f"model.kind={kind}", f"train.loss={loss}")
    length = parts.federation.tiers[0].model.network.user_dim
    nothing = np.zeros(0, np.int32)
    for state in (np.zeros(length), np.ones(length)):
        assert norm_of_answer(parts, nothing, state) == 0
    # The same device with a history does say something, so that the zeros above mean it.
    assert norm_of_answer(parts, split.train.history(3), np.ones(length)) > 0


def test_a_device_with_any_history_stays_within_the_bound() -> None:
    parts, split = parts_of("train.local_lr=1000.0")
    length = parts.federation.tiers[0].model.network.user_dim
    bound = parts.server.plan.protection.encoding.bound
    for history in (split.train.history(3), np.arange(60, dtype=np.int32)):
        assert 0 < norm_of_answer(parts, history, np.ones(length)) <= bound


@pytest.mark.parametrize("loss", [("train.loss=bce",), IALS], ids=["bce", "ials"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_device_of_any_tier_adds_zero_without_history_and_little_with_one(
    nesting: str, loss: tuple[str, ...]
) -> None:
    """Weights of tiers only shrink a part of the sum, so one bound serves all of them."""
    parts, split = parts_of(TIERS, *NESTINGS[nesting], *loss, *LARGE)
    length = parts.federation.tiers[0].model.network.user_dim
    bound = parts.server.plan.protection.encoding.bound
    for tier in parts.federation.tiers:
        for state in (np.zeros(length), np.ones(length)):
            assert norm_of_answer(parts, np.zeros(0, np.int32), state, tier.index) == 0
        for history in (split.train.history(3), np.arange(60, dtype=np.int32)):
            found = norm_of_answer(parts, history, np.zeros(length), tier.index)
            assert 0.9 * tier.weight * bound < found <= tier.weight * bound + 1
