"""How well a language model predicts the next word of texts that no device trained on.

The whole softmax is looked at, whatever part of it devices train. The unknown word is never
predicted and never counted: it is no word that a keyboard could offer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from privrec.data.text import UNKNOWN_ID, Corpus
from privrec.device.words import Language
from privrec.randomness import rng_for

FloatArray = NDArray[np.float32]
Int64Array = NDArray[np.int64]

_SEQUENCES = 8  # at a time, so that their scores stay in a cache
_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions counted text by text.

    Args:
        tokens: positions that count, int64 [texts].
        hits: those whose word was predicted, int64 [texts] by metric.
        losses: summed negative log-likelihood, float64 [texts].
    """

    tokens: Int64Array
    hits: Mapping[str, Int64Array]
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
    language: Language, weights: FloatArray, texts: Corpus, cuts: Sequence[int]
) -> Predicted:
    """Predict every next word of some texts, from windows of the model's context.

    Args:
        language: the meaning of the weights.
        weights: the shared vector in memory form.
        texts: what is predicted; words that the model does not hold are unknown.
        cuts: ``accuracy@k`` is computed for each.
    """
    words = language.vectors.items
    table = torch.from_numpy(
        language.vectors.gather(language.layout.memory_of(weights), np.arange(words))
    )
    biases = torch.from_numpy(
        language.biases.gather(language.layout.biases_of(weights)[:, None], np.arange(words))[:, 0]
    )
    dense = torch.from_numpy(language.layout.dense_of(weights).copy())
    most = max(cuts)
    tokens = np.zeros(texts.n_users, np.int64)
    losses = np.zeros(texts.n_users)
    ranked = np.zeros((texts.n_users, most + 1), np.int64)
    with torch.no_grad():
        for text in range(texts.n_users):
            for inputs, targets in _windows(texts, text, language.model.context, words):
                hidden = language.model.hidden(table[torch.from_numpy(inputs)], dense)
                wanted = torch.from_numpy(targets.ravel())
                counts = wanted != UNKNOWN_ID
                scores = torch.addmm(biases, hidden.flatten(0, 1)[counts], table.T)
                scores[:, UNKNOWN_ID] = -torch.inf
                own = scores.gather(1, wanted[counts][:, None])
                # Of the best, one more than is asked; a tie or what is no number counts against it.
                best = torch.topk(scores, min(most + 1, words), sorted=False).values
                above = (~(best < own)).sum(1).clamp(min=1) - 1
                ranked[text] += np.bincount(above.numpy(), minlength=most + 1)
                tokens[text] += len(own)
                losses[text] += float((torch.logsumexp(scores, 1) - own[:, 0]).sum())
    within = np.cumsum(ranked, axis=1)
    hits = {f"accuracy@{cut}": within[:, cut - 1] for cut in cuts}
    return Predicted(tokens, hits, np.nan_to_num(losses, nan=np.inf))


def commonest(train: Corpus, heldout: Corpus, cuts: Sequence[int]) -> dict[str, float]:
    """Accuracy of always predicting the commonest words, which is what popularity comes to."""
    counts = train.item_counts()
    counts[UNKNOWN_ID] = -1
    best = np.argsort(-counts, kind="stable")[: max(cuts)]
    targets = np.concatenate(
        [
            heldout.tokens[a + 1 : b]
            for a, b in zip(heldout.indptr, heldout.indptr[1:], strict=False)
        ]
    )
    targets = targets[targets != UNKNOWN_ID]
    size = max(1, len(targets))
    return {f"accuracy@{cut}": float(np.isin(targets, best[:cut]).sum() / size) for cut in cuts}


def _windows(
    texts: Corpus, text: int, context: int, words: int
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Inputs and targets of one text, in batches of sequences of one length."""
    tokens = texts.tokens[texts.indptr[text] : texts.indptr[text + 1]].astype(np.int64)
    tokens[tokens >= words] = UNKNOWN_ID
    whole = (len(tokens) - 1) // context
    for start in range(0, whole, _SEQUENCES):
        count = min(_SEQUENCES, whole - start)
        piece = tokens[start * context : (start + count) * context + 1]
        yield piece[:-1].reshape(count, context), piece[1:].reshape(count, context)
    rest = tokens[whole * context :]
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]
