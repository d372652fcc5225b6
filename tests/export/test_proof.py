"""The proof: engines whose answers are known, the whole table, the control, files and servers that fail."""

import shutil
from functools import partial

import pytest

from export import ExportError
from export.diagnosis import as_decoded
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine, open_in_process
from export.gguf import scale_of, scaled_copy
from export.proof import against, problems, prove, verify
from export.register import open_on_server
from export.served import find_served
from tests.conftest import TEMPLATE
from tests.export.verify_runs import ARM, answers, model, one, opened
from tests.ollama_double import OllamaDouble

pytestmark = pytest.mark.usefixtures("own_records")


def test_all_models_in_both_modes(tree, kind):
    with opened(kind) as (opener, double):
        rows = [row for served in find_served(tree) for row in verify(opener, served)]
        assert double is None or double.models == {}, "what was registered for the check is gone"
        asked = [(path, body) for _, path, body in double.requests] if double else []
    modes = [("base_model", "merged"), (ARM, "merged"), (ARM, "adapter")]
    assert [(r.name, r.mode, r.form) for r in rows] == [(*m, f) for m in modes for f in ("plain", "newline", "second")]
    for row in rows:
        assert (row.rendered, row.counted, row.answered, row.first_difference) == (1.0, 1.0, 1.0, None), row
        assert (row.backend, row.prompts, row.tied) == (kind, 6, 0)
        assert (row.server_digest is None) is (row.stored_sha256 is None) is (kind == "llama_cpp")
    assert problems(rows, 1.0) == []
    assert [r.equal_to_merged for r in rows] == [None] * 6 + [1.0] * 3
    assert [r.perturbed_noticed for r in rows] == [None] * 6 + [True, None, None]
    assert rows[0].gguf_sha256 == rows[6].gguf_sha256 and rows[6].adapter_sha256 and not rows[3].adapter_sha256
    said = [body["messages"] for path, body in asked if path == "/api/chat"]
    assert not asked or {len(messages) for messages in said} == {3}
    assert not asked or any(path == "/api/generate" and body["prompt"].endswith("\n") for path, body in asked)


def test_a_release_without_adapters_is_no_fault_of_the_model(tree):
    with OllamaDouble(version="0.34.1") as double:
        *merged, adapter = verify(partial(open_on_server, double.url), model(tree))
        assert double.models == {}
    assert problems(merged, 1.0) == [] and [row.answered for row in merged] == [1.0] * 3
    assert adapter.unsupported and problems([adapter], 1.0) == [] and adapter.prompts == 0 and adapter.rendered is None
    assert "0.34.1" in adapter.first_difference and "no longer supported" in adapter.first_difference


# --- the control -----------------------------------------------------------------------------------------


def test_scaled_copies_are_llama_cpps_own_scale(tree, tmp_path):
    form = model(tree).adapter_form()
    alpha, rank = scale_of(form.adapter)
    whole = shutil.copy(form.adapter, tmp_path / "whole.gguf")
    for factor in (0.5, 3.0):
        scaled_copy(whole, tmp_path / "copy.gguf", factor)
        assert scale_of(tmp_path / "copy.gguf") == (alpha * factor, rank)
        expected = answers(form, factor)
        shutil.copy(tmp_path / "copy.gguf", form.adapter)
        assert answers(form) == expected
        shutil.copy(whole, form.adapter)
    assert answers(form, 0.5) != answers(form), "or the lines above show nothing"
    with pytest.raises(ExportError, match="other than 0"):
        scaled_copy(form.adapter, tmp_path / "copy.gguf", 0)
    with pytest.raises(ExportError, match=r"expected adapter\.lora\.alpha"):
        scaled_copy(form.gguf, tmp_path / "copy.gguf", 2)


def test_a_control_that_changes_nothing_makes_the_check_worthless(tree):
    served = model(tree)
    row = one(verify(open_in_process, served, ["adapter"], control_scale=1.0 + 1e-6))
    assert row.answered == 1 and row.perturbed_noticed is False
    assert "none of 6 answers differs" in row.first_difference and problems([row], 0.0)


def test_the_first_blank():
    for text, answer, decoded in (
        (" 12", "12", "12"),  # SentencePiece: Hugging Face drops the first blank
        ("  12", " 12", " 12"),
        (" 12", " 12", " 12"),  # byte-level BPE: it keeps it
        ("12", " 12", "12"),  # a blank that the engine leaves out is a difference
        (" 13", "12", "13"),
        (" ", "", " "),
        ("", "12", ""),
    ):
        assert as_decoded(text, answer) == decoded


# --- quantized models, two engines -------------------------------------------------------------------------


def test_least_share_of_a_quantized_model(tree):
    """What quantization itself does to answers is tested in tests/pipelines/test_verify_stage.py."""
    row = one(verify(open_in_process, model(tree), ["merged"])).model_copy(update={"quantization": "q8_0"})
    alone = row.model_copy(update={"mode": "adapter", "answered": 0.5})  # the base, where only this mode was asked for
    assert problems([alone], 1.0, 0.4) == []
    adapted = alone.model_copy(update={"adapter_sha256": row.gguf_sha256})
    assert problems([adapted], 1.0, 0.4), "an adapter lies on the f16 base"


def test_two_engines_must_agree_on_the_same_files(tree):
    served = model(tree)
    local = verify(open_in_process, served)
    with opened("ollama") as (opener, double):
        rows = against(verify(opener, served), local)
        assert [(r.equal_to_llama_cpp, r.tokens_as_llama_cpp) for r in rows] == [(1.0, 1.0)] * 6
        whole = double.generate
        double.generate = lambda body: ({**p, "response": p["response"].upper() + "?"} for p in whole(body))
        wrong = one(verify(opener, served, ["merged"])).model_copy(update={"quantization": "q8_0"})
    compared = one(against([wrong], local))
    assert compared.equal_to_llama_cpp == 0.0
    assert "answers equal to llama.cpp's of the same files: expected 90%, got 0%" in str(problems([compared], 0.9, 0.0))
    more = rows[0].model_copy(update={"answer_tokens": tuple(n + 1 for n in rows[0].answer_tokens)})
    said = "equal answers with as many tokens as in llama.cpp: expected 90%, got 0%"
    assert said in str(problems(against([more], local), 0.9))
    other = wrong.model_copy(update={"gguf_sha256": "0" * 64})
    assert one(against([other], local)).equal_to_llama_cpp is None
    assert against(local, [])[0].equal_to_llama_cpp is None


# --- files and failures ----------------------------------------------------------------------------------


def test_nothing_stays_on_the_server_when_a_check_breaks_off(tree):
    with opened("ollama") as (opener, double):
        double.misbehave = "drop"
        with pytest.raises(ExportError, match="the connection to Ollama"):
            verify(opener, model(tree))
        made = [body["model"] for _, path, body in double.requests if path == "/api/create"]
        assert len(made) == 1 and made[0].startswith("grit-verify-") and double.models == {}


# --- the files alone ----------------------------------------------------------------------------------------------


def test_files_beside_hugging_face(tree, base_dir, adapter_dir, prompts):
    served = model(tree)

    def llama_cpp(form):
        return LlamaCppEngine(form.gguf, TEMPLATE, num_ctx=256, adapter=form.adapter)

    def rows_of(adapter):
        trained = partial(HfEngine, str(base_dir), TEMPLATE, adapter=adapter, parallel=4)
        return prove(trained, llama_cpp, [served, served.adapter_form()], prompts, 6)

    rows, answers = rows_of(adapter_dir)
    assert [(row.mode, row.form, row.prompts, row.counted, row.answered, row.first_difference) for row in rows] == [
        (mode, "rendered", len(prompts), 1.0, 1.0, None) for mode in ("merged", "adapter")
    ]
    assert answers.keys() == set(prompts) and problems(rows, 1.0) == []
    assert all(one["ids"][0] == 1 and isinstance(one["answer"], str) for one in answers.values())
    rows, _ = rows_of(None)
    assert all(row.counted == 1.0 and row.answered < 0.9 for row in rows) and len(problems(rows, 0.9)) == 2
