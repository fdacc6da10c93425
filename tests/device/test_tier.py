"""Devices of mixed capacity: prefixes of one vector, and updates that add up in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from on_devices import bounded, lift, trained_rows

from privrec.device.device import TOLERANCE, Cohort, Device, Draws, Trained
from privrec.device.local import LocalModel
from privrec.device.samples import Histories
from privrec.device.tier import Tier
from privrec.device.update import (
    Address,
    BoundedUpdate,
    Protection,
    RawUpdate,
    Round,
    model_digests,
)
from privrec.errors import ReleaseRefused
from privrec.models.layout import Layout
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding

SYSTEMS = ["fold", "rows", "dims"]
ROOT, KEY = SecretRoot.known(b"test"), 77
MODELS = [
    ("fold", {}),
    ("fold", {"model__item_bias": False}),
    ("fold", {"model__compression": 4.0}),
    ("fold", {"model__kind": "neumf", "train__local_steps": 2}),
    ("fold", {"train__loss": "full_softmax", "train__local_steps": 2}),
    ("fold", {"train__loss": "ials"}),
    ("rows", {}),
    ("rows", {"model__kind": "neumf", "train__local_steps": 2}),
    ("rows", {"train__loss": "full_softmax"}),
    ("rows", {"train__loss": "ials"}),
    ("dims", {}),
    ("dims", {"train__loss": "bpr", "model__item_bias": False}),
    ("dims", {"train__loss": "ials"}),
]
SAMPLED = [
    (system, changes)
    for system, changes in MODELS
    # A sum over all items is another one for a tier that holds other items.
    if changes.get("train__loss") != "ials"
    and not (system == "rows" and changes.get("train__loss") == "full_softmax")
]


def round_of(federation: Any, weights: np.ndarray) -> Round:
    event = RoundEvent("none", 0.0, 1.0)
    digests = model_digests(weights, federation.layouts)
    return Round("run", 0, 0, event, "plan", digests)


def trained(here: Any, weights: np.ndarray) -> Iterator[tuple[Tier, np.ndarray, Trained]]:
    """Each tier, its memory, and what its own batches of devices make of a round."""
    for tier, cohort in zip(here.tiers, here.parts.simulation.cohorts, strict=True):
        view = tier.view(here.federation.prefix(weights, tier))
        for _, result in trained_rows(cohort, view, np.arange(len(cohort.states)), Draws(KEY)):
            yield tier, view, result


def address_row(update: RawUpdate, row: int) -> tuple[np.ndarray, np.ndarray]:
    blocks, biases = update.address.blocks, update.address.biases
    return blocks[row if len(blocks) > 1 else 0], biases[row if len(biases) > 1 else 0]


@pytest.mark.parametrize(("system", "changes"), MODELS)
def test_memory_and_coefficients_are_two_forms_of_one_vector(mixed, system, changes) -> None:
    here = mixed(system, **changes)
    weights = here.weights()
    for tier in here.tiers:
        prefix = here.federation.prefix(weights, tier)
        before = prefix.copy()
        memory = tier.view(prefix)
        assert np.array_equal(prefix, before)
        assert np.allclose(tier.coefficients(memory), prefix, atol=1e-6)
        assert np.allclose(tier.view(tier.coefficients(prefix)), prefix, atol=1e-6)
        assert np.linalg.norm(memory) == pytest.approx(np.linalg.norm(prefix), rel=1e-5)
        head = tier.layout.head
        assert np.array_equal(memory[:head], prefix[:head])
    turned = system == "fold"
    assert np.array_equal(here.tiers[0].view(weights), weights) is not turned


def test_item_biases_turn_as_item_vectors_do(mixed) -> None:
    here = mixed("fold")
    weights, layout = here.weights(), here.federation.layout
    tier = here.tiers[0]
    whole = tier.view(weights)
    for weaker in here.tiers[1:]:
        view = weaker.view(here.federation.prefix(weights, weaker))
        biases = weaker.layout.biases_of(view)
        folded = layout.biases_of(whole).reshape(-1, len(biases)).sum(0)
        folded /= np.sqrt(layout.bias_slots / len(biases))
        assert np.allclose(biases, folded, atol=1e-5)


@pytest.mark.parametrize(("system", "changes"), MODELS)
def test_a_lifted_update_is_the_change_in_coefficients(mixed, vector, system, changes) -> None:
    """Of weights, Gram matrix, vectors and biases; as long as before, and every name once."""
    here = mixed(system, **changes)
    moved = 0.0
    for tier, _, result in trained(here, here.weights()):
        lifted = tier.lift(result.update)
        assert lifted.values.dtype == np.float32
        assert lifted.values.shape == (len(result.states), lifted.address.width)
        for row, values in enumerate(lifted.values):
            dense = vector(result.update, row)
            scale = max(float(np.abs(dense).max()), 1e-30)
            expected = tier.coefficients(dense)
            assert np.abs(vector(lifted, row) - expected).max() <= 1e-5 * scale
            length = np.linalg.norm(values.astype(np.float64))
            assert length == pytest.approx(np.linalg.norm(expected), rel=1e-5, abs=1e-12)
            check_named_once(lifted, row)
            moved = max(moved, scale)
    assert moved > 1e-3


def check_named_once(update: RawUpdate, row: int) -> None:
    """No block or bias is named twice with values other than zero: clipping sees the row."""
    layout, (blocks, biases) = update.address.layout, address_row(update, row)
    values, end = update.values[row], layout.head + len(blocks) * layout.block
    used = values[layout.head : end].reshape(-1, layout.block).any(1)
    for names in (blocks[used], biases[values[end:] != 0]):
        assert len(np.unique(names)) == len(names)
    assert blocks.max(initial=0) < layout.slots
    assert biases.max(initial=0) < max(1, layout.bias_slots)


def test_a_lift_puts_together_what_meets_in_one_coefficient(mixed, vector) -> None:
    """Slots of one class, slots named twice, and a batch that shares its names."""
    here = mixed("fold", (1.0, 0.25))
    tier = here.tiers[0]
    layout, rng = tier.layout, np.random.default_rng(3)
    quarter, small = layout.slots // 4, layout.bias_slots // 4
    blocks = np.array([[0, quarter, 2 * quarter, 3 * quarter, 5, 5, 6]])
    biases = np.array([[1, 1 + small, 1 + 2 * small, 2]])
    width = layout.head + blocks.shape[1] * layout.block + biases.shape[1]
    values = rng.normal(size=(3, width)).astype(np.float32)
    second = layout.head + 5 * layout.block
    values[:, second : second + layout.block] = 0  # slot 5 again, with zeros
    for named in (blocks, np.repeat(blocks, 3, 0)):
        small_named = biases if len(named) == 1 else np.repeat(biases, 3, 0)
        update = RawUpdate(values, Address(named, small_named, layout))
        lifted = tier.lift(update)
        for row in range(3):
            expected = tier.coefficients(vector(update, row))
            assert np.allclose(vector(lifted, row), expected, atol=1e-5)
            check_named_once(lifted, row)
            assert np.linalg.norm(lifted.values[row]) == pytest.approx(
                np.linalg.norm(values[row]), rel=1e-5
            )


@pytest.mark.parametrize(("system", "changes"), MODELS)
def test_updates_of_all_tiers_add_up_to_the_sum_of_what_they_mean(
    mixed, vector, system, changes
) -> None:
    """Prefixes padded with zeros, and the lifted updates in the whole memory, are one sum."""
    here = mixed(system, **changes)
    federation, whole = here.federation, here.tiers[0]
    layout, updates = federation.layout, list(trained(here, here.weights()))
    longest = max(np.linalg.norm(u.update.values, axis=1).max() for _, _, u in updates)
    encoding, coins = Encoding(1.01 * float(longest), layout.size, 20), ROOT.stream("rounding")
    total, expected = np.zeros(layout.size, np.int64), np.zeros(layout.size)
    for tier, _, result in updates:
        bounded(tier.lift(result.update), encoding, coins).add_to(total, layout)
        for row in range(len(result.states)):
            change, own = vector(result.update, row), tier.layout
            expected[: own.head] += change[: own.head]
            memory = lift(tier.vectors, own.memory_of(change), tier.index)
            layout.memory_of(expected)[...] += memory
            if tier.biases is not None:
                lifted = lift(tier.biases, own.biases_of(change)[:, None], tier.index)
                layout.biases_of(expected)[...] += lifted[:, 0]
    found = whole.view(encoding.decode(total))
    error = 4 * len(here.split.train.user_ids) / encoding.scale
    assert np.abs(expected).max() > 100 * error
    assert np.abs(found - expected).max() <= error


@pytest.mark.parametrize(("system", "changes"), SAMPLED)
def test_a_tier_trains_as_if_on_the_whole_memory_that_says_the_same(
    mixed, vector, system, changes
) -> None:
    """One step in the coefficients of a weak tier is the projected gradient step on the whole.

    In dims the other dimensions are zero in the lifted memory, so that scores agree. Samples are
    the tier's own: the whole memory has others to draw from, in rows.
    """
    here = mixed(system, **{**changes, "train__local_steps": 1, "train__user_steps": 0})
    weights, whole = here.weights(), here.tiers[0]
    federation, layout = here.federation, here.federation.layout
    for tier in here.tiers[1:]:
        mine, everywhere = tier.layout, whole.layout
        view = tier.view(federation.prefix(weights, tier))
        lifted = np.zeros(layout.size, np.float32)
        lifted[: mine.head] = view[: mine.head]
        everywhere.memory_of(lifted)[...] = lift(tier.vectors, mine.memory_of(view), tier.index)
        if tier.biases is not None:
            biases = lift(tier.biases, mine.biases_of(view)[:, None], tier.index)
            everywhere.biases_of(lifted)[...] = biases[:, 0]
        learner = here.parts.simulation.cohorts[tier.index].learner
        strong = here.parts.everyone.learner
        history = Histories.alone(3, np.array([0, 2, 5, 7], np.int32))
        batch = learner.sampler.draw(history, KEY)
        state = np.random.default_rng(1).normal(0, 0.5, (1, learner.state_dim))
        padded = np.zeros((1, strong.state_dim))
        # The bias of a user comes last; its vector is padded with zeros where it has fewer.
        padded[:, : state.shape[1] - 1], padded[:, -1] = state[:, :-1], state[:, -1]
        model = LocalModel(learner.view, view)
        small = learner.train(model, history, state.astype(np.float32), Draws(KEY))
        large = _train_on(strong, lifted, batch, padded.astype(np.float32))
        coefficients = whole.coefficients(vector(large))
        projected = layout.prefix_of(coefficients, mine)
        found = vector(tier.lift(small.update))
        scale = np.abs(found).max()
        assert scale > 1e-3
        assert np.abs(found - projected).max() <= 1e-5 * scale


def _train_on(learner: Any, weights: np.ndarray, batch: Any, state: np.ndarray) -> RawUpdate:
    """One round's update on given samples."""

    class Same:
        budget = None

        def draw(self, histories: Histories, key: int) -> Any:
            return batch

    fixed = type("Fixed", (type(learner),), {"sampler": property(lambda self: Same())})
    one = fixed(learner.view, learner.settings)
    nobody = Histories.alone(3, np.zeros(0, np.int32))
    update: RawUpdate = one.train(LocalModel(one.view, weights), nobody, state, Draws(0)).update
    return update


# --------------------------------------------------------------------------- devices


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_device_answers_to_its_own_prefix_and_to_no_other(mixed, system, index) -> None:
    here = mixed(system)
    weights, tier = here.weights(), here.tiers[index]
    round, device = round_of(here.federation, weights), device_of(here, 3, index)
    prefix = here.federation.prefix(weights, tier)
    assert len(prefix) == tier.layout.size
    for place in (0, tier.layout.head, len(prefix) // 2, len(prefix) - 1):
        wrong = prefix.copy()
        wrong[place] += 1
        with pytest.raises(ReleaseRefused, match="another digest"):
            device.answer(round, wrong, KEY)
        assert not device.state.any()
    answer = device.answer(round, prefix, KEY)
    assert answer.vector().any()
    assert len(answer.vector()) == tier.layout.size


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_a_weak_device_lacks_may_change_without_its_knowledge(mixed, system) -> None:
    """Its round is the same: it checks the bands of its own prefix alone, and all of those."""
    here = mixed(system)
    weights = here.weights()
    for index, tier in enumerate(here.tiers):
        marked, layout = weights.copy(), here.federation.layout
        layout.memory_of(marked)[tier.layout.slots :] += 1
        layout.biases_of(marked)[tier.layout.bias_slots :] += 1
        one, other = (model_digests(each, here.federation.layouts) for each in (weights, marked))
        held = len(here.tiers) - index
        assert one[:held] == model_digests(
            here.federation.prefix(weights, tier), here.federation.layouts[index:]
        )
        assert [a == b for a, b in zip(one, other, strict=True)] == [
            band < held for band in range(len(here.tiers))
        ]


def test_every_number_of_the_model_is_in_one_digest(mixed) -> None:
    here = mixed("dims", train__loss="ials")
    weights = here.weights()
    before = model_digests(weights, here.federation.layouts)
    bands = set()
    for place in range(len(weights)):
        changed = weights.copy()
        changed[place] += 1
        after = model_digests(changed, here.federation.layouts)
        differ = [a != b for a, b in zip(before, after, strict=True)]
        assert sum(differ) == 1
        bands.add(differ.index(True))
    assert bands == {0, 1, 2}


def test_the_context_of_a_round_covers_every_digest(mixed) -> None:
    here = mixed()
    round = round_of(here.federation, here.weights())
    contexts = {round.context}
    for band in range(3):
        digests = list(round.model_digests)
        digests[band] = b"other"
        contexts.add(replace(round, model_digests=tuple(digests)).context)
    assert len(contexts) == 4


def device_of(here: Any, user: int, index: int, weight: float | None = None) -> Device:
    tier = here.tiers[index]
    if weight is not None:
        tier = replace(tier, weight=weight)
    learner = here.parts.simulation.cohorts[index].learner
    protection = here.parts.server.plan.protection
    history = here.split.train.history(user)
    layouts = here.federation.layouts_of(tier)
    return Device(user, history, tier, layouts, learner, protection, ROOT)


def model_of(tier: Tier, view: np.ndarray) -> LocalModel[Any]:
    return LocalModel(tier.model, view)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_device_alone_agrees_with_the_cohort_of_its_tier(mixed, vector, system) -> None:
    here = mixed(system, train__local_steps=2)
    weights, seen = here.weights(), 0
    for tier, cohort in zip(here.tiers, here.parts.simulation.cohorts, strict=True):
        view = tier.view(here.federation.prefix(weights, tier))
        for rows, result in trained_rows(cohort, view, np.arange(len(cohort.states)), Draws(KEY)):
            for place, row in enumerate(rows):
                user = int(cohort.users[row])
                alone = device_of(here, user, tier.index).train(model_of(tier, view), Draws(KEY))
                lifted = [vector(tier.lift(alone.update)), vector(tier.lift(result.update), place)]
                scale = max(float(np.abs(lifted[0]).max()), 1e-30)
                assert np.abs(lifted[0] - lifted[1]).max() <= 2 * TOLERANCE * scale
                assert np.allclose(alone.states[0], result.states[place], rtol=1e-3, atol=1e-4)
                seen += scale > 1e-3
    assert seen > 30


@pytest.mark.parametrize("system", ["rows", "fold", "dims"])
def test_a_device_trains_on_what_it_holds_of_its_history(mixed, system) -> None:
    """In rows it has no part in items that its memory lacks; otherwise it holds them all."""
    here = mixed(system)
    weights = here.weights()
    for index, tier in enumerate(here.tiers):
        view, held = tier.view(here.federation.prefix(weights, tier)), 48 >> index
        assert tier.model.vectors.items == (held if system == "rows" else 48)
        device = device_of(here, 3, index)
        beyond = np.arange(held, 48, dtype=np.int32) if system == "rows" else np.zeros(0, np.int32)
        more = replace(device, history=np.concatenate((device.history, beyond[:5])))
        fewer = replace(device, history=device.history[device.history < held])
        for other in (more, fewer) if system == "rows" else (more,):
            values, expected = (
                each.train(model_of(tier, view), Draws(KEY)).update.values
                for each in (other, device)
            )
            assert np.array_equal(values, expected)
        cohort = Cohort.of(device.learner, Histories.alone(3, more.history))
        assert cohort.data.items.max(initial=0) < tier.model.vectors.items


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.1, 0.0])
def test_a_weight_scales_the_clipped_update(mixed, vector, weight) -> None:
    """After clipping, so that the sensitivity of a tier is its weight's part of the bound."""
    here = mixed(train__local_lr=50.0)
    weights = here.weights()
    for index, tier in enumerate(here.tiers):
        device = device_of(here, 3, index, weight)
        device.protection = Protection(Encoding(0.5, here.federation.layout.size, 20))
        view = tier.view(here.federation.prefix(weights, tier))
        raw = vector(tier.lift(device.train(model_of(tier, view), Draws(KEY)).update))
        assert np.linalg.norm(raw) > 0.5
        expected = weight * raw * 0.5 / np.linalg.norm(raw)
        prefix = here.federation.prefix(weights, tier)
        sent = device.answer(round_of(here.federation, weights), prefix, KEY).vector()
        assert (
            np.abs(device.protection.encoding.decode(sent) - expected).max()
            <= 4 / device.protection.encoding.scale
        )
        length = np.linalg.norm(sent.astype(np.float64))
        assert length <= weight * device.protection.encoding.bound + np.sqrt(len(sent))
        assert length <= device.protection.encoding.bound


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_bound_holds_whatever_a_tier_has_trained(weight) -> None:
    layout = Layout(2, 4, 2, 3)
    address = Address(np.array([[0, 3]]), np.array([[1]]), layout)
    rows = np.array([[1e3] * 7, [np.nan] * 7, [0.1] * 7, [0] * 7], np.float32)
    encoding = Encoding(1.0, layout.size)
    found = bounded(RawUpdate(rows, address), encoding, ROOT.stream("a"), weight)
    lengths = np.linalg.norm(found.integers.astype(float), axis=1)
    assert lengths.max() <= encoding.bound
    assert lengths[0] == pytest.approx(weight * 2**13, rel=1e-2)
    assert lengths[2] == pytest.approx(weight * 2**13 * 0.1 * 7**0.5, rel=1e-2)
    assert not found.integers[[1, 3]].any()


# --------------------------------------------------------------------------- public facts


def test_shares_of_bands_count_who_trains(mixed) -> None:
    here = mixed(shares=(0.2, 0.3, 0.5), weights=(1.0, 0.0, 0.25)).federation
    assert here.holders == pytest.approx((1.0, 0.2 / 0.7, 0.2 / 0.7))
    assert [here.fraction(tier) for tier in here.tiers] == pytest.approx(
        [0.2 / 0.7, 0.0, 0.25 * 0.5 / 0.7]
    )
    alike = mixed(capacities=(0.5,)).federation
    assert alike.holders == (1.0,)
    assert alike.fraction(alike.tiers[0]) == 1


def test_weaker_tiers_hold_prefixes_of_stronger_ones(mixed) -> None:
    for system in SYSTEMS:
        federation = mixed(system).federation
        weights = np.arange(federation.layout.size, dtype=np.float32)
        for one, other in itertools.pairwise(federation.tiers):
            held = one.layout.prefix_of(federation.prefix(weights, one), other.layout)
            assert np.array_equal(held, federation.prefix(weights, other))
            assert federation.layouts_of(one)[1] == other.layout
            assert other.layout.size < one.layout.size
        assert federation.layouts_of(last := federation.tiers[-1]) == (last.layout,)
        assert np.array_equal(federation.prefix(weights, federation.tiers[0]), weights)


def test_a_weak_update_goes_where_its_names_are_in_the_whole_vector() -> None:
    """The layout of the sum is not that of the device: sections begin elsewhere."""
    own, whole = Layout(2, 2, 2, 1), Layout(2, 8, 2, 4)
    address = Address(np.array([[1, 0]]), np.array([[0]]), own)
    integers = np.arange(1, 8, dtype=np.int32)[None]
    total = np.zeros(whole.size, np.int64)
    BoundedUpdate(integers, address).add_to(total, whole)
    assert whole.dense_of(total).tolist() == [1, 2]
    assert whole.memory_of(total)[:2].tolist() == [[5, 6], [3, 4]]
    assert whole.biases_of(total).tolist() == [7, 0, 0, 0]
    assert np.count_nonzero(total) == 7
    upload = BoundedUpdate(integers, address).vector()
    assert upload.tolist() == [1, 2, 5, 6, 3, 4, 7]
