"""``privrec init``: from a table to a scenario that trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from commands import call, done

from privrec.cli.init import _toml
from privrec.cli.plan import planned
from privrec.errors import DataError, ScenarioError, UsageError
from privrec.run.plan import federation_of
from privrec.scenario.defaults import NOISE, REACH, delta_for, private_settings
from privrec.scenario.load import Scenario, load

ORDERS = """\
CustomerID;SKU;Stars;When
a;7;5;03/28/2024 06:46
a;8;4;03/28/2024 06:47
a;7;1;03/29/2024 06:46
b;7;3;04/01/2024 10:00
b;9;5;04/02/2024 10:00
c;8;2;04/01/2024 10:00
c;9;5;04/02/2024 10:00
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table and titles, and a state directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "Shop orders.csv").write_text(ORDERS)
    (tmp_path / "names.csv").write_text("SKU,name\n7,Cup\n8,Mug\n")
    return tmp_path


def test_a_table_becomes_a_scenario_that_trains_and_recommends(place: Path) -> None:
    printed = done("init", "Shop orders.csv", "--titles", "names.csv").stdout
    for words in ("';'", "CustomerID", "SKU", "When", "month first", "repeats left out"):
        assert words in printed
    assert "warning: A round has 3 devices on average" in printed
    assert printed.splitlines()[-2:] == [
        "  privrec plan Shop-orders.toml",
        "  privrec run Shop-orders.toml",
    ]
    scenario = load("Shop-orders.toml")
    assert scenario.data.model_dump(exclude_defaults=True) == {
        "source": "table", "path": "Shop orders.csv", "separator": ";",
        "user_column": "CustomerID", "item_column": "SKU", "rating_column": "Stars",
        "time_column": "When", "titles": "names.csv", "title_column": "name",
    }  # fmt: skip
    assert (scenario.devices.population, scenario.devices.sampling_rate) == (3, 1.0)
    assert (scenario.privacy.epsilon, scenario.privacy.delta) == (8.0, 1e-5)
    done("run", "Shop-orders.toml", "--out", "run", "-s", "train.rounds=2")
    assert "The test split was looked at" not in Path("run/report.md").read_text("utf-8")
    found = json.loads(done("recommend", "run", "--user", "b", "-k", "2", "--json").stdout)
    assert [each["title"] for each in found] == ["Mug"]  # she has the others, one held out


def test_noise_in_shares_is_planned_with_the_items_that_were_counted(place: Path) -> None:
    rows = [f"u{user},i{(user * step) % 40}" for user in range(200) for step in range(1, 8)]
    (place / "events.csv").write_text("\n".join(["user,item", *dict.fromkeys(rows)]))
    shared = ("-s", "privacy.noise=distributed")
    printed = done("init", "events.csv", *shared).stdout
    assert printed.splitlines()[-1] == "  privrec run events.toml"
    assert "privrec plan" not in printed
    said = call("plan", "events.toml").stderr
    assert "the number of items, for which the data has to be read" in said
    assert "devices.population" not in said
    text = (place / "events.toml").read_text().replace("population = 200\n", "")
    (place / "unknown.toml").write_text(text)
    said = call("plan", "unknown.toml").stderr
    assert "set devices.population" in said
    done("run", "events.toml", "--out", "run", "-s", "train.rounds=1")


def test_what_is_said_stands_in_the_scenario(place: Path) -> None:
    words = ("-s", "data.min_rating=3", "-s", "train.rounds=7", "-s", "train.loss=bce")
    done("init", "Shop orders.csv", "--out", "shop.toml", "--epsilon", "2", *words)
    text = Path("shop.toml").read_text()
    assert "# 3 users, 3 items and 3 interactions to learn from" in text
    scenario = load("shop.toml")
    assert (scenario.data.min_rating, scenario.train.rounds, scenario.train.loss) == (3, 7, "bce")
    assert scenario.privacy.epsilon == 2
    found = json.loads(done("init", "Shop orders.csv", "--out", "x.toml", "--json").stdout)
    assert found["scenario"] == "x.toml"
    assert {"what": "user", "taken": "CustomerID", "why": "its name"} in found["taken"]


def test_a_published_set_goes_by_its_name(place: Path) -> None:
    (place / "here").mkdir()
    ratings = "1\t10\t3\t100\n2\t10\t5\t300\n1\t20\t4\t200\n2\t30\t5\t400\n"
    (place / "here" / "u.data").write_text(ratings)
    words = ("ml-100k", "--epsilon", "4", "--data", "here", "-s", "data.max_history=9")
    printed = done("init", *words).stdout
    assert printed.splitlines()[-1] == "  privrec run ml-100k.toml --data here"
    assert "2 users, 3 items and 2 interactions" in Path("ml-100k.toml").read_text()
    scenario = load("ml-100k.toml")
    said = {"source": "ml-100k", "max_history": 9}
    assert scenario.data.model_dump(exclude_defaults=True) == said
    assert (scenario.devices.population, scenario.privacy.epsilon) == (2, 4.0)
    own = private_settings(2, 3, 2, epsilon=4.0, timed=True)["train"]
    assert scenario.train.server_lr == own["server_lr"]
    assert scenario.train.serve_recency == own["serve_recency"] > 0
    films = [f"{item}|Film ({1990 + item})||||" + "|".join("01" * 9 + "1") for item in (10, 20, 30)]
    (place / "here" / "u.item").write_text("\n".join(films))
    done("init", "ml-100k", "--data", "here", "--out", "told.toml")
    assert load("told.toml").data.item_features
    Path("told.toml").unlink()
    done(
        "init", "ml-100k", "--data", "here", "--out", "told.toml", "-s", "data.item_features=false"
    )
    assert not load("told.toml").data.item_features


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (("ml-20m", "--data", "."), "privrec data fetch ml-20m", DataError),
        (("Shop orders.csv", "--out", "names.csv"), "names.csv: this file is there", UsageError),
        (("nothing.csv",), "nothing.csv: no such file", DataError),
        (("names.csv",), "none of them is known as a column of users", DataError),
        (("Shop orders.csv", "-s", "data.min_usr=3"), "did you mean data.min_user", ScenarioError),
        (("Shop orders.csv", "-s", "train.lr=3"), "there is no such key", ScenarioError),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    place: Path, words: tuple[str, ...], says: str, code: type[UsageError]
) -> None:
    before = sorted(place.iterdir())
    result = call("init", *words)
    assert result.exit_code == code.exit_code
    assert says in result.stderr
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("users", [2, 943, 9_999, 10_000, 10_001, 138_493, 10**6, 10**9])
def test_delta_is_a_round_number_below_a_tenth_of_one_over_the_users(users: int) -> None:
    assert 1e-10 <= delta_for(users) <= min(1e-5, 1 / (10 * users))
    assert delta_for(users) >= min(1e-5, 1 / (100.0001 * users))


def test_the_step_of_the_server_is_that_which_was_found_by_hand() -> None:
    """On MovieLens 1M (36) and on the quickstart's data (6, in 30 rounds)."""
    large = private_settings(6040, 3706, 994_169)["train"]
    assert 36 / 1.5 < large["server_lr"] <= 36
    quick = private_settings(2000, 200, 58_000)["train"]
    assert quick["server_lr"] * 40 / 30 == pytest.approx(6.0, rel=0.1)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0, 50.0])
@pytest.mark.parametrize("users", [900, 4000, 10**6])
def test_noise_does_not_pile_up_beyond_what_was_good(users: int, epsilon: float) -> None:
    """By the noise that the accountant asks for; the estimate of it is within a third."""
    found = private_settings(users, 1000, 20 * users, epsilon=epsilon)
    plan = planned(Scenario.from_toml(_toml("sized", found)))
    lr = found["train"]["server_lr"]
    piled = lr * plan["noise_multiplier"] * math.sqrt(plan["rounds"]) / users
    assert piled <= NOISE * 1.1
    assert plan["epsilon_server"] <= epsilon
    reach = lr * 40 * math.sqrt(20) / 1000
    assert piled > NOISE / 1.5 or reach == pytest.approx(REACH, rel=0.1)


def test_vectors_are_short_where_an_item_tells_little_through_the_noise() -> None:
    def found(users: int, items: int, interactions: int, epsilon: float) -> int:
        tables = private_settings(users, items, interactions, epsilon=epsilon)
        assert "popularity" not in tables["devices"]  # a release that would cost budget
        return int(tables["model"]["dim"])

    movies = 6040, 3706, 994_169
    assert [found(*movies, epsilon) for epsilon in (1.0, 4.0, 8.0, 16.0)] == [8, 8, 16, 16]
    assert found(943, 1682, 99_057, 8.0) == 8
    assert found(1000, 300, 19_336, 8.0) == 8  # few users, and fewer items still
    assert found(1000, 300, 19_336, math.inf) == 16  # without noise


@pytest.mark.parametrize("items", [2, 300, 1682, 3706, 4097])
@pytest.mark.parametrize("each", [8, 12, 20, 36, 68, 1000])
def test_an_upload_is_as_large_as_it_may_be(items: int, each: int) -> None:
    """So many bytes for each item."""
    found = private_settings(10**6, items, 10**9, upload_bytes=each * items)
    scenario = Scenario.from_toml(_toml("sized", found))
    assert scenario.model.dim == min(16, each // 4 - 1)
    assert federation_of(scenario, items).tiers[0].layout.size * 4 == items * min(68, each)
    with pytest.raises(UsageError, match=f"{items:,} items take {8 * items:,} with one number"):
        private_settings(10**6, items, 10**9, upload_bytes=8 * items - 1)


def test_an_upload_can_be_limited_by_an_option(place: Path) -> None:
    done("init", "Shop orders.csv", "--out", "small.toml", "--upload-bytes", "80")
    assert load("small.toml").model.dim == 4
    result = call("init", "Shop orders.csv", "--out", "none.toml", "--upload-bytes", "23")
    assert "allow as much, or leave out rare items by data.min_item" in result.stderr
    assert result.exit_code == UsageError.exit_code
    assert not Path("none.toml").exists()


@pytest.mark.parametrize("items", [30, 20_000, 20_001, 10**6])
def test_settings_of_any_size_are_a_scenario(items: int) -> None:
    found = private_settings(5000, items, 100_000, epsilon=1.0)
    scenario = Scenario.from_toml(_toml("sized", found))
    assert scenario.train.loss == "full_softmax"
    assert (scenario.train.selector == "each") == (items <= 20_000)
