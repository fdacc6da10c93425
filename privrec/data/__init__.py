"""Data sets: readers, the synthetic generator, and the split that a scenario's ``[data]`` means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from privrec.data.fetch import ARCHIVES, cache_dir
from privrec.data.folder import Folder, find_folder, table_files
from privrec.data.interactions import (
    Duplicates,
    Holdout,
    Interactions,
    ItemLists,
    SourceConfig,
    Split,
    leave_last_out,
)
from privrec.data.problems import bad_file
from privrec.data.synthetic import Planted, generate
from privrec.errors import DataError, UsageError
from privrec.scenario.kinds import READERS

__all__ = [
    "Interactions",
    "ItemLists",
    "Planted",
    "Split",
    "describe",
    "generate",
    "leave_last_out",
    "load",
    "planted",
]


class DataConfig(SourceConfig, Protocol):
    """What :func:`load` asks of a scenario's ``[data]`` table."""

    @property
    def max_history(self) -> int | None: ...
    @property
    def user_column(self) -> str | int: ...
    @property
    def item_column(self) -> str | int: ...
    @property
    def time_column(self) -> str | int | None: ...
    @property
    def separator(self) -> str | None: ...
    @property
    def encoding(self) -> str: ...
    @property
    def duplicates(self) -> Duplicates: ...


def load(config: DataConfig, *, data_dir: Path | None = None) -> Split:
    """The split that a scenario asks for.

    Files are looked for in ``data_dir`` if given, else at ``config.path``, else where downloads
    go. A folder may be the data set's own or its parent, or a zip archive as published. Where a
    folder has both the publisher's files and those of the NCF paper, the latter are taken.

    Args:
        config: ``[data]`` of a scenario.
        data_dir: what ``--data`` says; ``config.path`` is then looked for inside it first.

    Returns:
        Training interactions, cut to ``config.max_history`` each, and what is held out.

    Raises:
        DataError: when files are missing or malformed.
    """
    split = _load(config, data_dir)
    most = getattr(config, "max_history", None)
    return split if most is None else replace(split, train=split.train.most_recent(most))


def describe(split: Split) -> dict[str, int | float | str | bool]:
    """Figures of a split, ready for JSON.

    Returns:
        ``users``, ``items``, ``interactions`` (training), ``heldout``, ``tested_users``,
        ``density`` (share of user-item pairs in training), ``shortest_history``,
        ``median_history``, ``longest_history``, ``holdout``, ``times``, ``titles``,
        ``published_negatives``, ``repeats_left_out`` (rows of a pair that has another) and
        ``untrained_left_out`` (test users of a published split without training items).
    """
    train, counts = split.train, split.train.counts
    return {
        "users": train.n_users,
        "items": train.n_items,
        "interactions": train.size,
        "heldout": split.heldout.size,
        "tested_users": int((split.heldout.counts > 0).sum()),
        "density": train.size / (train.n_users * train.n_items),
        "shortest_history": int(counts.min()),
        "median_history": float(np.median(counts)),
        "longest_history": int(counts.max()),
        "holdout": split.holdout,
        "times": train.times is not None,
        "titles": train.titles is not None,
        "published_negatives": split.negatives is not None,
        "repeats_left_out": train.repeats,
        "untrained_left_out": split.untrained,
    }


def _load(config: DataConfig, data_dir: Path | None) -> Split:
    if (reader := READERS[config.source].load()) is not None:
        split: Split = reader(config, data_dir)
        return split
    if config.source == "synthetic":
        return leave_last_out(planted(config).interactions, holdout=config.holdout)
    if config.source in ("text", "synthetic_text", "labels", "synthetic_labels"):
        raise UsageError(
            f"data.source = {config.source!r}: texts and labels have no items to recommend; "
            'privrec run trains on them, with model.kind = "next_word" or "extreme"'
        )
    # Imported when files are read: Arrow takes a tenth of a second and tens of megabytes, which a
    # device that holds one history can spare.
    from privrec.data.files import TableFormat, read_table
    from privrec.data.lightgcn import read_lightgcn

    roots = _roots(config.path, data_dir)
    if config.source == "table":
        form = TableFormat(
            config.user_column, config.item_column, config.time_column, config.separator,
            config.encoding, config.duplicates,
        )  # fmt: skip
        for root in roots:
            if table_files(root, needed=False):
                return leave_last_out(read_table(root, form), holdout=config.holdout)
        raise _not_found(roots, "table (.csv, .tsv or .parquet)", "table")
    if config.source == "lightgcn":
        folder = _found(roots, [], ["train.txt"], config.source)
        return read_lightgcn(folder, config.holdout)
    if config.source == "ncf":
        return _load_ncf(roots, config.holdout)
    return _load_movielens(roots, config.source, config.holdout)


def planted(config: DataConfig) -> Planted:
    """The synthetic data set of a scenario together with the oracle that generated it."""
    return generate(
        users=config.users,
        items=config.items,
        clusters=config.clusters,
        interactions_per_user=config.interactions_per_user,
        seed=config.seed,
    )


def _load_movielens(roots: Sequence[Path], source: str, holdout: Holdout) -> Split:
    from privrec.data.movielens import LAYOUTS, read_movielens
    from privrec.data.ncf import read_ncf

    layout = LAYOUTS.get(source)
    if layout is None:
        raise UsageError(
            f"data.source {source!r}: it is synthetic, {', '.join(LAYOUTS)}, ncf, lightgcn or "
            "table; choose one of them"
        )
    ncf = f"{source}.train.rating"
    folder = _found(roots, layout.folders, [ncf, layout.ratings], source)
    if folder.has(ncf):
        return read_ncf(folder, source, holdout)
    return leave_last_out(read_movielens(folder, layout), holdout=holdout)


def _load_ncf(roots: Sequence[Path], holdout: Holdout) -> Split:
    from privrec.data.ncf import find_ncf_prefix, read_ncf

    for root in roots:
        if root.is_dir():
            folder, prefix = Folder(root), find_ncf_prefix(Folder(root))
        else:
            # The path of one of the files, or what their names begin with.
            folder, name = Folder(root.parent), root.name.removesuffix(".train.rating")
            prefix = name if folder.has(f"{name}.train.rating") else None
        if prefix is not None:
            return read_ncf(folder, prefix, holdout)
    raise _not_found(roots, "PREFIX.train.rating", "ncf")


def _roots(path: str | None, data_dir: Path | None) -> list[Path]:
    """Where to look, first choice first."""
    if data_dir is not None:
        inner = [data_dir / path, data_dir] if path else [data_dir]
        return [*inner, Path(path)] if path else inner
    return [Path(path)] if path else [cache_dir()]


def _found(
    roots: Sequence[Path], names: Sequence[str], markers: Sequence[str], source: str
) -> Folder:
    for root in roots:
        folder = find_folder(root, names, markers)
        if folder is not None:
            return folder
    raise _not_found(roots, " or ".join(markers), source)


def _not_found(roots: Sequence[Path], wanted: str, source: str) -> DataError:
    places = ", ".join(str(root) for root in roots)
    fetch = f", or run: privrec data fetch {source}" if source in ARCHIVES else ""
    return bad_file(
        places,
        f"no {wanted} there",
        f"source {source!r} needs it",
        f"point --data (or data.path, or PRIVREC_DATA) at its folder{fetch}",
    )
