"""The words of the report: no promise that does not hold, and every weakness said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from privrec.report.claims import Facts

from privrec.report import claims

PRIVATE = Facts(
    scenario="ml-1m-dp",
    simulated=True,
    noise="central",
    noise_known=False,
    epsilon=7.981,
    epsilon_server=91.8,
    epsilon_rdp=8.6,
    epsilon_server_rdp=95.0,
    delta=1e-5,
    sampling="poisson",
    sampling_rate=0.1,
    population=6040,
    budget=8.0,
    budget_against="recipients",
    rounds=400,
    planned_rounds=400,
    charges=400,
    holdout="test",
    evaluations=1,
)
NONE = replace(PRIVATE, noise="none", epsilon=None, epsilon_server=None)
KNOWN = replace(PRIVATE, noise_known=True, epsilon=None, epsilon_server=None)
EVERYBODY = replace(PRIVATE, sampling="everybody", sampling_rate=1.0, epsilon=91.8)


def titles(facts: Facts) -> list[str]:
    return [notice.title for notice in claims.warnings(facts)]


def test_the_claim_names_unit_adjacency_adversaries_and_both_epsilons() -> None:
    sentence = claims.claim(PRIVATE)
    for part in (
        "This simulated training run",
        "(7.99, 1e-5)-differentially private",
        "at user level",
        "one user’s history being there or not",
        "recipients of the released models who do not know which users took part",
        "knows every cohort and sees every release, ε is 91.80",
    ):
        assert part in sentence


@pytest.mark.parametrize("facts", [NONE, KNOWN])
def test_without_secret_noise_there_is_no_guarantee(facts: Facts) -> None:
    assert "no privacy guarantee" in claims.claim(facts)
    assert "differentially private" not in claims.claim(facts)
    assert all(adversary.epsilon is None for adversary in claims.adversaries(facts))
    assert claims.warnings(facts)[0].level == "serious"


def test_known_noise_voids_a_finite_epsilon() -> None:
    careless = replace(PRIVATE, noise_known=True)
    assert not careless.private
    assert "no privacy guarantee" in claims.claim(careless)
    assert claims.adversaries(careless)[0].epsilon is None


def test_with_everybody_nothing_rests_on_sampling() -> None:
    assert "same ε holds" in claims.claim(EVERYBODY)
    assert "The claim rests on secret cohorts" not in titles(EVERYBODY)
    assert "amplified" not in claims.adversaries(EVERYBODY)[0].assumes


def test_the_trusted_server_is_named() -> None:
    assert "One server is trusted" in claims.trust(PRIVATE)
    assert "sums before noise" in claims.trust(PRIVATE)
    assert "one machine" in claims.trust(PRIVATE)
    assert "one machine" not in claims.trust(replace(PRIVATE, simulated=False))


def test_a_deployment_is_not_called_simulated() -> None:
    assert claims.claim(replace(PRIVATE, simulated=False)).startswith("This training run")


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"delta": 1 / 6040}, "δ is too large for this population"),
        ({"epsilon": 10.01}, "ε is large"),
        ({"epsilon_server": 16.0}, "The claim rests on secret cohorts"),
        ({"charges": 401}, "Some rounds were charged more than once"),
        ({"rounds": 399, "charges": 399}, "The run stopped before its last round"),
        ({"evaluations": 2}, "The test split was looked at during training"),
        ({"holdout": "validation"}, "Metrics are of a validation split"),
        ({"further_runs": 2}, "Further runs used the same users"),
        ({"noise": "none"}, "No privacy guarantee"),
        ({"noise_known": True}, "The noise is known: ε = ∞"),
    ],
)
def test_each_weakness_is_said_and_only_then(changes: dict[str, object], title: str) -> None:
    calm = replace(PRIVATE, epsilon_server=15.0)
    assert titles(calm) == []
    assert title in titles(replace(calm, **changes))  # type: ignore[arg-type]


def test_the_serious_come_first() -> None:
    worst = replace(PRIVATE, epsilon=50.0, delta=0.1, charges=500, evaluations=9)
    levels = [notice.level for notice in claims.warnings(worst)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == "serious"
