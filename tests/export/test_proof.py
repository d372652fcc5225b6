"""The proof: engines whose answers are known, the whole table, the control, files and servers that fail."""

import re
import shutil
from functools import partial

import numpy as np
import pytest

from export import ExportError
from export.diagnosis import as_decoded
from export.engines.engine import Generation, LocalEngine
from export.engines.llama_cpp import open_in_process
from export.gguf import scale_of, scaled_copy
from export.modelfile import Serving
from export.proof import against, problems, prove, verify
from export.register import open_on_server
from export.served import Served, find_served
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


# --- engines whose answers are known ------------------------------------------------------------------------------


class Told(LocalEngine):
    """Token ids are character codes; answers are looked up. `lead`: logits of every token that an answer has."""

    name, version, device_class = "told", "1", "cpu"
    next_token = feed = is_end = None

    def __init__(self, answers, bos=True, lead=5.0):
        super().__init__("{prompt}")
        self.answers, self.bos, self.closed, self.lead = answers, bos, False, lead

    def tokenize(self, text):
        return ([1] if self.bos else []) + [ord(c) for c in text]

    def answer(self, ids, max_tokens, stop=()):
        answer = self.answers["".join(map(chr, ids)).lstrip("\x01")][:max_tokens]
        return Generation(self.detokenize(answer), len(ids), len(answer), 0, 0, 0, "stop", prompt_ids=ids, ids=answer)

    def detokenize(self, ids):
        return "".join(map(chr, ids))

    def prefill(self, ids):
        pass

    def logits(self):
        return np.where(np.arange(128) == 70, self.lead, 0.0)

    def close(self):
        self.closed = True


RIGHT = {"a": [65, 66], "b": [67], "c": [68, 69], "d": [70]}


@pytest.mark.parametrize(
    ("other", "counted", "answered", "tied", "said"),
    [
        (Told(RIGHT), 1.0, 1.0, 0.0, None),
        (Told({**RIGHT, "c": [68, 70]}), 1.0, 0.75, 0.0, r"prompt 2 \('c'\): token 1 of the answer is 70, expected 69 "
         ".*Likely cause: adapter scale, merge or quantization"),
        (Told({**RIGHT, "c": [68, 70]}, lead=0.01), 1.0, 0.75, 0.25, "rounding; the two tokens are a tie"),
        (Told({**RIGHT, "c": [68, 70]}, lead=0.03), 1.0, 0.75, 0.0, "adapter scale, merge or quantization"),
        (Told({**RIGHT, "a": [65]}), 1.0, 0.75, 0.0, "token 1 of the answer is the end, expected 66 .*end of sequence"),
        (Told(RIGHT, bos=False), 0.0, 1.0, 0.0, "token 0 of the prompt is 97, expected 1 .*BOS; it is missing"),
    ],
)  # fmt: skip
def test_files_beside_hugging_face(tmp_path, other, counted, answered, tied, said):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    served = Served("m", "arm", 0, tmp_path, file, None, Serving(template="{prompt}", stop=["x"], num_ctx=8))
    reference = Told(RIGHT)
    [row], known = prove(lambda: reference, lambda form: other, [served], list("abcd"), 8)
    assert reference.closed and other.closed and known["a"] == {"ids": [1, 97], "answer": "AB"}
    assert (row.mode, row.form, row.prompts) == ("merged", "rendered", 4)
    assert (row.counted, row.answered, row.tied) == (counted, answered, tied)
    assert row.first_difference is said or re.search(said, row.first_difference)
    assert bool(problems([row], 0.76)) is (counted < 1 or answered + tied < 0.76)
