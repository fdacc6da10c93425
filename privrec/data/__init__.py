"""Data sets: what a scenario's ``[data]`` names, read from files or invented, and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from privrec.data.corpus import TextSplit
from privrec.data.interactions import Interactions, ItemLists, Split, leave_last_out
from privrec.data.synthetic import Planted, generate
from privrec.errors import UsageError
from privrec.scenario.schema import Data

__all__ = [
    "Interactions",
    "ItemLists",
    "Planted",
    "Split",
    "TextSplit",
    "generate",
    "leave_last_out",
    "load",
    "load_texts",
]

# Modules are imported when a source is read: Arrow takes a tenth of a second and tens of megabytes,
# which a device that holds one history can spare.
_PUBLISHED = "privrec.data.published"
SOURCES: Mapping[str, tuple[str, str]] = {
    "synthetic": ("privrec.data.synthetic", "load_interactions"),
    **dict.fromkeys(
        ("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m"), (_PUBLISHED, "load_movielens")
    ),
    "ncf": (_PUBLISHED, "load_ncf"),
    "lightgcn": (_PUBLISHED, "load_lightgcn"),
    "table": (_PUBLISHED, "load_table"),
    "text": ("privrec.data.texts", "load_articles"),
    "synthetic_text": ("privrec.data.synthetic", "load_articles"),
    "labels": ("privrec.data.texts", "load_examples"),
    "synthetic_labels": ("privrec.data.synthetic", "load_examples"),
}
"""Module and function that loads each source: from ``[data]`` and the folder of ``--data``."""


def load(config: Data, *, data_dir: Path | None = None) -> Split:
    """Load the interactions that a scenario asks for.

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
        UsageError: when the source has texts or labels.
    """
    split = _loaded(config, data_dir)
    if isinstance(split, TextSplit):
        raise UsageError(
            f"data.source = {config.source!r}: texts and labels have no items to recommend; "
            'privrec run trains on them, with model.kind = "next_word" or "extreme"'
        )
    if config.max_history is None:
        return split
    return replace(split, train=split.train.most_recent(config.max_history))


def load_texts(config: Data, *, data_dir: Path | None = None) -> TextSplit:
    """Load the texts or labelled examples that a scenario asks for; see :func:`load`.

    Where neither a path nor ``data_dir`` is given, the texts are the small ones of the package.

    Raises:
        DataError: when there is no text, it is malformed, or too short to be split.
        UsageError: when the source has interactions.
    """
    split = _loaded(config, data_dir)
    if isinstance(split, Split):
        raise UsageError(f"data.source = {config.source!r}: it has no texts; use data.load")
    return replace(split, vocabulary=config.vocabulary)


def _loaded(config: Data, data_dir: Path | None) -> Split | TextSplit:
    module, function = SOURCES[config.source]
    split: Split | TextSplit = getattr(import_module(module), function)(config, data_dir)
    return split
