"""Figures as people read them: δ, bytes, seconds, intervals, names of settings."""

from __future__ import annotations

from privrec.report.model import Metric, Scalar
from privrec.run.wording import duration_text, metric_name

_NAMES = {
    "cpu_s_per_device_round": "CPU time",
    "device_peak_bytes": "device memory",
    "download_bytes": "download",
    "dim": "dimensions",
    "epsilon": "ε, recipients",
    "epsilon_server": "ε, cohorts known",
    "heldout": "held out",
    "init_std": "initial standard deviation",
    "item_bias": "item bias",
    "lr": "learning rate",
    "max_history": "longest history",
    "size": "interactions",
    "upload_bytes": "upload",
    "wall_s": "time",
}


def delta_text(delta: float | None) -> str:
    """δ in short: "1e-5"; None gives a dash."""
    return "–" if delta is None else f"{delta:g}".replace("e-0", "e-")


def bytes_text(count: float | None) -> str:
    """Bytes in binary units: "800 bytes", "256 KiB", "9.4 MiB"; None gives a dash."""
    if count is None:
        return "–"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    digits = 1 if unit != "bytes" and count < 99.95 else 0
    return f"{count:,.{digits}f} {unit}".replace(".0 ", " ")


def seconds_text(seconds: float | None) -> str:
    """A span of time, down to microseconds: "310 µs", "0.31 ms", "2.4 s"; None gives a dash."""
    if seconds is None:
        return "–"
    if seconds >= 0.1 or seconds == 0:
        return duration_text(seconds)
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2g} µs"


def number_text(value: float | None, digits: int = 3) -> str:
    """A figure with a fixed number of decimals; None gives a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def amount_text(value: float) -> str:
    """An amount of any size to three digits, without an exponent where people need none."""
    return f"{float(f'{value:.3g}'):,.10g}"


def interval_text(metric: Metric) -> str:
    """The 95 % interval of a metric, "0.676 to 0.700"; a dash where it has none."""
    if metric.low is None or metric.high is None:
        return "–"
    return f"{metric.low:.3f} to {metric.high:.3f}"


def fact_name(key: str) -> str:
    """A setting's key as people write it; the table a key stands in is left out."""
    last = key.rpartition(".")[2]
    return metric_name(last) if "@" in last else _NAMES.get(last, last.replace("_", " "))


def result_text(key: str, value: Scalar) -> str:
    """One cell of a table of compared settings: metrics, bytes and seconds by the key's name."""
    if isinstance(value, str | bool) or value is None:
        return fact_text(value)
    if "@" in key:
        return number_text(value)
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.endswith(("wall_s", "cpu_s_per_device_round")):
        return seconds_text(value)
    return fact_text(value)


def fact_text(value: Scalar) -> str:
    """A setting's value as people write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else value
