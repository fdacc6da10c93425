"""What each layer of a model saw in one pass: the raw material of clipping.

While a layer works in a pass that will be differentiated, its trainable parameters are replaced by
aliases that have no gradient. So autograd spends nothing on gradients of whole batches, and
whatever gradient a parameter does get came by another way than through its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from privrec.errors import UsageError
from privrec.optim.apart import Probe, refuse_mixing, refuse_moved_rows
from privrec.optim.ghost import Layer, Record, layer_of
from privrec.optim.parameter import LazyParameter

# Layers that take positions before or after the examples; images have the examples first always.
_ANY_LEADING = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
COMPILED = (
    "a compiled model: what its layers see cannot be recorded; train the model that was given to "
    "torch.compile, and compile it after close()"
)
_ENOUGH = 3  # examples, so that one has others before and after it


class _Pass:
    """One forward pass; when its examples are in a step's sum, they must not come again."""

    is_taken = False


class Capture:
    """Hooks on a model's layers, and the records of the pass that is going on.

    Promise: the examples of one pass are one batch and count once; a second pass before
    :meth:`take` is refused, since its first example is not the first example of the first pass.
    The layers are those with trainable parameters as the model stands at each pass. Once in each
    mode of the model, a pass is preceded by a look at whether it keeps examples apart.

    Args:
        model: its trainable parameters must all belong to layers that can be clipped, each to one.
        prepare: called before each training pass.
        batch_first: False when layers' outputs of three dimensions have positions first.
    """

    def __init__(
        self, model: nn.Module, prepare: Callable[[], None], *, batch_first: bool = True
    ) -> None:
        self.layers: dict[nn.Module, Layer] = {}
        self._model, self._prepare, self._batch_first = model, prepare, batch_first
        self._records: dict[nn.Module, list[Record]] = {}
        self._passes: set[_Pass] = set()
        self._now: _Pass | None = None
        self._last = _Pass()
        self._probe: Probe | None = None
        self._looked: set[tuple[bool, ...]] = set()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._hooked: set[nn.Module] = set()
        self._aliased: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._source = torch.zeros(0, requires_grad=True)
        before, after = _Hook(self._begin), _Hook(self._end)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]

    def follow(self) -> dict[nn.Parameter, str]:
        """Hook the layers with trainable parameters, as the model stands now.

        Returns:
            Each trainable parameter's name.

        Raises:
            UsageError: when a layer cannot be clipped or mixes examples, or two share a parameter.
        """
        for layer in [*self._aliased]:
            self._restore(layer)  # a pass was interrupted, as in a notebook
        names: dict[nn.Parameter, str] = {}
        for name, module in reversed(list(self._model.named_modules())):
            refuse_mixing(name, module)
            prefix = name and f"{name}."
            is_owner = False
            for key, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad:
                    continue
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
                self._handles += [
                    module.register_forward_pre_hook(_Hook(self._enter)),
                    module.register_forward_hook(
                        _Hook(self._leave), prepend=True, with_kwargs=True, always_call=True
                    ),
                ]
        return names

    def take(self) -> tuple[int, dict[nn.Module, list[Record]]]:
        """The number of examples and the records of the pass; none are kept.

        Raises:
            UsageError: when there were two passes, or layers that disagree on the examples.
        """
        records, passes = self._records, self._passes
        self.forget()
        if len(passes) > 1:
            raise UsageError(
                f"gradients of {len(passes)} forward passes before one step: where each pass holds "
                "other examples, call accumulate() after each backward pass; where they hold the "
                "same ones, make one pass and add their losses, or an example counts in each"
            )
        counts = {len(record.gradient) for each in records.values() for record in each}
        if len(counts) > 1:
            raise UsageError(_disagree(counts))
        return (counts.pop() if counts else 0), records

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
        if self._probe is not None or self._now is None:
            return
        self._now = None
        self._refuse_changes()

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {name: (id(b), b._version) for name, b in self._model.named_buffers()}

    def _refuse_changes(self) -> None:
        now = self._versions()
        names = now.keys() | self._buffers.keys()
        self._refuse_buffers([n for n in names if now.get(n) != self._buffers.get(n)])

    def _refuse_buffers(self, changed: list[str]) -> None:
        if changed:
            raise UsageError(
                f"buffers {', '.join(sorted(changed))} change in a training pass: what they take "
                "from the examples has no noise and would leave with the model; put their layers "
                "into eval(), or use layers that keep no statistics, as GroupNorm and LayerNorm"
            )

    def _look(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
        """Number of examples of a pass, after it was looked at whether one moves another."""

        def run(probe: Probe) -> Probe:
            self._probe = probe
            try:
                with torch.random.fork_rng(devices=[]), torch.enable_grad():
                    probe.run(self._model, inputs, named)
            finally:
                self._probe = None
            return probe

        before = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        first = run(Probe(self._batch_first))
        counts = first.counts
        if len(counts) > 1:
            raise UsageError(_disagree(counts))
        n = counts.pop() if counts else 0
        if n > 1:
            one = torch.arange(n) == n // 2
            for moved, like in ((one, n // 2 - 1), (~one, n // 2)):
                refuse_moved_rows(first, run(Probe(self._batch_first, moved, like)), n)
            refuse_moved_rows(first, run(Probe(self._batch_first)), n)
        self._refuse_changes()
        # What is written through .data leaves no other trace.
        after = dict(self._model.named_buffers())
        self._refuse_buffers(
            [k for k, b in before.items() if not torch.allclose(b, after[k], 0, 0, equal_nan=True)]
        )
        return n

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or layer not in self.layers:
            return
        own = {k: p for k, p in layer._parameters.items() if p is not None and p.requires_grad}
        if not own:
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
        if not self._restore(layer):
            return None
        if not isinstance(output, Tensor):
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
        given = inputs, named
        versions = [v._version for v in _tensors(given)]

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
            if versions != [v._version for v in _tensors(given)]:
                raise UsageError(
                    f"what came into {type(layer).__name__} was changed in place before the "
                    "backward pass: its gradient is not known any more; change a copy"
                )
            self._passes.add(passed)
            positional, by_name = _plain(given, turned)
            record = Record(positional, by_name, _plain(gradient, turned))
            self._records.setdefault(layer, []).append(record)

        output.register_hook(keep)
        return output


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

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *given: Any) -> Any:
        return self._call(*given)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*given: Any) -> None:
    return None


def _disagree(counts: set[int]) -> str:
    return (
        f"layers that saw {sorted(counts)} examples in one pass: the first dimension of every "
        "layer's output must be the example, with one bag an example in each table; with positions "
        "first give batch_first=False, and what all examples share expand() to a row for each"
    )


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _plain(values: Any, turned: bool) -> Any:
    """Without their graph, examples first, and no shorter than float32, so that norms are exact."""

    def plain(value: Tensor) -> Tensor:
        value = value.detach()
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        return value.transpose(0, 1) if turned else value

    return tree_map_only(Tensor, plain, values)
