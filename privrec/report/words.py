"""Words and figures of a report: its templates, and numbers as people read them.

``templates/sentences.toml.j2`` holds every sentence about privacy, ``templates/sections.toml.j2``
the parts of a report in the order in which they are shown. Both render to TOML, and so to data.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from privrec.report.model import Metric, Scalar
from privrec.run.record import (
    adversary_text,
    duration_text,
    epsilon_text,
    metric_name,
    told_once,
)

T = TypeVar("T")

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
    """Write δ in short: "1e-5"; None gives a dash."""
    return "–" if delta is None else f"{delta:g}".replace("e-0", "e-")


def bytes_text(count: float | None) -> str:
    """Write bytes in binary units: "800 bytes", "256 KiB", "9.4 MiB"; None gives a dash."""
    if count is None:
        return "–"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    digits = 1 if unit != "bytes" and count < 99.95 else 0
    return f"{count:,.{digits}f} {unit}".replace(".0 ", " ")


def seconds_text(seconds: float | None) -> str:
    """Write a span of time: "310 µs", "0.31 ms", "2.4 s", "3 min 05 s"; None gives a dash."""
    if seconds is None:
        return "–"
    if seconds >= 0.1 or seconds == 0:
        return duration_text(seconds)
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2g} µs"


def number_text(value: float | None, digits: int = 3) -> str:
    """Write a figure with a fixed number of decimals; None gives a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def bound_text(value: float | None) -> str:
    """Write an upper bound to four significant digits, rounded **up**; None gives a dash."""
    if not value:
        return "–" if value is None else "0"
    exact = Decimal(repr(value))
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 3), ROUND_CEILING):f}"


def amount_text(value: float) -> str:
    """Write an amount of any size to three digits, without an exponent where none is needed."""
    return f"{float(f'{value:.3g}'):,.10g}"


def interval_text(metric: Metric) -> str:
    """Write the 95 % interval of a metric, "0.676 to 0.700"; a dash where it has none."""
    if metric.low is None or metric.high is None:
        return "–"
    return f"{metric.low:.3f} to {metric.high:.3f}"


def fact_name(key: str) -> str:
    """Write a setting's key as people do; the table that it stands in is left out."""
    last = key.rpartition(".")[2]
    return metric_name(last) if "@" in last else _NAMES.get(last, last.replace("_", " "))


def fact_text(value: Scalar, key: str = "") -> str:
    """Write a value as people do; metrics, bytes and seconds are known by the end of their key."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if "@" in key:
        return number_text(value)
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.endswith(("wall_s", "cpu_s_per_device_round")):
        return seconds_text(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}"


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most ``most`` (>= 2) of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(place * step)] for place in range(most)]


def render(template: str, **values: Any) -> str:
    """Render a page from ``templates/``; unknown names are errors, HTML is escaped."""
    return _environment(toml=False).get_template(template).render(**values)


def tables(template: str, **values: Any) -> dict[str, Any]:
    """Render a template of TOML and parse it; every run of white space in a text becomes a space.

    Whatever is put into a text is escaped, so that no name from a scenario ends the text.
    """
    text = _environment(toml=True).get_template(template).render(**values)
    return dict(_plain(tomllib.loads(text)))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


class _Toml(str):
    """Text that is TOML already."""

    __slots__ = ()


def _escaped(value: Any) -> Any:
    """Escapes of JSON are those of TOML's basic strings, but for one character."""
    if not isinstance(value, str) or isinstance(value, _Toml):
        return value
    return json.dumps(value, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")


def _toml(value: Any) -> _Toml:
    """A text, or a list of texts, with its quotes."""
    if isinstance(value, str):
        return _Toml(f'"{_escaped(value)}"')
    return _Toml("[" + ", ".join(_toml(each) for each in value) + "]")


def _cell(text: object) -> str:
    """Text that stays within one cell or line of Markdown and is not taken for markup."""
    plain = " ".join(str(text).split())
    return re.sub(r"([\\|*_`\[\]#])", r"\\\1", plain).replace("<", "&lt;")


def _unbroken(text: str) -> Markup:
    """HTML of a text, with code between backticks, whose figures are not broken across lines."""
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    figures = r"(\([\d.∞]+, [\d.e-]+\)-|[εδ] = [\d.e∞-]*[\de∞]|\b\d[\d.]*e-\d+)"
    return Markup(re.sub(figures, r'<span class="nobreak">\1</span>', found))  # noqa: S704


@cache
def _environment(*, toml: bool) -> Environment:
    # S701: escaping is chosen by the template's name; Markdown has its own `cell` filter.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html.j2"], default_for_string=True),
        undefined=StrictUndefined,
        finalize=_escaped if toml else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        adversary=adversary_text,
        amount=amount_text,
        bound=bound_text,
        bytes=bytes_text,
        ceil=math.ceil,
        cell=_cell,
        delta=delta_text,
        epsilon=epsilon_text,
        fact=fact_text,
        fact_name=fact_name,
        general="{:g}".format,
        interval=interval_text,
        json=lambda value: json.dumps(value, ensure_ascii=False),
        metric_name=metric_name,
        number=number_text,
        percent="{:.0%}".format,
        seconds=seconds_text,
        thinned=thinned,
        thousands="{:,}".format,
        told_once=lambda metrics: set(told_once({each.key: each.value for each in metrics})),
        toml=_toml,
        unbroken=_unbroken,
    )
    return environment
