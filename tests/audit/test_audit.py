"""An honest build passes, in every kind of scenario and whatever the draws."""

from __future__ import annotations

import pytest
from audit_scenarios import KINDS, failed, scenario

import privrec
from privrec.audit import audit, noise
from privrec.audit.harness import ALPHA, STAND_IN_ITEMS, stand_in


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "MOST_SHARES", 60_000_000)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_honest_build_passes(kind: str) -> None:
    found = audit(scenario(kind), canaries=60)
    assert not failed(found)
    assert found.passed
    assert (found.version, found.scenario_hash) == (privrec.__version__, scenario(kind).hash())
    if kind in ("none", "examples"):
        assert found.lower_bound is found.confidence is found.claimed is None
        why = {"none": "adds no noise", "examples": "so no canary is a user"}[kind]
        assert why in found.method
    else:
        assert found.lower_bound is not None
        assert found.claimed is not None
        assert found.lower_bound < found.claimed <= 6.001
    names = [check.probe for check in found.checks]
    assert len(set(names)) == len(names)
    assert len(names) * ALPHA < 1e-6


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["central", "poisson", "tiers"])
def test_an_honest_build_passes_whatever_the_draws(kind: str) -> None:
    for number in range(12):
        key = b"honest" + bytes([number])
        assert not failed(audit(scenario(kind), canaries=100, key=key))


def test_an_audit_with_a_key_repeats() -> None:
    plan = scenario("central")
    assert audit(plan, canaries=20, key=b"k") == audit(plan, canaries=20, key=b"k")
    assert audit(plan, canaries=0, key=b"k") != audit(plan, canaries=0, key=b"l")


def test_canaries_may_be_left_out() -> None:
    found = audit(scenario("central"), canaries=0)
    assert found.passed
    assert found.lower_bound is None
    assert found.claimed is not None
    assert "left out" in found.method


def test_every_band_has_its_own_line() -> None:
    names = [check.probe for check in audit(scenario("mixed"), canaries=0).checks]
    for name in ("amount of noise, band 1 of 2", "amount of noise, a device's share, band 2 of 2"):
        assert name in names


def test_numbers_that_are_not_public_are_made_up_and_named() -> None:
    named = ("users", "items", "clusters", "interactions_per_user")
    unknown = ("data.source=table", "data.path=nowhere", *(f"data.{name}=" for name in named))
    found = audit(scenario("central", *unknown), canaries=0)
    assert found.passed
    assert f"{STAND_IN_ITEMS:,} items" in found.method


@pytest.mark.parametrize(("users", "items"), [(5, 1), (40, 3), (7, 7919), (300, 60)])
def test_stand_in_histories_name_no_item_twice(users: int, items: int) -> None:
    made = stand_in(users, items)
    assert (made.n_users, made.n_items) == (users, items)
    for user in range(users):
        mine = made.items[made.indptr[user] : made.indptr[user + 1]]
        assert len(set(mine.tolist())) == len(mine) >= 1
        assert mine.max() < items
