"""Every command and every Python block of the prose runs.

The words after a fence's language say otherwise: ``install`` and ``test`` are run by ``.ci/run``;
``long`` needs a download or minutes, so its commands are only parsed; ``flower`` needs Flower, and
is run by ``tests/flower/test_secure_sum_docs.py``; ``deployment`` needs SuperLinks, and is run by
``tests/flower/test_first_command.py``. Nothing else is exempt. The
blocks of a page run in its order, in one directory. Runs are cut down to three rounds and do not
measure a device's memory, which takes a process each; audits have a tenth of the canaries.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from docs_pages import PAGES, ROOT, Fence, commands, fences, inline_code

from privrec.cli import main
from privrec.errors import UsageError
from privrec.scenario.load import Scenario

SHORTER = {
    "run": ["-s", "train.rounds=3"],
    "audit": ["--canaries", "100"],
}
ELSEWHERE = {"install", "test", "deployment"}
WORDS = {"bash": {*ELSEWHERE, "long"}, "python": {"flower"}, "toml": set(), "json": set()}
NOT_RUN = {"text", "{toctree}", "{eval-rst}"}
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def group() -> click.Group:
    """The command line as click sees it."""
    found = [value for value in vars(main).values() if isinstance(value, click.Group)]
    tops = [one for one in found if "demo" in one.commands]
    assert tops
    return tops[0]


@contextlib.contextmanager
def parsed(words: list[str]) -> Iterator[click.Context]:
    """The context of the innermost command that ``words`` call; nothing is run."""
    command: click.Command = group()
    parent: click.Context | None = None
    rest = words[1:]
    while isinstance(command, click.Group):
        if not rest or rest[0].startswith("-"):
            break
        parent = click.Context(command, info_name=command.name, parent=parent)
        name, child, rest = command.resolve_command(parent, rest)
        assert child is not None, name
        command = child
    with command.make_context(command.name, list(rest), parent=parent) as context:
        yield context


def call(words: list[str]) -> tuple[int, str]:
    """Run one command in this process: exit code and what it printed."""
    extra = SHORTER.get("".join(words[1:2]), []) if "--help" not in words else []
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, *extra])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = main.main()
            except SystemExit as stop:
                code = stop.code
    return (code if isinstance(code, int) else 0 if code is None else 1), output.getvalue()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like a fresh clone, with a state directory of its own."""
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    (tmp_path / "liked.txt").write_text("1\n2\n3\n")
    rows = (
        f"{user};{(user * step * step + step) % 23};{2 + step % 4};03/{13 + step}/2024 06:46\n"
        for user in range(30)
        for step in range(12)
    )
    (tmp_path / "ratings.csv").write_text("userId;movieId;rating;when\n" + "".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("privrec.run.costs.peak_bytes", lambda *_: None)
    monkeypatch.delenv("PRIVREC_DATA", raising=False)
    return tmp_path


def run_shell(fence: Fence, where: str) -> None:
    for words in commands(fence.text):
        assert words[0] == "privrec", f"{where}: {words[0]} in a block that should run"
        code, output = call(words)
        assert code == 0, f"{where}: {' '.join(words)} exited {code}\n{output}"


def parse_shell(fence: Fence, where: str) -> None:
    for words in commands(fence.text):
        assert words[0] == "privrec", f"{where}: {words[0]}"
        for word in words:
            if word.startswith("scenarios/"):
                assert (ROOT / word).is_file(), f"{where}: {word}"
        with pytest.MonkeyPatch.context() as patch, parsed_anyhow(words, patch):
            pass


@contextlib.contextmanager
def parsed_anyhow(words: list[str], patch: pytest.MonkeyPatch) -> Iterator[click.Context]:
    """Like :func:`parsed`, where run directories that no command has made are taken to exist."""
    patch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(str(value)))
    with parsed(words) as context:
        yield context


def check_toml(fence: Fence) -> None:
    values = tomllib.loads(fence.text)
    if "name" in values:
        Scenario.from_toml(fence.text)


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_blocks_run(name: str, checkout: Path) -> None:
    names: dict[str, object] = {"__name__": "__page__"}
    for fence in fences((ROOT / name).read_text("utf-8")):
        where = f"{name}:{fence.line}"
        if fence.language == "bash" and "long" in fence.words:
            parse_shell(fence, where)
        elif fence.language == "bash" and not ELSEWHERE & set(fence.words):
            run_shell(fence, where)
        elif fence.language == "python" and "flower" not in fence.words:
            program = compile(fence.text, where, "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(program, names)  # noqa: S102 - running the page is the test
        elif fence.language == "toml":
            check_toml(fence)
        elif fence.language == "json":
            json.loads(fence.text)


def test_deployments_are_of_the_page_whose_blocks_are_run() -> None:
    pages = {p.name for p in PAGES for f in fences(p.read_text("utf-8")) if "deployment" in f.words}
    assert pages == {"flower.md"}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_fences_say_what_they_are(name: str) -> None:
    for fence in fences((ROOT / name).read_text("utf-8")):
        if fence.language not in NOT_RUN:
            assert fence.language in WORDS, f"{name}:{fence.line}: ```{fence.language}"
            assert set(fence.words) <= WORDS[fence.language], f"{name}:{fence.line}"


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_commands_in_running_text_exist(name: str) -> None:
    for code in inline_code((ROOT / name).read_text("utf-8")):
        if not re.match(r"privrec( |$)", code):
            continue
        command: click.Command = group()
        for word in code.split()[1:]:
            if isinstance(command, click.Group) and not word.startswith("-"):
                short = getattr(command, "default", word)  # `report DIR`: `report write DIR`
                known = command.commands.get(word, command.commands.get(short))
                assert known is not None, f"{name}: `{code}`"
                command = known
            elif word.startswith("-"):
                known = {option for one in command.params for option in one.opts} | {"--help"}
                assert word.partition("=")[0] in known, f"{name}: `{code}`"


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    missing = [path for path in leaves(group(), "privrec") if path not in text]
    assert not missing


def leaves(command: click.Group, path: str) -> Iterator[str]:
    for name, child in command.commands.items():
        if isinstance(child, click.Group):
            yield from leaves(child, f"{path} {name}")
        else:
            yield f"{path} {name}"


def test_a_wrong_command_is_found(checkout: Path) -> None:
    for text in ("privrec fly", "privrec plan nowhere.toml", "privrec run --no-such-option"):
        with pytest.raises(AssertionError, match="exited 2"):
            run_shell(Fence("bash", (), text, 1), "page")
    with pytest.raises((click.UsageError, UsageError)):
        parse_shell(Fence("bash", (), "privrec data fly", 1), "page")
