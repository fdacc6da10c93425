"""The client app: a node's devices behind Flower's messages.

A node hosts a single phone, or every user of a partition. Each device has its own history, private
state, identity and session. What must survive between messages is kept before an answer leaves.

Flower starts a process for each message. Only the one that trains imports what computes models, in
:meth:`Node._trained`; for all others that would be most of the work. Noise for an ε against sampled
cohorts takes seconds to find, and is found with a node's first message.

What depends on no single device is done once for all of a node: the roster and its signatures are
checked, the model is compared with its digests and the order of the items with its own. Devices
train one after the other, as ``run.engine = "device"`` simulates them, with the same bits: a batch
would round by who else is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

import privrec
from privrec import data
from privrec.data.files import read_catalogue, read_history
from privrec.device.tier import Federation, Tier
from privrec.device.update import (
    Counting,
    Evaluating,
    Protection,
    Round,
    SideSum,
    Upload,
    agreed_places,
)
from privrec.errors import DataError, PrivrecError, ReleaseRefused, UsageError
from privrec.flower import exchange
from privrec.flower.app import population_of, scenario_of
from privrec.flower.enrolment import Anyone, anchor_of, text_of
from privrec.models.layout import Layout
from privrec.privacy.ledger import PREPARATION
from privrec.run.plan import Plan, assign, federation_of
from privrec.scenario.load import Scenario
from privrec.secagg.client import Policy
from privrec.secagg.roster import Call

if TYPE_CHECKING:
    from privrec.device.device import Learner
    from privrec.device.local import LocalModel


CALIBRATED = "calibrated"
"""Under which a node keeps its noise, beside what its devices remember by their numbers."""


def client_app(folder: Path) -> ClientApp:
    """Make a Flower ClientApp that hosts a node's devices, for the app that lies in ``folder``.

    What they are is said by ``--node-config``: ``partition-id`` and ``num-partitions`` for every
    n-th user of the scenario's data set (with ``data=PATH``), or ``history=FILE`` for one user's
    own items, one id a line, with ``catalogue=FILE`` that has all items, one id a line in the order
    of the model. ``keys=FOLDER`` has the node's secrets; without it they live as long as the run.
    ``roster=FILE`` or ``enrolment-key=HEX`` says whom the devices trust.
    """
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # Flower may be absent
    def answer(message: Message, context: Context) -> Message:
        try:
            with exchange.keys_of(context) as keys:
                body = Node(folder, context, keys).answer(*exchange.asked(message))
            return Message(exchange.pack(body), reply_to=message)
        except Exception as error:
            return exchange.refuse(message, error)

    return app


@dataclass(frozen=True)
class Hosted:
    """A user of a node: the number that names its draws, the index of its tier, its items.

    ``heldout`` are items that it does not train on, by which the model is evaluated.
    """

    user: int
    tier: int
    history: NDArray[np.int32]
    heldout: NDArray[np.int32]


class Node:
    """Answers the server for all devices that its configuration says it hosts.

    Promise: all that an answer depends on is in ``keys`` when it is given, so that a node whose
    process ends between two messages neither answers twice nor draws noise anew.

    Raises:
        UsageError: when the configuration contradicts itself, or there is no trust anchor.
        DataError: when a file is malformed.
    """

    def __init__(self, folder: Path, context: Context, keys: exchange.NodeKeys) -> None:
        config = context.node_config
        self.scenario = scenario = scenario_of(folder, context.run_config)
        self.simulated = "history" not in config
        described = (_partition if self.simulated else _own)(scenario, config)
        self.hosted, self.federation, self._features = described
        anchor = anchor_of(config)
        if anchor is None and not self.simulated:
            raise UsageError(
                "this node has a history of its own and no trust anchor: a server could surround "
                "it with devices that it made up; add roster=FILE or enrolment-key=HEX to its "
                "--node-config"
            )
        self._keys, federation, trusted = keys, self.federation, anchor or Anyone()
        self._items = federation.tiers[0].model.vectors.items
        self.plan = self._plan()
        self._tier, self._model = cache(self._tier_of), cache(self._model_of)
        self._places, self._digest = cache(self._places_in), cache(self._digest_with)
        self._devices = {}
        for each in self.hosted:
            device = exchange.HostedDevice(keys, each.user, trusted)
            self._devices[device.key.public] = each, device

    def answer(self, stage: str, body: Mapping[str, Any]) -> exchange.Body:
        """Answer one message of :mod:`privrec.flower.exchange`."""
        if stage == exchange.PREKEYS:
            devices = self._devices.values()
            return {
                "devices": [device.deposit(body, each.tier) for each, device in devices],
                "items": self._items,
                "plan": self._digest(b""),
                "simulated": self.simulated,
            }
        answers: dict[bytes, bytes] = {}
        refused: dict[bytes, str] = {}
        for name, message in exchange.by_device(body, exchange.MESSAGES).items():
            try:
                answers[name] = self._answer(stage, name, message, body)
            except PrivrecError as error:
                refused[name] = exchange.told(error)
        if not refused:
            return {"answers": answers}
        said = f"{stage} was refused by {exchange.summary(refused)}"
        exchange.LOG.error("privrec: %s", said)
        return {"answers": answers, "refused": said}

    def _answer(self, stage: str, name: bytes, message: bytes, body: Mapping[str, Any]) -> bytes:
        """One device's answer to one exchange."""
        if name not in self._devices:
            raise ReleaseRefused("this node hosts no such device")
        hosted, device = self._devices[name]
        kept = device.kept
        if stage == exchange.SHARES:
            # Of the call itself: noise of another attempt than that of the masks would be drawn
            # for two sums, or opened for a sum that was released.
            called = Call.parse(message).terms
            stated = body.get("model"), body.get("order")
            told: Any = [called.run, called.round, called.attempt, *stated]
            round, policy = self._agreed(told)
            seeds: tuple[bytes, ...] = ()
            protection, layouts = self._protected(round, hosted)
            if protection.removes_excess:
                seeds = protection.noise_seeds(self._keys.root, round, len(layouts), hosted.user)
            answer = device.shares(policy, message, seeds)
            kept["round"] = told
            return answer
        told = kept.get("round")
        round, policy = self._agreed(told)
        if stage != exchange.MASKED:
            return device.conclude(policy, stage, message)
        session = device.resumed(policy)
        plan, changed = self.plan, dict[str, Any]()
        if plan.counting is not None and round.index == PREPARATION:
            upload = self._counted(plan.counting, hosted, round)
        elif plan.evaluating is not None and round.index == plan.evaluating.index:
            upload = self._evaluated(plan.evaluating, hosted, round, told, body)
        else:
            upload, changed = self._trained(hosted, round, told[-1], kept, body)
        _, layouts = self._protected(round, hosted)
        digests = round.model_digests[: len(layouts)]
        masked = session.masked(message, upload.integers, digests)
        kept.update(changed)
        return bytes(masked)

    def _agreed(self, told: Any) -> tuple[Round, Policy]:
        """The round of a call, with the event and the plan that these devices agreed to.

        The terms that all masks are bound to must be of these, or a device refuses them.
        """
        if told is None:
            raise ReleaseRefused(exchange.NOT_IN)
        run, index, attempt, model, order = told
        scenario, plan, layouts = self.scenario, self.plan, self.federation.layouts
        protection, evaluating = plan.protection, plan.evaluating
        if index == PREPARATION:
            if plan.counting is None:
                raise ReleaseRefused("a count of items that the scenario does not release")
            round = plan.counting.round(run, attempt, self._digest(b""))
            protection, layouts = plan.counting.protection, plan.counting.layouts
        else:
            if type(model) is not list or [type(each) for each in model] != [bytes] * len(layouts):
                raise ReleaseRefused("digests of the model that are none; nothing is answered")
            if plan.counting is not None and (type(order) is not bytes or not order):
                raise ReleaseRefused("a round that is bound to no order of the items")
            agreed = self._digest(order if plan.counting else b"")
            if evaluating is not None and index == evaluating.index:
                round = evaluating.round(run, attempt, agreed, model)
                protection, layouts = evaluating.protection, evaluating.layouts
            else:
                round = Round(run, index, attempt, plan.event, agreed, tuple(model))
        terms = protection.terms(round, layouts)
        return round, Policy(scenario.devices.min_cohort, scenario.privacy.colluding_share, terms)

    def _protected(self, round: Round, hosted: Hosted) -> tuple[Protection, tuple[Layout, ...]]:
        """What protects a device's part in a round, and the layouts of the bands that it sends."""
        counting, evaluating = self.plan.counting, self.plan.evaluating
        wanted: SideSum | None = counting if round.index == PREPARATION else None
        if evaluating is not None and round.index == evaluating.index:
            wanted = evaluating
        if wanted is not None:
            return wanted.protection, wanted.layouts
        return self.plan.protection, self.federation.layouts[hosted.tier :]

    def _counted(self, counting: Counting, hosted: Hosted, round: Round) -> Upload:
        """What a user's history counts."""
        from privrec.device.samples import Histories

        root = self._keys.root
        data, protection = Histories.alone(hosted.user, hosted.history), counting.protection
        seeds = protection.noise_seeds(root, round, 1, hosted.user)
        bounded = counting.bounded(data, root, round)
        return bounded.upload(counting.layouts, protection.shares, seeds)

    def _evaluated(
        self,
        evaluating: Evaluating,
        hosted: Hosted,
        round: Round,
        told: Any,
        body: Mapping[str, Any],
    ) -> Upload:
        """What a user finds of the model after the last round, fitted to it from nothing."""
        from privrec.device.samples import Histories
        from privrec.evaluate.evaluator import figures

        weights, ordered = self._sent(told[-1], body)
        held = replace(round, model_digests=tuple(told[3]))  # those that the round is bound to
        model = self._model(held, hosted.tier, weights, *ordered)
        _, learner = self._tier(hosted.tier, *ordered)
        items = [hosted.history, hosted.heldout]
        if self.plan.counting is not None:
            items = [self._places(*ordered)[each] for each in items]
        data, heldout = (Histories.alone(hosted.user, each) for each in items)
        run, view = self.scenario.run, model.weights
        found = figures(cast("Any", learner), view, data, heldout, self._items, run)
        protection = evaluating.protection
        seeds = protection.noise_seeds(self._keys.root, round, 1, hosted.user)
        return evaluating.bounded(found).upload(evaluating.layouts, protection.shares, seeds)

    def _sent(
        self, order: Any, body: Mapping[str, Any]
    ) -> tuple[bytes, tuple[bytes, bytes | None]]:
        """The model of a message, and the order of items in it with the digest it must have."""
        weights, size = body.get("weights"), self.federation.layout.size
        if type(weights) is not bytes or len(weights) != 4 * size:
            raise ReleaseRefused(
                f"a model that has not the scenario's {size} coefficients; nothing is answered"
            )
        if self.plan.counting is None:
            return weights, (b"", None)
        sent = body.get("order")
        return weights, (sent if type(sent) is bytes else b"", order)

    def _trained(
        self,
        hosted: Hosted,
        round: Round,
        order: Any,
        kept: Mapping[str, Any],
        body: Mapping[str, Any],
    ) -> tuple[Upload, dict[str, Any]]:
        """A user's update, and what the device keeps then."""
        from privrec.device.device import Device, Draws

        history, (weights, ordered) = hosted.history, self._sent(order, body)
        if self.plan.counting is not None:
            history = self._places(*ordered)[history]
        # Another attempt at the same round begins where the first one did.
        now = [round.run_id, round.index]
        state = kept["before"] if kept.get("trained") == now else kept.get("state", b"")
        tier, learner = self._tier(hosted.tier, *ordered)
        layouts, root = self.federation.layouts_of(tier), self._keys.root
        own = np.frombuffer(state, np.float32).copy()
        kind = hosted.user, history, tier, layouts, learner, self.plan.protection, root
        device = Device(*kind, own)
        before, model = device.state.tobytes(), self._model(round, hosted.tier, weights, *ordered)
        trained = device.train(model, Draws.of(root, round, body.get("key", 0)))
        upload = device.upload(round, device.protect(round, trained))
        return upload, {"trained": now, "before": before, "state": device.state.tobytes()}

    def _plan(self) -> Plan:
        """The plan of the scenario; the noise that meets its ε is searched for once, and kept."""
        scenario, kept = self.scenario, self._keys.kept
        about = [privrec.__version__, scenario.plan_hash(), self._items]
        found, noise = kept.get(CALIBRATED, (None, None))
        known = noise if found == about else None
        plan = Plan.of(scenario, self._items, population_of(scenario), self.federation, known)
        kept[CALIBRATED] = [about, plan.event.noise_multiplier]
        return plan

    # Of a message, once for all devices that it is for.

    def _tier_of(self, index: int, sent: bytes, told: bytes | None) -> tuple[Tier, Learner]:
        """A tier, and what trains in its memory, under the order of items that was sent, if any."""
        from privrec.device.device import MANY
        from privrec.run.parties import learner_of

        tier, features = self.federation.tiers[index], self._features
        if len(self.hosted) >= MANY:  # a machine that plays many devices, and has room
            tier = replace(tier, model=tier.model.tabulated())
        if features is not None and told is not None:  # rows of the model are in the order
            features = features[np.argsort(self._places(sent, told))]
        own = self.federation, tier, self._items, self.plan.examples
        return tier, learner_of(self.scenario, *own, features=features)

    def _model_of(
        self, round: Round, index: int, weights: bytes, sent: bytes, told: bytes | None
    ) -> LocalModel[Any]:
        """What devices of a tier were sent, which is the model that their round names."""
        from privrec.device.device import received

        tier, learner = self._tier(index, sent, told)
        prefix = self.federation.prefix(np.frombuffer(weights, np.float32), tier)
        return received(round, prefix, tier, self.federation.layouts_of(tier), learner.view)

    def _places_in(self, packed: bytes, told: bytes) -> NDArray[np.int32]:
        """The place of each item in the order that all devices were told of."""
        return agreed_places(packed, self._items, told)

    def _digest_with(self, order: bytes) -> str:
        """What devices agree to with an order of the items, of that digest."""
        return replace(self.plan, order=order).digest


Described = tuple[list[Hosted], Federation, NDArray[np.float32] | None]


def _partition(scenario: Scenario, config: Mapping[str, Any]) -> Described:
    """Every n-th user of the data set, in the tier that the scenario's seed gives."""
    part, parts = config.get("partition-id"), config.get("num-partitions")
    if not (isinstance(part, int) and isinstance(parts, int) and 0 <= part < parts):
        raise UsageError(
            f"partition-id = {part}, num-partitions = {parts}: give both to host users of a data "
            "set, or history=FILE and catalogue=FILE to host one user"
        )
    folder = text_of(config, "data")
    split = data.load(scenario.data, data_dir=Path(folder) if folder else None)
    train, heldout = split.train, split.heldout
    federation = federation_of(scenario, train.n_items)
    tiers = assign(train.n_users, federation, scenario.run.seed)
    users = [u for u in range(part, train.n_users, parts) if tiers[u] < len(federation.tiers)]
    hosted = [
        Hosted(user, int(tiers[user]), train.history(user), heldout.history(user)) for user in users
    ]
    return hosted, federation, train.features


def _own(scenario: Scenario, config: Mapping[str, Any]) -> Described:
    """One user with a history of its own."""
    if getattr(scenario.data, "item_features", False):
        raise UsageError(
            "data.item_features = true: a node with a history of its own has no features of items; "
            'remove the key (set = "data.item_features=" in the run-config)'
        )
    catalogue = text_of(config, "catalogue")
    if catalogue is None:
        raise UsageError(
            "history is given without catalogue: add catalogue=FILE to --node-config, with the ids "
            "of all items, one a line, in the order that the server's catalogue has them"
        )
    items = read_catalogue(Path(catalogue))
    liked = read_history(Path(str(config["history"])), items)
    unknown = next((name for name in liked if name not in items), None)
    if unknown is not None:
        raise DataError(
            f"{config['history']}: item {unknown!r} is not in the catalogue {catalogue}; correct "
            "the id, or bring the catalogue up to date"
        )
    federation = federation_of(scenario, len(items))
    capacities = [tier.capacity for tier in federation.tiers]
    capacity = config.get("capacity", capacities[0])
    if capacity not in capacities:
        raise UsageError(f"capacity = {capacity}: the scenario's tiers have {capacities}; take one")
    numbers = np.array([items[name] for name in liked], np.int32)
    # The last one of a history, as leave-one-out has it, where the model is evaluated at all.
    heldout = numbers[len(numbers) - (scenario.privacy.evaluation_epsilon is not None) :]
    history = np.setdiff1d(numbers, heldout)
    user = int(config.get("number", 0))
    return [Hosted(user, capacities.index(capacity), history, heldout)], federation, None
