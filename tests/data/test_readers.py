"""Every reader on small files in its publisher's layout, and what `load` makes of a scenario."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_of import data_of
from pydantic import ValidationError

from privrec import data
from privrec.data.interactions import Split, position_of
from privrec.errors import DataError
from privrec.scenario.kinds import READERS, Reader, setting
from privrec.scenario.schema import Data


def config(source: str, **keys: Any) -> Data:
    sizes = {"users": 30, "items": 80, "clusters": 4, "interactions_per_user": 8}
    return data_of(source, **{**(sizes if source == "synthetic" else {}), **keys})


# user, item, rating, time: user 2 has one interaction, user 5 two at the same time.
RATINGS = [
    (5, 10, "3", 100),
    (1, 20, "4.5", 300),
    (1, 10, "5", 200),
    (5, 30, "0.5", 100),
    (1, 30, "1", 400),
    (2, 20, "2", 50),
]
TITLES = {10: "Amélie (2001)", 20: "Heat, The (1995)", 40: "Unseen (1990)"}


def write_ratings(path: Path, separator: str, header: str = "") -> None:
    lines = [separator.join(map(str, row)) for row in RATINGS]
    path.write_text(header + "\n".join(lines) + "\n")


def publish(folder: Path, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if source == "ml-100k":
        write_ratings(folder / "u.data", "\t")
        text = "".join(f"{item}|{title}|01-Jan-1995||0\n" for item, title in TITLES.items())
        (folder / "u.item").write_bytes(text.encode("latin-1"))
    elif source in ("ml-1m", "ml-10m"):
        write_ratings(folder / "ratings.dat", "::")
        text = "".join(f"{item}::{title}::Drama\n" for item, title in TITLES.items())
        encoding = "latin-1" if source == "ml-1m" else "utf-8"
        (folder / "movies.dat").write_bytes(text.encode(encoding))
    else:
        write_ratings(folder / "ratings.csv", ",", "userId,movieId,rating,timestamp\n")
        text = "".join(f'{item},"{title}",Drama\n' for item, title in TITLES.items())
        (folder / "movies.csv").write_text("movieId,title,genres\n" + text, encoding="utf-8")


def check(split: Split) -> None:
    train = split.train
    assert train.user_ids.tolist() == [1, 2, 5]
    assert train.item_ids.tolist() == [10, 20, 30]
    assert train.titles == ("Amélie (2001)", "Heat, The (1995)", "item 30")
    assert [train.item_ids[train.history(user)].tolist() for user in range(3)] == [
        [10, 20],
        [20],
        [10],
    ]
    assert [train.item_ids[split.heldout.history(user)].tolist() for user in range(3)] == [
        [30],
        [],
        [30],
    ]


MOVIELENS = ("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m")


@pytest.mark.parametrize("source", MOVIELENS)
@pytest.mark.parametrize("place", ["itself", "parent", "path"])
def test_a_release_is_found_and_read(source: str, place: str, tmp_path: Path) -> None:
    publish(tmp_path / source, source)
    if place == "path":
        check(data.load(config(source, path=str(tmp_path / source))))
        return
    check(data.load(config(source), data_dir=tmp_path / (source if place == "itself" else "")))


@pytest.mark.parametrize("source", MOVIELENS)
@pytest.mark.parametrize("inner", ["", "as-published/"])
def test_an_archive_is_read_as_it_is(source: str, inner: str, tmp_path: Path) -> None:
    publish(tmp_path / "unpacked", source)
    archive = tmp_path / f"{source}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in (tmp_path / "unpacked").iterdir():
            packed.write(file, f"{inner}{file.name}")
    check(data.load(config(source), data_dir=tmp_path))
    check(data.load(config(source), data_dir=archive))


def test_downloads_are_found_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_DATA", str(tmp_path))
    publish(tmp_path / "ml-1m", "ml-1m")
    check(data.load(config("ml-1m")))


def test_titles_are_optional_and_may_be_utf_8(tmp_path: Path) -> None:
    publish(tmp_path, "ml-1m")
    content = (tmp_path / "movies.dat").read_bytes()
    (tmp_path / "movies.dat").write_bytes(content.decode("latin-1").encode("utf-8"))
    check(data.load(config("ml-1m"), data_dir=tmp_path))
    (tmp_path / "movies.dat").unlink()
    assert data.load(config("ml-1m"), data_dir=tmp_path).train.titles is None


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    publish(tmp_path, "ml-20m")
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    check(data.load(config("ml-20m"), data_dir=tmp_path))


def write_ncf(folder: Path, prefix: str = "ml-1m", *, times: bool = False) -> None:
    rows = [(0, 0), (0, 1), (0, 2), (1, 3), (1, 0), (2, 1), (2, 4), (2, 5)]
    stamps = [30, 20, 10, 1, 2, 3, 1, 2] if times else [0] * len(rows)
    lines = [f"{u}\t{i}\t1\t{t}\n" for (u, i), t in zip(rows, stamps, strict=True)]
    (folder / f"{prefix}.train.rating").write_text("".join(lines))
    # User 2's test item is in training too.
    (folder / f"{prefix}.test.rating").write_text("0\t6\t5\t9\n1\t7\t5\t9\n2\t4\t5\t9\n")
    tail = "\t".join(str(item) for item in range(8, 8 + 99))
    lines = [f"({u},{i})\t{tail}\n" for u, i in [(0, 6), (1, 7), (2, 4)]]
    (folder / f"{prefix}.test.negative").write_text("".join(lines))


def test_ncf_files_give_their_own_split(tmp_path: Path) -> None:
    write_ncf(tmp_path)
    split = data.load(config("ncf"), data_dir=tmp_path)
    train = split.train
    assert [train.history(u).tolist() for u in range(3)] == [[0, 1, 2], [3, 0], [1, 5]]
    assert split.heldout.items.tolist() == [6, 7, 4]
    assert split.negatives is not None
    assert split.negatives.shape == (3, 99)
    assert split.negatives.dtype == np.int32
    assert split.negatives[1].tolist() == list(range(8, 107))
    assert (train.n_items, train.times, train.titles) == (107, None, None)
    assert train.user_ids.tolist() == [0, 1, 2]
    assert position_of(106, train.item_ids, "item") == 106


def test_ncf_files_come_before_the_publishers(tmp_path: Path) -> None:
    publish(tmp_path, "ml-1m")
    write_ncf(tmp_path)
    (tmp_path / "movies.dat").unlink()
    assert data.load(config("ml-1m"), data_dir=tmp_path).negatives is not None


@pytest.mark.parametrize("path", ["b", "b.train.rating"])
def test_one_of_several_ncf_sets_is_chosen_by_path(path: str, tmp_path: Path) -> None:
    write_ncf(tmp_path, "a")
    write_ncf(tmp_path, "b")
    assert data.load(config("ncf", path=path), data_dir=tmp_path).train.n_users == 3
    with pytest.raises(DataError, match="several data sets"):
        data.load(config("ncf"), data_dir=tmp_path)


def test_ncf_validation_with_placeholder_times_is_drawn(tmp_path: Path) -> None:
    write_ncf(tmp_path)
    split = data.load(config("ncf", holdout="validation"), data_dir=tmp_path)
    again = data.load(config("ncf", holdout="validation"), data_dir=tmp_path)
    assert split.heldout.items.tolist() == again.heldout.items.tolist()
    assert split.heldout.counts.tolist() == [1, 1, 1]
    assert split.negatives is None
    for user, known in enumerate([{0, 1, 2}, {0, 3}, {1, 5}]):
        assert {*split.train.history(user), *split.heldout.history(user)} == known


def test_ncf_validation_with_times_is_the_latest(tmp_path: Path) -> None:
    write_ncf(tmp_path, times=True)
    split = data.load(config("ncf", holdout="validation"), data_dir=tmp_path)
    assert split.heldout.items.tolist() == [0, 0, 1]
    assert split.train.history(0).tolist() == [2, 1]
    assert split.holdout == "validation"


def test_ncf_ids_and_titles_beside_the_files(tmp_path: Path) -> None:
    write_ncf(tmp_path)
    ids = [1000 - at for at in range(107)]
    (tmp_path / "item_ids.txt").write_text("".join(f"{item}\n" for item in ids))
    (tmp_path / "movies.dat").write_text("1000::First::x\n998::Third::x\n")
    (tmp_path / "users.dat").write_text("1::F::1\n2::M::1\n3::M::1\n4::M::1\n")
    train = data.load(config("ncf"), data_dir=tmp_path).train
    assert position_of("998", train.item_ids, "item") == 2
    assert train.titles is not None
    assert train.titles[:3] == ("First", "item 999", "Third")
    assert train.user_ids.tolist() == [1, 2, 3]


def test_ncf_files_without_candidates(tmp_path: Path) -> None:
    write_ncf(tmp_path)
    (tmp_path / "ml-1m.test.negative").unlink()
    split = data.load(config("ncf"), data_dir=tmp_path)
    assert split.negatives is None
    assert split.train.n_items == 8


def test_ncf_users_without_a_test_item_hold_out_none(tmp_path: Path) -> None:
    write_ncf(tmp_path)
    for name in ("test.rating", "test.negative"):
        file = tmp_path / f"ml-1m.{name}"
        kept = file.read_text().splitlines(keepends=True)
        file.write_text(kept[0] + kept[2])
    split = data.load(config("ncf"), data_dir=tmp_path)
    assert split.heldout.counts.tolist() == [1, 0, 1]
    assert split.negatives is not None
    assert split.negatives[1].tolist() == [-1] * 99


def test_lightgcn_files(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("7 4 0 2\n3 1 2 \n")
    (tmp_path / "test.txt").write_text("3 9 4\n7\n")
    split = data.load(config("lightgcn"), data_dir=tmp_path)
    assert split.train.user_ids.tolist() == [3, 7]
    assert [split.train.history(u).tolist() for u in range(2)] == [[1, 2], [4, 0, 2]]
    assert [split.heldout.history(u).tolist() for u in range(2)] == [[9, 4], []]
    assert (split.train.n_items, split.heldout.single) == (10, False)


def test_lightgcn_validation_holds_out_a_tenth(tmp_path: Path) -> None:
    long = " ".join(str(item) for item in range(40))
    (tmp_path / "train.txt").write_text(f"0 {long}\n1 5 6\n2 3\n")
    (tmp_path / "test.txt").write_text("0 50\n1 7\n2 8\n")
    split = data.load(config("lightgcn", holdout="validation"), data_dir=tmp_path)
    assert split.heldout.counts.tolist() == [4, 1, 0]
    assert split.train.counts.tolist() == [36, 1, 1]
    assert set(split.train.history(0)) | set(split.heldout.history(0)) == set(range(40))
    assert split.train.n_items == 51


TABLE = "when,book,reader,note\n3,9,b1,x\n1,8,b1,y\n2,9,a,z\n1,7,b1,w\n"
NAMES = {"user_column": "reader", "item_column": "book", "time_column": "when"}


def histories(split: Split) -> dict[str, list[object]]:
    train = split.train
    return {
        str(name): [
            *train.item_ids[train.history(at)].tolist(),
            *train.item_ids[split.heldout.history(at)].tolist(),
        ]
        for at, name in enumerate(train.user_ids.tolist())
    }


@pytest.mark.parametrize(
    ("name", "text", "extra"),
    [
        ("t.csv", TABLE, {}),
        ("t.tsv", TABLE.replace(",", "\t"), {}),
        ("t.csv", TABLE.replace(",", ";"), {"separator": ";"}),
        ("t.csv", TABLE.replace("x", '"quoted, ""x"""'), {}),
        ("t.csv", TABLE.replace("x", '"two\nlines"'), {}),
        ("t.csv", TABLE.replace("3,9", " 3 , 9 "), {}),
        ("t.csv", TABLE.replace("x", "é"), {"encoding": "latin-1"}),
        ("t.txt", TABLE.replace("b1", "7").replace(",a,", ",4,"), {}),
        ("t.csv", TABLE.replace("b1", "7").replace(",a,", ',"4",'), {}),
    ],
)
def test_tables_by_named_columns(
    name: str, text: str, extra: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode(extra.get("encoding", "utf-8")))
    form = config("table", path=name, **NAMES, **extra)
    split = data.load(form, data_dir=tmp_path)
    assert list(histories(split).values()) in ([[9], [7, 8, 9]], [[9], [8, 7, 9]])
    # b1 has two items at time 1: the one earlier in the file comes first.
    longest = max(histories(split).values(), key=len)
    assert longest == [8, 7, 9]


def test_a_table_without_times_is_in_file_order(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("user,item\n1,30\n1,20\n1,10\n")
    split = data.load(config("table"), data_dir=tmp_path)  # the only table of the folder
    assert histories(split) == {"1": [30, 20, 10]}
    assert split.train.times is None
    assert data.load(config("table"), data_dir=tmp_path / "t.csv").train.size == 2


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (["2024-01-03", "2024-01-02T10:00", "2024-01-02"], [2, 1, 0]),
        (["2024-01-01T12:00:00+02:00", "2024-01-01T11:00:00Z", "2024-01-01T10:30"], [0, 2, 1]),
        (["1.5", "1.25", "2"], [1, 0, 2]),
        (["-3", "-5", "4"], [1, 0, 2]),
        (["1969-12-31T23:59:59.9", "1970-01-01", "1969-12-31T23:59:59.8"], [2, 0, 1]),
    ],
)
def test_times_may_be_numbers_or_dates(times: list[str], order: list[int], tmp_path: Path) -> None:
    rows = "".join(f"1,{at},{time}\n" for at, time in enumerate(times))
    (tmp_path / "t.csv").write_text(f"user,item,time\n{rows}")
    split = data.load(config("table", time_column="time"), data_dir=tmp_path)
    assert histories(split) == {"1": order}


@pytest.mark.parametrize("kind", ["int", "text", "timestamp"])
def test_parquet_tables(kind: str, tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    users: list[object] = [1, 1, 2] if kind != "text" else ["b", "b", "c"]
    times = arrow.array([3, 2, 1])
    if kind == "timestamp":
        times = times.cast(arrow.timestamp("ns"))
    table = arrow.table({"time": times, "user": users, "item": ["x", "y", "x"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    split = data.load(config("table", time_column="time"), data_dir=tmp_path)
    assert list(histories(split).values()) == [["y", "x"], ["x"]]


def test_histories_are_cut_after_the_split(tmp_path: Path) -> None:
    write_ncf(tmp_path)
    split = data.load(config("ncf", max_history=1), data_dir=tmp_path)
    assert split.train.items.tolist() == [2, 0, 5]
    assert split.heldout.items.tolist() == [6, 7, 4]
    assert split.negatives is not None


def test_the_synthetic_source_needs_no_files() -> None:
    split = data.load(config("synthetic"))
    assert (split.train.n_users, split.train.n_items) == (30, 80)
    assert data.load(config("synthetic", seed=1)).train.items.tolist() != split.train.items.tolist()
    made = data.generate(config("synthetic"))
    assert made.interactions.size == split.train.size + split.heldout.size


def test_a_description_is_plain_json(tmp_path: Path) -> None:
    import json

    write_ncf(tmp_path)
    figures = data.load(config("ncf"), data_dir=tmp_path).describe()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["users"] == 3
    assert figures["items"] == 107
    assert figures["interactions"] == 7
    assert figures["tested_users"] == 3
    assert figures["density"] == pytest.approx(7 / 321)
    assert figures["published_negatives"] is True
    assert figures["median_history"] == 2.0


class Pairs(Reader):
    """Two items for every user, as somebody else's reader invents them."""

    people: int = setting(3, "[1, 100]")
    """How many there are."""


def read_pairs(config: Data, data_dir: Path | None) -> Split:
    users = np.repeat(np.arange(config.people), 2)
    interactions = data.Interactions.from_pairs(users, np.tile([7, 9], config.people))
    return data.leave_last_out(interactions, holdout=config.holdout)


def test_a_reader_comes_from_outside_by_its_keys_and_one_call(
    request: pytest.FixtureRequest,
) -> None:
    READERS.add("pairs", Pairs, read_pairs)
    request.addfinalizer(lambda: READERS.pop("pairs"))
    split = data.load(data_of("pairs", people=5))
    assert (split.train.n_users, split.train.item_ids.tolist()) == (5, [7, 9])
    assert split.heldout.items.tolist() == [1] * 5
    with pytest.raises(ValidationError, match="people"):
        data_of("pairs", people=0)
