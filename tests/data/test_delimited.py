from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privrec.data.delimited import Column, Kind, fast_columns, read_columns, strict_columns
from privrec.data.folder import Folder
from privrec.errors import DataError

COLUMNS = (
    Column("user", "id"),
    Column("note", "text"),
    Column("rating", "rating"),
    Column("time", "time"),
)
KINDS: list[Kind] = [column.kind for column in COLUMNS]

number = st.integers(0, 10**17)
rating = st.sampled_from(["5", "3.5", ".5", "4.", "0", "1e0", "+2", "-1"])
row = st.tuples(number, st.sampled_from(["", "a b", "é"]), rating, st.integers(-5, 10**12))


@settings(deadline=None)
@given(st.lists(row, min_size=1, max_size=30), st.sampled_from([b"\t", b"::", b","]))
def test_the_fast_parser_is_the_strict_one_or_gives_up(
    rows: Sequence[tuple[int, str, str, int]], separator: bytes
) -> None:
    lines = [separator.join(str(field).encode() for field in fields) for fields in rows]
    data = b"".join(line + b"\n" for line in lines)
    strict = strict_columns(data, COLUMNS, separator, "file", 1)
    assert [column.tolist() for column in strict] == [
        [fields[0] for fields in rows],
        [fields[3] for fields in rows],
    ]
    fast = fast_columns(data, KINDS, separator)
    if fast is not None:
        assert [column.tolist() for column in fast] == [column.tolist() for column in strict]


@settings(deadline=None, max_examples=300)
@given(st.text("0123456789\t\n.-+ aN:", max_size=40))
def test_the_fast_parser_accepts_nothing_that_the_strict_one_refuses(text: str) -> None:
    data = text.strip("\n").encode() + b"\n"
    fast = fast_columns(data, KINDS, b"\t")
    if fast is not None:
        strict = strict_columns(data, COLUMNS, b"\t", "file", 1)
        assert [column.tolist() for column in fast] == [column.tolist() for column in strict]


def test_plain_numbers_take_the_fast_path() -> None:
    fast = fast_columns(b"12::x::3.5::978300760\n0::::4::0\n", KINDS, b"::")
    assert fast is not None
    assert [column.tolist() for column in fast] == [[12, 0], [978300760, 0]]


@pytest.mark.parametrize("chunk", [4, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_chunks_do_not_show(
    chunk: int, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privrec.data.folder._CHUNK", chunk)
    rows = [b"%d\tx\t3\t%d" % (at, at * at) for at in range(40)]
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfhead" + end + end.join(rows) + end + end + b"\n")
    users, times = read_columns(Folder(tmp_path), "f", COLUMNS, separator=b"\t", header=b"head")
    assert users.tolist() == list(range(40))
    assert times.tolist() == [at * at for at in range(40)]


@pytest.mark.parametrize("chunk", [3, 50, 1 << 20])
def test_the_line_is_right_in_every_chunk(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privrec.data.folder._CHUNK", chunk)
    rows = [b"%d\tx\t3\t9" % at for at in range(40)]
    rows[31] = b"thirty\tx\t3\t9"
    (tmp_path / "f").write_bytes(b"head\n" + b"\n".join(rows))
    with pytest.raises(DataError, match=r"line 33: user 'thirty'"):
        read_columns(Folder(tmp_path), "f", COLUMNS, separator=b"\t", header=b"head")


def test_a_last_line_without_a_newline_counts(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1\n2")
    (ids,) = read_columns(Folder(tmp_path), "f", [Column("id", "id")], separator=b"\t")
    assert ids.tolist() == [1, 2]
    assert ids.dtype == np.int64
