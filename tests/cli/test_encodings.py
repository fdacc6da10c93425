"""Streams that cannot hold ε: what they lack is replaced, and no command fails for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
sampling_rate = 0.5
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
# One process, since loading torch is most of the work; each command finds the streams as they came.
DRIVER = """
import sys
from privrec.cli.main import main
for line in sys.argv[1].strip().splitlines():
    sys.stdout.reconfigure(errors="strict")
    print("#", line)
    try:
        main(line.split(), prog_name="privrec")
    except SystemExit as end:
        assert not end.code, (line, end.code)
    sys.stdout.flush()
"""


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_no_command_fails_where_epsilon_cannot_be_written(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "tiny.toml").write_text(SCENARIO, encoding="utf-8")
    state = str(tmp_path / "state")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, COMMANDS], capture_output=True, cwd=tmp_path, check=False,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "PRIVREC_STATE": state,
            "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0",
        },
    )  # fmt: skip
    said = done.stdout.decode(encoding, "replace")  # where ASCII is asked for, click writes UTF-8
    assert done.returncode == 0, done.stderr.decode(encoding, "replace")
    assert b"Traceback" not in done.stderr
    for part in said.split("# ")[1:]:
        command, _, text = part.partition("\n")
        assert text.strip(), command
    assert "? = " in said  # the ε that none of these has
    assert (tmp_path / "run" / "report.html").is_file()
