"""Federated extreme classification: a run over labelled examples is a run like any other."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from parts import assemble
from small_runs import Silent, Stop, make_scenario, run_once, weights

from privrec import data
from privrec.cli.main import main
from privrec.cli.plan import coefficients
from privrec.errors import Interrupted, ScenarioError
from privrec.models.words import Bags
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.report.render import write
from privrec.run import lifecycle
from privrec.scenario.load import Scenario

USERS, LABELS = 30, 121
TINY = f"""
name = "labels"
title = "A run over a few labelled examples"
[data]
source = "synthetic_labels"
users = {USERS}
items = {LABELS}
clusters = 6
interactions_per_user = 12
features = 400
labels_each = 2.5
[model]
kind = "extreme"
dim = 16
block = 8
features = 128
init_std = 0.05
[devices]
popularity = "public"
sampling_rate = 0.5
[train]
rounds = 4
loss = "softmax"
selector = "scan"
budget = 0.4
selected = 0.3
frequent = 0.2
max_samples = 8
[privacy]
noise = "none"
[run]
top_k = [1, 3]
checkpoint_every = 2
footprint = false
"""
NOISE = ("privacy.noise=central", "privacy.clip_norm=0.5", "privacy.noise_multiplier=1.0")
SPREAD = ("privacy.noise=distributed", "privacy.clip_norm=0.5", "privacy.noise_multiplier=2.0",
          "devices.min_cohort=2", "privacy.colluding_share=0", "devices.sampling=everybody",
          "devices.sampling_rate=1.0")  # fmt: skip
TIERS = ("devices.tiers=[{capacity=1.0,share=0.5},{capacity=0.25,share=0.5}]", "train.budget=0.9")
RELEASED = (*NOISE, "devices.popularity=released", "devices.popularity_epsilon=1.0",
            "devices.nesting=rows")  # fmt: skip


pytestmark = pytest.mark.usefixtures("state")
scenario = partial(make_scenario, TINY)
started = partial(run_once, TINY)


def test_devices_learn_labels_together(tmp_path: Path) -> None:
    changes = ("train.rounds=24", "train.server_lr=0.1", "devices.sampling_rate=1")
    payload = started(tmp_path / "a", *changes)
    common = payload["baselines"]["popularity"]
    assert payload["metrics"]["precision@1"] > common["precision@1"] + 0.2
    low, high = payload["intervals"]["precision@1"]
    assert low <= payload["metrics"]["precision@1"] <= high
    assert payload["data"]["items"] == LABELS
    assert payload["model"]["dense_weights"] == 129 * 16
    pages = write(build(tmp_path / "a"), tmp_path / "a")
    text = pages.markdown.read_text("utf-8")
    assert "Precision@1" in text
    assert "all words or labels" in text
    assert "99 items" not in text


@pytest.mark.parametrize("changes", [(), NOISE, SPREAD, TIERS, RELEASED])
def test_every_way_repeats_bit_for_bit_and_goes_on_where_it_stopped(
    changes: tuple[str, ...], tmp_path: Path
) -> None:
    started(tmp_path / "a", *changes, key=b"k" * 32)
    with pytest.raises(Interrupted):
        started(tmp_path / "b", *changes, key=b"k" * 32, observer=Stop(2))
    lifecycle.resume(tmp_path / "b", observer=Silent())
    np.testing.assert_array_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("selector", ["uniform", "scan", "hamming", "pghash", "sketch", "auto"])
def test_no_device_moves_the_sum_by_more_than_the_bound(selector: str) -> None:
    of = scenario(*NOISE, "train.local_lr=1000", f"train.selector={selector}")
    train = data.load_texts(of.data).train
    parts = assemble(of, train, "run", SecretRoot.known(b"d"))
    round, tier = parts.server.next_round(0), parts.federation.tiers[0]
    bound, layout = parts.server.plan.protection.encoding.bound, parts.federation.layout
    largest = 0.0
    answers = parts.simulation.answers(round, parts.server.weights, tier, np.arange(USERS))
    for _, update, _ in answers:
        total = np.zeros(layout.size, np.int64)
        update.add_to(total, layout)
        largest = max(largest, float(np.linalg.norm(total)))
    assert 0.9 * bound < largest <= bound


def test_a_device_with_little_room_knows_the_common_labels_alone() -> None:
    of = scenario(*TIERS)
    split = data.load_texts(of.data)
    order = np.argsort(-split.train.item_counts(), kind="stable")
    split = split.renumbered(np.concatenate(([0], order[order != 0])))
    parts = assemble(of, split.train, "run", SecretRoot.known(b"d"))
    weak = parts.simulation.cohorts[1]
    held = weak.learner.view.vectors.items
    assert held < LABELS
    for row in range(len(weak.users)):
        batch = weak.learner.batch(weak.data.of(row), 0, 0)
        assert isinstance(batch, Bags)
        assert len(batch.examples.features)
        assert batch.own.max(initial=0) < held


@pytest.mark.parametrize("more", [(), ("data.vocabulary=40",)])
def test_the_plan_knows_the_size_of_the_model(more: tuple[str, ...]) -> None:
    of = scenario("model.compression=2", "devices.nesting=fold", *more)
    split = data.load_texts(of.data)
    split = split.renumbered(np.arange(split.train.n_items))
    parts = assemble(of, split.train, "run", SecretRoot.known(b"d"))
    assert of.population() == USERS
    assert coefficients(of) == parts.federation.layout.size


def test_what_a_device_takes_is_measured(tmp_path: Path) -> None:
    cost = started(tmp_path / "a", "run.footprint=true")["cost"]
    assert cost["device_peak_bytes"] > cost["download_bytes"]
    assert cost["output_neurons"] == round(0.4 * LABELS)
    small = started(tmp_path / "b", "train.budget=0.2")["cost"]
    assert small["output_multiply_adds"] < 0.6 * cost["output_multiply_adds"]


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ("model.kind=next_word", "need each other"),
        ("model.kind=gmf", "labels and model.kind"),
        ("data.source=synthetic_text", "need each other"),
        ("train.scheme=requested", r'belongs to train.selector = "simhash"'),
        ("train.loss=bce", "a wide output does not have it"),
        ("model.item_bias=false", "belongs to model.kind"),
        ("data.words=list.txt", "synthetic_labels"),
        ("data.max_history=5", "data.max_history"),
        ("data.labels_each=0.5", "data.labels_each"),
        ("data.clusters=200", "must not exceed data.items - 1"),
        ("train.serve_budget=1", "a wide output does not have it"),
        ("train.serve_recency=1", "a wide output does not have it"),
        ("privacy.local=example", 'privacy.local = "example"'),
        ("model.features=0", "model.features"),
    ],
)
def test_what_does_not_go_with_labels_is_refused(change: str, about: str) -> None:
    with pytest.raises(ScenarioError, match=about):
        scenario(change)


def test_keys_of_labels_are_refused_elsewhere() -> None:
    with pytest.raises(ScenarioError, match=r"data\.labels_each"):
        Scenario.from_toml('name = "x"', ("data.labels_each=2",))


def test_other_commands_say_that_they_are_for_recommenders(tmp_path: Path) -> None:
    file = tmp_path / "labels.toml"
    file.write_text(TINY)
    started(tmp_path / "a")
    for command, about in (
        (["audit", str(file)], "for recommenders of items alone"),
        (["recommend", str(tmp_path / "a"), "--user", "1"], "no items to recommend"),
        (["flower", "init", str(tmp_path / "app"), "--scenario", str(file)], "deployments train"),
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code != 0
        assert about in done.output
        assert "Traceback" not in done.output


def test_the_data_command_describes_labels(tmp_path: Path) -> None:
    file = tmp_path / "labels.toml"
    file.write_text(TINY)
    done = CliRunner().invoke(main, ["data", "describe", str(file), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert (facts["users"], facts["items"]) == (USERS, LABELS)
    for name in ("synthetic_labels", "synthetic_text"):
        done = CliRunner().invoke(main, ["data", "describe", name])
        assert done.exit_code == 0, done.output
