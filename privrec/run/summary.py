"""What a finished run leaves behind: the model, and ``result.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

import privrec
from privrec import storage
from privrec.device.tier import Federation
from privrec.device.update import digest
from privrec.errors import IntegrityError, UsageError
from privrec.evaluate.metrics import Evaluation
from privrec.privacy.events import Accountant, Adversary, epsilon
from privrec.privacy.ledger import EXAMPLE, Ledger
from privrec.run import costs
from privrec.run.identity import Identity
from privrec.run.plan import Plan
from privrec.run.privacy_plan import release_event
from privrec.run.record import OUTSIDE
from privrec.scenario.load import Privacy, Scenario
from privrec.server.server import Server

_EPSILONS: dict[str, tuple[Adversary, Accountant]] = {
    "epsilon": ("recipients", "pld"),
    "epsilon_server": ("server", "pld"),
    "epsilon_rdp": ("recipients", "rdp"),
    "epsilon_server_rdp": ("server", "rdp"),
}


def write_model(out: Path, server: Server, scenario: Scenario) -> None:
    """Write the released weights (``model.safetensors``) and what they mean (``model.json``)."""
    storage.replace(out / "model.safetensors", save({"weights": server.released}))
    n_items = server.plan.federation.tiers[0].model.vectors.items
    description = {"items": n_items, "scenario": scenario.name, **_model_facts(server, scenario)}
    storage.write_json(out / "model.json", description)


def read_model(out: Path, federation: Federation, n_items: int, model: bytes | None) -> Any:
    """Return the coefficients of a finished run whose ledger ends with the digest ``model``.

    Raises:
        UsageError: when the run is not finished.
        IntegrityError: when the model is another, or does not fit the scenario or the catalogue.
    """
    path = out / "model.safetensors"
    if not path.exists():
        raise UsageError(f"{out}: there is no model yet; finish the run: privrec resume {out}")
    try:
        weights = load_file(path)["weights"]
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not a model ({error}); restore the file") from None
    if weights.shape != (federation.layout.size,):
        raise IntegrityError(
            f"{path}: {weights.size} coefficients, where a catalogue of {n_items} items "
            f"needs {federation.layout.size}; use the data that the model was trained on"
        )
    if digest(weights) != model:
        raise IntegrityError(
            f"{path}: it is not the model that the run's ledger ends with; restore the file"
        )
    return weights


def result_of(
    plan: Plan, server: Server, ledger: Ledger, identity: Identity, wall_s: float
) -> dict[str, Any]:
    """Return the content of ``result.json`` as far as it needs no devices: nothing is measured.

    Realised cohort sizes appear in no figure of it.
    """
    scenario = plan.scenario
    tiers = [costs.of_tier(plan, tier) for tier in plan.federation.tiers]
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "simulated": identity.simulated,
        "version": privrec.__version__,
        "run_id": identity.run_id,
        "rounds": server.index,
        "planned_rounds": scenario.train.rounds,
        "holdout": scenario.data.holdout,
        "metrics": {},
        "intervals": {},
        "baselines": {},
        "metrics_note": OUTSIDE,
        "outside_the_guarantee": ["cost"],
        "privacy": _privacy(plan, server, ledger, known=identity.known_key is not None),
        "cost": cost_of(plan, server, tiers[0], wall_s=wall_s),
        "tiers": tiers,
        "model": _model_facts(server, scenario),
        "data": identity.data,
    }


def cost_of(
    plan: Plan,
    server: Server,
    strongest: Mapping[str, Any],
    names: Sequence[str] = ("upload_bytes", "download_bytes", "device_peak_bytes"),
    *,
    wall_s: float,
    cpu_s: float | None = None,
) -> dict[str, Any]:
    """Return the costs of the run, and of the device that holds most.

    Those are the ``names`` among the facts of the ``strongest`` tier; CPU seconds are of the
    rounds, where the devices are simulated.
    """
    # Realised cohorts are nobody's business: two digits of a total do not tell their number.
    seconds = (lambda s: float(f"{s:.1e}")) if plan.event.hides_cohorts else float
    device_rounds = server.index * server.plan.expected_cohort
    per_round = None if cpu_s is None or not device_rounds else seconds(cpu_s / device_rounds)
    costs = {name: strongest.get(name) for name in names}
    return {**costs, "cpu_s_per_device_round": per_round, "wall_s": seconds(wall_s)}


def _privacy(plan: Plan, server: Server, ledger: Ledger, *, known: bool) -> dict[str, Any]:
    """What ``result.json`` says about privacy; every ε comes from the ledger."""
    privacy, devices = plan.scenario.privacy, plan.scenario.devices
    encoding = plan.protection.encoding
    holds = plan.event.is_private and not known
    spent = {
        name: _finite(ledger.epsilon(privacy.delta, adversary, accountant)) if holds else None
        for name, (adversary, accountant) in _EPSILONS.items()
    }
    before = release_event(plan.scenario)
    released = None
    if before is not None and not known:
        released = _finite(epsilon([before], privacy.delta, "server"))
    return {
        "private": holds,
        **spent,
        "popularity": devices.popularity,
        "epsilon_popularity": released,
        "delta": privacy.delta,
        "noise": privacy.noise,
        "noise_multiplier": plan.event.noise_multiplier,
        "clip_norm": encoding.clip_norm,
        "unit": "user",
        "adjacency": "zero-out",
        "mechanism": plan.event.mechanism,
        "rounding_bound_ratio": encoding.bound / 2**encoding.scale_bits,
        "sampling": devices.sampling,
        "sampling_rate": devices.sampling_rate,
        "population": plan.users,
        "expected_cohort": server.plan.expected_cohort,
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
        "epsilon": None
        if known
        else _finite(epsilon(ledger.examples, privacy.local_delta, "server")),
        "delta": privacy.local_delta,
        "noise_multiplier": event and event.noise_multiplier,
        "clip_norm": privacy.local_clip_norm,
        "budget": privacy.local_epsilon,
        "charges": sum(ledger.examples.values()),
    }


def together(own: Sequence[Evaluation]) -> Evaluation:
    """Return everybody's metrics, each with what the user's own tier holds, named ``own_…``."""
    own = [each for each in own if each.users.size]
    if not own:
        return Evaluation.nobody()
    users = np.concatenate([each.users for each in own])
    order = np.argsort(users)
    common = set.intersection(*(set(each.values) for each in own))
    values = {
        f"own_{name}": np.concatenate([each.values[name] for each in own])[order]
        for name in own[0].values
        if name in common
    }
    return Evaluation(users[order], values)


def _finite(value: float) -> float | None:
    """A number as JSON has it: an infinite ε is null."""
    return value if math.isfinite(value) else None


def _model_facts(server: Server, scenario: Scenario) -> dict[str, Any]:
    recommender = server.plan.federation.tiers[0].model
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
