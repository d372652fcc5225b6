"""Every cause of a difference told apart, by a fault that is just this one."""

import json
import re
import shutil

import pytest
from gguf import GGUFReader

from export import gguf
from export.diagnosis import ask, first_token
from export.engines.llama_cpp import open_in_process
from export.gguf import quantize, scaled_copy
from export.register import register
from export.served import read_references
from export.verify import verify
from tests.export.verify_runs import ARM, LATEST, answers, edit, longer, model, one, opened, patch, rewrite, substitute

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
    assert ("same tokens: expected 100%, got 0%" if rendered else "rendered") in row.problem(0.0)


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
        register(double.url, ARM, served.gguf, served.serving)
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
        register(double.url, ARM, form.gguf, form.serving, tmp_path / "lost.gguf")
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
    merged, adapter = verify(open_in_process, model(tree))
    assert "Likely cause: scale; the adapter counts 2 times as much as trained" in merged.first_difference
    assert adapter.answered == 1 and adapter.equal_to_merged == merged.answered < 1
    assert "answers equal to mode merged" in adapter.problem(1.0)


def test_cause_quantization(tree, kind):
    served = model(tree)
    longer(served, 60)
    quantize(shutil.copy(served.gguf, tree / "f16.gguf"), served.gguf, "q4_0")
    with opened(kind) as (opener, _):
        row = one(verify(opener, served, ["merged"]))
    assert row.answered < 1 and "Likely cause: quantization; the weights are Q4_0" in row.first_difference
    assert row.problem(1.0) is not None, "it was exported as f16"
    assert row.model_copy(update={"quantization": "q4_0"}).problem(1.0) is None, "quantized on purpose"


def test_a_tie_is_named(tree, monkeypatch):
    """Where two tokens tie the other one is as good; elsewhere it is not."""
    served = model(tree)
    with open_in_process(served) as engine:
        lead = ask(engine, read_references(served.folder)[0]).leads[0]
    rewrite(served.folder, answer=lambda row: "#" + row["answer"][1:])
    said = {}
    for tie in (lead * 0.9, lead * 1.1):
        monkeypatch.setattr("export.diagnosis.TIE", tie)
        said[tie > lead] = one(verify(open_in_process, served, ["merged"])).first_difference
    assert "Likely cause: rounding; the best two tokens are a tie there" in said[True]
    assert "Likely cause: merge or weights of the file" in said[False]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("answered", {"answer": lambda row: "#" + row["answer"][1:]}),
        ("rendered", {"rendered": lambda row: row["rendered"] + "?"}),
        ("counted", {"ids": lambda row: [1]}),
    ],
)
def test_a_cause_that_cannot_be_found_does_not_hide_the_difference(tree, what, change):
    """The diagnosis asks llama.cpp as well, which here finds no Modelfile or no GGUF."""
    served = model(tree, "base_model")
    rewrite(served.folder, **change)
    with opened("ollama") as (opener, double):
        register(double.url, "base_model", served.gguf, served.serving)
        double.show = lambda body, show=double.show: {**show(body), "details": {"quantization_level": "F16"}}
        if what == "answered":
            (served.folder / "Modelfile").unlink()
        else:
            served.gguf.write_bytes(b"GGUF")
        row = one(verify(opener, served, ["merged"]))
    why = "Modelfile: no such file" if what == "answered" else "model.gguf: expected a GGUF"
    assert getattr(row, what) == 0 and row.first_difference.startswith("prompt 0: ")
    assert "Cause not found: " in row.first_difference and why in row.first_difference
