"""Probes of lazy noise: whoever reads a row gets all the noise that it owes, and once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from privrec.audit.judging import (
    CheckResult,
    judged,
    of_many,
    product_p,
    seen_deviation,
    variance_p,
)
from privrec.privacy.lazy import LazyMemory
from privrec.privacy.pending import LinearStep, Normals
from privrec.randomness import SecretRoot

Floats = NDArray[np.float64]

ROWS, WIDTH = 6000, 32
_VARIANCES = (1.0, 4.0, 2.0, 3.0)
_READS: tuple[tuple[str, Callable[[LazyMemory], object]], ...] = (
    ("rows", lambda memory: memory[::2]),
    ("the table", lambda memory: memory.settled()),
    ("an array", lambda memory: np.asarray(memory)),
    ("a state", lambda memory: memory.state_dict()["values"]),
)


def probe(root: SecretRoot) -> Iterator[CheckResult]:
    """All probes of lazy noise.

    Args:
        root: the audit's secret.
    """
    yield _settled(LazyMemory(np.zeros((ROWS, WIDTH)), Normals(root)))
    yield _moving(root)


def _settled(memory: LazyMemory) -> CheckResult:
    """Each way to read gives the variance owed since the last one, independent of it.

    A row read between others owes less than they do; after each read nothing is owed any more.
    """
    p_values, worst, left = [], 1.0, 0.0
    before, total = np.zeros((ROWS, WIDTH)), 0
    known = np.zeros((ROWS, WIDTH))
    for (_, read), variance in zip(_READS, _VARIANCES, strict=True):
        memory.owe(variance)
        early = memory[: ROWS // 4].astype(np.float64)
        memory.owe(2 * variance)
        shown = np.asarray(read(memory), np.float64)
        # What is shown has been paid: a second look shows the same.
        again = np.asarray(read(memory), np.float64)
        left = max(left, float(np.abs(again - shown).max()))
        now = memory.settled().astype(np.float64)
        first, rest = slice(None, ROWS // 4), slice(ROWS // 4, None)
        steps = (
            (early - known[first], variance),
            (now[first] - early, 2 * variance),
            (now[rest] - known[rest], 3 * variance),
        )
        for change, owed in steps:
            ratio = float((change**2).mean() / owed)
            p_values.append(float(variance_p(ratio, change.size)))
            worst = max(worst, ratio, key=lambda each: abs(math.log(max(each, 1e-9))))
            total += change.size
        increment = (now - known) / math.sqrt(3 * variance)
        p_values.append(float(product_p(np.array((increment * before).sum()), before.size)))
        before, known = increment, now
    return judged(
        "lazy noise settled before a read",
        of_many(np.array(p_values)) if left == 0 else 0.0,
        f"{math.sqrt(worst):.4f} of what was owed at worst, over {len(_READS)} ways to read; "
        f"{left:g} is left after a read",
        f"1, independent of all reads before; {seen_deviation(ROWS * WIDTH / 4):.1%} is seen",
    )


def _moving(root: SecretRoot) -> CheckResult:
    """With momentum and weight decay: the covariance is that of steps taken one by one."""
    update = LinearStep(0.1, momentum=0.8, weight_decay=0.05)
    memory = LazyMemory(np.zeros((ROWS, WIDTH)), Normals(root), moving=True)
    matrix, gain = update.matrix, update.gain
    covariance = np.zeros((2, 2))
    nothing = np.zeros(0, np.int64), np.zeros((0, WIDTH))
    for variance in _VARIANCES:
        memory.step(*nothing, variance, update)
        covariance = matrix @ covariance @ matrix.T + variance * np.outer(gain, gain)
    velocities = memory.velocities()
    values = memory.settled().astype(np.float64)
    moved = np.zeros_like(values) if velocities is None else velocities.astype(np.float64)
    ratios = np.array(
        [
            (values**2).mean() / covariance[0, 0],
            (moved**2).mean() / covariance[1, 1],
            # What of the velocity the value does not tell.
            ((moved - covariance[1, 0] / covariance[0, 0] * values) ** 2).mean()
            / (covariance[1, 1] - covariance[1, 0] ** 2 / covariance[0, 0]),
        ]
    )
    return judged(
        "lazy noise with momentum",
        of_many(variance_p(ratios, values.size)),
        "value, velocity and what is left of it: "
        + ", ".join(f"{math.sqrt(each):.4f}" for each in ratios),
        f"1 each; {seen_deviation(values.size):.1%} is seen",
    )
