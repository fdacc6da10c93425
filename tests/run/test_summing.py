"""Plain sums and the protocol's give the same bits; noise in shares is what is accounted."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import Parts, assemble
from scipy import stats

from privrec import data
from privrec.cli.plan import planned
from privrec.device.device import Device
from privrec.device.update import Aggregate
from privrec.errors import ReleaseRefused, UsageError
from privrec.models.layout import band_sizes, from_wire, to_wire
from privrec.privacy import discrete
from privrec.privacy.ledger import Ledger
from privrec.privacy.mechanism import Shares
from privrec.randomness import SecretRoot
from privrec.run import lifecycle
from privrec.run.record import Observer
from privrec.run.simulation import (
    SUMMING,
    Enrolled,
    Participant,
    Plain,
    Secure,
    Simulation,
)
from privrec.scenario.load import Scenario
from privrec.secagg.client import ClientSession
from privrec.secagg.messages import Stage
from privrec.secagg.server import ServerSession
from privrec.workers import forked

LEVEL = 1e-4
SCENARIO = """
name = "secure"
[data]
users = 60
items = 40
clusters = 3
interactions_per_user = 8
[model]
dim = 8
block = 2
[devices]
population = 60
sampling = "everybody"
min_cohort = 2
dropout_rate = 0.1
[train]
rounds = 3
loss = "full_softmax"
server_optimizer = "fedavg"
server_lr = 3.0
[privacy]
noise = "distributed"
clip_norm = 1.0
noise_multiplier = 2.0
delta = 1e-3
[run]
footprint = false
checkpoint_every = 1
"""
TIERS = (
    "devices.tiers=[{capacity=1.0,share=0.4},{capacity=0.5,share=0.3},{capacity=0.25,share=0.3}]"
)
ROWS = "devices.popularity=public"
FEWER = ("data.users=36", "devices.population=36")  # what devices compute grows with its square
SMALL_RING = ("privacy.ring_bits=16", "privacy.scale_bits=8")
KINDS: dict[str, tuple[str, ...]] = {
    "alike": (),
    "tiers": (TIERS,),
    "rows": (TIERS, ROWS),
    "excess kept": (TIERS, "privacy.remove_excess=false"),
    "small ring": (TIERS, *SMALL_RING),
    "central": (TIERS, "privacy.noise=central"),
    "no noise": (TIERS, "privacy.noise=none", "privacy.noise_multiplier="),
    "small ring, no noise": (TIERS, *SMALL_RING, "privacy.noise=none", "privacy.noise_multiplier="),
    "poisson": ("devices.sampling=poisson", "devices.sampling_rate=0.7", "privacy.delta=0.9",
                "privacy.least_survivors=0.4"),
    "one by one": (TIERS, "run.engine=device"),
}  # fmt: skip


def scenario(*changes: str) -> Scenario:
    return Scenario.from_toml(SCENARIO, changes)


def parts_of(*changes: str, root: bytes = b"devices") -> Parts:
    made = scenario(*changes)
    train = data.load(made.data).train
    return assemble(made, train, "run", SecretRoot.known(root))


def collected(parts: Parts, attempt: int = 0) -> Aggregate:
    return parts.simulation.collect(parts.server.next_round(attempt), parts.server.weights)


def started(out: Path, *changes: str, key: bytes | None = b"k") -> dict[str, Any]:
    made = scenario(*changes)
    return lifecycle.start(made, out=out, observer=Observer(), unsafe_noise_key=key).payload


# --------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_bits_with_and_without_masks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    for name in ("exact", "full"):
        started(tmp_path / name, *FEWER, *KINDS[kind], f"run.secure_sum={name}")
    one, two = (tmp_path / name for name in ("exact", "full"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    charged = []
    for out in (one, two):
        entries = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
        charged.append([(e.get("round"), e.get("attempt"), e.get("tag")) for e in entries])
    assert charged[0] == charged[1]
    assert len(charged[0]) >= 7


def test_the_protocol_runs_and_its_server_sees_masked_vectors_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[np.ndarray] = []
    original = ServerSession.receive

    def watched(self: ServerSession, device: bytes, message: bytes) -> None:
        if self.stage is Stage.MASKED:
            seen.append(np.frombuffer(message, np.uint32, offset=36).copy())
        original(self, device, message)

    monkeypatch.setattr(ServerSession, "receive", watched)
    parts = parts_of("run.secure_sum=full", "devices.dropout_rate=0", "privacy.noise=none",
                     "privacy.noise_multiplier=")  # fmt: skip
    total = collected(parts).total
    assert len(seen) == 60
    for vector in seen:
        # A masked vector is uniform: of its top bits half are set, as of small integers none.
        share = (vector >> 31).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(len(vector))
    unmasked = sum(vector.astype(np.int64) for vector in seen).astype(np.uint32).view(np.int32)
    assert not np.array_equal(unmasked, total)  # own masks are in it


def test_both_agree_on_many_rounds_with_heavy_drop_outs() -> None:
    """Aborted rounds abort in both, and the others give one sum."""
    changes = (*FEWER, TIERS, "devices.dropout_rate=0.3", "privacy.least_survivors=0.45")
    exact, full = (parts_of(*changes, f"run.secure_sum={name}") for name in ("exact", "full"))
    outcomes = Counter()
    for attempt in range(14):
        try:
            found = collected(exact, attempt).total
        except ReleaseRefused:
            outcomes["aborted"] += 1
            with pytest.raises(ReleaseRefused):
                collected(full, attempt)
            continue
        outcomes["released"] += 1
        assert np.array_equal(found, collected(full, attempt).total)
    assert outcomes["aborted"] >= 2
    assert outcomes["released"] >= 2


# --------------------------------------------------------------------------- noise in shares


def noise_of(parts: Parts, attempt: int = 0) -> np.ndarray:
    """The noise of a round in the order of the wire, by collecting it again without."""
    simulation, layouts = parts.simulation, parts.federation.layouts
    with_noise = collected(parts, attempt).total
    for cohort in simulation.cohorts:
        cohort.states[:] = 0
    quiet = replace(simulation, protection=replace(simulation.protection, shares=None))
    without = quiet.collect(parts.server.next_round(attempt), parts.server.weights).total
    for cohort in simulation.cohorts:
        cohort.states[:] = 0
    return to_wire(with_noise - without, layouts)


def fits(noise: np.ndarray, variance: float) -> bool:
    ratio = float((noise.astype(float) ** 2).sum()) / variance
    return bool(LEVEL / 2 < stats.chi2.cdf(ratio, len(noise)) < 1 - LEVEL / 2)


@pytest.mark.statistical
@pytest.mark.parametrize("removed", [True, False])
def test_the_noise_of_each_band_is_as_accounted(removed: bool) -> None:
    parts = parts_of(
        TIERS, "devices.dropout_rate=0",
        f"privacy.remove_excess={str(removed).lower()}", "data.items=4000", "privacy.scale_bits=11",
    )  # fmt: skip
    shares = parts.server.plan.protection.shares
    assert shares is not None
    noise, start = noise_of(parts), 0
    holders = (60, 42, 24)
    for band, size in enumerate(band_sizes(parts.federation.layouts)):
        mine = noise[start : start + size]
        start += size
        least, colluders = shares.bands[band].least, shares.bands[band].colluders
        assert least == int(0.67 * holders[band]) + 1
        assert colluders == int(np.ceil(0.05 * holders[band]))
        kept = least if removed else holders[band]
        variance = float(shares.variance) * kept / (least - colluders)
        assert fits(mine, variance)
        assert not fits(mine, variance * 0.81)
        assert not fits(mine, variance * 1.21)
        assert stats.kstest(mine / np.sqrt(variance), "norm").pvalue > LEVEL
    assert start == len(noise)


def test_noise_is_in_a_sum_once_however_often_it_is_read_and_by_how_many_made() -> None:
    parts = parts_of(TIERS)
    simulation, round = parts.simulation, parts.server.next_round(0)
    cohort = [
        Participant(user, tier.index)
        for tier, held in zip(simulation.federation.tiers, simulation.cohorts, strict=True)
        for user in held.users.tolist()
    ]

    def made() -> Plain:
        protection, enrolled = simulation.protection, simulation.enrolled
        return Plain(round, simulation.federation.layouts, protection, cohort, enrolled)

    discrete._parts.cache_clear()
    whole, shared = made(), made()
    tables = discrete._parts.cache_info().misses
    first = whole.total()
    # Made before anything is drawn, so that workers that are forked then have them.
    assert discrete._parts.cache_info().misses == tables > 0
    assert first.any()
    assert (whole.total() == first).all()
    shared.gather(forked(3, lambda take: made().part(take)))
    assert (shared.total() == first).all()


def test_noise_is_another_one_in_each_attempt_and_under_each_root() -> None:
    drawn = [noise_of(parts_of("devices.dropout_rate=0"), attempt) for attempt in (0, 1)]
    drawn.append(noise_of(parts_of("devices.dropout_rate=0", root=b"others")))
    for i, one in enumerate(drawn):
        for two in drawn[:i]:
            assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(len(one))


def test_what_devices_upload_adds_up_to_the_sum() -> None:
    """The device's own code path, against what the simulation adds for many at once."""
    parts = parts_of(TIERS, "devices.dropout_rate=0", "privacy.remove_excess=false")
    simulation, server = parts.simulation, parts.server
    round, federation = server.next_round(0), parts.federation
    key = 7
    total = np.zeros(federation.layout.size, np.int64)
    seeds = set()
    for tier, cohort in zip(federation.tiers, simulation.cohorts, strict=True):
        for row, user in enumerate(cohort.users.tolist()):
            device = Device(
                user, cohort.data.of(row), tier,
                federation.layouts_of(tier), cohort.learner, simulation.protection, simulation.root,
            )  # fmt: skip
            answer = device.answer(round, federation.prefix(server.weights, tier), key)
            sent = device.upload(round, answer).integers
            quiet = to_wire(answer.vector(), device.layouts)
            assert (sent != quiet).mean() > 0.9  # every coefficient is noised, touched or not
            total[: len(sent)] += sent - quiet
            seeds |= set(device.noise_seeds(round))
    assert len(seeds) == 60 + 42 + 24
    assert np.array_equal(total, noise_of(parts))


# --------------------------------------------------------------------------- rounds that end


def test_an_aborted_round_is_charged_and_tried_again_without_telling_how_many_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    failing = {"left": 3}
    original = Plain._check_turnout

    def moody(*arguments: Any) -> None:
        failing["left"] -= 1
        if failing["left"] in (0, 1):
            raise ReleaseRefused("37 of 60 devices")
        if failing["left"] > 0:
            original(*arguments)

    monkeypatch.setattr(Plain, "_check_turnout", moody)
    lifecycle.start(scenario(), out=tmp_path / "run", observer=Observer())
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    aborted = [event for event in events if event["type"] == "aborted"]
    assert [(event["round"], event["attempt"]) for event in aborted] == [(1, 0), (1, 1)]
    assert set(aborted[0]) == {"type", "round", "attempt"}
    with Ledger.open(tmp_path / "run/ledger.jsonl") as ledger:
        assert len(ledger.charges) == 5
        assert ledger.attempts(1) == 3


def test_rounds_that_never_release_end_the_run_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    with pytest.raises(ReleaseRefused, match="too few devices"):
        started(tmp_path / "run", "devices.dropout_rate=0.95")


def test_devices_refuse_terms_with_fewer_survivors_than_agreed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that lowers the minimum would have more noise taken off than may be."""
    parts = parts_of("run.secure_sum=full", "devices.dropout_rate=0")
    original = ServerSession.__init__

    def lowered(self: ServerSession, terms: Any, *arguments: Any) -> None:
        original(self, replace(terms, minimums=(terms.minimums[0] // 2,)), *arguments)

    monkeypatch.setattr(ServerSession, "__init__", lowered)
    with pytest.raises(ReleaseRefused, match="agreed to other ones"):
        collected(parts)


def test_a_device_below_its_own_minimum_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("run.secure_sum=full", "devices.dropout_rate=0")
    simulation = parts.simulation
    policy = replace(simulation.enrolled.policy, minimum=61)
    simulation.enrolled = Enrolled(simulation.root, policy)
    with pytest.raises(ReleaseRefused, match="is set to 61"):
        collected(parts)


def test_each_device_answers_an_attempt_once() -> None:
    parts = parts_of("run.secure_sum=full", "devices.dropout_rate=0")
    collected(parts)
    with pytest.raises(ReleaseRefused, match="took part in"):
        collected(parts)


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("devices.min_cohort=61",), "60 devices hold a part"),
        ((TIERS, "devices.min_cohort=25"), "24 devices hold a part"),
        (("privacy.least_survivors=0.9999", "privacy.colluding_share=0.3",
          "devices.sampling=poisson"), "fewer colluders than survivors"),
        (("privacy.scale_bits=1", "privacy.noise_multiplier=0.05"), "raise privacy.scale_bits"),
        (("privacy.ring_bits=16", "privacy.scale_bits=16"), "lower privacy.scale_bits"),
        (("devices.sampling=poisson", "devices.sampling_rate=0.5"), "of a band for its least"),
    ],
)  # fmt: skip
def test_what_cannot_be_protected_is_refused_before_the_run(
    changes: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        parts_of(*changes)


@pytest.mark.parametrize("kind", ["alike", "tiers", "rows", "excess kept", "poisson", "small ring"])
def test_a_plan_is_what_the_run_charges(kind: str) -> None:
    changes = (*KINDS[kind], "privacy.noise_multiplier=", "privacy.epsilon=6")
    costs = planned(scenario(*changes))
    event = parts_of(*changes).server.plan.event
    assert costs["noise_multiplier"] == event.noise_multiplier
    assert costs["epsilon"] <= 6
    kept = kind == "excess kept"
    assert (costs["epsilon"] == costs["epsilon_server"]) == (kind != "poisson" or kept)


def test_a_small_ring_gives_the_same_model_but_for_its_grid() -> None:
    """Rotated, rounded, summed and turned back: close to the sum in the large ring."""
    quiet = (TIERS, "devices.dropout_rate=0", "privacy.noise=none", "privacy.noise_multiplier=")
    found = []
    for changes in ((), ("privacy.ring_bits=16", "privacy.scale_bits=8.5")):
        parts = parts_of(*quiet, *changes)
        round = parts.server.next_round(0)
        aggregate = parts.simulation.collect(round, parts.server.weights)
        release = parts.server.release(round, aggregate, SecretRoot.known(b"server"))
        found.append(parts.server.decode(release))
    large, small = found
    step = 1 / 2**8.5
    assert np.abs(large).max() > 0.02
    assert np.abs(large - small).max() < 6 * step * np.sqrt(60) / 60
    assert np.corrcoef(large, small)[0, 1] > 0.98


def test_rotated_integers_keep_the_bound() -> None:
    parts = parts_of(TIERS, "devices.dropout_rate=0", *SMALL_RING)
    bound = parts.server.plan.protection.encoding.squared_bound
    norms: list[int] = []
    original = Plain.add

    def watched(self: Any, tier: Any, users: Any, update: Any) -> None:
        norms.extend((update.integers.astype(np.int64) ** 2).sum(1).tolist())
        assert (update.integers != 0).mean() > 0.5  # spread over all coefficients
        original(self, tier, users, update)

    Plain.add = watched  # type: ignore[method-assign]
    try:
        collected(parts)
    finally:
        Plain.add = original  # type: ignore[method-assign]
    assert len(norms) == 60
    assert 0 < max(norms) <= bound


# --------------------------------------------------------------------------- the wire


@pytest.mark.parametrize("changes", [(TIERS,), (TIERS, ROWS), (TIERS, "devices.nesting=dims")])
def test_in_the_order_of_the_wire_weaker_vectors_are_prefixes(changes: tuple[str, ...]) -> None:
    federation = parts_of(*changes, "model.block=1", "model.item_bias=true").federation
    layouts = federation.layouts
    vector = np.random.default_rng(0).integers(0, 10**6, layouts[0].size)
    wired = to_wire(vector, layouts)
    assert np.array_equal(from_wire(wired, layouts), vector)
    assert sum(band_sizes(layouts)) == layouts[0].size
    for tier in federation.tiers:
        own = federation.prefix(vector, tier)
        mine = federation.layouts_of(tier)
        assert np.array_equal(to_wire(own, mine), wired[: tier.layout.size])
        both = np.stack([own, own + 1])
        assert np.array_equal(to_wire(both, mine)[1], to_wire(own + 1, mine))


def test_the_simulation_is_what_the_scenario_says() -> None:
    for name in ("exact", "full"):
        simulation: Simulation = parts_of(f"run.secure_sum={name}").simulation
        assert simulation.secure_sum == name
        assert simulation.dropout_rate == 0.1
        assert isinstance(simulation.protection.shares, Shares)
    assert {"exact": Plain, "full": Secure} == SUMMING
    assert ClientSession.__name__ in vars(sys.modules[Plain.__module__])
