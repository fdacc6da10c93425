from __future__ import annotations

import numpy as np
import pytest

from privrec.embedding.table import PlainTable
from privrec.errors import UsageError
from privrec.models.sparse_output import SparseOutput
from privrec.search.autotune import NEARLY, autotune
from privrec.search.memory import ItemMemory

N, DIM = 3000, 16


def test_the_choice_fits_is_nearly_the_best_and_is_told() -> None:
    choice = autotune(0.9, N, dim=DIM)
    assert choice.trial is not None
    assert {trial.kind for trial in choice.trials} == {
        "hamming", "sketch", "cells", "simhash", "pghash", "block_sign",
    }  # fmt: skip
    assert choice.trial.recall >= max(trial.recall for trial in choice.trials) - NEARLY
    assert choice.trial.recall > 0.5
    assert str(choice).startswith(f"chosen: {choice.trial.kind}")
    assert "10 % active; rebuilt every" in str(choice)
    assert all(trial.build_s > 0 and trial.select_s > 0 for trial in choice.trials)
    layer = SparseOutput(N, DIM, **choice.settings())
    assert layer.selector == choice.trial.kind
    assert layer.budget == 300


def test_memory_is_a_limit() -> None:
    free = autotune(0.9, N, dim=DIM)
    assert free.trial is not None
    room = min(trial.nbytes for trial in free.trials) + 1
    tight = autotune(0.9, N, room, dim=DIM)
    assert tight.trial is not None
    assert tight.trial.nbytes <= room
    nothing = autotune(0.9, N, 1000, dim=DIM)
    assert nothing.trial is None
    assert nothing.settings()["selector"] == "uniform"
    assert "uniform" in str(nothing)


def test_a_dense_layer_needs_no_index() -> None:
    assert autotune(0.0, N).settings() == {"share": 1.0, "selector": "uniform"}


def test_it_measures_the_layer_that_it_is_given() -> None:
    """Where rows differ in length alone, angles tell nothing and the sketch all."""
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(DIM).astype(np.float32)
    rows = rng.standard_normal((N, 1)).astype(np.float32) * direction
    layer = ItemMemory(PlainTable.of(N, DIM, block=DIM), rows)
    choice = autotune(0.9, N, layer=layer, queries=direction[None])
    recall = {trial.kind: trial.recall for trial in choice.trials}
    assert recall["sketch"] == 1
    assert recall["simhash"] < 1
    assert choice.trial is not None
    assert choice.trial.recall >= 1 - NEARLY


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="sparsity = 1"):
        autotune(1.0, N)
    with pytest.raises(UsageError, match="the layer has 2 neurons"):
        autotune(
            0.5, N, layer=ItemMemory(PlainTable.of(2, 4, block=4), np.ones((2, 4), np.float32))
        )
