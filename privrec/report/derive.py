"""From the facts of a ledger to everything in a report that a ledger tells.

:func:`derive` is a function of the signed ledger and of the few fields that no ledger tells, which
it puts in as they are (:data:`privrec.report.model.WORD`). A run directory is reported with it, and
a report is verified by doing it again. Here are the figures; the sentences beside them come from
``templates/sentences.toml.j2``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from privrec.privacy.events import Adversary, RoundEvent, divergence, epsilon
from privrec.privacy.ledger import Charge
from privrec.report import model
from privrec.report.facts import Facts
from privrec.report.words import tables, thinned
from privrec.run.privacy_plan import EPSILONS
from privrec.run.record import REVEALED

DELTAS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, *(n / 10 for n in range(1, 10)))
"""The δ of the δ(ε) curve; the run's own comes on top."""

ORDERS = (2, 4, 8, 16, 32, 64)
ALARMS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Chances of a false alarm at which the trade-off curve is given."""

EPSILON_POINTS = 40
"""Rounds, spread evenly, at which ε is computed anew for the curve; early ones come on top."""

_EARLY = (1, 2, 4, 8, 16)

Said = Mapping[str, Any]
Counts = Mapping[RoundEvent, int]


def derive(facts: Facts, word: Mapping[str, Any]) -> model.Report:
    """Make the report of a ledger's facts; it is private only when every starred part is there.

    The ``word`` is the fields of ``WORD``, and ``curves`` from private data.
    """
    said = sentences(facts)
    parts = starred(facts, said)
    missing = tuple(name for name in model.STARRED if parts[name] is None)
    if missing:
        facts = replace(facts, missing=missing)
        said = sentences(facts)
        parts = {**starred(facts, said), **dict.fromkeys(missing)}
    scenario, single = facts.scenario, facts.examples
    curve = parts["accounting"].curve if parts["accounting"] else ()
    return model.Report(
        simulated=facts.declared.simulated,
        scenario=scenario.name,
        title=scenario.title,
        description=scenario.description.strip(),
        run_id=str(facts.ledger.header["run_id"]),
        version=facts.declared.version,
        scenario_hash=scenario.hash(),
        privacy_hash=scenario.privacy_hash(),
        rounds=facts.rounds,
        claim=said["claim"],
        missing=missing,
        privacy=_privacy(facts, said),
        examples=model.ExampleLevel(**said["examples"], **single) if single else None,
        deployment=model.Deployment(
            simulated=facts.declared.simulated,
            accounted_population=facts.population,
            **said["deployment"],
        ),
        reading=_reading(facts, curve, said),
        warnings=said.get("warnings", ()),
        operators_word=said["operators_word"],
        **{**parts, **word, "curves": (*word["curves"], *_epsilon_curves(facts))},
    )


def sentences(facts: Facts) -> Said:
    """Every sentence that holds of the facts, by part."""
    return tables("sentences.toml.j2", facts=facts, examples=facts.examples, revealed=REVEALED)


def starred(facts: Facts, said: Said) -> dict[str, Any]:
    """The starred parts, those that lack facts as None."""
    figured = {"mechanism": _mechanism, "sampling": _sampling, "accounting": _accounting}
    return {
        name: figured[name](facts, said) if name in figured else said[name]
        for name in model.STARRED
    }


def _privacy(facts: Facts, said: Said) -> model.Privacy:
    encoding = facts.encoding
    privacy, rate = facts.scenario.privacy, facts.scenario.devices.sampling_rate
    found: dict[Adversary, tuple[float | None, float | None]] = {
        "recipients": (facts.epsilon, facts.epsilon_rdp),
        "server": (facts.epsilon_server, facts.epsilon_server_rdp),
    }
    return model.Privacy(
        private=facts.private,
        unit="user",
        adjacency="zero-out",
        delta=facts.delta,
        adversaries=tuple(
            model.Adversary(
                name=name,
                epsilon=pld if facts.private else None,
                epsilon_rdp=rdp if facts.private else None,
                limits_run=privacy.epsilon is not None and privacy.budget_against == name,
                **said["adversaries"][name],
            )
            for name, (pld, rdp) in found.items()
        ),
        noise=privacy.noise,
        noise_multiplier=facts.least_noise,
        clip_norm=encoding.clip_norm,
        rounding_bound_ratio=encoding.bound / 2**encoding.scale_bits,
        sampling="everybody" if facts.everybody else "poisson",
        sampling_rate=rate,
        population=facts.population,
        expected_cohort=facts.population * rate if facts.population else None,
        budget=privacy.epsilon,
        budget_against=privacy.budget_against,
        noise_known=facts.noise_known,
        charges=len(facts.ledger.charges),
        events=tuple(
            model.Charged(
                **event.to_json(),
                count=count,
                accounted_multiplier=event.gaussian_multiplier,
                hidden_rate=event.rate_against("recipients"),
            )
            for event, count in facts.ledger.counts.items()
        ),
        ledger_head=facts.ledger.last_hash,
        ledger_key=facts.ledger.public_key.public_bytes_raw().hex(),
        ledger_signature=facts.signature,
        **said["privacy"],
    )


def _mechanism(facts: Facts, said: Said) -> model.Mechanism:
    encoding, declared = facts.encoding, facts.declared
    rate, multiplier = facts.scenario.devices.sampling_rate, facts.least_noise
    charged = {event.mechanism for event in facts.of_rounds}
    laws = sorted(charged, key=lambda law: law == "gaussian")
    places = zip(reversed(declared.capacities), declared.bands, declared.holders, strict=True)
    std = (multiplier or 0.0) * encoding.bound / encoding.scale
    bands = tuple(
        model.NoiseBand(
            capacity=capacity,
            coefficients=size,
            noise_std=std,
            noise_norm=std * math.sqrt(size),
            signal_norm=rate * devices * encoding.clip_norm,
        )
        for capacity, size, devices in places
        if multiplier
    )
    return model.Mechanism(
        law=laws[0] if laws else "none",
        clip_norm=encoding.clip_norm,
        scale_bits=encoding.scale_bits,
        ring_bits=facts.scenario.privacy.ring_bits,
        squared_sensitivity=encoding.squared_bound,
        bands=bands,
        **said["mechanism"],
    )


def _sampling(facts: Facts, said: Said) -> model.Sampling | None:
    """Who takes part, as declared; None where the number of users is not known."""
    if facts.population is None:
        return None
    rate, holders = facts.scenario.devices.sampling_rate, facts.declared.holders
    return model.Sampling(
        declared="everybody" if facts.everybody else "poisson",
        rate=rate,
        population=facts.population,
        expected_cohort=rate * holders[0] if holders else 0.0,
        **said["sampling"],
    )


def _accounting(facts: Facts, said: Said) -> model.Accounting | None:
    """How ε was computed; None where δ or users are not known, no curves without a guarantee."""
    delta, counts = facts.ledger.header.get("delta"), facts.ledger.counts
    if facts.population is None or not isinstance(delta, float):
        return None
    privacy, finite = facts.scenario.privacy, facts.private
    spent = facts.epsilon if privacy.budget_against == "recipients" else facts.epsilon_server
    left = None
    if finite and privacy.epsilon is not None and spent is not None:
        left = max(0.0, privacy.epsilon - spent)
    return model.Accounting(
        delta=delta,
        curve=tuple(delta_curve(counts, delta, "recipients")) if finite else (),
        curve_server=tuple(delta_curve(counts, delta, "server")) if finite else (),
        renyi=tuple(_renyi(counts)) if finite else (),
        zcdp_server=_zcdp(counts) if finite else None,
        remaining=left,
        lifetime=_lifetime(facts),
        **said["accounting"],
    )


def delta_curve(counts: Counts, delta: float, adversary: Adversary) -> Iterator[model.Point2]:
    """Points (ε, δ) that hold, by rising δ; those that double precision cannot carry left out."""
    for each in sorted({*DELTAS, delta}):
        found = epsilon(counts, each, adversary)
        if math.isfinite(found):
            yield model.Point2(x=found, y=each)


def _renyi(counts: Counts) -> Iterator[model.RenyiPoint]:
    for order in ORDERS:
        bounds = (divergence(counts, order, each) for each in ("recipients", "server"))
        recipients, server = (_up(b) if math.isfinite(b) else None for b in bounds)
        yield model.RenyiPoint(order=order, recipients=recipients, server=server)


def _zcdp(counts: Counts) -> float | None:
    """ρ of zero-concentrated DP: 1/(2σ²) a charge of the Gaussian mechanism, cohorts known."""
    if any(event.mechanism != "gaussian" for event in counts):
        return None
    return _up(math.fsum(n / (2 * event.noise_multiplier**2) for event, n in counts.items()))


def _up(value: float) -> float:
    return math.ceil(value * 1e6) / 1e6


def _lifetime(facts: Facts) -> model.Lifetime | None:
    balance = facts.declared.standing
    if balance.population is None:
        return None
    return model.Lifetime(
        population=balance.population,
        epsilon=balance.epsilon or 0.0,
        delta=balance.delta or 0.0,
        against=balance.against or "recipients",
        runs_before=balance.runs,
        spent_before=balance.spent or 0.0,
        reserved=balance.reserved or 0.0,
    )


def _reading(facts: Facts, curve: Sequence[model.Point2], said: Said) -> model.Reading:
    """What ε against recipients means, by the points (ε, δ) that hold: none without a guarantee."""
    odds = None
    if curve and facts.epsilon is not None and facts.epsilon < 300:
        odds = math.exp(facts.epsilon)
        unit = 10.0 ** (3 - math.floor(math.log10(odds)))  # four significant digits, rounded up
        odds = math.ceil(odds * unit - 1e-9) / unit
    return model.Reading(
        odds=odds,
        advantage=_advantage(curve),
        trade_off=tuple(model.Point2(x=alarm, y=_miss(curve, alarm)) for alarm in ALARMS),
        **said["reading"],
    )


def _advantage(curve: Sequence[model.Point2]) -> float:
    """The most that a test gains over guessing: the total variation that the points allow."""
    bounds = [1 - (1 - point.y) * 2 / (math.exp(point.x) + 1) for point in curve if point.x < 300]
    return math.ceil(min([1.0, *bounds]) * 1e4) / 1e4


def _miss(curve: Sequence[model.Point2], alarm: float) -> float:
    """The least chance of a miss of any test with a given chance of a false alarm, from below."""
    bounds = [0.0]
    for point in curve:
        grown = math.exp(min(point.x, 700.0))
        bounds += [1 - point.y - grown * alarm, (1 - point.y - alarm) / grown]
    return math.floor(max(bounds) * 1e6) / 1e6


def _epsilon_curves(facts: Facts) -> Iterator[model.Curve]:
    charged = facts.ledger.charges
    if not facts.private or facts.delta is None or not charged:
        return
    milestones = list(_milestones(charged, facts.rounds))
    for key, name in (("epsilon", "ε, recipients"), ("epsilon_server", "ε, cohorts known")):
        points = tuple(
            model.Point(round=number, value=epsilon(counts, facts.delta, EPSILONS[key][0]))
            for number, counts in milestones
        )
        yield model.Curve(key=key, name=name, note="", points=points)


def _milestones(
    charged: Sequence[Charge], rounds: int
) -> Iterator[tuple[int, Counter[RoundEvent]]]:
    """Charges counted up to some rounds, the last among them; ε bends most in the first ones.

    What is charged after the last of so many ``rounds`` is shown with it.
    """
    shown = [min(charge.round, rounds - 1) for charge in charged]
    last_of_round = {round: place for place, round in enumerate(shown)}
    ends = sorted(last_of_round.values())
    places = sorted({*thinned(ends, EPSILON_POINTS), *(ends[i] for i in _EARLY if i < len(ends))})
    counts: Counter[RoundEvent] = Counter()
    start = 0
    for place in places:
        counts.update(charge.event for charge in charged[start : place + 1])
        start = place + 1
        yield shown[place] + 1, counts.copy()
