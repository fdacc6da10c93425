"""A grid in this process: Flower's own messages and apps, without its network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


def context_of(node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Context:
    return Context(7, node, dict(node_config), RecordDict(), dict(run_config))


class Loopback(Grid):
    """Nodes that answer at once, in order; ``lost`` says which messages never arrive."""

    def __init__(
        self,
        apps: Mapping[int, tuple[ClientApp, Context]],
        lost: Callable[[int, str], bool] = lambda node, kind: False,
    ) -> None:
        # A message needs to know of whose task it is, which Flower sets in its own processes.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.apps, self.lost = dict(apps), lost
        self.seen: list[tuple[int, str, Message, Message]] = []

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            if self.lost(node, kind):
                continue
            app, context = self.apps[node]
            reply = app(message, context)
            self.seen.append((node, kind, message, reply))
            replies.append(reply)
        return replies
