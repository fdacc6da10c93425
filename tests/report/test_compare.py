"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from privrec.errors import UsageError
from privrec.report.render import compare, replace_text

MakeRun = Callable[..., Path]


def test_one_row_a_run_with_epsilons_metrics_and_costs(a_run: MakeRun) -> None:
    compared = compare([a_run("a"), a_run("b", name="ml-1m", noise="none", quality=0.69)])
    private, bare = compared.rows()
    assert (private["name"], bare["name"]) == ("ml-1m-dp", "ml-1m")
    assert private["epsilon"] == compared.reports[0].adversary("recipients").epsilon
    assert bare["epsilon"] is None
    assert bare["private"] is False
    assert (private["hr@10"], bare["hr@10"]) == (0.56, 0.69)
    assert private["upload_bytes"] == 474_368
    assert compared.cautions == ()


def test_popularity_and_settings_stand_beside_runs_on_the_same_data(a_run: MakeRun) -> None:
    known = {"baselines": {"popularity": {"hr@10": 0.453}}}
    elsewhere = {**known, "data": {"source": "ml-100k"}}
    runs = [a_run("a", extra=known), a_run("b", noise="none"), a_run("c", extra=elsewhere)]
    same, mixed = compare(runs[:2]), compare(runs[1:])
    assert (same.popularity, mixed.popularity) == ({"hr@10": 0.453}, {})
    assert "popularity</th>" in same.to_html()
    assert "popularity</th>" not in mixed.to_html()
    assert same.settings["privacy.noise"] == ['"central"', '"none"']
    assert "privacy.noise</th>" in same.to_html()


def test_runs_of_one_scenario_are_told_apart_by_folder(a_run: MakeRun) -> None:
    assert compare([a_run("first"), a_run("second")]).names == ("first", "second")


def test_a_metric_that_only_some_runs_have(a_run: MakeRun) -> None:
    short = a_run("b", extra={"metrics": {"hr@10": 0.5}})
    compared = compare([a_run("a"), short])
    assert compared.rows()[1]["ndcg@10"] is None
    assert compared.metrics[-1].startswith("full_")
    assert "–" in compared.to_html()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"holdout": "validation"}, "different splits"),
        ({"delta": 1e-6}, "different δ (1e-6, 1e-5)"),
        ({"extra": {"data": {"source": "ml-100k"}}}, "different data"),
        ({"simulated": False}, "Some runs are simulated"),
    ],
)
def test_what_is_not_comparable_is_said(
    a_run: MakeRun, settings: dict[str, object], words: str
) -> None:
    compared = compare([a_run("a"), a_run("b", **settings)])
    assert [words in caution for caution in compared.cautions] == [True]
    assert words in compared.to_html()


def test_pictures_hold_what_can_be_compared(a_run: MakeRun) -> None:
    elsewhere = {"extra": {"data": {"source": "ml-100k"}}}
    runs = [a_run("a", sigma=1.1), a_run("b", sigma=1.1001), a_run("c", sigma=2.0)]
    same, apart = compare(runs[:2]).to_html(), compare(runs[1:]).to_html()
    assert ('id="utility-title"' in same, 'id="utility-title"' in apart) == (False, True)
    mixed = compare([runs[0], a_run("d", sigma=2.0, **elsewhere)]).to_html()
    assert 'id="utility-title"' not in mixed
    assert mixed.count("<circle") == 1  # the metric of the first data set alone


def test_the_page_stands_alone_and_starts_with_the_stamp(a_run: MakeRun, tmp_path: Path) -> None:
    compared = compare([a_run("a"), a_run("b", noise="none")])
    replace_text(tmp_path / "compare.html", compared.to_html())
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert "script" not in tags
    assert "link" not in tags
    assert tags.count("svg") == 1
    assert text.index("Simulated runs") < text.index("<h1>")
    assert "∞" in text
    assert text == compared.to_html()


def test_fewer_than_two_runs_are_refused(a_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="1 run was named"):
        compare([a_run()])


def test_one_run_twice_is_refused(a_run: MakeRun) -> None:
    run = a_run()
    with pytest.raises(UsageError, match="named twice"):
        compare([run, run / ".." / run.name])


def test_an_unfinished_run_is_named(a_run: MakeRun) -> None:
    unfinished = a_run("b")
    (unfinished / "result.json").unlink()
    with pytest.raises(UsageError, match=f"{unfinished}.*not finished"):
        compare([a_run("a"), unfinished])
