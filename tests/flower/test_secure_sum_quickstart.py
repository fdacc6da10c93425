"""Flower's own quickstart model, with and without a secure sum around its strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")

import quickstart_task as task
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from memory_grid import MemoryGrid, stage_of
from sum_apps import fedavg, grid_of, lenient

from privrec.flower.exchange import EXCHANGES, PREKEYS
from privrec.flower.secure_sum import SecureSum

NODES, ROUNDS, SEEDS = 8, 9, (0, 1, 2)
STAGES = (PREKEYS, *EXCHANGES)


def quickstart(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config, node = message.content["config"], context.node_config["partition-id"]
        net = task.Net()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loader = task.load_data(node, NODES, seed=config["seed"] * 100 + config["server-round"])
        loss = task.train(net, loader, epochs=2, lr=config["lr"])
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
        arrays = ArrayRecord(net.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def trained(strategy: Any, grid: MemoryGrid, seed: int) -> tuple[float, list[float]]:
    """Accuracy on unseen images at the end, and the training loss of each round."""
    initial = ArrayRecord(task.Net(seed).state_dict())
    config = ConfigRecord({"lr": 0.03, "seed": seed})
    result = strategy.start(grid, initial, num_rounds=ROUNDS, timeout=60, train_config=config)
    net = task.Net()
    net.load_state_dict(result.arrays.to_torch_state_dict())
    losses = [result.train_metrics_clientapp[r]["train_loss"] for r in range(1, ROUNDS + 1)]
    return task.accuracy(net), losses


def one_a_round(seed: int) -> Callable[[Message], bool]:
    """In each round another node falls silent, each time from another exchange on."""
    asked: Counter[int] = Counter()

    def lost(message: Message) -> bool:
        stage, node = stage_of(message), message.metadata.dst_node_id
        asked[node] += stage == "shares"
        round = max(asked.values())
        gone = STAGES[1 + round % 4 :]
        return stage in gone and node == (round + seed) % NODES + 1

    return lost


@pytest.mark.slow
def test_the_quickstart_is_as_accurate_inside_a_secure_sum_with_a_drop_out_a_round() -> None:
    plain, secure, dropped = [], [], 0
    for seed in SEEDS:
        plain.append(trained(fedavg(NODES), grid_of(NODES, quickstart()), seed)[0])
        strategy = SecureSum(fedavg(NODES), clip_norm=5.0, metrics={"train_loss": 5.0})
        grid = grid_of(NODES, quickstart(lenient()), lost=one_a_round(seed))
        found, losses = trained(strategy, grid, seed)
        secure.append(found)
        dropped += len(grid.sent) - len(grid.replies)
        assert losses[-1] < losses[0]
    assert dropped >= len(SEEDS) * ROUNDS
    spread = max(np.ptp(plain), 0.02)
    print(f"plain {plain}, secure {secure}, spread {spread:.3f}")
    assert min(plain) > 0.8  # a tenth is guessing
    assert abs(np.mean(secure) - np.mean(plain)) <= spread
    assert min(secure) >= min(plain) - spread


def test_without_drop_outs_the_models_are_the_same_up_to_rounding() -> None:
    plain = fedavg(NODES)
    settings = {"clip_norm": 5.0, "metrics": {"train_loss": 5.0}, "max_examples": task.IMAGES}
    secure = SecureSum(fedavg(NODES), **settings)
    config = ConfigRecord({"lr": 0.03, "seed": 3})
    initial = ArrayRecord(task.Net(3).state_dict())
    results = [
        strategy.start(grid_of(NODES, app), initial, num_rounds=1, timeout=60, train_config=config)
        for strategy, app in ((plain, quickstart()), (secure, quickstart(lenient())))
    ]
    for name, array in results[0].arrays.items():
        other = results[1].arrays[name].numpy()
        assert np.allclose(array.numpy(), other, atol=2e-6)
        assert other.dtype == array.numpy().dtype == np.float32
    losses = [result.train_metrics_clientapp[1]["train_loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
