"""What each layer of a model saw in one pass: the raw material of clipping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from privrec.errors import UsageError
from privrec.optim.ghost import Layer, Record, layer_of


class Capture:
    """Hooks on a model's layers, and the records of the pass that is going on.

    Promise: the examples of one pass are one batch; a second pass before :meth:`take` is refused,
    since its first example is not the first example of the first pass.

    Args:
        model: its trainable parameters must all belong to layers that can be clipped, each to one.

    Raises:
        UsageError: when a layer cannot be clipped, or two layers share a parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[nn.Module, Layer] = {}
        self._records: dict[nn.Module, list[Record]] = {}
        self._passes: set[int] = set()
        self._pass = 0
        owners: dict[nn.Parameter, str] = {}
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            for parameter in own:
                if parameter in owners:
                    raise UsageError(
                        f"layers {owners[parameter]!r} and {name!r} share a parameter: what one "
                        "example moves would be clipped twice and not once; give each its own"
                    )
                owners[parameter] = name
            if own:
                self.layers[module] = layer_of(module)
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin)]
        for module in self.layers:
            self._handles.append(module.register_forward_hook(self._watch, with_kwargs=True))

    def take(self) -> tuple[int, dict[nn.Module, list[Record]]]:
        """The number of examples and the records of the pass; none are kept.

        Raises:
            UsageError: when there were two passes, or layers that disagree on the examples.
        """
        records, passes = self._records, self._passes
        self._records, self._passes = {}, set()
        if len(passes) > 1:
            raise UsageError(
                f"backward passes of {len(passes)} forward passes before one step: call "
                "accumulate() after each backward pass"
            )
        counts = {len(record.gradient) for each in records.values() for record in each}
        if len(counts) > 1:
            raise UsageError(
                f"layers that saw {sorted(counts)} examples in one pass: the first dimension of "
                "every layer's output must be the example, with one bag an example in each table"
            )
        return (counts.pop() if counts else 0), records

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._pass += 1

    def _watch(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        if not self._pass:
            raise UsageError(
                "a layer was called outside of its model: call the model that the optimiser was "
                "made for, so that the examples of one pass are known"
            )
        number = self._pass

        def keep(gradient: Tensor) -> None:
            self._passes.add(number)
            made = Record(
                _detached(inputs),
                dict(zip(named, _detached(named.values()), strict=True)),
                gradient,
            )
            self._records.setdefault(layer, []).append(made)

        output.register_hook(keep)  # type: ignore[no-untyped-call]


def _detached(values: Any) -> tuple[Any, ...]:
    return tuple(_each(values))


def _each(values: Any) -> Iterator[Any]:
    for value in values:
        yield value.detach() if isinstance(value, Tensor) else value
