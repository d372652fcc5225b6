"""Every cause of a difference told apart, by a fault that is just this one."""

import json
import shutil
from dataclasses import replace

import pytest
from gguf import GGUFReader

from export.adapter_file import scaled_copy
from export.gguf import quantize
from export.llama_engine import LlamaCpp, LlamaEngine
from export.ollama import register
from export.verify import read_references, verify
from tests.export.verify_runs import ARM, answers, longer, model, one, opened, patch, rewrite

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_records")]


def test_cause_template(tree, kind):
    folder = tree / "pure_grit/0"
    for name in ("Modelfile", "Modelfile.adapter"):
        text = (folder / name).read_text()
        assert "### Instruction" in text
        (folder / name).write_text(text.replace("### Instruction", "### Question"))
    facts = json.loads((folder / "serving.json").read_text())
    facts["template"] = facts["template"].replace("### Instruction", "### Question")
    (folder / "serving.json").write_text(json.dumps(facts))
    with opened(kind) as (backend, _):
        row = one(verify(backend, model(tree), ["merged"]))
    assert row.rendered == 0 and "Likely cause: template" in row.first
    said = row.first.split(" of the rendered prompt")[0]
    assert said.startswith("prompt 0: token ") and int(said.split()[-1]) > 0, "the hashes in front are equal"
    assert "rendered" in row.problem(0.0)


def test_cause_bos_missing(tree, kind):
    patch(tree / "pure_grit/0/model.gguf", "tokenizer.ggml.add_bos_token", False)
    with opened(kind) as (backend, _):
        row = one(verify(backend, model(tree), ["merged"]))
    assert (row.rendered, row.counted) == (1.0, 0.0)
    assert "expected '<s>'" in row.first and "Likely cause: BOS; it is missing" in row.first
    assert "token 0 of the prompt" in row.first and "same tokens: expected 100%, got 0%" in row.problem(0.0)


def test_cause_bos_twice(tree, kind):
    """As with a chat template that writes the token, under a GGUF that adds it too."""
    folder = tree / "pure_grit/0"
    rewrite(folder, rendered=lambda row: "<s>" + row["rendered"])
    facts = json.loads((folder / "serving.json").read_text())
    facts["template"] = "<s>" + facts["template"]
    (folder / "serving.json").write_text(json.dumps(facts))
    text = (folder / "Modelfile").read_text()
    (folder / "Modelfile").write_text(text.replace("### Instruction", "<s>### Instruction"))
    with opened(kind) as (backend, _):
        row = one(verify(backend, model(tree), ["merged"]))
    assert (row.rendered, row.counted) == (1.0, 0.0)
    assert "token 1 of the prompt is '<s>'" in row.first and "Likely cause: BOS; it comes twice" in row.first


def test_cause_bos_that_only_the_server_adds(tree):
    """The exported file is right; what the server counts is not."""
    with opened("ollama") as (backend, double):
        whole = double.generate

        def more(body):
            for part in whole(body):
                count = part.get("prompt_eval_count")
                yield part if count is None else {**part, "prompt_eval_count": count + 1}

        double.generate = more
        row = one(verify(backend, model(tree), ["merged"]))
    assert row.counted == 0 and "token 1 of the prompt is '<s>'" in row.first and "it comes twice" in row.first


def test_cause_stop_word_inside_of_answers(tree, kind):
    served = model(tree)
    word = next(text for text in answers(served).values() if len(text) > 1)[1]
    with opened(kind) as (backend, double):
        if double:
            register(double.url, ARM, served.gguf, served.spec)
            double.models[f"{ARM}:latest"].parameters["stop"] = ["</s>", word]
        else:
            with (served.folder / "Modelfile").open("a") as file:
                file.write(f'PARAMETER stop "{word}"\n')
        row = one(verify(backend, served, ["merged"]))
    assert row.answered < 1 and row.counted == 1
    assert f"Likely cause: stop; {word!r} is a stop word on the server and inside of answers" in row.first


def test_cause_stop_word_that_is_missing(tree, kind):
    served = model(tree)
    word = next(text for text in answers(served).values() if len(text) > 1)[1]
    rewrite(served.folder, answer=lambda row: row["answer"].split(word)[0])
    facts = {**served.facts, "stop": ["</s>", word]}
    (served.folder / "serving.json").write_text(json.dumps(facts))
    served = model(tree)
    with opened(kind) as (backend, double):
        if double:  # the Modelfile has not got the word either way
            register(double.url, ARM, served.gguf, served.spec)
            double.models[f"{ARM}:latest"].parameters["stop"] = ["</s>"]
        row = one(verify(backend, served, ["merged"]))
    assert row.answered < 1
    assert f"Likely cause: stop; stop words differ: it has ['</s>'], training ['</s>', {word!r}]" in row.first


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
    for name in ("serving.json", "Modelfile"):
        text = (served.folder / name).read_text()
        (served.folder / name).write_text(text.replace("</s>", "</t>"))
    with opened(kind) as (backend, _):
        row = one(verify(backend, model(tree), ["merged"]))
    assert row.answered < 1
    assert "Likely cause: stop; the answer goes on behind '</t>', which the GGUF does not mark as an end" in row.first


def test_cause_stop_a_token_that_ends_and_should_not(tree, kind):
    served = model(tree)
    with LlamaCpp().open(served) as engine:
        seen = [engine.ask(r) for r in read_references(served.folder)]
        token = next(s.answer_ids[1] for s in seen if len(s.answer_ids) > 1 and s.answer_ids[1] not in s.answer_ids[:1])
    patch(served.folder / "model.gguf", "tokenizer.ggml.eos_token_id", token)
    with opened(kind) as (backend, _):
        row = one(verify(backend, served, ["merged"]))
    assert row.answered < 1 and "Likely cause: stop; the GGUF marks '" in row.first


@pytest.mark.parametrize("factor", [0.5, 2.0, 1e-6])
def test_cause_scale_of_the_adapter_file(tree, factor):
    served = model(tree)
    adapter = served.folder / "adapter.gguf"
    whole = shutil.copy(adapter, tree / "whole.gguf")
    scaled_copy(whole, adapter, factor)
    row = one(verify(LlamaCpp(), served, ["adapter"]))
    if factor == 1e-6:
        assert "Likely cause: weights of the adapter" in row.first, "no factor that is known brings it back"
        return
    assert (
        f"Likely cause: scale; the adapter file answers as trained once its scale is multiplied by {1 / factor:.3g}"
        in (row.first)
    )


@pytest.mark.parametrize(("factor", "said"), [(0.5, "counts 0.5 times"), (1e-6, "has no effect")])
def test_cause_scale_on_the_server(tree, tmp_path, factor, said):
    served = model(tree)
    form = served.adapter_form()
    scaled_copy(form.adapter, tmp_path / "lost.gguf", factor)
    with opened("ollama") as (backend, double):
        register(double.url, ARM, form.gguf, form.spec, tmp_path / "lost.gguf")
        row = one(verify(backend, served, ["adapter"]))
    assert row.answered < 1 and row.equal_to_merged < 1
    assert f"Likely cause: scale; the adapter {said}" in row.first


def test_cause_scale_lost_in_the_merge(tree, base_dir, adapter_dir, tmp_path):
    from export import gguf

    twice = shutil.copytree(adapter_dir, tmp_path / "twice")
    config = json.loads((twice / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (twice / "adapter_config.json").write_text(json.dumps(config))
    gguf.save_merged(str(base_dir), twice, tmp_path / "merged", {})
    gguf.convert_model(tmp_path / "merged", tree / "pure_grit/0/model.gguf", "x")
    merged, adapter = verify(LlamaCpp(), model(tree))
    assert "Likely cause: scale; the adapter counts 2 times as much as trained" in merged.first
    assert adapter.answered == 1 and adapter.equal_to_merged == merged.answered < 1
    assert "answers equal to mode merged" in adapter.problem(1.0)


def test_cause_quantization(tree, kind):
    file = tree / "pure_grit/0/model.gguf"
    f16 = shutil.copy(file, tree / "f16.gguf")
    served = model(tree)
    longer(served, 60)
    quantize(f16, file, "q4_0")
    with opened(kind) as (backend, _):
        row = one(verify(backend, served, ["merged"]))
    assert row.answered < 1 and "Likely cause: quantization; the weights are Q4_0" in row.first
    assert row.problem(1.0) is not None, "it was exported as f16"
    assert replace(row, quantization="q4_0").problem(1.0) is None, "quantized on purpose"


def test_a_tie_is_named(tree, monkeypatch):
    """Where two tokens tie the other one is as good; elsewhere it is not."""
    served = model(tree)
    with LlamaCpp().open(served) as engine:
        lead = engine.ask(read_references(served.folder)[0]).leads[0]
    rewrite(served.folder, answer=lambda row: "#" + row["answer"][1:])
    said = {}
    for tie in (lead * 0.9, lead * 1.1):
        monkeypatch.setattr("export.diagnosis.TIE", tie)
        said[tie > lead] = one(verify(LlamaCpp(), served, ["merged"])).first
    assert "Likely cause: rounding; the best two tokens are a tie there" in said[True]
    assert "Likely cause: merge or weights of the file" in said[False]


def test_a_cause_that_cannot_be_found_does_not_hide_the_difference(tree):
    """The diagnosis asks llama.cpp as well, which here finds no Modelfile."""
    served = model(tree, "base_model")
    rewrite(served.folder, answer=lambda row: "#" + row["answer"][1:])
    with opened("ollama") as (backend, double):
        register(double.url, "base_model", served.gguf, served.spec)
        (served.folder / "Modelfile").unlink()
        row = one(verify(backend, served, ["merged"]))
    assert row.answered == 0 and "of the answer is" in row.first and "expected '#" in row.first
    assert "Cause not found: " in row.first and "Modelfile: no such file" in row.first


@pytest.mark.parametrize("what", ["rendered", "counted"])
def test_nor_does_one_that_needs_the_file(tree, what):
    served = model(tree, "base_model")
    change = {"rendered": {"rendered": lambda row: row["rendered"] + "?"}, "counted": {"ids": lambda row: [1]}}[what]
    rewrite(served.folder, **change)
    with opened("ollama") as (backend, double):
        register(double.url, "base_model", served.gguf, served.spec)
        double.show = lambda body, show=double.show: {**show(body), "details": {"quantization_level": "F16"}}
        served.gguf.write_bytes(b"GGUF")
        row = one(verify(backend, served, ["merged"]))
    assert getattr(row, what) == 0 and row.first.startswith("prompt 0: ") and "Cause not found: " in row.first
    assert "model.gguf: expected a GGUF model" in row.first


def test_an_engine_that_knows_its_tokens_is_not_loaded_twice(tree, monkeypatch):
    served = model(tree, "base_model")
    rewrite(served.folder, answer=lambda row: "#" + row["answer"][1:])
    loads = []
    load = LlamaEngine.__init__
    monkeypatch.setattr(LlamaEngine, "__init__", lambda self, *a, **k: (loads.append(a), load(self, *a, **k))[1])
    row = one(verify(LlamaCpp(), served, ["merged"]))
    assert "Likely cause: merge or weights of the file" in row.first and len(loads) == 1
