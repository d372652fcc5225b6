"""A server that fails: what is asked again, for how long, and that every item is scored once."""

from collections import Counter

import pytest

from evaluation import scoring
from evaluation.backends import BackendError
from evaluation.backends.ollama import OllamaBackend
from evaluation.backends.retry import PassingError, Retry
from evaluation.journal import Journal
from evaluation.tasks import Item
from export.modelfile import ModelfileSpec
from export.ollama import register
from tests.ollama_double import OllamaDouble
from tests.ollama_double_engine import Refusal

TEMPLATE = "Q: {{ .Prompt }}\nA: "
ITEMS = [Item(f"i{n}", "addition", f"{n} + 1", f"{n + 1}", {"answer": f"{n + 1}"}) for n in range(24)]


def ids(item: str) -> list[int]:
    return [1, *TEMPLATE.replace("{{ .Prompt }}", item).encode()]


def reply(rendered: str) -> str:
    number = rendered.split()[1]
    return str(int(number) + 1) if number.isdigit() else "?"


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def wait(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def retry(self, **settings):
        return Retry(wait=self.wait, clock=lambda: self.now, **settings)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def double(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with OllamaDouble(reply=reply) as server:
        put(server, tmp_path)
        yield server


def put(server, folder):
    spec = ModelfileSpec("./model.gguf", TEMPLATE, ["###"], 128, 0.0)
    return register(server.url, "m", folder / "model.gguf", spec, records=folder)


def make(double, clock, **options):
    options = {"retry": clock.retry(), "expected": ids, "say": lambda line: None, **options}
    return OllamaBackend(double.url, "m", 128, **options)


def asked(double):
    return Counter(b["prompt"] for _, path, b in double.requests if path == "/api/generate")


def score(backend, journal=None):
    return scoring.ask(backend, ITEMS, "test", max_tokens=4, stop=[], journal=journal)


PASSING = ["error_500_n_times", "wrong_json", "missing_response", "not_done", "drop"]


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("how", PASSING)
def test_what_passes_costs_no_item_and_none_is_scored_twice(double, clock, tmp_path, how, parallel):
    double.misbehave, double.times = how, 3
    with make(double, clock, parallel=parallel) as backend, Journal(tmp_path / "j.jsonl") as journal:
        results = score(backend, journal)
    assert [row["item_id"] for row, _ in results] == [item.id for item in ITEMS]
    assert all(s.correct for _, s in results)
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == len(ITEMS)
    assert sum(asked(double).values()) == len(ITEMS) + 3
    assert len(clock.pauses) == 3


def test_pauses_double_up_to_a_limit_and_end(double, clock):
    double.misbehave = "error_500_n_times"
    lines = []
    with make(double, clock, say=lines.append) as backend, pytest.raises(BackendError, match="500: llama runner") as no:
        backend.generate("1 + 1", 4, [])
    assert "tries in" in str(no.value)
    bounds = [min(15.0, 0.5 * 2**n) for n in range(len(clock.pauses))]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(clock.pauses, bounds, strict=True))
    assert max(clock.pauses) > 7 and 30 < clock.now <= 60
    assert len(lines) == len(clock.pauses) and "trying again in" in lines[0]
    assert asked(double)["1 + 1"] == len(clock.pauses) + 1


def test_several_requests_do_not_come_back_all_at_once():
    firsts = set()
    for _ in range(8):
        clock = Clock()

        def ask():
            raise PassingError("no")

        with pytest.raises(BackendError):
            clock.retry(patience_s=1).call(ask, lambda line: None)
        firsts.add(clock.pauses[0])
    assert len(firsts) > 1


def test_a_refusal_is_not_asked_again(double, clock):
    with make(double, clock) as backend:
        double.models.clear()
        with pytest.raises(BackendError, match="404: model 'm' not found"):
            backend.generate("1 + 1", 4, [])
    assert clock.pauses == [] and asked(double)["1 + 1"] == 1


@pytest.mark.parametrize("status", [408, 429])
def test_a_refusal_that_passes_is_asked_again(double, clock, monkeypatch, status):
    generate, refused = double.generate, []

    def busy(body):
        if len(refused) < 3:
            refused.append(body)
            raise Refusal(status, "come again")
        return generate(body)

    monkeypatch.setattr(double, "generate", busy)
    with make(double, clock) as backend:
        assert backend.generate("1 + 1", 4, []).text == "2"
    assert len(clock.pauses) == 3 and asked(double)["1 + 1"] == 4


def test_our_own_mistake_that_comes_as_500_ends(double, clock):
    double.models["m:latest"].parameters["num_keep"] = "all"
    with make(double, clock) as backend, pytest.raises(BackendError, match='500: option "num_keep" must be of type'):
        backend.generate("1 + 1", 4, [])
    assert clock.now <= 60


def test_silence_is_waited_for_twice(double, clock):
    double.misbehave, double.times = "hang", 1
    with make(double, clock, timeout_s=0.3) as backend:
        assert backend.generate("1 + 1", 4, []).text == "2"
    assert asked(double)["1 + 1"] == 2


def test_a_request_that_takes_longer_than_patience_gets_a_second_try(clock):
    tries = []

    def slow():
        tries.append(clock.now)
        clock.now += 600
        raise PassingError("said nothing for 600 s")

    with pytest.raises(BackendError, match="2 tries"):
        clock.retry().call(slow, lambda line: None)
    assert len(tries) == 2


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_model_that_was_removed_is_registered_again(double, clock, tmp_path, parallel):
    times = []

    def restore():
        times.append(put(double, tmp_path))

    with make(double, clock, parallel=parallel, restore=restore) as backend:
        backend.generate("0 + 1", 4, [])
        double.misbehave, double.times = "forget_model", 1
        results = score(backend)
    assert [row["item_id"] for row, _ in results] == [item.id for item in ITEMS] and all(s.correct for _, s in results)
    assert len(times) == 1 and times[0].created
    uploads = [1 for method, path, _ in double.requests if method == "POST" and "/blobs/" in path]
    assert len(uploads) == 1  # the weights were there still


def test_a_model_that_goes_again_at_once_is_an_error(double, clock, tmp_path):
    double.misbehave = "forget_model"
    with make(double, clock, restore=lambda: put(double, tmp_path)) as backend:
        with pytest.raises(BackendError, match="404: model 'm' not found") as no:
            score(backend)
    assert "0 of 24 items of test are done" in str(no.value)
    assert asked(double) == {"0 + 1": 2}


def test_an_older_server_scores_all_the_same(double, clock):
    double.misbehave = "missing_fields"
    lines = []
    with make(double, clock, say=lines.append) as backend:
        got = backend.generate("1 + 1", 4, [])
        assert (got.text, got.prompt_tokens, got.answer_tokens) == ("2", None, None)
        assert (got.load_ns, got.prefill_ns, got.decode_ns, got.finish_reason) == (None, None, None, None)
        results = score(backend)
        assert all(s.correct for _, s in results) and results[0][0]["prompt_tokens"] is None
        names = {"done_reason", "prompt_eval_count", "eval_count", "load_duration", "prompt_eval_duration",
                 "eval_duration"}  # fmt: skip
        assert backend.missing == names
    assert len(lines) == len(names) and sum("prompt_eval_count" in line for line in lines) == 1


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_server_that_dies_midway_leaves_what_it_answered(double, clock, tmp_path, parallel):
    def answer_some(rendered):
        if len(asked(double)) > 10:
            double.misbehave = "die"
        return reply(rendered)

    double.reply = answer_some
    path = tmp_path / "j.jsonl"
    with make(double, clock, parallel=parallel) as backend, Journal(path) as journal:
        with pytest.raises(BackendError, match=r"ollama serve.*the same command goes on from there") as no:
            score(backend, journal)
        done = len(journal)
        assert f"{done} of 24 items of test are done and kept" in str(no.value) and 5 < done < 24
        kept = {item.prompt for item in ITEMS if journal.get("test", item.id)}
    (tmp_path / "two").mkdir()
    (tmp_path / "two/model.gguf").write_bytes(b"GGUF")
    with OllamaDouble(reply=reply) as second:
        put(second, tmp_path / "two")
        with make(second, clock, parallel=parallel) as backend, Journal(path) as journal:
            assert journal.resumed == done
            results = score(backend, journal)
        assert asked(second) == {item.prompt: 1 for item in ITEMS if item.prompt not in kept}
    assert [row["item_id"] for row, _ in results] == [item.id for item in ITEMS] and all(s.correct for _, s in results)


def test_as_many_requests_as_asked_for_are_in_flight(double, clock):
    import threading

    together = threading.Barrier(3, timeout=20)  # passed only if three requests come at once
    send = OllamaDouble.strike

    def strike(body):
        together.wait()
        return send(double, body)

    double.strike = strike
    with make(double, clock, parallel=3) as backend:
        assert all(s.correct for _, s in score(backend))


def test_phases_of_a_streamed_request(double, clock):
    with make(double, clock) as backend:
        first = backend.load_cold()
        phases = backend.timed("1 + 1", 4)
        assert backend.load_cold() == first == 260_000_000
    n = len(ids("1 + 1"))
    assert phases["prefill"] == (n, 1000 * n) and phases["decode"] == (1, 5000)
    count, ns = phases["ttft"]
    assert count == 1 and -1_000_000 < ns < 60e9
    unloads = [b for _, path, b in double.requests if path == "/api/generate" and b.get("keep_alive") == 0]
    assert len(unloads) == 2


def test_an_empty_answer_takes_no_time_and_is_not_unknown(double, clock):
    double.reply = lambda rendered: ""
    with make(double, clock) as backend:
        assert backend.timed("1 + 1", 4)["decode"] == (0, 0)
        assert not backend.missing


def test_a_timed_request_that_does_not_fit_is_refused(double, clock):
    with make(double, clock) as backend, pytest.raises(BackendError, match="within num_ctx 128"):
        backend.timed("1 + 1", 128)


def test_phases_that_an_older_server_does_not_give(double, clock):
    double.misbehave = "missing_fields"
    with make(double, clock) as backend:
        phases = backend.timed("1 + 1", 4)
    assert phases["prefill"] == (None, None) and phases["decode"] == (None, None)
    assert phases["ttft"] == (1, None), "a load may be in it"


def test_a_model_that_somebody_keeps_loaded_cannot_be_timed(double, clock, monkeypatch):
    from evaluation.backends import ollama

    monkeypatch.setattr(ollama, "UNLOAD_S", 0.1)
    with make(double, clock) as backend:
        backend.generate("1 + 1", 4, [])
        double.loaded = type("Sticky", (dict,), {"pop": lambda *a: None})(double.loaded)
        with pytest.raises(BackendError, match="still holds 'm'"):
            backend.load_cold()
