"""Identities, one-time prekeys, and what is derived from them."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privrec.errors import IntegrityError, ReleaseRefused, UsageError
from privrec.randomness import SecretRoot
from privrec.secagg import keys
from privrec.secagg.keys import (
    DeviceKey,
    Prekey,
    PrekeyBook,
    Verifier,
    agree,
    derive,
    is_low_order,
    public_of,
    statement,
)

ROOT = SecretRoot.known(b"device")
KEY = DeviceKey.derive(ROOT, "device", 3)
P = 2**255 - 19


def book(states: list[bytes] | None = None, state: bytes | None = None) -> PrekeyBook:
    return PrekeyBook(
        KEY, ROOT, save=(lambda s: None) if states is None else states.append, state=state
    )


def test_statements_of_different_parts_differ() -> None:
    parts: list[tuple[bytes | int | str, ...]] = [
        (), ("a",), (b"a",), ("a", "b"), ("ab",), ("a", b"b"), (1,), ("1",), (b"1",), (11,),
        (1, 1), ("", "a"), ("a", ""), (b"", b""), (b"",),
    ]  # fmt: skip
    made = [statement(label, *p) for label in ("x", "y") for p in parts]
    assert len(set(made)) == len(made)
    assert statement("x", 1) == statement("x", 1)


def test_derived_keys_are_those_of_hkdf() -> None:
    stated = statement("label", b"context", 4)
    reference = HKDF(hashes.SHA256(), 32, keys._SALT, stated).derive(b"secret")
    assert derive(b"secret", "label", b"context", 4) == reference
    assert derive(b"other", "label", b"context", 4) != reference


def test_a_device_signs_and_others_check_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, stated = Verifier(), statement("x", 1)
    signature = KEY.sign(stated)
    assert verifier.check(KEY.public, signature, stated)
    for public, signed, what in (
        (KEY.public, signature, statement("x", 2)),
        (KEY.public, bytes(64), stated),
        (DeviceKey(bytes(32)).public, signature, stated),
        (bytes(31), signature, stated),
    ):
        assert not verifier.check(public, signed, what)
    monkeypatch.setattr(keys, "Ed25519PublicKey", None)
    assert verifier.check(KEY.public, signature, stated)  # remembered
    monkeypatch.setattr(keys, "_REMEMBERED", 1)
    monkeypatch.setattr(keys, "Ed25519PublicKey", Ed25519PublicKey)
    other = statement("x", 3)
    assert verifier.check(KEY.public, KEY.sign(other), other)
    assert len(verifier._good) == 1


def test_a_remembered_signature_is_none_of_other_parts_that_join_to_the_same_bytes() -> None:
    verifier, stated = Verifier(), statement("x", 1)
    signature = KEY.sign(stated)
    assert verifier.check(KEY.public, signature, stated)
    joined = KEY.public + signature + stated
    for first, second in ((31, 96), (33, 96), (32, 95), (32, 97), (0, 64), (32, 128)):
        assert not verifier.check(joined[:first], joined[first:second], joined[second:])


def test_prekeys_are_fresh_signed_and_survive_the_way() -> None:
    records = book().issue(3, tier=2)
    made = [Prekey.unpack(record) for record in records]
    assert [prekey.serial for prekey in made] == [0, 1, 2]
    assert {prekey.tier for prekey in made} == {2}
    assert len({key for prekey in made for key in (prekey.sealing, prekey.masking)}) == 6
    for prekey, record in zip(made, records, strict=True):
        assert prekey.pack() == record
        assert Verifier().check(KEY.public, prekey.signature, prekey.stated)
    with pytest.raises(ReleaseRefused, match="bytes"):
        Prekey.unpack(records[0][:-1])


@pytest.mark.parametrize("field", ["serial", "tier", "sealing", "masking"])
def test_a_signature_covers_every_field(field: str) -> None:
    prekey = Prekey.unpack(book().issue(1, 0)[0])
    value = getattr(prekey, field)
    other = value + 1 if isinstance(value, int) else bytes(32)
    altered = Prekey(**{**vars(prekey), field: other})
    assert not Verifier().check(KEY.public, prekey.signature, altered.stated)


def test_the_secret_half_belongs_to_the_public_one() -> None:
    mine = book()
    prekey = Prekey.unpack(mine.issue(2, 0)[1])
    secret = mine.enter(1, "run", 0, 0)
    assert public_of(secret.sealing) == prekey.sealing
    assert public_of(secret.masking) == prekey.masking
    assert public_of(X25519PrivateKey.from_private_bytes(secret.masking_bytes)) == prekey.masking
    peer = X25519PrivateKey.generate()
    assert agree(secret.masking, public_of(peer)) == agree(peer, prekey.masking)


def test_a_prekey_is_taken_once_also_after_a_restart() -> None:
    states: list[bytes] = []
    mine = book(states)
    mine.issue(2, 0)
    mine.enter(0, "run", 0, 0)
    for again in (mine, book(state=states[-1])):
        with pytest.raises(ReleaseRefused, match="used before"):
            again.enter(0, "run", 1, 0)
        with pytest.raises(ReleaseRefused, match="never issued"):
            again.enter(2, "run", 1, 0)
    assert Prekey.unpack(book(state=states[-1]).issue(1, 0)[0]).serial == 2


def test_only_the_latest_progress_of_the_latest_attempt_is_gone_on_with() -> None:
    """A session that was set back would answer twice, and a book its prekeys be used twice."""
    states: list[bytes] = []
    mine = book(states)
    mine.issue(3, 0)
    with pytest.raises(IntegrityError, match="set back"):
        mine.check_latest("run", b"")  # never entered
    mine.enter(0, "run", 0, 0)
    mine.advance("run", b"", b"one")
    mine.advance("run", b"one", b"two")
    for again in (mine, book(state=states[-1])):
        again.check_latest("run", b"two")
        for other in (b"", b"one", b"three"):
            with pytest.raises(IntegrityError, match="set back"):
                again.advance("run", other, b"four")
        with pytest.raises(IntegrityError, match="set back"):
            again.check_latest("another run", b"two")
    with pytest.raises(IntegrityError, match="set back"):
        book(state=states[-2]).check_latest("run", b"two")  # the book was set back
    mine.enter(1, "another run", 0, 0)
    mine.check_latest("run", b"two")
    mine.enter(2, "run", 0, 1)
    with pytest.raises(IntegrityError, match="set back"):
        mine.check_latest("run", b"two")


@pytest.mark.parametrize(("count", "tier"), [(-1, 0), (1, -1), (1, 256)])
def test_prekeys_are_issued_forwards_and_for_tiers_that_are(count: int, tier: int) -> None:
    """A count below zero would have serials issued again."""
    states: list[bytes] = []
    mine = book(states)
    mine.issue(2, 0)
    with pytest.raises(UsageError, match=f"{count} prekeys for tier {tier}"):
        mine.issue(count, tier)
    assert len(states) == 1
    assert Prekey.unpack(mine.issue(1, 0)[0]).serial == 2


@pytest.mark.parametrize("attempt", [(4, 1), (4, 0), (3, 9), (0, 0)])
def test_an_attempt_is_entered_once_and_in_order(attempt: tuple[int, int]) -> None:
    states: list[bytes] = []
    mine = book(states)
    mine.issue(9, 0)
    mine.enter(0, "run", 4, 1)
    for again in (mine, book(state=states[-1])):
        with pytest.raises(ReleaseRefused, match="took part in attempt 1 at round 4"):
            again.enter(1, "run", *attempt)
    mine.enter(1, "run", 4, 2)
    mine.enter(2, "run", 5, 0)
    mine.enter(3, "another run", 0, 0)


def test_the_state_is_kept_before_the_secret_is_given() -> None:
    def fail(state: bytes) -> None:
        raise OSError("disk full")

    mine = PrekeyBook(KEY, ROOT, save=fail)
    with pytest.raises(OSError, match="full"):
        mine.issue(1, 0)
    with pytest.raises(OSError, match="full"):
        mine.enter(0, "run", 0, 0)


def test_a_refused_entry_burns_nothing() -> None:
    states: list[bytes] = []
    mine = book(states)
    mine.issue(2, 0)
    mine.enter(0, "run", 3, 0)
    kept = len(states)
    with pytest.raises(ReleaseRefused):
        mine.enter(1, "run", 3, 0)
    assert len(states) == kept
    mine.enter(1, "run", 3, 1)


@pytest.mark.parametrize(
    "state", [b"", b"{}", b"[]", b'{"issued": 1}', b'{"issued":1,"unused":[],"joined":{"r":[1,0]}}']
)
def test_a_broken_state_is_refused(state: bytes) -> None:
    with pytest.raises(IntegrityError, match="enrol the device anew"):
        book(state=state)


def test_the_state_holds_no_secret() -> None:
    states: list[bytes] = []
    mine = book(states)
    mine.issue(1, 0)
    secret = mine.enter(0, "run", 0, 0)
    assert set(json.loads(states[-1])) == {"issued", "unused", "joined"}
    assert secret.masking_bytes.hex() not in repr(vars(mine))
    assert secret.masking_bytes.hex() not in repr(secret)


def test_points_of_low_order_are_known_and_never_agreed_with() -> None:
    private = X25519PrivateKey.generate()
    low = [point + top for point in keys._LOW_ORDER for top in (0, 2**255)]
    assert len(low) == 14
    for value in low:
        public = value.to_bytes(32, "little")
        assert is_low_order(public)
        with pytest.raises(ReleaseRefused, match="same secret"):
            agree(private, public)
    assert not is_low_order(public_of(private))
    assert not is_low_order((P - 2).to_bytes(32, "little"))


def test_roots_of_identities_are_apart() -> None:
    names = [("device", 3), ("device", 4), ("device", "3")]
    assert len({DeviceKey.derive(ROOT, *name).public for name in names}) == 3
    assert hmac.compare_digest(DeviceKey.derive(ROOT, "device", 3).public, KEY.public)
    assert hashlib.sha256(KEY.public).digest() != KEY.public
