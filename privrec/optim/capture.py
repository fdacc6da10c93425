"""What each layer of a model saw in one pass: the raw material of clipping.

While a layer works in a pass that will be differentiated, its trainable parameters are replaced by
aliases without a gradient. So autograd spends nothing on gradients of whole batches, and whatever
gradient a parameter does get came by another way than through its layer.

Clipping bounds nobody unless the model keeps the examples of a batch apart. Layers that are known
to mix them are refused by type. Any other model is run on a batch, again as it is, and after one
example was changed, and all but one: what it makes of the others must stay what it was. That finds
what mixes by construction; a model that mixes on rare inputs alone is its user's to avoid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from privrec.errors import UsageError
from privrec.optim.ghost import Layer, Record, layer_of
from privrec.optim.parameter import LazyParameter

# Layers that take positions before or after the examples; images have the examples first always.
_ANY_LEADING = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
COMPILED = (
    "a compiled model: what its layers see cannot be recorded; train the model that was given to "
    "torch.compile, and compile it after close()"
)
_ENOUGH = 3  # examples, so that one has others before and after it
_TOLERANCE = 1e-5

Records = dict[nn.Module, list[Record]]


class _Pass:
    """One forward pass; when its examples are in a step's sum, they must not come again."""

    is_taken = False


class Capture:
    """Hooks on a model's layers, and the records of the pass that is going on.

    Promise: the examples of one pass are one batch and count once; a second pass before
    :meth:`take` is refused, since its first example is not the first example of the first pass.
    Layers are those with trainable parameters at each pass, before which ``prepare`` is called.
    Once in each mode of the model, a pass is preceded by a look at whether it keeps examples apart.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[], None], batch_first: bool) -> None:
        self.layers: dict[nn.Module, Layer] = {}
        self._model, self._prepare, self._batch_first = model, prepare, batch_first
        self._records: Records = {}
        self._passes: set[_Pass] = set()
        self._now: _Pass | None = None
        self._last = _Pass()
        self._probe: Probe | None = None
        self._looked: set[tuple[bool, ...]] = set()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._hooked: set[nn.Module] = set()
        self._aliased: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._source = torch.zeros(0, requires_grad=True)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True),
            model.register_forward_hook(_Hook(self._end), always_call=True),
        ]

    def follow(self) -> dict[nn.Parameter, str]:
        """Hook the layers with trainable parameters, or refuse them, and name the parameters."""
        for layer in [*self._aliased]:
            self._restore(layer)  # a pass was interrupted, as in a notebook
        names: dict[nn.Parameter, str] = {}
        for name, module in reversed(list(self._model.named_modules())):
            _refuse_mixing(name, module)
            prefix = name and f"{name}."
            is_owner = False
            for key, parameter in _trained(module).items():
                owner = names.get(parameter)
                if owner is None:
                    names[parameter], is_owner = prefix + key, True
                elif not (owner.startswith(prefix) and "." in owner[len(prefix) :]):
                    raise UsageError(
                        f"layers share a parameter, {prefix + key!r} and {owner!r}: what one "
                        "example moves would be clipped twice and not once; give each its own"
                    )
                # What a module keeps of its own child, as Opacus' DPLSTM does, is the child's.
                # If it is used there too, its gradient comes by another way and is refused.
            if is_owner and module not in self.layers:
                self.layers[module] = layer_of(module, name)
            if module._parameters and module not in self._hooked:
                self._hooked.add(module)
                leave = {"prepend": True, "with_kwargs": True, "always_call": True}
                self._handles.append(module.register_forward_pre_hook(_Hook(self._enter)))
                self._handles.append(module.register_forward_hook(_Hook(self._leave), **leave))
        return names

    def take(self) -> tuple[int, Records]:
        """The number of examples and the records of the pass; none are kept."""
        records, passes = self._records, self._passes
        self.forget()
        if len(passes) > 1:
            raise UsageError(
                f"gradients of {len(passes)} forward passes before one step: where each pass holds "
                "other examples, call accumulate() after each backward pass; where they hold the "
                "same ones, make one pass and add their losses, or an example counts in each"
            )
        return _agreed(len(use.gradient) for uses in records.values() for use in uses), records

    def forget(self) -> None:
        """Drop the records of the pass; its examples are not asked for again."""
        for each in self._passes:
            each.is_taken = True
        self._records, self._passes = {}, set()

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback():
            raise UsageError(COMPILED)
        if self._probe is not None or not (torch.is_grad_enabled() or model.training):
            return
        self._prepare()
        self._buffers = self._versions()
        mode = tuple(state for m in model.modules() for state in (m.training, m in self.layers))
        if torch.is_grad_enabled() and self.layers and mode not in self._looked:
            if self._look(inputs, named) >= _ENOUGH:
                self._looked.add(mode)
        self._now = self._last = _Pass()

    def _end(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._probe is None and self._now is not None:
            self._now = None
            self._refuse_changes({})

    def _refuse_changes(self, values: Mapping[str, Tensor]) -> None:
        """Refuse buffers that changed since the pass began, or that have not these values."""
        now, versions = dict(self._model.named_buffers()), self._versions()
        changed = {name for name, _ in versions.items() ^ self._buffers.items()}
        for name in values.keys() - changed:
            if not torch.allclose(values[name], now[name], 0, 0, equal_nan=True):
                changed.add(name)
        if changed:
            raise UsageError(
                f"buffers {', '.join(sorted(changed))} change in a training pass: what they take "
                "from the examples has no noise and would leave with the model; put their layers "
                "into eval(), or use layers that keep no statistics, as GroupNorm and LayerNorm"
            )

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {name: (id(b), b._version) for name, b in self._model.named_buffers()}

    def _look(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
        """Number of examples of a pass, after it was looked at whether one moves another."""

        def run(moved: Tensor | None = None, like: int = 0) -> Probe:
            self._probe = Probe(self._batch_first, moved, like)
            try:
                with torch.random.fork_rng(devices=[]), torch.enable_grad():
                    self._probe.run(self._model, inputs, named)
                return self._probe
            finally:
                self._probe = None

        before = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        first = run()
        n = _agreed(first.counts)
        if n > 1:
            one = torch.arange(n) == n // 2
            for moved, like in ((one, n // 2 - 1), (~one, n // 2), (None, 0)):
                _refuse_moved(first, run(moved, like), n)
        # What is written through .data leaves no trace but its values.
        self._refuse_changes(before)
        return n

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or layer not in self.layers or not (own := _trained(layer)):
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise UsageError(
                "a layer inside vmap or another transform of torch.func: what it sees is not a "
                "batch; call it on the batch"
            )
        # Recomputing a checkpoint calls layers after their model has returned, within backward.
        recomputing = torch._C._current_graph_task_id() != -1
        if self._now is None and self._probe is None and not recomputing:
            raise UsageError(
                "a layer was called outside of its model: call the model that the optimiser was "
                "made for, so that the examples of one pass are known"
            )
        self._aliased[layer] = own
        for key, parameter in own.items():
            if isinstance(parameter, LazyParameter):
                parameter._open = True
            else:
                layer._parameters[key] = parameter.detach()  # type: ignore[assignment]

    def _restore(self, layer: nn.Module) -> bool:
        own = self._aliased.pop(layer, {})
        for key, parameter in own.items():
            if isinstance(parameter, LazyParameter):
                parameter._open = False
            else:
                layer._parameters[key] = parameter
        return bool(own)

    def _leave(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        if not self._restore(layer) or not isinstance(output, Tensor):
            return None  # an error is on its way, or layer_of() would not know the layer
        if output.is_leaf:
            output = _Source.apply(output, self._source)  # type: ignore[no-untyped-call]
        if output.dim() < (layer.weight.dim() if isinstance(layer, _ConvNd) else 2):
            raise UsageError(
                f"an output of {type(layer).__name__} of shape {tuple(output.shape)}, without a "
                "dimension for the examples: give a batch, of one example with unsqueeze(0)"
            )
        turned = not self._batch_first and isinstance(layer, _ANY_LEADING) and output.dim() > 2
        if self._probe is not None:
            return self._probe.seen(layer, inputs, output, int(turned))
        passed = self._now or self._last
        if not inputs:
            named = dict(named)
            inputs = (named.pop("input" if "input" in named else next(iter(named))),)
        tensors = [x for x in tree_leaves((inputs, named)) if isinstance(x, Tensor)]
        versions = [x._version for x in tensors]

        def keep(gradient: Tensor) -> None:
            if passed.is_taken:
                raise UsageError(
                    "a backward pass through examples that are in the step's sum already: an "
                    "example would count once more; add the losses of one pass, and call "
                    "backward() on the sum"
                )
            if torch.is_grad_enabled():
                raise UsageError(
                    "a backward pass with create_graph=True: gradients of gradients are not "
                    "clipped; leave it out"
                )
            if versions != [x._version for x in tensors]:
                raise UsageError(
                    f"what came into {type(layer).__name__} was changed in place before the "
                    "backward pass: its gradient is not known any more; change a copy"
                )
            self._passes.add(passed)
            record = Record(*_plain((inputs, named, gradient), turned))
            self._records.setdefault(layer, []).append(record)

        output.register_hook(keep)
        return output


def _trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's own trainable parameters by name."""
    return {k: p for k, p in layer._parameters.items() if p is not None and p.requires_grad}


class _Source(torch.autograd.Function):
    """The same values where gradients begin: no leaf, so that they may be changed in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class _Hook:
    """A hook that stays with its model: in copies and pickles of the model it does nothing."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *given: Any) -> Any:
        return self._call and self._call(*given)

    def __reduce__(self) -> Any:
        return _Hook, ()


def _agreed(seen: Iterable[int]) -> int:
    """The number of examples that all layers saw, 0 when there was none."""
    counts = set(seen)
    if len(counts) > 1:
        raise UsageError(
            f"layers that saw {sorted(counts)} examples in one pass: the first dimension of every "
            "layer's output must be the example, with one bag an example in each table; with "
            "positions first give batch_first=False, and what all examples share expand() to a row "
            "for each"
        )
    return next(iter(counts), 0)


def _plain(values: Any, turned: bool) -> Any:
    """Without their graph, examples first, and no shorter than float32, so that norms are exact."""

    def plain(value: Tensor) -> Tensor:
        is_short = value.dtype in (torch.float16, torch.bfloat16)
        value = value.detach().float() if is_short else value.detach()
        return value.transpose(0, 1) if turned else value

    return tree_map_only(Tensor, plain, values)


def _refuse_mixing(name: str, layer: nn.Module) -> None:
    """Refuse a layer that mixes the examples of a batch as it stands, trained or not."""
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

    All are moved by a little, so that weights which are still zero let through what they will let
    through later. The examples that are ``moved`` are given the inputs of the one that they are to
    be ``like``, which so stay valid. Where that is all but one, no statistic of the batch is left
    of the others.
    """

    def __init__(self, batch_first: bool, moved: Tensor | None, like: int) -> None:
        self.counts: set[int] = set()  # what the layers take for the number of examples
        # What came in and out of each layer, and the gradients behind it that there were: a name,
        # the examples' dimension, and values.
        self.shown: list[tuple[str, int, Tensor | None]] = []
        self.outputs: list[Tensor] = []  # what the model gives that has a gradient, scalars too
        self.batch_first, self.moved, self.like = batch_first, moved, like

    def run(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Run the model forth and back, and keep what it and its layers make of the examples."""
        inputs, named = self._exchanged((inputs, named))
        leaves = tree_leaves(model(*inputs, **named))
        given = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        weights = [torch.ones_like(x) for x in given]
        for weight in weights:
            if self.moved is not None and (at := self.places(weight, len(self.moved))):
                weight += _along(self.moved, at[0], weight)
        self.outputs = [x.detach().clone() for x in given]
        torch.autograd.backward(given, weights)

    def places(self, output: Tensor, examples: int) -> list[int]:
        """Dimensions of an output that may be the examples."""
        places = [0] if self.batch_first else [1, 0]
        return [at for at in places if output.dim() > at and output.shape[at] == examples]

    def seen(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, at: int) -> Tensor:
        """Keep what came in and out of a layer, and give what goes on in its place."""
        name, value = f"a {type(layer).__name__}", inputs[0] if inputs else None
        self.counts.add(output.shape[at])
        if isinstance(value, Tensor) and value.is_floating_point():
            self.shown.append((f"what comes into {name}", at, value.detach().clone()))
        self.shown.append((f"the output of {name}", at, output.detach()))
        place, behind = len(self.shown), f"the gradient behind {name}"
        self.shown.append((behind, at, None))
        # Neither symmetric nor of one sign, so that sums, means and maxima all feel it.
        each = output[:1] if at == 0 else output[:, :1]
        wave = torch.cos(torch.arange(each.numel(), dtype=output.dtype)).reshape(each.shape) + 0.5
        rest = [d for d in range(output.dim()) if d != at]
        wave = wave * (1 + output.detach().abs().mean(rest, keepdim=True) if rest else 1)
        output = output + 0.1 * wave
        if self.moved is not None and output.shape[at] == len(self.moved):
            output = output + torch.where(_along(self.moved, at, output), wave, 0.0)

        def keep(gradient: Tensor) -> None:
            self.shown[place] = (behind, at, gradient.detach().clone())

        output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    def _exchanged(self, given: Any) -> Any:
        """Inputs where each moved example has the values of another; none has a graph."""
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        n = 0 if self.moved is None else len(self.moved)
        # With offsets, of one table or of several, a flat list of rows has no example in each row.
        flat = any(_are_offsets(x) for x in tensors if x.dim() == 1 or x.shape[:1] != (n,))

        def exchanged(x: Tensor) -> Tensor:
            made, at = x.detach(), int(not self.batch_first and x.dim() > 1)
            is_one_each = x.shape[at : at + 1] == (n,) and not (flat and x.dim() == 1)
            if self.moved is not None and is_one_each:
                made = torch.where(_along(self.moved, at, x), made.narrow(at, self.like, 1), made)
            return made.requires_grad_(x.requires_grad)

        return tree_map_only(Tensor, exchanged, given)


def _refuse_moved(still: Probe, moved: Probe, examples: int) -> None:
    """Refuse a model where what it made of the examples that were not moved is not what it was."""
    kept = torch.ones(examples, dtype=torch.bool) if moved.moved is None else ~moved.moved
    if not still.outputs:
        raise UsageError(
            "a model without an output that has a gradient: whether it keeps examples apart cannot "
            "be seen; return tensors, or tuples, lists and dictionaries of tensors"
        )
    calls = [[(name, x is None) for name, _, x in probe.shown] for probe in (still, moved)]
    if calls[0] != calls[1]:
        _refuse("which layers are called", moved)
    for (name, at, one), (_, _, two) in zip(still.shown, moved.shown, strict=True):
        if one is None or two is None or one.shape[at : at + 1] != (examples,):
            continue
        if not _same(one, two, at, kept):
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
    is_list = 1 <= x.dim() <= 2 and x.shape[-1] > 1
    is_list = is_list and not x.is_floating_point() and x.dtype != torch.bool
    return is_list and bool((x[..., 0] == 0).all() and (x[..., 1:] >= x[..., :-1]).all())
