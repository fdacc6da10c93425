"""Streams that cannot hold ε: what they lack is replaced, and no command fails for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = """
name = "tiny"
title = "Für alle Ωμέγα"
[data]
users = 40
items = 20
clusters = 2
interactions_per_user = 6
[model]
dim = 4
block = 2
[devices]
population = 40
sampling = "everybody"
[train]
rounds = 2
[privacy]
noise = "central"
clip_norm = 1.0
epsilon = 8.0
[run]
footprint = false
"""
COMMANDS = """
--help
audit --help
plan tiny.toml
plan tiny.toml --json
population create readers --epsilon 100 --delta 1e-5
run tiny.toml --out run --population readers
population show readers
report run
report verify run/report.json
resume run
"""
ENCODINGS = ("cp1252", "latin-1", "ascii")
# One process, since loading torch is most of the work, with a child for each encoding; each command
# finds the streams as they came, which are what PYTHONIOENCODING would have made of them.
DRIVER = """
import os
import sys
import privrec.report.build, privrec.report.render, privrec.run.lifecycle
from privrec.cli.main import main

def work(encoding):
    os.chdir(encoding)
    os.environ["PRIVREC_STATE"] = os.path.abspath("state")
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout.reconfigure(encoding=encoding)
    sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
    for line in sys.argv[1].strip().splitlines():
        sys.stdout.reconfigure(errors="strict")
        print("#", line)
        try:
            main(line.split(), prog_name="privrec")
        except SystemExit as end:
            assert not end.code, (line, end.code)
        sys.stdout.flush()

for encoding in sys.argv[2:]:
    if os.fork() == 0:
        work(encoding)
        sys.exit()
    _, status = os.wait()
    open(encoding + "/code", "w").write(str(os.waitstatus_to_exitcode(status)))
"""


def test_no_command_fails_where_epsilon_cannot_be_written(tmp_path: Path) -> None:
    for encoding in ENCODINGS:
        (tmp_path / encoding).mkdir()
        (tmp_path / encoding / "tiny.toml").write_text(SCENARIO, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-c", DRIVER, COMMANDS, *ENCODINGS], cwd=tmp_path, check=True,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": ENCODINGS[0],
            "PYTHONUTF8": "0",
        },
    )  # fmt: skip
    for encoding in ENCODINGS:
        check(tmp_path / encoding, encoding)


def check(place: Path, encoding: str) -> None:
    """In a folder with what the commands made and said."""
    out, err = ((place / name).read_bytes() for name in ("stdout", "stderr"))
    said = out.decode(encoding, "replace")  # where ASCII is asked for, click writes UTF-8
    assert (place / "code").read_text() == "0", err.decode(encoding, "replace")
    assert b"Traceback" not in err
    for part in said.split("# ")[1:]:
        command, _, text = part.partition("\n")
        assert text.strip(), command
    assert "? = " in said  # the ε that none of these has
    assert (place / "run" / "report.html").is_file()
