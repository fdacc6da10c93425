"""The rules between keys of a scenario: what each key alone cannot say.

A rule reads values by dotted path and gives its problems by path. It is skipped while a key that
it reads is malformed, so that one mistake is reported once.

The rules between keys of a scenario over texts or labelled examples.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from privrec.scenario.problems import as_toml, describe

TEXTS = ("text", "synthetic_text")
LABELS = ("labels", "synthetic_labels")
WIDE = {"next_word": TEXTS, "extreme": LABELS}
"""Models with a wide output layer, and the sources of what they learn from."""
OF_WORDS = (*TEXTS, *LABELS)
"""Sources whose vocabulary is ordered by how common its words are."""

Values = Mapping[str, Any]
Problems = dict[str, str]


def texts(values: Values) -> Problems:
    """What goes with texts and labels, and with nothing else: problems by path."""
    source, kind = values["data.source"], values["model.kind"]
    for wide, sources in WIDE.items():
        if (source in sources) != (kind == wide):
            rule = f"data.source = {as_toml(source)} has other data"
            some = "texts" if wide == "next_word" else "labels"
            remedy = f"{some} and model.kind = {as_toml(wide)} need each other; change one of them"
            return {"model.kind": describe("model.kind", kind, rule, remedy)}
    if kind not in WIDE:
        return _not_texts(values)
    needed: Mapping[str, tuple[Any, ...]] = {
        "privacy.local": ("none",),
        "train.loss": ("softmax", "full_softmax"),
        "train.serve_budget": (None,),
        "model.item_bias": (True,),
        "run.engine": ("cohort",),
        "train.server_optimizer": ("fedavg", "fedadam", "sgd"),
        "devices.popularity": ("public", "released"),
        "devices.aggregation": ("sum", "contributors"),
        "run.baselines": (("popularity",), ["popularity"], (), []),
    }
    for path, options in needed.items():
        if values[path] not in options:
            rule = "a model with a wide output does not have it"
            return {path: describe(path, values[path], rule, f"use {as_toml(options[0])}")}
    return _language(values)


def _not_texts(values: Values) -> Problems:
    """Keys of texts where there are none."""
    for path, neutral in (("train.frequent", 0.0), ("train.scheme", "private")):
        if values[path] != neutral:
            rule = "it belongs to texts and labels"
            return {path: describe(path, values[path], rule, f"remove it (-s {path}=)")}
    return {}


def _language(values: Values) -> Problems:
    dim, heads, selector = values["model.dim"], values["model.heads"], values["train.selector"]
    if values["model.kind"] == "next_word" and dim % heads:
        rule = f"must divide model.dim = {dim}"
        return {"model.heads": describe("model.heads", heads, rule, "use 1, 2, 4 or 8")}
    sparse = values["train.loss"] == "softmax"
    if sparse != (selector != "each") or selector == "popularity":
        rule = (
            "a sampled softmax chooses its neurons, and a full one has all of them"
            if selector != "popularity"
            else "common words are a share of the budget"
        )
        remedy = 'set train.selector = "uniform" (and train.frequent), or loss = "full_softmax"'
        return {"train.selector": describe("train.selector", selector, rule, remedy)}
    part = values["train.selected"] + values["train.frequent"]
    if sparse and selector != "uniform" and part > 1:
        rule = f"with train.selected = {values['train.selected']} it is more than the budget"
        path = "train.frequent"
        return {path: describe(path, values[path], rule, "lower one of them")}
    if (
        values["devices.popularity"] == "released"
        and values["data.source"] == "text"
        and values["data.words"] is None
    ):
        rule = "which words there are in private texts is private too"
        return {"data.words": f"data.words is unset: {rule}; name a public list of words"}
    return _requested(values)


def _requested(values: Values) -> Problems:
    """What a scheme allows that shows the server what each device asks for."""
    path = "train.scheme"
    if values[path] != "requested":
        return {}
    allowed: Mapping[str, tuple[Any, ...]] = {
        "model.kind": ("next_word",),
        "train.selector": ("simhash",),
        "privacy.noise": ("none",),
        "run.secure_sum": ("exact",),
        "devices.tiers": ((), []),
        "model.compression": (1.0,),
    }
    for key, options in allowed.items():
        if values[key] not in options:
            rule = f"the server sees who asks for what: no {key} = {as_toml(values[key])}"
            remedy = 'use train.scheme = "private"'
            return {path: describe(path, values[path], rule, remedy)}
    return {}


SYNTHETIC_KEYS = ("users", "items", "clusters", "interactions_per_user", "seed")
TEXT_KEYS = ("words", "vocabulary")
LABEL_KEYS = ("features", "labels_each")
TABLE_KEYS = (
    "user_column", "item_column", "time_column", "separator", "encoding", "duplicates"
)  # fmt: skip


def values_of(
    document: Mapping[str, Any], defaults: Mapping[str, Any], malformed: AbstractSet[str]
) -> dict[str, Any]:
    """Values by dotted path, with defaults filled in and without the malformed.

    Args:
        document: The scenario as nested tables.
        defaults: Default by dotted path, of every key in a table.
        malformed: Dotted keys and whole tables with a problem of their own.
    """
    values = {}
    for path, default in defaults.items():
        table, _, name = path.rpartition(".")
        section = document.get(table, {})
        if not {path, table} & malformed and isinstance(section, Mapping):
            values[path] = section.get(name, default)
    return values


def foreign_keys(source: str) -> tuple[str, ...]:
    """The keys of ``[data]`` that mean nothing for this source."""
    foreign: tuple[str, ...] = TABLE_KEYS if source != "table" else ()
    if not source.startswith("synthetic"):
        dealt = ("interactions_per_user", "seed") if source == "labels" else ()
        foreign += tuple(key for key in SYNTHETIC_KEYS if key not in dealt)
    if source != "synthetic_labels":
        foreign += LABEL_KEYS
    if source not in OF_WORDS:
        return foreign + TEXT_KEYS
    unread = {"text": (), "labels": ("words",)}.get(source, ("words", "path"))
    return (*foreign, "max_history", *unread)


def conflicts(values: Values, given: AbstractSet[str]) -> Problems:
    """Everything that is wrong between keys, by path.

    Args:
        values: As :func:`values_of` gives them.
        given: Dotted keys that are written out, not defaulted.
    """
    problems = _foreign(values, given)
    for rule in _RULES:
        try:
            problems.update(rule(values))
        except KeyError:
            continue
    return problems


def _foreign(values: Values, given: AbstractSet[str]) -> Problems:
    source = values.get("data.source")
    problems: Problems = {}
    if source is None:
        return problems
    for path in (f"data.{key}" for key in foreign_keys(source)):
        if path in given and path in values:
            owner = _owner(path.partition(".")[2])
            rule = f"it belongs to data.source = {owner}, and the source is {as_toml(source)}"
            problems[path] = describe(path, values[path], rule, f"remove it (-s {path}=)")
    return problems


def _owner(key: str) -> str:
    """The source, in quotes, that a key of ``[data]`` belongs to."""
    if key in SYNTHETIC_KEYS:
        return '"synthetic"'
    if key in TEXT_KEYS:
        return '"text"' if key == "words" else "texts or labels"
    if key in LABEL_KEYS:
        return '"synthetic_labels"'
    return '"table"' if key in TABLE_KEYS else "interactions or files"


def _synthetic(values: Values) -> Problems:
    source = values["data.source"]
    if source not in ("synthetic", "synthetic_labels"):
        return {}
    items, problems = values["data.items"], {}
    limits = {"data.clusters": (items - 1, f"data.items - 1 = {items - 1}")}
    if source == "synthetic":
        limits = {
            "data.clusters": (items, f"data.items = {items}"),
            "data.interactions_per_user": (items // 2, f"half of data.items = {items}"),
        }
    for path, (limit, words) in limits.items():
        if values[path] > limit:
            rule = f"must not exceed {words}"
            problems[path] = describe(path, values[path], rule, "lower it or raise data.items")
    return problems


def _encoding(values: Values) -> Problems:
    path = "data.encoding"
    try:
        codecs.lookup(values[path])
    except LookupError:
        rule = "must name a text encoding that Python knows"
        return {path: describe(path, values[path], rule, 'for example "utf-8" or "latin-1"')}
    return {}


def _block(values: Values) -> Problems:
    dim, block = values["model.dim"], values["model.block"]
    divisors = [size for size in range(1, min(dim, block) + 1) if dim % size == 0]
    if dim % block:
        rule, remedy = f"must divide model.dim = {dim}", f"use {divisors[-1]}"
    elif values["model.compression"] > 1 and dim == block:
        rule = f"a compressed model.dim = {dim} needs two blocks or more, or whole items collide"
        remedy = f"use {divisors[-2]}" if dim > 1 else "raise model.dim"
    else:
        return {}
    return {"model.block": describe("model.block", block, rule, remedy)}


def _warmup(values: Values) -> Problems:
    path, rounds = "train.warmup_rounds", values["train.rounds"]
    if values[path] <= rounds:
        return {}
    return {path: describe(path, values[path], f"must not exceed train.rounds = {rounds}", _LOWER)}


_LOWER = "lower it or train for longer"


def _top_k(values: Values) -> Problems:
    cuts = list(values["run.top_k"])
    if len(set(cuts)) == len(cuts):
        return {}
    remedy = f"use {as_toml(sorted(set(cuts)))}"
    return {"run.top_k": describe("run.top_k", cuts, "must not repeat a cut-off", remedy)}


def _clip(values: Values) -> Problems:
    path = "privacy.clip_norm"
    if values["privacy.noise"] == "none" or values[path] is not None:
        return {}
    rule = f"privacy.noise = {as_toml(values['privacy.noise'])} needs a bound on each update"
    return {path: f"{path} is unset: {rule}; set it, for example to 1.0"}


def _budget(values: Values) -> Problems:
    epsilon, multiplier = values["privacy.epsilon"], values["privacy.noise_multiplier"]
    if values["privacy.noise"] == "none":
        return _without_noise(values)
    if epsilon is None and multiplier is None:
        rule = (
            f"privacy.noise = {as_toml(values['privacy.noise'])} needs a target ε or a multiplier"
        )
        remedy = "set privacy.epsilon, for example to 8, or privacy.noise_multiplier"
        return {"privacy.epsilon": f"privacy.epsilon is unset: {rule}; {remedy}"}
    if epsilon is not None and multiplier is not None:
        rule = f"excludes privacy.noise_multiplier = {multiplier}, since each decides the other"
        return {"privacy.epsilon": describe("privacy.epsilon", epsilon, rule, "remove one of them")}
    return {}


def _without_noise(values: Values) -> Problems:
    rule = 'privacy.noise = "none" gives no guarantee at all'
    return {
        path: describe(
            path, values[path], rule, f'set privacy.noise = "central" or remove it (-s {path}=)'
        )
        for path in ("privacy.epsilon", "privacy.noise_multiplier")
        if values[path] is not None
    }


def _tiers(values: Values) -> Problems:
    path, tiers = "devices.tiers", values["devices.tiers"]
    if not tiers:
        return {}
    tiers = [tier if isinstance(tier, Mapping) else tier.model_dump() for tier in tiers]
    rule = _tier_rule(tiers)
    if rule is None:
        return {}
    remedy = "for example [{capacity = 1.0, share = 0.5}, {capacity = 0.25, share = 0.5}]"
    return {path: describe(path, tiers, rule, remedy)}


def _tier_rule(tiers: Sequence[Mapping[str, Any]]) -> str | None:
    """The first rule that the tiers break."""
    if any((tier.get("capacity") is None) == (tier.get("memory_kib") is None) for tier in tiers):
        return "each tier has one of capacity and memory_kib"
    capacities = [tier["capacity"] for tier in tiers if tier.get("capacity") is not None]
    if any(capacity and math.frexp(capacity)[0] != 0.5 for capacity in capacities):
        return "a capacity is a power of two, 1, 0.5, 0.25 and so on, or memories do not nest"
    if len(set(capacities)) < len(capacities):
        return "two tiers of one capacity are the same tier"
    if abs(sum(tier["share"] for tier in tiers) - 1) > 1e-6:
        return f"the shares must add up to 1, and they give {sum(t['share'] for t in tiers):g}"
    if not any(tier.get("weight", 1.0) and tier.get("capacity") != 0 for tier in tiers):
        return "a tier of weight 0 or capacity 0 does not train, and then nobody does"
    return None


def _nesting(values: Values) -> Problems:
    path, nesting, popularity = (
        "devices.nesting",
        values["devices.nesting"],
        values["devices.popularity"],
    )
    order = nesting or ("fold" if popularity is None else "rows")
    sampled = values["train.selector"] == "popularity" and popularity == "public"
    # The words of a vocabulary are in this order however they are nested.
    sampled = sampled or values["data.source"] in OF_WORDS
    if order == "rows" and popularity is None:
        rule = "the order of the rows must come from somewhere"
        remedy = 'set devices.popularity = "public" or "released"'
    elif order != "rows" and popularity is not None and not sampled:
        rule = f"devices.popularity = {as_toml(popularity)} orders rows, which are not used"
        remedy = 'set nesting = "rows" or remove popularity (-s devices.popularity=)'
    elif order != "fold" and values["model.compression"] > 1:
        rule = f"model.compression = {values['model.compression']} needs a hashed memory"
        remedy = 'use nesting = "fold", or model.compression = 1'
    elif order == "dims" and values["model.kind"] != "gmf":
        rule = f"the network of model.kind = {as_toml(values['model.kind'])} has one input width"
        remedy = 'use model.kind = "gmf", or nesting = "fold"'
    else:
        return {}
    return {path: describe(path, nesting, rule, remedy)}


def _popularity(values: Values) -> Problems:
    path, epsilon = "devices.popularity_epsilon", values["devices.popularity_epsilon"]
    released = values["devices.popularity"] == "released"
    if released and epsilon is None:
        rule = 'devices.popularity = "released" is charged'
        return {path: f"{path} is unset: {rule}; set it, for example to 0.5"}
    if epsilon is not None and not released:
        rule = "there is no release to charge"
        remedy = f'set devices.popularity = "released" or remove it (-s {path}=)'
        return {path: describe(path, epsilon, rule, remedy)}
    return {}


def _aggregation(values: Values) -> Problems:
    path = "devices.aggregation"
    if values[path] != "fair_averaging":
        return {}
    allowed = {
        "model.kind": ("gmf",),
        "privacy.noise": ("none",),
        "train.server_optimizer": ("fedavg", "newton"),
    }
    for key, options in allowed.items():
        if values[key] not in options:
            rule = f"FAIR's plain average of item memories has no {key} = {as_toml(values[key])}"
            return {path: describe(path, values[path], rule, f"set {key} = {as_toml(options[0])}")}
    if (values["devices.nesting"] or "fold") != "fold" or values["devices.popularity"] is not None:
        rule = "FAIR averages folded memories"
        return {path: describe(path, values[path], rule, 'use devices.nesting = "fold"')}
    return {}


def _ials(values: Values) -> Problems:
    path = "train.loss"
    if values[path] != "ials":
        if values["train.server_optimizer"] != "newton":
            return {}
        rule = 'train.server_optimizer = "newton" has its curvature from implicit ALS'
        return {path: describe(path, values[path], rule, 'set train.loss = "ials"')}
    needed = {"model.kind": "gmf", "model.item_bias": False, "train.local_steps": 1}
    for key, value in needed.items():
        if values[key] != value:
            rule = f"its sum over all items needs {key} = {as_toml(value)}"
            return {path: describe(path, values[path], rule, f"set {key}, or use another loss")}
    return {}


def _selector(values: Values) -> Problems:
    path, selector = "train.selector", values["train.selector"]
    if selector == "each" and values["train.serve_budget"] is not None:
        path = "train.serve_budget"
        rule = 'train.selector = "each" has no budget'
        return {path: describe(path, values[path], rule, "set a selector, or remove it")}
    if selector == "each" or values["data.source"] in OF_WORDS:
        return {}
    if values["train.loss"] != "softmax":
        rule = "a shared budget of negatives is a sample of a softmax"
        return {path: describe(path, selector, rule, 'set train.loss = "softmax"')}
    if selector == "popularity" and values["devices.popularity"] != "public":
        rule = "it draws by counts that everybody knows"
        remedy = 'set devices.popularity = "public", which declares them so'
        return {path: describe(path, selector, rule, remedy)}
    if selector not in ("uniform", "popularity") and values["model.kind"] != "gmf":
        rule = f"the network of model.kind = {as_toml(values['model.kind'])} has no nearest items"
        return {path: describe(path, selector, rule, 'use model.kind = "gmf", or "uniform"')}
    return {}


_LOCAL = "privacy.local"


def _local(values: Values) -> Problems:
    """Example-level noise: what it needs, and what would undo it."""
    if values[_LOCAL] == "none":
        return _without_local(values)
    if values["model.kind"] in WIDE:
        return {}  # refused as such
    needed = {
        "train.loss": (("bce", "bpr"), "each example has a loss of its own"),
        "train.selector": (("each",), "negatives must not depend on the history"),
        "train.user_steps": ((0,), "a user vector fitted without noise would show the examples"),
        "train.max_samples": ((None,), "a window of the history moves with every example"),
        "devices.aggregation": (("sum", "contributors"), "updates have noise everywhere"),
    }
    for path, (options, reason) in needed.items():
        if values[path] not in options:
            rule = f'privacy.local = "example" cannot have it: {reason}'
            remedy = f"remove it (-s {path}=)" if options[0] is None else ""
            remedy = remedy or f"set {path} = {as_toml(options[0])}"
            return {path: describe(path, values[path], rule, remedy)}
    return _local_noise(values)


def _local_noise(values: Values) -> Problems:
    clip, epsilon, multiplier = (
        f"privacy.local_{name}" for name in ("clip_norm", "epsilon", "noise_multiplier")
    )
    if values[clip] is None:
        rule = 'privacy.local = "example" needs a bound on each interaction'
        return {clip: f"{clip} is unset: {rule}; set it, for example to 1.0"}
    if values[epsilon] is None and values[multiplier] is None:
        rule = 'privacy.local = "example" needs a target ε or a multiplier'
        return {epsilon: f"{epsilon} is unset: {rule}; set it, for example to 8"}
    if values[epsilon] is not None and values[multiplier] is not None:
        rule = f"excludes {multiplier} = {values[multiplier]}, since each decides the other"
        return {epsilon: describe(epsilon, values[epsilon], rule, "remove one of them")}
    return {}


def _without_local(values: Values) -> Problems:
    rule = 'privacy.local = "none" protects no single interaction'
    return {
        path: describe(path, values[path], rule, f"set {_LOCAL} or remove it (-s {path}=)")
        for path in (f"privacy.local_{n}" for n in ("clip_norm", "epsilon", "noise_multiplier"))
        if values[path] is not None
    }


_RULES: tuple[Callable[[Values], Problems], ...] = (
    _synthetic,
    _encoding,
    _block,
    _warmup,
    _top_k,
    _clip,
    _budget,
    _tiers,
    _nesting,
    _popularity,
    _aggregation,
    _ials,
    _selector,
    _local,
    texts,
)
