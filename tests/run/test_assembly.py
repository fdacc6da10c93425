"""From a scenario to its parts: who is in which tier, what a tier holds, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import assemble

from privrec.data import Interactions
from privrec.errors import UsageError
from privrec.models.layout import packed_size
from privrec.randomness import SecretRoot
from privrec.run.plan import BYTES_A_COEFFICIENT, assign, federation_of
from privrec.scenario.load import Scenario

PLAIN = """
name = "plain"
[model]
dim = 8
block = 2
[privacy]
noise = "none"
"""
SYSTEMS: dict[str, dict[str, Any]] = {
    "fold": {},
    "rows": {"devices.popularity": "public"},
    "dims": {"devices.nesting": "dims"},
}
QUARTERS = [{"capacity": 2.0**-h, "share": 0.25} for h in (0, 2, 1, 3)]


def scenario(changes: dict[str, Any]) -> Scenario:
    return Scenario.from_toml(PLAIN).with_settings(changes)


def tiers(*described: tuple[float, float, float]) -> dict[str, Any]:
    names = ("capacity", "share", "weight")
    return {"devices.tiers": [dict(zip(names, each, strict=True)) for each in described]}


def train_of(users: int, items: int = 40) -> Interactions:
    pairs = [(user, (user * 7 + step) % items) for user in range(users) for step in range(5)]
    return Interactions.from_pairs(*zip(*pairs, strict=True), item_ids=range(items))


# --------------------------------------------------------------------------- who


@settings(max_examples=60)
@given(
    st.integers(1, 500),
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_tier_has_its_share_of_the_users(
    users: int, parts: list[int], idle: bool, seed: int
) -> None:
    """Also devices that hold nothing, which come last."""
    shares = [part / sum(parts) for part in parts]
    described = [(2.0**-h, share, 1.0) for h, share in enumerate(shares)]
    if idle and len(parts) > 1:
        described[-1] = (0.0, shares[-1], 1.0)
    federation = federation_of(scenario({**tiers(*described), "model.item_bias": False}), 64)
    assigned = assign(users, federation, seed)
    assert len(assigned) == users
    counts = np.bincount(assigned, minlength=len(parts))
    assert len(counts) == len(parts)
    assert np.all(np.abs(counts - np.array(shares) * users) <= 1 + 1e-9)
    assert np.array_equal(assign(users, federation, seed), assigned)


def test_tiers_are_drawn_without_regard_to_the_users() -> None:
    federation = federation_of(scenario(tiers((1.0, 0.5, 1.0), (0.5, 0.5, 1.0))), 64)
    one, other = (assign(1000, federation, seed) for seed in (0, 1))
    assert 400 < np.count_nonzero(one == other) < 600
    halves = one[:500].sum(), one[500:].sum()
    assert abs(halves[0] - halves[1]) < 100


def test_the_expected_cohort_counts_who_trains() -> None:
    described = tiers((1.0, 0.5, 1.0), (0.5, 0.3, 0.0), (0.25, 0.2, 0.5))
    changes = {**described, "devices.sampling_rate": 0.1}
    parts = assemble(scenario(changes), train_of(50), "run", SecretRoot.known(b"x"))
    assert parts.server.plan.expected_cohort == pytest.approx(0.1 * 35)
    assert [len(cohort.states) for cohort in parts.simulation.cohorts] == [25, 15, 10]
    assert len(parts.everyone.states) == 50
    users = np.concatenate([cohort.users for cohort in parts.simulation.cohorts])
    assert sorted(users) == list(range(50))


# --------------------------------------------------------------------------- what


@pytest.mark.parametrize("system", SYSTEMS)
def test_tiers_are_sorted_from_strong_to_weak(system: str) -> None:
    quarters = [{**tier, "weight": tier["capacity"]} for tier in QUARTERS]
    changes = {**SYSTEMS[system], "devices.tiers": quarters, "model.block": 1}
    federation = federation_of(scenario(changes), 40)
    assert [tier.capacity for tier in federation.tiers] == [1, 0.5, 0.25, 0.125]
    assert [tier.index for tier in federation.tiers] == [0, 1, 2, 3]
    assert [tier.weight for tier in federation.tiers] == [1, 0.5, 0.25, 0.125]
    whole = federation.tiers[0].model.vectors
    for tier in federation.tiers:
        table = tier.model.vectors
        assert table.size == whole.size * tier.capacity
        assert tier.layout.slots == table.slots == tier.vectors.tables[tier.index].slots
        assert tier.model.network.dot == table.dim


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_weakest_capacity_alone_is_a_smaller_model_of_the_same_kind(system: str) -> None:
    """Its table is that of the tier in a mixture, so that rows of a comparison compare."""
    alone = federation_of(scenario({**SYSTEMS[system], **tiers((0.25, 1.0, 1.0))}), 40)
    mixed = federation_of(
        scenario({**SYSTEMS[system], **tiers((1.0, 0.5, 1.0), (0.25, 0.5, 1.0))}), 40
    )
    assert alone.tiers[0].model == mixed.tiers[1].model
    assert alone.tiers[0].model.network == mixed.tiers[1].model.network
    assert alone.layout == mixed.tiers[1].layout


@pytest.mark.parametrize("loss", ["bce", "ials"])
def test_in_dims_biases_are_whole_and_gram_matrices_small(loss: str) -> None:
    changes = {"devices.nesting": "dims", **tiers((1.0, 0.5, 1.0), (0.25, 0.5, 1.0))}
    if loss == "ials":
        changes |= {"train.loss": "ials", "model.item_bias": False}
    strong, weak = federation_of(scenario(changes), 40).tiers
    assert weak.model.vectors.dim == 2
    assert (strong.layout.gram, weak.layout.gram) == (
        (packed_size(8), packed_size(2)) if loss == "ials" else (0, 0)
    )
    assert strong.layout.bias_slots == weak.layout.bias_slots == (0 if loss == "ials" else 40)


@pytest.mark.parametrize("kib", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("system", ["fold", "rows"])
def test_a_memory_in_kib_picks_the_largest_tier_that_fits(system: str, kib: int) -> None:
    described = [{"capacity": 1.0, "share": 0.5}, {"memory_kib": kib, "share": 0.5}]
    changes = {**SYSTEMS[system], "devices.tiers": described}
    if kib == 100:
        with pytest.raises(UsageError, match="two tiers of the same capacity are one"):
            federation_of(scenario(changes), 300)
        return
    chain = federation_of(scenario(changes), 300)
    tier, whole = chain.tiers[1], chain.tiers[0]
    room = 1024 * kib
    assert tier.layout.size * BYTES_A_COEFFICIENT <= room
    assert whole.layout.size * BYTES_A_COEFFICIENT * 2 * tier.capacity > room


@pytest.mark.parametrize(
    ("items", "changes", "says"),
    [
        (6, {**SYSTEMS["rows"], **tiers((1.0, 0.5, 1.0), (0.125, 0.5, 1.0))}, "1/8 of 6 items"),
        (40, {**SYSTEMS["dims"], **tiers((1.0, 0.5, 1.0), (0.125, 0.5, 1.0))}, "1/8 of dim = 8"),
        (2, tiers((1.0, 0.5, 1.0), (0.0625, 0.5, 1.0)), "0 to 3 for 8 slots"),
    ],
)
def test_capacities_that_do_not_nest_in_the_catalogue_are_refused(
    items: int, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        federation_of(scenario(changes), items)


def test_a_catalogue_of_any_size_nests_in_rows_and_fold() -> None:
    for items in (9, 13, 37, 101):
        for system in ("fold", "rows"):
            changes = {**SYSTEMS[system], "devices.tiers": QUARTERS}
            federation = federation_of(scenario(changes), items)
            slots = [tier.layout.slots for tier in federation.tiers]
            assert slots == sorted(slots, reverse=True)
            assert len(set(slots)) == 4


def test_fair_averaging_steps_as_far_as_the_folded_memory_itself() -> None:
    described = tiers((1.0, 0.5, 1.0), (0.25, 0.5, 1.0))
    fair = {
        **described,
        "devices.aggregation": "fair_averaging",
        "train.server_optimizer": "fedavg",
        "train.local_lr": 0.3,
    }
    for changes, gains in ((fair, [1, 4]), ({**described, "train.local_lr": 0.3}, [1, 1])):
        parts = assemble(scenario(changes), train_of(20), "run", SecretRoot.known(b"x"))
        rates = [cohort.learner.settings.local_lr for cohort in parts.simulation.cohorts]
        assert rates == pytest.approx([0.3 * gain for gain in gains])
        assert parts.everyone.learner.settings.local_lr == 0.3


def test_the_first_weights_do_not_depend_on_the_tiers() -> None:
    """Gaussian coefficients are a Gaussian memory: the system is orthonormal."""
    one, mixed = (
        assemble(scenario(changes), train_of(20), "run", SecretRoot.known(b"x"))
        for changes in (tiers((1.0, 0.5, 1.0), (weak, 0.5, 1.0)) for weak in (0.5, 0.25))
    )
    assert np.array_equal(one.server.weights, mixed.server.weights)
    view = mixed.federation.tiers[1].view(
        mixed.federation.prefix(mixed.server.weights, mixed.federation.tiers[1])
    )
    memory = mixed.federation.tiers[1].layout.memory_of(view)
    assert memory.std() == pytest.approx(0.01, rel=0.3)
