"""The words of the report: no promise that does not hold, and every weakness said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privrec.report.build import build
from privrec.report.derive import sentences
from privrec.report.facts import Facts, read_facts

MakeFacts = Callable[..., Facts]


@pytest.fixture
def facts_of(a_run: Callable[..., Path]) -> MakeFacts:
    """Facts of a run with settings of its own, and with some facts replaced."""

    def make(changes: dict[str, Any] | None = None, **settings: Any) -> Facts:
        settings = {"rate": 0.1, "rounds": 4, "eval_every": 0, **settings}
        private = settings.get("noise") != "none" and not settings.get("noise_known")
        spent = {"epsilon": 7.981, "epsilon_server": 91.8} if private else {}
        facts = read_facts(a_run(str(len(made)), **settings))
        made.append(facts)
        return replace(facts, **{**spent, **(changes or {})})

    made: list[Facts] = []
    return make


def adversary(facts: Facts, name: str) -> dict[str, str]:
    found: dict[str, str] = sentences(facts)["adversaries"][name]
    return found


def titles(facts: Facts) -> list[str]:
    return [notice["title"] for notice in sentences(facts).get("warnings", [])]


def test_the_claim_names_unit_adjacency_adversaries_and_both_epsilons(facts_of: MakeFacts) -> None:
    sentence = sentences(facts_of())["claim"]
    for part in (
        "This simulated training run",
        "(7.99, 1e-5)-differentially private",
        "at user level",
        "one user’s history being there or not",
        "recipients of the released models who do not know which users took part",
        "knows every cohort and sees every release, ε is 91.80",
    ):
        assert part in sentence


@pytest.mark.parametrize("settings", [{"noise": "none"}, {"noise_known": True}])
def test_without_secret_noise_there_is_no_guarantee(
    a_run: Callable[..., Path], facts_of: MakeFacts, settings: dict[str, Any]
) -> None:
    said = sentences(facts_of(**settings))
    assert "no privacy guarantee" in said["claim"]
    assert "differentially private" not in said["claim"]
    assert said["warnings"][0]["level"] == "serious"
    assert all(each.epsilon is None for each in build(a_run("all", **settings)).privacy.adversaries)


def test_known_noise_voids_a_finite_epsilon(facts_of: MakeFacts) -> None:
    careless = facts_of({"noise_known": True})
    assert careless.epsilon is not None
    assert not careless.private
    assert "no privacy guarantee" in sentences(careless)["claim"]
    assert not any("epsilon" in actor for actor in sentences(careless)["trust_model"]["actors"])


def test_with_everybody_nothing_rests_on_sampling(facts_of: MakeFacts) -> None:
    everybody = facts_of({"epsilon": 91.8}, rate=1.0)
    assert "same ε holds" in sentences(everybody)["claim"]
    assert "The claim rests on secret cohorts" not in titles(everybody)
    assert "amplified" not in adversary(everybody, "recipients")["assumes"]
    assert "amplified" in adversary(facts_of(), "recipients")["assumes"]


def test_the_trusted_server_is_named(facts_of: MakeFacts) -> None:
    trust = sentences(facts_of())["privacy"]["trust"]
    assert "One server is trusted" in trust
    assert "sums before noise" in trust
    assert "one machine" in trust
    assert "one machine" not in sentences(facts_of(simulated=False))["privacy"]["trust"]


def test_a_deployment_is_not_called_simulated(facts_of: MakeFacts) -> None:
    assert sentences(facts_of(simulated=False))["claim"].startswith("This training run")


@pytest.mark.parametrize(
    ("changes", "settings", "title"),
    [
        ({"delta": 1 / 6040}, {}, "δ is too large for this population"),
        ({"epsilon": 10.01}, {}, "ε is large"),
        ({"epsilon_server": 16.0}, {}, "The claim rests on secret cohorts"),
        ({"charges": 5}, {}, "Some rounds were charged more than once"),
        ({"rounds": 3, "charges": 3}, {}, "The run stopped before its last round"),
        ({"evaluations": 2}, {}, "The test split was looked at during training"),
        ({}, {"holdout": "validation"}, "Metrics are of a validation split"),
        ({}, {"compared": ("a", "b")}, "Further runs used the same users"),
        ({}, {"noise": "none"}, "No privacy guarantee"),
        ({"noise_known": True}, {}, "The noise is known: ε = ∞"),
    ],
)
def test_each_weakness_is_said_and_only_then(
    facts_of: MakeFacts, changes: dict[str, Any], settings: dict[str, Any], title: str
) -> None:
    calm = {"epsilon_server": 15.0}
    assert titles(facts_of(calm)) == []
    if settings.get("noise") == "none":
        calm = {}
    assert title in titles(facts_of({**calm, **changes}, **settings))


def test_the_serious_come_first(facts_of: MakeFacts) -> None:
    worst = facts_of({"epsilon": 50.0, "delta": 0.1, "charges": 500, "evaluations": 9})
    levels = [notice["level"] for notice in sentences(worst)["warnings"]]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == "serious"


@pytest.mark.parametrize("name", ['x" }', "a\\b", 'end"""', "new\nline = 1", "\x7f", "{{ facts }}"])
def test_no_name_ends_a_sentence(facts_of: MakeFacts, name: str) -> None:
    facts = facts_of()
    scenario = facts.scenario.model_copy(update={"name": name})
    evil = replace(facts, declared=facts.declared.model_copy(update={"scenario": scenario}))
    assert f"“{' '.join(name.split())}”" in sentences(evil)["claim"]
    assert sentences(evil).keys() == sentences(facts).keys()
