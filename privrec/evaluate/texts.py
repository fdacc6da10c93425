"""How well next words, or labels, are predicted for devices that did not train.

All neurons are looked at, whatever part of them devices train. The unknown word is never predicted
and never counted: it is no word that a keyboard could offer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privrec.data.corpus import UNKNOWN_ID, Corpus, examples_in
from privrec.device.lessons import Network
from privrec.device.words import WideModel
from privrec.models.next_word import NextWord
from privrec.randomness import rng_for

FloatArray = NDArray[np.float32]
Int64Array = NDArray[np.int64]

_SEQUENCES = 8  # at a time, so that their scores stay in a cache
_EXAMPLES = 16  # likewise, of labels
_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class TextEvaluation:
    """Predictions counted text by text.

    Args:
        tokens: positions, or examples, that count, int64 [texts].
        hits: those that were predicted, float64 [texts] by metric.
        losses: summed negative log-likelihood, float64 [texts].
    """

    tokens: Int64Array
    hits: Mapping[str, NDArray[np.float64]]
    losses: NDArray[np.float64]

    def summary(self) -> dict[str, float]:
        """The share of positions predicted, by metric, and the perplexity; over all texts."""
        size = max(1, int(self.tokens.sum()))
        found = {name: float(hits.sum() / size) for name, hits in self.hits.items()}
        return found | {"perplexity": float(np.exp(min(50.0, self.losses.sum() / size)))}

    def intervals(self, seed: int, *, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the accuracies, texts resampled with replacement.

        Args:
            seed: of the resampling.
            level: coverage, in (0, 1).
        """
        rng, texts = rng_for(seed, "metrics", "bootstrap"), len(self.tokens)
        chosen = rng.integers(0, texts, (_DRAWS, texts))
        sizes = np.maximum(1, self.tokens[chosen].sum(axis=1))
        edge = (1.0 - level) / 2
        bounds = {}
        for name, hits in self.hits.items():
            low, high = np.quantile(hits[chosen].sum(axis=1) / sizes, [edge, 1.0 - edge])
            bounds[name] = (float(low), float(high))
        return bounds


def predict(
    language: WideModel, weights: FloatArray, texts: Corpus, cuts: Sequence[int]
) -> TextEvaluation:
    """Predict every next word of some texts, or the labels of examples, by all neurons' scores.

    Args:
        language: the meaning of the weights.
        weights: the shared vector in memory form.
        texts: what is predicted; words that the model does not hold are unknown.
        cuts: for texts ``accuracy@k`` of each is computed, for labels ``precision@k``: how many of
            the best ``k`` are an example's own, over ``k``.
    """
    words, layout = language.vectors.items, language.layout
    table = torch.from_numpy(language.vectors.gather(layout.memory_of(weights), np.arange(words)))
    biases = torch.from_numpy(
        language.biases.gather(layout.biases_of(weights)[:, None], np.arange(words))[:, 0]
    )
    dense = torch.from_numpy(layout.dense_of(weights).copy())
    model, most = language.model, min(max(cuts), words)
    positions = np.zeros(texts.n_users, np.int64)
    losses = np.zeros(texts.n_users)
    ranked = np.zeros((texts.n_users, most))
    with torch.no_grad():
        for text in range(texts.n_users):
            for hidden, wanted in _asked(model, texts, text, table, dense):
                scores = torch.addmm(biases, hidden, table.T)
                scores[:, UNKNOWN_ID] = -torch.inf
                found, loss = _found(scores, wanted, most)
                ranked[text] += found
                positions[text] += len(wanted)
                losses[text] += loss
    within = np.cumsum(ranked, axis=1)
    one = isinstance(model, NextWord)
    hits = {
        f"accuracy@{cut}" if one else f"precision@{cut}": within[:, min(cut, words) - 1]
        / (1 if one else cut)
        for cut in cuts
    }
    return TextEvaluation(positions, hits, np.nan_to_num(losses, nan=np.inf))


def _asked(
    model: Network, texts: Corpus, text: int, table: Tensor, dense: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden vectors of a text's positions that count, and what is wanted there: ``(p, labels)``,
    filled up by -1.
    """  # noqa: D205
    tokens = texts.tokens[texts.indptr[text] : texts.indptr[text + 1]].astype(np.int64)
    tokens[tokens >= len(table)] = UNKNOWN_ID
    if isinstance(model, NextWord):
        for inputs, targets in _windows(tokens, model.context):
            wanted = torch.from_numpy(targets.ravel())
            counts = wanted != UNKNOWN_ID
            hidden = model.hidden(table[torch.from_numpy(inputs)], dense).flatten(0, 1)
            yield hidden[counts], wanted[counts, None]
        return
    for part in examples_in(tokens).hashed(model.features).batches(_EXAMPLES):
        labels = torch.from_numpy(part.padded_labels())
        counts = (labels >= 0).any(1)
        yield model.hidden(part, dense)[counts], labels[counts]


def _found(scores: Tensor, wanted: Tensor, most: int) -> tuple[NDArray[np.float64], float]:
    """How many positions have a wanted neuron at each rank, and the summed loss of the wanted."""
    real = wanted >= 0
    own = scores.gather(1, wanted.clamp(min=0)).masked_fill(~real, -torch.inf)
    # Of the best, one more than is asked; a tie or what is no number counts against its neuron.
    best = torch.topk(scores, min(most + 1, scores.shape[1]), sorted=False).values
    better = (~(best[:, None, :] < own[:, :, None])).sum(2).clamp(min=1) - 1
    found = np.bincount(better[real].numpy(), minlength=most + 1)[:most].astype(np.float64)
    logs = torch.logsumexp(scores, 1) - own.masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return found, float(logs.sum())


def commonest(train: Corpus, heldout: Corpus, cuts: Sequence[int]) -> dict[str, float]:
    """Accuracy of always predicting the commonest words, which is what popularity comes to."""
    counts = train.item_counts()
    counts[UNKNOWN_ID] = -1
    best = np.argsort(-counts, kind="stable")[: max(cuts)]
    if (heldout.tokens < 0).any():
        examples = examples_in(heldout.tokens)
        size = max(1, int((np.diff(examples.label_ends, prepend=0) > 0).sum()))
        found = {cut: np.isin(examples.labels, best[:cut]).sum() / cut for cut in cuts}
        return {f"precision@{cut}": float(hits / size) for cut, hits in found.items()}
    targets = np.concatenate(
        [
            heldout.tokens[a + 1 : b]
            for a, b in zip(heldout.indptr, heldout.indptr[1:], strict=False)
        ]
    )
    targets = targets[targets != UNKNOWN_ID]
    size = max(1, len(targets))
    return {f"accuracy@{cut}": float(np.isin(targets, best[:cut]).sum() / size) for cut in cuts}


def _windows(tokens: Int64Array, context: int) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Inputs and targets of one text, in batches of sequences of one length."""
    whole = (len(tokens) - 1) // context
    for start in range(0, whole, _SEQUENCES):
        count = min(_SEQUENCES, whole - start)
        piece = tokens[start * context : (start + count) * context + 1]
        yield piece[:-1].reshape(count, context), piece[1:].reshape(count, context)
    rest = tokens[whole * context :]
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]
