"""Each loss is what its name says, its gradient is autograd's, and its curvature is a bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from privrec.models.losses import Samples, loss_of
from privrec.scenario import kinds

LOSSES = {name: loss_of(name) for name in kinds.LOSSES}
GRADES = {name: loss.grade for name, loss in LOSSES.items()}
IMPLICIT = {name for name, loss in LOSSES.items() if loss.implicit}
WHOLE_CATALOGUE = {name for name, loss in LOSSES.items() if loss.whole_catalogue}
SAMPLED = sorted(set(LOSSES) - WHOLE_CATALOGUE - IMPLICIT)
P, NEG = 3, 2
K = P * (1 + NEG)


def samples_of(loss: str, valid: Tensor) -> Samples:
    if loss in IMPLICIT:
        return Samples(valid, K)  # all are positives: negatives are never drawn
    return Samples(valid, 0 if loss in WHOLE_CATALOGUE else P)


def masks(loss: str, m: int, seed: int, share: float = 0.7) -> Tensor:
    """Which samples count; as on a device, a padded positive has no valid negatives."""
    draw = torch.Generator().manual_seed(seed)
    valid = (torch.rand(m, K, generator=draw) < share).float()
    if loss not in WHOLE_CATALOGUE | IMPLICIT:
        valid[:, P:] *= valid[:, :P].repeat_interleave(NEG, dim=1)
    return valid


def scores_of(m: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(m, K, generator=torch.Generator().manual_seed(seed))


def bce_by_hand(s: list[float], valid: list[float]) -> float:
    total = 0.0
    for i, x in enumerate(s):
        chance = 1 / (1 + math.exp(-x))
        total -= valid[i] * math.log(chance if i < P else 1 - chance)
    return total


def bpr_by_hand(s: list[float], valid: list[float]) -> float:
    total = 0.0
    for i in range(P):
        for j in range(P + i * NEG, P + (i + 1) * NEG):
            total -= valid[i] * valid[j] * math.log(1 / (1 + math.exp(s[j] - s[i])))
    return total


def softmax_by_hand(s: list[float], valid: list[float]) -> float:
    others = sum(math.exp(s[j]) for j in range(P, K) if valid[j])
    return -sum(valid[i] * math.log(math.exp(s[i]) / (math.exp(s[i]) + others)) for i in range(P))


def full_softmax_by_hand(s: list[float], history: list[float]) -> float:
    total = sum(math.exp(x) for x in s)
    return -sum(h * math.log(math.exp(x) / total) for x, h in zip(s, history, strict=True))


def ials_by_hand(s: list[float], valid: list[float]) -> float:
    return sum(v * (1 - x) ** 2 / 2 for x, v in zip(s, valid, strict=True))


BY_HAND = {
    "bce": bce_by_hand,
    "bpr": bpr_by_hand,
    "softmax": softmax_by_hand,
    "full_softmax": full_softmax_by_hand,
    "ials": ials_by_hand,
}


def test_every_loss_is_tested() -> None:
    assert set(BY_HAND) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_value_is_the_formula(name: str) -> None:
    scores, valid = scores_of(5, 1), masks(name, 5, 2)
    valid[0] = 1 if name not in WHOLE_CATALOGUE else valid[0]
    found = GRADES[name](scores.clone(), samples_of(name, valid))[0]
    expected = [BY_HAND[name](s, v) for s, v in zip(scores.tolist(), valid.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_value(name: str) -> None:
    scores, valid = scores_of(6, 3).requires_grad_(), masks(name, 6, 4)
    samples = samples_of(name, valid)
    value = GRADES[name](scores, samples)[0]
    expected = torch.autograd.grad(value.sum(), scores)[0]
    found = GRADES[name](scores.detach().clone(), samples)[1]
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.abs().max() > 0.1


def test_a_weighed_sample_is_the_full_softmax_over_what_it_stands_for() -> None:
    """A negative that stands for three is one of three equals; padding is none of them."""
    scores, valid = scores_of(4, 5), torch.ones(4, K)
    valid[:, 1], valid[:, P + 2], valid[3] = 0, 0, 0
    times = torch.tensor([1] * P + [3, 1, 2, 3, 1, 2][: K - P])
    samples = Samples(valid, P, torch.log(times.double()).float().expand(4, -1))
    value, gradient, curvature = GRADES["full_softmax"](scores.clone(), samples)
    for row in range(3):
        kept = [j for j in range(K) if valid[row, j]]
        spread = [j for j in kept for _ in range(int(times[j]))]
        history = torch.tensor([[float(j < P) for j in spread]])
        whole = GRADES["full_softmax"](scores[row, spread][None].clone(), Samples(history, 0))
        assert value[row] == pytest.approx(float(whole[0]), rel=1e-5)
        together = torch.zeros(K).index_add_(0, torch.tensor(spread), whole[1][0])
        assert torch.allclose(gradient[row], together, atol=1e-5)
    assert value[3] == 0
    assert not gradient[3].any()
    assert not curvature[3].any()


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1e-3, 0.3, 2.0, 8.0, 30.0]))
def test_curvature_is_never_below_the_hessian(name: str, seed: int, scale: float) -> None:
    valid = masks(name, 1, seed)
    samples = samples_of(name, valid.double())
    scores = scores_of(1, seed + 1, scale).double()

    def value(s: Tensor) -> Tensor:
        return GRADES[name](s[None], samples)[0][0]

    hessian = torch.autograd.functional.hessian(value, scores[0])
    curvature = GRADES[name](scores.clone(), samples)[2][0]
    assert curvature.min() >= 0
    lowest = torch.linalg.eigvalsh(torch.diag(curvature) - hessian).min()
    assert float(lowest) > -1e-6


@pytest.mark.parametrize("name", ["bce", "bpr", "ials"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), length=st.sampled_from([0.1, 1.0, 5.0, 20.0]))
def test_a_newton_step_never_goes_up(name: str, seed: int, length: float) -> None:
    """Their curvature bounds the loss everywhere, not just to second order at the point."""
    samples = samples_of(name, masks(name, 1, seed).double())
    scores = scores_of(1, seed + 1, length).double()
    before, gradient, curvature = GRADES[name](scores.clone(), samples)
    moved = scores - gradient / curvature.clamp_min(1e-12)
    assert float(GRADES[name](moved, samples)[0]) <= float(before) + 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_padding_has_no_part(name: str) -> None:
    valid = masks(name, 4, 5)
    scores = scores_of(4, 6)
    other = torch.where(valid == 0, scores + 3, scores)
    if name in WHOLE_CATALOGUE:
        other = scores  # every item is a candidate; only the history is marked
    one, two = (GRADES[name](s.clone(), samples_of(name, valid)) for s in (scores, other))
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    if name not in WHOLE_CATALOGUE:
        assert not one[1][valid == 0].any()
        assert not one[2][valid == 0].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_device_without_samples_has_no_loss(name: str) -> None:
    valid = masks(name, 2, 7)
    valid[0] = 0
    value, gradient, curvature = GRADES[name](scores_of(2, 8), samples_of(name, valid))
    assert value[0] == 0
    assert not gradient[0].any()
    assert not curvature[0].any()
    assert value[1] > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_positives_whose_negatives_were_all_in_the_history(name: str) -> None:
    valid = torch.cat((torch.ones(1, P), torch.zeros(1, K - P)), dim=1)
    value, gradient, curvature = GRADES[name](scores_of(1, 9), samples_of(name, valid))
    for part in (value, gradient, curvature):
        assert torch.isfinite(part).all()
    assert not gradient[:, P:].any()
    if name != "bce":  # nothing to compare with: nothing to learn
        assert value.abs().max() < 1e-6
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [0.0, 1e-4, 90.0, 1e3])
def test_extreme_scores_stay_finite(name: str, size: float) -> None:
    signs = torch.sign(scores_of(3, 10))
    parts = GRADES[name](size * signs, samples_of(name, torch.ones(3, K)))
    assert all(torch.isfinite(part).all() for part in parts)


@pytest.mark.parametrize("name", LOSSES)
def test_devices_do_not_mix(name: str) -> None:
    scores, valid = scores_of(3, 11), masks(name, 3, 12)
    together = GRADES[name](scores.clone(), samples_of(name, valid))
    alone = GRADES[name](scores[1:2].clone(), samples_of(name, valid[1:2]))
    for whole, part in zip(together, alone, strict=True):
        assert torch.allclose(whole[1:2], part, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_scores_and_samples_are_left_as_they_are(name: str) -> None:
    scores, valid = scores_of(3, 13), masks(name, 3, 14)
    before = scores.clone(), valid.clone()
    GRADES[name](scores, samples_of(name, valid))
    assert torch.equal(scores, before[0])
    assert torch.equal(valid, before[1])
