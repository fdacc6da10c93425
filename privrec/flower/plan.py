"""What a Flower app's server and nodes agree on about one secure sum, before anybody trains.

The server states it, every node checks it against what its owner asks for, and its digest is bound
into every mask and signature of the round.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from privrec.errors import ReleaseRefused, UsageError
from privrec.privacy.mechanism import Band, Shares
from privrec.secagg.keys import statement
from privrec.secagg.ring import LARGEST_WRAP, Encoding, Load, Ring
from privrec.secagg.roster import MAX_LENGTH, Terms
from privrec.secagg.sharing import Graph

WEIGHT, CLIPPED, CAPPED, ODD = range(4)
"""What follows the coefficients in a sum without noise: the weight, and the three warnings."""
_TAIL = ODD + 1
FINEST_BITS = 23.0  # what a float32 itself resolves
NOISY_BITS = 13.0  # noise hides a finer grid, and shares on a coarser one are drawn faster
_MOST_COUNT = 1 << 30


@dataclass(frozen=True)
class SumPlan:
    """One secure sum: what a node puts in, and with how much noise.

    Args:
        size: float coefficients of the model.
        clip_norm: largest L2 norm of a node's update, above 0.
        scale_bits: the integer grid has ``2^scale_bits`` steps to the clip norm, 1 to 23.
        max_examples: most examples that a node counts with; 0 where every node counts as one.
        weighted_by: the metric of a reply that holds the number of examples.
        metrics: name and largest magnitude of each metric that is summed along.
        least: fewest survivors.
        colluders: nodes that are assumed to tell the server their noise.
        noise_multiplier: accounted noise over the sensitivity; 0 for none.
        remove_excess: whether survivors beyond the fewest take their noise off again.
        weight_bits: numbers of examples are counted in steps of ``2^-weight_bits``.

    Raises:
        UsageError: when a value is outside its range, or noise is asked for together with metrics
            or weights, which would be in the sum and not in its accounting.
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

    def __post_init__(self) -> None:
        _check(
            1 <= self.size <= MAX_LENGTH - _TAIL - len(self.metrics),
            f"a model of {self.size} float coefficients: 1 to some {MAX_LENGTH} can be summed",
        )
        _check(
            math.isfinite(self.clip_norm) and self.clip_norm > 0,
            f"clip_norm {self.clip_norm}: it must be finite and above 0",
        )
        _check(
            math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0,
            f"noise_multiplier {self.noise_multiplier}: it must be finite and at least 0",
        )
        _check(
            1 <= self.scale_bits <= FINEST_BITS,
            f"scale_bits {self.scale_bits}: it must lie between 1 and {FINEST_BITS:g}",
        )
        _check(
            0 <= self.max_examples <= _MOST_COUNT,
            f"max_examples {self.max_examples}: it must lie between 1 and {_MOST_COUNT}; leave the "
            "weights out with max_examples=None",
        )
        _check(
            0 <= self.weight_bits <= 30 and self.max_examples << self.weight_bits <= _MOST_COUNT,
            f"{self.max_examples} examples in steps of 2^-{self.weight_bits}: at most "
            f"{_MOST_COUNT} steps can be summed",
        )
        for metric, bound in self.metrics:
            _check(
                math.isfinite(bound) and bound > 0,
                f"metric {metric!r} up to {bound}: its largest magnitude must be above 0",
            )
        plain = not self.metrics and not self.max_examples and self.scale_bits <= NOISY_BITS
        _check(
            plain or not self.noise_multiplier,
            "noise together with metrics or numbers of examples: they would be released without "
            "being accounted; leave them out, so that every node counts as one",
        )
        _check(
            0 <= self.colluders < self.least,
            f"{self.colluders} colluders among {self.least} survivors: there must be fewer; "
            "sample more nodes, or lower colluding_share",
        )

    @property
    def length(self) -> int:
        """Integers that a node sends: without noise, counts and metrics follow the coefficients."""
        return self.size + (0 if self.noise_multiplier else _TAIL + len(self.metrics))

    @property
    def encoding(self) -> Encoding:
        """From clipped floats to integers, and the sensitivity of their sum."""
        return Encoding(self.clip_norm, self.size, self.scale_bits)

    @property
    def shares(self) -> Shares | None:
        """The noise that every node adds, or None."""
        if not self.noise_multiplier:
            return None
        band = Band(self.size, self.least, self.colluders)
        bound = self.encoding.squared_bound
        return Shares(self.noise_multiplier, bound, (band,), self.remove_excess)

    @property
    def most_steps(self) -> int:
        """Steps of the largest weight that a node counts with."""
        return max(1, self.max_examples) << self.weight_bits

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        return statement("flower sum plan", self.pack())

    def pack(self) -> bytes:
        """The plan as JSON; :meth:`unpack` gives it back unchanged."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> SumPlan:
        """The plan that :meth:`pack` wrote, from whoever says that it is one.

        Raises:
            ReleaseRefused: when it is not one, or not what :meth:`pack` writes.
        """
        try:
            values = json.loads(packed)
            metrics = tuple((str(name), float(bound)) for name, bound in values.pop("metrics"))
            kinds = {field.name: field.type for field in fields(cls) if field.name != "metrics"}
            plan = cls(metrics=metrics, **{n: _typed(values.pop(n), k) for n, k in kinds.items()})
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise ReleaseRefused(f"a plan of a secure sum that is none ({error})") from None
        if values or plan.pack() != packed:
            raise ReleaseRefused("a plan of a secure sum in another spelling than this version's")
        return plan

    def terms(self, run: str, round: int, attempt: int) -> Terms:
        """The terms of the round, as the server states them and each node holds it to them."""
        return Terms(
            run, round, attempt, self.digest, (self.length,), (self.least,), 32, self.remove_excess
        )

    def noise_beyond(self, colluders: int) -> float:
        """Noise over the sensitivity that is left when as many of the fewest survivors add none."""
        left = max(0, self.least - colluders) / (self.least - self.colluders)
        return self.noise_multiplier * math.sqrt(left)


@dataclass(frozen=True)
class SumCohort:
    """The nodes of a round.

    Args:
        nodes: how many are called.
        colluding_share: part of them that is assumed to collude with the server, in [0, 1/3).
        remove_excess: whether survivors beyond the fewest take their noise off again.
    """

    nodes: int
    colluding_share: float = 0.0
    remove_excess: bool = False

    @property
    def least(self) -> int:
        """Fewest survivors: the quorum of the protocol, more than two thirds."""
        return Graph().quorum(self.nodes)

    @property
    def colluders(self) -> int:
        """How many are assumed to collude."""
        return math.ceil(self.colluding_share * self.nodes)

    def plan(
        self,
        size: int,
        clip_norm: float,
        noise_multiplier: float = 0.0,
        *,
        max_examples: int = 0,
        weighted_by: str = "num-examples",
        metrics: tuple[tuple[str, float], ...] = (),
    ) -> SumPlan:
        """The plan of a round, on the finest grid on which no sum of these nodes wraps around.

        Arguments are those of :class:`SumPlan`.

        Raises:
            UsageError: when a setting is out of range, or there is no such grid.
        """
        noisy = noise_multiplier > 0
        room = (Ring().half - 1) // max(2, self.nodes)  # steps of one node's weight
        plan = SumPlan(
            size, float(clip_norm), NOISY_BITS if noisy else FINEST_BITS, max_examples, weighted_by,
            metrics, self.least, self.colluders if noisy else 0, float(noise_multiplier),
            noisy and self.remove_excess,
        )  # fmt: skip
        _check(
            plan.most_steps <= room,
            f"{self.nodes} nodes of {plan.max_examples} examples: their number could wrap around; "
            "lower max_examples",
        )
        if plan.max_examples:
            plan = replace(plan, weight_bits=(room // plan.max_examples).bit_length() - 1)
        load = Load(
            size, self.nodes, self.nodes * noise_multiplier**2 / (self.least - plan.colluders)
        )
        ring = Ring()
        if ring.wrap_probability(plan.encoding, load) > LARGEST_WRAP:
            plan = replace(plan, scale_bits=ring.fitting_scale_bits(plan.encoding, load) or 1.0)
        ring.check(plan.encoding, load)
        return plan


def _typed(value: object, kind: object) -> Any:
    """A JSON value that is of the field's own type; JSON writes no other."""
    if type(value).__name__ != kind:
        raise TypeError(f"{value!r} instead of {kind}")
    return value


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
