"""Rows as people have them → items of the task chat, and the words about rows that cannot be used."""

import csv
import json

import pytest

from evaluation import EvaluationError
from evaluation.sources.rows import read_recipe
from evaluation.splits import PrepareData, divide, make_splits
from evaluation.tasks import Item, chat

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "What is a lake?"},
    {"role": "assistant", "content": "Water."},
    {"role": "user", "content": "And a sea?"},
    {"role": "assistant", "content": "More water."},
]
SHARED = [{"from": "human" if n % 2 == 0 else "gpt", "value": turn["content"]} for n, turn in enumerate(TURNS)]
LONG = Item(
    "", "chat", "And a sea?", "More water.", {"answer": "More water."}, (("What is a lake?", "Water."),), "Be brief."
)


def section(source, **changes):
    raw = dict(
        task="chat", source=str(source), columns={}, hub_split=None, hub_test_split=None, hub_subset=None,
        delimiter="auto", encoding="auto", max_chars=None, max_refused=1.0, trust_given_aqi=False, seed=0,
        train_items=None, valid_items=2, test_items=3, pollutants=["pm25"], max_pollutants=1, image_size=None,
        vary=0.5, paraphrased_items=2, retention_items_per_task=1,
    )  # fmt: skip
    return PrepareData(**raw | changes)


def read(tmp_path, *rows, name="rows.jsonl", **changes):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_recipe(chat, section(file, **changes))


def plain(item):
    return {**item.to_json(), "id": "", "truth": item.truth}


FORMS = {
    "messages": ({"messages": [SYSTEM, *TURNS]}, "messages with roles (column messages)"),
    "sharegpt": ({"conversations": [{"from": "system", "value": "Be brief."}, *SHARED]},
                 "ShareGPT conversations (column conversations)"),
    "sharegpt with a system column": ({"conversations": SHARED, "system": "Be brief."},
                                      "ShareGPT conversations (column conversations), with column system"),
    "alpaca": ({"instruction": "And a sea?", "input": "", "output": "More water.", "system": "Be brief.",
                "history": [["What is a lake?", "Water."]]},
               "instructions with outputs (columns instruction and output), with columns input, history and system"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_conversation_is_the_same_item_in_every_form(tmp_path, name):
    row, said = FORMS[name]
    results = read(tmp_path, row)
    assert [plain(item) for item in results.train] == [plain(LONG)]
    assert f"Rows are {said}." in results.notes


def test_single_questions_add_no_fields(tmp_path):
    asked = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    (item,) = read(tmp_path, asked).train
    assert (item.prompt, item.completion) == ("Add.\n\n1 and 2", "3")
    (same,) = read(tmp_path, {"prompt": "Add.\n\n1 and 2", "completion": "3", "id": 7}).train
    assert same == item and same.to_json().keys() == {"id", "task", "prompt", "completion", "truth"}
    assert Item.from_json(json.loads(json.dumps(LONG.to_json()))) == LONG


def test_a_text_is_learned_whole_and_scored_from_its_first_half(tmp_path):
    results = read(tmp_path, {"text": "The lake is wide.\nThe sea is wider."}, {"text": "湖很宽海更宽"})
    assert [(item.prompt, item.completion) for item in results.train] == [
        ("The lake is wide.", "\nThe sea is wider."), ("湖很宽", "海更宽")]  # fmt: skip
    assert all(item.whole for item in results.train) and "Rows are plain texts (column text)." in results.notes
    alike = read(tmp_path, *({"text": f"Below is one and the same long preamble. It ends in {n}."} for n in range(3)))
    assert len({chat.group(item) for item in alike.train}) == 3, "they begin alike, and are no duplicates"


def test_a_cell_may_hold_a_long_conversation_and_broken_json_is_refused(tmp_path):
    long = json.dumps([{"role": "user", "content": "a " * 100_000}, {"role": "assistant", "content": "b"}])
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["messages"], [long], ["[" * 50_000], ['[{"role"']])
    results = read_recipe(chat, section(file, max_refused=1.0))
    assert [len(item.prompt) for item in results.train] == [200_000]
    assert ["broken JSON" in row.reason for row in results.rejected] == [True, True]


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (["prompt\u200b", "\ufeffcompletion"], {}),
        (["my\u00a0question", "answer"], {"prompt": "my question", "completion": "answer"}),
        (["q", "\u00b5g"], {"prompt": "q", "completion": "\u03bcg"}),
        (["cafe\u0301", "a"], {"prompt": "caf\u00e9", "completion": "a"}),
    ],
)
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_column_goes_by_how_its_name_looks(tmp_path, columns, mapping, name):
    file = tmp_path / name
    row = json.dumps({columns[0]: "a;b", columns[1]: "c"})
    lines = [",".join(columns), "a;b,c"] if name.endswith("csv") else [row]
    file.write_text("\n".join(lines), encoding="utf-8")
    (item,) = read_recipe(chat, section(file, columns=mapping)).train
    assert (item.prompt, item.completion) == ("a;b", "c")


CODE = "    return x\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": f"def f(x):\n{CODE}", "completion": CODE},
        {"instruction": "def f(x):", "input": f"{CODE[:-1]}\n ", "output": CODE},
        {"messages": [{"role": "user", "content": "\tFinish: x = "}, {"role": "assistant", "content": CODE}]},
        {"conversations": [{"from": "human", "value": " f(x) "}, {"from": "gpt", "value": CODE}], "system": " Brief. "},
        {"text": f"{CODE}{CODE}"},
        {"text": "\n\n  a b  \n"},
    ],
)
def test_white_space_is_content(tmp_path, row):
    (item,) = read(tmp_path, row).train
    messages = row.get("messages") or row.get("conversations")
    texts = [m.get("content", m.get("value")) for m in messages] if messages else [*row.values()]
    if "text" in row:
        assert item.prompt + item.completion == row["text"] and item.prompt.strip() and item.completion.strip()
    else:
        assert (item.prompt, item.completion) == ("\n\n".join(texts[:-1]), CODE)
    assert item.system == row.get("system")


def test_texts_keep_their_indentation_and_lines_before_earlier_answers_are_counted(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes(b"\n  def f():\r\n    pass\r\n \t\r\n\r\n\tx = 1 \n\n")
    texts = [item.prompt + item.completion for item in read_recipe(chat, section(file)).train]
    assert texts == ["  def f():\n    pass", "\tx = 1 "]
    rows = [
        {"prompt": "a", "completion": "b "},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a ", "completion": "c"},
    ]
    results = read(tmp_path, *rows)
    assert (len(results.train), results.facts["repeated_rows"]) == (2, 1)
    assert len({chat.group(item) for item in results.train}) == 1
    first = {"role": "assistant", "content": "\n \n  Water.\n"}
    (item,) = read(tmp_path, {"messages": [TURNS[0], first, TURNS[2], {**first, "content": "\nSalt."}]}).train
    assert (item.turns, item.completion) == ((("What is a lake?", "  Water.\n"),), "\nSalt.")
    assert any("in 1 conversation" in note for note in chat.complete([item]))


def test_a_mapping_names_the_form_and_two_forms_are_asked_about(tmp_path):
    row = {"dialogue": TURNS[:2], "text": "x y", "instruction": "Add.", "output": "3"}
    assert read(tmp_path, row, columns={"messages": "dialogue"}).train[0].prompt == "What is a lake?"
    assert read(tmp_path, {"q": "a", "a": "b"}, columns={"prompt": "q", "completion": "a"}).train[0].completion == "b"
    for rows, columns, said in (
        (row, {}, "rows could be instructions with outputs (columns instruction and output) or plain texts (column "
                  "text); say which is meant in prepare_data.columns, e.g. {instruction: instruction, output: output}"),
        ({"question": "a", "answer": "b"}, {}, "expected the columns of one form (messages with roles: column mess"),
        ({"q": "a", "compltion": "b"}, {"prompt": "q"}, "there is no column 'completion'; did you mean 'compltion'?"),
    ):  # fmt: skip
        with pytest.raises(EvaluationError) as caught:
            read(tmp_path, rows, columns=columns)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (TURNS[:1], "messages: expected an assistant turn, got none"),
        ([{"role": "usr", "content": "a"}], "turn 1: expected a role, got 'usr'; did you mean 'user'? Available: "),
        ([TURNS[0], TURNS[0]], "turn 2: expected an answer, got two user turns in a row"),
        (TURNS[1:2], "turn 1: expected a user turn first, got an assistant turn"),
        ([*TURNS[:2], SYSTEM], "turn 3: expected one system message, at the start, got one among the turns"),
        ([TURNS[0], {"role": "assistant", "content": " "}], "turn 2 (assistant): expected text, got only blanks"),
        ([TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
         "turn 2: tool calls are not supported yet"),
        ([TURNS[0], {"from": "observation", "value": "1"}], "turn 2: tool calls are not supported yet"),
        ([{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "a"}]}],
         "turn 1 (user): expected parts of text, got image_url"),
        ([TURNS[0], {**TURNS[1], "weight": 2}], "turn 2 (assistant): expected weight: true (learned) or false, got 2"),
        ("Hello", "messages: expected a list of {role, content}, got 'Hello'"),
    ],
)  # fmt: skip
def test_an_unusable_conversation_is_refused_with_the_turn(tmp_path, turns, said):
    refused = read(tmp_path, {"messages": TURNS}, {"messages": turns}).rejected
    assert [(one.row, one.column) for one in refused] == [(2, "messages")] and said in refused[0].reason


def test_parts_are_joined_cells_are_json_and_a_last_question_is_dropped(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    cells = read(tmp_path, {"messages": json.dumps([{"role": "user", "content": parts}, TURNS[1]])})
    assert cells.train[0].prompt == "a\nb"
    rows = [[{"role": "user", "content": f"Lake {n}?"}, TURNS[1], TURNS[2]] for n in range(9)]
    read(tmp_path, *({"messages": turns} for turns in [*rows, TURNS]))
    file = tmp_path / "rows.jsonl"
    splits, facts = make_splits(section(file), tmp_path)
    assert any(note.startswith("9 conversations end with an unanswered question") for note in facts["notes"])
    assert any(note.startswith("1 of 10 conversations have several turns") for note in facts["notes"])
    assert {item.completion for split in ("train", "valid", "test") for item in splits[split]} <= {
        "Water.",
        "More water.",
    }


def test_conversations_that_share_their_last_question_are_no_duplicates(tmp_path):
    other = [{"role": "user", "content": "What is a pond?"}, *TURNS[1:]]
    results = read(tmp_path, {"messages": TURNS}, {"messages": other}, {"messages": TURNS})
    assert len(results.train) == 2 and results.facts["repeated_rows"] == 1


def talk(*questions, system=None, answers="Yes."):
    """The item of a conversation; its last answer is scored."""
    *before, last = questions
    return Item(
        "/".join(questions) + str(system), "chat", last, answers, {}, tuple((q, answers) for q in before), system
    )


def divided(pool, test=None, valid=20, tests=30):
    """Items by split; no tested question is learned anywhere else with what was asked before it."""
    division = divide(pool, test, chat.group, {"train": None, "valid": valid, "test": tests}, seed=0)
    splits = {split: {(i.system, chat.group(i)) for i in items} for split, items in division.splits.items()}
    for held in ("valid", "test"):
        for other in splits.keys() - {held}:
            learned = {(system, path[:n]) for system, path in splits[other] for n in range(1, len(path) + 1)}
            assert not splits[held] & learned, (held, other)
    assert division.unused == [] and sum(map(len, division.splits.values())) + len(division.apart) == len(pool) + len(
        test or ()
    )
    return division


@pytest.mark.parametrize("share", [0.7, 1.0])
@pytest.mark.parametrize(
    "conversation",
    [
        lambda n: talk("Hi", f"Question {n}?", "Thanks!"),
        lambda n: talk("Hi", "I need help", f"Question {n}?"),
        lambda n: talk("Hi", system=f"You are number {n}."),
        lambda n: talk("Hi", *(["hi"] * (n % 3)), f"Question {n // 3}?"),
        lambda n: talk("Hi") if n == 0 else talk("Hi", f"Question {n}?"),
    ],
    ids=["second", "third", "system", "mixed", "an opening of all others"],
)
def test_conversations_that_open_alike_are_in_every_split(conversation, share):
    count = int(300 * share)
    pool = [conversation(n) for n in range(count)] + [talk(f"Other {n}?", "And?") for n in range(300 - count)]
    for split, items in divided(pool).splits.items():
        alike = sum(chat.group(item)[0] == chat.group(talk("Hi"))[0] for item in items)
        assert alike / len(items) == pytest.approx(share, abs=0.25), split


def test_all_parts_of_a_conversation_are_in_one_split():
    parts = [talk(*(f"{n}.{turn}?" for turn in range(turns))) for n in range(40) for turns in range(1, 6)]
    trees = [talk(f"Root {n}?", f"Branch {branch}?") for n in range(40) for branch in range(2)]
    for pool in (parts, trees):
        where = {}
        for split, items in divided(pool).splits.items():
            for item in items:
                assert where.setdefault(chat.group(item)[0], split) == split
    test = [talk("Hi", "A?"), talk("Hi", "B?", "C?")]
    pool = [talk("Hi"), talk("Hi", "A?", "More?"), talk("Hi", "B?"), *(talk("Hi", f"{n}?") for n in range(30))]
    assert divided(pool, test).apart == pool[:3]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What does it cost?", "completion": "<s>12 EUR</s> 8 EUR"},
        {"prompt": "Stop at <|im_end|>.", "completion": "12 EUR"},
        {"prompt": "a", "completion": "b", "system": "Say <|eot_id|>."},
        {"messages": [{"role": "user", "content": "a</s>b"}, *TURNS[1:]]},
        {"conversations": [SHARED[0], {"from": "gpt", "value": "<unk>"}, *SHARED[2:]]},
        {"text": "<s>[INST] Hi [/INST] Hello </s>"},
        {"instruction": "a", "input": "<|im_start|>system", "output": "b"},
    ],
)
def test_control_tokens_that_a_row_spells_out_are_refused(tmp_path, row):
    control = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<unk>", "</s>", "<s>"]
    fine = {name: SHARED if name == "conversations" else TURNS if name == "messages" else "x < s >" for name in row}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(fine)}\n{json.dumps(row)}\n")
    results = read_recipe(chat, section(file), control)
    assert len(results.train) == 1 and [one.row for one in results.rejected] == [2]
    assert any(token in json.dumps(row) and token in results.rejected[0].reason for token in control)
    assert len(read_recipe(chat, section(file)).train) == 2, "text like any other to a base without such tokens"


# --- marks: what is learned ---


def marked(*flags):
    """The turns of TURNS with these marks, one mapping each."""
    return {"messages": [{**turn, **flag} for turn, flag in zip(TURNS, flags, strict=True)]}


FIRST_ONLY, LAST_ONLY, BOTH = ("Water.",), ("More water.",), ("Water.", "More water.")
MARKED = {
    "train": (marked({"train": False}, {"train": False}, {"train": False}, {"train": True}), LAST_ONLY),
    "trainable": (marked({}, {"trainable": 0}, {}, {"trainable": 1}), LAST_ONLY),
    "training": (marked({}, {"training": True}, {}, {"training": False}), FIRST_ONLY),
    "loss": (marked({}, {"loss": False}, {}, {"loss": True}), LAST_ONLY),
    "weight": (marked({}, {"weight": 0}, {}, {"weight": 1}), LAST_ONLY),
    "weight 0.0": (marked({}, {"weight": 1.0}, {}, {"weight": 0.0}), FIRST_ONLY),
    "loss_mask": (marked({"loss_mask": 0}, {"loss_mask": 1}, {"loss_mask": 0}, {"loss_mask": 0}), FIRST_ONLY),
    "text": (marked({}, {"train": "False"}, {}, {"train": "true"}), LAST_ONLY),
    "rejected": (marked({}, {"rejected": True}, {}, {"rejected": False}), LAST_ONLY),
    "masked": (marked({}, {"masked": True}, {}, {}), LAST_ONLY),
    "a list in a CSV file": ({"messages": json.dumps(TURNS), "train": "[1, 0]"}, FIRST_ONLY),
    "null": (marked({"train": None}, {"train": None}, {"weight": None}, {"loss": ""}), BOTH),
    "one a turn": ({"messages": TURNS, "train": [0, 0, 0, 1]}, LAST_ONLY),
    "one a turn with system": ({"messages": [SYSTEM, *TURNS], "loss_mask": [0, 0, 1, 0, 0]}, FIRST_ONLY),
    "one an answer": ({"conversations": SHARED, "trainable": [True, False]}, FIRST_ONLY),
    "history": ({"instruction": "And a sea?", "output": "More water.", "history": [["What is a lake?", "Water."]],
                 "weight": [0, 1]}, LAST_ONLY),
    "one is no answer": (marked({}, {"train": False}, {}, {"train": False}), None),
    "row": ({"messages": TURNS, "train": False}, None),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, None),
    "KTO, liked": ({"prompt": "a", "completion": "b", "label": True}, ("b",)),
    "KTO in a CSV file": ({"instruction": "a", "output": "b", "kto_tag": "False"}, None),
    "KTO of conversations": ({"messages": TURNS, "label": 0}, None),
    "KTO in words": ({"prompt": "a", "completion": "b", "label": "rejected"}, None),
    "thumbs down": ({"prompt": "a", "completion": "b", "rating": -1}, None),
    "deleted": ({"text": "a b", "deleted": True}, None),
    "a class": ({"prompt": "a", "completion": "b", "label": "sports"}, ("b",)),
    "a class of texts": ({"text": "a b", "label": 0}, (" b",)),
    "a score": ({"prompt": "a", "completion": "b", "score": 0.3}, ("b",)),
    "a pair": ({"messages": TURNS, "chosen": TURNS, "rejected": TURNS[:1]}, BOTH),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_what_is_marked_as_not_to_be_learned_is_not(tmp_path, name):
    row, learned = MARKED[name]
    if learned is None:
        with pytest.raises(EvaluationError, match="not to be learned: "):
            read(tmp_path, row)
        return
    (item,) = read(tmp_path, row).train
    answers = [answer for place, (_, answer) in enumerate(item.turns) if place not in item.given]
    assert (*answers, item.completion) == learned
    assert Item.from_json(json.loads(json.dumps(item.to_json()))) == item


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (marked({}, {"weight": 0.5}, {}, {}), "messages"),
        (marked({}, {"mask": 1}, {}, {}), "messages"),
        (marked({}, {"loss": 0.37}, {}, {}), "messages"),
        (marked({}, {}, {"train": True}, {}), "messages"),
        (marked({"deleted": True}, {}, {}, {}), "messages"),
        (marked({}, {"train_detail": [{"begin_offset": 0}]}, {}, {}), "messages"),
        ({"messages": TURNS, "mask": [1, 0, 1, 0]}, "messages"),
        ({"messages": TURNS, "loss_mask": [0, 1, 0]}, "loss_mask"),
        ({"messages": TURNS, "mask": "User"}, "mask"),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "weight"),
        ({"prompt": "a", "completion": "b", "loss_mask": [0, 0, 1, 1]}, "loss_mask"),
        ({"text": "a b", "loss_mask": [0, 1]}, "loss_mask"),
        ({"conversations": SHARED, "chosen": {"from": "gpt", "value": "Salt."}}, "chosen"),
        ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "chosen"),
        ({"prompt": "a", "completion": "b", "chosen": "b", "rejected": [{"content": " b"}]}, "rejected"),
    ],
)
def test_marks_that_could_mean_two_things_are_refused_by_name(tmp_path, row, column):
    fine = {name: SHARED if name == "conversations" else TURNS for name in ("messages", "conversations") if name in row}
    fine = fine or {name: "x y" for name in row if name in ("prompt", "completion", "text")}
    (refused,) = read(tmp_path, fine, row).rejected
    unread = {*row} - {"messages", "conversations", "prompt", "completion", "text"}
    name = (unread & {column, "mask"} or {None}).pop() or next(
        key for turn in row["messages"] for key in turn if key not in ("role", "content")
    )
    assert refused.column == column and name in refused.reason
    if column == name:
        assert len(read(tmp_path, fine, row, columns={name: None}).train) >= 1, "all rows alike, if that is meant"


def test_rows_left_out_by_a_mark_are_no_fault_and_what_is_not_read_is_listed(tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "b", "label": n % 2 == 0, "id": n, "note": ""} for n in range(10)]
    results = read(tmp_path, *rows, max_refused=0.0)
    assert (len(results.train), results.facts["unlearned_rows"]) == (5, 5)
    assert "Not read: id (100% of rows), note (0% of rows)." in results.notes
    assert len(read(tmp_path, *rows, columns={"label": None}).train) == 10
    named = [{**turn, "name": "Ada", "reasoning_content": None} for turn in TURNS]
    notes = read(tmp_path, {"messages": named}, {"messages": TURNS[:2]}).notes
    assert "Not read: name of turns (50% of rows)." in notes
    dropped = read(tmp_path, marked({}, {}, {}, {"weight": 0})).train
    assert any(note.startswith("1 answers in 1 conversations are marked") for note in chat.complete(dropped))
