"""The shared vector is cut into sections without gap or overlap, dense weights first."""

from __future__ import annotations

import numpy as np
import pytest

from privrec.models.layout import Layout, bands


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


CHAINS = [
    (Layout(3, 8, 2, 8), Layout(3, 2, 2, 2), Layout(3, 1, 2, 1)),
    (Layout(0, 12, 3, 0, 6), Layout(0, 4, 3, 0, 3)),  # dims: a smaller Gram matrix too
    (Layout(2, 5, 1, 4, 3), Layout(2, 5, 1, 4, 3), Layout(2, 5, 1, 2, 3)),
    (Layout(1, 4, 2, 3),),
]


def on_the_wire(vector: np.ndarray, layouts: tuple[Layout, ...]) -> np.ndarray:
    return np.concatenate([part for band in bands(vector, layouts) for part in band])


@pytest.mark.parametrize("chain", CHAINS)
def test_the_gram_matrix_lies_between_dense_weights_and_memory(chain: tuple[Layout, ...]) -> None:
    for layout in chain:
        vector = np.arange(layout.size)
        sections = (
            layout.dense_of(vector),
            layout.gram_of(vector),
            layout.memory_of(vector).ravel(),
            layout.biases_of(vector),
        )
        assert np.array_equal(np.concatenate(sections), vector)
        assert layout.head == layout.dense + layout.gram
        layout.gram_of(vector)[...] = -1  # a view
        assert np.count_nonzero(vector == -1) == layout.gram


@pytest.mark.parametrize("chain", CHAINS)
def test_bands_cover_the_vector_once(chain: tuple[Layout, ...]) -> None:
    vector = np.arange(chain[0].size)
    assert sorted(on_the_wire(vector, chain)) == vector.tolist()
    assert len(list(bands(vector, chain))) == len(chain)
    for band in bands(vector, chain):
        for part in band:
            part[...] = -1  # views, in place
    assert (vector == -1).all()


@pytest.mark.parametrize("chain", CHAINS)
def test_every_tiers_own_vector_is_a_prefix_on_the_wire(chain: tuple[Layout, ...]) -> None:
    vector = np.arange(chain[0].size)
    wire = on_the_wire(vector, chain)
    for index, layout in enumerate(chain):
        held = chain[0].prefix_of(vector, layout)
        own = on_the_wire(held, chain[index:])
        assert len(own) == layout.size
        assert np.array_equal(own, wire[: layout.size])
        # And held of the next stronger one's is held of the whole one's.
        stronger = chain[max(0, index - 1)]
        again = stronger.prefix_of(chain[0].prefix_of(vector, stronger), layout)
        assert np.array_equal(again, held)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_prefix_is_a_copy_of_the_first_of_each_section(chain: tuple[Layout, ...]) -> None:
    vector = np.random.default_rng(0).normal(size=chain[0].size)
    before = vector.copy()
    for layout in chain:
        held = chain[0].prefix_of(vector, layout)
        assert np.array_equal(layout.dense_of(held), chain[0].dense_of(vector))
        assert np.array_equal(layout.gram_of(held), chain[0].gram_of(vector)[: layout.gram])
        assert np.array_equal(layout.memory_of(held), chain[0].memory_of(vector)[: layout.slots])
        assert np.array_equal(
            layout.biases_of(held), chain[0].biases_of(vector)[: layout.bias_slots]
        )
        held[...] = 0
        assert np.array_equal(vector, before)
