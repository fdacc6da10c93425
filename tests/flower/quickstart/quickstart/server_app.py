"""The server's side: FedAvg inside a secure sum, every round's model kept."""

import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from privrec.flower.secure_sum import SecureSum
from quickstart.model import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train; a node that was killed is waited for until another process has taken its place."""
    config, known = context.run_config, set()
    nodes, out = config["num-nodes"], Path(config["out"])

    def keep(round: int, arrays: ArrayRecord) -> None:
        torch.save(arrays.to_torch_state_dict(), out / f"{round}.pt")
        while round < config["num-server-rounds"]:
            now = set(grid.get_node_ids())
            if len(now) == nodes and now != known:
                known.clear()
                known.update(now)
                return
            time.sleep(1)

    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy = SecureSum(
        inner, clip_norm=5.0, max_examples=64, metrics={"train_loss": 10.0},
        roster=config["roster"], timeout=config["timeout"],
    )  # fmt: skip
    strategy.start(
        grid,
        ArrayRecord(Net().state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        evaluate_fn=keep,
    )
