"""Who interacted with what: sorted arrays, a view for each user, id maps, and held-out splits.

Users and items are positions ``0..U-1`` and ``0..n-1`` everywhere inside the package; the ids of
the data set's publisher appear only here, at the edge.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privrec.data.files import shown
from privrec.embedding.subspace import splitmix64
from privrec.errors import DataError, UnknownIdError, UsageError

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
IdArray = NDArray[Any]
Holdout = Literal["test", "validation"]
Duplicates = Literal["refuse", "first", "last"]
Where = Callable[[int], str]

_HOLDOUT_KEY = 0x686F6C646F7574  # "holdout": fixed, so that a validation split is one split
_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class ItemLists:
    """A list of items for each user, in compressed rows.

    Attributes:
        indptr: int64 [U + 1]; user ``u`` owns ``items[indptr[u]:indptr[u + 1]]``, maybe nothing.
        items: int32 [m], positions in ``0..n-1``.
    """

    indptr: Int64Array
    items: Int32Array

    @property
    def n_users(self) -> int:
        """Number of users."""
        return self.indptr.size - 1

    @property
    def size(self) -> int:
        """Number of items in all lists together."""
        return self.items.size

    @property
    def counts(self) -> Int64Array:
        """Length of each list, int64 [U]."""
        return np.diff(self.indptr)

    @property
    def single(self) -> bool:
        """Whether no list is longer than one item."""
        return bool(self.counts.max(initial=0) <= 1)

    @cached_property
    def users(self) -> Int32Array:
        """The user of each row, int32 [m]."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), self.counts)

    def history(self, user: int) -> Int32Array:
        """The items of one user, earliest first: a view, int32 [length]."""
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def rows_of(self, users: NDArray[np.integer]) -> tuple[Int64Array, Int32Array]:
        """For each item of some users: its user's place in ``users``, and it."""
        places, bounds = entries(self.indptr, users)
        return np.repeat(np.arange(users.size), np.diff(bounds)), self.items[places]


@dataclass(frozen=True, eq=False)
class Interactions(ItemLists):
    """The histories of all users, sorted by user, then time, then original order.

    Attributes:
        times: int64 [m], not decreasing within a user, or None where the source has none. The
            unit is the source's own; only the order is used.
        user_ids: [U] original ids, int64 or objects that are str, without repetition.
        item_ids: [n] likewise. An item need not occur.
        titles: n titles, or None where the source has none.
        features: float32 [n, q], public ones (:mod:`privrec.data.item_features`), or None.
        facts: how the source was read and what was left out, for whoever describes the data.
    """

    times: Int64Array | None
    user_ids: IdArray
    item_ids: IdArray
    titles: Sequence[str] | None = None
    facts: Mapping[str, int | str] = field(default_factory=dict)
    features: NDArray[np.float32] | None = None

    @classmethod
    def from_pairs(
        cls,
        users: Any,
        items: Any,
        times: ArrayLike | None = None,
        *,
        item_ids: Any = None,
        titles: Sequence[str] | None = None,
        where: Where = lambda row: f"row {row + 1}",
        duplicates: Duplicates = "refuse",
    ) -> Interactions:
        """Sort one row per (user, item) pair, in any order, into histories.

        Args:
            users: [m] raw ids, integers or strings; an array of Arrow too; ``items`` likewise.
            times: [m] integers, or None: then the order of the rows is the order in time.
            item_ids: [n] the raw ids in the order of positions, also of items that nobody has
                interacted with; None: those that occur, sorted.
            where: names a row in an error, such as ``file, line``.
            duplicates: which row is kept, in time, of a pair that occurs again.
        """
        if not len(users):
            raise DataError("no interactions: a data set needs at least one; check the input file")
        user, user_names = _positions(users, "user")
        item, item_names = (
            _positions(items, "item") if item_ids is None else _listed(items, item_ids, where)
        )
        stamps = None if times is None else np.asarray(times)
        order = np.lexsort((user,) if stamps is None else (stamps, user))
        facts: dict[str, int | str] = {}
        if duplicates == "refuse":
            refuse_duplicates(user, item, user_names, item_names, where)
        else:
            keys = (user * item_names.size + item)[order]
            ahead = slice(None) if duplicates == "first" else slice(None, None, -1)
            first = np.unique(keys[ahead], return_index=True)[1]
            order = order[ahead][np.sort(first)][ahead]
            facts = {"repeats_left_out": user.size - order.size}
        return cls(
            row_bounds(user[order], user_names.size),
            item[order].astype(np.int32),
            None if stamps is None else stamps[order].astype(np.int64),
            user_names,
            item_names,
            None if titles is None else tuple(titles),
            facts,
        )

    @property
    def n_items(self) -> int:
        """Size of the catalogue, items without interactions included."""
        return int(self.item_ids.size)

    def item_counts(self) -> Int64Array:
        """How many users interacted with each item, int64 [n]."""
        return np.bincount(self.items, minlength=self.n_items).astype(np.int64)

    @cached_property
    def _pairs(self) -> Int64Array:
        """A number for each pair that occurs, sorted."""
        return np.sort(self.users.astype(np.int64) * self.n_items + self.items)

    def contains(self, users: NDArray[np.integer], items: NDArray[np.integer]) -> BoolArray:
        """Whether each pair of positions occurs; the two arrays broadcast."""
        wanted = users.astype(np.int64) * self.n_items + items
        found = np.searchsorted(self._pairs, wanted).clip(max=self.size - 1)
        return np.asarray(self._pairs[found] == wanted)

    def select(self, keep: BoolArray) -> Interactions:
        """The same users and catalogue with only the rows where ``keep`` [m] is true."""
        indptr = np.append(0, np.cumsum(keep, dtype=np.int64))[self.indptr]
        times = None if self.times is None else self.times[keep]
        return replace(self, indptr=indptr, items=self.items[keep], times=times)

    def most_recent(self, limit: int) -> Interactions:
        """The same users with at most their last ``limit`` interactions, at least 1."""
        later = np.repeat(self.indptr[1:], self.counts) - 1 - np.arange(self.size)
        return self.select(later < limit)

    def core(self, min_user: int, min_item: int) -> Interactions:
        """Keep users of ``min_user`` items and items of ``min_item`` users, counted among the kept.

        The largest such part is what is left once users and items with fewer are removed, over and
        over: its (p, q)-core, of Cerinšek & Batagelj, "Generalized two-mode cores" (Social Networks
        2015). Who and what is left depends on everybody's rows.

        Raises:
            DataError: when nothing is left.
        """
        keep, kept = np.ones(self.size, np.bool_), -1
        while keep.sum() != kept:
            kept = int(keep.sum())
            of_users = np.bincount(self.users[keep], minlength=self.n_users)
            of_items = np.bincount(self.items[keep], minlength=self.n_items)
            keep &= (of_users >= min_user)[self.users] & (of_items >= min_item)[self.items]
        if not kept:
            raise DataError(
                f"no interactions are left of {self.size}: a user needs {min_user} items and an "
                f"item {min_item} users; lower data.min_user or data.min_item"
            )
        users, items = np.flatnonzero(of_users), np.flatnonzero(of_items)
        left_out = {
            "users_left_out": self.n_users - users.size,
            "items_left_out": self.n_items - items.size,
            "thin_interactions_left_out": self.size - kept,
        }
        part, titles = self.select(keep), self.titles
        return replace(
            part,
            indptr=row_bounds(np.searchsorted(users, part.users), users.size),
            items=np.searchsorted(items, part.items).astype(np.int32),
            user_ids=self.user_ids[users],
            item_ids=self.item_ids[items],
            titles=None if titles is None else tuple(titles[item] for item in items.tolist()),
            features=None if self.features is None else self.features[items],
            facts={**self.facts, **left_out},
        )

    def renumbered(self, order: Int64Array) -> Interactions:
        """Number items anew: ``order``, int64 [n], has the present position of each new one."""
        titles = None if self.titles is None else tuple(self.titles[item] for item in order)
        items, names = _new_positions(order)[self.items], self.item_ids[order]
        features = None if self.features is None else self.features[order]
        return replace(self, items=items, item_ids=names, titles=titles, features=features)


# ------------------------------------------------------------------------------------------ splits


@dataclass(frozen=True, eq=False)
class Split:
    """What may be learned from, and what is held out to measure.

    Attributes:
        train: every user has at least one interaction.
        heldout: users too short to give one up hold out none.
        negatives: int32 [U, 99] published candidates, or None. A row of a user without a held-out
            item is filled with -1. Candidates that are items of that very user are kept as
            published, and the metric leaves them out.
        untrained: test users of a published split that are left out, having no training items.
    """

    train: Interactions
    heldout: ItemLists
    negatives: Int32Array | None
    holdout: Holdout
    untrained: int = 0

    def describe(self) -> dict[str, int | float | str | bool]:
        """Figures of the split, ready for JSON; ``density`` is of user-item pairs in training."""
        train, counts = self.train, self.train.counts
        return {
            "users": train.n_users,
            "items": train.n_items,
            "interactions": train.size,
            "heldout": self.heldout.size,
            "tested_users": int((self.heldout.counts > 0).sum()),
            "density": train.size / (train.n_users * train.n_items),
            "shortest_history": int(counts.min()),
            "median_history": float(np.median(counts)),
            "longest_history": int(counts.max()),
            "holdout": self.holdout,
            "times": train.times is not None,
            "titles": train.titles is not None,
            "published_negatives": self.negatives is not None,
            "untrained_left_out": self.untrained,
            **train.facts,
        }

    def renumbered(self, order: Int64Array) -> Split:
        """The same split with items numbered anew; see :meth:`Interactions.renumbered`."""
        # A candidate that is missing (-1) finds itself at the end.
        places = np.append(_new_positions(order), np.int32(-1))
        heldout = replace(self.heldout, items=places[self.heldout.items])
        negatives = None if self.negatives is None else places[self.negatives]
        train = self.train.renumbered(order)
        return replace(self, train=train, heldout=heldout, negatives=negatives)


def leave_last_out(interactions: Interactions, *, holdout: Holdout) -> Split:
    """Hold out the last interaction of every user (for ``validation``: the last but one).

    With times the last is the latest, and of several at that time the last in the file; without
    times it is the last in the file. ``validation`` removes the test item altogether. A user who
    would be left with nothing to learn from keeps everything and holds out nothing.
    """
    if holdout not in ("test", "validation"):
        raise UsageError(f"holdout {holdout!r}: it is 'test' or 'validation'; set data.holdout")
    if holdout == "validation":
        interactions = interactions.select(~_last_rows(interactions))
    return _holding_out(interactions, _last_rows(interactions), holdout)


def hold_out_some(interactions: Interactions, counts: NDArray[np.integer]) -> Split:
    """Hold out ``counts[u]`` interactions of each user, chosen uniformly, for validation.

    The choice is a fixed function of the rows (a keyed splitmix64 of their positions), so that
    the same file always gives the same split. At least one interaction stays in training.
    """
    marks = splitmix64(_HOLDOUT_KEY, np.arange(interactions.size))
    order = np.lexsort((marks, interactions.users))
    place = np.empty(interactions.size, np.int64)
    place[order] = np.arange(interactions.size) - interactions.indptr[interactions.users]
    limit = np.minimum(counts, interactions.counts - 1)
    return _holding_out(interactions, place < limit[interactions.users], "validation")


def _last_rows(interactions: Interactions) -> BoolArray:
    """The last row of every user who has at least two, marked."""
    last = np.zeros(interactions.size, np.bool_)
    last[interactions.indptr[1:][interactions.counts >= 2] - 1] = True
    return last


def _holding_out(interactions: Interactions, rows: BoolArray, holdout: Holdout) -> Split:
    chosen = interactions.select(rows)
    heldout = ItemLists(chosen.indptr, chosen.items)
    return Split(interactions.select(~rows), heldout, None, holdout)


# ------------------------------------------------------------------------------- compressed rows


def entries(indptr: Int64Array, rows: NDArray[np.integer]) -> tuple[Int64Array, Int64Array]:
    """Where the entries of some rows lie, in the order of ``rows``; and ``indptr`` of those."""
    lengths = indptr[rows + 1] - indptr[rows]
    bounds = np.append(0, np.cumsum(lengths)).astype(np.int64)
    return np.arange(bounds[-1]) + np.repeat(indptr[rows] - bounds[:-1], lengths), bounds


def row_bounds(users: Int64Array, n_users: int) -> Int64Array:
    """Where each user's rows begin and end among rows sorted by user, int64 [U + 1]."""
    return np.append(0, np.cumsum(np.bincount(users, minlength=n_users), dtype=np.int64))


# --------------------------------------------------------------------------------- ids to positions


def _new_positions(order: Int64Array) -> Int32Array:
    positions = np.empty(order.size, np.int32)
    positions[order] = np.arange(order.size, dtype=np.int32)
    return positions


def _column(raw: Any) -> Any:
    """Ids as one array of Arrow, which makes Python's objects of distinct texts only."""
    # Imported here: a device that holds one history can spare it.
    import pyarrow.compute

    return raw.combine_chunks() if hasattr(raw, "combine_chunks") else pyarrow.array(raw)


def _positions(raw: Any, noun: str) -> tuple[Int64Array, IdArray]:
    """Positions of raw ids among those that occur, sorted; and those."""
    import pyarrow.compute

    coded = _column(raw).dictionary_encode()
    pyarrow.default_memory_pool().release_unused()  # the hash table of distinct ids
    order = pyarrow.compute.sort_indices(coded.dictionary)  # UTF-8 sorts as its characters do
    names = coded.dictionary.take(order).to_numpy(zero_copy_only=False)
    if names.size > _INT32_MAX:
        raise DataError(f"{names.size} {noun}s: positions are 32-bit; split the data set")
    positions = _new_positions(order.to_numpy())[coded.indices.to_numpy()]
    return positions.astype(np.int64), names


def _listed(raw: Any, names: Any, where: Where) -> tuple[Int64Array, IdArray]:
    """Positions of raw ids of items among all that are listed; and those."""
    import pyarrow.compute

    items, listed = _column(raw), _column(names)
    positions = pyarrow.compute.index_in(items, listed)
    if positions.null_count:
        first = pyarrow.compute.index(positions.is_null(), True).as_py()
        raise DataError(
            f"{where(first)}: item {_quoted(items[first].as_py())} is not among the {len(listed)} "
            "listed items; all must be listed; add it to the list or remove the line"
        )
    return positions.to_numpy().astype(np.int64), listed.to_numpy(zero_copy_only=False)


def first_repeated(values: NDArray[Any]) -> int | None:
    """The first place whose value stands at an earlier one too; None where there is none."""
    first = np.unique(values, return_index=True)[1]
    if first.size == values.size:
        return None
    return int(np.setdiff1d(np.arange(values.size), first, assume_unique=True)[0])


def refuse_duplicates(
    users: Int64Array, items: Int64Array, user_ids: IdArray, item_ids: IdArray, where: Where
) -> None:
    """Refuse a pair of positions that occurs twice; the error names its second row and first."""
    keys = users * item_ids.size + items
    if (second := first_repeated(keys)) is None:
        return
    first = int(np.flatnonzero(keys == keys[second])[0])
    raise DataError(
        f"{where(second)}: user {_quoted(user_ids[users[second]])}, item "
        f"{_quoted(item_ids[items[second]])} is already in {where(first)}; a pair may occur once; "
        'remove one of them, or keep one of each pair: data.duplicates = "first" of a table'
    )


def _quoted(name: Any) -> str:
    return shown(name) if isinstance(name, str) else str(name)


def position_of(wanted: int | str, names: IdArray, noun: str) -> int:
    """The position of an id; or an UnknownIdError with what ids look like, and the nearest one."""
    numbers = names.dtype.kind in "iu"
    at = np.flatnonzero((names.astype(str) if numbers else names) == str(wanted))
    if at.size:
        return int(at[0])
    if numbers:
        near = "give one of these numbers"
        with suppress(ValueError):
            # Python integers: what was asked for may not fit into 64 bits.
            number = int(wanted)
            near = f"the nearest is {min(names.tolist(), key=lambda each: abs(each - number))}"
        remedy = f"its {names.size} ids lie between {names.min()} and {names.max()}; {near}"
    else:
        close = difflib.get_close_matches(str(wanted), names.tolist(), n=3, cutoff=0.5)
        examples = ", ".join(repr(name) for name in close or names[:3].tolist())
        remedy = f"its {names.size} ids are like {examples}; give one of them"
    raise UnknownIdError(f"{noun} {wanted!r}: the data set has no such {noun}; {remedy}")
