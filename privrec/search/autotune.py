"""Settings of a sparse output layer that are found by measuring, and told.

Every kind of index is built over the layer (or, before there is one, over an invented layer of its
width), timed, counted, and asked for what exact scores would choose. Of those that fit the memory
and find nearly as much as the best, the cheapest in the long run is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.embedding.table import PlainTable
from privrec.errors import UsageError
from privrec.randomness import SecretRoot, SecureStream, rng_for
from privrec.search.families import FAMILIES, Shape
from privrec.search.index import KINDS, Index, Kind, Rebuild, build
from privrec.search.memory import RANK, ItemMemory
from privrec.search.select import SIGNATURE
from privrec.search.tables import Items

FloatArray = NDArray[np.float32]

NEARLY = 0.03
"""Recall below the best at which an index still counts as equally good."""
_LARGEST = 1 << 16  # neurons of an invented layer; costs beyond are in proportion
_TABLES = (4, 16)
_SPARE = 10  # steps' selections that a rebuild may cost as much as, spread over its age
_FEWEST, _MOST = 20, 2000  # steps between rebuilds
_BEST = 10
_OPEN = 16  # queries of an invented batch


@dataclass(frozen=True)
class Trial:
    """One index, measured.

    Args:
        kind: which.
        shape: of its tables; None where it has none.
        recall: share of each query's exact best ten among what it chose for the batch.
        build_s: seconds to build it over the whole layer.
        select_s: seconds to choose for one batch.
        nbytes: bytes that it keeps.
        fits: whether the memory has room for it.
    """

    kind: Kind
    shape: Shape | None
    recall: float
    build_s: float
    select_s: float
    nbytes: int
    fits: bool

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" {self.shape.bits} bits, {self.shape.tables} tables"
        room = "" if self.fits else ", too large"
        return (
            f"{self.kind}{shape}: recall {self.recall:.2f}, {1e3 * self.select_s:.1f} ms a batch, "
            f"{self.build_s:.2f} s to build, {self.nbytes / 2**20:.1f} MiB{room}"
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen, and everything that was measured.

    Args:
        trial: the index; None where nothing fits, or all neurons are active: uniform then.
        rebuild: when it is made anew.
        share: active neurons of a batch over the layer's.
        trials: all that were measured.
    """

    trial: Trial | None
    rebuild: Rebuild
    share: float
    trials: tuple[Trial, ...]

    def settings(self) -> dict[str, Any]:
        """Arguments of :class:`privrec.models.sparse_output.SparseOutput`."""
        common = {"share": self.share, "rebuild": self.rebuild}
        if self.trial is None:
            return {**common, "selector": "uniform"}
        return {**common, "selector": self.trial.kind, "shape": self.trial.shape}

    def __str__(self) -> str:
        if self.trial is None:
            return f"chosen: uniform, {100 * self.share:g} % active; no index is needed or fits"
        return (
            f"chosen: {self.trial}; {100 * self.share:g} % active; rebuilt every "
            f"{self.rebuild.every} steps, or when {100 * (self.rebuild.changed or 0):g} % of the "
            "codes have changed"
        )


def autotune(
    sparsity: float,
    n: int,
    memory: int | None = None,
    *,
    dim: int = 128,
    layer: ItemMemory | None = None,
    queries: FloatArray | None = None,
    root: SecretRoot | None = None,
) -> Choice:
    """Family, bits, tables and schedule for a layer, by measuring on this machine.

    Args:
        sparsity: share of neurons that are not active in a batch, in [0, 1): 0.99 leaves 1 %.
        n: neurons of the layer.
        memory: bytes that the index may keep; None, any.
        dim: length of the hidden vector, where no layer is given.
        layer: the layer itself, once it has learned something; by default an invented one, with
            neurons around a few hundred centres.
        queries: a batch of hidden vectors for it, shape ``(q, layer.dim)``, with a last 1 where it
            has biases; by default rows of the layer.
        root: of hash functions; by default a known one, which makes trials repeat.

    Raises:
        UsageError: when a value is out of its range.
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
        return Choice(None, Rebuild(), share, ())
    layer = layer or _invented(min(n, _LARGEST), dim)
    scale = n / layer.items
    if queries is None:
        queries = layer.rows(np.linspace(0, layer.items - 1, _OPEN).astype(np.int64))
    budget = max(1, round(share * layer.items / 2))
    stream = (root or SecretRoot.known(b"autotune")).stream("trials")
    best, found = _best(layer, queries), []
    for kind, shape in _open(budget, layer.items, len(queries)):
        # What cannot fit is not even built.
        if memory is not None and _least_bytes(kind, shape, n) > memory:
            continue
        trial = _tried(kind, shape, layer, queries, budget, best, stream, scale)
        fits = memory is None or trial.nbytes <= memory
        found.append(Trial(**{**trial.__dict__, "fits": fits}))
    usable = [trial for trial in found if trial.fits]
    if not usable:
        return Choice(None, Rebuild(), share, tuple(found))
    enough = max(trial.recall for trial in usable) - NEARLY
    chosen = min((t for t in usable if t.recall >= enough), key=_cost)
    return Choice(chosen, Rebuild(every=_every(chosen)), share, tuple(found))


def _every(trial: Trial) -> int:
    """Steps after which building has cost no more than a tenth of selecting, within limits."""
    wanted = math.ceil(_SPARE * trial.build_s / max(trial.select_s, 1e-9))
    return min(_MOST, max(_FEWEST, wanted))


def _cost(trial: Trial) -> float:
    """Seconds a batch, building included."""
    return trial.select_s + trial.build_s / _every(trial)


def _open(budget: int, items: int, queries: int) -> Iterator[tuple[Kind, Shape | None]]:
    for kind in KINDS:
        if kind not in FAMILIES:
            yield kind, None
            continue
        for tables in _TABLES:
            # All queries' buckets of all tables together should hold about the budget.
            load = max(1.0, budget / (tables * queries) * 2)
            bits = min(16, max(2, round(math.log2(max(2.0, items / load)))))
            yield kind, Shape(bits + bits % 2, tables)


def _least_bytes(kind: Kind, shape: Shape | None, n: int) -> int:
    each = {"hamming": SIGNATURE // 8, "sketch": RANK, "cells": 8}.get(kind)
    return n * (each if each is not None else 8 * (shape.tables if shape else 1))


def _tried(
    kind: Kind, shape: Shape | None, layer: ItemMemory, queries: FloatArray, budget: int,
    best: Items, stream: SecureStream, scale: float,
) -> Trial:  # fmt: skip
    started = time.perf_counter()
    index = build(kind, layer, shape or Shape(1), stream)
    built = time.perf_counter()
    chosen = index.batch(queries, budget)
    selected = time.perf_counter()
    return Trial(
        kind, shape, float(np.isin(best, chosen).mean()), scale * (built - started),
        scale * (selected - built), _bytes(index, scale), True,
    )  # fmt: skip


def _bytes(index: Index, scale: float) -> int:
    return round(scale * index.nbytes)


def _best(layer: ItemMemory, queries: FloatArray) -> Items:
    """Each query's best neurons by exact score."""
    scores = np.concatenate([rows @ queries.T for _, rows in layer.chunks()])
    count = min(_BEST, len(scores))
    best: Items = np.argpartition(-scores, count - 1, axis=0)[:count].ravel()
    return best


def _invented(n: int, dim: int) -> ItemMemory:
    rng = rng_for(0, "autotune")
    centres = rng.standard_normal((256, dim), np.float32)
    rows = centres[rng.integers(0, len(centres), n)]
    rows += 0.7 * rng.standard_normal((n, dim), np.float32)
    return ItemMemory(PlainTable.of(n, dim, block=dim), rows)
