"""The proof: engines whose answers are known, the whole table, the control, files and servers that fail."""

from functools import partial

import pytest

from export.diagnosis import as_decoded
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine, open_in_process
from export.proof import against, problems, prove, verify
from export.served import find_served
from tests.conftest import TEMPLATE
from tests.export.verify_runs import ARM, model, one, opened

pytestmark = pytest.mark.usefixtures("own_records")


def test_all_models_in_all_forms(tree, kind):
    local = kind == "llama_cpp"
    with opened(kind) as (opener, double):
        rows = [row for served in find_served(tree) for row in verify(opener, served, with_adapter=local)]
        requests = [(path, body) for _, path, body in double.requests] if double else []
    modes = [("base_model", "merged"), (ARM, "merged"), *([(ARM, "adapter")] if local else [])]
    assert [(r.name, r.mode, r.form) for r in rows] == [(*m, f) for m in modes for f in ("plain", "newline", "second")]
    for row in rows:
        assert (row.rendered, row.counted, row.answered, row.first_difference) == (1.0, 1.0, 1.0, None), row
        assert (row.backend, row.prompts, row.tied) == (kind, 6, 0)
        assert (row.server_digest is None) is (row.stored_sha256 is None) is local
    assert problems(rows, 1.0) == []
    assert [r.equal_to_merged for r in rows[6:]] == [1.0] * 3 * local
    assert [r.perturbed_noticed for r in rows] == [None] * 6 + [True, None, None] * local
    if local:
        assert rows[0].gguf_sha256 == rows[6].gguf_sha256 and rows[6].adapter_sha256 and not rows[3].adapter_sha256
        return
    assert {len(body["messages"]) for path, body in requests if path == "/api/chat"} == {3}
    assert any(path == "/api/generate" and body["prompt"].endswith("\n") for path, body in requests)


# --- the control -----------------------------------------------------------------------------------------


def test_a_control_that_changes_nothing_makes_the_check_worthless(tree, monkeypatch):
    monkeypatch.setattr("export.proof.CONTROL_SCALE", 1.0 + 1e-6)
    row = verify(open_in_process, model(tree), with_adapter=True)[3]
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
    row = one(verify(open_in_process, model(tree)))
    row = row.model_copy(update={"quantization": "q8_0", "answered": 0.5})
    assert problems([row], 1.0, 0.4) == []
    adapted = row.model_copy(update={"mode": "adapter", "adapter_sha256": row.gguf_sha256})
    assert problems([adapted], 1.0, 0.4), "an adapter lies on the f16 base"


def test_two_engines_must_agree_on_the_same_files(tree):
    served = model(tree)
    local = verify(open_in_process, served)
    with opened("ollama") as (opener, double):
        rows = against(verify(opener, served), local)
        assert [(r.equal_to_llama_cpp, r.tokens_as_llama_cpp) for r in rows] == [(1.0, 1.0)] * 3
        whole = double.generate
        double.generate = lambda body: ({**p, "response": p["response"].upper() + "?"} for p in whole(body))
        wrong = one(verify(opener, served)).model_copy(update={"quantization": "q8_0"})
    compared = one(against([wrong], local))
    assert compared.equal_to_llama_cpp == 0.0
    assert "answers equal to llama.cpp's of the same files: expected 90%, got 0%" in str(problems([compared], 0.9, 0.0))
    more = rows[0].model_copy(update={"answer_tokens": tuple(n + 1 for n in rows[0].answer_tokens)})
    said = "equal answers with as many tokens as in llama.cpp: expected 90%, got 0%"
    assert said in str(problems(against([more], local), 0.9))
    other = wrong.model_copy(update={"gguf_sha256": "0" * 64})
    assert one(against([other], local)).equal_to_llama_cpp is None
    assert against(local, [])[0].equal_to_llama_cpp is None


# --- the files alone ----------------------------------------------------------------------------------------------


def test_files_beside_hugging_face(tree, base_dir, adapter_dir, prompts):
    served = model(tree)

    def llama_cpp(form):
        return LlamaCppEngine(form.gguf, TEMPLATE, num_ctx=256, adapter=form.adapter)

    def rows_of(adapter):
        trained = partial(HfEngine, str(base_dir), TEMPLATE, adapter=adapter, parallel=4)
        return prove(trained, llama_cpp, [served, served.adapter_form()], prompts, 6)

    rows, known = rows_of(adapter_dir)
    assert [(row.mode, row.form, row.prompts, row.counted, row.answered, row.first_difference) for row in rows] == [
        (mode, "rendered", len(prompts), 1.0, 1.0, None) for mode in ("merged", "adapter")
    ]
    assert known.keys() == set(prompts) and problems(rows, 1.0) == []
    assert all(one["ids"][0] == 1 and isinstance(one["answer"], str) for one in known.values())
    rows, _ = rows_of(None)
    assert all(row.counted == 1.0 and row.answered < 0.9 for row in rows) and len(problems(rows, 0.9)) == 2
