"""Labelled examples as tokens of devices: nothing is lost but what is meant to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_of import data_of

from privrec.data import load_texts
from privrec.data.corpus import Examples, dealt, examples_in
from privrec.data.synthetic import Invented
from privrec.errors import DataError
from privrec.scenario.schema import Data

WORLD = Invented(50, 40, words=6, labels_each=3, clusters=8)
FILE = "30 5 4\n" + "".join(
    f"{n % 4},{(n + 1) % 4} {n % 5}:1.0 {(n + 2) % 5}:0.5\n" for n in range(30)
)


def parts(examples: Examples) -> list[tuple[list[int], list[int]]]:
    """Words and labels of each example."""
    words = np.split(examples.features, examples.ends[:-1])
    labels = np.split(examples.labels, examples.label_ends[:-1])
    return [(w.tolist(), n.tolist()) for w, n in zip(words, labels, strict=True)]


def config(source: str = "synthetic_labels", **settings: object) -> Data:
    synthetic = {"clusters": 4} if source == "synthetic_labels" else {}
    return data_of(source, **{**synthetic, **settings})


def test_examples_come_back_from_their_devices() -> None:
    examples = WORLD.examples(20)
    corpus = dealt(examples, 4)
    assert corpus.n_users == 5
    found = []
    for device in range(5):
        tokens = corpus.history(device)
        found += parts(examples_in(tokens))
    wanted = [(words, [label + 1 for label in labels]) for words, labels in parts(examples)]
    assert found == wanted


def test_what_is_no_whole_share_of_a_device_is_left_out() -> None:
    corpus = dealt(WORLD.examples(11), 4)
    assert corpus.n_users == 2
    assert len(examples_in(corpus.items)) == 8


def test_a_word_weighs_with_the_root_of_its_example() -> None:
    found = examples_in(np.array([-1, -5, -3, -4, 7, 2, -9, 3], np.int32))
    assert parts(found) == [([0, 4, 2, 3], [7, 2]), ([8], [3])]
    np.testing.assert_allclose(found.values, [0.5, 0.5, 0.5, 0.5, 1.0])


def test_unknown_labels_are_no_labels_and_an_example_may_have_none() -> None:
    found = examples_in(np.array([-1, 0, 4, -2, 0, -3], np.int32))
    assert parts(found) == [([0], [4]), ([1], []), ([2], [])]


def test_no_word_is_one_empty_example() -> None:
    for tokens in ([], [0], [3, 4]):
        assert parts(examples_in(np.array(tokens, np.int32))) == [([], [])]


def test_only_labels_are_counted_and_numbered_anew() -> None:
    corpus = dealt(WORLD.examples(40), 10)
    counts = corpus.item_counts()
    labels = corpus.items[corpus.items >= 0]
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=41))
    order = np.concatenate(([0], 1 + np.argsort(-counts[1:], kind="stable")))
    new = corpus.renumbered(order, 10)
    words = corpus.items < 0
    np.testing.assert_array_equal(new.items[words], corpus.items[words])
    assert new.items.max() == 9
    assert (np.diff(new.item_counts()[1:]) <= 0).all()
    distinct = corpus.distinct
    own = corpus.history(1)
    assert set(distinct.items[distinct.indptr[1] : distinct.indptr[2]]) == set(own[own >= 0])


@pytest.mark.parametrize("holdout", ["test", "validation"])
def test_synthetic_devices_are_as_many_as_asked_and_others_are_held_out(holdout: str) -> None:
    split = load_texts(config(users=30, items=65, interactions_per_user=5, holdout=holdout))
    assert (split.train.n_users, split.heldout.n_users, split.n_items) == (30, 3, 65)
    assert len(examples_in(split.heldout.items)) == 15
    assert not set(split.train.names) & set(split.heldout.names)


def test_test_and_validation_devices_train_alike_and_are_others() -> None:
    test, validation = (
        load_texts(config(users=30, items=65, interactions_per_user=5, holdout=each))
        for each in ("test", "validation")
    )
    np.testing.assert_array_equal(test.train.items, validation.train.items)
    assert not set(test.heldout.names) & set(validation.heldout.names)


def test_a_file_of_the_repository_is_dealt_to_devices(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(FILE)
    settings = config(source="labels", interactions_per_user=3)
    split = load_texts(settings, data_dir=tmp_path)
    assert (split.train.n_users, split.heldout.n_users) == (9, 1)
    assert split.source == "train"
    assert split.n_items == 5
    named = load_texts(config(source="labels", path="train.txt", interactions_per_user=3),
                        data_dir=tmp_path)  # fmt: skip
    np.testing.assert_array_equal(named.train.items, split.train.items)


def test_examples_without_words_or_labels_are_left_out_and_a_label_counts_once(
    tmp_path: Path,
) -> None:
    lines = ["1,1 0:1.0", " 2:1.0", "2 ", "3,0,3 1:1.0 4:1.0"] * 20
    (tmp_path / "train.txt").write_text("\n".join(["80 5 4", *lines]) + "\n")
    split = load_texts(config(source="labels", interactions_per_user=4), data_dir=tmp_path)
    for device in range(split.train.n_users):
        tokens = split.train.history(device)
        found = parts(examples_in(tokens))
        assert len(found) == 4
        assert all(each in (([0], [2]), ([1, 4], [1, 4])) for each in found)


def test_a_vocabulary_keeps_the_commonest_labels() -> None:
    split = load_texts(config(users=30, items=65, interactions_per_user=5, vocabulary=10))
    assert split.n_items == 10
    order = np.argsort(-split.train.item_counts(), kind="stable")
    kept = split.renumbered(np.concatenate(([0], order[order != 0])))
    assert kept.train.n_items == 10
    assert examples_in(kept.train.items).labels.max() == 9


def test_facts_count_labels_and_no_words() -> None:
    split = load_texts(config(users=30, items=65, interactions_per_user=5, labels_each=2))
    facts = split.describe()
    assert facts["interactions"] == (split.train.items >= 0).sum() < split.train.items.size / 10
    assert facts["shortest_history"] >= 5


def test_few_examples_and_no_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one file of the Extreme"):
        load_texts(config(source="labels"), data_dir=tmp_path)
    with pytest.raises(DataError, match=r"data\.path"):
        load_texts(config(source="labels"))
    (tmp_path / "train.txt").write_text(FILE)
    with pytest.raises(DataError, match=r"30 examples.*lower data\.interactions_per_user"):
        load_texts(config(source="labels", interactions_per_user=4), data_dir=tmp_path)
