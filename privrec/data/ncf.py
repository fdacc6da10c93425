"""The leave-last-out files of the NCF paper.

Source: He et al., "Neural Collaborative Filtering" (WWW 2017).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.cells import whole_numbers
from privrec.data.files import read_columns, read_lists
from privrec.data.folder import Folder
from privrec.data.interactions import (
    Holdout,
    Interactions,
    ItemLists,
    Split,
    hold_out_some,
    leave_last_out,
)
from privrec.data.movielens import LAYOUTS, WHOLE, old_text, read_ratings, read_titles
from privrec.data.problems import bad_file, bad_line, first_repeated, shown

Int64Array = NDArray[np.int64]

NEGATIVES = 99
_RATINGS = (1, 2, 3, 4)
_PAIR = re.compile(r"^\(([0-9]+),([0-9]+)\)\t")


def find_ncf_prefix(folder: Folder) -> str | None:
    """The name before ``.train.rating`` in a folder; None when there is no such file.

    Args:
        folder: where to look.

    Raises:
        DataError: when there are several.
    """
    suffix = ".train.rating"
    found = [name.removesuffix(suffix) for name in folder.names() if name.endswith(suffix)]
    if len(found) > 1:
        rule = "data.path must say which"
        remedy = f"point it at one of the files, such as {found[0]}{suffix}"
        raise bad_file(folder.label(""), f"several data sets ({', '.join(found)})", rule, remedy)
    return found[0] if found else None


def read_ncf(folder: Folder, prefix: str, holdout: Holdout) -> Split:
    """The files of the NCF paper: ``PREFIX.train.rating``, ``.test.rating``, ``.test.negative``.

    ``test`` takes the published test item and candidates. ``validation`` ignores both, except
    that the test item of no user is learned from: with times it holds out the latest training
    item; where the times are placeholders, one chosen uniformly by a fixed rule. A test item that
    the training file has too is dropped from training. Users without a training item are left out
    and counted. Beside ``item_ids.txt`` (line k: the MovieLens id of item k), ``movies.dat`` and
    ``users.dat``, ids and titles are MovieLens'.

    Args:
        folder: where the files lie; ``.test.negative`` may be missing.
        prefix: such as ``ml-1m``.
        holdout: which part is held out.

    Raises:
        DataError: when a line is malformed, a pair occurs twice, or the three files do not fit
            each other.
    """
    name = f"{prefix}.train.rating"
    users, items, times, where = read_ratings(folder, name, _RATINGS, "\t")
    trained = np.unique(users[np.diff(users, prepend=-1) != 0])
    tested, wanted = _read_test(folder, prefix)
    published = _read_negatives(folder, prefix, tested, wanted)
    known = np.isin(tested, trained)
    places = np.searchsorted(trained, tested[known])
    targets = np.full(trained.size, -1, np.int64)
    targets[places] = wanted[known]
    negatives = np.full((trained.size if published.size else 0, NEGATIVES), -1, np.int32)
    if published.size:
        negatives[places] = published[known]
    largest = max(int(part.max(initial=0)) for part in (items, targets, published))
    item_ids, titles = _item_names(folder, largest)
    everything = Interactions.from_pairs(
        users,
        items,
        None if (times == times[:1]).all() else times,
        item_ids=np.arange(item_ids.size),
        where=where,
    )
    names = _user_names(folder, trained)
    named = replace(everything, user_ids=names, item_ids=item_ids, titles=titles)
    train = _without_targets(named, targets, folder.label(name))
    if holdout == "validation":
        return replace(_validation(train), untrained=int((~known).sum()))
    candidates = negatives if published.size else None
    return Split(train, _one_each(targets), candidates, "test", int((~known).sum()))


def _validation(train: Interactions) -> Split:
    if train.times is None:
        return hold_out_some(train, np.ones(train.n_users, np.int64))
    # The published test item is already gone, so the last that is left is the one to hold out.
    split = leave_last_out(train, holdout="test")
    return Split(split.train, split.heldout, None, "validation")


def _read_test(folder: Folder, prefix: str) -> tuple[Int64Array, Int64Array]:
    """The users that are tested, in order, and the test item of each."""
    name = f"{prefix}.test.rating"
    users, items, _, _ = read_ratings(folder, name, _RATINGS, "\t")
    again = first_repeated(users)
    if again is not None:
        rule, found = "a user has one test item", f"user {users[again]} again"
        raise bad_line(folder.label(name), again + 1, found, rule, "remove the line")
    order = np.argsort(users)
    return users[order], items[order]


def _read_negatives(
    folder: Folder, prefix: str, tested: Int64Array, wanted: Int64Array
) -> Int64Array:
    """The published candidates of each tested user, [T, 99]; [0, 99] without such a file."""
    name = f"{prefix}.test.negative"
    if not folder.has(name):
        return np.empty((0, NEGATIVES), np.int64)
    label, rows = folder.label(name), _candidates(folder, name)
    places = np.minimum(np.searchsorted(tested, rows[:, 0]), tested.size - 1)
    wrong = np.flatnonzero((tested[places] != rows[:, 0]) | (wanted[places] != rows[:, 1]))
    if wrong.size:
        user, item = rows[wrong[0], :2]
        rule = f"{prefix}.test.rating does not have this pair"
        found = f"candidates for ({user},{item})"
        raise bad_line(label, int(wrong[0]) + 1, found, rule, "use files of one release")
    lacking = np.setdiff1d(np.arange(tested.size), places)
    if lacking.size:
        found = f"no candidates for user {tested[lacking[0]]}"
        rule = f"every user of {prefix}.test.rating needs a line"
        raise bad_file(label, found, rule, "copy it again; or remove it, to draw candidates")
    negatives = np.empty((tested.size, NEGATIVES), np.int64)
    negatives[places] = rows[:, 2:]
    return negatives


def _candidates(folder: Folder, name: str) -> Int64Array:
    """Lines ``(user,item)<tab>99 items`` as int64 [lines, 101]."""

    def misshapen(line: str) -> tuple[str, str, str] | None:
        found = line.count("\t")
        if not _PAIR.match(line):
            rule, remedy = "a line starts with (user,item) and a tab", "use the NCF release's file"
            return shown(line.partition("\t")[0]), rule, remedy
        if found != NEGATIVES:
            rule = f"the protocol has {NEGATIVES}, separated by tabs"
            return f"{found} candidates", rule, "copy the file again, or remove it"
        return None

    values, _ = read_lists(folder, name, "item", misshapen, "\t", _PAIR.pattern)
    return values.reshape(-1, NEGATIVES + 2)


def _without_targets(train: Interactions, targets: Int64Array, label: str) -> Interactions:
    keep = train.items != targets[train.users]
    left = train.select(keep)
    empty = np.flatnonzero(left.counts == 0)
    if empty.size:
        found = f"user {train.user_ids[empty[0]]} has only the test item to learn from"
        rule = "every user needs another training interaction"
        raise bad_file(label, found, rule, "remove the user from all files and number them again")
    return left


def _one_each(targets: Int64Array) -> ItemLists:
    indptr = np.concatenate(([0], np.cumsum(targets >= 0, dtype=np.int64)))
    return ItemLists(indptr, targets[targets >= 0].astype(np.int32))


def _item_names(folder: Folder, largest: int) -> tuple[NDArray[Any], tuple[str, ...] | None]:
    """Item ids by position, and titles where ids and titles are known."""
    if not folder.has("item_ids.txt"):
        _refuse_gigantic(largest, folder)
        return np.arange(largest + 1), None
    read = read_columns([(folder, "item_ids.txt")], [1], "\t", width=1)
    ids = whole_numbers(read.cells[0], "item id", read.where)
    label = folder.label("item_ids.txt")
    if ids.size <= largest:
        rule = f"it needs a line for each item up to {largest}"
        remedy = "use the file of this release, or remove it"
        raise bad_file(label, f"{ids.size} lines", rule, remedy)
    _refuse_repeated(ids, label)
    return ids, read_titles(folder, LAYOUTS["ml-1m"], ids)


def _refuse_gigantic(largest: int, folder: Folder) -> None:
    if largest >= np.iinfo(np.int32).max:
        rule = "items are numbered from 0 and there are fewer than 2^31"
        raise bad_file(folder.label(""), f"item {largest}", rule, "number them again from 0")


def _refuse_repeated(ids: Int64Array, label: str) -> None:
    row = first_repeated(ids)
    if row is not None:
        rule, remedy = "every item has its own id", "use the file of this release, or remove it"
        raise bad_line(label, row + 1, f"id {ids[row]} again", rule, remedy)


def _user_names(folder: Folder, trained: Int64Array) -> Int64Array:
    """User ids by position: those of ``users.dat``, else the file's own numbers."""
    if not folder.has("users.dat"):
        return trained
    label, lines = folder.label("users.dat"), old_text(folder, "users.dat")
    if len(lines) <= trained[-1]:
        rule = f"training has users up to {trained[-1]}, and user k is on line k + 1"
        raise bad_file(label, f"{len(lines)} lines", rule, "use the file of this release")
    ids = [line.split("::")[0] for line in lines]
    wrong = next((row for row, field in enumerate(ids) if not WHOLE.fullmatch(field)), None)
    if wrong is not None:
        rule = "a line starts with the user's number and '::'"
        remedy = "use the publisher's own file"
        raise bad_line(label, wrong + 1, f"user {shown(ids[wrong])}", rule, remedy)
    names = np.array(ids, np.int64)
    _refuse_repeated(names, label)
    return names[trained]
