"""What a node refuses, whatever the server or another node does; each with a word on what to do."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import serde
from memory_grid import MemoryGrid, acting_as, carried, stage_of
from sum_apps import (
    app_of,
    calls,
    enrolled,
    expected,
    fedavg,
    flat,
    grid_of,
    lenient,
    model,
    one_round,
    same,
    strategy_of,
)

from privrec.errors import ReleaseRefused, UsageError
from privrec.flower.enrolment import ROOT, enroll
from privrec.flower.exchange import EXCHANGES, PREKEYS, RECORD, pack, unpack
from privrec.flower.mod import SecureSumMod
from privrec.flower.plan import SumPlan, plan_of

STRICT = {"minimum": 2}


def strict_grid(tmp_path: Path, nodes: int = 5, **changes: Any) -> MemoryGrid:
    """Enrolled nodes that trust no server."""
    configs = enrolled(tmp_path, nodes)
    return grid_of(nodes, app_of(SecureSumMod(**STRICT)), configs=configs, **changes)


def reasons(grid: MemoryGrid) -> dict[int, str]:
    """What nodes refused, by node."""
    failed = [reply for reply in grid.replies if reply.has_error()]
    return {reply.metadata.src_node_id: reply.error.reason for reply in failed}


def changed(stage: str, change: Callable[[dict[str, Any]], None], *nodes: int) -> Any:
    """A server that alters its part of a message to some nodes, or to all."""

    def tampered(message: Message) -> Message:
        if stage_of(message) != stage or (nodes and message.metadata.dst_node_id not in nodes):
            return message
        body, meta = unpack(message), message.metadata
        change(body)
        content = RecordDict({**message.content, **pack(body)})
        return Message(content, meta.dst_node_id, meta.message_type)

    return tampered


# ---------------------------------------------------------------------- identities


def test_enrolled_nodes_sum(tmp_path: Path) -> None:
    grid = strict_grid(tmp_path)
    roster = tmp_path / "roster.txt"
    arrays, _ = one_round(strategy_of(5, roster=roster), grid)
    assert same(arrays, expected(range(1, 6)))
    assert not reasons(grid)


def test_an_enrolment_key_does_in_place_of_a_roster(tmp_path: Path) -> None:
    office, public = tmp_path / "office", tmp_path / "office.pub"
    configs: dict[int, dict[str, Any]] = {}
    for node in range(1, 5):
        enroll(tmp_path / f"{node}", office=office)
        configs[node] = {
            "keys": str(tmp_path / f"{node}"),
            "enrolment-key": public.read_text()[:64],
        }
    configs[4]["enrolment-key"] = str(public)
    grid = grid_of(4, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(4, enrolment_key=str(public)), grid)
    assert same(arrays, expected(range(1, 5)))
    enroll(tmp_path / "other", office=tmp_path / "other office")
    configs[2]["keys"] = str(tmp_path / "other")
    grid = grid_of(4, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(4, enrolment_key=str(public)), grid)
    assert same(arrays, expected([1, 3, 4]))
    assert "is not enrolled" in reasons(grid)[2]


def test_a_certificate_of_another_identity_is_none(tmp_path: Path) -> None:
    for node in (1, 2):
        enroll(tmp_path / f"{node}", office=tmp_path / "office")
    (tmp_path / "2/state").write_bytes((tmp_path / "1/state").read_bytes())  # before any use
    config = {"keys": str(tmp_path / "2"), "enrolment-key": str(tmp_path / "office.pub")}
    grid = grid_of(3, app_of(SecureSumMod(**STRICT)), configs=dict.fromkeys(range(1, 4), config))
    assert one_round(strategy_of(3), grid) == (None, None)
    assert all("is not enrolled" in reason for reason in reasons(grid).values())
    (tmp_path / "2/state").write_bytes(msgpack.packb({0: {"certificate": b"12"}}))
    grid = grid_of(3, app_of(SecureSumMod(**STRICT)), configs=dict.fromkeys(range(1, 4), config))
    assert one_round(strategy_of(3), grid) == (None, None)
    assert len(reasons(grid)) == 3
    assert all(calls(context) == 0 for context in grid.contexts.values())


def test_a_node_without_any_anchor_refuses_and_says_what_to_do() -> None:
    grid = grid_of(3, app_of(SecureSumMod(**STRICT)))
    assert one_round(strategy_of(3), grid) == (None, None)
    for reason in reasons(grid).values():
        assert "a server could make devices up" in reason
        assert "keys=FOLDER, and roster=FILE or enrolment-key=KEY" in reason
        assert "trust_server=True" in reason
    assert all(calls(context) == 0 for context in grid.contexts.values())


def test_a_node_that_is_not_enrolled_is_left_out(tmp_path: Path) -> None:
    configs = enrolled(tmp_path, 5)
    enroll(tmp_path / "stranger", roster=tmp_path / "another roster")
    configs[5]["keys"] = str(tmp_path / "stranger")
    grid = grid_of(5, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(5), grid)
    assert same(arrays, expected([1, 2, 3, 4]))
    assert "is not enrolled: add it to the roster" in reasons(grid)[5]


def test_a_stranger_that_refuses_nothing_is_kept_out_by_the_server(tmp_path: Path) -> None:
    configs: dict[int, Any] = {**enrolled(tmp_path, 4), 5: {}}
    apps = {n: app_of(SecureSumMod(**STRICT)) for n in range(1, 5)} | {5: app_of(lenient())}
    arrays, _ = one_round(
        strategy_of(5, roster=tmp_path / "roster.txt"), grid_of(5, apps, configs=configs)
    )
    assert same(arrays, expected([1, 2, 3, 4]))


def test_nodes_refuse_a_server_that_makes_devices_up(tmp_path: Path) -> None:
    configs: dict[int, Any] = {**enrolled(tmp_path, 4), 5: {}}
    apps = {n: app_of(SecureSumMod(**STRICT)) for n in range(1, 5)} | {5: app_of(lenient())}
    grid = grid_of(5, apps, configs=configs)
    assert one_round(strategy_of(5), grid) == (None, None)  # a server that checks nothing
    assert {1, 2, 3, 4} == set(reasons(grid))
    assert all("no enrolled device signed this prekey" in r for r in reasons(grid).values())
    assert all(calls(grid.contexts[node]) == 0 for node in (1, 2, 3, 4))


def test_two_nodes_of_one_key_count_once(tmp_path: Path) -> None:
    configs = enrolled(tmp_path, 4)
    configs[3] = dict(configs[2])
    grid = grid_of(4, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(4), grid)
    assert same(arrays, expected([1, 2, 4])) or same(arrays, expected([1, 3, 4]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": None}, "no keys=FOLDER"),
        ({"keys": "/nowhere/keys"}, "could not be read"),
        ({"keys": 5}, "put it into quotation marks"),
        ({"number": 1}, "is not enrolled"),
        ({"roster": "/nowhere/roster"}, "roster file could not be read"),
        ({"enrolment-key": "ab" * 32}, "keep the one that is in use"),
        ({"roster": None, "enrolment-key": "short"}, "neither 64 hexadecimal digits nor a file"),
    ],
)
def test_a_configuration_that_is_not_whole_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    configs = enrolled(tmp_path, 4)
    configs[2] = {n: v for n, v in {**configs[2], **change}.items() if v is not None}
    grid = grid_of(4, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(4), grid)
    assert same(arrays, expected([1, 3, 4]))
    assert said in reasons(grid)[2]


def test_a_roster_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    configs = enrolled(tmp_path, 4)
    mine = tmp_path / "mine.txt"
    lines = (tmp_path / "roster.txt").read_text().splitlines()
    own = lines[1]
    mine.write_text("\n".join([own, *("00" * 32 for line in lines if line != own)]))
    configs[2]["roster"] = str(mine)
    grid = grid_of(4, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(4), grid)
    assert same(arrays, expected([1, 3, 4]))
    assert "no enrolled device signed this prekey" in reasons(grid)[2]


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    configs = enrolled(tmp_path, 4)
    with pytest.raises(UsageError, match="has keys already"):
        enroll(tmp_path / "node-1", roster=tmp_path / "roster.txt")
    (tmp_path / "node-1" / ROOT).chmod(0o644)
    (tmp_path / "node-2" / ROOT).write_bytes(b"short")
    grid = grid_of(4, app_of(SecureSumMod(**STRICT)), configs=configs)
    arrays, _ = one_round(strategy_of(4), grid)
    assert same(arrays, expected([3, 4]))
    assert "lets others than the owner" in reasons(grid)[1]
    assert "not a secret of 32 bytes" in reasons(grid)[2]


# ---------------------------------------------------------------------- what a server may not do


def test_training_in_clear_is_refused_and_not_even_begun() -> None:
    grid = grid_of(3)
    assert list(fedavg(3).configure_train(1, model(), ConfigRecord(), grid))
    replies = grid.send_and_receive(fedavg(3).configure_train(1, model(), ConfigRecord(), grid))
    assert all("wrap the server's strategy in SecureSum" in r.error.reason for r in replies)
    assert all(calls(context) == 0 for context in grid.contexts.values())


def test_too_small_a_cohort_is_refused() -> None:
    grid = grid_of(5, app_of(lenient(minimum=6)))
    assert one_round(strategy_of(5), grid) == (None, None)
    assert "among 5 nodes, and this node's SecureSumMod(minimum=6) insists" in reasons(grid)[1]
    grid = grid_of(5, app_of(SecureSumMod(trust_server=True)))  # 20 by default
    assert one_round(strategy_of(5), grid) == (None, None)


def test_a_run_without_one_sum_fails_and_says_what_nodes_insist_on() -> None:
    arrays, strategy = model(), strategy_of(5)
    before = flat(arrays)
    says = (
        r"no round gave a model: .* 5 of 5 nodes answered with an error, node 1: .* among 5 nodes"
        r".*SecureSumMod\(minimum=20\) insists on more"
    )
    with pytest.raises(ReleaseRefused, match=says):
        strategy.start(grid_of(5, app_of(SecureSumMod(trust_server=True))), arrays, timeout=5)
    assert np.array_equal(flat(arrays), before)
    # One sum among rounds without is a model; so is that of a run in which no round was asked for.
    result = strategy.start(grid_of(5, app_of(lenient(rounds=1))), arrays, num_rounds=2, timeout=5)
    assert same(result.arrays, expected(range(1, 6)))
    assert strategy.start(grid_of(5), arrays, num_rounds=0, timeout=5).arrays == arrays


def test_another_model_for_one_node_is_refused() -> None:
    def other(message: Message) -> Message:
        if stage_of(message) != "masked" or message.metadata.dst_node_id != 2:
            return message
        arrays = dict(message.content["arrays"].items())
        arrays["bias"] = Array(arrays["bias"].numpy() + 1)
        content = RecordDict({**message.content, "arrays": ArrayRecord(arrays)})
        return Message(content, 2, message.metadata.message_type)

    grid = grid_of(5, tampered=other)
    arrays, _ = one_round(strategy_of(5), grid)
    assert same(arrays, expected([1, 3, 4, 5]))
    assert "is not the one that all devices are told of" in reasons(grid)[2]


@pytest.mark.parametrize("value", [0.0, 1, "1", [1.0], b"1", True])
def test_other_settings_for_one_node_are_refused(value: Any) -> None:
    def other(message: Message) -> Message:
        if stage_of(message) != "masked" or message.metadata.dst_node_id != 2:
            return message
        config = ConfigRecord({**message.content["config"], "lr": value})
        content = RecordDict({**message.content, "config": config})
        return Message(content, 2, message.metadata.message_type)

    grid = grid_of(5, tampered=other)
    settings = ConfigRecord({"lr": 1.0})
    strategy = strategy_of(5)
    messages = strategy.configure_train(1, model(), settings, grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert same(arrays, expected([1, 3, 4, 5]))
    assert 2 in reasons(grid)


def other_plan(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["plan"] = replace(SumPlan.unpack(body["plan"]), **changes).pack()

    return change


@pytest.mark.parametrize(
    "changes", [{"clip_norm": 2.0}, {"max_examples": 4}, {"least": 3}, {"size": 11}]
)
def test_a_plan_other_than_that_of_the_call_is_refused(changes: dict[str, Any]) -> None:
    grid = grid_of(5, tampered=changed("shares", other_plan(**changes), 2))
    arrays, _ = one_round(strategy_of(5), grid)
    assert same(arrays, expected([1, 3, 4, 5]))
    assert "whose terms are not those of its plan" in reasons(grid)[2]


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (b"", "is none"),
        (b"[]", "is none"),
        (b"{}", "is none"),
        (plan_of(3, 5, 1.0).pack().replace(b'"size": 5', b'"size": 5.0'), "is none"),
        (plan_of(3, 5, 1.0).pack().replace(b'"size": 5', b'"size": 0'), "is none"),
        (plan_of(3, 5, 1.0).pack().replace(b" ", b""), "another spelling"),
        (plan_of(3, 5, 1.0).pack()[:-1] + b', "more": 1}', "another spelling"),
        (
            plan_of(3, 5, 1.0).pack().replace(b'"clip_norm": 1.0', b'"clip_norm": NaN'),
            "none",
        ),
    ],
)
def test_a_malformed_plan_is_refused(packed: bytes, said: str) -> None:
    with pytest.raises(ReleaseRefused, match=said):
        SumPlan.unpack(packed)


@pytest.mark.parametrize("stage", [PREKEYS, *EXCHANGES, "more", None, b"shares", ["shares"]])
@pytest.mark.parametrize("mine", [None, b"", b"PS", 0])
def test_malformed_messages_are_refused(stage: Any, mine: Any) -> None:
    grid = grid_of(3)
    own = _identity(grid, 1)
    told = {} if mine is None else {"messages": {own: mine}, "plan": mine, "count": mine}
    content = RecordDict({"arrays": model(), **pack({"stage": stage, **told})})
    reply = grid.ask(Message(content, 1, "train"))
    assert reply.has_error()
    assert reply.error.reason.startswith("privrec: ")
    assert calls(grid.contexts[1]) == 0


def _identity(grid: MemoryGrid, node: int) -> bytes:
    """The name by which a node is known: it is told with its prekeys."""
    reply = grid.ask(Message(pack({"stage": PREKEYS, "count": 1}), node, "train"))
    return bytes(unpack(reply)["devices"][0]["name"])


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", b"\x81\x05"])
def test_a_body_that_is_none_is_refused(body: bytes) -> None:
    grid = grid_of(3)
    array = Array("uint8", (len(body),), RECORD, body)
    reply = grid.ask(Message(RecordDict({RECORD: ArrayRecord({"body": array})}), 1, "train"))
    assert "must run the same version" in reply.error.reason


def test_a_message_in_the_middle_of_a_round_that_a_node_is_not_in_is_refused() -> None:
    grid, strategy = grid_of(3), strategy_of(3)
    messages = list(strategy.configure_train(1, model(), ConfigRecord(), grid))
    del grid.contexts[1].state[RECORD]
    reply = grid.ask(messages[0] if messages[0].metadata.dst_node_id == 1 else messages[1])
    by_node = {m.metadata.dst_node_id: m for m in messages}
    reply = grid.ask(by_node[1])
    assert "that this node is not in" in reply.error.reason
    assert calls(grid.contexts[1]) == 0


def test_a_node_gives_no_more_updates_than_it_was_made_to_give() -> None:
    grid, strategy = grid_of(3, app_of(lenient(rounds=2))), strategy_of(3)
    for round in (1, 2):
        assert one_round(strategy, grid, round=round)[0] is not None
    assert one_round(strategy, grid, round=3) == (None, None)
    assert "gave to 2 in this run, and its SecureSumMod(rounds=2) allows" in reasons(grid)[1]


@pytest.mark.parametrize("stage", EXCHANGES)
def test_a_second_answer_is_refused_also_when_flowers_state_is_set_back(
    tmp_path: Path, stage: str
) -> None:
    """Two vectors under the same masks would give their difference away."""
    grid, kept = strict_grid(tmp_path), {}

    def keep(message: Message) -> Message:
        if stage_of(message) == stage and message.metadata.dst_node_id == 1:
            kept["context"], kept["message"] = grid.contexts[1], message
        return message

    grid.tampered = keep
    arrays, _ = one_round(strategy_of(5), grid)
    assert same(arrays, expected(range(1, 6)))
    for context in (grid.contexts[1], kept["context"]):
        grid.contexts[1] = context
        before = calls(context)
        assert grid.ask(kept["message"]).has_error()
        assert calls(grid.contexts[1]) == before


def test_of_two_messages_at_once_a_node_answers_one(tmp_path: Path) -> None:
    """Flower may hand both the state that was there before either."""
    grid, strategy, replies = strict_grid(tmp_path), strategy_of(5), []
    messages = list(strategy.configure_train(1, model(), ConfigRecord(), grid))
    (mine,) = [m for m in messages if m.metadata.dst_node_id == 1]
    before = serde.context_to_proto(grid.contexts[1])

    def answer() -> None:
        with acting_as(1):
            replies.append(grid.app(carried(mine), serde.context_from_proto(before)))

    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reply.has_error() for reply in replies) == [False, True]


def test_a_node_that_sends_rubbish_drops_out(caplog: pytest.LogCaptureFixture) -> None:
    class Rubbish(MemoryGrid):
        def ask(self, message: Message) -> Message:
            reply = super().ask(message)
            if message.metadata.dst_node_id == 2 and stage_of(message) == "masked":
                (name,) = unpack(reply)["answers"]
                return Message(pack({"answers": {name: b"abc"}}), reply_to=message)
            if message.metadata.dst_node_id == 3 and stage_of(message) == "masked":
                return Message(RecordDict({"arrays": model()}), reply_to=message)
            return reply

    plain = grid_of(7)
    grid = Rubbish(plain.app, plain.configs)
    arrays, _ = one_round(strategy_of(7), grid)
    assert same(arrays, expected([1, 4, 5, 6, 7]))
    assert "SecureSumMod is the first of its mods" in caplog.text


def test_an_app_that_raises_or_returns_another_model_drops_out() -> None:
    def change(node: int, round: int) -> np.ndarray:
        if node == 2:
            raise RuntimeError("out of memory")
        return np.zeros(12)

    grid = grid_of(5, app_of(lenient(), change=change))
    arrays, _ = one_round(strategy_of(5), grid)
    assert arrays is not None
    assert "RuntimeError" in reasons(grid)[2]

    def renamed(message: Message, context: Any, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_id == 3:
            new = {name.upper(): a for name, a in reply.content["arrays"].items()}
            reply.content["arrays"] = ArrayRecord(new)
        if context.node_id == 4:
            arrays = dict(reply.content["arrays"].items())
            arrays["bias"] = Array(np.zeros(3))
            reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    grid = grid_of(7, app_of(lenient(), renamed))
    arrays, _ = one_round(strategy_of(7), grid)
    assert same(arrays, expected([1, 2, 5, 6, 7]))
    assert "return the model's own" in reasons(grid)[3]
    assert "came back as float64 of shape (3,)" in reasons(grid)[4]


# ---------------------------------------------------------------------- words of the place

SECRET = "patient 4711 has it"


def failing(node: int, round: int) -> np.ndarray:
    if node == 2:
        raise RuntimeError(SECRET)
    return np.zeros(12)


def test_what_an_app_raises_stays_on_its_node(caplog: pytest.LogCaptureFixture) -> None:
    """The text of an exception may quote the data that it came of."""
    grid = grid_of(5, app_of(lenient(), change=failing))
    assert one_round(strategy_of(5), grid)[0] is not None
    assert list(reasons(grid)) == [2]
    assert "RuntimeError" in reasons(grid)[2]
    assert SECRET not in str([reply.error for reply in grid.replies if reply.has_error()])
    assert SECRET in caplog.text  # in the node's own log
    grid = grid_of(5, app_of(lenient(errors_in_clear=True), change=failing))
    one_round(strategy_of(5), grid)
    assert SECRET in reasons(grid)[2]


def test_what_an_app_answers_as_an_error_stays_on_its_node(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def erring(message: Message, context: Any, call_next: Any) -> Message:
        if context.node_id == 2:
            return Message(Error(9, SECRET), reply_to=message)
        return call_next(message, context)

    grid = grid_of(5, app_of(lenient(), erring))
    assert one_round(strategy_of(5), grid)[0] is not None
    assert list(reasons(grid)) == [2]
    assert SECRET not in reasons(grid)[2]
    assert SECRET in caplog.text


def test_evaluation_in_clear_tells_no_text_of_exceptions() -> None:
    app = ClientApp(mods=[lenient(evaluate_in_clear=True)])

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        raise RuntimeError(SECRET)

    reply = grid_of(1, app).ask(Message(RecordDict({"arrays": model()}), 1, "evaluate"))
    assert "RuntimeError" in reply.error.reason
    assert SECRET not in reply.error.reason


def test_a_metric_that_is_no_number_is_not_told() -> None:
    app = app_of(lenient(), metrics=lambda node: {"loss": [0.125, 4711.0]})
    grid = grid_of(3, app)
    assert one_round(strategy_of(3, metrics={"loss": 1.0}), grid) == (None, None)
    assert "metric 'loss' of the reply is a list" in reasons(grid)[1]
    assert "4711" not in reasons(grid)[1]


def test_an_offline_node_is_named_by_its_own_id(caplog: pytest.LogCaptureFixture) -> None:
    """The SuperLink answers for it, under an id of its own."""
    for stage in ("shares", "masked", "confirm"):
        caplog.clear()
        grid = grid_of(
            7,
            offline=lambda message, stage=stage: (
                stage_of(message) == stage and message.metadata.dst_node_id in (4, 6)
            ),
        )
        assert one_round(strategy_of(7), grid)[0] is not None
        said = [r.getMessage() for r in caplog.records if "Node Unavailable" in r.getMessage()]
        assert sorted(line.split(":")[1] for line in said) == [" node 4", " node 6"], stage


@pytest.mark.parametrize("mods", [[], [SecureSumMod]])
def test_a_forgotten_mod_is_named(mods: list[Any]) -> None:
    """Or a class in the place of one, which takes no message."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Any) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    says = r"5 of 5 nodes .* node 1: .*ClientApp\(mods=\[SecureSumMod\(\.\.\.\)\]\), an instance"
    with pytest.raises(ReleaseRefused, match=says):
        strategy_of(5).start(grid_of(5, app), model(), num_rounds=1, timeout=5)


def test_a_small_sum_is_told_of_once_a_run(caplog: pytest.LogCaptureFixture) -> None:
    grid, strategy = grid_of(3), strategy_of(3)
    for round in (1, 2, 3):
        one_round(strategy, grid, round=round)
    said = [r.getMessage() for r in caplog.records if "among few" in r.getMessage()]
    assert said == ["privrec: this node is one of 3 in the sum, and is hidden among few"] * 3


@pytest.mark.parametrize("stage", [*EXCHANGES[:3]])
def test_refusals_speak_of_nodes_alone(stage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Bands, tiers and cohorts are the recommender's."""
    lost = EXCHANGES[EXCHANGES.index(stage) :]
    grid = grid_of(9, lost=lambda m: stage_of(m) in lost and m.metadata.dst_node_id < 5)
    with pytest.raises(ReleaseRefused) as failed:
        strategy_of(9).start(grid, model(), num_rounds=1, timeout=5)
    grid = grid_of(5, app_of(lenient(minimum=6, corrupt_share=0.3)))
    with pytest.raises(ReleaseRefused) as few:
        strategy_of(5).start(grid, model(), num_rounds=1, timeout=5)
    said = f"{failed.value} {few.value} {caplog.text}"
    assert not re.search("band|tier|cohort|scenario", said.replace("secure sum", "")), said


def test_a_metric_that_is_missing_is_named() -> None:
    grid = grid_of(3)
    assert one_round(strategy_of(3, metrics={"accuracy": 1.0}), grid) == (None, None)
    assert "metric 'accuracy' of the reply is missing" in reasons(grid)[1]


def test_prekeys_of_a_run_are_not_those_of_another(tmp_path: Path) -> None:
    """A mask key may be known after its round; the identity is the same in every run."""
    configs = enrolled(tmp_path, 3)
    seen, names = [], []
    for _ in range(2):
        grid = grid_of(3, app_of(SecureSumMod(**STRICT)), configs=configs)
        one_round(strategy_of(3), grid)
        devices = [device for r in grid.replies[:3] for device in unpack(r)["devices"]]
        names.append({device["name"] for device in devices})
        seen.append({device["prekeys"] for device in devices})
    assert names[0] == names[1]
    assert len(seen[0]) == len(seen[1]) == 3
    assert not seen[0] & seen[1]
