"""A Flower grid in one process: it calls real ClientApps, and carries what they say as bytes.

Messages, replies and contexts go through Flower's own serialisation, as they do between processes,
so that nothing is shared by accident and only what Flower keeps of a context is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import serde
from flwr.serverapp import Grid

from privrec.flower.exchange import RECORD, unpack

try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # Flower before 1.41, where anybody may make a message

    class TaskIdentity:  # type: ignore[no-redef]
        """Nothing to be set."""

        task_id = run_id = node_id = _node_id = None


RUN = 7
RAISED, UNAVAILABLE = 2, 5  # Flower's codes for an app that raised, and a node that is gone
SUPERLINK = 1  # its node id in replies that it makes itself


def stage_of(message: Message) -> str | None:
    """What a message of the secure sum asks for; None for any other message."""
    return str(unpack(message)["stage"]) if RECORD in message.content else None


def never(message: Message) -> bool:
    """Nobody drops out."""
    return False


@dataclass
class MemoryGrid(Grid):
    """Nodes that answer at once, or not at all.

    Args:
        app: the ClientApp of all nodes.
        configs: node id to its node-config.
        lost: which messages are never answered.
        offline: which messages the SuperLink answers, since their node does not.
        tampered: changes a message on its way, as a server that is not honest would.
    """

    app: ClientApp | Mapping[int, ClientApp]
    configs: Mapping[int, Mapping[str, Any]]
    lost: Callable[[Message], bool] = never
    offline: Callable[[Message], bool] = never
    tampered: Callable[[Message], Message] = lambda message: message
    sent: list[Message] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contexts = {
            node: context_of(node, config, {}) for node, config in self.configs.items()
        }

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.configs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(self._answers(messages))

    def _answers(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in list(messages):
            message.metadata.__dict__["_message_id"] = message.object_id  # as Flower's grids do
            self.sent.append(message)
            if self.lost(message):
                continue
            if self.offline(message):
                reply = unavailable(message)
            else:
                reply = self.ask(self.tampered(message))
            self.replies.append(reply)
            yield reply

    def ask(self, message: Message) -> Message:
        """One node's answer; its context is kept unless its app raised."""
        node = message.metadata.dst_node_id
        context = serde.context_from_proto(serde.context_to_proto(self.contexts[node]))
        copy = carried(message)
        app = self.app[node] if isinstance(self.app, Mapping) else self.app
        try:
            with acting_as(node):
                reply = app(copy, context)
        except Exception as error:
            return Message(Error(RAISED, f"{type(error)}:<'{error}'>"), reply_to=message)
        self.contexts[node] = context
        return carried(reply)


def unavailable(message: Message) -> Message:
    """What the SuperLink answers, as itself, for a node that it has not heard of for long."""
    reply = Message(Error(UNAVAILABLE, "Error: Node Unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK
    return reply


def carried(message: Message) -> Message:
    """A message as it arrives: everything that is not content or metadata is gone."""
    return serde.message_from_proto(serde.message_to_proto(message))


@contextmanager
def acting_as(node: int) -> Iterator[None]:
    """Messages that are made meanwhile come from this node."""
    before = TaskIdentity._node_id
    TaskIdentity.node_id = node
    try:
        yield
    finally:
        TaskIdentity._node_id = before


def be_the_server() -> None:
    """Let this process make messages, as Flower does where it starts a ServerApp."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1


def context_of(node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Context:
    """What Flower hands the app of a node."""
    return Context(RUN, node, dict(node_config), RecordDict(), dict(run_config))


class Loopback(MemoryGrid):
    """Nodes by id, each with its app and context; ``lost`` looks at node and stage."""

    def __init__(
        self,
        apps: Mapping[int, tuple[ClientApp, Context]],
        lost: Callable[[int, str | None], bool] = lambda node, stage: False,
    ) -> None:
        be_the_server()
        super().__init__(
            {node: app for node, (app, _) in apps.items()},
            {node: context.node_config for node, (_, context) in apps.items()},
            lambda message: lost(message.metadata.dst_node_id, stage_of(message)),
        )
        self.contexts = {node: context for node, (_, context) in apps.items()}
        self.seen: list[tuple[int, str | None, Message, Message]] = []

    def put(self, node: int, app: ClientApp, context: Context) -> None:
        """Another node in the place of one."""
        self.app = {**dict(self.app), node: app}  # type: ignore[arg-type]
        self.contexts[node] = context

    def ask(self, message: Message) -> Message:
        reply = super().ask(message)
        self.seen.append((message.metadata.dst_node_id, stage_of(message), message, reply))
        return reply
