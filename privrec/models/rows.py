"""Adam whose state belongs to rows: a row that has no gradient costs nothing and keeps everything.

A sparse gradient names rows. Moments and the count of steps are looked up by those names, so two
batches with other active neurons in other orders never mix what is kept. Counts are the row's own:
the first step of a row is as long as that of any other, however late it comes.
Sources: Kingma & Ba, "Adam" (ICLR 2015), per row; a row without a gradient takes no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from privrec.errors import UsageError

_AT_ONCE = 1 << 17  # floats


class RowAdam(torch.optim.Optimizer):
    """Adam by rows, for sparse and dense gradients; a dense one moves every row.

    Args:
        params: parameters, or groups of them; a row is what their first index names.
        lr: step size, above 0.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment, above 0.

    Raises:
        UsageError: when a value is out of its range.
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["first"], state["second"] = (
                torch.zeros_like(parameter),
                torch.zeros_like(parameter),
            )
            state["steps"] = torch.zeros(len(parameter), dtype=torch.int32)
        first, second, steps = state["first"], state["second"], state["steps"]
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows = gradient._indices()[0]
            values = gradient._values()
        else:
            rows, values = torch.arange(len(parameter)), gradient
        # In parts that a cache holds: copies of all active rows would cost more than the layer's.
        size = max(1, _AT_ONCE // max(1, parameter[0].numel()))
        for part, change in zip(torch.split(rows, size), torch.split(values, size), strict=True):
            few = (first[part], second[part], steps[part])
            moved = _adam(change, *few, group)
            for kept, new in zip((first, second, steps), few, strict=True):
                kept.index_copy_(0, part, new)
            parameter.index_add_(0, part, moved)


def _adam(
    values: Tensor, first: Tensor, second: Tensor, steps: Tensor, group: dict[str, Any]
) -> Tensor:
    """Change of some rows; their moments and counts are brought up to date in place."""
    one, two = group["betas"]
    steps += 1
    first.lerp_(values, 1 - one)
    second.mul_(two).addcmul_(values, values, value=1 - two)
    shape = (-1, *(1,) * (values.dim() - 1))
    count = steps.to(torch.float32).view(shape)
    root = (second / (1 - two**count)).sqrt_().add_(group["eps"])
    change: Tensor = (first / (1 - one**count)).div_(root).mul_(-group["lr"])
    return change
