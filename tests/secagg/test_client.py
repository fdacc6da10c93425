"""What a device refuses to answer, check by check; a refusal leaves the session as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from secagg_rounds import Cohort, answer, drive, model, plain_sum, terms

from privrec.errors import IntegrityError, ReleaseRefused
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import PrekeyBook, model_root
from privrec.secagg.messages import Deal, Quorum, Stage, Survivors, bitmap, members
from privrec.secagg.roster import Call, EnrolmentKey, ListedDevices
from privrec.secagg.server import ServerSession
from privrec.secagg.sharing import Graph

# Nine devices, so that bitmaps have a second byte; three of them hold both bands.
TIERS = (0, 0, 0, 1, 1, 1, 1, 1, 1)
AGREED = terms((4, 10), minimums=(1, 1))
POLICY = Policy(minimum=3, corrupt_share=0.0)
N, QUORUM = 9, 7
VECTOR = np.arange(10, dtype=np.int32)
KINDS: dict[Stage, Any] = {Stage.MASKED: Deal, Stage.CONFIRM: Survivors, Stage.UNMASK: Quorum}


class Waiting:
    """A round in which the first device waits for the message of a stage."""

    def __init__(self, stage: Stage, policy: Policy = POLICY) -> None:
        self.cohort = Cohort(TIERS, policy)
        self.server: ServerSession = self.cohort.server(AGREED)
        self.clients = dict(zip(self.cohort.ids, self.cohort.clients(), strict=True))
        self.vectors = {
            device: VECTOR[: AGREED.length(tier)]
            for device, tier in zip(self.cohort.ids, TIERS, strict=True)
        }
        while self.server.stage < stage:
            for device, message in self.server.outbox().items():
                self.server.receive(device, self.answer(device, message))
            self.server.advance()
        self.device = self.cohort.ids[0]
        self.client: ClientSession = self.clients[self.device]
        self.message = self.server.outbox()[self.device]

    def answer(self, device: bytes, message: bytes) -> Any:
        stage = self.server.stage
        return answer(self.clients[device], stage, message, self.vectors[device])

    def refuses(self, words: str, **changes: Any) -> None:
        """The device refuses the changed message, then answers the right one, and all ends well."""
        parsed = KINDS[self.server.stage].parse(self.message)
        saved = self.cohort.saved[self.device]
        with pytest.raises(ReleaseRefused, match=words):
            self.answer(self.device, replace(parsed, **changes).pack())
        assert self.cohort.saved[self.device] == saved
        total = drive(self.server, self.clients, self.vectors).total
        np.testing.assert_array_equal(total, plain_sum(list(self.vectors.values()), AGREED))


def without(*numbers: int) -> bytes:
    return bitmap([n for n in range(N) if n not in numbers], N)


# ---------------------------------------------------------------- the call


@pytest.mark.parametrize(
    ("policy", "works"),
    [(Policy(3, 0.3), True), (Policy(4, 0.3), False), (Policy(10, 0.0), False)],
)
def test_a_call_is_held_to_the_minimum_in_every_band(policy: Policy, works: bool) -> None:
    cohort = Cohort(TIERS, policy)
    call = cohort.server(AGREED).outbox()[cohort.ids[0]]
    if works:
        cohort.clients()[0].shares(call)
    else:
        with pytest.raises(ReleaseRefused, match="band"):
            cohort.clients()[0].shares(call)


def test_a_call_is_held_to_the_share_of_colluders_that_the_device_assumes() -> None:
    graph = Graph(complete_up_to=3, degree=5)
    for share, works in ((0.0, True), (0.3, False)):
        cohort = Cohort((0,) * 40, Policy(3, share, graph=Graph(complete_up_to=3, degree=30)))
        call = cohort.server(terms((5,))).outbox()[cohort.ids[0]]
        if works:
            cohort.clients()[0].shares(call)
        else:
            with pytest.raises(ReleaseRefused, match="12 colluders among 40|drawn badly"):
                cohort.clients()[0].shares(call)
    cohort = Cohort((0,) * 40, Policy(3, 0.0, graph=graph))
    with pytest.raises(ReleaseRefused, match="drawn badly"):
        cohort.clients()[0].shares(cohort.server(terms((5,))).outbox()[cohort.ids[0]])


def test_a_call_without_the_device_is_refused() -> None:
    cohort, others = Cohort((0,) * 4), Cohort((0,) * 4, name="others")
    call = others.server(terms((5,))).outbox()[others.ids[0]]
    session = ClientSession(cohort.books[0], others.anchor, cohort.policy)
    with pytest.raises(ReleaseRefused, match="without device"):
        session.shares(call)


# ---------------------------------------------------------------- the deal


@pytest.mark.parametrize(
    ("present", "words"),
    [
        (without(0), "leaves this device out"),
        (without(6, 7, 8), "6 of 9 devices sent shares"),
        (without(1), "band 2 of 2: 2 devices"),
    ],
)
def test_a_deal_with_too_few_present_is_refused(present: bytes, words: str) -> None:
    waiting = Waiting(Stage.MASKED)
    deal = Deal.parse(waiting.message)
    kept = [n for n in members(deal.dealers, N) if n in members(present, N)]
    sealed = b"".join(
        piece
        for n, piece in zip(members(deal.dealers, N), pieces(deal.sealed, 80), strict=True)
        if n in kept
    )
    dealers = bitmap(kept, N)
    waiting.refuses(words, present=present, dealers=dealers, drawn_by=dealers, sealed=sealed)


def pieces(joined: bytes, size: int) -> list[bytes]:
    return [joined[i : i + size] for i in range(0, len(joined), size)]


def test_neighbours_alone_are_no_quorum() -> None:
    """Beyond the complete graph, a device counts the whole cohort and not its neighbours alone."""
    graph = Graph(complete_up_to=5, degree=25)
    cohort = Cohort((0,) * 40, Policy(3, 0.0, graph=graph))
    server = cohort.server(terms((5,)))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    for device, message in server.outbox().items():
        server.receive(device, clients[device].shares(message))
    server.advance()
    session = clients[cohort.ids[0]]
    near = {0, *session._called().neighbours}
    message = Deal.parse(server.outbox()[cohort.ids[0]])
    kept = [n for n in members(message.dealers, 40) if n in near]
    all_pieces = dict(zip(members(message.dealers, 40), pieces(message.sealed, 80), strict=True))
    lie = replace(
        message,
        present=bitmap(sorted(near), 40),
        dealers=bitmap(kept, 40),
        drawn_by=bitmap(kept, 40),
        sealed=b"".join(all_pieces[n] for n in kept),
    )
    with pytest.raises(ReleaseRefused, match="26 of 40 devices sent shares, 26 of this"):
        session.masked(lie.pack(), VECTOR[:5], model(1))


def test_a_deal_with_dealers_that_cannot_be_is_refused() -> None:
    waiting = Waiting(Stage.MASKED)
    sealed = Deal.parse(waiting.message).sealed
    own = bitmap(range(N - 1), N)  # names the device itself
    waiting.refuses("leaves this device out", dealers=own, drawn_by=own, sealed=sealed)
    waiting = Waiting(Stage.MASKED)
    waiting.refuses("names others that are not present", drawn_by=without(0, 8))
    waiting = Waiting(Stage.MASKED)
    waiting.refuses("not present", present=without(8))
    waiting = Waiting(Stage.MASKED)
    waiting.refuses("8 pieces, 640 bytes", sealed=sealed[:-80])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (model(1), "digests of 1 bands told"),
        (model(3), "digests of 3 bands told"),
        ((model(2)[0], bytes(32)), "not the one that all devices are told of"),
        ((bytes(32), model(2)[1]), "not the one that all devices are told of"),
    ],
)
def test_a_deal_about_another_model_is_refused(told: tuple[bytes, ...], words: str) -> None:
    Waiting(Stage.MASKED).refuses(words, model=told)


def test_a_weak_device_compares_the_bands_that_it_holds() -> None:
    waiting = Waiting(Stage.MASKED)
    weak = waiting.cohort.ids[-1]
    message = waiting.server.outbox()[weak]
    vector = waiting.vectors[weak]
    session = waiting.clients[weak]
    for seen in (model(2), ()):
        with pytest.raises(ReleaseRefused, match=f"{len(seen)} seen, of 1 held"):
            session.masked(message, vector, seen)
    # It cannot know the other band, and takes part whatever is told of it; the roots then differ.
    other = replace(Deal.parse(message), model=(model(2)[0], bytes(32)))
    session.masked(other.pack(), vector, model(1))


# ---------------------------------------------------------------- sessions that were set back


class Kept:
    """What the first device of a round wrote to disk, in the order of the round's messages."""

    def __init__(self) -> None:
        self.books: list[bytes] = []
        self.sessions: list[bytes] = []
        self.cohort = Cohort(TIERS, POLICY)
        own = self.cohort.books[0]
        book = self.cohort.books[0] = self.book(None)
        session = ClientSession(book, self.cohort.anchor, POLICY, self.sessions.append)
        others = self.cohort.clients()[1:]
        self.clients = dict(zip(self.cohort.ids, [session, *others], strict=True))
        self.server = self.cohort.server(AGREED)
        assert own.key.public == self.cohort.ids[0]

    def book(self, state: bytes | None) -> PrekeyBook:
        own = self.cohort.books[0]
        return PrekeyBook(own.key, own.root, save=self.books.append, state=state)

    def rounds(self) -> Any:
        """The messages to the first device, each before it is answered."""
        for stage in list(Stage)[:4]:
            outbox = self.server.outbox()
            yield stage, outbox[self.cohort.ids[0]]
            for number, (device, message) in enumerate(outbox.items()):
                vector = VECTOR[: AGREED.length(TIERS[number])]
                reply = answer(self.clients[device], stage, message, vector)
                self.server.receive(device, reply)
            self.server.advance()


def resumed(
    book: PrekeyBook, cohort: Cohort, saved: bytes, anchor: Any = None, policy: Policy = POLICY
) -> ClientSession:
    anchor = anchor or cohort.anchor
    return ClientSession(book, anchor, policy, progress=saved, call=cohort.call)


def test_a_session_or_a_book_that_was_set_back_alone_answers_nothing() -> None:
    """Two vectors under one set of masks give their difference away."""
    kept = Kept()
    messages = dict(kept.rounds())
    assert len(kept.sessions) == 4
    for old, saved in enumerate(kept.sessions):
        for at, state in enumerate(kept.books):
            # The book is saved when it issues and enters, then once for each progress.
            if at == old + 2:
                session = resumed(kept.book(state), kept.cohort, saved)
                assert session._recalled().pack() == saved
                continue
            with pytest.raises(IntegrityError, match="set back"):
                resumed(kept.book(state), kept.cohort, saved)
    late = ClientSession(kept.book(kept.books[-1]), kept.cohort.anchor, POLICY)
    with pytest.raises(ReleaseRefused, match="used before"):
        late.shares(messages[Stage.SHARES])


@pytest.mark.parametrize("stage", [Stage.MASKED, Stage.CONFIRM, Stage.UNMASK])
def test_of_two_copies_of_a_session_one_answers(stage: Stage) -> None:
    waiting = Waiting(stage)
    twin = waiting.cohort.resumed(0)
    assert waiting.answer(waiting.device, waiting.message)
    with pytest.raises(IntegrityError, match="worked on twice"):
        answer(twin, stage, waiting.message, VECTOR[::-1].copy(), model(2))


def test_a_session_goes_on_with_the_call_that_began_it_alone() -> None:
    """Another roster of the same devices would have it masked with other keys."""
    waiting = Waiting(Stage.MASKED)
    book, saved = waiting.cohort.books[0], waiting.cohort.saved[waiting.device]
    own = waiting.cohort.call
    waiting.cohort.server(AGREED)  # of fresh prekeys
    assert waiting.cohort.call != own
    for call in (waiting.cohort.call, b""):
        with pytest.raises(ReleaseRefused):
            ClientSession(book, waiting.cohort.anchor, POLICY, progress=saved, call=call)
    assert ClientSession(book, waiting.cohort.anchor, POLICY, progress=saved, call=own)


def test_a_later_attempt_ends_the_session_of_an_earlier_one() -> None:
    waiting = Waiting(Stage.MASKED)
    again = waiting.cohort.server(replace(AGREED, attempt=1))
    waiting.cohort.clients()[0].shares(again.outbox()[waiting.device])
    with pytest.raises(IntegrityError, match="set back"):
        waiting.answer(waiting.device, waiting.message)


@pytest.mark.parametrize("stage", [Stage.MASKED, Stage.CONFIRM, Stage.UNMASK])
def test_a_resumed_session_is_held_to_the_policy_and_the_anchor_of_now(stage: Stage) -> None:
    """An owner who asks for more between two messages gives no answer under the old terms."""
    waiting = Waiting(stage)
    book, anchor = waiting.cohort.books[0], waiting.cohort.anchor
    saved = waiting.cohort.saved[waiting.device]
    strict: list[tuple[Any, Policy, str]] = [
        (anchor, Policy(4, 0.0), "band 2 of 2: 3 devices"),
        (anchor, Policy(3, 0.0, replace(AGREED, plan=bytes(32))), "agreed to other ones"),
        (ListedDevices(waiting.cohort.ids[:-1]), POLICY, "no enrolled device"),
    ]
    for believed, policy, words in strict:
        with pytest.raises(ReleaseRefused, match=words):
            resumed(book, waiting.cohort, saved, believed, policy)
    resumed(book, waiting.cohort, saved)


def test_what_one_device_checked_is_not_taken_for_what_another_is_shown() -> None:
    """Devices of one process share an anchor, which remembers checks by all that they looked at."""
    waiting = Waiting(Stage.UNMASK)
    other = waiting.cohort.ids[1]
    waiting.answer(waiting.device, waiting.message)
    quorum = Quorum.parse(waiting.server.outbox()[other])
    forged = replace(quorum, signatures=bytes(len(quorum.signatures)))
    with pytest.raises(ReleaseRefused, match="did not confirm"):
        waiting.answer(other, forged.pack())
    assert waiting.answer(other, quorum.pack())
    cohort = Cohort(TIERS, POLICY)
    message = cohort.server(AGREED).outbox()[cohort.ids[0]]
    first, second, *_ = cohort.clients()
    first.shares(message)
    call = Call.parse(message)
    unsigned = replace(call, records=call.records[:-1] + bytes([call.records[-1] ^ 1]))
    with pytest.raises(ReleaseRefused, match="no enrolled device signed"):
        second.shares(unsigned.pack())
    assert second.shares(message)


def test_a_roster_is_checked_once_by_each_anchor() -> None:
    """Where each message has a process, signatures of all would be verified four times."""
    waiting = Waiting(Stage.UNMASK)
    book, saved = waiting.cohort.books[0], waiting.cohort.saved[waiting.device]
    same = ListedDevices(reversed(waiting.cohort.ids))
    resumed(book, waiting.cohort, saved, same)
    assert not same.verifier._good
    other = ListedDevices([*waiting.cohort.ids, bytes(32)])
    resumed(book, waiting.cohort, saved, other)
    assert len(other.verifier._good) == len(waiting.cohort.ids)


def test_anchors_that_know_others_have_other_digests() -> None:
    ids = [bytes([number]) * 32 for number in range(3)]
    anchors = [ListedDevices(ids), ListedDevices(ids[:2]), ListedDevices([])]
    anchors += [EnrolmentKey(ids[0]), EnrolmentKey(ids[1])]
    assert len({anchor.digest for anchor in anchors}) == len(anchors)


# ---------------------------------------------------------------- the survivors


@pytest.mark.parametrize(
    ("survivors", "words"),
    [
        (without(0), "lack this device"),
        (without(6, 7, 8), "6 of 9 devices survived"),
        (without(1), "band 2 of 2: 2 devices"),
    ],
)
def test_too_few_survivors_are_refused(survivors: bytes, words: str) -> None:
    Waiting(Stage.CONFIRM).refuses(words, survivors=survivors)


def test_survivors_that_were_never_present_are_refused() -> None:
    waiting = Waiting(Stage.CONFIRM)
    waiting.client._advance(present=without(8))
    with pytest.raises(ReleaseRefused, match="never present"):
        waiting.client.confirm(waiting.message)


def test_survivors_of_another_model_are_refused() -> None:
    Waiting(Stage.CONFIRM).refuses("another model", root=model_root(model(2, b"other")))


@pytest.mark.parametrize(("altered", "works"), [(0, True), (8, True), (9, False), (25, False)])
def test_in_a_sparse_graph_a_neighbour_counts_when_its_tag_came(altered: int, works: bool) -> None:
    """Eighteen of a neighbourhood of 26 must; whoever sends no tag may hide this device."""
    cohort = Cohort((0,) * 40, Policy(3, 0.0, graph=Graph(complete_up_to=5, degree=25)))
    server, vector = cohort.server(terms((5,))), VECTOR[:5]
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    while server.stage < Stage.CONFIRM:
        for device, message in server.outbox().items():
            server.receive(device, answer(clients[device], server.stage, message, vector))
        server.advance()
    device = cohort.ids[0]
    session, told = clients[device], Survivors.parse(server.outbox()[device])
    lie = bytes(16 * altered) + told.pair_tags[16 * altered :]
    with pytest.raises(ReleaseRefused, match="25 pieces, 400 bytes, are due"):
        session.confirm(replace(told, pair_tags=lie[:-16]).pack())
    if works:
        session.confirm(replace(told, pair_tags=lie).pack())
        assert len(session._members("heard")) == 25 - altered
    else:
        with pytest.raises(ReleaseRefused, match=f"{26 - altered} of this device's own"):
            session.confirm(replace(told, pair_tags=lie).pack())


def test_signatures_of_neighbours_that_sent_no_tag_do_not_make_a_neighbourhood() -> None:
    cohort = Cohort((0,) * 40, Policy(3, 0.0, graph=Graph(complete_up_to=5, degree=25)))
    server, vector = cohort.server(terms((5,))), VECTOR[:5]
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    session = clients[cohort.ids[0]]
    while server.stage < Stage.UNMASK:
        for device, message in server.outbox().items():
            if server.stage is Stage.CONFIRM and device == cohort.ids[0]:
                told = Survivors.parse(message)
                lie = bytes(16 * 8) + told.pair_tags[16 * 8 :]  # 18 of 26 are left, as few as may
                message = replace(told, pair_tags=lie).pack()
            server.receive(device, answer(clients[device], server.stage, message, vector))
        server.advance()
    quorum = Quorum.parse(server.outbox()[cohort.ids[0]])
    last = session._called().neighbours[-1]
    kept = [number for number in range(40) if number != last]
    signatures = pieces(quorum.signatures, 64)
    joined = b"".join(signatures[number] for number in kept)
    lie = replace(quorum, signers=bitmap(kept, 40), signatures=joined).pack()
    with pytest.raises(ReleaseRefused, match="39 of 40 devices confirmed the survivors, 17 of"):
        session.unmask(lie)
    session.unmask(quorum.pack())


class Unchecked(Graph):
    """Neighbourhoods too small for the real bound."""

    def check(self, holders: Sequence[int], corrupt_share: float) -> None:
        """Never too unsafe."""


def without_those(session: ClientSession, message: bytes, gone: set[int]) -> bytes:
    """A deal from which devices are left out."""
    deal, size = Deal.parse(message), session._called().devices
    dealers = members(deal.dealers, size)
    held = dict(zip(dealers, pieces(deal.sealed, 80), strict=True))
    left = {
        name: bitmap([n for n in members(getattr(deal, name), size) if n not in gone], size)
        for name in ("present", "dealers", "drawn_by")
    }
    return replace(
        deal, **left, sealed=b"".join(piece for n, piece in held.items() if n not in gone)
    ).pack()


@pytest.mark.parametrize(
    ("strong", "missing", "works"), [(20, 4, True), (20, 5, False), (12, 6, True)]
)
def test_a_neighbourhood_is_drawn_and_counted_in_every_band(
    strong: int, missing: int, works: bool
) -> None:
    """Of twenty that hold the second band twelve are drawn, and nine needed; twelve are few."""
    policy = Policy(3, 0.0, graph=Unchecked(5, 12))
    cohort = Cohort((0,) * strong + (1,) * (40 - strong), policy)
    server = cohort.server(terms((4, 10)))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    for device, message in server.outbox().items():
        server.receive(device, clients[device].shares(message))
    server.advance()
    assert len(clients[cohort.ids[-1]]._called().drawn) == 1
    for device in cohort.ids[:strong]:
        first, second = clients[device]._called().drawn
        assert set(second) <= set(range(strong))
        assert (len(first), len(second)) == (12, min(12, strong - 1))
        if len(chosen := sorted(set(second) - set(first))) >= missing:
            break
    session, gone = clients[device], set(chosen[:missing])
    lie = without_those(session, server.outbox()[device], gone)
    if works:
        session.masked(lie, VECTOR, model(2))
    else:
        with pytest.raises(ReleaseRefused, match="8 of this device's own neighbourhood in band 2"):
            session.masked(lie, VECTOR, model(2))


@pytest.mark.parametrize("drops", [{}, {Stage.MASKED: [0, 30]}, {Stage.UNMASK: [1, 31]}])
def test_sums_of_sparse_rounds_with_bands_are_exact(drops: dict[Stage, list[int]]) -> None:
    policy = Policy(3, 0.0, graph=Unchecked(5, 25))
    cohort = Cohort((0,) * 4 + (1,) * 28 + (2,) * 8, policy)
    agreed = terms(minimums=(1, 1, 1))
    vectors = dict(zip(cohort.ids, cohort.vectors(agreed, np.random.default_rng(2)), strict=True))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    named = {stage: [cohort.ids[n] for n in numbers] for stage, numbers in drops.items()}
    result = drive(cohort.server(agreed), clients, vectors, named)
    summed = [vectors[device] for device in result.survivors[0]]
    assert len(summed) == 40 - len(drops.get(Stage.MASKED, []))
    np.testing.assert_array_equal(result.total, plain_sum(summed, agreed))


def test_in_a_complete_graph_there_are_no_tags() -> None:
    Waiting(Stage.CONFIRM).refuses("0 pieces", pair_tags=bytes(16 * 8))


# ---------------------------------------------------------------- the quorum


def quorum_of(waiting: Waiting, numbers: list[int]) -> dict[str, bytes]:
    signatures = pieces(Quorum.parse(waiting.message).signatures, 64)
    joined = b"".join(signatures[n] for n in numbers)
    return {"signers": bitmap(numbers, N), "signatures": joined}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (list(range(6)), "6 of 9 devices confirmed"),
        ([0, 1, 3, 4, 5, 6, 7, 8], "band 2 of 2: 2 devices"),
    ],
)
def test_too_few_signatures_are_refused(numbers: list[int], words: str) -> None:
    waiting = Waiting(Stage.UNMASK)
    waiting.refuses(words, **quorum_of(waiting, numbers))


def test_exactly_enough_signatures_are_taken() -> None:
    waiting = Waiting(Stage.UNMASK)
    changed = replace(Quorum.parse(waiting.message), **quorum_of(waiting, list(range(QUORUM))))
    waiting.client.unmask(changed.pack())


def test_signatures_of_others_than_survivors_do_not_count() -> None:
    waiting = Waiting(Stage.UNMASK)
    waiting.client._advance(survivors=without(8))
    with pytest.raises(ReleaseRefused, match="did not survive"):
        waiting.client.unmask(waiting.message)


@pytest.mark.parametrize("place", [0, 3, 8])
def test_every_signature_must_be_right(place: int) -> None:
    waiting = Waiting(Stage.UNMASK)
    signatures = pieces(Quorum.parse(waiting.message).signatures, 64)
    signatures[place] = signatures[place - 1]
    waiting.refuses("did not confirm", signatures=b"".join(signatures))


def test_after_the_end_nothing_of_others_is_kept() -> None:
    waiting = Waiting(Stage.UNMASK)
    held = waiting.client._recalled().held
    assert len(held) == 8 * 64
    waiting.client.unmask(waiting.message)
    assert waiting.client._recalled().held == b""
    assert held[:32] not in waiting.cohort.saved[waiting.device]
