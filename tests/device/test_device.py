"""What a device says is short, is an answer to the round it names, and is never a crash."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privrec.device.update import digest
from privrec.errors import ReleaseRefused
from privrec.secagg.ring import Encoding


def norm(vector: np.ndarray) -> float:
    return float(np.sqrt(float((vector.astype(object) ** 2).sum())))


@pytest.mark.parametrize("compression", [1.0, 8.0])
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("scale_bits", [4, 13, 20])
def test_the_answer_is_within_the_bound(lab, compression, clip_norm, scale_bits) -> None:
    here = lab("neumf", compression, local_lr=50.0, local_steps=2)
    encoding = Encoding(clip_norm, here.learner.view.layout.size, scale_bits)
    for user in here.users:
        answer = here.device(user, encoding).answer(here.round(), here.weights, here.key)
        assert norm(answer.vector()) <= encoding.bound


@pytest.mark.parametrize("compression", [1.0, 8.0])
@pytest.mark.parametrize("history", [[5] * 4, [0] * 9, [1, 2, 1, 2, 1, 7], list(range(30)) * 3])
def test_a_history_that_repeats_items_is_within_the_bound(lab, compression, history) -> None:
    """Readers refuse repeated items, but a device promises its bound for whatever it holds."""
    here = lab("gmf", compression, histories=[np.array(history, np.int32)], local_lr=100.0)
    encoding = Encoding(0.5, here.learner.view.layout.size)
    answer = here.device(0, encoding).answer(here.round(), here.weights, here.key)
    assert 0 < norm(answer.vector()) <= encoding.bound


def test_the_answer_is_the_clipped_update(lab, vector) -> None:
    here = lab("neumf", local_steps=2)
    raw = vector(here.alone(3).update)
    for clip_norm in (np.linalg.norm(raw) * 2, np.linalg.norm(raw) / 3):
        encoding = Encoding(float(clip_norm), len(raw), 20)
        sent = here.device(3, encoding).answer(here.round(), here.weights, here.key).vector()
        expected = raw * min(1, clip_norm / np.linalg.norm(raw))
        assert np.abs(encoding.decode(sent) - expected).max() < 3 / encoding.scale


def test_the_same_round_gets_the_same_answer_from_the_same_state(lab) -> None:
    here = lab("neumf")
    one, two = (here.device(3).answer(here.round(), here.weights, here.key) for _ in range(2))
    assert np.array_equal(one.vector(), two.vector())
    other = here.device(3).answer(here.round(attempt=1), here.weights, here.key)
    assert not np.array_equal(one.vector(), other.vector())
    assert np.abs(one.vector() - other.vector()).max() <= 1  # other coins, same update


def test_the_private_state_moves_on(lab) -> None:
    here = lab()
    device = here.device(3)
    device.answer(here.round(), here.weights, here.key)
    assert np.array_equal(device.state, here.alone(3).states[0])
    assert not np.array_equal(device.state, here.states[3])


def test_a_new_device_starts_at_zero(lab) -> None:
    here = lab("mlp")
    device = here.device(3)
    fresh = replace(device, state=np.zeros(0, np.float32))
    assert fresh.state.shape == (here.learner.state_dim,)
    assert not fresh.state.any()


def test_another_model_than_the_rounds_is_refused(lab) -> None:
    here = lab()
    device, other = here.device(3), here.weights.copy()
    other[0] += 1
    with pytest.raises(ReleaseRefused, match="another digest"):
        device.answer(here.round(), other, here.key)
    assert np.array_equal(device.state, here.states[3])
    assert digest(other) != digest(here.weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", ["gmf", "mlp", "neumf"])
@pytest.mark.parametrize("loss", ["bce", "bpr", "softmax", "full_softmax"])
def test_a_model_that_is_not_finite_gets_a_zero_update(lab, kind, loss, bad) -> None:
    here = lab(kind, loss=loss, local_steps=2, local_lr=1e10)
    here.weights[:] = bad
    answer = here.device(3).answer(here.round(), here.weights, here.key).vector()
    encoding = Encoding(1.0, len(answer))
    assert norm(answer) <= encoding.bound
    if not np.isfinite(bad):
        assert not answer.any()


@pytest.mark.parametrize("kind", ["gmf", "neumf"])
def test_a_device_recovers_from_a_model_that_was_not_finite(lab, kind) -> None:
    here = lab(kind)
    device, sound = here.device(3), here.weights.copy()
    here.weights[:] = np.nan
    device.answer(here.round(), here.weights, here.key)
    here.weights = sound
    assert device.answer(here.round(), sound, here.key).vector().any()
