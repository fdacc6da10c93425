"""The node's side: a mod that lets an app's update leave only inside a secure sum."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from privrec.errors import PrivrecError, ReleaseRefused, UsageError
from privrec.flower import plan as plans
from privrec.flower.enrolment import ROOT, Anyone, anchor_of, certificates_of, text_of
from privrec.flower.exchange import (
    LOG,
    MASKED,
    NOT_IN,
    PREKEYS,
    RECORD,
    SHARES,
    KeptDevice,
    asked,
    by_device,
    kept_in,
    refuse,
    reply,
)
from privrec.flower.plan import SumPlan
from privrec.privacy.mechanism import noise_seeds
from privrec.randomness import SecretRoot
from privrec.secagg.client import Policy
from privrec.secagg.keys import DeviceKey, Prekey, statement
from privrec.secagg.roster import Call, Roster, Terms

ANSWERED = "answered"
"""File beside a node's keys, with what it has answered."""
_MOST_PREKEYS = 64

Next = Callable[[Message, Context], Message]


class SecureSumMod:
    """A client mod for ``flwr.clientapp.ClientApp``, the first of its list of mods.

    Promise: a training reply leaves the node as one vector, clipped, in integers, with the node's
    noise where noise is agreed on, under masks that only fall in a sum over at least ``minimum``
    enrolled nodes; nothing else of the reply leaves it. A message that asks for anything else, or
    for less than this mod was made to insist on, is refused with an error, and without training.

    Args:
        minimum: fewest nodes that this one is willing to be summed with, itself included.
        noise_multiplier: least noise over the sensitivity, at the fewest survivors and without the
            noise of ``corrupt_share`` of the nodes; 0 to take part without.
        rounds: most updates that this node gives in a run; None for any number.
        corrupt_share: share of the nodes that is assumed to collude with the server.
        evaluate_in_clear: whether evaluation replies may leave as they are, which the server reads.
        trust_server: whether to take part when the node is configured with no list of enrolled
            nodes. There is no protection then from a server that makes nodes up.

    Raises:
        UsageError: when a value is outside its range.
    """

    def __init__(
        self,
        *,
        minimum: int = 20,
        noise_multiplier: float = 0.0,
        rounds: int | None = None,
        corrupt_share: float = 0.05,
        evaluate_in_clear: bool = False,
        trust_server: bool = False,
    ) -> None:
        if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
            raise UsageError(f"noise_multiplier {noise_multiplier}: it must be 0 or above")
        self.policy = Policy(minimum, corrupt_share)
        self.trust_server = trust_server
        self._noise_multiplier = noise_multiplier
        self._rounds = rounds
        self._evaluate_in_clear = evaluate_in_clear

    def __call__(self, message: Message, context: Context, call_next: Next) -> Message:
        """Answer a message; see Flower's ``Mod``."""
        try:
            if RECORD in message.content:
                return _Node(self, context).answer(message, call_next)
            kind = message.metadata.message_type
            is_evaluation = kind.partition(".")[0] == "evaluate"
            if is_evaluation and self._evaluate_in_clear:
                return call_next(message, context)
            remedy = " and evaluate there, or allow evaluate_in_clear" if is_evaluation else ""
            raise ReleaseRefused(
                f"a message of type {kind!r} that asks for a reply in clear: wrap the server's "
                f"strategy in SecureSum{remedy}"
            )
        except PrivrecError as error:
            return refuse(message, error)

    def check(self, plan: SumPlan, terms: Terms, nodes: int, given: int) -> None:
        """Refuse a round that is not what this mod insists on.

        Args:
            plan: that the server states.
            terms: of the call, which everybody's masks are bound to.
            nodes: size of the roster.
            given: updates that this node gave in this run before.

        Raises:
            ReleaseRefused: when it asks for too much, or the two contradict each other.
        """
        if plan.terms(terms.run, terms.round, terms.attempt) != terms:
            raise ReleaseRefused("a call whose terms are not those of its plan")
        noise = plan.noise_beyond(math.floor(self.policy.corrupt_share * nodes))
        if noise < self._noise_multiplier:
            raise ReleaseRefused(
                f"a round with noise of {noise:.4g} times the sensitivity, without that of the "
                f"nodes that may collude, and this node insists on {self._noise_multiplier:g}; "
                "raise the server's noise_multiplier or lower its epsilon"
            )
        if self._rounds is not None and given >= self._rounds:
            raise ReleaseRefused(
                f"update {given + 1} of this node in one run, and it gives at most {self._rounds}"
            )


class _Node:
    """One message at one node."""

    def __init__(self, mod: SecureSumMod, context: Context) -> None:
        self._mod, self._context = mod, context
        self._kept = kept_in(context.state)
        self._root = SecretRoot(self._kept["root"])
        config = context.node_config
        anchor = anchor_of(config)
        if anchor is None and not mod.trust_server:
            raise UsageError(
                "this node has no list of enrolled devices, so a server could make devices up and "
                "take the masks of its update off; start the node with node-config keys=FOLDER, "
                "and roster=FILE or enrolment-key=KEY; for an experiment on your own machine make "
                "the app's mod with SecureSumMod(trust_server=True)"
            )
        self._journal: Path | None = None
        key, certificate = DeviceKey.derive(self._root, "device"), b""
        if anchor is not None:
            key, certificate, self._journal = _enrolled(config)
            own = Prekey(key.public, certificate or bytes(64), 0, 0, b"", b"", b"")
            if not anchor.knows(own):
                raise UsageError(
                    f"this node's own identity {key.public.hex()} is not enrolled: add it to the "
                    "roster, or have it certified by the office: privrec flower enroll"
                )
        self._device = KeptDevice(key, self._root, anchor or Anyone(), self._kept, certificate)

    def answer(self, message: Message, call_next: Next) -> Message:
        stage, body = asked(message)
        if stage == PREKEYS:
            return reply(message, {"devices": [self._device.deposit(body, _MOST_PREKEYS)]})
        mine = self._device.key.public
        told = by_device(body, "messages").get(mine)
        if told is None:
            raise ReleaseRefused(NOT_IN)
        if stage == SHARES:
            answer = self._shares(told, body.get("plan"))
        elif stage == MASKED:
            trained = self._masked(told, message, call_next)
            if isinstance(trained, Message):
                return trained  # the app's own error
            answer = trained
        else:
            session = self._device.resumed(self._mod.policy)
            self._claim_stage(stage, session.terms)
            answer = self._device.conclude(session, stage, told)
        return reply(message, {"answers": {mine: answer}})

    def _shares(self, told: bytes, packed: Any) -> bytes:
        plan, call = SumPlan.unpack(packed), Call.parse(told)
        terms, roster = call.terms, Roster(call, self._device.anchor)
        self._mod.check(plan, terms, len(roster), self._kept.get("given", 0))
        own = roster.prekeys[roster.number(self._device.key.public)]
        self._claim("prekey", own.signature)
        self._claim_stage(SHARES, terms)
        session = self._device.called(self._mod.policy)
        answer = session.shares(told, self._seeds(terms) if plan.remove_excess else ())
        self._kept["plan"] = packed
        if session.warning:
            LOG.warning("privrec: %s", session.warning)
        return answer

    def _masked(self, told: bytes, message: Message, call_next: Next) -> bytes | Message:
        session = self._device.resumed(self._mod.policy)
        plan, terms = SumPlan.unpack(self._kept.get("plan")), session.terms
        content = RecordDict({n: r for n, r in message.content.items() if n != RECORD})
        digest = plans.content_digest(content, message.metadata.message_type)
        # A copy: apps may take the arrays out of the record that they are given.
        received = ArrayRecord(dict(plans.only_arrays(content, "a message").items()))
        message.content = content
        trained = call_next(message, self._context)
        if trained.has_error():
            return trained
        vector = self._vector(plan, terms, received, trained.content)
        self._claim_stage(MASKED, terms)
        masked = bytes(session.masked(told, vector, [digest]))
        self._kept["given"] = self._kept.get("given", 0) + 1
        self._kept.pop("plan")
        return masked

    def _vector(
        self, plan: SumPlan, terms: Terms, received: ArrayRecord, trained: RecordDict
    ) -> NDArray[np.int32]:
        """The update in integers, with this node's noise."""
        values = plans.update(received, plans.only_arrays(trained, "a reply"))
        metrics = {
            name: each
            for record in trained.metric_records.values()
            for name, each in record.items()
        }
        context = (terms.run, terms.round, terms.attempt, terms.plan)
        vector = plans.integers(plan, values, metrics, self._root.stream("rounding", *context))
        return vector if plan.shares is None else vector + plan.shares.draw(self._seeds(terms))

    def _seeds(self, terms: Terms) -> tuple[bytes, ...]:
        identity = self._device.key.public
        context = (terms.run, terms.round, terms.attempt, terms.plan, identity)
        return noise_seeds(self._root, 1, *context)

    def _claim_stage(self, stage: str, terms: Terms) -> None:
        self._claim(stage, terms.run, terms.round, terms.attempt)

    def _claim(self, stage: str, *what: bytes | int | str) -> None:
        """Mark an answer as given, on disk before it is; a node of one run alone does not.

        The state of a Flower context may be set back, by a crash or by two messages that are
        worked on at once. An answer given twice could give an update away.
        """
        if self._journal is None:
            return
        line = statement("answered", stage, *what).hex()
        descriptor = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            if line in before.splitlines():
                raise ReleaseRefused(
                    f"message {stage!r} of this round was answered before (see {self._journal}): "
                    "the node's state was set back, or the server asks twice; begin another round"
                )
            cut_off = before and not before.endswith("\n")
            file.write(("\n" if cut_off else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _enrolled(config: Mapping[str, Any]) -> tuple[DeviceKey, bytes, Path]:
    """Identity, certificate and journal of an enrolled node, from its folder of keys."""
    folder = text_of(config, "keys")
    if folder is None:
        raise UsageError(
            "node-config names enrolled devices and no keys=FOLDER: without its own key this node "
            "is none of them; make one with privrec flower enroll"
        )
    keys, number = Path(folder), int(config.get("number", 0))
    key = DeviceKey.derive(SecretRoot.load(keys / ROOT), "user", number)
    return key, certificates_of(keys).get(number, b""), keys / ANSWERED
