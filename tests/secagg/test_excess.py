"""Seeds of noise: dealt in shares, and opened for the survivors beyond a band's fewest alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_rounds import LENGTHS, Cohort, answer, plain_sum, terms

from privrec.errors import ReleaseRefused
from privrec.privacy.mechanism import Band, Shares
from privrec.secagg.client import ClientSession
from privrec.secagg.messages import NOISE, Opening, Stage
from privrec.secagg.roster import Terms
from privrec.secagg.server import Recovery, SecureSum, ServerSession

AGREED = terms(minimums=(4, 3, 2), excess=True)
TIERS = (0, 0, 0, 0, 1, 1, 2, 2, 2)


def seeds_of(device: bytes, tier: int) -> list[bytes]:
    """One seed for each band that the device holds; the last byte keeps it in the field."""
    return [device[:30] + bytes([band, 0]) for band in range(len(LENGTHS) - tier)]


def begun(
    cohort: Cohort, agreed: Terms = AGREED
) -> tuple[ServerSession, dict[bytes, ClientSession]]:
    return cohort.server(agreed), dict(zip(cohort.ids, cohort.clients(), strict=True))


def drive(
    cohort: Cohort, agreed: Terms = AGREED, drops: Mapping[Stage, Collection[int]] | None = None
) -> tuple[SecureSum, np.ndarray]:
    """A round in which devices deal the seeds of their noise, and the plain sum of survivors."""
    server, clients = begun(cohort, agreed)
    vectors = dict(zip(cohort.ids, cohort.vectors(agreed, np.random.default_rng(3)), strict=True))
    tiers = dict(zip(cohort.ids, cohort.tiers, strict=True))
    gone: set[bytes] = set()
    while not server.done:
        gone |= {cohort.ids[number] for number in (drops or {}).get(server.stage, ())}
        for device, message in server.outbox().items():
            if device in gone:
                continue
            if server.stage is Stage.SHARES:
                reply = clients[device].shares(message, seeds_of(device, tiers[device]))
            else:
                reply = answer(clients[device], server.stage, message, vectors[device])
            server.receive(device, reply)
        server.advance()
    result = server.result
    return result, plain_sum([vectors[device] for device in result.survivors[0]], agreed)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from(list(Stage)[:4])), max_size=2))
def test_the_seeds_of_the_excess_arrive_whoever_drops_out(
    drops: list[tuple[int, Stage]],
) -> None:
    cohort = Cohort(TIERS)
    named: dict[Stage, list[int]] = {}
    for number, stage in drops:
        named.setdefault(stage, []).append(number)
    result, plain = drive(cohort, drops=named)
    np.testing.assert_array_equal(result.total, plain)
    shares = Shares(
        1.0, 2**20, tuple(Band(4, t, 0) for t in AGREED.minimums),
        remove_excess=True,
    )  # fmt: skip
    tiers = dict(zip(cohort.ids, cohort.tiers, strict=True))
    for band, survivors in enumerate(result.survivors):
        silent = {cohort.ids[number] for number in named.get(Stage.CONFIRM, ())}
        removed = shares.removed(band, survivors, set(survivors) - silent)
        kept = survivors[: len(survivors) - len(removed)]
        assert sum(device not in silent for device in kept) == AGREED.minimums[band]
        assert result.excess[band] == tuple(seeds_of(d, tiers[d])[band] for d in removed)


def test_no_share_of_a_seed_is_opened_that_is_not_in_excess() -> None:
    """The server tries all shares that it got, for all seeds of noise that must stay secret."""
    cohort = Cohort(TIERS)
    server, clients = begun(cohort)
    vectors = dict(zip(cohort.ids, cohort.vectors(AGREED, np.random.default_rng(3)), strict=True))
    while server.stage is not Stage.UNMASK:
        for number, (device, message) in enumerate(server.outbox().items()):
            client = clients[device]
            if server.stage is Stage.SHARES:
                reply = client.shares(message, seeds_of(device, TIERS[number]))
            else:
                reply = answer(client, server.stage, message, vectors[device])
            server.receive(device, reply)
        server.advance()
    due = server._roster.due(range(9), range(9))
    kept = [
        (n, kind) for n in range(9) for kind in range(NOISE, server._roster.secrets(n))
        if kind not in due[n]
    ]  # fmt: skip
    assert len(kept) == sum(AGREED.minimums)
    secret = {seeds_of(cohort.ids[n], TIERS[n])[kind - NOISE] for n, kind in kept}
    seen = b""
    for device, message in server.outbox().items():
        reply = clients[device].unmask(message)
        seen += Opening.parse(reply).noise
        server.receive(device, reply)
    assert not any(seed in seen for seed in secret)
    recovery = Recovery(
        server._roster, server._binding, bytes(32), server._graph.threshold(9), server._deposits,
        range(9), {},
    )  # fmt: skip
    for number, kind in kept:
        with pytest.raises(ReleaseRefused, match="0 sound shares"):
            recovery._secret(kind, number)


def test_a_device_opens_its_own_seeds_only_where_it_is_in_excess() -> None:
    cohort = Cohort((0,) * 6)
    result, _ = drive(cohort, terms(minimums=(6, 5, 2), excess=True))
    assert [len(seeds) for seeds in result.excess] == [0, 1, 4]
    assert result.excess[1] == (seeds_of(cohort.ids[5], 0)[1],)


def test_a_seed_that_was_not_committed_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Cohort(TIERS)
    original = ServerSession.receive

    def altered(self: ServerSession, device: bytes, message: bytes) -> None:
        if self.stage is Stage.UNMASK:
            opening = Opening.parse(message)
            if opening.noise:
                lie = replace(opening, noise=bytes(len(opening.noise))).pack()
                with pytest.raises(ReleaseRefused, match="not the one that its device committed"):
                    original(self, device, lie)
                with pytest.raises(ReleaseRefused, match="pieces"):
                    original(self, device, replace(opening, noise=b"").pack())
        original(self, device, message)

    monkeypatch.setattr(ServerSession, "receive", altered)
    drive(cohort)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_as_many_seeds_as_bands_are_due(count: int) -> None:
    cohort = Cohort((0,) * 5)
    server, clients = begun(cohort)
    call = server.outbox()[cohort.ids[0]]
    with pytest.raises(ReleaseRefused, match="seeds of noise"):
        clients[cohort.ids[0]].shares(call, [bytes(32)] * count)
    assert cohort.books[0]._unused  # nothing was burned


def test_a_saved_session_goes_on_to_open_its_excess() -> None:
    cohort = Cohort((0,) * 6)
    agreed = terms(minimums=(5, 5, 5), excess=True)
    server, clients = begun(cohort, agreed)
    vectors = dict(zip(cohort.ids, cohort.vectors(agreed, np.random.default_rng(3)), strict=True))
    while not server.done:
        for number, (device, message) in enumerate(server.outbox().items()):
            if server.stage is Stage.SHARES:
                reply = clients[device].shares(message, seeds_of(device, 0))
            else:
                session = cohort.resumed(number)
                reply = answer(session, server.stage, message, vectors[device])
            server.receive(device, reply)
        server.advance()
    last = cohort.ids[5]
    assert server.result.excess == tuple((seed,) for seed in seeds_of(last, 0))
