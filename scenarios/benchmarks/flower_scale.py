"""CPU and bytes of a secure sum in Flower by its number of nodes, and how fast each grows.

    python scenarios/benchmarks/flower_scale.py [--quick] [--json FILE] [--nodes N ...]

It needs the extra `privrec[flower]`. It makes a round of `privrec.flower.secure_sum` around
Flower's FedAvg, from the first question for prekeys to the new model, over ClientApps with
`SecureSumMod` in this process. Every message and reply goes through Flower's own records and
serialisation, and is answered by a new ClientApp that has what Flower and the node's folder keep
and nothing else, as in a deployment. What a process and a network cost is left out
(`docs/flower.md` has it), and so is training: nodes return a vector that is known. A tenth of the
nodes falls silent once it has dealt its shares, so that their masks are recovered. The mean is
compared with the plain one.

* The server's figure is the CPU time (user and system) of everything that is not a node's: Flower's
  strategy, its records, serialisation, the roster, the sum and the recovery of masks. Each exchange
  has what its messages and their answers cost; `unmask` has the recovery too.
* A node's figure is the mean over a few nodes that share nothing: each verifies the roster and the
  confirmations by itself, against the list of enrolled nodes in its own folder. The others run on a
  common memory of verified signatures, to save time.
* `prekeys` is the exchange that comes every 32nd round.
* The growth exponent of a figure is `log(y2 / y1) / log(n2 / n1)` between two rows: 1 for what is
  proportional to the nodes. Beyond 200 nodes the graph is sparse, and a node has about 100
  neighbours; what a node still has to do for all others is to verify two signatures of each.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _common import Claim, document, machine, print_table, write_json
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import serde
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from privrec.flower import mod as mod_module
from privrec.flower.enrolment import anchor_of, enroll
from privrec.flower.exchange import EXCHANGES, PREKEYS, unpack
from privrec.flower.secure_sum import SecureSum, SecureSumMod
from privrec.secagg.keys import Verifier

STAGES = (PREKEYS, *EXCHANGES)
RUN, SERVER = 7, 1
ALONE = 5
"""Nodes that share nothing with others; the mean over them is the figure."""
NODES = (60, 200, 400, 1000, 2000)
QUICK, QUICK_SIZE, SIZE = (20, 30), 1_000, 10_000
CLAIMED = 1000
PACKAGES = ("privrec", "numpy", "cryptography", "flwr")


class Meter:
    """CPU seconds since the last lap, added to whoever a lap is said to be of."""

    def __init__(self) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()
        self._last = time.process_time()

    def lap(self, who: str, stage: str) -> None:
        now = time.process_time()
        self.seconds[who, stage] += now - self._last
        self._last = now

    def of(self, who: str) -> dict[str, float]:
        """By exchange."""
        return {stage: self.seconds[who, stage] for stage in STAGES}


def app() -> ClientApp:
    """An app whose node moves every coefficient by its own step."""
    made = ClientApp(mods=[SecureSumMod(minimum=2)])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        (old,) = message.content["arrays"].to_numpy_ndarrays()
        arrays = ArrayRecord([old + np.float32(step_of(context.node_id))])
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return made


def step_of(node: int) -> float:
    """What a node adds to every coefficient; exact in all sums."""
    return (node % 8) / 1024


@dataclass
class MeteredGrid(Grid):
    """Nodes in this process, reached by bytes; those in ``gone`` answer nothing after shares."""

    configs: Mapping[int, Mapping[str, Any]]
    alone: frozenset[int]
    gone: frozenset[int]
    meter: Meter
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.states = {
            node: serde.context_to_proto(Context(RUN, node, dict(config), RecordDict(), {}))
            for node, config in self.configs.items()
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.configs)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for message in messages:
            stage = str(unpack(message)["stage"])
            node = message.metadata.dst_node_id
            if node in self.gone and stage not in (PREKEYS, EXCHANGES[0]):
                continue
            sent = serde.message_to_proto(message)
            self.meter.lap("server", stage)
            reply = self._answer(node, sent)
            self.down[stage] += sent.ByteSize()
            self.up[stage] += reply.ByteSize()
            self.asked[stage] += 1
            self.meter.lap("node" if node in self.alone else "others", stage)
            yield serde.message_from_proto(reply)
            self.meter.lap("server", stage)

    def _answer(self, node: int, sent: Any) -> Any:
        before, TaskIdentity.node_id = TaskIdentity._node_id, node
        try:
            context = serde.context_from_proto(self.states[node])
            reply = serde.message_to_proto(app()(serde.message_from_proto(sent), context))
            self.states[node] = serde.context_to_proto(context)
        finally:
            TaskIdentity._node_id = before
        return reply

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def round_of(nodes: int, size: int, folder: Path) -> dict[str, Any]:
    """One round, measured.

    Raises:
        SystemExit: the mean is not the plain one, so that its cost says nothing.
    """
    note(f"{nodes} nodes x {size}")
    roster = folder / "roster.txt"
    numbers = range(1, nodes + 1)
    configs = {n: {"keys": f"{folder / str(n)}", "roster": f"{roster}"} for n in numbers}
    for node in numbers:
        enroll(folder / str(node), roster=roster)
    dropped = frozenset(range(1, nodes // 10 + 1))
    alone = frozenset(range(nodes // 2, nodes // 2 + ALONE))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SERVER
    common = Verifier()

    def anchored(config: Mapping[str, Any]) -> Any:
        anchor = anchor_of(config)
        if anchor is not None and Path(str(config["keys"])).name not in map(str, alone):
            anchor.verifier = common
        return anchor

    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy = SecureSum(inner, clip_norm=10.0, max_examples=1, roster=roster)
    start = ArrayRecord([np.zeros(size, np.float32)])
    plain, mod_module.anchor_of = mod_module.anchor_of, anchored
    try:
        meter = Meter()
        grid = MeteredGrid(configs, alone, dropped, meter)
        messages = strategy.configure_train(1, start, ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
        meter.lap("server", EXCHANGES[-1])
    finally:
        mod_module.anchor_of = plain
    mean = np.mean([step_of(node) for node in numbers if node not in dropped])
    if arrays is None or not np.allclose(arrays.to_numpy_ndarrays()[0], mean, atol=1e-6):
        raise SystemExit("error: the mean of the secure sum is not the plain one")
    server = meter.of("server")
    node = {stage: seconds / len(alone) for stage, seconds in meter.of("node").items()}
    return {
        "name": f"{nodes} nodes",
        "nodes": nodes,
        "size": size,
        "server_s": sum(server.values()),
        "node_s": sum(node.values()),
        "server_by_exchange_s": server,
        "node_by_exchange_s": node,
        "down_by_exchange": {s: grid.down[s] / grid.asked[s] for s in STAGES},
        "up_by_exchange": {s: grid.up[s] / grid.asked[s] for s in STAGES},
    }


FIGURES = ("server_s", "node_s")


def with_growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the exponents by which their figures grow from the row before."""
    grown = []
    for before, row in zip((None, *rows), rows, strict=False):
        own = {
            f"{name}_exponent": None if before is None else exponent(before, row, name)
            for name in FIGURES
        }
        grown.append({**row, **own})
    return grown


def exponent(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float:
    """Of a figure between two rows."""
    return math.log(after[name] / before[name]) / math.log(after["nodes"] / before["nodes"])


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What is promised for a thousand nodes."""
    row = next((each for each in rows if each["nodes"] == CLAIMED), None)
    of = f"CPU-s for {CLAIMED:,} nodes x {SIZE:,} coefficients, a tenth dropped out"
    return [
        Claim("server_cpu_s", row and row["server_s"], 20, f"{of}, the server", "at most"),
        Claim("node_cpu_s", row and row["node_s"], 0.5, f"{of}, each node", "at most"),
    ]


def tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the totals with their growth, then what each exchange costs."""
    print_table(
        "A secure sum in Flower: CPU seconds, and their growth exponents from the row before",
        (
            ("name", "what"),
            ("server_s", "server, s"),
            ("server_s_exponent", "exponent"),
            ("node_s", "a node, s"),
            ("node_s_exponent", "exponent"),
        ),
        rows,
    )
    shown = []
    for row in rows:
        for stage in STAGES:
            by = {
                "server_s": row["server_by_exchange_s"][stage],
                "node_ms": 1e3 * row["node_by_exchange_s"][stage],
                "down_kb": row["down_by_exchange"][stage] / 1e3,
                "up_kb": row["up_by_exchange"][stage] / 1e3,
            }
            shown.append({"name": row["name"], "exchange": stage, **by})
    print_table(
        "By exchange",
        (
            ("name", "what"),
            ("exchange", "exchange"),
            ("server_s", "server, s"),
            ("node_ms", "a node, ms"),
            ("down_kb", "to a node, kB"),
            ("up_kb", "from a node, kB"),
        ),
        shown,
    )


def note(text: str) -> None:
    """A line on standard error, so that standard output is the tables alone."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write the JSON file where one is named."""
    options = parser().parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    size = QUICK_SIZE if options.quick else SIZE
    about, measured = machine(*PACKAGES), []
    for nodes in options.nodes or (QUICK if options.quick else NODES):
        with tempfile.TemporaryDirectory() as folder:
            measured.append(round_of(nodes, size, Path(folder)))
    rows, checked = with_growth(measured), claims_of(measured)
    tables(rows)
    for claim in checked:
        print(claim)
    if options.json:
        write_json(options.json, document(rows, checked, about))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="CPU and bytes of a secure sum in Flower by its number of nodes.",
        epilog="example: flower_scale.py --json flower_scale.json (about ten minutes)",
    )
    made.add_argument("--quick", action="store_true", help="20 and 30 nodes x 1,000 only")
    made.add_argument("--json", type=Path, metavar="FILE", help="write rows, claims and machine")
    made.add_argument("--nodes", type=int, nargs="+", metavar="N", help="these numbers of nodes")
    return made


if __name__ == "__main__":
    main()
