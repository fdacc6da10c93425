"""Articles become devices, words become numbers, and nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_of import data_of
from small_runs import make_scenario

from privrec.data import load_texts
from privrec.data.corpus import UNKNOWN, Corpus, split_devices
from privrec.data.texts import EMBEDDED, END, read_articles
from privrec.errors import DataError, ScenarioError
from privrec.scenario.schema import Data

TWO = " = First one = \n\n the cat sat \n\n = = Part = = \n\n the dog \n = Second = \n the cat \n"


def config(source: str = "text", **changes: Any) -> Data:
    plain = {"users": 18, "items": 64, "clusters": 2, "interactions_per_user": 50, "seed": 3}
    return data_of(source, **{**(plain if source == "synthetic_text" else {}), **changes})


def write(folder: Path, text: str, name: str = "one.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def spelled(corpus: Corpus, device: int) -> list[str]:
    tokens = corpus.history(device)
    return [corpus.words[token] for token in tokens]


def test_titles_open_articles_and_headings_do_not(tmp_path: Path) -> None:
    corpus = read_articles([write(tmp_path, TWO)])
    assert corpus.names == ("First one", "Second")
    first = "= First one = <eos> the cat sat <eos> = = Part = = <eos> the dog <eos>"
    assert " ".join(spelled(corpus, 0)) == first
    assert spelled(corpus, 1) == ["=", "Second", "=", END, "the", "cat", END]
    assert corpus.words[0] == UNKNOWN
    assert corpus.item_counts().sum() == len(corpus.items)


def test_a_file_without_titles_is_one_article_by_the_name_of_the_file(tmp_path: Path) -> None:
    corpus = read_articles([write(tmp_path, "a b\nc\n", "letter.txt")])
    assert corpus.names == ("letter",)
    assert spelled(corpus, 0) == ["a", "b", END, "c", END]


def test_a_list_of_words_is_the_vocabulary_whatever_the_text_says(tmp_path: Path) -> None:
    corpus = read_articles([write(tmp_path, "the cat sat\n")], ["cat", "cow"])
    assert corpus.words == (UNKNOWN, END, "cat", "cow")
    assert spelled(corpus, 0) == [UNKNOWN, "cat", UNKNOWN, END]


def test_bad_texts_are_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good\nb\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt, line 2.*UTF-8"):
        read_articles([path])
    with pytest.raises(DataError, match="the file is empty"):
        read_articles([write(tmp_path, "\n\n")])
    with pytest.raises(DataError, match=r"no \.txt there"):
        load_texts(config(path="nothing"), data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match="2 articles"):
        load_texts(config(), data_dir=write(tmp_path, TWO))


def test_no_article_is_on_both_sides_and_validation_never_sees_the_test() -> None:
    corpus = read_articles([EMBEDDED])
    test, validation = (split_devices(corpus, h, "") for h in ("test", "validation"))
    assert not set(test.train.names) & set(test.heldout.names)
    assert set(test.train.names) | set(test.heldout.names) == set(corpus.names)
    left = {*validation.train.names, *validation.heldout.names}
    assert left.isdisjoint(test.heldout.names)
    assert len(left) + test.heldout.n_users == corpus.n_users
    assert set(validation.heldout.names) <= set(test.train.names)


def test_a_vocabulary_is_a_prefix_of_the_order_and_the_rest_is_unknown(tmp_path: Path) -> None:
    corpus = read_articles([write(tmp_path, "b b b a a c\n")])
    order = np.array([corpus.words.index(word) for word in (UNKNOWN, "b", "a", END, "c")])
    small = corpus.renumbered(order, 3)
    assert small.words == (UNKNOWN, "b", "a")
    assert small.items.tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert corpus.renumbered(order).items.tolist() == [1, 1, 1, 2, 2, 4, 3]


def test_distinct_words_are_what_a_loop_finds() -> None:
    corpus = read_articles([EMBEDDED])
    distinct = corpus.distinct
    for device in range(corpus.n_users):
        tokens = corpus.history(device)
        assert distinct.history(device).tolist() == sorted(set(tokens.tolist()))
    assert distinct.n_items == corpus.n_items


def test_the_embedded_text_needs_no_file_and_a_folder_above_is_searched(tmp_path: Path) -> None:
    assert load_texts(config()).source == "embedded"
    inner = tmp_path / "wikitext-2"
    inner.mkdir()
    write(inner, "\n".join(f" = T{i} = \n a b c" for i in range(12)))
    split = load_texts(config(), data_dir=tmp_path)
    assert (split.train.n_users, split.heldout.n_users, split.source) == (11, 1, "wikitext-2")
    assert split.describe()["users"] == 11


def test_synthetic_texts_repeat_and_differ_by_seed() -> None:
    sizes = {"users": 5, "items": 100, "clusters": 2, "interactions_per_user": 40}
    first, again, other = (
        load_texts(config("synthetic_text", **(sizes | {"seed": seed}))).train for seed in (1, 1, 2)
    )
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)
    assert first.counts.tolist() == [40] * 5
    assert first.items.min() >= 1  # no word of a synthetic text is unknown
    assert first.items.max() < 100


def test_synthetic_words_follow_each_other_and_are_of_a_power_law() -> None:
    sizes = {"users": 40, "items": 1000, "clusters": 4, "interactions_per_user": 1000}
    corpus = load_texts(config("synthetic_text", **sizes)).train
    counts = np.sort(corpus.item_counts())[::-1]
    assert counts[:10].sum() > 5 * counts[100:110].sum()
    pairs = corpus.items[:-1].astype(np.int64) * 1000 + corpus.items[1:]
    most = np.argmax(corpus.item_counts())
    after = np.bincount(pairs[corpus.items[:-1] == most] % 1000, minlength=1000)
    # The first follower alone has a chance of 0.6 * 0.5; no word has that by itself.
    assert 0.25 < after.max() / after.sum() < 0.65


def test_a_synthetic_split_has_the_users_that_were_asked_for() -> None:
    test, validation = (
        load_texts(config(source="synthetic_text", holdout=h)) for h in ("test", "validation")
    )
    assert test.train.n_users == validation.train.n_users == 18
    assert not set(test.heldout.names) & set(validation.heldout.names)
    assert np.array_equal(test.train.items, validation.train.items)


def test_impossible_synthetic_texts_are_refused() -> None:
    text = 'name = "plain"\n[privacy]\nnoise = "none"\n'
    good = "data.source=synthetic_text", "data.items=100", "data.clusters=2"
    for change, found in (
        ("data.clusters=9", "clusters = 9"),
        ("data.items=15", "clusters = 2"),
        ("data.interactions_per_user=1", "interactions_per_user = 1"),
    ):
        with pytest.raises(ScenarioError, match=rf"- data\.{found}: must"):
            make_scenario(text, *good, change)
