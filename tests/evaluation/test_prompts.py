"""Prompts of the Alignment Quality Index and general texts: what is shipped, what is read, what is refused."""

import json
from collections import Counter
from statistics import mean

import pytest

from evaluation.prompts import Prompt, PromptError, choose, read_prompts
from evaluation.sources.types import SourceError
from evaluation.texts import TextError, read_texts, spread


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(n=10, **changes):
    made = [{"prompt": f"Tell me about {label} thing {i}.", "label": label} for i in range(n) for label in
            ("safe", "unsafe")]  # fmt: skip
    return [{**row, **changes} for row in made]


def test_the_shipped_prompts_are_matched_pairs_over_the_axes_of_litmus():
    found = read_prompts("shipped")
    assert Counter(p.unsafe for p in found) == {False: 60, True: 60}
    assert len({p.text for p in found}) == 120
    axes = Counter(p.category for p in found if p.unsafe)
    assert sorted(axes) == ["civility", "duty", "empathy", "information", "justice", "well-being", "wisdom"]
    assert min(axes.values()) >= 8
    pairs = {}
    for p in found:
        pairs.setdefault((p.pair, p.category), []).append(p.unsafe)
    assert all(sorted(classes) == [False, True] for classes in pairs.values()) and len(pairs) == 60
    lengths = {c: mean(len(p.text) for p in found if p.unsafe == c) for c in (False, True)}
    assert abs(lengths[True] / lengths[False] - 1) < 0.02, "length must not tell the classes apart"


def test_columns_and_labels_of_a_user_s_file(tmp_path):
    """As LITMUS names them, with other capitals; of a CSV file and of JSON lines."""
    data = [{"input": r["prompt"], "safety_label": r["label"].title(), "axiom": "Duty"} for r in rows()]
    columns = {"prompt": "input", "label": "safety_label", "category": "axiom"}
    lines = ["input,safety_label,axiom", *(",".join(row.values()) for row in data)]
    (tmp_path / "p.csv").write_text("\n".join(lines), encoding="utf-8")
    for file in (write(tmp_path / "p.jsonl", data), str(tmp_path / "p.csv")):
        found = read_prompts(file, columns=columns)
        assert len(found) == 20 and found[1] == Prompt("Tell me about unsafe thing 0.", True, "Duty", None)
    ones = write(tmp_path / "n.jsonl", [{**r, "label": int(r["label"] == "safe")} for r in rows()])
    assert sum(p.unsafe for p in read_prompts(ones, safe_label="1", unsafe_label="0")) == 10


def test_columns_of_a_user_s_file_do_not_apply_to_the_shipped_set():
    assert len(read_prompts("shipped", columns={"prompt": "input"}, safe_label="ok", unsafe_label="bad")) == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [x for x in r if x["label"] == "safe"], "at least 10 prompts labelled 'unsafe', got 0"),
        (lambda r: r[:-2], "at least 10 prompts labelled 'safe', got 9"),
        (lambda r: [{"promt": x["prompt"], "label": x["label"]} for x in r],
         "no column 'prompt'. Did you mean 'promt'.*Available: promt, label.*measure.columns"),
        (lambda r: [{"prompt": x["prompt"]} for x in r], "there is no column 'label'"),
        (lambda r: [*r, {"prompt": "  ", "label": "safe"}], r"row 21 \(line 21\): prompt: expected a text, got '  '"),
        (lambda r: [*r, {"prompt": None, "label": "safe"}], "expected a text, got None"),
        (lambda r: [*r, {"prompt": "x", "label": "harmful"}], "expected 'safe' or 'unsafe', got 'harmful'.*safe_label"),
        (lambda r: [*r, {"prompt": r[0]["prompt"], "label": "unsafe"}], "is both safe and unsafe; keep one"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_are_refused(tmp_path, change, message):
    file = write(tmp_path / "p.jsonl", change(rows()))
    with pytest.raises(PromptError, match=message):
        read_prompts(file)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    bad = [*rows(), *({"prompt": "", "label": "safe"} for _ in range(9))]
    with pytest.raises(PromptError, match="(?s)row 21.*row 22.*row 25.*and 4 more") as caught:
        read_prompts(write(tmp_path / "p.jsonl", bad))
    caught.match("measure.prompts: ")
    with pytest.raises(PromptError, match="broken JSON"):
        (tmp_path / "b.jsonl").write_text(json.dumps(rows()[0]) + "\n{\n")
        read_prompts(str(tmp_path / "b.jsonl"))
    with pytest.raises(SourceError, match="expected a file, found no file"):
        read_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(PromptError, match="there is no column 'kind'"):
        read_prompts(write(tmp_path / "c.jsonl", rows()), columns={"category": "kind"})


def test_a_choice_is_even_over_the_categories_and_keeps_pairs():
    found = read_prompts("shipped")
    assert choose(found, 60) == found
    few = choose(found, 21)
    assert Counter((p.unsafe, p.category) for p in few) == {
        (u, p.category): 3 for u in (False, True) for p in found}  # fmt: skip
    assert all(n == 2 for n in Counter(p.pair for p in few).values())
    uneven = [Prompt(f"{c}{i}", u, c) for c, n in (("a", 100), ("b", 12)) for i in range(n) for u in (False, True)]
    assert Counter(p.category for p in choose(uneven, 30) if p.unsafe) == {"a": 18, "b": 12}


def test_values_are_spread_over_the_whole():
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 4) == [0, 1, 2]


def test_general_texts_of_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("\ufeffOne line.\nStill one.\n \n\n\nTwo µg.\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "t.txt")) == ["One line.\nStill one.", "Two µg."]
    file = write(tmp_path / "t.jsonl", [{"body": "a"}, {"body": " "}, {"body": "b"}])
    assert read_texts(file, column="body") == ["a", "b"]
    with pytest.raises(TextError, match="no column 'text'.*Available: body; set measure.text_column"):
        read_texts(file)
    (tmp_path / "e.txt").write_text(" \n\n")
    (tmp_path / "l.txt").write_bytes(b"\xe9\xff")
    for name, message in (("e.txt", "expected texts in"), ("l.txt", "UTF-8"), ("none.txt", "No such file")):
        with pytest.raises(TextError, match=message):
            read_texts(str(tmp_path / name))
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(TextError, match="1 rows cannot be read: row 2"):
        read_texts(str(tmp_path / "b.jsonl"))
