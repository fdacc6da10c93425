"""What a Flower run with noise has spent: the ledger of its server, and how it is opened again."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privrec.errors import BudgetError, IntegrityError, UsageError
from privrec.privacy.calibrate import noise_multiplier_for
from privrec.privacy.events import RoundEvent, check_delta
from privrec.privacy.ledger import Ledger
from privrec.randomness import SecretRoot, state_dir
from privrec.secagg.keys import statement
from privrec.storage import server_key

_UNIT = "a user of this ledger is a node: all that one Flower node trains on"


@dataclass
class SumBudget:
    """The write-ahead ledger of one population of nodes, over one run or several.

    ε is against the server, which knows who takes part: nobody's sampling is counted on.

    Args:
        path: of the ledger, which is begun or gone on with.
        delta: the δ of the claim.
        epsilon: largest ε; a round that would exceed it is not started. None only counts.

    Raises:
        UsageError: when δ is outside its range.
    """

    path: Path
    delta: float
    epsilon: float | None = None

    def __post_init__(self) -> None:
        check_delta(self.delta)

    def begin(self) -> str:
        """Begin the ledger, or check the one that is there.

        Returns:
            The id of the run in every secure sum.

        Raises:
            UsageError: when it cannot be written, or its signing key is gone.
            IntegrityError: when it was altered, or is about another δ.
        """
        if not self.path.exists():
            run = secrets.token_hex(8)
            header = {"run_id": run, "delta": self.delta, "note": _UNIT}
            key = server_key(_secrets(run) / "server.key")
            SecretRoot.create(_secrets(run) / "server.root")
            with Ledger.create(self.path, header=header, signing_key=key, kept=_head(run)):
                return run
        with self._opened() as ledger:
            if ledger.header["delta"] != self.delta:
                raise IntegrityError(
                    f"{self.path}: it is about delta = {ledger.header['delta']}, not {self.delta}; "
                    "go on with the same, or begin another ledger for other nodes"
                )
            return str(ledger.header["run_id"])

    def charge(self, round: int, event: RoundEvent) -> tuple[int, float]:
        """Pay for another attempt at a round, on disk before this returns.

        Returns:
            Which attempt, and ε of everything that was charged.

        Raises:
            BudgetError: when it would exceed the budget; nothing is charged.
        """
        with self._opened() as ledger:
            spent = ledger.epsilon_after(event, delta=self.delta, adversary="server")
            if self.epsilon is not None and spent > self.epsilon:
                raise BudgetError(
                    f"round {round + 1} would bring epsilon to {spent:g} at delta {self.delta:g}, "
                    f"above the {self.epsilon:g} that was set; it is not started, and what was "
                    "released before stays within the budget"
                )
            attempt = ledger.attempts(round)
            ledger.charge(round, attempt, event)
            ledger.seal()
            return attempt, spent

    def commit(self, round: int, attempt: int, total: NDArray[np.int64]) -> None:
        """Say on disk what a round releases, before it is released."""
        with self._opened() as ledger:
            root = SecretRoot.load(_secrets(str(ledger.header["run_id"])) / "server.root")
            released = statement("flower release", total.astype("<i8").tobytes())
            ledger.commit(round, attempt, root.tag("release", round, attempt, released))
            ledger.seal()

    def multiplier(self, event_of: Callable[[float], RoundEvent], rounds: int) -> float:
        """The least noise multiplier that keeps that many rounds within the budget."""
        if self.epsilon is None:
            raise UsageError("neither noise_multiplier nor epsilon: give one of them")
        return noise_multiplier_for(self.epsilon, self.delta, event_of, rounds, "server")

    @contextmanager
    def _opened(self) -> Iterator[Ledger]:
        with Ledger.open(self.path, repair=False) as ledger:
            run = str(ledger.header["run_id"])
        key = server_key(_secrets(run) / "server.key", new=False)
        with Ledger.open(self.path, signing_key=key, kept=_head(run)) as ledger:
            yield ledger


def _head(run: str) -> Path:
    return _secrets(run) / "head.json"


def _secrets(run: str) -> Path:
    return state_dir() / "flower" / run
