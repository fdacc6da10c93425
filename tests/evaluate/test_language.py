"""Predictions of next words, counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privrec.data.corpus import UNKNOWN, Corpus, dealt, examples_in
from privrec.data.synthetic import Invented
from privrec.device.local import LocalModel
from privrec.device.tier import ModelView
from privrec.embedding.subspace import Subspace
from privrec.embedding.table import PlainTable, Table
from privrec.evaluate.evaluator import LabelQuestions, WordQuestions, commonest, predict
from privrec.evaluate.metrics import Evaluation
from privrec.models.words import NextWord, WordBag
from privrec.randomness import rng_for

WORDS, DIM = 30, 8
MODEL = NextWord(DIM, 2, 10, 1, 4)


def language(table: Table) -> ModelView[NextWord]:
    return ModelView.of(MODEL, table, PlainTable.of(WORDS, 1, block=1))


def texts(*lengths: int) -> Corpus:
    tokens = rng_for(0, "texts").integers(0, WORDS, sum(lengths)).astype(np.int32)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    words = (UNKNOWN, *map(str, range(1, WORDS)))
    return Corpus(bounds, tokens, tuple(map(str, lengths)), words)


def weights(of: ModelView[NextWord]) -> np.ndarray:
    found = rng_for(1, "weights").normal(0, 0.5, of.layout.size).astype(np.float32)
    of.layout.dense_of(found)[...] = MODEL.initial_dense(rng_for(2, "dense"))
    return found


def one_by_one(
    of: ModelView[NextWord], vector: np.ndarray, tokens: np.ndarray, cut: int
) -> tuple[int, int]:
    rows = torch.from_numpy(of.vectors.gather(of.layout.memory_of(vector), np.arange(WORDS)))
    biases = torch.from_numpy(of.layout.biases_of(vector))
    dense = torch.from_numpy(of.layout.dense_of(vector))
    hits = counted = 0
    for place in range(1, len(tokens)):
        first = (place - 1) // MODEL.context * MODEL.context
        words = rows[torch.from_numpy(tokens[first:place].astype(np.int64))]
        scores = rows @ MODEL.hidden(words[None], dense)[0, -1] + biases
        if tokens[place] == 0:
            continue
        best = [w for w in torch.argsort(-scores).tolist() if w != 0][:cut]
        hits += tokens[place] in best
        counted += 1
    return hits, counted


@pytest.mark.parametrize(
    "table", [PlainTable.of(WORDS, DIM, block=4), Subspace.sized(WORDS, DIM, block=4, key=3)]
)
def test_predictions_are_what_a_loop_finds(table: Table) -> None:
    of, corpus = language(table), texts(2, 9, 300, 31)
    vector = weights(of)
    found = predict(WordQuestions(), LocalModel(of, vector), corpus, (1, 3))
    for text in range(4):
        tokens = corpus.history(text)
        for cut in (1, 3):
            hits, counted = one_by_one(of, vector, tokens, cut)
            assert (found.values[f"accuracy@{cut}"][text], found.sizes[text]) == (hits, counted)
    assert 0 < found.summary()["accuracy@1"] < found.summary()["accuracy@3"] < 1


def test_labels_are_found_as_a_loop_finds_them() -> None:
    model, examples = WordBag(16, DIM), Invented(99, WORDS - 1, 5, 2.5, 3).examples(30)
    corpus = dealt(examples, 10)
    table, biases = PlainTable.of(WORDS, DIM, block=4), PlainTable.of(WORDS, 1, block=1)
    of = ModelView.of(model, table, biases)
    vector = rng_for(1, "weights").normal(0, 0.5, of.layout.size).astype(np.float32)
    rows, shifts = of.layout.memory_of(vector).reshape(WORDS, DIM), of.layout.biases_of(vector)
    dense = torch.from_numpy(of.layout.dense_of(vector))
    for held in (corpus, corpus.renumbered(np.arange(WORDS), 12)):
        found = predict(LabelQuestions(), LocalModel(of, vector), held, (1, 3))
        hits, counted = dict.fromkeys((1, 3), 0.0), 0
        whole = examples_in(held.items).hashed(16)
        for one in (whole.take(np.array([row])) for row in range(30)):
            if not len(one.labels):
                continue
            scores = rows @ model.hidden(one, dense)[0].numpy() + shifts
            best = [label for label in np.argsort(-scores) if label]
            counted += 1
            for cut in hits:
                hits[cut] += len(set(best[:cut]) & set(one.labels)) / cut
        assert found.sizes.sum() == counted
        for cut, value in hits.items():
            assert found.summary()[f"precision@{cut}"] == pytest.approx(value / counted)
    assert counted < 30


def test_the_commonest_labels_are_the_baseline_of_labels() -> None:
    train = dealt(Invented(99, WORDS - 1, 5, 2.5, 3).examples(60), 10)
    best = 1 + np.argsort(-train.item_counts()[1:], kind="stable")[:3]
    examples = examples_in(train.items)
    own = np.split(examples.labels, examples.label_ends[:-1])
    found = commonest(LabelQuestions(), train, train, (1, 3))
    for cut in (1, 3):
        value = np.mean([np.isin(labels, best[:cut]).sum() / cut for labels in own])
        assert found[f"precision@{cut}"] == pytest.approx(value)


def test_a_model_that_is_no_number_or_constant_earns_nothing() -> None:
    of = language(PlainTable.of(WORDS, DIM, block=4))
    for vector in (weights(of) * np.float32(np.nan), weights(of) * 0):
        found = predict(WordQuestions(), LocalModel(of, vector), texts(50), (1,))
        assert found.summary()["accuracy@1"] == 0


def test_intervals_hold_the_figure_and_shrink_with_texts() -> None:
    hits = rng_for(0, "x").binomial(50, 0.3, 400)
    few, many = (
        Evaluation(np.arange(n), {"accuracy@1": hits[:n]}, np.full(n, 50)) for n in (20, 400)
    )
    bounds = [each.intervals(1)["accuracy@1"] for each in (few, many)]
    assert all(low < 0.3 < high for low, high in bounds)
    assert bounds[1][1] - bounds[1][0] < 0.4 * (bounds[0][1] - bounds[0][0])


def test_the_commonest_words_are_those_of_the_training_texts() -> None:
    train, heldout = texts(200), texts(3, 60)
    counts = np.bincount(train.items, minlength=WORDS)
    counts[0] = -1
    best = int(np.argmax(counts))
    targets = np.concatenate((heldout.items[1:3], heldout.items[4:]))
    targets = targets[targets != 0]
    assert commonest(WordQuestions(), train, heldout, (1,)) == {
        "accuracy@1": (targets == best).mean()
    }
