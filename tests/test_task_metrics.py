"""What finetune and evaluate measure, beside figures worked out by hand and other definitions."""

import pytest

for package in ("sklearn", "matplotlib"):
    pytest.importorskip(package)

import torch  # noqa: E402

from bigmodel_fast.data import DataError, Example  # noqa: E402
from bigmodel_fast.train.classification import classify  # noqa: E402
from bigmodel_fast.train.tasks.entities import entities, entity_scores, has_entities  # noqa: E402
from bigmodel_fast.train.tasks.labels import Labels  # noqa: E402
from bigmodel_fast.train.tasks.questions import answers_of, f1_of_words, normalised  # noqa: E402


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-P I-P O B-L", {("P", 1, 2), ("L", 4, 4)}),
        ("B-P B-P I-P", {("P", 0, 0), ("P", 1, 2)}),  # two neighbours of one type
        ("I-P I-P O I-L", {("P", 0, 1), ("L", 3, 3)}),  # I- without a B- before it
        ("B-P I-L I-L", {("P", 0, 0), ("L", 1, 2)}),  # another type goes on
        ("B-P I-P E-P S-L S-L O", {("P", 0, 2), ("L", 3, 3), ("L", 4, 4)}),
        ("B-P L-P U-L I-L", {("P", 0, 1), ("L", 2, 2), ("L", 3, 3)}),
        ("E-P B-L", {("P", 0, 0), ("L", 1, 1)}),
        ("O O", set()),
        ("NOUN VERB", set()),
        ("B-a-b I-a-b", {("a-b", 0, 1)}),
    ],
)
def test_entities_in_tags(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected
    assert has_entities(tags.split()) == bool(expected)


def test_an_entity_counts_when_its_type_and_both_ends_are_right() -> None:
    truth = [["B-P", "I-P", "O", "B-L", "O"], ["B-P", "O", "B-L", "I-L"]]
    said = [["B-P", "I-P", "O", "B-P", "O"], ["B-P", "O", "B-L", "O"]]
    (precision, recall, f1), kinds = entity_scores(truth, said)
    assert (precision, recall, f1) == (2 / 4, 2 / 4, 0.5)  # P: 2 of 3 said, 2 of 2 there; L: 0 of 1 said, 0 of 2 there
    found = {kind.name: (kind.precision, kind.recall, kind.f1, kind.samples) for kind in kinds}
    assert found == {"P": (2 / 3, 1.0, 0.8, 2), "L": (0.0, 0.0, 0.0, 2)}
    assert entity_scores([["O"]], [["O"]]) == ((0.0, 0.0, 0.0), ())


def test_macro_figures_and_mcc() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2, 1, 0])
    report = classify(predicted, labels, ("a", "b", "c"))
    assert report.accuracy == 0.6
    assert report.macro_recall == pytest.approx((3 / 4 + 1 / 2 + 2 / 4) / 3)
    assert report.macro_precision == pytest.approx((3 / 5 + 1 / 3 + 2 / 2) / 3)
    assert report.macro_f1 == pytest.approx(sum(c.f1 for c in report.classes) / 3)
    # (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)), Gorodkin 2004
    c, s, p, t = 6, 10, (5, 3, 2), (4, 2, 4)
    top = c * s - sum(a * b for a, b in zip(p, t, strict=True))
    bottom = ((s * s - sum(a * a for a in p)) * (s * s - sum(b * b for b in t))) ** 0.5
    assert report.mcc == pytest.approx(top / bottom)


def test_answers_are_compared_as_squad_does() -> None:
    assert normalised("The  U.S.A. - an area!") == ["usa", "area"]
    assert f1_of_words("in the old town", "Old Town") == pytest.approx(2 * 2 / (3 + 2))
    assert f1_of_words("", "the") == 1.0  # nothing is left of either
    assert f1_of_words("a b", "c") == 0.0


def example(**values: object) -> Example:
    return Example("file:7", {name: name for name in values}, values)


def test_forms_of_an_answer() -> None:
    context = "one two one"
    assert answers_of(example(context=context, answers="one")) == [(0, "one")]
    assert answers_of(example(context=context, answers="one", answer_start="8")) == [(8, "one")]
    assert answers_of(example(context=context, answers=["two", "one"])) == [(4, "two"), (0, "one")]
    assert answers_of(example(context=context, answers={"text": ["one"], "answer_start": [8]})) == [(8, "one")]
    assert answers_of(example(context=context, answers={"text": [], "answer_start": []})) == []
    with pytest.raises(DataError, match="file:7: column answers: expected a text"):
        answers_of(example(context=context, answers=3))
    with pytest.raises(DataError, match="file:7: column answer_start: expected a whole number, got x"):
        answers_of(example(context=context, answers="one", answer_start="x"))


def labelled(*names: str, known: dict[int, str] | None = None) -> Labels:
    return Labels(((name, example(label=name)) for name in names), known or {}, "label")


def test_order_of_labels() -> None:
    assert labelled("10", "9", "-1").names == ["-1", "9", "10"]
    assert labelled("b", "10", "9").names == ["10", "9", "b"]
    assert labelled("b", "a", "b", known={0: "b", 1: "c", 2: "a"}).names == ["b", "c", "a"]
    assert labelled("b", "a", known={0: "LABEL_0", 1: "LABEL_1"}).names == ["a", "b"]
    assert labelled("b", "z", known={0: "b", 1: "a"}).names == ["b", "z"]
    assert labelled(known={0: "LABEL_0", 1: "LABEL_1"}).names == ["LABEL_0", "LABEL_1"]
    assert labelled("b", "a", "b").counts == [1, 2]
    with pytest.raises(DataError, match="file:7: column label: unknown label c; the model's are a, b"):
        labelled("a", "b").number("c", example(label="c"))
