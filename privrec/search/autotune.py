"""Settings of a sparse output layer that are found by measuring.

Every kind of index is built over the layer, or an invented one, timed, counted, and asked for what
exact scores would choose. Of those that fit and find nearly as much as the best, the cheapest in
the long run is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from privrec.embedding.table import PlainTable
from privrec.errors import UsageError
from privrec.randomness import SecretRoot, rng_for
from privrec.search.hashing import FAMILIES, Shape
from privrec.search.index import INDEXES, RANK, SIGNATURE, Rebuild
from privrec.search.memory import FloatArray, ItemMemory, evenly

NEARLY = 0.03
"""Recall below the best at which an index still counts as equally good."""
_LARGEST = 1 << 16  # neurons of an invented layer; costs beyond are in proportion
_TABLES = (4, 16)
_SPARE = 10  # steps' selections that a rebuild may cost as much as, spread over its age
_FEWEST, _MOST = 20, 2000  # steps between rebuilds
_BEST = 10
_OPEN = 16  # queries of an invented batch
_BYTES_EACH = {"hamming": SIGNATURE // 8, "sketch": RANK, "cells": 8}  # a neuron, at least


@dataclass(frozen=True)
class Trial:
    """One index, measured: seconds to build it over the layer and to choose for one batch.

    ``recall`` is the share of each query's exact best ten among what it chose for the batch.
    """

    kind: str
    shape: Shape | None
    recall: float
    build_s: float
    select_s: float
    nbytes: int
    fits: bool

    @property
    def every(self) -> int:
        """Steps after which building has cost no more than a tenth of selecting, within limits."""
        wanted = math.ceil(_SPARE * self.build_s / max(self.select_s, 1e-9))
        return min(_MOST, max(_FEWEST, wanted))

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" {self.shape.bits} bits, {self.shape.tables} tables"
        room = "" if self.fits else ", too large"
        return (
            f"{self.kind}{shape}: recall {self.recall:.2f}, {1e3 * self.select_s:.1f} ms a batch, "
            f"{self.build_s:.2f} s to build, {self.nbytes / 2**20:.1f} MiB{room}"
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen: an index, or uniform neurons where nothing fits or all are active."""

    trial: Trial | None
    share: float
    trials: tuple[Trial, ...]

    def settings(self) -> dict[str, Any]:
        """Return the arguments of :class:`privrec.models.sparse_output.SparseOutput`."""
        if self.trial is None:
            return {"share": self.share, "selector": "uniform"}
        kept = {"share": self.share, "rebuild": Rebuild(every=self.trial.every)}
        return kept | {"selector": self.trial.kind, "shape": self.trial.shape}

    def __str__(self) -> str:
        active = f"{100 * self.share:g} % active"
        if self.trial is None:
            return f"chosen: uniform, {active}; no index is needed or fits"
        return (
            f"chosen: {self.trial}; {active}; rebuilt every {self.trial.every} steps, or when "
            f"{100 * (Rebuild().changed or 0):g} % of the codes have changed"
        )


def autotune(
    sparsity: float,
    n: int,
    memory: int | None = None,
    *,
    dim: int = 128,
    layer: ItemMemory | None = None,
    queries: FloatArray | None = None,
) -> Choice:
    """Find family, bits, tables and schedule for a layer of ``n`` neurons, by measuring here.

    Args:
        sparsity: share of neurons that are not active in a batch, in [0, 1): 0.99 leaves 1 %.
        memory: bytes that the index may keep; None, any.
        dim: length of the hidden vector, where no layer is given.
        layer: the layer itself, once it has learned something; by default an invented one, with
            neurons around a few hundred centres.
        queries: hidden vectors, shape ``(q, layer.dim)``, with a last 1 where the layer has biases;
            by default rows of the layer.
    """
    if not 0 <= sparsity < 1 or n < 1:
        raise UsageError(
            f"sparsity = {sparsity}, n = {n}: sparsity must lie in 0 to below 1 and n be at least "
            "1; change them"
        )
    if layer is not None and layer.items != n:
        raise UsageError(f"n = {n}: the layer has {layer.items} neurons; say as many")
    share = 1 - sparsity
    if share == 1:
        return Choice(None, share, ())
    layer = layer or _invented(min(n, _LARGEST), dim)
    if queries is None:
        queries = layer.rows(evenly(layer.items, _OPEN))
    scores = np.concatenate([rows @ queries.T for _, rows in layer.chunks()])
    count = min(_BEST, len(scores))
    best = np.argpartition(-scores, count - 1, axis=0)[:count].ravel()
    stream = SecretRoot.known(b"autotune").stream("trials")  # known, so that trials repeat
    budget, scale, found = max(1, round(share * layer.items / 2)), n / layer.items, []
    for kind, shape in _open(budget, layer.items, len(queries)):
        each = _BYTES_EACH.get(kind) or 8 * (shape.tables if shape else 1)
        if memory is not None and n * each > memory:
            continue  # what cannot fit is not even built
        started = time.perf_counter()
        index = INDEXES[kind](layer, shape or Shape(1), stream)
        built = time.perf_counter()
        chosen = index.batch(queries, budget)
        selected = time.perf_counter()
        recall, kept = float(np.isin(best, chosen).mean()), round(scale * index.nbytes)
        times = scale * (built - started), scale * (selected - built)
        found.append(Trial(kind, shape, recall, *times, kept, memory is None or kept <= memory))
    usable = [trial for trial in found if trial.fits]
    if not usable:
        return Choice(None, share, tuple(found))
    enough = max(trial.recall for trial in usable) - NEARLY
    good = [trial for trial in usable if trial.recall >= enough]
    # The cheapest a batch, building included.
    taken = min(good, key=lambda trial: trial.select_s + trial.build_s / trial.every)
    return Choice(taken, share, tuple(found))


def _open(budget: int, items: int, queries: int) -> Iterator[tuple[str, Shape | None]]:
    for kind in INDEXES:
        if kind not in FAMILIES:
            yield kind, None
            continue
        for tables in _TABLES:
            # All queries' buckets of all tables together should hold about the budget.
            load = max(1.0, budget / (tables * queries) * 2)
            bits = min(16, max(2, round(math.log2(max(2.0, items / load)))))
            yield kind, Shape(bits + bits % 2, tables)


def _invented(n: int, dim: int) -> ItemMemory:
    rng = rng_for(0, "autotune")
    centres = rng.standard_normal((256, dim), np.float32)
    rows = centres[rng.integers(0, len(centres), n)]
    rows += 0.7 * rng.standard_normal((n, dim), np.float32)
    return ItemMemory(PlainTable.of(n, dim, block=dim), rows)
