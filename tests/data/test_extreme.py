from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from privrec.data.synthetic import Invented
from privrec.data.texts import read_extreme
from privrec.errors import DataError

GOOD = "3 10 5\n1,4 0:0.5 7:1.25\n 2:1\n0 \n"
WORLD = Invented(2000, 500, words=20, labels_each=4, clusters=50)


def written(folder: Path, text: str) -> Path:
    path = folder / "data.txt"
    path.write_bytes(text.encode())
    return path


def test_the_format_of_the_repository(tmp_path: Path) -> None:
    found = read_extreme(written(tmp_path, GOOD))
    assert (len(found), found.n_features, found.n_labels) == (3, 10, 5)
    assert found.ends.tolist() == [2, 3, 3]
    assert found.features.tolist() == [0, 7, 2]
    assert found.values.tolist() == [0.5, 1.25, 1.0]
    assert found.padded_labels().tolist() == [[1, 4], [-1, -1], [0, -1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("1 10 5\n1 18446744073709551615:1\n", "line 2: feature 18446744073709551615.*0 to 9"),
        ("1 10 5\n1 0:1e39\n", "line 2.*finite"),
        ("1 10 5\n1 0:1_0\n", "line 2.*index:value"),
        ("1 1_0 5\n1 0:1\n", "line 1"),
        ("3 10\n", "line 1"),
        ("2 10 5\n1 0:1\n", "1 examples.*promises 2"),
        ("1 10 5\n1 0:1:2\n", "line 2"),
        ("1 10 5\nx 0:1\n", "line 2"),
        ("1 10 5\n1 10:1\n", "line 2: feature 10"),
        ("1 10 5\n5 0:1\n", "line 2: label 5"),
        ("1 10 5\n-1 0:1\n", "line 2: label -1"),
        ("1 10 5\n1 0:nan\n", "line 2.*finite"),
    ],
)
def test_bad_lines_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_extreme(written(tmp_path, text))


@pytest.mark.parametrize("text", ["\ufeff" + GOOD, GOOD + "\n\n", GOOD.replace("\n", "\r\n")])
def test_a_mark_blank_lines_and_windows_ends_do_no_harm(text: str, tmp_path: Path) -> None:
    packed = tmp_path / "data.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (written(tmp_path, text), packed):
        assert read_extreme(path).values.tolist() == [0.5, 1.25, 1.0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.txt: cannot be read"):
        read_extreme(tmp_path / "nowhere.txt")


def test_taking_rows_and_batches_keeps_examples_whole(tmp_path: Path) -> None:
    found = read_extreme(written(tmp_path, GOOD))
    turned = found.take(np.array([2, 0]))
    assert turned.features.tolist() == [0, 7]
    assert turned.ends.tolist() == [0, 2]
    assert turned.padded_labels().tolist() == [[0, -1], [1, 4]]
    parts = list(found.batches(2, np.array([1, 2, 0])))
    assert [len(part) for part in parts] == [2, 1]
    assert parts[1].labels.tolist() == [1, 4]


def test_invented_examples_repeat_and_parts_differ() -> None:
    first, again, other = (WORLD.examples(50, part) for part in ("train", "train", "test"))
    assert first.features.tolist() == again.features.tolist()
    assert first.labels.tolist() == again.labels.tolist()
    assert first.features.tolist() != other.features.tolist()


def test_invented_labels_lie_in_clusters_by_zipfs_law() -> None:
    found = WORLD.examples(20_000)
    counts = np.diff(found.label_ends, prepend=0)
    rows = np.repeat(np.arange(len(found)), counts)
    clusters = found.labels % WORLD.clusters
    first = clusters[found.label_ends - counts]
    assert (clusters == first[rows]).all()
    assert 0.5 * WORLD.labels_each < counts.mean() <= WORLD.labels_each


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.4])
def test_frequencies_follow_zipfs_law(exponent: float) -> None:
    found = Invented(10, 5000, words=1, clusters=1, zipf=exponent).examples(200_000)
    often = np.bincount(found.labels, minlength=5000)
    ranks = np.arange(5, 200)
    slope = np.polyfit(np.log(ranks + 1.5), np.log(often[ranks]), 1)[0]
    assert abs(slope + exponent) < 0.1


def test_words_tell_labels() -> None:
    """Examples of one label share words that others do not have."""
    found = WORLD.examples(4000)
    words = found.features.reshape(len(found), -1)
    single = np.diff(found.label_ends, prepend=0) == 1
    labels = found.labels[found.label_ends[single] - 1]
    own = words[single][labels == 0].ravel()
    most = np.bincount(own, minlength=2000).argsort()[::-1][:12]
    rest = words[single][(labels % WORLD.clusters) != 0].ravel()
    assert np.isin(own, most).mean() > 3 * np.isin(rest, most).mean()


def test_hashing_features_down_keeps_values_and_labels() -> None:
    found = WORLD.examples(30)
    small = found.hashed(64)
    assert small.n_features == 64
    assert small.features.max() < 64
    assert small.values.tolist() == found.values.tolist()
    same = found.features == found.features[0]
    assert len(set(small.features[same].tolist())) == 1
