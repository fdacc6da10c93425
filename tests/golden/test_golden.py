"""The golden runs are as they were kept; a change is kept with ``freeze.py`` and explained."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
from small_runs import Silent, Stop, run_once

import privrec
from privrec.errors import Interrupted


@cache
def measured(name: str, part: str) -> dict[str, Any]:
    if name == "flower":
        pytest.importorskip("flwr", reason="needs the extra privrec[flower]")
    return golden.measured(name, part)


def compare(kept: dict[str, Any], found: dict[str, Any]) -> None:
    if lines := golden.changed(kept, found):
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("part", ["paid", "first round"])
@pytest.mark.parametrize("name", golden.RUNS)
def test_a_run_pays_promises_and_begins_as_kept(name: str, part: str) -> None:
    compare(golden.kept()[name][part], measured(name, part))


@pytest.mark.parametrize("name", golden.RUNS)
def test_a_run_has_the_bits_that_are_kept(name: str) -> None:
    kept, mine, found = golden.kept()[name]["bits"], golden.arithmetic(), measured(name, "bits")
    if mine in kept:
        compare(kept[mine], found)
    elif found not in kept.values():
        pytest.skip(f"no bits are kept for the arithmetic {mine}, and these are of no other")


def test_masks_change_no_bit() -> None:
    assert measured("full", "bits") == measured("exact", "bits")


@pytest.mark.parametrize("name", ["central", "exact", "labels", "texts", "examples"])
def test_a_run_that_is_stopped_and_resumed_has_the_same_bits(name: str, tmp_path: Path) -> None:
    with golden.pinned():
        with pytest.raises(Interrupted):
            run_once(*golden.in_place(name, tmp_path / "run"), key=golden.ROOT, observer=Stop(1))
        payload = privrec.resume(tmp_path / "run", observer=Silent()).payload
    compare(measured(name, "bits"), golden.bits_of(tmp_path / "run", payload))


def test_a_change_is_told_with_its_field() -> None:
    kept = {"epsilon": 3.1394, "claim": "so", "weights": [1.0, 0.5], "count": 2, "gone": None}
    assert golden.changed(kept, {**kept, "epsilon": 3.13941}) == []
    assert golden.changed(kept, {**kept, "weights": [1.0, 0.50001]}) == []
    for field, value in (
        ("epsilon", 3.2), ("epsilon", None), ("claim", "so so"), ("weights", [1.0, 0.6]),
        ("weights", [1.0]), ("count", 3), ("count", True), ("new", None),
    ):  # fmt: skip
        (line,) = golden.changed(kept, {**kept, field: value})
        assert line == f"{field}: kept {kept.get(field)!r}, found {value!r}"
    assert golden.changed(kept, {k: kept[k] for k in kept if k != "gone"}) == [
        "gone: kept None, found None"
    ]
