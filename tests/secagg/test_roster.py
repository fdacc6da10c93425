"""Whom a device believes to be in a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from secagg_rounds import Cohort, terms

from privrec.errors import DataError, ReleaseRefused, UsageError
from privrec.randomness import SecretRoot
from privrec.secagg.keys import DeviceKey, Prekey, PrekeyBook, statement
from privrec.secagg.roster import Call, EnrolmentKey, ListedDevices, Roster, enrol


@pytest.fixture
def cohort() -> Cohort:
    return Cohort((0, 1, 2, 0, 2))


@pytest.fixture
def prekeys(cohort: Cohort) -> list[Prekey]:
    return [Prekey.unpack(record) for record in cohort.prekeys()]


def test_a_call_survives_the_way_and_is_ordered(prekeys: list[Prekey]) -> None:
    call = Call.of(terms(), prekeys)
    assert Call.parse(call.pack()) == call
    assert Call.of(terms(), prekeys[::-1]) == call
    assert call.terms == terms()


@pytest.mark.parametrize(
    "change",
    [{"run": "other"}, {"round": 1}, {"attempt": 1}, {"plan": bytes(32)}, {"lengths": (4, 11, 31)},
     {"minimums": (1, 1, 2)}, {"ring_bits": 16}],
)  # fmt: skip
def test_the_digest_covers_all_terms_and_the_roster(
    prekeys: list[Prekey], change: dict[str, object]
) -> None:
    call = Call.of(terms(), prekeys)
    assert Call.of(terms(**change), prekeys).digest != call.digest
    assert Call.of(terms(), prekeys[1:]).digest != call.digest
    assert Call.of(terms(), prekeys).digest == call.digest


def test_lengths_and_bands_of_tiers(cohort: Cohort, prekeys: list[Prekey]) -> None:
    roster = Roster(Call.of(terms(), prekeys))
    assert [roster.length(n) for n in range(5)] == [30, 11, 4, 30, 4]
    assert roster.holders(range(5)) == roster.holding == ((0, 1, 2, 3, 4), (0, 1, 3), (0, 3))
    assert roster.holders([2, 4]) == ((2, 4), (), ())
    assert [roster.number(identity) for identity in cohort.ids] == list(range(5))
    with pytest.raises(ReleaseRefused, match="without device"):
        roster.number(bytes(32))


def test_bands_are_held_to_both_minimums(cohort: Cohort, prekeys: list[Prekey]) -> None:
    roster = Roster(Call.of(terms(minimums=(5, 3, 1)), prekeys))
    roster.check_bands(range(5), 2)
    with pytest.raises(ReleaseRefused, match="band 3 of 3: 2 devices hold it, .* set to 3"):
        roster.check_bands(range(5), 3)
    with pytest.raises(ReleaseRefused, match="band 1 of 3: 4 devices hold it, .* set to 5"):
        roster.check_bands(range(4), 1)


Change = Callable[[list[Prekey]], list[Prekey]]


def substituted(prekeys: list[Prekey]) -> list[Prekey]:
    return [replace(prekeys[0], masking=bytes(range(32))), *prekeys[1:]]


def promoted(prekeys: list[Prekey]) -> list[Prekey]:
    return [*prekeys[:2], replace(prekeys[2], tier=0), *prekeys[3:]]


def unknown(prekeys: list[Prekey]) -> list[Prekey]:
    root = SecretRoot.known(b"stranger")
    record = PrekeyBook(DeviceKey(bytes(32)), root).issue(1, 0)[0]
    return [*prekeys, Prekey.unpack(record)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (substituted, "no enrolled device signed"),
        (promoted, "no enrolled device signed"),
        (unknown, "no enrolled device signed"),
        (lambda prekeys: [prekeys[0], *prekeys], "names devices twice"),
    ],
)
def test_a_roster_that_is_not_what_devices_signed_is_refused(
    cohort: Cohort, prekeys: list[Prekey], change: Change, words: str
) -> None:
    with pytest.raises(ReleaseRefused, match=words):
        Call.of(terms(), change(prekeys)).roster.check(cohort.anchor)


def test_rosters_have_one_order_and_whole_records(cohort: Cohort, prekeys: list[Prekey]) -> None:
    call = Call.of(terms(), prekeys)
    size = len(call.records) // 5
    swapped = call.records[size:] + call.records[:size]
    with pytest.raises(ReleaseRefused, match="order of identities"):
        Roster(replace(call, records=swapped))
    with pytest.raises(ReleaseRefused, match="last prekey"):
        Roster(replace(call, records=call.records + b"x"))
    with pytest.raises(ReleaseRefused, match="tier beyond the 2"):
        Roster(replace(call, lengths=(4, 11), minimums=(1, 1)))
    with pytest.raises(ReleaseRefused, match="do not ascend"):
        Roster(replace(call, lengths=(4, 4, 11)))


def test_in_a_round_of_one_band_devices_of_all_tiers_are_alike(prekeys: list[Prekey]) -> None:
    """As they are in a count, which comes before the first round."""
    call = Call.of(terms((7,), round=-1), prekeys)
    roster = Call.parse(call.pack()).roster
    assert roster.terms.round == -1
    assert [roster.length(number) for number in range(5)] == [7] * 5
    assert [roster.bands(number) for number in range(5)] == [1] * 5
    assert roster.holding == ((0, 1, 2, 3, 4),)
    with pytest.raises(ReleaseRefused, match="round is -2"):
        Call.parse(replace(call, round=-2).pack())


def low_order(key: DeviceKey, prekey: Prekey, field: str) -> Prekey:
    values = {"sealing": prekey.sealing, "masking": prekey.masking, field: bytes(32)}
    stated = statement("prekey", prekey.serial, prekey.tier, *values.values())
    return replace(prekey, **values, signature=key.sign(stated))


@pytest.mark.parametrize("field", ["sealing", "masking"])
def test_a_key_of_low_order_is_refused_though_signed(
    cohort: Cohort, prekeys: list[Prekey], field: str
) -> None:
    prekeys[1] = low_order(cohort.books[1].key, prekeys[1], field)
    with pytest.raises(ReleaseRefused, match="low order"):
        Call.of(terms(), prekeys).roster.check(cohort.anchor)


def test_an_enrolment_office_vouches_for_devices() -> None:
    office, root = DeviceKey(bytes(32)), SecretRoot.known(b"enrolled")
    key = DeviceKey.derive(root, "device")
    certificate = enrol(office, key.public)
    prekey = Prekey.unpack(PrekeyBook(key, root, certificate=certificate).issue(1, 0)[0])
    assert EnrolmentKey(office.public).knows(prekey)
    assert not EnrolmentKey(DeviceKey(bytes(31) + b"1").public).knows(prekey)
    other = DeviceKey.derive(root, "another")
    borrowed = PrekeyBook(other, root, certificate=certificate).issue(1, 0)[0]
    assert not EnrolmentKey(office.public).knows(Prekey.unpack(borrowed))
    bare = Prekey.unpack(PrekeyBook(key, root).issue(1, 0)[0])
    assert not EnrolmentKey(office.public).knows(bare)
    assert ListedDevices([key.public]).knows(bare)


def test_a_roster_file_is_read(tmp_path: Path, cohort: Cohort, prekeys: list[Prekey]) -> None:
    path = tmp_path / "roster.txt"
    lines = ["# our devices", "", *(f"{one.hex()}  # {i}" for i, one in enumerate(cohort.ids))]
    path.write_text("\n".join(lines))
    anchor = ListedDevices.read(path)
    assert all(map(anchor.knows, prekeys))
    path.write_text("\n".join(lines[:-1]))
    assert [ListedDevices.read(path).knows(prekey) for prekey in prekeys] == [True] * 4 + [False]


@pytest.mark.parametrize("text", ["zz", "ab" * 31, "ab" * 33, "roster"])
def test_a_broken_roster_file_names_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "roster.txt"
    path.write_text("ab" * 32 + "\n" + text)
    with pytest.raises(DataError, match=r"roster\.txt:2: "):
        ListedDevices.read(path)
    with pytest.raises(UsageError, match="could not be read"):
        ListedDevices.read(tmp_path / "none.txt")
