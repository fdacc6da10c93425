"""How much memory one device needs for a round, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privrec.device.batch import Histories
from privrec.device.device import Device, hash_functions, privatize
from privrec.device.round import Protection, Round, model_digests
from privrec.models.process_memory import (
    give_back_freed,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)
from privrec.privacy.events import RoundEvent
from privrec.privacy.mechanism import Band, Shares, noise_seeds
from privrec.randomness import SecretRoot
from privrec.run.assembly import federation_of, trainer_of, writers_of
from privrec.run.privacy_plan import encoding_of
from privrec.scenario.load import Scenario
from privrec.secagg.ring import Ring

TIMEOUT_S = 120


def peak_bytes(
    scenario: Scenario,
    tier: int,
    n_items: int,
    coefficients: NDArray[np.float32],
    history: NDArray[np.int32],
    shares: Shares | None = None,
) -> int | None:
    """Peak resident memory of one device's round above that of the idle interpreter, in bytes.

    A fresh interpreter imports what a device needs, then receives the model, trains on one history
    and encodes its update, with its noise. None when that interpreter could not be run.

    Args:
        scenario: decides the model and its training.
        tier: which tier the device is of, 0 for the strongest.
        n_items: size of the catalogue.
        coefficients: the tier's prefix of the model, which is what it is sent.
        history: the device's items; the longest one tells the worst case.
        shares: the noise that it adds, if devices do.
    """
    head = {"scenario": scenario.to_toml(), "tier": tier, "n_items": n_items}
    head |= {"coefficients": coefficients.nbytes, "shares": shares and asdict(shares)}
    task = json.dumps(head).encode() + b"\n" + coefficients.tobytes() + history.tobytes()
    try:
        done = subprocess.run(
            # -P: a file of the working directory must not pass for a module.
            [sys.executable, "-P", "-m", "privrec.run.memory_profile"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            input=task,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


class _Task:
    """A round of one device, to be carried out when asked."""

    def __init__(self, head: bytes, body: bytes) -> None:
        described = json.loads(head)
        scenario = Scenario.from_toml(described["scenario"])
        federation = self._federation = federation_of(scenario, described["n_items"])
        self._tier = federation.tiers[described["tier"]]
        self._weaker = federation.weaker(self._tier)
        self._scenario = scenario
        encoding, ring = encoding_of(scenario, federation.layout.size), scenario.privacy.ring_bits
        shares = described["shares"]
        if shares is not None:
            shares = Shares(**shares | {"bands": tuple(Band(**b) for b in shares["bands"])})
        self._protection = Protection(encoding, Ring(ring), shares)
        self._model = body[: described["coefficients"]]
        self._history = body[described["coefficients"] :]

    def peak(self) -> int:
        """Bytes that the round takes at its peak."""
        # A first round on one item loads what the libraries load on their first call.
        self._round(self._history[: np.dtype(np.int32).itemsize])
        give_back_freed()
        reset_peak()
        before = resident_bytes()
        self._round(self._history)
        return max(0, peak_resident_bytes() - before)

    def _round(self, history: bytes) -> None:
        # The bytes arrived before the measurement; the copies are what a device would hold.
        model = np.frombuffer(self._model, np.float32).copy()
        items = np.frombuffer(history, np.int32).copy()
        root = SecretRoot.known(b"measures itself")
        digests = model_digests(model, (self._tier.layout, *self._weaker))
        round = Round("footprint", 0, 0, RoundEvent("none", 0.0, 1.0), "", digests)
        if self._scenario.model.learns != "interactions":
            self._write(round, model, items, root)
            return
        trainer = trainer_of(self._scenario, self._federation, self._tier)
        device = Device(0, items, self._tier, self._weaker, trainer, self._protection, root)
        device.upload(round, device.answer(round, model, 0))

    def _write(
        self, round: Round, model: NDArray[np.float32], text: NDArray[np.int32], root: SecretRoot
    ) -> None:
        """A round of one device with a text."""
        # A text of one word has no next one: what the libraries load takes two.
        one = np.resize(text, max(2, len(text)))
        histories = Histories(np.array([0]), np.array([0, len(one)]), one)
        writers = writers_of(self._scenario, self._tier, histories)
        streams = hash_functions(root, round)
        for _, trained in writers.train(self._tier.view(model), np.array([0]), 0, streams):
            update, coins = self._tier.lift(trained.update), root.stream("rounding")
            bounded = privatize(update, self._protection, round, self._tier, self._weaker, coins)
            shares, layouts = self._protection.shares, (self._tier.layout, *self._weaker)
            seeds = () if shares is None else noise_seeds(root, len(layouts), *round.context, 0)
            bounded.upload(layouts, shares, seeds)


if __name__ == "__main__":
    received = sys.stdin.buffer
    sys.stdout.write(str(_Task(received.readline(), received.read()).peak()))
