"""Adjacency lists as LightGCN's files hold them: a user, then that user's items, a line.

Source: He et al., "LightGCN" (SIGIR 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privrec.data.delimited import digits
from privrec.data.folder import Folder
from privrec.data.interactions import Holdout, Interactions, ItemLists, Split, hold_out_some
from privrec.data.problems import bad_file, bad_line, shown

Int64Array = NDArray[np.int64]

_VALIDATION_SHARE = 0.1
_SPARE_ITEMS = 1_000_000  # numbers that a catalogue may leave unused, and fifty an interaction
_SPACES = np.isin(np.arange(256), [ord(" "), ord("\t"), ord("\n")])
_DIGITS = np.isin(np.arange(256), np.arange(ord("0"), ord("9") + 1))


@dataclass(frozen=True, eq=False)
class _Adjacency:
    """Lines ``user item item …``: the user of each line, and one row per item."""

    label: str
    line_users: Int64Array
    users: Int64Array
    items: Int64Array
    lines: Int64Array

    def where(self, row: int) -> str:
        return f"{self.label}, line {self.lines[row]}"


def read_lightgcn(folder: Folder, holdout: Holdout) -> Split:
    """The files of LightGCN: ``train.txt`` and ``test.txt``, a user and that user's items a line.

    ``test`` holds out what ``test.txt`` lists. ``validation`` does not read that file's items into
    anything but the size of the catalogue: it holds out a tenth of each user's training items (at
    least one, and never all), chosen by a fixed rule. Items are positions already, and the
    catalogue reaches to the largest in either file.

    Args:
        folder: where the two files lie.
        holdout: which part is held out.

    Raises:
        DataError: when a line is malformed, a user stands on two lines or has no training item,
            or a pair occurs twice.
    """
    train, test = _adjacency(folder, "train.txt"), _adjacency(folder, "test.txt")
    user_ids = _distinct_users(train)
    _distinct_users(test)
    _refuse_strangers(test, user_ids)
    n_items = _catalogue(train, test)
    interactions = Interactions.from_pairs(
        train.users,
        train.items,
        user_ids=user_ids,
        item_ids=np.arange(n_items),
        where=train.where,
    )
    heldout = _tested(test, interactions)
    if holdout == "test":
        return Split(interactions, heldout, None, "test")
    share = np.rint(_VALIDATION_SHARE * interactions.counts).astype(np.int64)
    return hold_out_some(interactions, np.maximum(share, 1))


def _adjacency(folder: Folder, name: str) -> _Adjacency:
    label = folder.label(name)
    parts: list[tuple[Int64Array, Int64Array]] = []
    line = 1
    for chunk in folder.chunks(name):
        tokens = _fast_tokens(chunk)
        parts.append(_strict_tokens(chunk, label, line) if tokens is None else tokens)
        line += chunk.count(b"\n")
    values = np.concatenate([values for values, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    heads = np.cumsum(counts) - counts
    is_item = np.ones(values.size, np.bool_)
    is_item[heads] = False
    owners = np.repeat(np.arange(counts.size), counts - 1)
    _refuse_empty(counts, name == "train.txt", label)
    return _Adjacency(
        label, values[heads], values[heads][owners], values[is_item], owners.astype(np.int64) + 1
    )


def _fast_tokens(data: bytes) -> tuple[Int64Array, Int64Array] | None:
    """All numbers, and how many stand on each line; None if anything is unusual."""
    text = np.frombuffer(data, np.uint8)
    is_digit = _DIGITS[text]
    if not (is_digit | _SPACES[text]).all():
        return None
    edges = np.flatnonzero(np.diff(is_digit, prepend=False))
    starts, ends = edges[::2], edges[1::2]  # a chunk ends in a newline, so edges come in pairs
    values = digits(text, starts, ends)
    newlines = np.flatnonzero(text == ord("\n"))
    counts = np.diff(np.searchsorted(starts, newlines), prepend=0)
    return None if values is None or not counts.all() else (values, counts)


def _strict_tokens(data: bytes, label: str, line: int) -> tuple[Int64Array, Int64Array]:
    values: list[int] = []
    counts: list[int] = []
    for number, text in enumerate(data[:-1].split(b"\n"), line):
        tokens = text.split()
        if not tokens:
            rule, remedy = "a line is a user and that user's items", "remove the line"
            raise bad_line(label, number, "no text", rule, remedy)
        values += [_token(token, label, number) for token in tokens]
        counts.append(len(tokens))
    return np.array(values, np.int64), np.array(counts, np.int64)


def _token(token: bytes, label: str, line: int) -> int:
    if token.isdigit() and len(token) <= 18:
        return int(token)
    rule = "users and items are whole numbers from 0, separated by spaces"
    remedy = "number them from 0, or use a table source for other ids"
    raise bad_line(label, line, f"field {shown(token)}", rule, remedy)


def _refuse_empty(counts: Int64Array, training: bool, label: str) -> None:
    empty = np.flatnonzero(counts == 1)
    if training and empty.size:
        rule = "every user has at least one training item"
        raise bad_line(label, int(empty[0]) + 1, "a user without items", rule, "remove the line")
    if empty.size == counts.size:
        raise bad_file(label, "no user has an item", "it must list items", "copy it again")


def _distinct_users(lists: _Adjacency) -> Int64Array:
    """The users in order, when each has one line."""
    users, first = np.unique(lists.line_users, return_index=True)
    if users.size < lists.line_users.size:
        again = int(np.setdiff1d(np.arange(lists.line_users.size), first)[0])
        found = f"user {lists.line_users[again]} has a line already"
        raise bad_line(lists.label, again + 1, found, "a user has one line", "join the two lines")
    return users


def _refuse_strangers(test: _Adjacency, user_ids: Int64Array) -> None:
    strange = np.flatnonzero(~np.isin(test.line_users, user_ids))
    if strange.size:
        row = int(strange[0])
        found = f"user {test.line_users[row]} is not in train.txt"
        rule = "only users with training items can be tested"
        raise bad_line(test.label, row + 1, found, rule, "remove the line")


def _catalogue(train: _Adjacency, test: _Adjacency) -> int:
    for lists in (train, test):
        row = int(lists.items.argmax())
        most = _SPARE_ITEMS + 50 * (train.items.size + test.items.size)
        if lists.items[row] >= min(most, np.iinfo(np.int32).max):
            found = f"item {lists.items[row]} is far beyond the number of interactions"
            rule = "items are numbered from 0, nearly without gaps"
            remedy = "number them again, or use a table source for other ids"
            raise bad_line(lists.label, int(lists.lines[row]), found, rule, remedy)
    return int(max(train.items.max(), test.items.max())) + 1


def _tested(test: _Adjacency, train: Interactions) -> ItemLists:
    users = np.searchsorted(train.user_ids, test.users)
    leaked = np.flatnonzero(train.membership().contains(users, test.items))
    if leaked.size:
        row = int(leaked[0])
        found = f"item {test.items[row]} of user {test.users[row]} is in train.txt too"
        rule = "what is tested must not be learned from"
        raise bad_line(test.label, int(test.lines[row]), found, rule, "remove it from one of them")
    return ItemLists.from_pairs(users, test.items, train, test.where)
