"""Readers of published sets of interactions: MovieLens, the NCF paper's files, and LightGCN's.

Sources: Harper & Konstan, "The MovieLens Datasets" (TiiS 2015); He et al., "Neural Collaborative
Filtering" (WWW 2017); He et al., "LightGCN" (SIGIR 2020).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data import item_features
from privrec.data.catalogue import ARCHIVES, Layout, cache_dir
from privrec.data.files import (
    File,
    Place,
    bad_file,
    files_in,
    find,
    find_folder,
    places,
    shown,
    table_files,
)
from privrec.data.interactions import (
    Holdout,
    Interactions,
    ItemLists,
    Split,
    Where,
    first_repeated,
    hold_out_some,
    leave_last_out,
    refuse_duplicates,
    row_bounds,
)
from privrec.data.own import read_table
from privrec.data.tables import read_columns, read_lists
from privrec.errors import DataError
from privrec.scenario.schema import Data

Int64Array = NDArray[np.int64]

NEGATIVES = 99
_TRAIN = ".train.rating"
_ADJACENCY = ("train.txt", "test.txt")
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_NUMBERS = np.float32(0.7)  # what an item's number in the release counts for
_PAIR = re.compile(r"\((0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\)")
_RELEASE = "use the file of this release, or remove it"
_VALIDATION_SHARE = 0.1
_SPARE_ITEMS = 1_000_000  # numbers that a catalogue may leave unused, and fifty an interaction
_INT32_MAX = np.iinfo(np.int32).max


def load_table(config: Data, data_dir: Path | None) -> Split:
    """Load a user's own table; see :func:`~privrec.data.own.read_table`."""

    def look(root: Path) -> Path | None:
        return root if table_files(root, needed=False) else None

    path = _found(config, data_dir, look, "table (.csv, .tsv or .parquet)")
    return leave_last_out(read_table(path, config), holdout=config.holdout)


def load_movielens(config: Data, data_dir: Path | None) -> Split:
    """Load a release of MovieLens: all ratings as interactions, whatever the rating was.

    Users and items are those that occur, in the order of their ids. Titles are there where the file
    of titles is; genres and years are read from it where ``config.item_features`` asks for them. A
    folder with the NCF paper's files is read by :func:`load_ncf`'s rules.
    """
    archive, ncf = ARCHIVES[config.source], f"{config.source}{_TRAIN}"
    layout, markers = archive.layout, [ncf, archive.layout.ratings]
    look = partial(find_folder, names=archive.folders, markers=markers)
    folder: Place = _found(config, data_dir, look, " or ".join(markers))
    if (folder / ncf).is_file():
        return _read_ncf(folder, config.source, config)
    file = File(folder / layout.ratings)
    users, items, times, where = _ratings(file, layout.columns, layout.separator)
    ids = np.unique(items)
    titles = _titles(folder, layout, ids)
    rated = Interactions.from_pairs(users, items, times, item_ids=ids, titles=titles, where=where)
    if config.item_features:
        rated = replace(rated, features=_described(folder, layout, ids))
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

    def look(root: Path) -> tuple[Path, str] | None:
        """The folder, and the name before ``.train.rating``."""
        found = [root.name.removesuffix(_TRAIN)]
        folder = root if root.is_dir() else root.parent
        if root.is_dir():
            names = [file.path.name for file in files_in(root)]
            found = [name.removesuffix(_TRAIN) for name in names if name.endswith(_TRAIN)]
        if len(found) > 1:
            rule = "data.path must say which"
            remedy = f"point it at one of the files, such as {found[0]}{_TRAIN}"
            raise bad_file(root, f"several data sets ({', '.join(found)})", rule, remedy)
        return (folder, found[0]) if found and (folder / f"{found[0]}{_TRAIN}").is_file() else None

    folder, prefix = _found(config, data_dir, look, f"PREFIX{_TRAIN}")
    return _read_ncf(folder, prefix, config)


def load_lightgcn(config: Data, data_dir: Path | None) -> Split:
    """Load the files of LightGCN: ``train.txt`` and ``test.txt``, a user and their items a line.

    ``test`` holds out what ``test.txt`` lists. ``validation`` does not read that file's items into
    anything but the size of the catalogue: it holds out a tenth of each user's training items (at
    least one, and never all), chosen by a fixed rule. Items are positions already, and the
    catalogue reaches to the largest in either file. Users without a training item, which published
    splits have, are left out; the split counts those who have test items.
    """
    look = partial(find_folder, names=[], markers=_ADJACENCY)
    folder: Place = _found(config, data_dir, look, "train.txt")
    (users, items, where), (tested, wanted, place) = (
        _adjacency(File(folder / name)) for name in _ADJACENCY
    )
    most = min(_SPARE_ITEMS + 50 * (items.size + wanted.size), _INT32_MAX)
    for numbers, named in ((items, where), (wanted, place)):
        row = int(numbers.argmax())
        if numbers[row] >= most:
            found = f"item {numbers[row]} is far beyond the number of interactions"
            rule = "items are numbered from 0, nearly without gaps"
            remedy = "number them again, or use a table source for other ids"
            raise bad_file(named(row), found, rule, remedy)
    ids = np.arange(max(items.max(), wanted.max()) + 1)
    train = Interactions.from_pairs(users, items, item_ids=ids, where=where)
    rows = np.flatnonzero(np.isin(tested, train.user_ids))
    heldout = _tested(train, tested[rows], wanted[rows], lambda row: place(int(rows[row])))
    untrained = np.unique(np.delete(tested, rows)).size
    if config.holdout == "test":
        return Split(train, heldout, None, "test", untrained)
    share = np.rint(_VALIDATION_SHARE * train.counts).astype(np.int64)
    return replace(hold_out_some(train, np.maximum(share, 1)), untrained=untrained)


def _found(config: Data, data_dir: Path | None, look: Callable[[Path], Any], wanted: str) -> Any:
    """What ``look`` finds where the scenario says, or among downloads."""
    source = config.source
    fetch = f", or run: privrec data fetch {source}" if source in ARCHIVES else ""
    remedy = f"point --data (or data.path, or PRIVREC_DATA) at its folder{fetch}"
    roots = places(config.path, data_dir) or [cache_dir()]
    return find(roots, look, wanted, f"source {source!r} needs it", remedy)


def _refuse_repeated(values: Int64Array, file: File, found: str, rule: str, remedy: str) -> None:
    """Refuse a value that stood on an earlier line."""
    if (row := first_repeated(values)) is not None:
        raise bad_file(file, found.format(values[row]), rule, remedy, line=row + 1)


# ------------------------------------------------------------------------------- MovieLens and NCF


def _ratings(
    file: File, columns: Sequence[str | int] = (1, 2, 3, 4), separator: str = "\t"
) -> tuple[Int64Array, Int64Array, Int64Array, Where]:
    """Users, items and times, and what names a row; a rating is a number, and is not kept."""
    called = ("user", "item", "rating", "time")
    user, item, rating, time = read_columns([file], columns, separator, width=4, called=called)
    users, items = user.whole_numbers(), item.whole_numbers()
    rating.numbers()
    return users, items, time.whole_numbers(least=None), user.where


def _titles(folder: Place, layout: Layout, item_ids: NDArray[Any]) -> tuple[str, ...] | None:
    """A title for each item id, or None when the file of titles is not there."""
    file, mark = File(folder / layout.titles), layout.title_separator
    if not file.path.is_file():
        return None
    encoding = _old_encoding(file) if layout.old else "utf-8"
    called, columns = ("item", "title"), layout.title_columns
    ids, titles = read_columns([file], columns, mark, encoding, called=called, quotes=mark == ",")
    known = dict(zip(ids.whole_numbers().tolist(), titles.texts(), strict=True))
    return tuple(known.get(item, f"item {item}").strip() for item in item_ids.tolist())


def _described(folder: Place, layout: Layout, item_ids: NDArray[Any]) -> NDArray[np.float32]:
    """Features of each item: its genres, the year in its title, and its number in the release.

    Numbers were given as films came in, many of a kind or of a series at once.
    """
    file, mark = File(folder / layout.titles), layout.title_separator
    if not file.path.is_file():
        rule = "data.item_features = true reads genres from the release's file of titles"
        raise bad_file(file, "it is not there", rule, "copy it there, or remove data.item_features")
    encoding = _old_encoding(file) if layout.old else "utf-8"
    names = (*layout.title_columns, *layout.genres)
    item, title, *genres = read_columns([file], names, mark, encoding, quotes=mark == ",")
    cells = genres[0].texts()
    if len(genres) > 1:  # a column of flags for each
        flags = np.stack([column.whole_numbers() for column in genres], axis=1)
        cells = ["|".join(map(str, np.flatnonzero(row))) for row in flags]
    years = [_YEAR.search(each) for each in title.texts()]
    ids = item.whole_numbers()
    order = np.argsort(ids)
    at = order[np.searchsorted(ids, item_ids, sorter=order).clip(max=ids.size - 1)]
    known = ids[at] == item_ids
    told = [cells[row] if there else "" for row, there in zip(at, known, strict=True)]
    number = [float(found[1]) if found else np.nan for found in years]
    year = np.where(known, np.array(number)[at], np.nan)
    numbers = item_features.of_numbers(item_ids.astype(np.float64))
    groups = (item_features.of_categories(told), item_features.of_numbers(year))
    return item_features.together([*groups, _NUMBERS * numbers])


def _old_encoding(file: File) -> str:
    """The publisher's older files are Latin-1, copies of them often UTF-8."""
    try:
        for _ in file.chunks():
            pass
    except DataError:
        return "latin-1"
    return "utf-8"


def _read_ncf(folder: Place, prefix: str, config: Data) -> Split:
    holdout: Holdout = config.holdout
    file, test = (File(folder / f"{prefix}.{part}.rating") for part in ("train", "test"))
    users, items, times, where = _ratings(file)
    trained = np.unique(users[np.diff(users, prepend=-1) != 0])
    tested, wanted, _, _ = _ratings(test)
    _refuse_repeated(tested, test, "user {} again", "a user has one test item", "remove the line")
    order = np.argsort(tested)
    tested, wanted = tested[order], wanted[order]
    published = _negatives(File(folder / f"{prefix}.test.negative"), prefix, tested, wanted)
    known = np.isin(tested, trained)
    at = np.searchsorted(trained, tested[known])
    targets, negatives = np.full(trained.size, -1, np.int64), None
    targets[at] = wanted[known]
    if published is not None:
        negatives = np.full((trained.size, NEGATIVES), -1, np.int32)
        negatives[at] = published[known]
    numbers = [part for part in (items, targets, published) if part is not None]
    item_ids, titles = _item_names(folder, max(int(part.max(initial=0)) for part in numbers))
    known_times = None if (times == times[:1]).all() else times
    positions = np.arange(item_ids.size)
    everything = Interactions.from_pairs(users, items, known_times, item_ids=positions, where=where)
    user_ids, names = trained, File(folder / "users.dat")
    if names.path.is_file():
        rule = f"training has users up to {trained[-1]}, and user k is on line k + 1"
        user_ids = _release_ids(names, "user", "::", None, int(trained[-1]), rule)[trained]
    named = replace(everything, user_ids=user_ids, item_ids=item_ids, titles=titles)
    if config.item_features:
        if titles is None:
            rule = "data.item_features = true needs item_ids.txt and movies.dat beside it"
            raise bad_file(folder, "films have no ids", rule, "copy them, or remove it")
        described = _described(folder, ARCHIVES["ml-1m"].layout, item_ids)
        named = replace(named, features=described)
    train = named.select(named.items != targets[named.users])
    empty = np.flatnonzero(train.counts == 0)
    if empty.size:
        found = f"user {train.user_ids[empty[0]]} has only the test item to learn from"
        rule = "every user needs another training interaction"
        raise bad_file(file, found, rule, "remove the user from all files and number them again")
    untrained = int((~known).sum())
    if holdout == "test":
        owners = np.flatnonzero(targets >= 0)
        bounds = row_bounds(owners, trained.size)
        heldout = ItemLists(bounds, targets[owners].astype(np.int32))
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
    if not file.path.is_file():
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
        raise bad_file(file, found, rule, "copy it again; or remove it, to draw candidates")
    negatives = np.empty((tested.size, NEGATIVES), np.int64)
    negatives[at] = published
    return negatives


def _item_names(folder: Place, largest: int) -> tuple[NDArray[Any], tuple[str, ...] | None]:
    """Item ids by position, and titles where ids and titles are known."""
    file = File(folder / "item_ids.txt")
    if not file.path.is_file():
        if largest >= _INT32_MAX:
            rule = "items are numbered from 0 and there are fewer than 2^31"
            raise bad_file(folder, f"item {largest}", rule, "number them again from 0")
        return np.arange(largest + 1), None
    rule = f"it needs a line for each item up to {largest}"
    ids = _release_ids(file, "item id", "\t", 1, largest, rule)
    return ids, _titles(folder, ARCHIVES["ml-1m"].layout, ids)


def _release_ids(
    file: File, called: str, separator: str, width: int | None, largest: int, rule: str
) -> Int64Array:
    """The ids in the first column, each of them once, of which line ``largest`` must be one."""
    encoding = _old_encoding(file)
    (column,) = read_columns([file], [1], separator, encoding, width=width, called=[called])
    ids = column.whole_numbers()
    if ids.size <= largest:
        raise bad_file(file, f"{ids.size} lines", rule, _RELEASE)
    _refuse_repeated(ids, file, "id {} again", "every id is on one line", _RELEASE)
    return ids


# ---------------------------------------------------------------------------------------- LightGCN


def _adjacency(file: File) -> tuple[Int64Array, Int64Array, Where]:
    """Users and items of a file of lines ``user item item …``, and what names a pair."""
    values, counts = read_lists(file, "field", "a line is a user and that user's items")
    heads = np.cumsum(counts) - counts
    users, owners = values[heads], np.repeat(np.arange(counts.size), counts - 1)
    if not owners.size:
        raise bad_file(file, "no user has an item", "it must list items", "copy it again")
    found, rule = "user {} has a line already", "a user has one line"
    _refuse_repeated(users, file, found, rule, "join the two lines")
    return users[owners], np.delete(values, heads), lambda row: f"{file}, line {owners[row] + 1}"


def _tested(train: Interactions, names: Int64Array, items: Int64Array, where: Where) -> ItemLists:
    """The test items of those who train."""
    users = np.searchsorted(train.user_ids, names)
    leaked = np.flatnonzero(train.contains(users, items))
    if leaked.size:
        row = int(leaked[0])
        found = f"item {items[row]} of user {names[row]} is in train.txt too"
        rule = "what is tested must not be learned from"
        raise bad_file(where(row), found, rule, "remove it from one of them")
    refuse_duplicates(users, items, train.user_ids, train.item_ids, where)
    order = np.argsort(users, kind="stable")
    return ItemLists(row_bounds(users, train.n_users), items[order].astype(np.int32))
