"""Which devices there are, and which Flower node hosts each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import ERROR, INFO, WARNING
from typing import Any

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from privrec.device.tier import Federation
from privrec.errors import ReleaseRefused
from privrec.flower.wire import REGISTER, pack, unpack
from privrec.secagg.keys import RECORD_BYTES, Prekey
from privrec.secagg.roster import Anchor, check_prekey

_POLL_S = 1.0


@dataclass
class Member:
    """A registered device, as the server knows it.

    Args:
        name: its identity.
        user: its number, which orders devices.
        tier: index of its tier.
        node: the Flower node that hosts it.
        prekeys: records that are left of its deposit.
    """

    name: bytes
    user: int
    tier: int
    node: int
    prekeys: list[bytes] = field(default_factory=list)


@dataclass
class Registry:
    """The devices of all nodes that are or were connected.

    Args:
        grid: Flower's.
        federation: the tiers.
        plan_hash: of the scenario, which nodes must have too.
        population: enrolled devices.
        anchor: whom the server takes for a device.
        deposit: prekeys that each device is asked for.
        wait_s: how long devices are waited for at the start.
        timeout_s: how long an exchange may take; who is silent for longer drops out.
    """

    grid: Grid
    federation: Federation
    plan_hash: str
    population: int
    anchor: Anchor
    deposit: int
    wait_s: float
    timeout_s: float
    simulated: bool = field(default=False, init=False)
    """Whether some node hosts users of a data set."""
    _members: dict[bytes, Member] = field(default_factory=dict, init=False)
    _heard: set[int] = field(default_factory=set, init=False)

    def register(self) -> None:
        """Wait for the devices, and take their prekeys; those that come later are taken then.

        Raises:
            ReleaseRefused: when no device has registered in time.
        """
        until = time.monotonic() + self.wait_s
        while len(self._members) < self.population and time.monotonic() < until:
            if not self.greet_newcomers():
                time.sleep(_POLL_S)
        if not self._members:
            raise ReleaseRefused(
                f"no device registered within {self.wait_s:g} s: start SuperNodes, and look into "
                "their logs for what they refused"
            )
        log(INFO, "privrec: %d of %d devices registered", len(self._members), self.population)

    def ordered(self) -> list[Member]:
        """All devices, by number."""
        return sorted(self._members.values(), key=lambda member: (member.user, member.name))

    def node_of(self, name: bytes) -> int:
        """The node that hosts a device; 0, which is no node, for one that is not known."""
        member = self._members.get(name)
        return 0 if member is None else member.node

    def greet_newcomers(self) -> bool:
        """Ask nodes that are new for their devices; whether there were any."""
        fresh = set(self.grid.get_node_ids()) - self._heard
        return self._greet(fresh)

    def refill(self, called: Iterable[Member]) -> None:
        """Ask for more prekeys where a device has none left."""
        self._greet({member.node for member in called if not member.prekeys})

    def ask(
        self, kind: str, bodies: Mapping[Any, Mapping[str, Any]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Send each node its body, and give the bodies of the replies that come in time.

        A node that does not answer, or cannot, is told of in the log and has dropped out.
        """
        messages = [
            Message(content=pack(body), dst_node_id=node, message_type=kind)
            for node, body in bodies.items()
        ]
        if not messages:
            return
        # Answers to a greeting may wait for as long as devices may.
        timeout_s = max(self.wait_s, self.timeout_s) if kind == REGISTER else self.timeout_s
        for reply in self.grid.send_and_receive(messages, timeout=timeout_s):
            node = reply.metadata.src_node_id
            self._heard.add(node)
            if reply.has_error():
                log(WARNING, "privrec: node %d did not answer %s: %s", node, kind, reply.error)
                continue
            try:
                body = unpack(reply)
            except ReleaseRefused as error:
                body = {"error": str(error)}
            if "error" in body:
                log(ERROR, "privrec: node %d refused %s: %s", node, kind, body["error"])
                continue
            yield node, body

    def _greet(self, nodes: set[int]) -> bool:
        for node, reply in self.ask(REGISTER, {node: {"prekeys": self.deposit} for node in nodes}):
            self._take(node, reply)
        return bool(nodes)

    def _take(self, node: int, reply: Mapping[str, Any]) -> None:
        items = self.federation.tiers[0].recommender.vectors.items
        if reply["plan"] != self.plan_hash or reply["items"] != items:
            log(
                ERROR,
                "privrec: node %d has another scenario, or a catalogue of %s items where the "
                "server has %d; it is left out: run the same app and run-config everywhere",
                node, reply["items"], items,
            )  # fmt: skip
            return
        self.simulated = self.simulated or bool(reply["simulated"])
        refused: list[str] = []
        for name, user, tier, records in reply["devices"]:
            starts = range(0, len(records), RECORD_BYTES)
            fresh = [records[at : at + RECORD_BYTES] for at in starts]
            try:
                self._check(name, tier, fresh)
            except ReleaseRefused as error:
                refused.append(str(error))
                continue
            member = self._members.setdefault(name, Member(name, user, tier, node))
            member.node, member.tier, member.user = node, tier, user
            member.prekeys = fresh
        if refused:
            text = "privrec: node %d: %d of its devices are left out: %s"
            log(ERROR, text, node, len(refused), refused[0])

    def _check(self, name: bytes, tier: int, records: list[bytes]) -> None:
        for record in records:
            prekey = Prekey.unpack(record)
            if (prekey.identity, prekey.tier) != (name, tier):
                raise ReleaseRefused(f"device {name.hex()[:16]}: a prekey of another one or tier")
            check_prekey(prekey, self.anchor)
