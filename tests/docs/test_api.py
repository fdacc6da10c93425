"""The API page has every public name with an example; internals list every module once."""

from __future__ import annotations

import importlib
import re

from docs_pages import ROOT, fences

import privrec

PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
INTERNALS = (ROOT / "docs" / "internals.md").read_text("utf-8")
PRIVATE = {"privrec", "privrec.__main__"}


def public_modules() -> set[str]:
    found = set()
    for path in (ROOT / "privrec").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if path.read_text("utf-8").strip():
            found.add(name)
    # The command line has a page of its own.
    return {
        name
        for name in found - PRIVATE
        if not name.startswith("privrec.cli") or name == "privrec.cli.console"
    }


def test_every_module_is_on_the_page_once() -> None:
    listed = re.findall(r"^\.\. automodule:: (\S+)$", INTERNALS, re.M)
    assert sorted(listed) == sorted(public_modules())


def test_every_fence_ends_before_the_next_heading() -> None:
    blocks = fences(PAGE) + fences(INTERNALS)
    assert blocks
    for block in blocks:
        assert not re.search(r"^(#|```)", block.text, re.M), f"line {block.line} is left open"


def test_every_name_of_the_package_is_on_the_page_and_there() -> None:
    for name in set(privrec.__all__) - {"__version__"}:
        assert f"`privrec.{name}`" in PAGE
        parts = [part for part in re.split(r"^## ", PAGE, flags=re.M) if f"`{name}`" in part[:80]]
        assert len(parts) == 1, name
        languages = {fence.language: fence.text for fence in fences(parts[0])}
        assert re.search(rf"\bprivrec\.{name}\b", languages["python"]), name
        assert f":: privrec.{name}\n" in languages["{eval-rst}"], name
        assert getattr(privrec, name)
    for role in re.findall(r"\{py:\w+\}`([\w.]+)`", PAGE):
        module, _, name = role.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
