"""A run directory as `run.py` leaves it: realistic files and a real, signed ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import Ledger
from privrec.privacy.population import PopulationBalance
from privrec.run.plan import Plan
from privrec.run.record import EventLog, Record
from privrec.scenario.load import Row, Scenario
from privrec.storage import sign

MakeRun = Callable[..., Path]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def make_run(
    path: Path,
    *,
    name: str = "ml-1m-dp",
    noise: str = "central",
    noise_known: bool = False,
    rounds: int = 12,
    planned: int | None = None,
    sigma: float = 1.1,
    rate: float = 0.05,
    delta: float = 1e-5,
    population: int = 6040,
    budget: float | None = 8.0,
    holdout: str = "test",
    eval_every: int = 4,
    retried: tuple[int, ...] = (),
    charged: RoundEvent | None = None,
    quality: float = 0.56,
    simulated: bool = True,
    standing: PopulationBalance | None = None,
    tiers: bool = False,
    settings: dict[str, Any] | None = None,
    declares: bool = True,
    compared: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a finished run.

    ``retried`` names rounds (from 0) that were charged twice, ``charged`` another event than the
    scenario plans, ``settings`` further keys of the scenario, ``tiers`` mixes three capacities.
    """
    path.mkdir(parents=True)
    scenario = _scenario(name, noise, planned or rounds, sigma, rate, delta, budget, holdout)
    mixed = [{"capacity": each, "share": 0.25 if each < 1 else 0.5} for each in (1.0, 0.5, 0.25)]
    scenario = scenario.with_settings(
        {
            "run.eval_every": eval_every,
            "title": "Federated GMF on MovieLens 1M",
            **({"devices.tiers": mixed} if tiers else {}),
            **(settings or {}),
        }
    )
    scenario = scenario.model_copy(update={"rows": tuple(Row(name=row) for row in compared)})
    event = charged or _event(scenario, noise, sigma, rate, population)
    header = {
        "run_id": "20260101-abc123",
        "scenario_hash": scenario.hash(),
        "privacy_hash": scenario.privacy_hash(),
        "delta": delta,
        "population": population,
        "noise_known": noise_known,
    }
    plan = Plan.of(scenario, 3706, population)
    if declares:
        header |= {"simulated": simulated} | plan.header(standing or PopulationBalance())
    with Ledger.create(path / "ledger.jsonl", header=header, signing_key=KEY) as ledger:
        for number in range(rounds):
            for attempt in range(2 if number in retried else 1):
                ledger.charge(event, number, attempt, plan.examples)
            ledger.commit(number, ledger.attempts(number) - 1, b"t" * 32)
        ledger.end(b"m" * 32)
        ledger.seal()
        charges = len(ledger.charges)
        examples = _examples(plan, ledger, noise_known)
        spent = [
            ledger.epsilon(adversary, delta, accountant)
            for accountant in ("pld", "rdp")
            for adversary in ("recipients", "server")
        ]
    finite = [None if noise_known or math.isinf(value) else value for value in spent]
    _write_events(path, rounds, eval_every, quality)
    _write_json(path / "run.json", _run(scenario, noise_known, simulated))
    (path / "scenario.toml").write_text(scenario.to_toml(), encoding="utf-8")
    result = {
        "scenario": name,
        "title": "Federated GMF on MovieLens 1M",
        "simulated": simulated,
        "version": "0.1.0",
        "run_id": header["run_id"],
        "holdout": holdout,
        "metrics": _metrics(quality),
        "intervals": {
            key: [value - 0.012, value + 0.013] for key, value in _metrics(quality).items()
        },
        "metrics_note": "outside the guarantee",
        "privacy": {
            "private": None not in finite,
            **dict(
                zip(
                    ("epsilon", "epsilon_server", "epsilon_rdp", "epsilon_server_rdp"),
                    finite,
                    strict=True,
                )
            ),
            "delta": delta,
            "noise": noise,
            "noise_multiplier": event.noise_multiplier,
            "clip_norm": scenario.privacy.clip_norm,
            "unit": "user",
            "adjacency": "zero-out",
            "sampling": "everybody" if rate == 1 else "poisson",
            "sampling_rate": rate,
            "population": population,
            "expected_cohort": population * rate,
            "budget": scenario.privacy.epsilon,
            "budget_against": "recipients",
            "noise_known": noise_known,
            "charges": charges,
            "examples": examples,
            "mechanism": "gaussian on the integer sum",
            "rounding_bound_ratio": 1.004,
        },
        "cost": {
            "upload_bytes": 474_368,
            "download_bytes": 474_368,
            "device_peak_bytes": 1_612_000,
            "cpu_s_per_device_round": 0.00031,
            "wall_s": 214.2,
        },
        "rounds": rounds,
        "planned_rounds": scenario.train.rounds,
        "model": {
            "kind": "gmf",
            "dim": 32,
            "block": 16,
            "memory_floats": 131072,
            "item_bias": True,
        },
        "data": {"source": "ml-1m", "users": 6040, "items": 3706, "interactions": 994_169},
        **(extra or {}),
    }
    _write_json(path / "result.json", sign("result", result, KEY))
    return path


def _examples(plan: Plan, ledger: Ledger, known: bool) -> dict[str, Any] | None:
    single, privacy = plan.examples, plan.scenario.privacy
    if single is None:
        return None
    return {
        "unit": "example",
        "epsilon": None if known else epsilon(ledger.examples, privacy.local_delta, "server"),
        "delta": privacy.local_delta,
        "noise_multiplier": single.noise_multiplier,
        "clip_norm": privacy.local_clip_norm,
        "budget": privacy.local_epsilon,
        "adversary": {"example": "uploads", "shares": "sums"}[privacy.local],
        "charges": sum(ledger.examples.values()),
    }


def _scenario(
    name: str,
    noise: str,
    rounds: int,
    sigma: float,
    rate: float,
    delta: float,
    budget: float | None,
    holdout: str,
) -> Scenario:
    privacy: dict[str, Any] = {"noise": noise, "delta": delta}
    if noise != "none":
        strength = {"noise_multiplier": sigma} if budget is None else {"epsilon": budget}
        privacy |= {"clip_norm": 0.5, **strength}
    devices = {"sampling": "everybody"} if rate == 1 else {"sampling_rate": rate}
    return Scenario.model_validate(
        {
            "name": name,
            "description": "Noisy federated GMF, to show a report.",
            "data": {"source": "ml-1m", "holdout": holdout},
            "devices": devices,
            "train": {"rounds": rounds},
            "privacy": privacy,
        }
    )


def _event(
    scenario: Scenario, noise: str, sigma: float, rate: float, population: int
) -> RoundEvent:
    if noise == "none":
        return RoundEvent("none", 0.0, rate)
    if noise == "central":
        return RoundEvent("gaussian", sigma, rate)
    planned = Plan.of(scenario, 3706, population).event
    return RoundEvent(planned.mechanism, sigma, rate, planned.grid)


def _run(scenario: Scenario, noise_known: bool, simulated: bool) -> dict[str, Any]:
    return {
        "run_id": "20260101-abc123",
        "version": "0.1.0",
        "simulated": simulated,
        "scenario_hash": scenario.hash(),
        "privacy_hash": scenario.privacy_hash(),
        "noise_known": noise_known,
        "data": {"source": "ml-1m", "users": 6040, "items": 3706},
    }


def _metrics(quality: float) -> dict[str, float]:
    return {
        "hr@10": quality,
        "ndcg@10": quality * 0.6,
        "full_hr@10": quality * 0.125,
        "full_ndcg@10": quality * 0.064,
        "full_recall@10": quality * 0.125,
    }


def _write_events(path: Path, rounds: int, eval_every: int, quality: float) -> None:
    with EventLog(path / "events.jsonl") as log:
        log.append("start", rounds=rounds)
        for number in range(1, rounds + 1):
            evaluated = number == rounds or (eval_every and number % eval_every == 0)
            reached = quality * (1 - math.exp(-3 * number / rounds)) / (1 - math.exp(-3))
            log.round(
                Record(
                    number,
                    rounds,
                    loss=0.25
                    + 0.45 * math.exp(-4 * number / rounds)
                    + 0.004 * math.sin(number * 7.0),
                    metrics={"hr@10": reached, "ndcg@10": reached * 0.6} if evaluated else None,
                    wall_s=0.35,
                    cpu_s=0.3,
                    cohort=300 + number,
                )
            )
        log.append("end")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


@pytest.fixture(autouse=True)
def no_kept_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that this machine keeps for real runs are of no concern to a test."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def make() -> MakeRun:
    """Makes a run directory at any path, for what a module makes once."""
    return make_run


@pytest.fixture
def a_run(tmp_path: Path) -> MakeRun:
    """Makes run directories: ``a_run("name", rounds=5, …)`` gives the path."""

    def make(folder: str = "run", **settings: Any) -> Path:
        return make_run(tmp_path / folder, **settings)

    return make
