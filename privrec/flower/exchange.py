"""The exchanges of a secure sum in Flower's messages: how they are packed, and both their halves.

A node hosts one device or hundreds, and answers for all of them in one message, whose body is a
msgpack map with its ``stage``. The server's messages to devices and their answers are maps by
identity in it, so that what one device refuses leaves the others alone.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from privrec.errors import PrivrecError, ReleaseRefused
from privrec.randomness import ROOT_BYTES, SecretRoot
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import RECORD_BYTES, DeviceKey, Prekey, PrekeyBook
from privrec.secagg.roster import Anchor, check_prekey
from privrec.secagg.server import ServerSession

RECORD = "privrec"
"""Name of the record of a message, and of a context's state, that is this package's."""
PREKEYS = "prekeys"
EXCHANGES = SHARES, MASKED, CONFIRM, UNMASK = ("shares", "masked", "confirm", "unmask")
LOG = logging.getLogger("flwr.privrec")
NOT_IN = (
    "a message in the middle of a secure sum that this node is not in: it was started anew, or "
    "refused to take part; it can join the next round"
)
_BODY = "body"
_REFUSED = 6  # Flower's code for a mod whose conditions are not met
_OURS = "privrec: "
_POLL_S = 1.0
Body = dict[str, Any]


def pack(body: Mapping[str, Any]) -> RecordDict:
    """Return the content of a message; its one array is what Flower moves in pieces."""
    packed: bytes = msgpack.packb(dict(body))
    array = Array(dtype="uint8", shape=(len(packed),), stype=RECORD, data=packed)
    return RecordDict({RECORD: ArrayRecord({_BODY: array})})


def unpack(message: Message) -> Body:
    """Return the body that :func:`pack` put into a message.

    Raises:
        ReleaseRefused: when there is none.
    """
    try:
        body = msgpack.unpackb(message.content.array_records[RECORD][_BODY].data)
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ReleaseRefused(
            f"a message of type {message.metadata.message_type} without a body of privrec's "
            f"({type(error).__name__}); server and nodes must run the same version of the app, and "
            "in an app of your own SecureSumMod is the first of its mods"
        ) from None
    if type(body) is not dict:
        raise ReleaseRefused("a body that is no map; server and nodes must run the same version")
    return body


def asked(message: Message) -> tuple[str, Body]:
    """Return the stage and the body of a server's message.

    Raises:
        ReleaseRefused: when it has none, or asks for something that is no stage.
    """
    body = unpack(message)
    stage = body.get("stage")
    if stage not in (PREKEYS, *EXCHANGES):
        raise ReleaseRefused(f"a message of a secure sum in stage {stage!r}, which is none")
    return stage, body


def by_device(body: Mapping[str, Any], name: str) -> dict[bytes, bytes]:
    """Return a map of a body from identities to bytes; empty when it is not there.

    Raises:
        ReleaseRefused: when it is something else.
    """
    found = body.get(name, {})
    if type(found) is dict and all(type(each) is bytes for pair in found.items() for each in pair):
        return found
    raise ReleaseRefused(f"{name!r} that map no identities to bytes")


def reply(message: Message, body: Mapping[str, Any]) -> Message:
    """Answer a server's message."""
    return Message(pack(body), reply_to=message)


def refuse(message: Message, error: PrivrecError) -> Message:
    """Answer a server's message with an error, and say so in the node's own log."""
    LOG.warning("privrec: this node refuses: %s", error)
    return Message(Error(_REFUSED, f"{_OURS}{error}"), reply_to=message)


def refusals(refused: Mapping[bytes, str]) -> str:
    """Say in a line what devices refused: hundreds on a node would fill a log with one reason."""
    name, why = next(iter(refused.items()))
    others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"device {name.hex()[:16]}{others}: {why}"


# ---------------------------------------------------------------------- at a node


def kept_in(state: RecordDict) -> ConfigRecord:
    """Return the record of ``context.state`` that is this package's, with a root of this run.

    It never leaves the node, and is as secret as the root.
    """
    if RECORD not in state:
        state[RECORD] = ConfigRecord({"root": secrets.token_bytes(ROOT_BYTES)})
    return state[RECORD]


@dataclass(frozen=True)
class KeptDevice:
    """A device whose prekeys and session outlast the process that answers one message.

    Promise: what an answer depends on is in ``kept`` before the answer is given.

    Args:
        key: its identity.
        root: its secret, from which masks and prekeys are derived.
        anchor: whom it trusts about other devices.
        kept: has ``book`` and ``session`` between messages; as secret as the root.
        certificate: of the enrolment office over its identity; empty without one.
    """

    key: DeviceKey
    root: SecretRoot
    anchor: Anchor
    kept: MutableMapping[str, Any]
    certificate: bytes = b""

    def deposit(self, body: Mapping[str, Any], most: int, number: int = 0, tier: int = 0) -> Body:
        """Issue the prekeys that a server asks for, at most ``most``, as it takes them.

        Raises:
            ReleaseRefused: when it asks for none or for more.
        """
        count = body.get("count")
        if type(count) is not int or not 1 <= count <= most:
            raise ReleaseRefused(f"{count!r} prekeys asked for: 1 to {most} are given")
        records = b"".join(self._book().issue(count, tier))
        return {"name": self.key.public, "number": number, "tier": tier, "prekeys": records}

    def called(self, policy: Policy) -> ClientSession:
        """Return the session of a round that begins."""
        return ClientSession(self._book(), self.anchor, policy, self._keeper("session"))

    def resumed(self, policy: Policy) -> ClientSession:
        """Return the session of the round that this device is in.

        Raises:
            ReleaseRefused: when it is in none.
        """
        saved = self.kept.get("session")
        if saved is None:
            raise ReleaseRefused(NOT_IN)
        keep = self._keeper("session")
        return ClientSession.resume(self._book(), self.anchor, saved, policy, keep)

    def conclude(self, session: ClientSession, stage: str, message: bytes) -> bytes:
        """Answer an exchange after the masked vector; the session is forgotten with the last."""
        if stage == CONFIRM:
            return session.confirm(message)
        answer = session.unmask(message)
        self.kept.pop("session")
        return answer

    def _book(self) -> PrekeyBook:
        state, keep = self.kept.get("book"), self._keeper("book")
        return PrekeyBook(self.key, self.root, certificate=self.certificate, save=keep, state=state)

    def _keeper(self, name: str) -> Any:
        return lambda value: self.kept.__setitem__(name, value)


# ---------------------------------------------------------------------- at the server


@dataclass
class Member:
    """A device that deposited prekeys.

    Args:
        name: its identity.
        number: by which the server orders devices.
        tier: index of its tier.
        node: the Flower node that hosts it.
        prekeys: records that are left of its deposit.
    """

    name: bytes
    number: int
    tier: int
    node: int
    prekeys: list[bytes]


@dataclass
class Registry:
    """The devices of a grid's nodes: which node hosts each, its prekeys, and exchanges with them.

    A node that does not answer, refuses or sends something else is told of in the log, and its
    devices have dropped out. Nothing that a node sends ends the server.

    Args:
        grid: Flower's.
        anchor: whom the server takes for a device.
        deposit: prekeys that each device is asked for.
        timeout_s: how long an exchange may take; None for any time.
        wait_s: how long devices are waited for at the start.
        tiers: how many tiers devices may be of.
        agreed: what a node must say of itself for its devices to be taken.
        like: the app's own messages, by node, where there are some: whose type and limits messages
            have, and whose content goes along with the question for masked vectors.
    """

    grid: Grid
    anchor: Anchor
    deposit: int
    timeout_s: float | None = None
    wait_s: float = 0.0
    tiers: int = 1
    agreed: Mapping[str, Any] = field(default_factory=dict)
    like: Mapping[int, Message] = field(default_factory=dict)
    members: dict[bytes, Member] = field(default_factory=dict, init=False)
    simulated: bool = field(default=False, init=False)
    """Whether some node hosts users of a data set."""
    _heard: set[int] = field(default_factory=set, init=False)

    def register(self, population: int) -> None:
        """Wait for as many devices; those that come later are taken by :meth:`greet_newcomers`.

        Raises:
            ReleaseRefused: when no device has registered in time.
        """
        until = time.monotonic() + self.wait_s
        while len(self.members) < population and time.monotonic() < until:
            if not self.greet_newcomers():
                time.sleep(_POLL_S)
        if not self.members:
            raise ReleaseRefused(
                f"no device registered within {self.wait_s:g} s: start SuperNodes, and look into "
                "their logs for what they refused"
            )
        LOG.info("privrec: %d of %d devices registered", len(self.members), population)

    def ordered(self) -> list[Member]:
        """Return all devices, by number."""
        return sorted(self.members.values(), key=lambda member: (member.number, member.name))

    def greet_newcomers(self) -> bool:
        """Ask nodes that were never heard of for their devices; whether there were any."""
        fresh = set(self.grid.get_node_ids()) - self._heard
        self.greet(fresh)
        return bool(fresh)

    def greet(self, nodes: Iterable[int]) -> None:
        """Ask nodes for prekeys of their devices, and take those that are in order."""
        asking = self._messages(PREKEYS, {node: {"count": self.deposit} for node in nodes})
        # Answers to a greeting may take as long as devices are waited for.
        patience = None if self.timeout_s is None else max(self.timeout_s, self.wait_s)
        for node, body in self._bodies(self._sent(asking, patience)):
            try:
                self._take_deposits(node, body)
            except ReleaseRefused as error:
                LOG.error("privrec: node %d is left out: %s", node, error)

    def exchange(self, stage: str, session: ServerSession, **more: Any) -> set[bytes]:
        """Make one exchange with all devices that a session waits for; whose answers were good.

        Args:
            stage: one of :data:`EXCHANGES`, the one that the session is in.
            session: of the round; it is not advanced.
            **more: what all nodes are told besides.
        """
        return self.take(session, self._sent(self.asking(stage, session, **more), self.timeout_s))

    def asking(self, stage: str, session: ServerSession, **more: Any) -> list[Message]:
        """Return the messages of an exchange, one for each node; see :meth:`exchange`."""
        bodies: dict[int, Body] = {}
        for name, message in session.outbox().items():
            body = bodies.setdefault(self.members[name].node, {"messages": {}, **more})
            body["messages"][name] = message
        return self._messages(stage, bodies)

    def take(self, session: ServerSession, replies: Iterable[Message]) -> set[bytes]:
        """Hand a session what nodes replied; whose answers were good."""
        good = set()
        for node, body in self._bodies(replies):
            if refused := body.get("refused"):
                LOG.warning("privrec: node %d: %s", node, refused)
            for name, answer in body["answers"].items():
                member = self.members.get(name)
                if member is None or member.node != node:
                    continue  # a node speaks for its own devices only
                try:
                    session.receive(name, answer)
                    good.add(name)
                except ReleaseRefused as error:
                    LOG.warning("privrec: device %s: %s", name.hex()[:16], error)
        return good

    def _sent(self, messages: list[Message], timeout_s: float | None) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=timeout_s) if messages else ()

    def _messages(self, stage: str, bodies: Mapping[int, Body]) -> list[Message]:
        made = []
        for node, body in bodies.items():
            content, own = pack({"stage": stage, **body}), self.like.get(node)
            if own is None:
                made.append(Message(content, dst_node_id=node, message_type="train"))
                continue
            if stage == MASKED:
                content = RecordDict({**own.content, **content})
            told = own.metadata
            made.append(
                Message(content, node, told.message_type, ttl=told.ttl, group_id=told.group_id)
            )
        return made

    def _bodies(self, replies: Iterable[Message]) -> Iterator[tuple[int, Body]]:
        for reply in replies:
            node = reply.metadata.src_node_id
            self._heard.add(node)
            if reply.has_error():
                LOG.warning("privrec: node %d: %s", node, reply.error.reason.removeprefix(_OURS))
                continue
            try:
                body = unpack(reply)
                body["answers"] = by_device(body, "answers")
            except ReleaseRefused as error:
                LOG.warning("privrec: node %d: %s", node, error)
                continue
            yield node, body

    def _take_deposits(self, node: int, body: Body) -> None:
        stated = {name: body.get(name) for name in self.agreed}
        if stated != dict(self.agreed):
            raise ReleaseRefused(
                f"it has another scenario or another catalogue, {_listed(stated)} where the server "
                f"has {_listed(self.agreed)}; run the same app and run-config everywhere"
            )
        self.simulated = self.simulated or bool(body.get("simulated"))
        refused = {}
        for member in _members(node, body, self.deposit):
            try:
                self._check(member)
            except ReleaseRefused as error:
                refused[member.name] = str(error)
                continue
            before = self.members.get(member.name, member)
            if before.node != node:
                LOG.warning("privrec: device %s has moved to node %d", member.name.hex()[:16], node)
            self.members[member.name] = member
        if refused:
            LOG.error("privrec: node %d: left out: %s", node, refusals(refused))

    def _check(self, member: Member) -> None:
        if not 0 <= member.tier < self.tiers:
            raise ReleaseRefused(f"tier {member.tier}, of {self.tiers}")
        for record in member.prekeys:
            prekey = Prekey.unpack(record)
            if (prekey.identity, prekey.tier) != (member.name, member.tier):
                name = member.name.hex()[:16]
                raise ReleaseRefused(f"device {name}: a prekey of another one or tier")
            check_prekey(prekey, self.anchor)


def _members(node: int, body: Body, most: int) -> list[Member]:
    """The devices that a node says it hosts; none of their prekeys was looked at yet."""
    found = []
    try:
        for told in body["devices"]:
            name, number, tier = told["name"], told["number"], told["tier"]
            records = told["prekeys"]
            if not (type(name) is type(records) is bytes and type(number) is type(tier) is int):
                raise TypeError("of other types")
            starts = range(0, len(records), RECORD_BYTES)[:most]
            prekeys = [records[start : start + RECORD_BYTES] for start in starts]
            found.append(Member(name, number, tier, node, prekeys))
    except (KeyError, TypeError) as error:
        raise ReleaseRefused(f"devices that are none ({error!r})") from None
    return found


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
