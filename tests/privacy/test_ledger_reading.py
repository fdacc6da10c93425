"""What follows its chain is still no entry when its content is of another shape."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privrec.errors import IntegrityError
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import Ledger
from privrec.storage import START, line_of, parsed, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw().hex()
EVENTS = [RoundEvent("gaussian", 1.5, 0.25), RoundEvent("gaussian", 2.0), RoundEvent("none", 0.0)]
GAUSSIAN = EVENTS[0].to_json()


def spelled(entries):
    """A ledger of these entries, chained as it should be."""
    previous, lines = START, []
    for index, entry in enumerate(entries):
        line = line_of({**entry, "index": index, "previous": previous})
        previous = parsed(line)["hash"]
        lines.append(line)
    return b"".join(lines)


def entries(rounds=6):
    yield {"kind": "header", "body": {"format": 1, "public_key": PUBLIC}}
    for number in range(-1, rounds):
        event = EVENTS[number % 3].to_json()
        yield {"kind": "charge", "round": number, "attempt": 0, "event": event}
        yield {"kind": "commit", "round": number, "attempt": 0, "tag": "ab" * 32}


def read(directory, content):
    path = directory / "ledger.jsonl"
    path.write_bytes(content)
    first = parsed(content.splitlines()[0])["hash"]
    head = sign("ledger head", {"format": 1, "entries": 1, "last_hash": first}, KEY)
    (directory / "ledger.head.json").write_bytes(repr(head).replace("'", '"').encode())
    return Ledger.open(path, repair=False)


def test_all_entries_are_counted(tmp_path: Path) -> None:
    ledger = read(tmp_path, spelled(entries()))
    assert ledger.counts == {EVENTS[0]: 2, EVENTS[1]: 2, EVENTS[2]: 3}
    assert ledger.committed(3, 0) == bytes.fromhex("ab" * 32)
    assert ledger.entries == 15


@pytest.mark.parametrize(
    "change",
    [
        {"round": 2},  # charged twice
        {"attempt": -1},
        {"event": {**GAUSSIAN, "sampling_rate": 2.0}},
        {"event": {"mechanism": "gaussian", "noise_multiplier": 1.5}},
        {"kind": "refund"},
        {"round": True},
        {"round": 7.0},
    ],
)
def test_chained_entries_of_another_shape_are_refused(tmp_path: Path, change) -> None:
    more = {"kind": "charge", "round": 6, "attempt": 0, "event": GAUSSIAN}
    assert read(tmp_path, spelled([*entries(), more])).counts[EVENTS[0]] == 3
    with pytest.raises(IntegrityError, match="line 16 is no entry that this version writes"):
        read(tmp_path, spelled([*entries(), {**more, **change}]))


def test_nothing_follows_the_end_of_a_run(tmp_path: Path) -> None:
    end = {"kind": "end", "model": "00" * 32}
    assert read(tmp_path, spelled([*entries(), end])).ended == bytes(32)
    charge = {"kind": "charge", "round": 9, "attempt": 0, "event": GAUSSIAN}
    for more in (charge, {**end}, {"kind": "commit", "round": 1, "attempt": 0, "tag": "00"}):
        with pytest.raises(IntegrityError, match="an entry after the one that ends a run"):
            read(tmp_path, spelled([*entries(), end, more]))
