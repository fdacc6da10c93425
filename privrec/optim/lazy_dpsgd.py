"""DP-SGD at the price of the rows that a batch touches.

:class:`LazyDPSGD` clips by ghost norms, so that no per-example gradient of a table is ever made,
adds noise to dense parameters in each step, and lets the rows of embedding tables owe theirs until
somebody reads them. It is the usual subsampled Gaussian mechanism: Opacus' accountants attach to it
as to Opacus' own optimiser. They assume Poisson batches, which :func:`poisson_loader` makes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from itertools import chain
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from privrec.errors import UsageError
from privrec.optim.capture import COMPILED, Capture
from privrec.optim.ghost import Lookups, TableLayer, joined
from privrec.optim.parameter import make_lazy, make_plain
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.pending import LinearStep, Normals
from privrec.randomness import ROOT_BYTES, SecretRoot

_SHORT = 1 - 1e-5  # norms are float32 sums; what they may be too small by is taken off the bound
_WORD = 2**32
_LINEAR = {"lr", "momentum", "weight_decay", "nesterov"}


class LazyDPSGD(torch.optim.Optimizer):
    """SGD with clipping and noise, where embedding rows owe their noise until they are read.

    Promise: what the model shows, at any time and by any way, has the law of DP-SGD with noise of
    ``noise_multiplier · max_grad_norm`` on the sum of clipped gradients in every step; one example
    moves that sum by at most ``max_grad_norm``. A step without a backward pass is noise alone, as
    for an empty batch. Values out of their range and layers that cannot be clipped are refused.

    Args:
        model: its embedding weights become lazy, in place, until :meth:`close`. A model that
            Opacus wrapped is used without Opacus' own hooks. It must keep the examples of a batch
            apart; before the first training pass that is looked at, at the price of four passes.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``; at least 0.
        max_grad_norm: ``C``, above 0.
        expected_batch_size: what the sum is divided by; a public constant, never the batch's size.
        loss_reduction: over the examples of a pass.
        params: parameters or groups, as ``torch.optim`` takes them; all that are trainable when
            None. What is frozen at a step stays as it is, and owes that step no noise.
        batch_first: whether the outputs of ``Linear``, ``Embedding``, ``LayerNorm`` and ``RMSNorm``
            of three or more dimensions have the examples first; when False, they come second.
        root: the secret to draw from; one is drawn from the operating system when None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        loss_reduction: Literal["mean", "sum"] = "mean",
        params: Iterable[Any] | None = None,
        batch_first: bool = True,
        root: SecretRoot | None = None,
    ) -> None:
        if hasattr(model, "_orig_mod"):
            raise UsageError(COMPILED)
        # The model itself, without the hooks by which Opacus makes per-example gradients.
        inner = getattr(model, "_module", None)
        if isinstance(inner, nn.Module) and hasattr(model, "remove_hooks"):
            cast(Any, model).remove_hooks()
            model = inner
        self._model, self.loss_reduction = model, loss_reduction
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.expected_batch_size = expected_batch_size
        self.step_hook: Callable[[LazyDPSGD], None] | None = None
        self._skips: list[bool] = []
        trainable = [p for p in model.parameters() if p.requires_grad]
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(trainable if params is None else params, given)
        self._capture = Capture(self._model, self._follow, batch_first)
        self._noise = Normals(root)
        self.tables: dict[nn.Parameter, LazyMemory] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._lookups: dict[nn.Parameter, list[Lookups]] = {}
        self._bound: float | None = None
        try:
            self._follow()
        except BaseException:
            self.close()  # no hook stays on a model that was refused
            raise
        self.zero_grad()

    @classmethod
    def replacing(cls, optimizer: Any, model: nn.Module, **options: Any) -> LazyDPSGD:
        """The lazy form of a ``torch.optim.SGD``, or of Opacus' ``DPOptimizer`` around one.

        That optimiser is read, and must not step any more. ``options`` are further arguments of the
        class; those of a ``DPOptimizer`` are taken from it. It is refused where its steps are not
        linear in what owes noise.
        """
        given: dict[str, Any] = {}
        inner = optimizer
        if hasattr(optimizer, "original_optimizer"):
            if type(optimizer).__name__ != "DPOptimizer":
                raise UsageError(
                    f"{type(optimizer).__name__}: lazy noise clips all parameters together by a "
                    "bound that does not adapt to values that still owe noise; use Opacus' flat "
                    'clipping (clipping="flat"), or keep the noise eager'
                )
            inner = optimizer.original_optimizer
            names = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction")
            given = {name: getattr(optimizer, name) for name in names}
        if type(inner) is not torch.optim.SGD:
            raise UsageError(
                f"{type(inner).__name__}: its step sizes depend on noise that is not drawn yet; "
                "use torch.optim.SGD, with momentum and weight decay if you like, or keep the "
                "noise eager"
            )
        for group in inner.param_groups:
            _update(group)
        groups = [{key: group[key] for key in (*_LINEAR, "params")} for group in inner.param_groups]
        first = {key: groups[0][key] for key in _LINEAR}
        return cls(model, params=groups, **{**first, **given, **options})

    def accumulate(self) -> None:
        """Clip the examples of the last pass and add them to the step's sum.

        :meth:`step` does it for the last pass; call it after each backward pass but the last when a
        batch is cut into microbatches of other examples each. A second pass over the same examples
        is to the optimiser a pass over other ones, and moves the sum once more. Gradients that came
        by a way where they are not clipped, in two passes, or in a pass that was taken already are
        refused, and the step's sum is left as it was.
        """
        examples, records = self._capture.take()
        others = [name for p, name in self._names.items() if p.grad is not None]
        if others:
            self.zero_grad()
            raise UsageError(
                f"{', '.join(others)} got a gradient by another way than its own layer, where it "
                "cannot be clipped: call the layer, and leave its weight out of the loss; for a "
                "penalty on weights give weight_decay"
            )
        if not examples:
            return
        if self._bound not in (None, self.max_grad_norm):
            raise UsageError(
                f"max_grad_norm = {self.max_grad_norm}, and {self._bound} for examples that are in "
                "the same step's sum: change it between steps alone"
            )
        self._bound = self.max_grad_norm
        if self.loss_reduction == "mean":
            for record in chain(*records.values()):
                record.gradient = record.gradient * examples
        squared = torch.zeros(examples, dtype=torch.float64)
        for module, each in records.items():
            squared += self._capture.layers[module].squared_norms(each, examples)
        norms = squared.sqrt()
        factors = (self.max_grad_norm * _SHORT / norms).clamp_(max=1.0)
        # An example whose gradient is not a number counts as none, as if it had dropped out.
        factors = torch.where(norms.isfinite(), factors, 0.0).to(torch.float32)
        for module, each in records.items():
            layer = self._capture.layers[module]
            found = layer.clipped(each, factors)
            if isinstance(layer, TableLayer):
                self._lookups.setdefault(cast(nn.Parameter, module.weight), []).extend(found)
            else:
                for parameter, total in found.items():
                    self._sums[parameter] = total + self._sums.get(parameter, 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip what is left to clip, add noise, and take one step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._follow()
        self.accumulate()
        if self._skips and self._skips.pop(0):
            return loss
        if self.step_hook is not None:
            self.step_hook(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                step = self._step_table if parameter in self.tables else self._step_dense
                step(parameter, group)
        self._sums.clear()
        self._lookups.clear()
        self._bound = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the last pass; what :meth:`accumulate` added up stays."""
        self._capture.forget()
        super().zero_grad(set_to_none=True)

    def attach_step_hook(self, hook: Callable[[LazyDPSGD], None]) -> None:
        """Call ``hook(self)`` in each step: an accountant's ``get_optimizer_hook_fn(rate)``."""
        self.step_hook = hook

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Let a coming :meth:`step` only accumulate, as Opacus' ``BatchMemoryManager`` asks."""
        self._skips.append(do_skip)

    @property
    def accumulated_iterations(self) -> int:
        """Batches that one step stands for, which is 1; Opacus' accountants ask."""
        return 1

    def settle(self) -> None:
        """Draw all noise that is owed; reading the model does so by itself."""
        for memory in self.tables.values():
            memory.settle()

    def close(self) -> None:
        """Settle, take the hooks off, and leave an ordinary model behind."""
        for parameter in self.tables:
            make_plain(parameter)
        self.tables = {}
        self._capture.remove()
        self.param_groups.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state as of ``torch.optim.SGD``, settled; momentum of tables included."""
        for parameter, memory in self.tables.items():
            velocities = memory.velocities()
            if velocities is not None:
                self.state[parameter]["momentum_buffer"] = torch.from_numpy(velocities)
        try:
            return super().state_dict()
        finally:
            for parameter in self.tables:
                self.state.pop(parameter, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the model has a state of its own to load."""
        super().load_state_dict(state_dict)
        self._follow()
        for parameter, memory in self.tables.items():
            held = self.state.pop(parameter, {}).get("momentum_buffer")
            if held is not None and memory.is_moving:
                memory.load_velocities(held.numpy())

    def _follow(self) -> None:
        """Take over what became of the model and of the groups since the last step."""
        self._check()
        groups = {p: group for group in self.param_groups for p in group["params"]}
        self._names = self._capture.follow()
        others = [tuple(p.shape) for p in groups.keys() - set(self._model.parameters())]
        if others:
            raise UsageError(
                f"parameters of shapes {others} in param_groups that are not the model's: nothing "
                "clips their gradients; leave them out, or make them part of the model"
            )
        missing = [name for parameter, name in self._names.items() if parameter not in groups]
        if missing:
            raise UsageError(
                f"the optimiser was not given all trainable parameters: {', '.join(missing)} would "
                "never be clipped; add_param_group() them, or freeze them"
            )
        layers = self._capture.layers.items()
        tables: set[Any] = {m.weight for m, layer in layers if isinstance(layer, TableLayer)}
        for group in self.param_groups:
            update = _update(group)
            is_moving = bool(update.momentum or update.weight_decay)
            for weight in tables.intersection(group["params"]):
                memory = self.tables.get(weight)
                if memory is not None and (memory.is_moving or not is_moving):
                    continue
                if memory is not None:
                    make_plain(weight)  # it owes nothing then, and begins to move from rest
                self.tables[weight] = make_lazy(weight, self._noise, moving=is_moving)
                weight._open = False

    def _check(self) -> None:
        noise = self.noise_multiplier
        if not (math.isfinite(noise) and noise >= 0):
            raise UsageError(f"noise_multiplier = {noise}: it must be finite and at least 0")
        for name in ("max_grad_norm", "expected_batch_size"):
            value = getattr(self, name)
            if not (value is not None and math.isfinite(value) and value > 0):
                raise UsageError(f"{name} = {value}: it must be finite and above 0")
        if self.loss_reduction not in ("mean", "sum"):
            raise UsageError(f'loss_reduction = {self.loss_reduction!r}: must be "mean" or "sum"')
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UsageError(
                "LazyDPSGD in a torch.distributed group: each process would settle with noise of "
                "its own; train a table in one process"
            )

    def _variance(self) -> float:
        """Of the noise in each coefficient of the gradient."""
        return (self.noise_multiplier * self.max_grad_norm / self.expected_batch_size) ** 2

    def _step_table(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        memory, update = self.tables[parameter], _update(group)
        step, scale = (update, 1.0) if memory.is_moving else (None, -update.lr)
        parts = self._lookups.get(parameter, [])
        rows, which, vectors = joined(parts, memory.shape[1], scale / self.expected_batch_size)
        taken = vectors.numpy().astype(memory.dtype, copy=False)
        memory.step(rows.numpy(), taken, self._variance() * scale**2, step, which=which.numpy())
        # A graph from before the step must not look at rows that owe its noise.
        torch.autograd.graph.increment_version(cast(Any, parameter)._raw)

    def _step_dense(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = np.zeros((1, parameter.numel()), np.float32)
        if self.noise_multiplier:
            self._noise.add(gradient, np.array([self._variance()]))
        private = torch.from_numpy(gradient).reshape(parameter.shape)
        total = self._sums.get(parameter)
        if total is not None:
            private = private + total / self.expected_batch_size
        private = private.to(parameter.dtype)  # rounded with its noise, not before
        if group["weight_decay"]:
            private = private + group["weight_decay"] * parameter
        if group["momentum"]:
            state = self.state[parameter]
            speed = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
            speed.mul_(group["momentum"]).add_(private)
            private = private + group["momentum"] * speed if group["nesterov"] else speed
        parameter.add_(private, alpha=-group["lr"])


def _update(group: dict[str, Any]) -> LinearStep:
    for name in ("dampening", "maximize"):
        if group.get(name):
            raise UsageError(f"torch.optim.SGD({name}={group[name]}): leave it at its default")
    numbers = {name: float(group[name]) for name in _LINEAR - {"nesterov"}}
    return LinearStep(**numbers, nesterov=bool(group["nesterov"]))


class PoissonSampler(Sampler[list[int]]):
    """Batches of examples that are each in with probability ``rate``, independently.

    Promise: coins come from the secure generator; the rate is never above the one given (it is
    rounded down to a multiple of 2^-32). Batches may be empty, and must be stepped on all the same.
    """

    def __init__(
        self, examples: int, rate: float, steps: int, root: SecretRoot | None = None
    ) -> None:
        if not (examples >= 1 and 0 < rate <= 1 and steps >= 1):
            raise UsageError(
                f"{steps} Poisson batches at rate {rate} of {examples} examples: there must be at "
                "least one of each, and the rate above 0 and at most 1"
            )
        self._examples, self._steps, self._below = examples, steps, int(rate * _WORD)
        self._root, self._drawn = root or SecretRoot(secrets.token_bytes(ROOT_BYTES)), 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._steps):
            self._drawn += 1
            coins = self._root.stream("poisson batch", self._drawn).uint32(self._examples)
            yield np.flatnonzero(coins.astype(np.int64) < self._below).tolist()


def poisson_loader(
    dataset: Dataset[Any], rate: float, steps: int, *, root: SecretRoot | None = None
) -> DataLoader[Any]:
    """A loader of ``steps`` Poisson batches of a map-style data set; see :class:`PoissonSampler`.

    The data set has a length, at least one example, and what ``default_collate`` takes; others are
    refused. An empty batch has the structure of a full one, with tensors of length 0.
    """
    if not isinstance(dataset, Sized):
        raise UsageError(
            f"Poisson batches of {type(dataset).__name__}: each example has a coin of its own, "
            "which needs a data set with a length and an index"
        )
    sampler = PoissonSampler(len(dataset), rate, steps, root)
    first = [dataset[0]]
    try:
        default_collate(first)
    except (TypeError, RuntimeError) as error:
        raise UsageError(
            f"examples that cannot be put into a batch: {error} Make each of tensors, numbers, "
            "texts, and tuples, lists or mappings of those"
        ) from error
    empty: dict[Any, Callable[..., Any]] = {
        kind: partial(_emptied, make) for kind, make in default_collate_fn_map.items()
    }

    def made(examples: list[Any]) -> Any:
        return default_collate(examples) if examples else collate(first, collate_fn_map=empty)

    return DataLoader(dataset, batch_sampler=sampler, collate_fn=made)


def _emptied(make: Callable[..., Any], batch: Any, **options: Any) -> Any:
    return make(batch, **options)[:0]
