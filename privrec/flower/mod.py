"""The node's side: a mod that lets an app's update leave only inside a secure sum."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from numpy.typing import NDArray

from privrec.errors import PrivrecError, ReleaseRefused, UsageError
from privrec.flower import vectors
from privrec.flower.devices import RunState, SumDevice
from privrec.flower.plan import SumPlan
from privrec.privacy.mechanism import noise_seeds
from privrec.secagg.client import ClientSession, Policy
from privrec.secagg.roster import Call, Roster, Terms

RECORD = "privrec.secure-sum"
"""The record of a message that holds the secure sum's part of it."""
ARRAY = "masked"
_REFUSED = 6  # Flower's code for a mod whose conditions are not met
_MOST_PREKEYS = 64
_LOG = logging.getLogger("flwr.privrec")

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
        self._policy = Policy(minimum, corrupt_share)
        self._noise_multiplier = noise_multiplier
        self._rounds = rounds
        self._evaluate_in_clear = evaluate_in_clear
        self._trust_server = trust_server

    def __call__(self, message: Message, context: Context, call_next: Next) -> Message:
        """Answer a message; see Flower's ``Mod``."""
        try:
            if RECORD in message.content:
                return _Node(self, context).answer(message, call_next)
            if self._evaluate_in_clear and _category(message) == "evaluate":
                return call_next(message, context)
            raise ReleaseRefused(
                f"a message of type {message.metadata.message_type!r} that asks for a reply in "
                "clear: wrap the server's strategy in SecureSum"
                + (
                    " and evaluate there, or allow evaluate_in_clear"
                    if not _is_train(message)
                    else ""
                )
            )
        except PrivrecError as error:
            _LOG.warning("secure sum: this node refuses: %s", error)
            return Message(Error(_REFUSED, f"privrec: {error}"), reply_to=message)

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
        noise = plan.noise_beyond(math.floor(self._policy.corrupt_share * nodes))
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

    @property
    def policy(self) -> Policy:
        """What every session of this node insists on."""
        return self._policy

    @property
    def trust_server(self) -> bool:
        """Whether a node without an anchor takes part."""
        return self._trust_server


class _Node:
    """One message at one node."""

    def __init__(self, mod: SecureSumMod, context: Context) -> None:
        self._mod = mod
        self._context = context
        self._state = RunState(context.state)
        self._device = SumDevice.of(
            context.node_config, self._state.root, trust_server=mod.trust_server
        )
        self._book = self._state.book(self._device)

    def answer(self, message: Message, call_next: Next) -> Message:
        asked = message.content[RECORD]
        stages = {
            "prekeys": self._prekeys, "shares": self._shares, "confirm": self._confirm,
            "unmask": self._unmask,
        }  # fmt: skip
        stage = asked.get("stage")
        if stage == "masked":
            return self._masked(message, call_next)
        if stage not in stages:
            raise ReleaseRefused(f"a message of a secure sum in stage {stage!r}, which is none")
        reply = ConfigRecord({"answer": bytes(stages[stage](asked))})
        return Message(RecordDict({RECORD: reply}), reply_to=message)

    def _prekeys(self, asked: ConfigRecord) -> bytes:
        count = asked.get("count")
        if type(count) is not int or not 1 <= count <= _MOST_PREKEYS:
            raise ReleaseRefused(f"{count!r} prekeys asked for: 1 to {_MOST_PREKEYS} are given")
        return b"".join(self._book.issue(count, 0))

    def _shares(self, asked: ConfigRecord) -> bytes:
        packed, message = _bytes(asked, "plan"), _bytes(asked, "message")
        plan, call = SumPlan.unpack(packed), Call.parse(message)
        terms, roster = call.terms, Roster(call, self._device.anchor)
        self._mod.check(plan, terms, len(roster), self._given())
        own = roster.prekeys[roster.number(self._device.key.public)]
        self._device.claim("prekey", own.signature)
        self._claim("shares", terms)
        session = ClientSession(self._book, self._device.anchor, self._mod.policy)
        seeds = self._seeds(terms) if plan.remove_excess else ()
        answer = session.shares(message, seeds)
        self._state.keep(session=session.saved(), plan=packed)
        if session.warning:
            _LOG.warning("secure sum: %s", session.warning)
        return answer

    def _masked(self, message: Message, call_next: Next) -> Message:
        deal = _bytes(message.content[RECORD], "message")
        content = RecordDict({n: r for n, r in message.content.items() if n != RECORD})
        digest = vectors.content_digest(content, message.metadata.message_type)
        # A copy: apps may take the arrays out of the record that they are given.
        received = ArrayRecord(dict(vectors.only_arrays(content, "a message").items()))
        session = self._session()
        plan, terms = SumPlan.unpack(self._state.get("plan") or b""), session.terms
        message.content = content
        reply = call_next(message, self._context)
        if reply.has_error():
            return reply
        vector = self._vector(plan, terms, received, reply.content)
        self._claim("masked", terms)
        masked = bytes(session.masked(deal, vector, [digest]))
        given = (self._given() + 1).to_bytes(8)
        self._state.keep(session=session.saved(), given=given)
        array = Array(dtype="uint8", shape=(len(masked),), stype=RECORD, data=masked)
        return Message(RecordDict({RECORD: ArrayRecord({ARRAY: array})}), reply_to=message)

    def _confirm(self, asked: ConfigRecord) -> bytes:
        session = self._session()
        self._claim("confirm", session.terms)
        answer = session.confirm(_bytes(asked, "message"))
        self._state.keep(session=session.saved())
        return answer

    def _unmask(self, asked: ConfigRecord) -> bytes:
        session = self._session()
        self._claim("unmask", session.terms)
        answer = session.unmask(_bytes(asked, "message"))
        self._state.forget("session", "plan")
        return answer

    def _vector(
        self, plan: SumPlan, terms: Terms, received: ArrayRecord, reply: RecordDict
    ) -> NDArray[np.int32]:
        """The update in integers, with this node's noise."""
        values = vectors.update(received, vectors.only_arrays(reply, "a reply"))
        metrics = {
            name: each for record in reply.metric_records.values() for name, each in record.items()
        }
        context = (terms.run, terms.round, terms.attempt, terms.plan)
        vector = vectors.integers(
            plan, values, metrics, self._state.root.stream("rounding", *context)
        )
        return vector if plan.shares is None else vector + plan.shares.draw(self._seeds(terms))

    def _seeds(self, terms: Terms) -> tuple[bytes, ...]:
        identity = self._device.key.public
        context = (terms.run, terms.round, terms.attempt, terms.plan, identity)
        return noise_seeds(self._state.root, 1, *context)

    def _session(self) -> ClientSession:
        saved = self._state.get("session")
        if saved is None:
            raise ReleaseRefused(
                "a message in the middle of a secure sum that this node is not in: it was started "
                "anew, or refused to take part; it can join the next round"
            )
        return ClientSession.resume(self._book, self._device.anchor, saved, self._mod.policy)

    def _claim(self, stage: str, terms: Terms) -> None:
        self._device.claim(stage, terms.run, terms.round, terms.attempt)

    def _given(self) -> int:
        return int.from_bytes(self._state.get("given") or b"")


def _bytes(asked: ConfigRecord, name: str) -> bytes:
    value = asked.get(name)
    if not isinstance(value, bytes):
        raise ReleaseRefused(f"a message of a secure sum without {name!r}")
    return value


def _category(message: Message) -> str:
    return str(message.metadata.message_type).partition(".")[0]


def _is_train(message: Message) -> bool:
    return _category(message) == "train"
