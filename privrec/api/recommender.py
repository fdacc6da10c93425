"""A recommender as an estimator: fit, recommend, evaluate, save, over the runs of a scenario."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Iterable, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import pyarrow
from numpy.typing import NDArray

from privrec.api.inputs import as_table, stored
from privrec.data import Interactions, ItemLists, Split, leave_last_out
from privrec.data import load as load_data
from privrec.data.interactions import row_bounds
from privrec.data.own import read_table
from privrec.data.sniff import look_at
from privrec.device.samples import Histories
from privrec.errors import BudgetError, DataError, Interrupted, UsageError
from privrec.evaluate import metrics
from privrec.evaluate.evaluator import scores_with
from privrec.privacy.events import Adversary
from privrec.privacy.ledger import Ledger
from privrec.report.build import build
from privrec.report.render import replace_text, to_html, to_json, to_markdown, write
from privrec.run import directory, lifecycle
from privrec.run.export import tables_of
from privrec.run.progress import ConsoleObserver
from privrec.run.recommend import NONE, TrainedModel
from privrec.run.record import Observer
from privrec.scenario.defaults import private_settings
from privrec.scenario.keys import is_key
from privrec.scenario.load import Scenario
from privrec.scenario.load import load as load_scenario
from privrec.scenario.schema import TABLES, Data
from privrec.storage import parsed, verified

Id: TypeAlias = int | str
Name: TypeAlias = str | PathLike[str]
Form: TypeAlias = Literal["arrow", "pandas", "polars", "arrays"]
REPORTS = {".html": to_html, ".md": to_markdown, ".json": to_json}

_BARE = 'name = "recommender"\n[privacy]\nnoise = "none"\n'


class Recommender:
    """A recommender that learns on simulated devices, within a user-level privacy budget.

    Every :meth:`fit` is a run as ``privrec run`` makes it: with a ledger, a signed result, a
    report, and the scenario that repeats it. What is not set has defaults that suit the size of the
    data and the noise.

    Settings are keys of a scenario by their own names: ``rounds=40`` is ``train.rounds``. Where two
    tables have one of that name, the table comes first: ``run__seed``, ``data__seed``.

    Args:
        model: ``model.kind``: ``"gmf"``, ``"mlp"`` or ``"neumf"``.
        dim: length of an item vector.
        epsilon: the budget, user-level ε at ``delta``; ``math.inf`` trains without noise.
        scenario: what is not set comes from this one, a path or a scenario that is loaded.
        folder: where the run is kept, new or empty; without one, in a temporary place that goes
            with the recommender unless it is saved, or stopped before its end.
        random_state: seed of everything that is not secret. Noise, the cohorts that it hides in and
            the rounding of updates come from the secure generator, so two fits of one seed differ.
        progress: whether to show each round, on a terminal, in a notebook or in a log; or who
            watches instead.
        **settings: further keys.

    Raises:
        UsageError: when there is no such key, or a name stands for several.

    Examples:
        >>> import privrec
        >>> data = {"user": [1, 1, 2, 2, 3, 3], "item": ["a", "b", "b", "c", "a", "c"]}
        >>> model = privrec.Recommender(dim=8, epsilon=8, rounds=3, progress=False).fit(data)
        >>> model.recommend(users=[1, 2], k=1)["user"].to_pylist()
        [1, 2]
        >>> round(model.epsilon("server"), 1)
        8.0
    """

    def __init__(
        self,
        model: str | None = None,
        dim: int | None = None,
        epsilon: float | None = None,
        *,
        scenario: Name | Scenario | None = None,
        folder: Name | None = None,
        random_state: int | None = None,
        progress: bool | Observer = True,
        **settings: Any,
    ) -> None:
        seed = None if random_state is None else int(random_state)
        named = {"model.kind": model, "model.dim": dim, "run.seed": seed}
        self._settings = {path: value for path, value in named.items() if value is not None}
        self._settings |= {_path(name): value for name, value in settings.items()}
        self._epsilon = epsilon
        if isinstance(scenario, str | PathLike):
            scenario = load_scenario(Path(scenario))
        self._base = scenario
        self._folder = None if folder is None else Path(folder)
        self._progress = progress
        self._model: TrainedModel | None = None
        self._stopped: Path | None = None

    @classmethod
    def load(cls, folder: Name, *, data_dir: Name | None = None) -> Self:
        """Return the recommender of a finished run; see :func:`load`."""
        found = cls(folder=folder)
        found._model = TrainedModel.read(
            folder, data_dir=None if data_dir is None else Path(data_dir)
        )
        found._base = found._model.scenario
        return found

    # ------------------------------------------------------------------ learning

    def fit(self, data: Any = None, **columns: Any) -> Self:
        """Train on interactions, and return this recommender.

        The last interaction of each user is held out to measure, by time if there are times and
        else by the order of the rows.

        Args:
            data: a path of a table (CSV, TSV, Parquet); a data frame of pandas or polars, or
                whatever else Arrow reads; a mapping of columns; an array of rows or a tuple of
                columns (users, items, perhaps times); a matrix of SciPy, users by items; or the
                package's own ``Interactions`` or ``Split``. None: what the scenario names.
            **columns: keys of ``[data]``, such as ``user_column`` and ``min_rating``. Columns that
                are not named are found as ``privrec init`` does, by what they are called.

        Raises:
            DataError: when the data is malformed.
            UsageError, ScenarioError: when a setting is wrong, or the folder is taken.
            BudgetError: when the budget ran out; the model is there as far as it came.
            Interrupted: on Ctrl-C, after a checkpoint in ``folder``, which :func:`privrec.resume`
                goes on from.
        """
        split, scenario = self._planned(data, columns)
        folder, going = self._folder, None
        if folder is None:
            temporary = mkdtemp(prefix="privrec-")
            going = weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            folder = Path(temporary) / "run"
        observer = self._progress
        if not isinstance(observer, Observer):
            observer = ConsoleObserver() if observer else Observer()
        try:
            with observer:
                lifecycle.start(scenario, out=folder, split=split, observer=observer)
        except BudgetError:
            if (folder / "result.json").exists():
                self._model = TrainedModel.read(folder, given=split)
            raise
        except Interrupted:
            self._stopped = folder
            if going is not None:
                going.detach()
            raise
        self._model = TrainedModel.read(folder, given=split)
        return self

    def _planned(self, data: Any, columns: Mapping[str, Any]) -> tuple[Split, Scenario]:
        """The data and the scenario of a run on it."""
        settings = self._settings | {f"data.{key}": value for key, value in columns.items()}
        base = Scenario.from_toml(_BARE) if self._base is None else self._base
        if data is None and self._base is None and "data.source" not in settings:
            raise UsageError("fit: there is no data; give some, or a scenario that names it")
        if data is None:
            split = load_data(_form(base, settings))
        elif isinstance(data, str | PathLike):
            settings = _looked_at(Path(data).resolve(), base, settings)
            split = load_data(_form(base, settings))
        elif isinstance(data, Interactions | Split):
            settings = {"data.source": "table"} | settings
            holdout = _form(base, settings).holdout
            split = data if isinstance(data, Split) else leave_last_out(data, holdout=holdout)
        else:
            with stored(as_table(data, settings.get("run.seed", base.run.seed))) as path:
                settings = _looked_at(path, base, settings) | {"data.path": None}
                split = load_data(_form(base, settings), data_dir=path)
        if isinstance(dim := settings.get("model.dim"), int):
            settings = {"model.block": math.gcd(dim, base.model.block)} | settings
        if self._base is None:
            settings = self._fitting(split.train, settings) | settings
        return split, base.with_settings(settings | self._budget(base, settings))

    def _fitting(self, train: Interactions, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that fit the size of the data and the noise, unless it is another's choice."""
        budget = self._epsilon if self._epsilon is not None and self._epsilon > 0 else 8.0
        if settings.get("privacy.noise") == "none":
            budget = math.inf
        sizes = train.n_users, train.n_items, train.size
        tables = private_settings(*sizes, epsilon=budget, timed=train.times is not None)
        found = {f"{table}.{key}": tables[table][key] for table in tables for key in tables[table]}
        if "privacy.noise_multiplier" in settings or math.isinf(budget):
            del found["privacy.epsilon"]
        return found

    def _budget(self, base: Scenario, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the privacy that ``epsilon`` asks for."""
        if self._epsilon is None:
            return {}
        none = {"privacy.noise_multiplier": None}
        if math.isinf(self._epsilon):
            return {**none, "privacy.noise": "none", "privacy.epsilon": None}
        noise = settings.get("privacy.noise", base.privacy.noise)
        if noise == "none" and "privacy.noise" not in self._settings:
            noise = "central"
        clip = settings.get("privacy.clip_norm", base.privacy.clip_norm) or 1.0
        noisy = {"privacy.noise": noise, "privacy.clip_norm": clip}
        return {**none, **noisy, "privacy.epsilon": float(self._epsilon)}

    @property
    def model(self) -> TrainedModel:
        """The model that was trained or loaded; UsageError before."""
        if self._model is None:
            raise UsageError("there is no model yet; call fit, or load one by privrec.load(folder)")
        return self._model

    @property
    def folder(self) -> Path:
        """The run's folder: model, catalogue, ledger and result, or where a stopped one goes on."""
        return self._stopped if self._model is None and self._stopped else self.model.path

    @property
    def scenario(self) -> Scenario:
        """What ran, all values resolved; it is in the folder as ``scenario.toml`` too."""
        return self.model.scenario

    # ------------------------------------------------------------------ answers

    def recommend(
        self,
        users: Id | Iterable[Id] | None = None,
        k: int = 10,
        *,
        filter_seen: bool = True,
        form: Form = "arrow",
    ) -> Any:
        """Return the ``k`` best items for one user of the data, some, or all.

        A list follows from all that the user has, so it is as private as that: no ε covers it.

        Args:
            users: an id, several, or None for all, in the order of ``user_ids``.
            filter_seen: whether to leave out what a user has already, the held-out item included.
            form: ``"arrow"``, ``"pandas"`` or ``"polars"``: a table of ``user``, ``rank``,
                ``item``, ``title`` (where there are titles) and ``score``. ``"arrays"``: items and
                scores, ``(m, k)`` each, masked where a list is shorter.

        Raises:
            UnknownIdError: when there is no such user.
        """
        several = [users] if isinstance(users, int | str | np.integer) else users
        chosen = self.model.users(several)
        names = self.model.split.train.user_ids[chosen]
        return self._lists(self.model.owned(chosen), k, filter_seen, form, names)

    def recommend_history(
        self,
        items: Iterable[Id] | Path,
        k: int = 10,
        *,
        filter_seen: bool = True,
        form: Form = "arrow",
    ) -> Any:
        """Return the ``k`` best items for somebody never seen, who likes some items.

        It needs no data: a user vector is fitted to the items, as the user's own device would.

        Args:
            items: their ids, the latest last, or a file of them, one a line.
            k: as of :meth:`recommend`; ``filter_seen`` and ``form`` likewise.

        Raises:
            UnknownIdError: when there is no such item.
        """
        return self._lists(self.model.history(items), k, filter_seen, form)

    def _lists(
        self,
        histories: Histories,
        k: int,
        filter_seen: bool,
        form: Form,
        users: NDArray[Any] | None = None,
    ) -> Any:
        lists = self.model.lists(histories, k, filter_seen=filter_seen)
        if form != "arrays":
            return _formed(pyarrow.concat_tables(tables_of(self.model, lists, users)), form)
        items, scores = (np.concatenate(each) for each in zip(*lists, strict=True))
        short, ids = items == NONE, self.model.catalogue.ids[items]
        if not short.any():
            return ids, scores
        return np.ma.masked_array(ids, short), np.ma.masked_array(scores, short)

    def similar_items(self, item: Id, k: int = 10, *, form: Form = "arrow") -> Any:
        """Return the ``k`` items nearest to one by the cosine of their vectors.

        Args:
            item: its id.
            k: how many.
            form: as of :meth:`recommend`, with the cosine as the score.
        """
        items, cosines = self.model.similar(item, k)
        if form == "arrays":
            return self.model.catalogue.ids[items[0]], cosines[0]
        return _formed(next(tables_of(self.model, [(items, cosines)])), form)

    def score(self, users: Id | Iterable[Id], items: Iterable[Id] | None = None) -> NDArray[Any]:
        """Return the model's scores of items, or of all, for users: float32 ``(users, items)``.

        Larger is better; scores of one user compare with one another only. Users are fitted to what
        the model learned from, and not to what was held out, which may be measured by scores.
        """
        several = [users] if isinstance(users, int | str | np.integer) else users
        states = self.model.fit(self.model.histories(self.model.users(several)))
        wanted = None if items is None else self.model.catalogue.positions(items)
        return self.model.scores(states, wanted)

    def fold_in(self, items: Iterable[Id] | Path) -> NDArray[np.float32]:
        """Return the vector of somebody who likes some items, ``(dim,)``, fitted as a device would.

        Its products with :attr:`item_vectors`, plus :attr:`item_biases`, are the scores of a model
        without a network, up to one constant.
        """
        return np.asarray(self.model.fit(self.model.history(items))[0, :-1])

    @property
    def item_ids(self) -> NDArray[Any]:
        """The ids of the items ``(n,)``, in the order of the model's rows."""
        return self.model.catalogue.ids

    @property
    def user_ids(self) -> NDArray[Any]:
        """The ids of the users of the data ``(m,)``."""
        return self.model.split.train.user_ids

    @property
    def item_vectors(self) -> NDArray[np.float32]:
        """The vectors of the items, ``(n, dim)``."""
        return self.model.vectors

    @property
    def item_biases(self) -> NDArray[np.float32]:
        """The biases of the items, ``(n,)``."""
        return self.model.biases

    # ------------------------------------------------------------------ what it is worth

    def evaluate(
        self, test: Any = None, *, k: int | Iterable[int] = 10
    ) -> dict[str, dict[str, float]]:
        """Return metrics by the names of the model and of baselines, outside the guarantee.

        Args:
            test: interactions of users that the model knows, in any form that :meth:`fit` takes but
                a path; each is ranked among all items that its user did not train on. None: what
                the run held out and measured.
            k: cut-offs, with ``test``.

        Raises:
            UnknownIdError: when the model does not know a user or an item of ``test``.
        """
        if test is None:
            result = self.result
            return {"model": result["metrics"], **result["baselines"]}
        model, train = self.model, self.model.split.train
        found = self._pairs(test)
        users, items = model.users(found.user_ids), model.catalogue.positions(found.item_ids)
        rows, wanted = users[found.users], items[found.items]
        if (seen := train.contains(rows, wanted)).any():
            raise DataError(
                f"{int(seen.sum())} interactions of the test were trained on; what is measured "
                "must not be learned from: leave them out"
            )
        order = np.argsort(rows, kind="stable")
        lists = ItemLists(row_bounds(rows, train.n_users), wanted[order].astype(np.int32))
        split = Split(train, lists, None, "test")
        measured = np.unique(rows)
        states = model.fit(model.histories(measured))
        scores = scores_with(model.local, measured, states, model.catalogue.size)
        cuts, seed = tuple(k) if isinstance(k, Iterable) else (k,), model.scenario.run.seed
        both = {"model": scores, "popularity": metrics.popularity_scores(train)}
        return {
            name: metrics.evaluate(each, split, seed=seed, k=cuts).summary()
            for name, each in both.items()
        }

    def _pairs(self, data: Any) -> Interactions:
        """Interactions in memory, all of them, by the columns that the model's were read by."""
        if isinstance(data, Interactions):
            return data
        own, table = self.scenario.data, as_table(data, 0)
        names = {key: getattr(own, key, None) for key in ("user_column", "item_column")}
        given = {f"data.{key}": name for key, name in names.items() if name in table.column_names}
        bare = Scenario.from_toml(_BARE)
        with stored(table) as path:
            return read_table(path, _form(bare, _looked_at(path, bare, given)))

    @property
    def result(self) -> dict[str, Any]:
        """The run's ``result.json``: metrics, privacy, costs; IntegrityError if not its own."""
        path = self.folder / "result.json"
        return verified("result", parsed(path.read_bytes()), self.model.key, path)

    def epsilon(self, adversary: Adversary = "recipients", *, delta: float | None = None) -> float:
        """Return the user-level ε that was spent, computed from the run's ledger.

        Args:
            adversary: ``"recipients"`` of the models, or ``"server"``: somebody who knows every
                cohort.
            delta: by default the scenario's.
        """
        path = self.folder / directory.LEDGER
        with Ledger.open(path, public_key=self.model.key, repair=False) as ledger:
            if ledger.header["noise_known"]:
                return math.inf
            chosen = self.scenario.privacy.delta if delta is None else delta
            return ledger.epsilon(adversary, chosen)

    def report(self, path: Name | None = None) -> Path:
        """Write the accounting report, HTML, Markdown or JSON by the ending, and return its path.

        Without a path all are written into the run's folder.
        """
        report = build(self.folder)
        if path is None:
            return write(report, self.folder).html
        path = Path(path)
        if path.suffix not in REPORTS:
            raise UsageError(f"{path}: a report is one of {', '.join(REPORTS)}; name it so")
        replace_text(path, REPORTS[path.suffix](report))
        return path

    def save(self, folder: Name) -> Path:
        """Copy the run's folder to a new place, with its report, and return that.

        It serves the model by itself, and ``privrec report verify`` takes it.
        """
        folder = Path(folder)
        directory.refuse_taken(folder)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        write(build(folder), folder)
        return folder


def load(folder: Name, *, data_dir: Name | None = None) -> Recommender:
    """Return the recommender of a finished run: read once, it answers many times.

    Histories are served from the folder alone, wherever it was copied to; users of the data from
    their own histories, which are read when they are first asked for.

    Args:
        folder: the run's, as ``privrec run`` or :meth:`Recommender.save` left it.
        data_dir: where the data lies, before the place that the run remembers.
    """
    return Recommender.load(folder, data_dir=data_dir)


def _path(name: str) -> str:
    """The dotted path of a setting."""
    if "__" in name or "." in name:
        return name.replace("__", ".", 1)
    found = [f"{table}.{name}" for table in TABLES if table and is_key(f"{table}.{name}")]
    if len(found) > 1:
        named = " and ".join(path.replace(".", "__") for path in found)
        raise UsageError(f"{name}: {len(found)} tables of a scenario have it; say {named}")
    if is_key(name):
        return name
    if not found:
        raise UsageError(
            f"{name}: there is no such key of a scenario; docs/scenarios.md lists all of them, and "
            "privrec scenario schema prints them"
        )
    return found[0]


def _form(base: Scenario, settings: Mapping[str, Any]) -> Data:
    """How data is read: what the settings say of ``[data]``, else the scenario."""
    own = {path: value for path, value in settings.items() if path.startswith("data.")}
    return base.with_settings(own).data


def _looked_at(path: Path, base: Scenario, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and how the table at ``path`` is read where neither they nor the base say."""
    given = {key[5:]: settings[key] for key in settings if key.startswith("data.")}
    if base.data.source == "table" or given.get("source", "table") != "table":
        return {"data.source": "table", **settings, "data.path": str(path)}
    found = look_at(path, given).keys
    return {**settings, **{f"data.{key}": value for key, value in found.items()}}


def _formed(table: pyarrow.Table, form: Form) -> Any:
    if form == "arrow":
        return table
    if form not in ("pandas", "polars"):
        raise UsageError(f"form = {form!r}: it is arrow, pandas, polars or arrays; name one")
    try:
        module = import_module(form)
    except ImportError:
        raise UsageError(f"form = {form!r}: {form} is not installed; pip install {form}") from None
    return table.to_pandas() if form == "pandas" else module.from_arrow(table)
