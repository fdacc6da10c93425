"""Golden runs: small runs whose every bit is known, kept in ``tests/golden/golden.json``.

Three things are kept of each run, by what they depend on:

- ``paid``: what was charged and what the report promises, of a run with secret noise made by the
  command line. It holds on every machine.
- ``first round``: the model after one round with a known noise root. Every stream of noise, coins
  and samples begins from integers that all machines share, so it holds on every machine up to
  float rounding; a renamed stream or a reordered draw changes it wholly.
- ``bits``: hashes of everything that a whole run with a known root releases, and its metrics. From
  the second round on noise is keyed by digests of float32 weights, so that one unit in the last
  place changes all that follows: bits are kept for each kind of arithmetic, as :func:`arithmetic`
  names it, and must be those where that one is known. Threads and OpenBLAS kernels change none;
  the vector width of torch does.

A run's draws are bound to a hash of its scenario. Here that hash is the run's name instead, so that
a key that is added to scenarios does not change all bits (:func:`pinned`).
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from small_runs import ledger_entries, make_scenario, run_once, weights

import privrec
from privrec.cli.main import main

FOLDER = Path(__file__).resolve().parents[1] / "golden"
KEPT = FOLDER / "golden.json"
ROOT = b"golden runs: nobody is protected"
RUNS: dict[str, tuple[str, ...]] = {
    "central": ("central.toml",),
    "exact": ("tiers.toml",),
    "full": ("tiers.toml", "run.secure_sum=full"),
    "rows": (
        "tiers.toml",
        "devices.popularity=released",
        "devices.popularity_epsilon=1.0",
        "devices.popularity_items=4",
    ),
    "selector": ("selector.toml",),
    "labels": ("labels.toml",),
    "texts": ("texts.toml",),
    "examples": ("examples.toml",),
    "flower": ("tiers.toml", "devices.dropout_rate=0"),
}
"""Scenario and changes of each run; ``flower`` goes over nodes of a grid in memory."""
TOLERANCE = 1e-4
"""Relative; ε is rounded up in its fourth decimal."""
SKETCH = 24
"""Coefficients that are kept of a model."""
_SILENT = ("devices.dropout_rate=0",)  # drop-outs are secret coins: they would change what is paid
_FACTS = (
    "claim", "privacy", "scope", "trust_model", "definition", "outputs", "mechanism", "sampling",
    "accounting", "examples", "outside_the_ledger", "deployment", "reading", "warnings",
    "operators_word",
)  # fmt: skip
_OWN = ("ledger_head", "ledger_key")  # names of one run with secret keys
_TIER = ("capacity", "share", "weight", "devices", "items", "dim", "upload_bytes", "download_bytes")
_MODEL = ("kind", "dim", "block", "slots", "compression", "dense_weights", "coefficients")

Fields = dict[str, Any]


# --------------------------------------------------------------------------- measuring


def measured(name: str, part: str) -> Fields:
    """Run one golden scenario, and return one of the :data:`PARTS` that are kept of it."""
    with pinned(), tempfile.TemporaryDirectory() as folder:
        return _MEASURE[part](name, Path(folder))


@contextmanager
def pinned() -> Iterator[None]:
    """Bind draws to the scenario's name, and keep secrets in a place of their own."""
    own = privrec.Scenario.plan_hash
    with tempfile.TemporaryDirectory() as state:
        environment = {"PRIVREC_STATE": state}
        with _environment(environment):
            privrec.Scenario.plan_hash = lambda of: _sha(of.name)  # type: ignore[method-assign]
            try:
                yield
            finally:
                privrec.Scenario.plan_hash = own  # type: ignore[method-assign]


def _paid(name: str, folder: Path) -> Fields:
    out = folder / "secret"
    file, *changes = RUNS[name]
    if name == "flower":
        _over_flower(folder, out, tuple(changes), None)
    else:
        settings = [word for change in (*changes, *_SILENT) for word in ("-s", change)]
        _cli("run", str(FOLDER / file), *settings, "--out", str(out))
    report = json.loads(_cli("report", str(out), "--json"))
    result = json.loads((out / "result.json").read_text("utf-8"))
    sizes = {
        "rounds": result["rounds"],
        "model": {key: result["model"].get(key) for key in _MODEL},
        "tiers": [{key: tier.get(key) for key in _TIER} for tier in result.get("tiers", ())],
    }
    entries = [entry for entry in ledger_entries(out) if "round" in entry]
    events = [entry["event"] for entry in entries if "event" in entry]
    ledger = {
        "entries": ", ".join(f"{e['kind']} {e['round']}.{e['attempt']}" for e in entries),
        "events": [event for place, event in enumerate(events) if event not in events[:place]],
    }
    parts = {key: report[key] for key in _FACTS}
    return {
        **_flat("ledger", ledger),
        **_flat("result.privacy", result["privacy"]),
        **_flat("result", sizes),
        **_flat("report", parts),
    }


def _first_round(name: str, folder: Path) -> Fields:
    out = folder / "first"
    _known(name, folder, out, "train.rounds=1")
    model = weights(out).astype(np.float64)
    places = np.linspace(0, len(model) - 1, SKETCH).astype(int)
    return {
        "weights.count": len(model),
        "weights.norm": _rounded(float(np.linalg.norm(model))),
        "weights.sum": _rounded(float(model.sum())),
        "weights.sketch": [_rounded(float(each)) for each in model[places]],
        "attempts": _attempts(out),
    }


def _bits(name: str, folder: Path) -> Fields:
    out = folder / "known"
    return bits_of(out, _known(name, folder, out))


def bits_of(out: Path, payload: Fields) -> Fields:
    """Return what is kept of the bits of a run in ``out`` that had a known root."""
    releases = [
        [entry.get(key) for key in ("kind", "round", "attempt", "tag", "model")]
        for entry in ledger_entries(out)[1:]
    ]
    return {
        "weights": _sha(weights(out).tobytes()),
        "releases": _sha(json.dumps(releases)),
        "attempts": _attempts(out),
        **_flat("metrics", payload["metrics"]),
        **_flat("intervals", payload.get("intervals", {})),
    }


_MEASURE = {"paid": _paid, "first round": _first_round, "bits": _bits}
PARTS = tuple(_MEASURE)


def _known(name: str, folder: Path, out: Path, *more: str) -> Fields:
    if name == "flower":
        return _over_flower(folder, out, (*RUNS[name][1:], *more), ROOT)
    return run_once(*in_place(name, out), *more, key=ROOT)


def in_place(name: str, out: Path) -> tuple[Any, ...]:
    """Return the arguments of :func:`runs.run_once` for one golden run."""
    file, *changes = RUNS[name]
    return FOLDER / file, out, *changes


def _attempts(out: Path) -> str:
    charges = [entry for entry in ledger_entries(out) if entry["kind"] == "charge"]
    return " ".join(f"{entry['round']}.{entry['attempt']}" for entry in charges)


def _over_flower(folder: Path, out: Path, changes: tuple[str, ...], key: bytes | None) -> Fields:
    """Run over eight nodes in memory, one of which is lost once in the midst of a round.

    With a key all nodes draw from one root that is known.
    """
    from memory_grid import Loopback, context_of

    from privrec.flower.client_app import client_app
    from privrec.flower.server_app import deploy
    from privrec.randomness import write_secret

    scenario, nodes = make_scenario(FOLDER / RUNS["flower"][0], *changes), 8
    app, lost = folder / f"app-{out.name}", []
    app.mkdir()
    (app / "scenario.toml").write_text(scenario.to_toml(), "utf-8")

    def vanishes(node: int, kind: str) -> bool:
        if kind.endswith("masked") and node == nodes - 1:
            lost.append(node)
            return len(lost) == 1
        return False

    contexts = {}
    for node in range(nodes):
        config: Fields = {"partition-id": node, "num-partitions": nodes}
        if key is not None:
            config["keys"] = str(app / f"keys-{node}")
            write_secret(app / f"keys-{node}" / "device.root", hashlib.sha256(key).digest())
            (app / f"keys-{node}" / "state").touch()
        contexts[node] = (client_app(app), context_of(node, config, {}))
    grid, words = Loopback(contexts, vanishes), {"items": scenario.data.items, "wait_s": 0.2}
    payload = deploy(scenario, grid, out=out, unsafe_noise_key=key, **words).payload
    if len(lost) < 2 <= scenario.train.rounds:
        raise AssertionError(f"no node was asked to mask twice: {lost}")
    return payload


def _cli(*words: str) -> str:
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    if done.exit_code:
        raise AssertionError(f"privrec {' '.join(words)}: exit {done.exit_code}\n{done.output}")
    return done.stdout


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    import os

    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --------------------------------------------------------------------------- comparing


def changed(expected: Fields, found: Fields) -> list[str]:
    """Return what differs, a line each: the field, what was kept and what was found."""
    return [
        f"{name}: kept {expected.get(name)!r}, found {found.get(name)!r}"
        for name in sorted({*expected, *found})
        if name not in expected
        or name not in found
        or not _same(expected[name], found[name])
    ]  # fmt: skip


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, list) and isinstance(found, list):
        scale = max((abs(each) for each in expected), default=0.0)
        return len(expected) == len(found) and all(
            abs(one - other) <= TOLERANCE * scale
            for one, other in zip(expected, found, strict=True)
        )
    if type(expected) is float or type(found) is float:
        numbers = all(isinstance(each, int | float) for each in (expected, found))
        return numbers and math.isclose(expected, found, rel_tol=TOLERANCE)
    return type(expected) is type(found) and expected == found


def kept() -> dict[str, Any]:
    """Return what is kept, by run, with ``bits`` by arithmetic."""
    stored = json.loads(KEPT.read_text("utf-8"))
    common = stored.pop("common")
    return {name: {**run, "paid": {**common, **run["paid"]}} for name, run in stored.items()}


def write(runs: dict[str, Any]) -> None:
    """Keep runs; what all of them have paid alike is written once."""
    first, *others = (run["paid"] for run in runs.values())
    common = {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }
    stored: dict[str, Any] = {"common": common}
    for name, run in runs.items():
        paid = {key: value for key, value in run["paid"].items() if key not in common}
        stored[name] = {**run, "paid": paid}
    KEPT.write_text(_lines(stored) + "\n", "utf-8")


def _lines(value: Any, indent: str = "") -> str:
    """JSON with one field a line, lists of numbers included."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    parts = [f"{inner}{json.dumps(key)}: {_lines(each, inner)}" for key, each in value.items()]
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


def arithmetic() -> str:
    """Name how this process computes in float32, from versions and the bits of what runs use."""
    sha = hashlib.sha256(f"{torch.__version__} {np.__version__}".encode())
    rng = np.random.default_rng(0)
    for shape in ((7, 5), (33, 18), (64, 130)):
        one = rng.normal(size=shape).astype(np.float32)
        square = one.T @ one + np.eye(shape[1], dtype=np.float32)
        for each in (square, np.exp(one), np.log(np.abs(one)), np.linalg.norm(one, axis=1)):
            sha.update(each.tobytes())
        many = torch.from_numpy(one).expand(3, *shape).contiguous()
        for function in (torch.exp, torch.sigmoid, torch.tanh, torch.sqrt, torch.log1p):
            sha.update(function(many.abs()).numpy().tobytes())
        for tensor in (
            many @ many.transpose(1, 2), many.softmax(-1), many.logsumexp(-1), many.sum(1),
            torch.linalg.solve(torch.from_numpy(square), many[0].T),
            torch.nn.functional.gelu(many), torch.nn.functional.layer_norm(many, shape[1:]),
        ):  # fmt: skip
            sha.update(tensor.numpy().tobytes())
    return f"{torch.backends.cpu.get_cpu_capability().lower()}-{sha.hexdigest()[:8]}"


def _flat(path: str, value: Any) -> Fields:
    """Leaves by their paths; points become a list for each coordinate."""
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list) and value and all(map(_is_point, value)):
        children = [(key, [point[key] for point in value]) for key in value[0]]
    elif isinstance(value, list) and not all(isinstance(each, int | float) for each in value):
        children = enumerate(value)
    else:
        return {} if path.rpartition(".")[2] in _OWN else {path: value}
    return {k: v for key, each in children for k, v in _flat(f"{path}.{key}", each).items()}


def _is_point(value: Any) -> bool:
    return isinstance(value, dict) and all(type(each) in (int, float) for each in value.values())


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def _sha(content: str | bytes) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()
