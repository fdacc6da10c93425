"""Every error that privrec raises on purpose, drawn as one tree.

::

    PrivrecError                 1
    ├── UsageError               2   what was asked cannot be done as asked
    │   ├── ScenarioError        2   a scenario file or an override is malformed
    │   └── UnknownIdError       2   a user or item id that the data set does not have
    ├── BudgetError              3   the next round would exceed the privacy budget
    ├── DataError                4   an input file is malformed
    │   └── IntegrityError       4   a ledger, checkpoint or model was altered or is incomplete
    ├── ReleaseRefused           5   a release was refused to keep a promise
    └── Interrupted            130   stopped by the user, after a checkpoint

The number is the exit code of the command line. A message gives the value, the rule and the
remedy, so that a reader can act on it without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class PrivrecError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UsageError(PrivrecError):
    """The request cannot be carried out as it was made; nothing was started or written."""

    exit_code = 2


class ScenarioError(UsageError):
    """A scenario is malformed; ``problems`` lists everything that is wrong with it at once."""

    def __init__(self, problems: Sequence[str], *, source: str = "scenario") -> None:
        self.problems = tuple(problems)
        self.source = source
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        plural = "s" if len(self.problems) != 1 else ""
        super().__init__(f"{source}: {len(self.problems)} problem{plural}{lines}")


class UnknownIdError(UsageError):
    """A user or item id that the data set does not contain."""


class BudgetError(PrivrecError):
    """The next round would spend more than the budget; it was neither charged nor run."""

    exit_code = 3


class DataError(PrivrecError):
    """An input file is malformed; the message names the file, the line and the remedy."""

    exit_code = 4


class IntegrityError(DataError):
    """A ledger, checkpoint or model file was altered, is incomplete or belongs to another run."""


class ReleaseRefused(PrivrecError):
    """A release was refused because a promise could not be kept; nothing left the system."""

    exit_code = 5


class Interrupted(PrivrecError):
    """The user stopped the run; the last checkpoint is complete and ``resume`` goes on from it."""

    exit_code = 130
