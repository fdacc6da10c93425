"""Before any data: ``privrec scenario``, ``plan`` and ``audit``.

What a scenario may say, what it will cost and how loud its noise will be, and whether this build
does what is accounted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privrec.cli.console import (
    PATH,
    Commands,
    check_run,
    example,
    json_option,
    number_text,
    print_json,
    print_lines,
    print_table,
    scenario_file,
    settings_option,
)
from privrec.errors import ReleaseRefused, UsageError
from privrec.run.record import adversary_text, epsilon_text

if TYPE_CHECKING:
    from privrec.privacy.events import RoundEvent
    from privrec.scenario.load import Scenario

MILESTONES = 10
SMALL_COHORT = 20


# --------------------------------------------------------------------------- scenarios


@click.group(cls=Commands, epilog=example("privrec scenario schema"))
def scenario() -> None:
    """Help to write scenarios."""


@scenario.command(epilog=example("privrec scenario schema"))
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors."""
    from privrec.scenario.keys import json_schema
    from privrec.scenario.load import Scenario

    print_json(json_schema(Scenario))


# --------------------------------------------------------------------------- the plan


@click.command(
    short_help="Noise, ε by round and signal to noise, before any data.",
    epilog=example("privrec plan scenarios/ml-1m-dp.toml -s privacy.epsilon=4"),
)
@scenario_file
@settings_option
@json_option
def plan(scenario_file: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Say what SCENARIO will cost, without touching data: noise, ε by round, signal to noise."""
    from privrec.scenario.load import load

    payload = planned(load(scenario_file, settings))
    if as_json:
        print_json(payload)
        return
    _print_plan(payload, f"Plan of {payload['scenario']}")
    for row in payload["rows"]:
        _print_plan(row, f"Row {row['name']}")


def planned(scenario: Scenario) -> dict[str, Any]:
    """The plan of a scenario as JSON values, with one entry of ``rows`` for each of its rows.

    ``epsilon`` and ``epsilon_server`` are after the last round; null is infinite.

    Raises:
        UsageError: If no noise meets the target, or sizes that distributed noise needs are unknown.
    """
    rows = [{"name": name, **_planned(variant)} for name, variant in scenario.variants()]
    return {**_planned(scenario), "rows": rows}


def _planned(scenario: Scenario) -> dict[str, Any]:
    privacy, devices, event = scenario.privacy, scenario.devices, _event(scenario)
    return {
        "scenario": scenario.name,
        "rounds": scenario.train.rounds,
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
        **_spending(scenario, event),
        "signal": _signal(scenario, event.noise_multiplier),
        "warnings": _warnings(scenario),
    }


def _spending(scenario: Scenario, event: RoundEvent) -> dict[str, Any]:
    if not event.is_private:
        return {"epsilon": None, "epsilon_server": None, "epsilon_by_round": []}
    from privrec.privacy.events import epsilon_by_round
    from privrec.run.privacy_plan import release_event

    rounds, delta = scenario.train.rounds, scenario.privacy.delta
    spent = epsilon_by_round(event, rounds, delta, MILESTONES, release_event(scenario))
    by_round = [
        {"round": after, "epsilon": _finite(ours), "epsilon_server": _finite(theirs)}
        for after, ours, theirs in spent
    ]
    last = {key: by_round[-1][key] for key in ("epsilon", "epsilon_server")}
    return {**last, "epsilon_by_round": by_round}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _event(scenario: Scenario) -> RoundEvent:
    """The event of each round: for distributed noise, that of the band that all devices hold."""
    from privrec.run.privacy_plan import event_without_shares, plan_privacy

    if scenario.privacy.noise != "distributed":
        return event_without_shares(scenario)
    population, lengths = scenario.population(), _lengths(scenario)
    if population is None or lengths is None:
        raise UsageError(
            'privacy.noise = "distributed" is planned for a number of users and a catalogue, and '
            "they are not known here; set devices.population, or plan with "
            '-s privacy.noise="central", which costs the same to within 0.1 %'
        )
    weakest_first = sorted(lengths.items())
    sizes = [longer - shorter for (shorter, _), (longer, _) in pairwise([(0, 0), *weakest_first])]
    holders = [
        round(population * sum(share for each, share in weakest_first if each >= length))
        for length, _ in weakest_first
    ]
    return plan_privacy(scenario, sizes, holders)[0]


def coefficients(scenario: Scenario) -> int | None:
    """Length of the vector that is noised, or None where the catalogue is not known in advance."""
    lengths = _lengths(scenario)
    return None if lengths is None else max(lengths)


def _lengths(scenario: Scenario) -> dict[int, float] | None:
    """Length of each tier's vector, and the share of devices that train with it."""
    from privrec.run.privacy_plan import known_items

    items, chain = known_items(scenario), scenario.devices.chain
    if items is None or any(tier.capacity is None for tier in chain):
        return None
    return {
        _length(scenario, items, round(-math.log2(tier.capacity))): tier.share * (tier.weight > 0)
        for tier in chain
        if tier.capacity
    }


def _length(scenario: Scenario, items: int, halving: int) -> int:
    from privrec.embedding.nested import nested
    from privrec.embedding.subspace import Subspace
    from privrec.embedding.table import PlainTable, Table
    from privrec.models.layout import Layout
    from privrec.scenario.kinds import ImplicitALS

    model, order = scenario.model, scenario.devices.order

    def held(dim: int, block: int, halving: int) -> Table:
        if order == "fold":
            size = model.compression
            table: Table = Subspace.sized(items, dim, block=block, key=0, compression=size)
        else:
            table = PlainTable.of(items, dim, block=block, by_part=order == "dims")
        return nested(table, [halving]).tables[0]

    vectors = held(model.dim, model.block, halving)
    biases = held(1, 1, 0 if order == "dims" else halving)  # the first dimensions are of all items
    gram = vectors.dim * (vectors.dim + 1) // 2 if isinstance(scenario.train, ImplicitALS) else 0
    bias_slots = biases.slots if model.item_bias else 0
    dense = model.dense_weights(vectors.dim)
    return Layout(dense, vectors.slots, vectors.block, bias_slots, gram).size


def _signal(scenario: Scenario, noise_multiplier: float) -> dict[str, Any] | None:
    """The best case of one round: every update as long as allowed and all of one direction."""
    cohort, clip_norm = scenario.expected_cohort(), scenario.privacy.clip_norm
    if not noise_multiplier or cohort is None or clip_norm is None:
        return None
    dimension, per_coefficient = coefficients(scenario), noise_multiplier * clip_norm
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


def _warnings(scenario: Scenario) -> list[str]:
    privacy, population = scenario.privacy, scenario.population()
    if privacy.noise == "none":
        if privacy.local == "example":
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
        warnings.append(
            f"A round has {cohort:.3g} devices on average, fewer than {SMALL_COHORT}: the noise "
            "will drown them; raise devices.sampling_rate."
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
        ("noise multiplier", number_text(plan["noise_multiplier"])),
        ("clip norm", number_text(plan["clip_norm"])),
        ("sampling", f"{plan['sampling']}, rate {plan['sampling_rate']:g}"),
        ("population", number_text(plan["population"])),
        ("expected cohort", number_text(plan["expected_cohort"])),
    ]
    if plan["budget"] is not None:
        adversary = adversary_text(plan["budget_against"])
        settings.append(("budget", f"ε = {plan['budget']:g} against {adversary}"))
    print_table(title, ("setting", "value"), settings)
    if plan["epsilon_by_round"]:
        spent = [
            (each["round"], *(epsilon_text(each[of], 3) for of in ("epsilon", "epsilon_server")))
            for each in plan["epsilon_by_round"]
        ]
        columns = ("after round", "ε, recipients", "ε, cohorts known")
        print_table(f"ε at δ = {plan['delta']:g}, by user, zero-out", columns, spent)
    if signal := plan["signal"]:
        rows = [
            (words, number_text(signal[key])) for key, words in _SIGNAL.items() if key in signal
        ]
        title = "One round at best: every update clipped, and all of one direction"
        print_table(title, ("what", "value"), rows)
    if plan["warnings"]:
        print_lines(f"warning: {warning}" for warning in plan["warnings"])


# --------------------------------------------------------------------------- the audit


@click.command(
    short_help="Check noise, clipping, rounding and sampling of this build.",
    epilog=example("privrec audit scenarios/quickstart.toml", "privrec audit runs/quickstart-1"),
)
@click.argument("path", metavar="SCENARIO|DIR", type=PATH)
@settings_option
@click.option(
    "--canaries",
    type=click.IntRange(0, 100_000),
    default=1000,
    show_default=True,
    help="Canaries of the empirical bounds on ε; 0 leaves them out.",
)
@json_option
def audit(path: Path, settings: tuple[str, ...], canaries: int, as_json: bool) -> None:
    """Audit this build with a SCENARIO's settings, or with those of the run in DIR.

    No data is looked at. Of a run's directory the findings are kept as audit.json, from which its
    report takes them.
    """
    from privrec.audit import audit as examine
    from privrec.report.build import AUDIT
    from privrec.report.render import replace_text
    from privrec.scenario.load import load

    if of_run := path.is_dir():
        check_run(path)
    found = examine(load(path / "scenario.toml" if of_run else path, settings), canaries=canaries)
    if of_run and not settings:
        replace_text(path / AUDIT, found.model_dump_json(indent=2) + "\n")
    if as_json:
        print_json(found.model_dump())
    else:
        rows = [
            ("ok" if check.passed else "FAIL", check.probe, check.found, check.expected)
            for check in found.checks
        ]
        print_table(f"Audit of privrec {found.version}", ("", "check", "found", "expected"), rows)
        bound = ""
        if found.lower_bound is not None and found.confidence is not None:
            bound = (
                f"ε is at least {found.lower_bound:.3g} with {found.confidence:.0%} confidence, "
                f"and {epsilon_text(found.claimed)} is claimed. "
            )
        print_lines([bound + found.method])
    if not found.passed:
        failed = [check.probe for check in found.checks if not check.passed]
        raise ReleaseRefused(
            f"{', '.join(failed)}: this build does not do what is accounted; release nothing that "
            "it makes"
        )
