"""Stages called as functions, in a separate folder."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from db.files import read_json, sha256
from evaluation.tasks import Item
from export import ExportError, gguf_base
from export.engines.engine import EngineError
from pipelines import base_model, evaluate, prepare_data, profile
from pipelines.check import parse_params
from pipelines.params import ConfigError
from trainers import TrainingError
from trainers.settings import BaseReference

PIPELINE = Path(__file__).resolve().parents[2] / "dvc.yaml"


@pytest.fixture
def params(tmp_path, monkeypatch):
    raw = yaml.safe_load(profile.compose("smoke"))
    monkeypatch.chdir(tmp_path)

    def make(**sections):
        for section, changes in sections.items():
            raw[section].update(changes)
        return parse_params(raw)

    return make


@pytest.fixture
def gguf_source(exported, tmp_path, monkeypatch):
    """A GGUF file as a base, proved on the data's texts alone."""
    monkeypatch.setattr(gguf_base, "probe_texts", lambda _: [])
    return Path(shutil.copyfile(exported / "base.gguf", tmp_path / "mine.gguf"))


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "no spaces allowed/x y"])
def test_a_missing_base_path_is_refused(params, source):
    with pytest.raises(ConfigError, match=r"prepare_base\.source: .* does not exist"):
        base_model.reference_for(params(prepare_base={"source": source}).prepare_base)


def test_an_unusable_base_is_an_error_with_advice(params, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "q").mkdir()
    (tmp_path / "q/config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    for source, output in (("./empty", r"no config\.json"), ("./q", r"merge_source: missing")):
        with pytest.raises(ConfigError, match=output):
            base_model.reference_for(params(prepare_base={"source": source}).prepare_base)
    with pytest.raises(ConfigError, match="dvc repro prepare_base"):
        base_model.load_reference()


def test_a_local_base_is_referenced_and_watched(params, tmp_path, base_dir):
    from pipelines import prepare_base

    mine = tmp_path / "mine"
    shutil.copytree(base_dir, mine)
    p = params(prepare_base={"source": "./mine"})
    prepare_data.run(p)
    prepare_base.run(p)
    assert sorted(f.name for f in (tmp_path / "models/base").iterdir()) == ["base.json", "run.json"]
    reference, _ = base_model.load_reference()
    assert reference.location == "mine"
    (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
    with pytest.raises(ConfigError, match="has changed since prepare_base ran"):
        base_model.load_reference()


def test_a_gguf_base_is_unpacked_and_watched(params, gguf_source, tmp_path, monkeypatch):
    from pipelines import check, prepare_base

    monkeypatch.setattr(check, "code_hash", lambda *_, **__: "0")
    p = params(prepare_base={"source": gguf_source.name})
    check.write_code_hashes(p, PIPELINE, tmp_path / "before")
    prepare_data.run(p)
    prepare_base.run(p)
    record = read_json(tmp_path / "models/base/run.json")
    assert record["extra"]["gguf"]["source_precision"] == "F16"
    reference, fingerprint = base_model.load_reference()
    assert (reference.location, fingerprint) == ("models/base", sha256(gguf_source))
    assert not base_model.base_has_changed()
    os.utime(gguf_source, ns=(0, 0))
    check.write_code_hashes(p, PIPELINE, tmp_path / "after")
    before, after = ({f.name: f.read_text() for f in (tmp_path / n).iterdir()} for n in ("before", "after"))
    assert base_model.base_has_changed() and {n for n in after if after[n] != before[n]} == {"prepare_base"}
    gguf_source.unlink()
    assert not base_model.base_has_changed(), "the copy is all that is needed"


def test_export_refuses_a_base_whose_gguf_reads_differently(params, base_dir, tmp_path, exported, monkeypatch):
    from pipelines import export, prepare_base

    p = params(prepare_base={"source": str(base_dir)})
    prepare_data.run(p)
    prepare_base.run(p)
    vocabulary = (exported / "base.gguf").read_bytes()
    assert b"Instruction" in vocabulary
    monkeypatch.setattr(export.gguf, "save_merged", lambda *_: None)
    monkeypatch.setattr(
        export.gguf, "convert_model", lambda _, out, __: out.write_bytes(vocabulary.replace(b"nstr", b"nsrt"))
    )
    with pytest.raises(ExportError, match="Hugging Face and llama.cpp read .*Instruction.* as different tokens"):
        export.run(p, "base", 0)
    assert not (tmp_path / "gguf/base/0").exists()


def test_a_gguf_base_without_a_chat_template_is_refused_where_one_is_asked(params, gguf_source, tmp_path):
    from pipelines import prepare_base

    p = params(prepare_base={"source": gguf_source.name}, prompt={"template": "chat"})
    prepare_data.run(p)
    with pytest.raises(ExportError, match="no chat template"):
        prepare_base.run(p)
    assert not (tmp_path / "models/base").exists()


def test_a_gguf_base_takes_no_settings_of_another_kind(params):
    with pytest.raises(ConfigError) as caught:
        params(prepare_base={"source": "mine.gguf", "revision": "main", "merge_source": "org/name"})
    assert all(f"{key}: expected null with a GGUF file" in str(caught.value) for key in ("revision", "merge_source"))


def test_an_unreachable_hub_is_an_error_that_names_the_local_way():
    from trainers.models import load_tokenizer
    from trainers.settings import BaseReference

    way = "`hf download org/name --local-dir FOLDER` and set prepare_base.source to FOLDER"
    with pytest.raises(ConfigError) as caught:
        base_model.hub_model("org/name", None)
    assert "the hub cannot be reached" in str(caught.value) and way in str(caught.value)
    with pytest.raises(ConfigError, match=r"set prepare_base\.merge_source to FOLDER"):
        base_model.hub_model("org/name", None, "merge_source")
    with pytest.raises(TrainingError) as missing:
        load_tokenizer(BaseReference("org/name"))
    assert way in str(missing.value) and "\n" not in str(missing.value)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("GatedRepoError", "is gated.*`hf auth login` or set HF_TOKEN"),
        ("RepositoryNotFoundError", "the hub has no model org/name"),
        ("RevisionNotFoundError", r"has no such revision; set prepare_base\.revision"),
    ],
)
def test_errors_of_the_hub_are_explained(kind, output):
    """As transformers raises it: inside an OSError."""
    import httpx
    from huggingface_hub import errors

    from trainers.models import hub_reason

    answer = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/x"))
    try:
        try:
            raise getattr(errors, kind)("refused", response=answer)
        except errors.HfHubHTTPError as error:
            raise OSError("a long text\nof many lines") from error
    except OSError as error:
        assert re.search(output, hub_reason(error, "org/name") or "")
    assert hub_reason(OSError("a broken file"), "org/name") is None


def test_a_running_server_is_used_and_an_arm_follows_the_base(monkeypatch, capsys):
    from tests.ollama_double import OllamaDouble

    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert evaluate.choose_backend("hf") == "hf"
    assert evaluate.choose_backend("auto") == "llama_cpp"
    assert "no Ollama server at http://127.0.0.1:9" in capsys.readouterr().out
    with pytest.raises(EngineError, match=r"no server answers at http://127\.0\.0\.1:9.*OLLAMA_HOST"):
        evaluate.choose_backend("ollama")

    with pytest.raises(EngineError, match="the base was scored through Ollama, and no server answers"):
        evaluate.choose_backend("auto", "ollama")
    with OllamaDouble(reply=lambda rendered: "126") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert evaluate.choose_backend("auto", "llama_cpp") == "llama_cpp"
        assert evaluate.choose_backend("ollama", "llama_cpp") == "ollama"
        assert evaluate.choose_backend("auto") == "ollama"
    assert "Ollama 0.32" in capsys.readouterr().out


def test_names_of_served_models():
    from pipelines.stage import model_name

    assert model_name("base", 0, 3407) == "base_model"
    assert model_name("baseline_lora", 3407, 3407) == "baseline_lora_model"
    assert model_name("baseline_lora", 7, 3407) == "baseline_lora_model:seed7"


def test_questions_that_exceed_the_context_are_refused_early(tmp_path, monkeypatch, base_dir):
    from export import ExportError
    from export.modelfile import Serving
    from pipelines.export import check_room
    from trainers.models import load_tokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split, prompts in {"test": ["1 + 1", "apple " * 60], "retention": ["2 + 2"], "paraphrased": []}.items():
        lines = [json.dumps(Item("", "general", prompt, "").to_json()) for prompt in prompts]
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(lines) + "\n")
    reference = BaseReference(location=str(base_dir))
    serving = Serving(template="Q: {prompt}\n", stop=["x"], num_ctx=512)
    check_room(reference, serving, 24)
    longest = len(load_tokenizer(reference)("Q: " + "apple " * 60 + "\n")["input_ids"])
    check_room(reference, serving.model_copy(update={"num_ctx": longest + 24 + 8}), 24)
    with pytest.raises(ExportError, match=rf"24 tokens .*, got 1 of 3 .*has {longest}\).*prepare_data\.max_chars"):
        check_room(reference, serving.model_copy(update={"num_ctx": longest + 24 + 7}), 24)
