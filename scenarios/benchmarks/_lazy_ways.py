"""Ways to update an embedding table under DP-SGD, each as its authors do it, on one shared table.

A way gets the rows of a batch and the clipped gradients of its pooled outputs. What it takes is CPU
time from there to the updated table, with whatever it has to draw before the next batch is read.
All ways but ours draw from PyTorch's ordinary generator, which is not secure, and is favoured so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privrec.privacy.lazy import LazyMemory

LR, SIGMA, CLIP, BATCH = 0.1, 1.0, 1.0, 2048
STD = SIGMA * CLIP / BATCH
_BLOCK = 1 << 16


@dataclass
class Batch:
    """Rows of each bag, flat, the bag of each, and the clipped gradient of each bag's output."""

    rows: Tensor
    bags: Tensor
    gradients: Tensor

    def values(self, scale: float = 1.0) -> Tensor:
        return (self.gradients * scale).index_select(0, self.bags)


Way = Callable[[Batch, Batch], None]


class SparseSGD:
    """No privacy: ``torch.optim.SGD`` on the sparse gradient of ``EmbeddingBag(sparse=True)``."""

    def __init__(self, table: Tensor) -> None:
        self.weight = torch.nn.Parameter(table)
        self.optimizer = torch.optim.SGD([self.weight], lr=LR)

    def __call__(self, batch: Batch, upcoming: Batch) -> None:
        self.weight.grad = torch.sparse_coo_tensor(
            batch.rows[None], batch.values(1 / BATCH), self.weight.shape, check_invariants=False
        )
        self.optimizer.step()


class AsOpacus:
    """``DPOptimizer``: a dense sum, dense noise, their sum, a division, and a dense step."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, batch: Batch, upcoming: Batch) -> None:
        summed = torch.zeros_like(self.table)
        summed.index_add_(0, batch.rows, batch.values())
        noise = torch.normal(0.0, SIGMA * CLIP, self.table.shape)
        gradient = summed + noise
        gradient /= BATCH
        self.table.add_(gradient, alpha=-LR)


class LazyDPBaseline:
    """LazyDP's baseline: a sparse gradient step, and dense noise into the table."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.sgd = table, SparseSGD(table)

    def __call__(self, batch: Batch, upcoming: Batch) -> None:
        self.sgd(batch, upcoming)
        self.table.add_(torch.normal(0.0, STD, self.table.shape), alpha=-LR)


class Blocked:
    """The same without a dense copy: noise is drawn block by block in the cache."""

    def __init__(self, table: Tensor) -> None:
        self.flat, self.sgd = table.view(-1), SparseSGD(table)
        self.buffer = torch.empty(_BLOCK)

    def __call__(self, batch: Batch, upcoming: Batch) -> None:
        self.sgd(batch, upcoming)
        for start in range(0, len(self.flat), _BLOCK):
            part = self.flat[start : start + _BLOCK]
            part.add_(self.buffer[: len(part)].normal_(0.0, STD), alpha=-LR)


class LazyDP:
    """LazyDP itself: a history of counts, and summed noise for the rows of the next batch."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.sgd, self.step = table, SparseSGD(table), 0
        self.history = torch.zeros(len(table), dtype=torch.int32)

    def __call__(self, batch: Batch, upcoming: Batch) -> None:
        self.sgd(batch, upcoming)
        self.step += 1
        rows = torch.unique(upcoming.rows)
        delays = self.step - self.history.index_select(0, rows)
        self.history.index_fill_(0, rows, self.step)
        noise = torch.empty(len(rows), self.table.shape[1]).normal_(0.0, STD)
        noise.mul_(delays.sqrt()[:, None])
        held = self.table.index_select(0, rows)
        self.table.index_copy_(0, rows, held.add_(noise, alpha=-LR))


class Ours:
    """Settle on read, by this package; noise from the secure generator."""

    def __init__(self, table: Tensor) -> None:
        self.memory = LazyMemory(table.numpy())
        self.scaled = torch.empty(BATCH, table.shape[1])

    def __call__(self, batch: Batch, upcoming: Batch) -> None:
        rows = batch.rows.numpy()
        self.memory.settle(rows)
        torch.mul(batch.gradients, -LR / BATCH, out=self.scaled)
        which = batch.bags.numpy()
        self.memory.step(rows, self.scaled.numpy(), (LR * STD) ** 2, which=which)


PRIVATE = {
    "as Opacus": AsOpacus,
    "LazyDP's baseline": LazyDPBaseline,
    "cache-blocked eager": Blocked,
    "LazyDP's algorithm": LazyDP,
    "settle on read": Ours,
}


def batches(
    rows: int, lookups: int, width: int, count: int, *, zipf: bool = False, seed: int = 0
) -> list[Batch]:
    """Seeded batches of ``BATCH`` bags; Zipf's law has exponent 1 over shuffled rows."""
    rng = np.random.default_rng(seed)
    bags = torch.arange(BATCH).repeat_interleave(lookups)
    made = []
    for _ in range(count):
        if zipf:
            places = np.exp(rng.random(BATCH * lookups) * np.log(rows)).astype(np.int64) - 1
            drawn = places * 2_654_435_761 % rows  # scattered, as hashed categories are
        else:
            drawn = rng.integers(0, rows, BATCH * lookups)
        gradients = torch.from_numpy(rng.standard_normal((BATCH, width), dtype=np.float32))
        made.append(Batch(torch.from_numpy(drawn), bags, gradients))
    return made


def medians(
    ways: dict[str, Way], data: Sequence[Batch], rounds: dict[str, int]
) -> dict[str, float]:
    """CPU milliseconds a step, the ways taking turns so that each meets the same machine."""
    for way in ways.values():
        way(data[0], data[1])
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(max(rounds.values())):
        for name, way in ways.items():
            if turn < rounds[name]:
                one, two = data[turn % len(data)], data[(turn + 1) % len(data)]
                start = time.process_time()
                way(one, two)
                spent[name].append((time.process_time() - start) * 1000)
    return {name: float(np.median(times)) for name, times in spent.items()}
