"""A classifier of texts and tables for people who know scikit-learn or Keras.

Hashed words, one hidden layer, and an output of which a batch trains only a few neurons where there
are many. It is trained here, on one machine, and gives no privacy guarantee.
Source: Chen et al., "SLIDE" (MLSys 2020), whose network this is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from privrec import storage
from privrec.data.corpus import Examples
from privrec.data.texts import SPLITS, Label, Labelled, Tokens, bags, labels_of, read_labelled
from privrec.errors import DataError, UsageError
from privrec.models.sparse_output import Loss, RowAdam, SparseOutput
from privrec.models.words import bag_of_words
from privrec.randomness import SecretRoot, rng_for

Labels: TypeAlias = Sequence[Label | Sequence[Label]]
Texts: TypeAlias = str | os.PathLike[str] | Sequence[str]
Source: TypeAlias = Texts | tuple[Sequence[str], Labels]

DENSE = 4096
"""Labels up to which all are active: a small layer gains nothing from being sparse."""
ROOM = 2048
"""Neurons that the automatic share leaves beside the labels of a batch, at least."""
_AT_ONCE = 256
_FORMAT = "privrec sparse classifier, version 1"
_UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, UsageError)


class BagOfWords(nn.Module):
    """:func:`bag_of_words` as a module; the gradient of the words' rows is sparse."""

    def __init__(self, features: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        drawn = rng_for(seed, "words").standard_normal((features, dim), np.float32)
        drawn *= np.float32(dim**-0.5)
        self.weight = nn.Parameter(torch.from_numpy(drawn))
        self.bias = nn.Parameter(torch.zeros(1, dim))

    def forward(self, examples: Examples) -> Tensor:
        """Hidden vectors of examples, shape ``(m, dim)``."""
        return bag_of_words(examples, self.weight, self.bias, sparse=True)


class ExtremeClassifier(nn.Module):
    """Words to hidden vector to labels."""

    def __init__(self, features: int, output: SparseOutput, *, seed: int = 0) -> None:
        super().__init__()
        self.words, self.output = BagOfWords(features, output.dim, seed=seed), output

    def loss(self, examples: Examples, kind: Loss = "softmax") -> Tensor:
        """Return the mean loss of a batch; see :meth:`SparseOutput.loss`."""
        labels = torch.from_numpy(examples.padded_labels())
        return self.output.loss(self.words(examples), labels, kind)

    @torch.no_grad()
    def topk(self, examples: Examples, k: int) -> tuple[Tensor, Tensor]:
        """Return scores and labels of the best ``k`` of each example, shape ``(m, k)``."""
        return self.output.topk(cast(Tensor, self.words(examples)), k)


@dataclass(frozen=True)
class Epoch:
    """What ``fit`` tells after each pass, from 1: the mean loss, by its ``active`` neurons."""

    number: int
    loss: float
    active: int


@dataclass(kw_only=True, eq=False)
class SparseClassifier:
    """Learns labels of texts, few or hundreds of thousands of them.

    It can be copied, pickled and cloned, and is kept in a file by :meth:`save`. Labels are strings
    or numbers, all of one type, and are predicted as they came. Values out of their range are
    refused.

    Args:
        text: column of the text, or several columns of a table; ``label`` is that of the label.
        between: what separates several labels in a cell, such as ``"|"``; None, there is one.
        share: active neurons of the output in a batch, in (0, 1]; None, all up to 4,096 labels and
            1 % (or what a batch needs) beyond.
        selector: who finds the neurons that compete with the labels; see
            :class:`privrec.models.sparse_output.SparseOutput`.
        features: size of the hashed vocabulary.
        batch: examples of a step; None, 32 of few rows and up to 256 of many.
        loss: ``softmax`` where labels compete, ``bce`` where each stands for itself.
        seed: the same data and seed give the same model.
        tokens: ``blanks`` splits texts at blanks alone, as fastText does; ``words`` takes runs of
            letters, digits and underscores, so that punctuation does not count, nor do signs.
    """

    text: str | Sequence[str] = "text"
    label: str = "label"
    between: str | None = None
    dim: int = 128
    share: float | None = None
    selector: str = "cells"
    features: int = 1 << 18
    epochs: int = 10
    batch: int | None = None
    lr: float = 3e-3
    loss: Loss = "softmax"
    seed: int = 0
    tokens: Tokens = "blanks"
    labels: tuple[Label, ...] = field(init=False, repr=False)
    model: ExtremeClassifier | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.labels, self.model = (), None
        for name in ("dim", "features", "epochs", "batch"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UsageError(f"{name} = {size}: must be at least 1; raise it")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"share = {self.share}: must lie above 0 and at most at 1; change it")
        if self.tokens not in SPLITS:
            raise UsageError(f"tokens = {self.tokens!r}: is one of {', '.join(SPLITS)}; choose one")

    def fit(
        self,
        source: Source,
        labels: Labels | None = None,
        *,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> SparseClassifier:
        """Learn from labelled texts; what was learned before is forgotten.

        Args:
            source: path of a CSV or TSV file with the named columns, or texts and their labels as
                one pair.
            labels: of the texts, a string, a number or several of them each, where ``source`` is
                the texts alone.

        Raises:
            DataError: when the file or a line is malformed, a label is missing, or there are fewer
                than two labels.
            UsageError: when a batch has more labels than ``share`` has room for.
        """
        data = self._read(source, labels)
        known = labels_of(data.labels)
        places = {name: place for place, name in enumerate(known)}
        examples = replace(
            bags(data.texts, self.features, self.tokens),
            label_ends=np.cumsum([len(own) for own in data.labels]),
            labels=np.array([places[name] for own in data.labels for name in own], np.int64),
            n_labels=len(places),
        )
        batch = self.batch or min(256, max(32, len(examples) // 500))
        share = self.share
        if share is None:
            most = int(np.sort(np.diff(examples.label_ends, prepend=0))[-batch:].sum())
            least = (most + ROOM) / len(known)
            share = 1.0 if len(known) <= DENSE else min(1.0, max(0.01, least))
        model = self._network(len(known), share)
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
                on_epoch(Epoch(number, float(np.mean(losses)), model.output.budget))
        self.labels, self.model = known, model.eval()
        return self

    def predict(self, texts: Texts) -> list[Label]:
        """Return the best label of each text of a list, or of the file at a path."""
        return [best[0] for best in self.predict_top(texts, 1)]

    def predict_top(self, texts: Texts, k: int) -> list[list[Label]]:
        """Return the best ``k`` labels of each text as for :meth:`predict`, the best first."""
        self._fitted()
        is_path = isinstance(texts, str | os.PathLike)
        found = self._file(texts, None).texts if is_path else _texts(texts)
        return [[self.labels[place] for place in row] for row in self._best(found, k).tolist()]

    def score(self, source: Source, labels: Labels | None = None) -> float:
        """Return the ``precision@1`` of :meth:`evaluate`, as cross-validation names it."""
        return self.evaluate(source, labels)["precision@1"]

    def evaluate(self, source: Source, labels: Labels | None = None) -> dict[str, float]:
        """Measure how often the best label is right; one that was never learned counts as missed.

        Texts and labels are handed over as to :meth:`fit`.

        Returns:
            ``precision@1`` (share of texts whose best label is one of their own; with one label
            each this is the accuracy), ``precision@5`` where there are that many labels, ``rows``
            and ``unknown_labels`` (how many distinct labels were never learned).

        Raises:
            DataError: as for :meth:`fit`, or when labels are of another type than was learned.
        """
        self._fitted()
        data = self._read(source, labels)
        if type(data.labels[0][0]) is not type(self.labels[0]):
            raise DataError(
                f"label {data.labels[0][0]!r}: those that were learned are of type "
                f"{type(self.labels[0]).__name__}, so that none could be right; convert the labels"
            )
        places = {name: place for place, name in enumerate(self.labels)}
        unknown = {name for own in data.labels for name in own} - set(places)
        k = 5 if len(self.labels) >= 5 else 1
        best = self._best(data.texts, k)
        hits = np.zeros(best.shape, np.bool_)
        for row, own in enumerate(data.labels):
            hits[row] = np.isin(best[row], [places[name] for name in own if name in places])
        found = {"precision@1": float(hits[:, 0].mean())}
        if k == 5:
            found["precision@5"] = float(hits.mean())
        return {**found, "rows": len(data), "unknown_labels": len(unknown)}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return what it was made with, by name of argument; ``deep`` changes nothing."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def set_params(self, **settings: Any) -> SparseClassifier:
        """Make it anew with some settings changed; what was learned is forgotten."""
        if unknown := settings.keys() - self.get_params():
            raise UsageError(
                f"{', '.join(sorted(unknown))}: is no setting; choose among "
                f"{', '.join(self.get_params())}"
            )
        self.__init__(**self.get_params() | settings)  # type: ignore[misc]
        return self

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn's own tools, such as cross-validation, what this is."""
        from sklearn.utils import ClassifierTags, Tags, TargetTags  # not needed by anything else

        tags = {"target_tags": TargetTags(required=True), "classifier_tags": ClassifierTags()}
        return Tags(estimator_type="classifier", **tags)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replace the file at ``path`` by all that :meth:`load` needs.

        It is a safetensors file, with settings and labels as JSON in its header: nothing in it is
        code. It holds no secret, and the labels and words' weights of what was learned from.
        """
        model = self._fitted()
        layer = model.output
        if layer.share < 1 and layer.selector != "uniform":
            layer.index()  # as it is after training; a loaded one is made with the same functions
        about: dict[str, Any] = {"format": _FORMAT, "settings": self.get_params()}
        about |= {"labels": self.labels, "share": layer.share, "rebuilds": layer.rebuilds}
        text = json.dumps(about, default=lambda value: value.item())  # settings may be NumPy's
        storage.replace(Path(path), save(model.state_dict(), metadata={"about": text}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseClassifier:
        """Return the classifier that :meth:`save` kept at ``path``; it predicts what that one did.

        A file that is missing, or not what :meth:`save` writes, is a :class:`DataError`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']!r}")
            found = cls(**about["settings"])
            found.labels = tuple(about["labels"])
            rows = {"words.weight": found.features, "output.weight": len(found.labels)}
            if any(weights[name].shape != (count, found.dim) for name, count in rows.items()):
                raise ValueError("weights of another shape")
            model = found._network(len(found.labels), float(about["share"]))
            model.load_state_dict(weights)
            model.output.rebuilds = max(0, int(about["rebuilds"]) - 1)
        except _UNREADABLE as error:
            raise DataError(
                f"{path}: not a classifier that save(...) wrote ({error}); check the path, or fit "
                "it anew"
            ) from None
        found.model = model.eval()
        return found

    def _network(self, labels: int, share: float) -> ExtremeClassifier:
        layer = SparseOutput(
            labels,
            self.dim,
            share=share,
            selector="scan" if share == 1 else self.selector,
            init_std=0.01,
            seed=self.seed,
            root=SecretRoot.known(b"a classifier of one machine %d" % self.seed),
        )
        return ExtremeClassifier(self.features, layer, seed=self.seed)

    @torch.no_grad()
    def _best(self, texts: Sequence[str], k: int) -> NDArray[np.int64]:
        model = self._fitted()
        parts = [np.zeros((0, k), np.int64)]
        for part in bags(texts, self.features, self.tokens).batches(_AT_ONCE):
            best = model.topk(part, k)[1]
            short = (best < 0).any(1)  # the index found fewer than were asked for
            if short.any():
                hidden = cast(Tensor, model.words(part))[short]
                best[short] = model.output(hidden).topk(k).indices
            parts.append(best.numpy())
        return np.concatenate(parts)

    def _fitted(self) -> ExtremeClassifier:
        if self.model is None:
            raise UsageError("nothing was learned yet: call fit(...) with labelled texts first")
        return self.model

    def _read(self, source: Source, labels: Labels | None) -> Labelled:
        if labels is not None:
            source = cast(Source, (source, labels))
        is_path = isinstance(source, str | os.PathLike)
        return self._file(source, self.label) if is_path else _handed_over(source)

    def _file(self, path: Any, label: str | None) -> Labelled:
        text = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        return read_labelled(Path(path), text, label, between=self.between, tokens=self.tokens)


def _handed_over(source: object) -> Labelled:
    """A pair of texts and labels, which nothing has checked yet."""
    if not (isinstance(source, tuple) and len(source) == 2):
        raise UsageError(
            f"a source of type {type(source).__name__}: is the path of a file, or a pair of "
            "texts and their labels; hand over (texts, labels)"
        )
    texts, given = _texts(source[0]), _listed(source[1], "labels")
    if len(texts) != len(given) or not texts:
        raise DataError(
            f"{len(texts)} texts and {len(given)} rows of labels: there must be as many of both, "
            "and at least one; check what was handed over"
        )
    labels: list[tuple[Label, ...]] = []
    for row, own in enumerate(given):
        several = isinstance(own, Iterable) and not isinstance(own, str | bytes) and not _lone(own)
        # Numbers of NumPy and PyTorch as Python's own, which JSON keeps and everybody compares.
        names = [n.item() if _lone(n) else n for n in (own if several else (own,))]
        kinds = {type(name) for name in (*names, *(labels[0] if labels else ()))}
        is_known = len(kinds) == 1 and kinds <= {str, bool, int, float}
        is_blank = any(n == "" or (isinstance(n, float) and not math.isfinite(n)) for n in names)
        if not names or not is_known or is_blank:
            raise DataError(
                f"row {row}: labels {own!r}: at least one label, all in all rows strings that are "
                "not empty, or all numbers of one type; correct the row, or leave it out"
            )
        labels.append(tuple(dict.fromkeys(names)))
    return Labelled(texts, tuple(labels))


def _texts(given: object) -> tuple[str, ...]:
    texts = _listed(given, "texts")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"row {row}: text {text!r}: a text is a string; correct the row, or leave it out"
            )
    return texts


def _lone(value: Any) -> bool:
    return getattr(value, "ndim", None) == 0


def _listed(given: Any, what: str) -> tuple[Any, ...]:
    """Values one by one: a string would be taken for its letters, a table for its columns."""
    if isinstance(given, str | bytes | dict) or getattr(given, "ndim", 1) != 1:
        raise UsageError(
            f"{what} of type {type(given).__name__}: they are a list or a column, one for each row"
        )
    return tuple(given)
