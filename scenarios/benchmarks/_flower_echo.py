"""The Flower side of `simulation.py`: an app that computes nothing, in Flower's Ray simulation.

The ServerApp sends an array record to every SuperNode through the Message API and Flower's FedAvg
strategy; the ClientApp returns the message's own content, untouched and never deserialised.
What is measured is therefore what the framework costs, the same for every app of this vector size.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import CpuMark, cpu_of_tree

ACTORS = 2
"""Ray actors of one CPU each, whatever the machine has: figures are CPU time, not wall time."""

INLINE_MESSAGES = {
    "max_direct_call_object_size": 2**24,
    "task_rpc_inlined_bytes_limit": 2**28,
}
"""Ray's private, undocumented limits, raised so that messages bypass its object store."""


@dataclass(frozen=True)
class EchoSpec:
    """One simulation.

    Args:
        values: Length of the float32 vector that goes down and comes back.
        supernodes: Virtual SuperNodes; each takes part in every round.
        rounds: Rounds in all; CPU is taken between the end of round ``warm`` and of the last.
        warm: Rounds before the first mark, at least 1.
        average: Whether the server averages the replies (FedAvg) or keeps the first as it is.
        inline: Whether to set `INLINE_MESSAGES`.
    """

    values: int
    supernodes: int
    rounds: int
    warm: int
    average: bool = True
    inline: bool = False


@dataclass
class Marks:
    """The clock and the CPU of the process tree at the ends of two rounds, and at no other.

    Reading the meter looks at every process of the system, which is not for free.

    Args:
        first: Round, counted from 1, after whose end the measured part begins.
        last: Round with whose end it stops.
    """

    first: int
    last: int
    taken: dict[int, tuple[float, CpuMark]] = field(default_factory=dict)

    def end_of(self, number: int) -> None:
        """To be told of the end of each round."""
        if number in (self.first, self.last):
            self.taken[number] = time.monotonic(), cpu_of_tree()

    @property
    def spent(self) -> tuple[float, CpuMark]:
        """Wall seconds and CPU between the two."""
        (began, before), (ended, after) = self.taken[self.first], self.taken[self.last]
        return ended - began, after.since(before)


def available() -> bool:
    """Whether ``flwr[simulation]`` is installed here."""
    return find_spec("flwr") is not None and find_spec("ray") is not None


def measure(spec: EchoSpec) -> tuple[float, CpuMark, int]:
    """Wall seconds, CPU of the process tree, and device-rounds, of the steady part of one run.

    To be called in a process of its own: Flower and Ray are imported, started and left behind, and
    the standard streams of the process go to a file, whose end is quoted in an error.

    Raises:
        RuntimeError: A client failed, or a round did not get every reply.
    """
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    marks = Marks(spec.warm, spec.rounds)
    with _scratch() as folder, _streams_to(folder / "log.txt") as log:
        try:
            _simulate(spec, marks, folder)
        except Exception as error:
            tail = log.read_text("utf-8", errors="replace")[-1000:]
            raise RuntimeError(f"Flower's simulation failed: {error!s:.500}\n{tail}") from None
    wall, cpu = marks.spent
    return wall, cpu, spec.supernodes * (spec.rounds - spec.warm)


def _simulate(spec: EchoSpec, marks: Marks, folder: Path) -> None:
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    ray: dict[str, Any] = {"num_cpus": ACTORS, "include_dashboard": False, "_temp_dir": str(folder)}
    if spec.inline:
        ray["_system_config"] = INLINE_MESSAGES
    run_simulation(
        server_app=_server(spec, marks),
        client_app=_client(),
        num_supernodes=spec.supernodes,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": ray},
    )


def _client() -> Any:
    """A ClientApp that returns what it was sent.

    It is built inside a function so that it travels to the Ray actors by value; they could not
    import this file.
    """
    from flwr.app import Message, MetricRecord
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        content = message.content
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(content=content, reply_to=message)

    return app


def _server(spec: EchoSpec, marks: Marks) -> Any:
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        initial = ArrayRecord({"memory": Array(np.zeros(spec.values, dtype=np.float32))})
        _strategy(spec, marks).start(grid=grid, initial_arrays=initial, num_rounds=spec.rounds)

    return app


def _strategy(spec: EchoSpec, marks: Marks) -> Any:
    from flwr.app import MetricRecord
    from flwr.serverapp.strategy import FedAvg

    class Marked(FedAvg):  # type: ignore[misc]
        """FedAvg that checks that everybody answered and tells the meter of each round's end."""

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            answers = list(replies)
            failed = [answer.error for answer in answers if answer.has_error()]
            if failed or len(answers) != spec.supernodes:
                raise RuntimeError(f"round {server_round}: {len(answers)} replies, {failed[:1]}")
            if spec.average:
                released = super().aggregate_train(server_round, answers)
            else:
                released = answers[0].content[self.arrayrecord_key], MetricRecord({})
            marks.end_of(server_round)
            return released

    return Marked(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=spec.supernodes,
        min_available_nodes=spec.supernodes,
    )


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    # Ray puts sockets there, and the path of a socket may not exceed 107 bytes: a short prefix.
    with tempfile.TemporaryDirectory(prefix="echo", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _streams_to(path: Path) -> Iterator[Path]:
    """Standard output and error of this process and its children go to a file meanwhile."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield path
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
