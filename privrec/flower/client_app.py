"""The client app: a node's devices behind Flower's messages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log

from privrec import data
from privrec.data.files import read_catalogue, read_history
from privrec.device.tier import Federation
from privrec.errors import DataError, PrivrecError, UsageError
from privrec.flower.app import scenario_of
from privrec.flower.enrol import ROOT, STATE, anchor_of, certificates_of
from privrec.flower.node import Hosted, Node
from privrec.flower.wire import CONFIRM, MASKED, REGISTER, SHARES, UNMASK, pack, summary, unpack
from privrec.randomness import ROOT_BYTES, SecretRoot
from privrec.run.assembly import assign, federation_of
from privrec.scenario.load import Scenario
from privrec.storage import replace

_STATE = "privrec"


def client_app(folder: Path) -> ClientApp:
    """A Flower ClientApp that hosts the devices of a node.

    What they are is said by ``--node-config``: ``partition-id`` and ``num-partitions`` for every
    so-manieth user of the scenario's data set (with ``data=PATH``), or ``history=FILE`` for one
    user's own items, one id a line, with ``catalogue=FILE`` that has all items, one id a line in
    the order of the model. ``keys=FOLDER`` has the node's secrets; without it they live as long as
    the run. ``roster=FILE`` or ``enrolment-key=HEX`` says whom the devices trust.

    Args:
        folder: where the app's scenario lies.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            node = node_of(folder, context)
            answer = node.answer(message.metadata.message_type, unpack(message))
        except PrivrecError as error:
            log(ERROR, "privrec: %s", error)
            answer = {"answers": {}, "refused": {}, "error": str(error)}
        if refused := answer.get("refused"):
            log(ERROR, "privrec: %s", summary(refused))
        return Message(pack(answer), reply_to=message)

    app.query(REGISTER.partition(".")[2])(handle)
    for exchange in (SHARES, MASKED, CONFIRM, UNMASK):
        app.train(exchange.partition(".")[2])(handle)
    return app


def node_of(folder: Path, context: Context) -> Node:
    """The node as its configuration and what it kept have it.

    Raises:
        UsageError: when the configuration contradicts itself, or there is no trust anchor.
        DataError: when a file is malformed.
    """
    config = {str(name): value for name, value in context.node_config.items()}
    scenario = scenario_of(folder, context.run_config)
    simulated = "history" not in config
    hosted, federation = _partition(scenario, config) if simulated else _own(scenario, config)
    anchor = anchor_of(_text(config, "roster"), _text(config, "enrolment-key"), simulated=simulated)
    keys = _text(config, "keys")
    kept = _Folder(Path(keys)) if keys else _InContext(context)
    certificates = certificates_of(Path(keys)) if keys else {}
    node = Node(
        scenario, federation, hosted, kept.root(), anchor, kept.save, certificates, simulated
    )
    state = kept.load()
    return node if state is None else node.restore(state)


class _InContext:
    """Secrets that Flower keeps for the node, for as long as the run lasts."""

    def __init__(self, context: Context) -> None:
        self._state = context.state

    def _record(self) -> ConfigRecord:
        if _STATE not in self._state.config_records:
            self._state[_STATE] = ConfigRecord({"root": os.urandom(ROOT_BYTES)})
        return self._state.config_records[_STATE]

    def root(self) -> SecretRoot:
        return SecretRoot(bytes(self._record()["root"]))

    def load(self) -> bytes | None:
        state = self._record().get("state")
        return None if state is None else bytes(state)

    def save(self, state: bytes) -> None:
        self._record()["state"] = state


class _Folder:
    """Secrets in a folder of the node's, which last over runs and restarts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def root(self) -> SecretRoot:
        return SecretRoot.load(self._folder / ROOT)

    def load(self) -> bytes | None:
        path = self._folder / STATE
        if not path.exists():
            # Prekeys would be issued, and rounds answered, a second time.
            raise UsageError(
                f"{path}: what this node's devices remember is gone, and its root is not; remove "
                "the folder, and enrol the node anew: privrec flower enroll"
            )
        return path.read_bytes() or None

    def save(self, state: bytes) -> None:
        replace(self._folder / STATE, state, mode=0o600)


def _partition(scenario: Scenario, config: Mapping[str, Any]) -> tuple[list[Hosted], Federation]:
    """Every so-manieth user of the data set, in the tier that the scenario's seed gives."""
    part, parts = config.get("partition-id"), config.get("num-partitions")
    if not (isinstance(part, int) and isinstance(parts, int) and 0 <= part < parts):
        raise UsageError(
            f"partition-id = {part}, num-partitions = {parts}: give both to host users of a data "
            "set, or history=FILE and catalogue=FILE to host one user"
        )
    folder = _text(config, "data")
    train = data.load(scenario.data, data_dir=Path(folder) if folder else None).train
    federation = federation_of(scenario, train.n_items)
    tiers = assign(train.n_users, federation, scenario.run.seed)
    users = [u for u in range(part, train.n_users, parts) if tiers[u] < len(federation.tiers)]
    return [Hosted(user, int(tiers[user]), train.history(user)) for user in users], federation


def _own(scenario: Scenario, config: Mapping[str, Any]) -> tuple[list[Hosted], Federation]:
    """One user with a history of its own."""
    catalogue = _text(config, "catalogue")
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
    tier, capacity = 0, config.get("capacity", federation.tiers[0].capacity)
    for each in federation.tiers:
        tier = each.index if each.capacity == capacity else tier
    if federation.tiers[tier].capacity != capacity:
        known = [each.capacity for each in federation.tiers]
        raise UsageError(f"capacity = {capacity}: the scenario's tiers have {known}; take one")
    history = np.unique(np.array([items[name] for name in liked], np.int32))
    return [Hosted(int(config.get("number", 0)), tier, history)], federation


def _text(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    return None if value in (None, "") else str(value)
