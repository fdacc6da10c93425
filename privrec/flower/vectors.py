"""From the records of a Flower message to one vector of integers, and back.

All float arrays of the model are one vector, in the order in which the record names them. Other
arrays (counters, masks) are not summed and stay what the server sent: a counter of steps would use
up the clip norm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from privrec.device.update import clip
from privrec.errors import UsageError
from privrec.flower.plan import SumPlan
from privrec.secagg.keys import statement
from privrec.secagg.ring import Coins

_COARSE = 0.01  # a weight that its rounding changes by more is reported


def only_arrays(content: RecordDict, whose: str) -> ArrayRecord:
    """The one record of arrays of a message.

    Raises:
        UsageError: when there is none or more than one.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise UsageError(
            f"{whose} with {len(records)} array records: a secure sum takes exactly one; put the "
            "whole model into one ArrayRecord"
        )
    return records[0]


def size_of(arrays: ArrayRecord) -> int:
    """Float coefficients of a model."""
    return sum(values.size for _, values in _floats(arrays))


def update(received: ArrayRecord, returned: ArrayRecord) -> NDArray[np.float32]:
    """New coefficients minus old ones, float32 of shape ``(size,)``; private.

    Raises:
        UsageError: when the app returned arrays of other names or shapes than it was sent.
    """
    if list(received) != list(returned):
        raise UsageError(
            f"arrays {sorted(set(received) ^ set(returned))} are in the model that was sent or in "
            "the one that came back, and not in both, or in another order; return the model's own"
        )
    parts = []
    for name, old in _floats(received):
        new = returned[name].numpy()
        if new.shape != old.shape or new.dtype.kind != "f":
            raise UsageError(
                f"array {name!r} came back as {new.dtype} of shape {new.shape}, and was sent as "
                f"{old.dtype} of shape {old.shape}"
            )
        part = np.empty(old.size, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(new.ravel(), old.ravel(), out=part, casting="unsafe")
        parts.append(part)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def integers(
    plan: SumPlan, values: NDArray[np.float32], metrics: Mapping[str, Any], coins: Coins
) -> NDArray[np.int32]:
    """What a node puts into the sum, before its noise.

    Promise: the coefficients have an integer L2 norm of at most ``plan.encoding.bound``, whatever
    the number of examples says; an update that is not finite becomes zero. Coefficients, weight and
    metrics are scaled by the same weight, in ``plan.most_steps`` steps, so that their quotient is
    the mean of exactly these weights; a number of examples that is negative or not finite has none.

    Args:
        plan: of the round.
        values: the update, shape ``(plan.size,)``; private.
        metrics: of the reply.
        coins: decide the rounding.

    Returns:
        int32 of shape ``(plan.length,)``.

    Raises:
        UsageError: when the update is of another size, or a metric that is summed is missing.
    """
    if len(values) != plan.size:
        raise UsageError(
            f"a model of {len(values)} float coefficients here, and of {plan.size} at the server; "
            "it must be the same in all rounds and on all nodes"
        )
    examples = _number(metrics, plan.weighted_by) if plan.max_examples else 1.0
    counts = math.isfinite(examples) and examples >= 0
    wanted = min(examples, max(1, plan.max_examples)) * 2**plan.weight_bits if counts else 0.0
    weight = round(wanted)
    whole = values[None]
    rows = clip(whole, plan.clip_norm)
    share = np.float32(weight / plan.most_steps)
    weighted = rows if share == 1 else rows * share
    encoded: NDArray[np.int32] = plan.encoding.encode(weighted, coins)[0]
    if plan.noise_multiplier:
        return encoded
    scaled = (float(share) * _bounded(metrics, name, bound) for name, bound in plan.metrics)
    steps = 2.0 ** math.floor(plan.scale_bits)
    tail = [
        weight,
        rows is not whole,
        counts and examples > max(1, plan.max_examples),
        not counts or abs(weight - wanted) > _COARSE * wanted,
        *(round(steps * value) for value in scaled),
    ]
    return np.concatenate([encoded, np.array(tail, np.int32)])


def mean_metrics(plan: SumPlan, tail: NDArray[np.int64]) -> dict[str, float]:
    """The weighted means of the summed metrics, from what follows the coefficients of a sum."""
    weight = tail[0] / plan.most_steps
    steps = 2.0 ** math.floor(plan.scale_bits)
    pairs = zip(plan.metrics, tail[len(tail) - len(plan.metrics) :].tolist(), strict=True)
    return {name: bound * total / (steps * weight) for (name, bound), total in pairs}


def moved(arrays: ArrayRecord, change: NDArray[np.float64]) -> ArrayRecord:
    """The model after a mean update, each array of its own type.

    Args:
        arrays: the model that was sent.
        change: shape ``(size,)``.
    """
    new, start = dict(arrays.items()), 0
    for name, old in _floats(arrays):
        part = change[start : start + old.size].reshape(old.shape)
        new[name] = Array(np.asarray(old + part).astype(old.dtype))
        start += old.size
    return ArrayRecord(new)


def with_others_of(arrays: ArrayRecord, sent: ArrayRecord) -> ArrayRecord:
    """A model whose arrays that are not summed are those that were sent, types included."""
    summed = {name for name, _ in _floats(sent)}
    return ArrayRecord({n: a if n in summed else sent.get(n, a) for n, a in arrays.items()})


def content_digest(content: RecordDict, message_type: str) -> bytes:
    """32 bytes that stand for all that a message asks for: model, settings and kind.

    All nodes must see the same: a server that sends one node another learning rate could tell its
    update from the others'.
    """
    parts: list[bytes | int | str] = [message_type, len(content)]
    for name in sorted(content):
        record = content[name]
        parts += [type(record).__name__, name, len(record)]
        # The order of arrays is that of the vector; that of settings tells nothing.
        names = list(record) if isinstance(record, ArrayRecord) else sorted(record)
        for key in names:
            parts += [key, *_spelled(record[key])]
    return statement("flower content", *parts)


def _floats(arrays: ArrayRecord) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in arrays.items():
        values = array.numpy()
        if values.dtype.kind == "c":
            raise UsageError(f"array {name!r} of {values.dtype}: complex numbers are not summed")
        if values.dtype.kind == "f":
            yield name, values


def _spelled(value: Any) -> Sequence[bytes | int | str]:
    if isinstance(value, Array):
        shape = ",".join(map(str, value.shape))
        return (value.dtype, shape, value.stype, hashlib.sha256(value.data).digest())
    if isinstance(value, list):
        return ("list", len(value), *(part for each in value for part in _spelled(each)))
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, value if isinstance(value, bytes | str) else str(int(value)))


def _number(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    if not isinstance(value, int | float):
        raise UsageError(
            f"metric {name!r} of the reply is {value!r}, and the secure sum needs a number there; "
            "put it into the one MetricRecord, or leave it out of SecureSum's settings"
        )
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _bounded(metrics: Mapping[str, Any], name: str, bound: float) -> float:
    value = _number(metrics, name)
    return max(-1.0, min(1.0, value / bound)) if math.isfinite(value) else 0.0
