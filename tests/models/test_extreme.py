from __future__ import annotations

import numpy as np
import pytest
import torch

from privrec.data.extreme import Examples, Invented
from privrec.embedding.subspace import Subspace
from privrec.models.classifier import BagOfWords, ExtremeClassifier
from privrec.models.sparse_output import RowAdam, SparseOutput
from privrec.randomness import SecretRoot

WORLD = Invented(1000, 2000, words=20, labels_each=2, clusters=40, zipf=0.8)
DIM = 32


def precision(best: list[int], examples: Examples) -> float:
    own = examples.padded_labels() == np.array(best)[:, None]
    return float(own.any(axis=1).mean())


def test_the_hidden_vector_is_the_weighted_sum_of_the_words() -> None:
    words, examples = BagOfWords(1000, DIM), WORLD.examples(5)
    dense = np.zeros((5, 1000), np.float32)
    np.add.at(dense, (np.repeat(np.arange(5), 20), examples.features), examples.values)
    wanted = torch.relu(torch.from_numpy(dense) @ words.weight + words.bias)
    hidden = words(examples)
    torch.testing.assert_close(hidden, wanted)
    hidden.sum().backward()
    assert words.weight.grad is not None
    assert words.weight.grad.is_sparse


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tenth_of_the_labels_learns_most_of_what_all_learn(compressed: bool) -> None:
    train, test = WORLD.examples(3000), WORLD.examples(400, "test")
    table = Subspace.sized(2000, DIM, block=8, key=1, compression=2) if compressed else None
    reached = {}
    for share in (0.1, 1.0):
        layer = SparseOutput(
            2000, DIM, share=share, table=table, init_std=0.02, root=SecretRoot.known(b"learns")
        )
        model = ExtremeClassifier(1000, layer)
        optimizer = RowAdam(model.parameters(), lr=1e-2)
        for epoch in range(4):
            for part in train.batches(64, np.random.default_rng(epoch).permutation(3000)):
                optimizer.zero_grad()
                model.loss(part).backward()
                optimizer.step()
        best = layer(model.words(test)).argmax(1)
        reached[share] = precision(best.tolist(), test)
        model.eval()
        scores, found = model.topk(test, 3)
        assert scores.shape == found.shape == (400, 3)
    frequent = precision([0] * len(test), test)
    assert reached[1.0] > frequent + 0.2
    # The tests' own error is .024, and 3,000 examples are few: the docs have the real comparison.
    assert reached[0.1] > 0.75 * reached[1.0]
