"""The exchanges of a secure sum in Flower's messages: their form, and both their halves.

A node hosts one device or hundreds, and answers for all of them in one message, whose body is a
msgpack map with its ``stage``. The server's messages to devices and their answers are maps by
identity in it, so that what one device refuses leaves the others alone.
"""

from __future__ import annotations

import fcntl
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from privrec.errors import (
    IntegrityError,
    PrivrecError,
    ReleaseRefused,
    UnknownIdError,
    UsageError,
)
from privrec.flower.enrolment import ROOT, STATE, text_of
from privrec.randomness import ROOT_BYTES, SecretRoot
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import RECORD_BYTES, DeviceKey, Prekey, PrekeyBook
from privrec.secagg.roster import Anchor, check_prekey
from privrec.secagg.server import ServerSession
from privrec.storage import replace

RECORD = "privrec"
"""Name of this package's record in a message, and in what Flower keeps for a node."""
PREKEYS, MESSAGES = "prekeys", "messages"
EXCHANGES = SHARES, MASKED, CONFIRM, UNMASK = ("shares", "masked", "confirm", "unmask")
LOG = logging.getLogger("flwr.privrec")
NOT_IN = (
    "a message in the middle of a secure sum that this node is not in, or has answered: it was "
    "started anew, or refused to take part; it can join the next round"
)
_MOST_PREKEYS = 1 << 14
_RAISED, _REFUSED = 2, 6  # Flower's codes for an app that raised, and a mod's unmet conditions
_OURS = "privrec: "
_MEMBER = [bytes, int, int, bytes]
Body = dict[str, Any]


def pack(body: Mapping[str, Any]) -> RecordDict:
    """Return a body as the content of a message: one array, which Flower moves in pieces.

    Of ``messages`` that are the same for several devices, as a roster is for all, one travels.
    """
    body = dict(body)
    if type(messages := body.get(MESSAGES)) is dict:
        places = {message: place for place, message in enumerate(dict.fromkeys(messages.values()))}
        body[MESSAGES] = [list(places), {name: places[each] for name, each in messages.items()}]
    packed: bytes = msgpack.packb(body)
    array = Array(dtype="uint8", shape=(len(packed),), stype=RECORD, data=packed)
    return RecordDict({RECORD: ArrayRecord({"body": array})})


def unpack(message: Message) -> Body:
    """Return the body that :func:`pack` put into a message; refuse one that has none."""
    try:
        body = msgpack.unpackb(message.content.array_records[RECORD]["body"].data)
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise ReleaseRefused(
            f"a message of type {message.metadata.message_type} without a body of privrec's "
            f"({type(error).__name__}); server and nodes must run the same version of the app, and "
            "in an app of your own SecureSumMod is the first of its mods"
        ) from None
    if type(body) is not dict:
        raise ReleaseRefused("a body that is no map; server and nodes must run the same version")
    if MESSAGES in body:  # what is none stays, for by_device() to refuse
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
            different, places = body[MESSAGES]
            body[MESSAGES] = {name: different[place] for name, place in places.items()}
    return body


def by_device(body: Mapping[str, Any], name: str) -> dict[bytes, bytes]:
    """Return a map of a body from identities to bytes, by default empty; refuse anything else."""
    found = body.get(name, {})
    if type(found) is dict and all(type(each) is bytes for pair in found.items() for each in pair):
        return found
    raise ReleaseRefused(f"{name!r} that map no identities to bytes")


def summary(refused: Mapping[bytes, str]) -> str:
    """Say in a line what devices refused: hundreds on a node would fill a log with one reason."""
    name, why = next(iter(refused.items()))
    others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"device {name.hex()[:16]}{others}: {why}"


# ---------------------------------------------------------------------- at a node


def asked(message: Message) -> tuple[str, Body]:
    """Return the stage and the body of a server's message, or refuse it."""
    body = unpack(message)
    stage = body.get("stage")
    if stage not in (PREKEYS, *EXCHANGES):
        raise ReleaseRefused(f"a message of a secure sum in stage {stage!r}, which is none")
    return stage, body


def refuse(message: Message, error: Exception) -> Message:
    """Answer a server's message with an error, which the node's own log has in full."""
    unforeseen = None if isinstance(error, PrivrecError) else error
    LOG.error("privrec: this node refuses: %s", error, exc_info=unforeseen)
    return Message(Error(_REFUSED, f"{_OURS}{told(error)}"), reply_to=message)


def told(error: Exception) -> str:
    """Return what a server may read of a node's error: of any that may quote data, its kind.

    Only errors about settings, secrets and the protocol have texts without histories, ids and
    other people's exceptions.
    """
    harmless = isinstance(error, ReleaseRefused | UsageError | IntegrityError)
    if harmless and not isinstance(error, UnknownIdError):
        return str(error)
    return f"{type(error).__name__}, whose text may quote data and stays in this node's log"


CALL = "call"
"""Under which a node keeps the call of a round, which is long and the same for all its devices."""


@dataclass(frozen=True)
class NodeKeys:
    """A node's secrets, and what it remembers from one message to the next; see :func:`keys_of`.

    Identities, masks and noise of its devices derive from ``root``. ``kept`` is what each device
    remembers, by its number, and the :data:`CALL` of the last round; it is as secret.
    """

    root: SecretRoot
    kept: dict[Any, Any]


@contextmanager
def keys_of(context: Context) -> Iterator[NodeKeys]:
    """Read a node's keys, and keep what changed in them, durable, when the block is left.

    Promise: between reading and keeping no other message of this node is worked on, where
    node-config names a folder with ``keys``. Flower's own state of a run, which is used without
    one, may be set back by a crash or by two messages at once; an answer given twice could give an
    update away.

    Raises:
        UsageError: when the folder has no root, or a root and nothing that its devices remember.
        IntegrityError: when the root is not what was written.
    """
    name = text_of(context.node_config, "keys")
    if name is None:
        new = ConfigRecord({"root": secrets.token_bytes(ROOT_BYTES)})
        record = context.state.setdefault(RECORD, new)
        keys = NodeKeys(SecretRoot(record["root"]), _read(record.get("state", b"")))
        try:
            yield keys
        finally:
            record["state"] = _packed(keys.kept)
        return
    path, root = Path(name) / STATE, SecretRoot.load(Path(name) / ROOT)
    with (Path(name) / ROOT).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # Prekeys would be issued, and rounds answered, a second time.
            raise UsageError(
                f"{path}: what this node's devices remember is gone, and its root is not; remove "
                "the folder, and enrol the node anew: privrec flower enroll"
            )
        keys = NodeKeys(root, _read(path.read_bytes()))
        try:
            yield keys
        finally:
            replace(path, _packed(keys.kept), mode=0o600)


def _packed(kept: dict[Any, Any]) -> bytes:
    """What a node keeps, without a call that no device of it is in any more."""
    if not any("session" in each for each in kept.values() if type(each) is dict):
        kept.pop(CALL, None)
    packed: bytes = msgpack.packb(kept)
    return packed


def _read(state: bytes) -> dict[Any, Any]:
    kept: dict[Any, Any] = msgpack.unpackb(state, strict_map_key=False) if state else {}
    return kept


class HostedDevice:
    """A device of a node, whose prekeys and session outlast the process that answers a message.

    Servers order devices by ``number``, which names the device's draws too. ``kept`` is what it
    remembers: the office's ``certificate`` if it has one, ``book`` and ``session``, and what is
    put there besides.
    """

    def __init__(self, keys: NodeKeys, number: int, anchor: Anchor) -> None:
        self.number, self.anchor = number, anchor
        self.key = DeviceKey.derive(keys.root, "user", number)
        self.kept: dict[str, Any] = keys.kept.setdefault(number, {})
        self.certificate: bytes = self.kept.get("certificate", b"")
        self._root, self._node = keys.root, keys.kept

    def deposit(self, body: Mapping[str, Any], tier: int = 0) -> Body:
        """Return the prekeys that a server asks for, in the form in which it takes them."""
        count = body.get("count")
        if type(count) is not int or not 1 <= count <= _MOST_PREKEYS:
            raise ReleaseRefused(f"{count!r} prekeys asked for: 1 to {_MOST_PREKEYS} are given")
        records = b"".join(self._book().issue(count, tier))
        return {"name": self.key.public, "number": self.number, "tier": tier, "prekeys": records}

    def shares(self, policy: Policy, message: bytes, noise: Sequence[bytes]) -> bytes:
        """Answer the call of a round that begins; see :meth:`ClientSession.shares`."""
        session = ClientSession(self._book(), self.anchor, policy, self._keep)
        answer = session.shares(message, noise)
        self._node[CALL] = message
        return answer

    def resumed(self, policy: Policy) -> ClientSession:
        """Return the session of the round that this device is in; refuse when it is in none."""
        if (saved := self.kept.get("session")) is None:
            raise ReleaseRefused(NOT_IN)
        call = self._node.get(CALL, b"")
        return ClientSession(self._book(), self.anchor, policy, self._keep, saved, call)

    def conclude(self, policy: Policy, stage: str, message: bytes) -> bytes:
        """Answer an exchange after the masked vector; with the last the session is forgotten."""
        session = self.resumed(policy)
        if stage == CONFIRM:
            return session.confirm(message)
        answer = session.unmask(message)
        del self.kept["session"]
        return answer

    def _book(self) -> PrekeyBook:
        return PrekeyBook(
            self.key,
            self._root,
            certificate=self.certificate,
            save=lambda state: self.kept.update(book=state),
            state=self.kept.get("book"),
        )

    def _keep(self, progress: bytes) -> None:
        self.kept["session"] = progress


# ---------------------------------------------------------------------- at the server


@dataclass(frozen=True)
class Member:
    """A device at a node, and the prekeys that are left of its deposit."""

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

    Attributes:
        anchor: whom the server takes for a device.
        deposit: prekeys that each device is asked for.
        timeout_s: how long an exchange may take; None for any time.
        wait_s: how long devices are waited for at the start.
        agreed: what a node must say of itself for its devices to be taken.
        like: the app's own messages, by node, where there are some: whose type and limits messages
            have, and whose content goes along with the question for masked vectors.
        simulated: whether some node hosts users of a data set.
        refused: why nodes, or the SuperLink for them, answered with an error; whoever begins a
            round clears it.
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
    refused: dict[int, str] = field(default_factory=dict, init=False)
    _heard: set[int] = field(default_factory=set, init=False)
    _asked: list[Metadata] = field(default_factory=list, init=False)
    _stage: str = field(default=PREKEYS, init=False)

    def register(self, population: int) -> None:
        """Wait for as many devices, of which one at least must come in time."""
        until = time.monotonic() + self.wait_s
        while len(self.members) < population and time.monotonic() < until:
            if not self.greet_newcomers():
                time.sleep(1.0)
        if not self.members:
            raise ReleaseRefused(
                f"no device registered within {self.wait_s:g} s: start SuperNodes, and look into "
                "their logs for what they refused"
            )
        LOG.info("privrec: %d of %d devices registered", len(self.members), population)

    def greet_newcomers(self) -> bool:
        """Ask nodes that were never heard of for their devices; whether there were any."""
        fresh = set(self.grid.get_node_ids()) - self._heard
        self.greet(fresh)
        return bool(fresh)

    def greet(self, nodes: Iterable[int]) -> None:
        """Ask nodes for prekeys of their devices, and take those that are in order."""
        asking = self._messages(PREKEYS, {node: {"count": self.deposit} for node in nodes})
        # Answers to a greeting may take as long as devices are waited for.
        timeout_s = None if self.timeout_s is None else max(self.timeout_s, self.wait_s)
        for node, body in self._bodies(self._sent(asking, timeout_s)):
            try:
                self._take_deposits(node, body)
            except (ReleaseRefused, KeyError, TypeError) as error:
                LOG.error("privrec: node %d is left out: %s", node, error)

    def exchange(self, stage: str, session: ServerSession, **more: Any) -> set[bytes]:
        """Make an exchange with all devices that a session waits for; whose answers were good.

        ``stage`` is the one of :data:`EXCHANGES` that the session is in, which is not advanced;
        ``more`` is what all nodes are told besides.
        """
        return self.take(session, self._sent(self.asking(stage, session, **more), self.timeout_s))

    def asking(self, stage: str, session: ServerSession, **more: Any) -> list[Message]:
        """Return the messages of an exchange, one for each node; see :meth:`exchange`."""
        bodies: dict[int, Body] = {}
        for name, message in session.outbox().items():
            body = bodies.setdefault(self.members[name].node, {MESSAGES: {}, **more})
            body[MESSAGES][name] = message
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
                    LOG.warning("privrec: node %d, device %s: %s", node, name.hex()[:16], error)
        return good

    def _messages(self, stage: str, bodies: Mapping[int, Body]) -> list[Message]:
        made = []
        for node, body in bodies.items():
            content, own = pack({"stage": stage, **body}), self.like.get(node)
            if own is None:
                made.append(Message(content, node, "train"))
                continue
            if stage == MASKED:
                content = RecordDict({**own.content, **content})
            kind, limits = own.metadata.message_type, own.metadata
            made.append(Message(content, node, kind, ttl=limits.ttl, group_id=limits.group_id))
        self._stage, self._asked = stage, [message.metadata for message in made]
        return made

    def _sent(self, messages: list[Message], timeout_s: float | None) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=timeout_s) if messages else ()

    def _bodies(self, replies: Iterable[Message]) -> Iterator[tuple[int, Body]]:
        asked = {each.message_id: each.dst_node_id for each in self._asked}
        for reply in replies:
            node = reply.metadata.src_node_id
            self._heard.add(node)
            try:
                if reply.has_error():
                    # For a node that is gone the SuperLink answers, under an id of its own.
                    node = asked.get(reply.metadata.reply_to_message_id, node)
                    raise ReleaseRefused(self._reason(reply.error))
                body = unpack(reply)
                body["answers"] = by_device(body, "answers")
            except ReleaseRefused as error:
                LOG.warning("privrec: node %d: %s", node, error)
                self.refused[node] = str(error)
                continue
            yield node, body

    def _reason(self, error: Error) -> str:
        if error.code == _RAISED and self.like and self._stage != MASKED:
            return (
                "its app failed on a message that SecureSumMod answers by itself: make the app "
                "with ClientApp(mods=[SecureSumMod(...)]), an instance and the first of its mods "
                f"({error.reason})"
            )
        return str(error.reason).removeprefix(_OURS)

    def _take_deposits(self, node: int, body: Body) -> None:
        stated = {name: body[name] for name in self.agreed}
        if stated != dict(self.agreed):
            raise ReleaseRefused(
                f"it has another scenario or another catalogue, {stated} where the server has "
                f"{self.agreed}; run the same app and run-config everywhere"
            )
        self.simulated = self.simulated or bool(body.get("simulated"))
        refused = {}
        for told in body["devices"]:
            name, number, tier, records = (told[k] for k in ("name", "number", "tier", "prekeys"))
            if [type(each) for each in (name, number, tier, records)] != _MEMBER:
                raise ReleaseRefused("it describes a device in another way than this version")
            try:
                prekeys = self._prekeys(name, tier, records)
            except ReleaseRefused as error:
                refused[name] = str(error)
                continue
            if name in self.members and self.members[name].node != node:
                LOG.warning("privrec: device %s has moved to node %d", name.hex()[:16], node)
            self.members[name] = Member(name, number, tier, node, prekeys)
        if refused:
            LOG.error("privrec: node %d: left out is %s", node, summary(refused))

    def _prekeys(self, name: bytes, tier: int, records: bytes) -> list[bytes]:
        """A device's deposit, once it is known for that of an enrolled device of a tier."""
        if not 0 <= tier < self.tiers:
            raise ReleaseRefused(f"a device of tier {tier}, of {self.tiers}")
        starts = range(0, len(records), RECORD_BYTES)[: self.deposit]
        prekeys = [records[start : start + RECORD_BYTES] for start in starts]
        for prekey in map(Prekey.unpack, prekeys):
            if (prekey.identity, prekey.tier) != (name, tier):
                raise ReleaseRefused("a prekey of another device or tier")
            check_prekey(prekey, self.anchor)
        return prekeys
