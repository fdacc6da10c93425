"""What a finished run leaves behind: the model, and ``result.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

import privrec
from privrec import metrics
from privrec.assembly import Parts, recommender_of
from privrec.checkpoint import replace
from privrec.data import Interactions, Split
from privrec.device.train import Recommender
from privrec.errors import IntegrityError, UsageError
from privrec.footprint import peak_bytes
from privrec.privacy.events import Accountant, Adversary
from privrec.privacy.ledger import Ledger
from privrec.record import OUTSIDE
from privrec.scenario import Scenario

BYTES_A_COEFFICIENT = 4
_EPSILONS: dict[str, tuple[Adversary, Accountant]] = {
    "epsilon": ("recipients", "pld"),
    "epsilon_server": ("server", "pld"),
    "epsilon_rdp": ("recipients", "rdp"),
    "epsilon_server_rdp": ("server", "rdp"),
}


def write_model(out: Path, parts: Parts, scenario: Scenario, train: Interactions) -> None:
    """Write the released weights (``model.safetensors``) and what they mean (``model.json``)."""
    replace(out / "model.safetensors", save({"weights": parts.server.released}))
    description = {"items": train.n_items, "scenario": scenario.name, **_model(parts, scenario)}
    replace(out / "model.json", (json.dumps(description, indent=2) + "\n").encode())


def read_model(out: Path, scenario: Scenario, train: Interactions) -> tuple[Recommender, Any]:
    """The recommender and weights of a finished run.

    Raises:
        UsageError: when the run is not finished.
        IntegrityError: when the model does not fit the scenario or the catalogue.
    """
    path = out / "model.safetensors"
    if not path.exists():
        raise UsageError(f"{out}: there is no model yet; finish the run: privrec resume {out}")
    recommender = recommender_of(scenario.model, train.n_items, scenario.run.seed)
    try:
        weights = load_file(path)["weights"]
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not a model ({error}); restore the file") from None
    if weights.shape != (recommender.layout.size,):
        raise IntegrityError(
            f"{path}: {weights.size} coefficients, where a catalogue of {train.n_items} items "
            f"needs {recommender.layout.size}; use the data that the model was trained on"
        )
    return recommender, weights


def result_of(
    scenario: Scenario,
    split: Split,
    parts: Parts,
    ledger: Ledger,
    evaluated: metrics.Evaluation,
    *,
    identity: Mapping[str, Any],
    cpu_s: float,
    wall_s: float,
) -> dict[str, Any]:
    """The content of ``result.json``; realised cohort sizes appear in no figure of it."""
    server, seed = parts.server, scenario.run.seed
    popularity = metrics.evaluate(
        metrics.popularity_scores(split.train), split, k=scenario.run.top_k, seed=seed
    )
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "simulated": True,
        "version": privrec.__version__,
        "run_id": identity["run_id"],
        "rounds": server.index,
        "planned_rounds": scenario.train.rounds,
        "holdout": split.holdout,
        "metrics": evaluated.summary(),
        "intervals": {name: list(pair) for name, pair in evaluated.intervals(seed).items()},
        "baselines": {"popularity": popularity.summary()},
        "metrics_note": OUTSIDE,
        "outside_the_guarantee": ["metrics", "intervals", "baselines", "data", "cost"],
        "privacy": _privacy(scenario, split, parts, ledger, known=bool(identity["noise_known"])),
        "cost": _cost(scenario, split.train, parts, cpu_s, wall_s),
        "model": _model(parts, scenario),
        "data": identity["data"],
    }


def _privacy(
    scenario: Scenario, split: Split, parts: Parts, ledger: Ledger, *, known: bool
) -> dict[str, Any]:
    privacy, plan = scenario.privacy, parts.server.plan
    holds = plan.event.is_private and not known
    spent = {
        name: ledger.epsilon(privacy.delta, adversary, accountant) if holds else None
        for name, (adversary, accountant) in _EPSILONS.items()
    }
    encoding = plan.encoding
    return {
        "private": holds,
        **spent,
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
        "population": split.train.n_users,
        "expected_cohort": plan.expected_cohort,
        "budget": privacy.epsilon,
        "budget_against": privacy.budget_against,
        "noise_known": known,
        "charges": len(ledger.charges),
    }


def _cost(
    scenario: Scenario, train: Interactions, parts: Parts, cpu_s: float, wall_s: float
) -> dict[str, Any]:
    size = parts.recommender.layout.size * BYTES_A_COEFFICIENT
    longest = train.history(int(train.counts.argmax()))
    server, plan = parts.server, parts.server.plan
    device_rounds = server.index * plan.expected_cohort
    # Realised cohorts are nobody's business: two digits of a total do not tell their number.
    seconds = _two_digits if plan.event.hides_cohorts else float
    return {
        "upload_bytes": size,
        "download_bytes": size,
        "device_peak_bytes": peak_bytes(scenario, train.n_items, server.weights, longest),
        "cpu_s_per_device_round": seconds(cpu_s / device_rounds) if device_rounds else None,
        "wall_s": seconds(wall_s),
    }


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _model(parts: Parts, scenario: Scenario) -> dict[str, Any]:
    vectors, layout = parts.recommender.vectors, parts.recommender.layout
    return {
        "kind": scenario.model.kind,
        "dim": vectors.dim,
        "block": vectors.block,
        "slots": vectors.slots,
        "compression": vectors.compression,
        "dense_weights": layout.dense,
        "coefficients": layout.size,
        "weights_norm": float(np.linalg.norm(parts.server.released)),
    }
