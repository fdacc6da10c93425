"""The scenario: what is accepted, how it is changed, what it hashes to."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scenario_keys import reference

from privrec.errors import ScenarioError
from privrec.scenario.keys import as_toml, json_schema, keys
from privrec.scenario.kinds import PUBLISHED, REGISTRIES
from privrec.scenario.load import Privacy, Scenario, load

ROOT = Path(__file__).resolve().parents[2]
PLAIN = 'name = "plain"\n[privacy]\nnoise = "none"\n'
PRIVATE = 'name = "private"\n[privacy]\nnoise = "central"\nclip_norm = 1.0\nepsilon = 8\n'
ROWS = (
    PLAIN
    + '[[rows]]\nname = "a"\nset = { "train.loss" = "bpr" }\n'
    + '[[rows]]\nname = "b"\nset = { "model.dim" = 64, "data.source" = "ml-1m" }\n'
)


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ScenarioError) as caught:
        Scenario.from_toml(text, overrides)
    return caught.value.problems


@pytest.mark.parametrize("text", [PLAIN, PRIVATE, ROWS])
def test_toml_and_back(text: str) -> None:
    scenario = Scenario.from_toml(text)
    assert Scenario.from_toml(scenario.to_toml()) == scenario
    assert Scenario.from_toml(scenario.to_toml()).hash() == scenario.hash()


def test_json_holds_the_same_as_toml() -> None:
    scenario = Scenario.from_toml(ROWS)
    assert json.loads(json.dumps(scenario.document())) == tomllib.loads(scenario.to_toml())


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_any_text_survives_toml(text: str) -> None:
    scenario = Scenario.from_toml(PLAIN).with_settings({"title": text})
    assert Scenario.from_toml(scenario.to_toml()).title == text


@given(st.floats(min_value=1e-10, max_value=0.999))
def test_any_number_survives_toml(delta: float) -> None:
    scenario = Scenario.from_toml(PLAIN).with_settings({"privacy.delta": delta})
    assert Scenario.from_toml(scenario.to_toml()).privacy.delta == delta


def test_the_resolved_toml_names_only_what_the_source_reads() -> None:
    synthetic = tomllib.loads(Scenario.from_toml(PLAIN).to_toml())["data"]
    published = tomllib.loads(Scenario.from_toml(PLAIN, ["data.source=ml-1m"]).to_toml())["data"]
    assert "users" in synthetic
    assert "user_column" not in synthetic
    assert set(published) == {"source", "holdout", "item_features"}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.rounds=7", "train.rounds", 7),
        ("train.loss=bpr", "train.loss", "bpr"),
        ('train.loss="softmax"', "train.loss", "softmax"),
        ("train.server_lr = 1", "train.server_lr", 1.0),
        ("run.top_k=[5, 20]", "run.top_k", (5, 20)),
        ("model.item_bias=false", "model.item_bias", False),
        ("title=/some/where=odd", "title", "/some/where=odd"),
        ("title=one two", "title", "one two"),
        ("privacy.delta=1e-6", "privacy.delta", 1e-6),
    ],
)
def test_overrides(override: str, path: str, value: object) -> None:
    found: object = Scenario.from_toml(PLAIN, [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_an_empty_one_removes() -> None:
    overrides = ["train.rounds=7", "train.rounds=9", "privacy.epsilon=", "privacy.noise=none"]
    scenario = Scenario.from_toml(PRIVATE, overrides)
    assert scenario.train.rounds == 9
    assert scenario.privacy.epsilon is None


def test_an_override_cannot_smuggle_in_a_second_key() -> None:
    assert "train.rounds" in problems(PLAIN, "train.rounds=7\nother = 1")[0]


def test_everything_wrong_is_reported_at_once() -> None:
    text = """
        name = "bad name"
        round = 3
        [data]
        source = "ml1m"
        [model]
        dim = 30
        [train]
        loss = "BPR"
        clip_norm = 1
        rounds = true
        [pravicy]
        [privacy]
        noise = "central"
        epsilon = 8
        noise_multiplier = 1
    """
    found = "\n".join(problems(text, "train.negatives=0.5", "nonsense"))
    for part in (
        'name = "bad name"',
        "round = 3",
        'did you mean "ml-1m"?',
        "model.block = 16: must divide model.dim = 30; use 15",
        'did you mean "bpr"?',
        "did you mean privacy.clip_norm?",
        "train.rounds = true: must be a whole number of at least 1",
        "did you mean [privacy]?",
        "privacy.clip_norm is unset",
        "excludes privacy.noise_multiplier = 1",
        "train.negatives = 0.5",
        "-s 'nonsense'",
    ):
        assert part in found
    assert found.count("\n") == 11


def test_no_word_of_the_validator_gets_through() -> None:
    found = "\n".join(problems('name = 3\n[data]\nusers = "x"\n[model]\nhidden = [0]\ndim = nan\n'))
    for jargon in ("Input should", "pydantic", "validation error", "int_parsing", "literal"):
        assert jargon not in found


def test_a_key_with_a_problem_of_its_own_has_no_second_one() -> None:
    assert len(problems(PLAIN, "model.block=0")) == 1
    assert len(problems(PRIVATE, "privacy.clip_norm=-1")) == 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.round", "train.rounds"),
        ("train.learning_rate", "train"),
        ("data.user", "data.users"),
        ("rounds", "train.rounds"),
        ("model.epsilon", "privacy.epsilon"),
        ("privacy.noise_multipler", "privacy.noise_multiplier"),
        ("run.name", "name"),
    ],
)
def test_the_nearest_key_is_named(wrong: str, right: str) -> None:
    (problem,) = problems(PLAIN, f"{wrong}=1")
    assert problem.startswith(f"{wrong} = 1: there is no such key")
    assert right in problem.partition("key;")[2]


def test_everybody_is_a_rate_of_one() -> None:
    overrides = ["devices.sampling=everybody", "devices.sampling_rate=0.3"]
    assert Scenario.from_toml(PLAIN, overrides).devices.sampling_rate == 1.0


def test_a_scenario_is_frozen() -> None:
    scenario = Scenario.from_toml(PLAIN)
    with pytest.raises(ValidationError):
        scenario.train.rounds = 3  # type: ignore[misc]


def test_the_constructor_checks_what_keys_mean_together() -> None:
    with pytest.raises(ValidationError, match="clip_norm"):
        Scenario(name="x", privacy=Privacy(noise="central", epsilon=1.0))


@pytest.mark.parametrize(
    "setting",
    [
        {"privacy.epsilon": 4.0},
        {"privacy.delta": 1e-6},
        {"privacy.clip_norm": 2.0},
        {"privacy.budget_against": "server"},
        {"privacy.spare_attempts": 1},
        {"devices.sampling_rate": 0.1},
        {"devices.sampling": "everybody"},
        {"train.rounds": 3},
    ],
)
def test_the_privacy_hash_covers_what_the_guarantee_depends_on(setting: dict[str, object]) -> None:
    scenario = Scenario.from_toml(PRIVATE)
    assert scenario.with_settings(setting).privacy_hash() != scenario.privacy_hash()


@pytest.mark.parametrize("setting", [{"model.dim": 64}, {"train.server_lr": 3.0}, {"run.seed": 4}])
def test_the_privacy_hash_covers_nothing_else(setting: dict[str, object]) -> None:
    scenario = Scenario.from_toml(PRIVATE)
    changed = scenario.with_settings(setting)
    assert changed.privacy_hash() == scenario.privacy_hash()
    assert changed.hash() != scenario.hash()


def test_hashes_are_the_same_everywhere() -> None:
    # Checkpoints and ledgers hold them: a change here breaks resuming what older versions wrote.
    text = (
        PRIVATE
        + "scale_bits = 13\ndelta = 1e-5\nbudget_against = 'recipients'\n"
        + "[devices]\nsampling_rate = 0.05\n[train]\nrounds = 100\n"
    )
    expected = "8bfd4069c1b3d436879b9350a6dd8d526ffc3f961fc7abc53512d65e457ebfb6"
    assert Scenario.from_toml(text).privacy_hash() == expected


def test_prose_does_not_enter_the_hash() -> None:
    scenario = Scenario.from_toml(PLAIN)
    prose = {"title": "A title", "description": "Words"}
    assert scenario.with_settings(prose).hash() == scenario.hash()


def test_variants_are_the_scenario_with_a_few_keys_changed() -> None:
    scenario = Scenario.from_toml(ROWS)
    (first, a), (second, b) = scenario.variants.items()
    assert (first, second) == ("a", "b")
    assert a.train.loss == "bpr"
    assert (b.model.dim, b.data.source) == (64, "ml-1m")
    assert a.model == scenario.model
    assert not a.rows


def test_a_wrong_row_is_named() -> None:
    (problem,) = problems(ROWS.replace('"bpr"', '"ranking"'))
    assert problem.startswith('rows[0] (a): train.loss = "ranking"')
    (problem,) = problems(ROWS.replace('name = "b"', 'name = "a"'))
    assert 'rows[1] (a).name = "a": two rows of the same name' in problem


@pytest.mark.parametrize(("source", "users"), [(name, of[0]) for name, of in PUBLISHED.items()])
def test_populations_of_published_data_are_known(source: str, users: int) -> None:
    scenario = Scenario.from_toml(PLAIN, [f"data.source={source}", "devices.sampling_rate=0.1"])
    assert scenario.population() == users
    assert scenario.expected_cohort() == pytest.approx(users / 10)


def test_a_declared_population_comes_first_and_an_unknown_one_is_unknown() -> None:
    assert Scenario.from_toml(PLAIN, ["data.users=50"]).population() == 50
    assert Scenario.from_toml(PLAIN, ["devices.population=60"]).population() == 60
    table = Scenario.from_toml(PLAIN, ["data.source=table"])
    assert table.population() is None
    assert table.expected_cohort() is None


def test_load_reads_a_file_with_a_byte_order_mark_and_names_it_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.encode())
    assert load(path).name == "plain"
    with pytest.raises(ScenarioError, match=r"mine\.toml: 1 problem\n"):
        load(path, ["train.rounds=0"])


def test_every_scenario_of_the_repository_is_one() -> None:
    paths = sorted((ROOT / "scenarios").glob("*.toml"))
    assert paths
    for path in paths:
        assert load(path).title


def test_a_scenario_that_comes_with_privrec_is_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("quickstart") == load(ROOT / "scenarios" / "quickstart.toml")
    with pytest.raises(ScenarioError, match="that come with privrec: .*ml-1m-dp, .*quickstart"):
        load("quickest")
    (tmp_path / "quickstart").write_text((ROOT / "scenarios" / "ml-1m.toml").read_text())
    assert load("quickstart").name == "ml-1m"  # a file of that name comes first


def test_a_wheel_has_the_scenarios_of_the_repository() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"] == {
        f"scenarios/{path.name}": f"privrec/scenario/built_in/{path.name}"
        for path in (ROOT / "scenarios").glob("*.toml")
    }


def test_words_go_with_the_privacy_that_they_were_written_for() -> None:
    path = ROOT / "scenarios" / "ml-100k.toml"
    noisy = ["privacy.noise=central", "privacy.epsilon=8"]
    assert "no privacy noise" in load(path, ["train.rounds=3"]).title
    assert load(path, noisy).title == load(path, noisy).description == ""
    assert load(path, [*noisy, "title=Ours"]).title == "Ours"


PAGE = ROOT / "docs" / "scenarios.md"
SCHEMA = ROOT / "docs" / "schemas" / "scenario.json"


def test_every_key_has_a_meaning() -> None:
    assert all(key.meaning and key.rule != "a value" for key in keys())
    assert all(registry[name].meaning for registry in REGISTRIES for name in registry)


@pytest.mark.parametrize("table", reference())
def test_the_documentation_has_the_tables_of_keys(table: str) -> None:
    heading = f"## [{table}]\n" if table else "## Above the tables\n"
    section = PAGE.read_text("utf-8").partition(heading)[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    wanted = [line for line in reference()[table].splitlines() if line]
    assert rows == wanted, f"write them anew: python {ROOT / 'docs' / 'scenario_keys.py'}"


def test_the_schema_for_editors_is_kept() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == json_schema(Scenario)


def accepted(text: str) -> bool:
    """Whether the schema for editors takes a document."""
    validator = jsonschema.Draft202012Validator(json_schema(Scenario))
    return validator.is_valid(tomllib.loads(text))


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ("", True),
        ("[train]\nbeta1 = 0.5", True),
        ("[train]\nmomentum = 0.5", False),
        ("[train]\nserver_optimizer = 'sgd'\nmomentum = 0.5", True),
        ("[train]\nserver_optimizer = 'sgd'\nbeta1 = 0.5", False),
        ("[train]\nserver_optimizer = 'adagrad'", False),
        ("[data]\nsource = 'table'\nuser_column = 1", True),
        ("[data]\nuser_column = 1", False),
        ("[data]\nsource = 'table'\nusers = 9", False),
        ("[model]\nwords = 1", False),
    ],
)
def test_the_schema_for_editors_knows_the_keys_of_each_kind(more: str, taken: bool) -> None:
    assert accepted(PLAIN + more) is taken
    if taken:
        Scenario.from_toml(PLAIN + more)
    else:
        problems(PLAIN + more)


def test_every_scenario_of_the_repository_satisfies_the_schema() -> None:
    for path in sorted((ROOT / "scenarios").glob("*.toml")):
        assert accepted(path.read_text("utf-8")), path


@pytest.mark.parametrize(
    ("key", "owner", "chosen"),
    [
        ("data.user_column='u'", 'data.source = "table"', 'the source is "synthetic"'),
        ("model.hidden=[4]", 'model.kind = "mlp" or "neumf"', 'the model is "gmf"'),
        ("train.item_l2=0.1", 'train.loss = "ials"', 'the loss is "bce"'),
        ("train.budget=0.1", 'train.selector other than "each"', 'the selector is "each"'),
        ("train.momentum=0.1", 'train.server_optimizer = "sgd"', 'optimiser is "fedadam"'),
    ],
)
def test_a_key_of_another_kind_is_refused_with_its_owner(key: str, owner: str, chosen: str) -> None:
    (problem,) = problems(PLAIN, key)
    assert owner in problem
    assert chosen in problem
    assert f"remove it (-s {key.partition('=')[0]}=)" in problem


def test_a_change_of_kind_takes_the_keys_of_the_former_kind_away() -> None:
    base = ["train.server_optimizer=sgd", "train.momentum=0.5"]
    scenario = Scenario.from_toml(PLAIN + "[train]\nbeta1 = 0.5\n", base)
    assert scenario.train.momentum == 0.5
    assert not hasattr(scenario.train, "beta1")
    again = scenario.with_settings({"train.server_optimizer": "fedadam", "train.beta2": 0.5})
    assert (again.train.beta1, again.train.beta2) == (0.9, 0.5)
    with pytest.raises(ScenarioError, match=r"train\.momentum"):
        scenario.with_settings({"train.server_optimizer": "fedadam", "train.momentum": 0.4})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unset"),
        (True, "true"),
        ('a"b\n', '"a\\"b\\n"'),
        ([1, 2.5], "[1, 2.5]"),
        ({"a.b": 1}, '{ "a.b" = 1 }'),
        ({}, "{}"),
    ],
)
def test_values_are_shown_as_toml(value: object, text: str) -> None:
    assert as_toml(value) == text


SOFTMAX = ("train.loss=softmax", "train.selector=hamming")


def test_a_selector_needs_a_softmax_over_vectors() -> None:
    Scenario.from_toml(PLAIN, SOFTMAX)
    (found,) = problems(PLAIN, "train.selector=scan")
    assert "train.loss" in found
    (found,) = problems(PLAIN, *SOFTMAX, "model.kind=neumf")
    assert "no nearest items" in found
    Scenario.from_toml(PLAIN, ("train.loss=softmax", "train.selector=uniform", "model.kind=neumf"))
    problems(PLAIN, *SOFTMAX, "train.selected=1.0")  # never all-hard


def test_sampling_by_popularity_needs_public_counts_and_any_nesting() -> None:
    by_popularity = ("train.loss=softmax", "train.selector=popularity")
    (found,) = problems(PLAIN, *by_popularity)
    assert "public" in found
    public = (*by_popularity, "devices.popularity=public")
    Scenario.from_toml(PLAIN, public)
    Scenario.from_toml(PLAIN, (*public, "devices.nesting=fold"))
    # Without that selector, an order that is not used is refused as before.
    problems(PLAIN, "devices.popularity=public", "devices.nesting=fold")
