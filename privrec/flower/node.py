"""The devices that one node hosts: a single phone, or every user of a partition.

Each has its own history, private state, identity and session; a message that fails one device's
checks leaves the others alone. What must survive between messages is kept before an answer leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from privrec.device.device import Device
from privrec.device.tier import Federation
from privrec.device.update import Protection, Round
from privrec.errors import PrivrecError, ReleaseRefused, UsageError
from privrec.flower.wire import (
    CONFIRM,
    MASKED,
    REGISTER,
    SHARES,
    UNMASK,
    Body,
    round_from_body,
)
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot
from privrec.run.assembly import learner_of
from privrec.run.plan import Plan
from privrec.scenario.load import Scenario
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.keys import DeviceKey, PrekeyBook
from privrec.secagg.roster import Anchor

Save = Callable[[bytes], None]


@dataclass(frozen=True)
class Hosted:
    """One device of a node.

    Args:
        user: its number, by which the server orders devices; it names the device's draws.
        tier: index of its tier.
        history: its items.
    """

    user: int
    tier: int
    history: NDArray[np.int32]


@dataclass
class _Kept:
    """What a device remembers between messages: all of it secret but the book."""

    book: bytes | None = None
    session: bytes | None = None
    state: bytes = b""
    before: tuple[int, bytes] = (-1, b"")
    """The round that was answered last, and the private state that it began with."""


@dataclass
class Node:
    """Answers the server for all devices that it hosts.

    Promise: an answer is given after :attr:`save` has kept all that it depends on, so that a node
    whose process ends between two messages neither answers twice nor draws noise anew.

    Args:
        scenario: what the devices agreed to take part in.
        federation: its tiers.
        hosted: the devices.
        root: the node's secret; identities, masks and noise derive from it by user.
        anchor: whom the devices trust about other devices; None for the server's own word.
        certificates: by user, of the enrolment office, where there is one.
        save: keeps the state, durable before it returns.
        simulated: whether the histories are those of a data set.
    """

    scenario: Scenario
    federation: Federation
    hosted: Sequence[Hosted]
    root: SecretRoot
    anchor: Anchor
    save: Save
    certificates: Mapping[int, bytes] = field(default_factory=dict)
    simulated: bool = False
    _kept: dict[int, _Kept] = field(default_factory=dict, init=False)
    _round: Body = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        population = self.scenario.devices.population
        if population is None:
            raise UsageError(
                "devices.population is unset: noise and thresholds follow from the number of "
                "enrolled devices, which must be public; set it in the scenario"
            )
        items = self.federation.tiers[0].recommender.vectors.items
        plan = Plan.over(self.scenario, self.federation, items, population)
        self._event, self._protection = plan.event, plan.protection
        self._by_name = {DeviceKey.derive(self.root, "user", h.user).public: h for h in self.hosted}

    def restore(self, state: bytes) -> Node:
        """The node where ``save`` was last called with ``state``."""
        stored = msgpack.unpackb(state, raw=False, strict_map_key=False)
        self._round = stored["round"]
        self._kept = {
            user: _Kept(book, session, own, (before[0], before[1]))
            for user, (book, session, own, before) in stored["devices"].items()
        }
        return self

    def answer(self, kind: str, body: Mapping[str, Any]) -> Body:
        """The answer to one message.

        Args:
            kind: one of the message types of :mod:`privrec.flower.wire`.
            body: its body.

        Returns:
            For :data:`REGISTER` the devices; for an exchange the ``answers`` and what was
            ``refused``, by identity.

        Raises:
            ReleaseRefused: when no device can answer such a message.
        """
        answered = self._register(body) if kind == REGISTER else self._exchange(kind, body)
        self._keep()
        return answered

    # ------------------------------------------------------------------ messages

    def _register(self, body: Mapping[str, Any]) -> Body:
        count = int(body["prekeys"])
        devices = []
        for name, hosted in self._by_name.items():
            records = self._book(hosted).issue(count, hosted.tier)
            devices.append([name, hosted.user, hosted.tier, b"".join(records)])
        return {
            "devices": devices,
            "items": self.federation.tiers[0].recommender.vectors.items,
            "plan": self.scenario.plan_hash(),
            "simulated": self.simulated,
        }

    def _exchange(self, kind: str, body: Mapping[str, Any]) -> Body:
        if kind == SHARES:
            self._round = dict(body["round"])
        round = round_from_body(self._round)
        self._check_round(round)
        view = None
        if kind == MASKED:
            view = np.frombuffer(body["weights"], np.float32)
            if len(view) != self.federation.layout.size:
                raise ReleaseRefused(
                    f"a model of {len(view)} coefficients, where the scenario's has "
                    f"{self.federation.layout.size}; nothing is answered"
                )
        answers, refused = {}, {}
        for name, message in body["messages"].items():
            hosted = self._by_name.get(name)
            if hosted is None:
                refused[name] = "this node hosts no such device"
                continue
            try:
                answers[name] = self._step(kind, round, hosted, message, view, body.get("key", 0))
            except PrivrecError as error:
                refused[name] = str(error)
        return {"answers": answers, "refused": refused}

    def _step(
        self,
        kind: str,
        round: Round,
        hosted: Hosted,
        message: bytes,
        view: NDArray[np.float32] | None,
        key: int,
    ) -> bytes:
        """One device's answer to one exchange."""
        kept, device = self._kept_of(hosted), self._device(hosted)
        seeds = device.noise_seeds(round) if self._protection.removes_excess else ()
        if kind == SHARES:
            return self._session(hosted, round, fresh=True).shares(message, seeds)
        session = self._session(hosted, round, fresh=False)
        if kind == CONFIRM:
            return session.confirm(message)
        if kind == UNMASK:
            return session.unmask(message)
        if view is None:
            raise ReleaseRefused(f"{kind}: no such exchange")
        # Another attempt at the same round begins where the first one did.
        if kept.before[0] == round.index:
            device.state = _floats(kept.before[1])
        before = device.state.tobytes()
        prefix = self.federation.prefix(view, device.tier)
        bounded = device.answer(round, prefix, key)
        upload = device.upload(round, bounded)
        digests = round.model_digests[: len(device.layouts)]
        masked = session.masked(message, upload.integers, digests)
        kept.before, kept.state = (round.index, before), device.state.tobytes()
        return bytes(masked)

    # ------------------------------------------------------------------ checks and parts

    def _check_round(self, round: Round) -> None:
        """A device takes part in what it agreed to, not in what it is told."""
        if round.plan_digest != self.scenario.plan_hash():
            raise ReleaseRefused(
                f"a round of plan {round.plan_digest[:16]}, and these devices agreed to "
                f"{self.scenario.plan_hash()[:16]}; run the same app and run-config everywhere"
            )
        if round.event != self._event:
            raise ReleaseRefused(
                f"a round that is charged as {round.event}, and these devices agreed to "
                f"{self._event}; server and nodes must run the same version"
            )

    def _kept_of(self, hosted: Hosted) -> _Kept:
        return self._kept.setdefault(hosted.user, _Kept())

    def _book(self, hosted: Hosted) -> PrekeyBook:
        kept = self._kept_of(hosted)

        def keep(state: bytes) -> None:
            kept.book = state

        return PrekeyBook(
            DeviceKey.derive(self.root, "user", hosted.user),
            self.root,
            certificate=self.certificates.get(hosted.user, b""),
            save=keep,
            state=kept.book,
        )

    def _session(self, hosted: Hosted, round: Round, *, fresh: bool) -> ClientSession:
        kept, book = self._kept_of(hosted), self._book(hosted)
        terms = self._protection.terms(round, self.federation.layouts)
        devices, privacy = self.scenario.devices, self.scenario.privacy
        policy = Policy(devices.min_cohort, privacy.colluding_share, terms)

        def keep(session: bytes) -> None:
            kept.session = session

        if fresh:
            return ClientSession(book, self.anchor, policy, keep)
        if kept.session is None:
            raise ReleaseRefused("an exchange of a round that this device was not called to")
        return ClientSession.resume(book, self.anchor, kept.session, policy, keep)

    def _device(self, hosted: Hosted) -> Device:
        tier = self.federation.tiers[hosted.tier]
        learner = learner_of(self.scenario, self.federation, tier)
        state = _floats(self._kept_of(hosted).state)
        return Device(
            hosted.user, hosted.history, tier, self.federation.weaker(tier), learner,
            self._protection, self.root, state,
        )  # fmt: skip

    @property
    def event(self) -> RoundEvent:
        """The privacy event that these devices agreed to."""
        return self._event

    @property
    def protection(self) -> Protection:
        """How these devices protect their updates."""
        return self._protection

    def _keep(self) -> None:
        devices = {
            user: [kept.book, kept.session, kept.state, list(kept.before)]
            for user, kept in self._kept.items()
        }
        self.save(msgpack.packb({"round": self._round, "devices": devices}, use_bin_type=True))


def _floats(state: bytes) -> NDArray[np.float32]:
    return np.frombuffer(state, np.float32).copy()
