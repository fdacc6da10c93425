"""Recommenders trained over people's own devices, with a user-level privacy budget.

``import privrec`` is cheap: it loads neither torch nor numpy. The names of ``__all__`` are all that
is public; they are looked up in their modules when they are first used.

Examples:
    >>> import privrec
    >>> scenario = privrec.load_scenario("scenarios/quickstart.toml", ["train.rounds=3"])
    >>> result = privrec.start(scenario, out="runs/quickstart")
    >>> model = privrec.load("runs/quickstart")
    >>> len(model.recommend_history([1, 2, 3], k=5))
    5
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from privrec.api.recommender import Recommender, load
    from privrec.models.classifier import SparseClassifier
    from privrec.models.sparse_output import SubspaceEmbedding
    from privrec.optim.lazy_dpsgd import LazyDPSGD
    from privrec.privacy.ledger import Ledger
    from privrec.run.lifecycle import resume, start
    from privrec.run.recommend import recommend
    from privrec.scenario.load import Scenario
    from privrec.scenario.load import load as load_scenario

__all__ = [
    "LazyDPSGD",
    "Ledger",
    "Recommender",
    "Scenario",
    "SparseClassifier",
    "SubspaceEmbedding",
    "__version__",
    "load",
    "load_scenario",
    "recommend",
    "resume",
    "start",
]

_LAZY = {
    "LazyDPSGD": "privrec.optim.lazy_dpsgd.LazyDPSGD",
    "Ledger": "privrec.privacy.ledger.Ledger",
    "Recommender": "privrec.api.recommender.Recommender",
    "Scenario": "privrec.scenario.load.Scenario",
    "SparseClassifier": "privrec.models.classifier.SparseClassifier",
    "SubspaceEmbedding": "privrec.models.sparse_output.SubspaceEmbedding",
    "load": "privrec.api.recommender.load",
    "load_scenario": "privrec.scenario.load.load",
    "recommend": "privrec.run.recommend.recommend",
    "resume": "privrec.run.lifecycle.resume",
    "start": "privrec.run.lifecycle.start",
}


def __getattr__(name: str) -> Any:
    """The object that ``name`` stands for, imported now."""
    if name not in _LAZY:
        raise AttributeError(f"module 'privrec' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].rpartition(".")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
