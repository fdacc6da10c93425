"""An embedding weight whose rows owe noise, and that PyTorch can only read settled.

PyTorch hands every function that is given a :class:`LazyParameter` to the parameter first. A lookup
settles the rows that it reads. What asks for shape or type alone is let through. Everything else
settles the whole table first and then works on a copy, so that nobody keeps a view of rows that
will owe noise later: ``state_dict``, ``detach``, ``numpy``, norms, printing, arithmetic.

A few functions of PyTorch ask nobody (``torch.tensor``, ``set_``). They find a single NaN: the rows
themselves are not in the parameter's own storage while it is lazy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from privrec.errors import UsageError
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.pending import Normals

_LOOKUPS = {functional.embedding, functional.embedding_bag, torch.embedding, torch.embedding_bag}
_TELL_NOTHING = """
    shape dtype device layout ndim requires_grad grad grad_fn is_leaf retains_grad is_sparse
    is_sparse_csr is_cuda is_cpu is_meta is_quantized is_mkldnn is_mps is_xpu is_nested names
    itemsize nbytes _version _backward_hooks _post_accumulate_grad_hooks output_nr _base _is_view
    name size dim numel nelement stride storage_offset element_size get_device is_contiguous
    is_floating_point is_complex is_signed is_shared is_pinned is_inference is_same_size __len__
    __hash__ requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad has_names
    _has_names is_conj is_neg
"""
_HARMLESS = frozenset(_TELL_NOTHING.split())  # of any value
_MOVES = {"data:set", "set_", "share_memory_", "resize_", "resize_as_", "swap_"}
# In place, as __iadd__ beside __add__.
_OPERATORS = {
    name for name in dir(Tensor) if name.startswith("__i") and hasattr(Tensor, "__" + name[3:])
}


class LazyParameter(torch.nn.Parameter):
    """A parameter that became lazy; see :func:`make_lazy`."""

    _memory: LazyMemory
    _raw: Tensor  # the rows, in storage that the memory shares
    _open = True  # whether the gradient of a lookup is recorded; set where there are hooks for it

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKUPS:
                return _look_up(func, args, options)
            name = _name(func)
            if name.startswith("_foreach") and name.endswith("_"):
                if any(isinstance(each, LazyParameter) for each in args[0]):
                    raise UsageError(
                        f"{name} would write to a copy of a table that owes noise; "
                        "write to one parameter at a time"
                    )
            if name in _HARMLESS:
                return func(*args, **options)
            inplace = name.endswith("_") and not name.endswith("__")
            inplace |= name in ("__setitem__", "data:set") or name in _OPERATORS
            if isinstance(options.get("out"), LazyParameter) or (
                inplace and isinstance(args[0], LazyParameter)
            ):
                return _write(func, name, args, options)
            return func(*_copied(args), **_copied(options))

    def __copy__(self) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.from_numpy(self._memory.settled()), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        memo[id(self)] = made = self.__copy__()
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        content = torch.from_numpy(self._memory.settled())
        return torch._utils._rebuild_parameter, (content, self.requires_grad, OrderedDict())


def make_lazy(
    parameter: torch.nn.Parameter, source: Normals | None = None, *, moving: bool = False
) -> LazyMemory:
    """Turn an embedding weight into a :class:`LazyParameter`, in place, and return its memory.

    Others than float32 or float64 ``(rows, width)`` on the CPU, and one that is lazy already, are
    refused. Arguments are those of :class:`~privrec.privacy.lazy.LazyMemory`.
    """
    if isinstance(parameter, LazyParameter):
        raise UsageError(
            "this embedding weight is lazy already: close() its optimiser before making another"
        )
    fits = parameter.dtype in (torch.float32, torch.float64) and parameter.dim() == 2
    if parameter.device.type != "cpu" or not fits or not parameter.is_contiguous():
        raise UsageError(
            f"an embedding weight of {parameter.dtype} on {parameter.device}, of shape "
            f"{tuple(parameter.shape)}: lazy noise needs float32 or float64 rows in main memory; "
            "keep the table on the CPU"
        )
    # A copy: views from before, as of pretrained vectors, would see rows that owe noise.
    raw = parameter.detach().clone()
    memory = LazyMemory(raw.numpy(), source, moving=moving)
    parameter.grad = None
    parameter.data = raw.new_full((1, 1), float("nan")).expand(raw.shape)
    parameter.__class__ = LazyParameter
    lazy: Any = parameter
    lazy._memory, lazy._raw = memory, raw
    return memory


def make_plain(parameter: torch.nn.Parameter) -> None:
    """Settle a lazy parameter and make it an ordinary one again, in place."""
    if isinstance(parameter, LazyParameter):
        lazy: Any = parameter
        raw = lazy._raw
        lazy._memory.settle()
        del lazy._memory, lazy._raw
        lazy.__dict__.pop("_open", None)
        lazy.__class__ = torch.nn.Parameter
        lazy.data = raw


class _Read(torch.autograd.Function):
    """A settled copy; its gradient is the parameter's, where the optimiser finds and refuses it."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyParameter) -> Tensor:
        return torch.from_numpy(lazy._memory.settled())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _look_up(func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A lookup: it settles its rows, and its output is where the gradient is taken."""
    lookup = func in (functional.embedding, functional.embedding_bag)
    at = next((i for i, arg in enumerate(args) if isinstance(arg, LazyParameter)), None)
    if not lookup or at != 1:
        raise UsageError(
            "a lookup by other means than torch.nn.functional.embedding and embedding_bag with "
            "(input, weight): the rows it reads are not known; use those"
        )
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        raise UsageError(
            "max_norm or scale_grad_by_freq on a private embedding: both make a step depend on "
            "other rows or examples than its own; leave them out"
        )
    rows, weight = args[0], args[1]
    weight._memory.settle(rows.detach().reshape(-1).numpy())
    if options.get("sparse"):
        options["sparse"] = False  # the raw weight has no gradient that could be sparse
    found = func(rows, weight._raw, *args[2:], **options)
    if torch.is_grad_enabled() and weight.requires_grad:
        found.requires_grad_()
        if not weight._open:
            found.register_hook(_refuse_gradient)
    return found


def _refuse_gradient(gradient: Tensor) -> None:
    raise UsageError(
        "a table got a gradient by another way than its layer: it cannot be clipped; look rows up "
        "by calling the Embedding or EmbeddingBag, and read it by nothing else"
    )


def _write(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    if name in _MOVES:
        raise UsageError(
            f"{name} would move a table away from its noise; close() the optimiser first, "
            "or write with copy_"
        )
    target = next(a for a in (args[0], options.get("out")) if isinstance(a, LazyParameter))
    target._memory.settle()
    given = [target._raw if arg is target else _copied(arg) for arg in args]
    named = {k: target._raw if v is target else _copied(v) for k, v in options.items()}
    result = func(*given, **named)
    return target if result is target._raw else result


def _name(func: Callable[..., Any]) -> str:
    """Name of a function, or of the attribute whose getter it is."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = str(getattr(getattr(func, "__self__", None), "__name__", ""))
        return attribute + ("" if name == "__get__" or attribute in _HARMLESS else ":set")
    return str(name)


def _copied(value: Any) -> Any:
    """With a settled copy, to which gradients flow, in place of each lazy parameter."""
    return tree_map_only(LazyParameter, _Read.apply, value)
