"""The rules between keys of a scenario over texts or labelled examples."""

from __future__ import annotations

from collections.abc import Mapping
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
