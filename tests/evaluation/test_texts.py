"""Prompts of the separation index and general texts: what is shipped, what is read, what is refused."""

import json
from collections import Counter
from statistics import mean

import pytest

from evaluation import EvaluationError
from evaluation.measure import texts
from evaluation.measure.texts import Prompt, choose, read_prompts, read_texts, spread
from evaluation.sources.tabular import RawRow, Table


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(n=10):
    pairs = ((i, label) for i in range(n) for label in ("safe", "unsafe"))
    return [{"prompt": f"Tell me about {label} thing {i}.", "label": label} for i, label in pairs]


def test_the_shipped_prompts_are_matched_pairs_over_the_axes_of_litmus():
    results, _ = read_prompts("shipped")
    assert Counter(p.unsafe for p in results) == {False: 60, True: 60}
    assert len({p.text for p in results}) == 120
    axes = Counter(p.category for p in results if p.unsafe)
    assert sorted(axes) == ["civility", "duty", "empathy", "information", "justice", "well-being", "wisdom"]
    assert min(axes.values()) >= 8
    pairs = {}
    for p in results:
        pairs.setdefault((p.pair, p.category), []).append(p.unsafe)
    assert all(sorted(classes) == [False, True] for classes in pairs.values()) and len(pairs) == 60
    lengths = {c: mean(len(p.text) for p in results if p.unsafe == c) for c in (False, True)}
    assert abs(lengths[True] / lengths[False] - 1) < 0.02, "length must not tell the classes apart"


def test_columns_and_labels_of_a_user_s_file(tmp_path):
    data = [{"input": r["prompt"], "safety_label": r["label"].title(), "axiom": "Duty"} for r in rows()]
    columns = {"prompt": "input", "label": "safety_label", "category": "axiom"}
    lines = ["input,safety_label,axiom", *(",".join(row.values()) for row in data)]
    (tmp_path / "p.csv").write_text("\n".join(lines), encoding="utf-8")
    for file in (write(tmp_path / "p.jsonl", data), str(tmp_path / "p.csv")):
        results, _ = read_prompts(file, columns=columns)
        assert len(results) == 20 and results[1] == Prompt("Tell me about unsafe thing 0.", True, "Duty", None)
    ones = write(tmp_path / "n.jsonl", [{**r, "label": int(r["label"] == "safe")} for r in rows()])
    assert sum(p.unsafe for p in read_prompts(ones, safe_label="1", unsafe_label="0")[0]) == 10
    results, lost = read_prompts("shipped", columns={"prompt": "input"}, safe_label="ok", unsafe_label="bad")
    assert len(results) == 120 and lost == 0, "they do not apply to the shipped set"


def test_prompts_that_cannot_be_used_are_refused_all_at_once(tmp_path):
    good = rows()
    for bad, message in (
        (good[:-2], "at least 10 prompts labeled 'safe', got 9"),
        ([{"promt": row["prompt"], "label": row["label"]} for row in good],
         "no column 'prompt'; did you mean 'promt'.*Available: promt, label.*measure.columns"),
        ([*good, {"prompt": "x", "label": "harmful"}], "expected 'safe' or 'unsafe', got 'harmful'.*safe_label"),
        ([*good, {"prompt": good[0]["prompt"], "label": "unsafe"}], "is both safe and unsafe"),
        ([*good, *([{"prompt": " ", "label": "safe"}] * 9)],
         r"(?s)measure.prompts: .*row 21 \(line 21\): prompt: expected a text, got ' '.*row 22.*row 25.*and 4 more"),
    ):  # fmt: skip
        with pytest.raises(EvaluationError, match=message):
            read_prompts(write(tmp_path / "p.jsonl", bad))
    with pytest.raises(EvaluationError, match="there is no column 'kind'"):
        read_prompts(write(tmp_path / "c.jsonl", good), columns={"category": "kind"})


def as_hub(monkeypatch, made):
    table = Table(list(made[0]), [RawRow(n, None, row) for n, row in enumerate(made, start=1)])
    monkeypatch.setattr(texts, "read_table", lambda _source, **_: table)


def test_a_few_bad_rows_of_a_hub_data_set_are_left_out_and_counted(monkeypatch):
    bad = [{"prompt": " ", "label": "safe"}, {"prompt": None, "label": "unsafe"}, {"prompt": "x", "label": "?"},
           {"prompt": rows()[0]["prompt"], "label": "unsafe"}]  # fmt: skip
    good = rows(48)  # 5 of 100 rows are lost: just allowed
    as_hub(monkeypatch, [*bad, *good])
    results, lost = read_prompts("hub:some/set")
    assert lost == 5, "of a text in both classes both rows"
    assert [p.text for p in results] == [row["prompt"] for row in good[1:]]
    as_hub(monkeypatch, [*bad, {"prompt": "", "label": "safe"}, *good])
    with pytest.raises(EvaluationError, match="(?s)6 of 101 rows cannot be used, expected at most 5%.*row 1: prompt"):
        read_prompts("hub:some/set")


def test_a_choice_is_even_over_the_categories_and_keeps_pairs():
    results, _ = read_prompts("shipped")
    assert choose(results, 60) == results
    few = choose(results, 21)
    assert Counter((p.unsafe, p.category) for p in few) == {
        (u, p.category): 3 for u in (False, True) for p in results}  # fmt: skip
    assert all(n == 2 for n in Counter(p.pair for p in few).values())
    uneven = [Prompt(f"{c}{i}", u, c) for c, n in (("a", 100), ("b", 12)) for i in range(n) for u in (False, True)]
    assert Counter(p.category for p in choose(uneven, 30) if p.unsafe) == {"a": 18, "b": 12}
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 4) == [0, 1, 2]


def test_general_texts_of_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("\ufeffOne line.\nStill one.\n \n\n\nTwo µg.\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "t.txt")) == ["One line.\nStill one.", "Two µg."]
    file = write(tmp_path / "t.jsonl", [{"body": "a"}, {"body": " "}, {"body": "b"}])
    assert read_texts(file, column="body") == ["a", "b"]
    (tmp_path / "e.txt").write_text(" \n\n")
    (tmp_path / "l.txt").write_bytes(b"\xe9\xff")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text"\n')
    write(tmp_path / "o.jsonl", [{"text": "a"}, {"text": 3}])
    for name, message in (
        ("t.jsonl", "no column 'text'.*Available: body.*measure.text_column"), ("e.txt", "is empty"),
        ("l.txt", "UTF-8"), ("none.txt", "expected a file or a folder, got none"), ("b.jsonl", r"row 2 \(line 2\)"),
        ("o.jsonl", "text: expected a text, got int"), ("", "expected a file, got a folder"),
        ("t.pdf", r"expected `retention`.*name ending in \.csv"),
    ):  # fmt: skip
        with pytest.raises(EvaluationError, match=f"(?s)measure.text: .*{message}"):
            read_texts(str(tmp_path / name))


def test_general_texts_of_the_hub(monkeypatch):
    as_hub(monkeypatch, [{"text": ""}, {"text": " = Title = \n"}, {"text": None}, {"text": "A paragraph.\n"}])
    assert read_texts("hub:Salesforce/wikitext", split="test") == [" = Title = \n", "A paragraph.\n"]
    as_hub(monkeypatch, [{"text": ["a", "b"]}])
    with pytest.raises(EvaluationError, match="expected a text, got list"):
        read_texts("hub:some/set.txt")
