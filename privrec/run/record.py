"""What a run tells while it goes: records, ``events.jsonl``, who may watch, and in what words.

Losses and metrics come from private data and are named "outside the guarantee" wherever they are
kept. The realised size of a cohort is written nowhere: amplification by sampling holds only while
those sizes stay with the operator. Where ε rests on hidden cohorts, the times that TensorBoard and
MLflow keep beside each figure are replaced by the number of the round: how long a round took tells
how many devices were in it.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any, Final, Self

from privrec.errors import DataError, ReleaseRefused, UsageError
from privrec.storage import parsed

_LOG = logging.getLogger(__name__)

OUTSIDE: Final = "outside the guarantee"
"""The stamp of every loss and metric that is computed from private data without noise."""

WITHIN: Final = "within the guarantee"
"""The stamp of metrics that come from a secure sum alone, whose noise was charged."""

SUMMED: Final = "summed_"
"""How names of metrics begin that a secure sum over devices gave, whose noise is in the budget."""

OPERATOR_ONLY = frozenset({"cohort", "cohort_size", "cohorts"})
"""Names that no file and no tracking service may ever be given."""


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first round, all of it public.

    Attributes:
        done: rounds finished before this start.
        noise_known: whether the noise comes from an injected root; then no ε holds.
        expected_cohort: population times sampling rate; public, unlike the realised size.
        hides_cohorts: whether ε rests on nobody knowing how many were in a round. Then no observer
            shows or keeps a realised size, or anything that tells a round's duration.
        root_lost: whether the noise root of the start is gone.
        examples: whom single examples are hidden from, in :data:`EXAMPLE_AGAINST`, if anybody.
    """

    name: str
    rounds: int
    title: str = ""
    done: int = 0
    population: int | None = None
    private: bool = True
    noise_known: bool = False
    budget: float | None = None
    budget_against: str = "recipients"
    expected_cohort: float | None = None
    hides_cohorts: bool = True
    root_lost: bool = False
    examples: str | None = None
    example_budget: float | None = None
    simulated: bool = True


@dataclass(frozen=True)
class Record:
    """One finished round.

    Attributes:
        round: counted from 1, so that the last one equals ``rounds``.
        epsilon: spent so far against the recipients of the models; None is infinite.
        epsilon_server: the same against somebody who knows every cohort.
        loss: mean training loss of the cohort; a run that hides its cohorts has none.
        wall_s: seconds of this round; 0 in a run that hides its cohorts, as ``cpu_s``.
        cohort: its realised size. Never written.
    """

    round: int
    rounds: int
    attempt: int = 0
    epsilon: float | None = None
    epsilon_server: float | None = None
    loss: float | None = None
    metrics: Mapping[str, float] | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    cohort: int | None = None


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, and what ``result.json`` there holds."""

    path: Path
    payload: dict[str, Any]


# --------------------------------------------------------------------------- observers


class Observer:
    """Watches a run; this one watches nothing, and is the base of those that do."""

    def started(self, info: RunInfo) -> None:
        """Hear of the start, once, before the first round."""

    def round(self, record: Record) -> None:
        """Hear of a round after it was recorded."""

    def finished(self, result: Result) -> None:
        """Hear of the end, once, after ``result.json`` was written."""

    def close(self) -> None:
        """Hear that nothing comes any more, also after an error; twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Observers(Observer):
    """Several observers as one, told in the order given.

    One that fails is closed and left out, since the run has its ledger.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers: Sequence[Observer] = observers

    def started(self, info: RunInfo) -> None:
        self._tell("started", info)

    def round(self, record: Record) -> None:
        self._tell("round", record)

    def finished(self, result: Result) -> None:
        self._tell("finished", result)

    def close(self) -> None:
        self._tell("close")

    def _tell(self, what: str, *news: Any) -> None:
        for observer in self._observers:
            try:
                getattr(observer, what)(*news)
            except (Exception, SystemExit) as error:  # rich exits where a pipe is closed
                self._observers = [each for each in self._observers if each is not observer]
                said = type(observer).__name__, type(error).__name__, error
                _LOG.warning("%s failed (%s: %s); the run goes on without it", *said)
                with suppress(Exception, SystemExit):
                    observer.close()


# --------------------------------------------------------------------------- the event log


class EventLog(Observer):
    """``events.jsonl``, for people and plots: one JSON object a line, at once with the system.

    Opening one whose last line was cut off by a crash drops that line.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def append(self, kind: str, **values: Any) -> None:
        """Write one event; what is not finite becomes null, a realised cohort size is refused."""
        if named := sorted(OPERATOR_ONLY & values.keys()):
            raise ReleaseRefused(
                f"the event holds {named[0]!r}: realised cohort sizes are never written, since ε "
                "against recipients holds only while they are unknown. Leave the value out."
            )
        event = finite({"type": kind, **values})
        self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def round(self, record: Record) -> None:
        """Write one round, without its cohort."""
        values = asdict(record)
        self.append("round", **{key: values[key] for key in values if key not in OPERATOR_ONLY})

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """Return a value, or the values of an object, as JSON has it: an infinite ε is null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def last_event(path: Path, kind: str) -> dict[str, Any] | None:
    """Return the last event of a kind in a log, None where there is none; of lines cut off none."""
    events = (parsed(line) for line in path.read_bytes().splitlines())
    return next((e for e in reversed([*events]) if e is not None and e.get("type") == kind), None)


def read_rounds(path: Path) -> list[Record]:
    """Return the rounds of a log in order; of a round written twice (after a resume) the later.

    A last line cut off by a crash is left out; a DataError says what else is wrong.
    """
    try:
        *whole, tail = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no event log; a run directory holds one from its first round on. "
            "Name the directory that `privrec run` printed."
        ) from None
    names = {field.name for field in fields(Record)} - OPERATOR_ONLY
    latest: dict[int, Record] = {}
    for number, line in enumerate([*whole, tail], 1):
        event = parsed(line)
        if event is None:
            if number > len(whole) or not line.strip():
                continue
            raise DataError(
                f"{path}, line {number}: {line[:60]!r} is not a JSON object; each line is one "
                "event. Restore the file, or delete the line to lose that event from the plots."
            )
        if event.get("type") != "round":
            continue
        try:
            record = Record(**{key: value for key, value in event.items() if key in names})
        except TypeError:
            raise DataError(
                f"{path}: the round event {event!r} lacks its round or rounds; "
                "events.jsonl is written by privrec alone. Restore the file, or resume the run."
            ) from None
        latest[record.round] = record
    return [latest[number] for number in sorted(latest)]


# --------------------------------------------------------------------------- words for people

REVEALED = (
    "Every device names the words of its text to the server, and the buckets that its hidden "
    "states fall into, and sends back which neurons it changed and how. Secure aggregation hides "
    "none of that and no noise was added: this scheme saves work and protects nothing."
)
"""What the server learns where devices ask it for output neurons."""

KEPT = (
    "Devices choose output neurons from their own copy of the model and ask for nothing; an update "
    "has the full length whatever they chose, so the server learns the sum alone."
)
"""The same where they choose for themselves."""


def adversary_text(name: str) -> str:
    """Say whom an ε holds against, in words, for "recipients" or "server"."""
    # With central noise no ε holds against the server itself, which has the sums before noise.
    return "somebody who knows every cohort" if name == "server" else "recipients of the models"


def epsilon_text(value: float | None, digits: int = 2) -> str:
    """Write ε rounded **up** to ``digits`` decimals, from 10^15 on to four digits; None is "∞"."""
    if value is None or math.isinf(value):
        return "∞"
    # In decimal, so that 1.24 stays 1.24 and anything above it, however little, becomes 1.25.
    exact = Decimal(repr(float(value)))
    long = exact.adjusted() >= 15
    unit = Decimal(1).scaleb(exact.adjusted() - 3 if long else -digits)
    return f"{exact.quantize(unit, ROUND_CEILING):{'.3e' if long else 'f'}}"


def opening_words(info: RunInfo) -> str:
    """Write the first line of a run: "Simulated run: …" where the devices are simulated."""
    kind = "Simulated run" if info.simulated else "Run"
    name = f"{info.name} ({info.title})" if info.title else info.name
    users = f", {info.population:,} devices" if info.population and info.simulated else ""
    resumed = f", going on after round {info.done}" if info.done else ""
    lost = " Its noise root is gone: rounds made again are charged again." if info.root_lost else ""
    apart = ""
    if info.examples and not info.noise_known:
        limit = f", at most ε = {info.example_budget:g}" if info.example_budget else ""
        against = EXAMPLE_AGAINST[info.examples]
        apart = f" Example-level privacy{limit} against {against}, a unit apart."
    return f"{kind}: {name}, {info.rounds:,} rounds{users}{resumed}. {_promise(info)}{apart}{lost}"


EXAMPLE_AGAINST: Mapping[str, str] = {
    "uploads": "whoever sees a device's upload",
    "sums": "whoever sees the sums, the server included, but no single upload",
}
"""Whom an ε of single interactions holds against, in words."""


def _promise(info: RunInfo) -> str:
    if info.examples == "sums":
        return "The noise of the sums hides single interactions: no guarantee at user level."
    if not info.private and info.examples:
        return "No noise is added to the sums: no guarantee at user level."
    if not info.private:
        return "No noise is added: no privacy guarantee."
    if info.noise_known:
        return "The noise root is known: no privacy guarantee (ε = ∞)."
    if info.budget is None:
        return "User-level privacy without a limit on ε."
    adversary = adversary_text(info.budget_against)
    return f"User-level privacy, at most ε = {info.budget:g} against {adversary}."


def spent_text(info: RunInfo, record: Record) -> str:
    """Say ε spent, and of what budget, in a few characters: "ε 1.24 of 8", "no privacy"."""
    if not info.private:
        return "no privacy"
    if info.noise_known:
        return "ε ∞ (noise known)"
    is_server = info.budget_against == "server"
    spent = f"ε {epsilon_text(record.epsilon_server if is_server else record.epsilon)}"
    return spent if info.budget is None else f"{spent} of {info.budget:g}"


def headline_metric(metrics: Mapping[str, float]) -> str | None:
    """Pick the metric to show where there is room for one: HR of the sampled protocol, else any HR.

    Of next words and labels it is that of the shortest list.
    """

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        depth = name.partition("@")[2]
        shortest = int(depth) if depth.isdigit() else 0
        return not name.startswith("hr@"), "hr@" not in name, "@" not in name, shortest, name

    return min(metrics, key=rank, default=None)


def told_once(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out a recall that repeats the hit rate, as it does where one item is held out."""
    return {
        key: value
        for key, value in metrics.items()
        if "recall@" not in key or metrics.get(key.replace("recall@", "hr@")) != value
    }


def metric_name(key: str) -> str:
    """Write a metric's key as people do: ``full_hr@10`` is "HR@10, full ranking"."""
    if key.startswith("own_"):
        return f"{metric_name(key[4:])}, own tier"
    if key.startswith(SUMMED):
        return f"{metric_name(key.removeprefix(SUMMED))}, secure sum"
    base, ranking = (key[5:], ", full ranking") if key.startswith("full_") else (key, "")
    stem, at, depth = base.partition("@")
    names = {"hr": "HR", "ndcg": "NDCG"}
    return f"{names.get(stem, stem.capitalize())}{at}{depth}{ranking}"


def duration_text(seconds: float) -> str:
    """Write a span of time: "42 s", "3 min 05 s", "2 h 07 min"; under ten seconds "0.4 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# --------------------------------------------------------------------------- tracking services


class TensorBoardSink(Observer):
    """Scalars for TensorBoard: ε by adversary; loss and metrics under "outside the guarantee"."""

    def __init__(self, directory: Path) -> None:
        module = _optional("torch.utils.tensorboard", "TensorBoard")
        self._writer: Any = module.SummaryWriter(log_dir=str(directory))
        self._hides_cohorts = True

    def started(self, info: RunInfo) -> None:
        self._hides_cohorts = info.hides_cohorts
        self._writer.add_text("run", opening_words(info), info.done)

    def round(self, record: Record) -> None:
        time = record.round if self._hides_cohorts else None
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record.round, walltime=time)

    def close(self) -> None:
        self._writer.close()


class MLflowSink(Observer):
    """One MLflow run: public settings as parameters, scalars by round, and how it ended.

    Without ``experiment`` or ``tracking_uri``, MLflow's own setting holds.
    """

    def __init__(self, experiment: str | None = None, *, tracking_uri: str | None = None) -> None:
        self._mlflow: Any = _optional("mlflow", "MLflow")
        self._experiment, self._tracking_uri = experiment, tracking_uri
        self._open, self._hides_cohorts = False, True

    def started(self, info: RunInfo) -> None:
        try:
            if self._tracking_uri is not None:
                self._mlflow.set_tracking_uri(self._tracking_uri)
            if self._experiment is not None:
                self._mlflow.set_experiment(self._experiment)
            self._mlflow.start_run(run_name=info.name)
            self._open, self._hides_cohorts = True, info.hides_cohorts
            settings = {key: value for key, value in asdict(info).items() if key != "done"}
            self._mlflow.log_params(settings)
            self._mlflow.set_tag("claim", opening_words(info))
        except self._mlflow.exceptions.MlflowException as error:
            raise UsageError(
                f"MLflow cannot open a run: {str(error).splitlines()[0]} "
                "Name a tracking server that answers, or do without MLflow."
            ) from None

    def round(self, record: Record) -> None:
        time = record.round if self._hides_cohorts else None
        self._mlflow.log_metrics(_scalars(record), step=record.round, timestamp=time)

    def finished(self, result: Result) -> None:
        self._end("FINISHED")

    def close(self) -> None:
        self._end("FAILED")  # unless it finished

    def _end(self, status: str) -> None:
        if self._open:
            self._open = False
            self._mlflow.end_run(status=status)


def _scalars(record: Record) -> dict[str, float]:
    """The finite figures of a round that may be kept, by a name that says what they are."""
    values = {"epsilon/recipients": record.epsilon, "epsilon/server": record.epsilon_server}
    for key, value in {"loss": record.loss, **(record.metrics or {})}.items():
        # Neither service allows "@" in the name of a metric.
        values[f"{OUTSIDE}/{key.replace('@', '_at_')}"] = value
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


def _optional(module: str, product: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{product} was asked for but is not installed. Install it with: "
            "pip install tensorboard mlflow-skinny"
        ) from None
