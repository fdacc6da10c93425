"""The shared vector is cut into sections without gap or overlap, dense weights first."""

from __future__ import annotations

import numpy as np
import pytest

from privrec.models.layout import Layout


@pytest.mark.parametrize(
    ("dense", "slots", "block", "biases"), [(7, 4, 3, 8), (0, 2, 5, 0), (3, 1, 1, 1)]
)
def test_sections_cover_the_vector_in_order(
    dense: int, slots: int, block: int, biases: int
) -> None:
    layout = Layout(dense, slots, block, biases)
    vector = np.arange(layout.size)
    sections = layout.dense_of(vector), layout.memory_of(vector), layout.biases_of(vector)
    assert [part.shape for part in sections] == [(dense,), (slots, block), (biases,)]
    assert np.array_equal(np.concatenate([part.ravel() for part in sections]), vector)


def test_sections_are_views() -> None:
    layout = Layout(2, 2, 2, 2)
    vector = np.zeros(layout.size)
    layout.dense_of(vector)[...] = 1
    layout.memory_of(vector)[...] = 2
    layout.biases_of(vector)[...] = 3
    assert vector.tolist() == [1, 1, 2, 2, 2, 2, 3, 3]


def test_the_dense_weights_are_a_prefix_of_every_memory() -> None:
    whole, folded = Layout(5, 8, 2, 8), Layout(5, 2, 2, 2)
    vector = np.arange(whole.size)
    assert np.array_equal(whole.dense_of(vector), folded.dense_of(vector[: folded.size]))
