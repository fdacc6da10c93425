"""Recommendations: for a user of the data, or for a history that nobody has seen."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import safe_open

from privrec import data
from privrec.data import Interactions
from privrec.device.local import LocalModel
from privrec.errors import IntegrityError, UnknownIdError, UsageError
from privrec.evaluate.evaluator import scores_with
from privrec.privacy.ledger import Ledger
from privrec.run import lifecycle
from privrec.run.catalogue import Catalogue
from privrec.run.export import tables_of, write_tables
from privrec.run.plan import federation_of
from privrec.run.recommend import NONE, Recommendation, TrainedModel, answer, recommend
from privrec.run.record import Observer
from privrec.run.summary import read_model
from privrec.scenario.load import Scenario

SCENARIO = """
name = "served"
[data]
users = 120
items = 40
clusters = 4
interactions_per_user = 10
[model]
dim = 8
block = 4
[devices]
sampling = "everybody"
[train]
rounds = 12
loss = "full_softmax"
server_optimizer = "fedavg"
server_lr = 2.0
[privacy]
noise = "none"
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIVREC_STATE", str(folder / "state"))
        patch.setattr("privrec.run.costs.peak_bytes", lambda *_: None)
        scenario = Scenario.from_toml(SCENARIO)
        lifecycle.start(scenario, out=folder / "run", observer=Observer(), unsafe_noise_key=b"k")
    return folder / "run"


@pytest.fixture(scope="module")
def train() -> Interactions:
    return data.load(Scenario.from_toml(SCENARIO).data, data_dir=None).train


def copied(trained: Path, to: Path) -> Path:
    return Path(shutil.copytree(trained, to / "run"))


def ids_of(train: Interactions, user: int) -> list[str]:
    return [str(train.item_ids[item]) for item in train.history(user)]


def as_sent(trained: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder alone, at somebody else's: another place, another state, and no data anywhere."""
    sent = copied(trained, to)
    monkeypatch.setenv("PRIVREC_STATE", str(to / "another state"))
    monkeypatch.setattr("privrec.data.load", lambda *_, **__: pytest.fail("the data was read"))
    monkeypatch.chdir(to)
    return sent.relative_to(to)


def test_a_history_needs_the_folder_alone(
    trained: Path, train: Interactions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = recommend(trained, history=ids_of(train, 3))
    sent = as_sent(trained, tmp_path, monkeypatch)
    assert recommend(sent, history=ids_of(train, 3)) == expected
    model = TrainedModel.read(sent)
    assert model.catalogue.ids.tolist() == train.item_ids.tolist()
    assert model.catalogue.titles == list(train.titles or ())


def test_what_a_folder_holds_of_the_data_are_items_alone(
    trained: Path, train: Interactions
) -> None:
    """Other histories over the same items leave the same list."""
    with safe_open(trained / "catalogue.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"ids", "titles.text", "titles.ends"}
        assert file.get_tensor("ids").tolist() == train.item_ids.tolist()
        assert set(json.loads(file.metadata()["record"])) == {"digest", "public_key", "signature"}
    with safe_open(trained / "model.safetensors", framework="numpy") as file:
        facts = json.loads(file.metadata()["privrec"])
    assert facts == json.loads((trained / "model.json").read_text())
    assert (facts["kind"], facts["items"], facts["dim"]) == ("gmf", train.n_items, 8)


@pytest.mark.parametrize("name", ["7", "a b", "é\N{SNOWMAN}", "", "007"])
def test_a_catalogue_of_texts_comes_back(name: str, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    ids, titles = np.array(["x", name], object), ["", "\N{SNOWMAN} of\n" + name]
    Catalogue(ids, titles, np.array([1, 0])).write(tmp_path, key)
    found = Catalogue.read(tmp_path, key.public_key())
    assert (found.ids.tolist(), found.titles) == (["x", name], titles)
    assert found.positions([name, "x"]).tolist() == [1, 0]
    with pytest.raises(UnknownIdError, match="item 'y': the data set has no such item"):
        found.positions(["y"])
    with pytest.raises(IntegrityError, match="not signed with the key"):
        Catalogue.read(tmp_path, Ed25519PrivateKey.generate().public_key())


@pytest.mark.parametrize("loss", ["full_softmax", "bce"])
@pytest.mark.parametrize("kind", ["gmf", "neumf"])
def test_everybody_gets_at_once_what_each_gets_alone(
    loss: str, kind: str, train: Interactions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the fit draws negatives, in parts of any size, and with what was seen."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("privrec.run.costs.peak_bytes", lambda *_: None)
    scenario = Scenario.from_toml(
        SCENARIO.replace("full_softmax", loss), ["train.rounds=2", f"model.kind={kind}"]
    )
    lifecycle.start(scenario, out=tmp_path / "run", observer=Observer(), unsafe_noise_key=b"k")
    model = TrainedModel.read(tmp_path / "run")
    monkeypatch.setattr("privrec.run.recommend._USERS", 50)
    parts = list(model.lists(model.owned(model.users()), 5))
    assert [len(items) for items, _ in parts] == [50, 50, 20]
    items, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    for user in range(0, 120, 13):
        alone = recommend(tmp_path / "run", user=str(train.user_ids[user]), k=5)
        assert [entry.item_id for entry in alone] == [str(train.item_ids[i]) for i in items[user]]
        np.testing.assert_allclose([e.score for e in alone], scores[user], rtol=1e-4, atol=1e-5)
    seen = np.concatenate(
        [i for i, _ in model.lists(model.histories(model.users()), 40, filter_seen=False)]
    )
    assert (np.sort(seen, axis=1) == np.arange(40)).all()
    whole, _ = next(iter(model.lists(model.histories(model.users()), 40)))
    for user, row in enumerate(whole):
        assert (row == NONE).sum() == len(train.history(user))
        assert not set(row) & set(train.history(user))


@pytest.mark.slow
def test_the_lists_of_everybody_take_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many users and items as MovieLens 1M has: under 20 s of one core, file included."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    size = ("data.users=6040", "data.items=3706", "data.interactions_per_user=165", "model.dim=16",
            "devices.sampling=poisson", "devices.sampling_rate=0.01", "train.rounds=1",
            "run.eval_users=10", "run.footprint=false", "train.user_steps=2")  # fmt: skip
    scenario = Scenario.from_toml(SCENARIO, size)
    lifecycle.start(scenario, out=tmp_path / "run", observer=Observer(), unsafe_noise_key=b"k")
    model = TrainedModel.read(tmp_path / "run")
    histories = model.histories(model.users())
    began = time.process_time()
    names = model.split.train.user_ids
    rows = write_tables(tmp_path / "r.parquet", tables_of(model, model.lists(histories, 10), names))
    assert time.process_time() - began < 20
    assert rows == 60_400


def test_similar_items_are_of_the_same_taste(trained: Path) -> None:
    model = TrainedModel.read(trained)
    titles = model.catalogue.titles or ()
    group = [title.rpartition(" ")[2] for title in titles]
    hits = [
        group[near] == group[item]
        for item in range(40)
        for near in model.similar(str(model.catalogue.ids[item]), 3)[0][0]
    ]
    assert np.mean(hits) > 0.5  # chance: a quarter
    found, cosines = (each[0] for each in model.similar(model.catalogue.ids[4], 100))
    assert sorted([*found, 4]) == [*range(40)]
    assert cosines.tolist() == sorted(cosines.tolist(), reverse=True)
    own = model.vectors[[4, found[0]]]
    assert cosines[0] == pytest.approx(own[0] @ own[1] / np.prod(np.linalg.norm(own, axis=1)))


def test_a_list_is_ranked_and_within_the_catalogue(trained: Path, train: Interactions) -> None:
    known = {str(item) for item in train.item_ids}
    for user in (0, 7, 119):
        found = recommend(trained, user=str(train.user_ids[user]))
        assert [entry.rank for entry in found] == [*range(1, 11)]
        scores = [entry.score for entry in found]
        assert scores == sorted(scores, reverse=True)
        assert len({entry.item_id for entry in found}) == 10
        assert {entry.item_id for entry in found} <= known


def test_nothing_of_the_history_comes_back(trained: Path, train: Interactions) -> None:
    for user in range(0, 120, 17):
        own = ids_of(train, user)
        for words in ({"user": str(train.user_ids[user])}, {"history": own}):
            found = recommend(trained, k=1000, **words)  # type: ignore[arg-type]
            offered = [entry.item_id for entry in found]
            assert not set(offered) & set(own)
            owned = len(set(own)) + ("user" in words)  # and the one that was held out
            assert len(offered) == len(set(offered)) == train.n_items - owned


@pytest.mark.parametrize("selector", ["scan", "simhash"])
def test_what_was_held_out_is_owned(trained: Path, selector: str) -> None:
    """Else each user's newest item, which the model ranks high, would be offered again."""
    model = TrainedModel.read(trained)
    split, users = model.split, model.users()
    heldout = split.heldout.items[split.heldout.indptr[:-1]]
    lists = model.lists(model.owned(users), 40, selector=selector)
    offered = np.concatenate([items for items, _ in lists])
    assert not (offered == heldout[:, None]).any()
    for user in (0, 5):
        found = recommend(trained, user=str(split.train.user_ids[user]), k=40, selector=selector)
        assert str(split.train.item_ids[heldout[user]]) not in {each.item_id for each in found}


@pytest.mark.parametrize("loss", ["full_softmax", "softmax", "bce", "bpr"])
def test_a_user_and_the_same_history_get_the_same_list(
    loss: str, train: Interactions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the fit draws negatives: those depend on the history, not on its order."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("privrec.run.costs.peak_bytes", lambda *_: None)
    trained, text = tmp_path / "run", SCENARIO.replace("full_softmax", loss)
    scenario = Scenario.from_toml(text, ["train.rounds=2"])
    lifecycle.start(scenario, out=trained, observer=Observer(), unsafe_noise_key=b"k")
    split = TrainedModel.read(trained).split
    for user in (1, 30, 64):
        by_id = recommend(trained, user=str(train.user_ids[user]))
        heldout = split.heldout.items[split.heldout.indptr[user]]
        own = [*ids_of(train, user), str(train.item_ids[heldout])]
        for history in (own, own[::-1], own + own):
            assert recommend(trained, history=history) == by_id


def test_the_order_of_a_history_counts_where_its_last_items_count_more(
    trained: Path, train: Interactions
) -> None:
    model, own = TrainedModel.read(trained), ids_of(train, 3)
    model = replace(model, scenario=model.scenario.with_settings({"train.serve_recency": 1.0}))
    fitted, turned = (model.fit(model.history(ids)) for ids in (own, own[::-1]))
    assert np.abs(fitted - turned).max() > 0.01
    again = model.fit(model.history([own[-1], own[0], *own]))  # where each comes last
    assert np.array_equal(again, fitted)
    states = model.fit(model.histories(np.arange(8)))
    assert np.allclose(states[3], fitted[0], atol=1e-5)
    # What was held out comes last of all.
    split, (everything,) = model.split, model.fit(model.owned(np.array([3])))
    heldout = str(train.item_ids[split.heldout.items[split.heldout.indptr[3]]])
    assert np.allclose(everything, model.fit(model.history([*own, heldout]))[0], atol=1e-5)


def test_a_history_nobody_has_seen_is_served_by_its_taste(
    trained: Path, train: Interactions
) -> None:
    """Two histories from two users' tastes get lists that differ, each closer to its own."""
    lists = [{entry.item_id for entry in recommend(trained, history=ids_of(train, user)[:4])}
             for user in range(12)]  # fmt: skip
    assert len({frozenset(found) for found in lists}) > 6


def test_held_out_items_are_found_more_often_than_by_chance(
    trained: Path, train: Interactions
) -> None:
    model = TrainedModel.read(trained)
    split, hits = model.split, []
    for user in range(0, 120, 3):
        target = split.heldout.items[split.heldout.indptr[user]]
        offered, _ = next(iter(model.lists(model.histories(np.array([user])), 10)))
        hits.append(target in offered)
    assert sum(hits) / len(hits) > 0.5  # chance: a third


def test_k_bounds_the_list(trained: Path, train: Interactions) -> None:
    whole = recommend(trained, user=str(train.user_ids[5]), k=1000)
    for k in (1, 3, 10):
        assert recommend(trained, user=str(train.user_ids[5]), k=k) == whole[:k]
    for k in (0, -1):
        with pytest.raises(UsageError, match=f"k = {k}: must be at least 1"):
            recommend(trained, user=str(train.user_ids[5]), k=k)


def test_a_history_of_everything_leaves_nothing_to_recommend(
    trained: Path, train: Interactions
) -> None:
    assert recommend(trained, history=[str(item) for item in train.item_ids]) == []


@pytest.mark.parametrize(
    "words", [{"user": "nobody"}, {"history": ["nothing"]}, {"history": ["1", "99999"]}], ids=str
)
def test_unknown_ids_are_refused(trained: Path, words: dict[str, Any]) -> None:
    with pytest.raises(UnknownIdError) as caught:
        recommend(trained, **words)
    wrong = words.get("user") or words["history"][-1]
    assert repr(wrong) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("words", [{}, {"user": "1", "history": ["1"]}], ids=str)
def test_exactly_one_of_user_and_history_is_needed(trained: Path, words: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give one of"):
        recommend(trained, **words)


def test_an_empty_history_is_refused(trained: Path) -> None:
    with pytest.raises(UsageError, match="the history is empty"):
        recommend(trained, history=[])


def test_titles_are_given_where_the_data_has_them(trained: Path, train: Interactions) -> None:
    assert train.titles is not None
    titles = {str(item): title for item, title in zip(train.item_ids, train.titles, strict=True)}
    for entry in recommend(trained, user=str(train.user_ids[3])):
        assert entry.title == titles[entry.item_id]


def test_a_recommendation_is_plain_json() -> None:
    entry = Recommendation(1, "12", None, 0.5)
    assert json.loads(json.dumps(asdict(entry))) == {
        "rank": 1, "item_id": "12", "title": None, "score": 0.5,
    }  # fmt: skip


def test_an_unfinished_run_says_how_to_finish_it(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="there is no model yet; finish the run: privrec resume"):
        recommend(path, user="1")


@pytest.mark.parametrize("content", [b"", b"{ spoilt", b"\x08" + bytes(7) + b'{"a":{}}'])
def test_a_spoilt_model_is_refused(trained: Path, tmp_path: Path, content: bytes) -> None:
    path = copied(trained, tmp_path)
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a model"):
        recommend(path, user="1")


def test_a_model_of_another_catalogue_is_refused(trained: Path, tmp_path: Path) -> None:
    path = copied(trained, tmp_path)
    text = (path / "scenario.toml").read_text()
    other = text.replace("items = 40", "items = 400")
    scenario = Scenario.from_toml(other)
    train = data.load(scenario.data).train
    with pytest.raises(IntegrityError, match="use the data that the model was trained on"):
        read_model(path, federation_of(scenario, train.n_items), None)
    (path / "scenario.toml").write_text(other)
    with pytest.raises(IntegrityError, match="its scenario_hash is"):
        recommend(path, user="1")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no run\.json"):
        recommend(tmp_path, user="1")


TIERS = """tiers = [{capacity = 1.0, share = 0.5}, {capacity = 0.5, share = 0.5}]
"""


@pytest.mark.parametrize(
    "nesting", ["nesting = 'fold'", "popularity = 'public'", "nesting = 'dims'"]
)
def test_a_model_of_mixed_capacities_is_served_from_the_whole_memory(
    nesting: str, train: Interactions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept are coefficients; recommendations are made from the memory that they mean."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("privrec.run.costs.peak_bytes", lambda *_: None)
    text = SCENARIO.replace("[train]", f"{TIERS}{nesting}\n[train]")
    scenario = Scenario.from_toml(text)
    result = lifecycle.start(
        scenario, out=tmp_path / "run", observer=Observer(), unsafe_noise_key=b"k"
    ).payload
    split = data.load(scenario.data, data_dir=None)
    hits = []
    for user in range(120):
        found = recommend(tmp_path / "run", history=ids_of(train, user))
        target = str(train.item_ids[split.heldout.items[split.heldout.indptr[user]]])
        if user % 20 == 0:
            by_id = recommend(tmp_path / "run", user=str(train.user_ids[user]))
            owned = [*ids_of(train, user), target]
            assert by_id == recommend(tmp_path / "run", history=owned)
        hits.append(target in {entry.item_id for entry in found})
    assert sum(hits) / len(hits) > 0.45  # chance: a third
    # They are the lists that were measured.
    assert sum(hits) / len(hits) == pytest.approx(result["metrics"]["full_hr@10"], abs=0.02)


@pytest.mark.parametrize(
    "selector", ["hamming", "sketch", "simhash", "pghash", "block_sign", "auto"]
)
def test_every_selector_recommends_what_it_finds_in_the_order_of_a_scan(
    trained: Path, train: Interactions, selector: Any
) -> None:
    user = str(train.user_ids[3])
    exact = {entry.item_id: entry.score for entry in recommend(trained, user=user, k=40)}
    found = recommend(trained, user=user, selector=selector)
    scores = [entry.score for entry in found]
    assert 0 < len(found) <= 10
    assert scores == sorted(scores, reverse=True)
    for entry in found:
        assert entry.score == pytest.approx(exact[entry.item_id], rel=1e-4, abs=1e-5)


def test_a_scan_is_what_scoring_the_whole_catalogue_gives(
    trained: Path, train: Interactions
) -> None:
    scenario = Scenario.from_toml(SCENARIO)
    with Ledger.open(trained / "ledger.jsonl", repair=False) as ledger:
        federation = federation_of(scenario, train.n_items)
        weights = read_model(trained, federation, ledger.ended)
    tier = federation.tiers[0]
    model, rng = LocalModel(tier.model, tier.view(weights)), np.random.default_rng(0)
    alone = np.array([0])
    for _ in range(20):
        state = rng.standard_normal(tier.model.network.user_dim).astype(np.float32)
        scores = scores_with(model, alone, state[None], train.n_items)(alone, None)[0]
        history = rng.permutation(train.n_items)[:6]
        items, values = answer(model, state, 10, history)
        scores[history] = -np.inf
        np.testing.assert_array_equal(items, np.argsort(-scores, kind="stable")[:10])
        np.testing.assert_allclose(values, scores[items], rtol=1e-4, atol=1e-5)


def test_what_a_device_does_not_hold_is_on_the_line_of_its_own_scores() -> None:
    """Scores that fall, or rise, with the logarithm of the rank go on falling, or stay level."""
    federation = federation_of(Scenario.from_toml(SCENARIO), 40)
    view = federation.tiers[0].model
    model = LocalModel(view, np.zeros(view.layout.size, np.float32))
    items, states = np.arange(40), np.zeros((2, view.network.user_dim), np.float32)
    states[:, 0] = 2, -1
    rows = np.zeros((40, view.vectors.dim), np.float32)
    rows[:, 0] = 3 - np.log1p(items)
    view.vectors.scatter_add(model.memory, items, rows)
    users = np.arange(2)
    found = scores_with(model, users, states, 100)(users, None)
    ranks = np.log1p(np.arange(100))
    np.testing.assert_allclose(found[0], 6 - 2 * ranks, atol=1e-4)
    np.testing.assert_allclose(found[1, :40], ranks[:40] - 3, atol=1e-4)
    np.testing.assert_allclose(found[1, 40:], -3, atol=1e-4)
    np.testing.assert_array_equal(scores_with(model, users, states, 40)(users, None), found[:, :40])


def test_what_a_device_does_not_hold_is_scored_by_its_features_beside_that_line() -> None:
    """Learned scores on a line of the rank, features of all items: the sum of both, everywhere."""
    federation = federation_of(Scenario.from_toml(SCENARIO), 40)
    features = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    view = federation.tiers[0].model.featured(features)
    model = LocalModel(view, np.zeros(view.layout.size, np.float32))
    rows = np.zeros((40, view.vectors.dim), np.float32)
    rows[:, 0] = 3 - np.log1p(np.arange(40))
    view.vectors.scatter_add(model.memory, np.arange(40), rows)
    states = np.zeros((2, view.network.user_dim), np.float32)
    states[:, 0], states[:, -4:-1] = 2, [[1, -2, 3], [0, 5, 0]]
    users = np.arange(2)
    expected = 6 - 2 * np.log1p(np.arange(100)) + states[:, -4:-1] @ features.T
    np.testing.assert_allclose(
        scores_with(model, users, states, 100)(users, None), expected, atol=1e-4
    )
