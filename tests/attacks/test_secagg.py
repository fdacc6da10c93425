"""Attacks by a server, and by devices that collude with it: each works against a session from which
one defence was taken, and fails against ours.

Every test has two halves. In the first the named check is switched off and the attack must succeed:
it shows that the attack is a real one, and that it is this check which stops it. In the second the
same attack runs against the session as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_rounds import SMALL, Cohort, answer, drive, model, plain_sum, terms

from privrec.errors import ReleaseRefused
from privrec.randomness import SecretRoot
from privrec.secagg import client as client_module
from privrec.secagg import roster as roster_module
from privrec.secagg import sharing
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import Binding, Mask, PrekeyBook, agree, apply_masks, model_root
from privrec.secagg.messages import (
    MASKED_START,
    MASKING,
    SEED,
    Confirmation,
    Deal,
    Opening,
    Quorum,
    Shares,
    Stage,
    Survivors,
    bitmap,
    masked_entries,
    members,
    sealed_bytes,
    split,
)
from privrec.secagg.roster import Call, ListedDevices
from privrec.secagg.server import Recovery, SecureSum, ServerSession
from privrec.secagg.sharing import Graph

LENGTH = 20
ROOT = model_root(model(1))
Patch = pytest.MonkeyPatch


def nothing(*arguments: object) -> None:
    """A check that was taken out."""


class Attacker(ServerSession):
    """A server that looks at everything it gets, and says what it likes."""

    uploads: dict[int, bytes]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.uploads = {}

    def _take_masked(self, number: int, message: Any) -> None:
        super()._take_masked(number, message)
        self.uploads[number] = bytes(message)

    def entries(self, number: int) -> np.ndarray:
        """A masked vector, to be unmasked by hand."""
        length = self._roster.length(number)
        dealers = len(self._drawn_by[number]) if self._is_sparse else 0
        upload, context = self.uploads[number], self._binding.context
        return masked_entries(upload, context, length, 32, dealers)[0].copy()

    def stripped(
        self, number: int, seed: bytes, keys: dict[int, bytes], root: bytes = ROOT
    ) -> np.ndarray:
        """What is left of a masked vector without its own mask and those of known mask keys."""
        entries = self.entries(number)
        length = len(entries)
        masks = [Mask(self._binding.self_key(seed, root), length, negative=True)]
        for peer, secret in keys.items():
            private = X25519PrivateKey.from_private_bytes(secret)
            agreed = agree(private, self._roster.prekeys[number].masking)
            key = self._binding.pair_key(agreed, root, number, peer)
            common = min(length, self._roster.length(peer))
            masks.append(Mask(key, common, negative=number < peer))
        apply_masks(entries, masks)
        return entries.view(np.int32)

    def recovery(self, openings: dict[int, Opening], survivors: Sequence[int]) -> Recovery:
        """What shares give away, whatever they were handed out for."""
        for number, opening in openings.items():
            dealers = members(opening.dealers, len(self._roster))
            shares = zip(dealers, split(opening.shares, [32] * len(dealers)), strict=True)
            self._deposits[number].opened = {
                (dealer, kind): share for dealer, share in shares for kind in (SEED, MASKING)
            }
        threshold = self._graph.threshold(len(self._roster))
        return Recovery(self._roster, self._binding, ROOT, threshold, self._deposits, survivors, {})


def vectors_of(cohort: Cohort, length: int = LENGTH) -> dict[bytes, np.ndarray]:
    rng = np.random.default_rng(7)
    return {d: rng.integers(-(2**31), 2**31, length).astype(np.int32) for d in cohort.ids}


def up_to(
    stage: Stage, cohort: Cohort, clients: dict[bytes, ClientSession], server: ServerSession
) -> None:
    """An honest beginning: every device answers up to a stage."""
    vectors = vectors_of(cohort)
    while server.stage < stage:
        for device, message in server.outbox().items():
            server.receive(device, answer(clients[device], server.stage, message, vectors[device]))
        server.advance()


def begun(
    cohort: Cohort, stage: Stage, **changes: Any
) -> tuple[Attacker, dict[bytes, ClientSession]]:
    server = cohort.server(terms((LENGTH,), **changes), Attacker)
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    up_to(stage, cohort, clients, server)  # type: ignore[arg-type]
    assert isinstance(server, Attacker)
    return server, clients


def sealed_for(server: Attacker, holders: Iterable[int], cohort: Cohort, victim: int) -> Any:
    """Both kinds of the victim's shares that colluding holders can open: their own."""
    deposit, found = server._deposits[victim], {}
    for holder in holders:
        if holder not in deposit.sealed:
            continue
        secret = cohort.books[holder].secret(server._roster.prekeys[holder].serial)
        agreed = agree(secret.sealing, server._roster.prekeys[victim].sealing)
        key = server._binding.sealing_key(agreed, victim, holder)
        found[holder] = client_module.AESGCM(key).decrypt(bytes(12), deposit.sealed[holder], None)
    return found


def opened_by_colluders(
    server: Attacker, holders: Iterable[int], cohort: Cohort, victim: int, threshold: int
) -> bool:
    """Whether colluders hold enough shares of a victim to take off all of its masks."""
    found = sealed_for(server, holders, cohort, victim)
    if len(found) < threshold:
        return False
    quorum = list(found)[:threshold]
    seed = sharing.combine_shares([found[h][:32] for h in quorum], [h + 1 for h in quorum])
    key = sharing.combine_shares([found[h][32:] for h in quorum], [h + 1 for h in quorum])
    roster, number = server._roster, victim
    private = X25519PrivateKey.from_private_bytes(key)
    if private.public_key().public_bytes_raw() != roster.prekeys[victim].masking:
        return False
    # With the victim's own mask key, all of its masks with others are known.
    entries = server.entries(number)
    masks = [Mask(server._binding.self_key(seed, ROOT), LENGTH, negative=True)]
    deposits = server._deposits
    for peer in deposits:
        if peer == victim or not (
            peer in deposits[victim].sealed or victim in deposits[peer].sealed
        ):
            continue
        agreed = agree(private, roster.prekeys[peer].masking)
        key = server._binding.pair_key(agreed, ROOT, victim, peer)
        masks.append(Mask(key, LENGTH, negative=victim < peer))
    apply_masks(entries, masks)
    return bool((entries.view(np.int32) == vectors_of(cohort)[cohort.ids[victim]]).all())


# ---------------------------------------------------------------- keys and rosters


def sum_with_sybils(victim: Cohort, sybils: Cohort) -> SecureSum:
    """A round of one real device, and a crowd that the server made up."""
    records = victim.prekeys() + sybils.prekeys()
    books = {book.key.public: book for book in victim.books + sybils.books}
    trusted = dict.fromkeys(books, ListedDevices(books)) | {victim.ids[0]: victim.anchor}
    sessions = {d: ClientSession(book, trusted[d], Policy()) for d, book in books.items()}
    server = ServerSession(terms((LENGTH,)), records, ListedDevices(books))
    server.publish(model(1))
    made_up = {device: np.zeros(LENGTH, np.int32) for device in sybils.ids}
    return drive(server, sessions, made_up | vectors_of(victim))


def test_key_substitution(monkeypatch: Patch) -> None:
    """The server puts keys of its own in everybody else's place."""

    def crowds() -> tuple[Cohort, Cohort]:
        return Cohort((0,), name="victim"), Cohort((0,) * 24, name="sybil")

    victim, sybils = crowds()
    result = sum_with_sybils(victim, sybils)
    assert set(result.survivors[0]) == set(sybils.ids)  # the victim stayed away
    assert not result.total.any()
    monkeypatch.setattr(roster_module, "check_prekey", nothing)
    victim, sybils = crowds()
    total = sum_with_sybils(victim, sybils).total
    np.testing.assert_array_equal(total, vectors_of(victim)[victim.ids[0]])


def test_a_roster_below_the_minimum_of_the_device() -> None:
    """The server calls one honest device, with accomplices that tell it their vectors."""
    for minimum, works in ((2, True), (20, False)):
        cohort = Cohort((0,) * 4, Policy(minimum=minimum))
        vectors = vectors_of(cohort)
        victim, *accomplices = cohort.ids
        policies = dict.fromkeys(accomplices, SMALL) | {victim: cohort.policy}
        clients = {
            device: ClientSession(book, cohort.anchor, policies[device])
            for device, book in zip(cohort.ids, cohort.books, strict=True)
        }
        server = cohort.server(terms((LENGTH,)))
        total = drive(server, clients, vectors).total
        rest = plain_sum([vectors[device] for device in accomplices], terms((LENGTH,)))
        assert (total - rest == vectors[victim]).all() == works


def test_a_band_that_only_the_victim_holds() -> None:
    """Enough devices in all, but one of them alone has the last band."""
    for minimum, works in ((1, True), (3, False)):
        tiers = (0, *(1,) * 9)
        policy = Policy(minimum=2, corrupt_share=0)
        cohort = Cohort(tiers, policy)
        agreed = terms((4, LENGTH))
        vectors = dict(
            zip(cohort.ids, cohort.vectors(agreed, np.random.default_rng(1)), strict=True)
        )
        object.__setattr__(policy, "minimum", minimum)
        clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
        if works:
            total = drive(cohort.server(agreed), clients, vectors).total
            np.testing.assert_array_equal(total[4:], vectors[cohort.ids[0]][4:])
        else:
            with pytest.raises(ReleaseRefused, match="0 of 10 devices sent shares"):
                drive(cohort.server(agreed), clients, vectors)


def lowered_terms(cohort: Cohort, agreed: Any) -> int:
    """The server halves the fewest survivors of a band; how many shares of noise are left then."""
    server = Attacker(
        replace(agreed, minimums=(4,)), cohort.prekeys(), cohort.anchor, cohort.policy.graph
    )
    server.publish(model(1))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    vectors, kept = vectors_of(cohort), 0
    while not server.done:
        for device, message in server.outbox().items():
            if server.stage is Stage.SHARES:
                reply = clients[device].shares(message, [device[:31] + b"\0"])
            else:
                reply = answer(clients[device], server.stage, message, vectors[device])
            if server.stage is Stage.UNMASK:
                kept += not Opening.parse(reply).noise
            server.receive(device, reply)
        server.advance()
    return kept


def test_fewest_survivors_lowered_by_the_server() -> None:
    """Noise is made for eight shares; under other terms four of them are taken off again."""
    agreed = terms((LENGTH,), minimums=(8,), excess=True)
    with pytest.raises(ReleaseRefused, match="agreed to other ones"):
        lowered_terms(Cohort((0,) * 10, replace(SMALL, agreed=agreed)), agreed)
    assert lowered_terms(Cohort((0,) * 10, SMALL), agreed) == 4


def first_round(
    cohort: Cohort, agreed: Any, absent: Sequence[int]
) -> tuple[list[bytes], dict[int, bytes]]:
    """An honest round in which some devices drop out: their prekeys, and what the server learns."""
    records, learned = cohort.prekeys(), {}
    server = Attacker(agreed, records, cohort.anchor, cohort.policy.graph)
    server.publish(model(len(agreed.lengths)))
    vectors = cohort.vectors(agreed, np.random.default_rng(0))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    secret = Recovery._secret

    def overheard(self: Recovery, kind: str, dealer: int) -> bytes:
        learned[dealer] = secret(self, kind, dealer)
        return learned[dealer]

    with Patch.context() as patch:
        patch.setattr(Recovery, "_secret", overheard)
        patch.setattr(roster_module.Roster, "check_bands", nothing)  # one strong device is left
        gone = {Stage.MASKED: [cohort.ids[number] for number in absent]}
        drive(server, clients, dict(zip(cohort.ids, vectors, strict=True)), gone)
    assert sorted(learned) == list(absent)
    return records, learned


Padded = tuple[Attacker, dict[int, Opening], dict[int, bytes], dict[bytes, np.ndarray]]


def padded_round(
    monkeypatch: Patch, cohort: Cohort, absent: Sequence[int], agreed: Any, noise: int = 0
) -> Padded:
    """The server names devices that are not there, by prekeys whose secret it learned.

    In a first round some devices drop out, and their mask keys are recovered, as they should be. In
    a second one the server names the same prekeys again, sends rubbish in the devices' name, and
    tells everybody that they survived.

    Returns:
        The server, the openings of those that were there, the mask keys of those that were not, and
        the vectors.
    """
    lengths = agreed.lengths
    records, stolen = first_round(cohort, terms(lengths), absent)
    vectors = dict(zip(cohort.ids, cohort.vectors(agreed, np.random.default_rng(1)), strict=True))
    fresh = [book.issue(1, tier)[0] for book, tier in zip(cohort.books, cohort.tiers, strict=True)]
    again = [records[n] if n in absent else fresh[n] for n in range(10)]
    server = Attacker(replace(agreed, round=1), again, cohort.anchor, cohort.policy.graph)
    server.publish(model(len(lengths)))
    there = {
        device: session
        for number, (device, session) in enumerate(zip(cohort.ids, cohort.clients(), strict=True))
        if number not in absent
    }
    for device, session in there.items():
        seeds = [device[:31] + b"\0"] * noise
        server.receive(device, session.shares(server.outbox()[device], seeds))
    for number in absent:
        holders = [n for n in range(10) if n != number]
        rubbish = Shares(
            server._binding.context, bitmap(holders, 10), bitmap(holders, 10),
            (bytes(32),) * (1 + noise), bytes(16 * (2 + noise) * 9),
            bytes(sealed_bytes(2 + noise) * 9),
        )  # fmt: skip
        server.receive(cohort.ids[number], rubbish.pack())
    server.advance()
    for device, message in server.outbox().items():
        if device in there:
            server.receive(device, answer(there[device], server.stage, message, vectors[device]))
    for number in absent:
        server._answered.add(number)  # the lie: they survived
    server.advance()
    for device, message in server.outbox().items():
        if device in there:
            server.receive(device, there[device].confirm(message))
    monkeypatch.setattr(server._roster, "check_bands", nothing)  # the server does not mind
    server.advance()
    openings = {
        server._numbers[device]: Opening.parse(there[device].unmask(message))
        for device, message in server.outbox().items()
    }
    return server, openings, stolen, vectors


def padded_sum(padded: Padded) -> np.ndarray:
    """The sum of those that were there."""
    server, openings, stolen, _ = padded
    total = np.zeros(LENGTH, np.uint32)
    for number, opening in openings.items():
        root = model_root(server._model)
        part = server.stripped(number, opening.seed, stolen, root)
        total[: len(part)] += part.view(np.uint32)
    return total.view(np.int32)


def test_band_sizes_that_lie(monkeypatch: Patch) -> None:
    """Counts are taken over signatures; over the named survivors they can be made up.

    Nobody but the victim is left in the strong band.
    """

    def attack() -> Padded:
        cohort = Cohort((0, 0, 0, *(1,) * 7), Policy(minimum=3, corrupt_share=0))
        return padded_round(monkeypatch, cohort, (1, 2), terms((4, LENGTH)))

    with pytest.raises(ReleaseRefused, match="band 2 of 2: 1 devices"):
        attack()
    original = roster_module.Roster.check_bands

    def over_survivors(self: Any, numbers: Sequence[int], minimum: int) -> None:
        original(self, range(10), minimum)

    monkeypatch.setattr(roster_module.Roster, "check_bands", over_survivors)
    padded = attack()
    victim = min(padded[3])
    # What the weak devices still share with the victim lies in the first band alone.
    np.testing.assert_array_equal(padded_sum(padded)[4:], padded[3][victim][4:])


def test_noise_that_is_kept_of_devices_that_are_not_there(monkeypatch: Patch) -> None:
    """Five shares of noise must stay; three that are not there are named before the others."""

    def kept() -> int:
        cohort, absent = Cohort((0,) * 10, Policy(minimum=3, corrupt_share=0)), (0, 1, 2)
        agreed = terms((LENGTH,), minimums=(5,), excess=True)
        padded = padded_round(monkeypatch, cohort, absent, agreed, noise=1)
        there = [vector for n, vector in enumerate(padded[3].values()) if n not in absent]
        np.testing.assert_array_equal(padded_sum(padded), plain_sum(there, agreed))
        return sum(not opening.noise for opening in padded[1].values())

    assert kept() == 5
    original = roster_module.Roster.due
    monkeypatch.setattr(
        roster_module.Roster, "due", lambda self, named, signers: original(self, named, named)
    )
    assert kept() == 2  # of seven: far less noise than is accounted


def test_a_tier_that_its_device_did_not_sign(monkeypatch: Patch) -> None:
    """The server promotes weak devices, so that a band seems to have more holders."""
    cohort = Cohort((0, 1, 1, 1), Policy(minimum=2, corrupt_share=0))
    call = Call.parse(cohort.server(terms((4, LENGTH))).outbox()[cohort.ids[0]])
    record = bytearray(call.records)
    size = len(record) // 4
    for number in range(4):
        record[number * size + 32 + 64 + 8] = 0  # the tier of a record
    lie = replace(call, records=bytes(record)).pack()
    with pytest.raises(ReleaseRefused, match="no enrolled device signed"):
        cohort.clients()[0].shares(lie)
    monkeypatch.setattr(roster_module.Verifier, "check", lambda *arguments: True)
    cohort.clients()[0].shares(lie)


# ---------------------------------------------------------------- graphs and thresholds


def ground_call(cohort: Cohort, colluders: set[int], victim: int) -> Any:
    """A plan under which a graph made from the roster gives the victim colluders only."""
    for attempt in range(5000):
        drawn = public_draw(victim, 12, attempt)
        if set(drawn) <= colluders:
            return attempt
    raise AssertionError("no such attempt")


def public_draw(own: int, devices: int, attempt: int) -> tuple[int, ...]:
    rng = np.random.default_rng([own, devices, attempt])
    others = [n for n in range(devices) if n != own]
    return tuple(sorted(rng.choice(others, 4, replace=False).tolist()))


def test_a_neighbour_graph_chosen_by_the_server(monkeypatch: Patch) -> None:
    """A graph that follows from public values is tried until the victim has bad neighbours."""
    monkeypatch.setattr(Graph, "check", nothing)  # twelve devices are too few for this to pass
    policy = Policy(minimum=2, corrupt_share=0, graph=Graph(complete_up_to=3, degree=4))
    colluders, victim = {1, 3, 5, 7, 9}, 0
    cohort = Cohort((0,) * 12, policy)
    attempt = ground_call(cohort, colluders, victim)
    server, _ = begun(cohort, Stage.CONFIRM, attempt=attempt)
    assert not opened_by_colluders(server, colluders, cohort, victim, 4)
    with monkeypatch.context() as patch:
        patch.setattr(
            Graph, "draw", lambda self, own, among, stream: public_draw(own, len(among), attempt)
        )
        cohort = Cohort((0,) * 12, policy)
        server, _ = begun(cohort, Stage.CONFIRM, attempt=attempt)
        assert opened_by_colluders(server, colluders, cohort, victim, 4)


def test_a_device_draws_once_a_prekey_so_that_its_draw_cannot_be_ground() -> None:
    cohort = Cohort((0,) * 4)
    server = cohort.server(terms((LENGTH,)))
    call = Call.parse(server.outbox()[cohort.ids[0]])
    session = cohort.clients()[0]
    session.shares(call.pack())
    with pytest.raises(ReleaseRefused, match="used before"):
        cohort.clients()[0].shares(replace(call, attempt=1).pack())


class Lowered(Graph):
    """Thresholds as a server would like them."""

    def quorum(self, devices: int) -> int:
        return 2

    def threshold(self, devices: int) -> int:
        return 2

    def check(self, holders: Sequence[int], corrupt_share: float) -> None:
        """Nothing is too unsafe."""


def test_a_threshold_lowered_by_the_server() -> None:
    """Two colluders of ten would open everybody, if the server could name the threshold."""
    colluders, victim = (8, 9), 0
    ours = Cohort((0,) * 10)
    server, _ = begun(ours, Stage.CONFIRM)
    assert not opened_by_colluders(server, colluders, ours, victim, 2)
    lowered = Cohort((0,) * 10, Policy(minimum=2, corrupt_share=0, graph=Lowered()))
    server, _ = begun(lowered, Stage.CONFIRM)
    assert opened_by_colluders(server, colluders, lowered, victim, 2)


def test_fewer_than_t_shares_say_nothing() -> None:
    """One colluder less than the threshold, and exactly as many."""
    for count, works in ((6, False), (7, True)):
        cohort = Cohort((0,) * 10)
        server, _ = begun(cohort, Stage.CONFIRM)
        assert opened_by_colluders(server, range(1, 1 + count), cohort, 0, count) == works


def test_the_neighbourhood_that_is_declared_gone(monkeypatch: Patch) -> None:
    """The server drops exactly those whose masks cover the victim, and keeps a quorum of others."""
    monkeypatch.setattr(Graph, "check", nothing)
    graph = Graph(complete_up_to=3, degree=6)

    def opened(name: str) -> bool | None:
        cohort = Cohort((0,) * 60, Policy(minimum=2, corrupt_share=0, graph=graph), name)
        server, clients = begun(cohort, Stage.CONFIRM)
        return isolated(cohort, server, clients)

    with pytest.raises(ReleaseRefused, match="of this device's own neighbourhood"):
        opened("isolated 0")
    original = client_module._Round.check_quorum

    def global_only(self: Any, present: Sequence[int], doing: str, heard: Any = None) -> None:
        original(replace(self, drawn=(tuple(present),)), present, doing, present)

    monkeypatch.setattr(client_module._Round, "check_quorum", global_only)
    # Not every graph lets the server recover the masks of all of the victim's neighbours.
    assert any(opened(f"isolated {i}") for i in range(12))


def isolated(cohort: Cohort, server: Attacker, clients: dict[bytes, ClientSession]) -> bool | None:
    """Whether the victim, the first that has few neighbours, can be unmasked by itself."""
    deposits, n = server._deposits, len(cohort.ids)
    near = {v: set(deposits[v].sealed) | {u for u in deposits if v in deposits[u].sealed}
            for v in deposits}  # fmt: skip
    victim = min(near, key=lambda v: len(near[v]))
    survivors = [number for number in range(n) if number not in near[victim]]
    server._survivors = tuple(survivors)
    signatures = {}
    for number, told in server._tidings(survivors).items():
        session = clients[cohort.ids[number]]
        signatures[number] = Confirmation.parse(session.confirm(told)).signature
    joined = b"".join(signatures[number] for number in survivors)
    quorum = Quorum(server._binding.context, bitmap(survivors, n), joined).pack()
    openings = {
        number: Opening.parse(clients[cohort.ids[number]].unmask(quorum)) for number in survivors
    }
    recovery = server.recovery(openings, survivors)
    try:
        keys = {number: recovery._secret(MASKING, number) for number in near[victim]}
    except ReleaseRefused:
        return None  # this graph did not allow it; the next one may
    seen = server.stripped(victim, openings[victim].seed, keys)
    return bool((seen == vectors_of(cohort)[cohort.ids[victim]]).all())


def alone_in_a_band(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """Those that hold the band and are masked with the victim are told to be gone; others stay.

    Returns:
        What is then seen of the victim's band, and what is in it.
    """
    agreed = terms((4, LENGTH))
    server = Attacker(agreed, cohort.prekeys(), cohort.anchor, cohort.policy.graph)
    server.publish(model(2))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    drawn = cohort.vectors(agreed, np.random.default_rng(4))
    vectors = dict(zip(cohort.ids, drawn, strict=True))
    strong = {number for number, tier in enumerate(cohort.tiers) if tier == 0}
    for device, message in server.outbox().items():
        server.receive(device, clients[device].shares(message))
    server.advance()
    near = {v: {u for u in strong - {v} if masked_with_each_other(server, u, v)} for v in strong}
    victim = min(strong, key=lambda v: len(near[v]))
    for stage in (Stage.MASKED, Stage.CONFIRM):
        for device, message in server.outbox().items():
            if server._numbers[device] not in near[victim]:
                server.receive(device, answer(clients[device], stage, message, vectors[device]))
        server.advance()
    openings = {}
    for device, message in server.outbox().items():
        openings[server._numbers[device]] = Opening.parse(clients[device].unmask(message))
    recovery = server.recovery(openings, tuple(openings))
    keys = {v: recovery._secret(MASKING, v) for v in near[victim]}
    seen = server.stripped(victim, openings[victim].seed, keys, model_root(model(2)))
    return seen[4:], vectors[cohort.ids[victim]][4:]


def masked_with_each_other(server: Attacker, one: int, other: int) -> bool:
    deposits = server._deposits
    return one in deposits[other].masked_with or other in deposits[one].masked_with


def test_a_device_that_is_alone_in_its_band_though_others_hold_it(monkeypatch: Patch) -> None:
    """Twelve neighbours of sixty are not twelve that hold the strong band."""
    monkeypatch.setattr(Graph, "check", nothing)
    policy = Policy(minimum=2, corrupt_share=0, graph=Graph(complete_up_to=3, degree=12))

    def attack() -> bool:
        seen, secret = alone_in_a_band(Cohort((0,) * 6 + (1,) * 54, policy, "band"))
        return bool((seen == secret).all())

    with pytest.raises(ReleaseRefused, match="band 2 of 2: 1 devices"):
        attack()
    original = Graph.draw

    def from_all(self: Graph, own: int, among: Sequence[int], stream: Any) -> tuple[int, ...]:
        return original(self, own, among, stream) if len(among) == 60 else ()

    monkeypatch.setattr(Graph, "draw", from_all)
    assert attack()


def hidden_round(cohort: Cohort) -> tuple[set[int], np.ndarray, dict[bytes, np.ndarray]]:
    """The server hides from devices who drew one of them, so that they are not masked with it.

    Those that drew the hidden device are told to be gone. The others are not masked with it, while
    its vector stays closed: everybody signs, and the sum is of one less than that.

    Returns:
        Who signs, the sum of all of them but one, and the vectors.
    """
    server, clients = begun(cohort, Stage.MASKED)
    deposits, n, vectors = server._deposits, len(cohort.ids), vectors_of(cohort)
    drew = {v: {u for u in deposits if v in deposits[u].sealed} for v in deposits}
    hidden = min(drew, key=lambda v: len(drew[v]))
    named = sorted(set(range(n)) - drew[hidden])
    for number in named:
        if number in deposits[hidden].masked_with:
            deposits[hidden].masked_with -= {number}
            server._drawn_by[number].remove(hidden)
        device = cohort.ids[number]
        message = server._deal(number).pack()
        server.receive(device, clients[device].masked(message, vectors[device], model(1)))
    server.advance()
    openings = {}
    for device, message in server.outbox().items():
        try:
            server.receive(device, clients[device].confirm(message))
        except ReleaseRefused:
            assert device == cohort.ids[hidden]
    server.advance()
    for device, message in server.outbox().items():
        openings[server._numbers[device]] = Opening.parse(clients[device].unmask(message))
    summed = [number for number in named if number != hidden]
    keys = {v: server.recovery(openings, named)._secret(MASKING, v) for v in drew[hidden]}
    total = np.zeros(LENGTH, np.uint32)
    for number in summed:
        near = set(deposits[number].share_commitments)
        mine = {
            v: k for v, k in keys.items() if v in near or number in deposits[v].share_commitments
        }
        total += server.stripped(number, openings[number].seed, mine).view(np.uint32)
    return set(named), total.view(np.int32), {cohort.ids[n]: vectors[cohort.ids[n]] for n in summed}


def test_a_device_that_is_hidden_from_those_it_drew(monkeypatch: Patch) -> None:
    """A sum of one less than all of them insist on: nobody else's mask covers the rest."""
    monkeypatch.setattr(Graph, "check", nothing)
    graph = Graph(complete_up_to=3, degree=6)

    def attack(minimum: int) -> tuple[set[int], np.ndarray, dict[bytes, np.ndarray]]:
        policy = Policy(minimum=minimum, corrupt_share=0, graph=graph)
        return hidden_round(Cohort((0,) * 60, policy, "hidden"))

    with monkeypatch.context() as patch:
        patch.setattr(ClientSession, "_heard", lambda self, near, told: near)
        signers, _, _ = attack(40)
        _, total, vectors = attack(len(signers))
        assert len(vectors) == len(signers) - 1
        np.testing.assert_array_equal(total, plain_sum(list(vectors.values()), terms((LENGTH,))))
    with pytest.raises(ReleaseRefused, match=f"{len(signers) - 1} devices take part"):
        attack(len(signers))


# ---------------------------------------------------------------- survivors


def unmask_all(
    cohort: Cohort,
    server: Attacker,
    clients: dict[bytes, ClientSession],
    survivors: Sequence[int],
    asked: Sequence[int],
) -> dict[int, Opening]:
    """Tell a set of survivors to some devices, and have them open what they will."""
    n = len(cohort.ids)
    told = Survivors(server._binding.context, bitmap(survivors, n), ROOT, b"").pack()
    signed = {
        number: Confirmation.parse(clients[cohort.ids[number]].confirm(told)).signature
        for number in asked
    }
    joined = b"".join(signed.values())
    quorum = Quorum(server._binding.context, bitmap(list(signed), n), joined)
    return {
        number: Opening.parse(clients[cohort.ids[number]].unmask(quorum.pack())) for number in asked
    }


def alive_and_dead(cohort: Cohort) -> bool:
    """Both kinds of share of one device, by telling the same devices two sets of survivors."""
    server, clients = begun(cohort, Stage.CONFIRM)
    everybody, others = range(10), range(1, 10)
    first = unmask_all(cohort, server, clients, everybody, others)
    seed = server.recovery(first, everybody)._secret(SEED, 0)
    second = unmask_all(cohort, server, clients, others, others)
    key = server.recovery(second, others)._secret(MASKING, 0)
    return unmasked_with(cohort, server, seed, key)


def unmasked_with(cohort: Cohort, server: Attacker, seed: bytes, key: bytes) -> bool:
    """Whether the first device's vector lies open to who knows its seed and its mask key."""
    private = X25519PrivateKey.from_private_bytes(key)
    entries = server.entries(0)
    masks = [Mask(server._binding.self_key(seed, ROOT), LENGTH, negative=True)]
    for peer in range(1, 10):
        agreed = agree(private, server._roster.prekeys[peer].masking)
        masks.append(Mask(server._binding.pair_key(agreed, ROOT, 0, peer), LENGTH, negative=True))
    apply_masks(entries, masks)
    return bool((entries.view(np.int32) == vectors_of(cohort)[cohort.ids[0]]).all())


def test_a_node_both_alive_and_dead(monkeypatch: Patch) -> None:
    with pytest.raises(ReleaseRefused, match="message 3 of a round, where message 5"):
        alive_and_dead(Cohort((0,) * 10))
    monkeypatch.setattr(ClientSession, "_due", nothing)
    original = ClientSession._advance

    def keep_shares(self: ClientSession, **changes: Any) -> None:
        original(self, **{k: v for k, v in changes.items() if k not in ("held", "dealers")
                          or changes["stage"] == 2})  # fmt: skip

    monkeypatch.setattr(ClientSession, "_advance", keep_shares)
    assert alive_and_dead(Cohort((0,) * 10))


def alive_then_dead(cohort: Cohort) -> bool:
    """The same in two attempts with the same prekeys: once alive, once dropped out."""
    records = cohort.prekeys()
    servers, seeds = [], []
    for attempt in range(2):
        server = Attacker(terms((LENGTH,), attempt=attempt), records, cohort.anchor)
        server.publish(model(1))
        clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
        up_to(Stage.CONFIRM, cohort, clients, server)
        survivors = range(attempt, 10)
        openings = unmask_all(cohort, server, clients, survivors, range(1, 10))
        kind = MASKING if attempt else SEED
        seeds.append(server.recovery(openings, survivors)._secret(kind, 0))
        servers.append(server)
    return unmasked_with(cohort, servers[0], *seeds)


def test_a_node_alive_in_one_attempt_and_dead_in_the_next(monkeypatch: Patch) -> None:
    with pytest.raises(ReleaseRefused, match="used before"):
        alive_then_dead(Cohort((0,) * 10))
    monkeypatch.setattr(PrekeyBook, "_check_fresh", nothing)
    monkeypatch.setattr(PrekeyBook, "_keep", nothing)
    enter = PrekeyBook.enter

    def again(self: PrekeyBook, serial: int, *attempt: Any) -> Any:
        self._unused.add(serial)
        return enter(self, serial, *attempt)

    monkeypatch.setattr(PrekeyBook, "enter", again)
    assert alive_then_dead(Cohort((0,) * 10))


def split_views(cohort: Cohort) -> np.ndarray:
    """Every device is told seven survivors, but others than its peers: six are summed alone."""
    server, clients = begun(cohort, Stage.CONFIRM)
    summed, out = range(6), (6, 7, 8, 9)
    openings, views, signed = {}, {}, {}
    for number in range(10):
        # Each of the four is left out for seven or more of the others.
        kept = number if number in out else out[number % 4]
        views[number] = sorted({*summed, kept})
        told = Survivors(server._binding.context, bitmap(views[number], 10), ROOT, b"").pack()
        session = clients[cohort.ids[number]]
        signed[number] = Confirmation.parse(session.confirm(told)).signature
    for number, view in views.items():
        joined = b"".join(signed[signer] for signer in view)  # each of them signed something
        quorum = Quorum(server._binding.context, bitmap(view, 10), joined)
        openings[number] = Opening.parse(clients[cohort.ids[number]].unmask(quorum.pack()))
    for number, opening in openings.items():
        server._deposits[number].own[SEED] = opening.seed
    recovery = server.recovery(openings, summed)
    total = sum((server.entries(n) for n in summed), np.zeros(LENGTH, np.uint32))
    # Shares of the other kind than is looked for are told by their marks.
    apply_masks(total, recovery.masks())
    return total.view(np.int32)


def test_different_survivors_to_different_devices(monkeypatch: Patch) -> None:
    """Devices that insist on seven are brought to unmask the sum of six."""
    policy = Policy(minimum=7, corrupt_share=0)
    with pytest.raises(ReleaseRefused, match="did not confirm the survivors"):
        split_views(Cohort((0,) * 10, policy))
    monkeypatch.setattr(ClientSession, "_check_signers", nothing)
    cohort = Cohort((0,) * 10, policy)
    six = [vectors_of(cohort)[device] for device in cohort.ids[:6]]
    np.testing.assert_array_equal(split_views(cohort), plain_sum(six, terms((LENGTH,))))


# ---------------------------------------------------------------- models


def crafted_model(cohort: Cohort) -> np.ndarray:
    """All devices are told of one model, and the victim is sent another, which sets it apart."""
    server, clients = begun(cohort, Stage.MASKED)
    for device, message in server.outbox().items():
        sent = model(1, b"crafted") if device == cohort.ids[0] else model(1)
        # The others' updates vanish on the model they get; the victim's does not.
        update = np.full(LENGTH, 9 if device == cohort.ids[0] else 0, np.int32)
        server.receive(device, clients[device].masked(message, update, sent))
    server.advance()
    return drive(server, clients, vectors_of(cohort)).total


def test_a_model_that_only_the_victim_is_sent(monkeypatch: Patch) -> None:
    with pytest.raises(ReleaseRefused, match="not the one that all devices are told of"):
        crafted_model(Cohort((0,) * 10))
    monkeypatch.setattr(ClientSession, "_check_model", nothing)
    assert (crafted_model(Cohort((0,) * 10)) == 9).all()


def two_models(cohort: Cohort) -> np.ndarray:
    """Each device is told of the model that it is sent, but the victim's is another one."""
    server, clients = begun(cohort, Stage.MASKED)
    crafted = model(1, b"crafted")
    victim, *others = cohort.ids
    for device, message in server.outbox().items():
        own = crafted if device == victim else model(1)
        deal = replace(Deal.parse(message), model=own).pack()
        update = np.full(LENGTH, 9 if device == victim else 0, np.int32)
        server.receive(device, clients[device].masked(deal, update, own))
    server.advance()
    told = Survivors.parse(server.outbox()[victim])
    clients[victim].confirm(replace(told, root=model_root(crafted)).pack())
    for stage in (Stage.CONFIRM, Stage.UNMASK):  # the victim is in the sum, but answers no more
        for device in others:
            message = server.outbox()[device]
            server.receive(device, answer(clients[device], stage, message, np.zeros(0)))
        if stage is Stage.UNMASK:
            seed = server.recovery({}, range(10))._secret(SEED, 0)
        server.advance()
    total = server.result.total.view(np.uint32)
    masks = [
        Mask(server._binding.self_key(seed, ROOT), LENGTH, negative=False),
        Mask(server._binding.self_key(seed, model_root(crafted)), LENGTH, negative=True),
    ]
    apply_masks(total, masks)
    return total.view(np.int32)


def test_different_models_to_different_devices(monkeypatch: Patch) -> None:
    """Masks are bound to the model; without that the sum is the victim's update alone."""
    assert not (two_models(Cohort((0,) * 10)) == 9).any()
    unbound = {
        "pair_key": lambda self, agreed, root, a, b: PAIR(self, agreed, ROOT, a, b),
        "self_key": lambda self, seed, root: SELF(self, seed, ROOT),
    }
    for name, function in unbound.items():
        monkeypatch.setattr(Binding, name, function)
    assert (two_models(Cohort((0,) * 10)) == 9).all()


def test_a_quorum_for_another_model_is_none(monkeypatch: Patch) -> None:
    """The victim itself opens nothing, when the others signed another model's root."""
    cohort = Cohort((0,) * 10)
    server, clients = begun(cohort, Stage.UNMASK)
    message = server.outbox()[cohort.ids[0]]
    victim = clients[cohort.ids[0]]
    victim._advance(root=model_root(model(1, b"crafted")))
    with pytest.raises(ReleaseRefused, match="did not confirm the survivors and the model"):
        victim.unmask(message)
    confirmation = Binding.confirmation
    monkeypatch.setattr(
        Binding, "confirmation", lambda self, survivors, root: confirmation(self, survivors, ROOT)
    )
    victim.unmask(message)


PAIR, SELF = Binding.pair_key, Binding.self_key


# ---------------------------------------------------------------- replays


def difference_of_two_uploads(cohort: Cohort) -> np.ndarray:
    """The same deal twice, with another vector: the masks are the same and drop out."""
    server, clients = begun(cohort, Stage.MASKED)
    device = cohort.ids[0]
    message, session = server.outbox()[device], clients[device]
    one, other = (
        np.frombuffer(session.masked(message, np.full(LENGTH, value), model(1)), "<u4")
        for value in (5, 12)
    )
    return other[MASKED_START // 4 :] - one[MASKED_START // 4 :]


def test_replayed_and_reordered_messages(monkeypatch: Patch) -> None:
    with pytest.raises(ReleaseRefused, match="message 2 of a round, where message 3 is due"):
        difference_of_two_uploads(Cohort((0,) * 4))
    with monkeypatch.context() as patch:
        patch.setattr(ClientSession, "_due", nothing)
        assert (difference_of_two_uploads(Cohort((0,) * 4)) == 7).all()


@pytest.mark.parametrize("due", list(Stage)[:4])
@pytest.mark.parametrize("sent", list(Stage)[:4])
def test_no_message_is_answered_out_of_its_order(due: Stage, sent: Stage) -> None:
    """Also one that was answered before; the session goes on undisturbed."""
    cohort = Cohort((0,) * 4)
    vectors = vectors_of(cohort)
    same = Cohort((0,) * 4)  # the same messages, and those that are still to come
    kept = {stage: begun(same, stage)[0].outbox()[same.ids[0]] for stage in [sent]}
    server = cohort.server(terms((LENGTH,)))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    while not server.done:
        out = server.outbox()
        assert server.stage is not sent or out[cohort.ids[0]] == kept[sent]
        if server.stage is due and sent is not due:
            with pytest.raises(ReleaseRefused, match="of a round, where|not called"):
                answer(clients[cohort.ids[0]], sent, kept[sent], vectors[cohort.ids[0]])
        for device, message in out.items():
            server.receive(device, answer(clients[device], server.stage, message, vectors[device]))
        server.advance()
    np.testing.assert_array_equal(
        server.result.total, plain_sum(list(vectors.values()), terms((LENGTH,)))
    )
    for stage, message in kept.items():
        with pytest.raises(ReleaseRefused):
            answer(clients[cohort.ids[0]], stage, message, vectors[cohort.ids[0]])


def sums_of_one_attempt(cohort: Cohort) -> np.ndarray:
    """The same attempt twice, once without the victim: the noise is the same and drops out."""
    totals = []
    noisy = vectors_of(cohort)  # bound to run, round and attempt: the same both times
    for gone in ((), cohort.ids[:1]):
        clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
        server = cohort.server(terms((LENGTH,)))
        totals.append(drive(server, clients, noisy, {Stage.MASKED: gone}).total)
    return totals[0] - totals[1]


def test_wrong_round_the_same_attempt_twice(monkeypatch: Patch) -> None:
    with pytest.raises(ReleaseRefused, match="0 of 10 devices sent shares"):
        sums_of_one_attempt(Cohort((0,) * 10))
    monkeypatch.setattr(PrekeyBook, "_check_order", nothing)
    cohort = Cohort((0,) * 10)
    np.testing.assert_array_equal(sums_of_one_attempt(cohort), vectors_of(cohort)[cohort.ids[0]])


@pytest.mark.parametrize("stage", [Stage.MASKED, Stage.CONFIRM, Stage.UNMASK])
def test_a_message_of_another_round(stage: Stage, monkeypatch: Patch) -> None:
    """A device that looked past the context would answer, in this round, words of another."""
    cohort = Cohort((0,) * 4)
    first, others = begun(cohort, stage)
    # The same devices with books of their own: one book ends a session when it enters a later one.
    second, clients = begun(Cohort((0,) * 4), stage, round=1)
    device = cohort.ids[0]
    foreign = first.outbox()[device]
    vector = vectors_of(cohort)[device]
    with pytest.raises(ReleaseRefused, match="another round"):
        answer(clients[device], stage, foreign, vector)
    with pytest.raises(ReleaseRefused, match="another round"):
        second.receive(device, answer(others[device], stage, foreign, vector))
    monkeypatch.setattr(ClientSession, "_check_context", nothing)
    if stage is Stage.UNMASK:  # the signatures themselves are bound, too
        with pytest.raises(ReleaseRefused, match="did not confirm"):
            answer(clients[device], stage, foreign, vector)
    else:
        answer(clients[device], stage, foreign, vector)


# ---------------------------------------------------------------- shares


def altered_round(cohort: Cohort, alter: Callable[[bytes], bytes]) -> tuple[bool, set[str]]:
    """Two holders return altered shares of devices that dropped out."""
    server, clients = begun(cohort, Stage.UNMASK)
    answers = {
        device: clients[device].unmask(message) for device, message in server.outbox().items()
    }
    for number, device in enumerate(cohort.ids[:9]):  # the last one does not answer any more
        opening = Opening.parse(answers[device])
        if number < 2:
            shares = split(opening.shares, [32] * 9)
            opening = replace(opening, shares=b"".join(map(alter, shares)))
        server.receive(device, opening.pack())
    server.advance()
    everybody = list(vectors_of(cohort).values())
    right = (server.result.total == plain_sum(everybody, terms((LENGTH,)))).all()
    blamed = {device.hex() for device in server.result.faults}
    assert blamed <= {device.hex() for device in cohort.ids[:2]}
    return bool(right), blamed


ALTERED: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda share: bytes([share[0] ^ 1]) + share[1:],
    "zero": lambda share: bytes(32),
    "out of the field": lambda share: b"\xff" * 32,
    "the modulus": lambda share: sharing.PRIME.to_bytes(32, "little"),
}


@pytest.mark.parametrize("how", ALTERED)
def test_altered_shares_and_values_outside_the_field(how: str, monkeypatch: Patch) -> None:
    right, blamed = altered_round(Cohort((0,) * 10), ALTERED[how])
    assert right
    assert len(blamed) == 2
    with monkeypatch.context() as patch:  # without commitments the server takes the lie
        patch.setattr(Recovery, "_is_secret", lambda *arguments: True)
        patch.setattr(Binding, "share_commitment", lambda *arguments: bytes(16))
        patch.setattr(sharing, "in_field", lambda share: True)
        right, blamed = altered_round(Cohort((0,) * 10), ALTERED[how])
        assert not right
        assert not blamed


@pytest.mark.parametrize(("wrong", "works"), [(2, True), (3, False)])
def test_shares_that_were_never_of_one_secret(wrong: int, works: bool, monkeypatch: Patch) -> None:
    """A dealer commits to shares of nothing, and drops out: another quorum, then no sum."""
    original, calls = sharing.split_secrets, []

    def crooked(*arguments: Any) -> list[list[bytes]]:
        dealt = original(*arguments)
        calls.append(arguments)
        if len(calls) == 10:
            dealt[0] = [bytes(32)] * wrong + dealt[0][wrong:]
        return dealt

    monkeypatch.setattr(sharing, "split_secrets", crooked)
    cohort = Cohort((0,) * 10)
    server, clients = begun(cohort, Stage.UNMASK)
    for device, message in list(server.outbox().items())[:9]:
        server.receive(device, clients[device].unmask(message))
    if works:
        server.advance()
        everybody = list(vectors_of(cohort).values())
        np.testing.assert_array_equal(server.result.total, plain_sum(everybody, terms((LENGTH,))))
    else:
        with pytest.raises(ReleaseRefused, match=cohort.ids[9].hex()[:16]):
            server.advance()


def test_a_device_that_seals_rubbish_makes_nobody_drop_out() -> None:
    cohort = Cohort((0,) * 10)
    server = cohort.server(terms((LENGTH,)))
    clients = dict(zip(cohort.ids, cohort.clients(), strict=True))
    for number, (device, message) in enumerate(server.outbox().items()):
        shares = clients[device].shares(message)
        if number == 0:
            parsed = Shares.parse(shares)
            shares = replace(parsed, sealed=bytes(len(parsed.sealed))).pack()
        server.receive(device, shares)
    server.advance()
    result = drive(server, clients, vectors_of(cohort))
    expected = plain_sum(list(vectors_of(cohort).values()), terms((LENGTH,)))
    np.testing.assert_array_equal(result.total, expected)


def test_colluders_learn_no_seed_before_the_survivors_are_certain() -> None:
    """Signatures of two thirds are needed; colluders and a victim alone do not get there."""
    cohort = Cohort((0,) * 10)
    server, clients = begun(cohort, Stage.CONFIRM)
    n, everybody = 10, range(10)
    told = Survivors(server._binding.context, bitmap(everybody, n), ROOT, b"").pack()
    signed = [Confirmation.parse(clients[d].confirm(told)).signature for d in cohort.ids[:7]]
    for count in (6, 7):
        joined = b"".join(signed[:count])
        quorum = Quorum(server._binding.context, bitmap(range(count), n), joined)
        if count < 7:
            with pytest.raises(ReleaseRefused, match="6 of 10 devices confirmed"):
                clients[cohort.ids[0]].unmask(quorum.pack())
        else:
            clients[cohort.ids[0]].unmask(quorum.pack())


def test_a_victim_is_not_told_apart_by_a_roster_of_its_own(monkeypatch: Patch) -> None:
    """Two rosters that differ in one device make two contexts, which do not mix."""
    cohort = Cohort((0,) * 10)
    server, _ = begun(cohort, Stage.SHARES)
    call = Call.parse(server.outbox()[cohort.ids[0]])
    size = len(call.records) // 10
    shorter = replace(call, records=call.records[: 9 * size])
    with pytest.raises(ReleaseRefused, match="another round"):
        server.receive(cohort.ids[0], cohort.clients()[0].shares(shorter.pack()))


def test_secrets_do_not_show() -> None:
    """Neither in a log nor in the local variables of a traceback."""
    root = SecretRoot.known(b"root")
    cohort = Cohort((0,) * 4)
    server, clients = begun(cohort, Stage.UNMASK)
    session, device = clients[cohort.ids[0]], cohort.ids[0]
    held = session._recalled().held
    opening = Opening.parse(session.unmask(server.outbox()[device]))
    server.receive(device, opening.pack())
    secrets = [held[:32], held[32:64], opening.seed, opening.shares[:32]]
    secrets.append(cohort.books[0].secret(0).masking_bytes)
    progress = replace(session._recalled(), held=held)
    seen = " ".join(map(repr, (session, cohort.books[0], root, progress, opening)))
    seen += repr(server._deposits[0]) + repr(vars(session)["_round"])
    for secret in secrets:
        assert repr(secret)[2:-1] not in seen
        assert secret.hex() not in seen
