"""A table is one data set in every format, and no cell of it changes in silence."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_of import data_of, form
from pydantic import ValidationError

from privrec import data
from privrec.data.files import read_catalogue, read_history, read_ids
from privrec.data.interactions import Interactions, leave_last_out
from privrec.data.own import read_table
from privrec.data.texts import read_labelled
from privrec.errors import DataError

FORM = form()


def histories(read: Interactions) -> dict[Any, list[Any]]:
    names, items = read.user_ids.tolist(), read.item_ids
    return {name: items[read.history(at)].tolist() for at, name in enumerate(names)}


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("users", "items"),
    [
        ([2, 2, 10], [7, 5, 7]),
        (["b", "b", "a"], ["#1 x", "007", "é"]),
        (["1", "01", "1"], ["0x10", "16", "+16"]),
        (["18446744073709551615", "7", "7"], ["9223372036854775807", "1", "-5"]),
        (["NaN", "null", "NaN"], ["-0", "0", "0"]),
    ],
)
def test_the_same_rows_are_the_same_data_set_in_every_format(
    users: list[Any], items: list[Any], tmp_path: Path
) -> None:
    rows = [("user", "item"), *zip(users, items, strict=True)]
    (tmp_path / "t.csv").write_text("".join(f"{u},{i}\n" for u, i in rows))
    (tmp_path / "q.csv").write_text("".join(f'"{u}","{i}"\n' for u, i in rows))
    (tmp_path / "t.tsv").write_text("".join(f"{u}\t{i}\n" for u, i in rows))
    parquet(tmp_path / "t.parquet", user=users, item=items)
    found = [read_table(tmp_path / name, FORM) for name in os.listdir(tmp_path)]
    wanted: dict[str, list[str]] = {}
    for user, item in rows[1:]:
        wanted.setdefault(str(user), []).append(str(item))
    for read in found:
        shown = {str(user): list(map(str, own)) for user, own in histories(read).items()}
        assert shown == wanted
        assert read.user_ids.tolist() == found[0].user_ids.tolist()
        assert read.item_ids.tolist() == found[0].item_ids.tolist()


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('user\titem\tnote\n1\ta\t"Weird\n1\tb\tx\n2\t"c\t12"\n')
    assert histories(read_table(tmp_path / "t.tsv", FORM)) == {1: ["a", "b"], 2: ['"c']}


@pytest.mark.parametrize(
    ("user", "says"),
    [
        (pyarrow.array([1.0, float("nan")]), "row 2: column 'user' is empty"),
        (pyarrow.array([1, None]), "row 2: column 'user' is empty"),
        (pyarrow.array([b"a", b"b"]), "type binary; ids are whole numbers or text"),
        (pyarrow.array([[1, 2], [3]]), "type list"),
        (pyarrow.array([1.0, 2.0]), "type double"),
        (pyarrow.array([True, False]), "type bool"),
        (pyarrow.array(["a", "b\0c"]), r"row 2: user 'b\\x00c'; an id has no NUL"),
    ],
)
def test_what_is_no_id_is_refused(user: Any, says: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", user=user, item=[1, 2])
    with pytest.raises(DataError, match=says):
        read_table(path, FORM)


def test_unsigned_ids_and_categories_keep_their_value(tmp_path: Path) -> None:
    user = pyarrow.array([2**64 - 1, 7], pyarrow.uint64())
    item = pyarrow.array(["a", "b"]).dictionary_encode()
    path = parquet(tmp_path / "t.parquet", user=user, item=item)
    assert histories(read_table(path, FORM)) == {"18446744073709551615": ["a"], "7": ["b"]}


@pytest.mark.parametrize(
    ("late", "early"),
    [
        ("1700000000123456789", "1600000000123456789"),
        ("1700000000123456.0", "1600000000123456.0"),
        ("1700000000.000000002", "1700000000.000000001"),
        ("2024-01-03T10:00:00.123456789Z", "2024-01-03T10:00:00.123456788Z"),
        ("9999-12-31", "0001-01-01"),
    ],
)
def test_times_are_kept_exactly(late: str, early: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"user,item,t\n1,late,{late}\n1,early,{early}\n")
    split = leave_last_out(
        read_table(tmp_path / "t.csv", form("user", "item", "t")), holdout="test"
    )
    assert split.train.item_ids[split.heldout.history(0)].tolist() == ["late"]


@pytest.mark.parametrize(
    ("time", "says"),
    [
        (pyarrow.array([1, 2**63], pyarrow.uint64()), "row 2.*64 bits"),
        (pyarrow.array([1.5, float("nan")]), "row 2: column 't' is empty; every row needs a time"),
        (pyarrow.array(["1", ""]), "row 2: column 't' is empty; every row needs a time"),
        (pyarrow.array(["0.5", "0.12345678901"]), "row 2: t '0.12345678901'.*9 decimals"),
        (pyarrow.array(["2024-01-01", "2024-02-30"]), "row 2: t '2024-02-30'.*date"),
    ],
)
def test_a_time_that_cannot_be_kept_is_refused(time: Any, says: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", user=[1, 1], item=[1, 2], t=time)
    with pytest.raises(DataError, match=says):
        read_table(path, form("user", "item", "t"))


def test_long_cells_are_read_or_refused_by_their_own_rule(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "t.csv").write_text(f"user,item\n1,{long}\n")
    assert histories(read_table(tmp_path / "t.csv", FORM)) == {1: [long]}
    (tmp_path / "t.csv").write_text(f'user,item\n1,"{long}"\n')
    with pytest.raises(DataError, match="at most 131072 characters"):
        read_table(tmp_path / "t.csv", FORM)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """One long id among 100,000: an array of fixed width took gigabytes."""
    path = tmp_path / "t.csv"
    rows = (f"u{k // 20},{'x' * 100_000 if k == 77 else f'p{k % 20}'}\n" for k in range(100_000))
    path.write_text("user,item\n" + "".join(rows))
    code = (
        "import sys; from pathlib import Path; "
        "from privrec.data.own import read_table; "
        "from privrec.scenario.schema import Data; "
        "read_table(Path(sys.argv[1]), Data(source='table')); "
        # Not ru_maxrss, which begins with that of the process that started this one.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    assert int(done.stdout) * 1024 < 8 * path.stat().st_size + 200e6


def test_packed_and_divided_tables_are_read_as_one(tmp_path: Path) -> None:
    content = b"user,item\n1,5\n1,6\n2,5\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("readme.txt", "about")
        archive.writestr("in/t.csv", content)
    (tmp_path / "u.csv").write_bytes(content.decode().encode("utf-16"))
    (tmp_path / "v.csv").write_bytes(content.decode().encode("utf-16-le"))
    for name, encoding in (("t.csv.gz", "utf-8"), ("t.zip", "utf-8"), ("u.csv", "utf-16"),
                           ("v.csv", "utf-16-le")):  # fmt: skip
        coded = form(encoding=encoding)
        assert histories(read_table(tmp_path / name, coded)) == {1: [5, 6], 2: [5]}
    with pytest.raises(DataError, match="starts as UTF-16.*set data.encoding to utf-16"):
        read_table(tmp_path / "u.csv", FORM)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "_SUCCESS").touch()
    for number in (2, 10):
        parquet(parts / f"part-{number}.parquet", user=[1, number], item=[number, 5])
    assert histories(read_table(parts, FORM)) == {1: [2, 10], 2: [5], 10: [5]}
    parquet(parts / "part-11.parquet", user=[1], item=[2])
    with pytest.raises(DataError, match=r"part-11.parquet, row 1: .*part-2.parquet, row 1"):
        read_table(parts, form(duplicates="refuse"))


def test_columns_are_numbered_where_there_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("A1,0001,5.0,9\nA1,0002,4.0,8\n")
    numbered = form(1, 2, 4)
    assert histories(read_table(tmp_path / "t.csv", numbered)) == {"A1": ["0002", "0001"]}
    with pytest.raises(DataError, match="line 1: 4 fields; column 5 is to be read"):
        read_table(tmp_path / "t.csv", form(1, 5))
    with pytest.raises(DataError, match="all by name or all by number"):
        read_table(tmp_path / "t.csv", form(1, "item"))


def test_users_without_training_items_are_left_out_and_counted(tmp_path: Path) -> None:
    for name, text in {"train.txt": "0 1 2\n1\n", "test.txt": "0 4\n1 3\n8 5\n"}.items():
        (tmp_path / name).write_text(text)
    split = data.load(data_of("lightgcn"), data_dir=tmp_path)
    assert split.train.user_ids.tolist() == [0]
    assert (split.heldout.items.tolist(), split.untrained) == ([4], 2)
    train = "0\t0\t1\t0\n0\t1\t1\t0\n2\t1\t1\t0\n"
    test = "0\t4\t5\t9\n1\t5\t5\t9\n2\t5\t5\t9\n"
    for name, text in {"a.train.rating": train, "a.test.rating": test}.items():
        (tmp_path / name).write_text(text)
    split = data.load(data_of("ncf"), data_dir=tmp_path)
    assert split.train.user_ids.tolist() == [0, 2]
    assert (split.heldout.items.tolist(), split.untrained) == ([4, 5], 1)


def test_a_history_keeps_ids_with_a_hash_and_a_catalogue_repeats_none(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("\ufeff#love\n# a note\n i3 \n\nhttps://e.org/p#2\na\u2028b\n")
    wanted = ["#love", "i3", "https://e.org/p#2", "a\u2028b"]
    assert read_history(path, {"#love"}) == wanted
    assert read_ids(path)[1] == "# a note"
    path.write_text("a\nb\na\n")
    with pytest.raises(DataError, match="item 'a' again"):
        read_catalogue(path)


def test_blanks_around_a_name_in_a_parquet_header_do_not_count(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({" user ": [1, 2], "item": ["a", "b"]}), tmp_path / "t.parquet"
    )
    assert histories(read_table(tmp_path / "t.parquet", FORM)) == {1: ["a"], 2: ["b"]}


def test_parts_without_a_byte_are_parts_without_a_row(tmp_path: Path) -> None:
    (tmp_path / "part-0.csv").write_bytes(b"")
    (tmp_path / "part-1.csv").write_bytes(b"user,item\n1,a\n")
    assert histories(read_table(tmp_path, FORM)) == {1: ["a"]}
    (tmp_path / "part-1.csv").write_bytes(b"")
    with pytest.raises(DataError, match="there is no row"):
        read_table(tmp_path, FORM)


def test_a_no_break_space_is_part_of_a_label(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,\u00a0x \n", encoding="utf-8")
    assert read_labelled(tmp_path / "t.csv", ["text"], "label").labels == (("\u00a0x",),)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("missing.csv", "no such file"),
        ("dangling.csv", "no such file"),
        ("folder", "no table is there"),
    ],
)
def test_a_path_without_a_table_is_refused(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{name}: {found}"):
        read_table(tmp_path / name, FORM)


def test_a_format_that_no_table_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"1,2\n")
    with pytest.raises(DataError, match=r"separator '\\x00'; cells are separated"):
        read_table(tmp_path / "t.csv", form(separator="\0"))
    for columns in ((0, 2), (1, -1)):  # numbers begin at 1
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            form(*columns)


def test_archives_that_can_be_read_two_ways_are_refused(tmp_path: Path) -> None:
    rows = b"user,item\n1,a\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(gzip.compress(rows)))
    with pytest.raises(DataError, match="packed by gzip twice"):
        read_table(tmp_path / "t.csv.gz", FORM)
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("t.csv", rows)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("t.csv", b"user,item\n9,z\n")
    with pytest.raises(DataError, match=r"'t.csv' is in it twice"):
        read_table(tmp_path / "t.zip", FORM)


@pytest.mark.parametrize("kind", ["gzip", "parquet"])
def test_a_file_that_unpacks_to_a_hundred_times_its_size_is_refused(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / {"gzip": "t.csv", "parquet": "t.parquet"}[kind]
    if kind == "gzip":
        path.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * (5 << 20)))
    else:
        parquet(path, user=pyarrow.repeat(1, 3 << 20), item=pyarrow.repeat(2, 3 << 20))
    with pytest.raises(DataError, match="unpacks to more than 100 times its size"):
        read_table(path, FORM)


def test_an_error_about_an_oddly_named_member_is_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("t\n.csv", b"nothing\n1\n")
    with pytest.raises(DataError, match=r"t\\n\.csv") as caught:
        read_table(tmp_path / "t.zip", FORM)
    assert "\n" not in str(caught.value)
