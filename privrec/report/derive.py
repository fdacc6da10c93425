"""From a ledger to everything in a report that a ledger tells.

:func:`derive` is a function of the signed ledger and of the few fields that no ledger tells, which
it puts in as they are (:data:`privrec.report.model.WORD`). A run directory is reported with it, and
a report is verified by doing it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from privrec.privacy.events import RoundEvent, epsilon
from privrec.report import accounts, claims, statements
from privrec.report.examples import example_level, sentence
from privrec.report.model import STARRED, Charged, Curve, Point, Privacy, Report
from privrec.report.spending import Spending
from privrec.run.plan import LedgerHeader
from privrec.run.privacy_plan import encoding_of

T = TypeVar("T")

EPSILON_POINTS = 40
"""Rounds, spread evenly, at which ε is computed anew for the curve; early ones come on top."""

_EARLY = (1, 2, 4, 8, 16)


def derive(spending: Spending, declaration: LedgerHeader, word: Mapping[str, Any]) -> Report:
    """The report of a ledger.

    Args:
        spending: what the ledger holds.
        declaration: of its header.
        word: the fields of ``WORD``, and ``curves`` from private data.

    Returns:
        The report; called private only when every starred part is there.
    """
    counts = spending.counts
    charged = [(charge.round, charge.attempt) for charge in spending.charges]
    facts = accounts.facts_of(declaration, spending.header, charged, counts, spending.before)
    single = example_level(spending.examples, declaration, noise_known=facts.noise_known)
    parts = _parts(spending, declaration, facts)
    missing = tuple(name for name in STARRED if parts[name] is None)
    if missing:
        facts = replace(facts, missing=missing)
        parts = {**_parts(spending, declaration, facts), **dict.fromkeys(missing)}
    curve = parts["accounting"].curve if parts["accounting"] else ()
    scenario = declaration.scenario
    return Report(
        simulated=facts.simulated,
        scenario=facts.scenario,
        title=scenario.title,
        description=scenario.description.strip(),
        run_id=str(spending.header["run_id"]),
        version=declaration.version,
        scenario_hash=scenario.hash(),
        privacy_hash=scenario.privacy_hash(),
        rounds=facts.rounds,
        claim=claims.claim(facts)
        + (sentence(single.epsilon, single.delta) if single is not None else ""),
        missing=missing,
        privacy=_privacy(spending, declaration, facts),
        **parts,
        examples=single,
        deployment=statements.deployment(facts),
        reading=accounts.reading(facts, curve),
        warnings=claims.warnings(facts),
        operators_word=statements.operator_statement(facts),
        curves=(*word["curves"], *_epsilon_curves(spending, facts)),
        **{name: value for name, value in word.items() if name != "curves"},
    )


def _parts(spending: Spending, declaration: LedgerHeader, facts: claims.Facts) -> dict[str, Any]:
    """The starred parts, those that lack facts as None."""
    delta = spending.header.get("delta")
    known = facts.population is not None and isinstance(delta, float)
    return {
        "scope": statements.scope(facts),
        "trust_model": statements.trust_model(facts),
        "definition": statements.definition(facts, declaration),
        "outputs": statements.outputs(facts),
        "mechanism": accounts.mechanism(facts, declaration, spending.rounds),
        "sampling": accounts.sampling(facts, declaration),
        "accounting": accounts.accounting(facts, declaration, spending.counts, float(delta))
        if known and delta is not None
        else None,
        "outside_the_ledger": statements.outside_the_ledger(facts, declaration),
    }


def _privacy(spending: Spending, declaration: LedgerHeader, facts: claims.Facts) -> Privacy:
    scenario = declaration.scenario
    encoding = encoding_of(scenario, declaration.coefficients)
    return Privacy(
        private=facts.private,
        unit="user",
        adjacency="zero-out",
        delta=facts.delta,
        adversaries=claims.adversaries(facts),
        trust=claims.trust(facts),
        noise=facts.noise,
        mechanism=claims.mechanism(facts),
        noise_multiplier=accounts.least_noise(spending.rounds),
        clip_norm=encoding.clip_norm,
        rounding_bound_ratio=encoding.bound / 2**encoding.scale_bits,
        sampling=facts.sampling,
        sampling_rate=facts.sampling_rate,
        population=facts.population,
        expected_cohort=facts.population * facts.sampling_rate if facts.population else None,
        budget=facts.budget,
        budget_against=facts.budget_against,
        noise_known=facts.noise_known,
        charges=len(spending.charges),
        events=tuple(_charged(spending.counts)),
        ledger_head=spending.head,
        ledger_key=spending.key,
        ledger_signature=spending.signature,
    )


def _charged(counts: Mapping[RoundEvent, int]) -> Iterator[Charged]:
    for event, count in counts.items():
        yield Charged(
            **event.to_json(),
            count=count,
            accounted_multiplier=event.gaussian_multiplier,
            hidden_rate=event.rate_against("recipients"),
        )


def _epsilon_curves(spending: Spending, facts: claims.Facts) -> Iterator[Curve]:
    if not facts.private or facts.delta is None:
        return
    milestones = list(_milestones(spending))
    for key, name in (("epsilon", "ε, recipients"), ("epsilon_server", "ε, cohorts known")):
        adversary, _ = accounts.WHICH[key]
        points = [
            Point(round=number, value=epsilon(counts, facts.delta, adversary))
            for number, counts in milestones
        ]
        if points:
            yield Curve(key=key, name=name, note="", points=tuple(points))


def _milestones(spending: Spending) -> Iterator[tuple[int, Counter[RoundEvent]]]:
    """Charges counted up to some rounds, the last among them; ε bends most in the first ones."""
    last_of_round = {charge.round: place for place, charge in enumerate(spending.charges)}
    ends = sorted(last_of_round.values())
    places = sorted({*thinned(ends, EPSILON_POINTS), *(ends[i] for i in _EARLY if i < len(ends))})
    counts: Counter[RoundEvent] = Counter()
    start = 0
    for place in places:
        part = spending.charges[start : place + 1]
        counts.update(Counter(charge.event for charge in part))
        start = place + 1
        yield spending.charges[place].round + 1, counts.copy()


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most ``most`` (>= 2) of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(place * step)] for place in range(most)]
