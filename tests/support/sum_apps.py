"""Small Flower apps whose mean is known, and rounds of them in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from memory_grid import MemoryGrid, be_the_server

from privrec.flower.enrolment import enroll
from privrec.flower.secure_sum import SecureSum, SecureSumMod

SIZE = 12
GRID = 2.0**-10
SCORES = {"num-examples": 1, "accuracy": 0.5}


def delta(node: int, round: int = 1, size: int = SIZE) -> np.ndarray:
    """The update of a node in a round: whole steps of a grid, of a norm well below 1."""
    rng = np.random.default_rng([node, round])
    return rng.integers(-40, 41, size) * GRID


def examples(node: int) -> int:
    """Numbers of examples that are powers of two, so that weights are exact too."""
    return 2 ** (node % 4)


def model(size: int = SIZE) -> ArrayRecord:
    """Two float arrays of a model, and a counter that must stay what it is."""
    half = size // 2
    return ArrayRecord(
        {
            "weight": Array(np.zeros((2, half // 2), np.float32)),
            "steps": Array(np.array(5, np.int64)),
            "bias": Array(np.ones(size - 2 * (half // 2), np.float64)),
        }
    )


def flat(arrays: ArrayRecord) -> np.ndarray:
    """The float coefficients of a model in their order."""
    values = (array.numpy() for array in arrays.values())
    return np.concatenate([v.ravel() for v in values if v.dtype.kind == "f"]).astype(np.float64)


def moved(arrays: ArrayRecord, change: np.ndarray) -> ArrayRecord:
    """What a node's training gives."""
    new, start = {}, 0
    for name, array in arrays.items():
        old = array.numpy()
        if old.dtype.kind == "f":
            part = change[start : start + old.size].reshape(old.shape)
            new[name], start = Array((old + part).astype(old.dtype)), start + old.size
        else:
            new[name] = Array(np.asarray(old + 50))
    return ArrayRecord(new)


def app_of(
    *mods: Any,
    change: Callable[[int, int], np.ndarray] = delta,
    metrics: Callable[[int], Mapping[str, float]] = lambda node: {"loss": node / 4},
    scores: Callable[[int], Mapping[str, float]] = lambda node: SCORES,
) -> ClientApp:
    """An app whose node ``n`` moves the model by ``change(n, round)``, and has these scores."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert set(message.content) == {"arrays", "config"}
        context.state["calls"] = MetricRecord({"n": calls(context) + 1})
        arrays, config = message.content["arrays"], message.content["config"]
        node, round = context.node_id, config["server-round"]
        record = MetricRecord({"num-examples": examples(node), **metrics(node)})
        new = moved(arrays, change(node, round))
        return Message(RecordDict({"arrays": new, "metrics": record}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        record = MetricRecord(dict(scores(context.node_id)))
        return Message(RecordDict({"metrics": record}), reply_to=message)

    return app


def calls(context: Context) -> int:
    """How often a node trained."""
    return int(context.state["calls"]["n"]) if "calls" in context.state else 0


def lenient(**changes: Any) -> SecureSumMod:
    """A mod that takes part among few, with no list of devices."""
    return SecureSumMod(**{"minimum": 2, "trust_server": True, **changes})


def grid_of(nodes: int, app: ClientApp | None = None, **changes: Any) -> MemoryGrid:
    """Nodes 1 to ``nodes`` of one app."""
    be_the_server()
    configs = {node: {"partition-id": node} for node in range(1, nodes + 1)}
    return MemoryGrid(app or app_of(lenient()), changes.pop("configs", configs), **changes)


def strategy_of(nodes: int, inner: Any = None, **changes: Any) -> SecureSum:
    """FedAvg over all nodes inside a secure sum."""
    inner = inner or fedavg(nodes)
    return SecureSum(inner, **{"clip_norm": 1.0, "max_examples": 8, **changes})


def fedavg(nodes: int) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)


def one_round(
    strategy: SecureSum, grid: MemoryGrid, arrays: ArrayRecord | None = None, round: int = 1
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """What Flower's own loop does in a round of training."""
    messages = strategy.configure_train(round, arrays or model(), ConfigRecord(), grid)
    return strategy.aggregate_train(round, grid.send_and_receive(messages))


def mean_of(nodes: Sequence[int], round: int = 1, size: int = SIZE) -> np.ndarray:
    """The mean update of some nodes, weighted by their examples."""
    weights = [examples(node) for node in nodes]
    return np.average([delta(node, round, size) for node in nodes], axis=0, weights=weights)


def enrolled(folder: Path, nodes: int) -> dict[int, dict[str, Any]]:
    """Node-configs with keys each and one roster of all."""
    keys, roster = {n: folder / f"node-{n}" for n in range(1, nodes + 1)}, folder / "roster.txt"
    for path in keys.values():
        enroll(path, roster=roster)
    return {n: {"keys": str(path), "roster": str(roster)} for n, path in keys.items()}


def expected(nodes: Sequence[int], round: int = 1) -> np.ndarray:
    """The model after a round over some nodes."""
    return flat(moved(model(), mean_of(nodes, round)))


def same(arrays: ArrayRecord | None, coefficients: np.ndarray) -> bool:
    """Whether a model has these coefficients, up to a few steps of the integers.

    A node that is missing, or counted twice, changes a coefficient by 25 times as much or more.
    """
    return arrays is not None and np.allclose(flat(arrays), coefficients, rtol=0, atol=2e-6)
