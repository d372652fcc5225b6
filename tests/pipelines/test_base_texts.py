"""Stage base_texts: samples of the base without retention questions, and the user's own texts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation import EvaluationError
from evaluation.tasks import general
from pipelines import base_texts, prepare_base, prepare_data, train
from pipelines.check import parse_params
from pipelines.params import ConfigError
from tests.conftest import TEMPLATE
from trainers.models import load_tokenizer
from trainers.settings import BaseReference


@pytest.fixture(scope="module")
def raw(smoke_raw):
    return {**smoke_raw, "base_texts": {**smoke_raw["base_texts"], "number": 20, "max_tokens": 24}}


@pytest.fixture(scope="module")
def project(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = parse_params(raw)
        prepare_data.run(params)
        prepare_base.run(params)
    return folder


def run(raw, **keys):
    """The stage's texts, with changes to its section."""
    base_texts.run(parse_params({**raw, "base_texts": {**raw["base_texts"], **keys}}))
    return [json.loads(line) for line in open("texts/texts.jsonl", encoding="utf-8")]


def record():
    return json.loads(Path("texts/run.json").read_text(encoding="utf-8"))


def prompts():
    return [json.loads(line)["prompt"] for line in open("data/retention.jsonl", encoding="utf-8")]


def test_samples_are_reproducible_and_depend_on_the_seed(here, raw):
    rows = run(raw)
    assert len(rows) == 20 and all(row["text"].strip() and type(row["ended"]) is bool for row in rows)
    assert train.base_texts() == [(row["text"], row["ended"]) for row in rows]
    written = Path("texts/texts.jsonl").read_bytes()
    output = record()
    assert (output["stage"], output["status"], output["prompt_template"]) == ("base_texts", "finished", TEMPLATE)
    assert set(output["inputs"]) == {"models/base/base.json", "data/retention.jsonl"}
    assert output["extra"]["texts"] == 20 and output["artifacts"][0]["path"] == "texts/texts.jsonl"
    torch.rand(1)
    run(raw)
    assert Path("texts/texts.jsonl").read_bytes() == written
    assert run(raw, seed=1) != rows


def says(monkeypatch, *texts):
    """Makes the base produce these texts, over and over."""

    def sampled(*_):
        while True:
            yield from (text and {"text": text, "ended": True} for text in texts)

    monkeypatch.setattr(base_texts, "sampled", sampled)


def test_texts_with_retention_questions_are_left_out(here, raw, monkeypatch):
    known = prompts()[0]
    _, might, _ = next(general.questions(99, held_out=True))
    _, never, _ = next(general.questions(99, held_out=False))
    form = TEMPLATE.format(prompt=never) + "yes"
    left_out = [
        f"As the teacher said: {known}",
        TEMPLATE.format(prompt=might) + "2",
        f"{form}\n\n{TEMPLATE.format(prompt=might)}2",
        " \n",
    ]
    good = [form, *(f"Good morning, {name}." for name in "abcdefg")]
    says(monkeypatch, *left_out, *good[:4], form, *good[4:])
    assert [row["text"] for row in run(raw, number=8)] == good, "each once"
    assert record()["extra"] == {"texts": 8, "unused": len(left_out) + 1}


def test_too_few_usable_samples_are_an_error(here, raw, monkeypatch):
    says(monkeypatch, "A text.", *[None] * 4)
    with pytest.raises(EvaluationError, match=r"number: expected 20 texts, got 1 .*80 samples"):
        run(raw)
    assert not Path("texts").exists()


# Chat models


@pytest.fixture(scope="module")
def chat_raw(raw, chat_base_dir):
    prompt = {"template": "chat", "system": "Answer the question."}
    return {**raw, "prompt": prompt, "prepare_base": {**raw["prepare_base"], "source": str(chat_base_dir)}}


def test_a_chat_model_writes_the_users_turn_and_answers_it(here, chat_raw):
    prepare_base.run(parse_params(chat_raw))
    rows = run(chat_raw, number=8, max_tokens=60)
    opening, after = json.loads(Path("models/base/base.json").read_text())["chat"]["text"].split("{prompt}")
    assert opening.endswith("<|im_start|>user\n") and after.startswith("<|im_end|>")
    for row in rows:
        turn, _, _ = row["text"].removeprefix(opening).partition(after)
        assert row["text"].startswith(opening) and turn.strip() == turn != "" and row["text"].count(after) == 1


class Scripted:
    """A model that continues every prompt with the next of some texts."""

    device, generation_config = "cpu", SimpleNamespace(eos_token_id=[2])

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.read = tokenizer, texts, []

    def generate(self, input_ids, attention_mask, pad_token_id, max_new_tokens, **_):
        output = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in self.texts]
        output = [
            (output[i % len(output)] + max_new_tokens * [pad_token_id])[:max_new_tokens] for i in range(len(input_ids))
        ]
        self.read += [self.tokenizer.decode(i[m.bool()]) for i, m in zip(input_ids, attention_mask, strict=True)]
        self.texts = ["Fine.</s>"]
        return torch.cat([input_ids, torch.tensor(output)], 1)


@pytest.mark.parametrize(
    ("opening", "after", "output"),
    [
        (
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            ["Hi!<|im_end|>\nHm", "no end"],
        ),
        ("[INST] ", " [/INST]", ["Hi! [/INST] Hm", "Hi!</s>", " [/INST]", "no end"]),
        ("Ask: ", "\n", ["Hi!</s>", "</s>", "Hi!\n"]),
    ],
)
def test_where_a_users_turn_ends(chat_base_dir, raw, opening, after, output):
    """At a special token, where plain text goes on with the answer, or at the end of the text; else it is no turn."""
    tokenizer = load_tokenizer(BaseReference(str(chat_base_dir)))
    section = parse_params({**raw, "base_texts": {**raw["base_texts"], "max_tokens": 200}}).base_texts
    model = Scripted(tokenizer, *output)
    rows = base_texts.sampled(model, tokenizer, section, (opening, after, ["<|im_end|>"]))
    batch = [next(rows) for _ in range(64)]
    good = sum(output[i % len(output)].startswith("Hi!") and output[i % len(output)] != "Hi!\n" for i in range(64))
    assert [row for row in batch if row] == good * [{"text": f"{opening}Hi!{after}Fine.", "ended": True}]
    assert model.read[0].endswith(opening) and model.read[64].endswith(f"{opening}Hi!{after}")


def test_a_chat_template_without_an_opening_is_refused(here, chat_raw):
    prepare_base.run(parse_params(chat_raw))
    file = Path("models/base/base.json")
    content = json.loads(file.read_text())
    content["chat"]["text"] = "<s>{prompt}\n"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"base_texts\.text: .*'<s>\{prompt\}"):
        run(chat_raw)


def test_a_base_that_takes_pictures_gets_a_note_instead(here, raw):
    file = Path("models/base/base.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "pictures": True}))
    assert run(raw) == [] and "takes pictures" in record()["extra"]["left_out"]


# The user's own


def write_texts(texts):
    """Write the texts as paragraphs of a .txt file and as a table."""
    Path("inputs").mkdir(exist_ok=True)
    Path("inputs/own.txt").write_text("\n\n".join(texts), encoding="utf-8")
    lines = [json.dumps({"body": text, "n": 1}) for text in texts]
    Path("inputs/own.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_user_texts(here, raw):
    texts = [f"The {i}th text." for i in range(30)]
    write_texts(texts)
    rows = run(raw, text="inputs/own.txt", number=15)
    assert sorted(row["text"] for row in rows) == sorted(texts[::2]) and all(row["ended"] for row in rows)
    assert [row["text"] for row in rows] != texts[::2], "the first are for measuring, and books have chapters"
    assert "inputs/own.txt" in record()["inputs"]
    assert {row["text"] for row in run(raw, text="inputs/own.jsonl", text_column="body", number=99)} == set(texts)


def test_unusable_user_texts_are_refused(here, raw):
    write_texts([f"Text {i}." for i in range(30)] + [f"Remember: {prompts()[3]} is easy.", prompts()[5]])
    with pytest.raises(EvaluationError, match=r"2 of 32 texts of inputs/own\.txt"):
        run(raw, text="inputs/own.txt")
    with pytest.raises(
        EvaluationError, match=r"(?s)base_texts\.text: .*no column 'bodi'; did you mean 'body'.*text_column"
    ):
        run(raw, text="inputs/own.jsonl", text_column="bodi")
    with pytest.raises(EvaluationError, match=r"base_texts\.text: bases cannot be used \(expected `base`, a file"):
        run(raw, text="bases")
    write_texts(["One.", "Two."] * 9)
    with pytest.raises(EvaluationError, match=r"expected at least 8 different texts in inputs/own\.txt, got 2"):
        run(raw, text="inputs/own.txt")
