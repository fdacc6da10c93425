"""Negatives within a budget: what is drawn, what each stands for, and who knows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from on_devices import trained_rows

from privrec.device import device as device_module
from privrec.device import recommender as recommender_module
from privrec.device.device import TOLERANCE, Draws
from privrec.device.local import LocalModel
from privrec.device.samples import Histories, NegativeBudget, popularity_of
from privrec.errors import UsageError
from privrec.models.losses import Samples, sampled_softmax
from privrec.randomness import SecretRoot, SecureStream

N = 400
SELECTIVE = ("scan", "hamming", "sketch", "simhash", "pghash", "block_sign", "auto")
LARGE = {"loss": "softmax", "budget": 0.5, "selected": 0.5}


def histories_of(*lists: list[int]) -> Histories:
    bounds = np.concatenate(([0], np.cumsum([len(items) for items in lists])))
    return Histories(np.arange(len(lists)), bounds, np.concatenate(lists).astype(np.int32))


def functions(user: int) -> SecureStream:
    return SecretRoot.known(b"tests").stream("lsh", user)


@pytest.mark.parametrize("selector", ["uniform", "popularity"])
def test_a_device_alone_draws_what_it_draws_among_others(selector: str) -> None:
    popularity = popularity_of(np.arange(N)) if selector == "popularity" else None
    budget = NegativeBudget(N, 30, selector, 0.5, popularity)
    lists = [[1, 2, 3], [], list(range(200)), [7]]
    together = budget.draw(histories_of(*lists), 5)
    for row, history in enumerate(lists):
        one = replace(histories_of(history), users=np.array([row]))
        for part, alone in zip(together, budget.draw(one, 5), strict=True):
            np.testing.assert_array_equal(part[row], alone[0])


@pytest.mark.statistical
@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2])
@pytest.mark.parametrize("selector", ["uniform", "popularity"])
def test_weighted_draws_stand_for_all_items_outside_the_history(
    selector: str, wrong: float
) -> None:
    rng = np.random.default_rng(1)
    popularity = popularity_of(rng.integers(0, 50, N)) if selector == "popularity" else None
    budget, values = NegativeBudget(N, 40, selector, 0.5, popularity), rng.exponential(size=N)
    history = np.array([3, 5, 300])
    values[history] = 100
    histories = Histories(np.arange(3000), np.arange(3001) * 3, np.tile(history, 3000))
    items, logs, valid = budget.draw(histories, 9)
    sums = (values[items] * np.exp(logs) * valid).sum(1) * wrong
    error = sums.mean() - np.delete(values, history).sum()
    # Dividing by how many of the draws count biases popular draws by a share of 1 / B at most.
    assert bool(abs(error) < 4.5 * sums.std() / np.sqrt(3000) + 0.1) is (wrong == 1.0)
    assert not np.isin(items[valid], history).any()


def test_a_history_of_everything_leaves_nothing_to_contrast_it_with() -> None:
    everything = histories_of(list(range(N)), [1])
    items, logs, valid = NegativeBudget(N, 20, "uniform", 0.5).draw(everything, 3)
    assert not valid[0].any()
    assert valid[1].all()
    assert np.isfinite(logs).all()
    assert items.max() < N


def test_popular_items_come_more_often_by_their_power() -> None:
    counts = np.array([0, 15, 80])
    np.testing.assert_allclose(
        np.diff(popularity_of(counts), prepend=0), np.array([1, 8, 27]) / 36, rtol=0.01
    )


def test_the_softmax_sums_what_each_negative_stands_for() -> None:
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[0.0, 0, 0, np.log(3), 0, 0]] * 2, dtype=torch.float32)
    weighted = sampled_softmax(scores, Samples(torch.ones(2, 6), 2, weights))
    # An item that stands for three is three equal items.
    spelled = torch.cat((scores, scores[:, 3:4], scores[:, 3:4]), dim=1)
    plain = sampled_softmax(spelled, Samples(torch.ones(2, 8), 2))
    torch.testing.assert_close(weighted[0], plain[0])
    for one, other in zip(weighted[1:], plain[1:], strict=True):
        torch.testing.assert_close(one[:, [0, 1, 2, 4, 5]], other[:, [0, 1, 2, 4, 5]])
        torch.testing.assert_close(one[:, 3], other[:, [3, 6, 7]].sum(1))


def refined(lab: Callable[..., Any], **settings: Any) -> tuple[Any, Any, Any]:
    here = lab(**{**LARGE, **settings})
    histories, sampler = here.cohort.data, here.learner.sampler
    batch, budget = sampler.draw(histories, 11), sampler.budget
    assert budget is not None
    search = here.model.search(budget.selector)
    queries = np.random.default_rng(0).standard_normal((len(histories.users), search.items.dim))
    again = budget.refine(batch, histories, queries.astype(np.float32), search, functions, 11)
    return histories, batch, (again, queries.astype(np.float32), search, budget)


@pytest.mark.parametrize("selector", SELECTIVE)
def test_selected_negatives_are_weighted_as_the_strata_they_are(
    lab: Callable[..., Any], selector: str
) -> None:
    histories, batch, (again, _, _, budget) = refined(lab, selector=selector)
    p, n = batch.positives, budget.n_items
    assert again.items.shape == batch.items.shape
    np.testing.assert_array_equal(again.items[:, :p], batch.items[:, :p])
    assert not again.weights[:, :p].any()
    some = 0
    for row in range(len(histories.users)):
        history = set(histories.items[histories.indptr[row] : histories.indptr[row + 1]].tolist())
        drawn, logs = again.items[row, p:], again.weights[row, p:]
        counted = again.valid[row, p:] > 0
        assert not history & set(drawn[counted].tolist())
        left, h = n - len(history), int((counted & (np.arange(len(drawn)) < 8)).sum())
        if left > budget.size and selector in ("scan", "hamming", "sketch", "auto"):
            h = round(budget.selected * budget.size)
            assert not logs[:h].any()
            assert len(set(drawn[:h].tolist())) == h
            np.testing.assert_allclose(logs[h:], np.log((left - h) / (budget.size - h)), rtol=1e-5)
            assert not set(drawn[:h].tolist()) & set(drawn[h:].tolist())
            some += 1
    assert some >= 4 or selector not in ("scan", "hamming", "sketch", "auto")


def test_a_scan_selects_what_the_device_scores_highest(lab: Callable[..., Any]) -> None:
    histories, batch, (again, queries, search, budget) = refined(lab, selector="scan")
    scores = search.items.rows(np.arange(budget.n_items)) @ queries.T
    h = round(budget.selected * budget.size)
    for row in (1, 2, 5):
        own = histories.items[histories.indptr[row] : histories.indptr[row + 1]]
        mine = scores[:, row].copy()
        mine[own] = -np.inf
        right = np.sort(np.argsort(-mine)[:h])
        np.testing.assert_array_equal(again.items[row, batch.positives :][:h], right)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("selector", ["uniform", *SELECTIVE])
def test_cohort_and_one_device_agree(
    lab: Callable[..., Any], vector: Callable[..., Any], selector: str, biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recommender_module, "SAMPLES_IN_BATCH", 60)
    monkeypatch.setattr(device_module, "MANY", 1)
    here = lab(item_bias=biased, selector=selector, **LARGE)
    together, draws = {}, Draws(here.key, functions)
    for batch, trained in trained_rows(
        here.cohort, here.weights, np.arange(len(here.users)), draws
    ):
        for row, user in enumerate(batch):
            together[int(user)] = vector(trained.update, row)
    for user in here.users:
        alone = here.device(int(user)).train(here.model, draws)
        right = vector(alone.update)
        scale = max(np.abs(right).max(), 1e-9)
        assert np.abs(together[int(user)] - right).max() <= TOLERANCE * scale


def test_a_single_device_never_holds_the_table(
    lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = lab(selector="scan", **LARGE)
    vectors = here.learner.view.vectors
    few, many = (
        LocalModel(here.learner.view, here.weights, resident=many).search("scan")
        for many in (False, True)
    )
    assert np.shares_memory(few.items.memory, here.weights)
    assert not np.shares_memory(many.items.memory, here.weights)
    assert many.items.memory.size == vectors.items * vectors.dim
    used: list[Any] = []
    honest = LocalModel.search

    def noted(self: LocalModel, *given: Any) -> Any:
        used.append(honest(self, *given))
        return used[-1]

    monkeypatch.setattr(LocalModel, "search", noted)
    here.device(3).train(here.model, Draws(here.key, functions))
    list(trained_rows(here.cohort, here.weights, here.users, Draws(here.key, functions)))
    # Nor do a few devices together.
    assert all(np.shares_memory(search.items.memory, here.weights) for search in used)


def test_without_a_secret_nothing_is_selected(lab: Callable[..., Any]) -> None:
    here = lab(selector="hamming", **LARGE)
    with pytest.raises(UsageError, match="from a secret"):
        here.device(0).train(here.model, Draws(here.key))


def test_a_new_device_starts_with_uniform_negatives(lab: Callable[..., Any]) -> None:
    here = lab(selector="scan", user_steps=0, **LARGE)
    here.states[0] = 0
    trained = here.device(0).train(here.model, Draws(here.key, functions))
    assert np.isfinite(trained.update.values).all()


def test_functions_are_of_one_device_and_one_round(lab: Callable[..., Any]) -> None:
    here = lab()
    root, other = SecretRoot(b"\x01" * 32), SecretRoot(b"\x02" * 32)
    first, later = here.round(0), here.round(1)
    drawn = [
        Draws.of(of, round, 0).functions(user).bytes(32)
        for of, round, user in (
            (root, first, 0), (root, first, 1), (root, later, 0), (other, first, 0),
            (root, first, 0),
        )
    ]  # fmt: skip
    assert len(set(drawn)) == 4
    assert drawn[4] == drawn[0]


@pytest.mark.parametrize("selector", ["hamming", "pghash"])
def test_functions_and_selected_items_appear_in_no_message(
    lab: Callable[..., Any], selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a device says is an update of the public shape, whatever it searched with."""
    here = lab(selector=selector, **LARGE)
    secrets: list[bytes] = []
    original = SecureStream.normal

    def watched(self: SecureStream, size: int) -> Any:
        drawn = original(self, size)
        secrets.extend(part.astype(np.float32).tobytes() for part in np.split(drawn[:64], 8))
        return drawn

    monkeypatch.setattr(SecureStream, "normal", watched)
    device, round = here.device(3), here.round()
    message = device.answer(round, here.weights, here.key).vector()
    assert secrets  # functions were drawn
    wire = message.tobytes()
    assert not any(secret in wire for secret in secrets)
    assert len(message) == here.learner.view.layout.size
    # Nor do they stay in what the device keeps.
    kept = here.device(3).__dict__
    assert not any("hash" in name or "table" in name for name in kept)


@pytest.mark.parametrize("selector", ["uniform", "popularity", "scan", "pghash"])
def test_a_budget_of_everything_is_the_softmax_of_the_whole_catalogue(
    lab: Callable[..., Any], selector: str
) -> None:
    here = lab(selector=selector, loss="softmax", budget=0.05, serve_budget=1.0, serve_steps=200)
    fitted, again = (
        here.learner.serve(here.weights, here.cohort.data, Draws(key))
        for key in (here.key, here.key + 1)
    )
    np.testing.assert_allclose(fitted, again, atol=1e-5)
    items = here.model.items
    table = torch.from_numpy(items.rows(np.arange(items.items)))
    for user in here.users[here.cohort.data.lengths > 0]:
        history = here.history(int(user)).items.astype(np.int64)
        wanted = torch.from_numpy(fitted[user, :-1]).requires_grad_()
        scores = table[:, :-1] @ wanted + table[:, -1]
        others = np.delete(np.arange(items.items), history)
        behind = torch.logsumexp(scores[others], 0) - scores[history]
        loss = torch.nn.functional.softplus(behind).sum()
        prior = here.learner.settings.user_l2 / 2 * wanted.square().sum()
        (slope,) = torch.autograd.grad(loss + prior, wanted)
        assert slope.abs().max() < 1e-3


def test_serving_has_batches_of_its_own_size(lab: Callable[..., Any]) -> None:
    here = lab(selector="uniform", loss="softmax", budget=0.05, serve_budget=1.0, max_samples=1)
    widths = here.learner.serving.sampler.width(here.cohort.data.lengths)
    np.testing.assert_array_equal(widths, here.cohort.data.lengths.clip(1) + 30)
    assert here.learner.sampler.budget.size == 2


@pytest.mark.parametrize("selector", ["uniform", "scan", "pghash"])
def test_the_full_softmax_of_a_budget_of_everything_is_the_full_softmax(
    lab: Callable[..., Any], vector: Callable[..., np.ndarray], selector: str
) -> None:
    plain = lab(loss="full_softmax", serve_steps=20)
    here = lab(selector=selector, loss="full_softmax", budget=1.0, serve_steps=20)
    expected, found = (
        each.learner.serve(each.weights, each.cohort.data, Draws(each.key))
        for each in (plain, here)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for user in (3, 4):
        vectors = [vector(each.alone(user).update) for each in (plain, here)]
        assert np.abs(vectors[0]).max() > 1e-3
        np.testing.assert_allclose(*vectors, atol=1e-5)
