"""Serial tables, lists and signatures against brute force; and how much room they take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from privrec.embedding.subspace import Subspace
from privrec.randomness import SecretRoot, SecureStream
from privrec.search import hashing, memory
from privrec.search.hashing import (
    FAMILIES,
    Buckets,
    Family,
    Shape,
    Signs,
    draw,
    projection,
    serial,
)
from privrec.search.index import Signatures
from privrec.search.memory import ItemMemory

ROOT = Path(__file__).resolve().parents[2]
N, DIM = 3000, 32


def stream(*context: str | int) -> SecureStream:
    return SecretRoot.known(b"a device of the tests").stream("lsh", *context)


@pytest.fixture
def items() -> ItemMemory:
    table = Subspace.sized(N, DIM, block=8, key=5, compression=8)
    rng = np.random.default_rng(0)
    # With a common direction, as learned vectors have.
    return ItemMemory(table, rng.standard_normal((table.slots, 8)).astype(np.float32) + 0.3)


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK", 700)
    monkeypatch.setattr(hashing, "ROOM", 4200)  # in several parts, and the last one is not whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 8, 11])
def test_serial_tables_find_what_whole_tables_would(
    items: ItemMemory, queries: np.ndarray, family: Family, count: int
) -> None:
    shape = Shape(6, count, fold=8, block=8)
    found = list(serial(items, queries, family, shape, stream("serial")))
    assert len(found) == count
    rows = items.rows(np.arange(N))
    # The same stream gives the same functions, a few tables at a time.
    again, expected, seen = stream("serial"), [], set()
    for few in (min(8, count), count - min(8, count)):
        if few:
            hashed = draw(family, DIM, Shape(6, few, 8, 8), again)
            codes, wanted = hashed.codes(rows, items.centre), hashed.codes(queries)
            for table in range(few):
                hits = set(np.flatnonzero(np.isin(codes[:, table], wanted[:, table])))
                expected.append(sorted(hits - seen))
                seen |= hits
    for got, right in zip(found, expected, strict=True):
        # A product on the threshold may round to either side.
        assert len(set(got) ^ set(right)) <= 2
        assert np.all(np.diff(got) > 0)
    every = np.concatenate(found)
    assert len(np.unique(every)) == len(every)


def test_a_device_that_has_enough_draws_no_further_tables(
    items: ItemMemory, queries: np.ndarray
) -> None:
    source = stream("budget")
    before = source.left
    steps = serial(items, queries, "simhash", Shape(4, 50), source)
    next(steps)
    one_pass = before - source.left
    assert 0 < one_pass < before - _left_after_all(items, queries) == one_pass * 50 / 8


def _left_after_all(items: ItemMemory, queries: np.ndarray) -> int:
    source = stream("budget")
    list(serial(items, queries, "simhash", Shape(4, 50), source))
    return source.left


def test_lists_are_the_buckets_of_each_query(items: ItemMemory) -> None:
    hashed = draw("simhash", DIM, Shape(7), stream("lists"))
    buckets = Buckets.of(items, hashed)
    queries = np.random.default_rng(3).standard_normal((40, DIM)).astype(np.float32)
    codes = np.concatenate([hashed.codes(part, items.centre)[:, 0] for _, part in items.chunks()])
    asked = hashed.codes(queries)[:, 0]
    for query, found in zip(queries, buckets.lists(asked), strict=True):
        right = np.flatnonzero(codes == hashed.codes(query[None])[0, 0])
        np.testing.assert_array_equal(found, right)
    assert len(buckets.order) == N


def distances(items: ItemMemory, query: np.ndarray, hashed: Signs) -> np.ndarray:
    """In how many bits of its signature each item differs from a query."""
    far = Signatures.of(items, hashed).words ^ hashed.signatures(query[None]).T
    return np.bitwise_count(far).sum(0, dtype=np.int64)


@pytest.mark.parametrize("bits", [64, 100, 256])
def test_distances_count_the_signs_that_differ(
    items: ItemMemory, queries: np.ndarray, bits: int
) -> None:
    hashed = Signs(projection("simhash", DIM, Shape(bits), stream("far")), Shape(bits))
    rows = items.rows(np.arange(N)) - items.centre
    right = np.array([((rows @ hashed.matrix > 0) != (q @ hashed.matrix > 0)).sum(1)
                      for q in queries])  # fmt: skip
    for query, expected in zip(queries, right, strict=True):
        assert np.abs(distances(items, query, hashed) - expected).max() <= 1


def test_estimates_come_close_to_the_products_of_centred_items(
    items: ItemMemory, queries: np.ndarray
) -> None:
    shape = Shape(2048)
    hashed = Signs(projection("simhash", DIM, shape, stream("many")), shape)
    centred = items.rows(np.arange(N)) - items.centre
    right = (centred @ queries.T).max(axis=1)
    lengths = np.sqrt(np.square(centred).sum(1)) * np.sqrt(np.square(queries).sum(1)).max()
    found = Signatures.of(items, hashed).values(queries)
    chunks = [part.values(queries) for part in Signatures.in_chunks(items, hashed)]
    np.testing.assert_allclose(found, np.concatenate(chunks), rtol=1e-5)
    # An angle from 2,048 bits is off by at most π / 2 / √2048 of its scale, one sigma.
    assert np.sqrt(np.mean(np.square((found - right) / lengths))) < 0.04
    assert np.corrcoef(found, right)[0, 1] > 0.96


def nearest(items: ItemMemory, query: np.ndarray, hashed: Signs, budget: int) -> np.ndarray:
    return np.argsort(distances(items, query, hashed), kind="stable")[:budget]


def recall(found: np.ndarray, best: np.ndarray) -> float:
    return float(np.isin(best, found).mean())


@pytest.mark.statistical
def test_more_tables_never_beat_exact_search_in_the_fold() -> None:
    """The fold is fixed: buckets of any number of tables approach the folded ranking, no more."""
    rng, fold, n, budget = np.random.default_rng(7), 8, 4000, 400
    table = Subspace.sized(n, 64, block=16, key=2)
    catalogue = ItemMemory(table, rng.standard_normal((table.slots, 16)).astype(np.float32))
    rows = catalogue.rows(np.arange(n)) - catalogue.centre
    queries = rng.standard_normal((60, 64)).astype(np.float32)
    in_fold, by_few, by_many, whole = [], [], [], []
    for number, query in enumerate(queries):
        best = np.argsort(-(rows @ query))[:10]
        folded, asked = (part.reshape(-1, 64 // fold, fold).sum(1) for part in (rows, query))
        asked = asked[0]
        cosine = folded @ asked / np.sqrt((folded * folded).sum(1))
        in_fold.append(recall(np.argsort(-cosine)[:budget], best))
        for count, results in ((64, by_few), (2048, by_many)):
            shape = Shape(count, fold=fold)
            hashed = Signs(projection("pghash", 64, shape, stream(number, count)), shape)
            results.append(recall(nearest(catalogue, query, hashed, budget), best))
        shape = Shape(256)
        hashed = Signs(projection("simhash", 64, shape, stream(number, "whole")), shape)
        whole.append(recall(nearest(catalogue, query, hashed, budget), best))
    ceiling, few, many = np.mean(in_fold), np.mean(by_few), np.mean(by_many)
    assert few < many <= ceiling + 0.02  # ever more functions: up to the ceiling
    assert many > ceiling - 0.04
    assert np.mean(whole) > ceiling + 0.1  # an eighth of them, unfolded: above it


MEASURE = """
import sys, json
import numpy as np, torch
torch.set_num_threads(1)
from privrec.embedding.subspace import Subspace
from privrec.workers import give_back_freed, peak_resident_bytes
from privrec.workers import reset_peak, resident_bytes
from privrec.search.hashing import Shape
from privrec.search.memory import ItemMemory
from privrec.search.hashing import serial
from privrec.randomness import SecretRoot

n, dim, count, family = int(sys.argv[1]), 128, int(sys.argv[2]), sys.argv[3]
table = Subspace.sized(n, dim, block=32, key=1, compression=64)
memory = np.random.default_rng(0).standard_normal((table.slots, 32), dtype=np.float32)
small = Subspace.sized(300, dim, block=32, key=1)
warm = ItemMemory(small, np.random.default_rng(0).random((small.slots, 32), np.float32))
query, root = np.ones((1, dim), np.float32), SecretRoot.known(b"measures itself")
list(serial(warm, query, family, Shape(12, 2), root.stream("warm")))
give_back_freed()
reset_peak()
before, found = resident_bytes(), 0
items = ItemMemory(table, memory)
for new in serial(items, query, family, Shape(12, count), root.stream("lsh")):
    found += len(new)
print(json.dumps([peak_resident_bytes() - before, found]))
"""


def workspace(count: int, family: str = "simhash", n: int = 670_091) -> list[int]:
    """Bytes above the memory of serial tables in a process of its own, and the items found."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n), str(count), family],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    measured: list[int] = json.loads(done.stdout)
    return measured


@pytest.mark.slow
def test_workspace_stays_below_32_mib_whatever_the_number_of_tables() -> None:
    peaks = {count: workspace(count) for count in (1, 8, 20, 50)}
    for measured, found in peaks.values():
        assert 0 < measured <= 32 * 2**20
        assert found > 0
    full = [peaks[count][0] for count in (8, 20, 50)]
    assert max(full) - min(full) < 3 * 2**20
