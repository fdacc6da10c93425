"""The grid in memory, for nodes with configurations of their own, as the recommender's app has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from memory_grid import MemoryGrid, be_the_server


def context_of(node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Context:
    return Context(7, node, dict(node_config), RecordDict(), dict(run_config))


class Loopback(MemoryGrid):
    """Nodes by id, each with its app and context; ``lost`` looks at node and message type."""

    def __init__(
        self,
        apps: Mapping[int, tuple[ClientApp, Context]],
        lost: Callable[[int, str], bool] = lambda node, kind: False,
    ) -> None:
        be_the_server()
        super().__init__(
            {node: app for node, (app, _) in apps.items()},
            {node: context.node_config for node, (_, context) in apps.items()},
            lambda message: lost(message.metadata.dst_node_id, message.metadata.message_type),
        )
        self.contexts = {node: context for node, (_, context) in apps.items()}
        self.seen: list[tuple[int, str, Message, Message]] = []

    def put(self, node: int, app: ClientApp, context: Context) -> None:
        """Another node in the place of one."""
        self.app = {**dict(self.app), node: app}  # type: ignore[arg-type]
        self.contexts[node] = context

    def ask(self, message: Message) -> Message:
        reply = super().ask(message)
        kind = message.metadata.message_type
        self.seen.append((message.metadata.dst_node_id, kind, message, reply))
        return reply
