"""What a run spent, read from its ledger and checked against the rest of the directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privrec.errors import IntegrityError
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import PREPARATION, Charge, Ledger
from privrec.storage import verified

Signature = Literal["server key", "key named in the ledger"]


@dataclass(frozen=True)
class Spending:
    """Everything charged, in order, and how far the ledger was checked.

    Args:
        header: The ledger's header.
        charges: One for each (round, attempt); rounds are counted from 0.
        counts: How often each event was charged.
        examples: How often each example-level event was entered, which is another unit.
        head: Hash of the last entry, in hex.
        key: The public key that the signed head was checked with, in hex.
        signature: Whether that key was given, or is the one that the ledger itself names.
        model: Digest of the model that the run ended with.
    """

    header: Mapping[str, Any]
    charges: Sequence[Charge]
    counts: Mapping[RoundEvent, int]
    examples: Mapping[RoundEvent, int]
    head: str
    key: str
    signature: Signature
    model: str

    @property
    def rounds(self) -> Counter[RoundEvent]:
        """How often each event was charged for a round."""
        return Counter(charge.event for charge in self.charges if charge.round >= 0)

    @property
    def before(self) -> RoundEvent | None:
        """What was charged before the first round, if anything."""
        return next((each.event for each in self.charges if each.round == PREPARATION), None)

    def check_result(self, result: Mapping[str, Any], path: Path) -> None:
        """Refuse a ``result.json`` that the run's key did not sign.

        Raises:
            IntegrityError: when it did not.
        """
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key))
        verified("result", result, key, path)


def read_spending(directory: Path, public_key: Ed25519PublicKey | None = None) -> Spending:
    """The spending of the run in ``directory``; the ledger is read and left as it is.

    Args:
        directory: The run directory.
        public_key: The server's key; without it the head is checked with the key that the header
            names, which shows damage but not a ledger that was replaced as a whole.

    Raises:
        IntegrityError: The ledger was altered, cut short, not signed to its end, or signed by
            another key, or is absent, or of a run that did not end.
    """
    path = directory / "ledger.jsonl"
    if not path.exists():
        raise IntegrityError(
            f"{path}: the ledger is missing, and no ε can be stated without it. "
            "Restore the directory as the run left it."
        )
    with Ledger.open(path, public_key=public_key, repair=False) as ledger:
        _check_whole(path, ledger)
        return Spending(
            header=ledger.header,
            charges=ledger.charges,
            counts=ledger.counts,
            examples=ledger.examples,
            head=ledger.last_hash,
            key=ledger.public_key.public_bytes_raw().hex(),
            signature="server key" if public_key else "key named in the ledger",
            model=(ledger.ended or b"").hex(),
        )


def _check_whole(path: Path, ledger: Ledger) -> None:
    if ledger.ended is None:
        raise IntegrityError(
            f"{path}: it lacks the entry that ends a run, so its end was cut away, or the run goes "
            "on; bring back the whole ledger, or finish the run"
        )
    if ledger.signed < ledger.entries:
        raise IntegrityError(
            f"{path}: {ledger.entries} entries, of which {ledger.signed} are signed: lines were "
            "added behind the signed end. Bring back the original file"
        )
