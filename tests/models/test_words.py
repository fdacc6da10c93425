"""The language model looks back and never ahead, and a sampled softmax is an unbiased one."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from privrec.models.losses import sampled_loss
from privrec.models.words import NextWord
from privrec.randomness import rng_for

SMALL = NextWord(dim=8, heads=2, ffn=12, layers=2, context=6)


def dense(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(SMALL.initial_dense(rng_for(seed, "dense")))


def test_the_sizes_are_those_of_the_paper() -> None:
    model = NextWord()
    attention, feed_forward = 4 * 96 * 97, 96 * 1536 + 1536 + 1536 * 96 + 96
    assert model.dense == 20 * 96 + attention + feed_forward + 6 * 96
    assert len(model.initial_dense(rng_for(0, "x"))) == model.dense


def test_a_state_depends_on_no_later_word_and_on_every_earlier_one() -> None:
    words = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    before = SMALL.hidden(words, dense())
    for changed in range(6):
        other = words.clone()
        other[0, changed, 0] += 1  # a shift of all numbers would be normalised away
        moved = (SMALL.hidden(other, dense()) - before).abs().amax(2)[0] > 1e-6
        assert moved.tolist() == [False] * changed + [True] * (6 - changed)


def test_shorter_sequences_are_prefixes() -> None:
    words = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))
    whole, short = SMALL.hidden(words, dense()), SMALL.hidden(words[:, :4], dense())
    assert torch.allclose(whole[:, :4], short, atol=1e-6)


def test_multiply_adds_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = NextWord(layers=1)
    weights = torch.from_numpy(model.initial_dense(rng_for(0, "x")))
    with FlopCounterMode(display=False) as counter:
        model.hidden(torch.zeros(4, 20, 96), weights)
    # Attention over 20 words is counted in full by torch, and by half here: it is causal.
    assert abs(counter.get_total_flops() / 2 / model.multiply_adds(80) - 1) < 0.03


def test_with_all_neurons_active_it_is_the_full_softmax_in_value_and_gradient() -> None:
    maker = torch.Generator().manual_seed(3)
    hidden, rows = (torch.randn(n, 8, generator=maker, requires_grad=True) for n in (10, 30))
    biases = torch.randn(30, generator=maker, requires_grad=True)
    targets = torch.randint(0, 30, (10,), generator=maker)
    ours = sampled_loss(hidden, rows, biases, torch.zeros(30), targets)
    whole = cross_entropy(hidden @ rows.T + biases, targets)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, rows, biases)),
        torch.autograd.grad(whole, (hidden, rows, biases)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(ours, whole, atol=1e-6)


def test_weights_of_a_sample_make_the_sum_over_words_right_on_average() -> None:
    rng = np.random.default_rng(4)
    hidden, rows = (
        torch.from_numpy(rng.normal(0, 0.5, (n, 8)).astype(np.float32)) for n in (1, 200)
    )
    scores = (hidden @ rows.T)[0]
    whole = torch.exp(scores).sum()
    sums = []
    for _ in range(400):
        drawn = np.append(0, 1 + rng.choice(199, 20, replace=False))
        logs = torch.full((21,), float(np.log(199 / 20)))
        logs[0] = 0
        loss = sampled_loss(
            hidden, rows[drawn], torch.zeros(21), logs, torch.zeros(1, dtype=torch.int64)
        )
        sums.append(float(torch.exp(loss + scores[0])))
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - float(whole)) < 4 * error
    # Without the weights it would be far off.
    assert error < 0.02 * float(whole)
