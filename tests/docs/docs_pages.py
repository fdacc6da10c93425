"""The prose of the repository, cut into fences, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_FENCE = re.compile(r"^(?P<mark>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=mark)\s*$", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`(?!`)([^`]+)`(?!`)")
_LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.M)


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, the words after it, its text and where it starts."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int


def fences(text: str) -> list[Fence]:
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(language, tuple(words), match["body"], line))
    return found


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in _INLINE.findall(without_fences(text))]


def links(text: str) -> list[str]:
    return _LINK.findall(_INLINE.sub("code", without_fences(text)))


def anchors(text: str) -> set[str]:
    """The anchors that headings get, by the rule that code hosts and myst share."""
    found = set()
    for heading in _HEADING.findall(without_fences(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; lines may be continued and commented."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words
