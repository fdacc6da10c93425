"""Public features of items: what films are, and where they stand in the order of popularity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_of import data_of

from privrec import data
from privrec.data import item_features
from privrec.errors import DataError

GENRES = ("Drama", "Comedy|Drama", "")
TITLES = {10: "One (1990)", 20: "Two (2001)", 30: "Three"}
FLAGS = {"Drama": 8, "Comedy": 5}


def publish(folder: Path, source: str, *, titled: bool = True) -> None:
    ratings = [(1, 10), (1, 20), (2, 20), (2, 30), (2, 10)]
    mark = "\t" if source == "ml-100k" else "::" if source == "ml-1m" else ","
    lines = [mark.join(map(str, (user, item, 3, at))) for at, (user, item) in enumerate(ratings)]
    if source == "ml-20m":
        lines.insert(0, "userId,movieId,rating,timestamp")
    name = {"ml-100k": "u.data", "ml-1m": "ratings.dat", "ml-20m": "ratings.csv"}[source]
    (folder / name).write_text("\n".join(lines) + "\n")
    if not titled:
        return
    films = []
    for (item, title), genres in zip(TITLES.items(), GENRES, strict=True):
        if source == "ml-100k":
            flags = ["0"] * 19
            for genre in filter(None, genres.split("|")):
                flags[FLAGS[genre]] = "1"
            films.append("|".join([str(item), title, "01-Jan-1995", "", "", *flags]))
        else:
            films.append(mark.join((str(item), title, genres)))
    if source == "ml-20m":
        films.insert(0, "movieId,title,genres")
    name = {"ml-100k": "u.item", "ml-1m": "movies.dat", "ml-20m": "movies.csv"}[source]
    (folder / name).write_text("\n".join(films) + "\n")


@pytest.mark.parametrize("source", ["ml-100k", "ml-1m", "ml-20m"])
def test_genres_and_years_are_read_from_each_layout(source: str, tmp_path: Path) -> None:
    publish(tmp_path, source)
    split = data.load(data_of(source, item_features=True), data_dir=tmp_path)
    genres = item_features.of_categories(GENRES)
    years = item_features.of_numbers(np.array([1990, 2001, np.nan]))
    numbers = item_features.of_numbers(np.array([10.0, 20, 30]))
    expected = item_features.together([genres, years, np.float32(0.7) * numbers])
    assert split.train.item_ids.tolist() == [10, 20, 30]
    np.testing.assert_allclose(split.train.features, expected, atol=1e-6)
    assert data.load(data_of(source), data_dir=tmp_path).train.features is None
    turned = split.renumbered(np.array([2, 0, 1]))
    np.testing.assert_array_equal(turned.train.features, split.train.features[[2, 0, 1]])


def test_without_the_file_that_has_them_nothing_is_guessed(tmp_path: Path) -> None:
    publish(tmp_path, "ml-1m", titled=False)
    with pytest.raises(DataError, match=r"data\.item_features = true reads genres"):
        data.load(data_of("ml-1m", item_features=True), data_dir=tmp_path)


def test_rare_categories_weigh_more_and_rows_have_a_norm_of_one() -> None:
    rows = item_features.of_categories(["a|b", "a", "a|c", ""])
    assert rows.shape == (4, 3)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 0], atol=1e-6)
    assert rows[0, 1] > rows[0, 0] > 0
    assert rows[0, 2] == rows[1, 1] == 0


def test_bumps_follow_a_number_and_know_nothing_of_what_is_missing() -> None:
    years = np.array([1920.0, 1950, 1980, 1990, 1995, 1996, 1997, 1999, 2000, np.nan])
    rows = item_features.of_numbers(years)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1] * 9 + [0], atol=1e-6)
    near, far = rows[4] @ rows[5], rows[4] @ rows[0]
    assert near > 0.8 > far
    assert item_features.of_numbers(np.full(3, np.nan)).shape == (3, 0)
    assert item_features.of_numbers(np.full(3, 7.0)).shape == (3, 0)


def test_groups_and_their_products_keep_the_angles_between_items() -> None:
    rng = np.random.default_rng(0)
    one, other, third = (rng.normal(size=(300, width)).astype(np.float32) for width in (3, 4, 2))
    rows = item_features.together([one, other, third])
    assert rows.shape == (300, 3 + 4 + 2 + 3 * 4 + 4 * 2)
    assert rows.dtype == np.float32
    kept = [part - part.mean(0) for part in (one, other, third)]
    angles = [part @ part.T for part in kept]
    around = np.eye(300) - 1 / 300
    products = angles[0] * angles[1] + angles[1] * angles[2]
    np.testing.assert_allclose(rows @ rows.T, sum(angles) + around @ products @ around, atol=1e-2)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
    lengths = np.linalg.norm(rows, axis=0)
    assert (np.diff(lengths) <= 0).all()
    assert (rows.max(0) >= -rows.min(0)).all()


def test_of_many_columns_those_that_tell_items_apart_stay() -> None:
    rng = np.random.default_rng(0)
    wide = [rng.normal(size=(500, 9)).astype(np.float32) for _ in range(2)]
    wide[0][:, 0] *= 30
    rows = item_features.together(wide)
    assert rows.shape == (500, 64)
    assert np.linalg.norm(rows[:, 0]) > 3 * np.linalg.norm(rows[:, 63])
    nothing = item_features.together([np.ones((5, 2), np.float32)])
    assert nothing.shape == (5, 0)


def test_ranks_that_are_near_are_alike() -> None:
    ranks = item_features.of_ranks(500)
    assert ranks[0] @ ranks[1] > ranks[0] @ ranks[400]
    np.testing.assert_allclose(item_features.centred(ranks).mean(0), 0, atol=1e-6)
