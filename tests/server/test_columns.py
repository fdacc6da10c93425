"""The server's tables over its output columns, against codes compared one by one."""

from __future__ import annotations

import numpy as np

from privrec.embedding.table import PlainTable
from privrec.randomness import rng_for
from privrec.search.memory import ItemMemory
from privrec.server.columns import ColumnServer

WORDS, DIM = 600, 12
TABLE = PlainTable.of(WORDS, DIM, block=4)
SMALL = PlainTable.of(WORDS, 1, block=1)


def items(seed: int = 0) -> ItemMemory:
    rng = rng_for(seed, "columns")
    memory = rng.normal(size=(TABLE.slots, 4)).astype(np.float32)
    return ItemMemory(TABLE, memory, (SMALL, rng.normal(size=(WORDS, 1)).astype(np.float32)))


def queries(count: int = 5) -> np.ndarray:
    found = rng_for(1, "queries").normal(size=(count, DIM + 1)).astype(np.float32)
    found[:, -1] = 1
    return found


def by_loop(columns: object, of: ItemMemory, asked: np.ndarray) -> np.ndarray:
    """In how many tables each neuron shares a bucket with some query."""
    rows = of.rows(np.arange(WORDS))
    hits = np.zeros(WORDS, int)
    for table in columns.tables:  # type: ignore[attr-defined]
        mine = table.hashed.codes(rows, of.centre)[:, 0]
        hits += np.isin(mine, table.hashed.codes(asked)[:, 0])
    return hits


def test_neurons_are_those_of_the_asked_buckets_the_most_hit_first() -> None:
    server, of, named = ColumnServer(6), items(), np.array([1, 5, 9])
    columns = server.hashed(of, 3)
    hits = by_loop(columns, of, queries())
    hits[named] = 0
    everything = columns.neurons(columns.codes(queries()), WORDS, named)
    assert everything.tolist() == np.flatnonzero(hits).tolist()
    assert 30 < len(everything) < WORDS
    few = columns.neurons(columns.codes(queries()), 20, named)
    assert len(few) == 20
    assert hits[few].min() >= np.sort(hits)[-20]
    assert (np.diff(few) > 0).all()


def test_near_neurons_are_found_more_often_than_others() -> None:
    of, found, near = items(), [], []
    scores = of.rows(np.arange(WORDS)) - of.centre
    for key in range(20):
        columns = ColumnServer().hashed(of, key)
        query = queries(1)
        best = np.argsort(-(scores @ query[0]))[:20]
        chosen = columns.neurons(columns.codes(query), WORDS, np.zeros(0, np.int64))
        found.append(len(chosen) / WORDS)
        near.append(np.isin(best, chosen).mean())
    assert np.mean(near) > 1.5 * np.mean(found)


def test_functions_are_public_and_new_in_each_round() -> None:
    of = items()
    first, again, other = (ColumnServer(2).hashed(of, key) for key in (1, 1, 2))
    a, b, c = (each.tables[0].hashed.codes(queries(50)) for each in (first, again, other))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_what_the_server_sees_is_counted() -> None:
    server, named = ColumnServer(4), np.array([2, 3])
    columns = server.hashed(items(), 1)
    codes = columns.codes(queries())
    found = columns.neurons(codes, 50, named)
    columns.neurons(codes, 50, named)
    assert server.sight.requests == 2
    assert server.sight.words == 4
    assert server.sight.buckets == 2 * sum(len(set(each.tolist())) for each in codes)
    assert server.sight.neurons == 2 * len(found)
