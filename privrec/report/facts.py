"""What a ledger tells: its charges, what its header declares, and the ε of both adversaries.

:class:`Facts` is all that a figure or a sentence about privacy may depend on. A fact is read here
and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privrec.errors import IntegrityError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.report.model import Signature
from privrec.run.plan import LedgerHeader, read_header
from privrec.run.privacy_plan import EPSILONS, encoding_of, example_figures
from privrec.run.record import finite
from privrec.scenario.load import Scenario
from privrec.secagg.ring import Encoding
from privrec.storage import verified


@dataclass(frozen=True)
class Facts:
    """Everything that the figures and sentences of a report depend on.

    Attributes:
        ledger: read and closed; its key is the one that the signed head was checked with.
        delta: δ of the claim; None where no noise was planned.
        population: number of users, as declared; None where it is not known.
        rounds: that were charged; ``charges`` counts attempts, and nothing beside the rounds.
        evaluations: how often the held-out split was looked at: as planned, and at the end.
        epsilon: against recipients of the models, by PLD; None is infinite, as in the other three.
    """

    ledger: Ledger
    declared: LedgerHeader
    signature: Signature
    noise_known: bool
    delta: float | None
    population: int | None
    rounds: int
    charges: int
    evaluations: int
    epsilon: float | None
    epsilon_server: float | None
    epsilon_rdp: float | None
    epsilon_server_rdp: float | None
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, ledger: Ledger, path: Path, public_key: Ed25519PublicKey | None) -> Facts:
        """Read the facts of an open ledger that has ended, checked with the key if one is given."""
        header, declared = ledger.header, read_header(ledger.header, str(path))
        delta, population = header.get("delta"), header.get("population")
        noisy = declared.scenario.privacy.noise != "none" and isinstance(delta, float)
        known = header.get("noise_known") is not False
        planned = declared.scenario.train.rounds
        attempts = [each.round for each in ledger.charges if 0 <= each.round < planned]
        rounds, every = len(set(attempts)), declared.scenario.run.eval_every
        unfinished = rounds - (rounds == planned)
        looked = (unfinished // every if every else 0) + (rounds > 0)
        spent: dict[str, Any] = dict.fromkeys(EPSILONS)
        if noisy and delta is not None and not known:
            for name, which in EPSILONS.items():
                spent[name] = finite(epsilon(ledger.counts, float(delta), *which))
        return cls(
            ledger=ledger,
            declared=declared,
            signature="server key" if public_key else "key named in the ledger",
            noise_known=known,
            delta=delta if noisy else None,
            population=population if isinstance(population, int) else None,
            rounds=rounds,
            charges=len(attempts),
            evaluations=looked if declared.simulated else 0,
            **spent,
        )

    def check_result(self, result: Mapping[str, Any], path: Path) -> None:
        """Refuse, by an IntegrityError, a ``result.json`` that the run's key did not sign."""
        verified("result", result, self.ledger.public_key, path)

    @cached_property
    def of_rounds(self) -> Counter[RoundEvent]:
        """How often rounds were charged as each event."""
        planned = range(self.scenario.train.rounds)
        return Counter(each.event for each in self.ledger.charges if each.round in planned)

    @cached_property
    def examples(self) -> dict[str, Any] | None:
        """The guarantee of single interactions, recomputed; None without devices' own noise."""
        charged, known = self.ledger.examples, self.noise_known
        return example_figures(self.scenario, charged, noise_known=known)

    @property
    def before(self) -> Counter[RoundEvent]:
        """What was charged before the first round, and how often."""
        return Counter(each.event for each in self.ledger.charges if each.round == PREPARATION)

    @property
    def after(self) -> Counter[RoundEvent]:
        """What was charged for the secure sum of metrics after the last round, and how often."""
        last = self.scenario.train.rounds
        return Counter(each.event for each in self.ledger.charges if each.round >= last)

    @property
    def epsilon_after(self) -> float | None:
        """ε of that sum alone; None where none was charged, or it hides nothing."""
        if self.delta is None or self.noise_known or not self.after:
            return None
        found: float | None = finite(epsilon(self.after, self.delta, "server"))
        return found

    @property
    def scenario(self) -> Scenario:
        """The scenario that the signed header declares."""
        return self.declared.scenario

    @cached_property
    def encoding(self) -> Encoding:
        """How updates become integers, and their sensitivity."""
        return encoding_of(self.scenario, self.declared.coefficients)

    @property
    def everybody(self) -> bool:
        """Whether every user is asked in every round."""
        return self.scenario.devices.sampling_rate == 1

    @property
    def hides_cohorts(self) -> bool:
        """Whether ε against recipients rests on cohorts that they do not know."""
        privacy = self.scenario.privacy
        shown = privacy.noise == "distributed" and not privacy.remove_excess
        return not self.everybody and not shown

    @property
    def private(self) -> bool:
        """Whether a finite ε holds against anybody, and the report is whole."""
        noisy = self.scenario.privacy.noise != "none" and not self.noise_known
        return noisy and self.epsilon is not None and not self.missing

    @cached_property
    def least_noise(self) -> float | None:
        """The smallest noise multiplier that a round was charged with; None without noise."""
        return min((event.noise_multiplier for event in self.of_rounds), default=0.0) or None


def read_facts(directory: Path, public_key: Ed25519PublicKey | None = None) -> Facts:
    """Read what the run in ``directory`` spent, from its whole ledger, which is left as it is.

    Without the server's key the head is checked with the one that the header names, which shows
    damage but not a ledger that was replaced as a whole.
    """
    path = directory / "ledger.jsonl"
    if not path.exists():
        raise IntegrityError(
            f"{path}: the ledger is missing, and no ε can be stated without it. "
            "Restore the directory as the run left it."
        )
    with Ledger.open(path, public_key=public_key, repair=False) as ledger:
        if ledger.ended is None:
            raise IntegrityError(
                f"{path}: it lacks the entry that ends a run, so its end was cut away, or the run "
                "goes on; bring back the whole ledger, or finish the run"
            )
        if ledger.signed < ledger.entries:
            raise IntegrityError(
                f"{path}: {ledger.entries} entries, of which {ledger.signed} are signed: lines "
                "were added behind the signed end. Bring back the original file"
            )
        return Facts.of(ledger, path, public_key)
