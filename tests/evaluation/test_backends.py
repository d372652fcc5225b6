"""The embedded backends: greedy, timed, and the same through llama.cpp and transformers."""

import pytest

from evaluation import speed
from evaluation.backends import BackendError
from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from tests.conftest import TEMPLATE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(base_dir, exported):
    return HfBackend(str(base_dir), TEMPLATE), LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256)


def test_both_answer_alike(pair):
    answers = [b.generate("Repeat: apple", 8) for b in pair]
    assert answers[0].text.strip() == answers[1].text.strip() != ""
    assert answers[0].prompt_tokens == answers[1].prompt_tokens > 5
    for answer in answers:
        assert answer.prefill_ns > 0 and answer.decode_ns > 0 and answer.load_ns > 0


@pytest.mark.parametrize("which", [0, 1])
def test_limits_and_stop_words(pair, which):
    backend = pair[which]
    backend.prefill(backend.tokenize("x"))
    ids, reason = backend.decode(9, ignore_end=True)
    assert len(ids) == 9 and reason == "length"
    whole = backend.detokenize(ids)
    word = whole.strip()[-1]
    backend.prefill(backend.tokenize("x"))
    shorter, reason = backend.decode(9, ignore_end=True, stop=[word])
    assert reason == "stop" and len(shorter) <= 9 and word in backend.detokenize(shorter)


def test_leads_are_the_logits_own(pair):
    import torch

    backend = pair[0]
    ids = backend.tokenize("Sort: 3 1 2")
    answer = backend.greedy(ids, 5)
    logits = backend._model(input_ids=torch.tensor([ids + answer])).logits[0].detach()
    for step, token in enumerate(answer):
        best = logits[len(ids) - 1 + step].topk(2)
        assert best.indices[0] == token
        assert backend.gaps[step] == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-3)


def test_an_answer_does_not_depend_on_what_was_asked_before(pair):
    for backend in pair:
        first = backend.generate("Sort: 3 1 2", 8).text
        backend.generate("What is 1 + 1?", 8)
        assert backend.generate("Sort: 3 1 2", 8).text == first


def test_prompt_that_does_not_fit(pair):
    with pytest.raises(BackendError, match="does not fit num_ctx 256"):
        pair[1].generate("1 " * 200, 4)


def test_missing_and_broken_files(tmp_path, base_dir):
    with pytest.raises(BackendError, match="no such file"):
        LlamaCppBackend(tmp_path / "none.gguf", TEMPLATE, num_ctx=128)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF rubbish")
    with pytest.raises(BackendError, match="cannot load it"):
        LlamaCppBackend(tmp_path / "bad.gguf", TEMPLATE, num_ctx=128)
    with pytest.raises(BackendError, match="transformers cannot load it"):
        HfBackend(str(tmp_path), TEMPLATE)


def test_speed_of_a_real_model(pair):
    rows = speed.alternate(
        {"hf": speed.embedded(pair[0]), "llama_cpp": speed.embedded(pair[1])},
        [TEMPLATE.format(prompt="Sort: 3 1 2")],
        repetitions=2,
        tokens=6,
    )
    assert len(rows) == 2 * 2 * 2
    assert {r["tokens"] for r in rows if r["phase"] == "decode"} == {6}
    for arm in ("hf", "llama_cpp"):
        assert speed.tokens_per_second(rows, arm, "decode") > 0
