"""The benchmarks of mixed capacities: convergence, and the memory of a weak device."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scenarios" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_optimum_is_one(benchmark: Callable[[str], ModuleType]) -> None:
    problem = benchmark("convergence").Problem.drawn(3)
    table, tastes = problem.table, problem.states[:, :-1].astype(np.float64)

    def error(memory: np.ndarray) -> float:
        rows = table.gather(memory, problem.histories.items)
        users = np.repeat(tastes, problem.histories.lengths, axis=0)
        return float(np.square((rows * users).sum(1) - 1).sum() / 2)

    rng, best = np.random.default_rng(0), error(problem.optimum)
    for _ in range(20):
        step = rng.normal(0, 1e-2, problem.optimum.shape)
        assert error(problem.optimum + step) > best
    assert not table.injective  # collisions and all


@pytest.mark.slow
def test_averaging_converges_as_one_over_the_rounds(benchmark: Callable[[str], ModuleType]) -> None:
    module = benchmark("convergence")
    found = module.measured(module.inverse, 1000, 6)
    assert module.slope(found) == pytest.approx(-1, abs=module.TOLERANCE)
    assert found[-1] < 1e-3 * found[0]


@pytest.mark.parametrize("course", ["inverse", "constant", "inverse square"])
def test_a_broken_course_of_steps_does_not_converge(
    benchmark: Callable[[str], ModuleType], course: str
) -> None:
    """Few rounds tell courses apart; that the slope is -1 takes the many of the test above."""
    module = benchmark("convergence")
    slope = module.slope(module.measured(module.COURSES[course], 300, 2))
    assert slope < -0.8 if course == "inverse" else slope > -0.5


@pytest.mark.parametrize("system", ["fold", "rows"])
def test_a_weak_device_never_holds_the_memory_nor_the_table(
    benchmark: Callable[[str], ModuleType], system: str
) -> None:
    module = benchmark("device_memory")
    weak = module.measured(system, "ials", 3)
    assert weak["upload_share"] <= 1 / 64
    if weak["peak_mib"] is None:
        pytest.skip("no interpreter of its own could be measured here")
    assert weak["upload_mib"] < weak["peak_mib"] <= 24


@pytest.mark.slow
def test_the_measure_sees_a_device_that_holds_more(benchmark: Callable[[str], ModuleType]) -> None:
    strong = benchmark("device_memory").measured("fold", "ials", 1)
    assert strong["peak_mib"] is None or strong["peak_mib"] > 64


@pytest.mark.slow
def test_the_scripts_write_rows_and_claims(
    benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    for name in ("convergence", "device_memory"):
        target = tmp_path / f"{name}.json"
        benchmark(name).main(["--quick", "--json", str(target)])
        content = json.loads(target.read_text("utf-8"))
        assert set(content) == {"rows", "claims", "machine"}
        assert all(claim["holds"] for claim in content["claims"])
