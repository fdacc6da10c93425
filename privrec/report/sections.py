"""The parts of a report as sections of pairs and tables, the same for the page and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from privrec.report.figures import amount_text, delta_text, number_text
from privrec.report.model import Accounting, Mechanism, Reading, Report, Sampling, TrustModel
from privrec.run.wording import adversary_text, epsilon_text, metric_name

Pair = tuple[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class ReportTable:
    """A table under the pairs of a section; columns from ``figures`` on hold figures."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figures: int = 1


@dataclass(frozen=True)
class Section:
    """One part of a report: pairs of a name and one text or several, and perhaps a table."""

    key: str
    title: str
    pairs: tuple[Pair, ...]
    table: ReportTable | None = None
    outside: bool = False


def guarantee(report: Report) -> tuple[Section, ...]:
    """The starred parts that are there, in the order in which a reviewer asks for them."""
    return tuple(_guarantee(report))


def _guarantee(report: Report) -> Iterator[Section]:
    if scope := report.scope:
        yield Section(
            "scope",
            "What is protected, and what is not",
            (("Protected", scope.protects), ("Not protected", scope.not_protected)),
        )
    if report.trust_model:
        yield _trust(report.trust_model)
    if definition := report.definition:
        yield Section(
            "definition",
            "The definition",
            (
                ("Variant", f"{definition.variant}. {_computational(report)}"),
                ("Unit", "One user: everything that one user’s device ever contributes."),
                ("Neighbours", f"Zero-out. {definition.neighbours}"),
                ("Contribution", definition.contribution_bounds),
                ("Data", definition.data_domain),
                ("Unprotected quantities", "; ".join(definition.unprotected_quantities) + "."),
            ),
        )
    if outputs := report.outputs:
        yield Section(
            "outputs",
            "Outputs covered",
            (("Covered", outputs.covered), ("Not covered", outputs.not_covered)),
        )
    if report.mechanism:
        yield _mechanism(report, report.mechanism)
    if report.sampling:
        yield _sampling(report.sampling)
    if report.accounting:
        yield _accounting(report, report.accounting)
    if outside := report.outside_the_ledger:
        yield Section(
            "ledger",
            "Outside the ledger",
            (
                ("Tuning", outside.tuning),
                ("Preprocessing", outside.preprocessing),
                ("Early stopping", outside.early_stopping),
                ("Pre-training", outside.pre_training),
                ("Simulated or deployed", report.deployment.text),
            ),
        )


def _computational(report: Report) -> str:
    if report.privacy.noise == "distributed":
        return (
            "The noise comes from AES, and masks hide single updates from the server: both hold "
            "against whoever cannot break them."
        )
    return "The noise comes from AES, and holds against whoever cannot break it."


def _trust(trust: TrustModel) -> Section:
    fallbacks = tuple(f"{each.when}: {each.means}" for each in trust.fallbacks)
    return Section(
        "trust",
        "Who is trusted, and what if they fail",
        (
            ("Collusion", trust.collusion),
            ("Drop-outs", trust.drop_outs),
            *((("If an assumption fails", fallbacks),) if fallbacks else ()),
        ),
        ReportTable(
            "Each ε holds against one actor; ∞ is no protection against them.",
            ("Actor", "Sees", "Trusted with", "ε"),
            tuple(
                (actor.name, actor.sees, actor.trusted_with, epsilon_text(actor.epsilon))
                for actor in trust.actors
            ),
            figures=3,
        ),
    )


def _mechanism(report: Report, mechanism: Mechanism) -> Section:
    bands = tuple(
        (
            f"{band.capacity:g}",
            f"{band.coefficients:,}",
            amount_text(band.noise_std),
            amount_text(band.noise_norm),
            amount_text(band.signal_norm),
        )
        for band in mechanism.bands
    )
    noise = report.privacy.noise_multiplier
    return Section(
        "mechanism",
        "The mechanism",
        (
            ("One round", report.privacy.mechanism),
            (
                "Noise multiplier",
                f"{noise:.4g} standard deviations per unit of sensitivity" if noise else "none",
            ),
            ("Clip norm", f"{mechanism.clip_norm:.4g}. {mechanism.clipping}"),
            ("Quantisation", mechanism.quantisation),
            ("Lazy noise", mechanism.lazy_noise),
            ("Randomness", mechanism.randomness),
            ("Floating point", mechanism.floating_point),
        ),
        ReportTable(
            "Noise and the largest signal of a sum, in what each tier holds beyond the weaker "
            "ones; in units of an update.",
            ("Tier (capacity)", "Coefficients", "Noise each", "Noise, norm", "Signal at most"),
            bands,
        )
        if bands
        else None,
    )


def _sampling(sampling: Sampling) -> Section:
    declared = (
        "Everybody takes part in every round."
        if sampling.declared == "everybody"
        else f"Poisson: each user takes part in a round by an independent coin of chance "
        f"{sampling.rate:g}."
    )
    return Section(
        "sampling",
        "Sampling",
        (
            ("Declared", declared),
            (
                "Population",
                f"{sampling.population:,} users; {sampling.expected_cohort:,.4g} expected in a "
                "round",
            ),
            ("Realised", sampling.realised),
            ("Amplification", sampling.amplification),
        ),
    )


def _accounting(report: Report, accounting: Accounting) -> Section:
    rows = tuple(
        (f"{point.order}", number_text(point.recipients), number_text(point.server))
        for point in accounting.renyi
    )
    pairs: list[Pair] = [
        ("Accountant", f"{accounting.accountant}. {accounting.settings}"),
        ("Second accountant", accounting.second),
        ("Why this δ", accounting.why_delta),
        ("Budget", _budget(report, accounting)),
        ("Lifetime budget", _lifetime(accounting)),
    ]
    if accounting.zcdp_server is not None:
        pairs.append(("zCDP, cohorts known", f"ρ = {accounting.zcdp_server:.4g}"))
    return Section(
        "accounting",
        "The accounting",
        tuple(pairs),
        ReportTable(
            "Rényi divergence of the whole run by order, for whoever composes it with others.",
            ("Order", "Recipients", "Cohorts known"),
            rows,
        )
        if rows
        else None,
    )


def _budget(report: Report, accounting: Accounting) -> str:
    privacy = report.privacy
    if not privacy.budget:
        return "None set for this run."
    left = ""
    if accounting.remaining is not None:
        left = f"; {epsilon_text(privacy.budget - accounting.remaining, 4)} of it is spent"
    return (
        f"ε = {privacy.budget:g} against {adversary_text(privacy.budget_against)}{left}. The run "
        "halts before a round that would exceed it."
    )


def _lifetime(accounting: Accounting) -> str:
    lifetime = accounting.lifetime
    if lifetime is None:
        return (
            "None: the run is tied to no population ledger. Another run over the same users adds "
            "its ε to this one, and nothing here stops it."
        )
    return (
        f"Population “{lifetime.population}”: at most ε = {lifetime.epsilon:g} at δ = "
        f"{delta_text(lifetime.delta)} against {adversary_text(lifetime.against)} over all runs. "
        f"{lifetime.runs_before:,} runs before spent {epsilon_text(lifetime.spent_before)}; with "
        f"this one it is at most {epsilon_text(lifetime.reserved)}."
    )


def reading(report: Report) -> Section:
    """What the number means for one person."""
    return Section("reading", "Reading the number", tuple(_reading(report.reading)))


def _reading(reading: Reading) -> Iterator[Pair]:
    if reading.odds is None:
        yield "Odds", "No bound: whoever gets a model may become sure of a guess about a user."
    else:
        yield (
            "Odds",
            "Whoever gets the models can multiply the odds of a guess about one user by at most "
            f"{reading.odds:,.4g} (e to the power ε), but for a chance of about δ.",
        )
    yield (
        "Membership",
        "For a user who is as likely in as out, the best guess whether the history was used is "
        f"right at most {_hundredths(reading.advantage)} times in 100; a coin is right 50 times.",
    )
    alarms = {round(point.x, 4): point.y for point in reading.trade_off}
    if reading.odds is not None and 0.05 in alarms:
        yield (
            "Errors",
            "A test that wrongly accuses 5% of the users whose history was not used finds at most "
            f"{math.ceil(1000 * (1 - alarms[0.05])) / 10:g}% of those whose history was.",
        )
    yield "Participation", reading.participation


def _hundredths(advantage: float) -> int:
    """How often of 100 the best guess is right: half, and half of what it gains; rounded up."""
    return math.ceil(50 + 50 * advantage - 1e-9)


def audit(report: Report) -> Section:
    """What was checked on the build itself, or that no audit was made."""
    found = report.audit
    if found is None:
        none = (
            (
                "Result",
                "None was made: that this build does what is claimed is not shown here.",
            ),
        )
        return Section("audit", "Audit of this build", none)
    bound = (
        f"Lower bound on ε: {found.lower_bound:.3g} with {found.confidence:.0%} confidence, and "
        f"{epsilon_text(found.claimed)} is claimed. {found.method}"
        if found.lower_bound is not None and found.confidence is not None
        else found.method
    )
    return Section(
        "audit",
        "Audit of this build",
        (
            ("Result", "Every check passed." if found.passed else "A CHECK FAILED."),
            ("Canaries", bound),
        ),
        ReportTable(
            f"White-box checks of privrec {found.version} with this scenario’s settings.",
            ("Check", "Result", "Found", "Expected"),
            tuple(
                (each.probe, "passed" if each.passed else "FAILED", each.found, each.expected)
                for each in found.checks
            ),
            figures=4,
        ),
    )


def segments(report: Report) -> Section | None:
    """Accuracy by kind of user, or None where it was not measured."""
    if not report.segments:
        return None
    keys = tuple(report.segments[0].metrics)
    return Section(
        "segments",
        "By kind of user",
        (),
        ReportTable(
            "Light and heavy users, and users whose held-out item is popular or not.",
            ("Users", "Share", *(metric_name(key) for key in keys)),
            tuple(
                (
                    f"{each.name} ({each.by})",
                    f"{each.share:.0%}",
                    *(number_text(each.metrics.get(key)) for key in keys),
                )
                for each in report.segments
            ),
        ),
        outside=True,
    )
