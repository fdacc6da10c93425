"""What a forger of ledgers can do without the key: mend every hash, and sign with another key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privrec.privacy.ledger import head_path
from privrec.storage import START, canonical, line_of

Content = dict[str, Any]


def ledger_of(place: Path) -> Path:
    """The ledger itself, or that of a run's directory."""
    return place / "ledger.jsonl" if place.is_dir() else place


def entries_of(place: Path) -> list[Content]:
    return [json.loads(line) for line in ledger_of(place).read_text().splitlines()]


def chained(place: Path, entries: list[Content]) -> str:
    """Write entries with places and hashes as they should be; the last hash."""
    previous, lines = START, []
    for index, entry in enumerate(entries):
        body = {name: value for name, value in entry.items() if name != "hash"}
        line = line_of({**body, "index": index, "previous": previous})
        previous = json.loads(line)["hash"]
        lines.append(line)
    ledger_of(place).write_bytes(b"".join(lines))
    return previous


def head_of(place: Path) -> Path:
    return head_path(ledger_of(place))


def signed_by(place: Path, entries: int, last: str, key: Ed25519PrivateKey) -> None:
    head = {"format": 1, "entries": entries, "last_hash": last}
    signature = key.sign(b"privrec ledger head, format 1\n" + canonical(head)).hex()
    named = key.public_key().public_bytes_raw().hex()
    head_of(place).write_bytes(
        canonical({**head, "public_key": named, "signature": signature}) + b"\n"
    )
