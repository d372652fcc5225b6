"""The embedded backends: greedy, timed, and the same through llama.cpp and transformers."""

import numpy as np
import pytest
import torch

from evaluation import speed
from evaluation.backends import BackendError
from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from export import gguf
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
    backend = pair[0]
    ids = backend.tokenize("Sort: 3 1 2")
    answer = backend.greedy(ids, 5)
    logits = backend._model(input_ids=torch.tensor([ids + answer])).logits[0].detach()
    for step, token in enumerate(answer):
        best = logits[len(ids) - 1 + step].topk(2)
        assert best.indices[0] == token
        assert backend.gaps[step] == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-3)


def logits_along(llm, ids, answer):
    """Next-token logits after the prompt and after each token of an answer, as a backend's own decoding sees them."""
    rows = []
    llm.prefill(ids)
    for token in [*answer, None]:
        found = llm._api.llama_get_logits_ith(llm._llm.ctx, -1)
        rows.append(np.ctypeslib.as_array(found, shape=(llm._llm.n_vocab(),)).copy())
        if token is not None:
            llm._llm.eval([token])
    return np.array(rows)


def test_in_float32_llama_cpp_computes_what_transformers_does(pair, exported, tmp_path):
    """What is left of the differences as served is rounding in the engine, and not in the file."""
    gguf.quantize(exported / "base.gguf", tmp_path / "base-f32.gguf", "f32")
    ids = pair[0].tokenize("Sort: 3 1 2")
    answer = pair[0].greedy(ids, 8)
    expected = pair[0]._model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 :].detach().numpy()
    apart = {}
    for file in (exported / "base.gguf", tmp_path / "base-f32.gguf"):
        for exact in (False, True):
            llm = LlamaCppBackend(file, TEMPLATE, num_ctx=256, exact_cache=exact)
            apart[file.stem, exact] = np.abs(logits_along(llm, ids, answer) - expected).max()
            llm.close()
    assert apart["base-f32", True] < 1e-4
    assert apart["base", False] > 10 * apart["base-f32", True], "else unpacking would be in vain"
    assert min(apart["base", True], apart["base-f32", False]) > 3 * apart["base-f32", True], "it takes both"


def test_an_answer_does_not_depend_on_what_was_asked_before(pair):
    for backend in pair:
        first = backend.generate("Sort: 3 1 2", 8).text
        backend.generate("What is 1 + 1?", 8)
        assert backend.generate("Sort: 3 1 2", 8).text == first


def test_prompt_that_does_not_fit(pair):
    with pytest.raises(BackendError, match="within num_ctx 256, got"):
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
    assert len(rows) == 2 * 2 * 3
    assert {r["phase"] for r in rows} == {"ttft", "prefill", "decode"}
    assert {r["tokens"] for r in rows if r["phase"] == "decode"} == {6}
    for arm in ("hf", "llama_cpp"):
        assert speed.tokens_per_second(rows, arm, "decode") > 0


# --- several at once --------------------------------------------------------------------------------------------


def items(n):
    from evaluation.tasks import aqi, general

    made = aqi.generate({"x": n}, seed=3, pollutants=["pm25", "no2", "co"], max_pollutants=2)["x"]
    return [i.prompt for i in [*made, *general.retention_items(n // 11 + 1, seed=3)]]


def parts(generation):
    return generation.text, generation.prompt_tokens, generation.answer_tokens, generation.finish_reason


def is_tie(reference, prompt, other, lead=0.05):
    """Whether the reference's answer parts from the other text where its best two tokens are all but equal."""
    reference.generate(prompt, 16)
    ids = reference.greedy(reference.tokenize(TEMPLATE.format(prompt=prompt)), 16)
    parts = (n for n in range(1, len(ids) + 1) if not other.startswith(reference.detokenize(ids[:n]).strip()))
    at = next(parts, None)
    return at is not None and reference.gaps[at - 1] < lead


@pytest.fixture(scope="module")
def engines(base_dir, adapter_dir, exported):
    """Name → makes the backend with so many at once."""
    return {
        "llama_cpp": lambda n: LlamaCppBackend(
            exported / "base.gguf", TEMPLATE, num_ctx=256, threads=1, adapter=exported / "adapter.gguf", parallel=n
        ),
        "hf": lambda n: HfBackend(str(base_dir), TEMPLATE, adapter=adapter_dir, parallel=n),
    }


@pytest.mark.parametrize("name", ["llama_cpp", "hf"])
def test_answers_beside_others_are_those_given_alone(engines, name):
    prompts = items(300)
    made = {}
    for n in (1, 5):
        backend = engines[name](n)
        found = list(backend.generate_many(prompts, 16, ["</s>"]))
        backend.close()
        assert sorted(place for place, _ in found) == list(range(len(prompts)))
        made[n] = [parts(answer) for _, answer in sorted(found, key=lambda pair: pair[0])]
    assert len({text for text, *_ in made[1]}) > 15  # the model does say different things
    differ = [n for n in range(len(prompts)) if made[1][n] != made[5][n]]
    reference = engines["hf"](1)
    # One of the two equals Hugging Face's answer as a rule; the other parts from it at the tie.
    assert all(any(is_tie(reference, prompts[n], made[k][n][0].strip()) for k in (1, 5)) for n in differ), [
        (prompts[n], made[1][n], made[5][n]) for n in differ
    ]
    assert len(differ) <= 0.02 * len(prompts)


@pytest.mark.parametrize("name", ["llama_cpp", "hf"])
def test_limits_and_stop_words_hold_beside_others(engines, name):
    prompts = items(20)
    alone, beside = engines[name](1), engines[name](4)
    first = dict(alone.generate_many(prompts, 12, []))
    word = max(first.values(), key=lambda g: len(g.text)).text.strip()[2]
    for limit, stop in ((1, []), (3, []), (12, [word]), (12, [word, "e", " "])):
        one, other = dict(alone.generate_many(prompts, limit, stop)), dict(beside.generate_many(prompts, limit, stop))
        assert sum(parts(one[n]) != parts(other[n]) for n in one) <= 1
        assert all(g.answer_tokens <= limit for g in other.values())
        assert all(not any(word in g.text for word in stop) for g in other.values())
        if stop:
            assert any(first[n].text != other[n].text for n in first)
    assert list(beside.generate_many([], 4, [])) == []


@pytest.mark.parametrize("name", ["llama_cpp", "hf"])
def test_beside_others_no_phase_can_be_timed(engines, name):
    (_, got), *_ = engines[name](4).generate_many(items(11), 4, [])
    assert got.prefill_ns is None and got.decode_ns is None and got.load_ns > 0


def test_prompts_longer_than_a_batch_go_in_parts(exported, monkeypatch):
    from evaluation.backends import llama_batch

    prompts = items(11)
    make = lambda n: LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256, threads=1, parallel=n)  # noqa: E731
    whole = dict(make(3).generate_many(prompts, 8, []))
    monkeypatch.setattr(llama_batch, "N_BATCH", 16)
    cut = dict(make(3).generate_many(prompts, 8, []))
    assert sum(parts(whole[n]) != parts(cut[n]) for n in whole) <= 1


def test_a_prompt_that_does_not_fit_is_an_error_beside_others_too(exported):
    backend = LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256, parallel=4)
    with pytest.raises(BackendError, match="within num_ctx 256, got"):
        list(backend.generate_many(["a", "1 " * 200, "b"], 4, []))
    assert len(list(backend.generate_many(["a", "b"], 4, []))) == 2


def test_an_answer_that_the_context_would_cut_is_refused(exported):
    one, many = (LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256, parallel=n) for n in (1, 2))
    prompt = "1 " * 110
    room = 256 - len(one.tokenize(TEMPLATE.format(prompt=prompt)))
    got = [dict(b.generate_many([prompt, prompt], room, [])) for b in (one, many)]
    assert parts(got[0][0]) == parts(got[1][0]) == parts(got[1][1])
    for backend in (one, many):
        with pytest.raises(BackendError, match=rf"within num_ctx 256, got {256 - room} \+ {room + 1} tokens"):
            list(backend.generate_many([prompt, prompt], room + 1, []))


@pytest.mark.parametrize(("original", "shared"), [(None, True), (4096, True), (1024, True), (512, False)])
def test_long_rope_models_do_not_share_a_cache_longer_than_their_original_context(
    exported, monkeypatch, original, shared
):
    import llama_cpp

    made, build = [], llama_cpp.llama_init_from_model

    def spy(model, params):
        made.append((params.kv_unified, params.n_ctx, params.n_seq_max))
        return build(model, params)

    prompts = items(11)
    alone = dict(LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256, threads=1).generate_many(prompts, 8))
    backend = LlamaCppBackend(exported / "base.gguf", TEMPLATE, num_ctx=256, threads=1, parallel=4)
    if original:
        backend._llm.metadata["phi3.rope.scaling.original_context_length"] = str(original)
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", spy)
    got = dict(backend.generate_many(prompts, 8))
    assert made == [(shared, 1024, 4)]
    assert sum(parts(alone[n]) != parts(got[n]) for n in alone) <= 1
