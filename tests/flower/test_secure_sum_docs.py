"""The example of the documentation runs as it is printed, and is as short as it says."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the flower extra is not installed")

import quickstart_task as task
from docs_pages import PAGES, ROOT, fences
from flwr.app import Context, RecordDict
from memory_grid import stage_of
from sum_apps import grid_of

PAGE = ROOT / "docs" / "flower-secure-sum.md"
LEDGERS = ROOT / "docs" / "ledger.md"  # run by test_own_strategies.py
NODES = 8


def blocks() -> list[str]:
    found = [f for f in fences(PAGE.read_text("utf-8")) if "flower" in f.words]
    assert all(fence.language == "python" for fence in found)
    return [fence.text for fence in found]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's blocks leave, run one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setitem(sys.modules, "task", task)
    names: dict[str, Any] = {"__name__": "__page__"}
    for number, text in enumerate(blocks()):
        exec(compile(text, f"{PAGE.name}, block {number}", "exec"), names)  # noqa: S102
    return names


def test_no_other_page_has_blocks_that_nobody_runs() -> None:
    for page in PAGES:
        if page not in (PAGE, LEDGERS):
            assert not [f for f in fences(page.read_text("utf-8")) if "flower" in f.words], page


def test_the_example_is_thirty_lines() -> None:
    client, server = blocks()[:2]
    lines = [line for line in (client + server).splitlines() if line.strip()]
    assert len(lines) <= 30


def test_the_example_trains(example: dict[str, Any], tmp_path: Path) -> None:
    configs = {n: {"partition-id": n, "num-partitions": NODES} for n in range(1, NODES + 1)}
    grid = grid_of(NODES, example["app"], configs=configs)
    with contextlib.redirect_stdout(None):
        example["server_app"](grid, Context(7, 0, {}, RecordDict(), {}))
    assert [stage_of(m) for m in grid.sent].count("unmask") == 3 * NODES
    assert not [reply for reply in grid.replies if reply.has_error()]
    assert (tmp_path / "final_model.pt").stat().st_size > 200_000


def test_the_private_one_is_charged(example: dict[str, Any], tmp_path: Path) -> None:
    configs = {n: {"partition-id": n, "num-partitions": NODES} for n in range(1, NODES + 1)}
    grid = grid_of(NODES, example["app"], configs=configs)
    arrays = example["ArrayRecord"](task.Net().state_dict())
    config = example["ConfigRecord"]({"lr": 0.03})
    result = example["private"].start(grid, arrays, train_config=config, num_rounds=1, timeout=60)
    assert 0 < result.train_metrics_clientapp[1]["epsilon"] <= 8.0
    assert (tmp_path / "ledger.jsonl").exists()
    assert len(bytes.fromhex(example["identity"])) == 32
