"""The items as a device searches them: rows, products and the centre, from the memory alone."""

from __future__ import annotations

import numpy as np
import pytest

from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.errors import UsageError
from privrec.search import memory as module
from privrec.search.memory import ItemMemory

TABLES: dict[str, Table] = {
    "compressed": Subspace.sized(1000, 24, block=8, key=3, compression=8),
    "folded": Subspace.sized(1000, 24, block=8, key=3, compression=8).folded(2),
    "bijective": Subspace.sized(1000, 24, block=8, key=3),
    "rows": PlainTable.of(1000, 24, block=8),
    "dims": PlainTable.of(1000, 24, block=8, by_part=True),
}


def made(kind: str, *, biased: bool) -> ItemMemory:
    rng, table = np.random.default_rng(1), TABLES[kind]
    memory = rng.standard_normal((table.slots, table.block)).astype(np.float32)
    if not biased:
        return ItemMemory(table, memory)
    small = Subspace.sized(1000, 1, block=1, key=4, compression=4)
    return ItemMemory(table, memory, (small, rng.random((small.slots, 1), np.float32)))


@pytest.mark.parametrize("doubled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", TABLES)
def test_chunks_and_products_are_those_of_the_gathered_rows(
    kind: str, biased: bool, doubled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 96)  # the last chunk is not whole
    monkeypatch.setattr(module, "_DOUBLED", 10**9 if doubled else 0)
    items = made(kind, biased=biased)
    rows = items.rows(np.arange(1000))
    assert rows.shape == (1000, 24 + biased) == (items.items, items.dim)
    chunks = [(start, part.copy()) for start, part in items.chunks()]
    assert [start for start, _ in chunks] == list(range(0, 1000, 96))
    np.testing.assert_allclose(np.concatenate([part for _, part in chunks]), rows, rtol=1e-6)
    query = np.random.default_rng(2).standard_normal(items.dim).astype(np.float32)
    products = np.concatenate(list(items.products(query)))
    np.testing.assert_allclose(products, rows @ query, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(items.centre, rows.mean(0), rtol=1e-4, atol=1e-5)


def test_a_memory_of_another_table_is_refused() -> None:
    with pytest.raises(UsageError, match="belongs to the table"):
        ItemMemory(TABLES["compressed"], np.zeros((7, 8), np.float32))
    small = Subspace.sized(1000, 1, block=1, key=4)
    with pytest.raises(UsageError, match="biases of shape"):
        ItemMemory(made("rows", biased=False).table, np.zeros((3000, 8), np.float32),
                   (small, np.zeros((3, 1), np.float32)))  # fmt: skip
