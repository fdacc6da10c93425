"""Tracking services: stamped figures, no cohort, and no time that tells of one."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from privrec.errors import UsageError
from privrec.run.record import MLflowSink, Record, RunInfo, TensorBoardSink

INFO = RunInfo("ml-1m-dp", 20, title="Federated GMF", population=6040, budget=8.0)


def a_record(number: int, **values: Any) -> Record:
    defaults = {"epsilon": 1.2301, "epsilon_server": 9.0, "loss": 0.5, "cohort": 302}
    return Record(number, 20, **{**defaults, **values})


class Recorder:
    """Notes every call made on it, as a stand-in for a tracking service."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **named: self.calls.append((name, values, named))


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda log_dir: recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return recorder


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", recorder)  # type: ignore[arg-type]
    return recorder


def scalars_of(writer: Recorder) -> dict[str, tuple[Any, ...]]:
    return {values[0]: values[1:] for name, values, _ in writer.calls if name == "add_scalar"}


def test_tensorboard_gets_stamped_scalars_and_no_cohort(writer: Recorder, tmp_path: Path) -> None:
    with TensorBoardSink(tmp_path) as sink:
        sink.started(INFO)
        sink.round(a_record(3, metrics={"hr@10": 0.6}))
    assert scalars_of(writer) == {
        "outside the guarantee/loss": (0.5, 3),
        "outside the guarantee/hr_at_10": (0.6, 3),
        "epsilon/recipients": (1.2301, 3),
        "epsilon/server": (9.0, 3),
    }
    assert writer.calls[-1][0] == "close"


@pytest.mark.parametrize(("hides", "time"), [(True, 3), (False, None)])
def test_no_service_keeps_the_time_of_a_round_with_a_hidden_cohort(
    writer: Recorder, mlflow: Recorder, tmp_path: Path, hides: bool, time: int | None
) -> None:
    for sink in (TensorBoardSink(tmp_path), MLflowSink()):
        sink.started(replace(INFO, hides_cohorts=hides))
        sink.round(a_record(3))
    named = [named for name, _, named in writer.calls if name == "add_scalar"]
    assert named == [{"walltime": time}] * 3
    named = [named for name, _, named in mlflow.calls if name == "log_metrics"]
    assert named == [{"step": 3, "timestamp": time}]


def test_mlflow_gets_public_settings_scalars_and_the_end(mlflow: Recorder, tmp_path: Path) -> None:
    with MLflowSink("ncf", tracking_uri="file:runs") as sink:
        sink.started(INFO)
        sink.round(a_record(3, loss=math.nan, epsilon=None))
        sink.finished(SimpleNamespace(path=tmp_path, payload={}))
    called = {name: (values, named) for name, values, named in mlflow.calls}
    assert called["log_metrics"] == (({"epsilon/server": 9.0},), {"step": 3, "timestamp": 3})
    assert called["log_params"][0][0]["budget"] == 8.0
    assert [named for name, _, named in mlflow.calls if name == "end_run"] == [
        {"status": "FINISHED"}
    ]
    assert "302" not in repr(mlflow.calls).replace("1.2301", "")


def test_mlflow_marks_a_run_that_did_not_finish(mlflow: Recorder) -> None:
    with MLflowSink() as sink:
        sink.started(INFO)
    assert mlflow.calls[-1] == ("end_run", (), {"status": "FAILED"})


def test_an_mlflow_that_refuses_is_reported_in_plain_words(mlflow: Recorder) -> None:
    class MlflowException(Exception):
        pass

    def refuse(**_: Any) -> None:
        raise MlflowException("unsupported URI 'x'\nmore")

    vars(mlflow).update(
        start_run=refuse, exceptions=SimpleNamespace(MlflowException=MlflowException)
    )
    with pytest.raises(UsageError, match="unsupported URI 'x' Name"):
        MLflowSink().started(INFO)


@pytest.mark.parametrize(
    ("module", "make"),
    [("mlflow", MLflowSink), ("torch.utils.tensorboard", lambda: TensorBoardSink(Path("x")))],
)
def test_a_missing_service_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, make: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match="pip install tensorboard mlflow-skinny"):
        make()
