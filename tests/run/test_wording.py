"""Words and figures for people: none promises more than holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privrec.run.record import (
    Record,
    RunInfo,
    duration_text,
    epsilon_text,
    headline_metric,
    metric_name,
    opening_words,
    spent_text,
)

INFO = RunInfo("ml-1m-dp", 20, title="Federated GMF", population=6040, budget=8.0)


def a_record(number: int, **values: Any) -> Record:
    defaults = {"epsilon": 1.2301, "epsilon_server": 9.0, "loss": 0.5, "cohort": 302}
    return Record(number, 20, **{**defaults, **values})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.24, "1.24"), (1.240001, "1.25"), (7.999, "8.00"), (0.0, "0.00"), (1e-9, "0.01"),
        (9.8e14, "980000000000000.00"), (5.0000000000055195e39, "5.001e+39"),
        (9.9999e39, "1.000e+40"), (1.7e308, "1.700e+308"),
    ],
)  # fmt: skip
def test_epsilon_is_rounded_up(value: float, text: str) -> None:
    assert epsilon_text(value) == text


@given(st.floats(min_value=0, max_value=1e6))
def test_a_printed_epsilon_is_never_below_the_true_one(value: float) -> None:
    assert value <= float(epsilon_text(value)) < value + 0.0101


@pytest.mark.parametrize("value", [None, math.inf])
def test_no_epsilon_is_infinite(value: float | None) -> None:
    assert epsilon_text(value) == "∞"


def test_a_simulated_run_says_so_first() -> None:
    assert opening_words(INFO).startswith("Simulated run: ml-1m-dp")
    assert "at most ε = 8 against recipients of the models" in opening_words(INFO)


def test_no_promise_is_made_against_the_trusted_server() -> None:
    words = opening_words(replace(INFO, budget_against="server"))
    assert "at most ε = 8 against somebody who knows every cohort" in words
    assert "the server" not in words


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (RunInfo("a", 1, private=False), "no privacy guarantee"),
        (RunInfo("a", 1, noise_known=True, budget=8), "no privacy guarantee"),
        (RunInfo("a", 1), "without a limit"),
        (RunInfo("a", 9, done=4), "going on after round 4"),
        (RunInfo("a", 1, private=False, examples="uploads"), "against whoever sees a device's"),
        (RunInfo("a", 1, private=False, examples="sums"), "but no single upload, a unit apart"),
    ],
)
def test_the_opening_promises_no_more_than_holds(info: RunInfo, words: str) -> None:
    assert words in opening_words(info)


def test_spent_is_against_the_adversary_of_the_budget() -> None:
    server = RunInfo("a", 1, budget=20.0, budget_against="server")
    assert spent_text(INFO, a_record(1)) == "ε 1.24 of 8"
    assert spent_text(server, a_record(1)) == "ε 9.00 of 20"
    assert spent_text(RunInfo("a", 1, private=False), a_record(1)) == "no privacy"
    assert spent_text(RunInfo("a", 1, noise_known=True), a_record(1)) == "ε ∞ (noise known)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_names_of_metrics() -> None:
    assert metric_name("full_ndcg@20") == "NDCG@20, full ranking"
    assert headline_metric({"ndcg@10": 1.0, "full_hr@10": 1.0, "hr@10": 1.0}) == "hr@10"
    assert headline_metric({"full_ndcg@10": 1.0, "full_hr@10": 1.0}) == "full_hr@10"
    assert headline_metric({"perplexity": 9.0, "precision@1": 0.5, "precision@3": 0.6}) == (
        "precision@1"
    )
    assert headline_metric({"precision@5": 0.5, "precision@10": 0.6}) == "precision@5"
    assert metric_name("precision@1") == "Precision@1"
    assert headline_metric({}) is None
