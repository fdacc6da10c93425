"""From the facts of a ledger to everything in a report that a ledger tells.

:func:`derive` is a function of the signed ledger and of the few fields that no ledger tells, which
it puts in as they are (:data:`privrec.report.model.WORD`). A run directory is reported with it, and
a report is verified by doing it again. Here are the figures; the sentences beside them come from
``templates/sentences.toml.j2`` or, of training that is not ours, ``templates/account.toml.j2``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from privrec.privacy.events import Adversary, RoundEvent, divergence, epsilon, parts_of
from privrec.privacy.ledger import Charge, Ledger
from privrec.report import model
from privrec.report.facts import Account, Facts, Spent
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


def derive(facts: Facts | Account, word: Mapping[str, Any]) -> model.Report:
    """Make the report of a ledger's facts; it is private only when every starred part is there.

    The ``word`` is the fields of ``WORD``, and ``curves`` from private data; of training that is
    not ours it is those of ``TOLD``.
    """
    said = sentences(facts)
    parts = starred(facts, said)
    missing = tuple(name for name in model.STARRED if parts[name] is None)
    if missing:
        facts = replace(facts, missing=missing)
        said = sentences(facts)
        parts = {**starred(facts, said), **dict.fromkeys(missing)}
    curve = parts["accounting"].curve if parts["accounting"] else ()
    own = _of_run(facts, said) if isinstance(facts, Facts) else _of_account(facts, word)
    simulated = bool(own["simulated"])
    everything = {
        **own,
        "run_id": str(facts.ledger.header["run_id"]),
        "rounds": facts.rounds,
        "claim": said["claim"],
        "missing": missing,
        "privacy": _privacy(facts, said),
        "deployment": model.Deployment(
            simulated=simulated, accounted_population=facts.population, **said["deployment"]
        ),
        "reading": _reading(facts, curve, said),
        "warnings": said.get("warnings", ()),
        "operators_word": said["operators_word"],
        **parts,
        **word,
        "curves": (*word.get("curves", ()), *_epsilon_curves(facts)),
    }
    return model.Report(**everything)


def _of_run(facts: Facts, said: Said) -> dict[str, Any]:
    scenario, single = facts.scenario, facts.examples
    return {
        "simulated": facts.declared.simulated,
        "scenario": scenario.name,
        "title": scenario.title,
        "description": scenario.description.strip(),
        "version": facts.declared.version,
        "scenario_hash": scenario.hash(),
        "privacy_hash": scenario.privacy_hash(),
        "examples": model.ExampleLevel(**said["examples"], **single) if single else None,
    }


def _of_account(facts: Account, word: Said) -> dict[str, Any]:
    """What the reports of runs have beside privacy, of which nothing is known here."""
    return {
        "simulated": False,
        "scenario": facts.ledger.path.stem,
        "title": facts.told.name or "",
        "description": facts.told.description or "",
        "version": str(facts.ledger.header.get("version", "")),
        **dict.fromkeys(("scenario_hash", "privacy_hash"), ""),
        "examples": None,
        "audit": None,
        "accuracy": {"holdout": None, "metrics": ()},
        "cost": dict.fromkeys(model.Cost.model_fields.keys() - {"note"}),
        **dict.fromkeys(("segments", "tiers", "rows"), ()),
        **{name: {} for name in ("data", "model")},
    }


def sentences(facts: Facts | Account) -> Said:
    """Every sentence that holds of the facts, by part."""
    if isinstance(facts, Account):
        return tables("account.toml.j2", facts=facts, told=facts.told)
    return tables("sentences.toml.j2", facts=facts, examples=facts.examples, revealed=REVEALED)


def starred(facts: Facts | Account, said: Said) -> dict[str, Any]:
    """The starred parts, those that lack facts as None."""
    figured = {"mechanism": _mechanism, "sampling": _sampling, "accounting": _accounting}
    return {
        name: figured[name](facts, said) if name in figured else said.get(name)
        for name in model.STARRED
    }


def _settings(facts: Facts | Account) -> dict[str, Any]:
    """What bounds and limits the charges, as the scenario has it, or header and operator."""
    if isinstance(facts, Facts):
        encoding, privacy = facts.encoding, facts.scenario.privacy
        return {
            "noise": privacy.noise,
            "clip_norm": encoding.clip_norm,
            "rounding_bound_ratio": encoding.bound / 2**encoding.scale_bits,
            "sampling": "everybody" if facts.everybody else "poisson",
            "sampling_rate": facts.scenario.devices.sampling_rate,
            "budget": privacy.epsilon,
            "budget_against": privacy.budget_against,
            "noise_known": facts.noise_known,
        }
    header = facts.ledger.header
    return {
        "noise": (
            "none" if facts.epsilon is None else "distributed" if facts.in_shares else "central"
        ),
        "clip_norm": facts.told.clip_norm,
        "rounding_bound_ratio": None,
        "sampling": facts.sampling,
        "sampling_rate": facts.rate,
        "budget": header.get("budget"),
        "budget_against": header.get("against", "server"),
        "noise_known": False,
    }


def _privacy(facts: Facts | Account, said: Said) -> model.Privacy:
    settings, ledger = _settings(facts), facts.ledger
    rate, population = settings["sampling_rate"], facts.population
    found: dict[Adversary, tuple[float | None, float | None]] = {
        "recipients": (facts.epsilon, facts.epsilon_rdp),
        "server": (facts.epsilon_server, facts.epsilon_server_rdp),
    }
    limited = settings["budget"] is not None
    return model.Privacy(
        **settings,
        private=facts.private,
        unit=str(ledger.header["unit"]),
        adjacency=ledger.adjacency,
        delta=facts.delta,
        adversaries=tuple(
            model.Adversary(
                name=name,
                epsilon=pld if facts.private else None,
                epsilon_rdp=rdp if facts.private else None,
                limits_run=limited and settings["budget_against"] == name,
                **said["adversaries"][name],
            )
            for name, (pld, rdp) in found.items()
        ),
        noise_multiplier=facts.least_noise,
        population=population,
        expected_cohort=population * rate if population and rate else None,
        charges=len(ledger.charges),
        events=tuple(_charged(facts, *each) for each in parts_of(ledger.counts).items()),
        ledger_head=facts.ledger.last_hash,
        ledger_key=facts.ledger.public_key.public_bytes_raw().hex(),
        ledger_signature=facts.signature,
        **said["privacy"],
    )


def _charged(facts: Spent, event: RoundEvent, count: int) -> model.Charged:
    against: Adversary = "server" if facts.ledger.adjacency == "replace-one" else "recipients"
    shown = {"mechanism": "other", "noise_multiplier": 0.0, "sampling_rate": 1.0}
    return model.Charged(
        **(event.to_json() if event.other is None else {**shown, "event": event.other}),
        count=count,
        accounted_multiplier=event.gaussian_multiplier,
        hidden_rate=event.rate_against(against),
    )


def _law(facts: Spent) -> model.Law:
    charged = {event.mechanism for event in facts.of_rounds}
    laws = sorted(charged, key=lambda law: (law == "gaussian", law))
    return laws[0] if laws else "none"


def _mechanism(facts: Facts | Account, said: Said) -> model.Mechanism | None:
    if isinstance(facts, Account):
        bound = facts.told.clip_norm
        if bound is None:
            return None
        return model.Mechanism(
            law=_law(facts),
            clip_norm=bound,
            scale_bits=None,
            ring_bits=None,
            squared_sensitivity=None,
            bands=(),
            **said["mechanism"],
        )
    encoding, declared = facts.encoding, facts.declared
    rate, multiplier = facts.scenario.devices.sampling_rate, facts.least_noise
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
        law=_law(facts),
        clip_norm=encoding.clip_norm,
        scale_bits=encoding.scale_bits,
        ring_bits=facts.scenario.privacy.ring_bits,
        squared_sensitivity=encoding.squared_bound,
        bands=bands,
        **said["mechanism"],
    )


def _sampling(facts: Facts | Account, said: Said) -> model.Sampling | None:
    """Who takes part, as declared; None where the number of users is not known."""
    if facts.population is None:
        return None
    if isinstance(facts, Account):
        return model.Sampling(
            declared=facts.sampling,
            rate=facts.rate,
            population=facts.population,
            expected_cohort=None if facts.rate is None else facts.rate * facts.population,
            **said["sampling"],
        )
    rate, holders = facts.scenario.devices.sampling_rate, facts.declared.holders
    return model.Sampling(
        declared="everybody" if facts.everybody else "poisson",
        rate=rate,
        population=facts.population,
        expected_cohort=rate * holders[0] if holders else 0.0,
        **said["sampling"],
    )


def _accounting(facts: Facts | Account, said: Said) -> model.Accounting | None:
    """How ε was computed; None where δ or users are not known, no curves without a guarantee."""
    delta, ledger = facts.ledger.header.get("delta"), facts.ledger
    if facts.population is None or not isinstance(delta, float):
        return None
    settings, finite = _settings(facts), facts.private
    budget, against = settings["budget"], settings["budget_against"]
    spent = facts.epsilon if against == "recipients" else facts.epsilon_server
    left = None
    if finite and budget is not None and spent is not None:
        left = max(0.0, budget - spent)
    gaussian = finite and all(event.other is None for event in parts_of(ledger.counts))
    return model.Accounting(
        delta=delta,
        curve=tuple(delta_curve(ledger, delta, "recipients")) if finite else (),
        curve_server=tuple(delta_curve(ledger, delta, "server")) if finite else (),
        renyi=tuple(_renyi(ledger)) if gaussian else (),
        zcdp_server=_zcdp(parts_of(ledger.counts)) if finite else None,
        remaining=left,
        lifetime=_lifetime(facts) if isinstance(facts, Facts) else None,
        **said["accounting"],
    )


def delta_curve(ledger: Ledger, delta: float, adversary: Adversary) -> Iterator[model.Point2]:
    """Points (ε, δ) that hold, by rising δ; those that double precision cannot carry left out."""
    for each in sorted({*DELTAS, delta}):
        found = ledger.epsilon(adversary, each)
        if math.isfinite(found):
            yield model.Point2(x=found, y=each)


def _renyi(ledger: Ledger) -> Iterator[model.RenyiPoint]:
    against: tuple[Adversary, Adversary] = ("recipients", "server")
    for order in ORDERS:
        bounds = (divergence(ledger.counts, order, each, ledger.adjacency) for each in against)
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


def _reading(facts: Spent, curve: Sequence[model.Point2], said: Said) -> model.Reading:
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


def _epsilon_curves(facts: Spent) -> Iterator[model.Curve]:
    charged = facts.ledger.charges
    if not facts.private or facts.delta is None or not charged:
        return
    last = facts.rounds - 1 if isinstance(facts, Facts) else max(e.round for e in charged)
    milestones = list(_milestones(charged, last))
    for key, name in (("epsilon", "ε, recipients"), ("epsilon_server", "ε, cohorts known")):
        points = tuple(
            model.Point(
                round=number,
                value=epsilon(
                    counts, facts.delta, EPSILONS[key][0], adjacency=facts.ledger.adjacency
                ),
            )
            for number, counts in milestones
        )
        yield model.Curve(key=key, name=name, note="", points=points)


def _milestones(charged: Sequence[Charge], last: int) -> Iterator[tuple[int, Counter[RoundEvent]]]:
    """Charges counted up to some rounds, the last among them; ε bends most in the first ones.

    What is charged after the ``last`` round is shown with it.
    """
    shown = [min(charge.round, last) for charge in charged]
    last_of_round = {round: place for place, round in enumerate(shown)}
    ends = sorted(last_of_round.values())
    places = sorted({*thinned(ends, EPSILON_POINTS), *(ends[i] for i in _EARLY if i < len(ends))})
    counts: Counter[RoundEvent] = Counter()
    start = 0
    for place in places:
        counts.update(charge.event for charge in charged[start : place + 1])
        start = place + 1
        yield shown[place] + 1, counts.copy()
