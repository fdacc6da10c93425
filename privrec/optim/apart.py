"""Whether a model keeps the examples of a batch apart, without which clipping bounds nobody.

Layers that are known to mix examples are refused by type. For all others the model is run on a
batch, and again after one example was changed, and after all but one were: what it makes of the
others must stay what it was. That holds for one batch and one state of the model, so it finds what
mixes by construction; a model that mixes on rare inputs alone is its user's to avoid.
"""

from __future__ import annotations

from typing import Any, NoReturn

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
        moved: the examples to change, shape ``(examples,)``; none when None.
        like: the example whose inputs they are given, which so stay valid. Where all but one are
            given the inputs of that one, no statistic of the batch is left of the others.
    """

    def __init__(self, batch_first: bool, moved: Tensor | None = None, like: int = 0) -> None:
        self.counts: set[int] = set()
        """What the layers take for the number of examples."""
        self.batch_first, self.moved, self.like = batch_first, moved, like
        self.shown: list[tuple[str, int, Tensor]] = []
        """What came in and out of each layer: its name, the examples' dimension, and values."""
        self.gradients: dict[int, tuple[str, int, Tensor]] = {}
        """The gradients behind the layers' outputs, alike."""
        self.outputs: list[Tensor] = []
        """What the model gives that has a gradient, scalars included."""

    def run(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Run the model forth and back, and keep what it and its layers make of the examples."""
        inputs, named = self._exchanged((inputs, named))
        leaves = tree_leaves(model(*inputs, **named))
        given = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        weights = [torch.ones_like(x) for x in given]
        for x, weight in zip(given, weights, strict=True):
            if self.moved is not None and (at := self.places(x, len(self.moved))):
                weight += _along(self.moved, at[0], weight)
        self.outputs = [x.detach().clone() for x in given]
        torch.autograd.backward(given, weights)

    def places(self, output: Tensor, examples: int) -> list[int]:
        """Dimensions of an output that may be the examples."""
        places = [0] if self.batch_first else [1, 0]
        return [at for at in places if output.dim() > at and output.shape[at] == examples]

    def seen(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, at: int) -> Tensor:
        """Keep what came in and out of a layer, and give what goes on in its place."""
        name, number = f"a {type(layer).__name__}", len(self.shown)
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
        if self.moved is not None and output.shape[at] == len(self.moved):
            output = output + torch.where(_along(self.moved, at, output), wave, 0.0)

        def keep(gradient: Tensor) -> None:
            self.gradients[number] = (f"the gradient behind {name}", at, gradient.detach().clone())

        output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    def _exchanged(self, given: Any) -> Any:
        """Inputs where each moved example has the values of another; none has a graph."""
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        # With offsets, of one table or of several stacked, a flat list of rows has no example in
        # each row.
        n = 0 if self.moved is None else len(self.moved)
        flat = any(_are_offsets(x) for x in tensors if x.dim() == 1 or x.shape[:1] != (n,))

        def exchanged(x: Tensor) -> Tensor:
            made, at = x.detach(), int(not self.batch_first and x.dim() > 1)
            is_one_each = self.moved is not None and x.shape[at : at + 1] == self.moved.shape
            if is_one_each and self.moved is not None and not (flat and x.dim() == 1):
                made = torch.where(_along(self.moved, at, x), made.narrow(at, self.like, 1), made)
            return made.requires_grad_(x.requires_grad)

        return tree_map_only(Tensor, exchanged, given)


def refuse_moved_rows(still: Probe, moved: Probe, examples: int) -> None:
    """Refuse a model where what it made of the examples that were not moved is not what it was.

    Raises:
        UsageError: naming what moved.
    """
    kept = torch.ones(examples, dtype=torch.bool) if moved.moved is None else ~moved.moved
    if not still.outputs:
        raise UsageError(
            "a model without an output that has a gradient: whether it keeps examples apart cannot "
            "be seen; return tensors, or tuples, lists and dictionaries of tensors"
        )
    first = [*still.shown, *(still.gradients[at] for at in sorted(still.gradients))]
    second = [*moved.shown, *(moved.gradients[at] for at in sorted(moved.gradients))]
    if [n for n, _, _ in first] != [n for n, _, _ in second]:
        _refuse("which layers are called", moved)
    for (name, at, one), (_, _, two) in zip(first, second, strict=True):
        if one.shape[at : at + 1] == (examples,) and not _same(one, two, at, kept):
            _refuse(name, moved)
    for one, two in zip(still.outputs, moved.outputs, strict=True):
        if one.numel() == 1:
            continue  # a loss of all examples, seen by its gradients alone
        places = still.places(one, examples)
        if not places and one.shape[0] % examples == 0:  # positions of each example in turn
            one, two, places = one.view(examples, -1), two.reshape(examples, -1), [0]
        if not places:
            raise UsageError(
                f"an output of shape {tuple(one.shape)} of a model whose layers saw {examples} "
                "examples: the first dimension must be the example; with positions first give "
                "batch_first=False"
            )
        if not any(_same(one, two, at, kept) for at in places):
            _refuse("the model's output", moved)


def _refuse(what: str, moved: Probe) -> NoReturn:
    if moved.moved is None:
        raise UsageError(
            f"{what} differs between two passes over the same batch: what a model keeps from one "
            "pass to the next may carry examples; keep no state, and draw from torch's generator"
        )
    raise UsageError(
        f"one example changes {what} for others: the model mixes the examples of a batch, so that "
        "no clipping bounds what one of them moves. Use GroupNorm or LayerNorm, mix nothing along "
        "the first dimension, and with positions first give batch_first=False"
    )


def _same(one: Tensor, two: Tensor, at: int, kept: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    a, b = (x.movedim(at, 0)[kept].nan_to_num() for x in (one, two))
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=0.0)


def _along(mask: Tensor, at: int, like: Tensor) -> Tensor:
    return mask.reshape(*[1] * at, -1, *[1] * (like.dim() - at - 1))


def _are_offsets(x: Tensor) -> bool:
    is_list = 1 <= x.dim() <= 2 and x.shape[-1] > 1 and not x.is_floating_point()
    if not is_list or x.dtype == torch.bool:
        return False
    return bool((x[..., 0] == 0).all()) and bool((x[..., 1:] >= x[..., :-1]).all())
