"""Draw docs/accuracy.svg from the table of docs/accuracy.md: python docs/accuracy_figure.py."""

from __future__ import annotations

import re
from html import escape
from itertools import pairwise
from pathlib import Path

DOCS = Path(__file__).parent
INK = ("#1d5fb0", "#a8480f", "#1b7048", "#6b4a94", "#8a6d00")
USERS = 6040
"""Each hits or misses, so that a value's 95 % interval is that of a proportion."""
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 40, 232, 22, 36, 560, 250

Line = tuple[str, list[tuple[float, float]]]


def measured(page: str) -> tuple[list[Line], float]:
    """HR@10 on the test split by ε, of each row that has it; and that of popularity."""
    table = re.search(r"^\| ε \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
    popular = re.search(r"Popularity without noise is at (0?\.\d+)", page)
    if table is None or popular is None:
        raise SystemExit(
            "docs/accuracy.md: there is no table that begins with | ε |, or no baseline"
        )
    budgets = [float(each) for each in table[0].splitlines()[0].split("|")[2:-1]]
    lines = []
    for row in table[1].splitlines():
        name, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        points = [(e, float(c.split()[0])) for e, c in zip(budgets, cells, strict=True) if c]
        if "test split" in name:
            lines.append((re.sub(r",? test split|\(.*?\)|`", "", name).strip(), points))
    return lines, float(popular[1])


def picture(lines: list[Line], popular: float) -> str:
    """The lines over ε, with intervals over users, above the dashed line of popularity."""
    budgets = sorted({e for _, points in lines for e, _ in points})
    values = [y for _, points in lines for _, y in points]
    low, high = min(popular, *values) - 0.02, max(values) + 0.02
    step = (WIDTH - LEFT - RIGHT) / max(1, len(budgets) - 1)

    def x(budget: float) -> float:
        return LEFT + 10 + step * budgets.index(budget) * 0.95

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(at: float, down: float, words: str, ink: str = "#555", anchor: str = "start") -> str:
        end = f' text-anchor="{anchor}"' if anchor != "start" else ""
        return f'<text x="{at:.1f}" y="{down:.1f}" fill="{ink}"{end}>{escape(words)}</text>'

    def across(value: float, ink: str, more: str = "") -> str:
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        return f'<line {ends} stroke="{ink}"{more}/>'

    body = [text(4, 12, "HR@10, test split", "#222")]
    for tenth in range(int(low * 20) + 1, int(high * 20) + 1):
        value = tenth / 20
        body += [across(value, "#ddd"), text(LEFT - 6, y(value) + 4, f"{value:.2f}", anchor="end")]
    body += [text(x(e), HEIGHT - 18, f"{e:g}", anchor="middle") for e in budgets]
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "user-level ε", anchor="middle"))
    body.append(across(popular, "#555", ' stroke-dasharray="4 3"'))
    labels = [(y(popular), "popularity, no privacy", "#555")]
    for (name, points), ink in zip(lines, INK, strict=False):
        places = [(x(e), y(value)) for e, value in points]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        body.append(f'<polyline points="{joined}" fill="none" stroke="{ink}" stroke-width="2"/>')
        body += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{ink}"/>' for a, b in places]
        for budget, value in points:
            half = 1.96 * (value * (1 - value) / USERS) ** 0.5
            ends = f"M{x(budget):.1f},{y(value - half):.1f}V{y(value + half):.1f}"
            body.append(f'<path d="{ends}" stroke="{ink}"/>')
        labels.append((places[-1][1], name, ink))
    labels.sort()
    downs = [labels[0][0]]
    for _, (down, _, _) in pairwise(labels):
        downs.append(max(down, downs[-1] + 14))
    for (_, name, ink), down in zip(labels, downs, strict=True):
        body.append(text(WIDTH - RIGHT + 8, down + 4, name, ink))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" '
        'font-family="sans-serif" role="img"><title>Accuracy by user-level ε on MovieLens 1M'
        f'</title><rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def main() -> None:
    page = (DOCS / "accuracy.md").read_text("utf-8")
    (DOCS / "accuracy.svg").write_text(picture(*measured(page)), "utf-8")


if __name__ == "__main__":
    main()
