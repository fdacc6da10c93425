"""A run neither draws from nor seeds a generator that others use too."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import privrec
from privrec.run.record import Observer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("train.rounds=2", "data.users=40", "data.items=60", "devices.population=40")


def global_states() -> tuple[object, bytes, bytes]:
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), repr(numpy_state).encode(), torch_state


@pytest.mark.parametrize("kind", ["gmf", "neumf"])
@pytest.mark.parametrize("engine", ["cohort", "device"])
def test_a_run_leaves_the_global_generators_alone(
    kind: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    settings = (*SMALL, f"model.kind={kind}", f"run.engine={engine}", "run.footprint=false")
    scenario = privrec.load_scenario(ROOT / "scenarios" / "quickstart.toml", settings)
    before = global_states()
    privrec.start(scenario, out=tmp_path / "run", observer=Observer())
    assert global_states() == before
