"""What a finished run leaves behind: the model, and ``result.json``.

What a device pays for its output layer: bytes moved and held, and multiply-adds, measured.

Multiply-adds are those that torch counts while a device's real scores and gradients are computed;
bytes are those of the tensors. Selection is counted beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch.utils.flop_counter import FlopCounterMode

import privrec
from privrec.data import Interactions, Split
from privrec.device.lessons import QUERIES
from privrec.device.round import digest
from privrec.device.tier import Federation, Tier
from privrec.device.words import TextCohort
from privrec.errors import IntegrityError, UsageError
from privrec.evaluate import metrics
from privrec.evaluate.metrics import by_segment
from privrec.models.next_word import sampled_loss
from privrec.privacy.events import Accountant, Adversary, epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.ledger_index import EXAMPLE
from privrec.run.assembly import BYTES_A_COEFFICIENT, Parts, TextParts, federation_of
from privrec.run.memory_profile import peak_bytes
from privrec.run.popularity import release_event
from privrec.run.record import OUTSIDE
from privrec.scenario.load import Privacy, Scenario
from privrec.search.families import Shape
from privrec.search.index import SIGNATURE
from privrec.search.select import FOLD
from privrec.server.columns import ColumnServer
from privrec.server.server import Server
from privrec.storage import replace

_TABLES = 20  # of a device's own choice, on average; see privrec.search.families.own_shape
_CODE_BYTES = 2
_NAME_BYTES = 4


@dataclass(frozen=True)
class OutputCost:
    """The output layer of one device in one round.

    Args:
        neurons: active ones.
        bytes: weights and gradients of the active neurons, and scores of all positions.
        multiply_adds: of scores and gradients, counted by torch.
        selection: multiply-adds of choosing the neurons.
    """

    neurons: int
    bytes: int
    multiply_adds: int
    selection: int

    def to_json(self) -> dict[str, int]:
        """Facts for ``cost`` in ``result.json``."""
        return {
            "output_neurons": self.neurons,
            "output_bytes": self.bytes,
            "output_multiply_adds": self.multiply_adds,
            "selection_multiply_adds": self.selection,
        }


def output_cost(writers: TextCohort, scenario: Scenario, positions: int) -> OutputCost:
    """The output layer of one device of a tier, in a round over so many positions."""
    trainer = writers.trainer
    language, neurons = trainer.language, trainer.output.budget
    dim = language.vectors.dim
    rows = torch.zeros(neurons, dim, requires_grad=True)
    biases = torch.zeros(neurons, requires_grad=True)
    hidden = torch.zeros(positions, dim, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        targets = torch.zeros(positions, dtype=torch.int64)
        sampled_loss(hidden, rows, biases, torch.zeros(neurons), targets).backward()  # type: ignore[no-untyped-call]
    weights = rows.nbytes + biases.nbytes
    scores = positions * neurons * BYTES_A_COEFFICIENT
    return OutputCost(
        neurons,
        2 * weights + 2 * scores,
        counter.get_total_flops() // 2,
        selection_multiply_adds(writers, scenario),
    )


def selection_multiply_adds(writers: TextCohort, scenario: Scenario) -> int:
    """Multiply-adds of a device that chooses its neurons, in one round."""
    trainer = writers.trainer
    selector, items = trainer.practice.selector, trainer.language.vectors.items
    width = trainer.language.vectors.dim + 1
    if selector is None or not trainer.output.selected:
        return 0
    if scenario.train.scheme == "requested":
        shape = ColumnServer().shape(items)
        return QUERIES * width * shape.bits * ColumnServer().tables
    if selector == "scan":
        return QUERIES * items * width
    if selector == "hamming":
        return (items + QUERIES) * width * SIGNATURE
    bits = Shape(max(1, round(np.log2(max(2, items * _TABLES / (2 * trainer.output.budget))))))
    # A fold adds before it multiplies, so only as many numbers are multiplied as it has.
    folded = min(width, FOLD) if selector == "pghash" else width
    return (items + QUERIES) * folded * bits.bits * _TABLES


def moved(parts: TextParts, scenario: Scenario, tier: Tier) -> tuple[int, int]:
    """Bytes up and down of one device in one round, without its share of keys and masks.

    A device that asks for neurons moves those alone, the words that it names and bucket ids; one
    that selects them itself moves the whole of its prefix, touched or not.
    """
    ring_bits = parts.server.plan.protection.ring.bits
    size = tier.layout.size
    if scenario.train.scheme != "requested" or parts.columns is None:
        return size * ring_bits // 8, size * BYTES_A_COEFFICIENT
    sight, language = parts.columns.sight, parts.language
    neurons = round(scenario.train.budget * language.vectors.items)
    size = tier.layout.head + neurons * (language.vectors.dim + 1)
    asked = sight.words * _NAME_BYTES + sight.buckets * _CODE_BYTES
    request = round(asked / max(1, sight.requests))
    names = neurons * _NAME_BYTES
    return size * ring_bits // 8 + request, size * BYTES_A_COEFFICIENT + names


def device_peak(
    parts: TextParts, scenario: Scenario, tier: Tier, prefix: NDArray[np.float32],
    text: NDArray[np.int32],
) -> int | None:  # fmt: skip
    """Peak memory of one device's round, measured in a process of its own.

    A device that asks for neurons holds those alone: to it, they are a whole vocabulary.
    """
    words = parts.language.vectors.items
    shares = parts.server.plan.protection.shares
    if scenario.train.scheme != "requested":
        return peak_bytes(scenario, tier.index, words, prefix, text, shares)
    neurons = round(scenario.train.budget * words)
    small = scenario.with_settings(
        {"train.scheme": None, "train.loss": "full_softmax", "train.selector": "each"}
    )
    layout = tier.layout
    held = layout.head + neurons * (parts.language.vectors.dim + 1)
    return peak_bytes(small, 0, neurons, np.resize(prefix, held), text % neurons, shares)


def longest(writers: TextCohort) -> NDArray[np.int32]:
    """The longest text of a tier's devices, in words that the tier holds."""
    histories = writers.histories
    row = int(histories.lengths.argmax())
    text = histories.select(np.array([row])).items
    held = writers.trainer.language.vectors.items
    return np.where(text < held, text, 0).astype(np.int32)


def positions_of(writers: TextCohort) -> int:
    """Positions, or examples, that a device with much data trains on in a round."""
    return max(1, writers.trainer.lesson(longest(writers), 0, 0).positions)


def tier_facts(parts: TextParts, scenario: Scenario, tier: Tier) -> dict[str, Any]:
    """What one tier holds and costs."""
    writers = parts.simulation.cohorts[tier.index]
    prefix = parts.federation.prefix(parts.server.weights, tier)
    up, down = moved(parts, scenario, tier)
    peak = None
    if scenario.run.footprint:
        peak = device_peak(parts, scenario, tier, prefix, longest(writers))
    return {
        "capacity": tier.capacity,
        "share": tier.share,
        "weight": tier.weight,
        "devices": len(writers.states),
        "items": tier.recommender.vectors.items,
        "dim": tier.recommender.vectors.dim,
        "upload_bytes": up,
        "download_bytes": down,
        "device_peak_bytes": peak,
        **output_cost(writers, scenario, positions_of(writers)).to_json(),
    }


T = TypeVar("T")


class Attempt(Protocol):
    """See :meth:`privrec.run.loop.Loop.attempt`."""

    def __call__(self, what: str, compute: Callable[[], T], /) -> T | None: ...


_EPSILONS: dict[str, tuple[Adversary, Accountant]] = {
    "epsilon": ("recipients", "pld"),
    "epsilon_server": ("server", "pld"),
    "epsilon_rdp": ("recipients", "rdp"),
    "epsilon_server_rdp": ("server", "rdp"),
}


def write_model(out: Path, server: Server, scenario: Scenario) -> None:
    """Write the released weights (``model.safetensors``) and what they mean (``model.json``)."""
    replace(out / "model.safetensors", save({"weights": server.released}))
    n_items = server.plan.federation.tiers[0].recommender.vectors.items
    description = {"items": n_items, "scenario": scenario.name, **model_facts(server, scenario)}
    replace(out / "model.json", (json.dumps(description, indent=2) + "\n").encode())


def read_model(
    out: Path, scenario: Scenario, train: Interactions, model: bytes | None
) -> tuple[Federation, Any]:
    """The tiers and coefficients of a finished run.

    Args:
        out: its directory.
        scenario: what was run.
        train: what the model was trained on.
        model: digest of the model that its ledger ends with.

    Raises:
        UsageError: when the run is not finished.
        IntegrityError: when the model is another, or does not fit the scenario or the catalogue.
    """
    path = out / "model.safetensors"
    if not path.exists():
        raise UsageError(f"{out}: there is no model yet; finish the run: privrec resume {out}")
    federation = federation_of(scenario, train.n_items)
    try:
        weights = load_file(path)["weights"]
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not a model ({error}); restore the file") from None
    if weights.shape != (federation.layout.size,):
        raise IntegrityError(
            f"{path}: {weights.size} coefficients, where a catalogue of {train.n_items} items "
            f"needs {federation.layout.size}; use the data that the model was trained on"
        )
    if digest(weights) != model:
        raise IntegrityError(
            f"{path}: it is not the model that the run's ledger ends with; restore the file"
        )
    return federation, weights


def result_of(
    scenario: Scenario,
    split: Split,
    parts: Parts,
    ledger: Ledger,
    evaluated: metrics.Evaluation,
    *,
    own: Sequence[metrics.Evaluation],
    attempt: Attempt,
    identity: Mapping[str, Any],
    cpu_s: float,
    wall_s: float,
) -> dict[str, Any]:
    """The content of ``result.json``; realised cohort sizes appear in no figure of it.

    Args:
        scenario: what was run.
        split: on what.
        parts: at the end of the run.
        ledger: what was charged.
        evaluated: metrics of everybody with the whole memory.
        own: those of each tier's users with what the tier holds, the strongest tier's first.
        attempt: makes a figure that the guarantee does not need, or states the gap.
        identity: content of ``run.json``.
        cpu_s: CPU seconds of the rounds.
        wall_s: seconds of the whole run.
    """
    server, seed = parts.server, scenario.run.seed
    measured = (evaluated, _together(own)) if scenario.devices.tiers else (evaluated,)
    tiers = [
        attempt(f"costs of tier {tier.index + 1}", partial(_tier, scenario, parts, tier, measured))
        or {"capacity": tier.capacity, "share": tier.share, "weight": tier.weight}
        for tier, measured in zip(parts.federation.tiers, own, strict=False)
    ]
    if parts.federation.absent:
        tiers.append(_absent(parts, own[-1]))
    compared = {
        name: attempt(f"baseline {name}", partial(_baseline, name, scenario, split))
        for name in scenario.run.baselines
    }
    intervals = attempt("intervals", lambda: [each.intervals(seed) for each in measured]) or []
    return {
        **head_of(scenario, server, identity),
        "holdout": split.holdout,
        "metrics": {name: value for each in measured for name, value in each.summary().items()},
        "intervals": {name: list(pair) for each in intervals for name, pair in each.items()},
        "baselines": {name: found for name, found in compared.items() if found},
        "metrics_note": OUTSIDE,
        "outside_the_guarantee": [
            "metrics",
            "intervals",
            "baselines",
            "segments",
            "data",
            "cost",
            "tiers",
        ],
        "privacy": privacy_of(scenario, split.train.n_users, server, ledger, identity),
        "cost": _cost(parts, tiers, cpu_s, wall_s),
        "segments": attempt("segments", lambda: by_segment(evaluated, split)) or [],
        "tiers": tiers,
        "model": model_facts(server, scenario),
        "data": identity["data"],
    }


def deployed_result(
    scenario: Scenario,
    server: Server,
    ledger: Ledger,
    *,
    identity: Mapping[str, Any],
    population: int,
    wall_s: float,
) -> dict[str, Any]:
    """``result.json`` of a run whose devices are elsewhere: what the server knows, no accuracy.

    Args:
        scenario: what was run.
        server: at the end of the run.
        ledger: what was charged.
        identity: content of ``run.json``.
        population: enrolled devices.
        wall_s: seconds of the whole run.
    """
    ring_bits, layouts = server.plan.protection.ring.bits, server.plan.federation.layouts
    return {
        **head_of(scenario, server, identity),
        "holdout": scenario.data.holdout,
        "metrics": {},
        "intervals": {},
        "baselines": {},
        "metrics_note": OUTSIDE,
        "outside_the_guarantee": ["cost"],
        "privacy": privacy_of(scenario, population, server, ledger, identity),
        "cost": {
            "upload_bytes": layouts[0].size * ring_bits // 8,
            "download_bytes": layouts[0].size * BYTES_A_COEFFICIENT,
            "device_peak_bytes": None,
            "cpu_s_per_device_round": None,
            "wall_s": two_digits(wall_s) if server.plan.event.hides_cohorts else wall_s,
        },
        "tiers": [
            {
                "capacity": tier.capacity,
                "share": tier.share,
                "weight": tier.weight,
                "upload_bytes": tier.layout.size * ring_bits // 8,
                "download_bytes": tier.layout.size * BYTES_A_COEFFICIENT,
            }
            for tier in server.plan.federation.tiers
        ],
        "model": model_facts(server, scenario),
        "data": identity["data"],
    }


def head_of(scenario: Scenario, server: Server, identity: Mapping[str, Any]) -> dict[str, Any]:
    """How ``result.json`` begins: what was run, where, and how far.

    Args:
        scenario: what was run.
        server: at the end of the run.
        identity: content of ``run.json``.
    """
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "simulated": identity["simulated"],
        "version": privrec.__version__,
        "run_id": identity["run_id"],
        "rounds": server.index,
        "planned_rounds": scenario.train.rounds,
    }


def _baseline(name: str, scenario: Scenario, split: Split) -> dict[str, float]:
    seed = scenario.run.seed
    scores = metrics.scores_of(name, split.train, dim=scenario.model.dim, seed=seed)
    return metrics.evaluate(scores, split, k=scenario.run.top_k, seed=seed).summary()


def privacy_of(
    scenario: Scenario,
    population: int,
    server: Server,
    ledger: Ledger,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``result.json`` says about privacy; every ε comes from the ledger.

    Args:
        scenario: what was run.
        population: enrolled devices.
        server: at the end of the run.
        ledger: what was charged.
        identity: content of ``run.json``.
    """
    privacy, plan, known = scenario.privacy, server.plan, bool(identity["noise_known"])
    holds = plan.event.is_private and not known
    spent = {
        name: finite(ledger.epsilon(privacy.delta, adversary, accountant)) if holds else None
        for name, (adversary, accountant) in _EPSILONS.items()
    }
    encoding, before = plan.protection.encoding, release_event(scenario)
    return {
        "private": holds,
        **spent,
        "popularity": scenario.devices.popularity,
        "epsilon_popularity": None
        if before is None or known
        else finite(epsilon([before], privacy.delta, "server")),
        "delta": privacy.delta,
        "noise": privacy.noise,
        "noise_multiplier": plan.event.noise_multiplier,
        "clip_norm": encoding.clip_norm,
        "unit": "user",
        "adjacency": "zero-out",
        "mechanism": plan.event.mechanism,
        "rounding_bound_ratio": encoding.bound / 2**encoding.scale_bits,
        "sampling": scenario.devices.sampling,
        "sampling_rate": scenario.devices.sampling_rate,
        "population": population,
        "expected_cohort": plan.expected_cohort,
        "budget": privacy.epsilon,
        "budget_against": privacy.budget_against,
        "noise_known": known,
        "charges": len(ledger.charges),
        "examples": _examples(privacy, ledger, known),
    }


def _examples(privacy: Privacy, ledger: Ledger, known: bool) -> dict[str, Any] | None:
    """The guarantee of devices' own noise: another unit, which nothing adds to the user's."""
    if privacy.local == "none":
        return None
    (event,) = ledger.examples or (None,)
    return {
        "unit": EXAMPLE,
        "epsilon": None if known else finite(ledger.epsilon_of_examples(privacy.local_delta)),
        "delta": privacy.local_delta,
        "noise_multiplier": event and event.noise_multiplier,
        "clip_norm": privacy.local_clip_norm,
        "budget": privacy.local_epsilon,
        "charges": sum(ledger.examples.values()),
    }


def _together(own: Sequence[metrics.Evaluation]) -> metrics.Evaluation:
    """Everybody's metrics, each with what the user's own tier holds, by names of their own."""
    own = [each for each in own if each.users.size]
    if not own:
        return metrics.Evaluation.nobody()
    users = np.concatenate([each.users for each in own])
    order = np.argsort(users)
    names = set.intersection(*(set(each.values) for each in own))
    return metrics.Evaluation(
        users[order],
        {
            f"own_{name}": np.concatenate([each.values[name] for each in own])[order]
            for name in own[0].values
            if name in names
        },
    )


def _tier(
    scenario: Scenario, parts: Parts, tier: Tier, measured: metrics.Evaluation
) -> dict[str, Any]:
    """What one tier holds and costs, and how good it is at what it holds."""
    cohort, size = parts.simulation.cohorts[tier.index], tier.layout.size * BYTES_A_COEFFICIENT
    histories = cohort.histories
    longest = histories.select(np.array([histories.lengths.argmax()])).items
    prefix = parts.federation.prefix(parts.server.weights, tier)
    ring_bits = parts.server.plan.protection.ring.bits
    n_items = parts.everyone.trainer.recommender.vectors.items
    peak, shares = None, parts.server.plan.protection.shares
    if scenario.run.footprint:
        peak = peak_bytes(scenario, tier.index, n_items, prefix, longest, shares)
    return {
        "capacity": tier.capacity,
        "share": tier.share,
        "weight": tier.weight,
        "devices": len(cohort.states),
        "items": tier.recommender.vectors.items,
        "dim": tier.recommender.vectors.dim,
        "upload_bytes": size * ring_bits // (8 * BYTES_A_COEFFICIENT),
        "download_bytes": size,
        "device_peak_bytes": peak,
        **measured.summary(),
    }


def _absent(parts: Parts, measured: metrics.Evaluation) -> dict[str, Any]:
    """Devices that hold nothing and recommend what is popular."""
    facts = {"capacity": 0.0, "share": parts.federation.absent, "weight": 0.0}
    return {**facts, "devices": len(parts.simulation.absent), **measured.summary()}


def _cost(
    parts: Parts, tiers: Sequence[Mapping[str, Any]], cpu_s: float, wall_s: float
) -> dict[str, Any]:
    """Costs of the device that holds most, and of the run."""
    server, plan = parts.server, parts.server.plan
    device_rounds = server.index * plan.expected_cohort
    # Realised cohorts are nobody's business: two digits of a total do not tell their number.
    seconds = two_digits if plan.event.hides_cohorts else float
    device = ("upload_bytes", "download_bytes", "device_peak_bytes")
    return {
        **{name: tiers[0].get(name) for name in device},
        "cpu_s_per_device_round": seconds(cpu_s / device_rounds) if device_rounds else None,
        "wall_s": seconds(wall_s),
        "noise_deferred": parts.simulation.deferred.share,
    }


def finite(value: float) -> float | None:
    """A number as JSON has it: an infinite ε is null."""
    return value if math.isfinite(value) else None


def two_digits(value: float) -> float:
    """A time that tells no realised cohort size."""
    return float(f"{value:.1e}")


def model_facts(server: Server, scenario: Scenario) -> dict[str, Any]:
    """What ``result.json`` and ``model.json`` say about the model's size."""
    recommender = server.plan.federation.tiers[0].recommender
    vectors, layout = recommender.vectors, recommender.layout
    return {
        "kind": scenario.model.kind,
        "dim": vectors.dim,
        "block": vectors.block,
        "slots": vectors.slots,
        "compression": vectors.compression,
        "dense_weights": layout.dense,
        "coefficients": layout.size,
        "weights_norm": float(np.linalg.norm(server.released)),
    }
