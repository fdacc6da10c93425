"""Small devices with awkward histories, and what their updates are as whole vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from on_devices import trained_rows

from privrec.device.device import Cohort, Device, Draws, Settings, Trained
from privrec.device.local import LocalModel
from privrec.device.recommender import RecommenderLearner
from privrec.device.samples import Histories
from privrec.device.tier import ModelView, Tier
from privrec.device.update import Protection, RawUpdate, Round, model_digests
from privrec.embedding.nested import nested
from privrec.embedding.subspace import Subspace
from privrec.models.layout import packed_size
from privrec.models.losses import pack
from privrec.models.ncf import NCF
from privrec.privacy.events import RoundEvent
from privrec.randomness import SecretRoot
from privrec.secagg.ring import Encoding

ITEMS, DIM, BLOCK = 30, 8, 4
DEFAULTS = {
    "loss": "bce",
    "negatives": 4,
    "unobserved_weight": 0.1,
    "item_l2": 0.01,
    "newton": False,
    "max_samples": None,
    "user_steps": 2,
    "user_lr": 1.0,
    "user_l2": 0.3,
    "serve_steps": 3,
    "serve_negatives": 6,
    "local_steps": 1,
    "local_lr": 0.2,
}


def uneven_histories() -> list[np.ndarray]:
    """Of many lengths: empty, item 0 (which padding names too), one item, and nearly all items."""
    rng = np.random.default_rng(4)
    lengths = [5, 0, 1, 12, 3, 3, 27, 8, 2]
    histories = [rng.permutation(ITEMS)[:length] for length in lengths]
    histories[2] = np.array([0])
    histories[4] = np.array([7, 0, 29])
    return [history.astype(np.int32) for history in histories]


@dataclass
class Lab:
    """A learner, the weights it starts from, and devices with private states."""

    learner: RecommenderLearner
    weights: np.ndarray
    histories: list[np.ndarray]
    states: np.ndarray
    key: int = 77

    @property
    def users(self) -> np.ndarray:
        return np.arange(len(self.histories))

    @property
    def model(self) -> LocalModel:
        """The model as one device has it."""
        return LocalModel(self.learner.view, self.weights)

    @property
    def cohort(self) -> Cohort[RecommenderLearner]:
        indptr = np.cumsum([0, *map(len, self.histories)])
        everyone = Histories(self.users, indptr, np.concatenate(self.histories))
        cohort = Cohort.of(self.learner, everyone)
        cohort.states = self.states.copy()
        return cohort

    def history(self, user: int) -> Histories:
        return Histories.alone(user, self.histories[user])

    def serve(self, user: int) -> np.ndarray:
        """The private state that is fitted to the history of ``user`` alone."""
        return self.learner.serve(self.weights, self.history(user), Draws(self.key))[0]

    def alone(self, user: int) -> Trained:
        """What the device of ``user`` makes of the round by itself."""
        return self.device(user).train(self.model, Draws(self.key))

    def device(self, user: int, encoding: Encoding | None = None) -> Device:
        encoding = encoding or Encoding(1.0, self.learner.view.layout.size)
        state, mine = self.states[user].copy(), self.histories[user]
        root = SecretRoot.known(b"test")
        return Device(
            user,
            mine,
            self.tier,
            (self.tier.layout,),
            self.learner,
            Protection(encoding),
            root,
            state,
        )

    @property
    def tier(self) -> Tier:
        parts = self.learner.view
        biases = None if parts.biases is None else nested(parts.biases, [0])
        return Tier(0, 1.0, 1.0, 1.0, parts, nested(parts.vectors, [0]), biases)

    def round(self, attempt: int = 0) -> Round:
        event = RoundEvent("none", 0.0, 1.0)
        digests = model_digests(self.weights, (self.tier.layout,))
        return Round("run", 0, attempt, event, "plan", digests)

    def together(self) -> dict[int, tuple[np.ndarray, Any, Any]]:
        """By user: the whole update vector, the new state and the loss, as the cohort has them."""
        found = {}
        for batch, trained in trained_rows(self.cohort, self.weights, self.users, Draws(self.key)):
            for row, user in enumerate(batch):
                vector = vector_of(trained.update, row)
                found[int(user)] = vector, trained.states[row], trained.losses[row]
        return found


def vector_of(update: RawUpdate, row: int = 0) -> np.ndarray:
    """One device's update as a vector of the layout's size, by the contract of ``Address``."""
    address, values = update.address, update.values[row].astype(np.float64)
    layout, vector = address.layout, np.zeros(address.layout.size)
    end = layout.head + address.blocks.shape[1] * layout.block
    vector[: layout.head] = values[: layout.head]
    blocks = address.blocks[row if len(address.blocks) > 1 else 0]
    biases = address.biases[row if len(address.biases) > 1 else 0]
    np.add.at(layout.memory_of(vector), blocks, values[layout.head : end].reshape(-1, layout.block))
    np.add.at(layout.biases_of(vector), biases, values[end:])
    return vector


def make_lab(
    kind: str = "gmf",
    compression: float = 1.0,
    *,
    item_bias: bool = True,
    histories: list[np.ndarray] | None = None,
    scale: float = 0.4,
    dtype: type[np.floating] = np.float32,
    **settings: Any,
) -> Lab:
    model = NCF.of(kind, DIM, (6, 5))
    vectors = Subspace.sized(ITEMS, DIM, block=BLOCK, key=11, compression=compression)
    biases = Subspace.sized(ITEMS, 1, block=1, key=12, compression=compression)
    gram = packed_size(DIM) if settings.get("loss") == "ials" else 0
    view = ModelView.of(model, vectors, biases if item_bias else None, gram)
    layout = view.layout
    histories = uneven_histories() if histories is None else histories
    rng = np.random.default_rng(9)
    weights = rng.normal(0, scale, layout.size).astype(dtype)
    if gram:  # as a server that has seen users has it
        users = rng.normal(0, scale, (20, DIM)).astype(np.float32)
        layout.gram_of(weights)[...] = pack(users).mean(0)
    learner = RecommenderLearner(view, Settings(**{**DEFAULTS, **settings}))
    states = rng.normal(0, scale, (len(histories), learner.state_dim)).astype(dtype)
    return Lab(learner, weights, histories, states)


@pytest.fixture
def lab() -> Callable[..., Lab]:
    return make_lab


@pytest.fixture
def double_lab() -> Iterator[Callable[..., Lab]]:
    """In single precision a rectifier's input may round to either side of its kink."""
    torch.set_default_dtype(torch.float64)
    yield partial(make_lab, dtype=np.float64)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def vector() -> Callable[..., np.ndarray]:
    return vector_of
