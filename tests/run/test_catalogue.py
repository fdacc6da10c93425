"""The order of the catalogue: charged before it is used, as private as it says, kept for later."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import safe_open
from safetensors.numpy import load_file, save
from scipy import stats

from privrec import data
from privrec.data import Split
from privrec.device.samples import Histories
from privrec.device.update import BoundedUpdate, Counting, agreed_places, digest
from privrec.errors import (
    BudgetError,
    IntegrityError,
    Interrupted,
    ReleaseRefused,
)
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.privacy.population import PopulationBalance
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.run import lifecycle, loop
from privrec.run.catalogue import CATALOGUE, Catalogue
from privrec.run.directory import Identity
from privrec.run.parties import enrolled_with
from privrec.run.plan import Plan
from privrec.run.privacy_plan import (
    beside_without_shares,
    charges_of,
    counting_of,
    event_without_shares,
)
from privrec.run.recommend import TrainedModel, recommend
from privrec.run.record import Observer, Record
from privrec.run.simulation import side_sum
from privrec.run.task import Recommending
from privrec.scenario.load import Scenario
from privrec.secagg.ring import LARGEST_WRAP, Load

ROUNDS = 4
LEVEL = 1e-4
TINY = f"""
name = "ordered"
[data]
users = 60
items = 40
clusters = 3
interactions_per_user = 8
[model]
dim = 4
block = 2
[devices]
sampling = "everybody"
tiers = [{{capacity = 1.0, share = 0.5}}, {{capacity = 0.25, share = 0.5}}]
popularity = "released"
popularity_epsilon = 2.0
popularity_items = 3
[train]
rounds = {ROUNDS}
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 4.0
[run]
footprint = false
"""
PUBLIC = ("devices.popularity=public", "devices.popularity_epsilon=")
SHARED = ("privacy.noise=distributed", "devices.min_cohort=5", "privacy.delta=1e-4")
FULL = (*SHARED, "run.secure_sum=full")
DEVICES = SecretRoot.known(b"devices")


def scenario(*changes: str) -> Scenario:
    return Scenario.from_toml(TINY, changes)


def split_of(*changes: str) -> Split:
    return data.load(scenario(*changes).data, data_dir=None)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


class Memo(Ledger):
    """A ledger on no disk; ``told`` has what was charged and committed."""

    def __init__(self, run_id: str = "run") -> None:
        super().__init__(Path("memo"), None, None)
        standing = asdict(PopulationBalance())
        self.header, self.told = {"run_id": run_id, "standing": standing}, list[Any]()

    def charge(self, event: RoundEvent, *place: int) -> None:  # type: ignore[override]
        self.told.append((*place, event))
        self._charges[place] = place  # type: ignore[index, assignment]
        self.counts[event] += 1

    def commit(self, *commit: Any) -> None:
        self.told.append(commit)


def order_of(folder: Path, root: bytes = b"server", run_id: str = "run", *changes: str) -> Any:
    """The order that a release gives, and the ledger that it was charged to."""
    folder.mkdir(exist_ok=True)
    ledger, server = Memo(run_id), SecretRoot.known(root)
    task = Recommending(scenario(*changes), split_of())
    roots = {"server": server, "devices": DEVICES}
    identity = SimpleNamespace(
        root=roots.get, signing_key=Ed25519PrivateKey.generate, run_id=run_id
    )
    task.number(folder, ledger, identity)  # type: ignore[arg-type]
    return load_file(folder / CATALOGUE)["order"], ledger


def counting(*changes: str) -> Counting:
    found = counting_of(scenario(*changes), 40, 60)
    assert found is not None
    return found


def histories() -> Histories:
    train = split_of().train
    return Histories(np.arange(60), train.indptr, train.items)


def of_users(*items: list[int]) -> Histories:
    lengths = np.cumsum([0, *map(len, items)])
    return Histories(np.arange(len(items)), lengths, np.concatenate(items).astype(np.int32))


def counted(found: Counting, data: Histories, attempt: int = 0, root: SecretRoot = DEVICES) -> Any:
    """What each device puts into the sum before its noise, a row each."""
    bounded = found.bounded(data, root, found.round("run", attempt, "plan"))
    return np.array([each.vector() for each in bounded.rows()])


def summed(*changes: str, attempt: int = 0, dropout_rate: float = 0.0) -> Any:
    """The sum of all devices, as a run takes it."""
    settings, found = scenario(*changes), counting(*changes)
    enrolled, how = enrolled_with(settings, DEVICES), settings.run.secure_sum
    round = found.round("run", attempt, "plan")
    data = histories()

    def bounded(some: Any) -> BoundedUpdate:
        return found.bounded(data.select(some), DEVICES, round)

    return side_sum(found, round, data.users, bounded, enrolled, how, dropout_rate)


# --------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("changes", "law"), [((), "gaussian"), (SHARED, "discrete_gaussian")], ids=["central", "shares"]
)
def test_the_release_has_the_event_that_meets_its_epsilon(
    changes: tuple[str, ...], law: str
) -> None:
    event, delta = counting(*changes).event, scenario(*changes).privacy.delta
    assert (event.mechanism, event.sampling_rate) == (law, 1.0)
    for adversary in ("recipients", "server"):
        assert 1.9 < epsilon({event: 1}, delta, adversary) <= 2.0  # type: ignore[arg-type]
    for none in (PUBLIC, ("devices.popularity=", "devices.popularity_epsilon=")):
        assert counting_of(scenario(*changes, *none), 40, 60) is None
        assert beside_without_shares(scenario(*changes, *none)) == ()


@pytest.mark.parametrize("changes", [(), SHARED], ids=["central", "shares"])
def test_the_budget_covers_the_release_too(changes: tuple[str, ...]) -> None:
    budget = (
        *changes, "privacy.noise_multiplier=", "privacy.epsilon=3", "privacy.budget_against=server",
    )  # fmt: skip
    settings = scenario(*budget)
    delta = settings.privacy.delta
    plans = Plan.of(settings, 40, 60), Plan.of(scenario(*budget, *PUBLIC), 40, 60)
    with_release, without = (plan.event for plan in plans)
    assert with_release.noise_multiplier > without.noise_multiplier
    (before,) = plans[0].beside
    assert plans[1].beside == ()
    spent = epsilon({with_release: ROUNDS, before: 1}, delta, "server")
    assert 2.95 < spent <= 3
    assert epsilon({without: ROUNDS, before: 1}, delta, "server") > 3
    if not changes:
        assert event_without_shares(settings) == with_release
        assert beside_without_shares(settings) == (before,)
    charged = charges_of(settings, with_release, [before])
    assert charged == {with_release: ROUNDS, before: 1}


@pytest.mark.parametrize("most", [1, 3, 8, 1000])
@pytest.mark.parametrize("changes", [(), SHARED], ids=["central", "shares"])
def test_one_history_moves_the_sum_by_no_more_than_is_charged(
    changes: tuple[str, ...], most: int
) -> None:
    """Whatever it is, against nothing or against any other: the bound is exact, not rounded."""
    found = counting(*changes, f"devices.popularity_items={most}")
    kept, step = min(most, 40), found.step
    assert found.bound == step * kept**0.5
    if changes:
        assert found.protection.shares is not None
        assert found.protection.shares.squared_sensitivity == step**2 * kept
        assert found.event.grid is not None
        assert found.event.grid.squared_sensitivity == step**2 * kept
    every = list(range(40))
    data = of_users([], [7], every, every[::-1], [3, 3, 3, 5], every[:20] * 3)
    rows = counted(found, data)
    assert set(rows.ravel().tolist()) <= {0, step}
    wanted = [min(kept, n) for n in (0, 1, 40, 40, 2, 20)]
    assert (rows != 0).sum(1).tolist() == wanted
    assert ((rows.astype(np.int64) ** 2).sum(1) <= step**2 * kept).all()
    for row, items in zip(rows, data.sets(), strict=True):
        assert not set(np.flatnonzero(row)) - set(items)


def test_counts_are_those_of_all_users_when_nobody_is_cut() -> None:
    train = split_of().train
    found = counting("devices.popularity_items=1000")
    assert np.array_equal(counted(found, histories()).sum(0), found.step * train.item_counts())
    cut = counted(counting(), histories())
    assert (cut > 0).sum() == np.minimum(train.counts, 3).sum()


@pytest.mark.statistical
def test_which_items_count_is_uniform_and_secret_and_of_each_user_by_itself() -> None:
    """Not the first or the latest of a history, and not the same for who knows another root."""
    data, found = histories(), counting()
    user = int(data.lengths.argmax())
    alone = Histories.alone(user, data.of(user))
    drawn = sum(counted(found, alone, attempt)[0] > 0 for attempt in range(600))
    assert stats.chisquare(np.asarray(drawn)[data.of(user)]).pvalue > LEVEL
    together = counted(found, data)
    assert np.array_equal(together[user], counted(found, alone)[0])
    shuffled = Histories.alone(user, data.of(user)[::-1].copy())
    assert np.array_equal(together[user], counted(found, shuffled)[0])
    other = counted(found, data, root=SecretRoot.known(b"other"))
    assert not np.array_equal(together, other)


# --------------------------------------------------------------------------- its noise


def fits(noise: Any, variance: float) -> bool:
    """Whether a two-sided test of the variance passes."""
    ratio = (noise.astype(float) ** 2).sum() / variance
    return bool(LEVEL / 2 < stats.chi2.cdf(ratio, noise.size) < 1 - LEVEL / 2)


@pytest.mark.statistical
@pytest.mark.parametrize("kept", [True, False], ids=["excess removed", "excess kept"])
def test_the_sum_has_the_counts_and_the_noise_that_is_charged(kept: bool) -> None:
    """It must reject two thirds and one and a half of it too."""
    changes = SHARED if kept else (*SHARED, "privacy.remove_excess=false")
    found = counting(*changes)
    shares = found.protection.shares
    assert shares is not None
    (band,), plain = shares.bands, [counted(found, histories(), n).sum(0) for n in range(60)]
    sums = [summed(*changes, attempt=attempt) for attempt in range(60)]
    noise = np.array(sums) - np.array(plain)
    accounted = found.event.noise_multiplier**2 * found.bound**2
    variance = accounted * (band.least if kept else 60) / (band.least - band.colluders)
    for wrong, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        assert fits(noise, wrong**2 * variance) is right
    # Without what colluders know there is as much as is accounted.
    assert variance * (band.least - band.colluders) / band.least >= accounted * (1 - 1e-9)


@pytest.mark.statistical
def test_central_noise_is_what_is_charged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, noises = counting(), list[Any]()
    release = loop.released_sum

    def watched(round: Any, total: Any, *words: Any) -> Any:
        made = release(round, total, *words)
        noises.append(made.total - total)
        return made

    monkeypatch.setattr(loop, "released_sum", watched)
    for number in range(60):
        order_of(tmp_path / "a", b"server", f"run-{number}")
    sigma = found.event.noise_multiplier * found.step * 3**0.5
    for wrong, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        assert fits(np.concatenate(noises), (wrong * sigma) ** 2 + 1 / 12) is right


def test_the_protocol_gives_the_same_counts_bit_for_bit() -> None:
    for words in ({}, {"dropout_rate": 0.1}):
        plain, secure = summed(*SHARED, **words), summed(*FULL, **words)
        assert plain.tobytes() == secure.tobytes()
    assert not np.array_equal(summed(*SHARED), summed(*SHARED, attempt=1))


def test_the_grid_is_fine_and_no_count_of_many_devices_wraps_around() -> None:
    for devices, most in ((60, 3), (10**6, 50), (10**6, 1), (4 * 10**6, 10**5)):
        changes = f"devices.popularity_items={most}", "privacy.scale_bits=20"
        found = counting_of(scenario(*SHARED, *changes), 10**5, devices)
        assert found is not None
        assert devices * found.step < 2**31
        shares = found.protection.shares
        assert shares is not None
        noise = float(shares.share_variance(0)) * shares.bands[0].least / found.bound**2
        load = Load(10**5, devices, noise)
        ring, encoding = found.protection.ring, found.protection.encoding
        assert ring.wrap_probability(encoding, load) <= LARGEST_WRAP


def test_the_noise_is_in_the_order(tmp_path: Path) -> None:
    """Another root or run gives another order, the same ones the same order."""
    first, _ = order_of(tmp_path / "a")
    assert np.array_equal(order_of(tmp_path / "b")[0], first)
    for words in ((b"other", "run"), (b"server", "other")):
        assert not np.array_equal(order_of(tmp_path / "c", *words)[0], first)
    exact = np.argsort(-split_of().train.item_counts(), kind="stable")
    assert not np.array_equal(first, exact)
    counts = split_of().train.item_counts()
    generous = "devices.popularity_epsilon=1000", "devices.popularity_items=1000"
    for changes in (generous, (*generous, *SHARED)):
        found = order_of(tmp_path / "d", b"server", "run", *changes)[0]
        assert stats.spearmanr(counts[found], -np.arange(40)).statistic > 0.95
    assert stats.spearmanr(counts[first], -np.arange(40)).statistic < 0.95


@pytest.mark.parametrize("changes", [(), SHARED, FULL], ids=["central", "shares", "full"])
def test_it_is_charged_before_devices_are_asked_and_committed_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    told: list[str] = []
    original = Counting.bounded

    def bounded(self: Counting, *words: Any) -> Any:
        told.append("bounded")
        return original(self, *words)

    monkeypatch.setattr(Counting, "bounded", bounded)
    charge, write = Memo.charge, Catalogue.write

    def charged(self: Memo, event: RoundEvent, *place: int) -> None:
        told.append(f"charge {place}")
        charge(self, event, *place)

    def written(*words: Any) -> None:
        told.append("written")
        write(*words)

    monkeypatch.setattr(Memo, "charge", charged)
    monkeypatch.setattr(Memo, "commit", lambda self, *c: told.append(f"commit {c[:2]}"))
    monkeypatch.setattr(Catalogue, "write", written)
    order, _ = order_of(tmp_path / "a", b"server", "run", *changes)
    assert told == ["charge (-1, 0)", "bounded", "commit (-1, 0)", "written"]
    assert order.dtype == np.int64


def test_a_count_without_a_sum_is_charged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the devices fall silent at times, and two thirds must be there."""
    lossy = (*SHARED, "devices.dropout_rate=0.35")
    order, ledger = order_of(tmp_path / "a", b"server", "run-2", *lossy)
    attempts = [each[1] for each in ledger.told]
    assert len(attempts) > 2
    assert attempts == [*range(max(attempts) + 1), max(attempts)]
    assert {each[2] for each in ledger.told[:-1]} == {counting(*lossy).event}
    assert np.array_equal(np.sort(order), np.arange(40))
    lost = (*SHARED, "devices.dropout_rate=0.9")
    with pytest.raises(ReleaseRefused, match="20 attempts at another count of the items ended"):
        order_of(tmp_path / "b", b"server", "run", *lost)


def test_counts_that_are_lost_do_not_go_beyond_the_budget(tmp_path: Path) -> None:
    lossy = (
        *SHARED, "devices.dropout_rate=0.9", "privacy.noise_multiplier=", "privacy.epsilon=3",
        "privacy.budget_against=server",
    )  # fmt: skip
    with pytest.raises(BudgetError, match="another count of the items would bring ε to"):
        order_of(tmp_path / "a", b"server", "run", *lossy)


def test_all_rounds_are_bound_to_the_order(tmp_path: Path) -> None:
    plans = []
    for root in (b"one", b"two"):
        task = Recommending(scenario(), split_of())
        roots = {"server": SecretRoot.known(root), "devices": DEVICES}
        identity = SimpleNamespace(
            root=roots.get, signing_key=Ed25519PrivateKey.generate, run_id="run"
        )
        before = task.plan.digest
        assert before == task.scenario.plan_hash()
        task.number(tmp_path, Memo(), identity)  # type: ignore[arg-type]
        order = load_file(tmp_path / CATALOGUE)["order"]
        assert task.plan.order == digest(order)
        plans.append(task.plan.digest)
        assert plans[-1] != before
    assert plans[0] != plans[1]


def test_a_device_takes_no_other_order_than_all_others() -> None:
    order = np.random.default_rng(1).permutation(40)
    places = agreed_places(order.tobytes(), 40, digest(order))
    assert np.array_equal(order[places], np.arange(40))
    twice = np.zeros(40, np.int64)
    for packed, told in (
        (order[::-1].copy().tobytes(), digest(order)),
        (b"", digest(np.zeros(0, np.int64))),
        (order[:-1].tobytes(), digest(order[:-1])),
        (twice.tobytes(), digest(twice)),
        ((order + 1).tobytes(), digest(order + 1)),
    ):
        with pytest.raises(ReleaseRefused, match="not the one that the round is bound to"):
            agreed_places(packed, 40, told)


def test_a_public_order_is_that_of_the_counts_and_costs_nothing(tmp_path: Path) -> None:
    order, ledger = order_of(tmp_path / "a", b"server", "run", *PUBLIC)
    counts = split_of().train.item_counts()
    assert np.array_equal(order, np.argsort(-counts, kind="stable"))
    assert np.all(np.diff(counts[order]) <= 0)
    assert not ledger.told


# --------------------------------------------------------------------------- in a run


def started(out: Path, *changes: str, **words: Any) -> dict[str, Any]:
    words.setdefault("observer", Observer())
    return lifecycle.start(scenario(*changes), out=out, **words).payload


def test_a_run_charges_the_release_and_counts_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    payload = started(out)
    before = counting().event
    with Ledger.open(out / "ledger.jsonl", repair=False) as ledger:
        charges = [(charge.round, charge.attempt, charge.event) for charge in ledger.charges]
        assert ledger.committed(PREPARATION, 0) is not None
    event = RoundEvent("gaussian", 4.0, 1.0)
    assert charges == [(PREPARATION, 0, before), *((n, 0, event) for n in range(ROUNDS))]
    entries = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [(e["kind"], e.get("round")) for e in entries[:3]] == [
        ("header", None), ("charge", -1), ("commit", -1),
    ]  # fmt: skip
    spent = epsilon({before: 1, event: ROUNDS}, 1e-5, "server")
    assert payload["privacy"]["epsilon_server"] == spent
    assert spent > epsilon({event: ROUNDS}, 1e-5, "server")
    assert payload["privacy"]["charges"] == ROUNDS + 1
    price = payload["privacy"]["epsilon_popularity"]
    assert price == epsilon({before: 1}, 1e-5, "server") <= 2
    assert payload["privacy"]["popularity"] == "released"
    assert payload["rounds"] == ROUNDS
    assert build(out).privacy.charges == ROUNDS + 1


def test_a_report_refuses_a_release_that_was_not_charged(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        charge = Ledger.charge

        def skipped(self: Ledger, event: RoundEvent, round: int, *words: Any) -> None:
            if round != PREPARATION:
                charge(self, event, round, *words)

        patch.setattr(Ledger, "charge", skipped)
        patch.setattr(Ledger, "commit", lambda self, round, *words: None)
        started(out)
    with pytest.raises(IntegrityError, match="before the first round"):
        build(out)


class Stops(Observer):
    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: Record) -> None:
        if record.round == self.after:
            raise Interrupted("now")


@pytest.mark.parametrize("popularity", [(), PUBLIC], ids=["released", "public"])
def test_a_resumed_run_keeps_its_order_and_pays_once(
    tmp_path: Path, popularity: tuple[str, ...]
) -> None:
    key = {"unsafe_noise_key": b"k"}
    started(tmp_path / "whole", *popularity, **key)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        started(out, *popularity, observer=Stops(2), **key)
    before = (out / CATALOGUE).read_bytes()
    lifecycle.resume(out, observer=Observer())
    assert (out / CATALOGUE).read_bytes() == before == (tmp_path / "whole" / CATALOGUE).read_bytes()
    one, two = (
        load_file(tmp_path / name / "model.safetensors")["weights"] for name in ("whole", "run")
    )
    assert np.array_equal(one, two)
    with Ledger.open(out / "ledger.jsonl", repair=False) as ledger:
        rounds = [charge.round for charge in ledger.charges]
    assert rounds == [*([] if popularity else [PREPARATION]), *range(ROUNDS)]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    started(tmp_path / "run", unsafe_noise_key=b"k")
    return tmp_path / "run"


def swapped(order: np.ndarray) -> np.ndarray:
    changed = order.copy()
    changed[[0, -1]] = changed[[-1, 0]]
    return changed


SPOILT = {
    "gone": (None, "there is no catalogue"),
    "empty": (b"", "this is no catalogue"),
    "no file of its kind": (b"{ spoilt", "this is no catalogue"),
    "another array": (lambda order, _: save({"other": order}), "not a signed catalogue"),
    "unsigned": (lambda order, _: save({"order": order}), "not a signed catalogue"),
    "two items swapped": (
        lambda order, key: _signed(order, key, swapped(order)), "not what was written",
    ),
    "two items swapped, by another key": (
        lambda order, _: _signed(swapped(order), Ed25519PrivateKey.generate()),
        "not signed with the key of this run",
    ),
    "an item twice": (
        lambda order, key: _signed(np.concatenate((order[:1], order[:-1])), key),
        "no order of the 40 items",
    ),
    "too short": (lambda order, key: _signed(order[:-1], key), "no order of the 40 items"),
    "of floats": (
        lambda order, key: _signed(order.astype(np.float64), key), "no order of the 40 items",
    ),
}  # fmt: skip


def _signed(order: np.ndarray, key: Ed25519PrivateKey, instead: np.ndarray | None = None) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, CATALOGUE)
        Catalogue(split_of().train.item_ids, order=order).write(Path(folder), key)
        if instead is None:
            return path.read_bytes()
        with safe_open(path, framework="numpy") as file:
            return bytes(save({"order": instead}, metadata=file.metadata()))


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_order_is_refused_when_recommending_and_resuming(
    finished: Path, case: str, tmp_path: Path
) -> None:
    content, says = SPOILT[case]
    half = tmp_path / "half"
    with pytest.raises(Interrupted):
        started(half, observer=Stops(2), unsafe_noise_key=b"k")
    for folder in (finished, half):
        path = folder / CATALOGUE
        order = load_file(path)["order"]
        path.unlink()
        if content is not None:
            key = Identity.read(folder).signing_key()
            path.write_bytes(content(order, key) if callable(content) else content)
    with pytest.raises(IntegrityError, match=says):
        recommend(finished, user="1")
    with pytest.raises(IntegrityError, match=says):
        lifecycle.resume(half, observer=Observer())


def test_the_order_of_another_run_is_refused_when_resuming(tmp_path: Path) -> None:
    for name, key in (("one", b"k"), ("two", b"l")):
        with pytest.raises(Interrupted):
            started(tmp_path / name, observer=Stops(2), unsafe_noise_key=key)
    shutil.copy(tmp_path / "two" / CATALOGUE, tmp_path / "one" / CATALOGUE)
    with pytest.raises(IntegrityError, match="belongs to data"):
        lifecycle.resume(tmp_path / "one", observer=Observer())


def test_recommendations_name_items_as_the_data_does(finished: Path) -> None:
    """The model's items are numbered anew; ids, titles and the history are those of the data."""
    train = split_of().train
    assert train.titles is not None
    titles = {str(item): title for item, title in zip(train.item_ids, train.titles, strict=True)}
    for user in (0, 13, 59):
        found = recommend(finished, user=str(train.user_ids[user]), k=40)
        items = np.append(train.history(user), split_of().heldout.history(user))
        own = {str(train.item_ids[item]) for item in items}
        assert len(found) == 40 - len(own)
        assert not {entry.item_id for entry in found} & own
        assert all(entry.title == titles[entry.item_id] for entry in found)
        assert recommend(finished, history=sorted(own), k=40) == found


def test_data_of_other_items_is_refused(finished: Path) -> None:
    """A list of other items would be recommended by the vectors of these."""
    model = TrainedModel.read(finished, given=split_of("data.items=41"))
    with pytest.raises(IntegrityError, match="use the data that the run was started with"):
        model.histories(model.users())
    split = split_of()
    renamed = replace(split.train, item_ids=split.train.item_ids + 1)
    model = TrainedModel.read(finished, given=replace(split, train=renamed))
    with pytest.raises(IntegrityError, match="its items are not those of this data"):
        model.histories(model.users())


def test_a_run_without_rows_keeps_no_order(tmp_path: Path) -> None:
    words = ("devices.popularity=", "devices.popularity_epsilon=")
    started(tmp_path / "run", *words)
    privacy = json.loads((tmp_path / "run" / "result.json").read_text())["privacy"]
    assert privacy["popularity"] is privacy["epsilon_popularity"] is None
    identity = Identity.read(tmp_path / "run")
    listed = Catalogue.read(tmp_path / "run", identity.signing_key().public_key())
    assert listed.order is None
    np.testing.assert_array_equal(listed.ids, split_of().train.item_ids)
    assert recommend(tmp_path / "run", user="1")
    assert Identity.read(tmp_path / "run")
