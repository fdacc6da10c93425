"""The one shape of an error about an input file: where, what is there, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privrec.errors import DataError

BLANKS = " \t\n\v\f\r"
"""What does not count around a cell, an id or a label."""


def bad_file(file: str, found: str, rule: str, remedy: str) -> DataError:
    """An error about a whole file.

    Args:
        file: the path as the user knows it.
        found: what is wrong, with the offending value.
        rule: what would be right.
        remedy: what to do about it.
    """
    # A member of an archive may be named by anything, a line feed too.
    place = file if file.isprintable() else repr(file)
    return DataError(f"{place}: {found}; {rule}; {remedy}")


def bad_line(file: str, line: int, found: str, rule: str, remedy: str) -> DataError:
    """An error about one line of a file.

    Args:
        file: the path as the user knows it.
        line: counted from 1, the header included.
        found: what is wrong, with the offending value.
        rule: what would be right.
        remedy: what to do about it.
    """
    return bad_file(f"{file}, line {line}", found, rule, remedy)


def shown(text: str, most: int = 60) -> str:
    """A value as an error message quotes it: printable, and not longer than ``most`` characters."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


def line_namer(label: str) -> Callable[[int], str]:
    """Names a row of a file that has one on every line."""
    return lambda row: f"{label}, line {row + 1}"


def first_repeated(values: NDArray[np.int64]) -> int | None:
    """The first place in an array whose value stands before it too; None: there is none."""
    first = np.unique(values, return_index=True)[1]
    again = np.setdiff1d(np.arange(values.size), first)
    return int(again[0]) if again.size else None
