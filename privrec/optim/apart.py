"""Whether a model keeps the examples of a batch apart, without which clipping bounds nobody.

Layers that are known to mix examples are refused by type. For all others the model is run on a
batch, and again after one example was changed, and after all but one were: what it makes of the
others must stay what it was. That holds for one batch and one state of the model, so it finds what
mixes by construction; a model that mixes on rare inputs alone is its user's to avoid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from privrec.errors import UsageError

_TOLERANCE = 1e-5


def refuse_mixing(name: str, layer: nn.Module) -> None:
    """Refuse a layer that mixes the examples of a batch as it stands, trained or not.

    Raises:
        UsageError: for batch normalisation by the batch, instance normalisation that averages over
            it, and replicas.
    """
    where = f"layer {name!r} ({type(layer).__name__})"
    if isinstance(layer, _BatchNorm) and (layer.training or not layer.track_running_stats):
        raise UsageError(
            f"{where} normalises each example by all others of its batch, so that one moves the "
            "gradients of all, whether or not its own parameters are trained: use GroupNorm or "
            "LayerNorm, or keep it in eval() with the statistics that it has"
        )
    if isinstance(layer, _InstanceNorm) and layer.training and layer.track_running_stats:
        raise UsageError(
            f"{where} averages statistics over the batch, without noise: make it with "
            "track_running_stats=False, or use GroupNorm"
        )
    if isinstance(layer, nn.DataParallel):
        raise UsageError(f"{where} trains replicas that are not clipped: give the model inside")


class Probe:
    """One run of a model whose layers' outputs are moved, for chosen examples by more.

    All outputs are moved by a little, so that weights which are still zero let through what they
    will let through later.

    Args:
        batch_first: whether outputs of three dimensions have the examples first.
        moved: the examples to change, shape ``(examples,)``; none when None. Their inputs become
            those of the example before, and so stay valid.
    """

    def __init__(self, batch_first: bool, moved: Tensor | None = None) -> None:
        self.counts: set[int] = set()
        """What the layers take for the number of examples."""
        self._first, self._moved = batch_first, moved
        self.shown: list[tuple[str, int, Tensor]] = []
        """Of all that layers and model made: what, the examples' dimension, and values."""
        self.outputs: list[Tensor] = []
        self._made: list[tuple[str, int, Tensor]] = []

    def run(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Run the model, and keep what it and its layers make of the examples."""
        if self._moved is not None:
            inputs, named = self._exchanged((inputs, named))
        leaves = [x for x in tree_leaves(model(*inputs, **named)) if isinstance(x, Tensor)]
        self.outputs = [x.detach() for x in leaves if x.requires_grad and x.numel() != 1]
        totals = [x.sum() for x in leaves if x.requires_grad and x.numel() == 1]
        if totals and self._made:
            # Of a loss that the model computes itself, each example's gradient is its own.
            made = [x for _, _, x in self._made]
            found = torch.autograd.grad(sum(totals), made, allow_unused=True)  # type: ignore[arg-type]
            self.shown += [
                (f"the gradient behind {name}", at, gradient)
                for (name, at, _), gradient in zip(self._made, found, strict=True)
                if gradient is not None
            ]
        self.has_output = bool(self.outputs or totals)
        self._made.clear()

    def seen(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, at: int) -> Tensor:
        """Keep what came in and out of a layer, and give what goes on in its place."""
        name = f"a {type(layer).__name__}"
        self.counts.add(output.shape[at])
        for value in inputs[:1]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.shown.append((f"what comes into {name}", at, value.detach().clone()))
        self.shown.append((f"the output of {name}", at, output.detach()))
        # Neither symmetric nor of one sign, so that sums, means and maxima all feel it.
        each = output[:1] if at == 0 else output[:, :1]
        wave = torch.cos(torch.arange(each.numel(), dtype=output.dtype)).reshape(each.shape) + 0.5
        rest = [d for d in range(output.dim()) if d != at]
        wave = wave * (1 + output.detach().abs().mean(rest, keepdim=True) if rest else 1)
        output = output + 0.1 * wave
        if self._moved is not None and output.shape[at] == len(self._moved):
            output = output + wave * _along(self._moved, at, output)
        self._made.append((name, at, output))
        return output

    def _exchanged(self, given: Any) -> Any:
        """Inputs where each moved example has the values of the one before it."""
        moved = self._moved
        if moved is None:
            return given
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        # With offsets a flat list of rows has no example in each row.
        flat = any(_are_offsets(x) for x in tensors)

        def exchanged(x: Tensor) -> Tensor:
            at = int(not self._first and x.dim() > 1)
            if x.dim() <= at or x.shape[at] != len(moved) or (flat and x.dim() == 1):
                return x
            return torch.where(_along(moved, at, x), x.roll(1, at), x)

        return tree_map_only(Tensor, exchanged, given)


def refuse_moved_rows(still: Probe, moved: Probe, examples: int) -> None:
    """Refuse a model where what it made of the examples that were not moved is not what it was.

    Raises:
        UsageError: naming what moved.
    """
    kept = torch.ones(examples, dtype=torch.bool) if moved._moved is None else ~moved._moved
    if not still.has_output:
        raise UsageError(
            "a model without an output that has a gradient: whether it keeps examples apart cannot "
            "be seen; return tensors, or tuples, lists and dictionaries of tensors"
        )
    alike = [name for name, _, _ in still.shown] == [name for name, _, _ in moved.shown]
    if not alike or len(still.outputs) != len(moved.outputs):
        raise UsageError(_mixed("which layers are called"))
    for (name, at, one), (_, _, two) in zip(still.shown, moved.shown, strict=True):
        if one.shape[at : at + 1] == (examples,) and not _same(one, two, at, kept):
            _refuse(name, moved)
    for one, two in zip(still.outputs, moved.outputs, strict=True):
        places = [0] if still._first else [1, 0]
        fits = [at for at in places if one.dim() > at and one.shape[at] == examples]
        if not fits and one.shape[0] % examples == 0:  # positions of an example after one another
            one, two, fits = one.view(examples, -1), two.reshape(examples, -1), [0]
        if not fits:
            raise UsageError(
                f"an output of shape {tuple(one.shape)} of a model whose layers saw {examples} "
                "examples: the first dimension must be the example; with positions first give "
                "batch_first=False"
            )
        if not any(_same(one, two, at, kept) for at in fits):
            _refuse("the model's output", moved)


def _refuse(what: str, moved: Probe) -> None:
    if moved._moved is None:
        raise UsageError(
            f"{what} differs between two passes over the same batch: what a model keeps from one "
            "pass to the next may carry examples; keep no state, and draw from torch's generator"
        )
    raise UsageError(_mixed(what))


def _mixed(what: str) -> str:
    return (
        f"one example changes {what} for others: the model mixes the examples of a batch, so that "
        "no clipping bounds what one of them moves. Use GroupNorm or LayerNorm, mix nothing along "
        "the first dimension, and with positions first give batch_first=False"
    )


def _same(one: Tensor, two: Tensor, at: int, kept: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    a, b = (x.movedim(at, 0)[kept].nan_to_num() for x in (one, two))
    rest = list(range(1, a.dim()))
    scale = (a.abs() + b.abs()).sum(rest, keepdim=True) if rest else a.abs() + b.abs()
    return bool(((a - b).abs() <= _TOLERANCE * scale).all())


def _along(mask: Tensor, at: int, like: Tensor) -> Tensor:
    return mask.reshape(*[1] * at, -1, *[1] * (like.dim() - at - 1))


def _are_offsets(x: Tensor) -> bool:
    is_list = x.dim() == 1 and len(x) > 1 and not x.is_floating_point() and x.dtype != torch.bool
    return is_list and bool(x[0] == 0) and bool((x[1:] >= x[:-1]).all())
