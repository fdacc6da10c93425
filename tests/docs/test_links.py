"""Relative links of the prose lead somewhere, headings included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import accuracy_figure
import pytest
from docs_pages import PAGES, ROOT, anchors, fences, links


def broken_links(page: Path, text: str) -> Iterator[str]:
    for link in links(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if name and not target.exists():
            yield f"{link}: no such file"
        elif ROOT not in target.parents:
            yield f"{link}: outside of the repository"
        elif anchor and anchor not in anchors(
            text if target == page else target.read_text("utf-8")
        ):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page, page.read_text("utf-8")))


def test_the_picture_of_accuracy_is_that_of_its_table() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text("utf-8")
    lines, popular = accuracy_figure.measured(page)
    assert lines
    assert all(value > popular for _, points in lines for _, value in points)
    drawn = (ROOT / "docs" / "accuracy.svg").read_text("utf-8")
    assert drawn == accuracy_figure.picture(lines, popular), "run: python docs/accuracy_figure.py"


def test_pages_of_the_documentation_link_to_pages_only() -> None:
    found = [
        f"{page.name}: {link}"
        for page in PAGES
        if page.parent.name == "docs"
        for link in links(page.read_text("utf-8"))
        if "://" not in link
        and not link.startswith("#")
        and not link.partition("#")[0].endswith((".md", ".ipynb"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[a](README.md)", 0),
        ("[a](nowhere.md)", 1),
        ("[a](README.md#no-such-heading)", 1),
        ("# One `Two`\n[a](#one-two)", 0),
        ("`[a](nowhere.md)`", 0),
        ("[`a`](nowhere.md)", 1),
        ("```\n[a](nowhere.md)\n```", 0),
        ("[a](../../outside.md)", 1),
    ],
)
def test_a_broken_link_is_found(text: str, count: int) -> None:
    assert len(list(broken_links(ROOT / "page.md", text))) == count


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    trees = [fence.text for fence in fences(index) if fence.language == "{toctree}"]
    listed = [word for tree in trees for word in tree.partition("\n\n")[2].split()]
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert sorted(listed) == sorted(pages)
    assert all(":caption:" in tree for tree in trees)


def test_drawings_fit_the_width_of_a_page() -> None:
    wide = [
        f"{page.name}:{fence.line}: {line}"
        for page in PAGES
        for fence in fences(page.read_text("utf-8"))
        if page.parent.name == "docs" and re.search("[─│►]", fence.text)
        for line in fence.text.splitlines()
        if len(line) > 94
    ]
    assert not wide
