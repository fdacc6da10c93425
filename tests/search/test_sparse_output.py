from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from privrec.data.corpus import NO_LABEL
from privrec.embedding.subspace import Subspace
from privrec.errors import UsageError
from privrec.models.sparse_output import SparseOutput, distinct_labels
from privrec.randomness import SecretRoot
from privrec.search.hashing import Shape
from privrec.search.index import INDEXES, Rebuild
from privrec.search.select import active_set

N, DIM, BATCH = 600, 16, 12
ROOT = SecretRoot.known(b"sparse output tests")
EVERY = (*INDEXES, "scan", "uniform")


def layer(**settings: object) -> SparseOutput:
    made = SparseOutput(N, DIM, root=ROOT, **{"share": 0.1, **settings})  # type: ignore[arg-type]
    if made.bias is not None:
        made.bias.data.copy_(torch.linspace(-1, 1, N)[:, None])
    return made


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.standard_normal((BATCH, DIM)).astype(np.float32))
    labels = rng.integers(0, N, (BATCH, 3))
    labels[::2, 1:] = NO_LABEL  # examples differ in their number of labels
    return hidden, torch.from_numpy(labels)


def table(compression: float) -> Subspace:
    return Subspace.sized(N, DIM, block=4, key=5, compression=compression)


def dense_loss(scores: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Written from the definition, example by example."""
    losses = []
    for row, own in zip(scores, labels, strict=True):
        real = own[own >= 0]
        if kind == "softmax":
            losses.append(-torch.log_softmax(row, 0)[real].mean())
        else:
            wanted = torch.zeros(N).index_fill(0, real, 1.0)
            losses.append(functional.binary_cross_entropy_with_logits(row, wanted, reduction="sum"))
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------- equal to a dense layer


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("compression", [None, 1.0, 8.0])
@pytest.mark.parametrize("bias", [True, False])
def test_with_everything_active_it_is_a_dense_layer(
    kind: str, compression: float | None, bias: bool
) -> None:
    own = None if compression is None else table(compression)
    made = layer(share=1.0, table=own, bias=bias)
    hidden, labels = batch()
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weight = made.weight.detach().clone().requires_grad_()
    shift = torch.zeros(N) if made.bias is None else made.bias.detach()[:, 0].clone()
    shift.requires_grad_()
    rows = weight
    if own is not None:
        slots, signs = (torch.from_numpy(each) for each in own.locate(np.arange(N)))
        rows = (weight[slots] * signs[..., None]).reshape(N, DIM)
    loss = made.loss(mine, labels, kind)  # type: ignore[arg-type]
    wanted = dense_loss(theirs @ rows.T + shift, labels, kind)
    loss.backward()
    wanted.backward()
    # Sums over 600 neurons differ by rounding in proportion to their size.
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert made.weight.grad is not None
    assert made.weight.grad.is_sparse
    torch.testing.assert_close(made.weight.grad.to_dense(), weight.grad, rtol=1e-5, atol=1e-5)
    if made.bias is not None:
        assert made.bias.grad is not None
        assert shift.grad is not None
        torch.testing.assert_close(
            made.bias.grad.to_dense()[:, 0], shift.grad, rtol=1e-5, atol=1e-5
        )


def test_forward_is_the_dense_layer() -> None:
    made, (hidden, _) = layer(), batch()
    assert made.bias is not None
    torch.testing.assert_close(made(hidden), hidden @ made.weight.T + made.bias.T)


# --------------------------------------------------------------------------------- the active set


@pytest.mark.parametrize("selector", EVERY)
@pytest.mark.parametrize("share", [0.06, 0.1, 0.5, 1.0])
def test_labels_are_active_and_the_budget_is_exact(selector: str, share: float) -> None:
    made = layer(share=share, selector=selector, shape=Shape(6, 3))
    for seed in range(4):
        hidden, labels = batch(seed)
        chosen = made.active(hidden, labels)
        wanted = np.unique(labels[labels >= 0])
        neurons = chosen.neurons.numpy()
        assert len(chosen) == len(neurons) == round(share * N) == made.budget
        assert len(np.unique(neurons)) == len(neurons)
        np.testing.assert_array_equal(neurons[: chosen.labels], wanted)
        np.testing.assert_array_equal(
            chosen.neurons[chosen.places(labels)][labels >= 0], labels[labels >= 0]
        )


def test_what_is_counted_is_the_union_over_the_batch() -> None:
    made = layer(share=0.1, selector="scan", selected=1.0)
    hidden, labels = batch()
    chosen = made.active(hidden, labels)
    assert chosen.share == 0.1
    assert str(chosen).startswith("60 of 600 neurons (10.00 %): ")
    loss = made.loss(hidden, labels, active=chosen)
    loss.backward()
    assert made.weight.grad is not None
    moved = made.weight.grad.coalesce().indices()[0]
    # Whatever the examples want by themselves, the gradient touches this many neurons in all.
    assert len(moved) == 60
    assert set(moved.tolist()) == set(chosen.neurons.tolist())


def test_selected_neurons_are_the_best_that_are_no_labels() -> None:
    made = layer(share=0.1, selector="scan", selected=0.5)
    hidden, labels = batch()
    chosen = made.active(hidden, labels)
    assert chosen.selected == round(0.5 * (60 - chosen.labels))
    scores = made(hidden) - made(hidden).mean(1, keepdim=True)
    # The selector takes a sample's mean from all neurons, which here is everybody's.
    best = scores.max(0).values.index_fill(0, chosen.neurons[: chosen.labels], -torch.inf)
    wanted = best.topk(chosen.selected).indices.sort().values
    found = chosen.neurons[chosen.labels : chosen.labels + chosen.selected]
    np.testing.assert_array_equal(found, wanted)


def test_neurons_that_somebody_else_selected_are_taken_in_their_order() -> None:
    own, given = np.array([3, 5, 8]), np.random.default_rng(0).permutation(N)
    chosen = active_set(own, given, 60, N, ROOT.stream("nobody is left to chance"))
    wanted = [neuron for neuron in given.tolist() if neuron not in own][: chosen.selected]
    assert chosen.selected == 57
    found = chosen.neurons[chosen.labels : chosen.labels + chosen.selected]
    assert found.tolist() == sorted(wanted)


def test_more_labels_than_the_budget_are_refused() -> None:
    hidden, labels = batch()
    with pytest.raises(UsageError, match="distinct labels in a batch and a budget of 6"):
        layer(share=0.01).active(hidden, labels)


@pytest.mark.parametrize("wrong", [-2, N])
def test_a_label_out_of_range_is_refused(wrong: int) -> None:
    hidden, labels = batch()
    labels[3, 0] = wrong
    with pytest.raises(UsageError, match=f"label {wrong}"):
        layer().loss(hidden, labels)


# -------------------------------------------------------------------------------------- weights


@pytest.mark.statistical
def test_the_weighted_sum_estimates_the_whole_layers() -> None:
    rng = np.random.default_rng(2)
    values = rng.exponential(size=N)
    labels, selected = np.arange(20), np.arange(100, 130)
    stream = ROOT.stream("weights")
    sums, plain = [], []
    for _ in range(4000):
        chosen = active_set(labels, selected, 90, N, stream)
        some = values[chosen.neurons]
        certain = chosen.labels + chosen.selected
        weights = np.exp(chosen.log_weights.numpy())
        sums.append(some @ weights)
        plain.append(some[certain:] @ weights[certain:])
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - values.sum()) < 4 * error
    for factor in (2 / 3, 3 / 2):
        wrong = np.mean(sums) + (factor - 1) * np.mean(plain)
        assert abs(wrong - values.sum()) > 8 * error


@pytest.mark.statistical
def test_every_other_neuron_is_equally_likely_to_be_drawn() -> None:
    labels, stream = np.arange(0, 40, 2), ROOT.stream("evenly")
    counts = np.zeros(N)
    for _ in range(3000):
        counts[active_set(labels, labels[:0], 80, N, stream).neurons] += 1
    assert (counts[labels] == 3000).all()
    others = np.delete(counts, labels)
    rate = 60 / (N - 20)
    spread = others.std() / np.sqrt(3000 * rate * (1 - rate))
    assert 0.85 < spread < 1.15
    assert abs(others.mean() - 3000 * rate) < 1e-9


# ------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("selector", EVERY)
@pytest.mark.parametrize("compressed", [False, True])
def test_scores_of_topk_are_exact(selector: str, compressed: bool) -> None:
    made = layer(selector=selector, table=table(4.0) if compressed else None, candidates=0.2)
    hidden, _ = batch()
    scores, neurons = made.topk(hidden, 3)
    assert scores.shape == neurons.shape == (BATCH, 3)
    torch.testing.assert_close(scores, made(hidden).gather(1, neurons))
    assert (scores.diff(dim=1) <= 0).all()
    one = made.topk(hidden[0], 3)
    np.testing.assert_array_equal(one[1], neurons[0])


@pytest.mark.parametrize("selector", ["scan", "uniform"])
def test_without_an_index_topk_is_brute_force(selector: str) -> None:
    made, (hidden, _) = layer(selector=selector), batch()
    np.testing.assert_array_equal(made.topk(hidden, 5)[1], made(hidden).topk(5).indices)


@pytest.mark.parametrize(("selector", "least"), [("hamming", 0.9), ("sketch", 0.9), ("cells", 0.9)])
def test_an_index_finds_the_best_of_grouped_neurons(selector: str, least: float) -> None:
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((40, DIM))
    made = SparseOutput(4000, DIM, share=0.1, selector=selector, candidates=0.1, root=ROOT)
    rows = centres[rng.integers(0, 40, 4000)] + 0.3 * rng.standard_normal((4000, DIM))
    made.weight.data.copy_(torch.from_numpy(rows))
    hidden = torch.from_numpy(
        (centres[rng.integers(0, 40, 64)] + 0.3 * rng.standard_normal((64, DIM))).astype(np.float32)
    )
    found = made.topk(hidden, 1)[1][:, 0]
    assert (found == made(hidden).argmax(1)).float().mean() >= least


def test_what_an_index_does_not_find_is_marked() -> None:
    made = layer(selector="simhash", shape=Shape(12, 1))
    hidden, _ = batch()
    scores, neurons = made.topk(hidden, N)
    short = neurons == -1
    assert short.any()
    assert torch.isinf(scores[short]).all()
    assert torch.isfinite(scores[~short]).all()


@pytest.mark.parametrize("k", [0, N + 1])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=f"k = {k}"):
        layer().topk(batch()[0], k)


# ------------------------------------------------------------------------------------- schedules


def test_an_index_is_made_anew_every_so_many_steps() -> None:
    made = layer(rebuild=Rebuild(every=3, changed=None))
    hidden, labels = batch()
    counts = []
    for _ in range(7):
        made.active(hidden, labels)
        counts.append(made.rebuilds)
    assert counts == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("selector", INDEXES)
def test_an_index_is_made_anew_when_its_codes_have_changed(selector: str) -> None:
    made = layer(selector=selector, rebuild=Rebuild(changed=0.01, check=2), shape=Shape(8, 4))
    hidden, labels = batch()
    for _ in range(6):
        made.active(hidden, labels)
    assert made.rebuilds == 1  # nothing has moved
    index = made.index()
    assert index.changed(made.items()) == 0
    with torch.no_grad():
        made.weight[:] = torch.from_numpy(
            np.random.default_rng(8).standard_normal((N, DIM)).astype(np.float32)
        )
    assert index.changed(made.items()) > 0.01
    for _ in range(4):
        made.active(hidden, labels)
    assert made.rebuilds == 2


def test_inference_follows_the_weights_once_and_training_does_not() -> None:
    made, (hidden, _) = layer(), batch()
    made.topk(hidden, 1)
    with torch.no_grad():
        made.weight += 1.0
    made.topk(hidden, 1)
    assert made.rebuilds == 1
    made.eval()
    for _ in range(2):
        made.topk(hidden, 1)
    assert made.rebuilds == 2
    made.load_state_dict(made.state_dict())
    made.topk(hidden, 1)
    assert made.rebuilds == 3


@pytest.mark.parametrize("selector", INDEXES)
def test_a_small_change_of_few_neurons_is_no_reason(selector: str) -> None:
    made = layer(selector=selector, shape=Shape(8, 4))
    index = made.index()
    with torch.no_grad():
        made.weight[7] += 0.5
    assert 0 <= index.changed(made.items()) <= 0.01


def test_known_roots_repeat_and_fresh_ones_differ() -> None:
    hidden, labels = batch()
    first, again = (layer(selector="uniform").active(hidden, labels) for _ in range(2))
    np.testing.assert_array_equal(first.neurons, again.neurons)
    fresh = [SparseOutput(N, DIM, share=0.1, selector="uniform") for _ in range(2)]
    drawn = [set(each.active(hidden, labels).neurons.tolist()) for each in fresh]
    assert drawn[0] != drawn[1]


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share = 0.0"),
        ({"share": 1.5}, "share = 1.5"),
        ({"selected": -0.1}, "selected = -0.1"),
        ({"selector": "magic"}, 'selector = "magic"'),
        ({"candidates": 0.0}, "candidates = 0.0"),
        ({"table": Subspace.sized(N, 8, block=4, key=5)}, "a table of 600 rows of 8 numbers"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layer(**settings)


def test_bad_schedules_sizes_and_losses_are_refused() -> None:
    with pytest.raises(UsageError, match="every = 0"):
        Rebuild(every=0)
    with pytest.raises(UsageError, match="changed = 1"):
        Rebuild(changed=1.0)
    with pytest.raises(UsageError, match="n = 0"):
        SparseOutput(0, DIM)
    with pytest.raises(UsageError, match="has no index"):
        layer(selector="scan").reindex()
    with pytest.raises(UsageError, match='loss = "hinge"'):
        layer().loss(*batch(), "hinge")  # type: ignore[arg-type]


def test_labels_of_a_batch_are_distinct_and_without_filling() -> None:
    labels = torch.tensor([[3, NO_LABEL], [1, 3]])
    assert distinct_labels(labels, 5).tolist() == [1, 3]


def by_torch(model: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "torch": by_torch,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("known", [False, True])
def test_a_copy_has_the_weights_and_no_secret(how: str, known: bool) -> None:
    root = SecretRoot.known(b"root") if known else SecretRoot(bytes(range(32)))
    first = SparseOutput(300, 8, share=0.2, selector="simhash", root=root).eval()
    first.index()
    second = COPIES[how](first)
    assert second.weight.equal(first.weight)
    assert second._root.is_known == known
    assert second._root.tag("x") != first._root.tag("x")
    assert (second._index is None) != known
    hidden = torch.from_numpy(np.random.default_rng(1).standard_normal((20, 8), np.float32))
    if known:
        assert all(map(torch.equal, second.topk(hidden, 3), first.topk(hidden, 3)))
        again, other = COPIES[how](first), COPIES[how](second)
        assert again._root.tag("x") == second._root.tag("x") != other._root.tag("x")
    else:
        assert COPIES[how](first)._root.tag("x") != second._root.tag("x")
        assert root._extracted not in pickle.dumps(first)
    held = second.index()
    with torch.no_grad():  # counts of changes begin anew in a copy
        for _ in range(3):
            second.weight.add_(1.0)
            assert second.index() is not held
            held = second.index()
