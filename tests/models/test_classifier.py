from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import privrec
from privrec.data.texts import bags
from privrec.errors import DataError, UsageError
from privrec.models import classifier
from privrec.models.classifier import Epoch, SparseClassifier

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


@pytest.mark.parametrize(
    ("n", "rows_each", "settings", "least"),
    [
        # With DENSE and ROOM in proportion; a guess is right in 1 of 400.
        (400, 5, {"dim": 32, "epochs": 12, "features": 1 << 10, "lr": 1e-2}, 0.75),
        pytest.param(
            5000, 4, {"dim": 64, "epochs": 8, "features": 1 << 12}, 0.9, marks=pytest.mark.slow
        ),
    ],
)
def test_a_sparse_output_learns_as_well(
    n: int, rows_each: int, settings: dict[str, Any], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more labels than are active in a batch."""
    if n <= classifier.DENSE:
        monkeypatch.setattr(classifier, "DENSE", 256)
        monkeypatch.setattr(classifier, "ROOM", 96)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n, n * rows_each)
    texts = [f"w{label % 97} v{label % 89} u{label % 83}" for label in labels]
    names = [f"label {label}" for label in labels]
    model = SparseClassifier(batch=64, **settings)
    told: list[Epoch] = []
    model.fit((texts, names), on_epoch=told.append)
    assert told[0].active < n / 2
    assert model.evaluate((texts[:500], names[:500]))["precision@1"] > least


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
    bagged = bags(["One two two", "", "two"], 1000)
    assert bagged.ends.tolist() == [2, 2, 3]
    assert bagged.features[1] == bagged.features[2]
    np.testing.assert_allclose((bagged.values[:2] ** 2).sum(), 1, rtol=1e-6)
    assert bagged.values[1] > bagged.values[0]
    assert bagged.values[2] == 1
    assert len(bags([], 10)) == 0


def test_tokens_are_what_stands_between_blanks_or_words_by_choice() -> None:
    assert bags(["a, a\tb\u00a0b -b"], 1 << 20).ends.tolist() == [4]
    assert bags(["a, a\tb\u00a0b -b"], 1 << 20, "words").ends.tolist() == [2]
    with pytest.raises(UsageError, match="tokens = 'letters'"):
        SparseClassifier(tokens="letters")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["की", "का", "के", "को"], ["की", "का", "के", "को"]),
        (["กิ", "กี", "กุ"], ["1", "2", "3"]),
        (["A+", "A-", "O+", "O-"], ["+", "-", "+", "-"]),
        (["-5", "5", "-12", "12"], ["frost", "mild", "frost", "mild"]),
        (["c", "c++", "c#", "👍", "👎", "$", "€"], list("abcdefg")),
    ],
)
@pytest.mark.parametrize("columns", [1, 2])
def test_marks_and_signs_tell_words_apart(
    texts: list[str], labels: list[str], columns: int, tmp_path: Path
) -> None:
    model = SparseClassifier(dim=16, epochs=30, features=4096)
    source: Any = (texts * 30, labels * 30)
    if columns == 2:
        model.set_params(text=["text", "the same"])
        source = tmp_path / "table.csv"
        rows = zip(texts * 30, texts * 30, labels * 30, strict=True)
        lines = ["text,the same,label", *map(",".join, rows)]
        source.write_text("\n".join(lines), encoding="utf-8")
    assert model.fit(source).evaluate(source)["precision@1"] == 1


# ---------------------------------------------------------------- labels of any type


@pytest.mark.parametrize(
    "labels",
    [
        ["x", "y"], [0, 1], [True, False], [0.5, -1.0], np.array([7, 9]), np.array(["x", "y"]),
        torch.tensor([3, 4]), [np.int8(1), 2],
    ],
)  # fmt: skip
def test_labels_are_predicted_as_they_came(labels: Any) -> None:
    own = [label.item() if hasattr(label, "item") else label for label in labels]
    many = torch.cat([labels] * 20) if isinstance(labels, torch.Tensor) else list(labels) * 20
    model = SparseClassifier(dim=8, epochs=20, features=512).fit(["a b", "c d"] * 20, many)
    found = model.predict(np.array(["a b", "c d"]))  # type: ignore[arg-type]
    assert found == own
    assert [type(label) for label in found] == [type(label) for label in own]
    assert model.score(["a b", "c d"], own) == 1
    other = [7, 8] if isinstance(own[0], str) else ["7", "8"]
    with pytest.raises(DataError, match="that were learned are of type"):
        model.evaluate((["a b", "c d"], other))


def test_rows_of_several_numbers() -> None:
    texts, labels = ["a", "b", "a b"] * 20, [[1], [2], (1, 2, 2)] * 20
    model = SparseClassifier(dim=8, epochs=20, features=512).fit((texts, labels))
    assert sorted(model.predict_top(["a b"], 2)[0]) == [1, 2]
    assert model.evaluate((texts, labels))["precision@1"] == 1


@pytest.mark.parametrize(
    "labels",
    [
        [None, 1], [1, None], [1, float("nan")], [float("inf"), 1.0], [1, "1"], [1, True],
        [1, 1.0], ["a", b"b"], ["a", ["b", 1]], [[], [1]], ["", "a"], [{"a": 1}, {1: 2}],
        [np.float64("nan"), 1.0], [1j, 2j],
    ],
)  # fmt: skip
def test_labels_that_are_none_are_refused_with_their_row(labels: Any) -> None:
    with pytest.raises(DataError, match=r"row [01]: labels .* at least one label"):
        SparseClassifier().fit((["a", "b"], labels))


@pytest.mark.parametrize("bad", [None, float("nan"), 7, b"a", ["a"]])
def test_what_is_no_text_is_refused_with_its_row(bad: Any) -> None:
    texts: Any = ["a b", bad]
    model = SparseClassifier(dim=8, epochs=1, features=512).fit((["a b", "c d"], ["x", "y"]))
    for call in (
        model.predict,
        lambda t: model.fit((t, ["x", "y"])),
        lambda t: model.score(t, "x"),
    ):
        with pytest.raises(DataError, match="row 1: text"):
            call(texts)


@pytest.mark.parametrize(
    "source",
    [
        (["a", "b"], "xy"), ("ab", ["x", "y"]), (["a", "b"], np.eye(2)),
        (np.array([["a", "b"]]), ["x"]), (["a", "b"], {"x": 1, "y": 2}),
    ],
)  # fmt: skip
def test_what_would_be_taken_apart_is_refused(source: Any) -> None:
    """A string has letters, a matrix of ones and zeros has rows that look like labels."""
    with pytest.raises(UsageError, match="one for each row"):
        SparseClassifier().fit(source)
    with pytest.raises(UsageError, match="one for each row"):
        SparseClassifier().fit(*source)


# ---------------------------------------------------------------- kept and copied


@pytest.fixture(scope="module")
def sparse() -> SparseClassifier:
    """A classifier of so many labels that only a few are active, which has an index."""
    rng, n = np.random.default_rng(0), 300
    labels = rng.integers(0, n, 2_000)
    texts = [f"w{label % 19} v{label % 17}" for label in labels]
    model = SparseClassifier(dim=16, epochs=2, batch=64, features=1 << 10, share=0.5)
    return model.fit(texts, labels)  # type: ignore[arg-type]


QUERIES = [f"w{n % 19} v{n % 17}" for n in range(200)]


def saved(model: SparseClassifier, folder: Path) -> SparseClassifier:
    model.save(folder / "model.safetensors")
    return SparseClassifier.load(folder / "model.safetensors")


def pickled(model: SparseClassifier, folder: Path) -> SparseClassifier:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]  # noqa: S301


def by_torch(model: SparseClassifier, folder: Path) -> SparseClassifier:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)  # type: ignore[no-any-return]


KEPT: dict[str, Any] = {
    "saved": saved, "pickled": pickled, "torch": by_torch,
    "copied": lambda model, folder: copy.deepcopy(model),
}  # fmt: skip


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("asked", [False, True])
def test_a_kept_classifier_predicts_what_it_did(
    keep: str, asked: bool, sparse: SparseClassifier, tmp_path: Path
) -> None:
    model = copy.deepcopy(sparse)
    before = model.predict_top(QUERIES, 5) if asked else None
    again = KEPT[keep](model, tmp_path)
    assert again.predict_top(QUERIES, 5) == model.predict_top(QUERIES, 5)
    assert before is None or before == model.predict_top(QUERIES, 5)
    assert again.get_params() == model.get_params()
    assert again.labels == model.labels
    assert type(again.labels[0]) is int
    twice = KEPT[keep](again, tmp_path)
    assert twice.predict_top(QUERIES, 5) == model.predict_top(QUERIES, 5)


@pytest.mark.parametrize("keep", KEPT)
def test_a_small_classifier_of_texts_is_kept_too(keep: str, tmp_path: Path) -> None:
    texts, labels = zip(*rows(100, 0), strict=True)
    model = SparseClassifier(text=["a", "b"], features=256, dim=np.int64(8), epochs=1)  # type: ignore[arg-type]
    again = KEPT[keep](model.fit((texts, labels)), tmp_path)
    assert again.predict(texts) == model.predict(texts)
    assert again.predict_top(["refund1"], 5) == model.predict_top(["refund1"], 5)


def test_a_clone_has_the_settings_and_nothing_learned(sparse: SparseClassifier) -> None:
    columns = ["a", "b"]
    model = SparseClassifier(text=columns, dim=4)
    assert model.get_params()["text"] is columns  # clones compare by identity
    clone = SparseClassifier(**copy.deepcopy(sparse).get_params())
    assert clone.get_params() == sparse.get_params()
    assert clone.model is None
    fitted = copy.deepcopy(sparse)
    assert fitted.set_params(epochs=3) is fitted
    assert (fitted.epochs, fitted.dim, fitted.model) == (3, 16, None)
    with pytest.raises(UsageError, match="depth: is no setting"):
        fitted.set_params(depth=3)
    with pytest.raises(UsageError, match="epochs = 0"):
        fitted.set_params(epochs=0)


def test_scikit_learn_clones_and_cross_validates_it() -> None:
    base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")
    selection = pytest.importorskip("sklearn.model_selection")
    model = SparseClassifier(dim=8, epochs=20, features=512)
    assert base.clone(model).get_params() == model.get_params()
    texts, labels = ["a b", "c d"] * 20, [0, 1] * 20
    assert selection.cross_val_score(model, texts, labels, cv=3).tolist() == [1, 1, 1]


def test_what_was_never_fitted_or_saved_is_refused(
    sparse: SparseClassifier, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    with pytest.raises(UsageError, match="nothing was learned yet"):
        SparseClassifier().save(path)
    with pytest.raises(DataError, match="nowhere: not a classifier"):
        SparseClassifier.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a classifier"):
        SparseClassifier.load(tmp_path)
    sparse.save(path)
    whole = path.read_bytes()
    spoilt = {
        "cut": whole[:-1],
        "empty": b"",
        "format": whole.replace(b"version 1", b"version 9"),
        "settings": whole.replace(b'dim\\": 16', b'dim\\": 61'),
        "labels": whole.replace(b'labels\\": [', b'labels\\":9['),
        "unknown": whole.replace(b'\\"epochs', b'\\"epocks'),
    }
    for name, content in spoilt.items():
        assert content != whole, name
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a classifier that save"):
            SparseClassifier.load(path)


def test_an_index_that_finds_too_few_is_helped_out() -> None:
    rng, n = np.random.default_rng(0), 300
    labels = [f"label {label}" for label in rng.integers(0, n, 1_000)]
    model = SparseClassifier(
        dim=8, epochs=1, batch=64, features=1 << 10, share=0.5, selector="simhash"
    ).fit(labels, labels)
    many = len(model.labels) - 1
    found = model.predict_top(["label 3", ""], many)
    assert all(len(set(row)) == many for row in found)
