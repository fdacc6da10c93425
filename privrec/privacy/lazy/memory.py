"""A table whose noise is lazy, and that can only be read settled.

Every way out of a :class:`LazyMemory` pays the noise of what it shows: rows, the whole table,
norms, digests, conversion to an array, state, copies and pickles. There is no method
that shows a value which still owes noise.
"""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from privrec.errors import UsageError
from privrec.privacy.lazy.noise import LazyNoise, Rows
from privrec.privacy.lazy.pending import LinearStep
from privrec.privacy.lazy.stream import NoiseSource, Values

_CHUNK = 1 << 11


class LazyMemory:
    """A table of rows under DP-SGD whose noise is drawn when a row is read.

    Promise: what is read has, jointly, the law of noise added to every row in every step.

    Args:
        values: float, shape ``(rows, width)``, C-contiguous, taken over and not copied: the caller
            must not keep other views of it.
        source: what draws; see :class:`privrec.privacy.lazy.noise.LazyNoise`.
        moving: whether steps have momentum or weight decay; it doubles the memory.

    Raises:
        UsageError: when the values are not such a table.
    """

    def __init__(
        self,
        values: Values,
        source: NoiseSource | None = None,
        *,
        moving: bool = False,
    ) -> None:
        if values.ndim != 2 or values.dtype.kind != "f" or not values.flags.c_contiguous:
            raise UsageError(
                f"a table of {values.dtype} of shape {values.shape}: it must be contiguous, of "
                "floats, with rows and columns"
            )
        self.noise = LazyNoise(values.shape[0], values.shape[1], source, moving=moving)
        velocities = (np.zeros_like(values),) if moving else ()
        self.__tables: tuple[Values, ...] = (values, *velocities)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and coefficients a row."""
        return (self.noise.rows, self.noise.width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.__tables[0].dtype

    @property
    def is_moving(self) -> bool:
        """Whether steps have momentum or weight decay."""
        return len(self.__tables) > 1

    def owe(self, variance: float) -> None:
        """Let every row owe noise of one more step; see :meth:`LazyNoise.owe`."""
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
        """Take one step on some rows, and let all of them owe its noise.

        Args:
            rows: which rows, in any order; repeated ones add up.
            gradients: of the table's type, shape ``(len(rows), width)``. Without ``update`` they
                are added as they are.
            variance: of the noise in each coefficient: of the gradient with ``update``, else of
                what is added.
            update: the step; required exactly where rows move.
            which: for each row the number of its gradient, where many rows share one, as the rows
                of a bag do; they are in order when None.

        Raises:
            UsageError: when an argument is not of its shape, type or range.
        """
        self._check(rows, gradients, which)
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
        if update is None:
            self.noise.owe(variance)  # first: what is refused or interrupted has its noise
            if len(rows):
                _accumulate(self.__tables[0], rows, gradients, which)
            return
        self.settle(rows)
        distinct, place = np.unique(rows, return_inverse=True)
        total = np.zeros((len(distinct), self.shape[1]), self.dtype)
        if len(rows):
            _accumulate(total, place.astype(np.int64), gradients, which)
        values, velocities = (table[distinct] for table in self.__tables)
        (a, b), (c, d) = update.matrix.astype(self.dtype)
        first, second = update.gain.astype(self.dtype)
        self.noise.owe(variance, update)
        self.__tables[0][distinct] = a * values + b * velocities + first * total
        self.__tables[1][distinct] = c * values + d * velocities + second * total
        self.noise.moved(distinct)

    def settle(self, rows: Rows | None = None) -> None:
        """Pay what some rows owe, or all of them; nothing is shown."""
        if rows is not None:
            self._check_rows(rows)
        if not self.noise.steps:
            return
        if rows is None:
            self.noise.settle_all(self.__tables)
        else:
            self.noise.settle(self.__tables, rows)

    def settled(self, rows: Rows | None = None) -> Values:
        """A copy of some rows, or of the whole table, with all their noise."""
        self.settle(rows)
        return self.__tables[0].copy() if rows is None else self.__tables[0][rows]

    def velocities(self) -> Values | None:
        """A copy of the momentum buffer with all its noise, None for plain steps."""
        self.settle()
        return self.__tables[1].copy() if self.is_moving else None

    def load(self, values: Values, velocities: Values | None = None) -> None:
        """Replace the whole table by settled values; what was owed is drawn and forgotten."""
        self.settle()
        self.__tables[0][:] = values
        if velocities is not None and self.is_moving:
            self.__tables[1][:] = velocities

    def norm(self) -> float:
        """The Euclidean norm of the settled table."""
        self.settle()
        return float(np.linalg.norm(self.__tables[0].astype(np.float64)))

    def digest(self) -> str:
        """SHA-256 of the settled table."""
        self.settle()
        return hashlib.sha256(self.__tables[0].data.cast("B")).hexdigest()

    def state_dict(self) -> dict[str, Values]:
        """The settled table, and its settled velocities where it has them."""
        velocities = self.velocities()
        moving = {} if velocities is None else {"velocities": velocities}
        return {"values": self.settled(), **moving}

    def load_state_dict(self, state: dict[str, Values]) -> None:
        """Replace the table by what :meth:`state_dict` gave."""
        self.load(state["values"], state.get("velocities"))

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "noise" and hasattr(self, "noise"):
            self._refuse()
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"LazyMemory({self.shape[0]} x {self.shape[1]}, {self.noise.steps} steps owed)"

    def _refuse(self) -> NoReturn:
        raise UsageError("the noise of a table is never replaced: what is owed would be forgotten")

    def _check(self, rows: Rows, gradients: Values, which: Rows | None) -> None:
        self._check_rows(rows)
        count = len(rows) if which is None else len(gradients)
        if gradients.shape != (count, self.shape[1]) or gradients.dtype != self.dtype:
            raise UsageError(
                f"{len(rows)} rows and gradients of {gradients.dtype} of shape {gradients.shape}: "
                f"they must be {self.dtype} of shape ({count}, {self.shape[1]})"
            )
        if which is not None and (which.shape != rows.shape or which.dtype.kind not in "iu"):
            raise UsageError(
                f"{len(rows)} rows and the gradients of {len(which)}: name one for each row"
            )

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
