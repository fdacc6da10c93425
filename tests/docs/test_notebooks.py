"""Every notebook of the documentation runs, cell by cell, and shows what its text promises."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
from docs_pages import ROOT

import privrec
from privrec.report.verify import verify

NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
MOST_LINES = 25


def code_of(path: Path) -> list[str]:
    """The code cells of a notebook, which is in the fourth format and holds no results."""
    content = json.loads(path.read_text("utf-8"))
    assert (content["nbformat"], content["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


def run(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """What the cells leave behind, and what they print."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRIVREC_STATE", str(place / "state"))
    names: dict[str, Any] = {"__name__": "__notebook__"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, text in enumerate(code_of(path)):
            exec(compile(text, f"{path.name}[{number}]", "exec"), names)  # noqa: S102
    return names, printed.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_short(path: Path) -> None:
    lines = [line for text in code_of(path) for line in text.splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


def test_a_table_of_ones_own_ends_in_lists_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, printed = run(ROOT / "docs" / "own-table.ipynb", tmp_path, monkeypatch)
    orders = pyarrow.csv.read_csv(tmp_path / "orders.csv")
    assert orders.num_rows > orders.group_by(["customer", "article"]).aggregate([]).num_rows
    recommender = names["recommender"]
    metrics = recommender.evaluate()
    assert metrics["model"]["hr@10"] > metrics["popularity"]["hr@10"] + 0.3
    assert "popularity" in printed
    assert 7.9 < recommender.epsilon("recipients") == recommender.epsilon("server") <= 8
    lists = pyarrow.parquet.read_table(tmp_path / "recommendations.parquet")
    assert lists.num_rows == 10 * 1000
    assert lists.column_names == ["user", "rank", "item", "title", "score"]
    assert "8.00" in (tmp_path / "report.html").read_text("utf-8")
    assert verify(tmp_path / "runs" / "orders").holds
    assert privrec.load(tmp_path / "runs" / "orders").similar_items("12", k=1).num_rows == 1
