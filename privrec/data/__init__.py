"""Data sets: what a scenario's ``[data]`` names, read from files or invented, and split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from privrec.data.corpus import TextSplit
from privrec.data.interactions import Interactions, ItemLists, Split, leave_last_out
from privrec.data.synthetic import Planted, generate
from privrec.errors import UsageError
from privrec.scenario.kinds import READERS
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


def load(config: Data, *, data_dir: Path | None = None) -> Split:
    """Load the interactions that a scenario asks for, at most ``config.max_history`` a user.

    Files are looked for in ``data_dir`` if given (what ``--data`` says; first at ``config.path``
    inside it), else at ``config.path``, else where downloads go. A folder may be the data set's own
    or its parent, or a zip archive as published. Where a folder has both the publisher's files and
    those of the NCF paper, the latter are taken.

    Raises:
        DataError: when files are missing or malformed.
        UsageError: when the source has texts or labels.
    """
    kind = READERS[config.source]
    if kind.config.gives != "interactions":
        raise UsageError(
            f"data.source = {config.source!r}: texts and labels have no items to recommend; "
            'privrec run trains on them, with model.kind = "next_word" or "extreme"'
        )
    # Imported only now, since Arrow takes a tenth of a second and tens of megabytes.
    split: Split = kind.load()(config, data_dir)
    most: int | None = getattr(config, "max_history", None)  # a reader may do without it
    return split if most is None else replace(split, train=split.train.most_recent(most))


def load_texts(config: Data, *, data_dir: Path | None = None) -> TextSplit:
    """Load the texts or labelled examples that a scenario asks for; see :func:`load`.

    Where neither a path nor ``data_dir`` is given, the texts are the small ones of the package.
    """
    kind = READERS[config.source]
    if kind.config.gives == "interactions":
        raise UsageError(f"data.source = {config.source!r}: it has no texts; use data.load")
    split: TextSplit = kind.load()(config, data_dir)
    return replace(split, vocabulary=getattr(config, "vocabulary", None))
