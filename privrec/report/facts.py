"""What a ledger tells: its charges, what its header declares, and the ε of both adversaries.

:class:`Facts`, of a run, and :class:`Account`, of training that is not ours, are all that a figure
or a sentence about privacy may depend on. A fact is read here and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privrec.errors import IntegrityError, UsageError
from privrec.privacy.events import RoundEvent, epsilon, parts_of
from privrec.privacy.ledger import PREPARATION, Charge, Ledger
from privrec.randomness import KEPT, secrets_of
from privrec.report.model import How, Signature, Told
from privrec.run.plan import LedgerHeader, read_header
from privrec.run.privacy_plan import EPSILONS, encoding_of, example_figures
from privrec.run.record import finite
from privrec.scenario.load import Scenario
from privrec.secagg.ring import Encoding
from privrec.storage import verified


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a ledger's charges come to.

    Attributes:
        ledger: read and closed; its key is the one that the signed head was checked with.
        delta: δ of the claim; None where no noise was planned.
        population: number of units, as declared; None where it is not known.
        rounds: that were charged.
        epsilon: against recipients of the models, by PLD; None is infinite, as in the other three.
        missing: starred parts of the report for which there are no facts.
    """

    ledger: Ledger
    signature: Signature
    delta: float | None
    population: int | None
    rounds: int
    epsilon: float | None
    epsilon_server: float | None
    epsilon_rdp: float | None
    epsilon_server_rdp: float | None
    missing: tuple[str, ...] = ()

    @property
    def private(self) -> bool:
        """Whether a finite ε holds against anybody, and the report is whole."""
        return self.epsilon is not None and not self.missing

    @cached_property
    def of_rounds(self) -> Counter[RoundEvent]:
        """How often rounds were charged as each event."""
        charged = (charge.event for charge in self.ledger.charges if charge.round >= 0)
        return parts_of(Counter(charged))

    @cached_property
    def least_noise(self) -> float | None:
        """The smallest noise multiplier that a round was charged with; None without noise."""
        return min((event.noise_multiplier for event in self.of_rounds), default=0.0) or None


@dataclass(frozen=True, kw_only=True)
class Account(Spent):
    """What is known of training that privrec did not do: its ledger, and what its operator says."""

    told: Told

    @classmethod
    def of(cls, ledger: Ledger, path: Path, given: bool, told: Told) -> Account:
        """Read an open ledger; ``given`` is whether its key was, and not only named by itself."""
        header = ledger.header
        delta = header.get("delta")
        if "scenario" in header or not isinstance(delta, float) or "run_id" not in header:
            raise UsageError(
                f"{path}: it is no ledger of training elsewhere, as privrec.Ledger.create or a "
                "SecureSum with noise make it; a run is reported by the name of its directory"
            )
        spent = {
            name: finite(ledger.epsilon(adversary, delta, accountant))
            for name, (adversary, accountant) in EPSILONS.items()
        }
        return cls(
            ledger=ledger,
            signature="server key" if given else "key named in the ledger",
            delta=delta,
            population=told.population,
            rounds=len(ledger.charges),
            told=told,
            **spent,
        )

    @property
    def statement(self) -> dict[str, Any]:
        """What the ledger's key signs of what the operator told: the facts, and of which ledger."""
        header, last = self.ledger.header, self.ledger.last_hash
        return {"told": self.told.model_dump(), "run_id": header["run_id"], "last_hash": last}

    @property
    def unit(self) -> str:
        """Whose data two neighbours differ in."""
        return str(self.ledger.header["unit"])

    @property
    def in_shares(self) -> bool:
        """Whether the noise was made in shares, by those whose data it is."""
        return any(event.grid is not None for event in self.of_rounds)

    @property
    def sampling(self) -> How:
        """How the units of a release were drawn, as far as the events tell."""
        if any(event.other is not None for event in self.of_rounds):
            return "other"
        return "poisson" if any(e.sampling_rate < 1 for e in self.of_rounds) else "everybody"

    @property
    def rate(self) -> float | None:
        """The chance to be in a release, where all events have the same."""
        rates = {event.sampling_rate for event in self.of_rounds}
        return rates.pop() if len(rates) == 1 and self.sampling != "other" else None

    @property
    def hides_cohorts(self) -> bool:
        """Whether ε against recipients rests on samples that they do not know."""
        return self.epsilon != self.epsilon_server

    @property
    def too_rare(self) -> Charge | None:
        """A charge whose sampling rate is too low for the batch that the training expected."""
        for charge in self.ledger.charges:
            least = 0.99 * (charge.expected_batch or 0) - 1  # Opacus rounds down
            if self.population and charge.event.sampling_rate * self.population < least:
                return charge
        return None

    @property
    def untold(self) -> list[str]:
        """Keys of the operator's facts that nobody gave."""
        return [name for name, value in self.told.model_dump().items() if value in (None, ())]


@dataclass(frozen=True, kw_only=True)
class Facts(Spent):
    """Everything that the figures and sentences of a run's report depend on.

    Attributes:
        charges: counts attempts at rounds, and nothing before the first round.
        evaluations: how often the held-out split was looked at: as planned, and at the end.
    """

    declared: LedgerHeader
    noise_known: bool
    charges: int
    evaluations: int

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
    def examples(self) -> dict[str, Any] | None:
        """The guarantee of single interactions, recomputed; None without devices' own noise."""
        charged, known = self.ledger.examples, self.noise_known
        return example_figures(self.scenario, charged, noise_known=known)

    @cached_property
    def of_rounds(self) -> Counter[RoundEvent]:
        """How often rounds were charged as each event, and nothing beside them."""
        planned = range(self.scenario.train.rounds)
        charged = (each.event for each in self.ledger.charges if each.round in planned)
        return parts_of(Counter(charged))

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
        return noisy and super().private


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
        _check_signed(ledger)
        return Facts.of(ledger, path, public_key)


def read_account(
    path: Path, public_key: Ed25519PublicKey | None = None, told: Told | None = None
) -> Account:
    """Read what training elsewhere spent, from its ledger, which is left as it is.

    On the machine that charged, it must go on from the last head that was signed there.
    """
    with Ledger.open(path, public_key=public_key, repair=False) as ledger:
        folder = secrets_of(str(ledger.header.get("run_id", "")))
    kept = None if folder is None or not (folder / KEPT).exists() else folder / KEPT
    with Ledger.open(path, public_key=public_key, kept=kept, repair=False) as ledger:
        _check_signed(ledger)
        return Account.of(ledger, path, public_key is not None, told or Told.model_validate({}))


def _check_signed(ledger: Ledger) -> None:
    if ledger.signed < ledger.entries:
        raise IntegrityError(
            f"{ledger.path}: {ledger.entries} entries, of which {ledger.signed} are signed: lines "
            "were added behind the signed end. Bring back the original file; where training was "
            "cut off, open the ledger with Ledger.resume and close it"
        )
