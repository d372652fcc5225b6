"""`python -m pipelines.evaluate`, killed and served badly midway: no item is lost, none is scored twice."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines import evaluate, prepare_base, prepare_data, profile
from pipelines.check import parse_params
from tests.conftest import TEMPLATE
from tests.ollama_double import OllamaDouble

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


def read_json(path):
    return json.loads(path.read_text())


def items(folder):
    return [
        (s, json.loads(line))
        for s in ("test", "retention", "paraphrased")
        for line in (folder / f"data/{s}.jsonl").open()
    ]


def requests(server, folder):
    """How often each item was asked; the prompts of speed measurements are others."""
    prompts = {row["prompt"] for _, row in items(folder)}
    asked = Counter(b["prompt"] for _, path, b in server.requests if path == "/api/generate")
    return Counter({prompt: n for prompt, n in asked.items() if prompt in prompts})


def assert_each_item_once(folder):
    samples = [json.loads(line) for line in (folder / "scores/base/0/samples.jsonl").open()]
    assert [(r["split"], r["item_id"]) for r in samples] == [(s, row["id"]) for s, row in items(folder)]
    assert not list((folder / "checkpoints").rglob("*.jsonl"))


def journal_lines(folder):
    return [line for file in (folder / "checkpoints").rglob("*.jsonl") for line in file.open() if line.endswith("\n")]


def params_of(folder):
    return parse_params(yaml.safe_load((folder / "params.yaml").read_text()))


@pytest.mark.full
def test_killed_midway_and_started_again(project, tokenize):
    parallel, total = params_of(project).evaluate.parallel, len(items(project))
    command = [sys.executable, "-m", "pipelines.evaluate", "base"]

    def slowly(rendered):
        time.sleep(0.05)
        return "Good: 12"

    with OllamaDouble(reply=slowly, tokenize=tokenize) as server:
        env = {**os.environ, "OLLAMA_HOST": server.url, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while len(journal_lines(project)) < 12:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        time.sleep(0.3)  # the double finishes what it had begun
        kept = [json.loads(line) for line in journal_lines(project)]
        assert 12 <= len(kept) < total and not (project / "scores/base/0").exists()
        assert requests(server, project).total() <= len(kept) + parallel  # those in flight were asked and not kept
        server.reply = lambda rendered: "Good: 12"
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"resuming with {len(kept)} answers" in done.stdout
        asked = requests(server, project)
    assert_each_item_once(project)
    prompt_of = {(s, row["id"]): row["prompt"] for s, row in items(project)}
    assert asked.keys() == set(prompt_of.values())
    assert all(asked[prompt_of[r["split"], r["item_id"]]] == 1 for r in kept)
    assert asked.total() <= total + parallel and max(asked.values()) <= 2
    assert read_json(project / "scores/base/0/run.json")["extra"]["resumed_items"] == len(kept)
    phases = {r["phase"] for r in read_json(project / "scores/base/0/scores.json")["speed"]}
    assert phases == {"load", "ttft", "prefill", "decode"}


def test_answers_of_other_weights_are_not_gone_on_from(project):
    section = params_of(project).evaluate

    def key(inputs="1", changed=section, **backend):
        answering = {"name": "ollama", "version": "0.32.0", "device_class": "cpu", "mode": "merged", **backend}
        return evaluate.answers_key(changed, SimpleNamespace(**answering), {"x": inputs}, {})

    longer = section.model_copy(update={"max_tokens": section.max_tokens + 1})
    assert len({key(), key(device_class="gpu"), key(mode="adapter"), key(changed=longer), key(inputs="2")}) == 5
    more = section.model_copy(update={"parallel": section.parallel + 1})
    assert key(changed=more) == key(), "decides no answer"
    arm = [str(p) for p in evaluate.weights("hf", "pure_grit", 0)]
    assert "adapters/pure_grit/0" in arm and "models/base/base.json" in arm
    assert [str(p) for p in evaluate.weights("ollama", "pure_grit", 0)] == ["gguf/base/0"]
