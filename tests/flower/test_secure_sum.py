from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    Krum,
)
from memory_grid import MemoryGrid, stage_of
from sum_apps import (
    SIZE,
    app_of,
    calls,
    delta,
    examples,
    expected,
    fedavg,
    flat,
    grid_of,
    lenient,
    mean_of,
    model,
    moved,
    one_round,
    same,
    strategy_of,
)

from privrec.errors import ReleaseRefused, UsageError
from privrec.flower import enrolment, exchange, plan, secure_sum
from privrec.flower import mod as mod_module
from privrec.flower.exchange import EXCHANGES, PREKEYS, RECORD, unpack
from privrec.flower.mod import SecureSumMod
from privrec.flower.plan import SumPlan
from privrec.flower.secure_sum import SecureSum
from privrec.randomness import SecretRoot

STAGES = (PREKEYS, *EXCHANGES)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the secure sum says in Flower's log."""
    caplog.set_level(logging.INFO, "flwr.privrec")
    return caplog


def answers(grid: MemoryGrid, stage: str) -> list[bytes]:
    """What nodes answered in a stage."""
    pairs = [(a, r) for a, r in zip(grid.sent, grid.replies, strict=True) if stage_of(a) == stage]
    return [answer for _, reply in pairs for answer in unpack(reply)["answers"].values()]


def losing(stage: str, *nodes: int) -> Any:
    """Those nodes never answer in a stage, nor later in the round."""
    gone = STAGES[STAGES.index(stage) :]

    def lost(message: Message) -> bool:
        return message.metadata.dst_node_id in nodes and stage_of(message) in gone

    return lost


# ---------------------------------------------------------------------- the mean


def test_a_round_gives_the_exact_weighted_mean_of_all_updates() -> None:
    arrays, metrics = one_round(strategy_of(5), grid_of(5))
    assert same(arrays, expected(range(1, 6)))
    assert metrics == MetricRecord({})  # what is not named stays on the nodes


def test_the_sum_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The integers of the survivors, made again from their own roots, add up to what came out."""
    released: list[Any] = []
    mean = secure_sum._mean
    monkeypatch.setattr(secure_sum, "_mean", lambda *args: released.append(args[:2]) or mean(*args))
    grid = grid_of(7, lost=losing("masked", 3))
    one_round(strategy_of(7, metrics={"loss": 2.0}), grid)
    ((opened, total),) = released
    terms = opened.plan.terms(opened.session._call.run, 0, 0)
    mine = np.zeros(opened.plan.length, np.int64)
    for node in (1, 2, 4, 5, 6, 7):
        update = plan.update(model(), moved(model(), delta(node)))
        root = SecretRoot(grid.contexts[node].state[RECORD]["root"])
        coins = root.stream("rounding", terms.run, terms.round, terms.attempt, terms.plan)
        metrics = {"num-examples": examples(node), "loss": node / 4}
        mine += plan.integers(opened.plan, update, metrics, coins)
    assert np.array_equal(total, mine)
    assert np.abs(mine[:SIZE]).min() > 0


def test_the_mean_is_what_flower_gives_without_the_secure_sum() -> None:
    secure, _ = one_round(strategy_of(5), grid_of(5))
    grid = grid_of(5, app_of())
    plain, _ = one_round(fedavg(5), grid)
    for name in ("weight", "bias"):  # FedAvg makes a float of the counter
        assert np.allclose(secure[name].numpy(), plain[name].numpy(), atol=1e-7)
    assert {n: a.numpy().dtype for n, a in secure.items()} == {
        n: a.numpy().dtype for n, a in model().items()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_drop_outs_at_any_exchange_are_survived(stage: str) -> None:
    grid = grid_of(7, lost=losing(stage, 2, 5))
    arrays, _ = one_round(strategy_of(7), grid)
    # Whose vector was taken in is in the sum, also when the node is gone by its end.
    left = [n for n in range(1, 8) if n not in (2, 5) or STAGES.index(stage) > 2]
    assert same(arrays, expected(left))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_below_the_threshold_nothing_is_released(stage: str, log: pytest.LogCaptureFixture) -> None:
    strategy, grid = strategy_of(7), grid_of(7, lost=losing(stage, 1, 2, 3))
    assert one_round(strategy, grid) == (None, None)
    said = [r.getMessage() for r in log.records if r.levelno == logging.ERROR]
    assert len(said) == 1
    assert "round 1 releases nothing, and the model stays as it was: 4 " in said[0]
    assert "too many dropped out" in said[0]
    grid.lost = lambda message: False
    arrays, _ = one_round(strategy, grid, round=2)
    assert same(arrays, expected(range(1, 8), 2))


def test_flowers_own_loop_keeps_the_model_of_the_last_good_round() -> None:
    bad = {2}

    def lost(message: Message) -> bool:
        round = message.content["config"]["server-round"] if "config" in message.content else 0
        return stage_of(message) == "masked" and round in bad and message.metadata.dst_node_id < 4

    strategy, grid = strategy_of(5), grid_of(5, lost=lost)
    result = strategy.start(grid, model(), num_rounds=3, timeout=5)
    change = sum(mean_of(range(1, 6), round) for round in (1, 3))
    assert np.allclose(flat(result.arrays), flat(model()) + change, atol=1e-6)


def test_a_strategy_can_be_started_again() -> None:
    strategy, grid = strategy_of(5), grid_of(5)
    first = strategy.start(grid, model(), num_rounds=2, timeout=5).arrays
    second = strategy.start(grid, model(), num_rounds=2, timeout=5).arrays
    assert same(first, flat(second))


def test_a_strategy_can_be_started_again_over_other_nodes() -> None:
    strategy = strategy_of(5)
    for nodes in (5, 7):
        result = strategy.start(grid_of(nodes), model(), num_rounds=1, timeout=5)
        assert result.arrays


def test_more_rounds_than_prekeys_of_a_deposit() -> None:
    strategy, grid = strategy_of(3), grid_of(3)
    arrays = model()
    for round in range(1, 35):
        arrays, _ = one_round(strategy, grid, arrays, round)
    asked = [stage_of(message) for message in grid.sent]
    assert asked.count("prekeys") == 2 * 3  # one exchange in 32 rounds
    change = sum(mean_of([1, 2, 3], round) for round in range(1, 35))
    assert np.allclose(flat(arrays), flat(model()) + change, atol=1e-5)


def test_a_node_that_lost_its_state_comes_back_a_round_later() -> None:
    strategy, grid = strategy_of(5), grid_of(5)
    one_round(strategy, grid)
    del grid.contexts[4].state[RECORD]
    arrays, _ = one_round(strategy, grid, round=2)
    assert same(arrays, expected([1, 2, 3, 5], 2))
    arrays, _ = one_round(strategy, grid, round=3)
    assert same(arrays, expected(range(1, 6), 3))


@pytest.mark.parametrize("inner", [FedAdam, FedProx])
def test_strategies_that_average_work_on_the_mean(inner: Any) -> None:
    settings: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": 4}
    if inner is FedProx:
        settings["proximal_mu"] = 0.1
    secure, plain = (inner(**settings, min_available_nodes=4) for _ in range(2))
    arrays = ArrayRecord([np.zeros(SIZE, np.float32)])
    first, _ = one_round(strategy_of(4, secure), grid_of(4), arrays)
    second, _ = one_round(plain, grid_of(4, app_of()), arrays)
    assert np.allclose(flat(first), flat(second), atol=1e-6)


def test_an_app_may_take_the_arrays_out_of_its_message() -> None:
    def greedy(message: Message, context: Any, call_next: Any) -> Message:
        reply = call_next(message, context)
        message.content["arrays"].to_numpy_ndarrays(keep_input=False)
        return reply

    arrays, _ = one_round(strategy_of(3), grid_of(3, app_of(lenient(), greedy)))
    assert same(arrays, expected([1, 2, 3]))


# ---------------------------------------------------------------------- weights, metrics, clipping


def test_named_metrics_come_back_as_weighted_means() -> None:
    app = app_of(lenient(), metrics=lambda n: {"loss": n / 4, "acc": -0.5, "other": 9.0})
    strategy = strategy_of(5, metrics={"loss": 2.0, "acc": 1.0})
    _, metrics = one_round(strategy, grid_of(5, app))
    weights = [examples(n) for n in range(1, 6)]
    assert metrics["loss"] == pytest.approx(
        np.average([n / 4 for n in range(1, 6)], weights=weights), abs=1e-5
    )
    assert metrics["acc"] == pytest.approx(-0.5, abs=1e-5)
    assert set(metrics) == {"loss", "acc"}


def test_a_metric_is_bounded_and_a_broken_one_counts_as_zero() -> None:
    app = app_of(lenient(), metrics=lambda n: {"loss": 1e9 if n == 1 else float("nan")})
    _, metrics = one_round(strategy_of(3, metrics={"loss": 2.0}), grid_of(3, app))
    assert metrics["loss"] == pytest.approx(2.0 * examples(1) / (2 + 4 + 8), abs=1e-5)


def test_every_node_can_count_as_one() -> None:
    arrays, _ = one_round(strategy_of(4, max_examples=None), grid_of(4))
    mean = np.mean([delta(n) for n in range(1, 5)], axis=0)
    assert same(arrays, flat(moved(model(), mean)))


def test_examples_beyond_the_largest_are_cut_and_reported(log: pytest.LogCaptureFixture) -> None:
    arrays, _ = one_round(strategy_of(3, max_examples=4), grid_of(3))
    mean = np.average([delta(n) for n in (1, 2, 3)], axis=0, weights=[2, 4, 4])
    assert np.allclose(flat(arrays), flat(model()) + mean, atol=1e-6)
    assert "1 of 3 nodes have more examples than max_examples" in log.text


def test_long_and_broken_updates_are_bounded_and_counted(log: pytest.LogCaptureFixture) -> None:
    def change(node: int, round: int) -> np.ndarray:
        if node == 1:
            return np.full(SIZE, 1e6)
        return np.full(SIZE, np.nan) if node == 2 else delta(node)

    strategy = strategy_of(3, max_examples=None)
    arrays, _ = one_round(strategy, grid_of(3, app_of(lenient(), change=change)))
    long = np.full(SIZE, 1 / np.sqrt(SIZE))
    assert np.allclose(flat(arrays), flat(model()) + (long + delta(3)) / 3, atol=1e-5)
    assert "2 of 3 updates are longer than clip_norm, or not finite" in log.text


def weighted(weights: dict[int, Any], **changes: Any) -> tuple[Any, Any]:
    """A round of nodes with these numbers of examples."""
    app = app_of(lenient(), metrics=lambda n: {"num-examples": weights[n]})
    return one_round(strategy_of(len(weights), **changes), grid_of(len(weights), app))


@pytest.mark.parametrize(
    ("weights", "most"),
    [
        ([0.2, 0.3, 0.1, 0.4], 1),
        ([0.4, 0.3, 0.3], 8),
        ([1.9, 1, 1, 1], 8),
        ([0.5, 3, 3, 3], 8),
        ([np.float64(2.5), 0, 1], 8),
    ],
)
def test_weights_that_are_not_whole_give_flowers_own_mean(
    weights: list[float], most: int, log: pytest.LogCaptureFixture
) -> None:
    arrays, _ = weighted(dict(enumerate(weights, 1)), max_examples=most)
    mean = np.average([delta(n + 1) for n in range(len(weights))], axis=0, weights=weights)
    assert np.allclose(flat(arrays), flat(moved(model(), mean)), rtol=0, atol=1e-5)
    assert "nodes have" not in log.text
    assert "nodes gave" not in log.text


@pytest.mark.parametrize("bad", [-1, -0.5, float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_weight_that_is_none_leaves_its_node_out_and_is_told(
    bad: float, log: pytest.LogCaptureFixture
) -> None:
    arrays, _ = weighted({1: 2, 2: bad, 3: 1})
    mean = np.average([delta(1), delta(3)], axis=0, weights=[2, 1])
    assert np.allclose(flat(arrays), flat(moved(model(), mean)), rtol=0, atol=1e-5)
    assert "1 of 3 nodes gave a num-examples that is negative or not finite" in log.text


def test_weights_that_are_too_small_for_their_steps_are_told(
    log: pytest.LogCaptureFixture,
) -> None:
    weights = {1: 1e-6, 2: 1e-6, 3: 1.0}
    assert weighted(weights, max_examples=10_000)[0]
    assert "2 of 3 nodes gave" in log.text
    assert "lower max_examples to about the largest" in log.text
    log.clear()
    assert weighted({1: 1e-3, 2: 1e-3, 3: 1.0}, max_examples=1)[0]
    assert "nodes gave" not in log.text


@pytest.mark.parametrize("most", [0, -1, 2.5, 8.0, True, "8", float("nan")])
def test_a_largest_number_of_examples_is_a_whole_number(most: Any) -> None:
    with pytest.raises(UsageError, match="max_examples .* must be a whole number of at least 1"):
        strategy_of(3, max_examples=most)


@pytest.mark.parametrize("nodes", [3, 1000, 200_000])
@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_whatever_its_weight_says_a_node_stays_within_the_bound(nodes: int, most: int) -> None:
    planned = plan.plan_of(nodes, SIZE, 1.0, max_examples=most)
    assert nodes * planned.most_steps < 2**31
    assert 2 * nodes * planned.most_steps >= 2**31 or planned.most_steps > 2**29
    coins = SecretRoot.known(b"coins").stream("rounding")
    long = np.full(SIZE, 9.0, np.float32)
    given = [0, 1e-300, 0.3, 1, most - 0.25, most, most + 1, 1e300, -2, np.nan, np.inf, 10**400]
    for weight in given:
        found = plan.integers(planned, long, {"num-examples": weight}, coins).astype(np.int64)
        assert (found[:SIZE] ** 2).sum() <= planned.encoding.squared_bound
        assert 0 <= found[SIZE] <= planned.most_steps
    huge = SumPlan(SIZE, 1.0, 8.0, 7, "n", (), 3)
    for bits in (-1, 31, 28):
        with pytest.raises(UsageError, match="weight_bits"):
            replace(huge, weight_bits=bits)


def test_arrays_that_are_no_floats_stay_what_they_are() -> None:
    arrays, _ = one_round(strategy_of(3), grid_of(3))
    assert arrays["steps"].numpy() == 5
    assert arrays["steps"].dtype == "int64"


def test_nodes_without_examples_have_no_mean(log: pytest.LogCaptureFixture) -> None:
    app = app_of(lenient(), metrics=lambda n: {"num-examples": 0})
    assert one_round(strategy_of(3), grid_of(3, app)) == (None, None)
    assert "no examples at all" in log.text


# ---------------------------------------------------------------------- what leaves a node


def test_nothing_leaves_a_node_but_its_part_of_the_secure_sum() -> None:
    grid = grid_of(5)
    one_round(strategy_of(5, metrics={"loss": 2.0}), grid)
    assert grid.replies
    for reply in grid.replies:
        assert list(reply.content) == [RECORD]
        assert set(unpack(reply)) in ({"devices"}, {"answers"})
    masked = answers(grid, "masked")
    assert len(masked) == 5
    words = np.concatenate([np.frombuffer(m, np.uint32, offset=36) for m in masked])
    # Plain updates are below 2^14 here: under masks next to no word is.
    assert np.mean((words < 2**24) | (words > 2**32 - 2**24)) < 0.15
    assert len(masked[0]) == 36 + 4 * (SIZE + 4 + 1)


def test_replies_differ_though_updates_do_not() -> None:
    app = app_of(lenient(), change=lambda node, round: delta(1))
    grid, strategy = grid_of(3, app), strategy_of(3)
    for round in (1, 2):
        one_round(strategy, grid, round=round)
    sent = answers(grid, "masked")
    assert len(set(sent)) == len(sent) == 6


def test_state_is_forgotten_after_a_round() -> None:
    grid = grid_of(3)
    one_round(strategy_of(3), grid)
    for context in grid.contexts.values():
        assert set(context.state[RECORD]) == {"root", "state"}
        kept = msgpack.unpackb(context.state[RECORD]["state"], strict_map_key=False)
        assert set(kept) == {0}
        assert set(kept[0]) == {"book", "given"}


def test_the_context_of_a_node_can_be_counted() -> None:
    # Flower's own count_bytes fails on empty values.
    grid = grid_of(3, lost=losing("confirm", 2))
    one_round(strategy_of(3), grid)
    assert all(context.state[RECORD].count_bytes() > 0 for context in grid.contexts.values())


def test_another_run_has_other_masks_and_prekeys() -> None:
    first, second = grid_of(3), grid_of(3)
    one_round(strategy_of(3), first)
    one_round(strategy_of(3), second)
    sent = [
        {device["prekeys"] for reply in grid.replies for device in unpack(reply).get("devices", ())}
        | {answer for stage in EXCHANGES for answer in answers(grid, stage)}
        for grid in (first, second)
    ]
    assert len(sent[0]) == len(sent[1]) == 15
    assert not sent[0] & sent[1]


# ---------------------------------------------------------------------- evaluation


def test_evaluation_is_not_asked_for_unless_allowed(log: pytest.LogCaptureFixture) -> None:
    strategy = SecureSum(FedAvg(min_train_nodes=3, min_available_nodes=3), clip_norm=1.0)
    result = strategy.start(grid_of(3), model(), num_rounds=1, timeout=5)
    assert not result.evaluate_metrics_clientapp
    assert "nodes are not asked to evaluate" in log.text


def test_evaluation_in_clear_takes_both_sides() -> None:
    inner = FedAvg(min_train_nodes=3, min_available_nodes=3, min_evaluate_nodes=3)
    strategy = SecureSum(inner, clip_norm=1.0, evaluate_in_clear=True)
    result = strategy.start(grid_of(3), model(), num_rounds=1, timeout=5)
    assert not result.evaluate_metrics_clientapp  # the nodes refuse
    grid = grid_of(3, app_of(lenient(evaluate_in_clear=True)))
    result = strategy.start(grid, model(), num_rounds=1, timeout=5)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.5


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("inner", [FedMedian, Krum])
def test_strategies_that_look_at_single_replies_are_refused(inner: Any) -> None:
    with pytest.raises(UsageError, match="looks at each node's update by itself"):
        SecureSum(inner(), clip_norm=1.0)


def test_what_is_no_strategy_of_today_is_refused() -> None:
    from flwr.server.strategy import FedAvg as LegacyFedAvg
    from flwr.server.strategy import Krum as LegacyKrum

    for strategy, says in (
        (FedAvg, r"the class FedAvg, .* give an instance: SecureSum\(FedAvg\(\), \.\.\.\)"),
        (LegacyFedAvg(), "FedAvg of flwr.server.strategy.* import it from flwr.serverapp.strategy"),
        (LegacyKrum(), "Krum of flwr.server.strategy"),
        (strategy_of(3), "SecureSum looks at each node's update by itself"),
        ("FedAvg", "the strategy is 'FedAvg'"),
    ):
        with pytest.raises(UsageError, match=says):
            SecureSum(strategy, clip_norm=1.0)


@pytest.mark.parametrize(
    "wrapper",
    [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping],
)
def test_a_wrapper_around_a_secure_sum_is_refused(wrapper: Any) -> None:
    """It would clip masked integers, and say that it adds noise."""
    grid, strategy = grid_of(3), strategy_of(3)
    around = wrapper(strategy, noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=3)
    with pytest.raises(UsageError, match="around SecureSum, .*DifferentialPrivacy.* outermost"):
        around.start(grid, model(), num_rounds=1, timeout=5)
    assert not grid.sent
    assert strategy.start(grid, model(), num_rounds=1, timeout=5).arrays


def test_a_run_in_which_nobody_was_asked_is_no_success() -> None:
    strategy = strategy_of(3, FedAvg(fraction_train=0.0, fraction_evaluate=0.0))
    with pytest.raises(ReleaseRefused, match="asked no node to train"):
        strategy.start(grid_of(3), model(), num_rounds=2, timeout=5)

    class Deaf(FedAvg):
        def aggregate_train(self, *_: Any) -> Any:
            return None, None

    inner = Deaf(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    with pytest.raises(ReleaseRefused, match="Deaf made no model of the mean"):
        strategy_of(3, inner).start(grid_of(3), model(), num_rounds=2, timeout=5)


def test_rounds_without_a_sum_are_counted_at_the_end(log: pytest.LogCaptureFixture) -> None:
    grid = grid_of(5, app_of(lenient(rounds=1)))
    assert strategy_of(5).start(grid, model(), num_rounds=3, timeout=5).arrays
    assert "1 of 3 rounds released a sum; the model is that of these" in log.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip_norm": 0.0}, "clip_norm 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm nan"),
        ({"metrics": {"loss": 0.0}}, "metric 'loss' up to 0.0: it must lie between"),
        ({"max_examples": 2**31}, "max_examples 2147483648"),
        ({"noise_multiplier": 1.0}, "ledger go together"),
        ({"ledger": "l.jsonl"}, "ledger go together"),
        ({"noise_multiplier": 0.0, "ledger": "l.jsonl"}, "must be above 0"),
        (
            {"epsilon": 1.0, "ledger": "l.jsonl", "metrics": {"loss": 1.0}},
            "without being accounted",
        ),
        ({"epsilon": 1.0, "ledger": "l.jsonl", "delta": 2.0}, "delta 2.0"),
        ({"roster": "/nowhere"}, "could not be read"),
        ({"roster": "a", "enrolment_key": "b"}, "keep the one that is in use"),
        ({"enrolment_key": "zz" * 32}, "64 hexadecimal digits"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        strategy_of(3, **settings)


def test_a_mod_has_limits_too() -> None:
    with pytest.raises(UsageError, match="a sum of one hides nobody"):
        SecureSumMod(minimum=1)
    with pytest.raises(UsageError, match="noise_multiplier -1"):
        SecureSumMod(noise_multiplier=-1.0)


def test_more_examples_than_the_ring_holds_are_refused() -> None:
    with pytest.raises(UsageError, match="could wrap around"):
        one_round(strategy_of(5, max_examples=2**29), grid_of(5))


def test_a_strategy_that_sends_nodes_different_things_is_refused() -> None:
    class Uneven(FedAvg):
        def configure_train(self, *args: Any) -> Any:
            for number, message in enumerate(super().configure_train(*args)):
                config = ConfigRecord({"server-round": 1, "lr": 0.1 * number})
                message.content = RecordDict({**message.content, "config": config})
                yield message

    inner = Uneven(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    with pytest.raises(UsageError, match="different models or settings"):
        one_round(strategy_of(3, inner), grid_of(3))


def test_nodes_find_their_own_settings_among_those_of_all() -> None:
    class Each(FedAvg):
        def configure_train(self, round: int, arrays: Any, config: Any, grid: Any) -> Any:
            rates = {str(node): node / 8 for node in grid.get_node_ids()}
            return super().configure_train(round, arrays, ConfigRecord(rates), grid)

    app = ClientApp(mods=[lenient()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        rate = message.content["config"][str(context.node_id)]
        content = {"arrays": moved(message.content["arrays"], np.full(SIZE, rate / 4))}
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(RecordDict(content), reply_to=message)

    inner = Each(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    arrays, _ = one_round(strategy_of(3, inner), grid_of(3, app))
    assert same(arrays, flat(moved(model(), np.full(SIZE, (1 + 2 + 3) / 8 / 4 / 3))))


class Controlled(FedAvg):
    """Moves a model and its control, which are two ArrayRecords, by the means of both."""

    control = ArrayRecord({"bias": Array(np.full(3, 2.0, np.float32))})

    def configure_train(self, *args: Any) -> Any:
        for message in super().configure_train(*args):
            message.content = RecordDict({**message.content, "a control": self.control})
            yield message

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        (reply,) = replies
        assert list(reply.content.array_records) == ["a control", "arrays"]
        self.control = reply.content["a control"]
        del reply.content["a control"]
        return super().aggregate_train(server_round, [reply])


def test_several_array_records_are_summed_together() -> None:
    def train(message: Message, context: Context) -> Message:
        node, content = context.node_id, dict(message.content)
        content["metrics"] = MetricRecord({"num-examples": 1})
        del content["config"]
        content["arrays"] = moved(content["arrays"], delta(node))
        content["a control"] = moved(content["a control"], np.full(3, node / 64))
        return Message(RecordDict(dict(reversed(content.items()))), reply_to=message)

    app = ClientApp(mods=[lenient()])
    app.train()(train)
    inner = Controlled(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    strategy = strategy_of(3, inner)
    for round in (1, 2):
        arrays, _ = one_round(strategy, grid_of(3, app), round=round)
        mean = np.mean([delta(node) for node in (1, 2, 3)], axis=0)
        assert same(arrays, flat(moved(model(), mean)))
        assert arrays["steps"].numpy() == model()["steps"].numpy()
        assert inner.control["bias"].numpy() == pytest.approx(np.full(3, 2 + round * 2 / 64))

    def forgetting(message: Message, context: Context) -> Message:
        reply = train(message, context)
        del reply.content["a control"]
        return reply

    app = ClientApp(mods=[lenient()])
    app.train()(forgetting)
    grid = grid_of(3, app)
    assert one_round(strategy, grid, round=3) == (None, None)
    reasons = {reply.error.reason for reply in grid.replies if reply.has_error()}
    assert len(reasons) == 1
    assert "'a control/bias', 'arrays/bias'" in reasons.pop()


def test_the_error_code_is_flowers() -> None:
    constant = pytest.importorskip("flwr.common.constant")
    assert exchange._REFUSED == constant.ErrorCode.MOD_FAILED_PRECONDITION


def test_only_flowers_public_names_are_imported() -> None:
    public = {"flwr.app", "flwr.serverapp", "flwr.serverapp.strategy"}
    for module in (enrolment, exchange, mod_module, plan, secure_sum):
        text = Path(module.__file__).read_text("utf-8")
        assert set(re.findall(r"^\s*(?:from|import) (flwr[\w.]*)", text, re.M)) <= public


def test_a_node_trains_once_for_each_round() -> None:
    grid, strategy = grid_of(3), strategy_of(3)
    for round in (1, 2):
        one_round(strategy, grid, round=round)
    assert {calls(context) for context in grid.contexts.values()} == {2}


def test_a_message_is_an_array_which_flower_moves_in_pieces() -> None:
    grid = grid_of(3)
    one_round(strategy_of(3), grid)
    arrays = [r.content[RECORD]["body"] for r in grid.replies]
    assert all(isinstance(a, Array) and a.shape == (len(a.data),) for a in arrays)
