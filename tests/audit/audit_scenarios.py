"""Small scenarios of each kind of noise; a module that tests of the audit share."""

from __future__ import annotations

from pathlib import Path

import privrec
from privrec.report.model import AuditPart
from privrec.scenario.load import Scenario

QUICKSTART = Path(__file__).resolve().parents[2] / "scenarios" / "quickstart.toml"
SMALL = (
    "data.users=300", "devices.population=300", "data.items=60", "train.rounds=10",
    "privacy.epsilon=6",
)  # fmt: skip
TIERS = 'devices.tiers=[{"capacity"=1.0,"share"=0.5},{"capacity"=0.25,"share"=0.5}]'
POISSON = ("devices.sampling=poisson", "devices.sampling_rate=0.3")
KINDS: dict[str, tuple[str, ...]] = {
    "central": (),
    "poisson": (*POISSON, "privacy.budget_against=recipients", "privacy.evaluation_epsilon=1.0"),
    "tiers": (TIERS,),
    "distributed": ("privacy.noise=distributed", "data.users=100", "devices.population=100"),
    "kept": (
        "privacy.noise=distributed", "privacy.remove_excess=false",
        "data.users=100", "devices.population=100", "privacy.scale_bits=10",
        "privacy.evaluation_epsilon=1.0",
    ),
    "mixed": (
        "privacy.noise=distributed", "data.users=120", "devices.population=120", TIERS,
        "privacy.ring_bits=16", "privacy.scale_bits=6",
    ),
    "none": ("privacy.noise=none", "privacy.epsilon="),
    "examples": (
        "privacy.noise=none", "privacy.epsilon=", "privacy.local=shares", "privacy.scale_bits=18",
        "privacy.local_clip_norm=1.0", "privacy.local_epsilon=6", "privacy.clip_norm=2.0",
        "train.user_steps=0", "train.loss=bpr", "train.selector=each", "train.local_lr=0.1",
        "data.users=100", "devices.population=100",
    ),
}  # fmt: skip


def scenario(kind: str, *more: str) -> Scenario:
    return privrec.load_scenario(QUICKSTART, (*SMALL, *KINDS[kind], *more))


def failed(found: AuditPart) -> set[str]:
    return {check.probe for check in found.checks if not check.passed}
