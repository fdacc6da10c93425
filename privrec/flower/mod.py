"""The node's side: a mod that lets an app's update leave only inside a secure sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray

from privrec.errors import PrivrecError, ReleaseRefused, UsageError
from privrec.flower import exchange
from privrec.flower import plan as plans
from privrec.flower.enrolment import Anyone, anchor_of
from privrec.flower.plan import SumPlan
from privrec.privacy.mechanism import noise_seeds
from privrec.secagg.client import WARN_BELOW, Policy
from privrec.secagg.keys import Prekey
from privrec.secagg.roster import Call, Terms

Next = Callable[[Message, Context], Message]


@dataclass(frozen=True, kw_only=True)
class SecureSumMod:
    """A client mod for ``flwr.clientapp.ClientApp``, the first of its list of mods.

    Promise: a reply to training or evaluation leaves the node as one vector, clipped, in integers,
    with the node's noise where noise is agreed on, under masks that only fall in a sum over at
    least ``minimum`` enrolled nodes; nothing else of the reply leaves it. A message that asks for
    anything else, or for less than this mod was made to insist on, is refused with an error, and
    without training.

    Args:
        minimum: fewest nodes that this one is willing to be summed with, itself included.
        noise_multiplier: least noise over the sensitivity, at the fewest survivors and without the
            noise of ``corrupt_share`` of the nodes; 0 to take part without.
        rounds: most updates and evaluations that this node gives in a run; None for any number.
        corrupt_share: share of the nodes that is assumed to collude with the server.
        evaluate_in_clear: whether evaluation replies may leave as they are, which the server reads.
        errors_in_clear: whether the server reads the text of what the app raises or answers as an
            error, which may quote data; it is in the node's own log in any case.
        trust_server: whether to take part when the node is configured with no list of enrolled
            nodes. There is no protection then from a server that makes nodes up.

    Raises:
        UsageError: when a value is outside its range.
    """

    minimum: int = 20
    noise_multiplier: float = 0.0
    rounds: int | None = None
    corrupt_share: float = 0.05
    evaluate_in_clear: bool = False
    errors_in_clear: bool = False
    trust_server: bool = False

    def __post_init__(self) -> None:
        _ = self.policy
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise UsageError(f"noise_multiplier {self.noise_multiplier}: it must be 0 or above")

    @property
    def policy(self) -> Policy:
        """What every session of this node insists on."""
        return Policy(self.minimum, self.corrupt_share)

    def __call__(self, message: Message, context: Context, call_next: Next) -> Message:
        """Answer a message; see Flower's ``Mod``."""
        try:
            if exchange.RECORD in message.content:
                with exchange.keys_of(context) as keys:
                    return _Node(self, context, keys).answer(message, call_next)
            kind = message.metadata.message_type
            is_evaluation = kind.partition(".")[0] == "evaluate"
            if is_evaluation and self.evaluate_in_clear:
                return call_next(message, context)
            remedy = " and evaluate there, or allow evaluate_in_clear" if is_evaluation else ""
            raise ReleaseRefused(
                f"a message of type {kind!r} that asks for a reply in clear: wrap the server's "
                f"strategy in SecureSum{remedy}"
            )
        except Exception as error:
            if self.errors_in_clear and not isinstance(error, PrivrecError):
                raise
            return exchange.refuse(message, error)


class _Node:
    """One message at one node."""

    def __init__(self, mod: SecureSumMod, context: Context, keys: exchange.NodeKeys) -> None:
        config = context.node_config
        anchor = anchor_of(config)
        if anchor is None and not mod.trust_server:
            raise UsageError(
                "this node has no list of enrolled devices, so a server could make devices up and "
                "take the masks of its update off; start the node with node-config keys=FOLDER, "
                "and roster=FILE or enrolment-key=KEY; for an experiment on your own machine make "
                "the app's mod with SecureSumMod(trust_server=True)"
            )
        if anchor is not None and not config.get("keys"):
            raise UsageError(
                "node-config names enrolled devices and no keys=FOLDER: without its own key this "
                "node is none of them; make one with privrec flower enroll"
            )
        self.mod, self.context, self.root = mod, context, keys.root
        number = int(config.get("number", 0))
        self.device = exchange.HostedDevice(keys, number, anchor or Anyone())

    def answer(self, message: Message, call_next: Next) -> Message:
        device, (stage, body) = self.device, exchange.asked(message)
        own = Prekey(device.key.public, device.certificate or bytes(64), 0, 0, b"", b"", b"")
        if not device.anchor.knows(own):
            raise UsageError(
                f"this node's own identity {own.identity.hex()} is not enrolled: add it to the "
                "roster, or have it certified by the office: privrec flower enroll"
            )
        if stage == exchange.PREKEYS:
            return Message(exchange.pack({"devices": [device.deposit(body)]}), reply_to=message)
        told = exchange.by_device(body, exchange.MESSAGES).get(own.identity)
        if told is None:
            raise ReleaseRefused(exchange.NOT_IN)
        if stage == exchange.SHARES:
            answer = self._shares(told, body.get("plan"))
        elif stage == exchange.MASKED:
            if "plan" not in device.kept:
                raise ReleaseRefused(exchange.NOT_IN)
            plan, kind = SumPlan.unpack(device.kept["plan"]), message.metadata.message_type
            if bool(plan.evaluated) != (kind.partition(".")[0] == "evaluate"):
                raise ReleaseRefused(f"a message of type {kind!r} for a sum of another kind")
            content = RecordDict({n: r for n, r in message.content.items() if n != exchange.RECORD})
            digest = plans.content_digest(content, kind)
            received = plans.arrays_of(content, "a message")
            session = device.resumed(self.mod.policy)
            message.content = content
            trained = call_next(message, self.context)
            if trained.has_error():
                return self._erring(trained)
            vector = self._vector(plan, session.terms, received, trained.content)
            answer = bytes(session.masked(told, vector, [digest]))
            device.kept["given"] = [self.context.run_id, (self._given() or 0) + 1]
            del device.kept["plan"]
        else:
            answer = device.conclude(self.mod.policy, stage, told)
        return Message(exchange.pack({"answers": {own.identity: answer}}), reply_to=message)

    def _erring(self, trained: Message) -> Message:
        """The error that an app answered with, if its text may be told."""
        if self.mod.errors_in_clear:
            return trained
        exchange.LOG.error("privrec: the app answered with an error: %s", trained.error.reason)
        raise ReleaseRefused(
            f"the app answered with an error of code {trained.error.code}, whose text may quote "
            "data and stays in this node's log"
        )

    def _shares(self, told: bytes, packed: Any) -> bytes:
        """The node's shares, if the round's plan is no less than what its mod insists on."""
        device, mod, plan, call = self.device, self.mod, SumPlan.unpack(packed), Call.parse(told)
        nodes, terms, given = call.devices, call.terms, self._given()
        if plan.terms(terms.run, terms.round, terms.attempt) != terms:
            raise ReleaseRefused("a call whose terms are not those of its plan")
        if nodes < mod.minimum:
            raise ReleaseRefused(
                f"a sum among {nodes} nodes, and this node's SecureSumMod(minimum={mod.minimum}) "
                "insists on more: start more nodes, or lower the minimum in the app"
            )
        noise = plan.noise_beyond(math.floor(mod.corrupt_share * nodes))
        if noise < mod.noise_multiplier:
            raise ReleaseRefused(
                f"a round with noise of {noise:.4g} times the sensitivity, without that of the "
                f"nodes that may collude, and this node insists on {mod.noise_multiplier:g}; "
                "raise the server's noise_multiplier or lower its epsilon"
            )
        if mod.rounds is not None and (given or 0) >= mod.rounds:
            raise ReleaseRefused(
                f"another sum with this node, which gave to {given or 0} in this run, and its "
                f"SecureSumMod(rounds={mod.rounds}) allows no more"
            )
        seeds = self._seeds(terms) if plan.remove_excess else ()
        answer = device.shares(mod.policy, told, seeds)
        device.kept["plan"] = packed
        if given is None and nodes < WARN_BELOW:
            said = "privrec: this node is one of %d in the sum, and is hidden among few"
            exchange.LOG.warning(said, nodes)
        device.kept["given"] = [self.context.run_id, given or 0]
        return answer

    def _given(self) -> int | None:
        """Sums that this node gave to in this run of Flower; None before it took part in any."""
        run, given = self.device.kept.get("given", (None, 0))
        return int(given) if run == self.context.run_id else None

    def _vector(
        self, plan: SumPlan, terms: Terms, received: plans.Arrays, trained: RecordDict
    ) -> NDArray[np.int32]:
        """The update in integers, or the metrics of an evaluation, with this node's noise."""
        metrics = dict(chain.from_iterable(r.items() for r in trained.metric_records.values()))
        if plan.evaluated:
            values = plans.scores(plan, metrics)
        else:
            values = plans.update(received, plans.arrays_of(trained, "a reply"))
        coins = self.root.stream("rounding", terms.run, terms.round, terms.attempt, terms.plan)
        vector = plans.integers(plan, values, metrics, coins)
        return vector if plan.shares is None else vector + plan.shares.draw(self._seeds(terms))

    def _seeds(self, terms: Terms) -> tuple[bytes, ...]:
        identity = self.device.key.public
        context = (terms.run, terms.round, terms.attempt, terms.plan, identity)
        return noise_seeds(self.root, 1, *context)
