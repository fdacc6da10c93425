"""A masked evaluation: the mean that Flower gives in clear, an event of its own, and refusals."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")

from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from memory_grid import MemoryGrid, stage_of
from sum_apps import SIZE, app_of, examples, grid_of, lenient, model

from privrec.errors import UsageError
from privrec.flower.exchange import RECORD, pack, unpack
from privrec.flower.plan import SumPlan, plan_of
from privrec.flower.secure_sum import SecureSum
from privrec.privacy.events import epsilon
from privrec.privacy.ledger import Ledger

BOUNDS = {"loss": 4.0, "accuracy": 1.0}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


def scores(node: int) -> dict[str, float]:
    return {"num-examples": examples(node), "loss": node / 4, "accuracy": 1 / node, "other": 9.0}


def app(*mods: Any) -> Any:
    return app_of(*mods, scores=scores)


def everybody(nodes: int) -> FedAvg:
    same = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
    return FedAvg(**dict.fromkeys(same, nodes))


def strategy_of(nodes: int, **changes: Any) -> SecureSum:
    settings = {"clip_norm": 1.0, "max_examples": 8, "evaluate_metrics": BOUNDS, **changes}
    return SecureSum(everybody(nodes), **settings)


def evaluated(strategy: Any, grid: MemoryGrid, round: int = 1) -> MetricRecord | None:
    """What Flower's own loop does in a round of evaluation."""
    messages = strategy.configure_evaluate(round, model(), ConfigRecord(), grid)
    found: MetricRecord | None = strategy.aggregate_evaluate(round, grid.send_and_receive(messages))
    return found


def means(nodes: Any, weights: Any = None) -> dict[str, float]:
    return {
        name: float(np.average([scores(node)[name] for node in nodes], weights=weights))
        for name in BOUNDS
    }


def masked(*nodes: int) -> Any:
    return lambda message: stage_of(message) == "masked" and message.metadata.dst_node_id in nodes


# ---------------------------------------------------------------------- the mean


def test_the_means_are_what_flower_gives_in_clear() -> None:
    plain = evaluated(everybody(7), grid_of(7, app()))
    grid = grid_of(7, app(lenient()))
    secure = evaluated(strategy_of(7), grid)
    assert set(secure) == set(BOUNDS)
    for name in BOUNDS:
        assert secure[name] == pytest.approx(plain[name], abs=1e-5)
        assert secure[name] == pytest.approx(
            means(range(1, 8), [examples(node) for node in range(1, 8)])[name], abs=1e-5
        )
    for reply in grid.replies:
        assert list(reply.content) == [RECORD]
        assert set(unpack(reply)) in ({"devices"}, {"answers"})


def test_nodes_that_fall_silent_are_in_no_mean_and_too_few_give_none() -> None:
    grid, strategy = grid_of(7, app(lenient()), lost=masked(2, 5)), strategy_of(7)
    left = [1, 3, 4, 6, 7]
    found = evaluated(strategy, grid)
    assert dict(found) == pytest.approx(means(left, [examples(n) for n in left]), abs=1e-5)
    grid.lost = masked(1, 2, 3)
    assert evaluated(strategy, grid, 2) is None


def test_metrics_are_bounded_and_what_is_not_finite_counts_as_zero() -> None:
    wild = {1: 1e9, 2: -1e9, 3: float("nan"), 4: float("inf"), 5: 1.0}
    made = app_of(lenient(), scores=lambda n: {"num-examples": 1, "loss": wild[n], "accuracy": 1.0})
    found = evaluated(strategy_of(5, max_examples=None), grid_of(5, made))
    assert dict(found) == pytest.approx({"loss": 1.0 / 5, "accuracy": 1.0}, abs=1e-5)


def test_rounds_of_training_and_evaluation_follow_each_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flwr.privrec")
    result = strategy_of(5).start(grid_of(5, app(lenient())), model(), num_rounds=3, timeout=5)
    assert result.arrays
    assert list(result.evaluate_metrics_clientapp) == [1, 2, 3]
    assert "nodes are not asked" not in caplog.text
    assert "not finite" not in caplog.text  # nor was one cut


def test_evaluations_without_a_sum_are_counted_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as those of a strategy that samples nobody, which would pass for a success."""
    nobody = FedAvg(fraction_evaluate=0.0, min_train_nodes=5, min_available_nodes=5)
    strategy = SecureSum(nobody, clip_norm=1.0, max_examples=8, evaluate_metrics=BOUNDS)
    result = strategy.start(grid_of(5, app(lenient())), model(), num_rounds=3, timeout=5)
    assert not result.evaluate_metrics_clientapp
    assert "0 of 3 evaluations released metrics" in caplog.text
    caplog.clear()
    grid = grid_of(5, app(lenient()), lost=lambda m: "evaluate" in m.metadata.message_type)
    strategy_of(5).start(grid, model(), num_rounds=1, timeout=5)
    assert "0 of 1 evaluations released metrics" in caplog.text
    caplog.clear()
    strategy_of(5).start(grid_of(5, app(lenient())), model(), num_rounds=2, timeout=5)
    assert "evaluations released" not in caplog.text


# ---------------------------------------------------------------------- noise


def noisy(nodes: int, tmp_path: Path, **changes: Any) -> SecureSum:
    settings = {"noise_multiplier": 1.0, "ledger": tmp_path / "ledger.jsonl", **changes}
    return strategy_of(nodes, **settings)


def events(nodes: int, noise: float) -> tuple[Any, Any]:
    """What a round of training, and one of evaluation, cost."""
    shared = {"colluding_share": 0.05, "remove_excess": True}
    bound = np.sqrt(len(BOUNDS)) * (1 + 2.0**-14)
    evaluation = {**shared, "evaluated": tuple(BOUNDS.items())}
    return (
        plan_of(nodes, SIZE, 1.0, noise, **shared).event,
        plan_of(nodes, len(BOUNDS), bound, noise, **evaluation).event,
    )


def test_an_evaluation_is_an_event_of_its_own_within_the_target(tmp_path: Path) -> None:
    strategy = noisy(5, tmp_path, noise_multiplier=None, epsilon=6.0)
    grid = grid_of(5, app(lenient()))
    result = strategy.start(grid, model(), num_rounds=3, timeout=5)
    train, evaluation = events(5, strategy.noise_multiplier)
    with Ledger.open(tmp_path / "ledger.jsonl", repair=False) as ledger:
        assert ledger.counts == Counter({train: 3, evaluation: 3})
        assert [(c.round, c.attempt) for c in ledger.charges] == [
            (round, attempt) for round in range(3) for attempt in range(2)
        ]
    spent = [result.evaluate_metrics_clientapp[round]["epsilon"] for round in (1, 2, 3)]
    assert spent[-1] == epsilon({train: 3, evaluation: 3}, 1e-5, "server")
    assert 5.9 < spent[-1] <= 6.0
    asked = len(grid.sent)
    assert evaluated(strategy, grid, 4) is None  # beyond the budget: nobody trains or evaluates
    assert not [m for m in grid.sent[asked:] if stage_of(m) == "masked"]


@pytest.mark.statistical
def test_the_noise_of_an_evaluation_is_what_was_accounted(tmp_path: Path) -> None:
    grid, strategy, drawn = grid_of(9, app(lenient())), noisy(9, tmp_path, max_examples=None), []
    for round in range(1, 41):
        found = evaluated(strategy, grid, round)
        truth = means(range(1, 10))
        drawn += [(found[name] - truth[name]) / most for name, most in BOUNDS.items()]
    plan = plan_of(
        9, 2, np.sqrt(2), 1.0, colluding_share=0.05, remove_excess=True,
        evaluated=tuple(BOUNDS.items()),
    )  # fmt: skip
    share = 2 / (plan.least - plan.colluders)  # of the squared sensitivity
    deviation = np.sqrt(plan.least * share) / 9
    assert 0.75 < np.std(drawn) / deviation < 1.25


# ---------------------------------------------------------------------- refusals


def test_a_plan_of_the_other_kind_is_refused_before_anything_is_computed() -> None:
    """Else a server could have a node's training metrics, or its evaluation, for the other."""
    plans = {
        True: plan_of(5, SIZE, 1.0, max_examples=8),
        False: plan_of(5, 2, 2.0, max_examples=8, evaluated=tuple(BOUNDS.items())),
    }

    class Lying(SecureSum):
        def _planned(self, evaluates: bool, *_: Any) -> SumPlan:
            return plans[evaluates]

    for evaluates in (False, True):
        grid = grid_of(5, app(lenient()))
        strategy = Lying(everybody(5), clip_norm=1.0, max_examples=8, evaluate_metrics=BOUNDS)
        configure = strategy.configure_evaluate if evaluates else strategy.configure_train
        replies = grid.send_and_receive(configure(1, model(), ConfigRecord(), grid))
        assert len(replies) == 5
        assert all("for a sum of another kind" in reply.error.reason for reply in replies)


def test_a_node_insists_on_the_same_noise_and_counts_evaluations(tmp_path: Path) -> None:
    grid = grid_of(5, app(lenient(noise_multiplier=1.0)))
    assert evaluated(strategy_of(5), grid) is None
    assert evaluated(noisy(5, tmp_path), grid)
    grid, strategy = grid_of(5, app(lenient(rounds=1))), strategy_of(5)
    assert evaluated(strategy, grid)
    assert evaluated(strategy, grid, 2) is None


def test_evaluation_in_clear_or_masked() -> None:
    with pytest.raises(UsageError, match="summed under masks, and evaluate_in_clear is set"):
        strategy_of(3, evaluate_in_clear=True)
    with pytest.raises(UsageError, match="metric 'loss' up to 0.0"):
        strategy_of(3, evaluate_metrics={"loss": 0.0})
    plan = plan_of(3, 2, 1.0, evaluated=(("loss", 1.0), ("accuracy", 1.0)))
    assert SumPlan.unpack(plan.pack()) == plan
    with pytest.raises(UsageError, match="1 metrics evaluated in 2 coefficients"):
        plan_of(3, 2, 1.0, evaluated=(("loss", 1.0),))


def test_a_server_cannot_ask_for_other_metrics_than_nodes_are_told_of() -> None:
    def tampered(message: Message) -> Message:
        if stage_of(message) != "shares" or message.metadata.dst_node_id != 2:
            return message
        body, meta = unpack(message), message.metadata
        body["plan"] = body["plan"].replace(b"accuracy", b"illness!")
        return Message(pack(body), meta.dst_node_id, meta.message_type)

    grid = grid_of(5, app(lenient()), tampered=tampered)
    left = [1, 3, 4, 5]
    found = evaluated(strategy_of(5), grid)
    assert dict(found) == pytest.approx(means(left, [examples(n) for n in left]), abs=1e-5)
