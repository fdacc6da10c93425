"""Before any data: ``privrec scenario``, ``plan`` and ``audit``.

What a scenario may say, what it will cost and how loud its noise will be, and whether this build
does what is accounted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privrec.cli import console
from privrec.errors import ReleaseRefused, UsageError
from privrec.run.record import EXAMPLE_AGAINST, adversary_text, epsilon_text

if TYPE_CHECKING:
    from privrec.privacy.events import RoundEvent
    from privrec.scenario.load import Scenario

MILESTONES = 10
SMALL_COHORT = 20
FAR_APART = 5
"""Times that one ε is the other, from which on the difference is warned of."""


@click.group(cls=console.Commands, epilog=console.example("privrec scenario schema"))
def scenario() -> None:
    """Help to write scenarios."""


@scenario.command(epilog=console.example("privrec scenario schema"))
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors."""
    from privrec.scenario.keys import json_schema
    from privrec.scenario.load import Scenario

    console.print_json(json_schema(Scenario))


@click.command(epilog=console.example("privrec plan scenarios/ml-1m-dp.toml -s privacy.epsilon=4"))
@console.scenario_file
@console.settings_option
@console.json_option
def plan(scenario_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Noise, ε by round and signal to noise, before any data."""
    from privrec.scenario.load import load

    described = load(scenario_file, settings)
    rows = [{"name": name, **planned(variant)} for name, variant in described.variants.items()]
    payload = {**planned(described), "rows": rows}
    if as_json:
        console.print_json(payload)
        return
    _print_plan(payload, f"Plan of {payload['scenario']}")
    for row in rows:
        _print_plan(row, f"Row {row['name']}")


def planned(scenario: Scenario, counted: int | None = None) -> dict[str, Any]:
    """What a scenario will cost, as JSON values; ε is after the last round.

    ``counted`` is the number of items, where the data was read and the scenario does not tell.

    Raises:
        UsageError: If no noise meets the target, or sizes that distributed noise needs are unknown.
    """
    privacy, devices = scenario.privacy, scenario.devices
    event, examples, beside = _events(scenario, counted)
    spending = _spending(scenario, event, beside)
    return {
        "scenario": scenario.name,
        "rounds": scenario.train.rounds,
        "spare_attempts": privacy.spare_attempts,
        "noise": privacy.noise,
        "noise_multiplier": event.noise_multiplier or None,
        "clip_norm": privacy.clip_norm,
        "unit": "user",
        "adjacency": "zero-out",
        "delta": privacy.delta,
        "budget": privacy.epsilon,
        "budget_against": privacy.budget_against,
        "sampling": devices.sampling,
        "sampling_rate": devices.sampling_rate,
        "population": scenario.population(),
        "expected_cohort": scenario.expected_cohort(),
        **spending,
        "examples": _examples(scenario, examples),
        "signal": _signal(scenario, event.noise_multiplier, counted),
        "warnings": [*_warnings(scenario), *_far_apart(spending)],
    }


def _spending(
    scenario: Scenario, event: RoundEvent, beside: Sequence[RoundEvent]
) -> dict[str, Any]:
    if not event.is_private:
        return {"epsilon": None, "epsilon_server": None, "epsilon_by_round": []}
    from privrec.privacy.events import epsilon_by_round
    from privrec.run.privacy_plan import attempts_of

    delta = scenario.privacy.delta
    spent = epsilon_by_round(event, scenario.train.rounds, delta, MILESTONES, beside)
    keys = ("round", "epsilon", "epsilon_server")
    by_round = [dict(zip(keys, each, strict=True)) for each in spent]
    last = {key: by_round[-1][key] for key in keys[1:]}
    if scenario.privacy.spare_attempts:
        *_, (_, *most) = epsilon_by_round(event, attempts_of(scenario), delta, 2, beside)
        last |= dict(zip(("epsilon_at_most", "epsilon_server_at_most"), most, strict=True))
    return {**last, "epsilon_by_round": by_round}


def _examples(scenario: Scenario, event: RoundEvent | None) -> dict[str, Any] | None:
    """The guarantee of single interactions after the last round."""
    from privrec.run.privacy_plan import example_figures

    charged = Counter({event: scenario.train.rounds} if event else {})
    return example_figures(scenario, charged, noise_known=False)


def _events(
    scenario: Scenario, counted: int | None
) -> tuple[RoundEvent, RoundEvent | None, Sequence[RoundEvent]]:
    """The event of each round, of users and of single interactions, and what is charged beside."""
    from privrec.run.privacy_plan import (
        beside_without_shares,
        counting_of,
        enrolled,
        evaluating_of,
        event_without_shares,
        example_event,
        known_catalogue,
        plan_privacy,
    )

    privacy = scenario.privacy
    if not privacy.in_shares:
        beside = beside_without_shares(scenario)
        return event_without_shares(scenario), example_event(scenario, (), ()), beside
    population, lengths = scenario.population(), _lengths(scenario, counted)
    items = known_catalogue(scenario, counted)
    if population is None or lengths is None or items is None:
        single = privacy.local == "shares"
        key = 'local = "shares"' if single else 'noise = "distributed"'
        lacking = ["the number of users (set devices.population)"] if population is None else []
        if items is None:
            lacking.append("the number of items, for which the data has to be read")
        elif lengths is None:
            lacking.append("each tier's capacity")
        central = 'plan with -s privacy.noise="central", which costs the same to within 0.1 %'
        raise UsageError(
            f"privacy.{key} is planned for users and a catalogue, and here is not known: "
            f"{', '.join(lacking)}; {'run it' if single else central}"
        )
    weakest_first = sorted(lengths)
    sizes = [longer - shorter for shorter, longer in pairwise([0, *weakest_first])]
    shares = [sum(lengths[each] for each in weakest_first[n:]) for n in range(len(sizes))]
    holders = [round(population * share) for share in shares]
    devices = enrolled(scenario, population)
    sums = counting_of(scenario, items, devices), evaluating_of(scenario, devices)
    once = [each.event for each in sums if each]
    event, examples, _ = plan_privacy(scenario, sizes, holders, beside=once)
    return event, examples, once


def coefficients(scenario: Scenario, counted: int | None = None) -> int | None:
    """Length of the vector that is noised, or None where the catalogue is not known in advance."""
    return max(_lengths(scenario, counted) or (), default=None)


def _lengths(scenario: Scenario, counted: int | None) -> dict[int, float] | None:
    """Length of each tier's vector, as its layout in a run has it, and its share of devices.

    None where the catalogue is not known.
    """
    from privrec.models.layout import Layout
    from privrec.run.privacy_plan import coordinates_of, known_items, tables_of
    from privrec.scenario.kinds import ImplicitALS

    items, chain = known_items(scenario, counted), scenario.devices.chain
    if items is None or any(tier.capacity is None for tier in chain):
        return None
    tables, lengths = tables_of(scenario, items), dict[int, float]()
    for tier in (tier for tier in chain if tier.capacity):
        halving = round(-math.log2(tier.capacity or 1))
        vectors, biases = coordinates_of(scenario, tables, [halving])
        held = vectors.tables[0]
        gram = held.dim * (held.dim + 1) // 2 if isinstance(scenario.train, ImplicitALS) else 0
        slots = biases.tables[0].slots if biases else 0
        dense = scenario.model.dense_weights(held.dim)
        length = Layout(dense, held.slots, held.block, slots, gram).size
        lengths[length] = tier.share * (tier.weight > 0)
    return lengths


def _signal(
    scenario: Scenario, noise_multiplier: float, counted: int | None
) -> dict[str, Any] | None:
    """The best case of one round: every update as long as allowed and all of one direction."""
    cohort, clip_norm = scenario.expected_cohort(), scenario.privacy.clip_norm
    if not noise_multiplier or cohort is None or clip_norm is None:
        return None
    dimension = coefficients(scenario, counted)
    per_coefficient = noise_multiplier * clip_norm
    signal: dict[str, Any] = {
        "signal_norm": cohort * clip_norm,
        "noise_per_coefficient": per_coefficient,
        "ratio_per_coefficient": cohort / noise_multiplier,
        "coefficients": dimension,
    }
    if dimension is not None:
        signal["noise_norm"] = per_coefficient * math.sqrt(dimension)
        signal["ratio"] = cohort / (noise_multiplier * math.sqrt(dimension))
    return signal


def _far_apart(spending: Mapping[str, Any]) -> Iterator[str]:
    """A warning where nearly all of the promise rests on cohorts that stay secret."""
    hidden, known = spending["epsilon"], spending["epsilon_server"]
    if hidden is not None and known > FAR_APART * hidden:
        yield (
            f"ε = {epsilon_text(hidden, 3)} holds while nobody knows who took part in which round, "
            f"and ε = {epsilon_text(known, 3)} against {adversary_text('server')}. With "
            'devices.sampling = "everybody" and fewer rounds both are one, often at a better '
            'accuracy; privacy.budget_against = "server" bounds the larger.'
        )


def _warnings(scenario: Scenario) -> list[str]:
    privacy, population = scenario.privacy, scenario.population()
    if privacy.noise == "none":
        if privacy.local == "shares":
            return ["The noise of the sums hides single interactions: no guarantee at user level."]
        if privacy.local != "none":
            return ["No noise is added to the sums: no guarantee at user level."]
        return ["No noise is added: no privacy guarantee."]
    if population is None:
        return [
            "devices.population is unset, so the expected cohort and the signal are not known; "
            "declare it if it is public."
        ]
    warnings = []
    if privacy.delta >= 1 / population:
        warnings.append(
            f"privacy.delta = {privacy.delta:g} is not below 1 / population = {1 / population:.2g}:"
            " such a δ allows the data of one user to be published; lower it."
        )
    cohort = scenario.devices.sampling_rate * population
    if cohort < SMALL_COHORT:
        remedy = "raise devices.sampling_rate" if cohort < population else "it takes more users"
        warnings.append(
            f"A round has {cohort:.3g} devices on average, fewer than {SMALL_COHORT}: the noise "
            f"will drown them; {remedy}."
        )
    return warnings


_SIGNAL = {
    "signal_norm": "norm of the sum",
    "noise_per_coefficient": "noise in a coefficient (standard deviation)",
    "ratio_per_coefficient": "sum over noise, were it all in one coefficient",
    "coefficients": "coefficients",
    "noise_norm": "norm of the noise in all of them",
    "ratio": "sum over noise, in all of them",
}


def _print_plan(plan: Mapping[str, Any], title: str) -> None:
    settings = [
        ("rounds", f"{plan['rounds']:,}"),
        ("noise", plan["noise"]),
        ("noise multiplier", console.number_text(plan["noise_multiplier"])),
        ("clip norm", console.number_text(plan["clip_norm"])),
        ("sampling", f"{plan['sampling']}, rate {plan['sampling_rate']:g}"),
        ("population", console.number_text(plan["population"])),
        ("expected cohort", console.number_text(plan["expected_cohort"])),
    ]
    if plan["spare_attempts"]:
        said, most = f"{plan['spare_attempts']:,}", plan.get("epsilon_at_most")
        if most is not None:
            server = epsilon_text(plan["epsilon_server_at_most"], 3)
            said += f"; with all of them ε = {epsilon_text(most, 3)}, {server} with cohorts known"
        settings.append(("spare attempts", said))
    if plan["budget"] is not None:
        adversary = adversary_text(plan["budget_against"])
        settings.append(("budget", f"ε = {plan['budget']:g} against {adversary}"))
    if single := plan["examples"]:
        total = f"ε = {epsilon_text(single['epsilon'], 3)} at δ = {single['delta']:g}"
        settings += [
            ("single interactions", total),
            ("against", EXAMPLE_AGAINST[single["adversary"]]),
            ("their noise multiplier", console.number_text(single["noise_multiplier"])),
        ]
    console.print_table(title, ("setting", "value"), settings)
    if plan["epsilon_by_round"]:
        spent = [
            (each["round"], *(epsilon_text(each[of], 3) for of in ("epsilon", "epsilon_server")))
            for each in plan["epsilon_by_round"]
        ]
        columns = ("after round", "ε, recipients", "ε, cohorts known")
        console.print_table(f"ε at δ = {plan['delta']:g}, by user, zero-out", columns, spent)
    if signal := plan["signal"]:
        rows = [
            (words, console.number_text(signal[key]))
            for key, words in _SIGNAL.items()
            if key in signal
        ]
        title = "One round at best: every update clipped, and all of one direction"
        console.print_table(title, ("what", "value"), rows)
    if plan["warnings"]:
        console.print_lines(f"warning: {warning}" for warning in plan["warnings"])


@click.command(
    epilog=console.example(
        "privrec audit scenarios/quickstart.toml", "privrec audit runs/quickstart-1"
    ),
)
@click.argument("path", metavar="SCENARIO|DIR", type=console.PATH)
@console.settings_option
@click.option(
    "--canaries",
    type=click.IntRange(0, 100_000),
    default=1000,
    show_default=True,
    help="Canaries of the empirical bounds on ε; 0 leaves them out.",
)
@console.json_option
def audit(path: Path, settings: tuple[str, ...], canaries: int, as_json: bool) -> None:
    """Check noise, clipping, rounding and sampling of this build.

    The settings are those of a SCENARIO, or of the run in DIR; no data is looked at. In a run's
    directory the findings are kept as audit.json, from which its report takes them.
    """
    from privrec.audit import audit as examine
    from privrec.report.build import AUDIT
    from privrec.report.render import replace_text
    from privrec.scenario.load import load

    if of_run := path.is_dir():
        console.check_run(path)
    found = examine(load(path / "scenario.toml" if of_run else path, settings), canaries=canaries)
    if of_run and not settings:
        replace_text(path / AUDIT, found.model_dump_json(indent=2) + "\n")
    if as_json:
        console.print_json(found.model_dump())
    else:
        rows = [
            ("ok" if check.passed else "FAIL", check.probe, check.found, check.expected)
            for check in found.checks
        ]
        console.print_table(
            f"Audit of privrec {found.version}", ("", "check", "found", "expected"), rows
        )
        bound = ""
        if found.lower_bound is not None and found.confidence is not None:
            bound = (
                f"ε is at least {found.lower_bound:.3g} with {found.confidence:.0%} confidence, "
                f"and {epsilon_text(found.claimed)} is claimed. "
            )
        console.print_lines([bound + found.method])
    if not found.passed:
        failed = [check.probe for check in found.checks if not check.passed]
        raise ReleaseRefused(
            f"{', '.join(failed)}: this build does not do what is accounted; release nothing that "
            "it makes"
        )
