"""Figures as people read them."""

from __future__ import annotations

import pytest

from privrec.report import words
from privrec.report.model import Scalar


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (474_368, "463 KiB"),
        (1_612_000, "1.5 MiB"),
        (5 * 2**40, "5,120 GiB"),
    ],
)
def test_bytes(count: float | None, text: str) -> None:
    assert words.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.0, "0.0 s"), (3.1e-5, "31 µs"), (0.00031, "0.31 ms"), (214.2, "3 min 34 s")],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert words.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (None, "–"), (0.0, "0"), (1.38748, "1.388"), (0.0513, "0.05130"), (0.051301, "0.05131"),
        (1.25, "1.250"), (12345.6, "12350"), (1e-6, "0.000001000"),
    ],
)  # fmt: skip
def test_an_upper_bound_is_rounded_up(bound: float | None, text: str) -> None:
    assert words.bound_text(bound) == text


@pytest.mark.parametrize(("delta", "text"), [(1e-5, "1e-5"), (0.01, "0.01"), (None, "–")])
def test_delta(delta: float | None, text: str) -> None:
    assert words.delta_text(delta) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("metrics.hr@10", 0.5, "0.500"),
        ("cost.upload_bytes", 2048, "2 KiB"),
        ("cost.wall_s", 61.0, "1 min 01 s"),
        ("train.loss", "bpr", "bpr"),
        ("model.item_bias", True, "yes"),
        ("model.dim", 32, "32"),
        ("rounds", 131072, "131,072"),
        ("train.lr", 0.123456, "0.1235"),
        ("epsilon", None, "–"),
    ],
)
def test_cells_of_compared_settings(key: str, value: Scalar, text: str) -> None:
    assert words.fact_text(value, key) == text


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("metrics.full_hr@10", "HR@10, full ranking"),
        ("train.server_optimizer", "server optimizer"),
        ("cost.cpu_s_per_device_round", "CPU time"),
    ],
)
def test_names(key: str, name: str) -> None:
    assert words.fact_name(key) == name


@pytest.mark.parametrize(
    ("value", "text"),
    [(2000.4, "2,000"), (158.2, "158"), (3.2879, "3.29"), (0.00012345, "0.000123"), (0.0, "0")],
)
def test_amounts_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert words.amount_text(value) == text
