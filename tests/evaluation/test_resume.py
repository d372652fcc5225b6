"""`python -m pipelines.evaluate`, killed and served badly midway: no item is lost, none is scored twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml

from evaluation.backends import BackendError, retry
from export.registration import register_served
from export.serving import served_in
from pipelines import evaluate, exported_models, prepare_base, prepare_data, profile
from pipelines.config import parse_params
from pipelines.outputs import OutputError, exclusive
from tests.conftest import TEMPLATE
from tests.ollama_double import OllamaDouble

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepared(base_dir, tmp_path_factory):
    """A project folder up to the export of the base."""
    folder = tmp_path_factory.mktemp("project")
    raw = yaml.safe_load(profile.compose("smoke"))
    raw["prepare_data"]["retention_items_per_task"] = 1
    raw["prepare_base"]["source"] = str(base_dir)
    raw["evaluate"]["backend"] = "ollama"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = parse_params(raw)
        prepare_data.run(params)
        prepare_base.run(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    (folder / "profiles").mkdir()
    export = folder / "gguf/base/0"
    export.mkdir(parents=True)
    (export / "model.gguf").write_bytes(b"GGUF")  # the double answers from a function
    facts = {"template": TEMPLATE, "stop": ["</s>"], "num_ctx": 256, "model_name": "base_model", "license": None}
    (export / "serving.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def project(prepared, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def tokenize(base_dir):
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(str(base_dir))
    return lambda text: list(tokenizer(text)["input_ids"])


def items(folder):
    return [(s, json.loads(line)) for s in ("test", "retention") for line in (folder / f"data/{s}.jsonl").open()]


def requests(server, folder):
    """How often each item was asked; the prompts of speed measurements are others."""
    prompts = {row["prompt"] for _, row in items(folder)}
    asked = Counter(b["prompt"] for _, path, b in server.requests if path == "/api/generate")
    return Counter({prompt: n for prompt, n in asked.items() if prompt in prompts})


def samples(folder):
    return [json.loads(line) for line in (folder / "scores/base/0/samples.jsonl").open()]


def assert_each_item_once(folder):
    assert [(r["split"], r["item_id"]) for r in samples(folder)] == [(s, row["id"]) for s, row in items(folder)]
    assert not list((folder / "checkpoints").rglob("*.jsonl"))


def journal_lines(folder):
    return [line for file in (folder / "checkpoints").rglob("*.jsonl") for line in file.open() if line.endswith("\n")]


def params_of(folder):
    return parse_params(yaml.safe_load((folder / "params.yaml").read_text()))


@pytest.mark.parametrize("parallel", [1, 4])
def test_killed_midway_and_started_again(project, tokenize, monkeypatch, parallel):
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["evaluate"]["parallel"] = parallel
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "pipelines.evaluate", "--arm", "base"]

    def slowly(rendered):
        time.sleep(0.05)
        return "Good: 12"

    with OllamaDouble(reply=slowly, tokenize=tokenize) as server:
        env = {**os.environ, "OLLAMA_HOST": server.url, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while len(journal_lines(project)) < 12:
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        time.sleep(0.3)  # the double finishes what it had begun
        (file,) = (project / "checkpoints").rglob("*.jsonl")
        with file.open("a") as end:
            end.write('{"split": "test", "item_id"')  # as if the kill had come within a line
        kept = [json.loads(line) for line in journal_lines(project)]
        total = len(items(project))
        assert 12 <= len(kept) < total and not (project / "scores/base/0").exists()
        before = requests(server, project)
        assert sum(before.values()) <= len(kept) + parallel  # those in flight were asked and not kept
        server.reply = lambda rendered: "Good: 12"
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"going on with {len(kept)} answers" in done.stdout
        asked = requests(server, project)
    assert_each_item_once(project)
    prompt_of = {(s, row["id"]): row["prompt"] for s, row in items(project)}
    assert asked.keys() == set(prompt_of.values())
    assert all(asked[prompt_of[r["split"], r["item_id"]]] == 1 for r in kept)
    assert sum(asked.values()) <= total + parallel and max(asked.values()) <= 2
    assert json.load(open(project / "scores/base/0/run.json"))["extra"]["resumed_items"] == len(kept)
    phases = {r["phase"] for r in json.load(open(project / "scores/base/0/scores.json"))["speed"]}
    assert phases == {"load", "ttft", "prefill", "decode"}


def test_a_server_that_dies_is_waited_for_and_the_next_one_goes_on(project, tokenize, monkeypatch):
    monkeypatch.setattr("evaluation.backends.ollama.Retry", partial(retry.Retry, patience_s=0.2, first_s=0.01))
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)

        def dies(rendered):
            if len(requests(server, project)) > 9:
                server.misbehave = "die"
            return "Good: 12"

        server.reply = dies
        with pytest.raises(BackendError, match=r"of 40 items of test are done and kept; the same command goes on"):
            evaluate.run(params_of(project), "base", 0, 0)
    kept = len(journal_lines(project))
    assert kept >= 6  # of the ten that were asked four may be in flight
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        evaluate.run(params_of(project), "base", 0, 0)
        assert sum(requests(server, project).values()) == len(items(project)) - kept
    assert_each_item_once(project)


def forget_once(server, project):
    """After ten items all models are gone from the server."""
    left = [True]

    def reply(rendered):
        if left and len(requests(server, project)) >= 10:
            left.clear()
            server.models.clear()
        return "Good: 12"

    server.reply = reply


def test_a_model_removed_under_our_feet_is_registered_by_the_stage(project, tokenize, monkeypatch):
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        forget_once(server, project)
        evaluate.run(params_of(project), "base", 0, 0)
        created = [b["model"] for _, path, b in server.requests if path == "/api/create"]
    assert created == ["base_model", "base_model"]
    assert_each_item_once(project)


def test_a_model_on_a_shared_base_comes_back_as_such(project, tokenize, monkeypatch):
    """Merged it would be other weights than those that gave the first answers, where the merged file is quantized."""
    shutil.copytree(project / "gguf/base/0", project / "gguf/baseline_lora/0")
    (project / "gguf/baseline_lora/0/adapter.gguf").write_bytes(b"GGUF adapter")
    facts = json.loads((project / "gguf/base/0/serving.json").read_text()) | {"model_name": "baseline_lora_model"}
    (project / "gguf/baseline_lora/0/serving.json").write_text(json.dumps(facts))
    served = served_in(Path("gguf/baseline_lora/0"), "baseline_lora_model")
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        register_served(server.url, served.adapter_form())
        forget_once(server, project)
        evaluate.run(params_of(project), "baseline_lora", 0, 0)
        created = [b for _, path, b in server.requests if path == "/api/create"]
    mine = [bool(b.get("adapters")) for b in created if b["model"] == "baseline_lora_model"]
    assert mine == [True, True], "registered by hand, and once more when it was gone"
    scores = json.loads((project / "scores/baseline_lora/0/scores.json").read_text())
    assert scores["backend"]["mode"] == "adapter"
    assert {p.name for p in (project / "outputs/ollama").iterdir()} >= {"baseline_lora_model-adapter.json"}
    assert not (project / "outputs/ollama/baseline_lora_model-merged.json").exists()


def test_answers_of_other_weights_are_not_gone_on_from(project):
    key = partial(evaluate.answers_key, params_of(project), inputs={"x": "1"}, facts={})

    class Answers:
        name, version, device_class, mode = "ollama", "0.32.0", "cpu", "merged"

    class OnGpu(Answers):
        device_class = "gpu"

    class Adapter(Answers):
        mode = "adapter"

    keys = {key(backend) for backend in (Answers(), OnGpu(), Adapter())}
    assert len(keys) == 3 and key(Answers()) in keys
    arm = [str(p) for p in exported_models.weights("hf", "pure_grit", 0)]
    assert "adapters/pure_grit/0" in arm and "models/base/base.json" in arm
    assert [str(p) for p in exported_models.weights("ollama", "pure_grit", 0)] == ["gguf/base/0"]


def test_other_settings_do_not_go_on_from_these_answers(project, tokenize, monkeypatch):
    monkeypatch.setattr("evaluation.backends.ollama.Retry", partial(retry.Retry, patience_s=0))
    raw = yaml.safe_load((project / "params.yaml").read_text())
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)

        def fails(rendered):
            if len(requests(server, project)) >= 10:
                server.misbehave = "error_500_n_times"
            return "Good: 12"

        server.reply = fails
        with pytest.raises(BackendError, match="500"):
            evaluate.run(parse_params(raw), "base", 0, 0)
        assert journal_lines(project)
        server.misbehave, server.reply = None, lambda rendered: "Good: 12"
        server.requests.clear()
        raw["evaluate"]["max_tokens"] += 1
        evaluate.run(parse_params(raw), "base", 0, 0)
        assert sum(requests(server, project).values()) == len(items(project))
    assert_each_item_once(project)


def test_an_older_server_is_scored_and_what_it_leaves_out_is_recorded(project, tokenize, monkeypatch):
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12", misbehave="missing_fields") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        evaluate.run(params_of(project), "base", 0, 0)
    assert_each_item_once(project)
    assert {r["prompt_tokens"] for r in samples(project)} == {None}
    extra = json.load(open(project / "scores/base/0/run.json"))["extra"]
    left_out = {"prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration", "load_duration"}
    assert left_out <= set(extra["missing_figures"])
    speed = json.load(open(project / "scores/base/0/scores.json"))["speed"]
    assert {r["nanoseconds"] for r in speed if r["phase"] in ("load", "prefill", "decode")} == {None}


def test_two_processes_do_not_mix(project, tokenize, monkeypatch):
    with OllamaDouble(tokenize=tokenize, reply=lambda rendered: "Good: 12") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        with (
            exclusive(project / "checkpoints/scores/base/0.lock", "x"),
            pytest.raises(OutputError, match="evaluate base seed 0 is already running"),
        ):
            evaluate.run(params_of(project), "base", 0, 0)
        assert not requests(server, project)
