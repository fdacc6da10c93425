"""Per-example clipping without per-example gradients.

Every supported layer remembers what came in, and the gradient of what went out. From these two the
norm of each example's gradient follows without the gradient itself, and so does the sum of the
clipped gradients: one backward pass, and for a table nothing larger than the batch's own lookups.

* Linear, over ``T`` positions: ``|Σ b_t a_tᵀ|² = Σ (AAᵀ) ∘ (BBᵀ)``, and ``|a|² |b|²`` for one.
* Embedding: the lookups of one example that meet in a row add up before they are squared.
* Anything else small: the per-example gradients of Opacus' own registry.

Sources: Goodfellow, "Efficient per-example gradient computations" (2015); Li et al., "Large
Language Models Can Be Strong Differentially Private Learners" (2022); Bu et al., "Differentially
Private Optimization on Large Model at Small Cost" (2023), for a single backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from privrec.errors import UsageError

# What float32 may lose where terms cancel, of the square of the sum of their lengths. Squared norms
# have it added, so that neither a norm falls short nor what is added goes beyond the bound.
_LOST = 2.0**-20
_TINY = 2.0**-126  # what a square in float32 may lose where it underflows
_CHUNK = 1 << 22  # numbers of per-example gradient at a time, where they are cheaper than products


@dataclass
class Record:
    """One use of a layer: what came in, by position and by name, and the gradient behind it."""

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    gradient: Tensor


@dataclass
class Lookups:
    """Rows of a table, each with ``weights[l] · vectors[which[l]]`` as its part of a gradient."""

    rows: Tensor
    which: Tensor
    weights: Tensor | None
    vectors: Tensor

    def values(self) -> Tensor:
        """The part of each lookup, shape ``(lookups, width)``."""
        made = self.vectors.index_select(0, self.which)
        return made if self.weights is None else made.mul_(self.weights[:, None])


def joined(parts: list[Lookups], width: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The lookups of several microbatches as rows, numbers of vectors, and scaled vectors."""
    rows, which = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    vectors, count = [torch.zeros(0, width)], 0
    for part in parts:
        is_shared = part.weights is None  # with weights, each lookup has a vector of its own
        rows.append(part.rows.to(torch.int64))
        which.append(count + (part.which if is_shared else torch.arange(len(part.rows))))
        vectors.append(part.vectors if is_shared else part.values())
        count += len(vectors[-1])
    return torch.cat(rows), torch.cat(which), torch.cat(vectors) * scale


class Layer(Protocol):
    """A layer whose per-example gradients can be measured and summed."""

    def squared_norms(self, records: list[Record], examples: int) -> Tensor:
        """Squared norm of each example's gradient, shape ``(examples,)``."""

    def clipped(self, records: list[Record], factors: Tensor) -> Any:
        """What each parameter's gradient is when example ``e`` counts ``factors[e]``."""


class LinearLayer:
    """``torch.nn.Linear`` over inputs of shape ``(examples, …, features)``."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    def squared_norms(self, records: list[Record], examples: int) -> Tensor:
        a, b = self._both(records)
        total = torch.zeros(len(a), dtype=torch.float64)
        if self._layer.weight.requires_grad:
            total += _product_norms(a, b)
        if _is_trained(self._layer.bias):
            total += b.sum(1).square_().sum(1)
            if b.shape[1] > 1:
                total += _LOST * b.norm(dim=2).sum(1).square_()
        return total

    def clipped(self, records: list[Record], factors: Tensor) -> dict[nn.Parameter, Tensor]:
        a, b = self._both(records)
        scaled = _times(b, factors)
        made: dict[nn.Parameter, Tensor] = {}
        if self._layer.weight.requires_grad:
            made[self._layer.weight] = scaled.flatten(0, 1).T @ _where(a, factors).flatten(0, 1)
        if _is_trained(self._layer.bias):
            made[self._layer.bias] = scaled.sum((0, 1))
        return made

    def _both(self, records: list[Record]) -> tuple[Tensor, Tensor]:
        a = [_positions(record.inputs[0]) for record in records]
        b = [_positions(record.gradient) for record in records]
        return torch.cat(a, 1) if len(a) > 1 else a[0], torch.cat(b, 1) if len(b) > 1 else b[0]


class TableLayer:
    """``torch.nn.Embedding`` and ``torch.nn.EmbeddingBag``."""

    def __init__(self, layer: nn.Embedding | nn.EmbeddingBag) -> None:
        self._layer = layer
        if isinstance(layer, nn.EmbeddingBag) and layer.mode == "max":
            raise UsageError(
                'EmbeddingBag(mode="max"): its gradients are not clipped; use "sum" or "mean"'
            )

    def squared_norms(self, records: list[Record], examples: int) -> Tensor:
        parts = [(self._lookups(record), _owners(record, examples)) for record in records]
        if len(parts) == 1 and isinstance(self._layer, nn.EmbeddingBag):
            return _bag_norms(parts[0][0], self._layer.num_embeddings)
        values = torch.cat([found.values() for found, _ in parts])
        rows = torch.cat([found.rows for found, _ in parts])
        of = torch.cat([owners[found.which] for found, owners in parts])
        return _meeting_norms(rows, of, values, examples, self._layer.num_embeddings)

    def clipped(self, records: list[Record], factors: Tensor) -> list[Lookups]:
        made = [self._lookups(record) for record in records]
        for record, found in zip(records, made, strict=True):
            owners = _owners(record, len(factors))
            if found.weights is not None:
                found.weights = _where(found.weights, factors[owners[found.which]])
            found.vectors = _times(found.vectors, factors[owners])
        return made

    def _lookups(self, record: Record) -> Lookups:
        if isinstance(self._layer, nn.EmbeddingBag):
            found = _bag_lookups(self._layer, record)
        else:
            rows = record.inputs[0].reshape(-1)
            vectors = record.gradient.reshape(len(rows), record.gradient.shape[-1])
            found = Lookups(rows, torch.arange(len(rows)), None, vectors)
        if self._layer.padding_idx is None:
            return found
        kept = found.rows != self._layer.padding_idx
        weights = None if found.weights is None else found.weights[kept]
        return Lookups(found.rows[kept], found.which[kept], weights, found.vectors)


class SampledLayer:
    """A small layer of another kind, by the per-example gradients that Opacus has for it."""

    def __init__(self, layer: nn.Module, sampler: Callable[..., dict[nn.Parameter, Tensor]]):
        self._layer, self._sampler = layer, sampler

    def squared_norms(self, records: list[Record], examples: int) -> Tensor:
        total = torch.zeros(examples)
        for gradients in self._gradients(records).values():
            total += gradients.flatten(1).square().sum(1)
        return total

    def clipped(self, records: list[Record], factors: Tensor) -> dict[nn.Parameter, Tensor]:
        found = self._gradients(records)
        return {own: _times(gradients, factors).sum(0) for own, gradients in found.items()}

    def _gradients(self, records: list[Record]) -> dict[nn.Parameter, Tensor]:
        made: dict[nn.Parameter, Tensor] = {}
        for record in records:
            found = self._sampler(self._layer, list(record.inputs), record.gradient)
            for parameter, gradients in found.items():
                if parameter.requires_grad:
                    made[parameter] = made.get(parameter, 0) + gradients.detach()
        if any(p.requires_grad and p not in made for p in self._layer.parameters(recurse=False)):
            raise UsageError(
                f"the per-example gradients registered for {type(self._layer).__name__} leave out "
                "a trainable parameter: it would be noise alone; freeze it, or register its too"
            )
        return made


def layer_of(layer: nn.Module, name: str) -> Layer:
    """How a layer with trainable parameters of its own is clipped; refused where nobody knows."""
    kind = type(layer)
    where = f"layer {name!r} ({kind.__name__})"
    own = layer._parameters
    is_patched = "forward" in vars(layer)
    if any(p is not None and is_lazy(p) for p in own.values()):
        raise UsageError(f"{where} has no shape yet: call the model once before")
    # A subclass that computes something else with the same weights has other gradients.
    tables = (nn.Embedding, nn.EmbeddingBag)
    for known in (nn.Linear, *tables):
        is_known = isinstance(layer, known) and kind.forward is known.forward
        if is_known and not is_patched and own.keys() <= {"weight", "bias"}:
            return TableLayer(layer) if isinstance(layer, tables) else LinearLayer(layer)
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        raise UsageError(f"{where}: make it with track_running_stats=False, or use GroupNorm")
    from opacus.grad_sample import GradSampleModule  # heavy, and few models need it

    sampler = GradSampleModule.GRAD_SAMPLERS.get(kind)
    if sampler is None or is_patched or isinstance(layer, (nn.Linear, *tables)):
        raise UsageError(
            f"{where} has trainable parameters of its own, and its per-example gradients are not "
            "known: build it from Linear, Embedding and EmbeddingBag, freeze it, or register it "
            "with opacus.grad_sample.register_grad_sampler"
        )
    return SampledLayer(layer, sampler)


def _is_trained(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _bag_lookups(layer: nn.EmbeddingBag, record: Record) -> Lookups:
    names = ("input", "offsets", "per_sample_weights")
    given = {**dict(zip(names, record.inputs, strict=False)), **record.named}
    rows, offsets, weights = given["input"], given.get("offsets"), given.get("per_sample_weights")
    if offsets is None:
        bags, each = rows.shape
        which = torch.arange(bags).repeat_interleave(each)
        counts = torch.full((bags,), each)
    else:
        if not layer.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_tensor([len(rows)])])
        counts = offsets[1:] - offsets[:-1]
        which = torch.arange(len(counts)).repeat_interleave(counts)
    rows = rows.reshape(-1)
    weights = None if weights is None else weights.detach().reshape(-1)
    vectors = record.gradient
    if layer.mode == "mean":
        if layer.padding_idx is not None:
            kept = (rows != layer.padding_idx).to(counts.dtype)
            counts = torch.zeros_like(counts).index_add_(0, which, kept)
        vectors = vectors / counts.clamp(min=1)[:, None]
    return Lookups(rows, which, weights, vectors)


def _owners(record: Record, examples: int) -> Tensor:
    """Which example each vector of a record belongs to."""
    vectors = record.gradient.flatten(0, -2).shape[0] if record.gradient.dim() > 1 else 1
    return torch.arange(examples).repeat_interleave(vectors // max(1, examples))


def _bag_norms(found: Lookups, table: int) -> Tensor:
    """Every lookup of a bag has the same vector, so that only its weights have to meet."""
    key = found.which * table + found.rows
    squared = found.vectors.square().sum(1).double() + _TINY * found.vectors.shape[1]
    weights = torch.ones(len(key)) if found.weights is None else found.weights
    weights, total = weights.double(), torch.zeros_like(squared)
    if len(key) <= len(found.vectors) and bool((found.which[1:] > found.which[:-1]).all()):
        return total.index_add_(0, found.which, weights.square()) * squared
    distinct, place = torch.unique(key, return_inverse=True)
    nothing = squared.new_zeros(len(distinct))
    met, lengths = (nothing.index_add(0, place, each) for each in (weights, weights.abs()))
    owner = distinct.div(table, rounding_mode="floor")
    return total.index_add_(0, owner, met.square() + _LOST * lengths.square()) * squared


def _meeting_norms(rows: Tensor, of: Tensor, values: Tensor, examples: int, table: int) -> Tensor:
    distinct, place = torch.unique(of * table + rows, return_inverse=True)
    total = values.new_zeros(examples)
    if len(distinct) == len(rows):
        return total.index_add_(0, of, values.square().sum(1))
    met = values.new_zeros(len(distinct), values.shape[1]).index_add_(0, place, values)
    lengths = values.new_zeros(len(distinct)).index_add_(0, place, values.norm(dim=1))
    of = distinct.div(table, rounding_mode="floor")
    return total.index_add_(0, of, met.square().sum(1) + _LOST * lengths.square())


def _product_norms(a: Tensor, b: Tensor) -> Tensor:
    (n, positions, wide), high = a.shape, b.shape[2]
    if positions == 1:
        one, two = (x.square().sum((1, 2)).double() + _TINY * x.shape[2] for x in (a, b))
        return one * two
    one, two = a.norm(dim=2).double(), b.norm(dim=2).double()
    lost: Tensor = (one * two).sum(1).square()
    lost *= _LOST + (wide + high + positions) / 8 * 2.0**-24
    lost += _TINY * (high * one.sum(1).square() + wide * two.sum(1).square())
    if 2 * positions**2 <= wide * high:
        return ((a @ a.mT) * (b @ b.mT)).sum((1, 2)).clamp_(min=0) + lost
    step = max(1, _CHUNK // (wide * high))
    parts = [(b[i : i + step].mT @ a[i : i + step]).square().sum((1, 2)) for i in range(0, n, step)]
    return torch.cat(parts) + lost if parts else lost


def _positions(x: Tensor) -> Tensor:
    """Examples first, then positions, then features."""
    x = x.detach()
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)


def _times(values: Tensor, factors: Tensor) -> Tensor:
    """Values times a factor each; a factor of 0 makes 0 also of what is not a number."""
    return _where(values * factors.reshape(-1, *[1] * (values.dim() - 1)), factors)


def _where(values: Tensor, factors: Tensor) -> Tensor:
    if bool((factors > 0).all()):
        return values
    return torch.where(factors.reshape(-1, *[1] * (values.dim() - 1)) > 0, values, 0.0)
