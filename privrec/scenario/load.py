"""The scenario: everything that decides a run, in one typed TOML file.

A scenario has the tables ``[data]``, ``[model]``, ``[devices]``, ``[train]``, ``[privacy]`` and
``[run]``, and optionally ``[[rows]]`` that vary it. Models are frozen; an unknown key is refused;
all problems are reported at once, in plain words (:class:`privrec.errors.ScenarioError`).
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from privrec.errors import ScenarioError
from privrec.scenario.keys import conflicts, describe, is_key, problem_of, shown, unknown_key
from privrec.scenario.kinds import PUBLISHED, Values, as_tuple
from privrec.scenario.schema import (
    TABLES,
    Data,
    Devices,
    DeviceTier,
    Heading,
    Model,
    Privacy,
    Row,
    Run,
    Train,
)

_WORDS = ("title", "description")

__all__ = ["Data", "DeviceTier", "Devices", "Model", "Privacy", "Row", "Run", "Scenario"]
__all__ += ["Train", "load"]


class Scenario(Heading):
    """One complete, consistent scenario.

    Made by :func:`load` or :meth:`from_toml`, whose errors are in plain words; the constructor
    checks the same and raises pydantic's ``ValidationError``.
    """

    data: SerializeAsAny[Data] = Data()
    model: SerializeAsAny[Model] = Model()
    devices: Devices = Devices()
    train: SerializeAsAny[Train] = Train()
    privacy: Privacy
    run: Run = Run()
    rows: Annotated[tuple[Row, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="Variants that are run and compared.", max_length=100
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if found := conflicts(_values(self.model_dump())):
            text = "; ".join(found.values())
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "found": found})
        return self

    @classmethod
    def from_toml(
        cls, text: str, overrides: Sequence[str] = (), *, source: str = "scenario"
    ) -> Scenario:
        """The scenario that a TOML text describes; errors call the text ``source``.

        Args:
            overrides: ``table.key=value`` each, the last of a key counts. The value is read as TOML
                and, where that fails, as a bare text; an empty value removes the key.

        Raises:
            ScenarioError: If anything is wrong, listing everything that is.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            problem = f"not TOML: {error}"
            if at := re.search(r"at line (\d+)", problem):
                problem += f", which reads {shown(text.splitlines()[int(at[1]) - 1].strip())}"
            raise ScenarioError([f"{problem}; correct that line"], source=source) from None
        problems: dict[str, str] = {}
        settings = dict(_parsed(override, problems) for override in overrides)
        settings.pop("", None)
        if settings.get("rows") in ("", []):  # rows can be left out here, and are written in a file
            del settings["rows"]
            document.pop("rows", None)
        return _changed(document, settings, problems, source)

    def with_settings(self, settings: Mapping[str, Any], *, source: str = "settings") -> Scenario:
        """This scenario with some keys changed, without its rows; errors name ``source``.

        A change of kind takes the keys of the former kind away, but for those that both have.

        Args:
            settings: Value by dotted key; None or an empty text removes the key.
        """
        document = self.document()
        document.pop("rows", None)
        return _changed(document, settings, {}, source)

    @cached_property
    def variants(self) -> dict[str, Scenario]:
        """The scenario of each row by its name, in order; empty without rows."""
        found: dict[str, Scenario] = {}
        problems: list[str] = []
        for index, row in enumerate(self.rows):
            where = f"rows[{index}] ({row.name})"
            if row.name in found:
                rule = "two rows of the same name cannot be told apart"
                problems.append(describe(f"{where}.name", row.name, rule, "rename one"))
            try:
                found[row.name] = self.with_settings(row.set)
            except ScenarioError as error:
                problems += [f"{where}: {each}" for each in error.problems]
        if problems:
            raise ScenarioError(problems)
        return found

    def population(self) -> int | None:
        """Number of users, if it is public: declared, synthetic, or known for the data set."""
        if self.devices.population is not None:
            return self.devices.population
        known: int | None = getattr(self.data, "users", None)
        return known or PUBLISHED.get(self.data.source, (None,))[0]

    def expected_cohort(self) -> float | None:
        """Mean number of devices in a round, ``sampling_rate`` times the public population."""
        population = self.population()
        return None if population is None else self.devices.sampling_rate * population

    def privacy_hash(self) -> str:
        """SHA-256, in hex, of ``[privacy]`` and of the keys that its meaning depends on.

        Two scenarios of the same hash plan the same events against the same budget.
        """
        local = {key for key in Privacy.model_fields if key.split("_")[0] == "local"}
        unused = local if self.privacy.local == "none" else set()
        unused = unused if self.privacy.spare_attempts else {*unused, "spare_attempts"}
        unused = {*unused, *self._unset}
        planned: dict[str, Any] = {
            "privacy": self.privacy.model_dump(exclude=unused),
            "sampling": self.devices.sampling,
            "sampling_rate": self.devices.sampling_rate,
            "rounds": self.train.rounds,
        }
        if self.devices.popularity == "released":
            planned["popularity_epsilon"] = self.devices.popularity_epsilon
        if self.privacy.in_shares:
            planned["min_cohort"] = self.devices.min_cohort
            planned["dropout_rate"] = self.devices.dropout_rate
        return _digest(planned)

    @property
    def _unset(self) -> set[str]:
        """Keys of ``[privacy]`` that are in no hash while unset, so that older runs go on."""
        return {"evaluation_epsilon"} if self.privacy.evaluation_epsilon is None else set()

    def hash(self) -> str:
        """SHA-256, in hex, of everything but words and what only the machine decides."""
        words = {"title": True, "description": True}
        own = self.model_dump(exclude={**words, "run": {"workers"}, "privacy": self._unset})
        return _digest(own)

    def plan_hash(self) -> str:
        """SHA-256, in hex, of what devices agree to: all that decides what they compute.

        Words do not enter, nor what only the operator does (``[run]`` but for its seed).
        """
        left_out = dict.fromkeys(("title", "description", "rows", "run"), True)
        own = self.model_dump(exclude={**left_out, "privacy": self._unset})
        return _digest(own | {"seed": self.run.seed})

    def to_toml(self) -> str:
        """The scenario as TOML with defaults written out; :meth:`from_toml` gives it back."""
        return tomli_w.dumps(self.document())

    def document(self) -> dict[str, Any]:
        """Every key that applies, defaults included, ready for JSON and TOML."""
        document = self.model_dump(mode="json", exclude_none=True)
        if not self.rows:
            del document["rows"]
        return document


def built_in() -> dict[str, Path]:
    """The scenarios that come with privrec, by name."""
    here = Path(__file__).parent
    places = (here / "built_in", here.parents[1] / "scenarios")  # of a wheel, and of a clone
    return {path.stem: path for place in places for path in sorted(place.glob("*.toml"))}


def load(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in a TOML file; see :meth:`Scenario.from_toml`.

    Args:
        path: a file, or the name of a scenario that comes with privrec, such as ``quickstart``.

    Raises:
        ScenarioError: If the file cannot be read or is not a scenario.
    """
    file = Path(path)
    try:
        if not file.suffix and not file.exists():
            file = built_in().get(str(path), file)
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problem = (
            "there is no such file; a scenario is a TOML file, or one of those that come with "
            f"privrec: {', '.join(built_in())}"
        )
    except IsADirectoryError:
        problem = "this is a folder, and a scenario is a file; name a .toml file in it"
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8, which TOML must be; save the file as UTF-8"
    except OSError as error:
        problem = f"the file must be readable, but: {error.strerror}; check its permissions"
    else:
        return Scenario.from_toml(text, overrides, source=str(path))
    raise ScenarioError([problem], source=str(path))


def _parsed(override: str, problems: dict[str, str]) -> tuple[str, Any]:
    """Key and value of an override; the empty key, and a problem more, where it is none."""
    path, equals, value = (part.strip() for part in override.partition("="))
    where = f"-s {override}"
    if not equals or not path:
        form = "an override has the form table.key=value; for example train.rounds=50"
        problems[where] = f"-s {override!r}: {form}"
        return "", None
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as error:
        if value[:1] not in ('"', "'", "[", "{"):
            return path, value
        rule = "the value after = is neither TOML nor a bare text"
        problems[where] = f"-s {override!r}: {rule} ({error}); check its quotes"
        return "", None
    return path, parsed["value"] if list(parsed) == ["value"] else value


def _changed(
    document: dict[str, Any], settings: Mapping[str, Any], problems: dict[str, str], source: str
) -> Scenario:
    """The scenario of a document after changes; one ScenarioError with everything wrong in it."""
    if "title" not in settings and any(path.startswith("privacy.") for path in settings):
        # They were written for other settings: "no privacy noise" would head an ε of 8.
        document = {key: each for key, each in document.items() if key not in _WORDS}
    for path, value in settings.items():
        table, _, name = path.rpartition(".")
        target = document.setdefault(table, {}) if table in TABLES and table else document
        if not is_key(path):
            problems[path] = unknown_key(path, value, document)
        elif not isinstance(target, dict):
            continue  # reported as a malformed table
        elif value is None or value == "":
            target.pop(name, None)
        else:
            target[name] = value
    _forget_former_kinds(document, settings)
    try:
        scenario = Scenario.model_validate(document)
        _ = scenario.variants  # whose problems are the scenario's
    except ScenarioError as error:
        problems |= dict(zip(error.problems, error.problems, strict=True))
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
        between = [each["ctx"]["found"] for each in errors if each["type"] == "conflicts"]
        if between:
            problems |= between[0]
        else:
            for each in errors:
                problems.setdefault(*problem_of(each, document))
            problems |= conflicts(_values(document, {path.partition("[")[0] for path in problems}))
    if problems:
        raise ScenarioError(list(problems.values()), source=source)
    return scenario


def _forget_former_kinds(document: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Remove what only the former kind had, where the kind was changed and the key was not."""
    for name, table in TABLES.items():
        if not isinstance(document.get(name), dict):
            continue
        own = table.of(document[name]).model_fields
        changed = [registry for registry in table.registries if registry.path in settings]
        for key in list(document[name]):
            given = key in own or f"{name}.{key}" in settings
            if not given and any(registry.owners(key) for registry in changed):
                del document[name][key]


def _values(document: Mapping[str, Any], malformed: AbstractSet[str] = frozenset()) -> Values:
    """Values by dotted path, defaults of the chosen kinds filled in, without the malformed."""
    values: dict[str, Any] = {}
    for name, table in TABLES.items():
        given = document.get(name, {})
        if not name or name in malformed or not isinstance(given, Mapping):
            continue
        for key, field in table.of(given).model_fields.items():
            if f"{name}.{key}" not in malformed:
                values[f"{name}.{key}"] = given.get(key, field.get_default())
    return values


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
