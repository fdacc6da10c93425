"""The order of the catalogue: popular items first, so that weak devices can hold a prefix of it.

The order is public, or it is released: every user's history is cut to a few items, the counts get
Gaussian noise, and the ledger is charged before the first round (as round ``PREPARATION``).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privrec.data import Interactions, Split
from privrec.data.corpus import UNKNOWN_ID, TextSplit
from privrec.device.round import digest
from privrec.errors import IntegrityError
from privrec.privacy.calibrate import noise_multiplier_for
from privrec.privacy.events import RoundEvent
from privrec.privacy.ledger import Ledger
from privrec.privacy.ledger_index import PREPARATION, parsed
from privrec.privacy.mechanism import rounded_gaussian
from privrec.privacy.signed import verified
from privrec.randomness import SecretRoot, SecureStream
from privrec.scenario.kinds import PUBLISHED
from privrec.scenario.load import Scenario, load
from privrec.storage import replace

FILE = "catalogue.safetensors"
Order = NDArray[np.int64]


def known_items(scenario: Scenario) -> int | None:
    """Size of the catalogue, where it is public without looking at the data."""
    data = scenario.data
    items: int | None = getattr(data, "items", None) or PUBLISHED.get(data.source, (None, None))[1]
    if items is not None and data.gives != "interactions":
        return min(items, data.vocabulary or items)
    return items


def release_event(scenario: Scenario) -> RoundEvent | None:
    """What the release of the popularity order costs; None where none is released."""
    devices, delta = scenario.devices, scenario.privacy.delta
    if devices.popularity != "released" or devices.popularity_epsilon is None:
        return None
    z = noise_multiplier_for(devices.popularity_epsilon, delta, _release, 1, "server")
    return _release(z)


def _release(noise_multiplier: float) -> RoundEvent:
    return RoundEvent("gaussian", noise_multiplier, 1.0)


def numbered(
    scenario: Scenario, split: Split, ledger: Ledger, folder: Path, server: SecretRoot,
    devices: SecretRoot,
) -> Split:  # fmt: skip
    """A split whose items are numbered as the scenario's tiers need it.

    The order is written to ``folder`` before it is used; a released one was charged before.

    Args:
        scenario: what to run.
        split: as the data has it.
        ledger: is charged.
        folder: the run's directory.
        server: the server's secret, for the noise.
        devices: the devices' secret, for the choice of the items that count.
    """
    if scenario.devices.order != "rows":
        return split
    order = _released(scenario, split.train, ledger, server, devices)
    if order is None:
        order = np.argsort(-split.train.item_counts(), kind="stable")
    _write(folder / FILE, order, ledger)
    return split.renumbered(order)


def numbered_words(
    scenario: Scenario, split: TextSplit, ledger: Ledger, folder: Path, server: SecretRoot,
    devices: SecretRoot,
) -> TextSplit:  # fmt: skip
    """Texts whose words are numbered by how common they are, as far as the vocabulary goes.

    Public counts are of every occurrence; released ones, of the devices that use a word. The order
    is written to ``folder`` before it is used; a released one was charged before.

    Args:
        scenario: what to run.
        split: as the data has it.
        ledger: is charged.
        folder: the run's directory.
        server: the server's secret, for the noise.
        devices: the devices' secret, for the choice of the words that count.
    """
    order = None
    if release_event(scenario) is not None:
        order = _released(scenario, split.train.distinct, ledger, server, devices)
    if order is None:
        order = np.argsort(-split.train.item_counts(), kind="stable")
    order = np.concatenate(([UNKNOWN_ID], order[order != UNKNOWN_ID]))
    _write(folder / FILE, order, ledger)
    return split.renumbered(order)


def restored_words(folder: Path, split: TextSplit, key: Ed25519PublicKey) -> TextSplit:
    """Texts whose words are numbered as in the run in ``folder``, whose key is ``key``.

    Raises:
        IntegrityError: when the order kept there is gone, altered or not one of these words.
    """
    return split.renumbered(_kept(folder / FILE, split.train.n_items, key))


def _released(
    scenario: Scenario, train: Interactions, ledger: Ledger, server: SecretRoot,
    devices: SecretRoot,
) -> Order | None:  # fmt: skip
    """The popularity order by counts with noise, charged first; None where none is released."""
    event = release_event(scenario)
    if event is None:
        return None
    ledger.charge(PREPARATION, 0, event)
    most = scenario.devices.popularity_items
    context = (ledger.header["run_id"], scenario.plan_hash())
    counts = _capped_counts(train, most, devices.stream("popularity", *context))
    stream = server.stream("popularity", *context, digest(counts))
    # A 0/1 history of so many items is no longer than the root of their number.
    counts += rounded_gaussian(stream, event.noise_multiplier * most**0.5, len(counts))
    order = np.argsort(-counts, kind="stable")
    ledger.commit(PREPARATION, 0, server.tag("popularity", *context, digest(order)))
    return order


def restored(folder: Path, split: Split, key: Ed25519PublicKey) -> Split:
    """A split whose items are numbered as in the run in ``folder``, whose key is ``key``.

    Raises:
        IntegrityError: when the order kept there is gone, altered or not one of this catalogue.
    """
    path = folder / FILE
    if not path.exists():
        if load(folder / "scenario.toml").devices.order == "rows":
            raise IntegrityError(f"{path}: there is no order of the items; restore the file")
        return split
    return split.renumbered(_kept(path, split.train.n_items, key))


def _kept(path: Path, n_items: int, key: Ed25519PublicKey) -> Order:
    order = _read(path, key)
    if not np.array_equal(np.sort(order), np.arange(n_items)):
        raise IntegrityError(
            f"{path}: no order of the {n_items} items of this catalogue; use the data that the run "
            "was started with, or restore the file"
        )
    return order


def _write(path: Path, order: Order, ledger: Ledger) -> None:
    """Keep an order, signed: a model that is read by another one recommends other items."""
    record = ledger.sign("item order", {"digest": digest(order).hex()})
    replace(path, save({"order": order}, metadata={"record": json.dumps(record)}))


def _read(path: Path, key: Ed25519PublicKey) -> Order:
    try:
        with safe_open(path, framework="numpy") as file:
            record = parsed(((file.metadata() or {}).get("record") or "").encode())
            order: Order = file.get_tensor("order")
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not an order ({error}); restore the file") from None
    written = verified("item order", record, key, path)["digest"]
    if order.dtype != np.int64 or digest(order).hex() != written:
        raise IntegrityError(f"{path}: its content is not what was written; restore the file")
    return order


def _capped_counts(train: Interactions, most: int, coins: SecureStream) -> Order:
    """How many users count each item, when each counts at most ``most`` of its own, at random."""
    order = np.lexsort((coins.uint64(train.size), train.users))
    place = np.arange(train.size) - np.repeat(train.indptr[:-1], train.counts)
    return np.bincount(train.items[order][place < most], minlength=train.n_items).astype(np.int64)
