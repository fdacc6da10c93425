"""What a device pays for its output layer: bytes moved and held, and multiply-adds, measured.

Multiply-adds are those that torch counts while a device's real scores and gradients are computed;
bytes are those of the tensors. Selection is counted beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from privrec.device.lessons import QUERIES
from privrec.device.tier import Tier
from privrec.device.words import Writers
from privrec.models.next_word import sampled_loss
from privrec.run.assembly import BYTES_A_COEFFICIENT
from privrec.run.assembly_text import TextParts
from privrec.run.memory_profile import peak_bytes
from privrec.scenario.load import Scenario
from privrec.search.families import Shape
from privrec.search.select import FOLD, SIGNATURE
from privrec.server.columns import ColumnServer

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


def output_cost(writers: Writers, scenario: Scenario, positions: int) -> OutputCost:
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


def selection_multiply_adds(writers: Writers, scenario: Scenario) -> int:
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


def longest(writers: Writers) -> NDArray[np.int32]:
    """The longest text of a tier's devices, in words that the tier holds."""
    histories = writers.histories
    row = int(histories.lengths.argmax())
    text = histories.select(np.array([row])).items
    held = writers.trainer.language.vectors.items
    return np.where(text < held, text, 0).astype(np.int32)


def positions_of(writers: Writers) -> int:
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
