"""What a scenario will cost and how loud its noise will be, before any data is touched."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from privrec.errors import UsageError
from privrec.run.popularity import known_items, release_event
from privrec.scenario.load import Scenario

if TYPE_CHECKING:
    from privrec.privacy.events import RoundEvent

MILESTONES = 10
SMALL_COHORT = 20


def plan(scenario: Scenario) -> dict[str, Any]:
    """The plan of a scenario as JSON values, with one entry of ``rows`` for each of its rows.

    Args:
        scenario: What is to be run; its data is not looked for.

    Returns:
        ``noise_multiplier``, ``epsilon`` and ``epsilon_server`` (null is infinite) after the last
        round, ``epsilon_by_round`` at about ten rounds, ``signal``, ``warnings`` and the settings
        that they follow from.

    Raises:
        UsageError: If no noise meets the target, or the population is not positive.
    """
    return {
        **_one(scenario),
        "rows": [{"name": name, **_one(variant)} for name, variant in scenario.variants()],
    }


def _one(scenario: Scenario) -> dict[str, Any]:
    event = _event(scenario)
    noise_multiplier = event.noise_multiplier
    settings = _settings(scenario, noise_multiplier)
    spending = _spending(scenario, event)
    signal = _signal(scenario, noise_multiplier)
    return {**settings, **spending, "signal": signal, "warnings": _warnings(scenario)}


def _settings(scenario: Scenario, noise_multiplier: float) -> dict[str, Any]:
    privacy, devices = scenario.privacy, scenario.devices
    return {
        "scenario": scenario.name,
        "rounds": scenario.train.rounds,
        "noise": privacy.noise,
        "noise_multiplier": noise_multiplier or None,
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
    }


def _spending(scenario: Scenario, event: RoundEvent) -> dict[str, Any]:
    if not event.is_private:
        return {"epsilon": None, "epsilon_server": None, "epsilon_by_round": []}
    from privrec.privacy.calibrate import plan as spend

    rounds, delta = scenario.train.rounds, scenario.privacy.delta
    before = release_event(scenario)
    spent = spend(event, rounds=rounds, delta=delta, points=MILESTONES, before=before)
    by_round = zip(spent.after, spent.recipients, spent.server, strict=True)
    return {
        "epsilon": _finite(spent.epsilon),
        "epsilon_server": _finite(spent.epsilon_server),
        "epsilon_by_round": [
            {"round": after, "epsilon": _finite(ours), "epsilon_server": _finite(theirs)}
            for after, ours, theirs in by_round
        ],
    }


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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _signal(scenario: Scenario, noise_multiplier: float) -> dict[str, Any] | None:
    """The best case of one round: every update as long as allowed and all of one direction."""
    cohort, clip_norm = scenario.expected_cohort(), scenario.privacy.clip_norm
    if not noise_multiplier or cohort is None or clip_norm is None:
        return None
    dimension = coefficients(scenario)
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


def coefficients(scenario: Scenario) -> int | None:
    """Length of the vector that is noised, or None where the catalogue is not known in advance.

    It is computed without torch; a test holds it to the model that is built.
    """
    lengths = _lengths(scenario)
    return None if lengths is None else max(lengths)


def _lengths(scenario: Scenario) -> dict[int, float] | None:
    """Length of each tier's vector, and the share of devices that train with it."""
    items, chain = known_items(scenario), scenario.devices.chain
    if items is None or any(tier.capacity is None for tier in chain):
        return None
    return {
        _length(scenario, items, round(-math.log2(tier.capacity))): tier.share * (tier.weight > 0)
        for tier in chain
        if tier.capacity
    }


def _length(scenario: Scenario, items: int, halving: int) -> int:
    model, devices = scenario.model, scenario.devices
    dim = model.dim >> halving if devices.order == "dims" else model.dim
    held = items >> halving if devices.order == "rows" else items
    memory, biases = held * dim, held
    if devices.order == "fold":
        parts = items * (model.dim // model.block)
        memory = (_slots(parts, model.compression) >> halving) * model.block
        biases = _slots(items, model.compression) >> halving
    gram = dim * (dim + 1) // 2 if scenario.train.loss == "ials" else 0
    return _dense(scenario) + gram + memory + (biases if model.item_bias else 0)


def _slots(wanted: int, compression: float) -> int:
    """A power of two: upwards without compression, else the nearest, as Subspace.sized has it."""
    power = math.log2(max(1.0, wanted / compression))
    return 1 << (math.ceil(power) if compression == 1 else round(power))


def _dense(scenario: Scenario) -> int:
    model: Any = scenario.model
    return int(_dense_of(model))


def _dense_of(model: Any) -> Any:
    if model.kind == "gmf":
        return 0
    if model.kind == "extreme":
        return (model.features + 1) * model.dim
    if model.kind == "next_word":
        d, wide = model.dim, model.ffn
        layer = 4 * d * (d + 1) + (d + 1) * wide + (wide + 1) * d + 4 * d
        return model.context * d + model.layers * layer + 2 * d
    tower = model.dim if model.kind == "mlp" else model.dim - model.dim // 2
    widths = (2 * tower, *model.hidden)
    return sum((below + 1) * above for below, above in pairwise(widths)) + widths[-1]


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
