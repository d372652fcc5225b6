"""Rows become a recipe's items or rejections; columns, splits and duplicates are judged before that."""

import json
import types

import pytest
from datasets import ClassLabel, Dataset

from evaluation.sources.rows import Column, read_recipe
from evaluation.sources.tables import SourceError
from evaluation.tasks import Field, Item, RowError, Source
from tests.evaluation.test_sources import Where


def make_item(item_id, row):
    if not isinstance(row.get("ask"), str):
        raise RowError("ask", f"expected text, got {row.get('ask')!r}")
    label = {"0": "yes", "1": "no"}.get(str(row["label"]), row["label"])
    if label not in ("yes", "no"):
        raise RowError("label", f"expected yes or no, got {row['label']!r}")
    return Item(item_id, "small", " ".join([row["ask"], row.get("hint") or ""]).strip(), label, {"answer": label})


RECIPE = types.SimpleNamespace(
    NAME="small",
    SOURCE=Source("org/small", subset="main", test="test"),
    FIELDS={
        "ask": Field("question", True, "what is asked"),
        "label": Field("label", True, "yes or no"),
        "hint": Field("hint", False, "a hint"),
    },
    make_item=make_item,
    group=lambda item: item.prompt,
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(n, label="yes", **more):
    return [{"question": f"q{i}", "label": label, "hint": "", **more} for i in range(n)]


def read(source, columns=None, **more):
    return read_recipe(RECIPE, Where(source=source, columns=columns or {}, **more))


def problems(call):
    with pytest.raises(SourceError) as caught:
        call()
    return caught.value.problems


def test_every_row_is_an_item_or_refused_with_row_column_and_reason(tmp_path):
    rows = [
        {"question": question, "label": label}  # row 3 is refused, so row 6 repeats nothing
        for question, label in (("a", "yes"), (3, "no"), ("b", "maybe"), ("a", "yes"), ("a", "no"), ("b", "no"),
                                ("x" * 30, "yes"), ("x" * 27, "yes"))
    ]  # fmt: skip
    file = tmp_path / "d.jsonl"
    lines(file, [*rows, {"label": "yes"}])
    file.write_text(file.read_text() + '{"question":\n')
    made = read(str(file), max_chars=30)
    assert [(i.id, i.prompt, i.completion) for i in made.train] == [
        ("small-train-1", "a", "yes"), ("small-train-6", "b", "no"), ("small-train-8", "x" * 27, "yes")]  # fmt: skip
    assert made.test is None and (made.duplicates, made.too_long) == (2, 1)
    assert made.most_refused == {"train": 0.7} and made.facts["rows"] == {"train": 10}
    assert [(r.row, r.line, r.column, r.reason.split(" (")[0]) for r in made.rejected] == [
        (2, 2, "question", "question: expected text, got 3"),
        (3, 3, "label", "label: expected yes or no, got 'maybe'"),
        (4, 4, None, "duplicate: same prompt as row 1"),
        (5, 5, None, "duplicate: same prompt as row 1, with another answer"),
        (7, 7, None, "too long: expected prompt and completion of at most 30 characters, got 33"),
        (9, 9, "question", "question: expected text, got None"),
        (10, 10, None, "expected a JSON object, got broken JSON"),
    ]
    assert {r.split for r in made.rejected} == {"train"} and made.rejected[0].value == 3
    assert len(made.train) + len(made.rejected) == 10


def test_columns_are_the_recipes_own_unless_said_otherwise(tmp_path):
    file = lines(tmp_path / "d.jsonl", [{"q": "a", "label": "yes", "hint": "h", "question": "no"}])
    made = read(file, {"ask": "q"})
    assert made.train[0].prompt == "a h"
    assert made.facts["columns"] == {"ask": "q", "label": "label", "hint": "hint"}
    # An optional field whose column is asked for by another one, or is not there, is left out.
    assert read(file, {"ask": "hint"}).train[0].prompt == "h"
    bare = lines(tmp_path / "e.jsonl", [{"question": "a", "label": "yes"}])
    assert read(bare).facts["columns"] == {"ask": "question", "label": "label"}
    assert read(bare, {"ask": Column(column="question")}).train


def test_an_optional_column_that_is_not_there_is_told(tmp_path):
    bare = [{"question": "a", "label": "yes", "text": "t"}]
    said = "There is no column 'hint': items have none."
    file = lines(tmp_path / "d.jsonl", bare)
    assert said in read(file).notes
    assert not any("hint" in note for note in read(file, {"hint": "text"}).notes)
    assert not any("hint" in note for note in read(file, {"hint": None}).notes)  # said deliberately
    both = folder(tmp_path / "both", train=bare, test=[{**bare[0], "question": "b"}])
    assert read(both).notes == [said]


def test_an_optional_column_under_another_name_is_not_dropped(tmp_path):
    file = lines(tmp_path / "d.jsonl", [{"question": "a", "label": "yes", "Hint": "h"}])
    assert problems(lambda: read(file)) == [
        "hint: there is no column 'hint'; did you mean 'Hint'? Map it in columns, or say hint: null there to do "
        "without."
    ]
    assert read(file, {"hint": "Hint"}).train[0].prompt == "a h"
    made = read(file, {"hint": None})
    assert made.train[0].prompt == "a" and made.facts["columns"] == {"ask": "question", "label": "label"}
    # A column that another field is read from is not what was meant.
    other = lines(tmp_path / "e.jsonl", [{"hints": "a", "label": "yes"}])
    assert read(other, {"ask": "hints"}).train[0].prompt == "a"


def test_all_problems_of_a_mapping_are_named_at_once(tmp_path):
    file = lines(tmp_path / "d.jsonl", [{"Question": "a", "answer": "yes", "text": "t"}])
    found = problems(
        lambda: read(file, {"hnt": "text", "hint": "labell", "label": Column(column="answer", unit="ppm")})
    )
    assert found == [
        "unknown field 'hnt' in columns; did you mean 'hint'? Available: ask, label, hint.",
        "label: expected no unit, got 'ppm'; it has none.",
        "ask: there is no column 'question'; did you mean 'Question'? Available: Question, answer, text. "
        "Say which it is in columns (ask: what is asked).",
        "label: there is no column 'label'. Available: Question, answer, text. "
        "Say which it is in columns (label: yes or no).",
        "hint: there is no column 'labell'. Available: Question, answer, text. "
        "Say which it is in columns (hint: a hint).",
    ]
    assert problems(lambda: read(file, {"ask": "text", "hint": "text"}))[0] == (
        "column 'text' is mapped to both 'ask' and 'hint'; map it once."
    )
    assert problems(lambda: read(file, {"hint": "label"}))[0].startswith(
        "column 'label' is mapped to 'hint', and 'label' is read from it as well"
    )
    said = "label: expected a column, got null; items cannot do without it."
    assert problems(lambda: read(lines(tmp_path / "e.jsonl", rows_of(2)), {"label": None})) == [said]
    found = problems(lambda: read(str(tmp_path / "none.csv"), {"hnt": "x"}))
    assert len(found) == 2 and "unknown field" in found[0] and "found no file" in found[1]


def folder(path, **splits):
    for split, rows in splits.items():
        path.mkdir(exist_ok=True)
        lines(path / f"{split}.jsonl", rows)
    return str(path)


def test_splits_are_the_recipes_where_the_data_set_has_them(tmp_path):
    both = folder(tmp_path / "both", train=rows_of(3), test=rows_of(2, "no"), dev=rows_of(1))
    made = read(both)
    assert [i.id for i in made.test] == ["small-test-1", "small-test-2"] and len(made.train) == 3
    assert (made.facts["train_split"], made.facts["test_split"], made.notes) == ("train", "test", [])
    assert [i.id for i in read(both, hub_test_split="validation").test] == ["small-validation-1"]


def test_a_data_set_without_the_split_for_tests_says_so(tmp_path):
    alone = folder(tmp_path / "alone", train=rows_of(3))
    made = read(alone)
    assert made.test is None
    assert made.notes == ["The data set has no split 'test' (it has train): test items are drawn from 'train'."]
    both = folder(tmp_path / "both", train=rows_of(3), test=rows_of(2))
    assert read(both, hub_split="test", hub_test_split="test").notes == [
        "Split 'test' is used for training and tests: test items are drawn from 'test'."]  # fmt: skip
    assert read(lines(tmp_path / "d.jsonl", rows_of(2))).notes == [
        "A file has no split for tests: test items are drawn from its rows."]  # fmt: skip


def test_splits_that_are_not_there_or_of_which_nothing_is_left_are_named(tmp_path):
    both = folder(tmp_path / "both", train=rows_of(3), test=rows_of(2, -1))
    assert problems(lambda: read(both, hub_split="trian", hub_test_split="tset")) == [
        "there is no split 'trian'; did you mean 'train'? Available: train, test.",
        "there is no split 'tset'; did you mean 'test'? Available: train, test.",
    ]
    (first, *rest) = problems(lambda: read(both))
    assert first == "split 'test': no row is left, all 2 were rejected."
    assert rest == [f"row {n}: label: expected yes or no, got '-1'" for n in (1, 2)]


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(
    ("names", "expected", "said"),  # of names that the recipe does not know its own numbers count
    [(["yes", "no"], ["yes", "no"], False), (["Y", "N"], ["yes", "no"], False), (["no", "yes"], ["no", "yes"], True)],
)
def test_classes_numbered_otherwise_are_read_by_name(tmp_path, kind, names, expected, said):
    """A number alone would turn every label round."""
    seen = []
    recipe = types.SimpleNamespace(
        **{**vars(RECIPE), "make_item": lambda i, r: seen.append(r["label"]) or make_item(i, r)}
    )
    made = Dataset.from_dict({"question": ["a", "b"], "label": [0, 1]}).cast_column("label", ClassLabel(names=names))
    (tmp_path / "d").mkdir()
    made.to_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    source = tmp_path / "d" if kind == "folder" else tmp_path / "d" / "train-00000-of-00001.parquet"
    found = read_recipe(recipe, Where(source=str(source), columns={}))
    assert [i.completion for i in found.train] == expected
    assert any("numbers its classes otherwise" in note for note in found.notes) == said
    assert seen[-2:] == (expected if said else [0, 1]), "the number is given as stored"
