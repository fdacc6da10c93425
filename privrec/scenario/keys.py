"""The keys of a scenario in words: what each takes and means, what goes together, what is wrong.

What a key takes is read off the JSON Schema of its class, so that a message, the documentation and
the check cannot disagree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from privrec.scenario.kinds import (
    MODELS,
    READERS,
    REGISTRIES,
    Need,
    Problem,
    Registry,
    Section,
    Values,
    as_tuple,
)
from privrec.scenario.schema import TABLES

Schema = Mapping[str, Any]
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text in quotes",
    "object": "a table",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


@dataclass(frozen=True)
class Key:
    """One key of a scenario: where it stands, what it takes, and what it means.

    Attributes:
        table: Empty for a key above all tables.
        rule: What a value must be, in plain words, for example ``a whole number of at least 1``.
        default: As TOML; or ``required`` or ``unset``.
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


def as_toml(value: object) -> str:
    """``value`` as one TOML value on one line; ``unset`` for None, which TOML cannot write."""
    if value is None:
        return "unset"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{as_toml(str(key))} = {as_toml(entry)}" for key, entry in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return str(value)


def shown(value: object, *, limit: int = 60) -> str:
    """``value`` as TOML, cut to ``limit`` characters, for a message."""
    text = as_toml(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def describe(path: str, value: object, rule: str, remedy: str) -> str:
    """The one form of a problem: ``path = value: rule; remedy``."""
    found = f"{path} is unset" if value is None else f"{path} = {shown(value)}"
    return f"{found}: {rule}; {remedy}"


def rule_of(schema: Schema) -> str:
    """What a value must be according to its JSON schema, in plain words."""
    kind = str(schema.get("type"))
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(map(rule_of, options))
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(as_toml, schema.get("enum", [schema.get("const")])))
    if "$ref" in schema:
        return "a table"
    if "pattern" in schema:
        return "a text of 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
    if kind == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        return f"a list of {low} to {high} values, each {rule_of(schema['items'])}"
    if (most := schema.get("maxLength")) is not None:
        least = schema.get("minLength", 0)
        length = f"{least} to {most} characters" if least else f"at most {most} characters"
        return f"{_KINDS[kind]}, {'one character' if least == most == 1 else length}"
    found = [f"{text} {_plain(schema[key])}" for key, text in _BOUNDS.items() if key in schema]
    return " ".join([_KINDS.get(kind, "a value"), " and ".join(found)]).strip()


def _plain(value: float) -> str:
    if value == 2**63:
        return "2^63"
    return str(int(value)) if float(value).is_integer() else repr(value)


def keys_of(table: str, section: type[Section]) -> dict[str, Key]:
    """The keys of one class by name, in the order of its fields."""
    schema, found = section.model_json_schema(), {}
    for name, entry in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        default = "required" if required else as_toml(entry.get("default"))
        meaning = " ".join(entry.get("description", "").split())
        found[name] = Key(table, name, rule_of(entry), entry.get("unit", ""), default, meaning)
    return found


def keys() -> list[Key]:
    """Every key that a scenario can have: those of each table, then those of its kinds."""
    found: list[Key] = []
    for table, section in TABLES.items():
        found += keys_of(table, section).values()
        for registry in section.registries:
            owners: dict[Key, tuple[str, ...]] = {}
            for name in registry:
                for key in keys_of(table, registry[name].config).values():
                    owners[key] = (*owners.get(key, ()), name)
            found += [replace(key, registry=registry, kinds=kinds) for key, kinds in owners.items()]
    return found


def is_key(path: str) -> bool:
    """Whether some scenario has this key."""
    table, _, name = path.rpartition(".")
    section = TABLES.get(table, Section)
    return name in section.model_fields or any(r.owners(name) for r in section.registries)


# --------------------------------------------------------------------------- problems


_TIER = (
    "a tier is a table with a capacity of 1, 0.5, 0.25 and so on (or memory_kib, a whole "
    "number of at least 1), a share above 0 and at most 1, and perhaps a weight from 0 to 1",
    "for example {capacity = 1.0, share = 1}",
)
_ROW = (
    "a row is a table with a text `name` and a table `set` of dotted keys",
    'for example name = "bpr"',
)


def problem_of(error: Mapping[str, Any], document: Mapping[str, Any]) -> tuple[str, str]:
    """Path and message, in plain words, of one of pydantic's errors on a document."""
    place, value, missing = error["loc"], error["input"], error["type"] == "missing"
    table, path = str(place[0]), ".".join(map(str, place[:2]))
    if table == "rows" or (place[:2] == ("devices", "tiers") and len(place) > 2):
        path = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place)[1:]
        if table == "rows" and missing:
            return path, f"{path}: it is missing; a row needs it; add it"
        return path, describe(path, value, *(_ROW if table == "rows" else _TIER))
    if error["type"] == "extra_forbidden":
        return path, unknown_key(path, value, document)
    if error["type"] == "rule":
        return path, f"{path} = {shown(value)}: {error['msg']}"
    if path in TABLES:
        if missing:
            return path, f"[{path}]: the table is missing; add it"
        return path, describe(path, value, "must be a table", f"write it as [{path}]")
    owner = table if table in TABLES else ""
    section = TABLES[owner].of(document[owner] if owner else {})
    known = keys_of(owner, section).get(str(place[1]) if owner else table)
    if known is None:
        return path, describe(path, value, "must be a valid value", "correct it")
    if missing:
        return path, f"{path}: it is missing; it must be {known.rule}; add it"
    remedy = f"change the value, or remove the key for the default, {known.default}"
    if known.default in ("required", "unset"):
        remedy = "change the value" + " or remove the key" * (known.default == "unset")
    if isinstance(value, str) and known.rule.startswith("one of "):
        options = known.rule.removeprefix("one of ").split(", ")
        if near := get_close_matches(as_toml(value.lower()), options, n=1, cutoff=0.6):
            remedy = f"did you mean {near[0]}?"
    return path, describe(path, value, f"must be {known.rule}", remedy)


def unknown_key(path: str, value: object, document: Mapping[str, Any]) -> str:
    """The message for a key that this scenario cannot have: whose it is, or what was meant."""
    table, _, name = path.rpartition(".")
    section = TABLES.get(table, Section)
    for registry in section.registries:
        if owners := registry.owners(name):
            default = section.model_fields[registry.key].default
            chosen = as_toml(document.get(table, {}).get(registry.key, default))
            others = [each for each in registry if each not in owners]
            few = f" = {_listed(owners)}"
            if len(others) < len(owners):
                few = f" other than {_listed(others)}"
            rule = f"it belongs to {registry.path}{few}, and the {registry.noun} is {chosen}"
            return describe(path, value, rule, f"remove it (-s {path}=)")
    if not table and isinstance(value, dict):
        names = list(filter(None, TABLES))
        near = get_close_matches(path, names, n=1, cutoff=0.5)
        remedy = f"did you mean [{near[0]}]?" if near else "remove it"
        return f"[{path}]: there is no such table, only {', '.join(names)}; {remedy}"
    return describe(path, value, "there is no such key", _nearest_key(name, table))


def _listed(names: Sequence[str]) -> str:
    return " or ".join(map(as_toml, names))


def _nearest_key(name: str, table: str) -> str:
    found = [(key.table, key.name) for key in keys()]
    here = list(dict.fromkeys(key for where, key in found if where == table))
    elsewhere = {key: f"{where}.{key}".lstrip(".") for where, key in found if where != table}
    if name in elsewhere:
        where = elsewhere[name].rpartition(".")[0]
        where = f"in [{where}]" if where else "above the tables"
        return f"`{name}` stands {where}: did you mean {elsewhere[name]}?"
    if near := get_close_matches(name.lower(), here, n=1, cutoff=0.6):
        return f"did you mean {f'{table}.{near[0]}'.lstrip('.')}?"
    if far := get_close_matches(name.lower(), list(elsewhere), n=1, cutoff=0.7):
        return f"did you mean {elsewhere[far[0]]}?"
    return f"remove it; {f'[{table}]' if table else 'a scenario'} has {', '.join(here)}"


# --------------------------------------------------------------------------- rules between keys
#
# A rule yields the keys that break it. It ends where a key that it reads is malformed or of another
# kind, so that one mistake is reported once. What a kind needs of other keys stands at the kind.


def conflicts(values: Values) -> dict[str, str]:
    """Everything that is wrong between keys: a message by path."""
    named = [(registry, values.get(registry.path, "")) for registry in REGISTRIES]
    chosen = {of.path: of[name].config for of, name in named if name in of}
    needs = {path: config.needs for path, config in chosen.items()}
    needs |= {path: of for (path, value), of in _NEEDS.items() if values.get(path) == value}
    rules = [*_RULES, *(config.conflicts for config in chosen.values())]
    rules += [partial(_unmet, *each) for each in needs.items()]
    found: dict[str, str] = {}
    for problems in [rule(values) for rule in rules]:
        with suppress(KeyError):
            for path, rule, remedy in problems:
                found.setdefault(path, describe(path, values[path], rule, remedy))
    return found


def _unmet(owner: str, needs: Sequence[Need], values: Values) -> Iterator[Problem]:
    """The first thing that is missing; a key that the chosen kinds do not have is as it must be."""
    nouns = {registry.path: registry.noun for registry in REGISTRIES}
    for need in needs:
        wanted = need.options[0]
        if as_tuple(values.get(need.path, wanted)) not in need.options:
            rule = f"{owner} = {as_toml(values[owner])} does not go with it: {need.reason}"
            fix = f"set {need.path} = {as_toml(wanted)}"
            if wanted is None:
                fix = f"remove it (-s {need.path}=)"
            yield need.path, rule, f"{fix}, or use another {nouns.get(owner, owner)}"
            return


_FAIR = "it is FAIR's plain average of item memories"
_ASKED = "the server sees who asks for what"
_SHOWN = "a user vector fitted without noise would show the examples"
_OF_EXAMPLES = (
    Need("train.loss", ("bce", "bpr"), "each example has a loss of its own"),
    Need("train.selector", ("each",), "negatives must not depend on the history"),
    Need("train.user_steps", (0,), _SHOWN),
    Need("train.max_samples", (None,), "a window of the history moves with every example"),
    Need("devices.aggregation", ("sum", "contributors"), "updates have noise everywhere"),
)
_NEEDS: dict[tuple[str, str], tuple[Need, ...]] = {
    ("devices.aggregation", "fair_averaging"): (
        Need("model.kind", ("gmf",), _FAIR),
        Need("privacy.noise", ("none",), _FAIR),
        Need("train.server_optimizer", ("fedavg", "newton"), _FAIR),
        Need("devices.nesting", ("fold", None), "FAIR averages folded memories"),
        Need("devices.popularity", (None,), 'FAIR averages folded memories, nesting = "fold"'),
    ),
    ("privacy.local", "example"): _OF_EXAMPLES,
    ("privacy.local", "shares"): (
        *_OF_EXAMPLES,
        Need("privacy.noise", ("none",), "what is summed has one noise, that of interactions"),
        Need("privacy.ring_bits", (32,), "sums of interactions are integers that are not rotated"),
        Need("devices.tiers", ((),), "sums of interactions are integers of one memory"),
    ),
    ("train.scheme", "requested"): (
        Need("model.kind", ("next_word",), _ASKED),
        Need("privacy.noise", ("none",), _ASKED),
        Need("run.secure_sum", ("exact",), _ASKED),
        Need("devices.tiers", ((),), _ASKED),
        Need("model.compression", (1.0,), _ASKED),
    ),
}
"""What goes only with some values of other keys, besides kinds."""


def _material(values: Values) -> Iterator[Problem]:
    """A model learns from what the reader gives."""
    source, kind = values["data.source"], values["model.kind"]
    gives = READERS[source].config.gives
    if gives == MODELS[kind].config.learns:
        return
    learners = [name for name in MODELS if MODELS[name].config.learns == gives]
    remedy = f"{gives} and model.kind = {' or '.join(map(as_toml, learners))} need each other"
    yield "model.kind", f"data.source = {as_toml(source)} has other data", f"{remedy}; change one"


def _sizes(values: Values) -> Iterator[Problem]:
    """Blocks divide a vector, and warming up ends before the run does."""
    dim, block = values["model.dim"], values["model.block"]
    divisors = [size for size in range(1, min(dim, block) + 1) if dim % size == 0]
    if dim % block:
        yield "model.block", f"must divide model.dim = {dim}", f"use {divisors[-1]}"
    elif values["model.compression"] > 1 and dim == block:
        rule = f"a compressed model.dim = {dim} needs two blocks or more, or whole items collide"
        yield "model.block", rule, f"use {divisors[-2]}" if dim > 1 else "raise model.dim"


def _course(values: Values) -> Iterator[Problem]:
    if values["train.warmup_rounds"] > (rounds := values["train.rounds"]):
        rule = f"must not exceed train.rounds = {rounds}"
        yield "train.warmup_rounds", rule, "lower it or train for longer"
    if len(cuts := set(values["run.top_k"])) < len(values["run.top_k"]):
        yield "run.top_k", "must not repeat a cut-off", f"use {as_toml(sorted(cuts))}"


def _spares(values: Values) -> Iterator[Problem]:
    """Attempts are set aside within a target."""
    targets = values["privacy.epsilon"], values["privacy.local_epsilon"]
    if values["privacy.spare_attempts"] and targets == (None, None):
        rule = "is room within a target ε, and there is none: nothing halts the run"
        yield "privacy.spare_attempts", rule, "set privacy.epsilon or remove it"


def _noise(values: Values) -> Iterator[Problem]:
    """Noise has a bound on what it hides, and one of target and multiplier; without it, none."""
    for owner, prefix, whose, without in (
        ("privacy.noise", "privacy.", "update", "gives no guarantee at all"),
        ("privacy.local", "privacy.local_", "interaction", "protects no single interaction"),
    ):
        kind = f"{owner} = {as_toml(values[owner])}"
        if values[owner] == "shares" and values["privacy.clip_norm"] is None:
            remedy = "set it, for example to 10 times train.local_lr times privacy.local_clip_norm"
            yield "privacy.clip_norm", f"{kind} needs a bound on each coefficient", remedy
        clip, epsilon = f"{prefix}clip_norm", f"{prefix}epsilon"
        multiplier = f"{prefix}noise_multiplier"
        if values[owner] == "none":
            # Updates are encoded within a bound without noise too; single interactions are not.
            for path in (epsilon, multiplier, *([clip] if owner == "privacy.local" else [])):
                if values[path] is not None:
                    yield path, f"{kind} {without}", f"set {owner} or remove it (-s {path}=)"
            continue
        if values[clip] is None:
            yield clip, f"{kind} needs a bound on each {whose}", "set it, for example to 1.0"
        if values[epsilon] is None and values[multiplier] is None:
            remedy = f"set {epsilon}, for example to 8, or {multiplier}"
            yield epsilon, f"{kind} needs a target ε or a multiplier", remedy
        elif None not in (values[epsilon], values[multiplier]):
            rule = f"excludes {multiplier} = {values[multiplier]}, since each decides the other"
            yield epsilon, rule, "remove one of them"


def _tiers(values: Values) -> Iterator[Problem]:
    tiers = [
        tier if isinstance(tier, Mapping) else tier.model_dump() for tier in values["devices.tiers"]
    ]
    capacities = [tier["capacity"] for tier in tiers if tier.get("capacity") is not None]
    if not tiers:
        return
    if any((tier.get("capacity") is None) == (tier.get("memory_kib") is None) for tier in tiers):
        rule = "each tier has one of capacity and memory_kib"
    elif any(capacity and math.frexp(capacity)[0] != 0.5 for capacity in capacities):
        rule = "a capacity is a power of two, 1, 0.5, 0.25 and so on, or memories do not nest"
    elif len(set(capacities)) < len(capacities):
        rule = "two tiers of one capacity are the same tier"
    elif abs((total := sum(tier["share"] for tier in tiers)) - 1) > 1e-6:
        rule = f"the shares must add up to 1, and they give {total:g}"
    elif not any(tier.get("weight", 1.0) and tier.get("capacity") != 0 for tier in tiers):
        rule = "a tier of weight 0 or capacity 0 does not train, and then nobody does"
    else:
        return
    remedy = "for example [{capacity = 1.0, share = 0.5}, {capacity = 0.25, share = 0.5}]"
    yield "devices.tiers", rule, remedy


def _nesting(values: Values) -> Iterator[Problem]:
    path, popularity, kind = "devices.nesting", values["devices.popularity"], values["model.kind"]
    order = values[path] or ("fold" if popularity is None else "rows")
    # Words are in this order however they are nested; and sampling may draw by it.
    used = READERS[values["data.source"]].config.gives != "interactions"
    used = used or (values["train.selector"] == "popularity" and popularity == "public")
    if order == "rows" and popularity is None:
        remedy = 'set devices.popularity = "public" or "released"'
        yield path, "the order of the rows must come from somewhere", remedy
    elif order != "rows" and popularity is not None and not used:
        rule = f"devices.popularity = {as_toml(popularity)} orders rows, which are not used"
        yield path, rule, 'set nesting = "rows" or remove popularity (-s devices.popularity=)'
    elif order != "fold" and values["model.compression"] > 1:
        rule = f"model.compression = {values['model.compression']} needs a hashed memory"
        yield path, rule, 'use nesting = "fold", or model.compression = 1'
    elif order == "dims" and not MODELS[kind].config.inner_product:
        rule = f"the network of model.kind = {as_toml(kind)} has one input width"
        yield path, rule, 'use model.kind = "gmf", or nesting = "fold"'


def _release(values: Values) -> Iterator[Problem]:
    """Counts that are released have an ε of their own, and nothing else has."""
    path, released = "devices.popularity_epsilon", values["devices.popularity"] == "released"
    if released and values[path] is None:
        rule = 'devices.popularity = "released" is charged'
        yield path, rule, "set it, for example to 0.5"
    if not released and values[path] is not None:
        remedy = f'set devices.popularity = "released" or remove it (-s {path}=)'
        yield path, "there is no release to charge", remedy


def _evaluation(values: Values) -> Iterator[Problem]:
    """A secure sum of metrics needs the noise of users, and a recommender."""
    path = "privacy.evaluation_epsilon"
    if values[path] is None:
        return
    if values["privacy.noise"] == "none" or values["privacy.local"] != "none":
        rule = "it is charged to an ε of users, and adds up with no ε of single interactions"
        remedy = 'use privacy.noise = "distributed" or "central", with local = "none"'
        yield path, rule, f"{remedy}, or remove it (-s {path}=)"
    if MODELS[values["model.kind"]].config.learns != "interactions":
        yield path, "hits are counted of recommenders alone", f"remove it (-s {path}=)"


def _features(values: Values) -> Iterator[Problem]:
    """Ranks need an order that everybody knows, and features a user's fit by inner products."""
    kind, loss = values["model.kind"], values["train.loss"]
    order = values["devices.nesting"] or ("rows" if values["devices.popularity"] else "fold")
    ranked = order == "rows" and MODELS[kind].config.learns == "interactions"
    for path in ("train.rank_power", "model.rank_features"):
        if values.get(path) and not ranked:
            rule = "items have a rank in a recommender whose rows are in the order of popularity"
            yield path, rule, 'set devices.popularity = "released", or remove it'
    for path in ("data.item_features", "model.rank_features"):
        if values.get(path) is not True:
            continue
        if not MODELS[kind].config.inner_product:
            rule = f"model.kind = {as_toml(kind)} has no place for them"
            yield path, rule, f'use "gmf", or remove it (-s {path}=)'
        elif loss == "ials":
            rule = f"train.loss = {as_toml(loss)} sums over all items by their learned vectors"
            yield path, rule, f"remove it (-s {path}=), or use another loss"


_RULES = (
    *(_material, _sizes, _course, _spares, _noise, _tiers),
    *(_nesting, _release, _evaluation, _features),
)


# --------------------------------------------------------------------------- editors


def json_schema(scenario: type[Section]) -> dict[str, Any]:
    """The JSON Schema of a scenario file, for editors: no key without the kind that has it."""
    schema = scenario.model_json_schema()
    for section in TABLES.values():
        definition = schema["$defs"].get(section.__name__, {})
        for registry in section.registries:
            of_kinds = {
                kind.name: kind.config.model_json_schema().get("properties", {})
                for kind in registry.values()
            }
            everything = {key: entry for keys in of_kinds.values() for key, entry in keys.items()}
            definition["properties"] |= everything
            for kind, own in of_kinds.items():
                named: dict[str, Any] = {"properties": {registry.key: {"const": kind}}}
                if kind != section.model_fields[registry.key].default:
                    named["required"] = [registry.key]
                others = {key: False for key in everything if key not in own}
                rule = {"if": named, "then": {"properties": others}}
                definition.setdefault("allOf", []).append(rule)
    return schema
