"""A population's ledger is one piece, and no run's charge leaves it: what is not so is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privrec import storage
from privrec.errors import BudgetError, IntegrityError, PrivrecError, UsageError
from privrec.privacy import population
from privrec.privacy.events import RoundEvent, epsilon
from privrec.privacy.population import PopulationCharge, create, path_of, read, reserve, settle
from privrec.storage import START, canonical, line_of, server_key, sign

EVENT = RoundEvent("gaussian", 2.0, 1.0)
DELTA = 1e-5
FORGER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def rounds(number: int) -> Counter[RoundEvent]:
    return Counter({EVENT: number})


@pytest.fixture(autouse=True)
def readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ledger of a population with room for ten rounds, two runs of which one has ended."""
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    limit = epsilon(rounds(10), DELTA, "recipients") + 0.01
    create("readers", epsilon=limit, delta=DELTA, against="recipients")
    reserve("readers", "a", rounds(4))
    settle("readers", "a", rounds(3))
    reserve("readers", "b", rounds(5))
    return path_of("readers")


def header_of(run: str, number: int) -> dict[str, object]:
    """The part of a run's signed header that ties it to the population."""
    return {"run_id": run, "standing": asdict(reserve("readers", run, rounds(number)))}


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()[:-1]]


def written(path: Path, entries: list[dict[str, object]], key: Ed25519PrivateKey) -> None:
    """A ledger of other entries, chained as they should be, with a head of some key."""
    previous, lines = START, []
    for index, entry in enumerate(entries):
        body = {name: value for name, value in entry.items() if name != "hash"}
        lines.append(line_of({**body, "index": index, "previous": previous}))
        previous = json.loads(lines[-1])["hash"]
    facts = {"population": "readers", "entries": len(lines), "last_hash": previous}
    path.write_bytes(b"".join(lines) + canonical(sign("population head", facts, key)) + b"\n")


def without_tail(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    return entries[:-1]


def of_a_higher_limit(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{**entries[0], "epsilon": 1e6}, *entries[1:]]


def settled_for_less(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    return [*entries, {"kind": "settle", "run": "b", "events": []}]


def refused(kind: type[PrivrecError] = IntegrityError) -> str:
    with pytest.raises(kind) as caught:
        reserve("readers", "c", rounds(1))
    with pytest.raises(kind):
        read("readers")
    return str(caught.value)


def test_what_is_reserved_and_settled_adds_up(readers: Path) -> None:
    found = read("readers")
    assert found.runs == {"a": rounds(3), "b": rounds(5)}
    assert found.settled == {"a"}
    standing = reserve("readers", "c", rounds(2))
    assert (standing.runs, standing.entries) == (2, 5)
    assert standing.last_hash == read("readers").hashes[-1]
    with pytest.raises(BudgetError, match="limit is"):
        reserve("readers", "d", rounds(1))
    assert readers.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", [without_tail, of_a_higher_limit, settled_for_less])
@pytest.mark.parametrize("whose", ["of nobody", "of a forger"])
def test_a_rewritten_ledger_is_refused(
    readers: Path, change: Callable[..., list[dict[str, object]]], whose: str
) -> None:
    before = readers.read_bytes().splitlines(keepends=True)[-1]
    written(readers, change(lines_of(readers)), FORGER)
    if whose == "of nobody":
        lines = readers.read_bytes().splitlines(keepends=True)[:-1]
        readers.write_bytes(b"".join([*lines, before]))
    assert "readers.jsonl" in refused()


@pytest.mark.parametrize("change", [without_tail, of_a_higher_limit])
def test_what_the_key_itself_rewrote_lacks_what_runs_know(
    readers: Path, change: Callable[..., list[dict[str, object]]]
) -> None:
    written(readers, change(lines_of(readers)), server_key(readers.with_suffix(".key")))
    assert "it was cut, set back or begun anew" in refused()


@pytest.mark.parametrize(("kind", "run"), [("reserve", "a"), ("settle", "a"), ("header", "b")])
def test_no_entry_follows_the_end_of_its_run_or_is_of_another_kind(
    readers: Path, kind: str, run: str
) -> None:
    entry = {"kind": kind, "run": run, "events": []}
    written(readers, [*lines_of(readers), entry], server_key(readers.with_suffix(".key")))
    assert f"an entry of the kind '{kind}'" in refused()


def test_every_altered_byte_is_refused(readers: Path) -> None:
    content = readers.read_bytes()
    for place in range(0, len(content) - 1, 7):
        altered = bytearray(content)
        altered[place] ^= 1
        readers.write_bytes(altered)
        with pytest.raises(IntegrityError):
            read("readers")


def test_every_way_of_cutting_it_short_is_refused(readers: Path) -> None:
    content = readers.read_bytes()
    for length in range(0, len(content) - 1, 11):
        readers.write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            read("readers")


def test_an_older_copy_is_refused(readers: Path, tmp_path: Path) -> None:
    backup = readers.read_bytes()
    reserve("readers", "c", rounds(2))
    readers.write_bytes(backup)
    message = refused()
    assert str(tmp_path / "state" / "runs" / "c" / "population.json") in message
    assert "knows it with 5 entries" in message


def test_what_is_deleted_is_not_begun_again(readers: Path) -> None:
    for also in ([], [readers.with_suffix(".key")]):
        for path in (readers, *also):
            path.unlink(missing_ok=True)
        with pytest.raises(UsageError, match="a limit is never taken back"):
            create("readers", epsilon=1e6, delta=DELTA, against="recipients")
        with pytest.raises(UsageError, match="no ledger here"):
            reserve("readers", "c", rounds(1))


def test_a_key_that_is_gone_is_never_replaced(readers: Path) -> None:
    readers.with_suffix(".key").unlink()
    assert "the key that signs the ledger is gone" in refused(UsageError)
    assert not readers.with_suffix(".key").exists()
    with pytest.raises(UsageError, match="a limit is never taken back"):
        create("readers", epsilon=1e6, delta=DELTA, against="recipients")


def test_the_ledger_of_another_population_is_refused(readers: Path) -> None:
    for number, suffixes in enumerate([(".jsonl",), (".jsonl", ".key")]):
        other = create(f"other-{number}", epsilon=1e6, delta=DELTA, against="server").path
        for suffix in suffixes:
            shutil.copy(other.with_suffix(suffix), readers.with_suffix(suffix))
        refused()


def test_a_run_refuses_a_ledger_that_lacks_its_own_entry(readers: Path, tmp_path: Path) -> None:
    """Also where everything that this machine keeps was set back: the header is in the run."""
    shutil.copytree(tmp_path / "state", tmp_path / "backup")
    header = header_of("c", 2)
    assert PopulationCharge.of(header, ended=False) == PopulationCharge("readers", "c", rounds(2))
    shutil.rmtree(tmp_path / "state")
    shutil.copytree(tmp_path / "backup", tmp_path / "state")
    assert read("readers").runs.keys() == {"a", "b"}
    with pytest.raises(IntegrityError, match="run c knows it with 5 entries"):
        PopulationCharge.of(header, ended=False)


def test_settled_is_final(readers: Path) -> None:
    header = header_of("c", 2)
    settle("readers", "c", rounds(2))  # also what charged all that it had set aside
    before = readers.read_bytes()
    settle("readers", "c", rounds(2))  # said again after a crash
    assert PopulationCharge.of(header, ended=True) is not None
    for charged in (rounds(1), rounds(3)):
        with pytest.raises(IntegrityError, match="what it charged is final"):
            settle("readers", "c", charged)
        with pytest.raises(IntegrityError, match="what it charged is final"):
            reserve("readers", "c", charged)
    with pytest.raises(IntegrityError, match="an older copy of it"):
        PopulationCharge.of(header, ended=False)
    assert readers.read_bytes() == before


@pytest.mark.parametrize("moment", ["before the ledger", "before what the run knows"])
def test_a_crash_between_two_writes_leaves_what_goes_on(
    readers: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class PowerLossError(Exception):
        pass

    replace, left = storage.replace, 0 if moment == "before the ledger" else 1

    def fails(*given: object, **words: object) -> None:
        nonlocal left
        if not left:
            raise PowerLossError
        left -= 1
        replace(*given, **words)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(population.storage, "replace", fails)
        with pytest.raises(PowerLossError):
            reserve("readers", "c", rounds(1))
    assert read("readers").runs.get("c") == (rounds(1) if "knows" in moment else None)
    reserve("readers", "c", rounds(2))
    settle("readers", "c", rounds(1))
    assert read("readers").runs["c"] == rounds(1)


def test_two_processes_never_reserve_the_same_room(readers: Path) -> None:
    """Room for two more rounds, six processes that want one each."""
    script = (
        "import sys; from collections import Counter\n"
        "from privrec.errors import BudgetError\n"
        "from privrec.privacy.events import RoundEvent\n"
        "from privrec.privacy.population import reserve\n"
        "sys.stdin.readline()\n"
        "try: reserve('readers', sys.argv[1], Counter({RoundEvent('gaussian', 2.0, 1.0): 1}))\n"
        "except BudgetError: sys.exit(3)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, f"run-{number}"], stdin=subprocess.PIPE)
        for number in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    codes = sorted(process.wait() for process in processes)
    assert codes == [0, 0, 3, 3, 3, 3]
    found = read("readers")
    assert sum(found.counts.values()) == 10
    assert found.spent() <= found.epsilon
