"""The report as files: valid, self-contained, readable by everybody, the same every time."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from privrec.errors import UsageError
from privrec.report.build import build
from privrec.report.model import Report, json_schema
from privrec.report.plots import plots
from privrec.report.render import to_html, to_json, to_markdown, verification, write
from privrec.run.record import epsilon_text

MakeRun = Callable[..., Path]
VARIANTS: dict[str, dict[str, object]] = {
    "central": {},
    "none": {"noise": "none", "budget": None},
    "known": {"noise_known": True},
    "no limit": {"budget": None},
    "everybody": {"rate": 1.0, "sigma": 3.0, "rounds": 3, "eval_every": 1},
    "at the end": {"eval_every": 0, "rounds": 1},
    "rows": {
        "extra": {
            "rows": [
                {"name": "bce | <b>", "train.loss": "bce", "metrics": {"hr@10": 0.56}},
                {"name": "bpr", "cost": {"upload_bytes": 474368, "wall_s": 3.0}, "private": True},
            ],
            "baselines": {"popularity": {"hr@10": 0.452}},
        }
    },
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def a_report(a_run: MakeRun) -> Callable[[str], Report]:
    return lambda variant: build(a_run(variant, **VARIANTS[variant]))


MakeReport = Callable[[str], Report]


class Page(HTMLParser):
    """Notes elements in order, ids, and whether every element is closed in turn."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [values for tag, values in self.tags if tag in names]


# --------------------------------------------------------------------------- JSON


@each_variant
def test_the_json_satisfies_its_schema_and_comes_back(a_report: MakeReport, variant: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    report = a_report(variant)
    jsonschema.validators.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(json.loads(to_json(report)), json_schema())
    assert Report.model_validate_json(to_json(report)) == report


def test_the_schema_refuses_what_is_unknown(a_report: MakeReport) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads(to_json(a_report("central")))
    content["privacy"]["cohort"] = 302
    with pytest.raises(jsonschema.ValidationError, match="cohort"):
        jsonschema.validate(content, json_schema())


# --------------------------------------------------------------------------- HTML


@each_variant
def test_the_page_loads_and_runs_nothing(a_report: MakeReport, variant: str) -> None:
    text = to_html(a_report(variant))
    page = Page(text)
    assert not page.of("script", "link", "iframe", "object", "embed", "img", "base", "form")
    for _, values in page.tags:
        assert not [name for name in values if name.startswith("on")]
        assert not {"src", "srcset", "action"} & values.keys()
        target = values.get("href") or values.get("xlink:href") or "#"
        assert target.startswith("#")
    assert not re.search(r"@import|@font-face|url\((?!#)", text)
    assert "javascript:" not in text


@each_variant
def test_the_page_is_well_formed_and_accessible(a_report: MakeReport, variant: str) -> None:
    page = Page(to_html(a_report(variant)))
    assert page.of("html")[0]["lang"] == "en"
    assert [number for number, count in Counter(page.ids).items() if count > 1] == []
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(values.get("scope") for values in page.of("th"))
    for values in page.of("section", "svg"):
        assert values.get("aria-labelledby", values.get("aria-label"))
    for _, values in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert values.get(name) is None or values[name] in page.ids
    assert len(page.of("svg")) == len(page.of("desc"))


@each_variant
def test_a_simulated_run_says_so_before_anything_else(a_report: MakeReport, variant: str) -> None:
    report = a_report(variant)
    words = [word for word in Page(to_html(report)).words if word.strip()]
    assert words[0].startswith("Simulated run: ")
    assert words[1] == "Simulated run"
    assert to_markdown(report).startswith("# Simulated run: ")


def test_page_and_markdown_hold_every_promise_and_figure(a_report: MakeReport) -> None:
    report = a_report("central")
    recipients, server = report.adversary("recipients"), report.adversary("server")
    html = re.sub(r'<span class="nobreak">(.*?)</span>', r"\1", to_html(report))
    page = " ".join(" ".join(Page(html).words).split())
    markdown = to_markdown(report)
    for text in (page, markdown):
        assert report.claim in text
        assert epsilon_text(recipients.epsilon) in text
        assert epsilon_text(server.epsilon) in text
        for part in (
            recipients.assumes,
            server.assumes,
            report.privacy.trust,
            "Zero-out",
            "Poisson",
            "outside the guarantee",
            "0.560",
            "0.548 to 0.573",
            "463 KiB",
            "1.5 MiB",
            "0.31 ms",
            "3 min 34 s",
        ):
            assert part.lower() in text.lower()


def test_every_table_of_private_data_is_stamped(a_report: MakeReport) -> None:
    report = a_report("rows")
    page, markdown = to_html(report), to_markdown(report)
    for heading in ("Accuracy", "Settings compared", "Costs", "Data"):
        assert f'{heading} <span class="tag">outside the guarantee</span>' in page
    for heading in ("Accuracy", "Settings compared", "Costs"):
        assert f"## {heading} (outside the guarantee)" in markdown


def test_no_epsilon_is_said_to_hold_against_the_server(a_report: MakeReport) -> None:
    report = a_report("central")
    for text in (to_html(report), to_markdown(report)):
        assert "somebody who knows every cohort" in text
        assert not re.search(r"(against the|ε,|<th[^>]*>) ?server(?!’)", text)


@each_variant
def test_markdown_tables_are_rectangular(a_report: MakeReport, variant: str) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", to_markdown(a_report(variant)), flags=re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_names_from_a_scenario_are_only_text(a_run: MakeRun) -> None:
    evil = '<script>alert("x")</script>'
    run = a_run(extra={"title": evil, "rows": [{"name": evil, evil: evil}]})
    report = build(run)
    assert not Page(to_html(report)).of("script")
    assert "<script" not in to_markdown(report)


@each_variant
def test_the_same_run_gives_the_same_bytes(a_report: MakeReport, variant: str) -> None:
    report = a_report(variant)
    assert to_html(report) == to_html(report)
    assert "dc:date" not in to_html(report)


def _luminance(colour: str) -> float:
    colour = colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_every_text_colour_stands_out_in_light_dark_and_print(a_report: MakeReport) -> None:
    text = to_html(a_report("central"))
    themes = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", theme))
        for name in ("ink", "muted", "accent", "first", "second", "third", "fourth"):
            for paper in ("paper", "card"):
                assert _contrast(colours[name], colours[paper]) >= 4.5, (name, paper)
        for level in ("serious", "caution"):
            assert _contrast(colours[level], colours[f"{level}-paper"]) >= 4.5
            assert _contrast(colours["ink"], colours[f"{level}-paper"]) >= 7


# --------------------------------------------------------------------------- pictures


@each_variant
def test_pictures_are_valid_svg_in_the_colours_of_the_page(
    a_report: MakeReport, variant: str
) -> None:
    for plot in plots(a_report(variant)):
        root = ElementTree.fromstring(plot.svg)  # noqa: S314 - our own text
        assert root.tag.endswith("svg")
        assert root[0].tag.endswith("title")
        assert root[1].tag.endswith("desc")
        assert not re.search(r"#[0-9a-fA-F]{6}\b", plot.svg)
        assert "<style" not in plot.svg
        assert "DejaVu" not in plot.svg


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("central", ["epsilon", "metric", "loss"]),
        ("no limit", ["epsilon", "metric", "loss"]),
        ("none", ["metric", "loss"]),
        ("known", ["metric", "loss"]),
        ("at the end", []),
    ],
)
def test_what_is_drawn(a_report: MakeReport, variant: str, keys: list[str]) -> None:
    assert [plot.key for plot in plots(a_report(variant))] == keys


def test_a_picture_describes_its_ends(a_report: MakeReport) -> None:
    report = a_report("central")
    epsilon, metric, _ = plots(report)
    assert "recipients ε = " in epsilon.svg.split("</desc>")[0]
    assert "to 0.56 in round 12" in metric.svg.split("</desc>")[0]


def test_equal_epsilons_are_drawn_once(a_report: MakeReport) -> None:
    assert next(plots(a_report("everybody"))).svg.count("both adversaries") == 2  # desc and label


# --------------------------------------------------------------------------- checking it oneself


@pytest.mark.parametrize("variant", ["central", "everybody"])
def test_the_printed_check_gives_the_printed_epsilon(a_report: MakeReport, variant: str) -> None:
    report = a_report(variant)
    code = verification(report)
    assert code is not None
    assert code in to_markdown(report)
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, {})  # noqa: S102 - it is what a reviewer is told to run
    values = dict(line.split() for line in printed.getvalue().splitlines())
    for name in ("recipients", "server"):
        assert float(values[name]) == pytest.approx(report.adversary(name).epsilon, rel=2e-3)


@pytest.mark.parametrize("variant", ["none", "known"])
def test_without_a_guarantee_there_is_nothing_to_check(a_report: MakeReport, variant: str) -> None:
    assert verification(a_report(variant)) is None


# --------------------------------------------------------------------------- files


def test_three_files_are_written_and_replaced(a_run: MakeRun) -> None:
    run = a_run()
    report = build(run)
    (run / "report.md").write_text("old")
    written = write(report, run)
    assert json.loads(written.json.read_text()) == json.loads(to_json(report))
    assert written.html.read_text(encoding="utf-8") == to_html(report)
    assert written.markdown.read_text(encoding="utf-8") == to_markdown(report)
    assert not list(run.glob(".report*"))


def test_a_folder_that_is_not_there_is_named(a_report: MakeReport, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="existing folder"):
        write(a_report("central"), tmp_path / "absent")


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here to draw the page with")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page_in_both_schemes(
    a_run: MakeRun, tmp_path: Path, scheme: str
) -> None:
    image = pytest.importorskip("PIL.Image")
    run = a_run()
    page, shot = write(build(run), run).html, tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=900,1400", f"--screenshot={shot}", *dark, page.as_uri()]
    subprocess.run([str(BROWSER), *options], capture_output=True, check=True)
    pixels = image.open(shot).convert("L")
    assert (pixels.getpixel((5, 5)) < 128) == (scheme == "dark")
    assert len(pixels.getcolors(256) or []) > 20
