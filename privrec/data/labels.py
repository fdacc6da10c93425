"""Labelled examples of devices, as next-word prediction has texts: labels are the vocabulary.

A device's examples lie in one row of a :class:`~privrec.data.text.Corpus`: the words of an example,
then its labels. A label is a token like any other, numbered by how common it is, the unknown one
first. A word of the input is a negative token, ``-1 - word``, and no part of the vocabulary: it is
neither counted nor numbered anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privrec.data.extreme import Examples, Invented, read_extreme
from privrec.data.problems import bad_file, bad_line
from privrec.data.text import (
    EVERY,
    UNKNOWN,
    UNKNOWN_ID,
    Corpus,
    TextConfig,
    TextSplit,
    split_after,
    split_devices,
    with_heldout,
)
from privrec.randomness import rng_for

Int64Array = NDArray[np.int64]
_WORDS = 64
_MOST = 2**31 - 2  # a token is an int32, and label 0 is the unknown one


class LabelConfig(TextConfig, Protocol):
    """What :func:`load_labels` asks of a scenario's ``[data]`` table."""

    @property
    def features(self) -> int: ...
    @property
    def labels_each(self) -> float: ...


def load_labels(config: LabelConfig, *, data_dir: Path | None = None) -> TextSplit:
    """The examples that a scenario asks for, dealt to devices, of which some are held out.

    Values of a file's features are not used, and examples without features or labels are left out.

    Args:
        config: ``[data]`` of a scenario, whose source is ``"labels"`` or ``"synthetic_labels"``.
        data_dir: what ``--data`` says: the file, or the folder that ``config.path`` lies in.

    Raises:
        DataError: when there is no file, it breaks the format, or it has too few examples.
    """
    each = config.interactions_per_user
    if config.source == "synthetic_labels":
        world = Invented(
            config.features, config.items - 1, words=_WORDS, labels_each=config.labels_each,
            clusters=config.clusters, seed=config.seed,
        )  # fmt: skip
        examples = world.examples(with_heldout(config.users) * each)
        split = split_after(dealt(examples, each), config.users, config.holdout)
        return replace(split, vocabulary=config.vocabulary)
    path = _file(config.path, data_dir)
    examples = _whole(read_extreme(path))
    if max(examples.n_features, examples.n_labels) > _MOST:
        raise bad_line(
            str(path), 1, f"{examples.n_features} features, {examples.n_labels} labels",
            f"at most {_MOST} of each can be numbered", "use a smaller numbering",
        )  # fmt: skip
    if len(examples) < EVERY * each:
        raise bad_file(
            str(path), f"{len(examples)} examples",
            f"{EVERY} devices of {each} are the fewest that can be split",
            "lower data.interactions_per_user",
        )  # fmt: skip
    order = rng_for(config.seed, "labels", "devices").permutation(len(examples))
    split = split_devices(dealt(examples.take(order), each), config.holdout, path.stem)
    return replace(split, vocabulary=config.vocabulary)


def dealt(examples: Examples, each: int) -> Corpus:
    """Examples in their order, so many to a device; a rest that is no device's share is left out.

    Args:
        examples: each with words and labels, labels from 0.
        each: examples of a device, at least 1.
    """
    devices = len(examples) // each
    examples = examples.take(np.arange(devices * each))
    counts = np.diff(examples.ends, prepend=0), np.diff(examples.label_ends, prepend=0)
    rows = np.arange(len(examples))
    owner = np.concatenate([np.repeat(rows, count) for count in counts])
    # A stable sort by example leaves its words before its labels.
    order = np.argsort(owner, kind="stable")
    tokens = np.concatenate((-1 - examples.features, examples.labels + 1))[order]
    ends = (examples.ends + examples.label_ends)[each - 1 :: each]
    return Corpus(
        tuple(f"device {number + 1}" for number in range(devices)),
        np.concatenate(([0], ends)).astype(np.int64),
        tokens.astype(np.int32),
        (UNKNOWN, *(str(number) for number in range(examples.n_labels))),
    )


def examples_in(tokens: NDArray[np.integer]) -> Examples:
    """The examples that a row of tokens holds; unknown labels are left out.

    A word of an example that has ``k`` of them counts ``1 / √k``: all are of length 1.

    Args:
        tokens: words of an example as ``-1 - word``, then its labels, then the next one's words;
            without any word, one empty example.
    """
    words = tokens < 0
    starts = words & ~np.concatenate(([False], words))[:-1]
    owner, count = np.cumsum(starts) - 1, max(1, int(starts.sum()))
    labels = ~words & (tokens != UNKNOWN_ID) & (owner >= 0)
    counts = np.bincount(owner[words], minlength=count)
    features = -1 - tokens[words].astype(np.int64)
    named = tokens[labels].astype(np.int64)
    return Examples(
        np.cumsum(counts), features, np.repeat(counts, counts).astype(np.float32) ** -0.5,
        np.cumsum(np.bincount(owner[labels], minlength=count)), named,
        int(features.max(initial=0)) + 1, int(named.max(initial=0)) + 1,
    )  # fmt: skip


def _whole(examples: Examples) -> Examples:
    """Examples that have words and labels, each label of theirs once."""
    row = np.repeat(np.arange(len(examples)), np.diff(examples.label_ends, prepend=0))
    named = np.unique(row * np.int64(examples.n_labels) + examples.labels)
    row, labels = named // examples.n_labels, named % examples.n_labels
    counts = np.bincount(row, minlength=len(examples))
    once = replace(examples, labels=labels, label_ends=np.cumsum(counts))
    words = np.diff(examples.ends, prepend=0)
    return once.take(np.flatnonzero((words > 0) & (counts > 0)))


def _file(path: str | None, data_dir: Path | None) -> Path:
    places = [Path(path)] if path is not None else []
    if data_dir is not None:
        places = [data_dir / path, *places] if path is not None else [data_dir]
    for place in places:
        if place.is_file():
            return place
        texts = sorted(place.glob("*.txt")) if place.is_dir() else []
        if len(texts) == 1:
            return texts[0]
    raise bad_file(
        ", ".join(map(str, places)) or "data.path", "no file there",
        "labels lie in one file of the Extreme Classification Repository's sparse format",
        "point --data (or data.path) at it",
    )  # fmt: skip
