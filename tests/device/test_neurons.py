"""The active neurons: an exact budget, every own word, and weights that stand for all words."""

from __future__ import annotations

import numpy as np
import pytest

from privrec.device.words import OutputBudget, spread

WORDS = 1000
OWN = np.array([3, 40, 500, 501, 999])
QUERIES = np.ones((2, 4), np.float32)


def find(queries: np.ndarray, wanted: int, without: np.ndarray) -> np.ndarray:
    """The rarest words that may be chosen."""
    return np.setdiff1d(np.arange(WORDS), without)[-wanted:]


def few(queries: np.ndarray, wanted: int, without: np.ndarray) -> np.ndarray:
    return np.setdiff1d(np.arange(WORDS), without)[: wanted // 3]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37, 0.999])
@pytest.mark.parametrize(("selected", "frequent"), [(0, 0), (0.5, 0), (0, 0.5), (0.4, 0.4), (0, 1)])
@pytest.mark.parametrize("finder", [find, few])
def test_the_budget_is_exact_and_own_words_are_always_in(
    share: float, selected: float, frequent: float, finder: object
) -> None:
    output = OutputBudget(WORDS, share, selected, frequent)
    items, logs = output.active(OWN, QUERIES, finder, 7, 1)  # type: ignore[arg-type]
    assert len(items) == output.size == round(share * WORDS)
    assert (np.diff(items) > 0).all()
    assert np.isin(OWN, items).all()
    assert (logs[np.searchsorted(items, OWN)] == 0).all()
    # Strata: each neuron stands for its share of the words, and all of them for all words.
    if (logs > 0).any():
        assert np.exp(logs.astype(np.float64)).sum() == pytest.approx(WORDS, rel=1e-5)


def test_what_is_public_comes_first_and_what_is_selected_counts_once() -> None:
    output = OutputBudget(WORDS, 0.1, 0.4, 0.4)
    items, logs = output.active(OWN, QUERIES, find, 7, 1)
    sure = items[logs == 0]
    common = round(0.4 * 95)
    assert np.isin(np.setdiff1d(np.arange(common), OWN), sure).all()
    assert np.isin(np.setdiff1d(np.arange(960, WORDS), OWN)[-38:], sure).all()
    assert len(sure) == len(OWN) + common + round(0.4 * 95)


def test_all_active_is_every_word_without_a_weight() -> None:
    items, logs = OutputBudget(WORDS, 1.0, 0.5).active(OWN, QUERIES, None, 1, 1)
    assert items.tolist() == list(range(WORDS))
    assert not logs.any()


def test_hidden_states_that_are_not_numbers_select_nothing() -> None:
    output = OutputBudget(WORDS, 0.1, 0.9)
    broken = np.full((1, 4), np.nan, np.float32)
    items, logs = output.active(OWN, broken, find, 7, 1)
    assert len(items) == output.size
    assert (logs == 0).sum() == len(OWN)


def test_chance_is_keyed_by_round_and_user() -> None:
    output = OutputBudget(WORDS, 0.1)
    first, again, round_, user = (
        output.active(OWN, QUERIES, None, *names)[0].tolist()
        for names in ((5, 2), (5, 2), (6, 2), (5, 3))
    )
    assert first == again
    assert first != round_
    assert first != user


def test_queries_are_spread_over_the_text() -> None:
    assert spread(1000, 4).tolist() == [0, 333, 666, 999]
    assert spread(3, 16).tolist() == [0, 1, 2]
