"""Scenario problems in plain words: each gives the key, its value, the rule and the remedy.

Nothing here knows a particular key: the rule of a key is read off the JSON schema of the scenario
model, so that a message and the documentation cannot disagree with what is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

Schema = Mapping[str, Any]

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text in quotes",
    "object": "a table",
}


@dataclass(frozen=True)
class Key:
    """One key of a scenario: where it stands, what it takes, and what it means.

    Attributes:
        table: The table it stands in; empty for a key above all tables.
        name: The key itself.
        rule: What a value must be, in plain words, for example ``a whole number of at least 1``.
        unit: What the value counts; empty where it counts nothing.
        default: The default as TOML, ``required`` or ``unset``.
        meaning: One sentence.
    """

    table: str
    name: str
    rule: str
    unit: str
    default: str
    meaning: str

    @property
    def path(self) -> str:
        """The dotted path that an override uses, for example ``train.rounds``."""
        return f"{self.table}.{self.name}" if self.table else self.name


def as_toml(value: object) -> str:
    """``value`` as one TOML value; ``unset`` for None, which TOML cannot write."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{as_toml(str(key))} = {as_toml(entry)}" for key, entry in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(entry) for entry in value) + "]"
    return str(value)


def shown(value: object, *, limit: int = 60) -> str:
    """``value`` as TOML, cut to ``limit`` characters, for a message."""
    text = as_toml(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def rule_of(schema: Schema) -> str:
    """What a value must be according to its JSON schema, in plain words."""
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(map(rule_of, options))
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(as_toml(option) for option in options)
    if schema.get("type") == "array":
        return _rule_of_list(schema)
    if "$ref" in schema:
        return "a table"
    kind = _KINDS.get(str(schema.get("type")), "a value")
    if "pattern" in schema:
        return "a text of 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
    return kind + _bounds(schema)


def _rule_of_list(schema: Schema) -> str:
    items: Schema = schema.get("items", {})
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    length = f"of {low} to {high} values" if high is not None else f"of at least {low} values"
    return f"a list {length}, each {rule_of(items)}"


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    lower = _bound("of at least", low) or _bound("above", above)
    upper = _bound("at most", high) or _bound("below", below)
    if "maxLength" in schema:
        return _length(schema.get("minLength", 0), schema["maxLength"])
    return " " + " and ".join(part for part in (lower, upper) if part) if lower or upper else ""


def _length(least: int, most: int) -> str:
    if least == most == 1:
        return ", one character"
    return f", {least} to {most} characters" if least else f", at most {most} characters"


def _bound(words: str, value: float | None) -> str:
    return "" if value is None else f"{words} {_plain(value)}"


def _plain(value: float) -> str:
    if value == 2**63 - 1:
        return "2^63 - 1"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def keys_of(schema: Schema) -> dict[str, Key]:
    """Every key of the scenario schema by dotted path, in the order of the model."""
    definitions: Mapping[str, Schema] = schema["$defs"]
    found = []
    for name, entry in schema["properties"].items():
        table = definitions.get(str(entry.get("$ref", "")).rpartition("/")[2])
        if table is None:
            found.append(_key("", name, entry, schema))
        else:
            found += [_key(name, key, each, table) for key, each in table["properties"].items()]
    return {key.path: key for key in found}


def _key(table: str, name: str, entry: Schema, owner: Schema) -> Key:
    required = name in owner.get("required", ())
    return Key(
        table=table,
        name=name,
        rule=rule_of(entry),
        unit=str(entry.get("unit", "")),
        default="required" if required else as_toml(entry.get("default")),
        meaning=str(entry.get("description", "")),
    )


def describe(path: str, value: object, rule: str, remedy: str) -> str:
    """The one form of a problem: ``path = value: rule; remedy``."""
    return f"{path} = {shown(value)}: {rule}; {remedy}"


def from_pydantic(errors: Iterable[Mapping[str, Any]], keys: Mapping[str, Key]) -> dict[str, str]:
    """Pydantic's errors in plain words, at most one for each key.

    Args:
        errors: ``ValidationError.errors()`` of the whole scenario.
        keys: The known keys, as :func:`keys_of` gives them.

    Returns:
        Message by dotted path, in the order of the errors.
    """
    messages: dict[str, str] = {}
    for error in errors:
        path = _path(error["loc"])
        if path:
            messages.setdefault(path, _message(error, path, keys))
    return messages


def _path(location: Sequence[str | int]) -> str:
    if location and location[0] == "rows":
        return "rows" + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[1:]
        )
    if tuple(location[:2]) == ("devices", "tiers") and len(location) > 2:
        return f"devices.tiers[{location[2]}]" + "".join(f".{part}" for part in location[3:])
    return ".".join(str(part) for part in location[:2])


def _message(error: Mapping[str, Any], path: str, keys: Mapping[str, Key]) -> str:
    known, kind = keys.get(path), error["type"]
    if path.startswith("devices.tiers["):
        return describe(path, error["input"], _TIER_RULE, "for example {capacity = 1.0, share = 1}")
    tables = {key.table for key in keys.values() if key.table}
    if kind == "extra_forbidden":
        return unknown_key(path, error["input"], keys)
    if kind == "missing":
        rule = f"it must be {known.rule}" if known else "a scenario needs it"
        if path in tables:
            return f"[{path}]: the table is missing; add it"
        return f"{path}: it is missing; {rule}; add it"
    if path in tables:
        return describe(path, error["input"], "must be a table", f"write it as [{path}]")
    if path.startswith("rows"):
        return describe(path, error["input"], _ROW_RULE, 'for example name = "bpr"')
    rule = known.rule if known else "a valid value"
    value = error["input"]
    return describe(path, value, f"must be {rule}", _remedy(value, known))


_TIER_RULE = (
    "a tier is a table with a capacity of 1, 0.5, 0.25 and so on (or memory_kib, a whole number of "
    "at least 1), a share above 0 and at most 1, and perhaps a weight from 0 to 1"
)
_ROW_RULE = "a row is a table with a text `name` and a table `set` of dotted keys"


def _remedy(value: object, key: Key | None) -> str:
    if key is None:
        return "correct it"
    near = _nearest(value, key)
    if near:
        return f"did you mean {near}?"
    if key.default in ("required", "unset"):
        optional = " or remove the key" if key.default == "unset" else ""
        return f"change the value{optional}"
    return f"change the value, or remove the key for the default, {key.default}"


def _nearest(value: object, key: Key) -> str:
    if not isinstance(value, str) or not key.rule.startswith("one of "):
        return ""
    options = key.rule.removeprefix("one of ").split(", ")
    close = get_close_matches(as_toml(value.lower()), options, n=1, cutoff=0.6)
    return close[0] if close else ""


def unknown_key(path: str, value: object, keys: Mapping[str, Key]) -> str:
    """The message for a key that no scenario has, with the nearest one that it has."""
    tables = list(dict.fromkeys(key.table for key in keys.values() if key.table))
    head = path.partition(".")[0]
    if "." not in path and isinstance(value, dict):
        near = get_close_matches(path, tables, n=1, cutoff=0.5)
        remedy = f"did you mean [{near[0]}]?" if near else "remove it"
        return f"[{path}]: there is no such table, only {_listed(tables)}; {remedy}"
    table = head if "." in path else ""
    remedy = _nearest_key(path.rpartition(".")[2], table, keys)
    return describe(path, value, "there is no such key", remedy)


def _nearest_key(name: str, table: str, keys: Mapping[str, Key]) -> str:
    here = [key.name for key in keys.values() if key.table == table]
    elsewhere = {key.name: key for key in keys.values() if key.table != table}
    if name in elsewhere:
        owner = elsewhere[name]
        where = f"in [{owner.table}]" if owner.table else "above the tables"
        return f"`{name}` stands {where}: did you mean {owner.path}?"
    near = get_close_matches(name.lower(), here, n=1, cutoff=0.6)
    if near:
        return f"did you mean {f'{table}.' if table else ''}{near[0]}?"
    far = get_close_matches(name.lower(), list(elsewhere), n=1, cutoff=0.7)
    if far:
        return f"did you mean {elsewhere[far[0]].path}?"
    return f"remove it; {f'[{table}]' if table else 'a scenario'} has {_listed(here)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
