"""The README's commands are what continuous integration runs, with the pinned versions."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from docs_pages import ROOT, fences

README = (ROOT / "README.md").read_text("utf-8")
CI = ROOT / ".ci" / "run"


def readme_lines(word: str) -> list[str]:
    found = [fence for fence in fences(README) if word in fence.words]
    assert len(found) == 1
    return found[0].text.splitlines()


def as_ci_reads(word: str, directory: Path = ROOT) -> list[str]:
    function = re.search(r"^readme_line\(\) \{.*?^\}", CI.read_text("utf-8"), re.M | re.S)
    assert function
    program = f"{function[0]}\nreadme_line {word}"
    done = subprocess.run(
        ["bash", "-c", program], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("word", ["install", "test"])
def test_ci_runs_the_line_that_the_readme_gives(word: str) -> None:
    assert len(readme_lines(word)) == 1
    assert as_ci_reads(word) == readme_lines(word)


def test_ci_would_follow_another_line(tmp_path: Path) -> None:
    text = "```bash\nfirst\n```\n```bash test\nsecond\n```\n```text test\nthird\n```\n"
    (tmp_path / "README.md").write_text(text)
    assert as_ci_reads("test", tmp_path) == ["second"]


def test_ci_runs_both_lines_and_every_check() -> None:
    text = CI.read_text("utf-8")
    for command in (
        'bash -euo pipefail -c "$first"',
        'bash -euo pipefail -c "$test_command"',
        "ruff check .",
        "ruff format --check .",
        "mypy --strict privrec",
        "sphinx-build -W",
    ):
        assert command in text


def test_the_readme_starts_with_install_and_test() -> None:
    shell = [fence for fence in fences(README) if fence.language == "bash"]
    assert [fence.words for fence in shell[:2]] == [("install",), ("test",)]
    assert shell[0].text.rstrip().endswith("privrec demo")


def test_ci_can_be_started() -> None:
    assert os.access(CI, os.X_OK)
    subprocess.run(["bash", "-n", str(CI)], check=True)


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins


def test_every_dependency_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["docs"] + extras["data"]
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    }
    assert {re.split(r"[<>=~!\[]", name)[0].lower() for name in wanted} <= pins
