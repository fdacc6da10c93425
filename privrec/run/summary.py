"""What a finished run leaves behind: the model, and ``result.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

import privrec
from privrec import storage
from privrec.device.tier import Federation
from privrec.device.update import Evaluating, digest
from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.evaluate.metrics import Evaluation, largest_loss
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import EXAMPLE, Ledger
from privrec.run.directory import Identity, going_on
from privrec.run.plan import Plan
from privrec.run.privacy_plan import EPSILONS, example_figures
from privrec.run.record import OUTSIDE, SUMMED, finite
from privrec.scenario.load import Scenario
from privrec.server.server import Server

FloatArray = NDArray[np.float32]
_COSTS = (
    "upload_bytes", "download_bytes", "device_peak_bytes", "output_neurons", "output_bytes",
    "output_multiply_adds", "selection_multiply_adds",
)  # fmt: skip


def write_model(out: Path, server: Server, scenario: Scenario) -> None:
    """Write the released weights (``model.safetensors``) and what they mean (``model.json``).

    The weights have the same facts in their metadata, as JSON under ``privrec``. Which item a row
    stands for is in ``catalogue.safetensors``.
    """
    items = server.plan.federation.tiers[0].model.vectors.items
    facts = {"items": items, "scenario": scenario.name, **_model_facts(server, scenario)}
    facts |= {"run_id": server.plan.run_id, "plan_hash": scenario.plan_hash()}
    metadata = {"privrec": json.dumps(facts)}  # one entry: several would be in no fixed order
    storage.replace(out / "model.safetensors", save({"weights": server.released}, metadata))
    storage.write_json(out / "model.json", facts)


def read_model(out: Path, federation: Federation, model: bytes | None) -> FloatArray:
    """Return the coefficients of a finished run whose ledger ends with the digest ``model``."""
    path, n_items = out / "model.safetensors", federation.tiers[0].model.vectors.items
    if not path.exists():
        raise UsageError(f"{out}: there is no model yet; finish the run: {going_on(out)}")
    try:
        weights: FloatArray = load_file(path)["weights"]
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
    plan: Plan,
    server: Server,
    ledger: Ledger,
    identity: Identity,
    tiers: Sequence[Mapping[str, Any]],
    *,
    wall_s: float,
    cpu_s: float | None = None,
) -> dict[str, Any]:
    """Return the content of ``result.json`` but for metrics; ``tiers`` are facts of each.

    Costs are those of the device that holds most; realised cohort sizes appear in no figure.
    """
    scenario = plan.scenario
    # Realised cohorts are nobody's business: two digits of a total do not tell their number.
    seconds = (lambda s: float(f"{s:.1e}")) if plan.event.hides_cohorts else float
    device_rounds = server.index * server.plan.expected_cohort
    per_round = seconds(cpu_s / device_rounds) if cpu_s is not None and device_rounds else None
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
        "privacy": _privacy(plan, server, ledger, known=identity.noise_known),
        "cost": {
            **{name: tiers[0][name] for name in _COSTS if name in tiers[0]},
            "cpu_s_per_device_round": per_round,
            "wall_s": seconds(wall_s),
        },
        "tiers": list(tiers),
        "model": _model_facts(server, scenario),
        "data": identity.data,
    }


def _privacy(plan: Plan, server: Server, ledger: Ledger, *, known: bool) -> dict[str, Any]:
    """What ``result.json`` says about privacy; every ε comes from the ledger."""
    privacy, devices = plan.scenario.privacy, plan.scenario.devices
    encoding = plan.protection.encoding
    holds = plan.event.is_private and not known
    spent = {
        name: finite(ledger.epsilon(adversary, privacy.delta, accountant)) if holds else None
        for name, (adversary, accountant) in EPSILONS.items()
    }
    sums = {"popularity": plan.counting, "evaluation": plan.evaluating}
    once = {
        name: finite(epsilon([each.event], privacy.delta, "server")) if each and not known else None
        for name, each in sums.items()
    }
    single = example_figures(plan.scenario, ledger.examples, noise_known=known)
    return {
        "private": holds,
        **spent,
        "popularity": devices.popularity,
        "epsilon_popularity": once["popularity"],
        **({"epsilon_evaluation": once["evaluation"]} if plan.evaluating else {}),
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
        "examples": single and {"unit": EXAMPLE, **single},
    }


def summed_metrics(
    plan: Plan, evaluating: Evaluating, figures: Sequence[float]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return mean loss and share of hits by the sums of an evaluation, and their 95 % intervals.

    Intervals are those of the noise alone. ReleaseRefused when it drowns the number of users.
    """
    loss, hits, count = figures
    shares, variance = evaluating.protection.shares, evaluating.bound**2
    if shares is None:
        variance *= evaluating.event.noise_multiplier**2
    else:
        variance = shares.kept(0, plan.devices) * float(shares.share_variance(0))
    std = math.sqrt(variance) / evaluating.step
    if count <= 2 * std:
        raise ReleaseRefused(
            f"{count:.4g} users hold an item out, by a sum whose noise has a standard deviation "
            f"of {std:.4g}: too few for a mean; raise privacy.evaluation_epsilon"
        )
    values, ends = dict[str, float](), dict[str, list[float]]()
    worst, cut = largest_loss(plan.items), plan.scenario.run.top_k[0]
    for name, total, most in (("loss", loss, worst), (f"hr@{cut}", hits, 1.0)):
        mean = min(1.0, max(0.0, total / count))
        reach = 1.96 * std / count * math.hypot(1, mean)
        values[SUMMED + name] = most * mean
        ends[SUMMED + name] = [most * max(0.0, mean - reach), most * min(1.0, mean + reach)]
    return values, ends


def together(own: Sequence[Evaluation]) -> Evaluation:
    """Return everybody's metrics, each with what the user's own tier holds, named ``own_…``."""
    own = [each for each in own if each.users.size]
    if not own:
        return Evaluation.nobody()
    users = np.concatenate([each.users for each in own])
    order = np.argsort(users)
    names = [name for name in own[0].values if all(name in each.values for each in own)]
    columns = {name: np.concatenate([each.values[name] for each in own]) for name in names}
    return Evaluation(users[order], {f"own_{key}": each[order] for key, each in columns.items()})


def _model_facts(server: Server, scenario: Scenario) -> dict[str, Any]:
    model = server.plan.federation.tiers[0].model
    vectors, layout = model.vectors, model.layout
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
