"""From a run directory to a `Report`, with every ε computed anew from the ledger.

``result.json`` says what the run claimed about itself; the signed ledger says what was charged, and
under which scenario, by its hash. What the claim depends on is taken from these two, and all files
must agree with them, or there is no report.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from privrec.errors import DataError, IntegrityError, ScenarioError, UsageError
from privrec.privacy.events import RoundEvent, epsilon
from privrec.report.accounts import WHICH
from privrec.report.derive import derive, thinned
from privrec.report.examples import example_level
from privrec.report.model import (
    Accuracy,
    AuditPart,
    Cost,
    Curve,
    Facts,
    Metric,
    Point,
    Report,
    Segment,
    TierCost,
    flat,
)
from privrec.report.spending import Spending, read_spending
from privrec.run.identity import kept_key
from privrec.run.plan import LedgerHeader
from privrec.run.plan import read_header as declared_in
from privrec.run.privacy_plan import example_event, release_event
from privrec.run.record import OUTSIDE, Record, read_rounds
from privrec.run.wording import headline_metric, metric_name
from privrec.scenario.load import Scenario, load

CURVE_POINTS = 200
"""Most points of a curve that a report keeps; the first and the last are always kept."""

AUDIT = "audit.json"
"""Where an audit of the run's scenario lies in its directory."""

TOLERANCE = 1e-3
"""Relative difference between a recorded and a recomputed ε that is put down to rounding."""


@dataclass(frozen=True)
class _Files:
    """The parsed files of a run directory."""

    directory: Path
    run: Mapping[str, Any]
    result: Mapping[str, Any]
    scenario: Scenario
    rounds: Sequence[Record]
    spending: Spending
    declaration: LedgerHeader

    @property
    def privacy(self) -> Mapping[str, Any]:
        return _section(self, "privacy")

    @property
    def noise_known(self) -> bool:
        return self.spending.header.get("noise_known") is not False


def build(directory: Path, *, public_key: Ed25519PublicKey | None = None) -> Report:
    """The report of one finished run.

    Args:
        directory: The run directory, as ``privrec run`` left it. It is only read.
        public_key: The server's key, to check the ledger's signed head with. Without it, the one
            that this machine keeps for the run is used, else the one that the ledger itself names;
            the report says which.

    Returns:
        The report; its ε come from ``ledger.jsonl`` alone.

    Raises:
        UsageError: It is no run directory, or the run is not finished.
        IntegrityError: The ledger was altered, its key did not sign ``result.json``, or another
            file does not agree with it: on whose run it is, whether the noise is known, δ,
            sampling, ε or what else the claim needs.
        DataError: A file is malformed.
    """
    files = _read(directory, public_key)
    _check_same_run(files)
    _check_charges(files)
    _check_claims(files)
    _check_examples(files)
    try:
        report = derive(files.spending, files.declaration, _word(files))
    except ValidationError as error:
        raise DataError(f"{directory / 'result.json'}: {_first_problem(error)}") from None
    files.spending.check_result(files.result, directory / "result.json")
    return report


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return (
        f"{place} is {problem.get('input')!r}: {problem['msg']}. The file is written by privrec "
        "alone; restore it, or finish the run again with `privrec resume`."
    )


# --------------------------------------------------------------------------- reading


def _read(directory: Path, public_key: Ed25519PublicKey | None) -> _Files:
    run = _json(directory, "run.json", "it is not a run directory; name one that privrec made")
    run_id = str(run.get("run_id", ""))
    result = _json(
        directory, "result.json", f"the run is not finished; go on with: privrec resume {directory}"
    )
    scenario = _scenario(directory / "scenario.toml")
    rounds = read_rounds(directory / "events.jsonl")
    spending = read_spending(directory, public_key or kept_key(run_id))
    declaration = declared_in(spending.header, str(directory / "ledger.jsonl"))
    return _Files(directory, run, result, scenario, rounds, spending, declaration)


def _json(directory: Path, name: str, absent: str) -> Mapping[str, Any]:
    path = directory / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{directory}: there is no {name}; {absent}") from None
    except ValueError as error:
        raise DataError(f"{path}: it is not JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: it holds {type(content).__name__}, not an object; restore it")
    return content


def _scenario(path: Path) -> Scenario:
    try:
        return load(path)
    except ScenarioError as error:
        raise DataError(f"{error}; the run wrote this file, restore it") from None


def _section(files: _Files, name: str) -> Mapping[str, Any]:
    section = files.result.get(name)
    if not isinstance(section, Mapping):
        raise DataError(
            f"{files.directory / 'result.json'}: {name!r} is {section!r}, not an object; "
            "the file is written by privrec alone. Restore it."
        )
    return section


# --------------------------------------------------------------------------- checks


def _check_same_run(files: _Files) -> None:
    scenario = files.scenario
    bound = ("run_id", "scenario_hash", "privacy_hash", "noise_known", "simulated")
    said: Mapping[str, Mapping[str, Any]] = {
        "run.json": {key: files.run.get(key) for key in bound},
        "result.json": {key: files.result.get(key) for key in ("run_id", "simulated")},
        "scenario.toml": {
            "scenario_hash": scenario.hash(),
            "privacy_hash": scenario.privacy_hash(),
        },
    }
    for name, values in said.items():
        for key, value in values.items():
            if value != files.spending.header.get(key):
                raise _foreign(files, name, key, value)


def _foreign(files: _Files, name: str, key: str, value: Any) -> IntegrityError:
    return IntegrityError(
        f"{files.directory / name}: its {key} is {value!r}, that of the signed ledger is "
        f"{files.spending.header.get(key)!r}; the files of a directory belong to one run. "
        "Restore the directory as the run left it."
    )


def _check_charges(files: _Files) -> None:
    privacy = files.scenario.privacy
    mechanism = {"none": "none", "central": "gaussian", "distributed": "discrete_gaussian"}
    planned = (mechanism[privacy.noise], files.scenario.devices.sampling_rate)
    if files.spending.before != release_event(files.scenario):
        raise IntegrityError(
            f"{files.directory / 'ledger.jsonl'}: {files.spending.before} was charged before the "
            f"first round, and the scenario plans {release_event(files.scenario)}; both must "
            "agree. Rely on neither, and restore the directory as the run left it."
        )
    for event in files.spending.rounds:
        if (event.mechanism, event.sampling_rate) != planned:
            raise IntegrityError(
                f"{files.directory / 'ledger.jsonl'}: a round was charged as {event}, and the "
                f"scenario plans the mechanism and sampling rate {planned}; both must agree. "
                "Rely on neither, and restore the directory as the run left it."
            )


def _check_examples(files: _Files) -> None:
    """Every round that devices trained in was entered at example level too, as the scenario has it.

    Raises:
        IntegrityError: when an entry lacks, or costs other than planned; or result.json says other
            than the ledger.
    """
    planned, spent = example_event(files.scenario), files.spending.examples
    rounds = sum(files.spending.rounds.values())
    if planned is None:
        wanted: dict[RoundEvent, int] = {}
    else:
        wanted = {planned: max(rounds, sum(spent.values()))}
    if dict(spent) != wanted:
        raise IntegrityError(
            f"{files.directory / 'ledger.jsonl'}: {dict(spent)} was entered for examples over "
            f"{rounds} charged rounds, and the scenario plans {planned} for each; both must agree. "
            "Rely on neither, and restore the directory as the run left it."
        )
    own = example_level(spent, files.declaration, noise_known=files.noise_known)
    said = files.privacy.get("examples") or {}
    for name in ("epsilon", "delta", "noise_multiplier", "clip_norm", "charges"):
        value = getattr(own, name, None)
        if not _agree(said.get(name), value):
            raise _disagreement(files, f"examples.{name}", said.get(name), value)


def _check_claims(files: _Files) -> None:
    delta = files.spending.header.get("delta")
    for key, value in _stated(files).items():
        if files.privacy.get(key) != value:
            raise _disagreement(files, key, files.privacy.get(key), value)
    for key in ("epsilon", "epsilon_server"):
        recorded, computed = files.privacy.get(key), _recomputed(files, key, delta)
        if not _agree(recorded, computed):
            raise _disagreement(files, key, recorded, computed)


def _stated(files: _Files) -> dict[str, Any]:
    """What ``privacy`` of result.json must say, by the ledger and the scenario it is bound to."""
    header, privacy, devices = files.spending.header, files.scenario.privacy, files.scenario.devices
    noise = {event.noise_multiplier for event in files.spending.rounds}
    return {
        "unit": header.get("unit"),
        "adjacency": header.get("adjacency"),
        "charges": len(files.spending.charges),
        "noise_known": files.noise_known,
        "delta": header.get("delta"),
        "population": header.get("population"),
        "noise": privacy.noise,
        "sampling": devices.sampling,
        "sampling_rate": devices.sampling_rate,
        "budget": privacy.epsilon,
        "budget_against": privacy.budget_against,
        # An update of privrec in mid-run may have calibrated the rest of it a little otherwise.
        **({"noise_multiplier": noise.pop()} if len(noise) == 1 else {}),
        **({"clip_norm": privacy.clip_norm} if privacy.clip_norm is not None else {}),
    }


def _recomputed(files: _Files, key: str, delta: Any) -> float | None:
    if files.noise_known or delta is None or files.scenario.privacy.noise == "none":
        return None
    value = epsilon(files.spending.counts, float(delta), *WHICH[key])
    return value if math.isfinite(value) else None


def _agree(recorded: Any, computed: float | None) -> bool:
    if recorded is None or computed is None:
        return recorded is None and computed is None
    if not isinstance(recorded, int | float):
        return False
    return math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=1e-4)


def _disagreement(files: _Files, key: str, recorded: Any, computed: Any) -> IntegrityError:
    def shown(value: Any) -> str:
        if value is None:
            return "infinite" if key.startswith("epsilon") else "nothing"
        return f"{value:g}" if _is_number(value) else repr(value)

    return IntegrityError(
        f"{files.directory / 'result.json'}: privacy.{key} is {shown(recorded)}, the ledger gives "
        f"{shown(computed)}; both must agree. One of the files was altered or belongs to another "
        "run: rely on neither, and restore the directory as the run left it."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --------------------------------------------------------------------------- assembling


def _word(files: _Files) -> dict[str, Any]:
    """The fields that no ledger tells."""
    result = files.result
    return {
        "gaps": dict(result.get("gaps") or {}),
        "accuracy": _accuracy(files),
        "segments": tuple(Segment(**each) for each in result.get("segments") or ()),
        "cost": _cost(files),
        "tiers": tuple(_tier(tier) for tier in result.get("tiers") or ()),
        "data": flat(result.get("data") or files.run.get("data") or {}),
        "model": flat(result.get("model") or {}),
        "rows": tuple(_row(row) for row in result.get("rows") or ()),
        "audit": _audit(files),
        "curves": tuple(_curves(files)),
    }


def _audit(files: _Files) -> AuditPart | None:
    """What an audit of this scenario by this version left in the directory, if there was one."""
    if not (files.directory / AUDIT).exists():
        return None
    found = AuditPart.model_validate(_json(files.directory, AUDIT, ""))
    declared = files.declaration
    if (found.version, found.scenario_hash) != (declared.version, declared.scenario.hash()):
        raise IntegrityError(
            f"{files.directory / AUDIT}: it is of another scenario or version of privrec; audit "
            f"again: privrec audit {files.directory}"
        )
    return found


def _tier(tier: Mapping[str, Any]) -> TierCost:
    sizes = ("upload_bytes", "download_bytes", "device_peak_bytes")
    return TierCost(
        capacity=tier["capacity"],
        share=tier["share"],
        **{name: tier.get(name) for name in sizes},
        metrics={key: value for key, value in tier.items() if "@" in key},
    )


def _accuracy(files: _Files) -> Accuracy:
    result = files.result
    intervals, baselines = result.get("intervals") or {}, result.get("baselines") or {}
    metrics = [
        Metric(
            key=key,
            name=metric_name(key).removesuffix(", full ranking"),
            protocol=_protocol(key),
            value=value,
            low=(intervals.get(key) or (None, None))[0],
            high=(intervals.get(key) or (None, None))[1],
            baselines={name: row[key] for name, row in baselines.items() if key in row},
        )
        for key, value in sorted(_section(files, "metrics").items(), key=_metric_order)
    ]
    return Accuracy(holdout=files.scenario.data.holdout, metrics=tuple(metrics))


def _metric_order(item: tuple[str, Any]) -> tuple[bool, int, int, str]:
    key = item[0]
    stem, _, depth = key.removeprefix("full_").partition("@")
    order = ["hr", "accuracy", "precision", "ndcg", "recall"]
    rank = order.index(stem) if stem in order else len(order)
    return key.startswith("full_"), int(depth) if depth.isdigit() else sys.maxsize, rank, key


def _protocol(key: str) -> str:
    if key.startswith(("accuracy", "precision")) or key == "perplexity":
        return "all words or labels, unknown ones left out"
    if key.startswith("full_"):
        return "all items, those of the history left out"
    return "99 items the user has not seen"


def _cost(files: _Files) -> Cost:
    cost = _section(files, "cost")
    return Cost.model_validate(
        {name: cost.get(name) for name in Cost.model_fields.keys() - {"note"}}
    )


def _row(row: Mapping[str, Any]) -> Facts:
    """A row's facts but for those of its tiers and seeds, and full ranking under a second name."""
    left_out = {"tiers", "seeds", "intervals"}
    twice = {key for key in row if "full_" in key and row.get(key.replace("full_", "")) == row[key]}
    return flat({key: value for key, value in row.items() if key not in left_out | twice})


def _curves(files: _Files) -> Iterator[Curve]:
    losses = [(record.round, record.loss) for record in files.rounds]
    yield from _curve("loss", "Training loss", losses)
    key = headline_metric(files.result.get("metrics") or {}) or "hr@10"
    metrics = [(record.round, (record.metrics or {}).get(key)) for record in files.rounds]
    yield from _curve(key, metric_name(key), metrics)


def _curve(key: str, name: str, values: Sequence[tuple[int, float | None]]) -> Iterator[Curve]:
    points = [Point(round=number, value=value) for number, value in values if value is not None]
    if points:
        kept = thinned(points, CURVE_POINTS)
        yield Curve(key=key, name=name, note=OUTSIDE, points=tuple(kept))
