"""Adjacency lists as LightGCN's files hold them: a user, then that user's items, a line.

Source: He et al., "LightGCN" (SIGIR 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privrec.data.files import read_lists
from privrec.data.folder import Folder
from privrec.data.interactions import Holdout, Interactions, ItemLists, Split, hold_out_some
from privrec.data.problems import bad_file, bad_line, first_repeated

Int64Array = NDArray[np.int64]

_VALIDATION_SHARE = 0.1
_SPARE_ITEMS = 1_000_000  # numbers that a catalogue may leave unused, and fifty an interaction


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
    catalogue reaches to the largest in either file. Users without a training item, which published
    splits have, are left out; the split counts those who have test items.

    Args:
        folder: where the two files lie.
        holdout: which part is held out.

    Raises:
        DataError: when a line is malformed, a user stands on two lines, or a pair occurs twice.
    """
    train, test = _adjacency(folder, "train.txt"), _adjacency(folder, "test.txt")
    _refuse_second_lines(train)
    _refuse_second_lines(test)
    n_items = _catalogue(train, test)
    interactions = Interactions.from_pairs(
        train.users,
        train.items,
        item_ids=np.arange(n_items),
        where=train.where,
    )
    trained = np.isin(test.users, interactions.user_ids)
    untrained = np.unique(test.users[~trained]).size
    heldout = _tested(test, trained, interactions)
    if holdout == "test":
        return Split(interactions, heldout, None, "test", untrained)
    share = np.rint(_VALIDATION_SHARE * interactions.counts).astype(np.int64)
    split = hold_out_some(interactions, np.maximum(share, 1))
    return replace(split, untrained=untrained)


def _adjacency(folder: Folder, name: str) -> _Adjacency:
    label = folder.label(name)
    values, counts = read_lists(folder, name, "field", _misshapen)
    heads = np.cumsum(counts) - counts
    is_item = np.ones(values.size, np.bool_)
    is_item[heads] = False
    owners = np.repeat(np.arange(counts.size), counts - 1)
    if (counts == 1).all():
        raise bad_file(label, "no user has an item", "it must list items", "copy it again")
    return _Adjacency(label, values[heads], values[heads][owners], values[is_item], owners + 1)


def _misshapen(line: str) -> tuple[str, str, str] | None:
    rule, remedy = "a line is a user and that user's items", "remove the line"
    return None if line.strip() else ("no text", rule, remedy)


def _refuse_second_lines(lists: _Adjacency) -> None:
    again = first_repeated(lists.line_users)
    if again is not None:
        found = f"user {lists.line_users[again]} has a line already"
        raise bad_line(lists.label, again + 1, found, "a user has one line", "join the two lines")


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


def _tested(test: _Adjacency, trained: NDArray[np.bool_], train: Interactions) -> ItemLists:
    rows = np.flatnonzero(trained)
    users, items = np.searchsorted(train.user_ids, test.users[rows]), test.items[rows]
    leaked = rows[train.membership().contains(users, items)]
    if leaked.size:
        row = int(leaked[0])
        found = f"item {test.items[row]} of user {test.users[row]} is in train.txt too"
        rule = "what is tested must not be learned from"
        raise bad_line(test.label, int(test.lines[row]), found, rule, "remove it from one of them")
    return ItemLists.from_pairs(users, items, train, lambda row: test.where(int(rows[row])))
