"""Long ledgers are read by a short cut that decides what the long way decides."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privrec.errors import IntegrityError
from privrec.privacy import ledger_index
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger_index import START, line_of

PATH = Path("ledger.jsonl")
EVENTS = [RoundEvent("gaussian", 1.5, 0.25), RoundEvent("gaussian", 2.0), RoundEvent("none", 0.0)]


def spelled(entries):
    """A ledger of these entries, chained as it should be."""
    previous, lines = START, []
    for index, entry in enumerate(entries):
        line = line_of({**entry, "index": index, "previous": previous})
        previous = ledger_index.parsed(line)["hash"]
        lines.append(line)
    return b"".join(lines)


def entries(rounds=6):
    yield {"kind": "header", "body": {"format": 1, "x": [1]}}
    for number in range(-1, rounds):
        event = EVENTS[number % 3].to_json()
        yield {"kind": "charge", "round": number, "attempt": 0, "event": event}
        yield {"kind": "commit", "round": number, "attempt": 0, "tag": "ab" * 32}


def long_way(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_index, "_add_plain", lambda *_: False)
        return outcome(content)


def outcome(content):
    try:
        return ledger_index.read(PATH, content)
    except IntegrityError as error:
        return str(error)


def test_both_ways_read_the_same():
    content = spelled(entries())
    assert outcome(content) == long_way(content)
    assert outcome(content)[0].counts == {EVENTS[0]: 2, EVENTS[1]: 2, EVENTS[2]: 3}


def test_the_short_cut_is_taken(monkeypatch):
    monkeypatch.setattr(
        ledger_index, "add", lambda *given: pytest.fail(f"the long way for {given[2]!r}")
    )
    content = spelled(entries())
    first = content.index(b"\n") + 1
    found = ledger_index.Book(hashes=[ledger_index.parsed(content[: first - 1])["hash"]])
    for line in content[first:].splitlines(keepends=True)[2:0:-1]:
        assert not ledger_index._add_plain(found, line, {})  # out of order
    # The preparation has a negative round, which is left to the long way.
    rest = content[first:].splitlines(keepends=True)
    found.hashes += [ledger_index.parsed(line[:-1])["hash"] for line in rest[:2]]
    assert all(ledger_index._add_plain(found, line, {}) for line in rest[2:])


@settings(max_examples=300)
@given(data=st.data())
def test_both_ways_refuse_the_same(data):
    content = bytearray(spelled(entries(4)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "drop", "digit", "double line"]))
        if kind == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "drop":
            del content[place]
        elif kind == "digit":
            content[place : place + 1] = b"0"
        else:
            start = content.rfind(b"\n", 0, place) + 1
            end = content.find(b"\n", place) + 1 or len(content)
            content[end:end] = content[start:end]
    assert outcome(bytes(content)) == long_way(bytes(content))


@pytest.mark.parametrize(
    "change",
    [
        {"round": 2},  # charged twice
        {"attempt": -1},
        {"event": {"mechanism": "gaussian", "noise_multiplier": 1, "sampling_rate": 0.25}},
        {"event": {"mechanism": "gaussian", "noise_multiplier": 1.5, "sampling_rate": 2.0}},
        {"event": {"mechanism": "gaussian", "noise_multiplier": 1.5}},
        {"kind": "refund"},
        {"more": 1},
        {"round": 10**15},
        {"round": True},
        {"round": 7.0},
    ],
)
def test_chained_entries_of_another_shape_are_judged_the_same(change):
    more = {"kind": "charge", "round": 6, "attempt": 0, "event": EVENTS[0].to_json(), **change}
    content = spelled([*entries(), more])
    assert outcome(content) == long_way(content)


def test_nothing_follows_the_end_of_a_run():
    end = {"kind": "end", "model": "00" * 32}
    assert outcome(spelled([*entries(), end]))[0].end == bytes(32)
    charge = {"kind": "charge", "round": 9, "attempt": 0, "event": EVENTS[0].to_json()}
    for more in (charge, {**end}, {"kind": "commit", "round": 1, "attempt": 0, "tag": "00"}):
        assert "no entry that this version writes" in outcome(spelled([*entries(), end, more]))
