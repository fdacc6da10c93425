"""Any number of worker processes gives the same bits, and one that dies ends the run in words."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import ledger_entries, make_scenario, weights

from privrec.device.update import BoundedUpdate
from privrec.errors import PrivrecError
from privrec.run import lifecycle
from privrec.run.record import Observer
from privrec.scenario.load import Scenario
from privrec.workers import Take, Workers, cpu_s, forked, shared

SMALL = """
name = "workers"
[data]
users = 60
items = 40
clusters = 3
interactions_per_user = 8
[model]
dim = 8
block = 2
[devices]
population = 60
sampling = "everybody"
min_cohort = 2
dropout_rate = 0.1
tiers = [{ capacity = 1.0, share = 0.5 }, { capacity = 0.5, share = 0.5 }]
[train]
rounds = 3
loss = "bce"
server_optimizer = "fedavg"
server_lr = 3.0
[privacy]
noise = "distributed"
clip_norm = 1.0
noise_multiplier = 2.0
delta = 1e-3
[run]
footprint = false
eval_every = 3
"""
KEY = b"known to all, so that runs repeat"[:32]


def started(folder: Path, scenario: Scenario) -> Any:
    return lifecycle.start(scenario, out=folder, observer=Observer(), unsafe_noise_key=KEY)


def told(folder: Path) -> list[Any]:
    """What a run charged and committed, without what names the run."""
    kept = ("kind", "round", "attempt", "event")
    return [{key: entry.get(key) for key in kept} for entry in ledger_entries(folder)[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("run.engine=device",),
        ("run.secure_sum=full", "train.rounds=1"),
        ("train.loss=full_softmax", "privacy.noise=central", "devices.dropout_rate=0"),
        ("train.loss=softmax", "train.selector=simhash", "train.budget=0.3"),
        (
            "privacy.local=example",
            "privacy.local_noise_multiplier=1",
            "privacy.local_clip_norm=1",
            "train.user_steps=0",
        ),
    ],
)
def test_any_number_of_workers_gives_the_same_bits(
    changes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few samples a batch, so that there are batches for three.
    monkeypatch.setattr("privrec.device.recommender.SAMPLES_IN_BATCH", 256)
    monkeypatch.setattr("privrec.device.recommender.SHARED_SAMPLES_IN_BATCH", 256)
    seen = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        scenario = make_scenario(SMALL, "train.rounds=2", *changes, f"run.workers={workers}")
        payload = started(out, scenario).payload
        figures = {key: payload[key] for key in ("metrics", "segments", "tiers") if key in payload}
        for tier in figures.get("tiers", ()):
            tier.pop("cpu_s", None)
        seen.append((weights(out).tobytes(), told(out), figures))
    assert seen[0] == seen[1] == seen[2]


def test_a_run_that_lost_a_worker_goes_on_with_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "whole"
    started(expected, make_scenario(SMALL))
    parent, add = os.getpid(), BoundedUpdate.add_to
    lost = tmp_path / "lost"

    def dying(update: BoundedUpdate, *rest: Any) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        add(update, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BoundedUpdate, "add_to", dying)
        with pytest.raises(PrivrecError, match=r"worker process \d+ ended .* resume"):
            started(lost, make_scenario(SMALL, "run.workers=2"))
    assert len(told(lost)) == 1  # the first round was charged, and nothing was released
    lifecycle.resume(lost, observer=Observer(), workers=3)
    assert weights(lost).tobytes() == weights(expected).tobytes()
    assert told(lost) == told(expected)


def test_the_number_of_workers_is_no_part_of_what_was_agreed() -> None:
    one, many = make_scenario(SMALL), make_scenario(SMALL, "run.workers=7")
    assert one.hash() == many.hash()
    assert one.plan_hash() == many.plan_hash()


class TestForked:
    def test_each_task_is_taken_once_by_processes_of_their_own(self) -> None:
        first, second = range(1000, 3000), "letters"

        def share(take: Take) -> tuple[int, list[tuple[int, int]], list[tuple[int, str]]]:
            return os.getpid(), list(take(first)), list(take(second))

        found = forked(3, share)
        assert len({process for process, _, _ in found} - {os.getpid()}) == 3
        assert sorted(each for _, part, _ in found for each in part) == list(enumerate(first))
        assert sorted(each for _, _, part in found for each in part) == list(enumerate(second))

    def test_a_task_waits_for_whoever_is_free(self) -> None:
        def share(take: Take) -> list[int]:
            done = []
            for number, other_is_done in take([reading, writing, writing]):
                if not number:
                    os.read(other_is_done, 1)  # until the other process has done all the rest
                elif number == 2:
                    os.write(other_is_done, b".")
                done.append(number)
            return done

        reading, writing = os.pipe()
        try:
            assert sorted(forked(2, share)) == [[0], [1, 2]]
        finally:
            os.close(reading)
            os.close(writing)

    def test_one_runs_here(self) -> None:
        here = forked(1, lambda take: (list(take("ab")), os.getpid()))
        assert here == [([(0, "a"), (1, "b")], os.getpid())]

    def test_what_a_share_raises_is_raised(self) -> None:
        def refuse(take: Take) -> None:
            for number, _ in take(range(2)):
                if number:
                    raise ValueError(f"task {number}")

        with pytest.raises(ValueError, match="task 1"):
            forked(2, refuse)

    def test_large_answers_come_through_and_their_time_is_counted(self) -> None:
        before = cpu_s()
        found = forked(2, lambda take: [np.full(1 << 20, n) for n, _ in take(range(2))])
        assert sorted(int(each.sum()) for part in found for each in part) == [0, 1 << 20]
        assert cpu_s() > before

    def test_ctrl_c_is_left_to_the_process_that_forked(self) -> None:
        def interrupted(_: Take) -> str:
            os.kill(os.getpid(), signal.SIGINT)
            return "done"

        assert forked(2, interrupted) == ["done", "done"]


class TestWorkers:
    def test_they_are_forked_once_and_see_what_lies_in_shared_memory(self) -> None:
        both, at_first = shared(np.zeros(4, np.int64)), np.zeros(4, np.int64)

        def answer(take: Take, tasks: range) -> tuple[int, int]:
            for _, place in take(tasks):
                both[place] += 1
            return os.getpid(), int(at_first.sum())

        made = Workers(2, answer)
        seen = []
        for asked in range(1, 4):
            at_first += 1
            seen.append(made.ask(range(4)))
            assert both.tolist() == [asked] * 4
        assert seen == seen[:1] * 3  # the same processes, and what is not shared stays as it was
        assert {found for _, found in seen[0]} == {0}

    def test_after_an_error_they_are_gone(self) -> None:
        def answer(take: Take, wanted: int) -> int:
            for number, _ in take(range(2)):
                if number == wanted:
                    raise ValueError(f"task {number}")
            return os.getpid()

        made = Workers(2, answer)
        gone = made.ask(2)
        with pytest.raises(ValueError, match="task 1"):
            made.ask(1)
        assert not made.close.alive
        for process in gone:
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)

    def test_they_end_when_the_process_that_asks_is_killed(self) -> None:
        reading, writing = os.pipe()
        asking = os.fork()
        if not asking:
            Workers(3, lambda take: None).ask()
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(writing)
        os.waitpid(asking, 0)
        # Its workers hold the other end: this returns when the last of them is gone.
        assert os.read(reading, 1) == b""
        os.close(reading)
