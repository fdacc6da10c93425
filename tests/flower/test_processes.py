"""What the process that Flower starts for each message imports: nothing that it can do without.

Importing costs such a process far more than what it computes; see ``docs/flower.md``.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common import serde
from flwr.serverapp.strategy import FedAvg
from memory_grid import Loopback, context_of, stage_of

from privrec.flower.client_app import client_app
from privrec.flower.exchange import EXCHANGES, MASKED, PREKEYS, SHARES
from privrec.flower.secure_sum import SecureSum
from privrec.flower.server_app import deploy
from privrec.scenario.load import load

SUPPORT = Path(__file__).parents[1] / "support"
NODE = 10
HEAVY = ("torch", "scipy.stats")
CRYPTOGRAPHIC = {PREKEYS, *EXCHANGES} - {MASKED}
SCENARIO = """
name = "in-processes"
[data]
users = 40
items = 60
clusters = 3
interactions_per_user = 8
[model]
kind = "neumf"
hidden = [8]
dim = 8
block = 4
[devices]
population = 40
min_cohort = 5
SAMPLED
[train]
rounds = 1
[privacy]
noise = "distributed"
least_survivors = 0.4
clip_norm = 1.0
epsilon = 50.0
delta = 1e-3
"""
ANSWER = """
import sys
import msgpack
message, context, node, heavy = msgpack.unpackb(sys.stdin.buffer.read())
{app}
from flwr.common import serde
from flwr.proto.message_pb2 import Context, Message
from memory_grid import acting_as
context = serde.context_from_proto(Context.FromString(context))
with acting_as(node):
    reply = app(serde.message_from_proto(Message.FromString(message)), context)
parts = (serde.message_to_proto(reply), serde.context_to_proto(context))
loaded = [name for name in heavy if name in sys.modules]
sys.stdout.buffer.write(msgpack.packb([*(each.SerializeToString() for each in parts), loaded]))
"""


class Processes(Loopback):
    """One node answers every message in a process of its own, as Flower has it.

    ``app`` are the lines that make it there; ``loaded``, by stage, what it had imported then.
    Messages of other stages than these are answered here.
    """

    def __init__(self, apps: Any, app: str, stages: Collection[str]) -> None:
        super().__init__(apps)
        self.lines, self.stages = ANSWER.format(app=app), stages
        self.loaded: dict[str | None, list[str]] = {}

    def ask(self, message: Message) -> Message:
        if message.metadata.dst_node_id != NODE or stage_of(message) not in self.stages:
            return super().ask(message)
        parts = (serde.message_to_proto(message), serde.context_to_proto(self.contexts[NODE]))
        given = msgpack.packb([*(each.SerializeToString() for each in parts), NODE, HEAVY])
        lines = f"import sys; sys.path.append({str(SUPPORT)!r})\n{self.lines}"
        command = [sys.executable, "-c", lines]
        done = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True)
        reply, context, loaded = msgpack.unpackb(done.stdout)
        self.loaded[stage_of(message)] = loaded
        self.contexts[NODE] = serde.context_from_proto(type(parts[1]).FromString(context))
        answer = serde.message_from_proto(type(parts[0]).FromString(reply))
        assert not answer.has_error(), answer.error
        return answer


@pytest.mark.parametrize(
    ("sampled", "loads"),
    [
        ('sampling = "everybody"', {stage: [] for stage in CRYPTOGRAPHIC} | {MASKED: ["torch"]}),
        # Noise for sampled cohorts is searched for by dp-accounting, once, with the first message;
        # what comes after the second does not depend on sampling.
        ("sampling_rate = 0.9", {PREKEYS: ["scipy.stats"], SHARES: []}),
    ],
)
def test_only_the_message_that_trains_loads_what_computes_models(
    sampled: str, loads: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    (tmp_path / "scenario.toml").write_text(SCENARIO.replace("SAMPLED", sampled))
    made = "from pathlib import Path\nfrom privrec.flower.client_app import client_app\n"
    made += f"app = client_app(Path({str(tmp_path)!r}))"
    own = client_app(tmp_path)
    nodes = {
        NODE + part: (own, context_of(NODE + part, {"partition-id": part, "num-partitions": 2}, {}))
        for part in range(2)
    }
    grid = Processes(nodes, made, loads)
    scenario = load(tmp_path / "scenario.toml")
    assert deploy(scenario, grid, out=tmp_path / "run", items=60, wait_s=0.2).payload["rounds"] == 1
    assert grid.loaded == loads


MOD = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from privrec.flower.secure_sum import SecureSumMod

app = ClientApp(mods=[SecureSumMod(minimum=2, trust_server=True)])


@app.train()
def train(message, context):
    arrays = ArrayRecord([message.content["arrays"].to_numpy_ndarrays()[0] + np.float32(1)])
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
"""


def test_the_secure_sum_of_an_app_loads_neither(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(MOD)
    app = runpy.run_path(str(tmp_path / "app.py"))["app"]
    made = f'import runpy\napp = runpy.run_path({str(tmp_path / "app.py")!r})["app"]'
    nodes = {NODE + n: (app, context_of(NODE + n, {}, {})) for n in range(3)}
    grid = Processes(nodes, made, (PREKEYS, *EXCHANGES))
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    strategy = SecureSum(inner, clip_norm=4.0, max_examples=1)
    start = ArrayRecord([np.zeros(4, np.float32)])
    messages = strategy.configure_train(1, start, ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is not None
    # Three coefficients of equal weight, each rounded to a neighbouring step of 4 / 2^23: their
    # mean is off by a step at most, and a float32 by less than another.
    assert np.allclose(arrays.to_numpy_ndarrays()[0], 1, rtol=0, atol=2 * 4 / 2**23)
    assert grid.loaded == {stage: [] for stage in (PREKEYS, *EXCHANGES)}
