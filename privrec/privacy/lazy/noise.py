"""Lazy noise: the noise of a row is owed until the row is read, then drawn at once.

DP-SGD adds noise to every row of a table in every step, also where no gradient came. Noise that
nobody has seen can be drawn later: the sum of what the steps since the last reading would have
added is one Gaussian, whose variance is the sum of theirs. The joint law of everything that is ever
read equals that of eager noise if and only if steps are linear in the table, no step size depends
on values that still owe noise, and everything that reads a row settles it first.

:class:`LazyNoise` keeps 4 bytes a row: the step at which the row was settled. The table itself
belongs to :class:`privrec.privacy.lazy.memory.LazyMemory`, which has no way out that does not
settle.
Source: Lim et al., "LazyDP: Co-Designing Algorithm-Software for Scalable Training of Differentially
Private Recommendation Models" (ASPLOS 2024), whose deferral it is. The debt as a variance instead
of a count, the exact treatment of momentum, weight decay and changing steps, and the reading side
are this package's own.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privrec.errors import UsageError
from privrec.privacy.lazy.pending import Interval, LinearStep, PendingNoise, PendingSteps
from privrec.privacy.lazy.stream import NoiseSource, Normals, Values, Variances
from privrec.randomness import Name

Rows = NDArray[np.int64]

EAGER_SHARE = 0.7
"""Share of rows from which settling all of them in order is cheaper: see the benchmark."""
MOST_STEPS = 2**31 - 1

_BLOCK_BYTES = (1 << 20) - 1  # with the buffers of the noise, about what a level-2 cache holds
_STAMP = np.uint32(MOST_STEPS)
_OWN = np.uint32(1 << 31)  # the row moved in the step of its stamp and still owes that step's noise


class LazyNoise:
    """The noise that the rows of a table owe.

    Promise: whenever rows are settled, they and all that was settled before have the joint law of
    noise that was added step by step to everything. Interrupted at any moment, rows owe at least
    what they had owed and was not added.

    Args:
        rows: rows of the table, at least 1.
        width: coefficients a row, at least 1.
        source: what draws; :class:`Normals` from a root of the operating system when None.
        moving: whether steps have momentum or weight decay, so that rows move while they owe.

    Raises:
        UsageError: when a size is below 1.
    """

    def __init__(
        self, rows: int, width: int, source: NoiseSource | None = None, *, moving: bool = False
    ) -> None:
        if rows < 1 or width < 1:
            raise UsageError(f"lazy noise for {rows} rows of {width}: both must be at least 1")
        self.source: NoiseSource = source or Normals()
        self.rows, self.width = rows, width
        self._sum, self._drift = PendingNoise(), PendingSteps()
        self._moving = moving
        self._stamps = np.zeros(rows, np.uint32)
        self._block = max(1, _BLOCK_BYTES // (4 * width))
        self._held: tuple[Values, ...] = ()
        self.drawn = 0
        """Rows that noise was drawn for so far; eager noise draws for every row in each step."""

    @property
    def steps(self) -> int:
        """Steps since everything was settled."""
        return self._drift.steps if self._moving else self._sum.steps

    def owe(self, variance: float, update: LinearStep | None = None) -> None:
        """Enter one step: from now on every row owes its noise too.

        Args:
            variance: of the noise in each coefficient, at least 0, in squared units of the table.
                With ``update`` it is that of the noise in the gradient.
            update: the step, for a table that moves.

        Raises:
            UsageError: when the variance is negative or not finite, the update is missing or not
                wanted, or 2^31 steps are owed.
        """
        if not (math.isfinite(variance) and variance >= 0):
            raise UsageError(f"noise of variance {variance}: it must be finite and at least 0")
        if (update is None) == self._moving:
            raise UsageError(
                f"a step {'without' if self._moving else 'with'} an update on a table that was "
                f"made with moving={self._moving}: give updates exactly where rows move"
            )
        if update is None and not variance:
            return
        if self.steps >= MOST_STEPS:
            raise UsageError(f"{self.steps} steps are owed: settle everything at least once before")
        if update is None:
            self._sum.append(variance)
        else:
            self._drift.append(update, variance)

    def moved(self, rows: Rows) -> None:
        """Say that distinct rows took the last step with their gradient, but without its noise."""
        self._stamps[rows] = np.uint32(self.steps) | _OWN

    def settle(self, tables: tuple[Values, ...], rows: Rows, *context: Name) -> None:
        """Pay what rows owe, in place.

        Args:
            tables: the values, and for moving rows their velocities: shape ``(rows, width)`` each.
            rows: which rows, in any order and with repetitions, within range.
            *context: names the draw, so that the same one can be made again after a crash.

        Raises:
            UsageError: when a row is not of the table; nothing is drawn then.
        """
        distinct = _distinct(rows)
        if len(distinct) and not 0 <= distinct[0] <= distinct[-1] < self.rows:
            raise UsageError(
                f"rows from {distinct[0]} to {distinct[-1]} of a table of {self.rows}: they are "
                "counted from 0"
            )
        stamps = np.take(self._stamps, distinct, mode="clip")
        owing = stamps != self.steps
        debtors, stamps = (distinct, stamps) if owing.all() else (distinct[owing], stamps[owing])
        if len(debtors) >= EAGER_SHARE * self.rows:
            self.settle_all(tables, *context)
            return
        if not len(debtors):
            return
        self.source.begin(*context)
        debt = self._debt(stamps)
        for start in range(0, len(debtors), self._block):
            part = debtors[start : start + self._block]
            held = self._taken(tables, part)
            self._pay(held, debt, slice(start, start + self._block))
            for table, paid in zip(tables, held, strict=True):
                table[part] = paid
            self._stamps[part] = self.steps
        self.drawn += len(debtors)

    def settle_all(self, tables: tuple[Values, ...], *context: Name) -> None:
        """Pay everything, block by block in order, and forget the steps."""
        if not self.steps:
            return
        self.source.begin(*context)
        for start in range(0, self.rows, self._block):
            part = slice(start, start + self._block)
            held = tuple(table[part].copy() for table in tables)
            stamps = self._stamps[part]
            self.drawn += int(np.count_nonzero(stamps != self.steps))
            self._pay(held, self._debt(stamps), slice(None))
            for table, paid in zip(tables, held, strict=True):
                table[part] = paid
            self._stamps[part] = self.steps
        self._stamps.fill(0)
        self._sum.clear()
        self._drift.clear()

    def variances(self, rows: Rows) -> NDArray[np.float64]:
        """Variance of what rows owe in each coefficient of the value, shape ``(len(rows),)``."""
        stamps = self._stamps[rows]
        if self._moving:
            return self._interval(stamps).noise[:, 0, 0]
        return self._sum.since(stamps)

    def _taken(self, tables: tuple[Values, ...], rows: Rows) -> tuple[Values, ...]:
        """Copies of rows, in buffers that stay in the cache from block to block."""
        if not self._held:
            self._held = tuple(np.empty((self._block, self.width), t.dtype) for t in tables)
        buffers = tuple(buffer[: len(rows)] for buffer in self._held)
        for table, buffer in zip(tables, buffers, strict=True):
            np.take(table, rows, axis=0, out=buffer, mode="clip")
        return buffers

    def _debt(self, stamps: NDArray[np.uint32]) -> Variances | Interval:
        if self._moving:
            return self._interval(stamps)
        return self._sum.since(stamps)

    def _pay(self, tables: tuple[Values, ...], debt: Variances | Interval, part: slice) -> None:
        if not isinstance(debt, Interval):
            self.source.add(tables[0], debt[part])
            return
        values, velocities = tables
        due = Interval(debt.drift[part], debt.noise[part])
        (a, b), (c, d) = due.drift.astype(values.dtype).transpose(1, 2, 0)[..., None]
        moved = a * values + b * velocities
        velocities *= d
        velocities += c * values
        first, cross, rest = due.factor()
        noise = np.zeros_like(values)
        self.source.add(noise, np.ones(len(noise)))
        np.add(moved, noise * _column(first, values), out=values)
        velocities += noise * _column(cross, values)
        noise[:] = 0
        self.source.add(noise, np.ones(len(noise)))
        velocities += noise * _column(rest, values)

    def _interval(self, stamps: NDArray[np.uint32]) -> Interval:
        at = (stamps & _STAMP).astype(np.int64)
        return self._drift.since(at, at - (stamps >> np.uint32(31)).astype(np.int64))


def _distinct(rows: Rows) -> Rows:
    ordered = np.sort(rows)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(rows) else ordered


def _column(factor: NDArray[np.float64], like: Values) -> Values:
    return factor.astype(like.dtype)[:, None]
