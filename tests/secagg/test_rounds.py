"""Whole rounds: the unmasked sum is the plain one of the survivors, or there is none."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secagg_rounds import (
    LENGTHS,
    SMALL,
    Cohort,
    answer,
    drive,
    model,
    plain_sum,
    round_of,
    terms,
)

from privrec.errors import ReleaseRefused, UsageError
from privrec.secagg import server as server_module
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.messages import Confirmation, Opening, Quorum, Shares, Stage, bitmap, members
from privrec.secagg.roster import Terms
from privrec.secagg.server import ServerSession
from privrec.secagg.sharing import Graph

SPARSE = Policy(minimum=2, corrupt_share=0.0, graph=Graph(complete_up_to=5, degree=25))


def is_possible(cohort: Cohort, agreed: Terms, drops: Mapping[Stage, Collection[int]]) -> bool:
    """Whether the protocol promises a sum for a pattern of drop-outs in a complete graph."""
    left = survivors = set(range(len(cohort.tiers)))
    quorum = 2 * len(left) // 3 + 1
    for stage in (Stage.SHARES, Stage.MASKED, Stage.CONFIRM):
        left = left - set(drops.get(stage, ()))
        survivors = left if stage is Stage.MASKED else survivors
        held = [sum(cohort.tiers[number] <= tier for number in left) for tier in (2, 1, 0)]
        asked = [max(least, cohort.policy.minimum) for least in agreed.minimums]
        if len(left) < quorum or any(map(int.__lt__, held, asked)):
            return False
    opened = left - set(drops.get(Stage.UNMASK, ()))
    return opened == survivors or len(opened) >= quorum


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Cohort, Terms, dict[Stage, set[int]]]:
    tiers = (0, 0, 0, *draw(st.lists(st.integers(0, 2), min_size=0, max_size=7)))
    n = len(tiers)
    lengths = draw(st.sets(st.integers(1, 40), min_size=3, max_size=3))
    minimums = tuple(draw(st.lists(st.integers(1, 3), min_size=3, max_size=3)))
    ring_bits = draw(st.sampled_from([16, 32]))
    agreed = terms(sorted(lengths), minimums=minimums, ring_bits=ring_bits)
    # Up to a bit more than a third in all, so that both sides of the threshold are met often.
    gone = draw(st.lists(st.integers(0, n - 1), max_size=n // 3 + 1, unique=True))
    drops: dict[Stage, set[int]] = {}
    for number in gone:
        stage = draw(st.sampled_from(list(Stage)[:4]))
        drops.setdefault(stage, set()).add(number)
    return Cohort(tiers), agreed, drops


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(sessions(), st.integers(0, 2**32))
def test_the_unmasked_sum_is_the_plain_sum_of_the_survivors(
    session: tuple[Cohort, Terms, dict[Stage, set[int]]], seed: int
) -> None:
    cohort, agreed, drops = session
    try:
        result, plain = round_of(cohort, agreed, drops, seed)
    except ReleaseRefused:
        assert not is_possible(cohort, agreed, drops)
        return
    assert is_possible(cohort, agreed, drops)
    np.testing.assert_array_equal(result.total, plain)
    gone = drops.get(Stage.SHARES, set()) | drops.get(Stage.MASKED, set())
    left = [i for i in range(len(cohort.tiers)) if i not in gone]
    for band, named in enumerate(result.survivors):
        assert named == tuple(cohort.ids[i] for i in left if cohort.tiers[i] <= 2 - band)
    assert not result.faults


@pytest.mark.parametrize(
    ("drops", "words"),
    [
        ({Stage.SHARES: range(4)}, "6 of 10 devices sent shares, and 7 must"),
        ({Stage.MASKED: range(4)}, "6 of 10 devices sent masked"),
        ({Stage.CONFIRM: range(4)}, "6 of 10 devices confirmed"),
        ({Stage.UNMASK: range(4)}, "6 sound shares"),
        ({stage: [stage] for stage in list(Stage)[:4]}, "6 sound shares"),
    ],
)
def test_past_the_threshold_there_is_an_error_and_no_value(
    drops: dict[Stage, list[int]], words: str
) -> None:
    cohort = Cohort((0,) * 10)
    agreed = terms((30,))
    server = cohort.server(agreed)
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    vectors = {device: np.ones(30, np.int32) for device in cohort.ids}
    named = {stage: [cohort.ids[i] for i in numbers] for stage, numbers in drops.items()}
    with pytest.raises(ReleaseRefused, match=words):
        drive(server, clients, vectors, named)
    assert server.done
    assert server.outbox() == {}
    with pytest.raises(ReleaseRefused, match="no sum"):
        _ = server.result
    assert server._total.size == 0  # nothing partly unmasked is left


def test_just_above_the_threshold_there_is_a_sum() -> None:
    for stage in list(Stage)[:4]:
        result, plain = round_of(Cohort((0,) * 10), terms((30,)), {stage: range(3)})
        np.testing.assert_array_equal(result.total, plain)
        assert len(result.survivors[0]) == (7 if stage < Stage.CONFIRM else 10)


@pytest.mark.parametrize("ring_bits", [16, 32])
@pytest.mark.parametrize("gone", [0, 2])
def test_a_sparse_graph_gives_the_same_sum(ring_bits: int, gone: int) -> None:
    drops = {stage: range(gone * stage, gone * (stage + 1)) for stage in list(Stage)[:4]}
    cohort = Cohort((0, 1, 2, 0) * 10, SPARSE)
    result, plain = round_of(cohort, terms(ring_bits=ring_bits), drops)
    np.testing.assert_array_equal(result.total, plain)
    assert len(result.survivors[0]) == 40 - 2 * gone


def test_a_band_below_the_minimum_of_the_plan_ends_the_round() -> None:
    agreed = terms(minimums=(1, 1, 4))
    cohort = Cohort((0, 0, 0, 0, 1, 2, 2, 2, 2, 2))
    assert list(map(len, round_of(cohort, agreed)[0].survivors)) == [10, 5, 4]
    with pytest.raises(ReleaseRefused, match="band 3 of 3: 3 devices"):
        round_of(cohort, terms(minimums=(1, 1, 4), round=1), {Stage.MASKED: [0]})
    with pytest.raises(ReleaseRefused, match="band 3 of 3: 3 devices"):
        round_of(cohort, terms(minimums=(1, 1, 4), round=2), {Stage.CONFIRM: [0]})


def test_survivors_are_known_before_the_last_answer() -> None:
    cohort = Cohort((0, 1, 2, 0, 1))
    server = cohort.server()
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    vectors = dict(zip(cohort.ids, cohort.vectors(terms(), np.random.default_rng(1)), strict=True))
    while server.stage < Stage.UNMASK:
        for device, message in server.outbox().items():
            server.receive(device, answer(clients[device], server.stage, message, vectors[device]))
        server.advance()
    (seen,) = {clients[device]._members("survivors") for device in cohort.ids}
    result = drive(server, clients, vectors)
    assert result.survivors[0] == tuple(cohort.ids[number] for number in seen)
    assert [len(named) for named in result.survivors] == [5, 4, 2]
    assert result.excess == ((), (), ())


def test_the_upload_is_four_bytes_an_entry_or_two() -> None:
    for ring_bits, width in ((32, 4), (16, 2)):
        cohort = Cohort((0,) * 4)
        agreed = terms((1000,), ring_bits=ring_bits)
        client = cohort.clients()[0]
        server = cohort.server(agreed)
        for device, one in zip(cohort.ids, [client, *cohort.clients()[1:]], strict=True):
            server.receive(device, one.shares(server.outbox()[device]))
        server.advance()
        deal = server.outbox()[cohort.ids[0]]
        upload = client.masked(deal, np.zeros(1000, np.int64), model(1))
        assert len(upload) == 1000 * width + 36


def test_the_vector_that_is_given_is_left_as_it_is_and_any_integer_type_is_taken() -> None:
    results = []
    for dtype in (np.int8, np.int32, np.int64, np.uint32):
        cohort = Cohort((0,) * 4)
        vectors = {d: np.arange(30).astype(dtype) for d in cohort.ids}
        clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
        results.append(drive(cohort.server(terms((30,))), clients, vectors).total)
        assert all((v == np.arange(30)).all() for v in vectors.values())
    assert all((total == 4 * np.arange(30)).all() for total in results)


def test_the_same_roots_give_the_same_bytes() -> None:
    def uploads() -> list[bytes]:
        cohort = Cohort((0, 1, 2, 0))
        server, clients = cohort.server(), cohort.clients()
        rng = np.random.default_rng(0)
        sent = []
        for stage in list(Stage)[:4]:
            for device, client, vector in zip(
                cohort.ids, clients, cohort.vectors(terms(), rng), strict=True
            ):
                vector[:] = 5
                sent.append(bytes(answer(client, stage, server.outbox()[device], vector)))
                server.receive(device, sent[-1])
            server.advance()
        return sent

    assert uploads() == uploads()


@pytest.mark.parametrize("dtype", [np.float32, np.bool_])
def test_floats_are_not_summed(dtype: type) -> None:
    cohort = Cohort((0,) * 4)
    server = cohort.server(terms((30,)))
    clients = cohort.clients()
    for device, client in zip(cohort.ids, clients, strict=True):
        server.receive(device, client.shares(server.outbox()[device]))
    server.advance()
    deal = server.outbox()[cohort.ids[0]]
    with pytest.raises(UsageError, match="encode it first"):
        clients[0].masked(deal, np.zeros(30, dtype), model(1))
    with pytest.raises(UsageError, match="29 entries"):
        clients[0].masked(deal, np.zeros(29, np.int32), model(1))


# ---------------------------------------------------------------- restarts


def test_no_seed_is_that_of_another_attempt() -> None:
    """Seeds are opened at the end: one that came again would give the next mask away."""
    cohort, seeds = Cohort((0,) * 4), []
    for attempt in range(2):
        server, clients = cohort.server(terms(attempt=attempt)), cohort.clients()
        for stage in list(Stage)[:4]:
            for device, client in zip(cohort.ids, clients, strict=True):
                vector = np.zeros(LENGTHS[-1], np.int32)
                sent = bytes(answer(client, stage, server.outbox()[device], vector))
                server.receive(device, sent)
                if stage is Stage.UNMASK:
                    seeds.append(Opening.parse(sent).seed)
            server.advance()
    assert len(set(seeds)) == 8


def test_shares_of_another_mask_key_end_the_round() -> None:
    class Liar(ClientSession):
        def _dealt(self, round, noise):  # type: ignore[no-untyped-def]
            prekey = copy(round.prekey)
            prekey.masking_bytes = bytes([1]) * 32
            return super()._dealt(replace(round, prekey=prekey), noise)

    cohort = Cohort((0,) * 7)
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    liar = cohort.ids[0]
    clients[liar] = Liar(cohort.books[0], cohort.anchor, cohort.policy)
    vectors = dict.fromkeys(cohort.ids, np.zeros(LENGTHS[-1], np.int32))
    with pytest.raises(ReleaseRefused, match="no secret it committed to"):
        drive(cohort.server(), clients, vectors, {Stage.MASKED: [liar]})


@pytest.mark.parametrize("policy", [SMALL, SPARSE])
def test_a_session_goes_on_in_another_process(policy: Policy) -> None:
    cohort = Cohort((0, 1, 2, 0) * (10 if policy is SPARSE else 2), policy)
    server = cohort.server()
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    rng = np.random.default_rng(5)
    vectors = dict(zip(cohort.ids, cohort.vectors(terms(), rng), strict=True))
    dropped, mute = cohort.ids[0], cohort.ids[1]
    while not server.done:
        for device, message in server.outbox().items():
            if (device == dropped and server.stage > 0) or (device == mute and server.stage > 2):
                continue
            reply = answer(clients[device], server.stage, message, vectors[device])
            server.receive(device, reply)
            clients[device] = cohort.resumed(cohort.ids.index(device))
        server.advance()
    plain = plain_sum([vectors[device] for device in cohort.ids[1:]], terms())
    np.testing.assert_array_equal(server.result.total, plain)


@pytest.mark.parametrize("crash", list(Stage)[:4])
def test_progress_is_kept_before_an_answer_leaves(crash: Stage) -> None:
    """A process that ends while it sends must not answer again, of which all masks are the same."""
    cohort = Cohort((0,) * 4)
    kept: list[bytes] = []
    server = cohort.server(terms((5,)))
    book, anchor = cohort.books[0], cohort.anchor
    session = ClientSession(book, anchor, SMALL, save=kept.append)
    clients = dict(zip(cohort.ids, [session, *cohort.clients()[1:]], strict=True))
    while server.stage < crash:
        for device, message in server.outbox().items():
            reply = answer(clients[device], server.stage, message, np.ones(5, np.int32))
            server.receive(device, reply)
        server.advance()
    message = server.outbox()[cohort.ids[0]]

    def full(state: bytes) -> None:
        kept.append(state)
        raise OSError("disk full")

    if crash > Stage.SHARES:
        session = ClientSession(book, anchor, SMALL, full, kept[-1], cohort.call)
    else:
        session = ClientSession(book, anchor, SMALL, save=full)
    with pytest.raises(OSError, match="full"):  # and no answer
        answer(session, crash, message, np.ones(5, np.int32))
    saved = {"progress": kept[-1], "call": cohort.call}
    for again in (session, ClientSession(book, anchor, SMALL, **saved)):
        with pytest.raises(ReleaseRefused, match=f"message {crash + 1} of a round"):
            answer(again, crash, message, np.zeros(5, np.int32))


def test_a_saved_session_keeps_nothing_of_others_once_it_is_over() -> None:
    cohort = Cohort((0,) * 4)
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    drive(cohort.server(terms((5,))), clients, dict.fromkeys(cohort.ids, np.ones(5, np.int32)))
    assert len(cohort.saved[cohort.ids[0]]) < len(clients) * 240 + 200


def test_a_device_takes_part_in_the_plan_that_it_agreed_to() -> None:
    agreed = terms((5,), minimums=(3,))
    others = (
        {"plan": bytes(32)}, {"minimums": (2,)}, {"run": "b"}, {"ring_bits": 16}, {"lengths": (6,)}
    )  # fmt: skip
    for changes in ({}, {"round": 7, "attempt": 2}, *others):
        works = changes not in others
        cohort = Cohort((0,) * 4, Policy(minimum=2, corrupt_share=0, agreed=agreed))
        call = cohort.server(replace(agreed, **changes)).outbox()[cohort.ids[0]]
        session = cohort.clients()[0]
        if works:
            session.shares(call)
        else:
            with pytest.raises(ReleaseRefused, match="agreed to other ones"):
                session.shares(call)
        assert (cohort.books[0]._unused == set()) == works  # a refusal burns no prekey


def test_policies_that_protect_nobody_are_refused() -> None:
    for bad in ({"minimum": 1}, {"corrupt_share": 0.34}, {"corrupt_share": -0.1}):
        with pytest.raises(UsageError):
            Policy(**bad)  # type: ignore[arg-type]
    assert Policy().minimum == 20


def test_small_cohorts_are_warned_of() -> None:
    for devices, warned in ((20, True), (100, False)):
        cohort = Cohort((0,) * devices, Policy())
        session = cohort.clients()[0]
        with pytest.raises(ReleaseRefused, match="not called"):
            _ = session.warning
        session.shares(cohort.server(terms((5,))).outbox()[cohort.ids[0]])
        assert bool(session.warning) == warned


# ---------------------------------------------------------------- what the server refuses


def test_the_server_counts_an_answer_once_and_of_the_cohort_alone() -> None:
    cohort = Cohort((0,) * 4)
    server = cohort.server(terms((5,)))
    client = cohort.clients()[0]
    shares = client.shares(server.outbox()[cohort.ids[0]])
    server.receive(cohort.ids[0], shares)
    with pytest.raises(ReleaseRefused, match="none is due"):
        server.receive(cohort.ids[0], shares)
    with pytest.raises(ReleaseRefused, match="none is due"):
        server.receive(bytes(32), shares)


def test_who_dropped_out_is_not_heard_again() -> None:
    cohort = Cohort((0,) * 4)
    server = cohort.server(terms((5,)))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    late = clients[cohort.ids[0]].shares(server.outbox()[cohort.ids[0]])
    for device in cohort.ids[1:]:
        server.receive(device, clients[device].shares(server.outbox()[device]))
    server.advance()
    assert set(server.outbox()) == set(cohort.ids[1:])
    for message in (late, bytes(clients[cohort.ids[1]].masked(
        server.outbox()[cohort.ids[1]], np.ones(5, np.int32), model(1)
    ))):  # fmt: skip
        with pytest.raises(ReleaseRefused, match="none is due"):
            server.receive(cohort.ids[0], message)


def test_the_server_takes_shares_for_the_right_number_of_others() -> None:
    cohort = Cohort((0,) * 6)
    server = cohort.server(terms((5,)))
    device = cohort.ids[0]
    right = cohort.clients()[0].shares(server.outbox()[device])
    parsed = Shares.parse(right)
    fewer = replace(
        parsed,
        neighbours=bitmap([1, 2, 3, 4], 6),
        share_commitments=parsed.share_commitments[32:],
        sealed=parsed.sealed[80:],
    )
    itself = replace(parsed, neighbours=bitmap([0, 1, 2, 3, 4], 6))
    for wrong in (fewer, itself):
        with pytest.raises(ReleaseRefused, match="neighbours, where 5 others are due"):
            server.receive(device, wrong.pack())
    for masked_with in (range(6), range(1, 5)):
        with pytest.raises(ReleaseRefused, match="lacks a neighbour or has the sender"):
            server.receive(device, replace(parsed, masked_with=bitmap(masked_with, 6)).pack())
    server.receive(device, right)


def test_the_server_takes_no_wrong_signature_and_no_wrong_seed() -> None:
    cohort = Cohort((0,) * 4)
    server = cohort.server(terms((5,)))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    changes = {Stage.CONFIRM: {"signature": bytes(64)}, Stage.UNMASK: {"seed": bytes(32)}}
    while not server.done:
        for device, message in server.outbox().items():
            stage = server.stage
            reply = answer(clients[device], stage, message, np.ones(5, np.int32))
            if stage in changes:
                kind = Confirmation if stage is Stage.CONFIRM else Opening
                wrong = replace(kind.parse(reply), **changes[stage])  # type: ignore[type-var]
                with pytest.raises(ReleaseRefused, match="wrong signature|not the one"):
                    server.receive(device, wrong.pack())
            server.receive(device, reply)
        server.advance()
    assert (server.result.total == 4).all()


def test_the_server_needs_a_model_and_sound_terms() -> None:
    cohort = Cohort((0,) * 4)
    server = ServerSession(terms((5,)), cohort.prekeys(), cohort.anchor)
    clients = cohort.clients()
    for device, client in zip(cohort.ids, clients, strict=True):
        server.receive(device, client.shares(server.outbox()[device]))
    server.advance()
    with pytest.raises(UsageError, match="publish"):
        server.outbox()
    with pytest.raises(UsageError, match="2 bands of a model that has 1"):
        server.publish(model(2))
    with pytest.raises(UsageError, match="31 bytes"):
        server.publish((bytes(31),))
    server.publish(model(1))
    server.publish(model(1))
    with pytest.raises(UsageError, match="another model"):  # some may have got the first one
        server.publish(model(1, b"other"))
    for bad in (
        terms((5, 5)),
        terms((5, 4)),
        terms((5,), minimums=(1, 1)),
        terms((5,), ring_bits=24),
        terms((), minimums=()),
        terms((0,)),
        terms((5,), minimums=(0,)),
        terms((5,), plan=b"short"),
        terms((5,), run=""),
        terms((5,), round=-2),
    ):
        with pytest.raises(UsageError, match="a round of"):
            ServerSession(bad, cohort.prekeys(), cohort.anchor)


def test_a_quorum_message_is_packed_once_for_all_that_get_the_same() -> None:
    cohort = Cohort((0,) * 4)
    server = cohort.server(terms((5,)))
    clients = cohort.clients()
    for _ in range(3):
        for device, client in zip(cohort.ids, clients, strict=True):
            message = server.outbox()[device]
            server.receive(device, answer(client, server.stage, message, np.ones(5, np.int32)))
        server.advance()
    out = server.outbox()
    assert len({id(message) for message in out.values()}) == 1
    assert len(members(Quorum.parse(out[cohort.ids[0]]).signers, 4)) == 4
    opening = Opening.parse(clients[0].unmask(out[cohort.ids[0]]))
    assert len(opening.shares) == 3 * 32


class Weighed(ServerSession):
    """Counts the interpreter's steps in all that a server does once its roster is there."""

    steps = 0

    def outbox(self) -> dict[bytes, bytes]:
        return self._weighed(super().outbox)

    def receive(self, *answer: Any) -> None:
        self._weighed(super().receive, *answer)

    def advance(self) -> None:
        self._weighed(super().advance)

    def _weighed(self, method: Any, *words: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(self._look)
        try:
            return method(*words)
        finally:
            sys.settrace(before)

    def _look(self, frame: Any, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.steps += event == "opcode"
        return self._look


def test_beyond_a_neighbourhood_the_server_works_in_proportion_to_the_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A set of all devices for each of them is counted by its size, as it is packed in one step."""
    policy = Policy(minimum=2, corrupt_share=0.0, graph=Graph(complete_up_to=5, degree=16))
    agreed, packed = terms((8,)), [0]

    def counting(numbers: Any, devices: int) -> bytes:
        packed[0] += len(numbers)
        return bitmap(numbers, devices)

    monkeypatch.setattr(server_module, "bitmap", counting)

    def work(devices: int) -> tuple[int, int]:
        cohort, packed[0] = Cohort((0,) * devices, policy), 0
        server = cohort.server(agreed, Weighed)
        clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
        vectors = dict.fromkeys(cohort.ids, np.ones(8, np.int32))
        drive(server, clients, vectors, {Stage.MASKED: cohort.ids[: devices // 10]})
        assert isinstance(server, Weighed)
        return server.steps, packed[0]

    (few, some), (twice, more) = work(30), work(60)
    assert 1.9 * few < twice < 2.1 * few
    assert more < 2.1 * some
