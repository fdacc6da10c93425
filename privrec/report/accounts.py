"""The parts of a report that are figures: mechanism, sampling, accounting, and how to read ε.

Everything here is a function of the ledger: of its charges, and of what its header declares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from privrec.privacy.events import Accountant, Adversary, RoundEvent, divergence, epsilon
from privrec.report import claims
from privrec.report.claims import Facts
from privrec.report.figures import delta_text
from privrec.report.model import (
    Accounting,
    Lifetime,
    Mechanism,
    NoiseBand,
    Point2,
    Reading,
    RenyiPoint,
    Sampling,
)
from privrec.run.header import LedgerHeader
from privrec.run.privacy_plan import encoding_of

Counts = Mapping[RoundEvent, int]

DELTAS = (
    1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8,
    0.9,
)  # fmt: skip
"""The δ of the δ(ε) curve; the run's own comes on top."""

ORDERS = (2, 4, 8, 16, 32, 64)
ALARMS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Chances of a false alarm at which the trade-off curve is given."""


def mechanism(facts: Facts, declaration: LedgerHeader, counts: Counts) -> Mechanism:
    """How one round's release is made, with the noise of each band."""
    scenario = declaration.scenario
    encoding = encoding_of(scenario, declaration.coefficients)
    laws = sorted({event.mechanism for event in counts}, key=lambda law: law == "gaussian")
    return Mechanism(
        law=laws[0] if laws else "none",
        clip_norm=encoding.clip_norm,
        clipping=_clipping(declaration),
        scale_bits=encoding.scale_bits,
        ring_bits=scenario.privacy.ring_bits,
        squared_sensitivity=encoding.squared_bound,
        quantisation=f"Updates are rounded at random to integers of 2^{encoding.scale_bits:g} "
        "steps to the clip norm, and drawn again until the squared norm is at most "
        f"{encoding.squared_bound:,}: the sensitivity that noise is scaled to exceeds the clip "
        f"norm by a factor of {encoding.bound / 2**encoding.scale_bits:.4f}. Sums are exact, "
        f"modulo 2^{scenario.privacy.ring_bits}.",
        bands=tuple(_bands(facts, declaration, counts)),
        lazy_noise=_lazy_noise(scenario.privacy.local),
        randomness="AES-256 in counter mode, keyed through HKDF by a secret 32-byte root from the "
        f"operating system{_roots(facts)}; every draw has its own key, bound to run, round, "
        "attempt, plan, model and input."
        if not facts.noise_known
        else "A noise root that others know: whoever has it can subtract the noise.",
        floating_point=_floating_point(facts),
    )


def _lazy_noise(local: str) -> str:
    inside = (
        " Devices owe noise between their own steps and settle it before they upload; that noise "
        "protects single interactions and is accounted apart."
        if local == "example"
        else ""
    )
    return (
        "Not used: every coefficient of every released sum gets its noise in the round itself, so "
        f"none is owed when a model is read.{inside}"
    )


def _roots(facts: Facts) -> str:
    if facts.noise != "distributed":
        return " of the server"
    return (
        " of this one machine; in a deployment, of each device"
        if facts.simulated
        else (" of each device")
    )


def _clipping(declaration: LedgerHeader) -> str:
    tiers = len(declaration.bands)
    if tiers == 1:
        return (
            "The L2 norm of all coefficients of a device’s update together is cut to the clip "
            "norm; an update that is not finite counts as zero."
        )
    return (
        f"Devices of {tiers} capacities hold prefixes of one vector in orthonormal coordinates, so "
        "that the L2 norm of a prefix is the norm of the update it stands for: one clip norm over "
        "all coefficients bounds devices of every capacity, and noise of one strength in every "
        "coefficient protects them alike. An update that is not finite counts as zero."
    )


def _floating_point(facts: Facts) -> str:
    if facts.noise == "none":
        return "No noise is drawn."
    if facts.noise == "distributed":
        return (
            "None touches privacy: shares of noise are integers drawn by exact tables, sums are "
            "integers. The small gap between the drawn noise and its law is counted in δ."
        )
    return (
        "The Gaussian is drawn in double precision by Box and Muller’s method from 64-bit "
        "uniforms and rounded to integers; released are integers only. Its tail ends at 9.49 "
        "standard deviations."
    )


def _bands(facts: Facts, declaration: LedgerHeader, counts: Counts) -> Iterator[NoiseBand]:
    multiplier = least_noise(counts)
    if multiplier is None:
        return
    encoding = encoding_of(declaration.scenario, declaration.coefficients)
    std = multiplier * encoding.bound / encoding.scale
    places = zip(
        reversed(declaration.capacities), declaration.bands, declaration.holders, strict=True
    )
    for capacity, size, devices in places:
        yield NoiseBand(
            capacity=capacity,
            coefficients=size,
            noise_std=std,
            noise_norm=std * math.sqrt(size),
            signal_norm=facts.sampling_rate * devices * encoding.clip_norm,
        )


def least_noise(counts: Counts) -> float | None:
    """The smallest noise multiplier that was charged; None without noise."""
    return min((event.noise_multiplier for event in counts), default=0.0) or None


def sampling(facts: Facts, declaration: LedgerHeader) -> Sampling | None:
    """Who takes part, as declared; None where the number of users is not known."""
    if facts.population is None:
        return None
    expected = facts.sampling_rate * declaration.holders[0] if declaration.holders else 0.0
    return Sampling(
        declared=facts.sampling,
        rate=facts.sampling_rate,
        population=facts.population,
        expected_cohort=expected,
        realised="Everybody but devices that dropped out."
        if facts.sampling == "everybody"
        else "Known to the operator alone. No file of the run, this report included, holds the "
        "size of a cohort.",
        amplification=_amplification(facts),
    )


def _amplification(facts: Facts) -> str:
    if not facts.private:
        return "Nothing is accounted."
    if facts.hides_cohorts:
        return (
            "Against recipients, who do not know the cohorts, Poisson sampling amplifies; against "
            "somebody who knows them, nothing is counted for it."
        )
    return "None is counted, against anybody."


def accounting(
    facts: Facts, declaration: LedgerHeader, counts: Counts, delta: float, bare: bool = False
) -> Accounting:
    """How ε was computed; without a guarantee its curves are empty.

    Args:
        facts: of the run.
        declaration: of the ledger's header.
        counts: what was charged.
        delta: of the claim.
        bare: leave the curves out.
    """
    finite = facts.private and not bare
    spent = facts.epsilon if facts.budget_against == "recipients" else facts.epsilon_server
    left = None
    if facts.private and facts.budget is not None and spent is not None:
        left = max(0.0, facts.budget - spent)
    return Accounting(
        accountant="privacy loss distributions (PLD), from above",
        settings="Losses on a grid, rounded up, refined until ε moves by less than 0.5 %; "
        "composition by run lengths; every ε rounded up in the fourth decimal.",
        second="Rényi differential privacy (RDP): looser, so it lies above.",
        delta=delta,
        why_delta=_why_delta(facts, delta),
        curve=tuple(delta_curve(counts, delta, "recipients")) if finite else (),
        curve_server=tuple(delta_curve(counts, delta, "server")) if finite else (),
        renyi=tuple(_renyi(counts)) if finite else (),
        zcdp_server=_zcdp(counts) if finite else None,
        remaining=left,
        lifetime=_lifetime(declaration),
    )


def _why_delta(facts: Facts, delta: float) -> str:
    chosen = f"δ = {delta_text(delta)} is the scenario’s"
    if facts.population is None:
        return f"{chosen}; the number of users is not known, so it cannot be judged."
    ratio = delta * facts.population
    if ratio >= 1:
        return (
            f"{chosen}, NOT below one over the {facts.population:,} users: a method that publishes "
            "one whole user would pass."
        )
    return (
        f"{chosen}; one over the {facts.population:,} users is {1 / ratio:,.3g} times as much. A "
        "method that publishes one random user’s history would not pass."
    )


def delta_curve(counts: Counts, delta: float, adversary: Adversary) -> Iterator[Point2]:
    """Points (ε, δ) that hold, by rising δ; those that double precision cannot carry left out."""
    for each in sorted({*DELTAS, delta}):
        found = epsilon(counts, each, adversary)
        if math.isfinite(found):
            yield Point2(x=found, y=each)


def _renyi(counts: Counts) -> Iterator[RenyiPoint]:
    def rounded(order: int, adversary: Adversary) -> float | None:
        value = divergence(counts, order, adversary)
        return math.ceil(value * 1e6) / 1e6 if math.isfinite(value) else None

    for order in ORDERS:
        yield RenyiPoint(
            order=order, recipients=rounded(order, "recipients"), server=rounded(order, "server")
        )


def _zcdp(counts: Counts) -> float | None:
    if any(event.mechanism != "gaussian" for event in counts):
        return None
    total = math.fsum(count / (2 * event.noise_multiplier**2) for event, count in counts.items())
    return math.ceil(total * 1e6) / 1e6


def _lifetime(declaration: LedgerHeader) -> Lifetime | None:
    standing = declaration.standing
    if standing.population is None:
        return None
    return Lifetime(
        population=standing.population,
        epsilon=standing.epsilon or 0.0,
        delta=standing.delta or 0.0,
        against=standing.against or "recipients",
        runs_before=standing.runs,
        spent_before=standing.spent or 0.0,
        reserved=standing.reserved or 0.0,
    )


def reading(facts: Facts, curve: Sequence[Point2]) -> Reading:
    """What the number means for somebody who is in the data, against recipients.

    Args:
        facts: of the run.
        curve: points (ε, δ) that hold; empty without a guarantee.
    """
    expected = facts.planned_rounds * facts.sampling_rate
    share = (
        f"Each user is in up to all {facts.planned_rounds:,} rounds; ε counts them together."
        if facts.sampling == "everybody"
        else f"A user is in {expected:,.4g} of {facts.planned_rounds:,} rounds on average, and may "
        "be in all; ε counts them together."
    )
    odds = None
    if curve and facts.epsilon is not None and facts.epsilon < 300:
        odds = _up(math.exp(facts.epsilon))
    return Reading(
        odds=odds,
        advantage=_advantage(curve),
        trade_off=tuple(Point2(x=alarm, y=_miss(curve, alarm)) for alarm in ALARMS),
        participation=share,
    )


def _up(value: float) -> float:
    """Rounded up to four significant digits."""
    digits = 3 - math.floor(math.log10(value))
    return math.ceil(value * 10.0**digits - 1e-9) / 10.0**digits


def _advantage(curve: Sequence[Point2]) -> float:
    """The most that a test gains over guessing: the total variation that the points allow."""
    bounds = [1 - (1 - point.y) * 2 / (math.exp(point.x) + 1) for point in curve if point.x < 300]
    return math.ceil(min([1.0, *bounds]) * 1e4) / 1e4


def _miss(curve: Sequence[Point2], alarm: float) -> float:
    """The least chance of a miss of any test with a given chance of a false alarm, from below."""
    bounds = [0.0]
    for point in curve:
        grown = math.exp(min(point.x, 700.0))
        bounds += [1 - point.y - grown * alarm, (1 - point.y - alarm) / grown]
    return math.floor(max(bounds) * 1e6) / 1e6


def facts_of(
    declaration: LedgerHeader,
    header: Mapping[str, object],
    charged: Sequence[tuple[int, int]],
    counts: Counts,
    before: RoundEvent | None,
) -> Facts:
    """Everything that sentences depend on, from the ledger alone.

    Args:
        declaration: of its header.
        header: itself.
        charged: (round, attempt) of every charge; rounds from 0, -1 for what came before.
        counts: how often each event was charged.
        before: what was charged before the first round, if anything.
    """
    scenario = declaration.scenario
    privacy, devices = scenario.privacy, scenario.devices
    delta, population = header.get("delta"), header.get("population")
    rounds = len({round for round, _ in charged if round >= 0})
    facts = claims.Facts(
        scenario=scenario.name,
        simulated=declaration.simulated,
        noise=privacy.noise,
        noise_known=header.get("noise_known") is not False,
        epsilon=None,
        epsilon_server=None,
        epsilon_rdp=None,
        epsilon_server_rdp=None,
        delta=float(delta) if privacy.noise != "none" and isinstance(delta, float) else None,
        sampling="everybody" if devices.sampling_rate == 1 else "poisson",
        sampling_rate=devices.sampling_rate,
        population=population if isinstance(population, int) else None,
        budget=privacy.epsilon,
        budget_against=privacy.budget_against,
        rounds=rounds,
        planned_rounds=scenario.train.rounds,
        charges=sum(round >= 0 for round, _ in charged),
        holdout=scenario.data.holdout,
        evaluations=_evaluations(declaration, rounds),
        further_runs=len(scenario.rows) * scenario.run.seeds,
        # Runs of one population are charged to it, and need no warning.
        runs_before=0 if declaration.standing.population else declaration.standing.runs,
        public_popularity=devices.popularity == "public",
        requested=scenario.train.requested,
        texts=scenario.model.learns != "interactions",
        popularity_released=before is not None,
        excess_removed=privacy.remove_excess,
        least_survivors=privacy.least_survivors,
        colluding_share=privacy.colluding_share,
        masked=scenario.run.secure_sum == "full" or not declaration.simulated,
        examples=privacy.local == "example",
    )
    return replace(
        facts,
        epsilon=_spent(facts, counts, "epsilon"),
        epsilon_server=_spent(facts, counts, "epsilon_server"),
        epsilon_rdp=_spent(facts, counts, "epsilon_rdp"),
        epsilon_server_rdp=_spent(facts, counts, "epsilon_server_rdp"),
    )


WHICH: Mapping[str, tuple[Adversary, Accountant]] = {
    "epsilon": ("recipients", "pld"),
    "epsilon_server": ("server", "pld"),
    "epsilon_rdp": ("recipients", "rdp"),
    "epsilon_server_rdp": ("server", "rdp"),
}
"""Every ε of a claim: its adversary and its accountant."""


def _spent(facts: Facts, counts: Counts, which: str) -> float | None:
    if facts.noise_known or facts.delta is None:
        return None
    value = epsilon(counts, facts.delta, *WHICH[which])
    return value if math.isfinite(value) else None


def _evaluations(declaration: LedgerHeader, rounds: int) -> int:
    """How often the split was looked at: as planned, and at the end."""
    if not declaration.simulated:
        return 0
    every, last = declaration.scenario.run.eval_every, declaration.scenario.train.rounds
    between = (rounds - (rounds == last)) // every if every else 0
    return between + (rounds > 0)
