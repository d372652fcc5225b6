"""`python -m export.ollama` and verification on a server: the double, and the real one at OLLAMA_HOST if it answers."""

from pathlib import Path

import httpx
import pytest

from export.engines.engine import conversation
from export.engines.ollama_engine import OllamaEngine, connect, list_models, stored_model
from export.proof import problems, verify
from export.register import register
from export.served import find_served, read_references
from tests.export.verify_runs import ARM, LATEST, model, one, opened, rewrite, run
from tests.ollama_double import OllamaDouble

pytestmark = pytest.mark.usefixtures("own_records")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def where(server, tree):
    server.rename(tree)
    return ["--gguf", tree, "--host", server.url]


def complete(url, name, reference):
    """As OpenAI's clients ask, who name no temperature."""
    body = {"model": name, "messages": conversation(reference.prompt), "max_tokens": reference.max_tokens}
    said = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
    return said["choices"][0]["message"]["content"]


def stream(url, name, reference):
    """As an interactive `ollama run` asks, with the model's own settings."""
    with connect(url, 60) as client:
        options = {"num_predict": reference.max_tokens}
        parts = client.chat(name, conversation(reference.prompt), stream=True, options=options)
        return "".join(part.message.content for part in parts)


# --- on both servers -----------------------------------------------------------------------------------------


def test_created_verified_in_both_modes_scored_and_removed(server, tree, where):
    absent = run("verify", *where)
    assert absent.exit_code == 1 and "python -m export.ollama create" in absent.output
    assert f"{server.prefix}-base, {server.prefix}-pure_grit" in absent.output
    made = run("create", *where)
    assert made.exit_code == 0, made.output
    names = [served.name for served in find_served(tree)]
    assert {f"{name}:latest" for name in names} <= set(list_models(server.url))
    listed = run("list", *where).output
    assert server.version in listed and " no " not in listed

    checked = run("verify", *where, "--mode", "both")
    assert checked.exit_code == 0, checked.output
    rows = [line for line in checked.output.splitlines() if server.prefix in line and "│" in line]
    assert len(rows) in (7, 9) and all(row.count("100%") == 3 for row in rows[:6])
    assert (all(row.count("100%") == 4 for row in rows[6:]) and "yes" in rows[6]) or "not supported" in rows[6]

    for served in find_served(tree):
        with OllamaEngine(server.url, served.name, 256) as engine:
            for reference in read_references(served.folder):
                scored = engine.generate(reference.asked, reference.max_tokens)
                assert (scored.text, scored.prompt_tokens) == (reference.answer, len(reference.ids))
                if reference.form == "plain":
                    chat = engine.generate(conversation(reference.prompt), reference.max_tokens)
                    assert (chat.text, chat.answer_tokens) == (scored.text, scored.answer_tokens)
                    assert complete(server.url, served.name, reference) == scored.text
                    assert stream(server.url, served.name, reference) == scored.text
    assert run("remove", *where).output.count("removed") == 2
    assert run("remove", *where).output.count("was not there") == 2
    assert not [name for name in list_models(server.url) if name.startswith(server.prefix)]


# --- the command ---------------------------------------------------------------------------------------------


def test_names_modes_backends_and_servers_that_do_not_exist(tree, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    for command in ("create", "list", "verify", "remove"):
        done = run(command, "--gguf", tree, "--host", "127.0.0.1:9")
        assert done.exit_code == 1 and "127.0.0.1:9" in done.output and "Traceback" not in done.output
    assert "expected names among base_model, pure_grit_model" in run("create", "pure_grid", "--gguf", tree).output
    for wrong in (("create", "--mode", "both"), ("verify", "--mode", "x"), ("verify", "--backend", "llama")):
        refused = run(*wrong, "--gguf", tree)
        assert refused.exit_code == 2 and "is not one of" in refused.output
    named = run("verify", "--gguf", tree, "--backend", "ollama")
    assert named.exit_code == 1 and "no Ollama answers at http://127.0.0.1:9" in named.output


def test_without_a_server_llama_cpp_verifies_and_with_one_it_is_the_server(tree, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    done = run("verify", "--gguf", tree, "--mode", "both")
    assert done.exit_code == 0 and done.output.count("100%") == 30 and "llama_cpp" in done.output, done.output
    with OllamaDouble() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert run("create", "--gguf", tree).exit_code == 0
        done = run("verify", "--gguf", tree)
        assert done.exit_code == 0 and "ollama 0.32.0" in done.output
        server.requests.clear()
        assert run("verify", "--gguf", tree, "--backend", "llama_cpp").exit_code == 0 and not server.requests


def test_what_can_only_be_served_merged_has_no_adapter_row(tree):
    (tree / "pure_grit/0/adapter.gguf").unlink()
    done = run("verify", "--gguf", tree, "--mode", "both", "--backend", "llama_cpp")
    assert done.exit_code == 0 and done.output.count("100%") == 18, done.output
    refused = run("verify", "--gguf", tree, "--mode", "adapter", "--backend", "llama_cpp")
    assert refused.exit_code == 1 and "can be served merged only" in refused.output


# --- an older release ----------------------------------------------------------------------------------------


def test_what_an_older_release_does_not_tell_is_no_difference_and_no_cause(tree):
    served = model(tree)
    with opened("ollama") as (opener, double):
        register(double.url, served)
        double.misbehave = "missing_fields"
        row = one(verify(opener, served, ["merged"]))
        bodies = [b for _, path, b in double.requests if path == "/api/generate" and "_debug_render_only" in b]
        done = run("verify", ARM, "--gguf", tree, "--host", double.url)
        assert (row.rendered, row.counted, row.answered) == (None, None, 1.0)
        assert row.first_difference is None and problems([row], 1.0) == []
        assert bodies and all(b["options"]["num_predict"] == 1 for b in bodies), "such a server answers the prompt"
        assert done.exit_code == 0, done.output
        rewrite(served.folder, answer=lambda row: "#" + row["answer"][1:])
        row = one(verify(opener, served, ["merged"]))
    assert row.answered == 0 and "Likely cause: merge or weights of the file" in row.first_difference
    assert "template" not in row.first_difference.split("Likely cause")[0]


# --- what was really registered ------------------------------------------------------------------------------


def test_other_settings_than_were_exported_are_a_problem_even_where_all_answers_are_equal(tree):
    served = model(tree)
    with opened("ollama") as (opener, double):
        register(double.url, served)
        there, go = double.models[LATEST], served.serving.go_template
        right = dict(there.parameters)
        for part, value, said in (
            ("parameters", {"repeat_penalty": None}, "repeat_penalty: expected [1.0], got None"),
            ("parameters", {"stop": ["</s>", "~~"]}, "stop: expected ['</s>'], got ['</s>', '~~']"),
            ("parameters", {"num_predict": 3}, "num_predict: expected none, got [3]"),
            ("system", "Be rude.", "system: expected '', got 'Be rude.'"),
            ("template", f"{go}?", f"template: expected {go!r}, got {go + '?'!r}"),
            ("parameters", {"temperature": 0.7}, "temperature: expected [0.0], got [0.7]"),
        ):
            there.system, there.template, there.parameters = "", go, right
            if part == "parameters":
                value = {k: v for k, v in {**right, **value}.items() if v is not None}
            setattr(there, part, value)
            assert stored_model(double.url, ARM).differences(served.serving) == [said]
        row = one(verify(opener, served, ["merged"]))
        done = run("verify", ARM, "--gguf", tree, "--host", double.url)
    assert row.answered == row.rendered == row.counted == 1 and row.differences == said
    assert f"stored other settings than were exported ({said}); register it again" in str(problems([row], 0.0))
    assert done.exit_code == 1 and said in done.output


# --- the mode, and temporary copies --------------------------------------------------------------------------


def test_the_mode_that_is_checked_is_the_one_that_the_server_has(tree):
    with opened("ollama") as (opener, double):
        where = ["--gguf", tree, "--host", double.url]
        assert run("create", *where, "--mode", "adapter").exit_code == 0
        digest = double.models[LATEST].digest
        done = run("verify", *where)
        assert done.exit_code == 0 and "temporary copy" not in done.output, done.output
        row = next(line for line in done.output.splitlines() if ARM in line)
        assert "adapter" in row and "yes" in row and row.count("100%") == 4

        other = run("verify", ARM, *where, "--mode", "merged").output
        copied = "asked of a temporary copy in mode merged, for the server has this model in mode adapter"
        assert f"{ARM} (merged): {copied}" in other
        merged, _, _, adapter, _, _ = verify(opener, model(tree))
        assert adapter.server_digest == digest and adapter.note is None
        assert merged.server_digest != digest and merged.note == copied
        (tree / "pure_grit/0/adapter.gguf").unlink()
        lost = run("verify", *where)
        assert lost.exit_code == 1 and "can be served merged only" in lost.output


def test_what_a_killed_check_left_is_removed(tree):
    with opened("ollama") as (opener, double), opener(model(tree)):
        [left] = double.models
        double.models["mine:latest"] = double.models[left]
        done = run("remove", ARM, "--gguf", tree, "--host", double.url)
        assert done.exit_code == 0 and f"{left}: removed, left by a check that was killed" in done.output
        assert set(double.models) == {"mine:latest"}
        double.models[left] = double.models["mine:latest"]
