"""The command line: what each command prints, where, and with which exit code."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from click.testing import Result
from commands import call, done
from scipy import stats

import privrec
from privrec import errors
from privrec.cli import machine
from privrec.cli import main as cli
from privrec.cli.console import print_json
from privrec.cli.main import main
from privrec.run.recommend import TrainedModel
from privrec.run.record import epsilon_text
from privrec.scenario import load as scenario

ROOT = Path(__file__).resolve().parents[2]
TINY = """
name = "tiny"
title = "A tiny run"
[data]
users = 40
items = 20
clusters = 2
interactions_per_user = 6
[model]
dim = 4
block = 2
[devices]
population = 40
sampling_rate = 0.5
[train]
rounds = 3
[privacy]
noise = "central"
clip_norm = 1.0
epsilon = 8.0
[run]
footprint = false
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a state directory of their own, and a scenario."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PRIVREC_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run, and what running it printed."""
    place = tmp_path_factory.mktemp("finished")
    (place / "tiny.toml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIVREC_STATE", str(place / "state"))
        patch.setenv("COLUMNS", "120")
        words = ("-s", "run.footprint=true", "--out", place / "run")
        result = done("run", place / "tiny.toml", *words)
    return place / "run", result


# --------------------------------------------------------------------------- help


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = dict(commands(main))
EVERY_COMMAND = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


def examples(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("privrec ")]


@EVERY_COMMAND
def test_help_ends_with_an_example_of_the_command_itself(path: tuple[str, ...]) -> None:
    text = done(*path, "--help").stdout
    heading, found = text.rstrip().rpartition("Example")[1:]
    assert heading
    assert examples(found)
    assert len(examples(found)) == len(found.strip().splitlines()) - 1
    for example in examples(found):
        assert example.startswith(" ".join(["privrec", *path]))


@EVERY_COMMAND
def test_examples_of_the_help_can_be_parsed(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    for example in examples(command.epilog or ""):
        words = shlex.split(example)[1 + len(path) :]
        with command.make_context(path[-1], words):
            pass


@EVERY_COMMAND
def test_every_command_and_option_is_documented(path: tuple[str, ...]) -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    section = page.partition(f"\n## privrec {' '.join(path)}\n")[2].partition("\n## ")[0]
    assert f"privrec {' '.join(path)}" in section.partition("```bash")[2]
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Option):
            assert any(f"`{name}" in section for name in parameter.opts), parameter.opts


@EVERY_COMMAND
def test_what_lists_something_can_do_so_for_programs(path: tuple[str, ...]) -> None:
    names = {name for parameter in COMMANDS[path].params for name in parameter.opts}
    assert "--json" in names or path in {
        ("data", "fetch"),
        ("report", "key"),
        ("report", "schema"),
        ("scenario", "schema"),
    }


def test_commands_stand_in_the_order_of_first_use() -> None:
    text = done("--help").stdout.partition("Commands:")[2]
    places = [text.index(f"\n  {name} ") for name in main.commands]
    assert places == sorted(places)
    assert "130 interrupted" in done("--help").stdout


def test_the_version_is_that_of_the_package() -> None:
    assert done("--version").stdout == "privrec, version 0.1.0\n"


def loaded_after(*words: str) -> set[str]:
    program = (
        "import sys\nfrom click.testing import CliRunner\nfrom privrec.cli.main import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:])\n"
        "assert result.exit_code in (0, 2), result.output\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("run", "--help"),
        ("plan", "tiny.toml", "--json"),
        ("run", "tiny.toml", "-s", "train.rounds=0"),
        ("data", "list"),
        ("recommend", "nothing"),
    ],
    ids=" ".join,
)
def test_what_needs_only_the_scenario_does_not_load_torch(words: tuple[str, ...]) -> None:
    assert not loaded_after(*words) & {"torch", "opacus"}


def test_help_loads_no_numbers_at_all() -> None:
    assert not loaded_after("run", "--help") & {"numpy", "scipy", "pydantic", "rich", "jinja2"}


# --------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PrivrecError("value, rule, remedy"), 1),
        (errors.UsageError("value, rule, remedy"), 2),
        (errors.UnknownIdError("value, rule, remedy"), 2),
        (errors.BudgetError("value, rule, remedy"), 3),
        (errors.DataError("value, rule, remedy"), 4),
        (errors.IntegrityError("value, rule, remedy"), 4),
        (errors.ReleaseRefused("value, rule, remedy"), 5),
        (errors.Interrupted("value, rule, remedy"), 130),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: errors.PrivrecError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("privrec.run.lifecycle.start", fail)
    result = call("run", "tiny.toml")
    assert result.exit_code == code
    word = "interrupted" if code == 130 else "error"
    assert result.stderr == f"{word}: value, rule, remedy\n"
    assert not result.stdout


def test_ctrl_c_anywhere_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("privrec.scenario.load.load", stop)
    result = call("plan", "tiny.toml")
    assert result.exit_code == 130
    assert result.stderr.lstrip().startswith("interrupted; ")


def test_an_option_that_is_a_key_of_the_scenario_is_named() -> None:
    refused = call("run", "tiny.toml", "--epsilon", "4")
    assert refused.exit_code == 2
    assert "Did you mean -s privacy.epsilon=VALUE?" in refused.stderr
    assert "--json" not in refused.stderr
    assert "Did you mean --user" in call("recommend", "run", "--users", "4").stderr


def test_a_full_disk_is_named_and_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "out/model")

    monkeypatch.setattr("privrec.run.lifecycle.start", fail)
    result = call("run", "tiny.toml")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: out/model: No space left on device; check")

    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("privrec.run.lifecycle.start", fault)
    assert isinstance(call("run", "tiny.toml").exception, ZeroDivisionError)


def test_a_run_that_its_budget_stopped_is_reported(
    finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = finished
    (directory / "report.html").unlink()

    def fail(*_: object, **__: object) -> None:
        raise errors.BudgetError("spent")

    monkeypatch.setattr("privrec.run.lifecycle.resume", fail)
    assert call("resume", directory).exit_code == 3
    assert (directory / "report.html").is_file()


def test_interrupted_by_a_signal_then_resumed(place: Path) -> None:
    words = [sys.executable, "-m", "privrec", "run", "tiny.toml", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*words, "-s", "train.rounds=100000", "-s", "privacy.epsilon=",
         "-s", "privacy.noise_multiplier=500", "-s", "devices.sampling=everybody"],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stderr is not None
    seen = [process.stderr.readline()]
    while "round" not in (line := process.stderr.readline()):
        seen.append(line)
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode == 130, rest
    assert seen[0].startswith("Simulated run: tiny")
    assert "interrupted: stopped after round" in rest
    assert "error" not in rest
    assert "privrec resume run" in rest
    assert "Traceback" not in rest
    assert not (place / "run" / "result.json").exists()
    again = subprocess.Popen(
        [*words[:3], "resume", "run"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert again.stderr is not None
    assert "going on after round" in again.stderr.readline()
    time.sleep(0.2)
    again.send_signal(signal.SIGINT)
    again.communicate()
    assert again.returncode == 130


# --------------------------------------------------------------------------- run and what follows


def test_a_run_says_simulated_first_and_ends_with_figures_and_the_report(
    finished: tuple[Path, Result],
) -> None:
    directory, result = finished
    assert result.stderr.startswith("Simulated run: tiny (A tiny run), 3 rounds")
    assert result.stdout.startswith("Simulated run: tiny, 3 rounds")
    assert "outside the guarantee" in result.stdout
    payload = json.loads((directory / "result.json").read_text())
    for adversary in ("epsilon", "epsilon_server"):
        # Rounded up, never down.
        value = payload["privacy"][adversary]
        assert any(f"ε = {value + extra:.3f}" in result.stdout for extra in (0, 0.0005))
    assert f"{payload['metrics']['hr@10']:.4f}" in result.stdout
    assert result.stdout.splitlines()[-1] == f"Report: {directory / 'report.html'}"
    for name in ("report.html", "report.md", "report.json", "scenario.toml", "ledger.jsonl"):
        assert (directory / name).is_file()


def test_json_is_the_result_and_nothing_else() -> None:
    result = done("run", "tiny.toml", "--out", "run", "--json")
    assert json.loads(result.stdout) == json.loads(Path("run/result.json").read_text())
    assert json.loads(result.stdout)["simulated"] is True


def test_a_run_without_noise_says_so() -> None:
    words = ("-s", "privacy.noise=none", "-s", "privacy.epsilon=", "--out", "run")
    result = done("run", "tiny.toml", *words)
    assert "no privacy guarantee" in result.stdout
    assert "ε =" not in result.stdout


def test_a_run_without_a_limit_on_epsilon_is_reported() -> None:
    words = ("-s", "privacy.noise_multiplier=1.5", "-s", "privacy.epsilon=", "--out", "run")
    result = done("run", "tiny.toml", *words)
    assert "without a limit on ε" in result.stderr
    assert "None set for this run" in Path("run/report.html").read_text(encoding="utf-8")


def test_no_table_promises_anything_against_the_trusted_server(
    finished: tuple[Path, Result],
) -> None:
    for text in (finished[1].stdout, done("plan", "tiny.toml").stdout):
        assert "against the server" not in text
    assert "against somebody who knows every cohort" in finished[1].stdout
    assert "Cost (outside the guarantee)" in finished[1].stdout


ROWS = """
[[rows]]
name = "strict"
set = { "privacy.epsilon" = 1.0 }
[[rows]]
name = "ranking"
set = { "train.loss" = "bpr", "train.rounds" = 2 }
"""


def test_one_row_is_run_alone_or_none(place: Path) -> None:
    (place / "tiny.toml").write_text(TINY + ROWS)
    done("run", "tiny.toml", "--row", "ranking", "--out", "one")
    one, found = json.loads(Path("one/result.json").read_text()), scenario.load("one/scenario.toml")
    assert (found.title, found.train.loss, one["rounds"], found.rows) == ("ranking", "bpr", 2, ())
    done("run", "tiny.toml", "-s", "rows=", "--out", "none")
    for folder in ("one", "none"):
        assert "rows" not in json.loads(Path(folder, "result.json").read_text())
    refused = call("run", "tiny.toml", "--row", "bare", "--out", "two")
    assert refused.exit_code == 2
    assert "tiny.toml has 'strict', 'ranking'; name one" in refused.stderr
    assert "has no rows" in call("run", "tiny.toml", "-s", "rows=[]", "--row", "strict").stderr


SEEDED = """
[[rows]]
name = "alike"
set = { "run.footprint" = true }
[[rows]]
name = "mixed"
set = { "devices.tiers" = [{ capacity = 1.0, share = 0.5 }, { capacity = 0.5, share = 0.5 }] }
"""


def test_rows_over_several_seeds_give_means_and_intervals(place: Path) -> None:
    (place / "tiny.toml").write_text(TINY + SEEDED)
    settings = ("-s", "run.seeds=3", "-s", 'run.baselines=["popularity", "ease"]')
    printed = done("run", "tiny.toml", "--out", "seeded", *settings).stdout
    payload = json.loads(Path("seeded/result.json").read_text())
    assert set(payload["baselines"]) == {"popularity", "ease"}
    for index, row in enumerate(payload["rows"]):
        folders = [f"{index}", f"{index}-1", f"{index}-2"]
        found = [json.loads(Path(f"seeded/rows/{f}/result.json").read_text()) for f in folders]
        seeds = [scenario.load(Path(f"seeded/rows/{f}/scenario.toml")).run.seed for f in folders]
        assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
        assert row["seeds"] == [each["run_id"] for each in found]
        values = [each["metrics"]["ndcg@10"] for each in found]
        assert len(set(values)) > 1
        assert row["ndcg@10"] == pytest.approx(np.mean(values))
        reach = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
        assert row["intervals"]["ndcg@10"] == pytest.approx(
            [np.mean(values) - reach, np.mean(values) + reach]
        )
        # Memory is measured once where it is asked for, and is that of a real process.
        peaks = [each["tiers"][0]["device_peak_bytes"] for each in found]
        assert (peaks[0] or 0) > 0 if row["name"] == "alike" else peaks[0] is None
        assert peaks[1:] == [None, None]
    alike, mixed = payload["rows"]
    assert "own_ndcg@10" not in alike
    assert [tier["capacity"] for tier in mixed["tiers"]] == [1.0, 0.5]
    uploads = [tier["upload_bytes"] for tier in mixed["tiers"]]
    assert uploads[1] < 0.6 * uploads[0]
    own = np.mean([tier["ndcg@10"] for tier in mixed["tiers"]])
    assert mixed["own_ndcg@10"] == pytest.approx(own, abs=0.02)  # tiers of about one size
    assert "±" in printed
    assert "ease (centralised)" in printed


def test_rows_are_run_and_listed_and_resumed_where_they_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "tiny.toml").write_text(TINY + ROWS)
    from privrec.run import lifecycle

    begun: list[str] = []

    def fail_once(scenario: Any, **words: Any) -> Any:
        begun.append(scenario.title)
        if begun == ["A tiny run", "strict", "ranking"]:
            raise errors.Interrupted("stopped")
        return original(scenario, **words)

    original = lifecycle.start
    monkeypatch.setattr(lifecycle, "start", fail_once)
    stopped = call("run", "tiny.toml", "--out", "run")
    assert stopped.exit_code == 130, stopped.output
    result = done("resume", "run")
    assert begun == ["A tiny run", "strict", "ranking", "ranking"]
    payload = json.loads(Path("run/result.json").read_text())
    strict, ranking = payload["rows"]
    assert (strict["name"], strict["privacy.epsilon"]) == ("strict", 1.0)
    assert strict["epsilon"] <= 1 < payload["privacy"]["epsilon"]
    assert (ranking["train.loss"], ranking["train.rounds"]) == ("bpr", 2)
    assert {"hr@10", "upload_bytes"} <= set(ranking)
    assert "ranking" in result.stdout
    assert len(json.loads(Path("run/report.json").read_text())["rows"]) == 2
    assert "rows" not in json.loads(Path("run/rows/0/result.json").read_text())


def test_runs_are_numbered(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def begin(_: object, *, out: Path, **words: object) -> None:
        begun.append(out)
        raise errors.UsageError("enough")

    monkeypatch.setattr("privrec.run.lifecycle.start", begin)
    call("run", "tiny.toml")
    (place / "runs" / "tiny-1").mkdir(parents=True)
    (place / "runs" / "tiny-3").mkdir()
    call("run", "tiny.toml")
    assert begun == [Path("runs/tiny-1"), Path("runs/tiny-2")]


def test_an_empty_folder_is_a_place_for_a_run(place: Path) -> None:
    (place / "run").mkdir()
    done("run", "tiny.toml", "-s", "train.rounds=1", "--out", "run")
    assert (place / "run" / "result.json").is_file()


def test_resuming_a_finished_run_shows_its_result(
    finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, first = finished
    assert call("resume", directory).exit_code == 2  # without its key nothing vouches for it
    monkeypatch.setenv("PRIVREC_STATE", str(directory.parent / "state"))
    assert done("resume", directory).stdout == first.stdout


def test_report_names_its_files_and_prints_json(finished: tuple[Path, Result]) -> None:
    directory, _ = finished
    names = [Path(line).name for line in done("report", directory).stdout.splitlines()]
    assert names == ["report.html", "report.md", "report.json", "report.registry.yaml"]
    payload = json.loads(done("report", directory, "--json").stdout)
    assert payload == json.loads((directory / "report.json").read_text())


def test_recommendations_for_a_user_have_titles_and_leave_out_the_history(
    finished: tuple[Path, Result],
) -> None:
    directory, _ = finished
    table = done("recommend", directory, "--user", "3", "-k", "4").stdout
    assert "Recommendations for user 3" in table
    assert "of group" in table
    found = json.loads(done("recommend", directory, "--user", "3", "-k", "4", "--json").stdout)
    assert [entry["rank"] for entry in found] == [1, 2, 3, 4]
    assert set(found[0]) == {"rank", "item_id", "title", "score"}
    assert all(entry["title"].startswith(f"Item {entry['item_id']} ") for entry in found)


def test_recommendations_for_a_file_of_liked_items(
    finished: tuple[Path, Result], place: Path
) -> None:
    directory, _ = finished
    (place / "liked.txt").write_text("# what I like\n5\n\n  7\n")
    words = ("recommend", directory, "--history", "liked.txt", "-k", "6", "--json")
    found = {entry["item_id"] for entry in json.loads(done(*words).stdout)}
    assert len(found) == 6
    assert not found & {"5", "7"}
    assert "the history in liked.txt" in done(*words[:-1]).stdout


def test_items_like_one_are_listed(finished: tuple[Path, Result], place: Path) -> None:
    directory, _ = finished
    words = ("recommend", directory, "--similar-to", "5", "-k", "3")
    assert "Items like 5" in done(*words).stdout
    found = json.loads(done(*words, "--json").stdout)
    near = privrec.load(directory).similar_items("5", k=3).to_pylist()
    assert [(each["item_id"], each["score"]) for each in found] == [
        (str(each["item"]), each["score"]) for each in near
    ]
    assert "no such item" in call("recommend", directory, "--similar-to", "nothing").stderr


def test_every_user_that_is_named_gets_a_list(finished: tuple[Path, Result]) -> None:
    directory, _ = finished
    words = ("recommend", directory, "--user", "3", "--user", "1", "-k", "4")
    table = done(*words).stdout
    assert table.index("Recommendations for user 3") < table.index("Recommendations for user 1")
    found = json.loads(done(*words, "--json").stdout)
    assert [entry.pop("user") for entry in found] == [*["3"] * 4, *["1"] * 4]
    for user, own in (("3", found[:4]), ("1", found[4:])):
        alone = done("recommend", directory, "--user", user, "-k", "4", "--json").stdout
        for one, two in zip(own, json.loads(alone), strict=True):
            assert one.pop("score") == pytest.approx(two.pop("score"), rel=1e-4)
            assert one == two


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_lists_of_all_users_are_written_as_a_table(
    ending: str, finished: tuple[Path, Result], place: Path
) -> None:
    directory, _ = finished
    said = done("recommend", directory, "--all", "-k", "3", "-o", f"r.{ending}").stdout
    read = {"csv": pyarrow.csv.read_csv, "parquet": pyarrow.parquet.read_table}
    table = read[ending](place / f"r.{ending}")
    assert table.column_names == ["user", "rank", "item", "title", "score"]
    users = len(set(table["user"].to_pylist()))
    assert table.num_rows == 3 * users
    assert f"wrote r.{ending}: {table.num_rows} recommendations" in said
    assert table["rank"].to_pylist() == [1, 2, 3] * users
    words = ("recommend", directory, "--user", "3", "-k", "3", "--json")
    rows = [row for row in table.to_pylist() if row["user"] == 3]
    for row, entry in zip(rows, json.loads(done(*words).stdout), strict=True):
        assert (str(row["item"]), row["title"]) == (entry["item_id"], entry["title"])
        assert row["score"] == pytest.approx(entry["score"], rel=1e-4)
    (place / "liked.txt").write_text("5\n7\n")
    words = ("recommend", directory, "--history", "liked.txt", "-k", "2", "-o", f"h.{ending}")
    payload = json.loads(done(*words, "--json").stdout)
    assert payload == {"file": f"h.{ending}", "rows": 2}
    assert read[ending](place / f"h.{ending}").column_names == ["rank", "item", "title", "score"]
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_what_is_exported_scores_items_as_the_model_does(
    finished: tuple[Path, Result], place: Path
) -> None:
    directory, _ = finished
    assert "wrote items.npz" in done("export", directory, "--items", "items.npz").stdout
    payload = json.loads(done("export", directory, "--items", "i.parquet", "--json").stdout)
    table = pyarrow.parquet.read_table(place / "i.parquet")
    with np.load(place / "items.npz") as file:
        items = dict(file)
    assert payload == {"file": "i.parquet", "items": len(items["ids"])}
    model = TrainedModel.read(directory)
    (state,) = model.fit(model.history(["5", "7"]))
    scores = items["vectors"] @ state[:-1] + items["biases"] + state[-1]
    np.testing.assert_allclose(scores, model.scores(state[None])[0], rtol=1e-4, atol=1e-5)
    assert table["item"].to_pylist() == items["ids"].tolist() == model.catalogue.ids.tolist()
    assert table["title"].to_pylist() == items["titles"].tolist() == model.catalogue.titles
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), items["vectors"])
    np.testing.assert_array_equal(table["bias"].to_numpy(), items["biases"])


def test_users_of_a_relative_path_are_found_from_anywhere(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"u{user},i{(user * 7 + step * 3) % 20}" for user in range(30) for step in range(5)]
    (place / "own.csv").write_text("\n".join(["user,item", *rows]))
    words = ("-s", "data.source=table", "-s", "data.path=own.csv", "-s", "devices.population=")
    monkeypatch.delenv("PRIVREC_DATA")
    done("run", "tiny.toml", *words, "--out", "run")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert len(json.loads(done("recommend", "../run", "--user", "u3", "--json").stdout)) == 10


def test_a_network_is_not_exported_as_vectors(place: Path) -> None:
    done("run", "tiny.toml", "-s", "model.kind=neumf", "--out", "net")
    refused = call("export", "net", "--items", "items.npz")
    assert refused.exit_code == 2
    assert "a network makes the scores" in refused.stderr
    assert not (place / "items.npz").exists()


def test_runs_are_compared(
    finished: tuple[Path, Result], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = finished
    done("run", "tiny.toml", "-s", "name=other", "-s", "privacy.epsilon=4", "--out", "other")
    table = done("compare", directory, "other", "--out", "page.html").stdout
    assert "tiny" in table
    assert "other" in table
    assert "<html" in (place / "page.html").read_text()
    rows = json.loads(done("compare", directory, "other", "--json").stdout)["rows"]
    assert [row["name"] for row in rows] == ["tiny", "other"]
    assert rows[0]["epsilon"] > rows[1]["epsilon"]
    # In a pipe: fields with tabs between them. On a narrow terminal: a column a run.
    headings, *lines = [line.split("\t") for line in table.splitlines()]
    assert headings[:3] == ["run", "rounds", "ε, recipients"]
    found = json.loads(done("compare", directory, "other", "--json").stdout)
    epsilons = [epsilon_text(row["epsilon"], 3) for row in rows]
    assert [line[2] for line in lines] == [*epsilons, ""]
    assert {len(line) for line in lines} == {len(headings)}
    hits = [row["hr@10"] for row in (*rows, found["popularity"])]
    assert [line[headings.index("HR@10")] for line in lines] == [f"{each:.4g}" for each in hits]
    assert found["settings"]["privacy.epsilon"] == ["8.0", "4.0"]
    assert [line[headings.index("privacy.epsilon")] for line in lines] == ["8.0", "4.0", ""]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("privrec.cli.console.terminal_width", lambda: 80)
    narrow = done("compare", directory, "other").stdout.splitlines()
    assert "HR@10, full ranking" in "\n".join(narrow)
    assert max(map(len, narrow)) <= 80
    assert narrow[1].split() == ["tiny", "other", "popularity"]
    # No heading is broken across lines; the settings that differ follow.
    title = narrow.index("Settings that differ")
    assert title == len(headings) - len(found["settings"]) + 2
    assert ["privacy.epsilon", "8.0", "4.0"] in [line.split() for line in narrow[title:]]


def test_the_key_that_a_reviewer_needs_is_printed(
    finished: tuple[Path, Result], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = finished
    assert "does not keep its key" in call("report", "key", directory).stderr
    monkeypatch.setenv("PRIVREC_STATE", str(directory.parent / "state"))
    (place / "server.pub").write_text(done("report", "key", directory).stdout)
    monkeypatch.setenv("PRIVREC_STATE", str(place / "state"))
    for name in ("report.json", "report.html", "report.md"):
        done("report", "verify", directory / name, "--key", "server.pub")


def test_the_demo_ends_with_recommendations_and_the_report(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "QUICKSTART", "tiny.toml")
    lines = done("demo").stdout.splitlines()
    assert "Recommendations for user 7" in lines
    assert lines[-2:] == ["Run:    runs/tiny-1", "Report: runs/tiny-1/report.html"]
    payload = json.loads(done("demo", "--json").stdout)
    assert len(payload["recommendations"]) == 10
    assert Path(payload["report"]).is_file()


def test_sinks_are_opened_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Sink:
        def __init__(self, where: object) -> None:
            opened.append(where)
            raise errors.UsageError("no such service")

    monkeypatch.setattr("privrec.run.record.MLflowSink", Sink)
    result = call("run", "tiny.toml", "--mlflow", "mine", "--out", "run")
    assert (result.exit_code, opened) == (2, ["mine"])
    assert not Path("run").exists()


# --------------------------------------------------------------------------- plan


def planned(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("plan", "tiny.toml", *words, "--json").stdout)
    return found


def test_the_plan_meets_the_target_with_the_accountants_own_figures() -> None:
    from privrec.privacy.events import RoundEvent, epsilon

    plan = planned("-s", "train.rounds=40")
    event = {RoundEvent("gaussian", plan["noise_multiplier"], 0.5): 40}
    assert plan["epsilon"] == epsilon(event, 1e-5, "recipients") <= 8
    assert plan["epsilon_server"] == epsilon(event, 1e-5, "server") > plan["epsilon"]
    rounds = [entry["round"] for entry in plan["epsilon_by_round"]]
    assert len(rounds) == 10
    assert (rounds[0], rounds[-1]) == (1, 40)
    spent = [entry["epsilon"] for entry in plan["epsilon_by_round"]]
    assert spent == sorted(spent)
    assert spent[-1] == plan["epsilon"]


def test_the_plan_states_its_spare_attempts() -> None:
    from privrec.privacy.events import RoundEvent, epsilon

    words = ("-s", "train.rounds=10", "-s", "privacy.spare_attempts=4")
    plan, without = planned(*words), planned(*words[:2])
    assert "epsilon_at_most" not in without
    event = RoundEvent("gaussian", plan["noise_multiplier"], 0.5)
    assert plan["epsilon"] == epsilon({event: 10}, 1e-5, "recipients")
    assert plan["epsilon_at_most"] == epsilon({event: 14}, 1e-5, "recipients") <= 8
    assert plan["epsilon"] < 7.5 < without["epsilon"] <= 8
    text = " ".join(done("plan", "tiny.toml", *words).stdout.split())
    assert f"4; with all of them ε = {plan['epsilon_at_most']:.2f}" in text
    other = ("-s", "privacy.epsilon=", "-s", "privacy.noise_multiplier=2")
    refused = call("plan", "tiny.toml", *words, *other)
    assert refused.exit_code == 2
    assert "room within a target" in refused.output


def test_the_plan_against_the_server_needs_more_noise() -> None:
    against_all = planned("-s", "privacy.budget_against=server")
    assert against_all["noise_multiplier"] > planned()["noise_multiplier"]
    assert against_all["epsilon_server"] <= 8


def test_signal_to_noise_is_that_of_aligned_updates() -> None:
    plan = planned("-s", "privacy.clip_norm=0.5")
    signal, sigma = plan["signal"], plan["noise_multiplier"]
    assert plan["expected_cohort"] == 20
    assert signal["signal_norm"] == 10
    assert signal["noise_per_coefficient"] == pytest.approx(0.5 * sigma)
    assert signal["ratio_per_coefficient"] == pytest.approx(20 / sigma)
    assert signal["ratio"] == pytest.approx(20 / sigma / signal["coefficients"] ** 0.5)


MIXED = [{"capacity": 0.25, "share": 0.5}, {"capacity": 1.0, "share": 0.5}]
WEAK = [{"capacity": 0.25, "share": 0.5}, {"capacity": 0.5, "share": 0.5}]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.item_bias": False},
        {"model.compression": 3.0},
        {"model.kind": "mlp", "model.dim": 6},
        {"model.kind": "neumf", "model.dim": 6, "model.hidden": (9, 5)},
        {"devices.tiers": MIXED},
        {"devices.tiers": WEAK, "model.compression": 3.0},
        {"devices.tiers": WEAK, "model.kind": "neumf"},
        {"devices.tiers": WEAK, "devices.popularity": "public"},
        {"devices.tiers": WEAK, "devices.popularity": "public", "model.item_bias": False},
        {"devices.tiers": WEAK, "devices.nesting": "dims", "model.block": 1},
        {"train.loss": "ials", "model.item_bias": False},
        {
            "devices.tiers": WEAK,
            "devices.nesting": "dims",
            "model.block": 1,
            "train.loss": "ials",
            "model.item_bias": False,
        },
    ],
)
def test_coefficients_are_those_of_the_model_that_is_built(settings: dict[str, Any]) -> None:
    from privrec.cli.plan import coefficients
    from privrec.run.plan import federation_of
    from privrec.scenario.load import Scenario

    scenario = Scenario.from_toml(TINY).with_settings(settings)
    layout = federation_of(scenario, scenario.data.items).layout
    assert coefficients(scenario) == layout.size


def test_a_plan_of_published_data_needs_no_data() -> None:
    plan = planned(
        *("-s", "data.source=ml-1m"),
        *(word for key in ("users", "items", "clusters", "interactions_per_user")
          for word in ("-s", f"data.{key}=")),
        *("-s", "devices.population="),
    )  # fmt: skip
    assert plan["population"] == 6040
    assert plan["signal"]["coefficients"] == 3706 * (4 + 1)
    assert not Path("runs").exists()


def test_a_plan_without_a_population_says_what_is_missing() -> None:
    (warning,) = planned(
        *("-s", "data.source=table", "-s", "devices.population="),
        *(word for key in ("users", "items", "clusters", "interactions_per_user")
          for word in ("-s", f"data.{key}=")),
    )["warnings"]  # fmt: skip
    assert "devices.population is unset" in warning


def test_a_plan_warns_of_a_large_delta_and_a_small_cohort() -> None:
    warnings = planned("-s", "privacy.delta=0.05", "-s", "devices.sampling_rate=0.1")["warnings"]
    assert "privacy.delta = 0.05 is not below 1 / population = 0.025" in warnings[0]
    assert "4 devices on average" in warnings[1]
    assert not planned("-s", "devices.sampling_rate=0.5")["warnings"]


def test_a_plan_warns_where_the_two_epsilons_are_far_apart() -> None:
    rounds, rare = ("-s", "train.rounds=40"), ("-s", "devices.sampling_rate=0.05")
    many = ("-s", "devices.population=4000", "-s", "data.users=4000")
    plan = planned(*rounds, *rare, *many)
    assert plan["epsilon_server"] > 5 * plan["epsilon"]
    (warning,) = plan["warnings"]
    assert f"{math.ceil(plan['epsilon_server'] * 1000) / 1000:.3f} against somebody" in warning
    known = planned(*rounds, *rare, *many, "-s", "privacy.budget_against=server")
    assert known["epsilon_server"] > 5 * known["epsilon"]  # who is told of the cohorts has the less
    everybody = planned(*rounds, *many, "-s", "devices.sampling=everybody")
    assert everybody["epsilon"] == everybody["epsilon_server"]
    assert not everybody["warnings"]


def test_a_plan_without_noise_promises_nothing() -> None:
    words = ("-s", "privacy.noise=none", "-s", "privacy.epsilon=")
    plan = planned(*words)
    assert plan["epsilon"] is plan["epsilon_server"] is plan["signal"] is None
    assert "no privacy guarantee" in done("plan", "tiny.toml", *words).stdout


@pytest.mark.parametrize(
    ("local", "against"),
    [("example", "whoever sees a device's upload"), ("shares", "whoever sees the sums")],
)
def test_a_plan_says_whom_single_interactions_are_hidden_from(local: str, against: str) -> None:
    changes = (
        "privacy.noise=none", "privacy.epsilon=", f"privacy.local={local}", "train.user_steps=0",
        "privacy.local_clip_norm=1", "privacy.local_epsilon=6", "privacy.clip_norm=10",
        "privacy.scale_bits=16", "train.loss=bpr", "train.selector=each", "devices.min_cohort=2",
    )  # fmt: skip
    words = [word for change in changes for word in ("-s", change)]
    plan, text = planned(*words), done("plan", "tiny.toml", *words).stdout
    assert plan["epsilon"] is None
    assert 5.9 < plan["examples"]["epsilon"] <= plan["examples"]["budget"] == 6
    assert plan["examples"]["delta"] == 1e-7
    assert against in text


@pytest.mark.parametrize("noise", ["1e-300", "1e-160", "1e-20", "1e6"])
@pytest.mark.parametrize("clip_norm", ["1e-30", "1e6"])
@pytest.mark.parametrize("delta", ["1e-10", "0.5"])
def test_a_plan_of_extremes_is_json(noise: str, clip_norm: str, delta: str) -> None:
    words = [f"privacy.{name}" for name in ("epsilon=", f"noise_multiplier={noise}")]
    words += [f"privacy.clip_norm={clip_norm}", f"privacy.delta={delta}"]
    text = done("plan", "tiny.toml", *(w for word in words for w in ("-s", word)), "--json").stdout
    found = json.loads(text, parse_constant=pytest.fail)
    assert (found["epsilon"] is None) == (noise in ("1e-300", "1e-160"))
    assert done("plan", "tiny.toml", *(w for word in words for w in ("-s", word))).stdout


@pytest.mark.parametrize(
    "word",
    ["clip_norm=1e30", "clip_norm=inf", "delta=1e-11", "delta=1", "noise_multiplier=inf"],
)
def test_a_plan_beyond_the_extremes_is_refused(word: str) -> None:
    result = call("plan", "tiny.toml", "-s", f"privacy.{word}", "--json")
    assert result.exit_code == 2
    assert word.partition("=")[0] in result.stderr


def test_json_has_no_word_for_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"spent": math.inf, "runs": [math.nan, -math.inf, 1e300, "Infinity"]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "spent": None, "runs": [None, None, 1e300, "Infinity"]
    }  # fmt: skip


def test_a_plan_has_the_rows_of_its_scenario(place: Path) -> None:
    rows = '[[rows]]\nname = "strict"\nset = { "privacy.epsilon" = 1.0 }\n'
    (place / "tiny.toml").write_text(TINY + rows)
    plan = planned()
    assert [row["name"] for row in plan["rows"]] == ["strict"]
    assert plan["rows"][0]["epsilon"] <= 1 < plan["epsilon"]
    assert "Row strict" in done("plan", "tiny.toml").stdout


def test_the_printed_plan_rounds_epsilon_up() -> None:
    plan, table = planned(), done("plan", "tiny.toml").stdout
    shown = next(line.split() for line in table.splitlines() if line.split()[:1] == ["3"])
    for text, value in zip(shown[1:], (plan["epsilon"], plan["epsilon_server"]), strict=True):
        assert value <= float(text) < value + 0.001


# --------------------------------------------------------------------------- data


def test_the_list_of_data_says_what_is_here(place: Path) -> None:
    (place / "cache" / "ml-1m").mkdir(parents=True)
    (place / "more").mkdir()
    (place / "more" / "ml-100k.zip").write_bytes(b"")
    rows = json.loads(done("data", "list", "--data", "more", "--json").stdout)
    found = {row["name"]: row["found"] for row in rows}
    assert found["ml-1m"] == str(place / "cache" / "ml-1m")
    assert found["ml-100k"] == "more/ml-100k.zip"
    assert found["ml-25m"] is None
    listed = done("data", "list").stdout
    assert "not found" in listed
    assert "Looked in" in listed


def test_a_data_set_is_described_by_name_or_scenario() -> None:
    by_name = done("data", "describe", "synthetic", "-s", "data.users=50", "--json").stdout
    assert json.loads(by_name)["users"] == 50
    by_file = json.loads(done("data", "describe", "tiny.toml", "--json").stdout)
    assert (by_file["users"], by_file["items"]) == (40, 20)
    assert "heldout" in done("data", "describe", "tiny.toml").stdout


def test_a_table_is_described_as_it_is_found(place: Path) -> None:
    rows = ("a;7;1/2/2024", "a;8;1/13/2024", "b;7;1/2/2024", "a;7;1/3/2024")
    (place / "orders.csv").write_text("\n".join(("CustomerID;SKU;bought", *rows)))
    found = json.loads(done("data", "describe", "orders.csv", "--json").stdout)
    assert (found["users"], found["items"], found["repeats_left_out"]) == (2, 2, 1)
    printed = done("data", "describe", "orders.csv", "-s", "data.time_column=bought").stdout
    for words in ("';'", "CustomerID", "SKU", "bought", "month first", "repeats left out"):
        assert words in printed
    wrong = call("data", "describe", "nothing.csv")
    assert wrong.exit_code == errors.DataError.exit_code
    assert "nothing.csv: no such file" in wrong.stderr


def test_fetch_prints_the_path_and_the_terms_apart(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(name: str, *, directory: Path | None, echo: Any) -> Path:
        echo(f"terms of {name}")
        return (directory or Path("nowhere")) / f"{name}.zip"

    monkeypatch.setattr("privrec.data.catalogue.fetch", pretend)
    result = done("data", "fetch", "ml-1m", "--data", "here")
    assert (result.stdout, result.stderr) == ("here/ml-1m.zip\n", "terms of ml-1m\n")


def test_a_result_below_popularity_is_warned_of(
    finished: tuple[Path, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    payload = json.loads((finished[0] / "result.json").read_text())
    popular = payload["baselines"]["popularity"]["hr@10"]
    assert popular > 0
    for found, warned in ((popular / 2, True), (popular, False)):
        cli.print_result({**payload, "metrics": {**payload["metrics"], "hr@10": found}})
        assert ("of the commonest items for everybody" in capsys.readouterr().out) == warned


# --------------------------------------------------------------------------- doctor


def test_the_doctor_finds_a_healthy_machine(place: Path) -> None:
    findings = {entry["name"]: entry for entry in json.loads(done("doctor", "--json").stdout)}
    assert {"python", "packages", "threads", "secure generator", "AES speed", "data"} <= set(
        findings
    )
    assert findings["state directory"]["level"] == "ok"
    assert str(place / "state") in findings["state directory"]["detail"]
    assert not list((place / "state").iterdir())
    assert "privrec doctor" in done("doctor").stdout


def test_the_doctor_fails_where_the_state_cannot_be_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("PRIVREC_STATE", str(place / "file" / "state"))
    result = call("doctor")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "set PRIVREC_STATE" in result.stdout
    assert "error: state directory" in result.stderr


def test_the_doctor_survives_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> machine.Found:
        raise RuntimeError("no cipher")

    monkeypatch.setattr(machine, "CHECKS", {"AES speed": broken})
    finding = machine.examine()[0]
    assert (finding.name, finding.level) == ("AES speed", "fail")
    assert "no cipher" in finding.detail


def test_the_doctor_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2", "no-such-thing>=1", "nor-this; extra == 'track'", "x; extra == 'dev'"]
    monkeypatch.setattr(machine, "requires", lambda name: declared)
    findings = {finding.name: finding for finding in machine.examine()}
    assert findings["packages"].level == "fail"
    assert findings["packages"].detail == "missing: no-such-thing"
    assert findings["extra track"].level == "note"
    assert "extra dev" not in findings


def test_the_doctor_looks_into_the_extras_of_what_an_extra_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared = {
        "privrec": ["torch>=2", "numpy[fast]<9,>=1 ; extra == 'flower'"],
        "numpy": ["no-such-ray==2; python_version > '3' and extra == 'fast'", "x; extra == 'y'"],
    }
    monkeypatch.setattr(machine, "requires", lambda name: declared.get(name, []))
    (found,) = (each for each in machine.examine() if each.name == "extra flower")
    assert (found.level, found.detail) == ("note", "missing: no-such-ray")
    assert found.remedy.startswith("pip install 'numpy[fast]<9,>=1'")


def test_nothing_advises_to_install_privrec_from_a_registry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared = [f"no-such-thing; extra == '{extra}'" for extra in machine.EXTRAS]
    monkeypatch.setattr(machine, "requires", lambda name: declared)
    for finding in machine.examine():
        assert not re.search(r"pip install\S* *['\"]?privrec", finding.remedy), finding
    for path in (Path(machine.__file__).parents[1]).rglob("*"):
        if path.suffix in (".py", ".in", ".toml"):
            text = " ".join(path.read_text("utf-8").split())
            assert not re.search(r"pip install ['\"]?privrec", text), path


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_local_superlink_of_another_environment_is_named(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(sys.executable).parent if where == "here" else tmp_path
    command = f"{folder}/python {folder}/flower-superlink --insecure --simulation --port 39091"
    listed = f"  17 /usr/bin/vim flower-superlink\n  4711 {command}\n"
    done = subprocess.CompletedProcess([], 0, listed)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
    (found,) = (each for each in machine.examine() if each.name == "local SuperLink")
    assert found.level == ("ok" if where == "here" else "note")
    assert ("kill 4711" in found.remedy) == (where == "elsewhere")


def test_flower_init_names_what_the_next_command_needs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setattr(machine, "_lacking", lambda requirement: ["ray"])
    result = done("flower", "init", "my-app")
    assert "pip install 'flwr[simulation]': ray" in result.stderr
    assert "120 devices" in result.stdout
    assert "num-supernodes=N" in result.stdout
    assert result.stdout.endswith(
        "  flwr run my-app --stream\n  privrec report verify ~/privrec-runs/my-app\n"
    )
    template = (place / "my-app" / "recommender" / "scenario.toml").read_text("utf-8")
    files = template.replace('"synthetic"\nusers = 120\nitems = 200', '"ml-100k"')
    (place / "movies.toml").write_text(files.replace("population = 120", "population = 943"))
    (place / "home" / "privrec-runs" / "two").mkdir(parents=True)
    said = json.loads(done("flower", "init", "two", "--scenario", "movies.toml", "--json").stdout)
    *_, data, taken = said["first"]
    assert data.startswith("privrec data fetch ml-100k: ")
    assert taken.startswith("move ~/privrec-runs/two away")


def test_a_new_app_asks_no_registry_for_anything(place: Path) -> None:
    done("flower", "init", "my-app")
    project = tomllib.loads((place / "my-app" / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dependencies"] == []
    # Where a run goes is decided on the machine that writes it, whoever made the app.
    assert project["tool"]["flwr"]["app"]["config"]["out"] == "~/privrec-runs/my-app"
    assert str(Path.home()) not in "".join(
        path.read_text("utf-8") for path in (place / "my-app").rglob("*") if path.is_file()
    )


# --------------------------------------------------------------------------- scenarios


def test_the_schema_of_scenarios_is_json() -> None:
    schema = json.loads(done("scenario", "schema").stdout)
    assert "adagrad" not in schema["$defs"]["Train"]["properties"]["server_optimizer"]["enum"]


# --------------------------------------------------------------------------- the package


def test_the_package_offers_its_names_lazily() -> None:
    import privrec
    from privrec.scenario.load import load

    assert privrec.load_scenario is load
    assert set(privrec.__all__) <= set(dir(privrec))
    with pytest.raises(AttributeError, match="no_such_name"):
        privrec.no_such_name  # noqa: B018
