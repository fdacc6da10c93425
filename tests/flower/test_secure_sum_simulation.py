"""The secure sum in Flower's own simulation engine: contexts and messages as Flower keeps them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")
if find_spec("ray") is None:  # which is not imported here: it takes a while
    pytest.skip("Flower's simulation engine is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from privrec.flower.secure_sum import SecureSum, SecureSumMod

def client():
    app = ClientApp(mods=[SecureSumMod(minimum=4, trust_server=True, rounds=3)])

    @app.train()
    def train(message, context):
        node, round = context.node_config["partition-id"], message.content["config"]["server-round"]
        if node == round:
            raise RuntimeError("this node drops out")
        (values,) = message.content["arrays"].to_numpy_ndarrays()
        new = ArrayRecord([values + 2.0 ** -np.float32(node)])
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": new, "metrics": metrics}), reply_to=message)

    return app

server, found = ServerApp(), []

@server.main()
def main(grid, context):
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=5, min_available_nodes=5)
    strategy = SecureSum(inner, clip_norm=8.0, max_examples=None)
    result = strategy.start(grid, ArrayRecord([np.zeros(16, np.float32)]), num_rounds=3, timeout=60)
    found.append(result.arrays.to_numpy_ndarrays()[0].tolist())

run_simulation(
    server, client(), num_supernodes=5,
    backend_config={
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": 1, "include_dashboard": False, "_temp_dir": sys.argv[1]},
    },
)
print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
def test_three_rounds_with_a_drop_out_each_in_the_simulation_engine(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "home"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    program = tmp_path / "app.py"
    program.write_text(PROGRAM)
    # Ray's sockets lie below the folder, and their paths may not exceed 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, str(program), folder],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    (values,) = json.loads(line.removeprefix("FOUND "))
    each = [2.0**-node for node in range(5)]
    change = sum((sum(each) - each[gone]) / 4 for gone in (1, 2, 3))
    assert values == pytest.approx([change] * 16, abs=1e-5)
    assert done.stderr.count("4 of 5 nodes are in it") == 3
