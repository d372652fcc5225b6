"""Every cause of a difference told apart, by a fault that is just this one."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from gguf import GGUFReader

from export import gguf
from export.diagnosis import ask, first_token
from export.engines.engine import EngineError, conversation
from export.engines.llama_cpp import open_in_process
from export.gguf import quantize, scaled_copy
from export.go import CONTENT, ELSE_ASSISTANT, END, IF_USER, MESSAGES, go_of_turns
from export.proof import problems, verify
from export.register import register
from export.served import read_references
from tests.export.verify_runs import (
    LATEST,
    answers,
    edit,
    longer,
    model,
    one,
    opened,
    patch,
    rewrite,
    substitute,
)

pytestmark = pytest.mark.usefixtures("own_records")


def test_the_first_differing_token(exported):
    at, expected, got = first_token(exported / "base.gguf", "Good: 42", "Good: 43")
    assert (expected, got) == ("2", "3") and at > 0
    assert first_token(exported / "base.gguf", "Good", "Good: 4")[1] == ""


def template_changes(folder):
    substitute(folder, "### Instruction", "### Question")


def bos_is_missing(folder):
    patch(folder / "model.gguf", "tokenizer.ggml.add_bos_token", False)


def bos_is_written_as_well(folder):
    """As with a chat template that writes the token, under a GGUF that adds it too."""
    rewrite(folder, rendered=lambda row: "<s>" + row["rendered"])
    substitute(folder, "### Instruction", "<s>### Instruction")
    edit(folder, adds_bos=False)  # or it would be refused


@pytest.mark.parametrize(
    ("spoil", "rendered", "at", "said"),
    [
        (template_changes, 0.0, r"prompt 0: token [1-9]\d* of the rendered prompt", "Likely cause: template"),
        (bos_is_missing, 1.0, "token 0 of the prompt is .* expected '<s>'", "Likely cause: BOS; it is missing"),
        (bos_is_written_as_well, 1.0, "token 1 of the prompt is '<s>'", "Likely cause: BOS; it comes twice"),
    ],
)
def test_cause_template_or_bos(tree, kind, spoil, rendered, at, said):
    spoil(tree / "pure_grit/0")
    with opened(kind) as (opener, _):
        row = one(verify(opener, model(tree), ["merged"]))
    assert row.rendered == rendered and (row.counted == 0 or not rendered)
    assert re.search(at, row.first_difference) and said in row.first_difference
    assert ("same tokens: expected 100%, got 0%" if rendered else "rendered") in str(problems([row], 0.0))


def test_cause_bos_that_only_the_server_adds(tree):
    """The exported file is right; what the server counts is not."""
    with opened("ollama") as (opener, double):
        whole = double.generate

        def more(body):
            for part in whole(body):
                count = part.get("prompt_eval_count")
                yield part if count is None else {**part, "prompt_eval_count": count + 1}

        double.generate = more
        row = one(verify(opener, model(tree), ["merged"]))
    assert row.counted == 0 and "token 1 of the prompt is '<s>'" in row.first_difference
    assert "it comes twice" in row.first_difference


@pytest.mark.parametrize("where", ["server", "training"])
def test_cause_stop_word_that_only_one_side_has(tree, where):
    folder = tree / "pure_grit/0"
    word = next(text for text in answers(model(tree)).values() if len(text) > 1)[1]
    stops = {"server": ["</s>"], "training": ["</s>"], where: ["</s>", word]}
    if where == "training":
        rewrite(folder, answer=lambda row: row["answer"].split(word)[0])
        edit(folder, stop=stops["training"])
    served = model(tree)
    with opened("ollama") as (opener, double):
        register(double.url, served)
        double.models[LATEST].parameters["stop"] = stops["server"]
        row = one(verify(opener, served, ["merged"]))
    said = f"{word!r} is a stop word on the server and inside of answers" if where == "server" else "stop words differ"
    assert row.answered < 1 and row.counted == 1
    assert f"Likely cause: stop; {said}: it has {stops['server']}, training {stops['training']}" in row.first_difference


def test_cause_stop_an_end_token_that_is_none(tree, kind):
    """The end token has a name that llama.cpp does not know, and the GGUF says that another one ends."""
    served = model(tree)
    longer(served, 60)
    file = served.folder / "model.gguf"
    reader = GGUFReader(file, "r+")
    words = reader.get_field("tokenizer.ggml.tokens")
    assert bytes(words.parts[words.data[2]]) == b"</s>"
    words.parts[words.data[2]][:] = list(b"</t>")
    reader.data.flush()
    patch(file, "tokenizer.ggml.eos_token_id", 7)
    substitute(served.folder, "</s>", "</t>")
    with opened(kind) as (opener, _):
        row = one(verify(opener, model(tree), ["merged"]))
    said = "Likely cause: stop; the answer goes on behind '</t>', which the GGUF does not mark as an end"
    assert row.answered < 1 and said in row.first_difference


def test_cause_stop_a_token_that_ends_and_should_not(tree, kind):
    served = model(tree)
    with open_in_process(served) as engine:
        seen = [ask(engine, r).ids for r in read_references(served.folder)]
        token = next(ids[1] for ids in seen if len(ids) > 1 and ids[1] not in ids[:1])
    patch(served.folder / "model.gguf", "tokenizer.ggml.eos_token_id", token)
    with opened(kind) as (opener, _):
        row = one(verify(opener, served, ["merged"]))
    assert row.answered < 1 and "Likely cause: stop; the GGUF marks '" in row.first_difference


@pytest.mark.parametrize("factor", [0.5, 2.0, 1e-6])
def test_cause_scale_of_the_adapter_file(tree, factor):
    served = model(tree)
    adapter = served.folder / "adapter.gguf"
    scaled_copy(shutil.copy(adapter, tree / "whole.gguf"), adapter, factor)
    said = one(verify(open_in_process, served, ["adapter"])).first_difference
    if factor == 1e-6:
        assert "Likely cause: weights of the adapter" in said, "no factor that is known brings it back"
        return
    scale = f"scale; the adapter file answers as trained once its scale is multiplied by {1 / factor:.3g}"
    assert f"Likely cause: {scale}" in said


@pytest.mark.parametrize(("factor", "said"), [(0.5, "counts 0.5 times"), (1e-6, "has no effect")])
def test_cause_scale_on_the_server(tree, tmp_path, factor, said):
    served = model(tree)
    form = served.adapter_form()
    scaled_copy(form.adapter, tmp_path / "lost.gguf", factor)
    with opened("ollama") as (opener, double):
        register(double.url, replace(form, adapter=tmp_path / "lost.gguf"))
        row = one(verify(opener, served, ["adapter"]))
    assert row.answered < 1 and row.equal_to_merged < 1
    assert f"Likely cause: scale; the adapter {said}" in row.first_difference


def test_cause_scale_lost_in_the_merge(tree, base_dir, adapter_dir, tmp_path):
    twice = shutil.copytree(adapter_dir, tmp_path / "twice")
    config = json.loads((twice / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (twice / "adapter_config.json").write_text(json.dumps(config))
    gguf.save_merged(str(base_dir), twice, tmp_path / "merged", {})
    gguf.convert_model(tmp_path / "merged", tree / "pure_grit/0/model.gguf", "x")
    rows = verify(open_in_process, model(tree))
    merged, adapter = rows[0], rows[3]
    assert "Likely cause: scale; the adapter counts 2 times as much as trained" in merged.first_difference
    assert adapter.answered == 1 and adapter.equal_to_merged == merged.answered < 1
    assert "answers equal to mode merged" in str(problems([adapter], 1.0))


def test_cause_quantization(tree, kind):
    served = model(tree)
    longer(served, 60)
    quantize(shutil.copy(served.gguf, tree / "f16.gguf"), served.gguf, "q4_0")
    with opened(kind) as (opener, _):
        row = one(verify(opener, served, ["merged"]))
    assert row.answered < 1 and "Likely cause: quantization; the weights are Q4_0" in row.first_difference
    assert problems([row], 1.0), "it was exported as f16"
    assert problems([row.model_copy(update={"quantization": "q4_0"})], 1.0) == [], "quantized on purpose"


def test_cause_rounding_a_tie_on_the_server_alone(tree, monkeypatch):
    """llama.cpp answers as training did; the server takes the second best token, which is as good where they tie."""
    served = model(tree)
    first = read_references(served.folder)[0]
    with open_in_process(served) as engine:
        engine.prefill(first.ids)
        best = engine.logits().argsort()[::-1].tolist()
        lead = float(engine.logits()[best[0]] - engine.logits()[best[1]])
        other = engine.detokenize(best[1:2])
    with opened("ollama") as (opener, double):
        whole = double.generate

        def second_best(body):
            for part in whole(body):
                if body.get("prompt") == first.prompt:
                    part["response"] = other if part["done"] else ""
                yield part

        double.generate = second_best
        for tie in (lead * 0.9, lead * 1.1):
            monkeypatch.setattr("export.diagnosis.TIE", tie)
            rows = verify(opener, served, ["merged"])
            row = one(rows)
            assert row.answered == pytest.approx(5 / 6) and [r.answered for r in rows[1:]] == [1, 1]
            assert row.tied == pytest.approx(1 / 6 if tie > lead else 0)
            if tie > lead:
                assert f"rounding; the two are a tie there ({lead:.3f} logits apart)" in row.first_difference
                assert problems(rows, 1.0) == [], "a tie does not count"
            else:
                assert "Likely cause: the server; llama.cpp answers from the same files as" in row.first_difference
                assert "expected 95%, got 94%" in str(problems(rows, 0.95)) and problems(rows, 0.94) == []


def test_a_model_whose_answers_all_part_at_ties_is_damaged(tree):
    rows = verify(open_in_process, model(tree, "base_model"))
    for answered, said in ((5 / 6, "[]"), (0.5, "diverge at a tie: expected at most 25%, got 50%; are weights lost?")):
        spoilt = [row.model_copy(update={"answered": answered, "tied": 1 - answered}) for row in rows]
        assert said in str(problems(spoilt, 1.0))


# --- what only a second question shows ------------------------------------------------------------------------------


def test_cause_template_that_renders_the_history_for_a_model_of_single_turns(tree):
    served = model(tree)
    old = go_of_turns(served.serving.template, "</s>")
    with opened("ollama") as (opener, double):
        register(double.url, replace(served, serving=served.serving.model_copy(update={"go": old})))
        plain, newline, second = verify(opener, served, ["merged"])
    assert plain.rendered == newline.rendered == 1 and second.rendered == 0
    assert "TEMPLATE renders what was said before, and the model was trained on single" in second.first_difference
    assert "prompts rendered as in training: expected 100%, got 67%" in str(problems([plain, newline, second], 0.0))


def test_cause_template_without_an_end_token_between_turns(tree, kind):
    """Exported for a model of several turns; what is served forgets that an answer ends."""
    folder = tree / "pure_grit/0"
    head, _, tail = model(tree).serving.template.partition("{prompt}")

    def go(end):
        said = IF_USER + CONTENT + ELSE_ASSISTANT + tail + CONTENT + end + head + END
        return head + MESSAGES + said + END + tail

    edit(folder, go=go("</s>"))
    served = model(tree)
    with open_in_process(served) as engine:

        def asked(row):
            return conversation(row["prompt"], turns=row["turns"])

        rewrite(
            folder,
            rendered=lambda row: engine.render(asked(row)),
            ids=lambda row: engine.tokenize(engine.render(asked(row))),
            answer=lambda row: engine.generate(asked(row), row["max_tokens"]).text.removeprefix(" "),
        )
    with opened(kind) as (opener, _):
        assert problems(verify(opener, served), 0.0) == []
        edit(folder, go=go(""))
        plain, newline, second = verify(opener, model(tree), ["merged"])
    assert plain.rendered == newline.rendered == 1 and second.rendered == 0
    assert "TEMPLATE writes no '</s>' behind an answer, so that turns run together" in second.first_difference


def test_a_cause_that_cannot_be_found_does_not_hide_the_difference(tree, monkeypatch):
    """The diagnosis asks llama.cpp as well, which here cannot load the file."""

    def unloadable(*_):
        raise EngineError("model.gguf: llama.cpp cannot load it")

    monkeypatch.setattr("export.diagnosis.open_in_process", unloadable)
    served = model(tree, "base_model")
    rewrite(served.folder, answer=lambda row: "#" + row["answer"][1:])
    with opened("ollama") as (opener, double):
        register(double.url, served)
        row = one(verify(opener, served, ["merged"]))
    assert row.answered == 0 and row.first_difference.startswith("prompt 0: ")
    assert "Cause not found: " in row.first_difference and "llama.cpp cannot load it" in row.first_difference
