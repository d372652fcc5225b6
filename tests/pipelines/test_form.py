"""Conversations within prompt.template: prompts, trained answers, and the same text in training and serving."""

import json
from dataclasses import asdict, replace

import pytest

from evaluation.tasks import Item
from export.engines.engine import asked_for
from export.engines.llama_cpp import LlamaCppEngine
from export.go import go_of_turns
from export.modelfile import Serving
from export.template import from_tokenizer
from pipelines.params import ConfigError
from pipelines.prompt import CHAT, Form
from tests.conftest import TEMPLATE
from tests.export.test_templates import SHAPES, made, named, rendered
from trainers.encode import encode_prompt, encode_turns, learnt
from trainers.models import load_tokenizer
from trainers.settings import BaseReference

TALK = Item(
    "1", "chat", "And 4 + 4?", "8", {}, (("What is 2 + 2?", "4 it is"), ("What is\n3 + 3?", "6")), "Count the apples."
)


@pytest.fixture
def base(request, tmp_path, monkeypatch, base_dir, chat_base_dir):
    """(prompt.template, tokenizer, serving settings) of a base with a chat template, and of one without."""
    folder = chat_base_dir if request.param == CHAT else base_dir
    tokenizer = load_tokenizer(BaseReference(str(folder)))
    (tmp_path / "models/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    content = {"kind": "hub", "location": str(folder), "fingerprint": "", "revision": None, "merge_location": None,
               "merge_revision": None, "trust_remote_code": False}  # fmt: skip
    if request.param == CHAT:
        content["chat"] = asdict(from_tokenizer(tokenizer))
        text, go = content["chat"]["text"], content["chat"]["go"]
    else:
        text, go = TEMPLATE, go_of_turns(TEMPLATE, "</s>")
    (tmp_path / "models/base/base.json").write_text(json.dumps(content))
    return request.param, tokenizer, Serving(template=text, stop=["</s>"], go=go, num_ctx=256)


@pytest.mark.parametrize("base", [CHAT, TEMPLATE], indirect=True, ids=["chat", "literal"])
def test_exactly_the_answers_of_all_turns_and_their_ends_are_trained_on(base):
    template, tokenizer, serving = base
    end = "<|im_end|>" if template == CHAT else "</s>"
    for item in (TALK, replace(TALK, system=None), replace(TALK, turns=TALK.turns[:1]), replace(TALK, turns=())):
        ids, ends = encode_turns(tokenizer, Form(template).parts(item))
        mask = learnt(ends)
        starts = [n for n in range(len(ids)) if mask[n] and not mask[n - 1]]
        output = [ids[n : mask.index(0, n) if 0 in mask[n:] else None] for n in starts]
        answers = [answer for _, answer in item.turns]
        assert [tokenizer.decode(one) for one in output] == [*(a + end for a in answers), item.completion + "</s>"]
        # Asked for any of the answers, it is shown the very tokens that stood before that one in training.
        for n, start in enumerate(starts):
            part = replace(item, turns=item.turns[:n], prompt=[*item.turns, (item.prompt, "")][n][0])
            assert encode_prompt(tokenizer, serving.render(asked_for(part))) == ids[:start]
        assert Form(template).asked(item) == serving.render(asked_for(item)) and serving.converses
    serving.check()


@pytest.mark.parametrize("base", [TEMPLATE], indirect=True, ids=["literal"])
def test_a_literal_template_is_filled_for_every_turn_and_plain_texts_use_none(base, exported):
    template, tokenizer, serving = base
    form, turn = Form(template), "### Instruction:\n{}\n\n### Response:\n{}"
    output = [turn.format(question, f"{answer}</s>") for question, answer in TALK.turns]
    assert form.asked(TALK) == "".join(["Count the apples.\n\n", *output, turn.format("And 4 + 4?", "")])
    with LlamaCppEngine(exported / "base.gguf", serving.render, num_ctx=256) as engine:
        assert engine.tokenize(engine.render(asked_for(TALK))) == encode_prompt(tokenizer, form.asked(TALK))
    text = Item("2", "chat", "The lake", " is wide.", {}, whole=True)
    assert form.parts(text) == ("", "The lake is wide.")
    ids, ends = encode_turns(tokenizer, form.parts(text))
    assert learnt(ends) == [0] + [1] * (len(ids) - 1) and tokenizer.decode(ids) == "<s> The lake is wide.</s>"
    assert form.asked(text) == serving.render(asked_for(text)) == "The lake"


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_match_the_chat_template(name, tmp_path, monkeypatch):
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/base.json").write_text(json.dumps({"chat": asdict(made(name))}))
    monkeypatch.chdir(tmp_path)
    form = Form(CHAT)
    item = TALK if name in named("system") else replace(TALK, system=None)
    if item is not TALK:
        with pytest.raises(ConfigError, match="takes no system message, and 1 has one"):
            form.parts(TALK)
    assert form.asked(item) == rendered(name, item.system, item.prompt, item.turns)
