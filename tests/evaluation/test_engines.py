"""The engines in this process: greedy, timed, and the same through llama.cpp and transformers, one by one or not."""

import shutil
from itertools import islice

import pytest
import torch
from transformers import AutoModelForImageTextToText

from evaluation import vision
from evaluation.measure import speed
from evaluation.tasks import aqi, general, render
from export.engines import llama_cpp as engine_module
from export.engines.engine import EngineError
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from tests.conftest import TEMPLATE
from tests.export.verify_runs import add_adapter
from trainers import TrainingError
from trainers.embedded_base import EmbeddedSettings, train_base


@pytest.fixture(scope="module")
def pair(base_dir, exported):
    return HfEngine(str(base_dir), TEMPLATE), LlamaCppEngine(exported / "base.gguf", TEMPLATE, num_ctx=256)


def test_both_answer_alike_whatever_was_asked_before(pair):
    answers = [engine.generate("Repeat: apple", 8) for engine in pair]
    assert answers[0].text.strip() == answers[1].text.strip() != ""
    assert answers[0].prompt_ids == answers[1].prompt_ids and answers[0].prompt_tokens > 5
    for engine, answer in zip(pair, answers, strict=True):
        assert answer.prefill_ns > 0 and answer.decode_ns > 0 and answer.load_ns > 0
        engine.generate("What is 1 + 1?", 8)
        assert engine.generate("Repeat: apple", 8).text == answer.text


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(EngineError, match="no such file"):
        LlamaCppEngine(tmp_path / "none.gguf", TEMPLATE, num_ctx=128)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF rubbish")
    with pytest.raises(EngineError, match="cannot load it"):
        LlamaCppEngine(tmp_path / "bad.gguf", TEMPLATE, num_ctx=128)
    with pytest.raises(EngineError, match="transformers cannot load it"):
        HfEngine(str(tmp_path), TEMPLATE)


# --- several at once --------------------------------------------------------------------------------------------


def items(n):
    made = aqi.generate({"x": n}, seed=3, pollutants=["pm25", "no2", "co"], max_pollutants=2)["x"]
    return [i.prompt for i in [*made, *general.retention_items(n // 11 + 1, seed=3)]]


def parts(generation):
    return generation.text, generation.prompt_tokens, generation.answer_tokens, generation.finish_reason


def differing(first, second):
    """Places of prompts that two engines answer otherwise, of which ties of the best two tokens make a few."""
    assert first.keys() == second.keys()
    return [place for place in first if parts(first[place]) != parts(second[place])]


def is_tie(reference, prompt, other, lead=0.05):
    """Whether the reference's answer diverges from the other text where its best two tokens are all but equal."""
    made = reference.generate(prompt, 16)
    ids = made.ids
    parted = (n for n in range(1, len(ids) + 1) if not other.startswith(reference.detokenize(ids[:n]).strip()))
    at = next(parted, None)
    if at is None:
        return False
    reference.prefill([*made.prompt_ids, *ids[: at - 1]])
    best, second = reference._logits.topk(2).values
    return best - second < lead


@pytest.fixture(scope="module")
def engines(base_dir, adapter_dir, exported):
    """Name → makes the engine with so many at once."""
    file, adapter = exported / "base.gguf", exported / "adapter.gguf"
    return {
        "llama_cpp": lambda n: LlamaCppEngine(file, TEMPLATE, num_ctx=256, threads=1, adapter=adapter, parallel=n),
        "plain": lambda n: LlamaCppEngine(file, TEMPLATE, num_ctx=256, threads=1, parallel=n),
        "hf": lambda n: HfEngine(str(base_dir), TEMPLATE, adapter=adapter_dir, parallel=n),
    }


@pytest.mark.parametrize("name", ["llama_cpp", "hf"])
def test_answers_limits_and_stop_words_beside_others_are_those_alone(engines, name):
    prompts = items(110 if name == "llama_cpp" else 44)
    made = {}
    for n in (1, 5):
        with engines[name](n) as engine:
            found = list(engine.generate_many(prompts, 16, ["</s>"]))
            assert list(engine.generate_many([], 4, [])) == []
        assert sorted(place for place, _ in found) == list(range(len(prompts)))
        made[n] = dict(found)
    assert found[0][1].prefill_ns is None and found[0][1].decode_ns is None and found[0][1].load_ns > 0
    assert len({answer.text for answer in made[1].values()}) > 8  # the model does say different things
    differ, reference = differing(made[1], made[5]), engines["hf"](1)
    # One of the two equals Hugging Face's answer as a rule; the other parts from it at the tie.
    assert all(any(is_tie(reference, prompts[n], made[k][n].text.strip()) for k in (1, 5)) for n in differ), [
        (prompts[n], made[1][n], made[5][n]) for n in differ
    ]
    assert len(differ) <= 2
    prompts = items(20)
    alone, beside = engines[name](1), engines[name](4)
    first = dict(alone.generate_many(prompts, 12, []))
    word = max(first.values(), key=lambda g: len(g.text)).text.strip()[2]
    for limit, stop in ((3, []), (12, [word, "e", " "])):
        one, other = dict(alone.generate_many(prompts, limit, stop)), dict(beside.generate_many(prompts, limit, stop))
        assert len(differing(one, other)) <= 1
        assert all(g.answer_tokens <= limit for made in (one, other) for g in made.values())
        assert all(not any(word in g.text for word in stop) for made in (one, other) for g in made.values())
        assert not stop or any(first[n].text != other[n].text for n in first)


def test_what_the_context_would_cut_is_refused(engines):
    one, many = engines["plain"](1), engines["plain"](2)
    prompt = "1 " * 110
    room = 256 - len(one.tokenize(one.render(prompt)))
    got = [dict(engine.generate_many([prompt, prompt], room, [])) for engine in (one, many)]
    assert parts(got[0][0]) == parts(got[1][0]) == parts(got[1][1])
    for engine in (one, many):
        for asked, more in ((prompt, rf"{256 - room} \+ {room + 1} tokens"), ("1 " * 200, "")):
            with pytest.raises(EngineError, match=rf"within num_ctx 256, got {more}"):
                list(engine.generate_many([asked, asked], room + 1, []))
        assert len(list(engine.generate_many(["a", "b"], 4, []))) == 2, "it goes on"


def test_prompts_longer_than_a_batch_go_in_parts_and_long_rope_models_share_no_longer_cache(engines, monkeypatch):
    """A cache longer than the context that such a model was made for would turn its positions."""
    import llama_cpp

    made, build, prompts = [], llama_cpp.llama_init_from_model, items(11)

    def spy(model, params):
        made.append((params.kv_unified, params.n_ctx, params.n_seq_max))
        return build(model, params)

    alone = dict(engines["plain"](1).generate_many(prompts, 8))
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", spy)
    monkeypatch.setattr(engine_module, "N_BATCH", 16)
    for original, shared in ((None, True), (1024, True), (512, False)):
        engine = engines["plain"](4)
        if original:
            engine._llm.metadata["phi3.rope.scaling.original_context_length"] = str(original)
        made.clear()
        assert len(differing(alone, dict(engine.generate_many(prompts, 8)))) <= 1
        assert made == [(shared, 1024, 4)]


# --- with pictures ---------------------------------------------------------------------------------------------

SIZE = 32
TOKENS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def shown(data):
    return vision.retention_items(2, seed=0, image_size=SIZE, folder=data)


@pytest.fixture(scope="module")
def seeing(data, tmp_path_factory):
    """An Idefics3 trained for some steps, so that answers differ."""
    settings = EmbeddedSettings(
        seed=0, vocab_size=400, hidden_size=32, intermediate_size=64, layers=1, heads=2, context=128,
        vision={"image_size": SIZE, "patch_size": 8, "scale_factor": 2, "hidden_size": 32, "layers": 1, "heads": 2},
        examples=960, batch_size=16, learning_rate=5e-3, precision="fp32",
    )  # fmt: skip
    asked = vision.training_examples(settings.examples, 0, SIZE, data)
    examples = [(render(TEMPLATE, prompt), answer) for prompt, answer in asked]
    folder = tmp_path_factory.mktemp("base")
    train_base(settings, examples, folder, tmp_path_factory.mktemp("checkpoints"), data)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(seeing, tmp_path_factory):
    """LoRA in both towers, large enough to change answers."""
    out = tmp_path_factory.mktemp("adapter")
    return add_adapter(seeing, out, AutoModelForImageTextToText, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("with_adapter", [False, True])
def test_with_pictures_a_batch_answers_as_one_by_one(seeing, adapter, data, shown, with_adapter):
    prompts = [item.prompt for item in shown]
    made = []
    for parallel in (1, 4):
        given = {"adapter": adapter if with_adapter else None, "pictures": data, "parallel": parallel}
        with HfEngine(seeing, TEMPLATE, **given) as engine:
            made.append(dict(engine.generate_many(prompts, TOKENS)))
    assert not differing(*made) and len({answer.text for answer in made[0].values()} - {""}) > 1


def test_an_adapter_and_the_picture_change_the_answer(seeing, adapter, data, shown):
    """Next-token scores, since a base of a few steps may answer two pictures alike."""
    plain = HfEngine(seeing, TEMPLATE, pictures=data)
    tuned = HfEngine(seeing, TEMPLATE, pictures=data, adapter=adapter)
    assert (plain.mode, tuned.mode, plain.name) == ("merged", "adapter", "hf")
    first, second = (plain.render(item.prompt) for item in shown if item.task == "visual_needle")
    assert list(plain.tokenize(first)) != [] and list(plain.tokenize(first)) == list(plain.tokenize(second))
    scores = []
    for engine, text in ((plain, first), (plain, second), (tuned, first)):
        engine.prefill(engine.tokenize(text))
        scores.append(engine._logits)
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    rows = speed.alternate({"base": plain.phases}, [i.prompt for i in islice(shown, 2)], repetitions=1, tokens=3)
    assert {row["phase"]: row["tokens"] for row in rows}["decode"] == 2 * 3
    assert all(row["nanoseconds"] > 0 for row in rows)


def test_pictures_that_cannot_be_asked_about(seeing, data, tmp_path):
    engine = HfEngine(seeing, TEMPLATE, pictures=data)
    for shown, said in (("![](images/none.png)\n", "no such file"), ("", "expected a picture")):
        with pytest.raises(TrainingError, match=said):
            engine.generate(f"{shown}Which colour is the square?", TOKENS)
    broken = shutil.copytree(seeing, tmp_path / "base")
    (broken / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="transformers cannot load it"):
        HfEngine(str(broken), TEMPLATE, pictures=data)
