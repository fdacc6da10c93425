"""Accuracy of recommenders that hold all histories in one place, beside privrec's, on MovieLens 1M.

    python scenarios/benchmarks/peers.py [--quick] [--only NAME] [--json FILE] [--data DIR]

One split, one set of candidates and one evaluation for all: leave-last-out, the held-out film among
the 99 published negatives, and in the full catalogue. Every peer is tuned by HR@10 on the
validation split over the few settings below; privrec's scenarios were, by hand. The table has the
test split.
implicit and LensKit come from an environment of their own beside privrec
(`pip install implicit lenskit`); one that is not installed is left out and named.

Peers see every history; the rows of privrec are of simulated devices, the second within a
user-level budget. CPU seconds are of one training, settings known, in one thread with
OMP_NUM_THREADS=1. `--quick` takes invented data, one setting each and few rounds: it shows that the
script runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from _common import ROOT, document, machine, print_table, write_json
from scipy import sparse

from privrec.data import Split, load
from privrec.evaluate import metrics
from privrec.run import lifecycle
from privrec.scenario.load import Scenario
from privrec.scenario.load import load as load_scenario

Train = Callable[..., metrics.Scores]
PACKAGES = ("privrec", "implicit", "lenskit", "numpy", "scipy", "torch")
COLUMNS = (
    ("name", "what"),
    ("hr@10", "HR@10"),
    ("ndcg@10", "NDCG@10"),
    ("full_ndcg@10", "NDCG@10, full"),
    ("epsilon", "ε"),
    ("cpu_s", "CPU, s"),
    ("settings", "settings"),
)
USERS = 300
QUICK = ("data.source=synthetic", f"data.users={USERS}", "data.items=150")
OWN = {"no noise": "ml-1m.toml", "ε = 8, server trusted": "ml-1m-dp.toml"}


def matrix_of(split: Split) -> sparse.csr_array:
    train = split.train
    ones, shape = np.ones(train.size, np.float32), (train.n_users, train.n_items)
    return sparse.csr_array((ones, train.items, train.indptr), shape=shape)


def implicit_als(split: Split, **settings: Any) -> metrics.Scores:
    from implicit.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(**settings, iterations=15, num_threads=1, random_state=0)
    model.fit(sparse.csr_matrix(matrix_of(split)), show_progress=False)
    return metrics.by_users(lambda users: model.user_factors[users] @ model.item_factors.T)


def implicit_bpr(split: Split, **settings: Any) -> metrics.Scores:
    from implicit.bpr import BayesianPersonalizedRanking

    model = BayesianPersonalizedRanking(**settings, num_threads=1, random_state=0)
    model.fit(sparse.csr_matrix(matrix_of(split)), show_progress=False)
    return metrics.by_users(lambda users: model.user_factors[users] @ model.item_factors.T)


def lenskit_data(split: Split) -> Any:
    import pandas
    from lenskit.data import from_interactions_df

    train = split.train
    users = np.repeat(np.arange(train.n_users), np.diff(train.indptr))
    return from_interactions_df(pandas.DataFrame({"user_id": users, "item_id": train.items}))


def placed(split: Split, known: Any, table: np.ndarray) -> np.ndarray:
    """The items' columns in the split's order; what a peer never saw ranks last."""
    places = known.numbers(np.arange(split.train.n_items), missing="negative")
    return np.where(places >= 0, table[:, places], -np.inf)


def lenskit_als(split: Split, **settings: Any) -> metrics.Scores:
    from lenskit.als import ImplicitMFScorer
    from lenskit.training import TrainingOptions

    model = ImplicitMFScorer(**settings)
    model.train(lenskit_data(split), TrainingOptions(rng=0))
    rows = model.users.numbers(np.arange(split.train.n_users))

    def scores(users: np.ndarray) -> np.ndarray:
        return placed(
            split, model.items, model.user_embeddings[rows[users]] @ model.item_embeddings.T
        )

    return metrics.by_users(scores)


def lenskit_ease(split: Split, **settings: Any) -> metrics.Scores:
    from lenskit.knn.ease import EASEScorer

    model, matrix = EASEScorer(**settings), matrix_of(split)
    model.train(lenskit_data(split))
    known = np.asarray(model.items.ids(), np.int64)

    def scores(users: np.ndarray) -> np.ndarray:
        return placed(split, model.items, matrix[users][:, known] @ model.weights)

    return metrics.by_users(scores)


PEERS: Mapping[str, tuple[str, Train, list[dict[str, Any]]]] = {
    "implicit, ALS": (
        "implicit",
        implicit_als,
        [
            {"factors": factors, "regularization": penalty, "alpha": alpha}
            for factors in (32, 64)
            for penalty, alpha in ((0.1, 1.0), (10.0, 1.0), (30.0, 4.0))
        ],
    ),
    "implicit, BPR": (
        "implicit",
        implicit_bpr,
        [
            {
                "factors": factors,
                "learning_rate": 0.03,
                "regularization": penalty,
                "iterations": 100,
            }
            for factors in (32, 64)
            for penalty in (0.01, 0.03)
        ],
    ),
    "LensKit, ImplicitMF": (
        "lenskit",
        lenskit_als,
        [
            {"embedding_size": size, "regularization": penalty, "weight": weight, "epochs": 15}
            for size in (16, 32)
            for penalty, weight in ((0.1, 40.0), (10.0, 1.0), (30.0, 4.0))
        ],
    ),
    "LensKit, EASE": (
        "lenskit",
        lenskit_ease,
        [{"regularization": penalty} for penalty in (300.0, 1000.0, 3000.0)],
    ),
}


def measured(scores: metrics.Scores, split: Split) -> dict[str, float]:
    return metrics.evaluate(scores, split, seed=0).summary()


def of_peers(splits: Mapping[str, Split], only: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    for name, (package, train, grid) in PEERS.items():
        if only not in name:
            continue
        if find_spec(package) is None:
            print(f"{name}: {package} is not installed; left out", flush=True)
            continue
        tried = [
            (measured(train(splits["validation"], **each), splits["validation"])["hr@10"], each)
            for each in (grid[:1] if quick else grid)
        ]
        _, settings = max(tried, key=lambda pair: pair[0])
        start = time.process_time()
        scores = train(splits["test"], **settings)
        cpu_s = time.process_time() - start
        told = " ".join(f"{key}={value:g}" for key, value in settings.items())
        yield {"name": name, **measured(scores, splits["test"]), "cpu_s": cpu_s, "settings": told}


def of_privrec(
    data_dir: Path | None, splits: Mapping[str, Split], only: str, *, quick: bool
) -> Iterator[dict[str, Any]]:
    if only in "popularity":
        popular = metrics.popularity_scores(splits["test"].train)
        yield {"name": "popularity", **measured(popular, splits["test"])}
    for name, file in OWN.items():
        if only not in f"privrec, {name}":
            continue
        settings = ["run.footprint=false", "run.eval_every=1000000"]
        if quick:
            settings += [*QUICK, f"devices.population={USERS}", "train.rounds=2"]
        scenario = load_scenario(ROOT / "scenarios" / file, settings)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            result = lifecycle.start(scenario, out=Path(folder) / "run", data_dir=data_dir)
            cpu_s = time.process_time() - start
        spent = result.payload["privacy"]["epsilon"]
        own = {"epsilon": spent, "cpu_s": cpu_s, "settings": file}
        yield {"name": f"privrec, {name}", **result.payload["metrics"], **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="invented data, one setting each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where MovieLens lies")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name has this")
    options = parser.parse_args()
    source = QUICK if options.quick else ("data.source=ml-1m",)
    splits = {}
    for holdout in ("validation", "test"):
        text = 'name = "peers"\n[privacy]\nnoise = "none"\n'
        data = [*source, f"data.holdout={holdout}"]
        splits[holdout] = load(Scenario.from_toml(text, data).data, data_dir=options.data)
    rows = [
        *of_privrec(options.data, splits, options.only, quick=options.quick),
        *of_peers(splits, options.only, quick=options.quick),
    ]
    print_table("invented" if options.quick else "MovieLens 1M, test split", COLUMNS, rows)
    if options.json:
        write_json(options.json, document(rows, [], machine(*PACKAGES)))


if __name__ == "__main__":
    main()
