"""What is summed: the plan of a round, and how updates become vectors of integers by it.

The server states the plan, every node checks it against what its owner asks for, and its digest is
bound into every mask and signature of the round. All float arrays of the model are one vector, in
the order in which its ArrayRecord names them; several records follow each other by their names.
Other arrays (counters, masks) are not summed and stay what the server sent: a counter of steps
would use up the clip norm. An evaluation is summed in the same way, with its bounded metrics in the
place of the update.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import msgpack
import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from pydantic import TypeAdapter

from privrec.device.update import clip
from privrec.errors import ReleaseRefused, UsageError
from privrec.privacy.events import RoundEvent, noise_multiplier_for
from privrec.privacy.mechanism import Band, Shares
from privrec.secagg.keys import statement
from privrec.secagg.ring import LARGEST_WRAP, Coins, Encoding, Load, Ring
from privrec.secagg.roster import MAX_LENGTH, Terms
from privrec.secagg.sharing import Graph

_TAIL = 4  # what follows the coefficients without noise: the weight, and counts of three warnings
FINEST_BITS = 23.0  # what a float32 itself resolves
NOISY_BITS = 13.0  # noise hides a finer grid, and shares on a coarser one are drawn faster
WEIGHT = 0.5  # with noise, what the largest weight is beside the clip norm: 12 % more noise for all
_MOST_COUNT = 1 << 30
_SMALL = 1e-30  # norms and magnitudes lie between this and its inverse
_COARSE = 0.01  # a weight that its rounding changes by more is reported


@dataclass(frozen=True)
class SumPlan:
    """One secure sum: what a node puts in, and with how much noise.

    Attributes:
        size: float coefficients of the model.
        clip_norm: largest L2 norm of a node's update.
        scale_bits: the integer grid has ``2^scale_bits`` steps to the clip norm.
        max_examples: most examples that a node counts with; 0 where every node counts as one.
        weighted_by: the metric of a reply that holds the number of examples.
        metrics: name and largest magnitude of each metric that is summed along.
        colluders: of ``least`` survivors, how many are assumed to tell the server their noise.
        noise_multiplier: accounted noise over the sensitivity; 0 for none.
        remove_excess: whether survivors beyond the fewest take their noise off again.
        weight_bits: numbers of examples are counted in steps of ``2^-weight_bits``.
        evaluated: of an evaluation, name and largest magnitude of each of its ``size`` metrics, of
            which one is a coefficient of the sum; empty where updates are summed.

    Raises:
        UsageError: when a value is outside its range, or noise is asked for together with metrics,
            which would be in the sum and not in its accounting.
    """

    size: int
    clip_norm: float
    scale_bits: float
    max_examples: int
    weighted_by: str
    metrics: tuple[tuple[str, float], ...]
    least: int
    colluders: int = 0
    noise_multiplier: float = 0.0
    remove_excess: bool = False
    weight_bits: int = 0
    evaluated: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        steps = self.max_examples * 2.0**self.weight_bits
        longest = MAX_LENGTH - _TAIL - len(self.metrics)
        if self.size > longest:
            raise UsageError(
                f"a model of {self.size:,} float coefficients: one secure sum takes at most "
                f"{longest:,}; train fewer of them, such as adapters of a large "
                "model, and leave the others out of the ArrayRecord"
            )
        for name, value, least, most in (
            ("size", self.size, 1, longest),
            ("clip_norm", self.clip_norm, _SMALL, 1 / _SMALL),
            ("scale_bits", self.scale_bits, 1, FINEST_BITS),
            ("max_examples", self.max_examples, 0, _MOST_COUNT),
            ("weight_bits", self.weight_bits, 0, 30),
            ("max_examples in steps of 2^-weight_bits", steps, 0, _MOST_COUNT),
            ("colluders", self.colluders, 0, self.least - 1),
            ("noise_multiplier", self.noise_multiplier, 0, 1 / _SMALL),
            *(
                (f"metric {name!r} up to", most, _SMALL, 1 / _SMALL)
                for name, most in (*self.metrics, *self.evaluated)
            ),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} {value}: it must lie between {least} and {most}")
        if self.evaluated and (self.metrics or len(self.evaluated) != self.size):
            raise UsageError(f"{len(self.evaluated)} metrics evaluated in {self.size} coefficients")
        plain = not self.metrics and not self.weight_bits and self.scale_bits <= NOISY_BITS
        if self.noise_multiplier and not plain:
            raise UsageError(
                "noise together with training metrics: they would be released without being "
                "accounted; leave them out, or name evaluate_metrics, which have noise of their own"
            )

    @property
    def length(self) -> int:
        """Integers that a node sends."""
        return self.encoding.dimension + (0 if self.noise_multiplier else _TAIL + len(self.metrics))

    @property
    def encoding(self) -> Encoding:
        """From clipped floats to integers, and the sensitivity of their sum.

        With noise the weight is a coefficient more, and within the same bound: update and weight
        shrink alike, so that no weight moves the sum by more than the largest.
        """
        if not (self.noise_multiplier and self.max_examples):
            return Encoding(self.clip_norm, self.size, self.scale_bits)
        longest = self.clip_norm * math.hypot(1, WEIGHT)
        return Encoding(longest, self.size + 1, self.scale_bits)

    @property
    def shares(self) -> Shares | None:
        """The noise that every node adds, or None."""
        if not self.noise_multiplier:
            return None
        bands = (Band(self.encoding.dimension, self.least, self.colluders),)
        bound = self.encoding.squared_bound
        return Shares(self.noise_multiplier, bound, bands, self.remove_excess)

    @property
    def event(self) -> RoundEvent:
        """What a round costs all nodes, none of them sampled; only with noise it is finite."""
        if self.shares is None:
            raise UsageError("a plan without noise costs an infinite epsilon")
        return self.shares.event(1.0)

    @property
    def most_steps(self) -> int:
        """Steps of the largest weight that a node counts with."""
        return max(1, self.max_examples) << self.weight_bits

    def pack(self) -> bytes:
        """The plan as JSON; :meth:`unpack` gives it back unchanged."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def unpack(cls, packed: Any) -> SumPlan:
        """The plan that :meth:`pack` wrote; anything else that somebody sends is refused."""
        try:
            plan = _SUM_PLAN.validate_json(packed, strict=True)
        except (ValueError, UsageError) as error:
            raise ReleaseRefused(f"a plan of a secure sum that is none ({error})") from None
        if plan.pack() != packed:
            raise ReleaseRefused("a plan of a secure sum in another spelling than this version's")
        return plan

    def terms(self, run: str, round: int, attempt: int) -> Terms:
        """The terms of the round, as the server states them and each node holds it to them."""
        digest, lengths = statement("flower sum plan", self.pack()), (self.length,)
        return Terms(run, round, attempt, digest, lengths, (self.least,), 32, self.remove_excess)

    def deviation(self, survivors: int) -> float:
        """Standard deviation of the noise in each coefficient of a sum, in units of the update."""
        shares = self.shares
        if shares is None:
            return 0.0
        variance = shares.kept(0, survivors) * shares.share_variance(0)
        return math.sqrt(variance) / self.encoding.scale

    def noise_beyond(self, colluders: int) -> float:
        """Noise over the sensitivity that is left when as many of the fewest survivors add none."""
        left = max(0, self.least - colluders) / (self.least - self.colluders)
        return self.noise_multiplier * math.sqrt(left)


_SUM_PLAN = TypeAdapter(SumPlan)
_Name = TypeVar("_Name")


def plan_of(
    nodes: int,
    size: int,
    clip_norm: float,
    noise_multiplier: float = 0.0,
    *,
    colluding_share: float = 0.0,
    remove_excess: bool = False,
    max_examples: int = 0,
    weighted_by: str = "num-examples",
    metrics: tuple[tuple[str, float], ...] = (),
    evaluated: tuple[tuple[str, float], ...] = (),
) -> SumPlan:
    """Plan a round on the finest grid on which no sum of the nodes that are called wraps around.

    ``colluding_share`` of them are with the server. See :class:`SumPlan` for the rest.

    Raises:
        UsageError: when a setting is out of range, or there is no such grid.
    """
    noisy, ring = noise_multiplier > 0, Ring()
    least = Graph().quorum(nodes)  # more than two thirds
    plan = SumPlan(
        size,
        float(clip_norm),
        NOISY_BITS if noisy else FINEST_BITS,
        max_examples,
        weighted_by,
        metrics,
        least,
        colluders=math.ceil(colluding_share * nodes) if noisy else 0,
        noise_multiplier=float(noise_multiplier),
        remove_excess=noisy and remove_excess,
        evaluated=evaluated,
    )
    room = (ring.half - 1) // max(2, nodes)  # steps of one node's weight
    if not noisy and plan.most_steps > room:
        raise UsageError(
            f"{nodes} nodes of {max_examples} examples: their number could wrap around; lower "
            "max_examples"
        )
    if max_examples and not noisy:
        plan = replace(plan, weight_bits=(room // max_examples).bit_length() - 1)
    noise = nodes * noise_multiplier**2 / (least - plan.colluders)
    load = Load(plan.encoding.dimension, nodes, noise)
    if ring.wrap_probability(plan.encoding, load) > LARGEST_WRAP:
        plan = replace(plan, scale_bits=ring.fitting_scale_bits(plan.encoding, load) or 1.0)
    if ring.wrap_probability(plan.encoding, load) > LARGEST_WRAP:
        raise UsageError(
            f"the sum of {nodes} nodes with noise of {noise_multiplier:g} times the sensitivity "
            "could wrap around in the ring of 2^32: lower noise_multiplier, or ask fewer nodes"
        )
    return plan


@dataclass(frozen=True)
class Outlook:
    """What a target ε takes of a sum over so many ``nodes``, before any is asked.

    Attributes:
        noise_multiplier: accounted noise over the sensitivity.
        deviation: standard deviation of the noise in each coefficient of the mean update.
        signal: clip norm over the norm of that noise: the longest mean there can be, in units of
            what hides it; below 1 little is learned from a round.
    """

    nodes: int
    noise_multiplier: float
    deviation: float
    signal: float


def outlook(
    nodes: int,
    size: int,
    epsilon: float,
    *,
    rounds: int,
    delta: float = 1e-5,
    clip_norm: float = 1.0,
    colluding_share: float = 0.05,
    remove_excess: bool = True,
) -> Outlook:
    """Plan the noise with which ``rounds`` attempts at training ``size`` coefficients cost ε.

    It is that of ``SecureSum`` with the same settings, every node counting as one.

    Raises:
        UsageError: when no noise meets ε, or there is no such plan.
    """

    def planned(noise: float) -> SumPlan:
        parts = nodes, size, clip_norm, noise
        return plan_of(*parts, colluding_share=colluding_share, remove_excess=remove_excess)

    noise = noise_multiplier_for(epsilon, delta, lambda z: planned(z).event, rounds, "server")
    plan = planned(noise)
    deviation = plan.deviation(nodes) / nodes
    return Outlook(nodes, noise, deviation, clip_norm / (deviation * math.sqrt(size)))


Arrays = Mapping[tuple[str, ...], Array]
"""All arrays of a model in their order: by name, and before it by ArrayRecord if it has several."""


def arrays_of(content: RecordDict, whose: str) -> Arrays:
    """Return the arrays of a message's ArrayRecords, of which it must have one at least."""
    records = _records(content)
    if not records:
        raise UsageError(f"{whose} without an ArrayRecord: a secure sum is of the model in it")
    if len(records) == 1:  # whatever it is called
        return {(name,): array for name, array in records[0][1].items()}
    return {(key, name): array for key, record in records for name, array in record.items()}


def _records(content: RecordDict) -> list[tuple[str, ArrayRecord]]:
    """The ArrayRecords of a message, in the order of their names."""
    return sorted(content.array_records.items())


def size_of(arrays: Arrays) -> int:
    """Count the float coefficients of a model."""
    return sum(values.size for _, values in _floats(arrays))


def update(received: Arrays, returned: Arrays) -> NDArray[np.float32]:
    """Subtract old coefficients from new ones of the same arrays: float32 ``(size,)``, private."""
    if list(received) != list(returned):
        apart = sorted(map("/".join, received.keys() ^ returned.keys()))
        raise UsageError(
            f"arrays {apart} are in the model that was sent or in the one that came back, and not "
            "in both, or in another order; return the model's own"
        )
    parts = []
    for name, old in _floats(received):
        new = returned[name].numpy()
        if new.shape != old.shape or new.dtype.kind != "f":
            raise UsageError(
                f"array {'/'.join(name)!r} came back as {new.dtype} of shape {new.shape}, and was "
                f"sent as {old.dtype} of shape {old.shape}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            parts.append((new - old).ravel().astype(np.float32))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def scores(plan: SumPlan, metrics: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return what an evaluation puts in the place of an update: float32 ``(size,)``, private.

    Each metric over its largest magnitude, cut at 1; one that is not finite counts as zero.
    """
    return np.array([_bounded(metrics, *each) for each in plan.evaluated], np.float32)


def integers(
    plan: SumPlan, values: NDArray[np.float32], metrics: Mapping[str, Any], coins: Coins
) -> NDArray[np.int32]:
    """Return what a node puts into the sum before its noise, int32 of shape ``(plan.length,)``.

    Promise: the coefficients have an integer L2 norm of at most ``plan.encoding.bound``, whatever
    the number of examples says; an update that is not finite becomes zero. Coefficients, weight and
    metrics are scaled by the same weight, in ``plan.most_steps`` steps, so that their quotient is
    the mean of exactly these weights; a number of examples that is negative or not finite has none.

    After the coefficients come the weight; whether the update was clipped, its examples were cut,
    or are left out or coarse; and the metrics. With noise the weight alone does, if nodes have one.

    Raises:
        UsageError: when the update is of another size, or a metric that is summed is missing.
    """
    if len(values) != plan.size:
        raise UsageError(
            f"a model of {len(values)} float coefficients here, and of {plan.size} at the server; "
            "it must be the same in all rounds and on all nodes"
        )
    examples = _number(metrics, plan.weighted_by) if plan.max_examples else 1.0
    most = max(1, plan.max_examples)
    counts = math.isfinite(examples) and examples >= 0
    wanted = min(examples, most) * 2**plan.weight_bits if counts else 0.0
    weight = round(wanted)
    whole = values[None]
    rows = clip(whole, plan.clip_norm)
    if plan.noise_multiplier and plan.max_examples:
        weight = wanted  # in no steps: it is rounded like a coefficient
        rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=WEIGHT * plan.clip_norm)
    share = np.float32(weight / plan.most_steps)
    encoded: NDArray[np.int32] = plan.encoding.encode(rows * share, coins)[0]
    if plan.noise_multiplier:
        return encoded
    warnings = (
        rows is not whole,
        counts and examples > most,
        not counts or abs(weight - wanted) > _COARSE * wanted,
    )
    steps = 2.0 ** math.floor(plan.scale_bits)
    scaled = (float(share) * _bounded(metrics, name, bound) for name, bound in plan.metrics)
    tail = [weight, *warnings, *(round(steps * value) for value in scaled)]
    return np.concatenate([encoded, np.array(tail, np.int32)])


def mean_metrics(plan: SumPlan, tail: NDArray[np.int64]) -> dict[str, float]:
    """Return the weighted means of metrics from what follows the coefficients of a sum."""
    weight = tail[0] / plan.most_steps
    steps = 2.0 ** math.floor(plan.scale_bits)
    pairs = zip(plan.metrics, tail[len(tail) - len(plan.metrics) :].tolist(), strict=True)
    return {name: bound * total / (steps * weight) for (name, bound), total in pairs}


def moved(content: RecordDict, change: NDArray[np.float64]) -> dict[str, ArrayRecord]:
    """Add a mean update of shape ``(size,)`` to a message's ArrayRecords, types as they are."""
    records, start = {}, 0
    for record, arrays in _records(content):
        new = dict(arrays.items())
        for name, old in _floats(new):
            part = change[start : start + old.size].reshape(old.shape)
            new[name] = Array(np.asarray(old + part).astype(old.dtype))
            start += old.size
        records[record] = ArrayRecord(new)
    return records


def with_others_of(arrays: ArrayRecord, content: RecordDict) -> ArrayRecord:
    """Put the arrays that are not summed back to those that were sent, types included.

    Of several ArrayRecords, to those of the first that has all the names.
    """
    records = [record for _, record in _records(content)]
    sent = next((each for each in records if set(arrays) <= set(each)), records[0])
    summed = {name for name, array in sent.items() if array.numpy().dtype.kind == "f"}
    return ArrayRecord({n: a if n in summed else sent.get(n, a) for n, a in arrays.items()})


def content_digest(content: RecordDict, message_type: str) -> bytes:
    """Return 32 bytes that stand for all that a message asks for, which all nodes must see alike.

    A server that sends one node another learning rate could tell its update from the others'.
    """
    listed = []
    for name in sorted(content):
        record = content[name]
        # The order of arrays is that of the vector; that of settings tells nothing.
        keys = record if isinstance(record, ArrayRecord) else sorted(record)
        values = [[key, _spelled(record[key])] for key in keys]
        listed.append([type(record).__name__, name, values])
    return statement("flower content", message_type, msgpack.packb(listed))


def _spelled(value: Any) -> Any:
    """A value as msgpack spells it, which tells types apart; arrays by their digest."""
    if not isinstance(value, Array):
        return value
    return [value.dtype, list(value.shape), value.stype, hashlib.sha256(value.data).digest()]


def _floats(arrays: Mapping[_Name, Array]) -> Iterator[tuple[_Name, NDArray[Any]]]:
    for name, array in arrays.items():
        values = array.numpy()
        if values.dtype.kind == "c":
            raise UsageError(f"array {name!r} of {values.dtype}: complex numbers are not summed")
        if values.dtype.kind == "f":
            yield name, values


def _number(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    if not isinstance(value, int | float):
        kind = "missing" if value is None else f"a {type(value).__name__}"
        raise UsageError(
            f"metric {name!r} of the reply is {kind}, and the secure sum needs a number there; "
            "put it into the one MetricRecord, or leave it out of SecureSum's settings"
        )
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _bounded(metrics: Mapping[str, Any], name: str, bound: float) -> float:
    value = _number(metrics, name)
    return max(-1.0, min(1.0, value / bound)) if math.isfinite(value) else 0.0
