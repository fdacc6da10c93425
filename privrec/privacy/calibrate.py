"""From a target to settings: the noise multiplier that meets an ε, and what a plan will cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from privrec.errors import UsageError
from privrec.privacy import events
from privrec.privacy.events import DIGITS, Adversary, RoundEvent, epsilon

_DIGITS = 4
_STEPS = 9 * 10 ** (_DIGITS - 1)  # numbers of four significant digits in a decade
_LEAST, _MOST = -2, 6  # noise multipliers from 0.01 to a million


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    event_of: Callable[[float], RoundEvent],
    rounds: int,
    adversary: Adversary,
    before: RoundEvent | None = None,
) -> float:
    """The smallest noise multiplier of four significant digits that keeps ε within a target.

    Promise: :func:`privrec.privacy.events.epsilon` of ``rounds`` such rounds is at most
    ``target_epsilon``, and with one unit less in the last digit it is more (unless the result is
    the least noise that is offered, 0.01).

    Args:
        target_epsilon: largest ε at the end of all rounds, at least 0.0001.
        delta: the δ of the claim, in [1e-10, 1).
        event_of: the event of a round with a noise multiplier, so that ε falls as noise grows; it
            may refuse too little noise with a ``UsageError``.
        before: what is charged before the first round, if anything; the target covers it.

    Raises:
        UsageError: also when not even a noise multiplier of a million meets the target.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon >= 10.0**-DIGITS):
        raise UsageError(
            f"epsilon {target_epsilon}: it must be finite and at least {10.0**-DIGITS}, "
            'to which ε is rounded up; for no guarantee at all choose noise = "none"'
        )
    _check_rounds(rounds)
    events.check_delta(delta)

    def holds(candidate: int, against: Adversary) -> bool:
        try:
            event = event_of(_number(candidate))
        except UsageError:
            return False
        return epsilon(_events(event, rounds, before), delta, against) <= target_epsilon

    def first(against: Adversary, last: int) -> int:
        return bisect_left(range(last), True, key=lambda candidate: holds(candidate, against))

    # What holds against the server holds against recipients too, and costs nothing to find.
    enough = first("server", (_MOST - _LEAST) * _STEPS)
    if adversary == "recipients":
        enough = first("recipients", enough)
    if not holds(enough, adversary):
        event_of(_number(enough))  # says what is wrong with the event, if anything is
        raise UsageError(
            f"epsilon {target_epsilon} at delta {delta} over {rounds} rounds: not met even by a "
            f"noise multiplier of {_number(enough):g}; allow a larger epsilon or fewer rounds"
        )
    return _number(enough)


def epsilon_by_round(
    event: RoundEvent, rounds: int, delta: float, points: int, before: RoundEvent | None = None
) -> list[tuple[int, float, float]]:
    """What rounds of one kind will cost, before any data is touched.

    Numbers of rounds, ``points`` of them spread from 1 to ``rounds``, each with its ε against the
    recipients of the models and against the server. Refused is what :func:`noise_multiplier_for`
    refuses.
    """
    _check_rounds(rounds)
    count = max(2, min(points, rounds))
    after = {round(1 + (rounds - 1) * place / (count - 1)) for place in range(count)}
    spent = [(each, _events(event, each, before)) for each in sorted(after)]
    return [
        (each, epsilon(charged, delta, "recipients"), epsilon(charged, delta, "server"))
        for each, charged in spent
    ]


def _events(event: RoundEvent, rounds: int, before: RoundEvent | None) -> Counter[RoundEvent]:
    return Counter({event: rounds}) + Counter([] if before is None else [before])


def _number(candidate: int) -> float:
    """The candidates in ascending order: all numbers of four significant digits from 0.01 on."""
    decade, place = divmod(candidate, _STEPS)
    return float(f"{10 ** (_DIGITS - 1) + place}e{decade + _LEAST - _DIGITS + 1}")


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise UsageError(f"{rounds} rounds: there must be at least 1")
