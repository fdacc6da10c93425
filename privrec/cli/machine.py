"""What runs stand on: ``privrec data`` for data sets, ``doctor`` for the machine, ``flower``."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from privrec.cli import console
from privrec.cli.init import look_at_table, print_look
from privrec.errors import PrivrecError, UsageError

if TYPE_CHECKING:
    from privrec.scenario.load import Scenario


@click.group(
    cls=console.Commands, epilog=console.example("privrec data list", "privrec data fetch ml-1m")
)
def data() -> None:
    """List, fetch and describe data sets."""


@data.command("list", epilog=console.example("privrec data list --json"))
@console.data_option
@console.json_option
def list_data(data_dir: Path | None, as_json: bool) -> None:
    """List the data sets that can be fetched and say which are here."""
    console.check_data(data_dir)
    from privrec.data.catalogue import ARCHIVES, cache_dir

    here = found_data(data_dir)
    rows = [
        {"name": name, "holds": archive.holds, "url": archive.url, "found": here.get(name)}
        for name, archive in ARCHIVES.items()
    ]
    if as_json:
        console.print_json(rows)
        return
    cells = [(row["name"], row["holds"], row["found"] or "not found") for row in rows]
    console.print_table("Data sets", ("name", "holds", "found"), cells)
    folders = " and ".join(str(each) for each in (data_dir, cache_dir()) if each is not None)
    console.print_lines(
        [f"Looked in {folders}; --data PATH looks elsewhere, privrec data fetch NAME downloads."]
    )


@data.command(epilog=console.example("privrec data fetch ml-1m"))
@click.argument("name", metavar="NAME")
@click.option(
    *("--data", "directory"),
    type=console.PATH,
    metavar="DIR",
    envvar="PRIVREC_DATA",
    help="Where to keep it. [default: $PRIVREC_DATA, else the user's cache]",
)
def fetch(name: str, directory: Path | None) -> None:
    """Download a data set over https, check it, and show its terms of use once."""
    from privrec.data.catalogue import fetch as download

    path = download(name, directory=directory, echo=lambda terms: click.echo(terms, err=True))
    click.echo(path)


@data.command(
    epilog=console.example(
        "privrec data describe ml-1m --data data/ml-1m", "privrec data describe orders.csv"
    )
)
@click.argument("name", metavar="NAME|SCENARIO|TABLE")
@console.settings_option
@console.data_option
@console.json_option
def describe(name: str, settings: tuple[str, ...], data_dir: Path | None, as_json: bool) -> None:
    """Read a data set and count what is in it.

    It is named as a source, is that of a scenario file, or is a table of your own, whose columns
    are found as by `privrec init`.
    """
    console.check_data(data_dir)
    from privrec.data.files import is_table
    from privrec.scenario.kinds import READERS

    if name not in READERS and is_table(Path(name)):
        look, scenario = look_at_table(Path(name), settings)
        data_dir = None
        if not as_json:
            print_look(look, Path(name))
    else:
        scenario = _scenario_for_data(name, settings)
    from privrec.run.task import load_task

    facts = load_task(scenario, data_dir).split.describe()
    if as_json:
        console.print_json(facts)
        return
    rows = [(fact.replace("_", " "), value) for fact, value in facts.items()]
    console.print_table(f"Data of {name}", ("fact", "value"), rows)


def _scenario_for_data(name: str, settings: Sequence[str]) -> Scenario:
    from privrec.scenario.kinds import MODELS, READERS
    from privrec.scenario.load import Scenario, load

    if name.endswith(".toml"):
        return load(name, settings)
    text = 'name = "data"\n[privacy]\nnoise = "none"\n'
    gives = READERS[name].config.gives if name in READERS else "interactions"
    kinds = [f"model.kind={kind}" for kind in MODELS if MODELS[kind].config.learns == gives][:1]
    if gives != "interactions":
        kinds += ["train.loss=full_softmax", "devices.popularity=public"]
    given = [f"data.source={name}", *kinds, *settings]
    return Scenario.from_toml(text, given, source=f"data {name}")


# --------------------------------------------------------------------------- the doctor

SLOW_AES_GB_S = 0.5
AES_BYTES = 1 << 25
SHOWN = ("torch", "numpy", "scipy", "cryptography", "dp-accounting")
EXTRAS = ("data", "track", "flower")


Level = Literal["ok", "note", "fail"]
Found = tuple[Level, str] | tuple[Level, str, str]  # level, detail and perhaps a remedy


@dataclass(frozen=True)
class Finding:
    """One thing looked at: a run can do without what has a ``note``, not without a ``fail``."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


@click.command(epilog=console.example("privrec doctor"))
@console.data_option
@console.json_option
def doctor(data_dir: Path | None, as_json: bool) -> None:
    """Check this machine for what a run needs."""
    console.check_data(data_dir)
    findings = examine(data_dir)
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        rows = [
            ("FAIL" if each.level == "fail" else each.level, each.name, each.detail, each.remedy)
            for each in findings
        ]
        console.print_table("privrec doctor", ("", "what", "found", "remedy"), rows)
    failed = [finding.name for finding in findings if finding.level == "fail"]
    if failed:
        raise PrivrecError(f"{', '.join(failed)}: a run needs this; see the remedy above")


def examine(data_dir: Path | None = None) -> list[Finding]:
    """Every finding about this machine, in reading order; ``data_dir`` may hold data sets."""
    findings = []
    for name, check in CHECKS.items():
        try:
            findings.append(Finding(name, *check()))
        except Exception as error:  # to be shown, not to die of
            detail = f"{type(error).__name__}: {error}"
            findings.append(Finding(name, "fail", detail, "reinstall privrec"))
    places = [f"{name} in {place}" for name, place in found_data(data_dir).items()]
    remedy = "privrec data fetch ml-1m, or set PRIVREC_DATA; synthetic data needs nothing"
    nothing = Finding("data", "note", "no MovieLens set was found", remedy)
    here = Finding("data", "ok", ", ".join(places)) if places else nothing
    return [*findings, *_packages(), here]


def _python() -> Found:
    return "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _threads() -> Found:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    used = torch.get_num_threads()
    detail = f"{used} used by torch, {cores} cores usable"
    if cores and used > cores:
        return "note", detail, f"set OMP_NUM_THREADS={cores}"
    return "ok", detail


def _secure_generator() -> Found:
    from privrec.randomness import SecretRoot

    first, second = (SecretRoot(os.urandom(32)).stream("doctor").bytes(32) for _ in range(2))
    if first == second:
        return "fail", "two roots gave the same bytes", "do not run privrec with noise here"
    return "ok", "operating system entropy, AES-CTR keystream"


def _aes_speed() -> Found:
    from privrec.randomness import SecretRoot

    stream = SecretRoot(os.urandom(32)).stream("doctor")
    stream.bytes(AES_BYTES)
    start = time.perf_counter()
    stream.bytes(AES_BYTES)
    speed = AES_BYTES / (time.perf_counter() - start) / 1e9
    detail = f"{speed:.1f} GB/s"
    if speed < SLOW_AES_GB_S:
        return "note", detail, "noise will be slow: use a CPU with AES-NI"
    return "ok", detail


def _state_directory() -> Found:
    from privrec.randomness import state_dir

    directory = state_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            probe.write(b"privrec")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        remedy = "set PRIVREC_STATE to a folder of your own on a local disk"
        return "fail", f"{directory} cannot be written: {error.strerror}", remedy
    return "ok", f"{directory} is writable; noise roots are kept there"


def _local_superlink() -> Found:
    """Whose packages ``flwr run`` gets: a SuperLink that it started once serves later runs too."""
    ours = Path(sys.executable).parent.resolve()
    try:
        listed = subprocess.run(
            ["ps", "-axwwo", "pid=,args="], capture_output=True, text=True
        ).stdout
    except OSError:
        return "ok", "not looked for, since there is no ps"
    for pid, *command in (line.split() for line in listed.splitlines()):
        script = next((word for word in command[:2] if word.endswith("flower-superlink")), None)
        if script is None or "--simulation" not in command:
            continue
        theirs = Path(script).parent.resolve()
        if theirs != ours:
            remedy = f"if flwr run finds no privrec there: kill {pid}; it starts one anew"
            return "note", f"process {pid} runs simulations with the packages of {theirs}", remedy
    return "ok", "flwr run gets the packages of this environment"


CHECKS: dict[str, Callable[[], Found]] = {
    "python": _python,
    "threads": _threads,
    "secure generator": _secure_generator,
    "AES speed": _aes_speed,
    "state directory": _state_directory,
    "local SuperLink": _local_superlink,
}


def _packages() -> Iterator[Finding]:
    """One finding for the packages that are needed and one for each extra."""
    for extra, wanted in _declared().items():
        what = f"extra {extra}" if extra else "packages"
        if absent := {line: lacking for line in wanted if (lacking := _lacking(line))}:
            # By their own names: a registry has no privrec, or somebody else's.
            install = "pip install " + " ".join(f"'{line}'" for line in absent)
            remedy = f"{install} if you want it" if extra else "reinstall privrec"
            missing = f"missing: {', '.join(chain.from_iterable(absent.values()))}"
            yield Finding(what, "note" if extra else "fail", missing, remedy)
        else:
            here = wanted if extra else [f"{name} {version(name)}" for name in SHOWN]
            yield Finding(what, "ok", ", ".join(here))


def _declared() -> dict[str, list[str]]:
    """What privrec needs, as in ``flwr[simulation]>=1.26``, by extra; "" has what runs need."""
    try:
        declared = requires("privrec") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        declared = list(SHOWN)
    wanted: dict[str, list[str]] = {"": []}
    for line in declared:
        if not (extra := _extra(line)) or extra in EXTRAS:
            wanted.setdefault(extra, []).append(line.partition(";")[0].strip())
    return wanted


def _extra(requirement: str) -> str:
    return requirement.partition("extra ==")[2].strip(" '\"")


def _lacking(requirement: str) -> list[str]:
    """The packages of a requirement, and of the extras that it names, that are not installed."""
    name, *extras = re.findall(r"[\w.-]+", re.split(r"[^\w.,\[-]", requirement, maxsplit=1)[0])
    if not _installed(name):
        return [name]
    lines = [line for line in (requires(name) or []) if extras and _extra(line) in extras]
    named = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines}
    return sorted(each for each in named if not _installed(each))


def _installed(name: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(name))
    return False


def found_data(data_dir: Path | None = None) -> dict[str, str]:
    """Where each set was found, by name, in ``data_dir`` first: a data set's own, or one above."""
    from privrec.data.catalogue import ARCHIVES, cache_dir

    found: dict[str, str] = {}
    for name, archive in ARCHIVES.items():
        for root in (root for root in (data_dir, cache_dir()) if root is not None):
            places = [root] if root.name in archive.folders else []
            places += [root / folder for folder in archive.folders]
            places += [root / f"{folder}.zip" for folder in archive.folders]
            for here in filter(Path.exists, places):
                found.setdefault(name, str(here))
    return found


@click.group(
    cls=console.Commands,
    epilog=console.example(
        "privrec flower init my-app", "privrec flower enroll keys --roster roster.txt"
    ),
)
def flower() -> None:
    """Deploy with Flower: write an app, enrol devices."""


@flower.command(epilog=console.example("privrec flower init my-app --scenario my.toml"))
@click.argument("folder", type=console.PATH)
@click.option("--scenario", type=console.PATH, help="What the app trains; a small one if unset.")
@console.json_option
def init(folder: Path, scenario: Path | None, as_json: bool) -> None:
    """Write a complete Flower app to FOLDER, ready for `flwr run`."""
    from privrec.flower.app import init as write
    from privrec.flower.app import name_of, population_of
    from privrec.scenario.load import load

    files = write(folder, scenario)
    written = load(next(path for path in files if path.name == "scenario.toml"))
    out = f"~/privrec-runs/{name_of(folder)}"
    first = _before_flwr_run(written, out)
    run = [f"flwr run {shlex.quote(str(folder))} --stream", f"privrec report verify {out}"]
    if as_json:
        console.print_json({"files": [str(path) for path in files], "first": first, "run": run})
        return
    for path in files:
        click.echo(f"wrote {path}")
    click.echo(
        f"Its {population_of(written)} devices are spread over the nodes that Flower simulates: 2, "
        "or N with --federation-config num-supernodes=N after flwr run."
    )
    for need in first:
        click.echo(f"First, {need}", err=True)
    click.echo("\n".join(["Run it, and check what it left:", *(f"  {line}" for line in run)]))


def _before_flwr_run(scenario: Scenario, out: str) -> list[str]:
    """What stands in the way of an app's simulation on this machine, each begun by its remedy."""
    from privrec.data.catalogue import ARCHIVES

    needs = []
    if lacking := _lacking("flwr[simulation]"):
        missing = " and ".join(lacking)
        needs.append(f"pip install 'flwr[simulation]': {missing}, which it needs, is not here")
    level, *words = _local_superlink()
    if level != "ok":
        needs.append(f"look at Flower's local SuperLink: {'; '.join(words)}")
    source = scenario.data.source
    if source in ARCHIVES and source not in found_data():
        needs.append(f"privrec data fetch {source}: every node reads its users from it")
    if Path(out).expanduser().exists():
        needs.append(f"move {out} away, or name another out in pyproject.toml: a run lies there")
    return needs


@flower.command(
    "plan",
    epilog=console.example("privrec flower plan --epsilon 8 --rounds 20 --coefficients 62006"),
)
@click.option("--epsilon", type=float, required=True, help="ε of all attempts, for a whole node.")
@click.option("--rounds", type=int, required=True, help="Attempts at rounds that it is for.")
@click.option("--coefficients", type=int, required=True, help="Floats of the model.")
@click.option("--delta", type=float, default=1e-5, show_default=True, help="δ of the guarantee.")
@click.option("--nodes", type=int, multiple=True, help="Numbers of nodes; 10 to 10,000 if unset.")
@console.json_option
def nodes_for(
    epsilon: float,
    rounds: int,
    coefficients: int,
    delta: float,
    nodes: tuple[int, ...],
    as_json: bool,
) -> None:
    """Noise of a SecureSum by the number of nodes, at a target ε and before any is asked."""
    try:
        from privrec.flower.plan import outlook
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not here, which a SecureSum needs: install the extra, privrec[flower]"
        ) from None
    wanted = nodes or (10, 30, 100, 300, 1000, 3000, 10_000)
    found = [outlook(each, coefficients, epsilon, rounds=rounds, delta=delta) for each in wanted]
    if as_json:
        console.print_json([asdict(each) for each in found])
        return
    columns = ("nodes", "noise multiplier", "noise in a coefficient of the mean", "signal")
    rows = [(f"{e.nodes:,}", *(console.number_text(v) for v in astuple(e)[1:])) for e in found]
    console.print_table(f"ε = {epsilon:g} at δ = {delta:g} over {rounds:,} rounds", columns, rows)
    console.print_lines(
        ["In units of clip_norm. Signal: the longest mean update over the norm of its noise."]
    )


@flower.command(epilog=console.example("privrec flower enroll keys --roster roster.txt --number 7"))
@click.argument("keys", type=console.PATH)
@click.option("--roster", type=console.PATH, help="Add the devices to this file.")
@click.option("--office", type=console.PATH, help="Certify them with this secret key.")
@click.option("--partition", nargs=2, type=int, metavar="ID COUNT", help="Users of a partition.")
@click.option("--population", type=int, help="Users of the data set, with --partition.")
@click.option("--number", type=int, default=0, show_default=True, help="Of a single device.")
@console.json_option
def enroll(
    keys: Path,
    roster: Path | None,
    office: Path | None,
    partition: tuple[int, int] | None,
    population: int | None,
    number: int,
    as_json: bool,
) -> None:
    """Make the keys of a node in the new folder KEYS, and enrol its devices."""
    from privrec.flower.enrolment import enroll as make

    if partition is None:
        users: range = range(number, number + 1)
    else:
        part, parts = partition
        if population is None or not 0 <= part < parts:
            raise UsageError(
                f"--partition {part} {parts}: ID is below COUNT, and --population N says how many "
                "users the data set has"
            )
        users = range(part, population, parts)
    identities = make(keys, users, roster, office)
    if as_json:
        console.print_json({"keys": str(keys), "identities": identities})
        return
    click.echo(f"{len(identities)} devices; their secret root is in {keys}: keep it there")
    if roster is not None:
        click.echo(f"Enrolled in {roster}: hand that file to every device, not by the server")
    if office is not None:
        click.echo(f"Certified by {office}: hand {office}.pub to every device")
