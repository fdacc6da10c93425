"""One interface to every way of choosing items for a device, with what it cost.

All run on the device, over the compressed memory that it holds anyway, and nothing of what they
choose leaves it. ``scan`` is exact: the others are measured against it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.search.costs import Costs, Demand, Ranking, choose
from privrec.search.families import Shape, own_shape, signature
from privrec.search.memory import ItemMemory, Sketch
from privrec.search.tables import Items, estimates, serial, serial_bytes

FloatArray = NDArray[np.float32]
Selector = Literal[
    "pghash", "pghash_d", "simhash", "block_sign", "hamming", "sketch", "scan", "uniform", "auto"
]
TABLES: tuple[Literal["pghash", "pghash_d", "simhash", "block_sign"], ...] = (
    "pghash",
    "pghash_d",
    "simhash",
    "block_sign",
)

SIGNATURE = 256
"""Bits of a signature that is ranked."""

FOLD = 32
"""Length to which ``pghash`` folds a vector, where a caller names no other."""

GOOD = 0.97
"""Recall from which ``auto`` takes the sketch for as good as a scan."""

PUSHED = 2
"""Most queries for which numbers are gathered instead of blocks."""


@dataclass(frozen=True)
class Search:
    """What a device searches.

    Args:
        items: the catalogue in its memory.
        sketch: the server's, for ``sketch``.
        shape: functions of the tables; None, the device chooses for itself.
        fold: ``pghash``: length of a folded vector.
        room: bytes that the device can spare beside the memory, for ``auto``; None, any.
        costs: this machine's measured costs, for ``auto``.
    """

    items: ItemMemory
    sketch: Sketch | None = None
    shape: Shape | None = None
    fold: int = FOLD
    room: int | None = None
    costs: Costs | None = None


@dataclass(frozen=True)
class Evidence:
    """What a selection cost, and how good it was where that was asked.

    Args:
        selector: who chose; for ``auto``, the one that it picked.
        count: items chosen.
        seconds: wall time.
        bytes: room taken beside the memory, by count of what is held at a time.
        tables: tables that were built; 0 for a selector without.
        recall: share of the exact best ``asked`` items that were chosen; None where not asked.
        asked: how many that were.
    """

    selector: str
    count: int
    seconds: float
    bytes: int
    tables: int = 0
    recall: float | None = None
    asked: int = 0


@dataclass(frozen=True)
class Selection:
    """Chosen items, ascending and without repeats, and the evidence."""

    items: Items
    evidence: Evidence


def select(
    selector: Selector,
    search: Search,
    queries: FloatArray,
    budget: int,
    stream: SecureStream,
    *,
    exclude: Items | None = None,
    recall_of: int = 0,
) -> Selection:
    """Choose up to ``budget`` items that score high for some of the queries.

    Between queries, scores are compared as those of centred items: what all items have in common
    with a query speaks for none of them.

    Args:
        selector: how: tables (``pghash``, ``pghash_d``, ``simhash``, ``block_sign``), 256-bit
            signatures (``hamming``), the server's ``sketch``, exact scores (``scan``), chance
            (``uniform``), or ``auto``: the cheapest of the good ones that fits.
        search: the catalogue.
        queries: shape ``(q, items.dim)``, ``q`` at least 1; with biases, each ends in a 1.
        budget: at least 1; a table selector may find fewer.
        stream: the device's own secret stream.
        exclude: items never to be chosen, such as the history.
        recall_of: how many of the exact best items to measure recall on, which costs a scan; 0 for
            none.

    Raises:
        UsageError: when the budget is below 1, queries have another length than rows, or
            ``sketch`` is asked for without one.
    """
    _check(selector, search, queries, budget)
    without = np.zeros(0, np.int64) if exclude is None else np.unique(exclude)
    if selector == "auto":
        selector = _cheapest(search, len(queries), budget)
    started = time.perf_counter()
    found, used, tables = _run(selector, search, queries, budget, stream, without)
    seconds, recall = time.perf_counter() - started, None
    if recall_of:
        best = _top(_most(_scores(search.items, queries)), recall_of, without)
        recall = float(np.isin(best, found).mean())
    evidence = Evidence(selector, len(found), seconds, used, tables, recall, recall_of)
    return Selection(found, evidence)


def best(search: Search, query: FloatArray, k: int, exclude: Items) -> tuple[Items, FloatArray]:
    """The ``k`` items of the highest exact scores, the best first, and their scores.

    Args:
        search: the catalogue.
        query: shape ``(dim,)``.
        k: how many, at least 1.
        exclude: items to leave out.
    """
    # Gathered numbers and gathered blocks round differently: blocks decide between close ones.
    close = _top(_most(_scores(search.items, query[None])), 2 * k + 16, np.unique(exclude))
    return ranked(search.items, query, close, k)


def ranked(
    items: ItemMemory, query: FloatArray, candidates: Items, k: int
) -> tuple[Items, FloatArray]:
    """The best ``k`` of some candidates by exact score, and their scores."""
    scores = items.rows(candidates) @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return candidates[order], scores[order]


def outside(excluded: Items, places: Items) -> Items:
    """The items at given places of the catalogue less some of its items.

    Args:
        excluded: ascending, without repeats.
        places: in ``[0, n - len(excluded))``, of any shape.
    """
    gaps = excluded - np.arange(len(excluded))
    return places + np.searchsorted(gaps, places, side="right")


def mix(
    selected: Items, positives: Items, places: Items, catalogue: int
) -> tuple[Items, FloatArray]:
    """Selected items and a uniform sample of the others, with the logarithms of their weights.

    A selected item stands for itself. One of the ``B - H`` uniform draws stands for its share of
    the ``n - P - H`` items that are neither positive nor selected.

    Args:
        selected: ``H`` items, ascending, none of them positive.
        positives: ``P`` items, ascending.
        places: ``B - H`` uniform draws from ``[0, n - P - H)``.
        catalogue: ``n``.

    Returns:
        ``B`` items and ``B`` log weights.
    """
    taken = np.union1d(selected, positives)
    drawn = outside(taken, places)
    weights = np.zeros(len(selected) + len(drawn), np.float32)
    weights[len(selected) :] = np.log(max(1, catalogue - len(taken)) / max(1, len(drawn)))
    return np.concatenate((selected, drawn)), weights


def _check(selector: str, search: Search, queries: FloatArray, budget: int) -> None:
    if budget < 1:
        raise UsageError(f"budget = {budget}: must be at least 1; ask for one item or more")
    if queries.ndim != 2 or queries.shape[1] != search.items.dim or not len(queries):
        raise UsageError(
            f"queries of shape {queries.shape}: rows have {search.items.dim} numbers; "
            "hand over one row a query, with a last 1 where items have biases"
        )
    if selector == "sketch" and search.sketch is None:
        raise UsageError('selector = "sketch": there is none; make one with Sketch.of')


def _cheapest(search: Search, queries: int, budget: int) -> Selector:
    sketch = search.sketch
    if sketch is not None and sketch.recall < GOOD:
        sketch = None
    demand = _demand(search.items, sketch, queries, budget)
    return choose(demand, search.costs or Costs.here(), search.room)


def _demand(items: ItemMemory, sketch: Sketch | None, queries: int, budget: int) -> Demand:
    rank = 0 if sketch is None else sketch.codes.shape[1]
    return Demand(
        items.items, items.dim, items.table.parts, queries, budget, rank, items.pass_bytes
    )


def _run(
    selector: Selector, search: Search, queries: FloatArray, budget: int, stream: SecureStream,
    without: Items,
) -> tuple[Items, int, int]:  # fmt: skip
    """Chosen items, bytes held, and tables built."""
    items = search.items
    if selector in TABLES:
        return _from_tables(selector, search, queries, budget, stream, without)
    if selector == "uniform":
        left = items.items - len(without)
        return uniform(left, budget, stream, without), 16 * budget, 0
    ranking: Ranking = "scan"
    if selector == "hamming":
        likely = estimates(items, queries, signature(items.dim, SIGNATURE, stream))
        ranking = "hamming"
    elif selector == "sketch" and search.sketch is not None:
        likely = _most(search.sketch.values(queries))
        ranking = "sketch"
    else:
        likely = _most(_scores(items, queries))
    held = Costs.bytes(ranking, _demand(items, search.sketch, len(queries), budget))
    return _top(likely, budget, without), held, 0


def _from_tables(
    selector: Selector, search: Search, queries: FloatArray, budget: int, stream: SecureStream,
    without: Items,
) -> tuple[Items, int, int]:  # fmt: skip
    items, base = search.items, Shape(8, 1, search.fold, search.items.table.block)
    shape = search.shape or own_shape(items.items, budget, stream, base)
    if selector == "pghash_d" and shape.bits % 2:
        shape = replace(shape, bits=shape.bits + 1)
    found: list[Items] = []
    size = tables = 0
    for new in serial(items, queries, selector, shape, stream):  # type: ignore[arg-type]
        tables += 1
        fresh = np.setdiff1d(new, without, assume_unique=True)
        if size + len(fresh) > budget:
            # The last table gives what is wanting, evenly over the catalogue.
            fresh = fresh[np.linspace(0, len(fresh) - 1, budget - size).astype(np.int64)]
        found.append(fresh)
        size += len(fresh)
        if size == budget:
            break
    return np.sort(np.concatenate(found)), serial_bytes(items, shape), tables


def _scores(items: ItemMemory, queries: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """Exact scores of centred items by chunks, ``(m, q)``."""
    table, centre = items.table, queries @ items.centre
    if len(queries) <= PUSHED and 2 * table.slots <= table.items * table.parts:
        together = zip(*(items.products(query) for query in queries), strict=True)
        for parts in together:
            yield parts[0][0], np.stack([values for _, values in parts], axis=1) - centre
        return
    for start, rows in items.chunks():
        yield start, rows @ queries.T - centre


def _most(scores: Iterator[tuple[int, FloatArray]]) -> FloatArray:
    """Highest score of each item for any query, shape ``(n,)``."""
    return np.concatenate([part.max(axis=1) for _, part in scores])


def _top(values: FloatArray, budget: int, without: Items) -> Items:
    """Items of the highest values, ascending; ``values`` loses what is excluded."""
    values[without] = -np.inf
    budget = min(budget, len(values) - len(without))
    if budget == 0:
        return np.zeros(0, np.int64)
    return np.sort(np.argpartition(values, len(values) - budget)[len(values) - budget :])


def uniform(left: int, budget: int, stream: SecureStream, without: Items) -> Items:
    """Distinct items, ascending, uniform over those that are not excluded.

    Args:
        left: how many items are not excluded.
        budget: how many to draw; all that are left where they are fewer.
        stream: the drawer's own.
        without: excluded items, ascending, without repeats.
    """
    budget = min(budget, left)
    if 2 * budget > left:
        return outside(without, np.sort(np.argsort(stream.uint64(left))[:budget]))
    places = np.zeros(0, np.int64)
    while len(places) < budget:
        more = (stream.uint64(2 * budget) % np.uint64(left)).astype(np.int64)
        # In order of their draw, so that being distinct favours no item.
        together = np.concatenate((places, more))
        _, first = np.unique(together, return_index=True)
        places = together[np.sort(first)][:budget]
    return outside(without, np.sort(places))
