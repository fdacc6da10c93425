"""Lazy noise: the noise of a row is owed until the row is read, then drawn at once.

DP-SGD adds noise to every row of a table in every step, also where no gradient came. What nobody
has seen can be drawn later: the sum of what the steps since the last reading would have added is
one Gaussian, whose variance is the sum of theirs. The joint law of everything that is ever read
equals that of eager noise if and only if steps are linear in the table, no step size depends on
values that still owe noise, and everything that reads a row settles it first.

:class:`LazyMemory` is a table that can only be read settled. It keeps 4 bytes a row: the step at
which the row was settled; :mod:`privrec.privacy.pending` knows what is owed since.
Source: Lim et al., "LazyDP: Co-Designing Algorithm-Software for Scalable Training of Differentially
Private Recommendation Models" (ASPLOS 2024). The debt as a variance instead of a count, the exact
treatment of momentum, weight decay and changing steps, and the reading side are this package's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from privrec.embedding.table import distinct
from privrec.errors import UsageError
from privrec.privacy import pending
from privrec.privacy.pending import LinearStep, Normals, Values

Rows = NDArray[np.int64]

EAGER_SHARE = 0.7
"""Share of rows from which settling all of them in order is cheaper: see the benchmark."""
MOST_STEPS = 2**31 - 1

_CHUNK = 1 << 11
_BLOCK_BYTES = (1 << 20) - 1  # with the buffers of the noise, about what a level-2 cache holds
_STAMP = np.uint32(MOST_STEPS)
_OWN = np.uint32(1 << 31)  # the row moved in the step of its stamp and still owes that step's noise


class LazyMemory:
    """A table of rows under DP-SGD whose noise is drawn when a row is read.

    Promise: what is read has, jointly, the law of noise added to every row in every step. Every way
    out pays the noise of what it shows: rows, the whole table, conversion to an array, copies and
    pickles. Interrupted at any moment, rows owe at least what they had owed and was not added.

    Args:
        values: float, shape ``(rows, width)``, C-contiguous (UsageError otherwise), taken over and
            not copied: the caller must not keep other views of it.
        moving: whether steps have momentum or weight decay, so that rows move while they owe; it
            doubles the memory.

    Attributes:
        drawn: rows that noise was drawn for; eager noise draws for every row in each step.
    """

    def __init__(
        self, values: Values, source: Normals | None = None, *, moving: bool = False
    ) -> None:
        is_table = values.ndim == 2 and values.dtype.kind == "f" and values.size
        if not is_table or not values.flags.c_contiguous:
            raise UsageError(
                f"a table of {values.dtype} of shape {values.shape}: it must be contiguous, of "
                "floats, with rows and columns"
            )
        self.shape: tuple[int, int] = values.shape
        self.dtype = values.dtype
        self.is_moving = moving
        self.drawn = 0
        self._source = source or Normals()
        self._sum, self._drift = pending.PendingNoise(), pending.PendingSteps()
        self._stamps = np.zeros(len(values), np.uint32)
        self._block = max(1, _BLOCK_BYTES // (4 * self.shape[1]))
        self.__tables: tuple[Values, ...] = (values, *([np.zeros_like(values)] if moving else []))
        room = self._block, self.shape[1]
        self._held = tuple(np.empty(room, self.dtype) for _ in self.__tables)

    @property
    def steps(self) -> int:
        """Steps since everything was settled."""
        return self._drift.steps if self.is_moving else self._sum.steps

    def owe(self, variance: float) -> None:
        """Let every row owe noise of one more step, of this variance in each coefficient."""
        self.step(np.zeros(0, np.int64), np.zeros((0, self.shape[1]), self.dtype), variance)

    def step(
        self,
        rows: Rows,
        gradients: Values,
        variance: float,
        update: LinearStep | None = None,
        *,
        which: Rows | None = None,
    ) -> None:
        """Take one step on some rows, and let all of them owe its noise, in up to 2^31 steps.

        Args:
            rows: in any order; repeated ones add up.
            gradients: of the table's type, shape ``(len(rows), width)``. Without ``update``, which
                is required exactly where rows move, they are added as they are.
            variance: of the noise in each coefficient of the gradient, or of what is added.
            which: for each row the number of its gradient, where many rows share one, as the rows
                of a bag do; they are in order when None.
        """
        self._check_rows(rows)
        count = len(rows) if which is None else len(gradients)
        if gradients.shape != (count, self.shape[1]) or gradients.dtype != self.dtype:
            raise UsageError(
                f"{len(rows)} rows and gradients of {gradients.dtype} of shape {gradients.shape}: "
                f"they must be {self.dtype} of shape ({count}, {self.shape[1]})"
            )
        if which is not None and (which.shape != rows.shape or which.dtype.kind not in "iu"):
            raise UsageError(f"{len(rows)} rows and gradients of {len(which)}: name one for each")
        if not isinstance(update, LinearStep | None):
            raise UsageError(
                f"a step by {type(update).__name__}: lazy noise is exact for SGD with momentum and "
                "weight decay; adaptive steps depend on noise that is not drawn yet. Use Update, "
                "or settle everything in each step"
            )
        if (update is None) == self.is_moving:
            raise UsageError("a step with an update exactly where rows move; see moving")
        if not 0 <= variance < np.inf:
            raise UsageError(f"noise of variance {variance}: it must be finite and at least 0")
        if self.steps >= MOST_STEPS:
            raise UsageError(f"{self.steps} steps are owed: settle everything at least once before")
        if update is None:
            if variance:
                self._sum.append(variance)  # first: what is interrupted has its noise
            if len(rows):
                _accumulate(self.__tables[0], rows, gradients, which)
            return
        self.settle(rows)
        moved, place = np.unique(rows, return_inverse=True)
        total = np.zeros((len(moved), self.shape[1]), self.dtype)
        if len(rows):
            _accumulate(total, place.astype(np.int64), gradients, which)
        values, velocities = (table[moved] for table in self.__tables)
        (a, b), (c, d) = update.matrix.astype(self.dtype)
        first, second = update.gain.astype(self.dtype)
        self._drift.append(update, variance)
        self.__tables[0][moved] = a * values + b * velocities + first * total
        self.__tables[1][moved] = c * values + d * velocities + second * total
        self._stamps[moved] = np.uint32(self.steps) | _OWN

    def settle(self, rows: Rows | None = None) -> None:
        """Pay what some rows owe, or all of them; UsageError, and no draw, for unknown rows."""
        if rows is not None:
            self._check_rows(rows)
        if not self.steps:
            return
        if rows is None:
            self._settle_all()
            return
        debtors = distinct(rows)
        stamps = self._stamps.take(debtors)
        owing = stamps != self.steps
        if not owing.all():
            debtors, stamps = debtors[owing], stamps[owing]
        if len(debtors) >= EAGER_SHARE * self.shape[0]:
            self._settle_all()
            return
        for start in range(0, len(debtors), self._block):
            part = debtors[start : start + self._block]
            held = tuple(buffer[: len(part)] for buffer in self._held)  # they stay in the cache
            for table, buffer in zip(self.__tables, held, strict=True):
                np.take(table, part, axis=0, out=buffer, mode="clip")
            self._settle_block(part, held, stamps[start : start + self._block])

    def settled(self, rows: Rows | None = None) -> Values:
        """A copy of some rows, or of the whole table, with all their noise."""
        self.settle(rows)
        return self.__tables[0].copy() if rows is None else self.__tables[0][rows]

    def velocities(self) -> Values | None:
        """A copy of the momentum buffer with all its noise, None for plain steps."""
        self.settle()
        return self.__tables[1].copy() if self.is_moving else None

    def load_velocities(self, velocities: Values) -> None:
        """Replace the momentum buffer by a settled one; what was owed is drawn first."""
        self.settle()
        self.__tables[1][:] = velocities

    def __getitem__(self, key: Any) -> Values:
        rows = np.arange(self.shape[0])
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        chosen = rows[first]
        taken = self.settled(np.atleast_1d(chosen).ravel())
        shaped = taken.reshape(*np.shape(chosen), self.shape[1])
        return np.asarray(shaped[(..., *rest)] if rest else shaped)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a view of a table that will owe noise is never given: copy it")
        return self.settled().astype(dtype or self.dtype, copy=False)

    def __copy__(self) -> Values:
        return self.settled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Values:
        return self.settled()

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (self.settled(),)

    def __repr__(self) -> str:
        return f"LazyMemory({self.shape[0]} x {self.shape[1]}, {self.steps} steps owed)"

    def _settle_all(self) -> None:
        """Pay everything, block by block in order, and forget the steps."""
        for start in range(0, self.shape[0], self._block):
            part = slice(start, start + self._block)
            held = tuple(table[part].copy() for table in self.__tables)
            self._settle_block(part, held, self._stamps[part])
        self._stamps.fill(0)
        self._sum, self._drift = pending.PendingNoise(), pending.PendingSteps()

    def _settle_block(
        self, part: Rows | slice, held: tuple[Values, ...], stamps: NDArray[np.uint32]
    ) -> None:
        """Bring copies of some rows from their stamps to now, and write them back when paid."""
        if self.is_moving:
            self._move(held[0], held[1], stamps)
        else:
            self._source.add(held[0], self._sum.since(stamps))
        self.drawn += int(np.count_nonzero(stamps != self.steps))
        for table, paid in zip(self.__tables, held, strict=True):
            table[part] = paid
        self._stamps[part] = self.steps

    def _move(self, values: Values, velocities: Values, stamps: NDArray[np.uint32]) -> None:
        """Let rows drift from their stamps to now, in place, with the noise of these steps."""
        at = (stamps & _STAMP).astype(np.int64)
        drift = self._drift.since(at)[0]
        owed = self._drift.since(at - (stamps >> np.uint32(31)).astype(np.int64))[1]
        (a, b), (c, d) = drift.astype(self.dtype).transpose(1, 2, 0)[..., None]
        first, cross, rest = (each.astype(self.dtype)[:, None] for each in pending.factor(owed))
        moved = a * values + b * velocities
        velocities *= d
        velocities += c * values
        noise = np.zeros_like(values)
        self._source.add(noise, np.ones(len(noise)))
        np.add(moved, noise * first, out=values)
        velocities += noise * cross
        noise[:] = 0
        self._source.add(noise, np.ones(len(noise)))
        velocities += noise * rest

    def _check_rows(self, rows: Rows) -> None:
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise UsageError(f"rows of {rows.dtype} of shape {rows.shape}: give a list of integers")
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.shape[0]):
            raise UsageError(
                f"rows from {rows.min()} to {rows.max()} of a table of {self.shape[0]}: "
                "they are counted from 0"
            )


def _accumulate(table: Values, rows: Rows, values: Values, which: Rows | None) -> None:
    """``table[rows] += values[which]``, where repeated rows add up; spread out in the cache."""
    target, added = torch.from_numpy(table), torch.from_numpy(np.ascontiguousarray(values))
    index = torch.from_numpy(np.ascontiguousarray(rows, np.int64))
    chosen = None if which is None else torch.from_numpy(np.ascontiguousarray(which, np.int64))
    buffer = added.new_empty(0)
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        if chosen is None:
            spread = added[part]
        else:
            spread = torch.index_select(added, 0, chosen[part], out=buffer.resize_(0))
        target.index_add_(0, index[part], spread)
