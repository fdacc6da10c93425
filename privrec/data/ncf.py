"""The leave-last-out files of the NCF paper.

Source: He et al., "Neural Collaborative Filtering" (WWW 2017).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.delimited import Column, digits, read_columns
from privrec.data.folder import Folder, decoded
from privrec.data.interactions import (
    Holdout,
    Interactions,
    ItemLists,
    Split,
    hold_out_some,
    leave_last_out,
)
from privrec.data.movielens import LAYOUTS, RATING_COLUMNS, TEXT_ENCODING, read_titles
from privrec.data.problems import bad_file, bad_line, line_namer, shown

Int64Array = NDArray[np.int64]

NEGATIVES = 99


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
    the training file has too is dropped from training. Beside ``item_ids.txt`` (line k: the
    MovieLens id of item k), ``movies.dat`` and ``users.dat``, ids and titles are MovieLens'.

    Args:
        folder: where the files lie; ``.test.negative`` may be missing.
        prefix: such as ``ml-1m``.
        holdout: which part is held out.

    Raises:
        DataError: when a line is malformed, a pair occurs twice, the numbering of users has a
            gap, or the three files do not fit each other.
    """
    name = f"{prefix}.train.rating"
    users, items, times = read_columns(folder, name, RATING_COLUMNS, separator=b"\t")
    label = folder.label(name)
    n_users = _contiguous(users, label)
    targets = _read_test(folder, prefix, n_users)
    negatives = _read_negatives(folder, prefix, targets)
    largest = max(int(part.max(initial=0)) for part in (items, targets, negatives))
    item_ids, titles = _item_names(folder, largest)
    everything = Interactions.from_pairs(
        users,
        items,
        None if (times == times[:1]).all() else times,
        user_ids=np.arange(n_users),
        item_ids=np.arange(item_ids.size),
        where=line_namer(label, 1),
    )
    named = Interactions(
        everything.indptr,
        everything.items,
        everything.times,
        _user_names(folder, n_users),
        item_ids,
        titles,
    )
    train = _without_targets(named, targets, label)
    if holdout == "validation":
        return _validation(train)
    published = negatives.astype(np.int32) if negatives.size else None
    return Split(train, _one_each(targets), published, "test")


def _validation(train: Interactions) -> Split:
    if train.times is None:
        return hold_out_some(train, np.ones(train.n_users, np.int64))
    # The published test item is already gone, so the last that is left is the one to hold out.
    split = leave_last_out(train, holdout="test")
    return Split(split.train, split.heldout, None, "validation")


def _contiguous(users: Int64Array, label: str) -> int:
    """Number of users, when every one from 0 to the largest occurs."""
    n_users = int(users.max()) + 1
    if n_users <= users.size:
        missing = np.flatnonzero(np.bincount(users, minlength=n_users) == 0)
    else:
        missing = np.setdiff1d(np.arange(users.size), users)[:1]
    if missing.size:
        found = f"user {missing[0]} has no interactions, yet user {n_users - 1} has"
        rule = "users are numbered from 0 without a gap"
        raise bad_file(label, found, rule, "number them again, or use a table source")
    return n_users


def _read_test(folder: Folder, prefix: str, n_users: int) -> Int64Array:
    """The test item of each user, int64 [U], -1 for none."""
    name = f"{prefix}.test.rating"
    users, items, _ = read_columns(folder, name, RATING_COLUMNS, separator=b"\t")
    label = folder.label(name)
    stranger = np.flatnonzero(users >= n_users)
    if stranger.size:
        found = f"user {users[stranger[0]]} is not in {prefix}.train.rating"
        rule = f"training has the users 0 to {n_users - 1}, and only they can be tested"
        raise bad_line(label, int(stranger[0]) + 1, found, rule, "remove the line")
    first = np.unique(users, return_index=True)[1]
    if first.size < users.size:
        again = int(np.setdiff1d(np.arange(users.size), first)[0])
        rule = "a user has one test item"
        raise bad_line(label, again + 1, f"user {users[again]} again", rule, "remove the line")
    targets = np.full(n_users, -1, np.int64)
    targets[users] = items
    return targets


def _read_negatives(folder: Folder, prefix: str, targets: Int64Array) -> Int64Array:
    """The published candidates, int64 [U, 99], or [0, 99] when there is no such file."""
    name = f"{prefix}.test.negative"
    negatives = np.full((targets.size, NEGATIVES), -1, np.int64)
    if not folder.has(name):
        return negatives[:0]
    label = folder.label(name)
    line = 1
    for chunk in folder.chunks(name):
        rows = _fast_negatives(chunk)
        rows = _strict_negatives(chunk, label, line) if rows is None else rows
        wrong = np.flatnonzero(~_is_tested(rows, targets))
        if wrong.size:
            user, item = rows[wrong[0], :2]
            rule = f"{prefix}.test.rating does not have this pair"
            found = f"candidates for ({user},{item})"
            raise bad_line(label, line + int(wrong[0]), found, rule, "use files of one release")
        negatives[rows[:, 0]] = rows[:, 2:]
        line += rows.shape[0]
    lacking = np.flatnonzero((negatives[:, 0] < 0) & (targets >= 0))
    if lacking.size:
        found = f"no candidates for user {lacking[0]}"
        rule = f"every user of {prefix}.test.rating needs a line"
        raise bad_file(label, found, rule, "copy it again; or remove it, to draw candidates")
    return negatives


def _is_tested(rows: Int64Array, targets: Int64Array) -> NDArray[np.bool_]:
    known = rows[:, 0] < targets.size
    return np.asarray(known & (targets[np.where(known, rows[:, 0], 0)] == rows[:, 1]))


def _fast_negatives(data: bytes) -> Int64Array | None:
    """Lines ``(user,item)<tab>99 items`` as int64 [lines, 101], or None if anything is unusual."""
    plain = data.replace(b"(", b"").replace(b")", b"").replace(b",", b"\t")
    text = np.frombuffer(plain, np.uint8)
    ends = np.flatnonzero((text == ord("\t")) | (text == ord("\n")))
    lines = data.count(b"\n")
    if ends.size != lines * (NEGATIVES + 2) or len(data) - len(plain) != 2 * lines:
        return None
    if (text[ends[NEGATIVES + 1 :: NEGATIVES + 2]] != ord("\n")).any():
        return None
    numbers = digits(text, np.concatenate(([0], ends[:-1] + 1)), ends)
    return None if numbers is None else numbers.reshape(lines, -1)


def _strict_negatives(data: bytes, label: str, line: int) -> Int64Array:
    lines = enumerate(data[:-1].split(b"\n"), line)
    return np.array([_negative_line(text, label, number) for number, text in lines], np.int64)


def _negative_line(text: bytes, label: str, line: int) -> list[int]:
    pair, *candidates = text.split(b"\t")
    known = pair.strip()
    if not (known.startswith(b"(") and known.endswith(b")") and known.count(b",") == 1):
        rule = "a line starts with (user,item) and a tab"
        raise bad_line(label, line, shown(pair), rule, "use the file of the NCF release")
    if len(candidates) != NEGATIVES:
        found = f"{len(candidates)} candidates"
        rule = f"the protocol has {NEGATIVES}, separated by tabs"
        raise bad_line(label, line, found, rule, "copy the file again, or remove it")
    fields = [*known[1:-1].split(b","), *candidates]
    for field in fields:
        if not field.strip().isdigit() or len(field.strip()) > 18:
            rule, remedy = "an item is a whole number from 0", "correct the line"
            raise bad_line(label, line, f"item {shown(field)}", rule, remedy)
    return [int(field) for field in fields]


def _without_targets(train: Interactions, targets: Int64Array, label: str) -> Interactions:
    keep = train.items != targets[train.users]
    left = train.select(keep)
    empty = np.flatnonzero(left.counts == 0)
    if empty.size:
        found = f"user {empty[0]} has only the test item to learn from"
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
    column = (Column("item id", "id"),)
    (ids,) = read_columns(folder, "item_ids.txt", column, separator=b"\t")
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
    order = np.argsort(ids, kind="stable")
    repeated = order[1:][ids[order[1:]] == ids[order[:-1]]]
    if repeated.size:
        row = int(repeated.min())
        rule, remedy = "every item has its own id", "use the file of this release, or remove it"
        raise bad_line(label, row + 1, f"id {ids[row]} again", rule, remedy)


def _user_names(folder: Folder, n_users: int) -> Int64Array:
    """User ids by position: those of ``users.dat``, else the file's own numbers."""
    if not folder.has("users.dat"):
        return np.arange(n_users)
    label = folder.label("users.dat")
    lines = decoded(folder.read("users.dat"), label, TEXT_ENCODING).removesuffix("\n").split("\n")
    if len(lines) < n_users:
        rule = f"training has {n_users} users"
        raise bad_file(label, f"{len(lines)} lines", rule, "use the file of this release")
    ids = [
        _user_name(line, label, number)
        for number, line in enumerate(itertools.islice(lines, n_users), 1)
    ]
    names = np.array(ids, np.int64)
    _refuse_repeated(names, label)
    return names


def _user_name(line: str, label: str, number: int) -> int:
    field = line.split("::")[0]
    if field.isdecimal() and len(field) <= 18:
        return int(field)
    rule, remedy = "a line starts with the user's number and '::'", "use the publisher's own file"
    raise bad_line(label, number, f"user {shown(field)}", rule, remedy)
