"""Verification on a server: older and silent ones, changed settings, temporary copies and what is left of them."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from export import ollama_client
from export.errors import ExportError
from export.gguf import quantize
from export.llama_engine import LlamaCpp
from export.ollama import list_models, register, remove, render_prompt, stored_model
from export.ollama_cli import app
from export.ollama_client import OllamaError, OllamaUnavailable
from export.ollama_engine import OllamaServer
from export.temporary_models import remove_abandoned, temporary_name
from export.verdict import against
from export.verify import verify
from tests.export.verify_runs import ARM, model, one, opened, rewrite

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_records")]
ROOT = Path(__file__).resolve().parents[2]
LATEST = f"{ARM}:latest"


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


# --- an older release --------------------------------------------------------------------------------------


def test_what_an_older_release_does_not_tell_is_no_difference(tree):
    served = model(tree)
    with opened("ollama") as (backend, double):
        register(double.url, ARM, served.gguf, served.spec)
        double.misbehave = "missing_fields"
        row = one(verify(backend, served, ["merged"]))
        bodies = [b for _, path, b in double.requests if path == "/api/generate" and "_debug_render_only" in b]
        done = run("verify", ARM, "--gguf", tree, "--host", double.url)
    assert (row.rendered, row.counted, row.answered, row.first, row.problem(1.0)) == (None, None, 1.0, None, None)
    assert (
        row.note.count("ollama 0.32.0 does not tell how") == 2 and "'rendered'" in row.note and "'counted'" in row.note
    )
    assert bodies and all(b["options"]["num_predict"] == 1 for b in bodies), "such a server answers the prompt"
    assert done.exit_code == 0 and f"{ARM} (merged): ollama 0.32.0 does not tell how it renders" in done.output


def test_a_wrong_answer_of_an_older_release_has_no_made_up_cause(tree):
    rewrite(tree / "pure_grit/0", answer=lambda row: "#" + row["answer"][1:])
    with opened("ollama") as (backend, double):
        double.misbehave = "missing_fields"
        row = one(verify(backend, model(tree), ["merged"]))
    assert row.answered == 0 and "Likely cause: merge or weights of the file" in row.first
    assert "template" not in row.first.split("Likely cause")[0]


@pytest.mark.parametrize("untold", [0, 1])
def test_other_counts_of_a_release_that_does_not_render(tree, untold):
    """More tokens than in training may be a BOS or another template; nobody knows. Cached prompts have no count."""
    counts = []
    with opened("ollama") as (backend, double):
        whole = double.generate

        def silent(body):
            for part in whole(body):
                count = part.get("prompt_eval_count")
                known = {k: v for k, v in part.items() if k != "_debug_info"}
                if count is not None and "_debug_render_only" not in body:
                    counts.append(count)
                    known.pop("prompt_eval_count")
                    if len(counts) > untold:
                        known["prompt_eval_count"] = count + 1
                yield known

        double.generate = silent
        row = one(verify(backend, model(tree), ["merged"]))
    assert (row.rendered, row.counted) == (None, 0.0) and "Likely cause: template or BOS" in row.first


# --- a silent server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [list_models, stored_model, remove, render_prompt])
def test_a_server_that_says_nothing_is_not_waited_for_for_ever(tree, ask, monkeypatch):
    monkeypatch.setattr(ollama_client, "ANSWER_S", 0.3)
    monkeypatch.setattr(ollama_client, "LOAD_S", 0.3)
    arguments = {list_models: (), render_prompt: (ARM, "Hi")}.get(ask, (ARM,))
    with opened("ollama") as (_, double):
        double.misbehave = "hang_all"
        with pytest.raises(OllamaUnavailable, match="said nothing for 0.3 s"):
            ask(double.url, *arguments)


def test_the_second_request_is_not_waited_for_for_ever_either(tree, monkeypatch):
    """`remove` and `stored_model` look at the list first."""
    monkeypatch.setattr(ollama_client, "ANSWER_S", 0.3)
    served = model(tree)
    for ask in (remove, stored_model):
        with opened("ollama") as (_, double):
            register(double.url, ARM, served.gguf, served.spec)
            whole = double.listing

            def listing(*names, whole=whole, double=double, **more):
                double.misbehave = "hang_all"  # from the next request on
                return whole(*names, **more)

            double.listing = listing
            with pytest.raises(OllamaUnavailable, match="said nothing for 0.3 s"):
                ask(double.url, ARM)


def test_a_list_without_digests_is_refused(tree):
    served = model(tree)
    with opened("ollama") as (_, double):
        register(double.url, ARM, served.gguf, served.spec)
        double.misbehave = "bare_list"
        with pytest.raises(OllamaError, match=f"name and digest of every model .* '{LATEST}' with digest None"):
            list_models(double.url)


# --- what was really registered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.7}, "temperature: expected [0.0], got [0.7]"),
        ({"num_ctx": 64}, "num_ctx: expected [256], got [64]"),
        ({"repeat_penalty": None}, "repeat_penalty: expected [1.0], got None"),
        ({"stop": ["</s>", "~~"]}, "stop: expected ['</s>'], got ['</s>', '~~']"),
        ({"num_predict": 3}, "num_predict: expected none, got [3]"),
    ],
)
def test_other_parameters_than_were_exported_are_a_problem_even_where_all_answers_are_equal(tree, change, said):
    served = model(tree)
    with opened("ollama") as (backend, double):
        register(double.url, ARM, served.gguf, served.spec)
        assert one(verify(backend, served, ["merged"])).differences is None
        parameters = {**double.models[LATEST].parameters, **change}
        double.models[LATEST].parameters = {k: v for k, v in parameters.items() if v is not None}
        row = one(verify(backend, served, ["merged"]))
        done = run("verify", ARM, "--gguf", tree, "--host", double.url)
    assert row.answered == row.rendered == row.counted == 1 and row.differences == said
    assert f"stored other settings than were exported ({said}); register it again" in row.problem(0.0)
    assert done.exit_code == 1 and said in done.output


def test_another_template_or_system_message_is_a_problem_of_its_own(tree):
    served = model(tree)
    with opened("ollama") as (backend, double):
        register(double.url, ARM, served.gguf, served.spec)
        double.models[LATEST].system = "Be rude."
        row = one(verify(backend, served, ["merged"]))
        assert row.answered == 1 and row.differences == "system: expected '', got 'Be rude.'"
        double.models[LATEST].system = ""
        double.models[LATEST].template = served.spec.template.replace("Response", "Answer")
        row = one(verify(backend, served, ["merged"]))
    assert row.differences.startswith("template: expected ") and "Likely cause: template" in row.first


# --- the mode, and temporary copies ------------------------------------------------------------------------


def test_the_mode_that_is_checked_is_the_one_that_the_server_has(tree):
    with opened("ollama") as (_, double):
        where = ["--gguf", tree, "--host", double.url]
        assert run("create", *where, "--mode", "adapter").exit_code == 0
        digest = double.models[LATEST].digest
        done = run("verify", *where)
        assert done.exit_code == 0 and "temporary copy" not in done.output, done.output
        row = next(line for line in done.output.splitlines() if ARM in line)
        assert "adapter" in row and "yes" in row and row.count("100%") == 4

        other = run("verify", ARM, *where, "--mode", "merged")
        assert (
            f"{ARM} (merged): asked of a temporary copy in mode merged, for the server has this model in mode adapter"
            in (other.output)
        )
        merged, adapter = verify(OllamaServer(double.url), model(tree))
        assert adapter.server_digest == digest and adapter.note is None
        assert merged.server_digest != digest and merged.note.startswith("asked of a temporary copy in mode merged")
        (tree / "pure_grit/0/adapter.gguf").unlink()
        lost = run("verify", *where)
        assert lost.exit_code == 1 and "can be served merged only" in lost.output


HOLD = """
import sys, time
from pathlib import Path
from export.ollama_engine import OllamaServer
from export.serving import find_served
with OllamaServer(sys.argv[1]).open(find_served(Path(sys.argv[2]), names=[sys.argv[3]])[0]):
    print("open", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("by", ["verify", "remove"])
def test_a_killed_check_leaves_nothing_for_long(tree, by):
    with opened("ollama") as (backend, double):
        command = [sys.executable, "-c", HOLD, double.url, str(tree), ARM]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout.readline() == "open\n"
            [left] = double.models
            assert left.startswith("grit-verify-") and f"-{child.pid}-" in left
            assert remove_abandoned(double.url) == [], "its process runs"
        finally:
            child.send_signal(signal.SIGKILL)
        with child:
            assert list(double.models) == [left]
        foreign = left.replace(left.split("-")[2], "00000000")
        double.models |= {foreign: double.models[left], "grit-verify-mine:latest": double.models[left]}
        if by == "verify":
            with backend.open(model(tree)):
                assert left not in double.models
        else:
            done = run("remove", ARM, "--gguf", tree, "--host", double.url)
            assert done.exit_code == 0 and f"{left}: removed, left by a check that was killed" in done.output
        assert set(double.models) == {foreign, "grit-verify-mine:latest"}, "of other machines and of others"
    assert temporary_name() != temporary_name()


def test_a_later_process_of_the_same_number_is_not_taken_for_the_one_that_made_it(tree):
    with opened("ollama") as (backend, double), backend.open(model(tree)):
        [mine] = double.models
        parts = mine.split("-")
        old = "-".join([*parts[:4], str(int(psutil.Process().create_time()) - 60), parts[5]])
        double.models[old] = double.models[mine]
        assert remove_abandoned(double.url) == [old] and set(double.models) == {mine}


def test_what_went_wrong_is_not_hidden_by_what_goes_wrong_afterwards(tree):
    with opened("ollama") as (backend, double), pytest.raises(ExportError, match="the real one"):
        with backend.open(model(tree)):
            double.die()
            raise ExportError("the real one")


# --- quantized models --------------------------------------------------------------------------------------


def test_a_quantized_model_must_not_talk_gibberish(tree):
    served = model(tree)
    file = served.gguf.rename(tree / "f16.gguf")
    quantize(file, served.gguf, "q8_0")
    row = replace(one(verify(LlamaCpp(), served, ["merged"])), quantization="q8_0")
    assert row.answered > 0.5 and row.problem(1.0, 0.5) is None
    gibberish = replace(row, answered=1 / 6)
    assert "answers equal to Hugging Face's: expected 25%, got 17%" in gibberish.problem(0.0)
    assert gibberish.problem(1.0, 0.1) is None
    alone = replace(row, mode="adapter", answered=0.5)  # the base, where only this mode was asked for
    assert alone.problem(1.0, 0.4) is None
    adapted = replace(alone, adapter_sha256=row.gguf_sha256)
    assert adapted.problem(1.0, 0.4) is not None, "an adapter lies on the f16 base"


def test_two_engines_must_agree_on_the_same_files(tree):
    served = model(tree)
    local = verify(LlamaCpp(), served)
    with opened("ollama") as (backend, double):
        rows = against(verify(backend, served), local)
        assert [r.equal_to_llama_cpp for r in rows] == [1.0, 1.0]
        whole = double.generate
        double.generate = lambda body: ({**p, "response": p["response"].upper() + "?"} for p in whole(body))
        wrong = replace(against([one(verify(backend, served, ["merged"]))], local)[0], quantization="q8_0")
    assert wrong.equal_to_llama_cpp == 0.0
    assert "answers equal to llama.cpp's of the same files: expected 90%, got 0%" in wrong.problem(0.9, 0.0)
    other = replace(wrong, gguf_sha256="0" * 64)
    assert against([replace(other, equal_to_llama_cpp=None)], local)[0].equal_to_llama_cpp is None
    assert against(local, [])[0].equal_to_llama_cpp is None
