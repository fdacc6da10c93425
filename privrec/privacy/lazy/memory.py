"""A table whose noise is lazy, and that can only be read settled.

Every way out of a :class:`LazyMemory` pays the noise of what it shows: rows, the whole table,
norms, digests, conversion to an array, state, copies and pickles. There is no method
that shows a value which still owes noise.
"""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from privrec.errors import IntegrityError, UsageError
from privrec.privacy.lazy.journal import Disk, Journal
from privrec.privacy.lazy.noise import LazyNoise, Rows
from privrec.privacy.lazy.pending import Update
from privrec.privacy.lazy.stream import NoiseSource, Values

_UPDATE = struct.Struct("<dddd?")
_STEP, _SETTLE, _ALL = b"s", b"r", b"a"
_CHUNK = 1 << 11


class LazyMemory:
    """A table of rows under DP-SGD whose noise is drawn when a row is read.

    Promise: what is read has, jointly, the law of noise added to every row in every step. With a
    journal, a crash at any moment leaves every value that was ever read as it was, and every row
    with at least the noise that was owed.

    Args:
        values: float or signed integers, shape ``(rows, width)``, C-contiguous, taken over and not
            copied: the caller must not keep other views of it.
        source: what draws; see :class:`privrec.privacy.lazy.noise.LazyNoise`.
        moving: whether steps have momentum or weight decay; it doubles the memory.
        journal: where to write ahead; None for a table that a crash may lose.

    Raises:
        UsageError: when the values are not such a table.
    """

    def __init__(
        self,
        values: Values,
        source: NoiseSource | None = None,
        *,
        moving: bool = False,
        journal: Journal | None = None,
    ) -> None:
        if values.ndim != 2 or values.dtype.kind not in "fi" or not values.flags.c_contiguous:
            raise UsageError(
                f"a table of {values.dtype} of shape {values.shape}: it must be contiguous, of "
                "floats or signed integers, with rows and columns"
            )
        self.noise = LazyNoise(values.shape[0], values.shape[1], source, moving=moving)
        if bool(self.noise.source.unit()) != (values.dtype.kind == "i"):
            raise UsageError(
                f"noise of {type(self.noise.source).__name__} for a table of {values.dtype}: "
                "Normals go with floats, Skellams with integers"
            )
        velocities = (np.zeros_like(values),) if moving else ()
        self.__tables: tuple[Values, ...] = (values, *velocities)
        self._journal = journal
        if journal is not None and not journal.is_begun:
            journal.begin(_packed(self.__tables))

    @classmethod
    def recover(
        cls, directory: Path, source: NoiseSource, *, disk: Disk | None = None
    ) -> LazyMemory:
        """The table that a crash left, with all that was ever read from it.

        Args:
            directory: of its journal.
            source: from the same secret root that the table had.
            disk: what the journal is read from and written to.

        Raises:
            IntegrityError: when the journal is not what was written.
        """
        journal = Journal(directory, disk)
        tables = _unpacked(journal.snapshot())
        memory = cls(tables[0], source, moving=len(tables) > 1, journal=journal)
        memory.__tables = tables
        for kind, content, digest in journal.entries():
            memory._replay(kind, content, digest)
        return memory

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
        update: Update | None = None,
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
        if not isinstance(update, Update | None):
            raise UsageError(
                f"a step by {type(update).__name__}: lazy noise is exact for SGD with momentum and "
                "weight decay; adaptive steps depend on noise that is not drawn yet. Use Update, "
                "or settle everything in each step"
            )
        if (update is None) == self.is_moving:
            raise UsageError("a step with an update exactly where rows move; see moving")
        if not 0 <= variance < np.inf:
            raise UsageError(f"noise of variance {variance}: it must be finite and at least 0")
        if self._journal is not None:
            self.settle(rows)  # an entry of its own, so that replaying draws it alike
            gradients = gradients if which is None else gradients[which]
            self._journal.append(_STEP, _entry(rows, gradients, variance, update))
            which = None
        self._step(rows, gradients, variance, update, which)

    def settle(self, rows: Rows | None = None) -> None:
        """Pay what some rows owe, or all of them; nothing is shown."""
        if rows is not None:
            self._check_rows(rows)
        if not self.noise.steps:
            return
        if rows is None:
            name = self._written(_ALL, b"")
            self.noise.settle_all(self.__tables, *name)
        else:
            name = self._written(_SETTLE, np.asarray(rows, np.int64).tobytes())
            self.noise.settle(self.__tables, rows, *name)

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
        self.compact()

    def compact(self) -> None:
        """Settle everything and begin the journal anew from here, if there is one."""
        self.settle()
        if self._journal is not None:
            self._journal.begin(_packed(self.__tables))

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

    def _step(
        self,
        rows: Rows,
        gradients: Values,
        variance: float,
        update: Update | None,
        which: Rows | None = None,
    ) -> None:
        if update is None:
            self.noise.owe(variance)  # first: what is refused or interrupted has its noise
            if len(rows):
                _accumulate(self.__tables[0], rows, gradients, which)
            return
        if self._journal is None:
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

    def _written(self, kind: bytes, content: bytes) -> tuple[bytes, ...]:
        return () if self._journal is None else (self._journal.append(kind, content),)

    def _replay(self, kind: bytes, content: bytes, digest: bytes) -> None:
        if kind == _STEP:
            self._step(*_read_entry(content, self.shape[1], self.dtype))
        elif kind == _SETTLE:
            self.noise.settle(self.__tables, np.frombuffer(content, np.int64), digest)
        elif kind == _ALL:
            self.noise.settle_all(self.__tables, digest)
        else:
            raise IntegrityError(f"a journal entry of kind {kind!r}: written by another version")

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


def _entry(rows: Rows, gradients: Values, variance: float, update: Update | None) -> bytes:
    made = update or Update(0.0)
    fields = (variance, made.lr, made.momentum, made.weight_decay, made.nesterov)
    head = struct.pack("<?", update is not None) + _UPDATE.pack(*fields)
    where = np.asarray(rows, np.int64).tobytes()
    return head + where + np.ascontiguousarray(gradients).tobytes()


def _read_entry(
    content: bytes, width: int, dtype: np.dtype[Any]
) -> tuple[Rows, Values, float, Update | None]:
    moving, (variance, *fields) = content[0], _UPDATE.unpack_from(content, 1)
    body = content[1 + _UPDATE.size :]
    count = len(body) // (8 + width * dtype.itemsize)
    rows = np.frombuffer(body, np.int64, count).copy()
    gradients = np.frombuffer(body, dtype, offset=8 * count).reshape(count, width)
    return rows, gradients.copy(), variance, Update(*fields) if moving else None


def _packed(tables: tuple[Values, ...]) -> bytes:
    file = io.BytesIO()
    np.savez(file, *tables)
    return file.getvalue()


def _unpacked(content: bytes) -> tuple[Values, ...]:
    with np.load(io.BytesIO(content), allow_pickle=False) as held:
        return tuple(held[name] for name in sorted(held.files))
