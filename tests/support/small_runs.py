"""What tests of whole runs share: a scenario with changes, one run of it, and what it leaves."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import privrec


class Silent:
    """An observer that is told everything and says nothing."""

    def started(self, info: Any) -> None:
        """Nothing."""

    def round(self, record: Any) -> None:
        """Nothing."""

    def finished(self, result: Any) -> None:
        """Nothing."""


class Stop(Silent):
    """Presses Ctrl-C after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: Any) -> None:
        """Interrupt where it is time."""
        if record.round == self.after:
            signal.raise_signal(signal.SIGINT)


def make_scenario(base: str | Path, *changes: str) -> privrec.Scenario:
    """Return the scenario of a TOML text or file, with ``key=value`` changes as ``-s`` has them."""
    if isinstance(base, Path):
        return privrec.load_scenario(base, changes)
    return privrec.Scenario.from_toml(base, changes)


def run_once(
    base: str | Path, out: Path, *changes: str, key: bytes | None = None, **words: Any
) -> dict[str, Any]:
    """Run a scenario to its end and return its result.

    Args:
        base: as for :func:`make_scenario`.
        out: the run's new directory.
        *changes: likewise.
        key: a known noise root, for runs that repeat bit for bit.
        **words: further arguments of :func:`privrec.start`, such as ``observer``.
    """
    words.setdefault("observer", Silent())
    scenario = make_scenario(base, *changes)
    return privrec.start(scenario, out=out, unsafe_noise_key=key, **words).payload


def weights(out: Path) -> np.ndarray:
    """Return the released weights of a finished run."""
    return load_file(out / "model.safetensors")["weights"]


def ledger_entries(out: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's ledger as they stand on disk, the header first."""
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text("utf-8").splitlines()]


def events_of(path: Path) -> list[dict[str, Any]]:
    """Every event of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]
