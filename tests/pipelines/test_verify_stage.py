"""Stage verify: what it writes, what fails it, and what it keeps then."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gguf import GGUFReader

from db.errors import OutputError
from db.files import exclusive
from export import ExportError
from export.gguf import quantize
from export.register import register
from export.served import served_in
from pipelines import profile, verify
from pipelines.check import parse_params
from pipelines.stage import SPEED_LOCK
from tests.export.verify_runs import substitute
from tests.ollama_double import OllamaDouble

ROOT = Path(__file__).resolve().parents[2]
KEYS = (
    "backend backend_version mode form prompts rendered counted answered tied equal_to_merged perturbed_noticed "
    "first_difference gguf_sha256 adapter_sha256 server_digest stored_sha256"
).split()


@pytest.fixture
def params(tree, own_records, monkeypatch):
    """The smoke profile, in a project's folder where everything is exported and no server answers."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    base = Path("models/base")
    base.mkdir(parents=True)
    (base / "base.json").write_text("{}")
    return parse_params(yaml.safe_load(profile.compose("smoke", ROOT / "profiles")))


def written(arm, form="plain"):
    """The rows of one form."""
    folder = Path("verified") / arm / "0"
    content = json.loads((folder / "verify.json").read_text())
    assert sorted(f.name for f in folder.iterdir()) == ["run.json", "verify.json"]
    assert (content["schema"], content["arm"], content["seed"]) == (1, arm, 0)
    assert content["model_name"] == f"{arm}_model"
    assert all(list(row) == KEYS for row in content["rows"])
    assert [row["form"] for row in content["rows"]] == ["plain", "newline", "second"] * (len(content["rows"]) // 3)
    return [row for row in content["rows"] if row["form"] == form]


def test_llama_cpp_in_both_modes(params):
    verify.run(params, "base", 0)
    verify.run(params, "pure_grit", 0)
    [base] = written("base")
    merged, adapter = written("pure_grit")
    assert [r["mode"] for r in (base, merged, adapter)] == ["merged", "merged", "adapter"]
    for row in (base, merged, adapter):
        assert row["backend"] == "llama_cpp" and row["prompts"] == 6 and row["first_difference"] is None
        assert row["rendered"] == row["counted"] == row["answered"] == 1.0
        assert row["server_digest"] is None and row["stored_sha256"] is None
    assert (merged["equal_to_merged"], merged["perturbed_noticed"], merged["adapter_sha256"]) == (None, None, None)
    assert (adapter["equal_to_merged"], adapter["perturbed_noticed"]) == (1.0, True)
    assert adapter["gguf_sha256"] == base["gguf_sha256"] != merged["gguf_sha256"] and adapter["adapter_sha256"]

    run = json.loads(Path("verified/pure_grit/0/run.json").read_text())
    assert run["status"] == "finished" and run["stage"] == "verify" and run["packages"]["llama-cpp-python"]
    assert {"gguf/base/0/model.gguf", "gguf/pure_grit/0/adapter.gguf"} <= set(run["inputs"])


def test_a_server_that_answers_is_verified_as_well(params, monkeypatch):
    with OllamaDouble() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        verify.run(params, "pure_grit", 0)
        assert list(server.models) == ["pure_grit_model:latest"], "registered, and nothing of the checks is left"
        model = server.models["pure_grit_model:latest"]
    rows = written("pure_grit")
    assert [(r["backend"], r["mode"]) for r in rows] == [
        ("llama_cpp", "merged"), ("llama_cpp", "adapter"), ("ollama", "merged"), ("ollama", "adapter")]  # fmt: skip
    assert all(r["answered"] == 1.0 for r in rows) and rows[3]["perturbed_noticed"] is True
    assert (rows[2]["server_digest"], rows[2]["stored_sha256"]) == (model.digest, model.stored)
    assert rows[2]["backend_version"] == "0.32.0"


def test_a_model_that_is_served_as_base_and_adapter_stays_so(params, tree, monkeypatch):
    form = served_in(tree / "pure_grit/0").adapter_form()
    with OllamaDouble() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        register(server.url, form)
        model = server.models["pure_grit_model:latest"]
        server.requests.clear()
        verify.run(params, "pure_grit", 0)
        created = [body["model"] for _, path, body in server.requests if path == "/api/create"]
        assert len(created) == 2 and all(name.startswith("grit-verify-") for name in created), "merged, and the control"
        assert server.models == {"pure_grit_model:latest": model} and model.adapter
        assert written("pure_grit")[3]["server_digest"] == model.digest

        model.parameters["temperature"] = 0.7  # of somebody else: another digest, so the model is stale
        model.digest = "0" * 64
        verify.run(params, "pure_grit", 0)
        anew = server.models["pure_grit_model:latest"]
        assert anew.adapter and anew.parameters["temperature"] == 0.0

        server.version = "0.35.0"
        anew.digest = "1" * 64
        verify.run(params, "pure_grit", 0)
        assert not server.models["pure_grit_model:latest"].adapter, "this release takes none, so it is served merged"


def test_nobody_times_models_on_a_server_meanwhile(params, monkeypatch):
    def registered(*_, **__):
        with pytest.raises(OutputError, match="timing is already running"), exclusive(SPEED_LOCK, "timing"):
            pass
        raise ExportError("held")

    monkeypatch.setattr(verify, "keep_registered", registered)
    with OllamaDouble() as server, pytest.raises(ExportError, match="held"):
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        verify.run(params, "base", 0)


def test_a_quantized_model_must_answer_as_llama_cpp_does_and_not_gibberish(params, tree, monkeypatch):
    file, model = tree / "pure_grit/0/serving.json", tree / "pure_grit/0/model.gguf"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization": "q8_0"}))
    quantize(model.rename(tree / "f16.gguf"), model, "q8_0")
    verify.run(params, "pure_grit", 0)
    lax = params.model_copy(update={"verify": params.verify.model_copy(update={"min_answers_equal_quantized": 0.0})})
    with OllamaDouble() as server, monkeypatch.context() as patched:
        patched.setenv("OLLAMA_HOST", server.url)
        whole = server.generate

        def other(body):
            merged = server.model(body).adapter is None
            return ({**p, "response": "?" if merged and p["response"] else p["response"]} for p in whole(body))

        server.generate = other
        with pytest.raises(ExportError, match=r"llama\.cpp's of the same files: expected 90%, got 0%"):
            verify.run(lax, "pure_grit", 0)
    reader = GGUFReader(model, "r+")
    for tensor in reader.tensors:
        if "ffn_down" in tensor.name or "attn_output" in tensor.name:
            tensor.data[..., 1] = 0x7B  # the high byte of each row's first scale
    reader.data.flush()
    with pytest.raises(ExportError, match="answers equal to Hugging Face's: expected 25%"):
        verify.run(params, "pure_grit", 0)


def test_a_mismatch_fails_and_keeps_what_was_there(params, tree):
    verify.run(params, "pure_grit", 0)
    before = {f.name: f.read_bytes() for f in Path("verified/pure_grit/0").iterdir()}
    substitute(tree / "pure_grit/0", "### Response", "### Answer")
    with pytest.raises(ExportError, match=r"verified/pure_grit/0: what is served is not .*Likely cause: template"):
        verify.run(params, "pure_grit", 0)
    assert {f.name: f.read_bytes() for f in Path("verified/pure_grit/0").iterdir()} == before
    failed = Path("verified/pure_grit/0.verify-failed.json")
    assert json.loads(failed.read_text())["rows"][0]["rendered"] == 0.0
    assert sorted(p.name for p in Path("verified/pure_grit").iterdir()) == ["0", failed.name]

    substitute(tree / "pure_grit/0", "### Answer", "### Response")
    verify.run(params, "pure_grit", 0)
    assert not failed.exists()


def test_the_command_names_the_error_and_needs_no_torch(params, tree):
    Path("params.yaml").write_text(profile.compose("smoke", ROOT / "profiles"))
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.verify", "pure_grit", "0"]
    env = {"PYTHONPATH": str(ROOT), "OLLAMA_HOST": "127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "llama_cpp" in imported and not imported & {"torch", "transformers"}
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "verified": "pure_grit_model", "rows": 6, "backends": ["llama_cpp"]}  # fmt: skip

    shutil.rmtree(tree / "pure_grit")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "verify pure_grit-0: error: gguf/pure_grit/0/serving.json: no such" in done.stderr
