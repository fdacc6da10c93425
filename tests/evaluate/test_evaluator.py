"""A recommender's scores as the metrics ask for them, and the users whose metrics are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privrec.device.local import LocalModel
from privrec.evaluate.evaluator import scores_with
from privrec.randomness import SecretRoot
from privrec.run.parties import server_of
from privrec.run.task import Task, load_task
from privrec.scenario.load import Scenario

RECOMMENDING = """
name = "some"
[data]
users = 60
items = 300
clusters = 3
interactions_per_user = 8
[model]
kind = "{kind}"
dim = 8
block = 4
init_std = 0.5
[devices]
tiers = [{{ capacity = 1.0, share = 0.4 }}, {{ capacity = 0.5, share = 0.4 }},
         {{ capacity = 0.0, share = 0.2 }}]
popularity = "public"
[privacy]
noise = "none"
"""
TEXTS = """
name = "some"
[data]
source = "synthetic_text"
users = 40
items = 64
clusters = 2
interactions_per_user = 20
[devices]
popularity = "public"
[model]
kind = "next_word"
dim = 8
block = 8
layers = 1
heads = 2
ffn = 8
context = 4
[train]
loss = "full_softmax"
[privacy]
noise = "none"
"""


def task_of(text: str, *changes: str) -> Task[Any]:
    return load_task(Scenario.from_toml(text, changes), None)


@pytest.mark.parametrize("kind", ["gmf", "neumf"])
@pytest.mark.parametrize("tier", [0, 1])
def test_few_candidates_have_the_scores_of_the_whole_catalogue(kind: str, tier: int) -> None:
    plan = task_of(RECOMMENDING.format(kind=kind)).plan
    federation, weights = plan.federation, server_of(plan, "some").weights
    held = federation.tiers[tier]
    model = LocalModel(held.model, held.view(federation.prefix(weights, held)))
    rng, users = np.random.default_rng(0), np.array([4, 9, 30])
    states = rng.normal(size=(3, held.model.network.user_dim)).astype(np.float32)
    scores = scores_with(model, users, states, 300)
    asked, candidates = users[[2, 0]], rng.integers(0, 300, (2, 20))
    every, few = scores(asked, None), scores(asked, candidates)
    assert every.shape == (2, 300)
    assert np.isfinite(every).all()
    expected = np.take_along_axis(every, candidates, axis=1)
    np.testing.assert_allclose(few, expected, rtol=1e-5, atol=1e-6)
    many = rng.integers(0, 300, (2, 400))
    assert scores(asked, many).tolist() == np.take_along_axis(every, many, axis=1).tolist()


def test_metrics_are_of_the_users_that_were_chosen() -> None:
    everybody = task_of(RECOMMENDING.format(kind="gmf"))
    some = task_of(RECOMMENDING.format(kind="gmf"), "run.eval_users=12")
    assert some.measured.size == 12
    assert set(some.measured) <= set(np.flatnonzero(some.split.heldout.counts))
    weights, found = server_of(some.plan, "some").weights, []
    for task in (everybody, some):
        devices = task.simulate(SecretRoot.known(b"a test"))
        whole = task.evaluate(devices, weights, whole=True)
        found.append((whole, *task.evaluate_tiers(devices, weights, whole)))
    for all_of_them, chosen in zip(*found, strict=True):
        assert set(chosen.users) == set(all_of_them.users) & set(some.measured)
        places = np.searchsorted(all_of_them.users, chosen.users)
        for name, values in chosen.values.items():
            assert values.tolist() == pytest.approx(all_of_them.values[name][places].tolist())
    assert sum(each.users.size for each in found[1][1:]) == 12
    assert some.baseline("popularity") != everybody.baseline("popularity")


def test_metrics_are_of_the_texts_that_were_chosen() -> None:
    some = task_of(TEXTS, "run.eval_users=2")
    weights, devices = (
        server_of(some.plan, "some").weights,
        some.simulate(SecretRoot.known(b"a test")),
    )
    found = some.evaluate(devices, weights, whole=True)
    some.scenario = Scenario.from_toml(TEXTS)
    del some.measured
    whole = some.evaluate(devices, weights, whole=True)
    assert found.users.size == 2 < whole.users.size
    assert set(found.losses.tolist()) < set(whole.losses.tolist())
