"""Kinds: readers, models, losses, selectors and server optimisers, each with keys of its own.

Some keys of a scenario name a kind, as ``train.loss = "bce"`` does. A :class:`Registry` holds the
kinds that such a key can name: a configuration class, whose fields are further keys of the same
table, and the implementation, which is imported when it is needed. A key that the chosen kind does
not have is refused. A kind outside of this package adds itself by the same call, before a scenario
that names it is loaded::

    class Adagrad(Section):
        '''AdaGrad: steps shorten as squared changes add up.'''

        accumulator: float = setting(0.1, "(0, 100]")
        '''Where the sum of squares begins.'''

    SERVER_OPTIMIZERS.add("adagrad", Adagrad, "mine.optimizers:AdaGrad")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Values = Mapping[str, Any]
"""Values by dotted path with defaults; malformed keys and those of other kinds are absent."""
Problem = tuple[str, str, str]
"""A dotted key, the rule that it breaks, and the remedy."""
Material = str
"""What a reader gives and a model learns from: ``interactions``, ``texts`` or ``labels``."""


@dataclass(frozen=True)
class Need:
    """What a kind needs of another key: one of ``options``, the first of which is the remedy."""

    path: str
    options: tuple[Any, ...]
    reason: str


class Section(BaseModel):
    """A frozen table that refuses unknown keys, conversions and values that are not finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    needs: ClassVar[tuple[Need, ...]] = ()
    registries: ClassVar[tuple[Registry, ...]] = ()

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """What is wrong between this kind's keys and others; most kinds say it by ``needs``."""
        return iter(())

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> type[Self]:
        """The class of a table with these keys."""
        return cls


def setting(default: Any, within: str = "", *, unit: str = "", **rules: Any) -> Any:
    """A field, as pydantic's ``Field`` makes it; the docstring below it says what it means.

    ``within`` is the interval of a number and what it counts, for example ``(0, 10^6] rounds``;
    ``unit`` is what a value without an interval counts.
    """
    if within:
        low, high, unit = re.fullmatch(r"[\[(](.+), (.+)[\])] ?(.*)", within).groups()  # type: ignore[union-attr]
        rules["ge" if within[0] == "[" else "gt"] = _number(low)
        if high != "∞":
            rules["le" if f"{high}]" in within else "lt"] = _number(high)
    return Field(default, json_schema_extra={"unit": unit}, **rules)


def _number(text: str) -> float:
    base, _, power = text.partition("^")
    number: float = int(base) ** int(power or 1) if base.isdigit() else float(text)
    return number


def as_tuple(value: object) -> object:
    """A TOML list as the tuple that a frozen model holds; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Kind:
    """One kind: its keys, what implements it, and its help in one line.

    The implementation is the object itself, or ``package.module:name`` to import it late.
    """

    name: str
    config: type[Any]
    implementation: Any
    meaning: str

    def load(self) -> Any:
        """The implementation, imported now where it is named by a text."""
        if isinstance(self.implementation, str):
            return resolve_name(self.implementation)
        return self.implementation


class Registry(dict[str, Kind]):
    """The kinds that the key ``path`` of a scenario can name; messages call one a ``noun``."""

    def __init__(self, path: str, noun: str) -> None:
        super().__init__()
        self.path, self.noun, self.key = path, noun, path.partition(".")[2]

    def add(
        self, name: str, config: type[Section], implementation: Any = None, *, meaning: str = ""
    ) -> None:
        """Add a kind, or replace the one of that name; its configuration's docstring is its help.

        What the implementation has to be is said where it is used.
        """
        meaning = meaning or (config.__doc__ or "").partition("\n")[0]
        self[name] = Kind(name, config, implementation, meaning)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """As metadata of a text: it names one of the kinds."""
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self)}

    def _known(self, name: str) -> str:
        if name not in self:
            raise PydanticCustomError("kind", "there is no such kind")
        return name

    def owners(self, key: str) -> list[str]:
        """Names of the kinds that have a key of this name."""
        return [kind.name for kind in self.values() if key in kind.config.model_fields]


READERS = Registry("data.source", "source")
MODELS = Registry("model.kind", "model")
LOSSES = Registry("train.loss", "loss")
SELECTORS = Registry("train.selector", "selector")
SERVER_OPTIMIZERS = Registry("train.server_optimizer", "optimiser")
REGISTRIES = (READERS, MODELS, LOSSES, SELECTORS, SERVER_OPTIMIZERS)


class Table(Section):
    """A table whose kinds add keys: an object is of a class that has those of its kinds too.

    ``isinstance(scenario.train, ImplicitALS)`` says that the loss is that one, and then its keys
    are there: ``scenario.train.item_l2``.
    """

    composed: ClassVar[bool] = False

    if TYPE_CHECKING:  # keys of kinds, which no static type can know

        def __getattr__(self, name: str) -> Any: ...

    def __new__(cls, **keys: Any) -> Self:
        return object.__new__(cls if cls.composed else cls.of(keys))

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> type[Self]:
        """The class of a table with these keys; an unknown kind is taken for its nearest."""
        found = [cls._kind(registry, keys) for registry in cls.registries]
        return _with_keys(cls, tuple(dict.fromkeys(kind.config for kind in found if kind)))

    @classmethod
    def _kind(cls, registry: Registry, keys: Mapping[str, Any]) -> Kind | None:
        """The kind that these keys name, else the one that was most likely meant."""
        name = str(keys.get(registry.key, cls.model_fields[registry.key].default))
        if name in registry:
            return registry[name]
        near = get_close_matches(name.lower(), registry, n=1, cutoff=0.6)
        return registry[near[0]] if near else None

    @model_validator(mode="wrap")
    @classmethod
    def _in_its_own_class(cls, given: Any, handler: Any) -> Any:
        if cls.composed or not isinstance(given, Mapping):
            return handler(given)
        own = cls.of(given)
        # What may belong to a kind that there is not is no problem of its own.
        unknown = [r for r in cls.registries if cls._kind(r, given) is None]
        foreign = {key for key in given if any(r.owners(key) for r in unknown)}
        kept = own.model_fields.keys() | (given.keys() - foreign)
        return own.model_validate({key: given[key] for key in given if key in kept})


@cache
def _with_keys(table: type[Any], configs: tuple[type[Section], ...]) -> type[Any]:
    """The class of ``table`` that has the keys of ``configs`` as well."""
    bases = (*(each for each in configs if each is not Section), table)
    words = {"__module__": table.__module__, "__doc__": table.__doc__, "composed": True}
    metaclass: Any = type(table)
    made: type[Any] = metaclass(table.__name__, bases, words)
    return made


# --------------------------------------------------------------------------- readers

PUBLISHED = {
    "ml-100k": (943, 1_682, 100_000),
    "ml-1m": (6_040, 3_706, 1_000_209),
    "ml-10m": (69_878, 10_677, 10_000_054),
    "ml-20m": (138_493, 26_744, 20_000_263),
    "ml-25m": (162_541, 59_047, 25_000_095),
}
"""Users, rated items and ratings of published sets: public, so `plan` needs no data for them."""

Column = Annotated[str, Field(min_length=1, max_length=200)] | Annotated[int, Field(ge=1, le=10**5)]


class Reader(Section):
    """Configuration of a source of data: ``gives`` says what it is made of."""

    gives: ClassVar[Material] = "interactions"


class _Files(Reader):
    path: str | None = setting(None, min_length=1, max_length=4096)
    """File or folder; `--data` and `PRIVREC_DATA` come first."""


class _Histories(Reader):
    max_history: int | None = setting(None, "[1, ∞) interactions")
    """The most recent interactions kept of each user."""


class _Vocabulary(Reader):
    gives = "texts"

    vocabulary: int | None = setting(None, "[2, 10^7]")
    """Most words or labels, the commonest; others are unknown."""


class _Drawn(Reader):
    limits: ClassVar[dict[str, tuple[str, int, int]]] = {}
    """Keys that ``data.items`` bounds: how a message calls the bound, what is taken off the items,
    and what the rest is divided by.
    """

    users: int = setting(400, "[2, 10^7] users")
    """Number of users that train."""
    items: int = setting(300, "[4, 10^7]")
    """Items; words or labels, with the unknown one."""
    clusters: int = setting(8, "[1, 10^4]")
    """Planted groups of taste, or topics."""
    interactions_per_user: int = setting(30, "[2, 10^5]")
    """Mean length of a history or a text; of labels, examples of a device."""
    seed: int = setting(0, "[0, 2^63)")
    """Seed of the generator."""

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """Groups and histories fit into the items."""
        for path, (bound, less, share) in cls.limits.items():
            if values[path] > (most := (values["data.items"] - less) // share):
                yield path, f"must not exceed {bound} = {most}", "lower it or raise data.items"


class Synthetic(_Drawn, _Histories):
    """Interactions drawn from planted groups of taste; needs no files."""

    limits: ClassVar = {
        "data.clusters": ("data.items", 0, 1),
        "data.interactions_per_user": ("data.items / 2", 0, 2),
    }


class FilesOfHistories(_Files, _Histories):
    """Files of users' interactions, as published."""


class DescribedHistories(FilesOfHistories):
    """Files of users' interactions with films, as published."""

    item_features: bool = False
    """Whether devices know genres, years and numbers of the films, and weigh them for their user:
    public, and no budget is spent on it.
    """


def _known_encoding(name: str) -> str:
    try:
        "a".encode(name)  # refuses what is no encoding of text, as base64
    except LookupError:
        rule = 'must name a text encoding that Python knows; for example "utf-8" or "latin-1"'
        raise PydanticCustomError("rule", "{rule}", {"rule": rule}) from None
    return name


class TableFile(FilesOfHistories):
    """A table of your own: CSV, TSV or Parquet."""

    user_column: Column = "user"
    """Column of user ids; numbers, from 1, where text has no header."""
    item_column: Column = "item"
    """Column of item ids."""
    time_column: Column | None = None
    """Column of times; unset, file order."""
    day_first: bool | None = None
    """Whether 03/04/2024 is the 3rd of April; unset, another date of the column tells."""
    rating_column: Column = "rating"
    """Column of ratings; read where `min_rating` is set."""
    min_rating: float | None = None
    """Least rating that makes a row an interaction; unset, every row is one."""
    duplicates: Literal["first", "last", "refuse"] = "first"
    """Which row is kept, in time, where a user and an item occur again."""
    min_user: int = setting(1, "[1, 10^6] interactions")
    """Fewest of a user, with items that are kept; others are left out."""
    min_item: int = setting(1, "[1, 10^6] users")
    """Fewest of an item, among users who are kept; others are left out."""
    titles: str | None = setting(None, min_length=1, max_length=4096)
    """File with `item_column` and `title_column` (by number: 1 and 2); beside the table, or in the
    working directory.
    """
    title_column: Column | None = None
    """Column of titles, in the file of `titles` (unset, `title`) or else in the table."""
    separator: str | None = setting(None, min_length=1, max_length=2)
    """Field separator; unset, the one of `,` tab `;` `|` `::` with which the columns are found."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] = setting(
        "utf-8", min_length=1, max_length=40
    )
    """Encoding of the file."""


class TextFiles(_Files, _Vocabulary):
    """Articles in `.txt` files, a device each; without a path, a small text of its own."""

    words: str | None = setting(None, min_length=1, max_length=4096)
    """File of a public vocabulary, a word a line; unset, all words of the text."""

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """A count that is released with noise is over words that everybody may know."""
        if values["devices.popularity"] == "released" and values["data.words"] is None:
            rule = "which words there are in private texts is private too"
            yield "data.words", rule, "name a public list of words"


class SyntheticText(_Drawn, _Vocabulary):
    """Texts drawn from topics; needs no files."""

    limits: ClassVar = {"data.clusters": ("data.items / 16", 0, 16)}


class LabelFile(_Files, _Vocabulary):
    """A file of the Extreme Classification Repository, its examples dealt to devices."""

    gives = "labels"

    interactions_per_user: int = setting(30, "[2, 10^5]")
    """Examples of a device."""
    seed: int = setting(0, "[0, 2^63)")
    """Seed by which examples are dealt."""


class SyntheticLabels(_Drawn, _Vocabulary):
    """Labelled examples drawn from topics; needs no files."""

    gives = "labels"
    limits: ClassVar = {"data.clusters": ("data.items - 1", 1, 1)}

    features: int = setting(10_000, "[1, 2^31) words")
    """Words of the world."""
    labels_each: float = setting(3.0, "[1, 1000] labels")
    """Mean labels of an example."""


READERS.add("synthetic", Synthetic, "privrec.data.synthetic:load_interactions")
_MOVIELENS = ("movielens", "A MovieLens set, of GroupLens or the NCF paper.")
for _name, (_load, _meaning) in {
    **dict.fromkeys(PUBLISHED, _MOVIELENS),
    "ncf": ("ncf", "A split as the NCF paper has it, with negatives."),
}.items():
    READERS.add(_name, DescribedHistories, f"privrec.data.published:load_{_load}", meaning=_meaning)
_LIGHTGCN = "A split as the LightGCN paper has it."
READERS.add("lightgcn", FilesOfHistories, "privrec.data.published:load_lightgcn", meaning=_LIGHTGCN)
READERS.add("table", TableFile, "privrec.data.published:load_table")
READERS.add("text", TextFiles, "privrec.data.texts:load_articles")
READERS.add("synthetic_text", SyntheticText, "privrec.data.synthetic:load_articles")
READERS.add("labels", LabelFile, "privrec.data.texts:load_examples")
READERS.add("synthetic_labels", SyntheticLabels, "privrec.data.synthetic:load_examples")


# --------------------------------------------------------------------------- models


Width = Annotated[int, Field(ge=1, le=4096)]


class Recommender(Section):
    """Configuration of a model over items.

    Where scores are inner products of item vectors (``inner_product``), items near to a user's
    vector can be searched, vectors be cut short, and sums over all items be had.
    """

    learns: ClassVar[Material] = "interactions"
    inner_product: ClassVar[bool] = False

    item_bias: bool = True
    """Whether each item has a bias of its own."""

    def dense_weights(self, dim: int) -> int:
        """Number of weights besides item vectors of length ``dim`` and biases."""
        return 0


class GMF(Recommender):
    """Matrix factorisation: an inner product of user and item."""

    inner_product = True

    rank_features: bool = False
    """With `nesting = "rows"`: whether devices weigh where items stand in the order of popularity,
    for their user.
    """


class Network(Recommender):
    """A network over user and item, of the NCF paper."""

    hidden: Annotated[tuple[Width, ...], BeforeValidator(as_tuple)] = setting(
        (64, 32, 16), unit="neurons", min_length=1, max_length=8
    )
    """Widths of the hidden layers."""

    def dense_weights(self, dim: int) -> int:
        """Layers over user and item side by side, and the output's weights."""
        widths = (2 * dim, *self.hidden)
        return sum((below + 1) * above for below, above in pairwise(widths)) + widths[-1]


class NeuMF(Network):
    """Matrix factorisation and a network, each over a half of the vectors."""

    def dense_weights(self, dim: int) -> int:
        """Those of the network over the second half."""
        return super().dense_weights(dim - dim // 2)


class WideOutput(Section):
    """Configuration of a model whose output layer is over all words or labels."""

    learns: ClassVar[Material] = "texts"
    inner_product: ClassVar[bool] = False
    item_bias: ClassVar[bool] = True
    needs = tuple(
        Need(path, options, "a wide output does not have it")
        for path, options in {
            "privacy.local": ("none",),
            "train.loss": ("softmax", "full_softmax"),
            "train.serve_budget": (None,),
            "train.serve_recency": (0.0,),
            "run.engine": ("cohort",),
            "devices.popularity": ("public", "released"),
            "devices.aggregation": ("sum", "contributors"),
            "run.baselines": (("popularity",), ()),
        }.items()
    )

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """A sampled softmax chooses its neurons by a selector, whose shares add up."""
        if values["train.loss"] == "softmax" and values["train.selector"] in ("each", "popularity"):
            rule = "a sampled softmax chooses its neurons, common words as a share of the budget"
            remedy = 'set train.selector = "uniform" (and train.frequent), or loss = "full_softmax"'
            yield "train.selector", rule, remedy
        if values["train.loss"] == "full_softmax" and values["train.selector"] != "each":
            rule = "all neurons are active under the full softmax"
            yield "train.selector", rule, 'remove it, or set train.loss = "softmax"'
        if (selected := values.get("train.selected", 0.0)) + values["train.frequent"] > 1:
            rule = f"with train.selected = {selected} it is more than the budget"
            yield "train.frequent", rule, "lower one of them"


class NextWord(WideOutput):
    """A small Transformer over words."""

    ffn: int = setting(1536, "[1, 10^6] neurons")
    """Width of the feed-forward layer."""
    heads: int = setting(8, "[1, 256]")
    """Heads of the attention; they divide `dim`."""
    layers: int = setting(1, "[1, 64]")
    """Layers of the Transformer."""
    context: int = setting(20, "[1, 4096] words")
    """Words that a prediction looks back at."""

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """Heads divide the vector."""
        if values["model.dim"] % values["model.heads"]:
            rule = f"must divide model.dim = {values['model.dim']}"
            yield "model.heads", rule, "use 1, 2, 4 or 8"
        yield from super().conflicts(values)

    def dense_weights(self, dim: int) -> int:
        """Positions, attention and feed-forward layers with their norms, and the last norm."""
        attention, norms = 4 * dim * (dim + 1), 4 * dim
        feed_forward = (dim + 1) * self.ffn + (self.ffn + 1) * dim
        return (self.context + 2) * dim + self.layers * (attention + feed_forward + norms)


class Extreme(WideOutput):
    """A bag of words over very many labels."""

    learns = "labels"

    features: int = setting(8192, "[1, 10^7] words")
    """Vocabulary that input words are hashed to."""

    def dense_weights(self, dim: int) -> int:
        """Vectors of the input words, and the hidden layer's bias."""
        return (self.features + 1) * dim


MODELS.add("gmf", GMF, "privrec.models.ncf:NCF")
MODELS.add("mlp", Network, "privrec.models.ncf:NCF")
MODELS.add("neumf", NeuMF, "privrec.models.ncf:NCF")
MODELS.add("next_word", NextWord, "privrec.models.words:NextWord")
MODELS.add("extreme", Extreme, "privrec.models.words:WordBag")


# --------------------------------------------------------------------------- losses


class Sampled(Section):
    """A loss over positives and sampled negatives."""

    negatives: int = setting(4, "[1, 1000] items")
    """Sampled negatives for each positive."""
    serve_negatives: int = setting(8, "[1, 1000] items")
    """The same in the fit of a user vector from nothing."""


class _Ranked(Section):
    """A softmax, under which popular items would take most of a bounded update."""

    rank_power: float = setting(0.0, "[0, 1]")
    """With `nesting = "rows"`: the gradient of the item of rank r is multiplied by
    (1 + r / 100)^this before the update is clipped, for rarer items to have their part of it.
    """


class Softmax(_Ranked, Sampled):
    """Softmax over a positive and sampled negatives."""


class FullSoftmax(_Ranked):
    """Softmax over all items; of a budget of negatives, an estimate of it."""

    shared_curvature: bool = False
    """Newton steps have the curvature of a user without a history: faster, but twice as many."""

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """Only where all devices look at the same rows is there a curvature to share."""
        path, model = "train.shared_curvature", MODELS[values["model.kind"]].config
        plain = values["train.selector"] == "each" and values["privacy.local"] == "none"
        if values[path] and not (plain and model.inner_product):
            rule = 'it takes selector = "each", model.kind = "gmf" and privacy.local = "none"'
            yield path, rule, f"set these, or remove it (-s {path}=)"


class ImplicitALS(Section):
    """Implicit ALS, a weighted square loss over all items; samples nothing."""

    needs = (
        Need("model.kind", ("gmf",), "it sums over all items"),
        Need("model.item_bias", (False,), "it sums over all items"),
        Need("train.local_steps", (1,), "its curvature is that of one step"),
    )

    unobserved_weight: float = setting(0.1, "(0, 1000]")
    """Weight of each item of the catalogue beside those of the history."""
    item_l2: float = setting(1e-5, "(0, 1000]")
    """L2 penalty on items, in the mean over users."""
    gram_rate: float = setting(1.0, "(0, 1]")
    """How fast the users' Gram matrix follows that of the round."""


for _name, _config, _meaning in (
    ("bce", Sampled, "Binary cross-entropy."),
    ("bpr", Sampled, "Bayesian personalised ranking."),
    ("softmax", Softmax, ""),
    ("full_softmax", FullSoftmax, ""),
    ("ials", ImplicitALS, ""),
):
    LOSSES.add(_name, _config, f"privrec.models.losses:{_name.upper()}", meaning=_meaning)


# --------------------------------------------------------------------------- selectors


class Each(Section):
    """`negatives` for each positive."""


class Budgeted(Section):
    """A budget that all positives of a device share, drawn by chance."""

    needs: ClassVar[tuple[Need, ...]] = (
        Need("train.loss", ("softmax", "full_softmax"), "a shared budget is a sample of a softmax"),
    )

    budget: float = setting(0.01, "(0, 1] share of the catalogue")
    """Negatives of a device; of texts, its active neurons, its own words included."""
    serve_budget: float | None = setting(None, "(0, 1] share of the catalogue")
    """The same in the fit of a user vector from nothing; 1 takes every item once and samples
    nothing. Unset, that of training.
    """
    frequent: float = setting(0.0, "[0, 0.9] share")
    """Texts, labels: share of the budget that is the commonest."""

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """Only words and labels are in the order of how common they are."""
        learns = MODELS[values["model.kind"]].config.learns
        if values["train.frequent"] and learns == "interactions":
            yield "train.frequent", "it belongs to texts and labels", "remove it"


class ByPopularity(Budgeted):
    """A shared budget, drawn by counts that everybody knows."""

    needs = (
        *Budgeted.needs,
        Need("devices.popularity", ("public",), "it draws by counts that everybody knows"),
    )


class Searching(Budgeted):
    """A shared budget, a part of which a device selects from its own copy of the memory."""

    selected: float = setting(0.5, "[0, 0.9] share")
    """Share of the budget that is selected; the rest is by chance."""

    @classmethod
    def conflicts(cls, values: Values) -> Iterator[Problem]:
        """Vectors are searched where scores are inner products, of hidden states too."""
        kind = values["model.kind"]
        config = MODELS[kind].config
        if not config.inner_product and config.learns == "interactions":
            rule = f'the network of model.kind = "{kind}" has no nearest items'
            yield "train.selector", rule, 'use model.kind = "gmf", or "uniform"'
        yield from super().conflicts(values)


class SimHash(Searching):
    """Selects by SimHash tables over whole vectors."""

    scheme: Literal["private", "requested"] = "private"
    """Texts: devices select neurons from their own copy, or ask the server for buckets of neurons,
    which tells it about their text.
    """


SELECTORS.add("each", Each)
SELECTORS.add("uniform", Budgeted, "privrec.search.select:chance")
SELECTORS.add("popularity", ByPopularity)
for _name, _searching, _meaning in (
    ("scan", Searching, "Selects by exact scores."),
    ("hamming", Searching, "Selects by the Hamming distance of signatures."),
    ("sketch", Searching, "Selects by scores of a sketch of few dimensions."),
    ("simhash", SimHash, ""),
    ("pghash", Searching, "Selects by tables of projections folded onto blocks."),
    ("block_sign", Searching, "Selects by signs of the memory's blocks."),
):
    SELECTORS.add(_name, _searching, f"privrec.search.select:{_name}", meaning=_meaning)
SELECTORS.add("auto", Searching, meaning="Selects by the cheapest of the good rankings.")


# --------------------------------------------------------------------------- server optimisers


class FedAvg(Section):
    """Plain averaging of the updates."""


class FedAdam(Section):
    """Adam on the mean update (Reddi et al., 2021)."""

    beta1: float = setting(0.9, "[0, 1)")
    """Decay of the first moment."""
    beta2: float = setting(0.99, "[0, 1)")
    """Decay of the second moment."""
    adam_eps: float = setting(1e-8, "(0, 1]")
    """Added to the root of the second moment."""


class SGD(Section):
    """Gradient descent with momentum."""

    momentum: float = setting(0.9, "[0, 1)")
    """Momentum."""


class Newton(Section):
    """Averages steps that devices precondition by the users' Gram matrix."""

    needs = (Need("train.loss", ("ials",), "its curvature is that of implicit ALS"),)


SERVER_OPTIMIZERS.add("fedavg", FedAvg, "privrec.server.optimizer:FedAvg")
SERVER_OPTIMIZERS.add("fedadam", FedAdam, "privrec.server.optimizer:FedAdam")
SERVER_OPTIMIZERS.add("sgd", SGD, "privrec.server.optimizer:Sgd")
SERVER_OPTIMIZERS.add("newton", Newton, "privrec.server.optimizer:FedAvg")
