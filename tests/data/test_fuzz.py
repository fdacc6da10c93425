"""Mutated files: each is read as an independent reading has it, or refused with a plain error.

The whole of it, 50,000 files, takes minutes: ``pytest -m slow tests/data/test_fuzz.py``.
"""

from __future__ import annotations

import csv
import io
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from privrec import data
from privrec.data.extreme import read_extreme
from privrec.data.files import TableFormat, read_table
from privrec.data.labelled import read_labelled
from privrec.data.listed import read_ids
from privrec.errors import DataError
from privrec.scenario import Data

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
    read = read_table(path, TableFormat("user", "item"))
    wanted = rows_of(content, "\t" if path.suffix == ".tsv" else ",")
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
}


def fuzzed(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Read so many mutated files of every reader; how many were accepted and refused."""
    rng, accepted, refused = random.Random(seed), 0, 0
    for name, content, check in READERS.values():
        path = folder / name
        for _ in range(count):
            altered = mutated(content, rng)
            path.write_bytes(altered)
            try:
                check(path, altered)
                accepted += 1
            except DataError as error:
                refused += "\n" not in str(error)
    for source, files in PUBLISHED.items():
        place = folder / source
        place.mkdir()
        for _ in range(count):
            wrong = rng.choice(sorted(files))
            for name, content in files.items():
                (place / name).write_bytes(mutated(content, rng) if name == wrong else content)
            try:
                data.load(Data.model_validate({"source": source}), data_dir=place)
                accepted += 1
            except DataError as error:
                refused += "\n" not in str(error)
    assert accepted + refused == count * (len(READERS) + len(PUBLISHED))  # no error had two lines
    return accepted, refused


def test_mutated_files_are_read_right_or_refused(tmp_path: Path) -> None:
    accepted, refused = fuzzed(tmp_path, 40, 0)
    assert accepted > 50
    assert refused > 50


@pytest.mark.slow
def test_many_mutated_files_are_read_right_or_refused(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted, refused = fuzzed(tmp_path, 4200, 1)
    print(f"{accepted} accepted, {refused} refused")
    assert accepted + refused >= 50_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
