"""What rounds cost: privacy events, ε of any collection of them, and the noise that a target takes.

The unit is a user and the adjacency is zero-out: one user's history is replaced by none, while
enrolment stays public. A sampled user shifts the sum by at most the sensitivity, an unsampled one
by nothing, and who is sampled does not depend on any history. So the outputs of two neighbouring
runs are, in the worst case, ``N(0, σ²)`` against ``(1 - q) N(0, σ²) + q N(1, σ²)``, in both
directions. That is the pair that dp-accounting analyses as ``REPLACE_SPECIAL`` (a record is
replaced by a special one, here the empty history) and, for Gaussian noise, equally as
``ADD_OR_REMOVE_ONE``. ``REPLACE_ONE`` swaps one history for another, which is twice as far.

Distributed noise is made of the integers of many devices. :mod:`privrec.privacy.discrete` proves
which Gaussian mechanism they amount to, and how closely.

Training that is not ours may have other events and other neighbours. :meth:`RoundEvent.of` takes
any event of dp-accounting; what is no Gaussian round in it is accounted by dp-accounting itself.
Where one unit is replaced by another (``"replace-one"``), a noise multiplier is over what that
moves the sum by, and sampling is not counted on.
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
import re
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from privrec.errors import UsageError
from privrec.privacy.discrete import Grid, Slack

if TYPE_CHECKING:
    from privrec.privacy.accountant import Composition

Adversary = Literal["recipients", "server"]
Accountant = Literal["pld", "rdp"]
Adjacency = Literal["zero-out", "add-or-remove", "replace-one"]
Mechanism = Literal["gaussian", "discrete_gaussian", "none", "other"]

DIGITS = 4
_SMALLEST_DELTA = 1e-10
_LEAST_SAMPLED, _MOST_NOISE = 0.01, 1e9
_FIGURES = 4
_STEPS = 9 * 10 ** (_FIGURES - 1)  # numbers of four significant digits in a decade
_LEAST, _MOST = -2, 6  # noise multipliers that are offered, from 0.01 to a million
_NAMES = ("mechanism", "noise_multiplier", "sampling_rate")
_GRID_NAMES = tuple(each.name for each in fields(Grid))
_RELATIONS = {
    "zero-out": "REPLACE_SPECIAL",
    "add-or-remove": "ADD_OR_REMOVE_ONE",
    "replace-one": "REPLACE_ONE",
}
_ENOUGH = 16  # batches, to tell those of a fixed size
_SAMPLED = ("PoissonSampledDpEvent", "SampledWithoutReplacementDpEvent")


@dataclass(frozen=True)
class RoundEvent:
    """What one round reveals, to the mathematics: a mechanism, its noise and its sampling.

    Attributes:
        mechanism: ``"gaussian"`` noise on the sum; ``"discrete_gaussian"`` noise in shares of the
            devices; ``"none"``; or ``"other"``, whatever dp-accounting knows.
        noise_multiplier: standard deviation of the noise over the sensitivity of the sum; above 0,
            but 0 for ``"none"`` and ``"other"``. For shares that of those accounted for alone.
        sampling_rate: probability with which each user takes part, in (0, 1]; 1 means everybody.
        grid: of shares alone, what they are made of; too narrow to be accounted, they are refused.
        other: of ``"other"`` alone, the event of dp-accounting as :meth:`of` spelled it.
    """

    mechanism: Mechanism
    noise_multiplier: float
    sampling_rate: float = 1.0
    grid: Grid | None = None
    other: str | None = None

    def __post_init__(self) -> None:
        name, noise, rate = self.mechanism, self.noise_multiplier, self.sampling_rate
        known = get_args(Mechanism)
        _check(name in known, f"mechanism {name!r}: it must be one of {', '.join(known)}")
        _check(
            noise == 0 if name in ("none", "other") else 0 < noise < math.inf,
            f"noise_multiplier {noise}: it must be above 0 and finite, but 0 with mechanism 'none'"
            "; choose mechanism 'none' for no noise, and only then",
        )
        _check(0 < rate <= 1, f"sampling_rate {rate}: it must be above 0 and at most 1 (everybody)")
        _check(
            (name == "discrete_gaussian") == (self.grid is not None),
            f"mechanism {name!r} with grid {self.grid}: only noise in shares has one, and it must",
        )
        _check(
            (name == "other") == (self.other is not None) and (name != "other" or rate == 1),
            f"mechanism {name!r} of {self.other!r} at rate {rate}: an event of dp-accounting says "
            "by itself how it samples; make it with RoundEvent.of",
        )
        if self.grid is not None:
            self.grid.check(noise)

    @classmethod
    def of(cls, event: Any) -> RoundEvent:
        """The event that an event of dp-accounting is here; one of ours is itself.

        Promise: it costs what dp-accounting's event costs. Compositions stay one event, so that
        they are charged as a whole or not at all; see :attr:`parts`.

        UsageError for what is neither, an event of nothing, and values that make no sense in one.
        """
        if isinstance(event, cls):
            return event
        tree = _tree(event)
        _check(isinstance(tree, dict), f"{event!r}: it is no event; charge a RoundEvent")
        found = _flattened(tree)
        _check(bool(found), f"{event!r}: it releases nothing, so there is nothing to charge")
        (first, count), *others = found.items()
        return cls("other", 0.0, other=_spelled(tree)) if others or count > 1 else first

    @property
    def parts(self) -> Counter[RoundEvent]:
        """What it is composed of and how often: itself, unless dp-accounting composed it."""
        return Counter({self: 1} if self.other is None else _parts(self.other))

    @property
    def is_private(self) -> bool:
        """Whether it has noise, and so a finite ε."""
        return self.mechanism != "none" and all(
            part.mechanism != "none" for part in (self.parts if self.other else ())
        )

    @property
    def hides_cohorts(self) -> bool:
        """Whether ε rests on nobody knowing who took part, nor how many, nor how long it took."""
        return self.is_private and self.rate_against("recipients") < 1

    def rate_against(self, adversary: Adversary) -> float:
        """The sampling that ``adversary`` does not see through, in (0, 1].

        The server knows the cohort, so to it sampling hides nothing. Recipients see neither cohort
        nor size, but noise in shares whose excess is left in tells them the size by its variance.
        """
        check_adversary(adversary)
        shows_size = self.grid is not None and not self.grid.excess_removed
        return 1.0 if adversary == "server" or shows_size else self.sampling_rate

    @property
    def gaussian_multiplier(self) -> float:
        """That of the Gaussian mechanism accounted for the round, proved within :attr:`slack`."""
        noise = self.noise_multiplier
        return noise if self.grid is None else self.grid.multiplier(noise)

    @property
    def slack(self) -> Slack:
        """How far the round is from what is accounted for it; nothing for Gaussian noise."""
        return Slack() if self.grid is None else self.grid.slack(self.noise_multiplier)

    def dp_event(self, adversary: Adversary) -> Any:
        """The ``dp_accounting.DpEvent`` of :attr:`gaussian_multiplier` as ``adversary`` sees it."""
        from dp_accounting import dp_event

        rate = self.rate_against(adversary)
        if self.other is not None:
            tree = json.loads(self.other)
            return _built(tree if adversary == "recipients" else _seen_through(tree))
        if not self.is_private:
            return dp_event.NonPrivateDpEvent()
        event = dp_event.GaussianDpEvent(self.gaussian_multiplier)
        return event if rate == 1 else dp_event.PoissonSampledDpEvent(rate, event)

    def to_json(self) -> dict[str, Any]:
        """The event as plain JSON values; :meth:`from_json` gives it back unchanged."""
        if self.other is not None:
            return {"mechanism": "other", "other": json.loads(self.other)}
        own = {name: getattr(self, name) for name in _NAMES}
        return own if self.grid is None else {**own, **asdict(self.grid)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RoundEvent:
        """The event that :meth:`to_json` wrote; UsageError for any other key or value."""
        if values.get("mechanism") == "other":
            _check(set(values) == {"mechanism", "other"}, f"{sorted(values)} of an event")
            return cls("other", 0.0, other=_spelled(_tree(_built(values["other"]))))
        distributed = values.get("mechanism") == "discrete_gaussian"
        names = {*_NAMES, *_GRID_NAMES} if distributed else set(_NAMES)
        _check(
            set(values) == names,
            f"a privacy event with the keys {sorted(values)}: it has exactly {sorted(names)}",
        )
        mechanism, noise, rate = (values[name] for name in _NAMES)
        for number in (noise, rate):
            _check(type(number) in (int, float), f"{number!r} in a privacy event: give a number")
        grid = Grid(*(values[name] for name in _GRID_NAMES)) if distributed else None
        return cls(mechanism, float(noise), float(rate), grid)


def epsilon(
    events: Mapping[RoundEvent, int] | Iterable[RoundEvent],
    delta: float,
    adversary: Adversary,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "zero-out",
) -> float:
    """ε of a collection of rounds, rounded up to four decimals.

    Promise: a function of the arguments alone, in which the order of rounds does not matter. With
    ``"pld"`` it is an upper bound of the true value, on a grid refined until ε moves by < 0.5 %.
    Distributed noise is accounted with all of its :attr:`RoundEvent.slack`. Events of dp-accounting
    that are no Gaussian rounds are composed by its own accountants, with all others: by its PLD or,
    where that does not know one of them, by its RDP. UsageError where neither does.

    Args:
        events: how often each event happened, or the events one by one.
        delta: the δ of the claim, in [1e-10, 1).
        adversary: see :meth:`RoundEvent.rate_against`.
        accountant: ``"pld"``, or ``"rdp"``, a cross-check that is looser; infinite where it does
            not know an event.
        adjacency: which data sets are neighbours.

    Returns:
        0 for no events, infinity as soon as one event has no noise, and where ε is so large (above
        a hundred) that what the samplers leave of their 2^-236 would count.
    """
    from privrec.privacy.accountant import pld, rdp

    check_delta(delta)
    accountants = {"pld": pld, "rdp": rdp}
    known = ", ".join(accountants)
    _check(accountant in accountants, f"accountant {accountant!r}: it must be one of {known}")
    check_adjacency(adjacency)
    check_adversary(adversary)
    counts = _counts(events)
    if not counts:
        return 0.0
    if not all(event.is_private for event in counts):
        return math.inf
    each = [[count * part for part in astuple(e.slack)] for e, count in counts.items()]
    slack = Slack(*map(math.fsum, zip(*each, strict=True)))
    if any(event.other is not None for event in counts):
        within = _outside(counts, slack.inner(delta), adversary, accountant, adjacency)
    else:
        rounds = _composition(counts, adversary, adjacency)
        within = accountants[accountant](rounds, slack.inner(delta))
    bound = slack.outer(within, delta)
    scaled = bound * 10**DIGITS
    return math.ceil(scaled) / 10**DIGITS if math.isfinite(scaled) else bound


def divergence(
    events: Mapping[RoundEvent, int] | Iterable[RoundEvent],
    order: int,
    adversary: Adversary,
    adjacency: Adjacency = "zero-out",
) -> float:
    """Rényi divergence of a collection of rounds, from above; of shares, that of their Gaussian.

    None of them is ``"other"``. ``order`` is a whole number of at least 2; without noise there is
    no bound, and it is infinite.
    """
    from privrec.privacy.accountant import renyi

    counts = _counts(events)
    if not all(event.is_private for event in counts):
        return math.inf
    return sum(
        part.count * renyi(part, order) for part in _composition(counts, adversary, adjacency)
    )


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    event_of: Callable[[float], RoundEvent | Sequence[RoundEvent]],
    rounds: int,
    adversary: Adversary,
    beside: Sequence[RoundEvent] = (),
) -> float:
    """The smallest noise multiplier of four significant digits that keeps ε within a target.

    Promise: :func:`epsilon` of ``rounds`` such rounds is at most ``target_epsilon``, and with one
    unit less in the last digit it is more (unless the result is the least that is offered, 0.01).
    UsageError when not even a noise multiplier of a million meets it.

    Args:
        target_epsilon: largest ε at the end of all rounds, at least 0.0001.
        event_of: the event of a round with a noise multiplier, or its events, so that ε falls as
            noise grows; it may refuse too little noise with a ``UsageError``.
        beside: what is charged once beside the rounds; the target covers it.
    """
    _check(
        math.isfinite(target_epsilon) and target_epsilon >= 10.0**-DIGITS,
        f"epsilon {target_epsilon}: it must be finite and at least {10.0**-DIGITS}, "
        'to which ε is rounded up; for no guarantee at all choose noise = "none"',
    )
    _check(rounds >= 1, f"{rounds} rounds: there must be at least 1")
    check_delta(delta)

    def holds(candidate: int, against: Adversary) -> bool:
        try:
            event = event_of(_candidate(candidate))
        except UsageError:
            return False
        return epsilon(_charged(event, rounds, beside), delta, against) <= target_epsilon

    def first(against: Adversary, last: int) -> int:
        return bisect_left(range(last), True, key=lambda candidate: holds(candidate, against))

    # What holds against the server holds against recipients too, and costs nothing to find.
    enough = first("server", (_MOST - _LEAST) * _STEPS)
    if adversary == "recipients":
        enough = first("recipients", enough)
    if not holds(enough, adversary):
        event_of(_candidate(enough))  # says what is wrong with the event, if anything is
        raise UsageError(
            f"epsilon {target_epsilon} at delta {delta} over {rounds} rounds: not met even by a "
            f"noise multiplier of {_candidate(enough):g}; allow a larger epsilon or fewer rounds"
        )
    return _candidate(enough)


def epsilon_by_round(
    event: RoundEvent, rounds: int, delta: float, points: int, beside: Sequence[RoundEvent] = ()
) -> list[tuple[int, float, float]]:
    """Numbers of rounds, ``points`` of them from 1 to ``rounds``, with the ε that each will cost.

    It is against the recipients of the models, and against the server; ``beside`` is in all of it.
    """
    _check(rounds >= 1, f"{rounds} rounds: there must be at least 1")
    count = max(2, min(points, rounds))
    after = {round(1 + (rounds - 1) * place / (count - 1)) for place in range(count)}
    spent = [(each, _charged(event, each, beside)) for each in sorted(after)]
    return [
        (each, epsilon(charged, delta, "recipients"), epsilon(charged, delta, "server"))
        for each, charged in spent
    ]


def _charged(
    event: RoundEvent | Sequence[RoundEvent], rounds: int, beside: Sequence[RoundEvent]
) -> Counter[RoundEvent]:
    each = Counter([event] if isinstance(event, RoundEvent) else event)
    charged = Counter({one: rounds * count for one, count in each.items()})
    return charged + Counter(beside)


def _candidate(candidate: int) -> float:
    """The candidates in ascending order: all numbers of four significant digits from 0.01 on."""
    decade, place = divmod(candidate, _STEPS)
    return float(f"{10 ** (_FIGURES - 1) + place}e{decade + _LEAST - _FIGURES + 1}")


def check_delta(delta: float) -> None:
    """Raise UsageError for a δ that no accountant here can answer for: outside [1e-10, 1)."""
    _check(
        _SMALLEST_DELTA <= delta < 1,
        f"delta {delta}: it must be at least {_SMALLEST_DELTA} (what double precision carries) and "
        "below 1; choose less than 1 / number of users",
    )


def check_adversary(adversary: str) -> None:
    """Raise UsageError unless it is ``"recipients"`` or ``"server"``."""
    known = adversary in get_args(Adversary)
    _check(known, f"adversary {adversary!r}: it must be 'recipients' or 'server'")


def check_adjacency(adjacency: str) -> None:
    """Raise UsageError unless it is one of :data:`Adjacency`."""
    known = get_args(Adjacency)
    _check(adjacency in known, f"adjacency {adjacency!r}: it must be one of {', '.join(known)}")


def check_terms(
    unit: str, adjacency: str, delta: float | None, budget: float | None, against: str
) -> None:
    """Raise UsageError for terms of a ledger that make no sense."""
    check_adjacency(adjacency)
    check_adversary(against)
    known = re.fullmatch("[a-z][a-z -]{0,39}", unit)
    _check(bool(known), f"unit {unit!r}: it must be a noun in lower case, such as 'example'")
    if delta is not None:
        check_delta(delta)
    _check(
        budget is None or (delta is not None and 0 < budget < math.inf),
        f"budget {budget} with delta {delta}: a budget is a finite ε above 0 at some delta; give "
        "both, or no budget",
    )


def over_clip_norm(noise: float, rate: float, adjacency: Adjacency) -> RoundEvent:
    """The event of noise over a clip norm, which replacing a unit moves a sum by twice."""
    if noise == 0:
        return RoundEvent("none", 0.0)
    event = RoundEvent("gaussian", noise, rate)
    return RoundEvent("gaussian", noise / 2) if adjacency == "replace-one" else event


class Steps:
    """What the steps of a DP-SGD optimiser cost, of Opacus or :class:`privrec.LazyDPSGD`.

    A UsageError refuses one whose steps are taken in several processes, and a ``sample_rate`` below
    the one that a ``PrivacyEngine`` counts for it.
    """

    def __init__(self, optimizer: Any, sample_rate: float, adjacency: Adjacency) -> None:
        names = " ".join(kind.__name__ for kind in type(optimizer).mro())
        if "Distributed" in names or "FSDP" in names:
            raise UsageError(
                f"{type(optimizer).__name__}: each process would charge each step; charge it by "
                "yourself in one of them, before the step"
            )
        over_clip_norm(1.0, sample_rate, adjacency)  # a rate that makes no sense is refused here
        hook = optimizer.step_hook
        hooked = inspect.getclosurevars(hook).nonlocals if inspect.isfunction(hook) else {}
        if sample_rate < (counted := float(hooked.get("sample_rate", 0))) * (1 - 1e-9):
            raise UsageError(
                f"sample_rate = {sample_rate:g}: the optimiser's PrivacyEngine counts {counted:g}, "
                "which is one over its number of batches; give that, or 1 without Poisson sampling"
            )
        self._rate, self._adjacency = sample_rate, adjacency
        self._sizes: list[int] = []

    def cost(self, optimizer: Any) -> tuple[RoundEvent, float | None]:
        """Return the event of one step and the batch that was expected in it, if that is known.

        Warns once when the first batches of Opacus all had one size, which is secret itself.
        """
        batch, passes = optimizer.expected_batch_size, optimizer.accumulated_iterations
        rate = min(1.0, self._rate * passes)
        samples = getattr(next(iter(getattr(optimizer, "params", ())), None), "grad_sample", None)
        shape = getattr(samples, "shape", None)
        # Poisson batches of which more than one is expected vary, but for one chance in 10^5.
        if shape and batch and batch * (1 - rate) > 1 and len(self._sizes) < _ENOUGH:
            self._sizes.append(shape[0])
            if len(self._sizes) == _ENOUGH and len(set(self._sizes)) == 1:
                warnings.warn(
                    f"{_ENOUGH} batches were of the same size, which Poisson sampling does not "
                    "give: the ε that is charged is too low if batches are of a fixed size or in a "
                    "fixed order. Attach with sample_rate=1 then",
                    stacklevel=2,
                )
        event = over_clip_norm(float(optimizer.noise_multiplier), rate, self._adjacency)
        return event, None if batch is None else float(batch * passes)


def parts_of(counts: Mapping[RoundEvent, int]) -> Counter[RoundEvent]:
    """Events and their numbers, those that dp-accounting composed taken apart."""
    found: Counter[RoundEvent] = Counter()
    for event, count in counts.items():
        for part, times in event.parts.items():
            found[part] += count * times
    return found


def _counts(events: Mapping[RoundEvent, int] | Iterable[RoundEvent]) -> dict[RoundEvent, int]:
    counts = Counter(events)
    _check(
        all(count >= 0 for count in counts.values()),
        "a negative number of rounds: what was released cannot be taken back",
    )
    return {event: count for event, count in parts_of(counts).items() if count}


# --------------------------------------------------------------------------- dp-accounting's own

Tree = dict[str, Any]
"""An event of dp-accounting as plain values: ``kind`` is its class, the rest its fields."""


def _tree(event: Any) -> Any:
    """An event, or a value of one, as plain values that mean something in an event."""
    import attr
    from dp_accounting import dp_event

    if isinstance(event, dp_event.DpEvent):
        kind = type(event).__name__
        _check(
            getattr(dp_event, kind, None) is type(event) and kind != "UnsupportedDpEvent",
            f"{event!r}: it is no event that dp-accounting can account for",
        )
        names = [each.name for each in attr.fields(type(event))]
        return {"kind": kind, **{name: _tree(getattr(event, name)) for name in names}}
    if isinstance(event, Sequence) and not isinstance(event, str):
        return [_tree(each) for each in event]
    _check(
        isinstance(event, numbers.Real) and not isinstance(event, bool),
        f"{event!r}: charge a privrec.privacy.events.RoundEvent, or an event of dp-accounting, "
        "whose values are numbers",
    )
    value = int(event) if isinstance(event, numbers.Integral) else float(event)
    _check(0 <= value < math.inf, f"{value} in an event: a value is finite and at least 0")
    return value


def _spelled(tree: Tree) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def _built(tree: Any) -> Any:
    """The event that :func:`_tree` took apart."""
    from dp_accounting import dp_event

    if isinstance(tree, Mapping):
        made = getattr(dp_event, str(tree.get("kind")), None)
        values = {name: _built(value) for name, value in tree.items() if name != "kind"}
        try:
            _check(issubclass(made, dp_event.DpEvent), "")  # type: ignore[arg-type]
            return made(**values)  # type: ignore[misc]
        except (TypeError, UsageError):
            why = f"{dict(tree)!r}: no event of dp-accounting has this kind and these values"
            raise UsageError(why) from None
    return [_built(each) for each in tree] if isinstance(tree, list) else tree


@lru_cache(maxsize=1024)
def _parts(spelled: str) -> Counter[RoundEvent]:
    return _flattened(json.loads(spelled))


def _flattened(tree: Tree) -> Counter[RoundEvent]:
    """The events that a tree composes, Gaussian rounds as our own; no-ops are left out."""
    kind, inner = tree["kind"], tree.get("event")
    found: Counter[RoundEvent] = Counter()
    if kind == "ComposedDpEvent":
        for each in tree["events"]:
            found += _flattened(each)
    elif kind == "SelfComposedDpEvent" and isinstance(inner, dict):
        count = tree["count"]
        _check(type(count) is int, f"{count!r} times an event: it must be a whole number")
        if count:
            found += Counter({part: count * n for part, n in _flattened(inner).items()})
    elif kind == "NonPrivateDpEvent" or tree.get("noise_multiplier") == 0:
        found[RoundEvent("none", 0.0)] = 1
    elif kind == "GaussianDpEvent":
        found[RoundEvent("gaussian", float(tree["noise_multiplier"]))] = 1
    elif (
        kind == "PoissonSampledDpEvent"
        and isinstance(inner, dict)
        and (inner["kind"] == "GaussianDpEvent" and inner["noise_multiplier"])
    ):
        rate, noise = tree["sampling_probability"], inner["noise_multiplier"]
        if rate:
            found[RoundEvent("gaussian", float(noise), float(rate))] = 1
    elif kind != "NoOpDpEvent":
        found[RoundEvent("other", 0.0, other=_spelled(tree))] = 1
    return found


def _seen_through(tree: Any) -> Any:
    """The tree of an event to somebody who knows which units were sampled."""
    if isinstance(tree, list):
        return [_seen_through(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree["kind"]
    if kind in _SAMPLED:
        return _seen_through(tree["event"])
    if kind == "TruncatedSubsampledGaussianDpEvent":  # one unit may push another one out
        return {"kind": "GaussianDpEvent", "noise_multiplier": tree["noise_multiplier"] / 2}
    if kind == "MixtureOfGaussiansDpEvent" and any(tree["sensitivities"]):
        noise = tree["standard_deviation"] / max(tree["sensitivities"])
        return {"kind": "GaussianDpEvent", "noise_multiplier": noise}
    if kind == "SampledWithReplacementDpEvent":  # one unit may be drawn any number of times
        return {"kind": "NonPrivateDpEvent"}
    return {name: _seen_through(value) for name, value in tree.items()}


def _outside(
    counts: Mapping[RoundEvent, int],
    delta: float,
    adversary: Adversary,
    accountant: Accountant,
    adjacency: Adjacency,
) -> float:
    """ε at δ by dp-accounting's own accountants, which are from above too."""
    trees: Counter[str] = Counter()
    for event, count in counts.items():
        ours = event.other is None and adjacency == "replace-one"
        against: Adversary = "server" if ours else adversary
        trees[_spelled(_tree(event.dp_event(against)))] += count
    composed = tuple(sorted(trees.items()))
    pld, rdp = (_composed(composed, adjacency, name) for name in ("pld", "rdp"))
    known = ", ".join(spelled for spelled, _ in composed)
    _check(
        pld is not None or rdp is not None,
        f"{known}: no accountant of dp-accounting knows all of these with adjacency {adjacency!r}; "
        "charge what bounds them from above, or choose another adjacency",
    )
    chosen = rdp if accountant == "rdp" else pld if pld is not None else rdp
    return math.inf if chosen is None else float(chosen.get_epsilon(delta))


@lru_cache(maxsize=256)
def _composed(
    composed: tuple[tuple[str, int], ...], adjacency: Adjacency, accountant: Accountant
) -> Any:
    """dp-accounting's accountant of some events; None where it does not know all of them."""
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relation = NeighboringRelation[_RELATIONS[adjacency]]
    made = (PLDAccountant if accountant == "pld" else RdpAccountant)(neighboring_relation=relation)
    for spelled, count in composed:
        event = _built(json.loads(spelled))
        # dp-accounting 0.6 composes randomised response once into a PLD, however often it was; and
        # its PLDs take the noise of a replacement to be over what one unit's presence moves.
        counts_once = isinstance(event, dp_event.RandomizedResponseDpEvent)
        wrong = accountant == "pld" and (counts_once or adjacency == "replace-one")
        if wrong or not made.supports(event):
            return None
        try:
            made.compose(event, count)
        except ValueError as error:
            raise UsageError(f"{spelled}: dp-accounting refuses it ({error})") from None
    return made


def _composition(
    counts: Mapping[RoundEvent, int], adversary: Adversary, adjacency: Adjacency
) -> Composition:
    """The rounds as the adversary sees them, in one order, so that equal collections compare so.

    Outside of two bounds, where grids and series leave double precision, what is accounted costs
    more, never less: by little noise sampling gains next to nothing, and 1e9 times the sensitivity
    is as good as any more.
    """
    from privrec.privacy.accountant import Rounds

    seen: Counter[tuple[float, float]] = Counter()
    against: Adversary = "server" if adjacency == "replace-one" else adversary
    for event, count in counts.items():
        sigma, rate = min(event.gaussian_multiplier, _MOST_NOISE), event.rate_against(against)
        seen[sigma, rate if sigma >= _LEAST_SAMPLED else 1.0] += count
    return tuple(Rounds(sigma, rate, count) for (sigma, rate), count in sorted(seen.items()))


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
