"""A classifier of texts and tables for people who know scikit-learn or Keras.

::

    import privrec

    model = privrec.SparseClassifier(text="text", label="label")
    model.fit("train.csv")
    print(model.evaluate("test.csv"))
    print(model.predict(["where is my parcel"]))

Behind it is the network of :mod:`privrec.models.extreme`: hashed words, one hidden layer, and an
output of which a batch trains only a few neurons where there are many. It is trained here, on one
machine, and gives no privacy guarantee.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from privrec.data.extreme import Examples
from privrec.data.labelled import Labelled, bags, labels_of, read_labelled
from privrec.errors import DataError, UsageError
from privrec.lsh.sparse_output import LayerSelector, Loss, SparseOutput
from privrec.models.extreme import ExtremeClassifier
from privrec.optim.rows import RowAdam
from privrec.randomness import SecretRoot, rng_for

Source: TypeAlias = str | os.PathLike[str] | tuple[Sequence[str], Sequence[str | Sequence[str]]]

DENSE = 4096
"""Labels up to which all are active: a small layer gains nothing from being sparse."""
ROOM = 2048
"""Neurons that the automatic share leaves beside the labels of a batch, at least."""


_AT_ONCE = 256


@dataclass(frozen=True)
class Epoch:
    """What ``fit`` tells after each pass over the examples.

    Args:
        number: from 1.
        loss: mean over the batches, estimated from the active neurons.
        active: neurons active in a batch, labels included.
    """

    number: int
    loss: float
    active: int


class SparseClassifier:
    """Learns labels of texts, few or hundreds of thousands of them.

    Args:
        text: column of the text, or several columns of a table.
        label: column of the label.
        between: what separates several labels in a cell, such as ``"|"``; None, there is one.
        dim: length of the hidden vector.
        share: active neurons of the output in a batch, in (0, 1]; None, all up to 4,096 labels and
            1 % (or what a batch needs) beyond.
        selector: who finds the neurons that compete with the labels; see
            :class:`privrec.lsh.sparse_output.SparseOutput`.
        features: size of the hashed vocabulary.
        epochs: passes over the examples, at least 1.
        batch: examples of a step, at least 1; None, 32 of few rows and up to 256 of many.
        lr: step size.
        loss: ``softmax`` where labels compete, ``bce`` where each stands for itself.
        seed: the same data and seed give the same model.

    Raises:
        UsageError: when a value is out of its range.
    """

    def __init__(
        self,
        *,
        text: str | Sequence[str] = "text",
        label: str = "label",
        between: str | None = None,
        dim: int = 128,
        share: float | None = None,
        selector: LayerSelector = "cells",
        features: int = 1 << 18,
        epochs: int = 10,
        batch: int | None = None,
        lr: float = 3e-3,
        loss: Loss = "softmax",
        seed: int = 0,
    ) -> None:
        sizes = {"dim": dim, "features": features, "epochs": epochs}
        sizes |= {} if batch is None else {"batch": batch}
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"{name} = {size}: must be at least 1; raise it")
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"share = {share}: must lie above 0 and at most at 1; change it")
        self.text = (text,) if isinstance(text, str) else tuple(text)
        self.label, self.between, self.dim, self.share = label, between, dim, share
        self.selector, self.features, self.epochs = selector, features, epochs
        self.batch, self.lr, self.loss, self.seed = batch, lr, loss, seed
        self.labels: tuple[str, ...] = ()
        self.model: ExtremeClassifier | None = None

    def fit(
        self, source: Source, *, on_epoch: Callable[[Epoch], None] | None = None
    ) -> SparseClassifier:
        """Learn from labelled texts; what was learned before is forgotten.

        Args:
            source: path of a CSV or TSV file with the named columns, or texts and their labels.
            on_epoch: is told of each pass.

        Returns:
            This classifier.

        Raises:
            DataError: when the file or a line is malformed, a label is missing, or there are fewer
                than two labels.
            UsageError: when a batch has more labels than ``share`` has room for.
        """
        data = self._read(source)
        labels = labels_of(data.labels)
        examples = self._examples(data, {name: place for place, name in enumerate(labels)})
        batch = self.batch or min(256, max(32, len(examples) // 500))
        share = self._share(len(labels), examples, batch)
        layer = SparseOutput(
            len(labels), self.dim, share=share,
            selector="scan" if share == 1 else self.selector, init_std=0.01, seed=self.seed,
            root=SecretRoot.known(b"a classifier of one machine %d" % self.seed),
        )  # fmt: skip
        model = ExtremeClassifier(self.features, layer, seed=self.seed)
        optimizer = RowAdam(model.parameters(), lr=self.lr)
        for number in range(1, self.epochs + 1):
            order = rng_for(self.seed, "classifier", number).permutation(len(examples))
            losses = []
            for part in examples.batches(batch, order):
                optimizer.zero_grad()
                loss = model.loss(part, self.loss)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.item())
            if on_epoch is not None:
                on_epoch(Epoch(number, float(np.mean(losses)), layer.budget))
        self.labels, self.model = labels, model.eval()
        return self

    def predict(self, texts: str | os.PathLike[str] | Sequence[str]) -> list[str]:
        """The best label of each text.

        Args:
            texts: texts, or path of a file with the text columns; one string is a path.

        Raises:
            UsageError: before :meth:`fit`.
            DataError: when the file is malformed.
        """
        return [best[0] for best in self.predict_top(texts, 1)]

    def predict_top(self, texts: str | os.PathLike[str] | Sequence[str], k: int) -> list[list[str]]:
        """The best ``k`` labels of each text, the best first; see :meth:`predict`."""
        if isinstance(texts, str | os.PathLike):
            texts = read_labelled(Path(texts), self.text, None).texts
        best = self._best(bags(texts, self.features), k)
        return [[self.labels[place] for place in row] for row in best.tolist()]

    def evaluate(self, source: Source) -> dict[str, float]:
        """How often the best label is right; a label that was never learned counts as missed.

        Args:
            source: as for :meth:`fit`.

        Returns:
            ``precision@1`` (share of texts whose best label is one of their own; with one label
            each this is the accuracy), ``precision@5`` where there are that many labels, ``rows``
            and ``unknown_labels`` (how many distinct labels were never learned).

        Raises:
            UsageError: before :meth:`fit`.
            DataError: when the file or a line is malformed, or a label is missing.
        """
        self._fitted()
        data = self._read(source)
        places = {name: place for place, name in enumerate(self.labels)}
        unknown = {name for own in data.labels for name in own} - set(places)
        k = 5 if len(self.labels) >= 5 else 1
        best = self._best(bags(data.texts, self.features), k)
        hits = np.zeros(best.shape, np.bool_)
        for row, own in enumerate(data.labels):
            hits[row] = np.isin(best[row], [places[name] for name in own if name in places])
        found = {"precision@1": float(hits[:, 0].mean())}
        if k == 5:
            found["precision@5"] = float(hits.mean())
        return {**found, "rows": len(data), "unknown_labels": len(unknown)}

    def _best(self, examples: Examples, k: int) -> NDArray[np.int64]:
        model = self._fitted()
        parts = [model.topk(part, k)[1].numpy() for part in examples.batches(_AT_ONCE)]
        return np.concatenate(parts) if parts else np.zeros((0, k), np.int64)

    def _fitted(self) -> ExtremeClassifier:
        if self.model is None:
            raise UsageError("nothing was learned yet: call fit(...) with labelled texts first")
        return self.model

    def _read(self, source: Source) -> Labelled:
        if isinstance(source, str | os.PathLike):
            return read_labelled(Path(source), self.text, self.label, between=self.between)
        return _handed_over(source)

    def _examples(self, data: Labelled, places: dict[str, int]) -> Examples:
        ends = np.cumsum([len(own) for own in data.labels])
        labels = np.array([places[name] for own in data.labels for name in own], np.int64)
        bagged = bags(data.texts, self.features)
        return replace(bagged, label_ends=ends, labels=labels, n_labels=len(places))

    def _share(self, labels: int, examples: Examples, batch: int) -> float:
        if self.share is not None:
            return self.share
        if labels <= DENSE:
            return 1.0
        most = int(np.sort(np.diff(examples.label_ends, prepend=0))[-batch:].sum())
        return min(1.0, max(0.01, (most + ROOM) / labels))


def _handed_over(source: object) -> Labelled:
    """A pair of texts and labels, which nothing has checked yet."""
    if not (isinstance(source, tuple) and len(source) == 2):
        raise UsageError(
            f"a source of type {type(source).__name__}: is the path of a file, or a pair of "
            "texts and their labels; hand over (texts, labels)"
        )
    texts, given = (tuple(part) for part in source)
    labels = tuple((own,) if isinstance(own, str) else tuple(own) for own in given)
    if len(texts) != len(labels) or not texts:
        raise DataError(
            f"{len(texts)} texts and {len(labels)} rows of labels: there must be as many of both, "
            "and at least one; check what was handed over"
        )
    for row, (text, own) in enumerate(zip(texts, labels, strict=True)):
        if not (isinstance(text, str) and own and all(isinstance(n, str) and n for n in own)):
            raise DataError(
                f"row {row}: text {text!r}, labels {own!r}: a text and at least one label, all of "
                "them strings that are not empty; correct the row, or leave it out"
            )
    return Labelled(texts, labels)
