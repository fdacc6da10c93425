"""Runs whose devices weigh public features of the items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import make_scenario, run_once

from privrec.data.item_features import centred, of_ranks
from privrec.errors import ScenarioError
from privrec.run.parties import learner_of
from privrec.run.plan import federation_of
from privrec.run.recommend import recommend

SCENARIO = """
name = "weighed"
[data]
users = 150
items = 60
clusters = 4
interactions_per_user = 10
[model]
dim = 4
block = 4
[devices]
sampling = "everybody"
popularity = "public"
[train]
rounds = 6
loss = "full_softmax"
server_optimizer = "fedavg"
server_lr = 2.0
[privacy]
noise = "none"
[run]
footprint = false
"""


def test_features_are_no_part_of_what_is_sent_and_serve_again_as_they_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    results = [
        run_once(SCENARIO, tmp_path / name, *changes, key=b"k")
        for name, changes in {"plain": (), "ranks": ("model.rank_features=true",)}.items()
    ]
    sent = [result["tiers"][0]["upload_bytes"] for result in results]
    assert sent[0] == sent[1]
    assert results[0]["metrics"] != results[1]["metrics"]
    lists = [recommend(tmp_path / name, user="3", k=60) for name in ("plain", "ranks")]
    assert len(lists[1]) == len(lists[0]) > 40
    assert [each.item_id for each in lists[0]] != [each.item_id for each in lists[1]]


def test_every_device_knows_the_features_of_the_whole_catalogue_though_none_may_hold_it() -> None:
    scenario = make_scenario(
        SCENARIO, "model.rank_features=true", "devices.tiers=[{capacity=0.5, share=1.0}]"
    )
    own = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    federation = federation_of(scenario, 60)
    learner = learner_of(scenario, federation, federation.tiers[0], 60, None, features=own)
    known = learner.view.features
    assert known is not None
    assert learner.view.vectors.items == 30
    ranks = centred(of_ranks(60))
    assert np.array_equal(known, np.concatenate((own, ranks), axis=1))


REFUSED: dict[str, tuple[list[str], str]] = {
    "no order": (["devices.popularity=", "model.rank_features=true"], "items have a rank in"),
    "no inner product": (
        ["model.kind=neumf", "data.source=ml-1m", "data.item_features=true"],
        "no pla",
    ),
    "sums over all": (
        [
            *("data.source=ml-1m", "data.item_features=true", "train.loss=ials"),
            *("model.item_bias=false", "train.local_steps=1"),
        ],
        "by their learned vectors",
    ),
    "samples": (
        ["train.selector=uniform", "train.shared_curvature=true"],
        "it takes selector",
    ),
    "a network": (
        ["model.kind=neumf", "train.shared_curvature=true"],
        "it takes selector",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_features_rule_out_is_said(case: str) -> None:
    changes, words = REFUSED[case]
    base: Any = SCENARIO
    if any("ml-1m" in change for change in changes):
        base = SCENARIO.replace("users = 150\nitems = 60\nclusters = 4\n", "")
        base = base.replace("interactions_per_user = 10\n", "")
    with pytest.raises(ScenarioError, match=words):
        make_scenario(base, *changes)
