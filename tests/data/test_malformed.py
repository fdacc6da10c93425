"""Bad files: each is refused with the file, the line, the rule and the remedy."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from data_of import data_of
from pydantic import ValidationError

from privrec import data
from privrec.errors import DataError
from privrec.scenario.schema import Data


def config(source: str, **keys: Any) -> Data:
    own = {"time_column": "time", "duplicates": "refuse"} if source == "table" else {}
    return data_of(source, **{**own, **keys})


NEGATIVES = "\t".join(str(item) for item in range(10, 109))
GOOD: dict[str, dict[str, bytes]] = {
    "ml-100k": {
        "u.data": b"1\t10\t3\t100\n1\t20\t4\t200\n2\t10\t5\t300\n",
        "u.item": b"10|Ten (1990)|x\n20|Twenty|x\n",
    },
    "ml-1m": {
        "ratings.dat": b"1::10::3::100\n1::20::4::200\n2::10::5::300\n",
        "movies.dat": b"10::Ten::x\n20::Twenty::x\n",
    },
    "ml-20m": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n1,10,3.5,100\n1,20,4.0,200\n",
        "movies.csv": b"movieId,title,genres\n10,Ten,x\n20,Twenty,x\n",
    },
    "ncf": {
        "a.train.rating": b"0\t0\t1\t0\n0\t1\t1\t0\n1\t2\t1\t0\n1\t3\t1\t0\n",
        "a.test.rating": b"0\t4\t5\t9\n1\t5\t5\t9\n",
        "a.test.negative": f"(0,4)\t{NEGATIVES}\n(1,5)\t{NEGATIVES}\n".encode(),
    },
    "lightgcn": {"train.txt": b"0 1 2\n1 3\n", "test.txt": b"0 4\n1 5\n"},
    "table": {"t.csv": b"user,item,time\na,x,1\na,y,2\nb,x,3\n"},
}

# source, file, its content (None: no such file), what the message must say
CASES: list[tuple[str, str, bytes | None, str]] = [
    # MovieLens 100K: tab-separated
    ("ml-100k", "u.data", b"", "u.data: the file is empty"),
    ("ml-100k", "u.data", b"\n\n\r\n", "u.data: the file is empty"),
    ("ml-100k", "u.data", None, "no ml-100k.train.rating or u.data there"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\n1\t20\t4\n", "line 2: 3 fields .*has 4, separated"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\t9\n", "line 1: 5 fields"),
    ("ml-100k", "u.data", b"1\t10\n3\t9\n", "line 1: 2 fields"),
    ("ml-100k", "u.data", b"1,10,3,9\n", r"line 1: 1 field in '1,10,3,9'"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\n\n2\t10\t3\t9\n", "line 2: no text"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\nbob\t10\t3\t9\n", "line 2: user 'bob'.*whole number"),
    ("ml-100k", "u.data", b"user\titem\trating\ttime\n1\t1\t1\t1\n", "line 1: user 'user'.*header"),
    ("ml-100k", "u.data", b"1\t1.5\t3\t9\n", "line 1: item '1.5'.*whole number"),
    ("ml-100k", "u.data", b"1\t\t3\t9\n", "line 1: item ''.*fill it in"),
    ("ml-100k", "u.data", b"-1\t10\t3\t9\n", "line 1: user '-1'.*must not be negative"),
    ("ml-100k", "u.data", b"1\t1%b\t3\t9\n" % (b"0" * 30), "line 1: item '1000.*64 bits"),
    ("ml-100k", "u.data", b"1\t1%b\t3\t9\n" % (b"0" * 9000), "line 1: item '1000.*64 bits"),
    ("ml-100k", "u.data", b"1\t10\tnan\t9\n", "line 1: rating 'nan'.*finite"),
    ("ml-100k", "u.data", b"1\t10\tinf\t9\n", "line 1: rating 'inf'.*finite"),
    ("ml-100k", "u.data", b"1\t10\tgood\t9\n", "line 1: rating 'good'.*finite"),
    ("ml-100k", "u.data", b"1\t10\t1.2.3\t9\n", "line 1: rating '1.2.3'.*finite"),
    ("ml-100k", "u.data", b"1\t10\t3\tyesterday\n", "line 1: time 'yesterday'.*whole number"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\n2\t10\t3\t9\n1\t10\t5\t9\n",
     "line 3: user 1, item 10 is already in .*u.data, line 1; .*keep one"),
    ("ml-100k", "u.data", "1\t10\t3\t9\n".encode("utf-16"), "u.data: line 1 starts as UTF-16"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\n\xff\t10\t3\t9\n", "line 2: byte 0xff .*encoding"),
    ("ml-100k", "u.data", b"1\t10\t3\t9\n\x00\x00\x00\x00", r"line 2: 1 field"),
    ("ml-100k", "u.item", b"10|Ten\nTwenty\n", "u.item, line 2: 1 field in .Twenty.; a line has 2"),
    ("ml-100k", "u.item", b"", "u.item: the file is empty"),
    # MovieLens 1M and 20M
    ("ml-1m", "ratings.dat", b"1:10:3:9\n", "line 1: 1 field in '1:10:3:9'.*separated by '::'"),
    ("ml-1m", "ratings.dat", b"1::10::3::9\n1::10::3::9\n", "line 2: user 1, item 10 is already"),
    ("ml-1m", "movies.dat", b"ten::Ten::x\n", "movies.dat, line 1: item .ten."),
    ("ml-20m", "ratings.csv", b"user,movie,rating,time\n1,1,1,1\n",
     "line 1: column 'userId' is not among 'user', 'movie'"),
    ("ml-20m", "ratings.csv", b"userId,movieId,rating,timestamp\n", "ratings.csv: there is no row"),
    ("ml-20m", "ratings.csv", b"userId,movieId,rating,timestamp\n1,1,1,1\n2,x,1,1\n",
     "line 3: item 'x'"),
    ("ml-20m", "ratings.csv", b"userId,movieId,rating,timestamp\n1,1,1,1\n1,1,1,1\n",
     "line 3: user 1, item 1 is already in .*line 2"),
    ("ml-20m", "movies.csv", b"movieId,title\n10,caf\xe9\n", "movies.csv, line 2: byte 0xe9"),
    # NCF
    ("ncf", "a.test.rating", None, "a.test.rating: there is no such file"),
    ("ncf", "a.train.rating", b"0\t0\t1\t0\n0\t0\t1\t0\n1\t1\t1\t1\n",
     "line 2: user 0, item 0 is already in .*line 1"),
    ("ncf", "a.train.rating", b"0\t4\t1\t0\n1\t2\t1\t0\n", "user 0 has only the test item"),
    ("ncf", "a.test.rating", b"0\t4\t5\t9\n0\t5\t5\t9\n", "line 2: user 0 again"),
    ("ncf", "a.test.negative", b"(0,4)\t1\t2\n", r"line 1: 3 fields.*a line has 100"),
    ("ncf", "a.test.negative", f"0,4\t{NEGATIVES}\n".encode(), r"line 1: '0,4'.*\(user,item\)"),
    ("ncf", "a.test.negative", f"(0,4)\t{NEGATIVES}x\n".encode(), "line 1: item '108x'"),
    ("ncf", "a.test.negative", f"(0,5)\t{NEGATIVES}\n".encode(), r"line 1: candidates for \(0,5\)"),
    ("ncf", "a.test.negative", f"(9,5)\t{NEGATIVES}\n".encode(), r"line 1: candidates for \(9,5\)"),
    ("ncf", "a.test.negative", f"(0,4)\t{NEGATIVES}\n".encode(), "no candidates for user 1"),
    ("ncf", "a.test.negative", b"", "a.test.negative: the file is empty"),
    ("ncf", "a.train.rating", b"0\t99999999999\t1\t0\n1\t2\t1\t0\n", "item 99999999999"),
    ("ncf", "item_ids.txt", b"5\n6\n", "item_ids.txt: 2 lines.*up to 108"),
    ("ncf", "item_ids.txt", b"5\n" * 200, "item_ids.txt, line 2: id 5 again"),
    ("ncf", "users.dat", b"1::F\n", "users.dat: 1 lines.*users up to 1"),
    ("ncf", "users.dat", b"1::F\nx::M\n", "users.dat, line 2: user 'x'"),
    # LightGCN
    ("lightgcn", "train.txt", b"0 1\n\n1 2\n", "train.txt, line 2: no text"),
    ("lightgcn", "train.txt", b"0 1 2\n1 x\n", "train.txt, line 2: field 'x'"),
    ("lightgcn", "train.txt", b"0 1 -2\n1 3\n", "train.txt, line 1: field '-2'"),
    ("lightgcn", "train.txt", b"0,1,2\n", "train.txt, line 1: field '0,1,2'"),
    ("lightgcn", "train.txt", b"0 1 2 1\n1 3\n", "line 1: user 0, item 1 is already in .*line 1"),
    ("lightgcn", "train.txt", b"0 1\n1 3\n0 2\n", "line 3: user 0 has a line already"),
    ("lightgcn", "train.txt", b"0 1\n1 987654321\n", "line 2: item 987654321 is far beyond"),
    ("lightgcn", "test.txt", None, "test.txt: there is no such file"),
    ("lightgcn", "test.txt", b"1 5\n0 4 1\n", "line 2: item 1 of user 0 is in train.txt too"),
    ("lightgcn", "test.txt", b"1 5\n0 4 4\n", "test.txt, line 2: user 0, item 4 is already"),
    ("lightgcn", "test.txt", b"0\n1\n", "test.txt: no user has an item"),
    # Tables
    ("table", "t.csv", b"", "t.csv: the file is empty"),
    ("table", "t.csv", b"user,item,time\n", "t.csv: there is no row"),
    ("table", "t.csv", b"users,item,time\na,x,1\n", "line 1: column 'user' is not .*'users'"),
    ("table", "t.csv", b"user,item,item,time\na,x,y,1\n", "line 1: column 'item' is twice"),
    ("table", "t.csv", b"user,item,item,time\n1,2,3,4\n", "line 1: column 'item' is twice"),
    ("table", "t.csv", b"user:item:time\na:x:1\n", "line 1: column 'user' is not .*separator"),
    ("table", "t.csv", b"user,item,time\na,x,1\na,y\n", "line 3: 2 fields; the header has 3"),
    ("table", "t.csv", b"user,item,time\na,x,1\n\nb,y,2\n", "line 3: no text"),
    ("table", "t.csv", b"user,item,time\na,x,1\n,y,2\n", "line 3: column 'user' is empty"),
    ("table", "t.csv", b"user,item,time\na,x,1\na, ,2\n", "line 3: column 'item' is empty"),
    ("table", "t.csv", b"user,item,time\na,x,1\na,y,later\n", "line 3: time 'later'.*number"),
    ("table", "t.csv", b"user,item,time\na,x,1.5\na,y,nan\n", "line 3: time 'nan'.*finite"),
    ("table", "t.csv", b"user,item,time\na,x,2024-01-01\na,y,2024-13-01\n", "line 3: time .*date"),
    ("table", "t.csv", b"user,item,time\na,x,1\nb,x,2\na,x,3\n",
     "line 4: user 'a', item 'x' is already in .*t.csv, line 2"),
    ("table", "t.csv", b"user,item,time\n1,5,1\n2,5,2\n1,5,3\n",
     "line 4: user 1, item 5 is already in .*t.csv, line 2"),
    ("table", "t.csv", b'user,item,time\n"a\nb",x,1\n"a\nb",x,3\n', r"line 5: user 'a\\nb'"),
    ("table", "t.csv", b'user,item,time\na,"x,1\n', "line 2: .*quotes must be closed"),
    ("table", "t.csv", b'user,item,time\na,"x"y,1\n', "line 2: .*quotes must be closed"),
    ("table", "t.csv", b"user,item,time\na,x,1\ncaf\xe9,x,1\n", "line 3: byte 0xe9 is not utf-8"),
    ("table", "t.parquet", b"PAR1 and then nothing", "t.parquet: it cannot be read as Parquet"),
]  # fmt: skip


def write(folder: Path, source: str, file: str, content: bytes | None) -> None:
    files: dict[str, bytes | None] = {**GOOD[source], file: content}
    if source == "table" and file != "t.csv":
        del files["t.csv"]
    for name, text in files.items():
        if text is not None:
            (folder / name).write_bytes(text)


@pytest.mark.parametrize("source", sorted(GOOD))
def test_the_good_files_are_good(source: str, tmp_path: Path) -> None:
    write(tmp_path, source, *next(iter(GOOD[source].items())))
    assert data.load(config(source), data_dir=tmp_path).train.size > 0


@pytest.mark.parametrize(("source", "file", "content", "said"), CASES)
def test_a_bad_file_is_refused_with_file_line_and_remedy(
    source: str, file: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    write(tmp_path, source, file, content)
    with pytest.raises(DataError, match=said) as caught:
        data.load(config(source), data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert message.count("; ") >= 2  # what is there; the rule; the remedy
    assert "\n" not in message
    assert len(message) < 600
    assert caught.value.exit_code == 4


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


def archive_of(folder: Path, source: str) -> Path:
    path = folder / f"{source}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in GOOD[source].items():
            archive.writestr(f"{source}/{name}", text)
    return path


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_truncated_archive_is_refused(kept: float, tmp_path: Path) -> None:
    archive = archive_of(tmp_path, "ml-100k")
    content = archive.read_bytes()
    size = int(len(content) * kept) if isinstance(kept, float) else int(kept)
    archive.write_bytes(content[:size])
    with pytest.raises(DataError, match=r"ml-100k.zip: the archive is damaged.*download it again"):
        data.load(config("ml-100k"), data_dir=tmp_path)


def test_an_altered_archive_is_refused(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, "ml-100k")
    content = bytearray(archive.read_bytes())
    content[content.index(b"1\t10\t3")] = ord("7")
    archive.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"u\.data: the archive is damaged"):
        data.load(config("ml-100k"), data_dir=tmp_path)


def test_an_archive_of_something_else_is_not_found(tmp_path: Path) -> None:
    archive_of(tmp_path, "ml-20m").rename(tmp_path / "ml-1m.zip")
    with pytest.raises(DataError, match="privrec data fetch ml-1m"):
        data.load(config("ml-1m"), data_dir=tmp_path)


@pytest.mark.parametrize("source", ["ml-1m", "ncf", "lightgcn", "table"])
def test_a_folder_that_is_not_there_says_what_was_looked_for(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no .*there.*--data") as caught:
        data.load(config(source), data_dir=tmp_path / "nowhere")
    assert ("fetch" in str(caught.value)) == (source == "ml-1m")


def test_a_folder_of_two_tables_needs_a_path(tmp_path: Path) -> None:
    for name in ("a.csv", "b.tsv"):
        (tmp_path / name).write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match=r"2 tables.*data\.path"):
        data.load(config("table"), data_dir=tmp_path)


@pytest.mark.parametrize("encoding", ["klingon", "base64", "rot13"])
def test_an_unknown_encoding_is_refused_before_a_file_is_read(encoding: str) -> None:
    with pytest.raises(ValidationError, match="must name a text encoding that Python knows"):
        config("table", encoding=encoding)


def test_one_column_cannot_be_two(tmp_path: Path) -> None:
    write(tmp_path, "table", "t.csv", b"user,item,time\na,x,1\n")
    with pytest.raises(DataError, match="different columns"):
        data.load(config("table", item_column="user"), data_dir=tmp_path)


def test_a_parquet_file_with_holes_names_the_row(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table({"user": [1, None, 3], "item": [1, 2, 3], "time": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="row 2: column 'user' is empty"):
        data.load(config("table"), data_dir=tmp_path)
    parquet.write_table(table.slice(2).drop(["item"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'item' is not among 'user', 'time'"):
        data.load(config("table"), data_dir=tmp_path)
    parquet.write_table(table.slice(0, 0), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="there is no row"):
        data.load(config("table"), data_dir=tmp_path)


def test_messages_quote_control_characters(tmp_path: Path) -> None:
    write(tmp_path, "ml-100k", "u.data", b"1\t\x1b[31m\t3\t9\n")
    with pytest.raises(DataError) as caught:
        data.load(config("ml-100k"), data_dir=tmp_path)
    assert not re.search(r"[\x00-\x1f]", str(caught.value))
