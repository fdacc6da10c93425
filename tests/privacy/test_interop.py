"""Ledgers in the words of dp-accounting and of Opacus."""

from __future__ import annotations

from collections import Counter

import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from privrec.errors import UsageError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.interop import from_dp_event, from_opacus, to_dp_event, to_opacus

DELTA = 1e-6
CHARGED = Counter(
    {RoundEvent("gaussian", 1.0, 0.01): 800, RoundEvent("gaussian", 2.0, 0.1): 50}
)  # fmt: skip


@pytest.mark.parametrize("adversary", ["recipients", "server"])
def test_dp_accounting_gives_the_ledgers_epsilon(adversary) -> None:
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    accountant.compose(to_dp_event(CHARGED, adversary))
    own = epsilon(CHARGED, DELTA, adversary)
    assert accountant.get_epsilon(DELTA) == pytest.approx(own, rel=2e-3)


def test_events_of_dp_accounting_come_back_as_they_went() -> None:
    assert from_dp_event(to_dp_event(CHARGED, "recipients")) == CHARGED
    nested = dp_event.SelfComposedDpEvent(to_dp_event(CHARGED, "recipients"), 3)
    assert from_dp_event(nested) == Counter({event: 3 * n for event, n in CHARGED.items()})
    assert from_dp_event(dp_event.NoOpDpEvent()) == Counter()
    assert epsilon(from_dp_event(dp_event.NonPrivateDpEvent()), DELTA, "server") == float("inf")


def test_other_events_are_refused() -> None:
    with pytest.raises(UsageError, match="LaplaceDpEvent"):
        from_dp_event(dp_event.LaplaceDpEvent(1.0))
    fixed = dp_event.SampledWithoutReplacementDpEvent(100, 10, dp_event.GaussianDpEvent(1.0))
    with pytest.raises(UsageError, match="SampledWithoutReplacement"):
        from_dp_event(fixed)


def test_opacus_accountants_load_the_state_and_agree() -> None:
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.load_state_dict(to_opacus(CHARGED, "recipients"))
    rdp.load_state_dict(to_opacus(CHARGED, "recipients", "rdp"))
    own = epsilon(CHARGED, DELTA, "recipients")
    assert prv.get_epsilon(DELTA) == pytest.approx(own, rel=0.02)
    assert rdp.get_epsilon(DELTA) == pytest.approx(
        epsilon(CHARGED, DELTA, "recipients", "rdp"), rel=0.02
    )


def test_a_state_of_opacus_comes_in_with_steps_added_up() -> None:
    accountant = RDPAccountant()
    for _ in range(5):
        accountant.step(noise_multiplier=1.3, sample_rate=0.02)
    accountant.step(noise_multiplier=1.1, sample_rate=0.02)
    assert from_opacus(accountant.state_dict()) == Counter(
        {RoundEvent("gaussian", 1.3, 0.02): 5, RoundEvent("gaussian", 1.1, 0.02): 1}
    )
    assert from_opacus(to_opacus(CHARGED, "recipients")) == CHARGED


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"mechanism": "gdp", "history": []}, "gdp"),
        ({"mechanism": "rdp"}, "history"),
        ({"mechanism": "rdp", "history": [(1.0, 0.1)]}, "history"),
        ({"mechanism": "rdp", "history": [(-1.0, 0.1, 3)]}, "noise_multiplier"),
    ],
)
def test_a_state_that_says_too_little_is_refused(state, word) -> None:
    with pytest.raises(UsageError, match=word):
        from_opacus(state)


def test_what_opacus_cannot_say_is_refused() -> None:
    with pytest.raises(UsageError, match="none"):
        to_opacus(Counter({RoundEvent("none", 0.0): 1}), "server")
