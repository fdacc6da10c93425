"""A run in a tracking service: TensorBoard, MLflow.

Where ε rests on hidden cohorts, the times that a service keeps beside each figure are replaced by
the number of the round: how long a round took tells how many devices were in it.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from privrec.errors import UsageError
from privrec.run.record import OUTSIDE, Observer, Record, Result, RunInfo, opening_words


class TensorBoardSink(Observer):
    """Scalars for TensorBoard: ε by adversary, and loss and metrics under "outside the guarantee".

    Raises:
        UsageError: when TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        module = _optional("torch.utils.tensorboard", "TensorBoard")
        self._writer: Any = module.SummaryWriter(log_dir=str(directory))
        self._hides_cohorts = True

    def started(self, info: RunInfo) -> None:
        """Keep the opening words as text."""
        self._hides_cohorts = info.hides_cohorts
        self._writer.add_text("run", opening_words(info), info.done)

    def round(self, record: Record) -> None:
        """Keep the figures of the round."""
        time = record.round if self._hides_cohorts else None
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record.round, walltime=time)

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()


class MLflowSink(Observer):
    """One MLflow run: public settings as parameters, scalars by round, and how it ended.

    Without ``experiment`` or ``tracking_uri``, MLflow's own setting holds.

    Raises:
        UsageError: when MLflow is not installed.
    """

    def __init__(self, experiment: str | None = None, *, tracking_uri: str | None = None) -> None:
        self._mlflow: Any = _optional("mlflow", "MLflow")
        self._experiment, self._tracking_uri = experiment, tracking_uri
        self._open, self._hides_cohorts = False, True

    def started(self, info: RunInfo) -> None:
        """Open a run and keep the public settings.

        Raises:
            UsageError: when MLflow cannot open a run where it keeps them.
        """
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
        """Keep the figures of the round."""
        time = record.round if self._hides_cohorts else None
        self._mlflow.log_metrics(_scalars(record), step=record.round, timestamp=time)

    def finished(self, result: Result) -> None:
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
            f"{product} was asked for but is not installed; it comes with an extra. "
            'Install it with: pip install "privrec[track]"'
        ) from None
