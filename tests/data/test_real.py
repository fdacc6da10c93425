"""The real data sets, where they are: sizes as published, and figures that others have measured."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data_of import data_of

from privrec import data
from privrec.data.interactions import Holdout, Split, position_of
from privrec.evaluate.metrics import evaluate, popularity_scores

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PRIVREC_DATA") or ROOT.parent / "shared" / "data")


def load(source: str, folder: str, file: str, holdout: Holdout = "test") -> Split:
    if not (DATA / folder / file).is_file():
        pytest.skip(f"{folder} is not in {DATA}; set PRIVREC_DATA")
    return data.load(data_of(source, holdout=holdout), data_dir=DATA / folder)


def test_movielens_100k() -> None:
    split = load("ml-100k", "ml-100k", "u.data")
    train = split.train
    assert (train.n_users, train.n_items, train.size + split.heldout.size) == (943, 1682, 100_000)
    assert train.titles is not None
    assert train.titles[position_of(1, train.item_ids, "item")] == "Toy Story (1995)"
    assert train.times is not None
    for user in (0, 500):
        assert (np.diff(train.times[train.indptr[user] : train.indptr[user + 1]]) >= 0).all()


def test_movielens_1m_of_the_ncf_paper() -> None:
    split = load("ml-1m", "ml-1m", "ml-1m.train.rating")
    train = split.train
    assert (train.n_users, train.n_items, train.size) == (6040, 3706, 994_171)
    assert split.heldout.counts.tolist() == [1] * 6040
    assert not train.contains(np.arange(6040), split.heldout.items).any()
    assert train.titles is not None
    assert (
        train.titles[position_of(1193, train.item_ids, "item")]
        == "One Flew Over the Cuckoo's Nest (1975)"
    )
    assert position_of("6040", train.user_ids, "user") == 6039
    assert split.negatives is not None
    # Some published candidates are the user's own test item; the metric leaves them out.
    own = train.contains(np.arange(6040)[:, None], split.negatives)
    assert (own | (split.negatives == split.heldout.items[:, None])).sum() == 156


def test_popularity_on_movielens_1m_is_as_measured_elsewhere() -> None:
    split = load("ml-1m", "ml-1m", "ml-1m.train.rating")
    found = evaluate(popularity_scores(split.train), split, seed=0, protocols=("sampled",))
    summary = found.summary()
    assert summary["hr@10"] == pytest.approx(0.452, abs=0.003)
    assert summary["ndcg@10"] == pytest.approx(0.253, abs=0.003)


def test_validation_of_movielens_1m_keeps_clear_of_the_test() -> None:
    test = load("ml-1m", "ml-1m", "ml-1m.train.rating")
    valid = load("ml-1m", "ml-1m", "ml-1m.train.rating", "validation")
    assert valid.train.size == test.train.size - 6040
    everyone = np.arange(6040)
    assert not valid.train.contains(everyone, test.heldout.items).any()
    assert not (valid.heldout.items == test.heldout.items).any()
    assert not valid.train.contains(everyone, valid.heldout.items).any()
    assert valid.negatives is None


def test_gowalla() -> None:
    split = load("lightgcn", "gowalla", "train.txt")
    sizes = (split.train.n_users, split.train.n_items, split.train.size, split.heldout.size)
    assert sizes == (29_858, 40_981, 810_128, 217_242)
    valid = load("lightgcn", "gowalla", "train.txt", "validation")
    assert valid.train.size + valid.heldout.size == 810_128
    assert valid.heldout.size == pytest.approx(81_013, rel=0.02)


def test_goodreads() -> None:
    split = load("lightgcn", "goodreads-100", "train.txt")
    sizes = (split.train.n_users, split.train.n_items, split.train.size, split.heldout.size)
    assert sizes == (99, 359_014, 482_745, 206_869)
