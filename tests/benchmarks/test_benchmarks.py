"""The benchmarks: what a claim is, the CPU meter, and a short run of each script."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scenarios" / "benchmarks"
BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"

NUMBER_OR_NULL = {"type": ["number", "null"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["rows", "claims", "machine"],
    "additionalProperties": False,
    "properties": {
        "rows": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": [
                    "name",
                    "vector_bytes",
                    "device_rounds",
                    "cpu_s_per_device_round",
                    "wall_s_per_device_round",
                    "times_privrec",
                ],
                "properties": {
                    "vector_bytes": {"type": "integer", "minimum": 4},
                    "device_rounds": {"type": "integer", "minimum": 1},
                    "cpu_s_per_device_round": {"type": "number", "exclusiveMinimum": 0},
                    "times_privrec": {"type": "number", "exclusiveMinimum": 0},
                },
            },
        },
        "claims": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "value", "target", "holds", "unit"],
                "properties": {
                    "value": NUMBER_OR_NULL,
                    "target": {"type": "number"},
                    "holds": {"type": "boolean"},
                },
            },
        },
        "machine": {"type": "object", "required": ["processor", "cores", "python", "packages"]},
    },
}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("_common", monkeypatch)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("simulation", monkeypatch)


@pytest.mark.parametrize(
    ("value", "sense", "holds"),
    [
        (25.0, "at least", True),
        (24.99, "at least", False),
        (25.0, "at most", True),
        (25.01, "at most", False),
        (None, "at least", False),
        (math.nan, "at least", False),
    ],
)
def test_a_claim_holds_when_measured_and_met(
    common: ModuleType, value: float | None, sense: str, holds: bool
) -> None:
    claim = common.Claim("ratio", value, 25.0, "times", sense)
    assert claim.holds is holds
    assert claim.to_json()["holds"] is holds
    assert ("holds" in str(claim)) is holds


def test_the_meter_counts_living_and_dead_children(common: ModuleType) -> None:
    before = common.cpu_of_tree()
    dead = BURN.format(seconds=0.2)
    alive = BURN.format(seconds=0.2) + "\nprint('done', flush=True); input()"
    subprocess.run([sys.executable, "-c", dead], check=True)
    with subprocess.Popen(
        [sys.executable, "-c", alive], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while_alive = common.cpu_of_tree().since(before)
        child.communicate("\n")
    after = common.cpu_of_tree().since(before)
    assert while_alive.total >= 0.38
    assert while_alive.total <= after.total < 1.5
    assert sum(after.by_name.values()) == pytest.approx(after.total)


def test_the_meter_ignores_processes_outside_the_tree(common: ModuleType) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BURN.format(seconds=0.1) + "\nprint('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        of_child = common.cpu_of_tree(child.pid).total
        assert 0.08 <= of_child < common.cpu_of_tree(os.getpid()).total
        child.communicate("\n")


def test_the_json_file_is_written_whole(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        common.write_json(path, {"rows": [math.nan]})
    assert path.read_text() == "old"
    common.write_json(path, {"rows": [1]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]


def sample(simulation: ModuleType, cpu_s: float, values: int = 1000) -> Any:
    mark = simulation.CpuMark(100 * cpu_s, {"python": 100 * cpu_s})
    return simulation.Sample(wall_s=1.0, cpu=mark, device_rounds=100, vector_bytes=4 * values)


def test_the_claim_takes_the_cheapest_documented_peer_of_equal_size(simulation: ModuleType) -> None:
    settings = simulation.Settings(3, 9, 2, 4, 50, None, True, False)
    names = list(simulation.flower_rows(settings, 1000))
    costs = {"privrec": 0.25, **dict(zip(names, (8.0, 9.0, 2.0, 4.0), strict=True))}
    values = {name: 16 if "tiny" in name else 1000 for name in costs}
    rows = [
        simulation.as_row(
            name, [sample(simulation, factor * cost, values[name]) for factor in (9, 1, 0.9)], 0.25
        )
        for name, cost in costs.items()
    ]
    assert [row["cpu_s_per_device_round"] for row in rows] == pytest.approx(list(costs.values()))
    claim = simulation.claim(rows)
    assert claim.name == "cpu_ratio_vs_flower_ray"
    assert claim.value == pytest.approx(8.0 / 0.25)
    assert claim.target == 25.0


def test_without_a_peer_the_claim_is_not_measured(simulation: ModuleType) -> None:
    row = simulation.as_row("privrec", [sample(simulation, 0.25)], 0.25)
    assert simulation.claim([row]).value is None


def test_the_peer_sends_as_many_bytes_and_differs_in_one_thing_a_row(
    simulation: ModuleType,
) -> None:
    settings = simulation.Settings(1, 14, 4, 6, 50, None, True, True)
    rows = simulation.flower_rows(settings, 135_168)
    assert [spec.values for spec in rows.values()].count(135_168) == len(rows) - 1
    for spec in rows.values():
        assert (spec.supernodes, spec.warm, spec.rounds) == (50, 4, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repetitions", "0"], "--repetitions is 0"),
        (["--supernodes", "1"], "--supernodes is 1"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--quick", "--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_options_end_with_status_2(
    simulation: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        simulation.main([*arguments, "--no-flower"])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def run_quick(tmp_path: Path, *options: str, data: Path | None = None) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "PRIVREC_DATA"}
    environment |= {"PYTHONPATH": str(ROOT)}
    path = tmp_path / "simulation.json"
    where = ["--data", str(data)] if data else []
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "simulation.py", "--quick", "--json", path, *where, *options],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CPU of one device-round" in done.stdout
    assert "cpu_ratio_vs_flower_ray" in done.stdout
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    jsonschema.validate(content, SCHEMA)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    return content


@pytest.mark.slow
def test_a_quick_run_of_our_side(tmp_path: Path) -> None:
    content = run_quick(tmp_path, "--no-flower")
    (row,) = content["rows"]
    (claim,) = content["claims"]
    assert "synthetic" in row["name"]
    assert row["vector_bytes"] >= 4 * 3706 * 33
    assert row["times_privrec"] == 1
    assert row["cpu_s_per_device_round"] < 0.1
    assert (claim["value"], claim["holds"]) == (None, False)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("flwr") is None or find_spec("ray") is None,
    reason="flwr[simulation] is not installed in this environment",
)
def test_a_quick_run_of_both_sides(tmp_path: Path) -> None:
    content = run_quick(tmp_path)
    assert len(content["rows"]) == 5
    (claim,) = content["claims"]
    assert claim["value"] > 5
    for row in content["rows"]:
        assert sum(row["cpu_s_per_device_round_by_process"].values()) == pytest.approx(
            row["cpu_s_per_device_round"]
        )


@pytest.mark.slow
def test_a_quick_run_of_growth_draws_its_picture(tmp_path: Path) -> None:
    path, plot = tmp_path / "scale.json", tmp_path / "scale.svg"
    command = [sys.executable, BENCHMARKS / "scale.py"]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--quick", "--json", path], check=True, env=here)
    content = json.loads(path.read_text("utf-8"))
    sizes = [row for row in content["rows"] if row.get("coefficients")]
    assert {row["sweep"] for row in sizes} == {"users", "items"}
    for row in sizes:
        assert row["generate_s"] > 0
        assert 0 < row["noise_s"] < 60
        assert row["round_s"] > 0
        assert row["peak_mib"] > row["above_mib"] > 0
        assert row["upload_mib"] * 2**20 == 4 * row["coefficients"]
    (search,) = (row for row in content["rows"] if row.get("bits"))
    assert 0 < search["found"] < 10**6
    growth = {row["by"]: row for row in content["rows"] if "by" in row}
    assert growth["users"]["upload_mib"] == 0
    assert 0.8 < growth["items"]["upload_mib"] < 1.2
    assert [claim["value"] for claim in content["claims"][:3]] == [None] * 3
    subprocess.run([*command, "--read", path, "--plot", plot], check=True, env=here)
    drawn = ElementTree.fromstring(plot.read_text("utf-8"))  # noqa: S314 - our own text
    assert sum(each.tag.endswith("circle") for each in drawn.iter()) == 4 * 3 + 4 * 2


def test_private_peers_spend_the_epsilon_that_they_are_shown_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, path = load("private_peers", monkeypatch), tmp_path / "peers.json"
    for epsilon in peers.EPSILONS:
        spent = peers.accountant.gaussian(1 / peers.noise_multiplier(epsilon), peers.DELTA)
        assert spent == pytest.approx(epsilon, rel=1e-6)
    monkeypatch.setattr(sys, "argv", ["private_peers.py", "--quick", "--json", str(path)])
    peers.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == list(peers.WAYS)
    assert all(row["epsilon"] == 8 and 0 < row["hr@10"] < 1 for row in rows)


def test_accuracy_beside_peers_names_those_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers, path = load("peers", monkeypatch), tmp_path / "peers.json"
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "argv", ["peers.py", "--quick", "--json", str(path)])
    peers.main()
    assert "implicit, ALS: implicit is not installed; left out" in capsys.readouterr().out
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["popularity", *(f"privrec, {name}" for name in peers.OWN)]
    assert rows["privrec, ε = 8, server trusted"]["epsilon"] <= 8
    assert all(0 < row["hr@10"] < 1 for row in rows.values())
    assert "implicit" in found["machine"]["packages"]
