"""What the Ollama engine sends and makes of the answer, what it refuses, and how it takes a server's faults."""

import threading
from collections import Counter
from dataclasses import replace

import pytest

from evaluation.measure import answers
from evaluation.measure.answers import Journal
from evaluation.tasks import Item
from export.engines import ollama_engine as ollama
from export.engines.engine import EngineError, Generation, Raw, asked_for, conversation, fill
from export.engines.ollama_engine import OllamaEngine, Retry, render_asked
from export.go import go_of_turns
from export.modelfile import Serving
from export.register import register
from export.served import Served
from tests.ollama_double import LOAD_COLD_NS, LOAD_WARM_NS, OllamaDouble, Refusal

TEMPLATE = "Q: {prompt}\nA: "
SERVING = Serving(template=TEMPLATE, stop=["###"], num_ctx=128)
ITEMS = [Item(f"i{n}", "addition", f"{n} + 1", f"{n + 1}", {"answer": f"{n + 1}"}) for n in range(24)]


def ids(asked) -> list[int]:
    return [1, *fill(TEMPLATE, asked).encode()]


def reply(rendered: str) -> str:
    number = rendered.split()[1]
    return str(int(number) + 1) if number.isdigit() else f"{len(rendered)} ### more"


class Clock:
    def __init__(self):
        self.now, self.pauses = 0.0, []

    def wait(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def retry(self, **settings):
        return Retry(wait=self.wait, clock=lambda: self.now, **settings)


def refused_for(clock, takes_s=0, **settings):
    def ask():
        clock.now += takes_s
        raise EngineError("no", passing=True)

    with pytest.raises(EngineError):
        clock.retry(**settings).call(ask, lambda line: None)
    return clock


@pytest.fixture
def clock():
    return Clock()


def served(name, folder, serving):
    return Served(name, name, 0, folder, folder / "model.gguf", None, serving)


def put(server, folder):
    folder.mkdir(exist_ok=True)
    (folder / "model.gguf").write_bytes(b"GGUF")
    return register(server.url, served("m", folder, SERVING), folder)


@pytest.fixture
def double(tmp_path):
    with OllamaDouble(reply=reply) as server:
        put(server, tmp_path)
        yield server


def make(double, clock=None, **options):
    options = {"retry": clock.retry() if clock else Retry(patience_s=0), "expected": ids, **options}
    return OllamaEngine(double.url, "m", 128, **{"say": lambda line: None, **options})


def requests(double):
    return [body for _, path, body in double.requests if path == "/api/generate"]


def asked(double):
    return Counter(body["prompt"] for body in requests(double))


def score(engine, journal=None):
    return answers.ask(engine, ITEMS, "test", max_tokens=4, stop=[], journal=journal)


def all_once(results):
    return [row["item_id"] for row, _ in results] == [item.id for item in ITEMS] and all(s.correct for _, s in results)


def test_a_greedy_answer_with_counts_and_times(double):
    with make(double) as engine:
        assert (engine.name, engine.version, engine.mode) == ("ollama", "0.32.0", "merged")
        first = engine.generate("pm25 9", 16, ["###", "\n"])
        n = len(ids("pm25 9"))
        assert first == Generation(f"{n - 1} ", n, 4, LOAD_COLD_NS, 1000 * n, 5000 * 4, "stop")
        assert engine.generate("pm25 9", 16, ["###"]).load_ns == LOAD_WARM_NS
        cut = engine.generate("x", 1, ["###"])
        assert (cut.text, cut.answer_tokens, cut.finish_reason) == ("8", 1, "length")
        assert "###" not in engine.generate("x", 16, []).text, "without stop words those of the model count"
        assert "###" in engine.generate("x", 16, ["never"]).text
        double.reply = lambda rendered: ""  # the end token alone
        got = engine.generate("x", 4, ["###"])
        assert (got.text, got.answer_tokens, got.decode_ns, got.finish_reason) == ("", 1, 5000, "stop")
        assert engine.phases("9", "1 + 1", 4)["decode"] == (1, 5000)
    body = requests(double)[0]
    assert body["prompt"] == "pm25 9" and not body.get("raw") and not body["stream"], "the server puts the template"
    want = {"temperature": 0.0, "top_k": 1, "seed": 0, "num_predict": 16, "num_ctx": 128,
            "stop": ["###", "\n"], "repeat_penalty": 1.0}  # fmt: skip
    assert want.items() <= body["options"].items()


def test_a_conversation_is_asked_as_one_with_the_checks_of_a_prompt(double, clock):
    talk = conversation("2 + 1", turns=[("1 + 1", "2")])
    with make(double, clock) as engine:
        plain = engine.generate("2 + 1", 4, ["###"])
        double.misbehave, double.times = "missing_response", 2
        assert engine.generate(talk, 4, ["###"]) == replace(plain, load_ns=LOAD_WARM_NS)
        assert len(clock.pauses) == 2 and engine.render(talk) == engine.render("2 + 1") == "Q: 2 + 1\nA: "
        with pytest.raises(EngineError, match="within num_ctx 128"):
            engine.generate(conversation("x" * 120), 4)
    bodies = [body for _, path, body in double.requests if path == "/api/chat"]
    assert [body["messages"] for body in bodies] == [talk] * 4
    assert bodies[0]["options"]["temperature"] == 0 and bodies[3]["_debug_render_only"]


def test_a_text_goes_on_as_it_is_and_turns_are_closed_and_filled_anew(double, tmp_path):
    assert make(double, expected=None).generate(Raw("It is 7"), 9).text == "7 "  # the length of what was asked
    item = Item("i", "chat", "2 + 1", "3", {}, (("1 + 1", "2"),), "Count.")
    serving = SERVING.model_copy(update={"go": go_of_turns(TEMPLATE, "</s>")})
    register(double.url, served("turns", tmp_path, serving), tmp_path)
    expected = "Count.\n\nQ: 1 + 1\nA: 2</s>Q: 2 + 1\nA: "
    assert render_asked(double.url, "turns", asked_for(item)) == serving.render(asked_for(item)) == expected


@pytest.mark.parametrize(("shift", "said"), [(1, "BOS comes twice"), (-1, "does not add"), (-5, "cached tokens")])
def test_another_number_of_tokens_is_an_error_that_hints_at_the_cause(double, shift, said):
    n = len(ids("x"))
    double.tokenize = lambda text: [1, *text.encode(), 9][: n + shift]
    with make(double) as engine, pytest.raises(EngineError, match=rf"read {n + shift} .*expected {n}: BOS.*{said}"):
        engine.generate("x", 4, ["###"])


def test_prompts_that_do_not_fit_are_refused_before_they_are_cut(double):
    with make(double) as engine:
        for ask in (lambda: engine.generate("x" * 120, 4), lambda: engine.phases("9", "1 + 1", 128)):
            with pytest.raises(EngineError, match="within num_ctx 128"):
                ask()
        for item, limit in (("", 4), ("x", 0)):
            with pytest.raises(EngineError, match="max_tokens ≥ 1"):
                engine.generate(item, limit, ["###"])
    assert not requests(double)


def test_no_server_and_no_model_are_told_at_once(double):
    with pytest.raises(EngineError, match=r"has no model 'other' \(it has: m:latest\)"):
        OllamaEngine(double.url, "other", 128)
    double.die()
    with pytest.raises(EngineError, match=f"no Ollama answers at {double.url}"):
        OllamaEngine(double.url, "m", 128)


@pytest.mark.parametrize(("vram", "device"), [(0, "cpu"), (2, "cpu+gpu"), (4, "gpu")])
def test_device_class_is_where_the_server_holds_the_weights(double, vram, device):
    double.size_vram = vram  # of 4 bytes
    with make(double) as engine:
        assert (engine.device_class, engine.device_class) == (device, device)
    assert [body["prompt"] for body in requests(double)] == [""], "it is loaded once, and asked nothing"


def test_phases_of_a_streamed_request_and_loads_of_a_model_that_nobody_else_holds(double, monkeypatch):
    with make(double) as engine:
        first = engine.load_cold()
        phases = engine.phases("1", "+ 1", 4)
        assert engine.load_cold() == first == LOAD_COLD_NS
        assert len([body for body in requests(double) if body.get("keep_alive") == 0]) == 2
        n = len(ids("1 + 1"))
        assert phases["prefill"] == (n, 1000 * n) and phases["decode"] == (2, 10000)
        count, ns = phases["ttft"]
        assert count == 1 and 0 <= ns < 60e9
        monkeypatch.setattr(ollama, "UNLOAD_S", 0.1)
        double.loaded = type("Sticky", (dict,), {"pop": lambda *a: None})(double.loaded)
        with pytest.raises(EngineError, match="still holds 'm'"):
            engine.load_cold()


def test_as_many_requests_as_asked_for_are_in_flight(double):
    together = threading.Barrier(3, timeout=20)  # passed only if three requests come at once
    double.strike = lambda body: OllamaDouble.strike(double, body) if together.wait() >= 0 else None
    with make(double, parallel=3) as engine:
        assert all_once(score(engine))


def test_an_older_server_scores_all_the_same(double):
    double.misbehave = "missing_fields"
    with make(double) as engine:
        got = engine.generate("1 + 1", 4, [])
        assert (got.text, got.prompt_tokens, got.answer_tokens) == ("2", None, None)
        assert (got.load_ns, got.prefill_ns, got.decode_ns, got.finish_reason) == (None, None, None, None)
        phases = engine.phases("1", "+ 1", 4)
        assert phases["prefill"] == (None, None) and phases["decode"] == (None, None)
        assert phases["ttft"] == (1, None), "a load may be in it"
        results = score(engine)
        assert all_once(results) and results[0][0]["prompt_tokens"] is None


# --- faults: what is asked again, for how long, and that every item is scored once -------------------------------


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("how", ["error_500_n_times", "wrong_json", "missing_response", "not_done", "drop"])
def test_what_passes_costs_no_item_and_none_is_scored_twice(double, clock, tmp_path, how, parallel):
    double.misbehave, double.times = how, 3
    with make(double, clock, parallel=parallel) as engine, Journal(tmp_path / "j.jsonl") as journal:
        assert all_once(score(engine, journal))
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == len(ITEMS)
    assert sum(asked(double).values()) == len(ITEMS) + 3
    assert len(clock.pauses) == 3


def test_pauses_double_up_to_a_limit_and_end(double, clock):
    double.misbehave = "error_500_n_times"
    lines = []
    with make(double, clock, say=lines.append) as engine, pytest.raises(EngineError, match="500: llama runner") as no:
        engine.generate("1 + 1", 4, [])
    assert "tries in" in str(no.value)
    bounds = [min(15.0, 0.5 * 2**n) for n in range(len(clock.pauses))]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(clock.pauses, bounds, strict=True))
    assert max(clock.pauses) > 7 and 30 < clock.now <= 60
    assert len(lines) == len(clock.pauses) and "trying again in" in lines[0]
    assert asked(double)["1 + 1"] == len(clock.pauses) + 1
    firsts = set()  # pauses of several requests differ, so that they do not come back all at once
    for _ in range(8):
        firsts.add(refused_for(Clock(), patience_s=1).pauses[0])
    assert len(firsts) > 1


def test_refusals_are_passed_on_and_asked_again_only_if_they_may_pass(double, clock, monkeypatch):
    with make(double, clock) as engine:
        double.models["m:latest"].parameters["top_p"] = "many"
        assert engine.generate("x", 4, ["###"]), "the request's options win"
        refusals, generate = iter([408, 429]), double.generate

        def busy(body):
            if status := next(refusals, 0):
                raise Refusal(status, "come again")
            return generate(body)

        monkeypatch.setattr(double, "generate", busy)
        assert engine.generate("3 + 1", 4, []).text == "4"
        assert len(clock.pauses) == 2 and asked(double)["3 + 1"] == 3
        double.models["m:latest"].parameters["num_keep"] = "all"
        with pytest.raises(EngineError, match='500: option "num_keep" must be of type'):
            engine.generate("1 + 1", 4, [])  # our own mistake that comes as a 500 ends, too
        clock.pauses.clear()
        double.models.clear()
        with pytest.raises(EngineError, match="404: model 'm' not found"):
            engine.generate("2 + 1", 4, [])
    assert clock.pauses == [] and asked(double)["2 + 1"] == 1


def test_silence_is_waited_for_twice_and_then_left(double, clock):
    double.misbehave, double.times = "hang", 1
    with make(double, clock, timeout_s=0.3) as engine:
        assert engine.generate("1 + 1", 4, []).text == "2"
    assert asked(double)["1 + 1"] == 2
    double.times = 9
    with make(double, timeout_s=0.3) as engine, pytest.raises(EngineError, match=r"said nothing for 0\.3 s"):
        engine.generate("x", 4, ["###"])
    clock.pauses.clear()
    assert len(refused_for(clock, takes_s=600).pauses) == 1, "one that takes longer than patience gets a second try"


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_server_that_dies_midway_leaves_what_it_answered(double, clock, tmp_path, parallel):
    def answer_some(rendered):
        if len(asked(double)) > 10:
            double.misbehave = "die"
        return reply(rendered)

    double.reply = answer_some
    path = tmp_path / "j.jsonl"
    with make(double, clock, parallel=parallel) as engine, Journal(path) as journal:
        with pytest.raises(EngineError, match=r"ollama serve.*the same command resumes") as no:
            score(engine, journal)
        done = len(path.read_text().splitlines())
        assert f"{done} of 24 items of test are done and stored" in str(no.value) and 5 < done < 24
        kept = {item.prompt for item in ITEMS if journal.get("test", item.id)}
    with OllamaDouble(reply=reply) as second:
        put(second, tmp_path / "two")
        with make(second, clock, parallel=parallel) as engine, Journal(path) as journal:
            assert journal.resumed == done
            assert all_once(score(engine, journal))
        assert asked(second) == {item.prompt: 1 for item in ITEMS if item.prompt not in kept}
