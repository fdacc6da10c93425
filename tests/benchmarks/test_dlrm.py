"""DLRM by its definition, and a stream of clicks that repeats and can be learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _dlrm import DLRM, Clicks

from privrec.errors import UsageError


def test_a_logit_is_the_definition_written_out():
    torch.manual_seed(0)
    model = DLRM((5, 7), dense=4, bottom=(6, 3), top=(8,))
    dense = torch.randn(2, 4)
    categories = torch.tensor([[[0, 1], [6, 6]], [[4, 2], [3, 0]]])
    found = model(dense, categories)
    for i in range(2):
        x = model.bottom(dense[i : i + 1])[0]
        tables = [table.weight for table in model.tables]
        vectors = [x, *(t[categories[i, k]].sum(0) for k, t in enumerate(tables))]
        products = [vectors[1] @ x, vectors[2] @ x, vectors[2] @ vectors[1]]
        wanted = model.top(torch.cat([x, torch.stack(products)])[None])[0, 0]
        torch.testing.assert_close(found[i], wanted)


def test_mlperf_networks():
    model = DLRM((3,) * 26)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2][26:]
    assert shapes == [
        (512, 13), (256, 512), (128, 256),
        (1024, 128 + 351), (1024, 1024), (512, 1024), (256, 512), (1, 256),
    ]  # fmt: skip


def test_given_tables_are_used_in_place():
    table = torch.zeros(4, 3)
    model = DLRM((4,), bottom=(3,), top=(2,), weights=[table])
    assert model.tables[0].weight.data_ptr() == table.data_ptr()


@pytest.mark.parametrize("bad", [{"sizes": ()}, {"sizes": (3,), "bottom": ()}])
def test_nothing_is_refused(bad):
    with pytest.raises(UsageError, match="at least one"):
        DLRM(**bad)


@pytest.mark.parametrize("zipf", [0, 1.0, 1.3])
def test_clicks_repeat_and_parts_differ(zipf):
    clicks = Clicks((50, 1000), lookups=3, zipf=zipf, seed=4)
    one, two, other = (list(clicks.batches(64, 2, part=p)) for p in (0, 0, 1))
    for a, b, c in zip(one, two, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0], c[0])
    dense, categories, target = one[0]
    assert dense.shape == (64, 13)
    assert categories.shape == (64, 2, 3)
    assert int(categories[:, 0].max()) < 50
    assert 0.2 < float(target.mean()) < 0.8


def test_zipf_is_zipf():
    ((_, rows, _),) = Clicks((1000,), zipf=1.0).batches(40_000, 1)
    counts = np.bincount(rows.reshape(-1).numpy(), minlength=1000)
    harmonic = np.log(1001)
    for place in (0, 1, 4, 20):
        wanted = 40_000 * np.log((place + 2) / (place + 1)) / harmonic
        assert abs(counts[place] - wanted) < 5 * np.sqrt(wanted)
