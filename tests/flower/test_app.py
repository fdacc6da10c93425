"""The recommender over Flower's messages: the same run as a simulated one, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import signal
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

pytest.importorskip("flwr", reason="needs the extra privrec[flower]")

from flwr.app import ConfigRecord, Message, RecordDict
from memory_grid import Loopback, context_of, never, stage_of

from privrec.cli.main import main
from privrec.device import samples
from privrec.device.update import digest
from privrec.errors import (
    BudgetError,
    DataError,
    IntegrityError,
    Interrupted,
    ReleaseRefused,
    UsageError,
)
from privrec.flower import server_app as server_module
from privrec.flower.app import out_of, scenario_of
from privrec.flower.client_app import CALIBRATED, Node, client_app
from privrec.flower.enrolment import Anyone, anchor_of, enroll
from privrec.flower.exchange import (
    MASKED,
    PREKEYS,
    RECORD,
    SHARES,
    UNMASK,
    Registry,
    keys_of,
    pack,
    unpack,
)
from privrec.flower.server_app import deploy
from privrec.privacy.ledger import PREPARATION, Ledger
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.report.render import to_markdown
from privrec.run import directory, lifecycle
from privrec.run.catalogue import CATALOGUE
from privrec.run.parties import server_of
from privrec.run.plan import Plan
from privrec.run.recommend import recommend
from privrec.run.record import WITHIN, Observer
from privrec.run.simulation import unmask
from privrec.scenario.load import Scenario, load
from privrec.search import hashing, select
from privrec.secagg.roster import Call
from privrec.secagg.server import SecureSum

SCENARIO = """
name = "over-flower"
[data]
users = 20
items = 60
clusters = 3
interactions_per_user = 8
[model]
dim = 8
block = 4
[devices]
population = 20
sampling = "everybody"
min_cohort = 5
tiers = [{ capacity = 1.0, share = 0.5 }, { capacity = 0.5, share = 0.5 }]
[train]
rounds = 3
loss = "full_softmax"
server_optimizer = "fedavg"
server_lr = 3.0
[privacy]
noise = "distributed"
clip_norm = 1.0
noise_multiplier = 2.0
delta = 1e-3
[run]
engine = "device"
footprint = false
"""
NODES, USERS = 4, 20
_PARTS = (
    'loss = "full_softmax"\nrank_power = 0.3\nselector = "pghash"\nselected = 0.5\nbudget = 0.4'
)
_RELEASED = 'popularity = "released"\npopularity_epsilon = 1.0\npopularity_items = 4'
ORDERED = SCENARIO.replace("min_cohort = 5", f"min_cohort = 5\n{_RELEASED}")
ORDERED = ORDERED.replace('loss = "full_softmax"', _PARTS)
ORDERED = ORDERED.replace("[model]", "[model]\nrank_features = true")
"""All parts together: capacities, an order that is released, tables of each device's own."""
EVALUATED = ORDERED.replace("delta =", "evaluation_epsilon = 40.0\ndelta =")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))


def app_folder(tmp_path: Path, text: str = SCENARIO) -> Path:
    folder = tmp_path / "app"
    folder.mkdir(exist_ok=True)
    (folder / "scenario.toml").write_text(text)
    return folder


def grid_of(folder: Path, parts: int = NODES, **more: Any) -> Loopback:
    app, lost = client_app(folder), more.pop("lost", lambda node, kind: False)
    configs = more.pop("configs", [{} for _ in range(parts)])
    run_config = more.pop("run_config", {})
    return Loopback(
        {
            10 + part: (
                app,
                context_of(
                    10 + part,
                    {"partition-id": part, "num-partitions": parts, **configs[part]},
                    run_config,
                ),
            )
            for part in range(parts)
        },
        lost,
    )


def deployed(folder: Path, grid: Loopback, out: Path, **words: Any) -> dict[str, Any]:
    words = {"items": 60, "wait_s": 0.2, **words}
    return deploy(load(folder / "scenario.toml"), grid, out=out, **words).payload


def known_nodes(grid: Loopback, key: bytes = b"k") -> Loopback:
    """Nodes that draw from the root that a known simulated run gives its devices."""
    for context in grid.contexts.values():
        context.state[RECORD] = ConfigRecord({"root": key + b"devices"})
    return grid


def node_of(folder: Path, config: dict[str, Any]) -> Node:
    context = context_of(10, config, {})
    with keys_of(context) as keys:
        return Node(folder, context, keys)


def tags(out: Path) -> list[tuple[Any, ...]]:
    entries = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    return [(e.get("round"), e.get("attempt"), e.get("tag")) for e in entries]


@pytest.mark.parametrize("text", [SCENARIO, ORDERED, EVALUATED], ids=["fold", "rows", "evaluated"])
@pytest.mark.parametrize("excess", ["true", "false"])
def test_a_run_over_flower_is_the_simulated_one_bit_for_bit(
    excess: str, text: str, tmp_path: Path
) -> None:
    folder = app_folder(tmp_path, text.replace("delta =", f"remove_excess = {excess}\ndelta ="))
    grid = known_nodes(grid_of(folder))
    deployed(folder, grid, tmp_path / "flower", unsafe_noise_key=b"k")
    scenario = Scenario.from_toml((folder / "scenario.toml").read_text())
    lifecycle.start(scenario, out=tmp_path / "here", observer=Observer(), unsafe_noise_key=b"k")
    one, two = (
        load_file(tmp_path / n / "model.safetensors")["weights"] for n in ("flower", "here")
    )
    assert one.tobytes() == two.tobytes()
    assert tags(tmp_path / "flower") == tags(tmp_path / "here")
    # Header, three charges and commits, and end; one more of each of the order, and of metrics.
    assert len(tags(tmp_path / "here")) == 8 + 2 * (text != SCENARIO) + 2 * (text == EVALUATED)
    if text == EVALUATED:
        told, known = (
            json.loads((tmp_path / n / "result.json").read_text()) for n in ("flower", "here")
        )
        assert told["metrics"]
        for part in ("metrics", "intervals"):
            assert told[part].items() <= known[part].items()
    if text != SCENARIO:
        first, second = (load_file(tmp_path / n / CATALOGUE)["order"] for n in ("flower", "here"))
        assert np.array_equal(first, second)


def test_a_deployed_report_has_an_accuracy_and_its_price(tmp_path: Path) -> None:
    folder = app_folder(tmp_path, EVALUATED)
    deployed(folder, grid_of(folder), tmp_path / "run")
    report = build(tmp_path / "run")
    assert [metric.key for metric in report.accuracy.metrics] == ["summed_hr@10", "summed_loss"]
    assert report.accuracy.note == WITHIN
    said = " ".join(to_markdown(report).split())
    assert "summed under masks with noise that was charged: ε covers these figures" in said
    assert re.search(r"alone they cost ε = (39\.\d\d|40\.00), and ε of all is with them", said)


def test_a_server_that_has_a_device_evaluate_another_model_gets_nothing_of_it(
    tmp_path: Path, flower_log: Any
) -> None:
    """By a model of its own choice, such as one that fits one item, it would ask about items."""
    folder = app_folder(tmp_path, EVALUATED)

    def lying(message: Message) -> Message:
        told, meta = unpack(message), message.metadata
        if meta.dst_node_id != 12 or told["stage"] != MASKED or "key" in told:
            return message
        if "weights" in told:  # not in the count of the items
            told["weights"] = bytes(len(told["weights"]))
        return Message(pack(told), meta.dst_node_id, meta.message_type)

    grid = grid_of(folder)
    grid.tampered = lying
    payload = deployed(folder, grid, tmp_path / "run", timeout_s=1.0)
    assert "the model received has another digest than the round's" in logged(flower_log)
    assert "summed_loss" in payload["metrics"]  # of the others
    *_, last = [
        unpack(reply)["answers"]
        for node, stage, _, reply in grid.seen
        if (node, stage) == (12, MASKED)
    ]
    assert not last


@pytest.mark.parametrize("ends", [False, True], ids=["no budget", "budget"])
def test_a_server_that_dies_while_metrics_are_summed_pays_for_another_sum(
    ends: bool, tmp_path: Path, flower_log: Any
) -> None:
    """With a target ε there is room for one, and the model stays without an accuracy."""
    budget = "epsilon = 60.0" if ends else "noise_multiplier = 2.0"
    folder = app_folder(tmp_path, EVALUATED.replace("noise_multiplier = 2.0", budget))
    out, grid, asked = tmp_path / "run", grid_of(folder), list[int]()

    def dying(message: Message) -> bool:
        if stage_of(message) == UNMASK:
            asked.append(1)
            if len(asked) > 4 * NODES:  # those of the count of the items and of three rounds
                raise KeyboardInterrupt
        return False

    grid.lost = dying
    with pytest.raises(Interrupted):
        deployed(folder, grid, out)
    rounds = [(PREPARATION, 0), *((n, 0) for n in range(3))]
    assert charged(out) == [*rounds, (3, 0)]
    assert not (out / "result.json").exists()
    grid.lost = lambda message: asked.append(1) is not None
    payload = deployed(folder, grid, out)
    assert payload["rounds"] == 3
    assert charged(out) == [*rounds, (3, 0), *([] if ends else [(3, 1)])]
    assert bool(payload["metrics"]) is not ends
    assert ("the evaluation would bring ε" in str(payload["gaps"])) is ends
    assert build(out).privacy.charges == len(charged(out))
    asked.clear()
    assert deployed(folder, grid, out)["rounds"] == 3
    assert not asked
    assert "which is shown as it is: nothing is trained" in logged(flower_log)
    assert build(out).privacy.charges == len(charged(out))


def test_devices_give_no_metrics_that_their_scenario_does_not_release(
    tmp_path: Path, flower_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = app_folder(tmp_path), load(app_folder(tmp_path) / "scenario.toml")
    agreed, grid = other.plan_hash(), grid_of(folder)
    asking = Scenario.from_toml(
        EVALUATED.replace(_RELEASED, "")
        .replace(_PARTS, 'loss = "full_softmax"')
        .replace("rank_features = true", "")
    )
    monkeypatch.setattr(Scenario, "plan_hash", lambda _: agreed)  # it lies about the plan
    payload = deploy(asking, grid, out=tmp_path / "run", items=60, wait_s=0.2).payload
    assert "this device agreed to other ones" in logged(flower_log)
    assert not payload["metrics"]
    assert "the secure sum of metrics" in payload["gaps"]


def test_nodes_weigh_features_in_the_order_that_was_released(tmp_path: Path) -> None:
    """A node reads what films are in the order of its files, and its model has another."""
    films, rng = tmp_path / "films", np.random.default_rng(0)
    films.mkdir()
    rated = {(user, item) for user in range(20) for item in rng.permutation(60)[:9].tolist()}
    rated |= {(item % 20, item) for item in range(60)}
    lines = [f"{user + 1}::{item + 1}::3::{at}" for at, (user, item) in enumerate(sorted(rated))]
    (films / "ratings.dat").write_text("\n".join(lines) + "\n")
    genres = ("Drama", "Comedy|Drama", "War", "")
    text = "".join(f"{n + 1}::Film ({1930 + n})::{genres[n % 4]}\n" for n in range(60))
    (films / "movies.dat").write_text(text)
    start, end = ORDERED.index("[data]"), ORDERED.index("[model]")
    described = f'[data]\nsource = "ml-1m"\npath = "{films}"\nitem_features = true\n'
    folder = app_folder(tmp_path, ORDERED[:start] + described + ORDERED[end:])
    grid = known_nodes(grid_of(folder))
    deployed(folder, grid, tmp_path / "flower", unsafe_noise_key=b"k")
    scenario = load(folder / "scenario.toml")
    lifecycle.start(scenario, out=tmp_path / "here", observer=Observer(), unsafe_noise_key=b"k")
    one, two = (
        load_file(tmp_path / n / "model.safetensors")["weights"] for n in ("flower", "here")
    )
    assert one.tobytes() == two.tobytes()


def test_a_node_that_is_lost_in_the_midst_of_a_round_drops_out(tmp_path: Path) -> None:
    """A quarter of the users vanish after they dealt shares; then another time after masking."""
    folder = app_folder(tmp_path)
    gone: set[int] = set()

    def lost(node: int, kind: str) -> bool:
        if kind == MASKED and node == 12:
            gone.add(node)
        return node in gone

    grid = grid_of(folder, lost=lost)
    payload = deployed(folder, grid, tmp_path / "run")
    assert payload["rounds"] == 3
    assert payload["metrics"] == {}
    with Ledger.open(tmp_path / "run/ledger.jsonl") as ledger:
        assert len(ledger.charges) == 3
    assert build(tmp_path / "run").privacy.private
    found = recommend(tmp_path / "run", user="3", k=5)
    assert len(found) == 5


def test_devices_of_a_node_that_is_gone_are_not_called_again(tmp_path: Path) -> None:
    """In a sparse graph the loss of a quarter ends an attempt, and would end all that follow."""
    folder = app_folder(tmp_path)
    grid = grid_of(folder)

    def lost(message: Message) -> bool:
        node = message.metadata.dst_node_id
        if node == 12 and stage_of(message) == MASKED:
            grid.configs = {each: config for each, config in grid.configs.items() if each != 12}
        return node not in grid.configs

    grid.lost = lost
    assert deployed(folder, grid, tmp_path / "run")["rounds"] == 3
    called = [m.metadata.dst_node_id for m in grid.sent if stage_of(m) == SHARES]
    assert [called.count(node) for node in (10, 11, 12, 13)] == [3, 3, 1, 3]


def test_two_nodes_lost_are_too_many_and_the_round_is_charged_all_the_same(tmp_path: Path) -> None:
    folder = app_folder(tmp_path)
    grid = grid_of(folder, lost=lambda node, kind: node >= 12 and kind == UNMASK)
    with pytest.raises(ReleaseRefused):
        deployed(folder, grid, tmp_path / "run")
    with Ledger.open(tmp_path / "run/ledger.jsonl") as ledger:
        assert len(ledger.charges) == 20
        assert ledger.committed(0, 0) is None


def charged(out: Path) -> list[tuple[int, int]]:
    with Ledger.open(out / "ledger.jsonl") as ledger:
        return [(charge.round, charge.attempt) for charge in ledger.charges]


def test_a_node_that_is_lost_while_items_are_counted_is_not_in_the_counts(tmp_path: Path) -> None:
    folder, gone = app_folder(tmp_path, ORDERED), set[int]()

    def lost(node: int, stage: str | None) -> bool:
        if stage == MASKED and node == 12:
            gone.add(node)
        return node in gone

    payload = deployed(folder, grid_of(folder, lost=lost), tmp_path / "run")
    assert payload["rounds"] == 3
    assert charged(tmp_path / "run")[0] == (PREPARATION, 0)
    report = build(tmp_path / "run")
    assert report.privacy.private
    assert {event.mechanism for event in report.privacy.events} == {"discrete_gaussian"}
    assert len(recommend(tmp_path / "run", user="3", k=5)) == 5


@pytest.mark.parametrize("moment", ["asked", "committed"])
def test_a_server_that_dies_while_items_are_counted_pays_for_another_count(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = app_folder(tmp_path, ORDERED), tmp_path / "run"
    first = grid_of(folder)

    def dying(*_: Any) -> bool:
        raise Died

    with monkeypatch.context() as patch:
        if moment == "asked":
            first.lost = lambda message: stage_of(message) == UNMASK and dying()
        else:
            patch.setattr(server_module, "write_order", dying)
        with pytest.raises(Died):
            deployed(folder, first, out)
    assert charged(out) == [(PREPARATION, 0)]
    assert not (out / CATALOGUE).exists()
    first.lost = never
    assert deployed(folder, first, out)["rounds"] == 3
    assert charged(out) == [(PREPARATION, 0), (PREPARATION, 1), *((n, 0) for n in range(3))]
    report = build(out)
    assert report.privacy.charges == 5


def test_a_run_with_an_order_goes_on_with_that_order(tmp_path: Path) -> None:
    folder, out, calls = app_folder(tmp_path, ORDERED), tmp_path / "run", list[int]()

    def dying(message: Message) -> bool:
        calls.append(stage_of(message) == UNMASK)
        if sum(calls) > 2 * NODES:  # of the second round
            raise Died
        return False

    grid = grid_of(folder)
    grid.lost = dying
    with pytest.raises(Died):
        deployed(folder, grid, out)
    order = (out / CATALOGUE).read_bytes()
    grid.lost = never
    assert deployed(folder, grid, out)["rounds"] == 3
    assert (out / CATALOGUE).read_bytes() == order
    assert charged(out) == [(PREPARATION, 0), (0, 0), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({MASKED}, "not the one that the round is bound to"),
        ({SHARES, MASKED}, "this device agreed to other ones"),
        ({SHARES}, "this device agreed to other ones"),
    ],
    ids=["order", "order and digest", "digest"],
)
def test_a_server_that_gives_devices_another_order_gets_nothing_of_them(
    stages: set[str], says: str, tmp_path: Path, flower_log: Any
) -> None:
    """By rows of its own choice it could tell a device's part of the sum from all others'."""
    folder, other = app_folder(tmp_path, ORDERED), np.arange(60)

    def lying(message: Message) -> Message:
        told, meta = unpack(message), message.metadata
        if meta.dst_node_id != 12 or told["stage"] not in stages or "order" not in told:
            return message
        told["order"] = digest(other) if told["stage"] == SHARES else other.tobytes()
        return Message(pack(told), meta.dst_node_id, meta.message_type)

    grid = grid_of(folder)
    grid.tampered = lying
    deployed(folder, grid, tmp_path / "run", timeout_s=1.0)
    assert says in logged(flower_log)
    answered = [
        unpack(reply)["answers"]
        for node, stage, asked, reply in grid.seen
        if (node, stage) == (12, MASKED) and "order" in unpack(asked)
    ]
    assert not any(answered)


class Died(Exception):
    """The server's process ends."""


def test_a_stopped_run_goes_on_and_no_noise_is_drawn_with_two_values(tmp_path: Path) -> None:
    """The server dies in the midst of a round, and a new one with the same directory goes on."""
    folder, keys = app_folder(tmp_path), [tmp_path / f"keys{part}" for part in range(NODES)]
    for part, each in enumerate(keys):
        enroll(each, range(part, USERS, NODES), tmp_path / "roster", None)
    configs = [{"keys": str(each), "roster": str(tmp_path / "roster")} for each in keys]

    calls = {"masked": 0}

    def dying(node: int, kind: str) -> bool:
        calls["masked"] += kind == MASKED
        if calls["masked"] == 6:  # in the second round, after some devices masked
            raise Died
        return False

    first = grid_of(folder, configs=configs, lost=dying)
    with pytest.raises(Died):
        deployed(folder, first, tmp_path / "run")
    second = grid_of(folder, configs=configs)
    payload = deployed(folder, second, tmp_path / "run")
    assert payload["rounds"] == 3
    with Ledger.open(tmp_path / "run/ledger.jsonl") as ledger:
        # The devices refused the attempt that they had answered, so another one was charged.
        assert [(c.round, c.attempt) for c in ledger.charges] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    masked: dict[tuple[Any, ...], bytes] = {}
    for grid in (first, second):
        current: dict[int, Any] = {}
        for node, kind, asked, reply in grid.seen:
            if kind == SHARES:
                (call, *_) = unpack(asked)["messages"].values()
                current[node] = (Call.parse(call).round, Call.parse(call).attempt)
            if kind != MASKED:
                continue
            for name, answer in unpack(reply)["answers"].items():
                assert masked.setdefault((name, *current[node]), answer) == answer
    assert len({place[1:] for place in masked}) == 4


def test_another_scenario_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    folder = app_folder(tmp_path)

    def dying(node: int, stage: str | None) -> bool:
        if stage == UNMASK:
            raise Died
        return False

    with pytest.raises(Died):
        deployed(folder, grid_of(folder, lost=dying), tmp_path / "run")
    other = app_folder(tmp_path, SCENARIO.replace("rounds = 3", "rounds = 4"))
    with pytest.raises(UsageError, match="another scenario"):
        deployed(other, grid_of(other), tmp_path / "run")


# --------------------------------------------------------------------------- refusals


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> Any:
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_node_with_another_scenario_is_left_out(tmp_path: Path, flower_log: Any) -> None:
    folder = app_folder(tmp_path)
    grid = grid_of(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "scenario.toml").write_text(SCENARIO.replace("dim = 8", "dim = 16"))
    grid.put(13, client_app(other), grid.contexts[13])
    payload = deployed(folder, grid, tmp_path / "run")
    assert payload["rounds"] == 3
    assert "node 13 is left out: it has another scenario" in logged(flower_log)


def test_devices_refuse_a_cohort_with_one_that_is_not_enrolled(
    tmp_path: Path, flower_log: Any
) -> None:
    folder, roster = app_folder(tmp_path), tmp_path / "roster"
    keys = [tmp_path / f"keys{part}" for part in range(NODES)]
    for part, each in enumerate(keys):
        enroll(each, range(part, USERS, NODES), roster if part else tmp_path / "elsewhere", None)
    configs = [{"keys": str(each), "roster": str(roster)} for each in keys]
    with pytest.raises(ReleaseRefused):
        deployed(folder, grid_of(folder, configs=configs), tmp_path / "run")
    assert "no enrolled device signed this prekey" in logged(flower_log)
    # A server that has the roster leaves the stranger out, and the others go on.
    fresh = [tmp_path / f"fresh{part}" for part in range(NODES)]
    for part, each in enumerate(fresh):
        enroll(each, range(part, USERS, NODES), roster if part else tmp_path / "elsewhere", None)
    configs = [{"keys": str(each), "roster": str(roster)} for each in fresh]
    anchor = anchor_of({"roster": str(roster)})
    payload = deployed(folder, grid_of(folder, configs=configs), tmp_path / "second", anchor=anchor)
    assert payload["rounds"] == 3


def test_an_office_certifies_devices(tmp_path: Path) -> None:
    folder = app_folder(tmp_path)
    keys = [tmp_path / f"keys{part}" for part in range(NODES)]
    for part, each in enumerate(keys):
        enroll(each, range(part, USERS, NODES), None, tmp_path / "office")
    public = str(tmp_path / "office.pub")
    configs = [{"keys": str(each), "enrolment-key": public} for each in keys]
    assert deployed(folder, grid_of(folder, configs=configs), tmp_path / "run")["rounds"] == 3
    enroll(tmp_path / "other", [0], None, tmp_path / "other office")
    wrong = [{**config, "enrolment-key": str(tmp_path / "other office.pub")} for config in configs]
    with pytest.raises(ReleaseRefused):
        deployed(folder, grid_of(folder, configs=wrong), tmp_path / "refused")
    (keys[0] / "state").unlink()
    with pytest.raises(UsageError, match="enrol the node anew"):
        node_of(folder, {**configs[0], "partition-id": 0, "num-partitions": 4})


def test_a_server_that_swaps_keys_is_refused(tmp_path: Path, flower_log: Any) -> None:
    """It puts devices of its own in the place of others; honest devices hold the roster."""
    folder, roster = app_folder(tmp_path), tmp_path / "roster"
    configs = []
    for part in range(NODES):
        enroll(tmp_path / f"keys{part}", range(part, USERS, NODES), roster, None)
        configs.append({"keys": str(tmp_path / f"keys{part}"), "roster": str(roster)})
    grid = grid_of(folder, configs=configs)
    mine = grid_of(folder)  # the server's own devices, under fresh keys
    for node in (10, 11):
        grid.put(node, client_app(folder), mine.contexts[node])
    with pytest.raises(ReleaseRefused):
        deployed(folder, grid, tmp_path / "run")
    assert "no enrolled device signed this prekey" in logged(flower_log)


def test_a_node_keeps_the_noise_of_its_own_scenario_alone(tmp_path: Path) -> None:
    context = context_of(10, {"partition-id": 0, "num-partitions": NODES}, {})
    for epsilon in (8.0, 8.0, 4.0):
        text = SCENARIO.replace("noise_multiplier = 2.0", f"epsilon = {epsilon}")
        with keys_of(context) as keys:
            node = Node(app_folder(tmp_path, text), context, keys)
        plan = Plan.of(Scenario.from_toml(text), 60, USERS)
        assert node.plan.event == plan.event
        assert keys.kept[CALIBRATED][1] == plan.event.noise_multiplier


def test_a_server_that_plans_less_noise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flower_log: Any
) -> None:
    folder = app_folder(tmp_path)
    grid = grid_of(folder)
    lowered = Scenario.from_toml(SCENARIO.replace("= 2.0", "= 1.0"))
    agreed = Scenario.from_toml(SCENARIO).plan_hash()
    monkeypatch.setattr(Scenario, "plan_hash", lambda _: agreed)  # it lies about the plan
    with pytest.raises(ReleaseRefused):
        deploy(lowered, grid, out=tmp_path / "run", items=60, wait_s=0.2)
    assert "this device agreed to other ones" in logged(flower_log)


def test_a_device_of_its_own_needs_an_anchor(tmp_path: Path) -> None:
    folder = app_folder(tmp_path)
    (tmp_path / "liked").write_text("a\nc\n")
    (tmp_path / "catalogue").write_text("\n".join("abcd" * 1) + "\n")
    config = {"history": str(tmp_path / "liked"), "catalogue": str(tmp_path / "catalogue")}
    with pytest.raises(UsageError, match="no trust anchor"):
        node_of(folder, config)
    enroll(tmp_path / "keys", [7], tmp_path / "roster", None)
    config |= {"keys": str(tmp_path / "keys"), "roster": str(tmp_path / "roster"), "number": 7}
    node = node_of(folder, config)
    assert [(h.user, h.tier, h.history.tolist()) for h in node.hosted] == [(7, 0, [0, 2])]
    assert not node.simulated
    node = node_of(folder, config | {"capacity": 0.5})
    assert node.hosted[0].tier == 1
    assert not len(node.hosted[0].heldout)
    folder = app_folder(tmp_path, EVALUATED)
    (told,) = node_of(folder, config).hosted  # the last one is what it is evaluated by
    assert (told.history.tolist(), told.heldout.tolist()) == ([0], [2])
    folder = app_folder(tmp_path)
    for bad, kind, says in (
        ({"capacity": 0.3}, UsageError, "capacity = 0.3"),
        ({"catalogue": ""}, UsageError, "without catalogue"),
        ({"history": str(tmp_path / "nothing")}, DataError, "could not be read"),
        ({"roster": str(tmp_path / "nothing")}, UsageError, "could not be read"),
        ({"enrolment-key": "12"}, UsageError, "both given"),
        ({"roster": "", "enrolment-key": "12"}, UsageError, "64 hexadecimal"),
    ):
        with pytest.raises(kind, match=says):
            node_of(folder, config | bad)
    (tmp_path / "liked").write_text("z\n")
    with pytest.raises(DataError, match="'z' is not in the catalogue"):
        node_of(folder, config)


def test_what_a_history_has_is_not_in_an_error_that_the_server_reads(
    tmp_path: Path, flower_log: Any
) -> None:
    folder, keys, roster = app_folder(tmp_path), tmp_path / "keys", tmp_path / "roster"
    (tmp_path / "liked").write_text("a\nrare-illness\n")
    (tmp_path / "catalogue").write_text("a\nb\n")
    enroll(keys, [0], roster, None)
    names = {"history": "liked", "catalogue": "catalogue", "keys": "keys", "roster": "roster"}
    config = {name: str(tmp_path / file) for name, file in names.items()}
    grid = Loopback({10: (client_app(folder), context_of(10, config, {}))})
    reply = grid.ask(Message(pack({"stage": PREKEYS, "count": 1}), 10, "train"))
    assert reply.error.reason.startswith("privrec: DataError, whose text")
    assert "rare-illness" not in reply.error.reason
    assert "rare-illness" in logged(flower_log)  # the node's own


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("devices.population=", "population is unset"),
        ("privacy.noise=central", "trusts a server"),
        ("devices.popularity=public", "counts in the data, which are on the devices"),
        (
            "privacy.noise=none; privacy.noise_multiplier=; devices.popularity=released; "
            "devices.popularity_epsilon=1.0",
            "the server would have the counts before their noise",
        ),
    ],
)
def test_what_cannot_be_deployed_is_refused(change: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        scenario_of(app_folder(tmp_path), {"set": f"train.rounds=2; {change}"})


def test_messages_that_are_none_of_ours_are_answered_with_an_error(tmp_path: Path) -> None:
    grid = grid_of(app_folder(tmp_path))
    for content in (
        RecordDict(),
        pack({"stage": SHARES, "messages": {"name": b""}}),
        pack({"stage": SHARES, "messages": [b""]}),
        pack({"stage": "nonesuch"}),
        pack({"stage": PREKEYS, "count": -1}),
    ):
        message = Message(content=content, dst_node_id=10, message_type="train")
        (reply,) = grid.send_and_receive([message])
        assert reply.error.reason.startswith("privrec: ")


def test_a_model_that_is_none_is_refused_by_each_device(tmp_path: Path) -> None:
    grid = grid_of(app_folder(tmp_path))
    deployed(tmp_path / "app", grid, tmp_path / "run")
    told = next(asked for node, stage, asked, _ in grid.seen if (node, stage) == (10, SHARES))
    for model in (None, b"", [], [b""], [b"", "x"], [b""] * 3):
        message = Message(pack({**unpack(told), "model": model}), 10, "train")
        reply = unpack(grid.ask(message))
        assert not reply["answers"]
        assert "digests of the model that are none" in reply["refused"]


def test_noise_is_that_of_the_attempt_whose_masks_cover_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that tells of an attempt beside the call of the next one gets fresh noise all over.

    With the same noise in two sums of a round, their difference would show a drop-out without any;
    with the same seeds, what is opened for one sum would take the noise off the other.
    """
    folder = app_folder(tmp_path)
    scenario = load(folder / "scenario.toml")
    plan, grid, opened = Plan.of(scenario, 60, USERS), grid_of(folder), []
    server = server_of(plan, "run")
    rounds = [server.next_round(attempt) for attempt in (0, 1)]
    first = {**vars(rounds[0]), "event": rounds[0].event.to_json()}
    beside = {**first, "run": "run", "round": first}

    def lying(message: Message) -> Message:
        told = {**beside, **unpack(message)}
        meta = message.metadata
        return Message(pack(told), meta.dst_node_id, meta.message_type)

    def watched(result: SecureSum, *arguments: Any) -> Any:
        opened.append({seed for band in result.excess for seed in band})
        return unmask(result, *arguments)

    grid.tampered = lying
    monkeypatch.setattr(server_module, "unmask", watched)
    registry = Registry(grid, Anyone(), 2, wait_s=0.2, tiers=2)
    registry.register(USERS)
    flower = server_module.Flower(registry, plan, SecretRoot(bytes(32)))
    one, two = (flower.collect(round, server.weights).total for round in rounds)
    assert [len(each) for each in opened] == [6 + 3] * 2  # beyond the fewest, of both bands
    assert opened[0].isdisjoint(opened[1])
    shares = plan.protection.shares
    assert shares is not None
    kept = shares.share_variance(0) * shares.kept(0, USERS)
    # All train alike in both attempts: what differs is the noise, and half a step of rounding.
    assert np.mean((one - two) ** 2) == pytest.approx(2 * float(kept), rel=0.3)


def test_nothing_of_a_history_travels_in_clear(tmp_path: Path) -> None:
    """Masked vectors are uniform, and no message has a history or a private state."""
    folder = app_folder(tmp_path)
    grid = grid_of(folder)
    deployed(folder, grid, tmp_path / "run")
    entries = b"".join(
        answer[36 : 36 + 4 * 200]
        for _, kind, _, reply in grid.seen
        if kind == MASKED
        for answer in unpack(reply)["answers"].values()
    )
    top = np.frombuffer(entries, np.uint8)
    share = np.unpackbits(top).mean()
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(8 * len(top))


SELECTIVE = SCENARIO.replace(
    'loss = "full_softmax"', 'loss = "softmax"\nselector = "hamming"\nbudget = 0.5'
)


def test_hash_functions_and_what_they_found_are_in_no_message_of_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte that a node sends, looked through for its functions and for the items it chose."""
    secrets: list[bytes] = []
    draw, choose = hashing.signature, samples.select

    def watched_functions(*arguments: Any) -> Any:
        drawn = draw(*arguments)
        secrets.extend(drawn.matrix[:, column].tobytes() for column in range(0, 256, 64))
        return drawn

    def watched_choice(*arguments: Any, **words: Any) -> Any:
        chosen = choose(*arguments, **words)
        kinds = (np.int64, np.int32, np.uint16)
        secrets.extend(chosen.astype(kind).tobytes() for kind in kinds)
        secrets.append(msgpack.packb(chosen.tolist()))
        return chosen

    for module in (hashing, select):
        monkeypatch.setattr(module, "signature", watched_functions)
    monkeypatch.setattr(samples, "select", watched_choice)
    folder = app_folder(tmp_path, SELECTIVE)
    grid = grid_of(folder)
    deployed(folder, grid, tmp_path / "run")

    sent = [body for _, _, _, reply in grid.seen for body in bodies(reply.content)]
    wanted = {secret for secret in secrets if len(secret) >= 12}
    assert len(wanted) > 100
    assert not [1 for one in sent for secret in wanted if secret in one]
    # A node that did tell would be found.
    told = pack({"answers": {"3": next(iter(wanted))}})
    assert any(secret in body for body in bodies(told) for secret in wanted)


def bodies(content: RecordDict) -> list[bytes]:
    """All bytes that a message carries."""
    assert set(content) == set(content.array_records) == {RECORD}
    return [array.data for array in content[RECORD].values()]


def test_a_finished_run_is_shown_for_its_own_scenario_alone(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"
    payload = deployed(folder, grid_of(folder), out)
    assert deployed(folder, grid_of(folder), out) == payload
    louder = SCENARIO.replace("noise_multiplier = 2.0", "noise_multiplier = 3.0")
    assert louder != SCENARIO
    other = app_folder(tmp_path, louder)
    with pytest.raises(UsageError, match="a run of another scenario"):
        deployed(other, grid_of(other), out)
    app_folder(tmp_path)
    (out / "result.json").write_text("{}")
    with pytest.raises(IntegrityError, match="not a signed result"):
        deployed(folder, grid_of(folder), out)


def test_out_is_a_place_of_the_machine_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "theirs"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for out in ("~/runs/mine", "runs/mine", str(tmp_path / "theirs" / "runs" / "mine")):
        assert out_of({"out": out}) == tmp_path / "theirs" / "runs" / "mine"
    for unset in ({}, {"out": ""}):
        with pytest.raises(UsageError, match="out is unset"):
            out_of(unset)


def test_a_finished_run_is_said_to_be_an_old_one(tmp_path: Path, flower_log: Any) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"
    deployed(folder, grid_of(folder), out)
    assert "nothing is trained" not in flower_log.text
    grid = grid_of(folder)
    deployed(folder, grid, out)
    assert not grid.sent
    assert f"{out} has the finished run of this scenario" in flower_log.text
    assert "nothing is trained. For another run name another out" in flower_log.text


def test_a_simulated_run_is_not_shown_as_a_deployed_one(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"
    lifecycle.start(load(folder / "scenario.toml"), out=out, observer=Observer())
    with pytest.raises(UsageError, match="a simulated run lies there"):
        deployed(folder, grid_of(folder), out)


def test_a_run_over_another_catalogue_is_not_shown_as_this_one(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"
    deployed(folder, grid_of(folder), out)
    with pytest.raises(UsageError, match="'items': 60.* lies there, .* over .*'items': 61"):
        deployed(folder, grid_of(folder), out, items=61)


def test_advice_fits_where_a_run_lives(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"

    def dying(node: int, stage: str | None) -> bool:
        if stage == UNMASK:
            raise Died
        return False

    with pytest.raises(Died):
        deployed(folder, grid_of(folder, lost=dying), out)
    here = f"flwr run, with out={re.escape(str(out))} in its run-config"
    for refused in (
        lambda: lifecycle.resume(out, observer=Observer()),
        lambda: build(out),
        lambda: recommend(out, user="3"),
        lambda: directory.refuse_taken(out),
        lambda: lifecycle.start(load(folder / "scenario.toml"), out=out, observer=Observer()),
    ):
        with pytest.raises(UsageError, match=here):
            refused()
    done = CliRunner().invoke(main, ["run", str(folder / "scenario.toml"), "--out", str(out)])
    assert done.exit_code == 2
    assert "flwr run, with" in " ".join(done.output.split())
    payload = deployed(folder, grid_of(folder), out)
    assert lifecycle.resume(out, observer=Observer()).payload == payload


ROWS = """
[[rows]]
name = "louder"
set = { "privacy.noise_multiplier" = 3.0 }
"""


def test_rows_are_not_simulated_beside_what_nodes_trained(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path, SCENARIO + ROWS), tmp_path / "run"
    deployed(folder, grid_of(folder), out)
    done = CliRunner().invoke(main, ["resume", str(out)])
    assert done.exit_code == 0, done.output
    assert not (out / "rows").exists()


# --------------------------------------------------------------------------- stops and budgets


def served(folder: Path, grid: Loopback, out: Path, settings: str = "") -> None:
    """The generated app's server, as Flower calls it."""
    words = {"out": str(out), "wait-s": 0.2, "set": settings}
    for node, context in grid.contexts.items():
        grid.contexts[node] = context_of(node, context.node_config, words)
    server_module.server_app(folder)(grid, context_of(1, {}, words))


def dropping(attempts: int) -> Any:
    """Nobody unmasks in the first attempts of a run."""
    seen = []

    def lost(node: int, stage: str | None) -> bool:
        if stage == SHARES and node == 10:
            seen.append(node)
        return stage == UNMASK and len(seen) <= attempts

    return lost


BUDGET = SCENARIO.replace("noise_multiplier = 2.0", "epsilon = 8.0")


def test_a_budget_that_ends_a_run_ends_it_in_words_and_a_report(
    tmp_path: Path, flower_log: Any
) -> None:
    folder, out = app_folder(tmp_path, BUDGET), tmp_path / "run"
    served(folder, grid_of(folder, lost=dropping(1)), out)
    assert "round 3 would bring ε to" in flower_log.text
    assert "Stopped after 2 rounds; the model so far is in" in flower_log.text
    assert (out / "report.html").is_file()
    report = build(out)
    assert report.privacy.charges == 3
    assert report.privacy.adversaries[0].epsilon <= 8
    assert json.loads((out / "result.json").read_text())["rounds"] == 2


def test_a_deployed_run_leaves_what_a_simulated_one_leaves(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"
    served(folder, grid_of(folder), out, "train.rounds=1")
    words = ["run", str(folder / "scenario.toml"), "-s", "train.rounds=1"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "here")])
    assert done.exit_code == 0, done.output
    names = [{path.name for path in run.iterdir()} for run in (out, tmp_path / "here")]
    assert names[1] - names[0] == {CATALOGUE}  # the server of a deployment knows no items
    assert names[0] <= names[1]


def test_spare_attempts_keep_the_last_round(tmp_path: Path) -> None:
    folder, out = app_folder(tmp_path, BUDGET), tmp_path / "run"
    served(folder, grid_of(folder, lost=dropping(1)), out, "privacy.spare_attempts=1")
    assert json.loads((out / "result.json").read_text())["rounds"] == 3
    report = build(out)
    assert report.privacy.charges == 4
    assert 7.9 < report.privacy.adversaries[0].epsilon <= 8


def test_a_budget_that_ends_a_run_before_its_first_round_is_no_success(
    tmp_path: Path, flower_log: Any
) -> None:
    folder, out = app_folder(tmp_path, BUDGET), tmp_path / "run"
    with pytest.raises(BudgetError, match="No round released a sum, so there is no trained model"):
        served(folder, grid_of(folder, lost=dropping(9)), out)
    assert (out / "report.html").is_file()  # of what was spent
    for again in (
        lambda: served(folder, grid_of(folder), out),
        lambda: lifecycle.resume(out, observer=Observer()),
    ):
        with pytest.raises(BudgetError, match="ended at its budget before one round"):
            again()
    with pytest.raises(UsageError, match="so it has no trained model"):
        recommend(out, user="3")


def test_an_interrupt_in_mid_round_ends_in_words_and_at_once(
    tmp_path: Path, flower_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round could not be ended: Flower stops the run, or the SuperLink is gone."""
    folder, out, seen = app_folder(tmp_path, BUDGET), tmp_path / "run", []

    def stopping(node: int, stage: str | None) -> bool:
        if stage == MASKED and (out / "events.jsonl").read_text().count("round") > 2:
            signal.raise_signal(signal.SIGINT)
        return False

    def flowers(number: int, _: Any) -> None:
        seen.append(number)
        raise SystemExit

    before = signal.signal(signal.SIGINT, flowers)
    try:
        grid = grid_of(folder, lost=stopping)
        with pytest.raises(SystemExit):
            served(folder, grid, out)
        assert signal.getsignal(signal.SIGINT) is flowers
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
    assert stage_of(grid.sent[-1]) == MASKED
    assert f"stopped after round 1 of 3; go on with: flwr run, with out={out}" in flower_log.text
    with Ledger.open(out / "ledger.jsonl") as ledger:
        assert [(c.round, c.attempt) for c in ledger.charges] == [(0, 0), (1, 0)]
    served(folder, grid_of(folder), out)
    assert json.loads((out / "result.json").read_text())["rounds"] == 3


def test_a_report_that_cannot_be_written_does_not_unmake_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flower_log: Any
) -> None:
    folder, out = app_folder(tmp_path), tmp_path / "run"
    words = {"out": str(out), "wait-s": 0.2, "set": "train.rounds=1"}

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(server_module, "write", fails)
        server_module.server_app(folder)(
            grid_of(folder, run_config=words), context_of(1, {}, words)
        )
    assert (out / "result.json").is_file()
    assert f"Write it by: privrec report {out}" in flower_log.text
    assert build(out).privacy
