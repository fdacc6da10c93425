"""Mutated files: each is read as an independent reading has it, or refused with a plain error.

The whole of it, 50,000 files, takes minutes: ``pytest -s -m slow tests/data/test_fuzz.py``.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_of import data_of, form
from hypothesis import given, settings
from hypothesis import strategies as st

from privrec import data
from privrec.data.files import read_catalogue, read_history, read_ids
from privrec.data.interactions import Split
from privrec.data.own import read_table
from privrec.data.texts import read_extreme, read_labelled
from privrec.errors import DataError

BLANKS = " \t\n\v\f\r"
BYTES = b'\0"\t\n\r,;:#-+.019aeNxT_ \xff\xef\x8b'


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, put in, taken out, or a piece repeated."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(found) + 1), rng.randrange(5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at:at] = bytes([rng.choice(BYTES)])
        elif kind == 2:
            del found[at : at + rng.randint(1, 3)]
        elif kind == 3 and at < len(found):
            found[at] = rng.choice(BYTES)
        else:
            found[at:at] = found[at : at + rng.randint(1, 12)]
    return bytes(found)


def rows_of(content: bytes, mark: str) -> list[tuple[str, str]]:
    """Users and items of a table by the ``csv`` module, or by splitting lines at tabs."""
    text = content.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    lines = [f"{line}\n" for line in text.split("\n")]
    if mark == "\t" or '"' not in text:
        rows = [line.removesuffix("\n").removesuffix("\r").split(mark) for line in lines]
    else:
        rows = list(
            csv.reader(io.StringIO("".join(lines), newline=""), delimiter=mark, strict=True)
        )
    header = [cell.strip(BLANKS) for cell in rows[0]]
    places = header.index("user"), header.index("item")
    return [(row[places[0]].strip(BLANKS), row[places[1]].strip(BLANKS)) for row in rows[1:]]


def table(path: Path, content: bytes) -> None:
    read = read_table(path, form(duplicates="refuse"))
    same(read, rows_of(content, "\t" if path.suffix == ".tsv" else ","))


def packed(path: Path, content: bytes) -> None:
    read = read_table(path, form(duplicates="refuse"))
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    elif content.startswith(b"PK\3\4") or path.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    same(read, rows_of(content, ","))


def parquet(path: Path, content: bytes) -> None:
    read = read_table(path, form(duplicates="refuse"))
    found = pyarrow.parquet.read_table(io.BytesIO(content)).to_pydict()
    pairs = zip(found["user"], found["item"], strict=True)
    same(read, [(str(user).strip(BLANKS), str(item).strip(BLANKS)) for user, item in pairs])


def same(read: data.Interactions, wanted: list[tuple[str, str]]) -> None:
    names, items = read.user_ids.tolist(), read.item_ids.tolist()
    found = [(str(names[u]), str(items[i])) for u, i in zip(read.users, read.items, strict=True)]
    assert sorted(found) == sorted(wanted)
    for user in set(names):
        own = [item for name, item in found if name == str(user)]
        assert own == [item for name, item in wanted if name == str(user)]


def extreme(path: Path, content: bytes) -> None:
    read = read_extreme(path)
    text = content.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    lines = [line.removesuffix("\r") for line in text.split("\n")][1:]
    pairs = [pair.split(":") for line in lines for pair in line.partition(" ")[2].split()]
    assert read.features.tolist() == [int(feature) for feature, _ in pairs]
    assert read.values.tolist() == pytest.approx([float(value) for _, value in pairs], rel=1e-6)


def labelled(path: Path, content: bytes) -> None:
    read = read_labelled(path, ["user"], "item")
    assert sorted(label for (label,) in read.labels) == sorted(i for _, i in rows_of(content, ","))


def listed(path: Path, content: bytes) -> None:
    read = read_ids(path)
    lines = content.decode("utf-8").removeprefix("\ufeff").split("\n")
    assert read == [line.strip(BLANKS) for line in lines if line.strip(BLANKS)]


def history(path: Path, content: bytes) -> None:
    read = read_history(path, {"#b"})
    lines = content.decode("utf-8").removeprefix("\ufeff").split("\n")
    names = [line.strip(BLANKS) for line in lines if line.strip(BLANKS)]
    assert read == [name for name in names if name == "#b" or not name.startswith("#")]


def catalogue(path: Path, content: bytes) -> None:
    read = read_catalogue(path)
    lines = content.decode("utf-8").removeprefix("\ufeff").split("\n")
    assert list(read) == [line.strip(BLANKS) for line in lines if line.strip(BLANKS)]
    assert list(read.values()) == list(range(len(read)))


def texts(content: bytes) -> list[str]:
    """Lines of a file that may be Latin-1, as titles are."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return [
        line.removesuffix("\r") for line in text.removeprefix("\ufeff").rstrip("\r\n").split("\n")
    ]


def cells_of(content: bytes, mark: str) -> list[list[str]]:
    text = content.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    if mark == "," and '"' in text:
        return list(csv.reader(io.StringIO(text, newline=""), strict=True))
    return [line.removesuffix("\r").split(mark) for line in text.split("\n")]


def rated(content: bytes, mark: str, names: list[str] | None = None) -> dict[int, list[int]]:
    """Items of each user in the order of their times, then of the file."""
    rows = cells_of(content, mark)
    places = [0, 1, 3]
    if names is not None:
        header = [cell.strip(BLANKS) for cell in rows.pop(0)]
        places = [header.index(name) for name in names]
    found: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        user, item, time = (int(row[place].strip(BLANKS)) for place in places)
        found.setdefault(user, []).append((time, item))
    return {
        user: [item for _, item in sorted(own, key=lambda pair: pair[0])]
        for user, own in found.items()
    }


def held(split: Split) -> dict[int, tuple[list[int], list[int]]]:
    """Training and held-out items of each user, by the publisher's ids."""
    names = split.train.item_ids
    return {
        user: (names[split.train.history(at)].tolist(), names[split.heldout.history(at)].tolist())
        for at, user in enumerate(split.train.user_ids.tolist())
    }


def movielens(split: Split, files: dict[str, bytes], mark: str, titles: str, between: str) -> None:
    (ratings,) = (content for name, content in files.items() if name != titles)
    names = ["userId", "movieId", "timestamp"] if mark == "," else None
    wanted = rated(ratings, mark, names)
    assert held(split) == {
        user: (own[:-1], own[-1:]) if len(own) > 1 else (own, []) for user, own in wanted.items()
    }
    if mark == ",":
        rows = cells_of(files[titles], ",")
        place = [
            [cell.strip(BLANKS) for cell in rows[0]].index(name) for name in ("movieId", "title")
        ]
        known = {int(row[place[0]]): row[place[1]].strip() for row in rows[1:]}
    else:
        fields = [line.split(between) for line in texts(files[titles])]
        known = {int(row[0]): row[1].strip() for row in fields}
    assert split.train.titles == tuple(
        known.get(item, f"item {item}") for item in split.train.item_ids.tolist()
    )


def ncf(split: Split, files: dict[str, bytes]) -> None:
    train, test = rated(files["a.train.rating"], "\t"), rated(files["a.test.rating"], "\t")
    assert held(split) == {
        user: ([item for item in own if item not in test.get(user, [])], test.get(user, []))
        for user, own in train.items()
    }
    lines = [line.removesuffix("\r").split("\t") for line in texts(files["a.test.negative"])]
    published = {int(head[1:].split(",")[0]): [int(item) for item in own] for head, *own in lines}
    assert split.negatives is not None
    for at, user in enumerate(split.train.user_ids.tolist()):
        assert split.negatives[at].tolist() == published.get(user, [-1] * 99)


def lightgcn(split: Split, files: dict[str, bytes]) -> None:
    train, test = (
        {int(head): [int(item) for item in own] for head, *own in map(str.split, texts(content))}
        for content in (files["train.txt"], files["test.txt"])
    )
    assert held(split) == {user: (own, test.get(user, [])) for user, own in train.items() if own}


def table_in(form: str) -> bytes:
    """The same rows packed, or as Parquet."""
    rows = b"user,item\nu1,a\nu1,b\nu2,a\n"
    stream = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo("t.csv"), rows)
    elif form == "parquet":
        columns: Any = {"user": [1, 1, 2], "item": ["a", "b", "a"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), stream, write_page_checksum=True)
    return stream.getvalue() or gzip.compress(rows, mtime=0)


TABLE = b'user,item,note\n1,7,x\n1,8,"a ""b"""\n2,7,y\n12,9,"two\nlines"\n'
NEGATIVES = "\t".join(str(item) for item in range(10, 109))
PUBLISHED: dict[str, dict[str, bytes]] = {
    "ml-100k": {"u.data": b"1\t10\t3\t100\n2\t10\t5\t300\n", "u.item": b"10|Ten (1990)|x\n"},
    "ml-1m": {"ratings.dat": b"1::10::3::100\n1::20::4::200\n", "movies.dat": b"10::Ten::x\n"},
    "ml-20m": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n1,10,3.5,100\n1,20,4.0,200\n",
        "movies.csv": b'movieId,title,genres\n10,"Ten, or",x\n',
    },
    "ncf": {
        "a.train.rating": b"0\t0\t1\t0\n0\t1\t1\t0\n1\t2\t1\t0\n",
        "a.test.rating": b"0\t4\t5\t9\n1\t5\t5\t9\n",
        "a.test.negative": f"(0,4)\t{NEGATIVES}\n(1,5)\t{NEGATIVES}\n".encode(),
    },
    "lightgcn": {"train.txt": b"0 1 2\n1 3\n", "test.txt": b"0 4\n1 5\n"},
}
READERS: dict[str, tuple[str, bytes, Callable[[Path, bytes], None]]] = {
    "csv": ("t.csv", b"user,item,note\nu1,a,x\nu1,b,y\nu2,a,z\n", table),
    "numbers": ("t.csv", b"user,item\n1,70\n1,8\n22,8\n3,9\n", table),
    "quoted": ("t.csv", TABLE, table),
    "tsv": ("t.tsv", b'user\titem\nu1\t"a\nu1\tb\nu2\tc"\n', table),
    "extreme": ("x.txt", b"3 10 5\n1,4 0:0.5 7:1.25\n2 2:1\n0 3:4\n", extreme),
    "labelled": ("t.csv", b'user,item\nhello there,a\n"x, y",b\nagain,a\n', labelled),
    "listed": ("l.txt", "a\n# b\nc#d\n\u00e9\n".encode(), listed),
    "history": ("l.txt", "a\n#b\n# c\n\u00e9\n".encode(), history),
    "catalogue": ("l.txt", "a\n# b\nc#d\n\u00e9\n".encode(), catalogue),
    "gzip": ("t.csv.gz", table_in("gzip"), packed),
    "zip": ("t.zip", table_in("zip"), packed),
    "parquet": ("t.parquet", table_in("parquet"), parquet),
}
CHECKS: dict[str, Callable[[Split, dict[str, bytes]], None]] = {
    "ml-100k": lambda split, files: movielens(split, files, "\t", "u.item", "|"),
    "ml-1m": lambda split, files: movielens(split, files, "::", "movies.dat", "::"),
    "ml-20m": lambda split, files: movielens(split, files, ",", "movies.csv", ","),
    "ncf": ncf,
    "lightgcn": lightgcn,
}


def fuzzed(folder: Path, count: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Read so many mutated files of every reader; how many each accepted and refused."""
    rng = random.Random(seed)
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def attempt(reader: str, content: Any, check: Callable[[], None]) -> None:
        try:
            check()
            accepted[reader] += 1
        except DataError as error:
            refused[reader] += "\n" not in str(error)
        except Exception as error:
            error.add_note(f"{reader}: {content!r}")
            raise

    for reader, (name, content, check) in READERS.items():
        path = folder / name
        for _ in range(count):
            altered = mutated(content, rng)
            path.write_bytes(altered)
            attempt(reader, altered, lambda: check(path, altered))  # noqa: B023
    for source, files in PUBLISHED.items():
        place = folder / source
        place.mkdir()
        config = data_of(source)
        for _ in range(count):
            wrong = rng.choice(sorted(files))
            changed = {**files, wrong: mutated(files[wrong], rng)}
            for name, content in changed.items():
                (place / name).write_bytes(content)
            attempt(
                source,
                changed,
                lambda: CHECKS[source](data.load(config, data_dir=place), changed),  # noqa: B023
            )
    return accepted, refused


def test_mutated_files_are_read_right_or_refused(tmp_path: Path) -> None:
    accepted, refused = fuzzed(tmp_path, 30, 0)
    assert accepted.total() > 50
    assert set(refused) == {*READERS, *PUBLISHED}
    assert accepted.total() + refused.total() == 30 * len(refused)  # no error had two lines


@pytest.mark.slow
def test_many_mutated_files_are_read_right_or_refused(tmp_path: Path) -> None:
    accepted, refused = fuzzed(tmp_path, 3000, 1)
    for reader in sorted(accepted):
        print(f"{reader}: {accepted[reader]} accepted, {refused[reader]} refused")
    assert accepted.total() + refused.total() == 3000 * len(accepted) > 50_000


CELL = st.text(
    st.sampled_from("ab019-+.:#'\" ,;\t\n\r\x1f\u00e9\u4e2d\ufeff") | st.characters(codec="utf-8"),
    max_size=8,
)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6))
def test_any_cells_are_one_data_set_in_every_format(rows: list[tuple[str, str]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        [("user", "item"), *rows]
    )
    text = stream.getvalue().encode()
    bare = "".join(f"{user}\t{item}\n" for user, item in [("user", "item"), *rows]).encode()
    wanted = [(user.strip(BLANKS), item.strip(BLANKS)) for user, item in rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "t.csv").write_bytes(text)
        (folder / "t.csv.gz").write_bytes(gzip.compress(text))
        users, items = zip(*rows, strict=True)
        columns: Any = {"user": users, "item": items}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
        with zipfile.ZipFile(folder / "t.zip", "w") as archive:
            archive.writestr("t.csv", text)
        names = ["t.csv", "t.csv.gz", "t.parquet", "t.zip"]
        if not any(sign in cell for row in rows for cell in row for sign in "\t\n\r"):
            (folder / "t.tsv").write_bytes(bare)
            names.append("t.tsv")
        for name in names:
            try:
                same(read_table(folder / name, form(duplicates="refuse")), wanted)
            except DataError:
                # Nothing else is refused in any of the formats.
                cells = [cell for row in wanted for cell in row]
                assert (
                    not all(cells)
                    or any("\0" in cell for cell in cells)
                    or len(set(wanted)) < len(wanted)
                )


MIB = 1 << 20
SHAPES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "one long cell": ("table", lambda: b"user,item\n1," + b"x" * (8 * MIB) + b"\n2,y\n"),
    "one quoted cell": ("table", lambda: b'user,item\n1,"' + b"x" * (8 * MIB) + b'"\n'),
    "quotes": ("table", lambda: b"user,item\n1," + b'"' * (8 * MIB) + b"\n"),
    "columns": ("table", lambda: b"user,item" + b",c" * MIB + b"\n1,2" + b"," * MIB + b"\n"),
    "rows": ("table", lambda: b"user,item\n" + b"".join(b"u%d,i\n" % k for k in range(400_000))),
    "quoted rows": (
        "table", lambda: b"user,item\n" + b"".join(b'"%d",i\n' % k for k in range(400_000))
    ),
    "empty lines": ("table", lambda: b"user,item\n" + b"\n" * (8 * MIB) + b"1,2\n"),
    "examples": ("extreme", lambda: b"400000 9 9\n" + b"1 2:1\n" * 400_000),
    "one example": ("extreme", lambda: b"1 9 9\n1" + b" 2:1" * (2 * MIB) + b"\n"),
    "ids": ("history", lambda: b"".join(b"%d\n" % k for k in range(800_000))),
    "a line that unpacks": ("table", lambda: gzip.compress(b"x" * (64 * MIB))),
    "rows that unpack": ("table", lambda: gzip.compress(b"user,item\n" + b"1,2\n" * (16 * MIB))),
}  # fmt: skip
READ = """
import sys
from pathlib import Path
from privrec.data.files import read_history
from privrec.data.own import read_table
from privrec.data.texts import read_extreme
from privrec.errors import DataError
from privrec.workers import peak_resident_bytes
from privrec.scenario.schema import Data
kind, path = sys.argv[1], Path(sys.argv[2])
try:
    if kind == "table":
        read_table(path, Data(source="table"))
    else:
        read_extreme(path) if kind == "extreme" else read_history(path, ())
except DataError as error:
    assert str(error).count("\\n") == 0 and len(str(error)) < 2000, error
print(peak_resident_bytes())
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_eight_times_the_file_and_200_mb(shape: str, tmp_path: Path) -> None:
    kind, make = SHAPES[shape]
    path = tmp_path / "t.csv"
    path.write_bytes(make())
    command = [sys.executable, "-c", READ, kind, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) < 8 * path.stat().st_size + 200 * 10**6
