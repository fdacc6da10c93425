from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import privrec
from privrec.classifier import Epoch, SparseClassifier
from privrec.data.labelled import bags
from privrec.errors import DataError, UsageError

SUBJECTS = ("parcel", "refund", "password", "invoice", "warranty")


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Each subject has words of its own among words that tell nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        subject = SUBJECTS[rng.integers(len(SUBJECTS))]
        told = [f"{subject}{rng.integers(6)}" for _ in range(3)]
        filler = [f"word{rng.integers(300)}" for _ in range(8)]
        made.append((" ".join(rng.permutation(told + filler)), subject))
    return made


def written(path: Path, data: list[tuple[str, str]], head: str = "text,label") -> Path:
    path.write_text("\n".join([head, *(f'"{text}",{label}' for text, label in data)]) + "\n")
    return path


def test_it_learns_from_a_file_what_the_words_tell(tmp_path: Path) -> None:
    train, test = (written(tmp_path / f"{k}.csv", rows(n, k)) for k, n in ((0, 600), (1, 200)))
    told: list[Epoch] = []
    model = privrec.SparseClassifier(features=1 << 12, dim=16)
    assert model.fit(train, on_epoch=told.append) is model
    found = model.evaluate(test)
    assert found["precision@1"] > 0.95
    assert found["rows"] == 200
    assert found["unknown_labels"] == 0
    assert [each.number for each in told] == list(range(1, 11))
    assert told[-1].loss < told[0].loss
    assert model.predict(["Refund1 REFUND2"]) == ["refund"]
    assert len(model.predict(test)) == 200
    assert sorted(model.predict_top(["refund1"], 5)[0]) == sorted(SUBJECTS)


def test_labels_that_tell_nothing_are_not_learned() -> None:
    data = rows(600, 0)
    shuffled = np.random.default_rng(3).permutation([label for _, label in data]).tolist()
    model = SparseClassifier(features=1 << 12, dim=16)
    model.fit(([text for text, _ in data], shuffled))
    texts, labels = zip(*rows(300, 1), strict=True)
    assert model.evaluate((texts, labels))["precision@1"] < 0.4


def test_a_sparse_output_learns_as_well() -> None:
    """Far more labels than are active in a batch."""
    rng, n = np.random.default_rng(0), 5000
    labels = rng.integers(0, n, 20_000)
    texts = [f"w{label % 97} v{label % 89} u{label % 83}" for label in labels]
    names = [f"label {label}" for label in labels]
    model = SparseClassifier(dim=64, epochs=8, batch=64, features=1 << 12)
    told: list[Epoch] = []
    model.fit((texts, names), on_epoch=told.append)
    assert told[0].active < n / 2
    assert model.evaluate((texts[:500], names[:500]))["precision@1"] > 0.9


def test_several_labels_and_columns_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    lines = ["colour\tsize\tkinds"]
    lines += ["red\tbig\ta|b", "blue\tbig\tb", "red\tsmall\ta|c", "blue\tsmall\tc"] * 40
    path.write_text("\n".join(lines))
    model = SparseClassifier(
        text=["colour", "size"], label="kinds", between="|", features=512, dim=8, epochs=20
    )
    model.fit(path)
    assert set(model.labels) == {"a", "b", "c"}
    assert model.evaluate(path)["precision@1"] > 0.95
    assert model.predict(path)[1] == "b"


def test_the_same_seed_gives_the_same_model() -> None:
    texts, labels = zip(*rows(200, 0), strict=True)
    first, again, other = (
        SparseClassifier(features=256, dim=8, epochs=1, seed=seed).fit((texts, labels))
        for seed in (1, 1, 2)
    )
    assert first.model is not None
    assert again.model is not None
    assert other.model is not None
    weights = [each.model.words.weight for each in (first, again, other)]  # type: ignore[union-attr]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_a_label_that_was_never_learned_counts_as_missed() -> None:
    texts, labels = zip(*rows(300, 0), strict=True)
    model = SparseClassifier(features=1 << 12, dim=16).fit((texts, labels))
    right = model.evaluate((texts, labels))
    wrong = model.evaluate((texts, ["never seen"] * len(texts)))
    assert right["precision@1"] > 0.95
    assert wrong["precision@1"] == 0
    assert wrong["unknown_labels"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("text,label\n", "there is no row"),
        ("text,lable\na,b\n", "column 'label' is not among 'text', 'lable'.*perhaps 'lable'"),
        ("text,text,label\na,b,c\n", "column 'text' is twice or more"),
        ("text,label\na,b\nc,\n", "line 3: column 'label' is empty"),
        ("text,label\na,b\nc,d,e\n", "line 3: 3 fields; the header has 2"),
        ('text,label\na,b\n"c,d\n', "line 3"),
        ("text,label\na,b\nc,b\n", "1 distinct labels in 2 rows"),
        (b"text,label\na,\xff\n", "utf-8"),
    ],
)
def test_bad_files_are_refused_with_their_line(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"(?i){message}"):
        SparseClassifier().fit(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        SparseClassifier().fit(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((["a"], ["x", "y"]), "1 texts and 2 rows of labels"),
        (([], []), "0 texts"),
        ((["a", "b"], ["x", ""]), "row 1"),
        ((["a", "b"], ["x", []]), "row 1"),
        ((["a", 7], ["x", "y"]), "row 1"),
    ],
)
def test_bad_rows_are_refused(source: tuple[list[str], list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SparseClassifier().fit(source)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing was learned yet"):
        SparseClassifier().predict(["a"])
    with pytest.raises(UsageError, match="source of type list"):
        SparseClassifier().fit(["a"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="epochs = 0"):
        SparseClassifier(epochs=0)
    with pytest.raises(UsageError, match="share = 2"):
        SparseClassifier(share=2.0)


def test_words_have_the_same_places_everywhere_and_texts_length_one() -> None:
    bagged = bags(["One two, two", "", "two"], 1000)
    assert bagged.ends.tolist() == [2, 2, 3]
    assert bagged.features[1] == bagged.features[2]
    np.testing.assert_allclose((bagged.values[:2] ** 2).sum(), 1, rtol=1e-6)
    assert bagged.values[1] > bagged.values[0]
    assert bagged.values[2] == 1
    assert len(bags([], 10)) == 0
