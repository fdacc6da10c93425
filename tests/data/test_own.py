"""A table of somebody's own, as it is in the world: repeats, ratings, dates, separators, titles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_of import form

from privrec import data
from privrec.data.interactions import Interactions
from privrec.data.own import read_table
from privrec.errors import DataError


def table(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def histories(read: Interactions) -> dict[Any, list[Any]]:
    names, items = read.user_ids.tolist(), read.item_ids
    return {name: items[read.history(at)].tolist() for at, name in enumerate(names)}


# ------------------------------------------------------------------------ what is left out


REPEATS = "user,item,t\n1,5,9\n1,6,2\n1,5,1\n1,7,3\n"


@pytest.mark.parametrize(("kept", "order"), [("first", [5, 6, 7]), ("last", [6, 7, 5])])
def test_one_of_each_repeated_pair_is_kept_and_the_others_counted(
    kept: str, order: list[int], tmp_path: Path
) -> None:
    read = read_table(table(tmp_path, REPEATS), form(time="t", duplicates=kept))
    assert histories(read) == {1: order}
    assert read.facts["repeats_left_out"] == 1


def test_the_first_of_a_pair_is_kept_unless_told_and_refused_where_told(tmp_path: Path) -> None:
    path = table(tmp_path, REPEATS)
    assert histories(read_table(path, form(time="t"))) == {1: [5, 6, 7]}
    with pytest.raises(DataError, match=r"t.csv, line 4: user 1, item 5 .*t.csv, line 2.*first"):
        read_table(path, form(time="t", duplicates="refuse"))
    split = data.load(form(time="t"), data_dir=path)
    assert split.describe()["repeats_left_out"] == 1


RATED = "user,item,rating\n1,5,2.5\n1,6,4\n2,5,5\n2,5,1\n2,7, 3.99 \n"


def test_rows_below_the_least_rating_are_left_out_before_repeats_are(tmp_path: Path) -> None:
    path = table(tmp_path, RATED)
    read = read_table(path, form(min_rating=4))
    assert histories(read) == {1: [6], 2: [5]}
    left_out = {key: value for key, value in read.facts.items() if "left_out" in key}
    assert left_out == {"low_ratings_left_out": 3, "repeats_left_out": 0}
    assert read.item_ids.tolist() == [5, 6]
    pyarrow.parquet.write_table(
        pyarrow.table({"user": [1, 2], "item": [5, 6], "rating": [4.0, 3.5]}), tmp_path / "t.pq"
    )
    assert histories(read_table(tmp_path / "t.pq", form(min_rating=4.0))) == {1: [5]}


@pytest.mark.parametrize(
    ("text", "keys", "says"),
    [
        (RATED, {"min_rating": 6.0}, "t.csv: column 'rating'; no row has at least .* = 6"),
        (RATED, {"min_rating": 4.0, "rating_column": "stars"}, "'stars' is not among"),
        ("user,item,rating\n1,5,4\n1,6,good\n", {"min_rating": 4.0}, "line 3: rating 'good'"),
        ("user,item,rating\n1,5,4\n1,6,inf\n", {"min_rating": 4.0}, "line 3: rating 'inf'"),
        ("user,item,rating\n1,5,4\n1,6,\n", {"min_rating": 4.0}, "line 3: column 'rating' is empt"),
        (RATED, {"min_rating": 4.0, "rating_column": "item"}, "different columns"),
    ],
)
def test_a_rating_that_is_none_is_refused_with_its_line(
    text: str, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=says):
        read_table(table(tmp_path, text), form(**keys))


def test_rows_keep_their_lines_when_others_are_left_out(tmp_path: Path) -> None:
    text = "user,item,rating\n1,5,1\n1,5,4\n2,5,1\n1,5,5\n"
    with pytest.raises(DataError, match="line 5: user 1, item 5 is already in .*line 3"):
        read_table(table(tmp_path, text), form(min_rating=2.0, duplicates="refuse"))


def by_definition(pairs: set[tuple[int, int]], p: int, q: int) -> set[tuple[int, int]]:
    """What is left once a user or an item with too few is removed, one at a time."""
    while True:
        users = [user for user, _ in pairs]
        items = [item for _, item in pairs]
        thin = next((pair for pair in pairs if users.count(pair[0]) < p), None)
        if thin is not None:
            pairs = {pair for pair in pairs if pair[0] != thin[0]}
            continue
        thin = next((pair for pair in pairs if items.count(pair[1]) < q), None)
        if thin is None:
            return pairs
        pairs = {pair for pair in pairs if pair[1] != thin[1]}


@pytest.mark.parametrize(("p", "q"), [(1, 3), (3, 1), (3, 3), (4, 2)])
def test_the_core_is_what_removing_one_at_a_time_leaves(p: int, q: int) -> None:
    chance = np.random.default_rng(p * 10 + q)
    pairs = {(int(u), int(i)) for u, i in chance.integers(0, (16, 12), (60, 2))}
    users, items = zip(*sorted(pairs), strict=True)
    everything = Interactions.from_pairs(users, items, titles=None)
    wanted = by_definition(pairs, p, q)
    assert 0 < len(wanted) < len(pairs)
    core = everything.core(p, q)
    found = {(user, item) for user, own in histories(core).items() for item in own}
    assert found == wanted
    assert core.facts == {
        "users_left_out": everything.n_users - len({user for user, _ in wanted}),
        "items_left_out": everything.n_items - len({item for _, item in wanted}),
        "thin_interactions_left_out": len(pairs) - len(wanted),
    }
    assert core.core(p, q).size == core.size


def test_thin_users_and_items_are_left_out_of_distinct_pairs(tmp_path: Path) -> None:
    # User 2 has one item, twice; without user 2, item 6 has one user.
    path = table(tmp_path, "user,item\n1,5\n1,6\n2,6\n2,6\n3,5\n3,7\n3,8\n1,8\n")
    read = read_table(path, form(min_user=2, min_item=2))
    assert histories(read) == {1: [5, 8], 3: [5, 8]}
    assert read.facts["users_left_out"] == 1
    assert read.facts["items_left_out"] == 2
    with pytest.raises(DataError, match="no interactions are left of 7.*lower data.min_user"):
        read_table(path, form(min_user=5))


# ------------------------------------------------------------------------ how it is written


@pytest.mark.parametrize("mark", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_separator_is_the_one_with_which_the_columns_are_found(
    mark: str, quote: str, tmp_path: Path
) -> None:
    quote = quote if len(mark) == 1 and mark != "\t" else ""
    rows = [("user", "note", "item"), ("1", "x y", "5"), ("1", "z", "6")]
    lines = [mark.join(f"{quote}{cell}{quote}" for cell in row) for row in rows]
    read = read_table(table(tmp_path, "\n".join(lines)), form())
    assert histories(read) == {1: [5, 6]}
    words = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", "::": "two colons"}
    assert read.facts["separator"] == words[mark]
    read = read_table(table(tmp_path, "\n".join(lines[1:])), form(1, 3))
    assert histories(read) == {1: [5, 6]}


def test_a_separator_that_is_said_is_the_one_that_is_used(tmp_path: Path) -> None:
    path = table(tmp_path, "user;x,item;y\n1;2,3;4\n")
    with pytest.raises(DataError, match=r"column 'user' is not among 'user;x', 'item;y'"):
        read_table(path, form(separator=","))
    assert histories(read_table(path, form("user", "y", separator=";"))) == {1: [4]}


@pytest.mark.parametrize(
    ("early", "late", "order"),
    [
        ("03/28/2024 06:46", "03/28/2024 16:46", "month first"),
        ("12/31/2023", "1/13/2024", "month first"),
        ("31/12/2023", "01/02/2024 00:01:01", "day first"),
        ("29.02.2024", "1.3.2024", "day first"),
        ("13-01-2024 11:59 PM", "14-01-2024 12:00 am", "day first"),
        ("13-01-2024 12:01 AM", "13-01-2024, 1:00 AM", "day first"),
        ("13-01-2024 11:59 AM", "13-01-2024 12:00 PM", "day first"),
    ],
)
def test_a_column_tells_whether_day_or_month_comes_first(
    early: str, late: str, order: str, tmp_path: Path
) -> None:
    text = f'user,item,t\n1,late,"{late}"\n1,early,"{early}"\n'
    read = read_table(table(tmp_path, text), form(time="t"))
    assert histories(read) == {1: ["early", "late"]}
    assert read.facts["dates"] == order


def test_calendar_times_are_those_of_the_same_iso_dates(tmp_path: Path) -> None:
    seconds = np.random.default_rng(1).integers(-(10**9), 2 * 10**9, 500)
    moments = sorted(seconds.astype("datetime64[s]").tolist())
    for pattern in ("%d/%m/%Y %H:%M:%S", "%m-%d-%Y %I:%M:%S %p", "%d.%m.%Y, %H:%M:%S"):
        rows = [f'1,{at},"{moment.strftime(pattern)}"\n' for at, moment in enumerate(moments)]
        read = read_table(table(tmp_path, "user,item,t\n" + "".join(rows)), form(time="t"))
        assert read.times is not None
        wanted = np.array(moments, "datetime64[s]").astype(np.int64)
        assert read.times.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("times", "keys", "says"),
    [
        (["03/04/2024", "05/06/2024"], {}, "line 2: t '03/04/2024'; the day or the month may"),
        (["13/04/2024", "05/16/2024"], {}, "line 3: .*other way round in .*line 2"),
        (["13/04/2024", "2024-05-06"], {}, "line 3: t '2024-05-06'; .*begins with the day"),
        (["30/02/2024", "01/01/2024"], {}, "line 2: t '30/02/2024'"),
        (["13/04/2024 13:00 PM", "01/01/2024"], {}, "line 2: t '13/04/2024 13:00 PM'"),
        (["13/04/2024 24:00", "01/01/2024"], {}, "line 2: t"),
        (["13/00/2024", "01/01/2024"], {}, "line 2: t"),
        (["03/13/2024", "01/01/2024"], {"day_first": True}, "line 2: t '03/13/2024'"),
        (["2024-01-01", "2024-01-02"], {"day_first": True}, "line 2: t '2024-01-01'"),
    ],
)
def test_a_date_that_could_be_two_or_is_none_is_refused(
    times: list[str], keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    rows = "".join(f"1,{at},{time}\n" for at, time in enumerate(times))
    with pytest.raises(DataError, match=says):
        read_table(table(tmp_path, f"user,item,t\n{rows}"), form(time="t", **keys))


def test_dates_that_could_be_two_are_read_as_told(tmp_path: Path) -> None:
    path = table(tmp_path, "user,item,t\n1,a,03/04/2024\n1,b,01/05/2024\n")
    assert histories(read_table(path, form(time="t", day_first=True))) == {1: ["a", "b"]}
    assert histories(read_table(path, form(time="t", day_first=False))) == {1: ["b", "a"]}


# ------------------------------------------------------------------------ titles


def test_titles_come_from_a_file_beside_the_table(tmp_path: Path) -> None:
    path = table(tmp_path, "user,item\n1,5\n1,7\n2,9\n")
    table(tmp_path, 'item;title;year\n7;"Heat; The";1995\n5;Amélie;2001\nx1;Other;1990\n', "m.csv")
    split = data.load(form(titles="m.csv"), data_dir=path)
    assert split.train.titles == ("Amélie", "Heat; The", "item 9")
    table(tmp_path, "item,name\n5,Five\n", "n.csv")
    read = read_table(path, form(titles="n.csv", title_column="name"))
    assert read.titles == ("Five", "item 7", "item 9")
    table(tmp_path, "5::Five::Drama\n9::Nine::Drama\n", "movies.dat")
    bare = table(tmp_path, "1,5\n1,9\n", "bare.csv")
    read = read_table(bare, form(1, 2, titles="movies.dat"))
    assert read.titles == ("Five", "Nine")


def test_titles_come_from_a_column_of_the_table(tmp_path: Path) -> None:
    path = table(tmp_path, "user,item,name\n1,b,\n1,a,Ah\n2,b,Bee\n2,a,Other\n3,c,\n")
    read = read_table(path, form(title_column="name"))
    assert read.titles == ("Ah", "Bee", "item c")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "m.csv: there is no such file; data.titles"),
        ("item,name\n5,Five\n", "column 'title' is not among .*data.title_column"),
        ("item,title\n50,Fifty\n", "line 2: column 'item'; none of its ids is that of an item"),
    ],
)
def test_titles_that_cannot_be_those_of_the_items_are_refused(
    text: str | None, says: str, tmp_path: Path
) -> None:
    path = table(tmp_path, "user,item\n1,5\n1,7\n")
    if text is not None:
        table(tmp_path, text, "m.csv")
    with pytest.raises(DataError, match=says):
        read_table(path, form(titles="m.csv"))
