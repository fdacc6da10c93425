"""The scenario: everything that decides a run, in one typed TOML file.

A scenario has the tables ``[data]``, ``[model]``, ``[devices]``, ``[train]``, ``[privacy]`` and
``[run]``, and optionally ``[[rows]]`` that vary it. Models are frozen; an unknown key is refused;
all problems are reported at once, in plain words (:class:`privrec.errors.ScenarioError`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from privrec.errors import ScenarioError
from privrec.scenario.problems import (
    Key,
    as_toml,
    describe,
    from_pydantic,
    keys_of,
    shown,
    unknown_key,
)
from privrec.scenario.rules import conflicts, foreign_keys, values_of
from privrec.scenario.schema import (
    PUBLISHED,
    Data,
    Devices,
    DeviceTier,
    Model,
    Privacy,
    Row,
    Run,
    Section,
    Train,
    as_tuple,
    setting,
)

__all__ = [
    "Data",
    "DeviceTier",
    "Devices",
    "Model",
    "Privacy",
    "Row",
    "Run",
    "Scenario",
    "Train",
    "keys",
    "load",
]

_LOCAL_KEYS = {name for name in Privacy.model_fields if name.split("_")[0] == "local"}


class Scenario(Section):
    """One complete, consistent scenario.

    Made by :func:`load` or :meth:`from_toml`, whose errors are in plain words; the constructor
    checks the same and raises pydantic's ``ValidationError``.
    """

    name: str = setting(
        ...,
        "Short name; run folders are named after it.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    )
    title: str = setting("", "Heading of the report.", max_length=200)
    description: str = setting("", "What the scenario shows.", max_length=10**4)
    data: Data = Data()
    model: Model = Model()
    devices: Devices = Devices()
    train: Train = Train()
    privacy: Privacy
    run: Run = Run()
    rows: Annotated[tuple[Row, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="Variants that are run and compared.", max_length=100
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        written = _paths(self.model_dump(exclude_unset=True))
        problems = conflicts(values_of(self.model_dump(), _defaults(), set()), written)
        if problems:
            raise ValueError("; ".join(problems.values()))
        return self

    @classmethod
    def from_toml(
        cls, text: str, overrides: Sequence[str] = (), *, source: str = "scenario"
    ) -> Scenario:
        """The scenario that a TOML text describes.

        Args:
            text: The TOML document.
            overrides: ``table.key=value`` each, applied in order. The value is read as TOML and,
                where that fails, as a bare text; an empty value removes the key.
            source: What to call the text in errors.

        Returns:
            The validated scenario.

        Raises:
            ScenarioError: If anything is wrong, listing everything that is.
        """
        document = _document(text, source)
        problems = _apply(document, overrides)
        return _validated(document, problems, source)

    def with_settings(self, settings: Mapping[str, Any], *, source: str = "settings") -> Scenario:
        """This scenario with some keys changed, without its rows.

        Args:
            settings: Value by dotted key; None or an empty text removes the key.
            source: What to call the settings in errors.

        Raises:
            ScenarioError: If the result is not a scenario.
        """
        document = self._document()
        document.pop("rows", None)
        problems = {}
        for path, value in settings.items():
            problems.update(_set(document, path, value))
        data = document["data"]
        for key in foreign_keys(str(data.get("source", "synthetic"))):
            if f"data.{key}" not in settings:
                data.pop(key, None)
        return _validated(document, problems, source)

    def variants(self) -> list[tuple[str, Scenario]]:
        """Name and scenario of each row, in order; empty without rows."""
        return [(row.name, self.with_settings(row.set)) for row in self.rows]

    def population(self) -> int | None:
        """Number of users, if it is public: declared, synthetic, or known for the data set."""
        if self.devices.population is not None:
            return self.devices.population
        if self.data.source.startswith("synthetic"):
            return self.data.users
        users, _, _ = PUBLISHED.get(self.data.source, (None, None, None))
        return users

    def expected_cohort(self) -> float | None:
        """Mean number of devices in a round, ``sampling_rate`` times the public population."""
        population = self.population()
        return None if population is None else self.devices.sampling_rate * population

    def privacy_hash(self) -> str:
        """SHA-256, in hex, of ``[privacy]`` and of the keys that its meaning depends on.

        Two scenarios of the same hash plan the same events against the same budget. Titles,
        models and step sizes do not enter.
        """
        # Without local noise its keys mean nothing, and older hashes lack them.
        unused = _LOCAL_KEYS if self.privacy.local == "none" else set()
        planned: dict[str, Any] = {
            "privacy": self.privacy.model_dump(exclude=unused),
            "sampling": self.devices.sampling,
            "sampling_rate": self.devices.sampling_rate,
            "rounds": self.train.rounds,
        }
        if self.devices.popularity == "released":
            planned["popularity_epsilon"] = self.devices.popularity_epsilon
        if self.privacy.noise == "distributed":
            planned["min_cohort"] = self.devices.min_cohort
            planned["dropout_rate"] = self.devices.dropout_rate
        return _digest(planned)

    def hash(self) -> str:
        """SHA-256, in hex, of everything but ``title`` and ``description``."""
        return _digest(self.model_dump(exclude={"title", "description"}))

    def plan_hash(self) -> str:
        """SHA-256, in hex, of what devices agree to: all that decides what they compute.

        Words do not enter, nor what only the operator does (``[run]`` but for its seed).
        """
        own = self.model_dump(exclude={"title", "description", "rows", "run"})
        return _digest(own | {"seed": self.run.seed})

    def to_json(self) -> str:
        """The scenario as JSON with every key, defaults included."""
        return json.dumps(self._document(), indent=2, ensure_ascii=False) + "\n"

    def to_toml(self) -> str:
        """The scenario as TOML with defaults written out; :meth:`from_toml` gives it back."""
        document = self._document()
        rows = document.pop("rows", [])
        tables = {
            key: document.pop(key) for key in list(document) if isinstance(document[key], dict)
        }
        parts = [_lines(document)]
        parts += [f"[{name}]\n{_lines(table)}" for name, table in tables.items()]
        parts += [f"[[rows]]\n{_lines(row)}" for row in rows]
        return "\n".join(parts)

    def _document(self) -> dict[str, Any]:
        document = self.model_dump(mode="json", exclude_none=True)
        for key in foreign_keys(self.data.source):
            document["data"].pop(key, None)
        if not self.rows:
            del document["rows"]
        return document


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in a TOML file.

    Args:
        path: The file, UTF-8.
        overrides: As in :meth:`Scenario.from_toml`.

    Raises:
        ScenarioError: If the file cannot be read or is not a scenario.
    """
    return Scenario.from_toml(_read(Path(path)), overrides, source=str(path))


@cache
def keys() -> Mapping[str, Key]:
    """Every key that a scenario can have, by dotted path: rule, unit, default and meaning."""
    found = keys_of(Scenario.model_json_schema())
    return {path: key for path, key in found.items() if path != "rows"}


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problem = "there is no such file; a scenario is a TOML file, for example"
        problem += " scenarios/quickstart.toml"
    except IsADirectoryError:
        problem = "this is a folder, and a scenario is a file; name a .toml file in it"
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8, which TOML must be; save the file as UTF-8"
    except OSError as error:
        problem = f"the file must be readable, but: {error.strerror}; check its permissions"
    raise ScenarioError([problem], source=str(path))


def _document(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = f"not TOML: {error}{_line_of(text, error)}; correct that line"
        raise ScenarioError([problem], source=source) from None


def _line_of(text: str, error: tomllib.TOMLDecodeError) -> str:
    number = str(error).rpartition("at line ")[2].partition(",")[0]
    lines = text.splitlines()
    if not number.isdigit() or not 0 < int(number) <= len(lines):
        return ""
    return f", which reads {shown(lines[int(number) - 1].strip())}"


def _apply(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    problems: dict[str, str] = {}
    for override in overrides:
        path, equals, value = override.partition("=")
        path = path.strip()
        if not equals or not path:
            rule = "an override has the form table.key=value"
            problems[f"-s {override}"] = f"-s {override!r}: {rule}; for example train.rounds=50"
            continue
        try:
            problems.update(_set(document, path, _override_value(value.strip())))
        except tomllib.TOMLDecodeError as error:
            rule = "the value after = is neither TOML nor a bare text"
            problems[f"-s {override}"] = f"-s {override!r}: {rule} ({error}); check its quotes"
    return problems


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text[:1] in ('"', "'", "[", "{"):
            raise
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _set(document: dict[str, Any], path: str, value: Any) -> dict[str, str]:
    """Change one key in place; a problem by path if no scenario has such a key."""
    if path not in keys():
        return {path: unknown_key(path, value, keys())}
    table, _, name = path.rpartition(".")
    target = document.setdefault(table, {}) if table else document
    if not isinstance(target, dict):
        return {}  # reported as a malformed table
    if value is None or value == "":
        target.pop(name, None)
    else:
        target[name] = value
    return {}


def _validated(document: dict[str, Any], problems: dict[str, str], source: str) -> Scenario:
    """The scenario, or one ScenarioError with every problem of it and of its rows."""
    fields: dict[str, str] = {}
    try:
        scenario = Scenario.model_validate(deepcopy(document))
    except ValidationError as error:
        fields = from_pydantic(error.errors(include_url=False), keys())
    values = values_of(document, _defaults(), {path.partition("[")[0] for path in fields})
    found = {**problems, **fields, **conflicts(values, _paths(document))}
    if not found:
        found = _row_problems(scenario)
    if found:
        raise ScenarioError(list(found.values()), source=source)
    return scenario


def _row_problems(scenario: Scenario) -> dict[str, str]:
    problems: dict[str, str] = {}
    names = [row.name for row in scenario.rows]
    for index, row in enumerate(scenario.rows):
        where = f"rows[{index}] ({row.name})"
        if row.name in names[:index]:
            rule = "two rows of the same name cannot be told apart"
            problems[f"{where}.name"] = describe(f"{where}.name", row.name, rule, "rename one")
        try:
            scenario.with_settings(row.set)
        except ScenarioError as error:
            for problem in error.problems:
                problems[f"{where} {problem}"] = f"{where}: {problem}"
    return problems


@cache
def _defaults() -> Mapping[str, Any]:
    """Default by dotted path, of every key that stands in a table."""
    tables: dict[str, type[BaseModel]] = {"data": Data, "model": Model, "devices": Devices}
    tables |= {"train": Train, "privacy": Privacy, "run": Run}
    return {
        f"{table}.{name}": field.get_default()
        for table, model in tables.items()
        for name, field in model.model_fields.items()
    }


def _paths(document: Mapping[str, Any]) -> set[str]:
    """The dotted keys that stand in tables of this document."""
    tables = {name: table for name, table in document.items() if isinstance(table, Mapping)}
    return {f"{name}.{key}" for name, table in tables.items() for key in table}


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {as_toml(value)}\n" for key, value in table.items())
