"""The estimator: what it takes, what it gives, and that it is a run like any other."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pytest
from scipy import sparse
from small_runs import Silent, weights

import privrec
from privrec.api.inputs import as_table, stored
from privrec.data import Interactions, leave_last_out
from privrec.errors import (
    BudgetError,
    DataError,
    Interrupted,
    PrivrecError,
    UnknownIdError,
    UsageError,
)
from privrec.privacy.ledger import Ledger
from privrec.report.verify import verify
from privrec.run import loop
from privrec.run.record import Observer

USERS, ITEMS, EACH = 60, 30, 8
QUICK = {"rounds": 2, "dim": 8, "progress": False, "footprint": False}


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and times, in no order; each user likes one half of the items."""
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(100, 100 + USERS), EACH)
    halves = [np.arange(user % 2, ITEMS, 2) for user in range(USERS)]
    items = np.concatenate([rng.choice(half, EACH, replace=False) for half in halves])
    order = rng.permutation(users.size)
    return users[order], items[order], rng.permutation(users.size)[order]


@pytest.fixture(autouse=True, scope="module")
def _places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIVREC_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("PRIVREC_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def fitted(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> privrec.Recommender:
    users, items, times = rows
    table = {"user": users, "item": [f"i{item}" for item in items], "time": times}
    folder = tmp_path_factory.mktemp("fitted") / "run"
    recommender = privrec.Recommender(epsilon=8, folder=folder, **{**QUICK, "rounds": 30})
    return recommender.fit(table, time_column="time")


# --------------------------------------------------------------------------- what it takes


class Capsule:
    """What pandas and polars are to Arrow: something with its stream and nothing else."""

    def __init__(self, table: pyarrow.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested)


def forms(rows: Any, folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    users, items, times = rows
    timed = {"time_column": "time"}
    table = pyarrow.table({"user": users, "item": items, "time": times})
    pyarrow.csv.write_csv(table, folder / "t.csv")
    record = np.rec.fromarrays([users, items, times], names="user,item,time")
    return {
        "path": (folder / "t.csv", timed),
        "text of a path": (str(folder / "t.csv"), timed),
        "Arrow": (table, timed),
        "Arrow's interface": (Capsule(table), timed),
        "mapping": ({"user": users, "item": items, "time": times}, timed),
        "array": (np.stack([users, items, times], axis=1), {}),
        "arrays": ((users, items, times), {}),
        "records": (np.asarray(record), timed),
        "other names": (table.rename_columns(["u", "i", "t"]),
                        {"user_column": "u", "item_column": "i", "time_column": "t"}),
        "categories": (table.set_column(0, "user", table["user"].dictionary_encode()), timed),
        "interactions": (Interactions.from_pairs(users, items, times), {}),
        "split": (leave_last_out(Interactions.from_pairs(users, items, times), holdout="test"), {}),
    }  # fmt: skip


FORMS = ["path", "text of a path", "Arrow", "Arrow's interface", "mapping", "array", "arrays",
         "records", "other names", "categories", "interactions", "split"]  # fmt: skip


def same(found: privrec.Recommender, rows: Any) -> None:
    """It learned from these rows, and from all but each user's last."""
    split, users = found.model.split, rows[0]
    expected = leave_last_out(Interactions.from_pairs(*rows), holdout="test")
    assert split.train.user_ids.tolist() == expected.train.user_ids.tolist() == sorted({*users})
    assert split.train.item_ids.tolist() == expected.train.item_ids.tolist()
    for one, two in ((split.train, expected.train), (split.heldout, expected.heldout)):
        np.testing.assert_array_equal(one.indptr, two.indptr)
        np.testing.assert_array_equal(one.items, two.items)
    assert found.recommend(k=1).num_rows == USERS


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_in_any_form_are_learned_from(form: str, rows: Any, tmp_path: Path) -> None:
    data, columns = forms(rows, tmp_path)[form]
    same(privrec.Recommender(epsilon=math.inf, **QUICK).fit(data, **columns), rows)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames_come_and_go(library: str, rows: Any) -> None:
    module = pytest.importorskip(library)
    frame = module.DataFrame(dict(zip(("user", "item", "time"), rows, strict=True)))
    recommender = privrec.Recommender(epsilon=math.inf, **QUICK).fit(frame, time_column="time")
    same(recommender, rows)
    found = recommender.recommend(k=2, form=library)  # type: ignore[arg-type]
    assert isinstance(found, module.DataFrame)
    assert len(found) == 2 * USERS


def test_columns_are_found_by_their_names(rows: Any, tmp_path: Path) -> None:
    """Also ratings and titles, which are used as they are told to be."""
    users, items, times = rows
    low = np.arange(len(users)) % 9 == 0
    names = ["memberId", "rated_at", "movie_id", "stars"]
    table = pyarrow.table([users, times, items, np.where(low, 1, 4)], names=names)
    (tmp_path / "titles.csv").write_text(
        "movie_id,title\n" + "".join(f"{item},Film {item}\n" for item in range(ITEMS))
    )
    recommender = privrec.Recommender(epsilon=math.inf, **QUICK)
    recommender.fit(table, min_rating=3, titles=str(tmp_path / "titles.csv"))
    kept = [column[~low] for column in rows]
    same(recommender, kept)
    found = recommender.similar_items(4, k=2).to_pylist()
    assert all(each["title"] == f"Film {each['item']}" for each in found)


def test_a_matrix_holds_out_by_chance_and_not_its_last_column(rows: Any) -> None:
    users, items, _ = rows
    values = np.append(np.full(users.size, 2.5), 0.0)  # the last is stored, and no interaction
    matrix = sparse.csr_array((values, (np.append(users, 199), np.append(items, 3))))
    table = as_table(matrix, 0)
    assert sorted(zip(*(table[name].to_pylist() for name in ("user", "item")), strict=True)) == (
        sorted(zip(users.tolist(), items.tolist(), strict=True))
    )
    assert not table.equals(as_table(matrix, 1))
    split = privrec.Recommender(epsilon=math.inf, **QUICK).fit(matrix).model.split
    last = [int(split.train.history(user).max()) < item
            for user, item in enumerate(split.heldout.items.tolist())]  # fmt: skip
    assert sum(last) < USERS / 2  # by the order of columns it would be all


def test_what_is_read_from_memory_is_kept_nowhere(rows: Any, tmp_path: Path) -> None:
    """The file that it passes through is its owner's alone, and gone when it was read."""
    with stored(as_table(np.stack(rows, axis=1), 0)) as path:
        assert path.parent.stat().st_mode & 0o077 == 0
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, ("interactions of type int", "give a path")),
        (np.zeros((3, 5)), ("type ndarray", "arrays of users, items")),
        (([1, 2], [1]), ("type tuple", "give a path")),
        ({"user": [], "item": []}, ("no interactions", "at least one")),
        ({"u": [1, 2], "item": [2, 3]}, ("the table, line 1: columns 'u'", "data.user_column")),
        ({"user": [1, None], "item": [2, 3]}, ("the table, row 2", "fill it in")),
        ({"user": [1, 2], "item": [[2], [3]]}, ("the table, row 1", "column 'item'")),
        ({"user": [1, 1], "item": [2.5, 3.5]}, ("the table, row 1", "whole numbers or text")),
        ({"user": [1, 2], "item": [..., ...]}, ("type dict", "give a path")),
        ("nowhere.csv", ("nowhere.csv", "no such file")),
    ],
    ids=str,
)
def test_data_that_cannot_be_read_is_refused(data: Any, says: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        privrec.Recommender(**QUICK).fit(data)
    for part in says:
        assert part in str(caught.value)


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed": 1}, "say data__seed and run__seed"),
        ({"layers_of_cake": 1}, "there is no such key"),
        ({"privacy__cake": 1}, "privacy.cake = 1: there is no such key"),
        ({"rounds": "many"}, 'train.rounds = "many": must be a whole number'),
        ({"model": "cake"}, "model.kind"),
        ({"epsilon": -1.0}, "privacy.epsilon = -1.0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_is_made(
    settings: dict[str, Any], says: str, rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        privrec.Recommender(**{**QUICK, "folder": tmp_path / "run", **settings}).fit(rows)
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_data_or_a_model_it_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="give some, or a scenario that names it"):
        privrec.Recommender().fit()
    with pytest.raises(UsageError, match=r"call fit, or load one by privrec\.load"):
        privrec.Recommender().recommend(1)


def test_everything_that_a_scenario_says_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'name = "mine"\n[data]\nusers = 40\nitems = 20\nclusters = 2\ninteractions_per_user = 5\n'
        '[train]\nrounds = 9\n[privacy]\nnoise = "distributed"\nclip_norm = 0.5\n'
        'noise_multiplier = 2.0\n[devices]\nmin_cohort = 5\nsampling = "everybody"\n'
    )
    recommender = privrec.Recommender(
        scenario=tmp_path / "s.toml", epsilon=4, random_state=7, train__local_lr=0.5, **QUICK
    )
    ran = recommender.fit().scenario
    assert (ran.name, ran.data.source, ran.train.rounds, ran.run.seed) == (
        "mine",
        "synthetic",
        2,
        7,
    )
    assert (ran.train.local_lr, ran.model.dim, ran.model.block) == (0.5, 8, 8)
    privacy = ran.privacy
    assert (privacy.noise, privacy.clip_norm, privacy.epsilon) == ("distributed", 0.5, 4.0)
    assert privacy.noise_multiplier is None
    assert recommender.recommend(k=1).num_rows == 40


@pytest.mark.parametrize(
    ("settings", "noise", "epsilon"),
    [
        ({}, "central", 8.0),
        ({"epsilon": math.inf}, "none", None),
        ({"noise": "none"}, "none", None),
        ({"noise_multiplier": 3.0}, "central", None),
        ({"noise": "distributed", "epsilon": 4, "min_cohort": 5}, "distributed", 4.0),
    ],
    ids=str,
)
def test_the_noise_is_what_was_asked_for(
    settings: dict[str, Any], noise: str, epsilon: float | None, rows: Any
) -> None:
    privacy = privrec.Recommender(**QUICK, **settings).fit(rows).scenario.privacy
    assert (privacy.noise, privacy.epsilon) == (noise, epsilon)


def test_what_ran_is_a_file_that_runs_again(rows: Any, tmp_path: Path) -> None:
    """The kept scenario trains on the same rows from a file, but for coins of the rounding."""
    data, columns = forms(rows, tmp_path)["Arrow"]
    first = privrec.Recommender(epsilon=math.inf, **QUICK).fit(data, **columns)
    again = privrec.load_scenario(first.folder / "scenario.toml")
    assert again.hash() == first.scenario.hash()
    split_by = {"data_dir": tmp_path / "t.csv", "observer": Silent()}
    privrec.start(again, out=tmp_path / "again", **split_by)  # type: ignore[arg-type]
    loaded = privrec.load(tmp_path / "again")
    same(loaded, rows)
    np.testing.assert_allclose(weights(loaded.folder), weights(first.folder), atol=1e-3)


# --------------------------------------------------------------------------- what it gives


def test_a_fit_is_a_run_with_a_ledger_and_a_report(
    fitted: privrec.Recommender, tmp_path: Path
) -> None:
    with Ledger.open(fitted.folder / "ledger.jsonl", repair=False) as ledger:
        assert len(ledger.charges) == 30
        for adversary in ("recipients", "server"):
            assert fitted.epsilon(adversary) == ledger.epsilon(adversary, 1e-5)  # type: ignore[arg-type]
        assert fitted.epsilon(delta=1e-3) == ledger.epsilon("recipients", 1e-3)
    assert 7.5 < fitted.epsilon() <= 8
    assert fitted.report().name == "report.html"
    assert not verify(fitted.folder).mismatches
    for ending in ("html", "md", "json"):
        path = fitted.report(tmp_path / f"r.{ending}")
        assert path.read_text("utf-8") == (fitted.folder / f"report.{ending}").read_text("utf-8")
    with pytest.raises(UsageError, match=r"a report is one of \.html"):
        fitted.report(tmp_path / "r.pdf")


def test_no_noise_is_an_infinite_epsilon(rows: Any) -> None:
    free = privrec.Recommender(epsilon=math.inf, **QUICK).fit(rows)
    assert free.epsilon() == free.epsilon("server") == math.inf
    assert free.scenario.privacy.noise == "none"


def test_lists_are_those_of_the_command(fitted: privrec.Recommender, rows: Any) -> None:
    everybody = fitted.recommend(k=3)
    assert everybody.column_names == ["user", "rank", "item", "score"]
    assert everybody["user"].to_pylist() == np.repeat(np.arange(100, 100 + USERS), 3).tolist()
    own = fitted.recommend(103, k=3)
    some = fitted.recommend([103, "107"], k=3)
    assert some.slice(0, 3)["item"].equals(own["item"])
    assert own["item"].to_pylist() == everybody.slice(9, 3)["item"].to_pylist()
    history = [f"i{item}" for item in fitted.model.split.train.history(3)]
    assert len(history) == EACH - 1
    heldout = fitted.model.split.heldout
    newest = heldout.items[heldout.indptr[3]]  # owned, though the model did not learn from it
    ids = [fitted.item_ids[item] for item in (*fitted.model.split.train.history(3), newest)]
    same = fitted.recommend_history(ids, k=3)
    assert same.column_names == ["rank", "item", "score"]
    assert same["item"].to_pylist() == own["item"].to_pylist()
    found = privrec.recommend(fitted.folder, history=ids, k=3)
    assert [entry.item_id for entry in found] == same["item"].to_pylist()
    assert not set(fitted.recommend(103, k=ITEMS)["item"].to_pylist()) & {*ids}
    assert set(ids) <= set(fitted.recommend(103, k=ITEMS, filter_seen=False)["item"].to_pylist())


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda r: r.recommend(7), "user '7': the data set has no such user"),
        (lambda r: r.recommend([]), "no user is named"),
        (lambda r: r.recommend(101, k=0), "k = 0: must be at least 1"),
        (lambda r: r.recommend_history("i1"), r"as in \['i1'\]"),
        (lambda r: r.recommend_history([]), "the history is empty"),
        (lambda r: r.recommend_history(["i99"]), "item 'i99': the data set has no such item"),
        (lambda r: r.score(101, ["i99"]), "item 'i99'"),
        (lambda r: r.fit({"user": [1, 2], "item": [1, 2]}), "not empty"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    ask: Any, says: str, fitted: privrec.Recommender
) -> None:
    with pytest.raises(UsageError, match=says):
        ask(fitted)


def test_arrays_are_masked_where_a_list_is_short(fitted: privrec.Recommender) -> None:
    items, scores = fitted.recommend(k=3, form="arrays")
    assert items.shape == scores.shape == (USERS, 3)
    assert not isinstance(items, np.ma.MaskedArray)
    assert (np.diff(scores, axis=1) <= 0).all()
    items, scores = fitted.recommend([101, 102], k=ITEMS, form="arrays")
    assert items.mask.sum(axis=1).tolist() == scores.mask.sum(axis=1).tolist() == [EACH] * 2
    with pytest.raises(UsageError, match="form = 'excel'"):
        fitted.recommend(101, form="excel")  # type: ignore[arg-type]


def test_scores_are_products_of_vectors(fitted: privrec.Recommender) -> None:
    scores = fitted.score([101, 105])
    assert scores.shape == (2, ITEMS)
    picked = fitted.score(105, ["i3", "i7"])
    rows = [fitted.item_ids.tolist().index(name) for name in ("i3", "i7")]
    np.testing.assert_allclose(picked[0], scores[1, rows], rtol=1e-4, atol=1e-5)
    ids = [fitted.item_ids[item] for item in fitted.model.split.train.history(5)]
    own = fitted.item_vectors @ fitted.fold_in(ids) + fitted.item_biases
    np.testing.assert_allclose(own - own.mean(), scores[1] - scores[1].mean(), rtol=1e-3, atol=1e-4)


def test_similar_items_are_ranked_by_their_cosine(fitted: privrec.Recommender) -> None:
    found = fitted.similar_items("i4", k=5)
    assert found["rank"].to_pylist() == [1, 2, 3, 4, 5]
    names, cosines = fitted.similar_items("i4", k=5, form="arrays")
    assert found["item"].to_pylist() == names.tolist()
    assert found["score"].to_pylist() == pytest.approx(cosines.tolist())
    assert "i4" not in names
    with pytest.raises(UnknownIdError, match="item 'i99'"):
        fitted.similar_items("i99")


def test_metrics_stand_beside_those_of_popularity(fitted: privrec.Recommender, rows: Any) -> None:
    held = fitted.evaluate()
    assert held["model"] == fitted.result["metrics"]
    assert set(held) == {"model", "popularity"}
    split = fitted.model.split
    test = (
        split.train.user_ids[split.heldout.users],
        [str(fitted.item_ids[item]) for item in split.heldout.items],
    )
    again = fitted.evaluate(test, k=(5, 10))
    assert again["model"]["full_hr@10"] == pytest.approx(held["model"]["full_hr@10"], abs=0.04)
    assert again["popularity"]["full_ndcg@10"] == held["popularity"]["full_ndcg@10"]
    assert 0 <= again["model"]["full_hr@5"] <= again["model"]["full_hr@10"]
    train = (split.train.user_ids[:1], [str(fitted.item_ids[split.train.items[0]])])
    with pytest.raises(DataError, match="1 interactions of the test were trained on"):
        fitted.evaluate(train)
    with pytest.raises(UnknownIdError, match="user '7'"):
        fitted.evaluate(([7], ["i1"]))


def test_what_is_saved_serves_by_itself(fitted: privrec.Recommender, tmp_path: Path) -> None:
    assert fitted.save(tmp_path / "kept") == tmp_path / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIVREC_STATE", str(tmp_path / "another machine"))
        patch.chdir(tmp_path)
        loaded = privrec.load("kept")
        liked = ["i1", "i3"]
        assert loaded.recommend_history(liked).equals(fitted.recommend_history(liked))
        assert loaded.epsilon() == fitted.epsilon()
        assert loaded.result == fitted.result
        with pytest.raises(DataError, match="no table"):
            loaded.recommend(101)
    with pytest.raises(UsageError, match="not empty"):
        fitted.save(tmp_path / "kept")
    (tmp_path / "kept" / "result.json").write_text(
        json.dumps({**json.loads((tmp_path / "kept" / "result.json").read_text()), "rounds": 99})
    )
    with pytest.raises(PrivrecError, match="not signed with the key of this run"):
        _ = privrec.load(tmp_path / "kept").result


def test_a_folder_says_nothing_of_who_was_there(fitted: privrec.Recommender) -> None:
    """Neither ids of users nor anybody's history: items alone, each once."""
    for path in fitted.folder.iterdir():
        content = path.read_bytes()
        for user in range(100, 100 + USERS):
            for spelling in (
                f'"{user}"'.encode(),
                np.int64(user).tobytes() + np.int64(user + 1).tobytes(),
            ):
                assert spelling not in content, path.name
    assert not [name for name in os.listdir(fitted.folder) if "checkpoint" in name]


def test_a_temporary_folder_goes_with_its_recommender(rows: Any) -> None:
    recommender = privrec.Recommender(epsilon=math.inf, **QUICK).fit(rows)
    folder = recommender.folder
    assert folder.is_dir()
    del recommender
    assert not folder.exists()


def test_a_fit_that_was_stopped_is_gone_on_with(rows: Any, tmp_path: Path) -> None:
    """Its temporary folder stays, and the recommender says where."""

    class Stopping(Observer):
        def round(self, record: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    path = tmp_path / "rows.csv"
    pyarrow.csv.write_csv(pyarrow.table({"user": rows[0], "item": rows[1]}), path)
    recommender = privrec.Recommender(epsilon=math.inf, **{**QUICK, "progress": Stopping()})
    with pytest.raises(Interrupted, match="go on with: privrec resume") as stopped:
        recommender.fit(path)
    folder = recommender.folder
    assert str(folder) in str(stopped.value)
    del recommender
    assert privrec.resume(folder).payload["rounds"] == 2
    assert privrec.load(folder).recommend(101, k=1).num_rows == 1
    shutil.rmtree(folder.parent)


def test_a_budget_that_runs_out_leaves_the_model(rows: Any, tmp_path: Path) -> None:
    """As many rounds as it pays for, and the error that says so."""
    recommender = privrec.Recommender(epsilon=8, folder=tmp_path / "run", **QUICK)
    first = recommender.fit(rows).scenario.privacy
    settings = {"privacy.epsilon": None, "privacy.noise_multiplier": None, "train.rounds": 4}
    assert first.epsilon == 8
    half = recommender.scenario.with_settings(settings | {"privacy.epsilon": 8.0})
    stopped = privrec.Recommender(scenario=half, **{**QUICK, "rounds": 4})
    with pytest.MonkeyPatch.context() as patch:
        spent = loop.epsilon
        patch.setattr(loop, "epsilon", lambda counts, *words: (
            math.inf if sum(counts.values()) > 2 else spent(counts, *words)
        ))  # fmt: skip
        with pytest.raises(BudgetError, match="Stopped after 2 rounds"):
            stopped.fit(rows)
    assert stopped.result["rounds"] == 2
    assert stopped.recommend(101, k=1).num_rows == 1


def test_progress_is_shown_or_watched(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    privrec.Recommender(epsilon=math.inf, **{**QUICK, "progress": True}).fit(rows)
    said = capsys.readouterr()
    assert said.err.startswith("Simulated run: recommender")
    assert "round 2/2" in said.err
    assert not said.out
    privrec.Recommender(epsilon=math.inf, **QUICK).fit(rows)
    assert capsys.readouterr() == ("", "")
