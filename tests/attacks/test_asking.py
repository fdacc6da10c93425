"""What a server reads off devices that ask it for output neurons, and off those that do not."""

from __future__ import annotations

from typing import Any

import pytest
from parts import assemble

from privrec import data
from privrec.randomness import SecretRoot
from privrec.run.task import NextWords
from privrec.scenario.load import Scenario
from privrec.search.select import select
from privrec.server.columns import Columns

TEXTS = """
name = "asking"
[data]
source = "synthetic_text"
users = 20
items = 400
clusters = 2
interactions_per_user = 61
[model]
kind = "next_word"
dim = 16
block = 8
heads = 2
ffn = 16
context = 10
init_std = 0.3
[devices]
popularity = "public"
sampling_rate = 1.0
[train]
loss = "softmax"
selector = "simhash"
budget = 0.5
selected = 0.5
[privacy]
noise = "none"
"""


def collected(*changes: str) -> Any:
    scenario = Scenario.from_toml(TEXTS, changes)
    split = data.load_texts(scenario.data)
    columns = NextWords(scenario, split).columns
    parts = assemble(scenario, split.train, "run", SecretRoot.known(b"d"), columns and columns.ask)
    parts.simulation.collect(parts.server.next_round(0), parts.server.weights)
    return split.train


def test_a_request_is_the_list_of_words_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    original = Columns.neurons

    def spied(self: Columns, buckets: Any, wanted: int, named: Any) -> Any:
        seen.append(set(named.tolist()))
        return original(self, buckets, wanted, named)

    monkeypatch.setattr(Columns, "neurons", spied)
    texts = collected("train.scheme=requested")
    words = [set(texts.distinct.history(user).tolist()) for user in range(20)]
    # The whole text of each device is in its window, so the request names it exactly.
    assert seen == words


def test_a_device_that_selects_alone_sends_the_server_nothing_but_its_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Columns, "neurons", lambda *words: asked.append(words))
    used: list[bytes] = []

    def spied(*words: Any, **named: Any) -> Any:
        used.append(words[4].bytes(8))
        return select(*words, **named)

    monkeypatch.setattr("privrec.device.samples.select", spied)
    collected()
    assert not asked
    # Every device has functions of its own.
    assert len(set(used)) == len(used) == 20
