"""Readers of published sets of interactions: MovieLens, the NCF paper's files, and LightGCN's.

Sources: Harper & Konstan, "The MovieLens Datasets" (TiiS 2015); He et al., "Neural Collaborative
Filtering" (WWW 2017); He et al., "LightGCN" (SIGIR 2020).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data.catalogue import ARCHIVES, Layout, cache_dir
from privrec.data.files import File, Folder, bad_file, find_folder, places, shown, table_files
from privrec.data.interactions import (
    Holdout,
    Interactions,
    ItemLists,
    Split,
    Where,
    hold_out_some,
    leave_last_out,
    refuse_duplicates,
    row_bounds,
)
from privrec.data.tables import read_columns, read_lists, read_table
from privrec.errors import DataError
from privrec.scenario.schema import Data

Int64Array = NDArray[np.int64]

NEGATIVES = 99
_TRAIN = ".train.rating"
_PAIR = re.compile(r"\((0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\)")
_RELEASE = "use the file of this release, or remove it"
_VALIDATION_SHARE = 0.1
_SPARE_ITEMS = 1_000_000  # numbers that a catalogue may leave unused, and fifty an interaction
_INT32_MAX = np.iinfo(np.int32).max


def load_table(config: Data, data_dir: Path | None) -> Split:
    """Load a user's own table; see :func:`~privrec.data.tables.read_table`."""
    roots = _roots(config, data_dir)
    for root in roots:
        if table_files(root, needed=False):
            return leave_last_out(read_table(root, config), holdout=config.holdout)
    raise _not_found(roots, "table (.csv, .tsv or .parquet)", config.source)


def load_movielens(config: Data, data_dir: Path | None) -> Split:
    """Load a release of MovieLens: all ratings as interactions, whatever the rating was.

    Users and items are those that occur, in the order of their ids. Titles are there where the file
    of titles is. A folder with the NCF paper's files is read by :func:`load_ncf`'s rules.
    """
    archive, roots = ARCHIVES[config.source], _roots(config, data_dir)
    layout, ncf = archive.layout, f"{config.source}{_TRAIN}"
    folder = _found(roots, archive.folders, [ncf, layout.ratings], config.source)
    if folder.file(ncf).exists():
        return _read_ncf(folder, config.source, config.holdout)
    file = folder.file(layout.ratings)
    users, items, times, where = _ratings(file, layout.columns, layout.separator)
    ids = np.unique(items)
    titles = _titles(folder, layout, ids)
    rated = Interactions.from_pairs(users, items, times, item_ids=ids, titles=titles, where=where)
    return leave_last_out(rated, holdout=config.holdout)


def load_ncf(config: Data, data_dir: Path | None) -> Split:
    """Load the NCF paper's files: ``PREFIX.train.rating``, ``.test.rating``, ``.test.negative``.

    The path may be their folder, one of them, or what their names begin with; ``.test.negative``
    may be missing. Beside ``item_ids.txt`` (line k: the MovieLens id of item k), ``movies.dat`` and
    ``users.dat``, ids and titles are MovieLens'.

    ``test`` takes the published test item and candidates. ``validation`` ignores both, except
    that the test item of no user is learned from: with times it holds out the latest training
    item; where the times are placeholders, one chosen uniformly by a fixed rule. A test item that
    the training file has too is dropped from training. Users without a training item are left out
    and counted.
    """
    roots = _roots(config, data_dir)
    for root in roots:
        if root.is_dir():
            folder, prefix = Folder(root), _ncf_prefix(Folder(root))
        else:
            folder, prefix = Folder(root.parent), root.name.removesuffix(_TRAIN)
        if prefix is not None and folder.file(f"{prefix}{_TRAIN}").exists():
            return _read_ncf(folder, prefix, config.holdout)
    raise _not_found(roots, f"PREFIX{_TRAIN}", config.source)


def load_lightgcn(config: Data, data_dir: Path | None) -> Split:
    """Load the files of LightGCN: ``train.txt`` and ``test.txt``, a user and their items a line.

    ``test`` holds out what ``test.txt`` lists. ``validation`` does not read that file's items into
    anything but the size of the catalogue: it holds out a tenth of each user's training items (at
    least one, and never all), chosen by a fixed rule. Items are positions already, and the
    catalogue reaches to the largest in either file. Users without a training item, which published
    splits have, are left out; the split counts those who have test items.
    """
    folder = _found(_roots(config, data_dir), [], ["train.txt"], config.source)
    train, test = _adjacency(folder.file("train.txt")), _adjacency(folder.file("test.txt"))
    n_items = _catalogue_size(train, test)
    interactions = Interactions.from_pairs(
        train.users, train.items, item_ids=np.arange(n_items), where=train.where
    )
    trained = np.isin(test.users, interactions.user_ids)
    untrained = np.unique(test.users[~trained]).size
    heldout = _tested(test, np.flatnonzero(trained), interactions)
    if config.holdout == "test":
        return Split(interactions, heldout, None, "test", untrained)
    share = np.rint(_VALIDATION_SHARE * interactions.counts).astype(np.int64)
    return replace(hold_out_some(interactions, np.maximum(share, 1)), untrained=untrained)


def _roots(config: Data, data_dir: Path | None) -> list[Path]:
    return places(config.path, data_dir) or [cache_dir()]


def _found(
    roots: Sequence[Path], names: Sequence[str], markers: Sequence[str], source: str
) -> Folder:
    for root in roots:
        folder = find_folder(root, names, markers)
        if folder is not None:
            return folder
    raise _not_found(roots, " or ".join(markers), source)


def _not_found(roots: Sequence[Path], wanted: str, source: str) -> DataError:
    fetch = f", or run: privrec data fetch {source}" if source in ARCHIVES else ""
    remedy = f"point --data (or data.path, or PRIVREC_DATA) at its folder{fetch}"
    searched = ", ".join(map(str, roots))
    return bad_file(searched, f"no {wanted} there", f"source {source!r} needs it", remedy)


def _refuse_repeated(values: Int64Array, file: File, found: str, rule: str, remedy: str) -> None:
    """Refuse a value that stood on an earlier line."""
    first = np.unique(values, return_index=True)[1]
    again = np.setdiff1d(np.arange(values.size), first)
    if again.size:
        row = int(again[0])
        raise bad_file(file.label, found.format(values[row]), rule, remedy, line=row + 1)


# ------------------------------------------------------------------------------- MovieLens and NCF


def _ratings(
    file: File, columns: Sequence[str | int] = (1, 2, 3, 4), separator: str = "\t"
) -> tuple[Int64Array, Int64Array, Int64Array, Where]:
    """Users, items and times, and what names a row; a rating is a number, and is not kept."""
    called = ("user", "item", "rating", "time")
    user, item, rating, time = read_columns([file], columns, separator, width=4, called=called)
    users, items = user.whole_numbers(), item.whole_numbers()
    rating.check_finite()
    return users, items, time.whole_numbers(least=None), user.where


def _titles(folder: Folder, layout: Layout, item_ids: NDArray[Any]) -> tuple[str, ...] | None:
    """A title for each item id, or None when the file of titles is not there."""
    file, mark = folder.file(layout.titles), layout.title_separator
    if not file.exists():
        return None
    encoding = _old_encoding(file) if layout.old else "utf-8"
    called, columns = ("item", "title"), layout.title_columns
    ids, titles = read_columns([file], columns, mark, encoding, called=called, quotes=mark == ",")
    known = dict(zip(ids.whole_numbers().tolist(), titles.texts(), strict=True))
    return tuple(known.get(item, f"item {item}").strip() for item in item_ids.tolist())


def _old_encoding(file: File) -> str:
    """The publisher's older files are Latin-1, copies of them often UTF-8."""
    try:
        for _ in file.chunks():
            pass
    except DataError:
        return "latin-1"
    return "utf-8"


def _ncf_prefix(folder: Folder) -> str | None:
    """The name before ``.train.rating`` in a folder; None when there is no such file."""
    names = [file.name for file in folder.files()]
    found = [name.removesuffix(_TRAIN) for name in names if name.endswith(_TRAIN)]
    if len(found) > 1:
        rule = "data.path must say which"
        remedy = f"point it at one of the files, such as {found[0]}{_TRAIN}"
        raise bad_file(folder.label, f"several data sets ({', '.join(found)})", rule, remedy)
    return found[0] if found else None


def _read_ncf(folder: Folder, prefix: str, holdout: Holdout) -> Split:
    """See :func:`load_ncf`."""
    file = folder.file(f"{prefix}{_TRAIN}")
    users, items, times, where = _ratings(file)
    trained = np.unique(users[np.diff(users, prepend=-1) != 0])
    test = folder.file(f"{prefix}.test.rating")
    tested, wanted, _, _ = _ratings(test)
    _refuse_repeated(tested, test, "user {} again", "a user has one test item", "remove the line")
    order = np.argsort(tested)
    tested, wanted = tested[order], wanted[order]
    published = _negatives(folder.file(f"{prefix}.test.negative"), prefix, tested, wanted)
    known = np.isin(tested, trained)
    at = np.searchsorted(trained, tested[known])
    targets = np.full(trained.size, -1, np.int64)
    targets[at] = wanted[known]
    negatives = None
    if published is not None:
        negatives = np.full((trained.size, NEGATIVES), -1, np.int32)
        negatives[at] = published[known]
    numbers = (items, targets) if published is None else (items, targets, published)
    item_ids, titles = _item_names(folder, max(int(part.max(initial=0)) for part in numbers))
    known_times = None if (times == times[:1]).all() else times
    positions = np.arange(item_ids.size)
    everything = Interactions.from_pairs(users, items, known_times, item_ids=positions, where=where)
    user_ids = _user_names(folder, trained)
    named = replace(everything, user_ids=user_ids, item_ids=item_ids, titles=titles)
    train = named.select(named.items != targets[named.users])
    empty = np.flatnonzero(train.counts == 0)
    if empty.size:
        found = f"user {train.user_ids[empty[0]]} has only the test item to learn from"
        rule = "every user needs another training interaction"
        remedy = "remove the user from all files and number them again"
        raise bad_file(file.label, found, rule, remedy)
    untrained = int((~known).sum())
    if holdout == "test":
        has_target = targets >= 0
        bounds = row_bounds(np.flatnonzero(has_target), trained.size)
        heldout = ItemLists(bounds, targets[has_target].astype(np.int32))
        return Split(train, heldout, negatives, "test", untrained)
    if train.times is None:
        split = hold_out_some(train, np.ones(train.n_users, np.int64))
    else:
        # The published test item is already gone: the last that is left is the one to hold out.
        split = leave_last_out(train, holdout="test")
    return replace(split, holdout="validation", untrained=untrained)


def _negatives(
    file: File, prefix: str, tested: Int64Array, wanted: Int64Array
) -> Int64Array | None:
    """The published candidates of each tested user, [T, 99]; None without such a file.

    A line is ``(user,item)``, then the candidates after tabs.
    """
    if not file.exists():
        return None
    width, called = NEGATIVES + 1, ("pair", *["item"] * NEGATIVES)
    pair, *candidates = read_columns([file], range(1, width + 1), "\t", width=width, called=called)
    pairs = [_PAIR.fullmatch(cell) for cell in pair.texts()]
    if None in pairs:
        row = pairs.index(None)
        found, rule = shown(pair.texts()[row]), "a line starts with (user,item) and a tab"
        raise bad_file(pair.where(row), found, rule, "use the NCF release's file")
    users, items = np.array([found.groups() for found in pairs if found], np.int64).T
    published = np.stack([column.whole_numbers() for column in candidates], axis=1)
    at = np.minimum(np.searchsorted(tested, users), tested.size - 1)
    wrong = np.flatnonzero((tested[at] != users) | (wanted[at] != items))
    if wrong.size:
        found = f"candidates for ({users[wrong[0]]},{items[wrong[0]]})"
        rule = f"{prefix}.test.rating does not have this pair"
        raise bad_file(pair.where(int(wrong[0])), found, rule, "use files of one release")
    lacking = np.setdiff1d(np.arange(tested.size), at)
    if lacking.size:
        found = f"no candidates for user {tested[lacking[0]]}"
        rule = f"every user of {prefix}.test.rating needs a line"
        raise bad_file(file.label, found, rule, "copy it again; or remove it, to draw candidates")
    negatives = np.empty((tested.size, NEGATIVES), np.int64)
    negatives[at] = published
    return negatives


def _item_names(folder: Folder, largest: int) -> tuple[NDArray[Any], tuple[str, ...] | None]:
    """Item ids by position, and titles where ids and titles are known."""
    file = folder.file("item_ids.txt")
    if not file.exists():
        if largest >= _INT32_MAX:
            rule = "items are numbered from 0 and there are fewer than 2^31"
            raise bad_file(folder.label, f"item {largest}", rule, "number them again from 0")
        return np.arange(largest + 1), None
    ids = read_columns([file], [1], "\t", width=1, called=["item id"])[0].whole_numbers()
    if ids.size <= largest:
        rule = f"it needs a line for each item up to {largest}"
        raise bad_file(file.label, f"{ids.size} lines", rule, _RELEASE)
    _refuse_repeated(ids, file, "id {} again", "every item has its own id", _RELEASE)
    return ids, _titles(folder, ARCHIVES["ml-1m"].layout, ids)


def _user_names(folder: Folder, trained: Int64Array) -> Int64Array:
    """User ids by position: those of ``users.dat``, else the file's own numbers."""
    file = folder.file("users.dat")
    if not file.exists():
        return trained
    (column,) = read_columns([file], [1], "::", _old_encoding(file), called=["user"])
    ids = column.whole_numbers()
    if ids.size <= trained[-1]:
        rule = f"training has users up to {trained[-1]}, and user k is on line k + 1"
        raise bad_file(file.label, f"{ids.size} lines", rule, "use the file of this release")
    _refuse_repeated(ids, file, "id {} again", "every user has its own id", _RELEASE)
    return ids[trained]


# ---------------------------------------------------------------------------------------- LightGCN


@dataclass(frozen=True, eq=False)
class _Adjacency:
    """Lines ``user item item …`` of a file, one row per item, and the line of each row."""

    file: File
    users: Int64Array
    items: Int64Array
    lines: Int64Array

    def where(self, row: int) -> str:
        return f"{self.file.label}, line {self.lines[row]}"


def _adjacency(file: File) -> _Adjacency:
    values, counts = read_lists(file, "field", "a line is a user and that user's items")
    heads = np.cumsum(counts) - counts
    users, owners = values[heads], np.repeat(np.arange(counts.size), counts - 1)
    if not owners.size:
        raise bad_file(file.label, "no user has an item", "it must list items", "copy it again")
    found, rule = "user {} has a line already", "a user has one line"
    _refuse_repeated(users, file, found, rule, "join the two lines")
    is_item = np.ones(values.size, np.bool_)
    is_item[heads] = False
    return _Adjacency(file, users[owners], values[is_item], owners + 1)


def _catalogue_size(train: _Adjacency, test: _Adjacency) -> int:
    most = min(_SPARE_ITEMS + 50 * (train.items.size + test.items.size), _INT32_MAX)
    for lists in (train, test):
        row = int(lists.items.argmax())
        if lists.items[row] >= most:
            found = f"item {lists.items[row]} is far beyond the number of interactions"
            rule = "items are numbered from 0, nearly without gaps"
            remedy = "number them again, or use a table source for other ids"
            raise bad_file(lists.where(row), found, rule, remedy)
    return int(max(train.items.max(), test.items.max())) + 1


def _tested(test: _Adjacency, rows: Int64Array, train: Interactions) -> ItemLists:
    """The test items of those who train."""
    users, items = np.searchsorted(train.user_ids, test.users[rows]), test.items[rows]
    leaked = rows[train.membership().contains(users, items)]
    if leaked.size:
        row = int(leaked[0])
        found = f"item {test.items[row]} of user {test.users[row]} is in train.txt too"
        rule = "what is tested must not be learned from"
        raise bad_file(test.where(row), found, rule, "remove it from one of them")
    refuse_duplicates(
        users, items, train.user_ids, train.item_ids, lambda row: test.where(int(rows[row]))
    )
    order = np.argsort(users, kind="stable")
    return ItemLists(row_bounds(users, train.n_users), items[order].astype(np.int32))
