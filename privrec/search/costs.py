"""What each selector would cost here: seconds from a few measured rates, and bytes by count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from privrec.embedding.subspace import Subspace
from privrec.randomness import rng_for
from privrec.search.families import ROOM
from privrec.search.memory import CHUNK
from privrec.search.tables import popcount

_WORDS = 4  # of a 256-bit signature
_SIZE = 1 << 18
_REPEATS = 3

Ranking = Literal["scan", "hamming", "sketch"]


@dataclass(frozen=True)
class Demand:
    """A selection that is asked for.

    Args:
        items: size of the catalogue.
        dim: length of a row.
        parts: blocks in a row.
        queries: how many at once.
        budget: items wanted.
        sketched: rank of the sketch that is at hand; 0 for none that is good enough.
        pass_bytes: room of a pass over the memory.
    """

    items: int
    dim: int
    parts: int
    queries: int
    budget: int
    sketched: int
    pass_bytes: int


@dataclass(frozen=True)
class Costs:
    """Seconds a unit of each kind of work on this machine.

    Args:
        place: hashing one part of an item to its slot.
        copy: gathering one float of a block.
        pick: gathering one number.
        product: one multiplication and addition of a wide matrix product.
        thin: the same with a single vector.
        sign: turning one projection into a bit.
        word: comparing one 64-bit word.
        convert: turning one 8-bit number into a float.
        sort: one number of a partial sort.
    """

    place: float
    copy: float
    pick: float
    product: float
    thin: float
    sign: float
    word: float
    convert: float
    sort: float

    @staticmethod
    @cache
    def here() -> Costs:
        """Measured once in a process, in a tenth of a second or so."""
        return _measured()

    def seconds(self, ranking: Ranking, demand: Demand) -> float:
        """Predicted seconds of a selection."""
        n, d, q = demand.items, demand.dim, demand.queries
        order = self.sort * n
        passed = n * (demand.parts * self.place + d * self.copy)
        scored = n * d * (self.thin if q == 1 else q * self.product)
        if ranking == "scan":
            pushed = n * demand.parts * (q * self.place + q * self.pick)
            return order + (min(pushed, passed + scored) if q <= 2 else passed + scored)
        if ranking == "sketch":
            rank = demand.sketched
            return order + n * rank * (self.convert + (self.thin if q == 1 else q * self.product))
        bits = 64 * _WORDS
        return (
            order
            + passed
            + n
            * (d * bits * self.product + bits * self.sign + d * self.thin + _WORDS * q * self.word)
        )

    @staticmethod
    def bytes(ranking: Ranking, demand: Demand) -> int:
        """Room of a selection beside the memory; the sketch is counted where it is used."""
        some, bits = min(CHUNK, demand.items), 64 * _WORDS
        chosen, scores = 12 * demand.items, 8 * some * demand.queries
        if ranking == "sketch":
            return chosen + scores + (demand.items + 4 * some) * demand.sketched
        if ranking == "scan":
            return demand.pass_bytes + chosen + scores
        return demand.pass_bytes + chosen + 4 * demand.dim * bits + 5 * ROOM + bits // 4 * some


def choose(demand: Demand, costs: Costs, room: int | None) -> Ranking:
    """The fastest of the selectors whose recall is near that of a scan, among those that fit.

    Tables are never chosen: at equal candidates they find fewer of the best. Where
    nothing fits, the one that needs the least is.

    Args:
        demand: what is asked for.
        costs: of this machine.
        room: bytes to spare, or None.
    """
    open_to: list[Ranking] = ["scan", "hamming"]
    if demand.sketched:
        open_to.append("sketch")
    fitting = [r for r in open_to if room is None or costs.bytes(r, demand) <= room]
    if not fitting:
        return min(open_to, key=lambda ranking: costs.bytes(ranking, demand))
    return min(fitting, key=lambda ranking: costs.seconds(ranking, demand))


def _measured() -> Costs:
    rng = rng_for(0, "costs")
    table = Subspace.sized(_SIZE // 4, 64, block=16, key=1, compression=16)
    places = np.arange(_SIZE // 4)
    place = _time(lambda: [table.locate_doubled(part) for part in np.array_split(places, 8)])
    blocks = rng.random((1 << 14, 16), dtype=np.float32)
    slots = rng.integers(0, len(blocks), _SIZE // 8)
    out = np.empty((len(slots), 16), np.float32)
    copy = _time(lambda: np.take(blocks, slots, axis=0, out=out, mode="clip"))
    numbers, picks = blocks.ravel(), rng.integers(0, blocks.size, _SIZE)
    pick = _time(lambda: np.take(numbers, picks).reshape(-1, 4).sum(1))
    rows, wide = torch.from_numpy(out.reshape(-1, 64)[:4096]), torch.ones(64, 256)
    made = torch.empty(len(rows), 256)
    product = _time(lambda: torch.mm(rows, wide, out=made))
    vector = np.ones(64, np.float32)
    thin = _time(lambda: out.reshape(-1, 64) @ vector)
    values, above = rng.random((2048, 256), dtype=np.float32), np.full(256, 0.5, np.float32)
    sign = _time(lambda: np.packbits((values > above).reshape(-1)))
    words = rng.integers(0, 2**63, _SIZE).astype(np.uint64)
    word = _time(lambda: popcount(words ^ words[0]).astype(np.uint16))
    small = words.view(np.int8)
    convert = _time(lambda: small.astype(np.float32))
    floats = rng.random(_SIZE, dtype=np.float32)
    sort = _time(lambda: np.argpartition(floats, _SIZE - 100))
    return Costs(
        place / _SIZE, copy / out.size, pick / _SIZE, product / (rows.numel() * 256),
        thin / out.size, sign / values.size, word / _SIZE, convert / small.size, sort / _SIZE,
    )  # fmt: skip


def _time(work: Callable[[], object]) -> float:
    """The least of a few runs: what the machine can do when it does nothing else."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
