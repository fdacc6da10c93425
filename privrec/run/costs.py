"""What a run costs a device: bytes moved and held, multiply-adds, and memory, all measured.

Multiply-adds are those that torch counts while a device's real scores and gradients are computed;
bytes are those of the tensors. Selection is counted beside them. Peak memory is that of a process
of its own, which runs this module: it receives what a device holds, and goes through one round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from privrec.device.device import Cohort, Device
from privrec.device.tier import Tier
from privrec.device.update import Protection, Round, model_digests
from privrec.device.words import QUERIES, WordLearner
from privrec.models.losses import sampled_loss
from privrec.privacy.events import RoundEvent
from privrec.privacy.mechanism import Band, Shares
from privrec.randomness import SecretRoot
from privrec.run.parties import learner_of
from privrec.run.plan import BYTES_A_COEFFICIENT, Plan, federation_of
from privrec.run.privacy_plan import encoding_of
from privrec.scenario.load import Scenario
from privrec.search.hashing import FOLD, Shape
from privrec.search.index import SIGNATURE
from privrec.secagg.ring import Ring
from privrec.server.columns import TABLES, ServerView, shape_of
from privrec.workers import (
    give_back_freed,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)

TIMEOUT_S = 120
_TABLES = 20  # of a device's own choice, on average; see privrec.search.hashing.own_shape
_CODE_BYTES = 2
_NAME_BYTES = 4


def of_tier(plan: Plan, tier: Tier, sight: ServerView | None = None) -> dict[str, Any]:
    """Return what is public of a tier; its bytes up and down count no keys and masks.

    A device moves the whole of its prefix, touched or not. One that asks for neurons, of which the
    server has ``sight``, moves those alone, the words that it names and bucket ids.
    """
    size, asked, named = tier.layout.size, 0, 0
    if sight is not None:
        vectors = plan.federation.tiers[0].model.vectors
        neurons = round(plan.scenario.train.budget * vectors.items)
        size, named = tier.layout.head + neurons * (vectors.dim + 1), neurons * _NAME_BYTES
        all_asked = sight.words * _NAME_BYTES + sight.buckets * _CODE_BYTES
        asked = round(all_asked / max(1, sight.requests))
    return {
        "capacity": tier.capacity,
        "share": tier.share,
        "weight": tier.weight,
        "upload_bytes": size * plan.protection.ring.bits // 8 + asked,
        "download_bytes": size * BYTES_A_COEFFICIENT + named,
    }


def of_output(cohort: Cohort[WordLearner], scenario: Scenario, positions: int) -> dict[str, int]:
    """Return what the output layer takes of one device of a tier, in a round.

    ``output_neurons`` are those that are active; ``output_bytes`` their weights and gradients, and
    the scores of all positions; ``selection_multiply_adds`` are spent on choosing them.
    """
    neurons, dim = cohort.learner.output.size, cohort.learner.view.vectors.dim
    rows = torch.zeros(neurons, dim, requires_grad=True)
    biases = torch.zeros(neurons, requires_grad=True)
    hidden = torch.zeros(positions, dim, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        targets = torch.zeros(positions, dtype=torch.int64)
        sampled_loss(hidden, rows, biases, torch.zeros(neurons), targets).backward()  # type: ignore[no-untyped-call]
    scores = positions * neurons * BYTES_A_COEFFICIENT
    return {
        "output_neurons": neurons,
        "output_bytes": 2 * (rows.nbytes + biases.nbytes) + 2 * scores,
        "output_multiply_adds": counter.get_total_flops() // 2,
        "selection_multiply_adds": _selection(cohort.learner, scenario),
    }


def _selection(learner: WordLearner, scenario: Scenario) -> int:
    """Multiply-adds of a device that chooses its neurons, in one round."""
    output, vectors, selector = learner.output, learner.view.vectors, learner.settings.selector
    items, width = vectors.items, vectors.dim + 1
    if not output.selected:
        return 0
    if scenario.train.requested:
        return QUERIES * width * shape_of(items).bits * TABLES
    if selector == "scan":
        return QUERIES * items * width
    if selector == "hamming":
        return (items + QUERIES) * width * SIGNATURE
    bits = Shape(max(1, round(np.log2(max(2, items * _TABLES / (2 * output.size))))))
    # A fold adds before it multiplies, so only as many numbers are multiplied as it has.
    folded = min(width, FOLD) if selector == "pghash" else width
    return (items + QUERIES) * folded * bits.bits * _TABLES


def longest(cohort: Cohort[Any]) -> NDArray[np.int32]:
    """Return the longest data of a tier's devices, as far as the tier holds it."""
    return cohort.data.of(int(cohort.data.lengths.argmax()))


# --------------------------------------------------------------------------- peak memory


def peak_bytes(
    plan: Plan,
    tier: Tier,
    weights: NDArray[np.float32],
    history: NDArray[np.int32],
    described: int = 0,
) -> int | None:
    """Return the peak resident memory of one device's round above that of an idle interpreter.

    A fresh interpreter imports what a device needs, then receives the tier's prefix of the model,
    trains on one history (the longest is the worst case) and encodes its update, with its noise.
    Of each item of the catalogue the data has so many features, ``described``. None when that
    interpreter could not be run.
    """
    if len(history) < 2:  # a text of one word has no next one
        history = np.resize(history, 2)
    shares = plan.protection.shares
    head = {"scenario": plan.scenario.to_toml(), "items": plan.items, "tier": tier.index}
    head |= {"weights": weights.nbytes, "shares": shares and asdict(shares)}
    head |= {"examples": plan.examples and plan.examples.to_json(), "described": described}
    try:
        done = subprocess.run(
            # -P: a file of the working directory must not pass for a module.
            [sys.executable, "-P", "-m", "privrec.run.costs"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            input=json.dumps(head).encode() + b"\n" + weights.tobytes() + history.tobytes(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _peak(head: bytes, body: bytes) -> int:
    """Bytes that a round takes at its peak, in the process that :func:`peak_bytes` started."""
    described = json.loads(head)
    scenario = Scenario.from_toml(described["scenario"])
    federation = federation_of(scenario, described["items"])
    tier, shares = federation.tiers[described["tier"]], described["shares"]
    if shares is not None:
        shares = Shares(**shares | {"bands": tuple(Band(**band) for band in shares["bands"])})
    examples = described["examples"] and RoundEvent.from_json(described["examples"])
    encoding = encoding_of(scenario, federation.layout.size)
    protection = Protection(encoding, Ring(scenario.privacy.ring_bits), shares)
    sent, held = body[: described["weights"]], body[described["weights"] :]

    def round_on(history: bytes) -> None:
        # The bytes arrived before the measurement; the copies are what a device would hold.
        weights = np.frombuffer(sent, np.float32).copy()
        items = np.frombuffer(history, np.int32).copy()
        size = described["items"], described["described"]
        features = np.zeros(size, np.float32) if size[1] else None
        learner = learner_of(scenario, federation, tier, size[0], examples, features=features)
        root = SecretRoot.known(b"measures itself")
        device = Device(0, items, tier, federation.layouts_of(tier), learner, protection, root)
        digests = model_digests(weights, device.layouts)
        round = Round("footprint", 0, 0, RoundEvent("none", 0.0, 1.0), "", digests)
        device.upload(round, device.answer(round, weights, 0))

    # A first round on two items loads what the libraries load on their first call.
    round_on(held[: 2 * np.dtype(np.int32).itemsize])
    give_back_freed()
    reset_peak()
    before = resident_bytes()
    round_on(held)
    return max(0, peak_resident_bytes() - before)


if __name__ == "__main__":
    received = sys.stdin.buffer
    sys.stdout.write(str(_peak(received.readline(), received.read())))
