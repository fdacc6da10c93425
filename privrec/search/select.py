"""One interface to every way of choosing items for a device, with what it cost.

All run on the device, over the compressed memory that it holds anyway, and nothing of what they
choose leaves it. ``scan`` is exact: the others are measured against it. A way of choosing is a
:class:`SelectorKind` in :data:`SELECTORS`.

The neurons of a wide output layer that take part in a batch are an :class:`ActiveSet`: its labels,
always; then what a selector found; then as many others by chance as an exact budget has room for.
The set is one for the whole batch: what is counted is the union, not one example's share of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.scenario import kinds
from privrec.search.hashing import (
    FAMILIES,
    ROOM,
    Family,
    Shape,
    own_shape,
    serial,
    serial_bytes,
    signature,
)
from privrec.search.index import SIGNATURE, Sketch, estimates
from privrec.search.memory import CHUNK, FloatArray, ItemMemory, Items, evenly, outside, uniform

FOLD = 32  # length to which ``pghash`` folds a vector, where a caller names no other
_GOOD = 0.97  # recall from which ``auto`` takes the sketch for as good as a scan
_PUSHED = 2  # most queries for which numbers are gathered instead of blocks

# Nanoseconds a unit of work on the machine that the documented timings are from. Only ratios decide
# what `auto` picks, and they are fixed so that a resumed or repeated run picks the same.
_PLACE, _COPY, _PICK = 7.0, 0.17, 5.1  # hash a part to its slot; gather a block's float; a number
_PRODUCT, _THIN = 0.020, 0.032  # multiply and add, in a wide matrix product; with one vector
_SIGN, _WORD = 0.21, 0.57  # turn a projection into a bit; compare 64 bits
_CONVERT, _SORT = 0.10, 7.1  # turn 8 bits into a float; sort a number partially


@dataclass(frozen=True)
class Search:
    """What a device searches.

    Attributes:
        sketch: the server's, for ``sketch``.
        shape: functions of the tables; None, the device chooses for itself.
        fold: ``pghash``: length of a folded vector.
        room: bytes that the device can spare beside the memory, for ``auto``; None, any.
    """

    items: ItemMemory
    sketch: Sketch | None = None
    shape: Shape | None = None
    fold: int = FOLD
    room: int | None = None


@dataclass(frozen=True)
class Selection:
    """Chosen items, what they cost, and how good they are where that was asked.

    Attributes:
        items: ascending and without repeats.
        selector: who chose; for ``auto``, the one that it picked.
        seconds: wall time.
        bytes: room taken beside the memory, by count of what is held at a time.
        tables: tables that were built; 0 for a selector without.
        recall: share of the exact best items that were chosen; None where not asked.
    """

    items: Items
    selector: str
    seconds: float
    bytes: int
    tables: int
    recall: float | None


@dataclass(frozen=True)
class Request:
    """A selection that is asked for; ``without`` is ascending and without repeats."""

    search: Search
    queries: FloatArray
    budget: int
    stream: SecureStream
    without: Items


class SelectorKind(Protocol):
    """A way of choosing items."""

    def choose(self, request: Request) -> tuple[Items, int, int]:
        """Return chosen items, ascending, bytes held at a time, and tables built."""
        ...


class Ranking(SelectorKind, Protocol):
    """A way of choosing the items of the highest estimates, whose cost can be told beforehand."""

    def choose(self, request: Request) -> tuple[Items, int, int]:
        found = top(self.values(request), request.budget, request.without)
        return found, self.bytes(request.search, len(request.queries)), 0

    def values(self, request: Request) -> FloatArray:
        """Return each item's value for the query that likes it best, shape ``(n,)``."""
        ...

    def seconds(self, search: Search, queries: int) -> float:
        """Predict the time of a selection, up to a factor of the machine."""
        ...

    def bytes(self, search: Search, queries: int) -> int:
        """Count the room of a selection beside the memory."""
        ...


class Scan(Ranking):
    """Exact scores from the memory."""

    def values(self, request: Request) -> FloatArray:
        return _most(_scores(request.search.items, request.queries))

    def seconds(self, search: Search, queries: int) -> float:
        items = search.items
        scored = items.dim * (_THIN if queries == 1 else queries * _PRODUCT)
        each = _pass(items) + scored
        if queries <= _PUSHED:
            each = min(each, items.table.parts * queries * (_PLACE + _PICK))
        return items.items * (_SORT + each)

    def bytes(self, search: Search, queries: int) -> int:
        return search.items.pass_bytes + _kept(search.items, queries)


class Hamming(Ranking):
    """Signatures of 256 bits, made, compared and forgotten chunk by chunk."""

    def values(self, request: Request) -> FloatArray:
        items = request.search.items
        hashed = signature(items.dim, SIGNATURE, request.stream)
        return estimates(items, request.queries, hashed)

    def seconds(self, search: Search, queries: int) -> float:
        dim, words = search.items.dim, SIGNATURE // 64
        signed = SIGNATURE * (dim * _PRODUCT + _SIGN) + dim * _THIN + words * queries * _WORD
        return search.items.items * (_SORT + _pass(search.items) + signed)

    def bytes(self, search: Search, queries: int) -> int:
        items = search.items
        some = SIGNATURE // 4 * min(CHUNK, items.items)
        return items.pass_bytes + 12 * items.items + 4 * items.dim * SIGNATURE + 5 * ROOM + some


class Sketched(Ranking):
    """The server's sketch of its public table; its own bytes are counted."""

    def values(self, request: Request) -> FloatArray:
        if request.search.sketch is None:
            raise UsageError('selector = "sketch": there is none; make one with Sketch.of')
        return _most(request.search.sketch.values(request.queries))

    def seconds(self, search: Search, queries: int) -> float:
        scored = _CONVERT + (_THIN if queries == 1 else queries * _PRODUCT)
        return search.items.items * (_SORT + _rank(search) * scored)

    def bytes(self, search: Search, queries: int) -> int:
        items = search.items
        some = min(CHUNK, items.items)
        return _kept(items, queries) + (items.items + 4 * some) * _rank(search)


@dataclass(frozen=True)
class SerialTables:
    """Hash tables of one family, one after another, until the budget is filled."""

    family: Family

    def choose(self, request: Request) -> tuple[Items, int, int]:
        search, items, budget = request.search, request.search.items, request.budget
        base = Shape(8, 1, search.fold, items.table.block)
        shape = search.shape or own_shape(items.items, budget, request.stream, base)
        found: list[Items] = []
        size = 0
        for new in serial(items, request.queries, self.family, shape, request.stream):
            fresh = np.setdiff1d(new, request.without, assume_unique=True)
            if size + len(fresh) > budget:
                # The last table gives what is wanting, evenly over the catalogue.
                fresh = fresh[evenly(len(fresh), budget - size)]
            found.append(fresh)
            size += len(fresh)
            if size == budget:
                break
        return np.sort(np.concatenate(found)), serial_bytes(items, shape), len(found)


class Uniform:
    """Chance."""

    def choose(self, request: Request) -> tuple[Items, int, int]:
        left = request.search.items.items - len(request.without)
        found = uniform(left, request.budget, request.stream, request.without)
        return found, 16 * request.budget, 0


RANKINGS: dict[str, Ranking] = {"scan": Scan(), "hamming": Hamming(), "sketch": Sketched()}
SELECTORS: dict[str, SelectorKind] = {
    **RANKINGS,
    **{family: SerialTables(family) for family in FAMILIES},
    "uniform": Uniform(),
}
"""Ways of choosing by name; ``auto`` is the cheapest good one of :data:`RANKINGS` that fits.

Others are found in the kinds that a scenario knows.
"""


def select(
    selector: str,
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
        selector: one of :data:`SELECTORS`, or ``auto``.
        queries: shape ``(q, items.dim)``, ``q`` at least 1; with biases, each ends in a 1.
        budget: at least 1; a table selector may find fewer.
        stream: the device's own secret stream.
        exclude: items never to be chosen, such as the history.
        recall_of: how many of the exact best items to measure recall on, which costs a scan.

    Raises:
        UsageError: when the budget is below 1, queries have another length than rows, or
            ``sketch`` is asked for without one.
    """
    if budget < 1:
        raise UsageError(f"budget = {budget}: must be at least 1; ask for one item or more")
    if queries.ndim != 2 or queries.shape[1] != search.items.dim or not len(queries):
        raise UsageError(
            f"queries of shape {queries.shape}: rows have {search.items.dim} numbers; "
            "hand over one row a query, with a last 1 where items have biases"
        )
    without = np.zeros(0, np.int64) if exclude is None else np.unique(exclude)
    if selector == "auto":
        selector = cheapest(search, len(queries))
    started = time.perf_counter()
    request = Request(search, queries, budget, stream, without)
    kind = SELECTORS.get(selector) or kinds.SELECTORS[selector].load()
    found, used, tables = kind.choose(request)
    seconds, recall = time.perf_counter() - started, None
    if recall_of:
        right = top(_most(_scores(search.items, queries)), recall_of, without)
        recall = float(np.isin(right, found).mean())
    return Selection(found, selector, seconds, used, tables, recall)


def cheapest(search: Search, queries: int) -> str:
    """Name the fastest ranking whose recall is near that of a scan, among those that fit.

    Tables are never chosen: at equal candidates they find fewer of the best. Where nothing fits,
    the one that needs the least is.
    """
    good = search.sketch is not None and search.sketch.recall >= _GOOD
    open_to = {name: kind for name, kind in RANKINGS.items() if name != "sketch" or good}
    room = {name: kind.bytes(search, queries) for name, kind in open_to.items()}
    fitting = [name for name in open_to if search.room is None or room[name] <= search.room]
    if not fitting:
        return min(room, key=room.__getitem__)
    return min(fitting, key=lambda name: open_to[name].seconds(search, queries))


def best(search: Search, query: FloatArray, k: int, exclude: Items) -> tuple[Items, FloatArray]:
    """Return the ``k`` items of the highest exact scores, the best first, and their scores."""
    # Gathered numbers and gathered blocks round differently: blocks decide between close ones.
    close = top(_most(_scores(search.items, query[None])), 2 * k + 16, np.unique(exclude))
    return ranked(search.items, query, close, k)


def ranked(
    items: ItemMemory, query: FloatArray, candidates: Items, k: int
) -> tuple[Items, FloatArray]:
    """Return the best ``k`` of some candidates by exact score, and their scores."""
    scores = items.rows(candidates) @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return candidates[order], scores[order]


def mix(
    selected: Items, positives: Items, places: Items, catalogue: int
) -> tuple[Items, FloatArray]:
    """Join selected items and a uniform sample of the others, with the logarithms of their weights.

    A selected item stands for itself. One of the ``B - H`` uniform draws stands for its share of
    the ``n - P - H`` items that are neither positive nor selected.

    Args:
        selected: ``H`` items, ascending, none of them positive.
        positives: ``P`` items, ascending.
        places: ``B - H`` uniform draws from ``[0, n - P - H)``.
        catalogue: ``n``.
    """
    taken = np.union1d(selected, positives)
    drawn = outside(taken, places)
    weights = np.zeros(len(selected) + len(drawn), np.float32)
    weights[len(selected) :] = np.log(max(1, catalogue - len(taken)) / max(1, len(drawn)))
    return np.concatenate((selected, drawn)), weights


def top(values: FloatArray, budget: int, without: Items) -> Items:
    """Return the items of the highest values, ascending; ``values`` loses what is excluded."""
    values[without] = -np.inf
    budget = min(budget, len(values) - len(without))
    if budget == 0:
        return np.zeros(0, np.int64)
    return np.sort(np.argpartition(values, len(values) - budget)[len(values) - budget :])


def _scores(items: ItemMemory, queries: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """Exact scores of centred items by chunks, ``(m, q)``."""
    table, centre = items.table, queries @ items.centre
    if len(queries) <= _PUSHED and 2 * table.slots <= table.items * table.parts:
        together = zip(*(items.products(query) for query in queries), strict=True)
        for parts in together:
            yield parts[0][0], np.stack([values for _, values in parts], axis=1) - centre
        return
    for start, rows in items.chunks():
        yield start, rows @ queries.T - centre


def _most(scores: Iterator[tuple[int, FloatArray]]) -> FloatArray:
    """Highest score of each item for any query, shape ``(n,)``."""
    return np.concatenate([part.max(axis=1) for _, part in scores])


def _pass(items: ItemMemory) -> float:
    """Time an item of gathering all rows."""
    return items.table.parts * _PLACE + items.dim * _COPY


def _kept(items: ItemMemory, queries: int) -> int:
    """Bytes of the values, what is chosen, and a chunk's scores."""
    return 12 * items.items + 8 * min(CHUNK, items.items) * queries


def _rank(search: Search) -> int:
    return 0 if search.sketch is None else search.sketch.codes.shape[1]


NO_LABEL = -1
"""Fills up the rows of examples that have fewer labels than others."""


@dataclass(frozen=True)
class ActiveSet:
    """The neurons of a batch, without repeats.

    Attributes:
        neurons: int64 of shape ``(A,)``; labels ascending, then selected ascending, then uniform
            ascending.
        log_weights: float32 of shape ``(A,)``: logarithm of how many neurons each one stands for
            in a sum over the layer. Labels and selected ones stand for themselves; a uniform one
            for its share of all that are left.
        labels: how many of them are labels of the batch.
        selected: how many were selected.
        width: neurons of the layer.
    """

    neurons: Tensor
    log_weights: Tensor
    labels: int
    selected: int
    width: int

    def __len__(self) -> int:
        return len(self.neurons)

    @property
    def uniform(self) -> int:
        """How many were drawn by chance."""
        return len(self.neurons) - self.labels - self.selected

    @property
    def share(self) -> float:
        """Active neurons of the whole batch over those of the layer."""
        return len(self.neurons) / self.width

    def places(self, labels: Tensor) -> Tensor:
        """Return where each label of this batch stands among the neurons; 0 for no label."""
        places = torch.searchsorted(self.neurons[: self.labels], labels)
        return places.clamp_(max=max(0, self.labels - 1))

    def __str__(self) -> str:
        return (
            f"{len(self)} of {self.width} neurons ({100 * self.share:.2f} %): "
            f"{self.labels} labels, {self.selected} selected, {self.uniform} uniform"
        )


def distinct_labels(labels: Tensor, width: int) -> Items:
    """Return the labels of a batch, ascending, without repeats and :data:`NO_LABEL`.

    Raises:
        UsageError: when one is out of its range.
    """
    found: Items = np.unique(labels.detach().cpu().numpy().astype(np.int64, copy=False))
    if len(found) and found[0] == NO_LABEL:
        found = found[1:]
    if len(found) and not (found[0] >= 0 and found[-1] < width):
        wrong = int(found[0] if found[0] < 0 else found[-1])
        raise UsageError(
            f"label {wrong}: a layer of {width} neurons has labels 0 to {width - 1}; number labels "
            "from 0, or make the layer wider"
        )
    return found


def active_set(
    labels: Items, selected: Items, budget: int, width: int, stream: SecureStream
) -> ActiveSet:
    """Join labels, selected neurons and uniform ones: ``min(budget, width)`` in all, exactly.

    Args:
        labels: of the batch, ascending, without repeats.
        selected: neurons in the order in which they are wanted; labels among them and what is
            beyond the budget are left out.
        stream: for the uniform ones.

    Raises:
        UsageError: when the labels alone are more than the budget.
    """
    budget = min(budget, width)
    if len(labels) > budget:
        raise UsageError(
            f"{len(labels)} distinct labels in a batch and a budget of {budget} neurons: labels "
            "are always active; raise the share of the layer, or take smaller batches"
        )
    if budget == width:
        fresh, drawn = np.delete(np.arange(width), labels), labels[:0]
    else:
        fresh = selected[~np.isin(selected, labels)]
        _, first = np.unique(fresh, return_index=True)
        fresh = np.sort(fresh[np.sort(first)][: budget - len(labels)])
        taken = np.union1d(labels, fresh)
        drawn = uniform(width - len(taken), budget - len(taken), stream, taken)
    certain = len(labels) + len(fresh)
    weights = torch.zeros(budget)
    if len(drawn):
        weights[certain:] = float(np.log((width - certain) / len(drawn)))
    neurons = torch.from_numpy(np.concatenate((labels, fresh, drawn)))
    return ActiveSet(neurons, weights, len(labels), len(fresh), width)
