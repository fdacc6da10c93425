"""Runs over texts: the same loop, ledger and noise as any run, and what each scheme tells."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import assemble
from safetensors import safe_open
from small_runs import Silent, Stop, make_scenario, run_once, weights

from privrec import data
from privrec.cli.plan import coefficients
from privrec.device.device import Draws
from privrec.errors import Interrupted, ScenarioError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.ledger import PREPARATION
from privrec.randomness import SecretRoot
from privrec.report.build import build
from privrec.report.render import write
from privrec.run import lifecycle
from privrec.run.costs import of_output
from privrec.run.lifecycle import with_rows
from privrec.run.plan import federation_of
from privrec.run.record import KEPT, REVEALED
from privrec.run.task import NextWords
from privrec.scenario.load import Scenario, load
from privrec.server.server import Server

ROUNDS, USERS, WORDS = 4, 18, 120
TINY = f"""
name = "texts"
title = "A run over tiny texts"
[data]
source = "synthetic_text"
users = {USERS}
items = {WORDS}
clusters = 2
interactions_per_user = 60
[model]
kind = "next_word"
dim = 16
block = 8
heads = 2
ffn = 24
context = 5
init_std = 0.05
[devices]
popularity = "public"
sampling_rate = 0.5
[train]
rounds = {ROUNDS}
loss = "softmax"
selector = "scan"
budget = 0.4
selected = 0.3
frequent = 0.3
max_samples = 20
[privacy]
noise = "none"
[run]
top_k = [1, 3]
checkpoint_every = 2
footprint = false
"""
NOISE = ("privacy.noise=central", "privacy.clip_norm=0.5", "privacy.noise_multiplier=1.0")
ASKED = ("train.scheme=requested", "train.selector=simhash")
COMPRESSED = ("model.compression=4", "devices.nesting=fold")
SPREAD = ("privacy.noise=distributed", "privacy.clip_norm=0.5", "privacy.noise_multiplier=2.0",
          "devices.min_cohort=2", "privacy.colluding_share=0", "devices.sampling=everybody",
          "devices.sampling_rate=1.0")  # fmt: skip


pytestmark = pytest.mark.usefixtures("state")
scenario = partial(make_scenario, TINY)
started = partial(run_once, TINY)


def test_a_folder_does_not_name_the_words_of_texts(tmp_path: Path) -> None:
    """Which words there are in private texts is private: their order alone is written."""
    started(tmp_path / "run")
    with safe_open(tmp_path / "run" / "catalogue.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"order", "ids"}
        assert not file.get_tensor("ids").size
        assert np.sort(file.get_tensor("order")).tolist() == [*range(WORDS)]


def test_a_run_leaves_what_runs_leave_and_learns(tmp_path: Path) -> None:
    changes = ("train.rounds=40", "train.server_lr=0.01", "devices.sampling_rate=1")
    payload = started(tmp_path / "a", *changes)
    common = payload["baselines"]["popularity"]
    assert payload["metrics"]["accuracy@1"] > common["accuracy@1"] + 0.03
    assert payload["metrics"]["accuracy@1"] < payload["metrics"]["accuracy@3"] < 1
    assert payload["data"]["items"] == WORDS
    low, high = payload["intervals"]["accuracy@1"]
    assert low <= payload["metrics"]["accuracy@1"] <= high
    pages = write(build(tmp_path / "a"), tmp_path / "a")
    assert "Accuracy@1" in pages.markdown.read_text("utf-8")


@pytest.mark.parametrize(
    "changes", [(), ASKED, NOISE, SPREAD, ("model.compression=4", "devices.nesting=fold")]
)
def test_every_way_repeats_bit_for_bit_and_goes_on_where_it_stopped(
    changes: tuple[str, ...], tmp_path: Path
) -> None:
    started(tmp_path / "a", *changes, key=b"k" * 32)
    with pytest.raises(Interrupted):
        started(tmp_path / "b", *changes, key=b"k" * 32, observer=Stop(2))
    resumed = lifecycle.resume(tmp_path / "b", observer=Silent()).payload
    assert resumed["rounds"] == ROUNDS
    assert np.array_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    started(tmp_path / "c", *changes, key=b"other" * 8)
    # Rounding, noise and hash functions are of the root, so another one gives other bits.
    assert not np.array_equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    ("changes", "sigma"), [(NOISE, 1.0), (SPREAD, 2.0)], ids=["central", "distributed"]
)
def test_the_stated_epsilon_is_that_of_its_rounds(
    changes: tuple[str, ...], sigma: float, tmp_path: Path
) -> None:
    payload = started(tmp_path / "a", *changes)
    rate = scenario(*changes).devices.sampling_rate
    simple = epsilon([RoundEvent("gaussian", sigma, rate)] * ROUNDS, 1e-5, "recipients")
    assert payload["privacy"]["charges"] == ROUNDS
    assert payload["privacy"]["epsilon"] == pytest.approx(simple, rel=0.02)
    assert build(tmp_path / "a").privacy.private


def test_the_noise_on_the_sum_is_that_of_the_event(tmp_path: Path) -> None:
    sums: dict[str, np.ndarray] = {}
    original = Server.apply

    def kept(self: Server, release: Any) -> None:
        sums.setdefault(self.plan.event.mechanism, release.total.copy())
        original(self, release)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "apply", kept)
        # Nobody is sampled in either but in one of e^20 runs, so the sum is noise alone.
        started(tmp_path / "a", *NOISE, "devices.sampling_rate=1e-9", "train.rounds=1")
    noise = sums["gaussian"]
    bound = 2**13  # of a grid of 2^13 / C, in its own units, but for the rounding's slack
    assert abs(noise.std() / bound - 1) < 0.06
    assert abs(noise.mean()) < 5 * noise.std() / len(noise) ** 0.5


def test_no_device_moves_the_sum_by_more_than_the_bound(tmp_path: Path) -> None:
    of = scenario(*NOISE, "train.local_lr=1000")
    split = data.load_texts(of.data)
    parts = assemble(of, split.train, "run", SecretRoot.known(b"d"))
    round = parts.server.next_round(0)
    parts.simulation.sampling_rate = 1.0
    layout, bound = parts.federation.layout, parts.server.plan.protection.encoding.bound
    largest = 0.0
    tier = parts.federation.tiers[0]
    for _, update, _ in parts.simulation.answers(
        round, parts.server.weights, tier, np.arange(USERS)
    ):
        total = np.zeros(layout.size, np.int64)
        update.add_to(total, layout)
        largest = max(largest, float(np.linalg.norm(total)))
    assert 0.9 * bound < largest <= bound


def test_the_whole_secure_sum_gives_the_same_bits(tmp_path: Path) -> None:
    few = ("train.rounds=2", "devices.min_cohort=2")
    started(tmp_path / "a", *few, key=b"k" * 32)
    started(tmp_path / "b", *few, "run.secure_sum=full", key=b"k" * 32)
    assert np.array_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_released_vocabulary_is_charged_before_the_first_round(tmp_path: Path) -> None:
    changes = (*NOISE, "devices.popularity=released", "devices.popularity_epsilon=1.0",
               "devices.popularity_items=5", "data.vocabulary=50")  # fmt: skip
    payload = started(tmp_path / "a", *changes)
    alone = started(tmp_path / "b", *NOISE)["privacy"]["epsilon"]
    lines = (tmp_path / "a" / "ledger.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    first = next(entry for entry in entries if entry["kind"] == "charge")
    assert first["round"] == PREPARATION
    assert payload["privacy"]["epsilon_popularity"] == pytest.approx(1.0, rel=0.01)
    assert payload["privacy"]["epsilon"] > alone
    assert payload["data"]["items"] == 50
    assert build(tmp_path / "a").privacy.charges == ROUNDS + 1
    again = started(tmp_path / "c", *changes)["metrics"]
    assert again != payload["metrics"]  # other noise, another vocabulary


def test_a_released_count_of_private_texts_needs_a_public_list_of_words(tmp_path: Path) -> None:
    released = ("data.source=text", "data.users=", "data.items=", "data.clusters=",
                "data.interactions_per_user=", "devices.popularity=released",
                "devices.popularity_epsilon=1.0")  # fmt: skip
    with pytest.raises(ScenarioError, match=r"data\.words"):
        scenario(*NOISE, *released)
    words = tmp_path / "words.txt"
    words.write_text("the\nriver\nmountain\nharbour\nof\nin\n", "utf-8")
    payload = started(tmp_path / "a", *NOISE, *released, f"data.words={words}", "train.budget=1.0")
    assert payload["data"]["items"] == 8


@pytest.mark.parametrize(
    "noise", [NOISE, SPREAD, ("run.secure_sum=full", "devices.min_cohort=2"),
              ("model.compression=2",), ("train.selector=scan",)],
)  # fmt: skip
def test_asking_the_server_goes_with_no_promise_of_privacy(noise: tuple[str, ...]) -> None:
    with pytest.raises(ScenarioError, match=r"train\.scheme"):
        scenario(*ASKED, *noise)


def test_what_a_request_tells_is_in_the_result_and_the_report(tmp_path: Path) -> None:
    payload = started(tmp_path / "a", *ASKED)
    assert payload["reveals"]["statement"] == REVEALED
    assert payload["reveals"]["words_a_request"] > 10
    assert payload["reveals"]["buckets_a_request"] > 0
    notices = [notice for notice in build(tmp_path / "a").warnings if REVEALED in notice.text]
    assert [notice.level for notice in notices] == ["serious"]
    private = started(tmp_path / "b")
    assert private["reveals"] == {"scheme": "private", "statement": KEPT}
    assert not any(REVEALED in notice.text for notice in build(tmp_path / "b").warnings)
    # Asked for, an update moves its own neurons alone; else the whole vector, whatever it chose.
    assert payload["cost"]["upload_bytes"] < 0.8 * private["cost"]["upload_bytes"]
    assert private["cost"]["upload_bytes"] == 4 * private["model"]["coefficients"]


def test_a_private_device_asks_the_server_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "privrec.server.columns.ColumnServer.hashed", lambda *_: pytest.fail("it asked")
    )
    of = scenario()
    task = NextWords(of, data.load_texts(of.data))
    assert task.columns is None
    parts = assemble(of, task.split.train, "run", SecretRoot.known(b"d"))
    round = parts.server.next_round(0)
    assert parts.simulation.collect(round, parts.server.weights).cohort > 0


def test_devices_of_every_capacity_train_on_texts(tmp_path: Path) -> None:
    tiers = "devices.tiers=[{capacity=1.0,share=0.5},{capacity=0.25,share=0.5}]"
    payload = started(tmp_path / "a", tiers, "train.budget=0.9")
    assert [tier["items"] for tier in payload["tiers"]] == [WORDS, WORDS // 4]
    assert payload["tiers"][1]["upload_bytes"] < payload["tiers"][0]["upload_bytes"]


def test_output_costs_fall_with_the_share() -> None:
    def cost(*changes: str) -> Any:
        of = scenario(*changes)
        parts = assemble(of, data.load_texts(of.data).train, "run", SecretRoot.known(b"d"))
        return of_output(parts.simulation.cohorts[0], of, 20)

    full = cost("train.loss=full_softmax", "train.selector=each")
    few = cost("train.selector=uniform", "train.budget=0.3")
    assert (full["output_neurons"], few["output_neurons"]) == (WORDS, 36)
    # Scores, their gradient on states and that on rows: three products.
    assert full["output_multiply_adds"] == 3 * 20 * WORDS * 16
    assert few["output_multiply_adds"] == 3 * 20 * 36 * 16
    assert few["output_bytes"] / full["output_bytes"] == pytest.approx(0.3)
    assert few["selection_multiply_adds"] == full["selection_multiply_adds"] == 0
    assert cost()["selection_multiply_adds"] == 16 * WORDS * 17


def test_the_plan_knows_the_length_of_the_model() -> None:
    for changes in ((), ("model.layers=3", "model.ffn=7"), ("data.vocabulary=50",)):
        of = scenario(*changes)
        words = of.data.vocabulary or WORDS
        assert coefficients(of) == federation_of(of, words).layout.size


def test_memory_of_a_device_is_measured_for_both_schemes(tmp_path: Path) -> None:
    for name, changes in (("a", ()), ("b", ASKED)):
        payload = started(tmp_path / name, *changes, "run.footprint=true")
        assert 0 < payload["cost"]["device_peak_bytes"] < 2**28


def test_rows_over_seeds_have_intervals(tmp_path: Path) -> None:
    text = TINY + '[[rows]]\nname = "few"\nset = { "train.budget" = 0.3 }\n'
    of = Scenario.from_toml(text, ["run.seeds=2", "train.rounds=1"])
    first = lifecycle.start(of, out=tmp_path / "a", observer=Silent())
    result = with_rows(first, of, data_dir=None, observer=Silent())
    (row,) = result.payload["rows"]
    assert row["output_neurons"] == 36
    low, high = row["intervals"]["accuracy@1"]
    assert low <= row["accuracy@1"] <= high
    build(tmp_path / "a")


def test_other_learners_and_other_data_do_not_mix() -> None:
    with pytest.raises(ScenarioError, match=r"model\.kind"):
        scenario("model.kind=gmf")
    with pytest.raises(ScenarioError, match=r"train\.selector"):
        scenario("train.loss=full_softmax")
    with pytest.raises(ScenarioError, match=r"model\.heads"):
        scenario("model.heads=3")
    with pytest.raises(ScenarioError, match=r"train\.frequent"):
        scenario("train.frequent=0.8")
    with pytest.raises(ScenarioError, match=r"run\.engine"):
        scenario("run.engine=device")
    plain = 'name = "x"\n[privacy]\nnoise = "none"\n'
    with pytest.raises(ScenarioError, match=r"train\.scheme"):
        Scenario.from_toml(plain, ["train.scheme=requested"])
    with pytest.raises(ScenarioError, match=r"data\.vocabulary"):
        Scenario.from_toml(plain, ["data.vocabulary=30"])


def test_hash_functions_of_devices_differ() -> None:
    of = scenario()
    parts = assemble(of, data.load_texts(of.data).train, "run", SecretRoot.known(b"d"))
    functions = Draws.of(SecretRoot.known(b"d"), parts.server.next_round(0), 0).functions
    assert functions(1).bytes(8) != functions(2).bytes(8)


def test_devices_one_by_one_train_as_their_cohort() -> None:
    """Their coins are others, so each device's rounding may differ by a step."""
    of, sums = scenario(), []
    train = data.load_texts(of.data).train
    for engine in ("cohort", "device"):
        parts = assemble(of, train, "run", SecretRoot.known(b"d"))
        simulation = replace(parts.simulation, engine=engine)
        sums.append(simulation.collect(parts.server.next_round(0), parts.server.weights))
    together, alone = (aggregate.total for aggregate in sums)
    assert sums[0].loss == pytest.approx(sums[1].loss)
    assert 0 < np.abs(together - alone).max() <= sums[0].cohort
    assert np.abs(together).max() > 10 * sums[0].cohort


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse-fl-next-word", "sparse-fl-capacity"])
def test_the_scenarios_run_offline_on_the_small_text(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "scenarios" / f"{name}.toml"
    of = load(path, ["train.rounds=2", "train.warmup_rounds=0", "run.seeds=1"])
    small = tuple(row for row in of.rows if "data.source" not in row.set)
    of = of.model_copy(update={"rows": small})
    first = lifecycle.start(of, out=tmp_path / "a", observer=Silent())
    result = with_rows(first, of, data_dir=None, observer=Silent())
    assert result.payload["data"]["text"] == "embedded"
    rows = {row["name"]: row for row in result.payload["rows"]}
    assert list(rows) == [row.name for row in of.rows]
    full = next(row for row in rows.values() if row.get("train.loss") == "full_softmax")
    for row in rows.values():
        work = row["output_multiply_adds"] / full["output_multiply_adds"]
        assert work == pytest.approx(row.get("train.budget", of.train.budget), abs=0.02)
