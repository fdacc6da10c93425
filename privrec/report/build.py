"""From a run directory, or a ledger, to a `Report`, with every ε computed anew from the ledger.

``result.json`` says what the run claimed about itself; the signed ledger says what was charged, and
under which scenario, by its hash. What the claim depends on is taken from these two, and all files
must agree with them, or there is no report.
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from privrec import randomness, storage
from privrec.errors import DataError, IntegrityError, ScenarioError, UsageError
from privrec.report import model
from privrec.report.derive import derive
from privrec.report.facts import Facts, read_account, read_facts
from privrec.report.words import thinned
from privrec.run.directory import BOUND, check_header, going_on, public_key_of
from privrec.run.privacy_plan import counting_of, evaluating_of, example_event
from privrec.run.record import (
    OUTSIDE,
    SUMMED,
    WITHIN,
    Record,
    headline_metric,
    metric_name,
    read_rounds,
)
from privrec.scenario.load import Scenario, load

CURVE_POINTS = 200
"""Most points of a curve that a report keeps; the first and the last are always kept."""

AUDIT = "audit.json"
"""Where an audit of the run's scenario lies in its directory."""

TOLERANCE = 1e-3
"""Relative difference between a recorded and a recomputed ε that is put down to rounding."""


@dataclass(frozen=True)
class _Files:
    directory: Path
    run: Mapping[str, Any]
    result: Mapping[str, Any]
    scenario: Scenario
    rounds: Sequence[Record]
    facts: Facts

    def section(self, name: str) -> Mapping[str, Any]:
        section = self.result.get(name)
        if not isinstance(section, Mapping):
            raise DataError(
                f"{self.directory / 'result.json'}: {name!r} is {section!r}, not an object; "
                "the file is written by privrec alone. Restore it."
            )
        return section


def build(directory: Path, *, public_key: Ed25519PublicKey | None = None) -> model.Report:
    """Report a finished run, whose directory is only read; every ε comes from its ledger alone.

    Args:
        public_key: the server's, to check the ledger's signed head with. Without it, the one that
            this machine keeps for the run is used, else the one that the ledger itself names; the
            report says which.

    Raises:
        UsageError: when it is no run directory, or the run is not finished.
        IntegrityError: when the ledger was altered, its key did not sign ``result.json``, or
            another file does not agree with it on anything that the claim needs.
        DataError: when a file is malformed.
    """
    run = _json(directory, "run.json", "it is not a run directory; name one that privrec made")
    unfinished = f"the run is not finished; go on with: {going_on(directory)}"
    result = _json(directory, "result.json", unfinished)
    try:
        scenario = load(directory / "scenario.toml")
    except ScenarioError as error:
        raise DataError(f"{error}; the run wrote this file, restore it") from None
    rounds = read_rounds(directory / "events.jsonl")
    facts = read_facts(directory, public_key or public_key_of(str(run.get("run_id", ""))))
    files = _Files(directory, run, result, scenario, rounds, facts)
    own = {key: run.get(key) for key in BOUND}
    told = {key: result.get(key) for key in ("run_id", "simulated")}
    check_header(directory, facts.ledger.header, scenario, own, told)
    _check_charges(files)
    _check_claims(files)
    try:
        report = derive(facts, _word(files))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DataError(
            f"{directory / 'result.json'}: {place} is {problem.get('input')!r}: {problem['msg']}. "
            "The file is written by privrec alone; restore it, or finish the run again with "
            "`privrec resume`."
        ) from None
    facts.check_result(result, directory / "result.json")
    return report


def build_account(path: Path, facts: Path | None = None) -> model.Report:
    """Report training that privrec did not do, from its ledger at ``path``, which is only read.

    Promise: every ε is that of the ledger's charges. What the operator tells in ``facts``, a TOML
    file with the fields of :class:`privrec.report.model.Told`, is signed with the ledger's key;
    what it does not tell is said to be not known, and without the parts that a claim needs there is
    none.

    Raises:
        UsageError: when ``path`` is no such ledger, the facts cannot be read, or this machine does
            not keep the key to sign them with.
        IntegrityError: when the ledger was altered, or its last entries are not signed.
    """
    told = model.Told.model_validate({}) if facts is None else _told(facts)
    account = read_account(path, told=told)
    signing_key = randomness.kept_key(str(account.ledger.header["run_id"]))
    if signing_key is not None:
        account = read_account(path, signing_key.public_key(), told)
    elif facts is not None:
        raise UsageError(
            f"{path}: facts are signed with the ledger's key, which this machine does not keep; "
            "write the report where the ledger was charged, or leave --facts out"
        )
    signature = None
    if facts is not None and signing_key is not None:
        signature = storage.sign("facts", account.statement, signing_key)["signature"]
    return derive(account, {"told": told, "told_signature": signature})


def _told(path: Path) -> model.Told:
    try:
        return model.Told.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}; give the operator's facts as a TOML file") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place, known = ".".join(map(str, problem["loc"])), ", ".join(model.Told.model_fields)
        raise UsageError(f"{path}: {place}: {problem['msg']}; facts are {known}") from None


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


# --------------------------------------------------------------------------- checks


def _check_charges(files: _Files) -> None:
    """Refuse charges of rounds, examples or what is beside that the scenario does not plan."""
    scenario, facts = files.scenario, files.facts
    laws = {"none": "none", "central": "gaussian", "distributed": "discrete_gaussian"}
    planned = (laws[scenario.privacy.noise], scenario.devices.sampling_rate)
    spent, declared = facts.ledger.examples, facts.declared
    counting = counting_of(scenario, declared.items, declared.devices)
    before = {counting.event} if counting else set()
    evaluating = evaluating_of(scenario, declared.devices)
    after = {evaluating.event} if evaluating else set()
    example = example_event(scenario, declared.bands, declared.holders)
    # One charge at example level for every charge of a round.
    wanted = {example: facts.charges} if example and facts.charges else {}
    wrong = next((e for e in facts.of_rounds if (e.mechanism, e.sampling_rate) != planned), None)
    if set(facts.before) != before:
        what = f"{set(facts.before) or None} was charged before the first round, and the scenario "
        what += f"plans {before or None}"
    elif not set(facts.after) <= after:
        what = f"{set(facts.after)} was charged after the last round, and the scenario plans "
        what += f"{after or None}"
    elif wrong is not None:
        what = f"a round was charged as {wrong}, and the scenario plans the mechanism and sampling "
        what += f"rate {planned}"
    elif dict(spent) != wanted:
        what = f"{dict(spent)} was charged for examples over {facts.charges} charged rounds, and "
        what += f"the scenario plans {example} for each"
    else:
        return
    raise IntegrityError(
        f"{files.directory / 'ledger.jsonl'}: {what}; both must agree. Rely on neither, and "
        "restore the directory as the run left it."
    )


def _check_claims(files: _Files) -> None:
    """Hold ``privacy`` of ``result.json`` to the ledger and the scenario that it is bound to."""
    facts, privacy, said = files.facts, files.scenario.privacy, files.section("privacy")
    header, devices = facts.ledger.header, files.scenario.devices
    noise = {event.noise_multiplier for event in facts.of_rounds}
    stated = {
        "unit": header.get("unit"),
        "adjacency": header.get("adjacency"),
        "charges": len(facts.ledger.charges),
        "noise_known": facts.noise_known,
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
    for key, value in stated.items():
        if said.get(key) != value:
            raise _disagreement(files, key, said.get(key), value)
    single, ours = said.get("examples") or {}, facts.examples or {}
    names = ("epsilon", "delta", "noise_multiplier", "clip_norm", "charges")
    computed = {
        "epsilon": (said.get("epsilon"), facts.epsilon),
        "epsilon_server": (said.get("epsilon_server"), facts.epsilon_server),
        **{f"examples.{name}": (single.get(name), ours.get(name)) for name in names},
    }
    if single.get("adversary") != (against := ours.get("adversary")):
        raise _disagreement(files, "examples.adversary", single.get("adversary"), against)
    for key, (recorded, value) in computed.items():
        if not _agree(recorded, value):
            raise _disagreement(files, key, recorded, value)


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
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return f"{value:g}" if number else repr(value)

    return IntegrityError(
        f"{files.directory / 'result.json'}: privacy.{key} is {shown(recorded)}, the ledger gives "
        f"{shown(computed)}; both must agree. One of the files was altered or belongs to another "
        "run: rely on neither, and restore the directory as the run left it."
    )


def _word(files: _Files) -> dict[str, Any]:
    """The fields that no ledger tells."""
    result, cost = files.result, files.section("cost")
    sizes = ("upload_bytes", "download_bytes", "device_peak_bytes")
    tiers = [
        {
            **{name: tier.get(name) for name in ("capacity", "share", *sizes)},
            "metrics": {key: value for key, value in tier.items() if "@" in key},
        }
        for tier in result.get("tiers") or ()
    ]
    figures = model.Cost.model_fields.keys() - {"note"}
    return {
        "gaps": dict(result.get("gaps") or {}),
        "accuracy": _accuracy(files),
        "segments": result.get("segments") or (),
        "cost": {name: cost.get(name) for name in figures},
        "tiers": tiers,
        "data": model.flat(result.get("data") or files.run.get("data") or {}),
        "model": model.flat(result.get("model") or {}),
        "rows": tuple(_row(row) for row in result.get("rows") or ()),
        "audit": audit_of(files.directory, files.facts),
        "curves": tuple(_curves(files)),
    }


def audit_of(directory: Path, facts: Facts) -> model.AuditPart | None:
    """What an audit of this scenario by this version left in the directory, if there was one."""
    if not (directory / AUDIT).exists():
        return None
    found = model.AuditPart.model_validate(_json(directory, AUDIT, ""))
    if (found.version, found.scenario_hash) != (facts.declared.version, facts.scenario.hash()):
        raise IntegrityError(
            f"{directory / AUDIT}: it is of another scenario or version of privrec; audit again: "
            f"privrec audit {directory}"
        )
    return found


def _accuracy(files: _Files) -> dict[str, Any]:
    intervals = files.result.get("intervals") or {}
    baselines = files.result.get("baselines") or {}
    metrics = [
        {
            "key": key,
            "name": metric_name(key).replace(", full ranking", ""),
            "protocol": _protocol(key),
            "value": value,
            **dict(zip(("low", "high"), intervals.get(key) or (None, None), strict=True)),
            "baselines": {name: row[key] for name, row in baselines.items() if key in row},
        }
        for key, value in sorted(files.section("metrics").items(), key=_metric_order)
    ]
    scenario = files.scenario
    covered = bool(metrics) and all(each["key"].startswith(SUMMED) for each in metrics)
    return {
        "note": WITHIN if covered and files.facts.after else OUTSIDE,
        "holdout": scenario.data.holdout,
        "users": None if covered else scenario.run.eval_users,
        "metrics": metrics,
    }


def _metric_order(item: tuple[str, Any]) -> tuple[bool, int, int, str]:
    key = item[0]
    stem, _, depth = key.removeprefix("full_").partition("@")
    order = ["hr", "accuracy", "precision", "ndcg", "recall"]
    rank = order.index(stem) if stem in order else len(order)
    return key.startswith("full_"), int(depth) if depth.isdigit() else sys.maxsize, rank, key


def _protocol(key: str) -> str:
    if key.startswith(("accuracy", "precision")) or key == "perplexity":
        return "all words or labels, unknown ones left out"
    if key.startswith(SUMMED):
        return "all items, those of the history left out; summed under masks, with noise"
    if "full_" in key:
        return "all items, those of the history left out"
    return "99 items the user has not seen"


def _row(row: Mapping[str, Any]) -> model.Flat:
    """A row's facts but for those of its tiers and seeds, and full ranking under a second name."""
    left_out = {"tiers", "seeds", "intervals"}
    twice = {key for key in row if "full_" in key and row.get(key.replace("full_", "")) == row[key]}
    return model.flat({key: value for key, value in row.items() if key not in left_out | twice})


def _curves(files: _Files) -> Iterator[model.Curve]:
    key = headline_metric(files.result.get("metrics") or {}) or "hr@10"
    losses = [(record.round, record.loss) for record in files.rounds]
    metrics = [(record.round, (record.metrics or {}).get(key)) for record in files.rounds]
    named = (("loss", "Training loss", losses), (key, metric_name(key), metrics))
    for name, title, values in named:
        points = [
            model.Point(round=number, value=value) for number, value in values if value is not None
        ]
        if points:
            kept = tuple(thinned(points, CURVE_POINTS))
            yield model.Curve(key=name, name=title, note=OUTSIDE, points=kept)
