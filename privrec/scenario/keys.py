"""The keys of a scenario in words: what each takes and means, and what is wrong with a value.

Nothing here knows a particular key: what it takes is read off the JSON Schema of its class, so that
a message, the documentation and the check cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from privrec.scenario.kinds import Registry, Section, Table
from privrec.scenario.schema import TABLES, as_toml, describe, shown

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
        rule: What a value must be, in plain words, for example ``a whole number of at least 1``.
        unit: What the value counts; empty where it counts nothing.
        default: The default as TOML, ``required`` or ``unset``.
        registry: Where only some kinds have it; ``kinds`` are their names.
    """

    table: str
    name: str
    rule: str
    unit: str
    default: str
    meaning: str
    registry: Registry | None = None
    kinds: tuple[str, ...] = ()


def rule_of(schema: Schema) -> str:
    """What a value must be according to its JSON schema, in plain words."""
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(map(rule_of, options))
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(map(as_toml, options))
    if "$ref" in schema:
        return "a table"
    if "pattern" in schema:
        return "a text of 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
    if schema.get("type") == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        return f"a list of {low} to {high} values, each {rule_of(schema['items'])}"
    return _KINDS.get(str(schema.get("type")), "a value") + _bounds(schema)


def _bounds(schema: Schema) -> str:
    if (most := schema.get("maxLength")) is not None:
        least = schema.get("minLength", 0)
        if least == most == 1:
            return ", one character"
        return f", {least} to {most} characters" if least else f", at most {most} characters"
    words = {
        "minimum": "of at least", "exclusiveMinimum": "above",
        "maximum": "at most", "exclusiveMaximum": "below",
    }  # fmt: skip
    found = [f"{text} {_plain(schema[key])}" for key, text in words.items() if key in schema]
    return f" {' and '.join(found)}" if found else ""


def _plain(value: float) -> str:
    if value == 2**63:
        return "2^63"
    return str(int(value)) if float(value).is_integer() else repr(value)


def keys_of(table: str, section: type[Section]) -> dict[str, Key]:
    """The keys of one class by name, in the order of its fields."""
    schema = section.model_json_schema()
    required = schema.get("required", ())
    return {
        name: Key(
            table=table,
            name=name,
            rule=rule_of(entry),
            unit=str(entry.get("unit", "")),
            default="required" if name in required else as_toml(entry.get("default")),
            meaning=str(entry.get("description", "")),
        )
        for name, entry in schema.get("properties", {}).items()
    }


def keys() -> list[Key]:
    """Every key that a scenario can have: those of each table, then those of its kinds."""
    found: list[Key] = []
    for table, section in TABLES.items():
        found += keys_of(table, section).values()
        for registry in _registries(section):
            owners: dict[Key, tuple[str, ...]] = {}
            for name in registry:
                for key in keys_of(table, registry[name].config).values():
                    owners[key] = (*owners.get(key, ()), name)
            found += [replace(key, registry=registry, kinds=kinds) for key, kinds in owners.items()]
    return found


def is_key(path: str) -> bool:
    """Whether some scenario has this key."""
    table, _, name = path.rpartition(".")
    section = TABLES.get(table)
    if section is None:
        return False
    return name in section.model_fields or any(r.owners(name) for r in _registries(section))


def _registries(section: type[Section]) -> tuple[Registry, ...]:
    return section.registries if issubclass(section, Table) else ()


# --------------------------------------------------------------------------- problems


def problems_of(errors: Iterable[Mapping[str, Any]], document: Mapping[str, Any]) -> dict[str, str]:
    """Pydantic's errors in plain words: a message by dotted path, at most one for each key.

    Args:
        errors: ``ValidationError.errors()`` of the whole scenario.
        document: What was validated.
        TABLES: The class of each table.
    """
    messages: dict[str, str] = {}
    for error in errors:
        table, *rest = error["loc"]
        value, path = error["input"], ".".join(map(str, error["loc"][:2]))
        known = None
        if table not in (*TABLES, "rows"):
            known, path = keys_of("", TABLES[""]).get(str(table)), str(table)
        elif rest:
            section = TABLES.get(str(table), Section)
            if issubclass(section, Table):
                section = section.of(document[table])
            known = keys_of(str(table), section).get(str(rest[0]))
        if table == "rows" or (error["loc"][:2] == ("devices", "tiers") and len(rest) > 1):
            path = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in error["loc"])[1:]
            words = _OF_ENTRIES["rows" if table == "rows" else "tiers"]
            message = describe(path, value, *words)
            if table == "rows" and error["type"] == "missing":
                message = f"{path}: it is missing; a row needs it; add it"
        elif error["type"] == "extra_forbidden":
            message = unknown_key(path, value, document)
        elif error["type"] == "rule":
            message = f"{path} = {shown(value)}: {error['msg']}"
        elif path in TABLES and error["type"] == "missing":
            message = f"[{path}]: the table is missing; add it"
        elif path in TABLES:
            message = describe(path, value, "must be a table", f"write it as [{path}]")
        elif known is None:
            message = describe(path, value, "must be a valid value", "correct it")
        elif error["type"] == "missing":
            message = f"{path}: it is missing; it must be {known.rule}; add it"
        else:
            message = describe(path, value, f"must be {known.rule}", _remedy(value, known))
        messages.setdefault(path, message)
    return messages


_OF_ENTRIES = {
    "tiers": (
        "a tier is a table with a capacity of 1, 0.5, 0.25 and so on (or memory_kib, a whole "
        "number of at least 1), a share above 0 and at most 1, and perhaps a weight from 0 to 1",
        "for example {capacity = 1.0, share = 1}",
    ),
    "rows": (
        "a row is a table with a text `name` and a table `set` of dotted keys",
        'for example name = "bpr"',
    ),
}


def _remedy(value: object, key: Key) -> str:
    if isinstance(value, str) and key.rule.startswith("one of "):
        options = key.rule.removeprefix("one of ").split(", ")
        if near := get_close_matches(as_toml(value.lower()), options, n=1, cutoff=0.6):
            return f"did you mean {near[0]}?"
    if key.default in ("required", "unset"):
        return f"change the value{' or remove the key' if key.default == 'unset' else ''}"
    return f"change the value, or remove the key for the default, {key.default}"


def unknown_key(path: str, value: object, document: Mapping[str, Any]) -> str:
    """The message for a key that this scenario cannot have: whose it is, or what was meant."""
    table, _, name = path.rpartition(".")
    section = TABLES.get(table, Section)
    for registry in _registries(section):
        if owners := registry.owners(name):
            chosen = document.get(table, {}).get(
                key := registry.path.partition(".")[2], section.model_fields[key].default
            )
            others = [each for each in registry if each not in owners]
            few = f" = {_listed(owners)}"
            if len(others) < len(owners):
                few = f" other than {_listed(others)}"
            rule = f"it belongs to {registry.path}{few}, and the {registry.noun} is "
            return describe(path, value, rule + as_toml(chosen), f"remove it (-s {path}=)")
    names = [each for each in TABLES if each]
    if not table and isinstance(value, dict):
        near = get_close_matches(path, names, n=1, cutoff=0.5)
        remedy = f"did you mean [{near[0]}]?" if near else "remove it"
        return f"[{path}]: there is no such table, only {', '.join(names)}; {remedy}"
    return describe(path, value, "there is no such key", _nearest_key(name, table))


def _listed(names: Sequence[str]) -> str:
    return " or ".join(map(as_toml, names))


def _nearest_key(name: str, table: str) -> str:
    found = [(key.table, key.name) for key in keys()]
    here = list(dict.fromkeys(key for where, key in found if where == table))
    elsewhere = {key: where for where, key in found if where != table}
    if name in elsewhere:
        where = f"in [{elsewhere[name]}]" if elsewhere[name] else "above the tables"
        return f"`{name}` stands {where}: did you mean {_dotted(elsewhere[name], name)}?"
    if near := get_close_matches(name.lower(), here, n=1, cutoff=0.6):
        return f"did you mean {_dotted(table, near[0])}?"
    if far := get_close_matches(name.lower(), list(elsewhere), n=1, cutoff=0.7):
        return f"did you mean {_dotted(elsewhere[far[0]], far[0])}?"
    return f"remove it; {f'[{table}]' if table else 'a scenario'} has {', '.join(here)}"


def _dotted(table: str, name: str) -> str:
    return f"{table}.{name}" if table else name


# --------------------------------------------------------------------------- documentation


def reference() -> dict[str, str]:
    """The tables of keys in Markdown, by the table of a scenario that they describe."""
    everything, found = keys(), {}
    for table, section in TABLES.items():
        here = [key for key in everything if key.table == table]
        lines = ["| key | takes | unit | default | meaning |", "|---|---|---|---|---|"]
        lines += [_row(key) for key in here if key.registry is None]
        for registry in _registries(section):
            name = registry.path.partition(".")[2]
            lines += ["", f"| `{name}` | is | has the keys |", "|---|---|---|"]
            for kind in registry:
                own = ", ".join(f"`{key}`" for key in registry[kind].config.model_fields)
                lines.append(f"| `{kind}` | {registry[kind].meaning} | {own} |")
            of_kinds = [key for key in here if key.registry is registry]
            if of_kinds:
                lines += ["", f"| key of a `{name}` | takes | unit | default | meaning |"]
                lines += ["|---|---|---|---|---|", *map(_row, of_kinds)]
        found[table] = "\n".join(lines)
    return found


def _row(key: Key) -> str:
    default = key.default if key.default in ("required", "unset") else f"`{key.default}`"
    return f"| `{key.name}` | {key.rule} | {key.unit} | {default} | {key.meaning} |"


def json_schema(scenario: type[Section]) -> dict[str, Any]:
    """The JSON Schema of a scenario file, for editors: no key without the kind that has it."""
    schema = scenario.model_json_schema()
    for section in TABLES.values():
        definition = schema["$defs"].get(section.__name__, {})
        for registry in _registries(section):
            name = registry.path.partition(".")[2]
            of_kinds = {
                kind: registry[kind].config.model_json_schema().get("properties", {})
                for kind in registry
            }
            everything = {key: entry for keys in of_kinds.values() for key, entry in keys.items()}
            definition["properties"] |= everything
            for kind, own in of_kinds.items():
                named = {"properties": {name: {"const": kind}}}
                if kind != section.model_fields[name].default:
                    named["required"] = [name]  # type: ignore[assignment]
                others = {key: False for key in everything if key not in own}
                rule = {"if": named, "then": {"properties": others}}
                definition.setdefault("allOf", []).append(rule)
    return schema
