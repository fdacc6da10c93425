"""A reader, models, a loss, a selector, an optimiser and a task from outside, in a run.

Each kind takes two places: a class of its own keys with what implements it, and one call that adds
it. A wide task takes four: a network, a reader of its data, the task, and the calls that add them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import make_scenario, run_once

from privrec.data import Interactions, Split, TextSplit, leave_last_out
from privrec.data.corpus import Corpus
from privrec.errors import ScenarioError
from privrec.evaluate.evaluator import WordQuestions
from privrec.models.losses import Graded, Loss, Samples
from privrec.models.ncf import NCF
from privrec.models.words import NextWord
from privrec.report.build import build
from privrec.run.task import TASKS, WideTask
from privrec.scenario import kinds
from privrec.scenario.kinds import (
    MODELS,
    READERS,
    Kind,
    Reader,
    Recommender,
    Sampled,
    Searching,
    Section,
    WideOutput,
    setting,
)
from privrec.scenario.load import Scenario
from privrec.search.select import Request
from privrec.server.optimizer import Optimizer

TINY = """
name = "outside"
[data]
users = 30
items = 20
clusters = 2
interactions_per_user = 6
[model]
dim = 4
block = 2
[devices]
sampling_rate = 0.5
[train]
rounds = 3
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 1.0
[run]
footprint = false
"""
MELODIES = """
name = "melodies"
[data]
source = "melodies"
notes = 16
[model]
kind = "transition"
context = 5
dim = 8
block = 2
init_std = 0.3
[devices]
sampling = "everybody"
population = 30
popularity = "public"
[train]
rounds = 60
loss = "full_softmax"
server_lr = 0.1
[privacy]
noise = "central"
clip_norm = 1.0
noise_multiplier = 1.0
[run]
footprint = false
top_k = [2]
"""
asked: Counter[str] = Counter()


class Chain(Reader):
    """Everybody likes the items that follow their own number."""

    length: int = setting(5, "[3, 50] items")
    """Items of a history."""


def read_chain(config: Any, data_dir: Path | None) -> Split:
    """Thirty users, twenty items in a ring."""
    asked["reader"] += 1
    users, steps = np.arange(30).repeat(config.length), np.tile(np.arange(config.length), 30)
    histories = Interactions.from_pairs(users, (users + steps) % 20, times=steps)
    return leave_last_out(histories, holdout=config.holdout)


class OneLayer(Recommender):
    """A network with one hidden layer."""

    width: int = setting(3, "[1, 100] neurons")
    """Its width."""

    def dense_weights(self, dim: int) -> int:
        """Weights and biases of the layer, and the output's weights."""
        return (2 * dim + 1) * self.width + self.width


@dataclass(frozen=True)
class OneLayerNetwork(NCF):
    """The scorer of that model."""

    @classmethod
    def configured(cls, config: Any, dim: int) -> NCF:
        """As wide as configured."""
        asked["model"] += 1
        return cls(0, dim, (config.width,))


def squares(scores: torch.Tensor, samples: Samples) -> Graded:
    """Squared distance from one for positives, and from zero for negatives."""
    asked["loss"] += 1
    missing = scores.clone()
    missing[:, : samples.positives] -= 1
    missing *= samples.valid
    return missing.square().sum(1) / 2, missing, samples.valid


class FirstItems(Searching):
    """The items of the lowest numbers."""

    step: int = setting(1, "[1, 10] items")
    """Every so many."""


def choose_first(request: Request) -> np.ndarray:
    """What is left after the history, from the first on."""
    asked["selector"] += 1
    asked["step"] = request.config.step
    every = np.arange(0, request.search.items.items, request.config.step)
    return np.setdiff1d(every, request.without)[: request.budget]


class Adagrad(Section):
    """AdaGrad: steps shorten as squares add up (Duchi et al., 2011)."""

    accumulator: float = setting(0.1, "(0, 100]")
    """Where the sum of squares begins."""


@dataclass
class AdagradOptimizer(Optimizer):
    """The rule of that optimiser."""

    accumulator: float = 1.0

    def direction(self, update: np.ndarray, index: int) -> np.ndarray:
        """The update over the root of the squares so far."""
        asked["optimiser"] += 1
        total = self.moment("squares", update)
        total += update * update
        return update / np.sqrt(total + np.float32(self.accumulator))


class Melodies(Reader):
    """Scales, which go up by a step of the player's own."""

    gives = "melodies"
    notes: int = setting(12, "[4, 1000] notes")
    """Notes of a player."""


def read_melodies(config: Any, data_dir: Path | None) -> TextSplit:
    """Thirty players that train and four that are held out, on ten notes in a ring."""
    words = ("<unk>", *map(str, range(10)))

    def played(players: range) -> Corpus:
        steps = np.arange(config.notes)
        notes = np.concatenate([1 + (who + steps * (1 + who % 2)) % 10 for who in players])
        ends = np.arange(len(players) + 1) * config.notes
        return Corpus(ends, notes.astype(np.int32), tuple(map(str, players)), words)

    return TextSplit(played(range(30)), played(range(30, 34)), config.holdout, "scales")


class Transition(WideOutput):
    """One matrix from a note's vector to the next one's."""

    learns = "melodies"
    context: int = setting(4, "[1, 100] notes")
    """Notes of a piece."""

    def dense_weights(self, dim: int) -> int:
        """The matrix."""
        return dim * dim


class TransitionNetwork(NextWord):
    """The network of that model: pieces of a melody are those of a text."""

    @classmethod
    def configured(cls, config: Any, dim: int) -> NextWord:
        """As configured."""
        return cls(dim, context=config.context)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The matrix."""
        return ((self.dim, self.dim),)

    def hidden(self, words: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """The vectors, mapped."""
        return words @ dense.view(self.dim, self.dim)


class Continuing(WideTask):
    """To continue melodies, a note at a time."""

    questions = WordQuestions()


OUTSIDE = {
    "reader": (
        kinds.READERS,
        ("chain", Chain, read_chain),
        ("data.source=chain", "data.length=6"),
        "data.length=2",
    ),
    "model": (
        kinds.MODELS,
        ("one_layer", OneLayer, OneLayerNetwork),
        ("model.kind=one_layer", "model.width=4"),
        "model.width=0",
    ),
    "loss": (
        kinds.LOSSES,
        ("squares", Sampled, Loss(squares)),
        ("train.loss=squares", "train.negatives=2"),
        "train.negatives=0",
    ),
    "selector": (
        kinds.SELECTORS,
        ("first", FirstItems, choose_first),
        ("train.selector=first", "train.loss=softmax", "train.budget=0.3", "train.step=2"),
        "train.step=11",
    ),
    "optimiser": (
        kinds.SERVER_OPTIMIZERS,
        ("adagrad", Adagrad, AdagradOptimizer),
        ("train.server_optimizer=adagrad", "train.accumulator=0.5"),
        "train.accumulator=0",
    ),
}


@pytest.fixture
def added(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of them, added to its registry for one test."""
    registry, (name, config, implementation), _, _ = OUTSIDE[request.param]
    registry.add(name, config, implementation)
    asked.clear()
    yield str(request.param)
    del registry[name]


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("added", OUTSIDE, indirect=True)
def test_it_trains(added: str, tmp_path: Path) -> None:
    changes = OUTSIDE[added][2]
    payload = run_once(TINY, tmp_path / "run", *changes)
    assert asked[added] > 0
    assert payload["rounds"] == 3
    assert 0 < payload["privacy"]["epsilon"] < 100
    assert "ndcg@10" in payload["metrics"] or "full_ndcg@10" in payload["metrics"]
    kept = Scenario.from_toml((tmp_path / "run" / "scenario.toml").read_text("utf-8"))
    assert kept == make_scenario(TINY, *changes)


@pytest.mark.usefixtures("state", "added")
@pytest.mark.parametrize("added", ["selector"], indirect=True)
@pytest.mark.parametrize(("step", "engine"), [(2, "cohort"), (3, "device")])
def test_a_selector_is_handed_keys_of_its_own(step: int, engine: str, tmp_path: Path) -> None:
    changes = (*OUTSIDE["selector"][2], f"train.step={step}", f"run.engine={engine}")
    run_once(TINY, tmp_path / "run", *changes)
    assert asked["step"] == step


@pytest.mark.usefixtures("state")
def test_a_wide_task_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "melodies", Kind("melodies", Melodies, read_melodies, ""))
    monkeypatch.setitem(MODELS, "transition", Kind("transition", Transition, TransitionNetwork, ""))
    monkeypatch.setitem(TASKS, "melodies", Continuing)
    payload = run_once(MELODIES, tmp_path / "run")
    assert payload["rounds"] == 60
    assert 0 < payload["privacy"]["epsilon"] < 100
    # Of two steps that a player may take, popularity knows neither.
    assert payload["metrics"]["accuracy@2"] > 2 * payload["baselines"]["popularity"]["accuracy@2"]
    assert build(tmp_path / "run").scenario == "melodies"
    with pytest.raises(ScenarioError, match="melodies and model.kind = .transition. need"):
        make_scenario(MELODIES, "model.kind=next_word")


@pytest.mark.parametrize("added", OUTSIDE, indirect=True)
def test_its_keys_are_checked_as_those_of_the_package(added: str) -> None:
    registry, (name, *_), changes, wrong = OUTSIDE[added]
    with pytest.raises(ScenarioError, match=wrong.partition("=")[0]) as caught:
        make_scenario(TINY, *changes, wrong)
    assert "must be" in caught.value.problems[0]
    with pytest.raises(ScenarioError, match=f"one of .*{name}"):
        make_scenario(TINY, f"{registry.path}=nothing of the kind")


def test_what_is_not_added_is_unknown() -> None:
    for registry, (name, *_), _, _ in OUTSIDE.values():
        assert name not in registry


def test_what_is_named_by_a_text_is_imported_when_it_is_asked_for() -> None:
    assert kinds.Kind("x", Section, "collections:Counter", "").load() is Counter
    assert kinds.Kind("x", Section, squares, "").load() is squares


def test_every_kind_of_the_package_has_what_implements_it() -> None:
    for registry in (kinds.MODELS, kinds.LOSSES, kinds.SERVER_OPTIMIZERS):
        assert all(kind.load() is not None for kind in registry.values())
