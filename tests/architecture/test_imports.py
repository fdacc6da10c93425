"""Imports between the rooms run one way, and importing the package costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "privrec"

# The rooms, lowest first. A room imports rooms on lower floors only, never its neighbours; within
# the lowest floor, the root's own modules import one another in the order they have here.
FLOORS = (
    ("errors", "storage", "randomness", "workers"),
    ("embedding", "scenario"),
    ("data", "privacy", "search", "secagg"),
    ("models", "optim"),
    ("device",),
    ("server", "evaluate"),
    ("run",),
    ("report",),
    ("api", "audit", "flower"),
    ("cli", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOT_MODULES = FLOORS[0]
NETWORK = {
    "aiohttp", "asyncio", "flwr", "ftplib", "grpc", "http", "httpx", "multiprocessing", "pooch",
    "requests", "smtplib", "socket", "socketserver", "ssl", "subprocess", "urllib", "urllib3",
    "webbrowser", "websockets",
}  # fmt: skip


def room_of(module: str) -> str:
    """The room of a dotted module below ``privrec``."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also those inside functions and by ``importlib``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:kept], *([base] if base else [])])
            # `from privrec import data` imports a room; `from privrec.data import load` one too.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and is_import_call(node.func):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def edge_problem(source: str, target: str) -> str | None:
    """Why room ``source`` must not import room ``target``, or None if it may."""
    if source == target or (source, target) == ("__main__", "cli"):
        return None
    if source not in FLOOR or target not in FLOOR:
        missing = source if source not in FLOOR else target
        return f"room {missing!r} has no floor; give it one in FLOORS"
    if source in ROOT_MODULES and target in ROOT_MODULES:
        below = ROOT_MODULES.index(target) < ROOT_MODULES.index(source)
    else:
        below = FLOOR[target] < FLOOR[source]
    return None if below else f"{target} is not below {source}"


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def problems() -> Iterator[str]:
    for path, tree in sources().items():
        module = module_name(path)
        if module == "privrec":
            continue  # its lazy attributes are checked by test_the_package_itself_imports_nothing
        package = path.name == "__init__.py"
        for line, name in imported_modules(tree, module, is_package=package):
            if not name.startswith("privrec.") or name == "privrec.__version__":
                continue
            reason = edge_problem(room_of(module), room_of(name))
            if reason:
                yield f"{path.relative_to(ROOT)}:{line} imports {name}: {reason}"


def test_imports_run_one_way() -> None:
    assert not list(problems())


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module_name(path)) for path in sources() if module_name(path) != "privrec"}
    assert rooms == set(FLOOR)
    assert len(FLOORS) <= 10


def test_the_root_holds_few_modules() -> None:
    assert len([path for path in sources() if path.parent == PACKAGE]) <= 6


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("run", "server", True),
        ("server", "run", False),
        ("server", "evaluate", False),
        ("data", "embedding", True),
        ("embedding", "data", False),
        ("device", "run", False),
        ("privacy", "randomness", True),
        ("randomness", "errors", True),
        ("errors", "randomness", False),
        ("storage", "errors", True),
        ("errors", "privacy", False),
        ("data", "scenario", True),
        ("scenario", "data", False),
        ("models", "scenario", True),
        ("report", "audit", False),
        ("audit", "flower", False),
        ("attic", "errors", False),
        ("attic", "data", False),
    ],
)
def test_the_rule_can_fail(source: str, target: str, allowed: bool) -> None:
    assert (edge_problem(source, target) is None) is allowed


def test_lazy_and_relative_imports_are_seen() -> None:
    text = (
        "def f():\n"
        "    from ..server import server\n"
        "    from . import train\n"
        "    import privrec.run.lifecycle\n"
        "    importlib.import_module('privrec.cli.main')\n"
    )
    found = imported_modules(ast.parse(text), "privrec.device.device", is_package=False)
    assert [name for _, name in found] == [
        "privrec.server.server",
        "privrec.device.train",
        "privrec.run.lifecycle",
        "privrec.cli.main",
    ]


def test_a_device_reaches_no_server_transport_or_network() -> None:
    found = []
    for path in sorted((PACKAGE / "device").rglob("*.py")):
        package = path.name == "__init__.py"
        names = imported_modules(sources()[path], module_name(path), is_package=package)
        found += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in names
            if name.split(".")[0] in NETWORK
            or name.split(".")[:2]
            in (["privrec", "server"], ["privrec", "run"], ["privrec", "flower"])
        ]
    assert not found


def modules_after(code: str) -> set[str]:
    """What is loaded in a fresh interpreter after ``code``."""
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_device_loads_no_server_transport_or_network_client() -> None:
    names = [module_name(path) for path in sorted((PACKAGE / "device").rglob("*.py"))]
    assert len(names) > 1
    loaded = modules_after("\n".join(f"import {name}" for name in names))
    assert "privrec.device" in loaded
    rooms = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("privrec.")}
    assert not rooms & {
        "privrec.server",
        "privrec.transport",
        "privrec.run.lifecycle",
        "privrec.cli.main",
    }
    assert not loaded & {"pooch", "requests", "flwr", "httpx", "grpc"}


def test_the_package_itself_imports_nothing_heavy() -> None:
    loaded = modules_after("import privrec; privrec.__version__")
    assert not loaded & {"torch", "numpy", "scipy", "opacus", "dp_accounting"}


def test_importing_the_package_takes_less_than_300_ms() -> None:
    """Of the processor's time, of which it takes 17 ms: a busy machine has no say in it."""
    program = (
        "import time; start = time.process_time(); import privrec; "
        "print(time.process_time() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.3


def test_no_name_of_the_package_is_hidden_by_a_module_of_that_name() -> None:
    # Importing a submodule binds its name in the package, over any lazy attribute.
    import privrec

    rooms = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()}
    assert not set(privrec.__all__) & rooms
