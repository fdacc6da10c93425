"""The parts of a report: whole for every kind of run, true to its facts, and no claim without them.

To accept changed sentences after reading them: PRIVREC_ACCEPT=1 pytest tests/report/test_parts.py.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.population import PopulationBalance
from privrec.report import derive
from privrec.report.build import build
from privrec.report.facts import read_facts
from privrec.report.model import STARRED, Report, json_schema, schema_text
from privrec.report.render import to_json, to_markdown
from privrec.run.record import epsilon_text

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SNAPSHOTS = Path(__file__).with_name("snapshots")

LOCAL = {
    "privacy.local": "example", "privacy.local_clip_norm": 1.0, "privacy.local_epsilon": 8.0,
    "train.user_steps": 0, "train.loss": "bce",
}  # fmt: skip
SHARES = LOCAL | {
    "privacy.local": "shares", "privacy.clip_norm": 2.0, "privacy.scale_bits": 18.0,
    "train.local_lr": 0.1,
}  # fmt: skip
NOISES: dict[str, dict[str, Any]] = {
    "none": {"noise": "none", "budget": None},
    "central": {"sigma": 3.0, "budget": None},
    "distributed": {"noise": "distributed", "sigma": 3.0, "budget": None},
    "kept": {
        "noise": "distributed", "sigma": 3.0, "budget": None,
        "settings": {"privacy.remove_excess": False},
    },
    "local": {"noise": "none", "budget": None, "settings": LOCAL},
    "shares": {"noise": "none", "budget": None, "settings": SHARES},
    "both": {
        "noise": "distributed", "sigma": 3.0, "budget": None, "settings": LOCAL,
    },
    "known": {"noise_known": True, "sigma": 3.0},
}  # fmt: skip
KINDS = {
    f"{noise} {who}{' tiers' if tiers else ''}": {**settings, "rate": rate, "tiers": tiers}
    for noise, settings in NOISES.items()
    for who, rate in (("everybody", 1.0), ("sampled", 0.25))
    for tiers in (False, True)
    if not (noise == "shares" and tiers)
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def a_report(a_run: MakeRun) -> Callable[[str], Report]:
    return lambda kind: build(a_run(kind.replace(" ", "-"), **KINDS[kind]))


MakeReport = Callable[[str], Report]


def dumped(report: Report) -> dict[str, Any]:
    return json.loads(to_json(report))


# --------------------------------------------------------------------------- whole


@each_kind
def test_every_kind_fills_all_starred_parts_and_satisfies_the_schema(
    a_report: MakeReport, kind: str
) -> None:
    report = a_report(kind)
    assert report.missing == ()
    assert all(getattr(report, name) is not None for name in STARRED)
    jsonschema.validate(dumped(report), json_schema())
    assert report.privacy.private is (kind.split()[0] not in ("none", "local", "shares", "known"))


def test_the_schema_in_the_documentation_is_that_of_this_version() -> None:
    path = ROOT / "docs" / "schemas" / "privrec-report-2.json"
    assert path.read_text("utf-8") == schema_text()


@pytest.mark.parametrize("name", STARRED)
def test_no_report_calls_a_run_private_without_a_starred_part(
    a_report: MakeReport, name: str
) -> None:
    content = {**dumped(a_report("central everybody")), name: None}
    for missing in ((), (name,)):
        with pytest.raises(ValidationError):
            Report.model_validate_json(json.dumps({**content, "missing": missing}))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "missing": [name]}, json_schema())
    bare = {**content, "missing": [name], "privacy": {**content["privacy"], "private": False}}
    assert Report.model_validate_json(json.dumps(bare)).missing == (name,)
    jsonschema.validate(bare, json_schema())


@pytest.mark.parametrize("name", STARRED)
def test_a_run_without_the_facts_of_a_part_makes_no_claim(
    a_run: MakeRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = derive.starred
    monkeypatch.setattr(derive, "starred", lambda *given: {**whole(*given), name: None})
    report = build(a_run(sigma=3.0, budget=None))
    assert not report.privacy.private
    assert report.missing == (name,)
    assert "makes no privacy claim: its files do not tell the parts of the report" in report.claim
    assert name in report.claim
    assert all(each.epsilon is None for each in report.privacy.adversaries)
    assert "differentially private" not in to_markdown(report)


def test_an_unknown_population_makes_no_claim(a_run: MakeRun) -> None:
    """The one fact that a header of this version could lack."""
    facts = replace(read_facts(a_run()), population=None)
    parts = derive.starred(facts, derive.sentences(facts))
    assert [name for name, part in parts.items() if part is None] == ["sampling", "accounting"]


# --------------------------------------------------------------------------- sentences


def sentences(report: Report) -> dict[str, Any]:
    """Everything that is text, but hashes, names and what depends on the version."""
    kept = ("claim", *STARRED, "deployment", "warnings", "operators_word", "reading")
    content = {name: dumped(report)[name] for name in kept}
    content["adversaries"] = dumped(report)["privacy"]["adversaries"]
    content["privacy"] = {name: dumped(report)["privacy"][name] for name in ("trust", "mechanism")}
    return content


@each_kind
def test_sentences_are_those_that_were_read(a_report: MakeReport, kind: str) -> None:
    path = SNAPSHOTS / f"{kind.replace(' ', '-')}.json"
    text = json.dumps(sentences(a_report(kind)), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("PRIVREC_ACCEPT"):
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8"), "read the difference, then accept it"


FACTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "population": ({"population": 5003}, ["5,003 users"]),
    "rounds": ({"rounds": 17}, ["17 rounds", "All 17 released models"]),
    "δ": ({"delta": 3e-6}, ["3e-6)-differentially", "δ = 3e-6", "6,040 users is 55.2 times"]),
    "rate": ({"rate": 0.125}, ["probability 0.125"]),
    "clip": ({"settings": {"privacy.clip_norm": 0.75}}, ["at most 0.75 in a round"]),
    "budget": ({"budget": 40.0}, ["ε = 40 against recipients"]),
    "colluders": (
        {"noise": "distributed", "settings": {"privacy.colluding_share": 0.11}},
        ["11% of an expected cohort"],
    ),
    "survivors": (
        {"noise": "distributed", "settings": {"privacy.least_survivors": 0.59}},
        ["fewer than 59% of the devices"],
    ),
    "history": ({"settings": {"data.max_history": 41}}, ["cut to its 41 most recent"]),
    "core": (
        {"settings": {"data.source": "table", "data.min_user": 3, "data.min_item": 1700}},
        ["fewer than 3 interactions and items of fewer than 1,700", "not which ones are"],
    ),
    "grid": ({"settings": {"privacy.scale_bits": 11.5}}, ["2^11.5 steps"]),
    "tiers": ({"tiers": True}, ["Devices of 3 capacities"]),
    "deployed": ({"simulated": False}, ["Deployed: 6,040 users", "That clients run this code"]),
    "tuning": ({"standing": PopulationBalance(runs=7)}, ["7 earlier runs on this data"]),
    "population ledger": (
        {"standing": PopulationBalance("readers", 3, 9.0, 1e-6, "server", 2.5, 8.25)},
        [
            "3 runs came before in the ledger of the population “readers”",
            "at most ε = 9 at δ = 1e-6",
            "at most 8.25",
        ],
    ),
    "rows": ({"compared": ("a", "b")}, ["settings in 2 further runs"]),
    "retried": ({"retried": (1, 2)}, ["14 charges for 12 rounds"]),
    "stopped": ({"rounds": 5, "planned": 12}, ["5 of 12 planned rounds", "All 5 released"]),
    "evaluations": ({"eval_every": 3, "rounds": 12}, ["computed 4 times"]),
    "popularity": (
        {"tiers": True, "settings": {"devices.popularity": "public"}},
        ["counts of the users’ own data, declared public", "order of the catalogue by popularity"],
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_sentences_follow_the_facts(a_run: MakeRun, name: str) -> None:
    changes, expected = FACTS[name]
    base = {"sigma": 3.0, "rate": 0.25, "budget": None}
    plain = to_markdown(build(a_run("plain", **base))).replace("\\", "")
    changed = to_markdown(build(a_run("changed", **{**base, **changes}))).replace("\\", "")
    for words in expected:
        assert words in changed
        assert words not in plain


def test_every_epsilon_in_a_sentence_is_that_of_the_ledger(a_run: MakeRun) -> None:
    report = build(a_run(sigma=3.0, rate=0.25, budget=None))
    counts = {RoundEvent("gaussian", 3.0, 0.25): 12}
    known = {
        epsilon_text(epsilon(counts, 1e-5, adversary))  # type: ignore[arg-type]
        for adversary in ("recipients", "server")
    }
    trust = report.trust_model
    assert trust is not None
    texts = [report.claim, *(each.means for each in trust.fallbacks)]
    texts += [notice.text for notice in report.warnings]
    named = {number for text in texts for number in re.findall(r"(?:ε = |is )(\d+\.\d+)", text)}
    assert named == known


def test_no_sentence_says_that_epsilon_holds_against_a_trusted_server(a_report: MakeReport) -> None:
    trust = a_report("central sampled").trust_model
    assert trust is not None
    operator = next(each for each in trust.actors if "operator" in each.name)
    assert operator.epsilon is None
    shared = a_report("distributed sampled").trust_model
    assert shared is not None
    assert next(each for each in shared.actors if "operator" in each.name).epsilon is not None


# --------------------------------------------------------------------------- figures


def test_bands_are_those_of_the_tiers(a_run: MakeRun) -> None:
    report = build(a_run(sigma=2.0, rate=0.5, tiers=True, budget=None))
    mechanism = report.mechanism
    assert mechanism is not None
    assert [band.capacity for band in mechanism.bands] == [0.25, 0.5, 1.0]
    whole = build(a_run("whole", sigma=2.0, rate=0.5, budget=None)).mechanism
    assert whole is not None
    assert whole.bands[0].coefficients == 3706 * (32 + 1)
    # Where some hold less, the memory is folded: its rows are a power of two.
    assert sum(band.coefficients for band in mechanism.bands) == 4096 * (32 + 1)
    noise = 2.0 * math.sqrt(mechanism.squared_sensitivity) / 2**13 * mechanism.clip_norm
    for band, share in zip(mechanism.bands, (1.0, 0.75, 0.5), strict=True):
        assert band.noise_std == pytest.approx(noise)
        assert band.noise_norm == pytest.approx(noise * math.sqrt(band.coefficients))
        assert band.signal_norm == pytest.approx(0.5 * share * 6040 * 0.5)


def test_the_curve_of_delta_is_the_accountants(a_run: MakeRun) -> None:
    report = build(a_run(sigma=3.0, rate=0.25, delta=1e-5, budget=None))
    assert report.accounting is not None
    counts = {RoundEvent("gaussian", 3.0, 0.25): 12}
    curve = {point.y: point.x for point in report.accounting.curve}
    assert curve[1e-5] == report.adversary("recipients").epsilon
    assert curve[1e-3] == epsilon(counts, 1e-3, "recipients")
    assert list(curve.values()) == sorted(curve.values(), reverse=True)


def test_zcdp_and_renyi_are_the_textbook_ones(a_run: MakeRun) -> None:
    accounting = build(a_run(sigma=2.0, rate=1.0, rounds=8, budget=None)).accounting
    assert accounting is not None
    assert accounting.zcdp_server == pytest.approx(8 / (2 * 2.0**2))
    for point in accounting.renyi:
        assert point.server == pytest.approx(8 * point.order / (2 * 2.0**2), abs=2e-6)


def test_what_is_composed_further_is_shown_rounded_up(a_run: MakeRun) -> None:
    report = build(a_run(sigma=1.9, rate=0.25, rounds=7, budget=None))
    assert report.accounting is not None
    page = to_markdown(report)
    shown = float(re.findall(r"ρ = ([\d.]+)", page)[0])
    assert report.accounting.zcdp_server is not None
    assert report.accounting.zcdp_server <= shown < report.accounting.zcdp_server * 1.001
    for point in report.accounting.renyi:
        (row,) = re.findall(rf"^\| {point.order} \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
        for text, value in zip(row, (point.recipients, point.server), strict=True):
            assert value is not None
            assert value <= float(text) <= value * 1.001


def test_reading_is_the_gaussian_mechanisms_where_that_is_exact(a_run: MakeRun) -> None:
    from scipy.stats import norm

    reading = build(a_run(sigma=2.0, rate=1.0, rounds=4, budget=None)).reading
    mu = math.sqrt(4) / 2.0  # Dong, Roth & Su: f(α) = Φ(Φ⁻¹(1 - α) - μ)
    for point in reading.trade_off:
        exact = norm.cdf(norm.ppf(1 - point.x) - mu)
        assert point.y <= exact + 1e-9  # never promises more than holds
        assert point.y >= exact - 0.05
    exact = 2 * norm.cdf(mu / 2) - 1
    assert exact <= reading.advantage <= exact + 0.05


def test_without_a_guarantee_nothing_is_bounded(a_report: MakeReport) -> None:
    reading = a_report("none sampled").reading
    assert (reading.odds, reading.advantage) == (None, 1.0)
    assert all(point.y == 0 for point in reading.trade_off)


def test_what_no_verifier_can_see_is_in_the_report(a_report: MakeReport) -> None:
    titles = [each.title for each in a_report("central sampled").operators_word]
    for words in ("sampled as declared", "tuning", "real and different person", "noise"):
        assert any(words in title for title in titles)
