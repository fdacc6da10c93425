"""The order of the catalogue: charged before it is used, as private as it says, kept for later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
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
from privrec.data import Interactions, Split
from privrec.errors import IntegrityError, Interrupted
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.run import lifecycle, task
from privrec.run.catalogue import CATALOGUE, Catalogue
from privrec.run.directory import Identity
from privrec.run.privacy_plan import event_without_shares, release_event
from privrec.run.recommend import TrainedModel, recommend
from privrec.run.record import Observer, Record
from privrec.run.task import Recommending
from privrec.scenario.load import Scenario

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
DEVICES = SecretRoot.known(b"devices")


def scenario(*changes: str) -> Scenario:
    return Scenario.from_toml(TINY, changes)


def split_of(*changes: str) -> Split:
    return data.load(scenario(*changes).data, data_dir=None)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


class Memo:
    """A ledger that only remembers."""

    def __init__(self, run_id: str = "run") -> None:
        self.header, self.told = {"run_id": run_id}, list[Any]()

    def charge(self, *charge: Any) -> None:
        self.told.append(charge)

    def commit(self, *commit: Any) -> None:
        self.told.append(commit)


def order_of(folder: Path, root: bytes = b"server", run_id: str = "run", *changes: str) -> Any:
    """The order that a release gives, and the ledger that it was charged to."""
    folder.mkdir(exist_ok=True)
    ledger, server = Memo(run_id), SecretRoot.known(root)
    task = Recommending(scenario(*changes), split_of())
    roots = {"server": server, "devices": DEVICES}
    identity = SimpleNamespace(root=roots.get, signing_key=Ed25519PrivateKey.generate)
    task.number(folder, ledger, identity)  # type: ignore[arg-type]
    return load_file(folder / CATALOGUE)["order"], ledger


# --------------------------------------------------------------------------- what it costs


def test_the_release_has_the_event_that_meets_its_epsilon() -> None:
    event = release_event(scenario())
    assert event is not None
    assert (event.mechanism, event.sampling_rate) == ("gaussian", 1.0)
    for adversary in ("recipients", "server"):
        assert 1.9 < epsilon({event: 1}, 1e-5, adversary) <= 2.0  # type: ignore[arg-type]
    assert release_event(scenario(*PUBLIC)) is None
    unset = ("devices.popularity=", "devices.popularity_epsilon=")
    assert release_event(scenario(*unset)) is None


def test_the_budget_covers_the_release_too() -> None:
    budget = ("privacy.noise_multiplier=", "privacy.epsilon=3", "privacy.budget_against=server")
    with_release, without = (
        event_without_shares(scenario(*budget)),
        event_without_shares(scenario(*budget, *PUBLIC)),
    )
    assert with_release.noise_multiplier > without.noise_multiplier
    before = release_event(scenario(*budget))
    assert before is not None
    spent = epsilon({with_release: ROUNDS, before: 1}, 1e-5, "server")
    assert 2.95 < spent <= 3
    assert epsilon({without: ROUNDS, before: 1}, 1e-5, "server") > 3


@pytest.mark.parametrize("most", [1, 3, 8, 1000])
def test_one_history_moves_the_counts_by_no_more_than_the_root_of_its_items(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that noise of the multiplier times that root is what was charged."""
    seen: list[float] = []
    draw = task.rounded_gaussian

    def watched(stream: Any, sigma: float, size: int) -> Any:
        seen.append(sigma)
        return draw(stream, sigma, size)

    monkeypatch.setattr(task, "rounded_gaussian", watched)
    event = release_event(scenario())
    assert event is not None
    order_of(tmp_path / "a", b"server", "run", f"devices.popularity_items={most}")
    assert seen == [pytest.approx(event.noise_multiplier * most**0.5)]
    train = split_of().train
    for user in range(0, 60, 7):
        alone = Interactions(
            np.array([0, train.counts[user]]), train.history(user), None,
            train.user_ids[:1], train.item_ids,
        )  # fmt: skip
        counts = task._capped_counts(alone, most, DEVICES.stream("x", user))
        assert set(counts) <= {0, 1}
        assert counts.sum() == min(most, train.counts[user])
        assert np.linalg.norm(counts) <= most**0.5
        assert not set(np.flatnonzero(counts)) - set(train.history(user))


def test_counts_are_those_of_all_users_when_nobody_is_cut() -> None:
    train = split_of().train
    counts = task._capped_counts(train, 1000, DEVICES.stream("x"))
    assert np.array_equal(counts, train.item_counts())
    cut = task._capped_counts(train, 3, DEVICES.stream("x"))
    assert cut.sum() == np.minimum(train.counts, 3).sum()
    assert np.all(cut <= counts)


@pytest.mark.statistical
def test_which_items_count_is_uniform_and_secret() -> None:
    """Not the first or the latest of a history, and not the same for who knows another root."""
    train = split_of().train
    user = int(train.counts.argmax())
    alone = Interactions(
        np.array([0, train.counts[user]]), train.history(user), None,
        train.user_ids[:1], train.item_ids,
    )  # fmt: skip
    drawn = sum(task._capped_counts(alone, 3, DEVICES.stream("x", number)) for number in range(600))
    found = np.asarray(drawn)[train.history(user)]
    assert stats.chisquare(found).pvalue > LEVEL
    one, other = (
        task._capped_counts(train, 3, SecretRoot.known(key).stream("x")) for key in (b"a", b"b")
    )
    assert not np.array_equal(one, other)


@pytest.mark.statistical
def test_the_noise_of_the_counts_is_as_charged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It must reject two thirds and one and a half of it too."""
    event, noises = release_event(scenario()), list[Any]()
    assert event is not None
    draw = task.rounded_gaussian

    def watched(*words: Any) -> Any:
        noises.append(draw(*words))
        return noises[-1]

    monkeypatch.setattr(task, "rounded_gaussian", watched)
    for number in range(60):
        order_of(tmp_path / "a", b"server", f"run-{number}")
    found = np.concatenate(noises).astype(float)
    assert len(found) == 60 * 40
    sigma = event.noise_multiplier * 3**0.5
    for wrong, right in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        ratio = (found**2).sum() / ((wrong * sigma) ** 2 + 1 / 12)
        fits = LEVEL / 2 < stats.chi2.cdf(ratio, len(found)) < 1 - LEVEL / 2
        assert bool(fits) is right


def test_the_noise_is_in_the_order(tmp_path: Path) -> None:
    """Another root or run gives another order, the same ones the same order."""
    first, _ = order_of(tmp_path / "a")
    assert np.array_equal(order_of(tmp_path / "b")[0], first)
    for words in ((b"other", "run"), (b"server", "other")):
        assert not np.array_equal(order_of(tmp_path / "c", *words)[0], first)
    exact = np.argsort(-split_of().train.item_counts(), kind="stable")
    assert not np.array_equal(first, exact)
    generous = order_of(
        tmp_path / "d", b"server", "run", "devices.popularity_epsilon=1000",
        "devices.popularity_items=1000",
    )[0]  # fmt: skip
    counts = split_of().train.item_counts()
    assert stats.spearmanr(counts[generous], -np.arange(40)).statistic > 0.95
    assert stats.spearmanr(counts[first], -np.arange(40)).statistic < 0.95


def test_it_is_charged_before_the_counts_are_looked_at_and_tagged_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    places = {"_capped_counts": task, "rounded_gaussian": task, "write": Catalogue}
    for name, place in places.items():
        original = getattr(place, name)

        def watched(*words: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            told.append(name)
            return original(*words, **more)

        monkeypatch.setattr(place, name, watched)
    monkeypatch.setattr(Memo, "charge", lambda self, *charge: told.append(f"charge {charge[:2]}"))
    monkeypatch.setattr(Memo, "commit", lambda self, *commit: told.append(f"commit {commit[:2]}"))
    order_of(tmp_path / "a")
    assert told == [
        "charge (-1, 0)", "_capped_counts", "rounded_gaussian", "commit (-1, 0)", "write",
    ]  # fmt: skip
    assert PREPARATION == -1
    one, other = (order_of(tmp_path / "b", root) for root in (b"one", b"two"))
    assert one[0].dtype == other[0].dtype == np.int64


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
    before = release_event(scenario())
    assert before is not None
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

        def skipped(self: Ledger, round: int, *words: Any) -> None:
            if round != PREPARATION:
                charge(self, round, *words)

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
        own = {str(train.item_ids[item]) for item in train.history(user)}
        assert len(found) == 40 - len(own)
        assert not {entry.item_id for entry in found} & own
        assert all(entry.title == titles[entry.item_id] for entry in found)
        again = recommend(finished, history=sorted(own), k=40)
        assert [entry.item_id for entry in again] == [entry.item_id for entry in found]


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
