"""What a run tells while it goes: ``events.jsonl``, the console, and tracking services.

`run.py` makes one `Record` a round and hands it to an `EventLog` (the file the report is built
from) and to an `Observer` (what somebody watches). Losses and metrics come from private data and
are named "outside the guarantee" wherever they are kept. The realised size of a cohort is shown
on an interactive terminal and nowhere else: amplification by sampling holds only while those
sizes stay with the operator, and lines that are not on a terminal end up in logs.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any, Final, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from privrec.errors import DataError, ReleaseRefused, UsageError

OUTSIDE: Final = "outside the guarantee"
"""The stamp of every loss and metric that is computed from private data without noise."""

OPERATOR_ONLY = frozenset({"cohort", "cohort_size", "cohorts"})
"""Names that no file and no tracking service may ever be given."""


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first round, all of it public.

    Args:
        name: The scenario's name.
        title: One line for people; may be empty.
        rounds: Rounds of the whole run, at least 1.
        done: Rounds finished before this start (0, or more after a resume).
        population: Declared number of users.
        private: Whether noise is added at all.
        noise_known: Whether the noise comes from an injected root (then no ε holds).
        budget: The largest ε allowed, or None where the run has no limit.
        budget_against: The adversary whose ε the budget limits: "recipients" or "server".
        expected_cohort: Population times sampling rate; public, unlike the realised size.
        simulated: Whether the devices are simulated.
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
    simulated: bool = True


@dataclass(frozen=True)
class Record:
    """One finished round.

    Args:
        round: Number of the round, counted from 1, so that the last one equals ``rounds``.
        rounds: Rounds of the whole run.
        attempt: Attempt at this round, counted from 0.
        epsilon: ε spent so far against the recipients of the models; None is infinite.
        epsilon_server: ε spent so far against the server; None is infinite.
        loss: Mean training loss of the cohort, or None. Outside the guarantee.
        metrics: Metrics where this round was evaluated, such as ``hr@10``; else None.
            Outside the guarantee.
        wall_s: Wall-clock seconds of this round.
        cpu_s: CPU seconds of this round.
        cohort: Realised size of the cohort, for the operator's terminal alone. Never written.
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

    def to_json(self) -> dict[str, Any]:
        """The record as an event, without the cohort; what is not finite becomes null."""
        kept = {key: value for key, value in asdict(self).items() if key not in OPERATOR_ONLY}
        return {"type": "round", **{key: _finite(value) for key, value in kept.items()}}

    @classmethod
    def from_json(cls, event: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote; keys of later versions are ignored."""
        names = {field.name for field in fields(cls)} - OPERATOR_ONLY
        return cls(**{key: value for key, value in event.items() if key in names})

    def spent(self, against: str) -> float | None:
        """ε spent so far against one adversary, "recipients" or "server"; None is infinite."""
        return self.epsilon_server if against == "server" else self.epsilon


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --------------------------------------------------------------------------- the event log


class EventLog:
    """``events.jsonl``: one JSON object a line, appended and handed to the system at once.

    It is a log for people and for the report's plots; what was spent stands in the ledger. Opening
    a log whose last line was cut off by a crash drops that line.

    Args:
        path: The file; made when absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _drop_cut_off_tail(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def append(self, kind: str, **values: Any) -> None:
        """Write one event ``{"type": kind, …}``.

        Raises:
            ReleaseRefused: A value is named like a realised cohort size.
        """
        _refuse_operator_only(values)
        event = {"type": kind, **{key: _finite(value) for key, value in values.items()}}
        self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def round(self, record: Record) -> None:
        """Write one round, without its cohort."""
        event = record.to_json()
        self.append(event.pop("type"), **event)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a log, oldest first; a last line cut off by a crash is left out.

    Raises:
        DataError: The file is absent, or a line other than the last is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no event log; a run directory holds one from its first round on. "
            "Name the directory that `privrec run` printed."
        ) from None
    *whole, tail = lines
    events = [_event(path, number, line) for number, line in enumerate(whole, 1) if line.strip()]
    return events + _complete(tail)


def read_rounds(path: Path) -> list[Record]:
    """The rounds of a log in order; of a round written twice (after a resume) the later line.

    Raises:
        DataError: As `read_events`, or a round event lacks its number.
    """
    latest: dict[int, Record] = {}
    for event in read_events(path):
        if event.get("type") == "round":
            record = _record(path, event)
            latest[record.round] = record
    return [latest[number] for number in sorted(latest)]


def _record(path: Path, event: Mapping[str, Any]) -> Record:
    try:
        return Record.from_json(event)
    except TypeError:
        raise DataError(
            f"{path}: the round event {dict(event)!r} lacks its round or rounds; "
            "events.jsonl is written by privrec alone. Restore the file, or resume the run."
        ) from None


def _event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise DataError(
            f"{path}, line {number}: {line[:60]!r} is not a JSON object; each line is one event. "
            "Restore the file, or delete the line to lose that event from the plots."
        )
    return event


def _complete(tail: bytes) -> list[dict[str, Any]]:
    try:
        event = json.loads(tail)
    except ValueError:
        return []
    return [event] if isinstance(event, dict) else []


def _drop_cut_off_tail(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _refuse_operator_only(values: Mapping[str, Any]) -> None:
    named = sorted(OPERATOR_ONLY & values.keys())
    if named:
        raise ReleaseRefused(
            f"the event holds {named[0]!r}: realised cohort sizes are never written, since ε "
            "against recipients holds only while they are unknown. Leave the value out."
        )


# --------------------------------------------------------------------------- words and figures


def epsilon_text(value: float | None, digits: int = 2) -> str:
    """ε rounded **up** to ``digits`` decimals; None and infinity give "∞"."""
    if value is None or math.isinf(value):
        return "∞"
    # In decimal, so that 1.24 stays 1.24 and anything above it, however little, becomes 1.25.
    return f"{Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING):f}"


def opening_words(info: RunInfo) -> str:
    """The first line of a run; it begins with "Simulated run:" where the devices are simulated."""
    kind = "Simulated run" if info.simulated else "Run"
    name = f"{info.name} ({info.title})" if info.title else info.name
    users = f", {info.population:,} devices" if info.population and info.simulated else ""
    resumed = f", going on after round {info.done}" if info.done else ""
    return f"{kind}: {name}, {info.rounds:,} rounds{users}{resumed}. {_promise(info)}"


def _promise(info: RunInfo) -> str:
    if not info.private:
        return "No noise is added: no privacy guarantee."
    if info.noise_known:
        return "The noise root is known: no privacy guarantee (ε = ∞)."
    if info.budget is None:
        return "User-level privacy without a limit on ε."
    return f"User-level privacy, at most ε = {info.budget:g} against the {info.budget_against}."


def spent_text(info: RunInfo, record: Record) -> str:
    """ε spent, and of what budget, in a few characters: "ε 1.24 of 8", "no privacy"."""
    if not info.private:
        return "no privacy"
    if info.noise_known:
        return "ε ∞ (noise known)"
    spent = f"ε {epsilon_text(record.spent(info.budget_against))}"
    return spent if info.budget is None else f"{spent} of {info.budget:g}"


def _loss_text(record: Record) -> str:
    return "" if record.loss is None else f"loss {record.loss:.4f}"


def _metric_text(metrics: Mapping[str, float] | None) -> str:
    name = headline_metric(metrics or {})
    return f"{metric_name(name)} {(metrics or {})[name]:.3f}" if name else ""


def headline_metric(metrics: Mapping[str, float]) -> str | None:
    """The metric to show when there is room for one: HR of the sampled protocol, else any HR."""
    ranked = sorted(metrics, key=lambda name: (not name.startswith("hr@"), "hr@" not in name, name))
    return ranked[0] if ranked else None


def metric_name(key: str) -> str:
    """A metric's key as people write it: ``full_hr@10`` is "HR@10, full ranking"."""
    base, ranking = (key[5:], ", full ranking") if key.startswith("full_") else (key, "")
    stem, at, depth = base.partition("@")
    names = {"hr": "HR", "ndcg": "NDCG", "recall": "Recall"}
    return f"{names.get(stem, stem)}{at}{depth}{ranking}"


# --------------------------------------------------------------------------- observers


class Finished(Protocol):
    """What `run.Result` offers an observer at the end."""

    @property
    def path(self) -> Path:
        """The run directory."""
        ...

    @property
    def payload(self) -> Mapping[str, Any]:
        """The content of ``result.json``."""
        ...


class Observer(Protocol):
    """Something that watches a run. `close` is called last, whether the run ended well or not."""

    def started(self, info: RunInfo) -> None:
        """Called once, before the first round."""

    def round(self, record: Record) -> None:
        """Called after each round was recorded."""

    def finished(self, result: Finished) -> None:
        """Called once, after ``result.json`` was written."""

    def close(self) -> None:
        """Called last, also after an error; calling it twice is harmless."""


class NullObserver:
    """Watches nothing; also the base of observers that care for a part only."""

    def started(self, info: RunInfo) -> None:
        """Called once, before the first round."""

    def round(self, record: Record) -> None:
        """Called after each round was recorded."""

    def finished(self, result: Finished) -> None:
        """Called once, after ``result.json`` was written."""

    def close(self) -> None:
        """Called last, also after an error; calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Observers(NullObserver):
    """Several observers as one, called in the order given."""

    def __init__(self, *observers: Observer) -> None:
        self._observers: Sequence[Observer] = observers

    def started(self, info: RunInfo) -> None:
        """Tell all of them that the run starts."""
        for observer in self._observers:
            observer.started(info)

    def round(self, record: Record) -> None:
        """Hand the round to all of them."""
        for observer in self._observers:
            observer.round(record)

    def finished(self, result: Finished) -> None:
        """Tell all of them that the run is done."""
        for observer in self._observers:
            observer.finished(result)

    def close(self) -> None:
        """Close all of them."""
        for observer in self._observers:
            observer.close()


class PlainObserver(NullObserver):
    """A line now and then, for logs and pipes; it never shows a realised cohort size.

    A line is written for the first round, the last, each evaluated one, and otherwise when
    ``every_s`` seconds have passed since the last line.

    Args:
        stream: Where lines go; standard error when None, so that standard output stays a result.
        every_s: Seconds between lines, >= 0.
        clock: Seconds that only grow; a test gives its own.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._every_s = every_s
        self._clock = clock
        self._info: RunInfo | None = None
        self._start = self._last = clock()
        self._first = True

    def started(self, info: RunInfo) -> None:
        """Write the opening words."""
        self._info = info
        self._start = self._last = self._clock()
        self._first = True
        self._write(opening_words(info))

    def round(self, record: Record) -> None:
        """Write a line if one is due."""
        info = self._info or RunInfo(name="", rounds=record.rounds)
        now = self._clock()
        due = self._first or record.metrics or record.round >= record.rounds
        if not due and now - self._last < self._every_s:
            return
        self._first, self._last = False, now
        self._write(" · ".join(part for part in self._parts(info, record, now) if part))

    def _parts(self, info: RunInfo, record: Record, now: float) -> Iterator[str]:
        yield f"round {record.round}/{record.rounds}"
        yield spent_text(info, record)
        yield _loss_text(record)
        yield _metric_text(record.metrics)
        left = _seconds_left(info, record, now - self._start)
        yield f"{duration_text(left)} left" if left else ""

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _seconds_left(info: RunInfo, record: Record, elapsed: float) -> float:
    done = max(1, record.round - info.done)
    return elapsed / done * (record.rounds - record.round)


def duration_text(seconds: float) -> str:
    """A span of time for people: "42 s", "3 min 05 s", "2 h 07 min"; under ten seconds "0.4 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class _FigureColumn(ProgressColumn):
    """One figure of the last round, in a column that vanishes while it is empty."""

    max_refresh = None

    def __init__(self, field: str, style: str = "") -> None:
        super().__init__()
        self._field = field
        self._style = style

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self._field, "")), style=self._style, no_wrap=True)


class ProgressObserver(NullObserver):
    """A progress bar on a terminal: round, ε spent of budget, cohort, loss, HR@10 and the ETA.

    HR@10 stays on the line from the round in which it was last evaluated.

    Args:
        console: Where to draw; standard error when None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._info: RunInfo | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._metrics: Mapping[str, float] | None = None

    def started(self, info: RunInfo) -> None:
        """Write the opening words and draw the bar."""
        self._info = info
        self._metrics = None
        self._console.print(opening_words(info), highlight=False, soft_wrap=True)
        self._progress = self._bar()
        self._task = self._progress.add_task("Round", total=info.rounds, completed=info.done)
        self._progress.start()

    def _bar(self) -> Progress:
        narrow = self._console.width < 100
        return Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8 if narrow else 24),
            _FigureColumn("spent", "bold"),
            _FigureColumn("cohort"),
            _FigureColumn("loss"),
            _FigureColumn("metric"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
            transient=False,
        )

    def round(self, record: Record) -> None:
        """Move the bar and show the figures of the round."""
        if self._progress is None or self._info is None:
            return
        self._metrics = record.metrics or self._metrics
        self._progress.update(
            self._task,
            completed=record.round,
            spent=spent_text(self._info, record),
            cohort="" if record.cohort is None else f"cohort {record.cohort:,}",
            loss=_loss_text(record),
            metric=_metric_text(self._metrics),
        )

    def finished(self, result: Finished) -> None:
        """Leave the finished bar on the terminal."""
        self.close()

    def close(self) -> None:
        """Stop drawing and leave the last state on the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def console_observer(stream: IO[str] | None = None) -> NullObserver:
    """The observer that suits a stream: a bar on an interactive terminal, else plain lines.

    Args:
        stream: Where it writes; standard error when None.
    """
    console = Console(file=stream, stderr=stream is None)
    return ProgressObserver(console) if console.is_interactive else PlainObserver(stream)


# --------------------------------------------------------------------------- tracking services


class TensorBoardSink(NullObserver):
    """Scalars for TensorBoard: ε by adversary, and loss and metrics under "outside the guarantee".

    Args:
        directory: Where the event files go.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        module = _optional("torch.utils.tensorboard", "TensorBoard")
        self._writer: Any = module.SummaryWriter(log_dir=str(directory))

    def started(self, info: RunInfo) -> None:
        """Keep the opening words as text."""
        self._writer.add_text("run", opening_words(info), info.done)

    def round(self, record: Record) -> None:
        """Keep the figures of the round."""
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record.round)

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()


class MLflowSink(NullObserver):
    """One MLflow run: public settings as parameters, scalars by round, and how it ended.

    Args:
        experiment: Name of the experiment; MLflow's default when None.
        tracking_uri: Where MLflow keeps its runs; MLflow's own setting when None.

    Raises:
        UsageError: MLflow is not installed.
    """

    def __init__(self, experiment: str | None = None, *, tracking_uri: str | None = None) -> None:
        self._mlflow: Any = _optional("mlflow", "MLflow")
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._open = False

    def started(self, info: RunInfo) -> None:
        """Open a run and keep the public settings.

        Raises:
            UsageError: MLflow cannot open a run where it keeps them.
        """
        try:
            self._start(info)
        except self._mlflow.exceptions.MlflowException as error:
            raise UsageError(
                f"MLflow cannot open a run: {str(error).splitlines()[0]} "
                "Name a tracking server that answers, or do without MLflow."
            ) from None

    def _start(self, info: RunInfo) -> None:
        if self._tracking_uri is not None:
            self._mlflow.set_tracking_uri(self._tracking_uri)
        if self._experiment is not None:
            self._mlflow.set_experiment(self._experiment)
        self._mlflow.start_run(run_name=info.name)
        self._open = True
        self._mlflow.log_params({k: value for k, value in asdict(info).items() if k != "done"})
        self._mlflow.set_tag("claim", opening_words(info))

    def round(self, record: Record) -> None:
        """Keep the figures of the round."""
        self._mlflow.log_metrics(_scalars(record), step=record.round)

    def finished(self, result: Finished) -> None:
        """End the run as finished."""
        self._end("FINISHED")

    def close(self) -> None:
        """End the run as failed unless it finished."""
        self._end("FAILED")

    def _end(self, status: str) -> None:
        if self._open:
            self._open = False
            self._mlflow.end_run(status=status)


def _scalars(record: Record) -> dict[str, float]:
    """The finite figures of a round that may be kept, by a name that says what they are."""
    private = {"loss": record.loss, **{_tag(key): v for key, v in (record.metrics or {}).items()}}
    values = {f"{OUTSIDE}/{name}": value for name, value in private.items()}
    values |= {"epsilon/recipients": record.epsilon, "epsilon/server": record.epsilon_server}
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


def _tag(key: str) -> str:
    # Neither service allows "@" in the name of a metric.
    return key.replace("@", "_at_")


def _optional(module: str, product: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{product} was asked for but is not installed; it comes with an extra. "
            'Install it with: pip install "privrec[track]"'
        ) from None
