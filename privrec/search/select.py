"""One interface to every way of choosing items for a device.

All run on the device, over the compressed memory that it holds anyway, and nothing of what they
choose leaves it. ``scan`` is exact: the others are measured against it. Each is a function of a
:class:`Request`, and :data:`privrec.scenario.kinds.SELECTORS` knows its name and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from privrec.errors import UsageError
from privrec.randomness import SecureStream
from privrec.scenario import kinds
from privrec.search.hashing import FAMILIES, Family, own_shape, serial, signature
from privrec.search.index import SIGNATURE, Signatures, Sketch, highest, most_wanted
from privrec.search.memory import FloatArray, ItemMemory, Items, evenly, outside, uniform

_GOOD = 0.97  # recall from which ``auto`` takes the sketch for as good as a scan
_PUSHED = 2  # most queries for which numbers are gathered instead of blocks

# Nanoseconds a unit of work on the machine that the documented timings are from. Only ratios decide
# what `auto` picks, and they are fixed so that a resumed or repeated run picks the same.
_PLACE, _COPY, _PICK = 7.0, 0.17, 5.1  # hash a part to its slot; gather a block's float; a number
_PRODUCT, _THIN = 0.020, 0.032  # multiply and add, in a wide matrix product; with one vector
_SIGN, _WORD = 0.21, 0.57  # turn a projection into a bit; compare 64 bits
_CONVERT = 0.10  # turn 8 bits into a float


@dataclass(frozen=True)
class Search:
    """What a device searches, with the server's sketch of it for ``sketch``.

    ``config`` is the ``[train]`` table that names the selector, with its keys; None, its defaults.
    """

    items: ItemMemory
    sketch: Sketch | None = None
    config: Any = None


@dataclass(frozen=True)
class Request:
    """What a selector is asked, which returns the chosen items, ascending.

    Items ``without`` are never chosen, and are ascending and without repeats. ``config`` has the
    selector's own keys.
    """

    search: Search
    queries: FloatArray
    budget: int
    stream: SecureStream
    without: Items
    config: Any


def scan(request: Request) -> Items:
    """Choose by exact scores from the memory."""
    values = highest(_scores(request.search.items, request.queries))
    return top(values, request.budget, request.without)


def hamming(request: Request) -> Items:
    """Choose by signatures of 256 bits, made, compared and forgotten chunk by chunk."""
    items = request.search.items
    hashed = signature(items.dim, SIGNATURE, request.stream)
    parts = Signatures.in_chunks(items, hashed)
    values = np.concatenate([part.values(request.queries) for part in parts])
    return top(values, request.budget, request.without)


def sketch(request: Request) -> Items:
    """Choose by the server's sketch of its public table."""
    if request.search.sketch is None:
        raise UsageError('selector = "sketch": there is none; make one with Sketch.of')
    values = highest(request.search.sketch.values(request.queries))
    return top(values, request.budget, request.without)


def tables(family: Family, request: Request) -> Items:
    """Choose by hash tables of one family, one after another, until the budget is filled."""
    items, budget = request.search.items, request.budget
    shape = own_shape(items.items, budget, request.stream, items.table.block)
    excluded = np.zeros(items.items, np.bool_)
    excluded[request.without] = True
    found: list[Items] = []
    size = 0
    for new in serial(items, request.queries, family, shape, request.stream):
        fresh = new[~excluded[new]]
        if size + len(fresh) > budget:
            # The last table gives what is wanting, evenly over the catalogue.
            fresh = fresh[evenly(len(fresh), budget - size)]
        found.append(fresh)
        size += len(fresh)
        if size == budget:
            break
    return np.sort(np.concatenate(found))


simhash, pghash, block_sign = (partial(tables, family) for family in FAMILIES)


def chance(request: Request) -> Items:
    """Choose by chance."""
    left = request.search.items.items - len(request.without)
    return uniform(left, request.budget, request.stream, request.without)


def select(
    selector: str,
    search: Search,
    queries: FloatArray,
    budget: int,
    stream: SecureStream,
    *,
    exclude: Items | None = None,
) -> Items:
    """Choose up to ``budget`` items, ascending, that score high for some of the queries.

    Between queries, scores are compared as those of centred items: what all items have in common
    with a query speaks for none of them.

    Args:
        selector: one of :data:`privrec.scenario.kinds.SELECTORS` that searches, or ``uniform``.
        queries: shape ``(q, items.dim)``, ``q`` at least 1; with biases, each ends in a 1.
        budget: at least 1; a table selector may find fewer.
        stream: the device's own secret stream.
        exclude: items never to be chosen, such as the history.
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
    kind = kinds.SELECTORS[selector]
    request = Request(search, queries, budget, stream, without, search.config or kind.config())
    return cast(Items, kind.load()(request))


def cheapest(search: Search, queries: int) -> str:
    """Name the fastest ranking whose recall is near that of a scan.

    Tables are never chosen: at equal candidates they find fewer of the best.
    """
    items, product = search.items, _THIN if queries == 1 else queries * _PRODUCT
    gathered = items.table.parts * _PLACE + items.dim * _COPY
    scanned = gathered + items.dim * product
    if queries <= _PUSHED:
        scanned = min(scanned, items.table.parts * queries * (_PLACE + _PICK))
    signed = SIGNATURE * (items.dim * _PRODUCT + _SIGN) + items.dim * _THIN
    compared = SIGNATURE // 64 * queries * _WORD
    each = {"scan": scanned, "hamming": gathered + signed + compared}  # nanoseconds an item
    if search.sketch is not None and search.sketch.recall >= _GOOD:
        each["sketch"] = search.sketch.codes.shape[1] * (_CONVERT + product)
    return min(each, key=each.__getitem__)


def best(search: Search, query: FloatArray, k: int, exclude: Items) -> tuple[Items, FloatArray]:
    """Return the ``k`` items of the highest exact scores, the best first, and their scores."""
    # Gathered numbers and gathered blocks round differently: blocks decide between close ones.
    close = top(highest(_scores(search.items, query[None])), 2 * k + 16, np.unique(exclude))
    return ranked(search.items, query, close, k)


def ranked(
    items: ItemMemory, query: FloatArray, candidates: Items, k: int
) -> tuple[Items, FloatArray]:
    """Return the best ``k`` of some candidates by exact score, and their scores."""
    scores = items.scores(candidates, query)
    order = np.argsort(-scores, kind="stable")[:k]
    return candidates[order], scores[order]


def mix(
    selected: Items, positives: Items, places: Items, catalogue: int
) -> tuple[Items, FloatArray]:
    """Join selected items and a uniform sample of the others, with the logarithms of their weights.

    Each of the ``H`` selected items, ascending and none of them positive, stands for itself. One of
    the ``B - H`` uniform draws, ``places`` in ``[0, n - P - H)``, stands for its share of the
    ``n - P - H`` items that are neither positive nor selected.
    """
    taken = np.union1d(selected, positives)
    drawn = outside(taken, places)
    weights = np.zeros(len(selected) + len(drawn), np.float32)
    weights[len(selected) :] = np.log(max(1, catalogue - len(taken)) / max(1, len(drawn)))
    return np.concatenate((selected, drawn)), weights


def top(values: FloatArray, budget: int, without: Items) -> Items:
    """Return the items of the highest values, ascending; ``values`` loses what is excluded."""
    values[without] = -np.inf
    return np.sort(most_wanted(values, min(budget, len(values) - len(without))))


def _scores(items: ItemMemory, queries: FloatArray) -> Iterator[FloatArray]:
    """Exact scores of centred items by chunks, ``(m, q)``."""
    table, centre = items.table, queries @ items.centre
    if len(queries) <= _PUSHED and 2 * table.slots <= table.items * table.parts:
        for parts in zip(*(items.products(query) for query in queries), strict=True):
            yield np.stack(parts, axis=1) - centre
        return
    for _, rows in items.chunks():
        yield rows @ queries.T - centre


@dataclass(frozen=True)
class ActiveSet:
    """The neurons of a wide output layer that take part in a batch, without repeats.

    The first are its labels, always; then what a selector found; then as many others by chance as
    an exact budget has room for, all ascending in their part. The set is one for the whole batch:
    what is counted is the union, not one example's share of it. ``log_weights`` are logarithms of
    how many neurons each one stands for in a sum over the layer: one by chance for its share of all
    that are left, and the others for themselves.
    """

    neurons: Tensor
    log_weights: Tensor
    labels: int
    selected: int
    width: int

    def __len__(self) -> int:
        return len(self.neurons)

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
            f"{self.labels} labels, {self.selected} selected, "
            f"{len(self) - self.labels - self.selected} uniform"
        )


def active_set(
    labels: Items, selected: Items, budget: int, width: int, stream: SecureStream
) -> ActiveSet:
    """Join labels, selected neurons and uniform ones: ``min(budget, width)`` in all, exactly.

    Labels are ascending and distinct; more than the budget are refused. Selected neurons come the
    most wanted first: labels among them and what is beyond the budget are left out.
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
