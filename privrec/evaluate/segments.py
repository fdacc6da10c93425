"""Whom a model serves how well: metrics by activity of the user and by popularity of the item.

A mean over users hides whom noise hurts: light users and rare items lose first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privrec.data import Split
from privrec.evaluate.metrics import Evaluation

FEWEST = 20
"""A segment of fewer users is left out: its mean would tell of single ones."""

HEAD = 0.8
"""Share of all interactions that the popular items have between them."""


def by_segment(evaluated: Evaluation, split: Split) -> list[dict[str, Any]]:
    """Metrics of light, medium and heavy users, and of users whose held-out items are popular.

    Activity is cut at the terciles of the measured users' history lengths. An item is popular when
    it is one of the most frequent that have :data:`HEAD` of the interactions together; a user goes
    by the first item held out.

    Args:
        evaluated: metrics of each measured user.
        split: what they were measured on.

    Returns:
        Dictionaries of ``by``, ``name``, ``share`` of the measured users (two digits) and
        ``metrics``. They come from private data without noise.
    """
    if not evaluated.users.size:
        return []
    parts = (*_activity(evaluated, split), *_popularity(evaluated, split))
    return [_segment(evaluated, *part) for part in parts if part[2].sum() >= FEWEST]


def _segment(
    evaluated: Evaluation, by: str, name: str, chosen: NDArray[np.bool_]
) -> dict[str, Any]:
    means = {key: float(values[chosen].mean()) for key, values in evaluated.values.items()}
    return {"by": by, "name": name, "share": round(float(chosen.mean()), 2), "metrics": means}


def _activity(evaluated: Evaluation, split: Split) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    lengths = np.diff(split.train.indptr)[evaluated.users]
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    yield "activity", f"light, up to {low:.0f} items", lengths <= low
    yield "activity", "medium", (lengths > low) & (lengths <= high)
    yield "activity", f"heavy, above {high:.0f} items", lengths > high


def _popularity(
    evaluated: Evaluation, split: Split
) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    first = split.heldout.items[split.heldout.indptr[evaluated.users]]
    popular = _head(split.train.item_counts())[first]
    yield "item popularity", "a popular item held out", popular
    yield "item popularity", "a rare item held out", ~popular


def _head(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The fewest items that have :data:`HEAD` of all interactions."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    head = np.zeros(counts.size, np.bool_)
    head[order[before < HEAD * counts.sum()]] = True
    return head
