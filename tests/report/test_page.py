"""The page in a real browser: quiet, self-contained, readable on a phone, on paper and by a reader.

It wants Chromium (Debian's will do) and the extra ``browser``, and skips where either is missing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import privrec
from privrec.report.build import AUDIT, build
from privrec.report.model import AuditPart, Checked
from privrec.report.render import compare, replace_text, write
from privrec.scenario.load import load

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra privrec[browser]")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs privrec[browser]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

MOST_PAGES = 6
WIDTHS = (360, 390, 900, 1280)
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
KINDS: dict[str, dict[str, Any]] = {
    "central": {"rounds": 40, "planned": 40},
    "distributed": {"noise": "distributed", "tiers": True, "rate": 0.25, "rounds": 40},
    "none": {"noise": "none"},
    "known": {"noise_known": True},
}


@dataclass
class Heard:
    """What the browser said and asked for while a page was open."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def follow(self, page: Any) -> None:
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture(scope="module", params=[*KINDS, "compared"])
def file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make: Any
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIVREC_STATE", str(folder / "state"))
        yield page_of(request.param, folder, make)


def page_of(kind: str, folder: Path, make: Any) -> Path:
    if kind == "compared":
        runs = [make(folder / f"{n}", sigma=n, quality=0.5 + n / 50) for n in (1.0, 2.0, 4.0)]
        replace_text(folder / "comparison.html", compare(runs).to_html())
        return folder / "comparison.html"
    run = make(folder / "run", **KINDS[kind])
    if kind == "distributed":
        (run / AUDIT).write_text(audited(run).model_dump_json(), encoding="utf-8")
    return write(build(run), run).html


def audited(run: Path) -> AuditPart:
    """As many findings as an audit has, of the length that they have."""
    found = "0.9975 of the accounted variance over 72 sums, p = 0.52"
    checks = [
        Checked(probe=f"law of the noise, band {n}", passed=True, found=found, expected=found)
        for n in range(22)
    ]
    return AuditPart(
        version=privrec.__version__, scenario_hash=load(run / "scenario.toml").hash(), passed=True,
        checks=tuple(checks), lower_bound=1.7, confidence=0.95, claimed=8.0, method=found * 3,
    )  # fmt: skip


OUTSIDE = """
(() => {
  const found = [], wide = document.documentElement.clientWidth;
  for (const each of document.querySelectorAll("p, h1, h2, h3, li, dt, dd, figcaption, .pairs td"))
    if (each.checkVisibility() && each.getBoundingClientRect().right > wide + 1)
      found.push("clipped: " + each.textContent.slice(0, 40));
  for (const each of document.querySelectorAll("body *")) {
    const style = getComputedStyle(each);
    if (style.overflowX === "visible" || style.display === "inline") continue;
    if (each.closest("svg") || each.scrollWidth <= each.clientWidth + 1) continue;
    const shadows = style.backgroundAttachment.split(", ");
    const cue = style.backgroundImage.includes("gradient") && shadows.includes("local");
    if (!cue || !shadows.includes("scroll") || each.tabIndex < 0)
      found.push("scrolls without a cue: " + each.className + each.textContent.slice(0, 40));
  }
  return found;
})()
"""
"""What a reader would not see or not know of: text beyond the edge, and boxes that hide their rest.

A box that scrolls sideways has shadows at the ends that go on, and can be reached by the keyboard.
"""


def opened(browser: Any, file: Path, width: int, theme: str) -> tuple[Any, Heard]:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    heard = Heard()
    heard.follow(page)
    page.goto(file.as_uri())
    return page, heard


@pytest.mark.parametrize("theme", THEMES)
def test_it_is_quiet_and_fits(browser: Any, file: Path, theme: str) -> None:
    page, heard = opened(browser, file, WIDTHS[0], theme)
    assert heard.messages == []
    assert heard.requests == [file.as_uri()]
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == [], width
    page.close()


def test_figures_are_not_broken_across_lines(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, WIDTHS[0], "light")
    heights = "[...document.querySelectorAll('.nobreak')].map(each => each.getClientRects().length)"
    assert set(page.evaluate(heights)) <= {1}
    page.close()


def test_contents_lead_to_every_part(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, WIDTHS[-1], "light")
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(each => each.hash.slice(1))")
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(each => each.id)")
    assert links == ([] if file.name == "comparison.html" else headings)
    page.close()


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_serious(browser: Any, file: Path, theme: str) -> None:
    page, _ = opened(browser, file, 1280, theme)
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (each["id"], [node["target"] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []
    page.close()


def test_it_prints_to_a_few_pages(browser: Any, file: Path, tmp_path: Path) -> None:
    page, _ = opened(browser, file, 1280, "light")
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    count = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 1 <= count <= MOST_PAGES
    page.close()


def test_the_browser_would_tell(browser: Any, tmp_path: Path) -> None:
    """A page with every one of these faults fails every one of these looks."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<html><body style='width:3000px;color:#999'><img src='there-is-none.png'>grey words"
        "<p>wide</p><div style='overflow-x:auto;width:90px'><div style='width:900px'>x</div></div>"
        "<script>throw new Error('no')</script></body></html>",
        encoding="utf-8",
    )
    page, heard = opened(browser, bad, 360, "light")
    assert any("no" in message for message in heard.messages)
    assert len(heard.requests) == 2
    assert page.evaluate("document.documentElement.scrollWidth") > 360
    assert [each.split(":")[0] for each in page.evaluate(OUTSIDE)] == [
        "clipped", "scrolls without a cue"
    ]  # fmt: skip
    found = {each["id"] for each in axe.Axe().run(page).response["violations"]}
    assert {"image-alt", "color-contrast", "html-has-lang"} <= found
    page.close()
