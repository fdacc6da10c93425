"""A wide output layer of which a batch computes, and trains, only a few neurons.

Weights are dense, or live in a :class:`~privrec.embedding.subspace.Subspace`. A batch has one set
of active neurons of an exact size (:mod:`privrec.search.select`); only their rows get gradients, as
sparse tensors whose indices are the neurons' own, so that whatever an optimiser keeps for a row
stays with the neuron (:class:`RowAdam`).

Sources: Chen et al., "SLIDE" (MLSys 2020); Jean et al., "On using very large target vocabulary for
neural machine translation" (ACL 2015) for the importance weights of sampled softmax; Kingma & Ba,
"Adam" (ICLR 2015), per row.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from privrec.data.corpus import NO_LABEL
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table, distinct
from privrec.errors import UsageError
from privrec.models.losses import softmax_loss
from privrec.randomness import ROOT_BYTES, SecretRoot, SecureStream, rng_for
from privrec.search.hashing import Shape
from privrec.search.index import INDEXES, Index, Rebuild
from privrec.search.memory import FloatArray, ItemMemory, Items
from privrec.search.select import ActiveSet, Search, active_set, ranked, select
from privrec.workers import give_back_freed

Loss = Literal["softmax", "bce"]

_SHAPE = Shape(bits=10, tables=16)
_PART = 1 << 14
_AT_ONCE = 1 << 17  # floats of an optimiser's step: what a cache holds


class SparseOutput(nn.Module):
    """``n`` output neurons over a hidden vector of length ``dim``, few of them active at a time.

    Promise: with ``share = 1`` it is a dense layer. At any share the labels of a batch are active
    and the union over the batch has exactly :attr:`budget` neurons. Copies and pickles hold neither
    a secret root nor hash functions that were drawn from it: they draw a new one, and make their
    index with it. Of a known root they derive another known one, and take the index over. A value
    out of its range is refused, and so is a table of another size.

    Args:
        share: active neurons of a batch over ``n``, in (0, 1].
        selector: who finds the selected ones: ``uniform`` (nobody), ``scan`` (exact scores),
            or an index that is held: one of :data:`privrec.search.index.INDEXES`.
        selected: of the budget that labels leave, how much is selected, in [0, 1]; the rest is
            uniform.
        table: where rows lie: a :class:`~privrec.embedding.subspace.Subspace` of ``n`` items and
            ``dim`` numbers; None, each neuron has a row of its own.
        shape: of the hash tables; None, ten bits and sixteen tables.
        rebuild: when an index is made anew; by default when 1 % of its codes have changed.
        candidates: share of the layer that a query of :meth:`topk` scores exactly, in (0, 1].
        init_std: standard deviation of the first weights, which ``seed`` gives.
        root: the secret that hash functions and uniform neurons are drawn from; None, a fresh one.
            :meth:`privrec.randomness.SecretRoot.known` makes a layer repeat itself.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        *,
        share: float = 0.01,
        selector: str = "cells",
        selected: float = 0.5,
        table: Table | None = None,
        bias: bool = True,
        shape: Shape | None = None,
        rebuild: Rebuild | None = None,
        candidates: float = 0.01,
        init_std: float | None = None,
        seed: int = 0,
        root: SecretRoot | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n", n), ("dim", dim)):
            if size < 1:
                raise UsageError(f"{name} = {size}: must be at least 1; raise it")
        for name, part in (("share", share), ("candidates", candidates)):
            if not 0 < part <= 1:
                raise UsageError(f"{name} = {part}: must lie above 0 and at most at 1; change it")
        if not 0 <= selected <= 1:
            raise UsageError(f"selected = {selected}: must lie in 0 to 1; change it")
        if selector not in (*INDEXES, "scan", "uniform"):
            raise UsageError(
                f'selector = "{selector}": is none of {", ".join(INDEXES)}, scan and uniform; '
                "choose one"
            )
        if table is not None and (table.items, table.dim) != (n, dim):
            raise UsageError(
                f"a table of {table.items} rows of {table.dim} numbers for a layer of {n} neurons "
                f"over {dim}: they must be equal; make the table for the layer"
            )
        self.n, self.dim, self.share, self.selected = n, dim, share, selected
        self.selector, self.candidates = selector, candidates
        self.shape, self.rebuild = shape or _SHAPE, rebuild or Rebuild()
        self.table = table or PlainTable.of(n, dim, block=dim)
        blocks = (self.table.slots, self.table.block)
        drawn = rng_for(seed, "output").standard_normal(blocks, np.float32)
        drawn *= np.float32(dim**-0.5 if init_std is None else init_std)
        self.weight = nn.Parameter(torch.from_numpy(drawn))
        self.bias = nn.Parameter(torch.zeros(n, 1)) if bias else None
        self._biases = PlainTable.of(n, 1, block=1)
        self._root = root or SecretRoot(secrets.token_bytes(ROOT_BYTES))
        self._index: Index | None = None
        self._indexed: tuple[int, ...] = ()
        self._age = self._steps = self._looked = self.rebuilds = 0

    def __getstate__(self) -> dict[str, Any]:
        known = self._root.is_known
        return {
            **self.__dict__,
            "_root": self._root.tag("copy of a sparse output") if known else None,
            "_index": self._index if known else None,
            "_indexed": self._indexed == self._versions(),  # a copy's tensors count from 0 again
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        key = state["_root"]
        root = SecretRoot(secrets.token_bytes(ROOT_BYTES)) if key is None else SecretRoot.known(key)
        super().__setstate__({**state, "_root": root})  # type: ignore[no-untyped-call]
        self._indexed = self._versions() if state["_indexed"] else ()

    @property
    def budget(self) -> int:
        """Neurons of an active set, labels included."""
        return max(1, round(self.share * self.n))

    def active(self, hidden: Tensor, labels: Tensor) -> ActiveSet:
        """Return the active set of a batch, and take one step of the rebuild schedule.

        Hidden vectors are float32 ``(b, dim)``, labels int64 ``(b,)``, or ``(b, m)`` with rows
        filled up by -1. More distinct labels than the budget are refused.
        """
        wanted, stream = distinct_labels(labels, self.n), self._stream("active", self._steps)
        room = round(self.selected * max(0, self.budget - len(wanted)))
        if not room or self.budget == self.n or self.selector == "uniform":
            selected = np.zeros(0, np.int64)
        elif self.selector == "scan":
            search, queries = Search(self.items()), self.queries(hidden)
            selected = select("scan", search, queries, room, stream, exclude=wanted)
        else:
            selected = self.index().batch(self.queries(hidden), room + len(wanted))
        fresh = selected[~np.isin(selected, wanted)][:room]
        self._steps += 1
        self._age += 1
        return active_set(wanted, fresh, self.budget, self.n, stream)

    def queries(self, hidden: Tensor) -> FloatArray:
        """Return hidden vectors as an index is asked: float32, each ending in a 1 with biases."""
        rows = hidden.detach().to(torch.float32).cpu()
        rows = rows if self.bias is None else functional.pad(rows, (0, 1), value=1.0)
        return np.ascontiguousarray(rows.numpy())

    def items(self) -> ItemMemory:
        """Return the layer as a catalogue to search; it shares the weights' memory."""
        biases = None if self.bias is None else (self._biases, self.bias.detach().numpy())
        return ItemMemory(self.table, self.weight.detach().numpy(), biases)

    def index(self) -> Index:
        """Return the index that is held; a selector that has none raises a :class:`UsageError`.

        In training it follows the rebuild schedule, whose steps are calls of :meth:`active`. After
        ``eval()`` it is made anew when the weights have changed at all.
        """
        if self._index is None or (not self.training and self._versions() != self._indexed):
            return self.reindex()
        if self.training and self._looked != self._age:  # one look a step is enough
            self._looked = self._age
            if self.rebuild.due(self._age, self._index, self.items()):
                return self.reindex()
        return self._index

    def _versions(self) -> tuple[int, ...]:
        """Counts of changes in place that torch keeps of every tensor."""
        return tuple(parameter._version for parameter in self.parameters())

    def reindex(self) -> Index:
        """Make the index of the weights as they are now, with functions drawn anew."""
        if self.selector in ("scan", "uniform"):
            raise UsageError(
                f'selector = "{self.selector}": has no index; use one of {", ".join(INDEXES)}'
            )
        stream = self._stream("functions", self.rebuilds)
        self._index = INDEXES[self.selector](self.items(), self.shape, stream)
        give_back_freed()  # making an index takes several times its room
        self._age, self._indexed = 0, self._versions()
        self.rebuilds += 1
        return self._index

    def _stream(self, purpose: str, count: int) -> SecureStream:
        return self._root.stream(f"sparse output {purpose}", count)

    def rows(self, neurons: Tensor) -> Tensor:
        """Return the weights of distinct neurons, shape ``(A, dim)``, whose gradient is sparse."""
        if isinstance(self.table, PlainTable) and self.table.parts == 1:
            return _rows(self.weight, neurons)
        slots, signs = self.table.locate(neurons.numpy())
        factors = torch.from_numpy(signs.ravel() * np.float32(self.table.scale))[:, None]
        blocks = _rows(self.weight, torch.from_numpy(slots.ravel()), factors)
        return blocks.view(len(neurons), self.dim)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        kind: Loss = "softmax",
        active: ActiveSet | None = None,
    ) -> Tensor:
        """Return the mean loss of a batch, over the active set as an estimate of the whole layer.

        ``softmax``: cross-entropy, the mean over an example's labels. ``bce``: binary
        cross-entropy, summed over the neurons. With everything active it is the loss of the dense
        layer. Arguments are as for :meth:`active`, which chooses the set where none is given.
        """
        if kind not in ("softmax", "bce"):
            raise UsageError(f'loss = "{kind}": is "softmax" or "bce"; choose one of them')
        if active is None:
            active = self.active(hidden, labels)
        padded = labels[:, None] if labels.dim() == 1 else labels
        scores = hidden @ self.rows(active.neurons).T
        if self.bias is not None:
            scores = scores + _rows(self.bias, active.neurons).T
        places, real = active.places(padded), padded != NO_LABEL
        if kind == "softmax":
            return softmax_loss(scores + active.log_weights, places, real)
        own = torch.where(real, scores.gather(1, places), 0.0).sum(1)
        return ((functional.softplus(scores) * active.log_weights.exp()).sum(1) - own).mean()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scores of all neurons, shape ``(b, n)``, as a dense layer does."""
        scores = hidden @ self.rows(torch.arange(self.n)).T
        return scores if self.bias is None else scores + self.bias.T

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return scores and neurons, the ``k`` best of each vector among those found.

        Hidden vectors are float32 of shape ``(b, dim)`` or ``(dim,)``; what is returned has the
        shape ``(b, k)`` or ``(k,)``, the best first. Where an index finds fewer than ``k``, the
        scores end in ``-inf`` and the neurons in -1. ``scan`` and ``uniform`` score all neurons.
        """
        if not 1 <= k <= self.n:
            raise UsageError(f"k = {k}: a layer of {self.n} neurons has between 1 and all of them")
        items, count = self.items(), max(k, round(self.candidates * self.n))
        queries = self.queries(hidden).reshape(-1, items.dim)
        found = zip(*(self._best(items, query, k, count) for query in queries), strict=True)
        neurons, scores = (torch.from_numpy(np.stack(each)) for each in found)
        return (scores[0], neurons[0]) if hidden.dim() == 1 else (scores, neurons)

    def _best(
        self, items: ItemMemory, query: FloatArray, k: int, count: int
    ) -> tuple[Items, FloatArray]:
        if self.selector in ("scan", "uniform"):
            close = select("scan", Search(items), query[None], k, self._stream("scan", 0))
        else:
            close = self.index().one(query, count)
        neurons, scores = ranked(items, query, close, k)
        missing = (0, k - len(neurons))
        neurons = np.pad(neurons, missing, constant_values=-1)
        return neurons, np.pad(scores, missing, constant_values=-np.inf)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        shown = f"n={self.n}, dim={self.dim}, share={self.share:g}"
        return f"{shown}, selector={self.selector!r}, budget={self.budget}"


def distinct_labels(labels: Tensor, width: int) -> Items:
    """Return the labels of a batch, ascending, without repeats and :data:`NO_LABEL`."""
    found: Items = distinct(labels.detach().cpu().numpy().astype(np.int64, copy=False).ravel())
    if len(found) and found[0] == NO_LABEL:
        found = found[1:]
    if len(found) and not (found[0] >= 0 and found[-1] < width):
        wrong = int(found[0] if found[0] < 0 else found[-1])
        raise UsageError(
            f"label {wrong}: a layer of {width} neurons has labels 0 to {width - 1}; number labels "
            "from 0, or make the layer wider"
        )
    return found


def _rows(weight: Tensor, index: Tensor, factors: Tensor | None = None) -> Tensor:
    """Distinct rows of a matrix; with factors, signed blocks, which several neurons may share."""
    return cast(Tensor, _Rows.apply(weight, index, factors))  # type: ignore[no-untyped-call]


class _Rows(torch.autograd.Function):
    """:func:`_rows`, whose gradient names rows and never places in a list."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, factors: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, factors)
        ctx.size = weight.shape
        rows = weight.index_select(0, index)
        return rows if factors is None else rows.mul_(factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        index, factors = ctx.saved_tensors
        values = gradients[0]
        if factors is not None:
            index, place = index.unique(return_inverse=True)
            values = torch.zeros(len(index), ctx.size[1])
            # In parts: a signed copy of all of it would be as large as the active rows.
            for start in range(0, len(place), _PART):
                part = slice(start, start + _PART)
                values.index_add_(0, place[part], gradients[0][part] * factors[part])
        # Rows are distinct: whatever their order, nothing is left to be summed.
        sparse = torch.sparse_coo_tensor(index[None], values, ctx.size, check_invariants=False)
        return sparse._coalesced_(True), None, None


class SubspaceEmbedding(nn.Module):
    """Rows of a wide table, kept in a memory that is as many times smaller as ``compression`` says.

    A stand-in for :class:`torch.nn.Embedding` without its padding, norms and sparse gradients. Each
    row is cut into parts of ``block`` numbers; a keyed hash gives every part a sign and a place in
    :attr:`memory`, which it may share with parts of other rows, so that nothing is stored for a row
    and none has to be known before.

    Args:
        num_embeddings: rows, at least 1; an id outside of them is a UsageError.
        embedding_dim: numbers in a row, a multiple of ``block``.
        compression: the table's size over the memory's, at least 1, rounded so that the memory has
            a power of two of blocks.
        block: numbers that move together; None, as many as 16 and ``embedding_dim`` have in common.
        key: which of all hash functions, and the first numbers; whoever has it has the same.

    Attributes:
        memory: the parameter, of the shape ``(slots, block)``, drawn from a standard normal.

    Source: the random subspaces of FAIR, as :class:`privrec.embedding.subspace.Subspace` has them.

    Examples:
        >>> import torch, privrec
        >>> table = privrec.SubspaceEmbedding(1_000_000, 32, compression=64)
        >>> table(torch.tensor([[3, 999_999]])).shape, table.memory.numel()
        (torch.Size([1, 2, 32]), 524288)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        compression: float = 1.0,
        block: int | None = None,
        key: int = 0,
    ) -> None:
        super().__init__()
        block = math.gcd(16, embedding_dim) if block is None else block
        sizes = num_embeddings, embedding_dim
        self.table = Subspace.sized(*sizes, block=block, key=key, compression=compression)
        rng = rng_for(key, "subspace embedding")
        first = rng.standard_normal((self.table.slots, block), np.float32)
        self.memory = nn.Parameter(torch.from_numpy(first))

    def forward(self, items: Tensor) -> Tensor:
        """Return the rows of integer ids of any shape ``(*s)``, as ``(*s, embedding_dim)``."""
        ids = items.detach().cpu().numpy()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.table.items:
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise UsageError(f"id {wrong}: the table has rows 0 to {self.table.items - 1}")
        slots, signs = (torch.from_numpy(each).to(items.device) for each in self.table.locate(ids))
        rows = functional.embedding(slots, self.memory) * signs[..., None]
        return rows.reshape(*items.shape, self.table.dim)

    def extra_repr(self) -> str:
        """Say how large the table is, and how much smaller its memory."""
        table = self.table
        return f"{table.items}, {table.dim}, compression={table.compression:.3g}"


class RowAdam(torch.optim.Optimizer):
    """Adam whose state belongs to rows, which are what a parameter's first index names.

    A sparse gradient names rows: a row without one costs nothing, takes no step and keeps
    everything, and two batches with other active neurons in other orders never mix what is kept.
    The count of steps is the row's own: its first step is as long as that of any other, however
    late it comes. A dense gradient moves every row. A value out of its range is refused.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not (lr > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise UsageError(
                f"lr = {lr}, betas = {betas}, eps = {eps}: lr and eps must be above 0 and betas in "
                "0 to below 1; change them"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every row that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["first"] = torch.zeros_like(parameter)
            state["second"] = torch.zeros_like(parameter)
            state["steps"] = torch.zeros(len(parameter), dtype=torch.int32)
        first, second, steps = state["first"], state["second"], state["steps"]
        one, two = group["betas"]
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, values = gradient._indices()[0], gradient._values()
        else:
            rows, values = torch.arange(len(parameter)), gradient
        # In parts that a cache holds: copies of all active rows would cost more than the layer's.
        size = max(1, _AT_ONCE // max(1, parameter[0].numel()))
        for part, change in zip(torch.split(rows, size), torch.split(values, size), strict=True):
            mean = first[part].lerp_(change, 1 - one)
            square = second[part].mul_(two).addcmul_(change, change, value=1 - two)
            taken = steps[part] + 1
            first.index_copy_(0, part, mean)
            second.index_copy_(0, part, square)
            steps.index_copy_(0, part, taken)
            count = taken.to(torch.float32).view(-1, *(1,) * (change.dim() - 1))
            root = (square / (1 - two**count)).sqrt_().add_(group["eps"])
            moved = (mean / (1 - one**count)).div_(root).mul_(-group["lr"])
            parameter.index_add_(0, part, moved)
